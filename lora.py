"""The adapter: low-rank corrections beside frozen Linear layers, and the file that holds them.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1) leaves a pretrained weight W as
it is and learns a correction of rank r beside it: W x + (alpha / r) B A x, with A (r, in) and B
(out, r). Each of SDXL's 70 transformer blocks has self-attention (attn1) and cross-attention
(attn2), and both have four Linear layers, to_q, to_k, to_v and to_out.0: 560 layers, which at r =
16 get 23 million numbers to train, 0.9 % of the model.

Letters: `r` rank, `in` and `out` the layer's widths, `...` any leading dimensions.
"""

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inputs.adapter_file import check_fits, read_plain
from inputs.files import FILE_NAME, Refusal, safetensors_bytes, write_whole

# The attention projections, as published runs adapt them.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class LoRALinear(nn.Module):
    """A frozen Linear with a trainable low-rank branch beside it.

    base: nn.Linear, or a layer with a 4-bit weight. That weight is packed, so the widths are read
    from in_features and out_features, never from weight.shape. lora_A (r, in) and lora_B (out, r)
    are fp32, whatever the base is: a step of 1e-5 would be rounded away in fp16.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        # B is zero, so the adapted model starts out equal to the bare one. A must not be zero as
        # well: A's gradient contains B and B's contains A, so both would stay zero for ever.
        A, B = torch.empty(rank, self.in_features), torch.zeros(self.out_features, rank)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)  # +-1 / sqrt(in), as PEFT
        device = next(base.parameters()).device
        self.lora_A, self.lora_B = nn.Parameter(A.to(device)), nn.Parameter(B.to(device))
        self.scale = alpha / rank  # so that the rank can change without a new learning rate
        self.strength = 1.0  # how much of the branch acts when drawing
        self.weight_before_merge: Tensor | None = None  # a copy, while merged; else None

    def down(self, x: Tensor) -> Tensor:
        # A is cast, not x: autograd would keep an fp32 copy of x for the backward pass.
        return F.linear(x, self.lora_A.to(x.dtype))  # (..., in) -> (..., r)

    def up(self, h: Tensor) -> Tensor:
        return F.linear(h, self.lora_B.to(h.dtype))  # (..., r) -> (..., out)

    def forward(self, x: Tensor) -> Tensor:
        # At strength 0 an infinite branch would give NaN; merged, the weight holds the branch.
        if self.strength == 0 or self.weight_before_merge is not None:
            return self.base(x)
        scale = self.strength * self.scale
        return self.base(x) + scale * self.up(self.down(x))  # (..., in) -> (..., out)


@dataclass
class Adapter:
    """All low-rank branches of one model, by the names of the layers that they stand beside."""

    layers: dict[str, LoRALinear]
    rank: int
    alpha: float
    targets: tuple[str, ...]

    def matrices(self) -> dict[str, Tensor]:
        """Every A (r, in) and B (out, r), fp32, as a file names them."""
        kinds, layers = ("lora_A", "lora_B"), self.layers.items()
        return {f"{name}.{kind}": getattr(layer, kind) for name, layer in layers for kind in kinds}


def find_targets(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """The layers of `model` whose dotted name is, or ends in, one of `targets`, by name."""
    endings, modules = tuple(f".{target}" for target in targets), dict(model.named_modules())
    found = {name: each for name, each in modules.items() if f".{name}".endswith(endings)}
    wrong = [name for name, each in found.items() if not hasattr(each, "in_features")]
    adapted = [name for name, each in modules.items() if isinstance(each, LoRALinear)]
    if wrong or adapted or not found:
        raise Refusal(
            f"targets {', '.join(targets)} match {', '.join(wrong[:1] + adapted[:1]) or 'nothing'}",
            f"plain Linear layers of a bare model, whose names end in such as {', '.join(TARGETS)}",
            "correct the targets, or load the model again",
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

    Raises Refusal where no layer matches, where one is no Linear, and where the model has an
    adapter already.
    """
    layers = {}
    model.requires_grad_(False)
    for name, base in find_targets(model, tuple(targets)).items():
        # Each layer has a seed of its own, from the run's seed and its name, so that its start does
        # not depend on the order. crc32 mixes both into 32 bits, all that torch's generator uses.
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
        layers[name] = LoRALinear(base, rank, alpha, generator)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[name])
    return Adapter(layers, rank, alpha, tuple(targets))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that requires a gradient, by its name: after inject() all A and B, and what
    else an edit of LoRALinear adds to learn.
    """
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def set_strength(adapter: Adapter, strength: float) -> None:
    """How much of the adapter acts: 0 is the bare model, bit for bit; 1 the trained one."""
    refuse_merged(adapter)
    for layer in adapter.layers.values():
        layer.strength = strength


def refuse_merged(adapter: Adapter) -> None:
    """What is merged acts through the base: another strength or other numbers would not be seen."""
    if any(layer.weight_before_merge is not None for layer in adapter.layers.values()):
        raise Refusal("the adapter is merged into its base", "a separate one", "unmerge() first")


@torch.no_grad()
def merge(adapter: Adapter) -> None:
    """Add each branch, at its strength, into its base weight: W + strength * alpha / r * B A,
    product in fp32.

    The old weights are kept (the model grows by their size), so that unmerge() gives them back bit
    for bit: subtracting the product from a rounded sum would not. To save the model whole, unwrap()
    it then. Raises Refusal for quantised layers.
    """
    for name, layer in adapter.layers.items():
        if layer.base.weight.shape != (layer.out_features, layer.in_features):  # packed in 4 bits
            found, remedy = f"{name} has a quantised weight", "merge into the whole model"
            raise Refusal(found, "fp32, fp16 or bf16", remedy)
    for layer in adapter.layers.values():
        if layer.weight_before_merge is None:
            product = layer.strength * layer.scale * (layer.lora_B @ layer.lora_A)  # (out, in) fp32
            weight = layer.weight_before_merge = layer.base.weight.data
            layer.base.weight.data = (weight.float() + product).to(weight.dtype)


def unmerge(adapter: Adapter) -> None:
    """Undo merge(), bit for bit."""
    for layer in adapter.layers.values():
        if layer.weight_before_merge is not None:
            layer.base.weight.data, layer.weight_before_merge = layer.weight_before_merge, None


def unwrap(model: nn.Module, adapter: Adapter) -> None:
    """Undo inject(): each base, merged or bare, back in its place. Then the model's keys are those
    that everybody loads; with the adapter in it, save_pretrained() would write .base. into them.
    """
    for name, layer in adapter.layers.items():
        model.set_submodule(name, layer.base)


# ---- the file, with the keys that diffusers reads and writes -------------------------------------


def peft_bytes(adapter: Adapter, dtype: torch.dtype, about: dict[str, str]) -> bytes:
    """A safetensors file with unet.<module>.lora_A.weight (r, in) and .lora_B.weight (out, r).

    alpha travels in the header, else diffusers would take alpha = r. about: what the header says
    besides, all strings, nothing that depends on the clock: equal adapters give equal files.
    """
    tensors = {f"unet.{name}.weight": each.to(dtype) for name, each in adapter.matrices().items()}
    config = {
        "unet.r": adapter.rank,
        "unet.lora_alpha": adapter.alpha,
        "unet.target_modules": sorted(adapter.targets),
    }
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    same = {"rank": str(adapter.rank), "alpha": str(float(adapter.alpha))}
    return safetensors_bytes(tensors, header | same | about)


def save(adapter: Adapter, path: Path, dtype: torch.dtype, about: dict[str, str]) -> None:
    """Write the adapter to `path`, whole or not at all. dtype: torch.float16 or float32."""
    write_whole(path, peft_bytes(adapter, dtype, about))


@dataclass
class AdapterFile:
    """An adapter as a file holds it. matrices: <module>.lora_A (r, in) and <module>.lora_B
    (out, r); about: the file's header.
    """

    path: Path
    matrices: dict[str, Tensor]
    rank: int
    alpha: float
    about: dict[str, str]


def read(path: Path | str) -> AdapterFile:
    """Read the file that save() or diffusers wrote, or the one in a run's folder. Raises Refusal
    for any key, shape, number or header that is not of plain LoRA, naming it.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    return AdapterFile(path, *read_plain(path))


@torch.no_grad()
def load(adapter: Adapter, file: AdapterFile) -> None:
    """Copy a file's numbers into `adapter`, strictly.

    Raises Refusal where a matrix is missing, unused or misshapen, where the scale differs, and
    while `adapter` is merged; it is unchanged then.
    """
    refuse_merged(adapter)
    mine, same_alpha = adapter.matrices(), math.isclose(file.alpha, adapter.alpha, rel_tol=1e-6)
    if file.rank != adapter.rank or not same_alpha:
        found = f"{file.path} has rank {file.rank} and alpha {file.alpha:g}"
        expected = f"rank {adapter.rank} and alpha {adapter.alpha:g}"
        raise Refusal(found, expected, f"--lora-rank {file.rank} --lora-alpha {file.alpha:g}")
    check_fits(file.path, file.matrices, mine)
    for name, matrix in mine.items():
        matrix.copy_(file.matrices[name])
