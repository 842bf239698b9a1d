"""Adapter files in the keys of other programs, beside PEFT's, which lora.py reads and writes. All
hold the same numbers. Kohya's, which ComfyUI, A1111 and Forge read, are written here as well.
"""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import lora
from adapters import foreign, kinds
from adapters.names import sgm_names, spellings
from inputs.adapter_file import UNIFORM, check_fits, check_matrices
from inputs.files import Refusal, data_section, safetensors_bytes, write_whole

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


def read(path: Path | str) -> lora.AdapterFile:
    """foreign.read() for plain LoRA: on Linear layers, of one rank and alpha. Its modules may have
    SGM's names, or underscores for dots; load() puts them right.

    Raises Refusal, naming what is wrong, for more than that, for mixed ranks, differing alphas, and
    numbers that are not finite or not fp32, fp16 or bf16.
    """
    file, matrices = foreign.read(path, plain=True), {}
    for each in file.corrections:
        matrices |= {f"{each.module}.{name}": matrix for name, matrix in each.parts.items()}
    rank, alphas = check_matrices(file.path, matrices), {each.alpha for each in file.corrections}
    if len(alphas) > 1:
        found = f"{file.path} has ranks {[rank]} and alphas {sorted(alphas)}"
        raise Refusal(found, "one rank and one alpha for all modules", UNIFORM)
    return lora.AdapterFile(file.path, matrices, rank, *alphas, file.about)


def load(adapter: lora.Adapter, file: lora.AdapterFile) -> None:
    """Copy the numbers of a file that read() gave into `adapter`, as strictly as lora.load()."""
    lora.load(adapter, replace(file, matrices=by_our_names(adapter, file)))


def by_our_names(adapter: lora.Adapter, file: lora.AdapterFile) -> dict[str, Tensor]:
    """The matrices of a file that read() gave, by the names that they have in `adapter`; those that
    are not in it by the file's. Raises Refusal for a module that is there twice.
    """
    # Which of kohya's underscores was a dot only the model knows: to_q has one of its own.
    spelt, matrices = spellings(adapter.layers), {}
    for name, matrix in file.matrices.items():
        module, _, kind = name.rpartition(".")
        matrices[f"{spelt.get(module.replace('.', '_'), module)}.{kind}"] = matrix
    if len(matrices) < len(file.matrices):
        raise foreign.twice(file.path)
    return matrices


@torch.no_grad()
def put_back(adapter: lora.Adapter, path: Path) -> None:
    """Copy what a file of save() holds into the run's `adapter`, strictly: every number of every
    layer, at the same scale.
    """
    if type(adapter) is lora.Adapter:
        return load(adapter, read(path))
    file, mine = foreign.read(path), adapter.matrices()
    names, theirs = spellings(adapter.layers, adapter.among), {}
    for c in file.corrections:
        name = names.get(c.module.replace(".", "_"), c.module)
        if not math.isclose(c.alpha / c.rank, adapter.layers[name].scale, rel_tol=1e-6):
            found = f"{path}: {name} has alpha {c.alpha:g} and rank {c.rank}"
            raise Refusal(found, f"a scale of {adapter.layers[name].scale:g}", foreign.ANOTHER)
        theirs |= {f"{name}.{key}": each for key, each in c.parts.items()}
    check_fits(path, theirs, mine)
    for name, matrix in mine.items():
        matrix.copy_(theirs[name])


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
