"""Adapter files in the keys of other programs: kohya's, which ComfyUI, A1111 and Forge read, beside
PEFT's, which lora.py reads and writes. Both hold the same numbers.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import lora
from inputs.adapter_file import check_alpha, check_matrices, read_tensors
from inputs.files import Refusal, data_section, safetensors_bytes, write_whole

LAYOUTS = {
    "peft": ("unet.", r"unet\..+\.lora_[AB]\.weight"),
    "kohya": ("lora_unet_", r"lora_unet_(.+)\.(lora_down\.weight|lora_up\.weight|alpha)"),
}
KINDS = {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B"}


def read(path: Path | str) -> lora.AdapterFile:
    """Read a PEFT- or kohya-keyed file, or the folder that a run wrote. The modules of a kohya file
    have underscores for dots; load() puts them right.

    Raises Refusal, naming what is wrong, for keys that are not of plain LoRA on Linear layers in
    one of the two layouts, for mixed ranks, differing alphas, and numbers that are not finite or
    not fp32, fp16 or bf16.
    """
    path = Path(path)
    path = path / lora.FILE_NAME if path.is_dir() else path
    tensors, about = read_tensors(path)
    return kohya_file(path, tensors, about) if is_kohya(path, tensors) else lora.read(path)


def is_kohya(path: Path, keys: Iterable[str]) -> bool:
    """Whether a file with these keys is a kohya file, else it is PEFT's. Raises Refusal for the
    first key that is not of the file's layout.
    """
    found = [k for k, (begin, _) in LAYOUTS.items() if any(key.startswith(begin) for key in keys)]
    layout = found[0] if found else "peft"
    for key in keys:
        if not re.fullmatch(LAYOUTS[layout][1], key):
            raise Refusal(
                f"{path} has the key {key}",
                "unet.<module>.lora_A.weight and .lora_B.weight (PEFT), or lora_unet_<module>"
                ".lora_down.weight, .lora_up.weight and .alpha (kohya), of plain LoRA on Linears",
                "convert the adapter to one of these; text-encoder, DoRA, LoHa and LoKr keys are "
                "not read",
            )
    return layout == "kohya"


def kohya_file(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> lora.AdapterFile:
    """The adapter in a kohya-keyed file's tensors. A module without .alpha has alpha = rank, as it
    does to every reader of such files.
    """
    matrices, alphas = {}, {}
    for key, tensor in tensors.items():
        module, end = re.fullmatch(LAYOUTS["kohya"][1], key).groups()
        if end == "alpha":
            alphas[module] = one_number(path, key, tensor)
        else:
            matrices[f"{module}.{KINDS[end]}"] = tensor
    rank = check_matrices(path, matrices)
    modules = {name.rpartition(".")[0] for name in matrices}
    if lonely := alphas.keys() - modules:
        raise Refusal(
            f"{path}: {min(lonely)} has an alpha and no matrix",
            "a matrix A, a matrix B and at most one alpha for each module",
            "use a whole adapter file",
        )
    found = {alphas.get(module, float(rank)) for module in modules}
    if len(found) != 1:
        raise Refusal(
            f"{path} has ranks {[rank]} and alphas {sorted(found)}",
            "one rank and one alpha for all modules",
            "use an adapter of uniform rank: diffusers reads others wrongly, too",
        )
    return lora.AdapterFile(path, matrices, rank, check_alpha(path, found.pop()), about)


def one_number(path: Path, key: str, tensor: Tensor) -> float:
    """A tensor's only number. Raises Refusal where there are several, or one that is not finite."""
    if tensor.numel() != 1 or not tensor.float().isfinite().all():
        raise Refusal(
            f"{path}: {key} holds {tensor.flatten()[:3].tolist()}",
            "finite numbers, one alpha for each module",
            "use another file",
        )
    return tensor.float().item()


def load(adapter: lora.Adapter, file: lora.AdapterFile) -> None:
    """Copy the numbers of a file in either layout into `adapter`, as strictly as lora.load()."""
    mine, matrices = adapter.matrices(), file.matrices
    if not matrices.keys() & mine.keys():
        # Which of kohya's underscores was a dot only the model knows: to_q has one of its own.
        dotted = {kohya_name(name): name for name in mine}
        matrices = {dotted.get(name, name): matrix for name, matrix in matrices.items()}
    lora.load(adapter, replace(file, matrices=matrices))


def kohya_name(name: str) -> str:
    """a.to_q.lora_A as a kohya file has it: a_to_q.lora_A."""
    module, _, kind = name.rpartition(".")
    return f"{module.replace('.', '_')}.{kind}"


def kohya_bytes(adapter: lora.Adapter, dtype: torch.dtype, about: dict[str, str]) -> bytes:
    """A safetensors file: lora_unet_<module>.lora_down.weight (r, in), .lora_up.weight (out, r) and
    .alpha (). about: what the header says besides, as for lora.peft_bytes().
    """
    tensors = {}
    for name, layer in adapter.layers.items():
        key = "lora_unet_" + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = layer.lora_A.to(dtype)
        tensors[f"{key}.lora_up.weight"] = layer.lora_B.to(dtype)
        tensors[f"{key}.alpha"] = torch.tensor(float(adapter.alpha))  # fp32: fp16 ends at 65504
    header = {
        "ss_base_model_version": "sdxl_base_v1-0",  # A1111 hides files without a sdxl_ here
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": str(float(adapter.alpha)),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": about.get("dataset", "lora"),
        "sshs_model_hash": hashlib.sha256(data_section(safetensors_bytes(tensors, {}))).hexdigest(),
    }
    same = {"rank": str(adapter.rank), "alpha": str(float(adapter.alpha))}
    return safetensors_bytes(tensors, header | same | about)


def save(
    adapter: lora.Adapter, path: Path, layout: str, dtype: torch.dtype, about: dict[str, str]
) -> None:
    """Write the adapter to `path`, whole or not at all. layout: "peft" or "kohya"; dtype:
    torch.float16 or float32; about: as for lora.peft_bytes().
    """
    write = {"peft": lora.peft_bytes, "kohya": kohya_bytes}[layout]
    write_whole(path, write(adapter, dtype, about))
