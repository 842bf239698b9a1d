"""Adapter files of every kind for SDXL's UNet, wherever they come from, as generate.py draws them.

Ranks and alphas may differ from layer to layer, and a file may hold LoRA, LoCon, DoRA, LoHa and
LoKr, in kohya's, LyCORIS', PEFT's or ComfyUI's keys. What is no part of the UNet is counted and
left out; another family's file is refused by its name.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
from adapters import files, kinds
from inputs.adapter_file import (
    MAX_RANK,
    NUMBERS,
    WHOLE,
    alpha_of_header,
    check_alpha,
    check_fits,
    check_keys,
)
from inputs.drawing import find_adapter
from inputs.files import Refusal, read_tensors, refuse, refusing

BEFORE = r"lycoris_|" + files.BEFORE
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LEFT_OUT = {
    "of text encoders": r"lora_te\d?_|lycoris_te\d?_|text_encoder|(?!conditioner).*text_model",
    "of embeddings": r"clip_[gl]$|emb_params$|bundle_emb\.|string_to_param",
}
M = "lora_magnitude_vector"  # a DoRA's lengths
# How a key ends, and what that is called here.
ENDS = files.KINDS | {"lora_A.default.weight": "lora_A", "lora_B.default.weight": "lora_B"}
ENDS |= {"lora_magnitude_vector": M, "lora_magnitude_vector.weight": M, "dora_scale": M}
ENDS |= {name: name for name in ("alpha", "lokr_w1", "lokr_w2")}
ENDS |= {f"{part}_{x}": f"{part}_{x}" for part in ("lokr_w1", "lokr_w2") for x in "ab"}
ENDS |= {f"hada_w{i}_{x}": f"hada_w{i}_{x}" for i in (1, 2) for x in "ab"}
MARKS = {"lora": "lora_A", "loha": "hada_w1_a"}
# What one layer may have, besides alpha and M.
WHOLES = [{"lora_A", "lora_B"}, {f"hada_w{i}_{x}" for i in (1, 2) for x in "ab"}]
WHOLES += [
    one | two
    for one in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
    for two in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
]


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


def read(path: Path | str) -> AnyFile:
    """Read a file of any kind, or the one in a folder. Raises Refusal, naming what is wrong, for
    another family's, for keys that no kind has, and for numbers that are not finite.
    """
    path = find_adapter(path)
    tensors, about = read_tensors(path)
    left, total = [], len(tensors)
    for what, mark in LEFT_OUT.items():
        if theirs := [key for key in tensors if re.match(mark, key)]:
            left.append(f"{len(theirs)} tensors {what}")
            tensors = {key: each for key, each in tensors.items() if key not in theirs}
    if total and not tensors:
        found = f"{path} holds {' and '.join(left)} and nothing of a UNet"
        raise Refusal(found, "an adapter of SDXL's UNet", WHOLE)
    key_like = rf"({BEFORE})(.+?)\.({'|'.join(map(re.escape, ENDS))})"
    check_keys(path, tensors, key_like, ("DoRA", "LoHa", "LoKr", "a text encoder's LoRA"))
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        _, module, end = re.fullmatch(key_like, key).groups()
        # PEFT's lengths are of rows, (out,), or of a convolution (1, out, 1, 1)
        layers.setdefault(module, {})[ENDS[end]] = tensor.flatten() if M in end else tensor
    refuse(troubles(path, layers))
    said = files.config_of(path, next(iter(tensors)), about)
    twice = sum(map(len, layers.values())) < len(tensors)
    if twice or (said and any("alpha" in parts for parts in layers.values())):
        found = f"{path} says the same twice, in two layouts"
        raise Refusal(found, "one kind of keys, and alpha in one place", WHOLE)
    alpha_of = alphas(path, said, layers)
    corrections = []
    for module, parts in layers.items():
        rank = rank_of(parts)
        own = parts.pop("alpha", None)
        alpha = alpha_of(module, rank) if own is None else check_alpha(path, own.item())
        alpha = 1.0 if {"lokr_w1", "lokr_w2"} <= parts.keys() else alpha
        parts = {name: each.float() for name, each in parts.items()}
        if M in parts and (flat := parts[M].flatten()).shape != parts[M].shape[1:2]:
            parts[M] = flat  # a length for each row; (1, in) as LyCORIS once had it is for columns
        corrections.append(Correction(path, module, parts, alpha, rank))
    first = corrections[0]
    said = f"{path}: left out {' and '.join(left)}" if left else ""
    return AnyFile(path, {}, first.rank, first.alpha, about, corrections, said)


def kind_of(correction: Correction) -> str:
    """In words."""
    parts = correction.parts
    if "hada_w1_a" in parts or "lora_A" not in parts:
        return "LoHa" if "hada_w1_a" in parts else "LoKr"
    conv = " on a convolution" * (parts["lora_A"].ndim > 2)
    return ("DoRA" if M in parts else "LoRA") + conv


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
            elif not each.float().isfinite().all():
                found.append((f"{module}.{name} holds NaN or Inf", "finite numbers"))
            elif name == "alpha" and each.numel() != 1:
                found.append((f"{module}.alpha holds {each.numel()} numbers", "one"))
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
    with refusing(f"{path} has an unreadable PEFT config", "JSON with r and lora_alpha", WHOLE):
        config = {key.removeprefix("unet."): v for key, v in dict(json.loads(said)).items()}
        own = {str(key): value for key, value in dict(config.pop("alpha_pattern", {})).items()}
    root = type(config.get("use_rslora")) is bool and config.pop("use_rslora")
    # The tensors themselves say these.
    patterned, _ = config.pop("rank_pattern", None), config.pop("use_dora", None)
    ranks = {rank_of(parts) for parts in layers.values()}
    if not patterned and len(ranks) == 1 and config.get("r", 1) not in ranks:
        found = f"{path} says r {config['r']}, and its matrices have rank {min(ranks)}"
        raise Refusal(found, "the same", WHOLE)
    usual = alpha_of_header(path, json.dumps(config), config.get("r", 1))
    own = {f".{name}": check_alpha(path, alpha) for name, alpha in own.items()}
    lost = [name[1:] for name in own if not any(f".{m}".endswith(name) for m in layers)]
    if lost:
        found = f"{path} has an alpha_pattern of {lost[0]}, which no layer's name ends in"
        raise Refusal(found, "names of its layers", WHOLE)

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
        found = f"{file.path} has some modules twice, under SGM's names and under diffusers'"
        raise Refusal(found, "every module once", WHOLE)
    refuse(
        (f"{c.path}: {c.module} has factors {shapes}", f"a change of {tuple(shape)}", WHOLE)
        for name, c in named
        if (shapes := misfit(c.parts, shape := kinds.shape_of(able[name])))
    )
    adapter.layers, adapter.bases = {}, {name: able[name] for name, _ in named}
    for i, (name, correction) in enumerate(named):
        layer = beside(adapter.model.get_submodule(name), correction, name)
        adapter.model.set_submodule(name, layer)
        adapter.layers[f"{name} {i}"] = layer


OUTSIDE = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
OUTSIDE |= {f"time_embedding.linear_{i}": f"time_embed.{2 * i - 2}" for i in (1, 2)}
OUTSIDE |= {f"add_embedding.linear_{i}": f"label_emb.0.{2 * i - 2}" for i in (1, 2)}


def spellings(names: Iterable[str], among: Iterable[str] = ()) -> dict[str, str]:
    """Of a UNet's layers, by every spelling that files have for them, with underscores for dots.
    among: as for sgm_names().
    """
    blocks = [name for name in names if re.fullmatch(files.BLOCK, name)]
    sgm = files.sgm_names(blocks, among) | OUTSIDE
    both = ((each, name) for name in names for each in (name, sgm.get(name, name)))
    return {each.replace(".", "_"): name for each, name in both}


def misfit(parts: dict[str, Tensor], shape: tuple[int, ...]) -> str:
    """The shapes of factors that do not come to a weight of `shape`, in words; else ""."""
    try:
        meta = {name: each.to("meta") for name, each in parts.items()}
        m, fits = parts.get(M, torch.ones(shape[0])), kinds.product(meta, shape).shape == shape
        tall = {len(parts[n]) for n in ("lora_B", "hada_w1_a", "hada_w2_a") if n in parts}
        if "lora_A" in parts and len(shape) > 2:
            fits = fits and parts["lora_A"].shape[1:] == shape[1:]
        if not tall:
            w1, w2 = (kinds.factor(meta, name) for name in ("lokr_w1", "lokr_w2"))
            tall = {len(w1) * len(w2)}
            wide = len(shape) > 2 or (w2.ndim == 2 and w1.shape[1] * w2.shape[1] == shape[1])
            fits = fits and w1.ndim == 2 and wide
        if fits and tall == {shape[0]} and m.numel() == shape[m.ndim > 1]:
            return ""
    except (RuntimeError, IndexError, TypeError, ZeroDivisionError):  # no such product
        pass
    return ", ".join(f"{name} {tuple(each.shape)}" for name, each in parts.items())


def beside(base: nn.Module, c: Correction, name: str) -> nn.Module:
    """`base`, which may have others beside it already, with a correction beside it: computed from
    its factors where a class of kinds.py does that, else as one difference; at conv_in always so,
    since diffusers takes the dtype of a UNet's first parameter for that of all.
    """
    origin, parts, m = kinds.frozen_of(base), c.parts, c.parts.get(M)
    kind = next((k for k, key in MARKS.items() if key in parts), "lokr")
    if m is not None:
        kind = "dora" if kind == "lora" and m.ndim == 1 else ""
    if kinds.is_conv(origin):
        cls = kinds.LoRAConv2d if kind == "lora" and name != "conv_in" else None
    else:
        cls = kinds.KINDS.get(kind)
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


@torch.no_grad()
def put_back(adapter: lora.Adapter, path: Path) -> None:
    """Copy what a file of save() holds into the run's `adapter`, strictly: every number of every
    layer, at the same scale.
    """
    if type(adapter) is lora.Adapter:
        return files.load(adapter, files.read(path))
    file, mine = read(path), adapter.matrices()
    names = spellings(adapter.layers, adapter.among)
    theirs = {}
    for c in file.corrections:
        name = names.get(c.module.replace(".", "_"), c.module)
        if not math.isclose(c.alpha / c.rank, adapter.layers[name].scale, rel_tol=1e-6):
            found = f"{path}: {name} has alpha {c.alpha:g} and rank {c.rank}"
            raise Refusal(found, f"a scale of {adapter.layers[name].scale:g}", WHOLE)
        theirs |= {f"{name}.{key}": each for key, each in c.parts.items()}
    check_fits(path, theirs, mine)
    for name, matrix in mine.items():
        matrix.copy_(theirs[name])
