"""The adapter: low-rank corrections to frozen Linear layers, kept in one vector.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1) leaves a pretrained weight W as
it is and learns a correction of rank r beside it: W x + (alpha / r) B A x, with A (r, in) and B
(out, r).

Every A and B of the model is a slice of one flat fp32 vector, and every gradient a slice of one
flat gradient. The optimizer therefore has a single parameter, clipping is one norm and a checkpoint
one tensor.

Letters: `r` rank, `N` numbers in the flat vector (padding included).
"""

import contextlib
import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inputs.files import (
    Refusal,
    data_section,
    first_line,
    open_safetensors,
    safetensors_bytes,
    write_whole,
)

# The attention projections, as published runs adapt them.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
# SDXL's narrowest adapted layer: a higher rank can say nothing more, and a file that claims a
# million would take all memory.
MAX_RANK = 640
# What diffusers' load_lora_weights(folder) looks for.
FILE_NAME = "pytorch_lora_weights.safetensors"

# bitsandbytes quantises optimizer state in blocks of 256 numbers. Starting every matrix at a
# multiple of that keeps a block from straddling two matrices, so the flat vector steps as separate
# tensors would. (Its 8-bit zero is not quite zero, so padding drifts. The model never reads it.)
BLOCK = 256


class LoRALinear(nn.Module):
    """A frozen Linear with a trainable low-rank branch beside it.

    base: nn.Linear or a bitsandbytes Linear (its packed weight has another shape: sizes are the
    layer's own). lora_A (r, in) and lora_B (out, r): fp32 Parameters, views of the adapter's flat
    vector.
    """

    def __init__(self, base: nn.Module, lora_A: nn.Parameter, lora_B: nn.Parameter, alpha: float):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A, self.lora_B = lora_A, lora_B
        self.used = (lora_A, lora_B)  # what forward() reads: these, or their cast (cast_once)
        self.scale = alpha / lora_A.shape[0]
        self.strength = 1.0
        self.unmerged: Tensor | None = None  # while merged: base.weight as it was

    def down(self, x: Tensor) -> Tensor:
        # in x's dtype: the small matrix is cast, so that no fp32 copy of x is kept for backward
        return F.linear(x, self.used[0].to(x.dtype))  # (..., in) -> (..., r)

    def up(self, h: Tensor) -> Tensor:
        return F.linear(h, self.used[1].to(h.dtype))  # (..., r) -> (..., out)

    def forward(self, x: Tensor) -> Tensor:
        if self.strength == 0 or self.unmerged is not None:  # bit for bit the base layer
            return self.base(x)
        scale = self.strength * self.scale
        return self.base(x) + scale * self.up(self.down(x))  # (..., in) -> (..., out)


@dataclass
class Adapter:
    """All low-rank branches of one model.

    flat: (N,) fp32 Parameter: all A, then all B, each padded to BLOCK numbers; flat.grad likewise.
    trainable: how many of the N are not padding.
    """

    layers: dict[str, LoRALinear]
    flat: nn.Parameter
    rank: int
    alpha: float
    targets: tuple[str, ...]
    trainable: int

    def parts(self) -> list[tuple[str, nn.Parameter]]:
        """Every matrix with its name, in the order of the flat vector."""
        return [(f"{name}.lora_A", layer.lora_A) for name, layer in self.layers.items()] + [
            (f"{name}.lora_B", layer.lora_B) for name, layer in self.layers.items()
        ]

    @contextlib.contextmanager
    def cast_once(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Inside, every layer reads its A and B from one cast of the flat vector, which is given:
        (N,) in `dtype`, a leaf whose gradient is that of all A and B.

        One cast, and one concatenation in the backward pass, for 1,120 small casts and 1,120 small
        additions. split() and not slices: the gradient of a slice is a vector of the whole size.
        """
        cast = self.flat.detach().to(dtype).requires_grad_()
        counts = [matrix.numel() for _, matrix in self.parts()]
        sizes = [size for count in counts for size in (count, padded(count) - count)]
        matrices = [
            part.view(matrix.shape)
            for part, (_, matrix) in zip(cast.split(sizes)[::2], self.parts(), strict=True)
        ]
        half = len(matrices) // 2
        for layer, A, B in zip(self.layers.values(), matrices[:half], matrices[half:], strict=True):
            layer.used = (A, B)
        try:
            yield cast
        finally:
            for layer in self.layers.values():
                layer.used = (layer.lora_A, layer.lora_B)

    def check_tied(self) -> None:
        """Assert that every A, B and gradient still lives in the flat vectors.

        `model.to(dtype)`, `copy.deepcopy(model)` and `model.zero_grad()` untie them without a word:
        the optimizer would then step a vector that the model no longer reads.
        """
        at = 0
        for name, matrix in self.parts():
            for kind, part, whole in (
                ("", matrix, self.flat),
                (".grad", matrix.grad, self.flat.grad),
            ):
                there = part is not None and whole is not None and part.dtype == torch.float32
                if not there or part.data_ptr() != whole.data_ptr() + 4 * at:
                    raise Refusal(
                        f"{name}{kind} no longer lives in the adapter's flat vector",
                        "views of one fp32 vector",
                        "call inject() after the model has its device and dtype; clear gradients "
                        "with "
                        "adapter.flat.grad.zero_(), never model.zero_grad()",
                    )
            at += padded(matrix.numel())


def padded(count: int) -> int:
    """`count` rounded up to a multiple of BLOCK."""
    return -(-count // BLOCK) * BLOCK


def find_targets(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """The Linear layers of `model` whose dotted name is, or ends in, one of `targets`, by name.

    Raises Refusal where none matches, where one is no Linear, or where the model has an adapter
    already.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise Refusal(
            "a model that has an adapter already",
            "a bare model",
            "load the model again, then inject()",
        )
    found = {
        name: module
        for name, module in model.named_modules()
        if any(f".{name}".endswith(f".{target}") for target in targets)
    }
    wrong = [name for name, module in found.items() if not hasattr(module, "in_features")]
    if wrong or not found:
        raise Refusal(
            f"targets {', '.join(targets)} match "
            f"{f'{wrong[0]}, which is no Linear' if wrong else 'no layer'}",
            "names that Linear layers end in, such as " + ", ".join(TARGETS),
            "correct the targets",
        )
    return found


def inject(
    model: nn.Module,
    targets: tuple[str, ...] = TARGETS,
    rank: int = 16,
    alpha: float = 32,
    seed: int = 0,
) -> Adapter:
    """Freeze `model`, replace each target Linear in place by a LoRALinear, and return the adapter.

    Call it once the model has its device and dtype: moving or casting afterwards unties the flat
    vector. A: Kaiming uniform with a = sqrt(5), PEFT's default, seeded by name so that it depends
    on no order; B: zero, so that the adapted model starts out equal to the bare one. Raises Refusal
    for a rank below 1 and as find_targets() does.
    """
    if rank < 1:
        raise Refusal(f"lora_rank {rank}", "at least 1", "--lora-rank 16")
    bases = find_targets(model, tuple(targets))
    model.requires_grad_(False)
    shapes = [(rank, base.in_features) for base in bases.values()]
    shapes += [(base.out_features, rank) for base in bases.values()]
    size = sum(padded(rows * columns) for rows, columns in shapes)
    device = next(next(iter(bases.values())).parameters()).device
    flat = torch.zeros(size, dtype=torch.float32, device=device)
    grad = torch.zeros_like(flat)

    matrices, at = [], 0
    for rows, columns in shapes:
        here = slice(at, at + rows * columns)
        matrix = nn.Parameter(flat[here].view(rows, columns))
        matrix.grad = grad[here].view(rows, columns)  # backward accumulates into it, in place
        matrices.append(matrix)
        at += padded(rows * columns)

    layers = {}
    for i, (name, base) in enumerate(bases.items()):
        lora_A, lora_B = matrices[i], matrices[len(bases) + i]
        # One crc32 over the name, started at the seed: torch's CPU generator uses only 32 bits of
        # its seed.
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
        start = nn.init.kaiming_uniform_(
            torch.empty(lora_A.shape), a=math.sqrt(5), generator=generator
        )
        lora_A.data.copy_(start)
        layers[name] = LoRALinear(base, lora_A, lora_B, alpha)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[name])

    whole = nn.Parameter(flat)
    whole.grad = grad
    return Adapter(layers, whole, rank, alpha, tuple(targets), sum(r * c for r, c in shapes))


def set_strength(adapter: Adapter, strength: float) -> None:
    """How much of the adapter acts: 0 is the bare model, bit for bit; 1 the trained one."""
    if not math.isfinite(strength):
        raise Refusal(f"strength {strength}", "a number, usually 0 to 1", "--strength 1")
    refuse_merged(adapter)
    for layer in adapter.layers.values():
        layer.strength = strength


def refuse_merged(adapter: Adapter) -> None:
    """What is merged acts through the base's weights: another strength or other numbers would not
    be seen.
    """
    if any(layer.unmerged is not None for layer in adapter.layers.values()):
        raise Refusal("the adapter is merged into its base", "a separate one", "unmerge() first")


@torch.no_grad()
def merge(adapter: Adapter) -> None:
    """Add each branch, at its strength, into its base weight: W + strength * alpha / r * B A,
    product in fp32.

    The old weights are kept (the model grows by their size), so that unmerge() gives them back bit
    for bit: subtracting the product from a rounded sum would not. Raises Refusal for quantised
    layers.
    """
    for name, layer in adapter.layers.items():
        weight = layer.base.weight
        if not weight.is_floating_point() or weight.shape != (
            layer.out_features,
            layer.in_features,
        ):
            raise Refusal(
                f"{name} has a quantised weight",
                "fp32, fp16 or bf16",
                "merge into the unquantised model",
            )
    for layer in adapter.layers.values():
        if layer.unmerged is None:
            product = layer.strength * layer.scale * (layer.lora_B @ layer.lora_A)  # (out, in) fp32
            layer.unmerged = layer.base.weight.data
            layer.base.weight.data = (layer.unmerged.float() + product).to(layer.unmerged.dtype)


def unmerge(adapter: Adapter) -> None:
    """Undo merge(), bit for bit."""
    for layer in adapter.layers.values():
        if layer.unmerged is not None:
            layer.base.weight.data, layer.unmerged = layer.unmerged, None


# ---- files ---------------------------------------------------------------------------------------
# Two formats hold the same numbers. PEFT keys are what diffusers writes; kohya keys are what
# ComfyUI, A1111 and Forge read. alpha travels in the PEFT file's header and in the kohya file's
# .alpha tensors: it is never lost.


def peft_file(adapter: Adapter, dtype: torch.dtype, about: dict[str, str]) -> bytes:
    """The bytes of a PEFT-keyed file: unet.<module>.lora_A.weight (r, in),
    unet.<module>.lora_B.weight (out, r).
    """
    tensors = {f"unet.{name}.weight": matrix.to(dtype) for name, matrix in adapter.parts()}
    config = {
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": sorted(adapter.targets),
    }
    header = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in config.items()}),
    }
    return safetensors_bytes(tensors, header | about)


def kohya_file(adapter: Adapter, dtype: torch.dtype, about: dict[str, str]) -> bytes:
    """The bytes of a kohya-keyed file: lora_unet_<module>.lora_down/.lora_up.weight and .alpha, one
    for all modules.

    A1111 hides files whose ss_base_model_version does not begin with sdxl_.
    """
    tensors = {}
    for name, layer in adapter.layers.items():
        key = "lora_unet_" + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = layer.lora_A.to(dtype)
        tensors[f"{key}.lora_up.weight"] = layer.lora_B.to(dtype)
        tensors[f"{key}.alpha"] = torch.tensor(float(adapter.alpha))  # fp32: fp16 ends at 65504
    header = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": str(float(adapter.alpha)),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": about.get("dataset", "lora"),
        "sshs_model_hash": hashlib.sha256(data_section(safetensors_bytes(tensors, {}))).hexdigest(),
    }
    return safetensors_bytes(tensors, header | about)


def save(
    adapter: Adapter, path: Path, layout: str, dtype: torch.dtype, about: dict[str, str]
) -> None:
    """Write the adapter to `path`, atomically. layout: "peft" or "kohya"; dtype: torch.float16 or
    float32.

    about: what the header says besides rank and alpha (base model, steps, recipe, data set), all
    strings and nothing that depends on the clock: equal adapters give equal files.
    """
    about = {"rank": str(adapter.rank), "alpha": str(float(adapter.alpha))} | about
    write_whole(path, {"peft": peft_file, "kohya": kohya_file}[layout](adapter, dtype, about))


@dataclass
class AdapterFile:
    """An adapter as a file holds it. matrices: {module: {"A": (r, in), "B": (out, r)}}; a kohya
    file's modules have underscores for dots. about: the file's header.
    """

    path: Path
    layout: str
    matrices: dict[str, dict[str, Tensor]]
    rank: int
    alpha: float
    about: dict[str, str]


def read(path: Path | str) -> AdapterFile:
    """Read a PEFT- or kohya-keyed file, or the folder a run wrote.

    alpha comes from the kohya file's .alpha tensors or the PEFT file's header; a PEFT file without
    that header means alpha = rank, as it does to diffusers. Raises Refusal for other formats, mixed
    ranks, differing alphas, and numbers that are not finite or not fp32, fp16 or bf16, naming the
    key.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    with open_safetensors(path) as file:
        about = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
    layout, matrices = sort_keys(path, tensors)
    ranks = {pair["A"].shape[0] for pair in matrices.values()}
    alphas = {float(pair.pop("alpha", len(pair["A"]))) for pair in matrices.values()}
    if layout == "peft":
        if "lora_adapter_metadata" in about:
            alphas = {alpha_in_header(path, about, ranks)}
    if len(ranks) != 1 or len(alphas) != 1:
        raise Refusal(
            f"{path} has ranks {sorted(ranks)} and alphas {sorted(alphas)}",
            "one rank and one alpha for all modules",
            "use an adapter of uniform rank: diffusers reads others wrongly, too",
        )
    rank, alpha = ranks.pop(), alphas.pop()
    if not 1 <= rank <= MAX_RANK or not 0 < alpha <= 1e6:  # False for nan, too
        raise Refusal(
            f"{path} has rank {rank} and alpha {alpha:g}",
            f"a rank of 1 to {MAX_RANK} and an alpha above 0, at most 1e6",
            "use another adapter file",
        )
    return AdapterFile(path, layout, matrices, rank, alpha, about)


def alpha_in_header(path: Path, about: dict[str, str], ranks: set[int]) -> float:
    """lora_alpha of a PEFT file's header. Raises Refusal for what would change the scale unseen."""
    try:
        header = json.loads(about["lora_adapter_metadata"])
        alpha = header.get("unet.lora_alpha", header.get("unet.r"))
        if type(alpha) not in (int, float):
            raise TypeError(f"unet.lora_alpha is {alpha!r:.50}")
        if len(ranks) == 1 and header.get("unet.r", *ranks) not in ranks:
            raise ValueError(f"unet.r is {header['unet.r']!r:.50}, and ranks are {sorted(ranks)}")
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
    return alpha


NUMBERS = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = {  # name: (what every key begins with, {what it ends in: what it holds})
    "peft": ("unet.", {".lora_A.weight": "A", ".lora_B.weight": "B"}),
    "kohya": (
        "lora_unet_",
        {".lora_down.weight": "A", ".lora_up.weight": "B", ".alpha": "alpha"},
    ),
}


def sort_keys(path: Path, tensors: dict[str, Tensor]) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """The file's layout, and {module: {"A", "B", perhaps "alpha"}}. Raises Refusal for any key that
    is not of plain LoRA on Linear layers in one of the two layouts.
    """
    kinds = [k for k, (begin, _) in LAYOUTS.items() if any(t.startswith(begin) for t in tensors)]
    layout = kinds[0] if kinds else "peft"
    begin, endings = LAYOUTS[layout]
    matrices: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        ending = next((e for e in endings if key.startswith(begin) and key.endswith(e)), None)
        if ending is None:
            raise Refusal(
                f"{path} has the key {key}",
                "unet.<module>.lora_A.weight and .lora_B.weight (PEFT), or lora_unet_<module>"
                ".lora_down.weight, .lora_up.weight and .alpha (kohya), of plain LoRA on Linears",
                "convert the adapter to one of these; text-encoder, DoRA, LoHa and LoKr keys are "
                "not read",
            )
        if tensor.dtype not in NUMBERS and endings[ending] != "alpha":
            raise Refusal(
                f"{path}: {key} holds {str(tensor.dtype).removeprefix('torch.')}",
                "fp32, fp16 or bf16",
                "use a file that is not quantised",
            )
        if not tensor.float().isfinite().all():
            raise Refusal(f"{path}: {key} holds NaN or Inf", "finite numbers", "use another file")
        matrices.setdefault(key[len(begin) : -len(ending)], {})[endings[ending]] = tensor
    for module, pair in matrices.items():
        whole = {"A", "B"} <= pair.keys() and pair["A"].ndim == pair["B"].ndim == 2
        if not whole or pair.get("alpha", torch.ones(())).numel() != 1:
            raise Refusal(
                f"{path}: {module} has {', '.join(f'{k} {[*v.shape]}' for k, v in pair.items())}",
                "a matrix A, a matrix B and at most one alpha",
                "use a whole adapter file",
            )
    return layout, matrices


@torch.no_grad()
def load(adapter: Adapter, path: Path | str) -> AdapterFile:
    """Copy a file's numbers into `adapter`, strictly.

    Raises Refusal where a key is missing, unused or misshapen, or where rank or alpha differ,
    naming it, and while `adapter` is merged; it is unchanged then.
    """
    refuse_merged(adapter)
    file = read(path)
    mine = {
        name.replace(".", "_") if file.layout == "kohya" else name: name for name in adapter.layers
    }
    for kind, names in (
        ("lacks", mine.keys() - file.matrices),
        ("has, unused,", file.matrices.keys() - mine),
    ):
        if names:
            raise Refusal(
                f"{file.path} {kind} {len(names)} modules, such as {min(names)}",
                f"exactly this model's {len(mine)} adapted modules",
                "use an adapter that was trained on this architecture with these targets",
            )
    same_alpha = math.isclose(file.alpha, adapter.alpha, rel_tol=1e-6)  # kohya's is rounded to fp32
    if file.rank != adapter.rank or not same_alpha:
        raise Refusal(
            f"{file.path} has rank {file.rank} and alpha {file.alpha:g}",
            f"rank {adapter.rank} and alpha {adapter.alpha:g}",
            f"--lora-rank {file.rank} --lora-alpha {file.alpha:g}",
        )
    for key, name in mine.items():
        for kind in "AB":
            want, got = getattr(adapter.layers[name], f"lora_{kind}"), file.matrices[key][kind]
            if want.shape != got.shape:
                raise Refusal(
                    f"{file.path}: {key}'s {kind} is {tuple(got.shape)}",
                    f"{tuple(want.shape)}",
                    "use an adapter that was trained on this architecture",
                )
    for key, name in mine.items():
        for kind in "AB":
            getattr(adapter.layers[name], f"lora_{kind}").copy_(file.matrices[key][kind])
    return file
