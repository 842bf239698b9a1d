"""Adapter files in the keys of other programs, beside PEFT's, which lora.py reads and writes. All
hold the same numbers. Kohya's, which ComfyUI, A1111 and Forge read, are written here as well.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import lora
from adapters import kinds
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
BLOCK = r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(?:(attentions|resnets)\.(\d+)|(.+samplers)\.0)\.(.+)"
# What lies in a block without attention is called otherwise there.
IN_SGM = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
IN_SGM |= {"conv_shortcut": "skip_connection"}


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
    said = config_of(path, before, about)
    alpha = alpha_of_header(path, said, rank)
    if alphas:
        modules = {name.rpartition(".")[0] for name in matrices}
        alpha = alpha_of_tensors(path, before, alphas, modules, rank)
    if len(matrices) + len(alphas) < len(tensors) or (alphas and said):
        found = f"{path} says the same twice, in two layouts"
        raise Refusal(found, "one kind of keys, and alpha in one place", WHOLE)
    return lora.AdapterFile(path, matrices, rank, alpha, about)


def config_of(path: Path, key: str, about: dict[str, str]) -> str | None:
    """PEFT's config: in the header, or, where a `key` is peft's own, in the file beside it."""
    if not key.startswith("base_model.model."):
        return about.get("lora_adapter_metadata")
    found = f"{path} has peft's own keys and no adapter_config.json beside it"
    with refusing(found, "both files of one folder", WHOLE):
        return (path.parent / "adapter_config.json").read_text()


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


def sgm_names(modules: Iterable[str], among: Iterable[str] = ()) -> dict[str, str]:
    """The modules' names in Stability's own UNet, which numbers its blocks through all levels:
    down_blocks.1.attentions.0.x is input_blocks.4.1.x. Empty unless every module lies in a block:
    to diffusers a file has one spelling or the other. among: all of the model's, where `modules`
    are few of them: a number depends on how many blocks a level has.
    """
    parts = {name: re.fullmatch(BLOCK, name) for name in modules}
    if not all(parts.values()):
        return {}
    # A level's blocks: two layers, and one that halves the size on the way down; three on the way
    # up. (The very first block is conv_in.)
    every = [*parts.values(), *(re.fullmatch(BLOCK, name) for name in among)]
    found = [part.groups() for part in every if part and part[2] and part[3]]
    level = max((int(layer) + 1 + (way == "down") for way, _, _, layer, *_ in found), default=3)
    return {name: sgm_name(level, *part.groups()) for name, part in parts.items()}


def sgm_name(
    level: int, way: str, block: str, kind: str, layer: str, sampler: str, rest: str
) -> str:
    """One of sgm_names(), from the parts of BLOCK; level: how many blocks each level has."""
    rest = IN_SGM.get(rest, rest) if kind == "resnets" else rest
    if way == "mid":  # resnet, transformer, resnet
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}.{rest}"
    first, place = level * int(block) + (way == "down"), int(kind == "attentions")
    if sampler == "downsamplers":
        return f"input_blocks.{first + level - 1}.0.op"
    if sampler:  # behind the last resnet of its level and its transformer
        return f"output_blocks.{first + level - 1}.2.{rest}"
    return f"{'input' if way == 'down' else 'output'}_blocks.{first + int(layer)}.{place}.{rest}"


# Kohya's and LyCORIS' words for what a layer of another kind learns; its other names are theirs.
ENDS = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}
ENDS |= {"lora_magnitude_vector": "dora_scale"}


def kohya_bytes(adapter: lora.Adapter, dtype: torch.dtype, about: dict[str, str]) -> bytes:
    """A safetensors file: lora_unet_<module>.lora_down.weight (r, in), .lora_up.weight (out, r) and
    .alpha (), under SGM's names, which kohya's own programs need and all others read as well; of
    other kinds what they learn, by LyCORIS' names. about: what the header says besides, as for
    lora.peft_bytes().
    """
    tensors, kind = {}, kinds.kind_of(adapter)
    sgm = sgm_names(adapter.layers, getattr(adapter, "among", ()))
    for name, layer in adapter.layers.items():
        key = "lora_unet_" + sgm.get(name, name).replace(".", "_")
        for own in kinds.keys(layer):
            tensor = getattr(layer, own).to(dtype)
            tensor = tensor[:, None] if tensor.ndim == 1 else tensor  # (out, 1), as LyCORIS has it
            tensors[f"{key}.{ENDS.get(own, own)}"] = tensor
        # fp32: fp16 ends at 65504
        tensors[f"{key}.alpha"] = torch.tensor(float(getattr(layer, "alpha", adapter.alpha)))
    header = {
        "ss_base_model_version": "sdxl_base_v1-0",  # A1111 hides files without a sdxl_ here
        "ss_network_module": "networks.lora" if kind in ("lora", "dora") else "lycoris.kohya",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": str(float(adapter.alpha)),
        "modelspec.title": about.get("dataset", "lora"),
        "sshs_model_hash": hashlib.sha256(data_section(safetensors_bytes(tensors, {}))).hexdigest(),
    }
    if kind in ("loha", "lokr"):  # by which LyCORIS itself knows it
        header["ss_network_args"] = json.dumps({"algo": kind})
    same = {"rank": str(adapter.rank), "alpha": str(float(adapter.alpha))}
    return safetensors_bytes(tensors, header | MODELSPEC | same | about)


def peft_bytes(adapter: lora.Adapter, dtype: torch.dtype, about: dict[str, str]) -> bytes:
    """lora.peft_bytes(), with the layers' other ranks in the header, and DoRA's magnitudes. Of LoHa
    and LoKr, for which diffusers has no names, LyCORIS' file.
    """
    kind, ranks = kinds.kind_of(adapter), getattr(adapter, "ranks", {})
    if kind in ("loha", "lokr"):
        return kohya_bytes(adapter, dtype, about)
    if kind == "lora" and not ranks:
        return lora.peft_bytes(adapter, dtype, about)
    tensors = {f"unet.{name}.weight": each.to(dtype) for name, each in adapter.matrices().items()}
    tensors = {key.replace("vector.weight", "vector"): each for key, each in tensors.items()}
    config = {"r": adapter.rank, "lora_alpha": adapter.alpha, "rank_pattern": ranks}
    config |= {"target_modules": sorted(adapter.targets), "use_dora": kind == "dora"}
    config = json.dumps({f"unet.{key}": value for key, value in config.items()})
    header = {"format": "pt", "lora_adapter_metadata": config}
    header |= {"rank": str(adapter.rank), "alpha": str(float(adapter.alpha))}
    return safetensors_bytes(tensors, header | about)


BYTES = {"peft": peft_bytes, "kohya": kohya_bytes}


def save(
    adapter: lora.Adapter, path: Path, layout: str, dtype: torch.dtype, about: dict[str, str]
) -> None:
    """Write the adapter to `path`, whole or not at all. layout: "peft" or "kohya"; dtype:
    torch.float16 or float32; about: as for lora.peft_bytes().
    """
    write_whole(path, BYTES[layout](adapter, dtype, about))
