"""What an adapter's file may say. It comes from anywhere: a rank of a million would take all
memory, one NaN every picture, and a scale told by a word not understood would change it unseen.
"""

import json
import re
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
ANOTHER = "use another adapter file"
# What a file may be or hold besides plain LoRA of SDXL's UNet, told by a key with its shape.
KINDS = {
    "a LoRA of Flux": r"(single|double)_blocks|single_transformer_blocks",
    "a LoRA of Stable Diffusion 3 or Qwen-Image": r"joint_blocks|\btransformer_blocks\.\d+\.attn\.",
    "a LoRA of a transformer, such as Wan": r"^transformer\.|^(diffusion_model|lora_unet)[._]"
    r"(blocks|layers)[._]",
    "a LoRA of Stable Diffusion 1 or 2": r"(up_blocks[._]3|output_blocks[._]9).*attn2[._]to_k.* "
    r"\(\d+, (768|1024)\)",
    "a whole model, not an adapter": r"^model\.diffusion_model\.|^(first_stage|conditioner)",
    "a text encoder's LoRA": r"^lora_te|text_encoder|text_model",
    "DoRA": r"dora_scale|magnitude_vector",
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "an embedding (textual inversion)": r"^clip_[gl] |^emb_params ",
}
# Fields of PEFT's config that do not touch the numbers, and what others say when they do not.
SILENT = {"r", "lora_alpha", "task_type", "auto_mapping", "peft_version", "revision"}
SILENT |= {"base_model_name_or_path", "inference_mode", "target_modules", "exclude_modules"}
SILENT |= {"lora_dropout", "megatron_core", "qalora_group_size"}
NEUTRAL = {"peft_type": ("LORA",), "bias": ("none",)}
NEUTRAL |= {"init_lora_weights": (True, "gaussian", "orthogonal")}  # others change the base


def read_plain(path: Path) -> tuple[dict[str, Tensor], int, float, dict[str, str]]:
    """Matrices <module>.lora_A and <module>.lora_B, rank, alpha and header of a file with PEFT's
    keys. Raises Refusal for others.
    """
    tensors, about = read_tensors(path)
    check_keys(path, tensors, PEFT_KEY)
    matrices = {re.fullmatch(PEFT_KEY, key)[1]: tensor for key, tensor in tensors.items()}
    if convolutions := sorted(name for name, matrix in matrices.items() if matrix.ndim == 4):
        found = f"{path} adapts convolutions, {convolutions[0].rpartition('.')[0]} for one"
        raise Refusal(found, "Linears alone, as lora.py has them", "draw without --plain")
    rank = check_matrices(path, matrices)
    return matrices, rank, alpha_of_header(path, about.get("lora_adapter_metadata"), rank), about


def check_keys(
    path: Path, tensors: dict[str, Tensor], pattern: str, allowed: tuple[str, ...] = ()
) -> None:
    """Raise Refusal, naming the first, for keys of another model, of more than the UNet's LoRA, and
    not of the file's layout; and for none at all. allowed: those of KINDS that are read.
    """
    if not tensors:
        raise Refusal(f"{path} holds no tensors", "an adapter", ANOTHER)
    keys = {f"{key} {tuple(tensor.shape)}": key for key, tensor in tensors.items()}
    for kind, mark in KINDS.items():
        theirs = [key for shaped, key in keys.items() if re.search(mark, shaped)]
        if theirs and kind not in allowed:
            found = f"{path} holds {kind}, since it has {len(theirs)} keys such as {theirs[0]}"
            remedy = "use an adapter of SDXL's UNet alone" + ", of plain LoRA" * (not allowed)
            raise Refusal(found, "SDXL's UNet alone and nothing else", remedy)
    for key in tensors:
        if not re.fullmatch(pattern, key):
            expected = "unet.<module>.lora_A.weight and .lora_B.weight of Linears (PEFT), or "
            expected += "lora_unet_<module>.lora_down.weight, .lora_up.weight and .alpha (kohya)"
            plain = ", or draw without --plain, which reads PEFT's keys only"
            remedy = "convert the adapter" + plain * (pattern == PEFT_KEY)
            raise Refusal(f"{path} has the key {key}", expected, remedy)


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


def alpha_of_header(path: Path, config: str | None, rank: int) -> float:
    """lora_alpha of a PEFT config, as a file's header or peft's adapter_config.json has it; without
    one alpha = rank, as it is to diffusers. Raises Refusal for what would change the numbers or the
    base unseen: every field is one that is understood, or says no.
    """
    if config is None:
        return float(rank)
    found = f"{path} has an unreadable PEFT config (lora_adapter_metadata or adapter_config.json)"
    with refusing(found, 'JSON with "r" and "lora_alpha"', ANOTHER):
        said = {key.removeprefix("unet."): v for key, v in dict(json.loads(config)).items()}
    more = {key: value for key, value in said.items() if value and key not in SILENT}
    more = {key: value for key, value in more.items() if value not in NEUTRAL.get(key, ())}
    if more or said.get("r", rank) != rank:
        found = f"{path} says r {said.get('r')!r:.50}, {more}; its matrices have rank {rank}"
        expected = "plain LoRA with one rank and one alpha, beside the base as it is"
        raise Refusal(found, expected, "use an adapter without these")
    return check_alpha(path, said.get("lora_alpha"))


def check_alpha(path: Path, alpha) -> float:
    """alpha as a number. Raises Refusal for one that is no scale."""
    if type(alpha) not in (int, float) or not 0 < alpha <= 1e6:  # nan, too, is not
        expected = "an alpha above 0, at most 1e6"
        raise Refusal(f"{path} has alpha {alpha!r:.50}", expected, ANOTHER)
    return float(alpha)


def check_fits(path: Path, theirs: dict[str, Tensor], mine: dict[str, Tensor]) -> None:
    """Raise Refusal where a file's matrices are not, name by name and shape by shape, those of the
    model that they are to go into.
    """
    expected = f"exactly this model's {len(mine)} matrices"
    remedy = "use an adapter that was trained on this architecture's attention alone"
    lacking, unused = mine.keys() - theirs.keys(), theirs.keys() - mine.keys()
    besides = f"adapts {len(unused) // 2} modules besides attention's {len(mine) // 2}, such as"
    wrong = [
        (f"{path} {kind} {min(names)}", expected, remedy)
        for kind, names in ((f"lacks {len(lacking)} such as", lacking), (besides, unused))
        if names
    ]
    for name in sorted(mine.keys() & theirs.keys()):
        got, want = tuple(theirs[name].shape), tuple(mine[name].shape)
        wrong += [(f"{path}: {name} is {got}", str(want), remedy)] if got != want else []
    refuse(wrong)
