"""Adapter files in the keys of other programs: kohya's, which ComfyUI, A1111 and Forge read, beside
PEFT's, which lora.py reads and writes. Both hold the same numbers.
"""

import hashlib
import math
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import lora
from inputs.adapter_file import UNIFORM, WHOLE, check_alpha, check_keys, check_matrices
from inputs.files import Refusal, data_section, read_tensors, refuse, safetensors_bytes, write_whole

KOHYA_KEY = r"lora_unet_(.+)\.(lora_down\.weight|lora_up\.weight|alpha)"
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
    kohya = [key for key in tensors if key.startswith("lora_unet_")]
    if not kohya or any(key.startswith("unet.") for key in tensors):
        return lora.read(path)
    return kohya_file(path, tensors, about)


def kohya_file(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> lora.AdapterFile:
    """The adapter in a kohya-keyed file's tensors. A module without .alpha has alpha = rank, as it
    does to every reader of such files.
    """
    check_keys(path, tensors, KOHYA_KEY)
    matrices, alphas = {}, {}
    for key, tensor in tensors.items():
        module, end = re.fullmatch(KOHYA_KEY, key).groups()
        if end in KINDS:
            matrices[f"{module}.{KINDS[end]}"] = tensor
        else:
            alphas[module] = tensor.flatten().tolist()
    modules = {name.rpartition(".")[0] for name in matrices}
    expected = "a matrix A, a matrix B and at most one alpha of finite numbers for each module"
    refuse(
        (f"{path}: lora_unet_{module}.alpha holds {numbers[:3]}", expected, WHOLE)
        for module, numbers in alphas.items()
        if module not in modules or len(numbers) != 1 or not math.isfinite(numbers[0])
    )
    rank = check_matrices(path, matrices)
    different = {alphas.get(module, [float(rank)])[0] for module in modules}
    if len(different) != 1:
        found = f"{path} has ranks {[rank]} and alphas {sorted(different)}"
        raise Refusal(found, "one rank and one alpha for all modules", UNIFORM)
    return lora.AdapterFile(path, matrices, rank, check_alpha(path, different.pop()), about)


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
