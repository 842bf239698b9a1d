"""What an adapter's file may say. It comes from anywhere: a rank of a million would take all
memory, one NaN every picture, and a scale told by a word not understood would change it unseen.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from inputs.files import Refusal, read_tensors, refuse, refusing

# SDXL's narrowest adapted layer: a higher rank can say nothing more.
MAX_RANK = 640
NUMBERS = (torch.float32, torch.float16, torch.bfloat16)
PEFT_KEY = r"unet\.(.+\.lora_[AB])\.weight"
UNIFORM = "use an adapter of uniform rank: diffusers reads others wrongly, too"
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
        if not re.fullmatch(pattern, key):
            raise Refusal(
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
    expected = "a matrix A and a matrix B of finite numbers (fp32, fp16, bf16) for each module"
    wrong = {name: what_is_wrong(name, matrices) for name in matrices}
    refuse((f"{path}: {name} {what}", expected, WHOLE) for name, what in wrong.items() if what)
    ranks = {tensor.shape[0 if name.endswith("A") else 1] for name, tensor in matrices.items()}
    if len(ranks) != 1 or not 1 <= max(ranks) <= MAX_RANK:
        expected = f"one rank for all modules, 1 to {MAX_RANK}"
        raise Refusal(f"{path} has ranks {sorted(ranks)}", expected, UNIFORM)
    return ranks.pop()


def what_is_wrong(name: str, matrices: dict[str, Tensor]) -> str:
    """In words, "" where the matrix is well."""
    matrix, twin = matrices[name], name[:-1] + ("B" if name.endswith("A") else "A")
    if twin not in matrices:
        return f"stands alone, without {twin}"
    if matrix.ndim != 2:
        return f"is {[*matrix.shape]}"
    if matrix.dtype not in NUMBERS:
        return f"holds {str(matrix.dtype)[6:]}"
    return "" if matrix.float().isfinite().all() else "holds NaN or Inf"


def alpha_of_header(path: Path, about: dict[str, str], rank: int) -> float:
    """lora_alpha of a PEFT file's header; without one alpha = rank, as it is to diffusers. Raises
    Refusal for what would change the scale unseen.
    """
    if "lora_adapter_metadata" not in about:
        return float(rank)
    found = f"{path} has an unreadable lora_adapter_metadata"
    with refusing(found, 'JSON with "unet.r" and "unet.lora_alpha"', WHOLE):
        said = dict(json.loads(about["lora_adapter_metadata"]))
    others = ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora")
    more = {name: said[f"unet.{name}"] for name in others if said.get(f"unet.{name}")}
    if more or said.get("unet.r", rank) != rank:
        found = f"{path} says r {said.get('unet.r')!r:.50}, {more}; its matrices have rank {rank}"
        expected = "plain LoRA with one rank and one alpha"
        raise Refusal(found, expected, "use an adapter without more")
    return check_alpha(path, said.get("unet.lora_alpha", said.get("unet.r")))


def check_alpha(path: Path, alpha) -> float:
    """alpha as a number. Raises Refusal for one that is no scale."""
    if type(alpha) not in (int, float) or not 0 < alpha <= 1e6:  # nan, too, is not
        expected = "an alpha above 0, at most 1e6"
        raise Refusal(f"{path} has alpha {alpha!r:.50}", expected, "use another adapter file")
    return float(alpha)


def check_fits(path: Path, theirs: dict[str, Tensor], mine: dict[str, Tensor]) -> None:
    """Raise Refusal where a file's matrices are not, name by name and shape by shape, those of the
    model that they are to go into.
    """
    expected = f"exactly this model's {len(mine)} matrices"
    remedy = "use an adapter that was trained on this architecture with these targets"
    lacking, unused = mine.keys() - theirs.keys(), theirs.keys() - mine.keys()
    refuse(
        (f"{path} {kind} {len(names)} such as {min(names)}", expected, remedy)
        for kind, names in (("lacks", lacking), ("has, unused,", unused))
        if names
    )
    shapes = [(name, tuple(theirs[name].shape), tuple(mine[name].shape)) for name in mine]
    refuse(
        (f"{path}: {name} is {got}", f"{want}", remedy) for name, got, want in shapes if got != want
    )
