"""Adapter files of every kind for SDXL's UNet, wherever they come from, as generate.py draws them.

Ranks and alphas may differ from layer to layer, and a file may hold LoRA, LoCon, DoRA, LoHa and
LoKr, in kohya's, LyCORIS', PEFT's or ComfyUI's keys. What is no part of the UNet is counted and
left out; another family's file is refused by its name.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
from adapters import kinds
from adapters.names import spellings
from inputs.adapter_file import (
    ANOTHER,
    MAX_RANK,
    NUMBERS,
    WHOLE,
    alpha_of_header,
    check_alpha,
    check_keys,
)
from inputs.drawing import find_adapter
from inputs.files import Refusal, read_tensors, refuse, refusing

# What a module's name follows in the keys of kohya, LyCORIS, diffusers, ComfyUI, peft, and of a
# bare UNet.
BEFORE = r"lora_unet_|lycoris_|unet\.|diffusion_model\.|base_model\.model\.|"
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LEFT_OUT = {
    "of text encoders": r"lora_te\d?_|lycoris_te\d?_|text_encoder|(?!conditioner).*text_model",
    "of embeddings": r"clip_[gl]$|emb_params$|bundle_emb\.|string_to_param",
}
M = "lora_magnitude_vector"  # a DoRA's lengths
# What one layer may have, besides alpha and M: LoRA's, LoHa's and LoKr's factors.
W1, W2 = ([{name}, {f"{name}_a", f"{name}_b"}] for name in ("lokr_w1", "lokr_w2"))
WHOLES = [{"lora_A", "lora_B"}, {f"hada_w{i}_{x}" for i in (1, 2) for x in "ab"}]
WHOLES += [one | two for one in W1 for two in W2]
# How a key ends, and what that is called here.
ENDS = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}  # PEFT's
ENDS |= {"lora_A.default.weight": "lora_A", "lora_B.default.weight": "lora_B"}
ENDS |= {"lora.down.weight": "lora_A", "lora.up.weight": "lora_B"}  # diffusers' training scripts'
ENDS |= {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B"}  # kohya's
ENDS |= {"lora_magnitude_vector": M, "lora_magnitude_vector.weight": M, "dora_scale": M}
ENDS |= {name: name for whole in WHOLES[1:] for name in {"alpha"} | whole}


@dataclass
class Correction:
    """What the file `path` says of one layer. module: as it is spelt there; parts: by ENDS' names;
    times: how strongly it acts.
    """

    path: Path
    module: str
    parts: dict[str, Tensor]
    alpha: float
    rank: int
    times: float = 1.0


@dataclass
class AnyFile(lora.AdapterFile):
    """An adapter of any kind. Its matrices are in `corrections`; rank and alpha are the first's."""

    corrections: list[Correction] = field(default_factory=list)
    left_out: str = ""


def read(path: Path | str, plain: bool = False) -> AnyFile:
    """Read a file of any kind, or the one in a folder; `plain`: of LoRA and nothing else. alpha is
    what the file's .alpha tensors, its header or peft's adapter_config.json say, else the rank, as
    it is to every reader of such files. Raises Refusal, naming what is wrong, for another family's,
    for keys that no kind has, and for numbers that are not finite.
    """
    path = find_adapter(path)
    tensors, about = read_tensors(path)
    left, total = [], len(tensors)
    for what, mark in LEFT_OUT.items() if not plain else ():
        if theirs := [key for key in tensors if re.match(mark, key)]:
            left.append(f"{len(theirs)} tensors {what}")
            tensors = {key: each for key, each in tensors.items() if key not in theirs}
    if total and not tensors:
        found = f"{path} holds {' and '.join(left)} and nothing of a UNet"
        raise Refusal(found, "an adapter of SDXL's UNet", ANOTHER)
    key_like = rf"({BEFORE})(.+?)\.({'|'.join(map(re.escape, ENDS))})"
    more = () if plain else ("DoRA", "LoHa", "LoKr", "a text encoder's LoRA")
    check_keys(path, tensors, key_like, more)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        _, module, end = re.fullmatch(key_like, key).groups()
        # PEFT's lengths are of rows, (out,), or of a convolution (1, out, 1, 1)
        layers.setdefault(module, {})[ENDS[end]] = tensor.flatten() if M in end else tensor
    refuse(troubles(path, layers))
    said = config_of(path, next(iter(tensors)), about)
    double = sum(map(len, layers.values())) < len(tensors)
    if double or (said and any("alpha" in parts for parts in layers.values())):
        found = f"{path} says the same twice, in two layouts"
        raise Refusal(found, "one kind of keys, and alpha in one place", ANOTHER)
    alpha_of = alphas(path, said, layers)
    corrections = []
    for module, parts in layers.items():
        rank = rank_of(parts)
        own = parts.pop("alpha", None)
        alpha = alpha_of(module, rank) if own is None else check_alpha(path, own.item())
        alpha = 1.0 if {"lokr_w1", "lokr_w2"} <= parts.keys() else alpha
        if M in parts and (flat := parts[M].flatten()).shape != parts[M].shape[1:2]:
            parts[M] = flat  # a length for each row; (1, in) as LyCORIS once had it is for columns
        corrections.append(Correction(path, module, parts, alpha, rank))
    first = corrections[0]
    said = f"{path}: left out {' and '.join(left)}" if left else ""
    return AnyFile(path, {}, first.rank, first.alpha, about, corrections, said)


def config_of(path: Path, key: str, about: dict[str, str]) -> str | None:
    """PEFT's config: in the header, or, where a `key` is peft's own, in the file beside it."""
    if not key.startswith("base_model.model."):
        return about.get("lora_adapter_metadata")
    found = f"{path} has peft's own keys and no adapter_config.json beside it"
    with refusing(found, "both files of one folder", ANOTHER):
        return (path.parent / "adapter_config.json").read_text()


def kind_of(parts: dict[str, Tensor]) -> str:
    """Of kinds.KINDS; of LoHa and LoKr with DoRA's lengths, too, without them."""
    if "lora_A" in parts:
        return "dora" if M in parts else "lora"
    return "loha" if "hada_w1_a" in parts else "lokr"


def troubles(path: Path, layers: dict[str, dict[str, Tensor]]) -> list[tuple[str, str, str]]:
    """What of the file's layers cannot be, as refuse() takes it."""
    found = []
    for module, parts in layers.items():
        own = parts.keys() - {"alpha", M}
        if own not in WHOLES:
            found.append((f"{module} has {', '.join(sorted(parts))}", "all factors of one kind"))
            continue
        wrong = len(found)
        for name, each in parts.items():
            if name != "alpha" and each.dtype not in (*NUMBERS, *FP8):
                found.append((f"{module}.{name} holds {str(each.dtype)[6:]}", "floats of 8 to 32"))
            elif name == "alpha" and each.numel() != 1:
                found.append((f"{module}.alpha holds {each.numel()} numbers", "one"))
            elif name != "alpha" and not each.float().isfinite().all():
                found.append((f"{module}.{name} holds NaN or Inf", "finite numbers"))
            elif name not in ("alpha", M) and each.ndim < 2:
                found.append((f"{module}.{name} is {[*each.shape]}", "a matrix"))
        if len(found) == wrong and not 1 <= rank_of(parts) <= MAX_RANK:
            found.append((f"{module} has rank {rank_of(parts)}", f"1 to {MAX_RANK}"))
    return [(f"{path}: {what}", expected, WHOLE) for what, expected in found]


def rank_of(parts: dict[str, Tensor]) -> int:
    """By which alpha is divided; 1 of a LoKr of two whole matrices, which has no scale."""
    inner = ("lora_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    return next((len(parts[name]) for name in inner if name in parts), 1)


def alphas(path: Path, said: str | None, layers: dict) -> Callable[[str, int], float]:
    """A function from a layer and its rank to alpha, by PEFT's config `said`; without one the rank.

    Raises Refusal for fields that would change the numbers and are not understood.
    """
    if said is None:
        return lambda module, rank: float(rank)
    with refusing(f"{path} has an unreadable PEFT config", "JSON with r and lora_alpha", ANOTHER):
        config = {key.removeprefix("unet."): v for key, v in dict(json.loads(said)).items()}
        own = {str(key): value for key, value in dict(config.pop("alpha_pattern", {})).items()}
    root = type(config.get("use_rslora")) is bool and config.pop("use_rslora")
    # The tensors themselves say these.
    patterned, _ = config.pop("rank_pattern", None), config.pop("use_dora", None)
    ranks = {rank_of(parts) for parts in layers.values()}
    rank = config.get("r", 1) if patterned or len(ranks) > 1 else min(ranks)
    usual = alpha_of_header(path, json.dumps(config), rank)
    own = {f".{name}": check_alpha(path, alpha) for name, alpha in own.items()}
    lost = [name[1:] for name in own if not any(f".{m}".endswith(name) for m in layers)]
    if lost:
        found = f"{path} has an alpha_pattern of {lost[0]}, which no layer's name ends in"
        raise Refusal(found, "names of its layers", ANOTHER)

    def alpha_of(module: str, rank: int) -> float:
        alpha = next((a for name, a in own.items() if f".{module}".endswith(name)), usual)
        return alpha * rank**0.5 if root else alpha  # alpha / sqrt(r) as alpha' / r

    return alpha_of


def together(parts: list[tuple[AnyFile, float]]) -> AnyFile:
    """Several files, each at its strength, as one that is called as the first."""
    found = [replace(c, times=c.times * k) for file, k in parts for c in file.corrections]
    said = "\n".join(file.left_out for file, _ in parts if file.left_out)
    return replace(parts[0][0], corrections=found, left_out=said)


# ---- into a UNet ---------------------------------------------------------------------------------


class Changed(kinds.Beside):
    """(W + D) x with D as large as W: what no class of kinds.py computes from its factors."""

    def __init__(self, base: nn.Module, D: Tensor):
        super().__init__(base, 1, 1.0)
        weight = self.frozen.weight
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        self.register_buffer("D", D.to(weight.device, dtype))

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        how, D = self.frozen, self.D.to(x.dtype)
        conv = kinds.is_conv(how)
        return F.conv2d(x, D, None, how.stride, how.padding) if conv else F.linear(x, D)


class Drawn(kinds.Adapter):
    """An adapter that load() fills, file after file. model: the UNet; bases: its own layers, where
    something stands beside them.
    """

    def __init__(self, model: nn.Module, *_):
        super().__init__({}, 1, 1.0, ())
        self.model, self.bases = model.requires_grad_(False), {}


def load(adapter: Drawn, file: AnyFile) -> None:
    """Have the UNet of `adapter` act with `file` instead of what it had before. Raises Refusal,
    before anything is changed, for layers that the UNet lacks and for other shapes.
    """
    for name, base in adapter.bases.items():
        adapter.model.set_submodule(name, base)
    able = kinds.able(adapter.model)
    names, given = spellings(able), {(c.path, c.module) for c in file.corrections}
    named = [(names.get(c.module.replace(".", "_"), ""), c) for c in file.corrections]
    if lost := [c for name, c in named if not name]:
        found = f"{lost[0].path} adapts {len(lost)} layers that this model lacks, such as "
        remedy = "use an adapter that was trained on this architecture"
        raise Refusal(found + lost[0].module, "layers of this UNet", remedy)
    if len({(c.path, name) for name, c in named}) < len(given):
        raise twice(file.path)
    refuse(
        (f"{c.path}: {c.module} has factors {shapes}", f"a change of {tuple(shape)}", ANOTHER)
        for name, c in named
        if (shapes := misfit(c.parts, shape := kinds.shape_of(able[name])))
    )
    adapter.layers, adapter.bases = {}, {name: able[name] for name, _ in named}
    for i, (name, correction) in enumerate(named):
        layer = beside(adapter.model.get_submodule(name), correction, name)
        adapter.model.set_submodule(name, layer)
        adapter.layers[f"{name} {i}"] = layer


def twice(path: Path) -> Refusal:
    found = f"{path} has some modules twice, under SGM's names and under diffusers'"
    return Refusal(found, "every module once", ANOTHER)


def misfit(parts: dict[str, Tensor], shape: tuple[int, ...]) -> str:
    """The shapes of factors that do not come to a weight of `shape`, in words; else ""."""
    try:
        meta = {name: each.to("meta") for name, each in parts.items()}
        m = parts.get(M, torch.ones(shape[0]))
        fits = m.numel() == shape[m.ndim > 1]
        if "lora_A" in parts and len(shape) > 2:
            fits = fits and parts["lora_A"].shape[1:] == shape[1:]
        if kind_of(parts) == "lokr" and len(shape) == 2:
            fits = fits and all(each.ndim == 2 for name, each in parts.items() if name != M)
        if fits and kinds.matrix(meta, shape).shape == (shape[0], math.prod(shape[1:])):
            return ""
    except (RuntimeError, IndexError, TypeError, ZeroDivisionError):  # no such product
        pass
    return ", ".join(f"{name} {tuple(each.shape)}" for name, each in parts.items())


def beside(base: nn.Module, c: Correction, name: str) -> nn.Module:
    """`base`, which may have others beside it already, with a correction beside it: computed from
    its factors where a class of kinds.py does that, else as one difference; at conv_in always so,
    since diffusers takes the dtype of a UNet's first parameter for that of all.
    """
    origin, parts = kinds.frozen_of(base), {name: each.float() for name, each in c.parts.items()}
    m, kind = parts.get(M), kind_of(parts)
    if kinds.is_conv(origin):
        cls = kinds.LoRAConv2d if kind == "lora" and name != "conv_in" else None
    else:
        cls = kinds.KINDS[kind] if m is None or (kind == "dora" and m.ndim == 1) else None
    if cls is lora.LoRALinear:
        layer = cls(origin, c.rank, c.alpha, torch.Generator())
        for name, own in parts.items():
            getattr(layer, name).data.copy_(own.flatten(1))
        layer.base, layer.scale = base, c.times * layer.scale
        return layer
    if cls:
        layer = cls.__new__(cls)  # without the numbers that it would start with
        kinds.Beside.__init__(layer, base, c.rank, c.alpha)
        B = parts.get("lora_B")  # of a convolution some write (out, r)
        square = {"lora_B": B[:, :, None, None]} if kinds.is_conv(origin) and B.ndim == 2 else {}
        layer.learn(**parts | square)
    else:
        W = kinds.weight_of(origin)
        D = c.alpha / c.rank * kinds.product(parts, W.shape).to(W.device)
        if m is not None:
            D = kinds.rescaled(W, D, (m[:, None] if m.ndim == 1 else m).to(W.device))
        layer = Changed(base, D)
    layer.times = c.times
    return layer
