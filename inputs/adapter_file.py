"""What an adapter's file may say. It comes from anywhere: a rank of a million would take all
memory, one NaN every picture, and a scale told by a word not understood would change it unseen.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from inputs.files import Refusal, first_line, read_tensors, require

# SDXL's narrowest adapted layer: a higher rank can say nothing more.
MAX_RANK = 640
NUMBERS = (torch.float32, torch.float16, torch.bfloat16)
PEFT_KEY = r"unet\.(.+\.lora_[AB])\.weight"
WHOLE = "use a whole adapter file that is not quantised"


def read_plain(path: Path) -> tuple[dict[str, Tensor], int, float, dict[str, str]]:
    """Matrices <module>.lora_A and <module>.lora_B, rank, alpha and header of a file with PEFT's
    keys. Raises Refusal for others.
    """
    tensors, about = read_tensors(path)
    check_keys(path, tensors, PEFT_KEY)
    matrices = {re.fullmatch(PEFT_KEY, key)[1]: tensor for key, tensor in tensors.items()}
    rank = check_matrices(path, matrices)
    return matrices, rank, alpha_of_header(path, about, rank), about


def check_keys(path: Path, keys: Iterable[str], pattern: str) -> None:
    """Raise Refusal, naming the first, for keys that are not of the file's layout."""
    for key in keys:
        require(
            bool(re.fullmatch(pattern, key)),
            f"{path} has the key {key}",
            "unet.<module>.lora_A.weight and .lora_B.weight (PEFT), or lora_unet_<module>"
            ".lora_down.weight, .lora_up.weight and .alpha (kohya), of plain LoRA on Linears",
            "draw without --plain, which reads PEFT's keys only, or convert the adapter; "
            "text-encoder, DoRA, LoHa and LoKr keys are not read",
        )


def check_matrices(path: Path, matrices: dict[str, Tensor]) -> int:
    """The one rank of <module>.lora_A (r, in) and <module>.lora_B (out, r). Raises Refusal where
    one stands alone, for numbers that are not finite or not fp32, fp16 or bf16, and other ranks.
    """
    ranks = set()
    for name, tensor in matrices.items():
        twin = name[:-1] + ("B" if name.endswith("A") else "A")
        if twin not in matrices:
            trouble = f"stands alone, without {twin}"
        elif tensor.ndim != 2:
            trouble = f"is {[*tensor.shape]}"
        elif tensor.dtype not in NUMBERS:
            trouble = f"holds {str(tensor.dtype)[6:]}"
        else:
            trouble = "" if tensor.float().isfinite().all() else "holds NaN or Inf"
        expected = "a matrix A and a matrix B of finite numbers (fp32, fp16, bf16) for each module"
        require(not trouble, f"{path}: {name} {trouble}", expected, WHOLE)
        ranks.add(tensor.shape[0 if name.endswith("A") else 1])
    require(
        len(ranks) == 1 and 1 <= max(ranks) <= MAX_RANK,
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
        said = dict(json.loads(about["lora_adapter_metadata"]))
    except (ValueError, TypeError, RecursionError) as error:
        raise Refusal(
            f"{path} has an unreadable lora_adapter_metadata ({first_line(error)})",
            'JSON with "unet.r" and "unet.lora_alpha"',
            WHOLE,
        ) from error
    others = ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora")
    more = {name: said[f"unet.{name}"] for name in others if said.get(f"unet.{name}")}
    require(
        not more and said.get("unet.r", rank) == rank,
        f"{path} says r {said.get('unet.r')!r:.50} and {more}, and its matrices have rank {rank}",
        "plain LoRA with one rank and one alpha",
        "use an adapter without more",
    )
    return check_alpha(path, said.get("unet.lora_alpha", said.get("unet.r")))


def check_alpha(path: Path, alpha) -> float:
    """alpha as a number. Raises Refusal for one that is no scale."""
    require(
        type(alpha) in (int, float) and 0 < alpha <= 1e6,  # False for nan, too
        f"{path} has alpha {alpha!r:.50}",
        "an alpha above 0, at most 1e6",
        "use another adapter file",
    )
    return float(alpha)


def check_fits(path: Path, theirs: dict[str, Tensor], mine: dict[str, Tensor]) -> None:
    """Raise Refusal where a file's matrices are not, name by name and shape by shape, those of the
    model that they are to go into.
    """
    remedy = "use an adapter that was trained on this architecture with these targets"
    for kind, names in (
        ("lacks", mine.keys() - theirs.keys()),
        ("has, unused,", theirs.keys() - mine.keys()),
    ):
        found = f"{path} {kind} {len(names)} such as {min(names, default='')}"
        require(not names, found, f"exactly this model's {len(mine)} matrices", remedy)
    for name, matrix in mine.items():
        got, want = tuple(theirs[name].shape), tuple(matrix.shape)
        require(got == want, f"{path}: {name} is {got}", f"{want}", remedy)
