"""Adapter files in the keys of other programs, beside PEFT's, which lora.py reads and writes. All
hold the same numbers. Kohya's, which ComfyUI, A1111 and Forge read, are written here as well.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import lora
from inputs.adapter_file import WHOLE, alpha_of_header, alpha_of_tensors, check_keys, check_matrices
from inputs.drawing import find_adapter
from inputs.files import (
    Refusal,
    data_section,
    read_tensors,
    refusing,
    safetensors_bytes,
    write_whole,
)

# What a module's name follows in the keys of kohya, diffusers, ComfyUI, peft, and of a bare UNet.
BEFORE = r"lora_unet_|unet\.|diffusion_model\.|base_model\.model\.|"
KINDS = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}  # PEFT's
KINDS |= {"lora.down.weight": "lora_A", "lora.up.weight": "lora_B"}  # diffusers' training scripts'
KINDS |= {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B"}  # kohya's
# What an SDXL LoRA says of itself, by https://github.com/Stability-AI/ModelSpec, in sd-scripts'
# words, which are the same for every kind of noise:
# https://github.com/kohya-ss/sd-scripts/blob/10bfcb9a/library/sai_model_spec.py
# (determine_architecture, determine_implementation). Not written: kohya's ss_v2, by which A1111
# tells SD 2 where it is True, after our ss_base_model_version has told SDXL
# (extensions-builtin/Lora/network.py at 0a0efa3f, detect_version), and ss_v_parameterization, which
# neither A1111's nor Forge's network.py (at 6f2171a1) reads.
MODELSPEC = {
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
}
BLOCK = r"(down|mid|up)_blocks?\.(?:(\d+)\.)?attentions\.(\d+)\.(.+)"


def read(path: Path | str) -> lora.AdapterFile:
    """Read a file in the keys of any of these programs, or the one in a folder. Its modules may
    have SGM's names, or underscores for dots; load() puts them right. alpha is what the file's
    .alpha tensors, its header or peft's adapter_config.json say, else the rank, as it is to every
    reader of such files.

    Raises Refusal, naming what is wrong, for keys that are not of plain LoRA on Linear layers in
    one layout, for mixed ranks, differing alphas, and numbers that are not finite or not fp32, fp16
    or bf16.
    """
    path = find_adapter(path)
    tensors, about = read_tensors(path)
    before = Counter(re.match(BEFORE, key)[0] for key in tensors).most_common(1)
    before = before[0][0] if before else ""
    ends = "|".join(map(re.escape, [*KINDS, "alpha"]))
    key_like = rf"{re.escape(before)}((?!{BEFORE[:-1]}).+)\.({ends})"
    check_keys(path, tensors, key_like)
    matrices, alphas = {}, {}
    for key, tensor in tensors.items():
        module, end = re.fullmatch(key_like, key).groups()
        if end == "alpha":
            alphas[module] = tensor.flatten().tolist()
        else:
            matrices[f"{module}.{KINDS[end]}"] = tensor
    rank = check_matrices(path, matrices)
    said = about.get("lora_adapter_metadata")
    if before == "base_model.model.":
        found = f"{path} has peft's own keys and no adapter_config.json beside it"
        with refusing(found, "both files of one folder", WHOLE):
            said = (path.parent / "adapter_config.json").read_text()
    alpha = alpha_of_header(path, said, rank)
    if alphas:
        modules = {name.rpartition(".")[0] for name in matrices}
        alpha = alpha_of_tensors(path, before, alphas, modules, rank)
    if len(matrices) + len(alphas) < len(tensors) or (alphas and said):
        found = f"{path} says the same twice, in two layouts"
        raise Refusal(found, "one kind of keys, and alpha in one place", WHOLE)
    return lora.AdapterFile(path, matrices, rank, alpha, about)


def load(adapter: lora.Adapter, file: lora.AdapterFile) -> None:
    """Copy the numbers of a file that read() gave into `adapter`, as strictly as lora.load()."""
    lora.load(adapter, replace(file, matrices=by_our_names(adapter, file)))


def by_our_names(adapter: lora.Adapter, file: lora.AdapterFile) -> dict[str, Tensor]:
    """The matrices of a file that read() gave, by the names that they have in `adapter`; those that
    are not in it by the file's. Raises Refusal for a module that is there twice.
    """
    sgm, spelt, matrices = sgm_names(adapter.layers), {}, {}
    for name in adapter.layers:
        # Which of kohya's underscores was a dot only the model knows: to_q has one of its own.
        spelt |= {each.replace(".", "_"): name for each in (name, sgm.get(name, name))}
    for name, matrix in file.matrices.items():
        module, _, kind = name.rpartition(".")
        matrices[f"{spelt.get(module.replace('.', '_'), module)}.{kind}"] = matrix
    if len(matrices) < len(file.matrices):
        found = f"{file.path} has some modules twice, under SGM's names and under diffusers'"
        raise Refusal(found, "every module once", WHOLE)
    return matrices


def sgm_names(modules: Iterable[str]) -> dict[str, str]:
    """The modules' names in Stability's own UNet, which numbers its blocks through all levels:
    down_blocks.1.attentions.0.x is input_blocks.4.1.x. Empty unless every module lies in a block
    with attention: to diffusers a file has one spelling or the other.
    """
    parts = {name: re.fullmatch(BLOCK, name) for name in modules}
    if not all(parts.values()):
        return {}
    # A level's blocks: two layers, and one that halves the size on the way down; three on the way
    # up. (The very first block is conv_in.)
    found = [part.groups() for part in parts.values() if part[2]]
    level = max((int(layer) + 1 + (way == "down") for way, _, layer, _ in found), default=0)
    names = {"mid": "middle_block.1.{1}"}
    names |= {"down": "input_blocks.{0}.1.{1}", "up": "output_blocks.{0}.1.{1}"}
    return {
        name: names[part[1]].format(
            level * int(part[2] or 0) + int(part[3]) + (part[1] == "down"), part[4]
        )
        for name, part in parts.items()
    }


def kohya_bytes(adapter: lora.Adapter, dtype: torch.dtype, about: dict[str, str]) -> bytes:
    """A safetensors file: lora_unet_<module>.lora_down.weight (r, in), .lora_up.weight (out, r) and
    .alpha (), under SGM's names, which kohya's own programs need and all others read as well.
    about: what the header says besides, as for lora.peft_bytes().
    """
    tensors, sgm = {}, sgm_names(adapter.layers)
    for name, layer in adapter.layers.items():
        key = "lora_unet_" + sgm.get(name, name).replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = layer.lora_A.to(dtype)
        tensors[f"{key}.lora_up.weight"] = layer.lora_B.to(dtype)
        tensors[f"{key}.alpha"] = torch.tensor(float(adapter.alpha))  # fp32: fp16 ends at 65504
    header = {
        "ss_base_model_version": "sdxl_base_v1-0",  # A1111 hides files without a sdxl_ here
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": str(float(adapter.alpha)),
        "modelspec.title": about.get("dataset", "lora"),
        "sshs_model_hash": hashlib.sha256(data_section(safetensors_bytes(tensors, {}))).hexdigest(),
    }
    same = {"rank": str(adapter.rank), "alpha": str(float(adapter.alpha))}
    return safetensors_bytes(tensors, header | MODELSPEC | same | about)


def save(
    adapter: lora.Adapter, path: Path, layout: str, dtype: torch.dtype, about: dict[str, str]
) -> None:
    """Write the adapter to `path`, whole or not at all. layout: "peft" or "kohya"; dtype:
    torch.float16 or float32; about: as for lora.peft_bytes().
    """
    write = {"peft": lora.peft_bytes, "kohya": kohya_bytes}[layout]
    write_whole(path, write(adapter, dtype, about))
