"""What an adapter's file may say. It comes from anywhere: a rank of a million would take all
memory, one NaN every picture, and a scale told by a word not understood would change it unseen.
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from inputs.files import Refusal, first_line, open_safetensors

# SDXL's narrowest adapted layer: a higher rank can say nothing more.
MAX_RANK = 640
NUMBERS = (torch.float32, torch.float16, torch.bfloat16)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors, sorted by name, and its header."""
    with open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in sorted(file.keys())}, file.metadata() or {}


def read_plain(path: Path) -> tuple[dict[str, Tensor], int, float, dict[str, str]]:
    """Matrices, rank, alpha and header of a file with PEFT's keys. Raises Refusal for others."""
    tensors, about = read_tensors(path)
    matrices = plain_matrices(path, tensors)
    rank = check_matrices(path, matrices)
    return matrices, rank, alpha_of_header(path, about, rank), about


def plain_matrices(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """<module>.lora_A and <module>.lora_B of a file with PEFT's keys. Raises Refusal for others."""
    matrices = {}
    for key, tensor in tensors.items():
        if not re.fullmatch(r"unet\..+\.lora_[AB]\.weight", key):
            raise Refusal(
                f"{path} has the key {key}",
                "unet.<module>.lora_A.weight and .lora_B.weight, of plain LoRA on Linears",
                "draw without --plain, which reads kohya's keys, too, or convert the adapter; "
                "text-encoder, DoRA, LoHa and LoKr keys are not read",
            )
        matrices[key.removeprefix("unet.").removesuffix(".weight")] = tensor
    return matrices


def check_matrices(path: Path, matrices: dict[str, Tensor]) -> int:
    """The one rank of <module>.lora_A (r, in) and <module>.lora_B (out, r). Raises Refusal where
    one stands alone, for numbers that are not finite or not fp32, fp16 or bf16, and other ranks.
    """
    ranks = set()
    for name, tensor in matrices.items():
        twin = name[:-1] + ("B" if name.endswith("A") else "A")
        if tensor.ndim != 2 or twin not in matrices:
            raise Refusal(
                f"{path}: {name} is {[*tensor.shape]}"
                + ("" if twin in matrices else f", and {twin} is not there"),
                "a matrix A and a matrix B for each module",
                "use a whole adapter file",
            )
        if tensor.dtype not in NUMBERS:
            found = str(tensor.dtype).removeprefix("torch.")
            raise Refusal(
                f"{path}: {name} holds {found}",
                "fp32, fp16 or bf16",
                "use a file that is not quantised",
            )
        if not tensor.float().isfinite().all():
            raise Refusal(f"{path}: {name} holds NaN or Inf", "finite numbers", "use another file")
        ranks.add(tensor.shape[0 if name.endswith("A") else 1])
    if len(ranks) != 1 or not 1 <= max(ranks) <= MAX_RANK:
        raise Refusal(
            f"{path} has ranks {sorted(ranks)}",
            f"one rank for all modules, 1 to {MAX_RANK}",
            "use an adapter of uniform rank: diffusers reads others wrongly, too",
        )
    return ranks.pop()


def alpha_of_header(path: Path, about: dict[str, str], rank: int) -> float:
    """lora_alpha of a PEFT file's header; without one alpha = rank, as it is to diffusers. Raises
    Refusal for what would change the scale unseen.
    """
    if "lora_adapter_metadata" not in about:
        return float(rank)
    try:
        header = json.loads(about["lora_adapter_metadata"])
        alpha = header.get("unet.lora_alpha", header.get("unet.r"))
        if type(alpha) not in (int, float):
            raise TypeError(f"unet.lora_alpha is {alpha!r:.50}")
        if header.get("unet.r", rank) != rank:
            raise ValueError(f"unet.r is {header['unet.r']!r:.50}, and the matrices' rank {rank}")
        alpha = float(alpha)
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise Refusal(
            f"{path} has an unreadable lora_adapter_metadata ({first_line(error)})",
            'JSON with "unet.r" and "unet.lora_alpha"',
            "use a whole adapter file",
        ) from error
    for name in ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora"):
        if header.get(f"unet.{name}"):
            raise Refusal(
                f"{path} has {name} {header[f'unet.{name}']}",
                "plain LoRA with one rank and one alpha",
                "use an adapter without it",
            )
    return check_alpha(path, alpha)


def check_alpha(path: Path, alpha: float) -> float:
    """alpha itself. Raises Refusal for one that is no scale."""
    if not 0 < alpha <= 1e6:  # False for nan, too
        raise Refusal(
            f"{path} has alpha {alpha:g}",
            "an alpha above 0, at most 1e6",
            "use another adapter file",
        )
    return alpha


def check_fits(path: Path, theirs: dict[str, Tensor], mine: dict[str, Tensor]) -> None:
    """Raise Refusal where a file's matrices are not, name by name and shape by shape, those of the
    model that they are to go into.
    """
    expected = f"exactly this model's {len(mine)} matrices"
    remedy = "use an adapter that was trained on this architecture with these targets"
    for kind, names in (
        ("lacks", mine.keys() - theirs.keys()),
        ("has, unused,", theirs.keys() - mine.keys()),
    ):
        if names:
            raise Refusal(f"{path} {kind} {len(names)} such as {min(names)}", expected, remedy)
    for name, matrix in mine.items():
        if theirs[name].shape != matrix.shape:
            found = f"{path}: {name} is {tuple(theirs[name].shape)}"
            raise Refusal(found, f"{tuple(matrix.shape)}", remedy)
