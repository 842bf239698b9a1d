"""LoRA's relatives, and LoRA on more layers: each class shows the one formula of its kind.

Every one stands beside a frozen layer, answers what that answers at the start and at strength 0,
and has its parameters' names in the files of the program that it comes from.

Letters: as in lora.py; W the frozen weight, s = alpha / r.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora
import model
from inputs import hub
from inputs.files import Refusal
from inputs.options import Config, relatives

# What --targets names: of SDXL's UNet 560 layers, 140 and 22, and 38 convolutions.
GROUPS = {
    "attention": r"\.(to_q|to_k|to_v|to_out\.0)$",
    "feed-forward": r"\.ff\.net\.(0\.proj|2)$",
    "proj_in and proj_out": r"\.proj_(in|out)$",
    "3x3 convolutions": r"_blocks?\..*(\.conv[12]|samplers\.0\.conv)$",
}
SETS = {"attention": 1, "transformer": 3, "all": 4}  # how many of GROUPS


class Beside(nn.Module):
    """A frozen layer, whole or in 4 bits, with a trained change beside it.

    keys: its parameters, as a file names them; the last is zero at the start. rank, alpha: of this
    layer; times: how strongly it acts beside other adapters.
    """

    keys: tuple[str, ...] = ()

    def __init__(self, base: nn.Module, rank: int, alpha: float):
        super().__init__()
        self.base, self.rank, self.alpha, self.scale = base, rank, alpha, alpha / rank
        self.strength, self.times, self.weight_before_merge = 1.0, 1.0, None

    def learn(self, **tensors: Tensor) -> None:
        """Take these for its parameters, in fp32, on its base's device."""
        device, self.keys = next(self.base.parameters()).device, tuple(tensors)
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor.float().to(device)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.strength == 0:  # the base, to the bit
            return y
        return torch.add(y, self.change(x, y), alpha=self.strength * self.times)

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        """What is added to the base's answer y."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self) -> Tensor:
        """What is added to the weight, of its shape, where this alone acts, at strength 1; fp32."""
        parts = {key: getattr(self, key) for key in self.keys}
        return self.scale * product(parts, shape_of(self.frozen))

    @property
    def frozen(self) -> nn.Module:
        """The model's own layer, under all that stands beside it."""
        return frozen_of(self.base)

    def weight(self) -> Tensor:
        return weight_of(self.frozen)


def frozen_of(layer: nn.Module) -> nn.Module:
    """The model's own layer, under all that stands beside it."""
    while isinstance(layer, (Beside, lora.LoRALinear)):
        layer = layer.base
    return layer


def weight_of(layer: nn.Module) -> Tensor:
    """W, fp32; that of a 4-bit layer expanded for the moment."""
    weight = layer.weight
    if not weight.is_floating_point():
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state)
    return weight.detach().float()


def start(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform numbers between -1 / sqrt(n) and 1 / sqrt(n), of n numbers in a row."""
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


class LoRAConv2d(Beside):
    """LoCon: W * x + s B * (A * x), with A (r, in, 3, 3) and B (out, r, 1, 1).

    https://arxiv.org/abs/2309.14859, section 3.1
    """

    def __init__(self, base: nn.Conv2d, rank: int, alpha: float, generator: torch.Generator):
        super().__init__(base, rank, alpha)
        A = start((rank, base.in_channels, *base.kernel_size), generator)
        self.learn(lora_A=A, lora_B=torch.zeros(base.out_channels, rank, 1, 1))

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        how = self.frozen
        h = F.conv2d(x, self.lora_A.to(x.dtype), None, how.stride, how.padding)
        # s times h, which is smaller than the answer: (B, r, H, W) -> (B, out, H, W)
        return F.conv2d(self.scale * h, self.lora_B.to(x.dtype))


class DoRALinear(Beside):
    """Magnitude and direction apart: m V x / ||V||, with V = W + s B A and a length m for each row.

    https://arxiv.org/abs/2402.09353, equation 5; no gradient passes through ||V||, section 4.3.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, generator: torch.Generator):
        super().__init__(base, rank, alpha)
        A, B = start((rank, base.in_features), generator), torch.zeros(base.out_features, rank)
        self.learn(lora_A=A, lora_magnitude_vector=self.weight().norm(dim=1), lora_B=B)

    def gain(self) -> Tensor:
        """m / ||V||, (out,) fp32."""
        with torch.no_grad():
            V = self.weight() + self.scale * (self.lora_B.float() @ self.lora_A.float())
        return self.lora_magnitude_vector.float() / V.norm(dim=1)

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        gain, base = self.gain(), self.frozen
        Wx = y if base is self.base else base(x)
        Wx = Wx if base.bias is None else Wx - base.bias.to(x.dtype)
        BAx = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return (gain - 1).to(x.dtype) * Wx + (self.scale * gain).to(x.dtype) * BAx

    @torch.no_grad()
    def update(self) -> Tensor:
        return rescaled(self.weight(), super().update(), self.lora_magnitude_vector[:, None])


class LoHaLinear(Beside):
    """(W + s (B1 A1) o (B2 A2)) x, an element-wise product: its rank may reach r r.

    https://arxiv.org/abs/2108.06098, equation 3
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, generator: torch.Generator):
        super().__init__(base, rank, alpha)
        wide, tall = (rank, base.in_features), (base.out_features, rank)
        B1, A1, A2 = (torch.randn(shape, generator=generator) for shape in (tall, wide, wide))
        B2 = torch.zeros(tall)
        self.learn(hada_w1_a=0.1 * B1, hada_w1_b=A1, hada_w2_b=A2, hada_w2_a=B2)

    def branch(self, x: Tensor) -> Tensor:
        product = (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)
        return F.linear(x, (self.scale * product).to(x.dtype))  # (..., in) -> (..., out)

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        # Computed again in the backward pass: kept, the products would be three times the weights.
        return checkpoint(self.branch, x, use_reentrant=False, preserve_rng_state=False)


class LoKrLinear(Beside):
    """(W + s w1 (x) w2) x, Kronecker's product of a small matrix and one of low rank.

    https://arxiv.org/abs/2309.14859, section 3.2; sizes and names as in LyCORIS: out = a b and
    in = c d, w1 is (a, c), and w2 (b, d) is w2_a w2_b, or, from r = max(b, d) / 2 on, whole with
    s = 1.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, generator: torch.Generator):
        (a, b), (c, d) = factors(base.out_features), factors(base.in_features)
        small = rank < max(b, d) / 2
        super().__init__(base, rank, alpha if small else rank)
        w1, w2 = start((a, c), generator), {"lokr_w2": torch.zeros(b, d)}
        if small:
            w2_a = start((b, rank), generator)
            w2 = {"lokr_w2_a": w2_a, "lokr_w2_b": torch.zeros(rank, d)}
        self.learn(lokr_w1=w1, **w2)

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        parts = {key: getattr(self, key).to(x.dtype) for key in self.keys}
        w1, w2 = (factor(parts, name) for name in ("lokr_w1", "lokr_w2"))
        X = x.unflatten(-1, (w1.shape[1], w2.shape[1]))  # (..., c, d): (w1 (x) w2) x = w1 X w2'
        return self.scale * (w1 @ F.linear(X, w2)).flatten(-2)  # (..., a, b) -> (..., out)


def factors(width: int) -> tuple[int, int]:
    """The two factors of `width` that are nearest to each other, the smaller one first."""
    small = next(n for n in range(math.isqrt(width), 0, -1) if width % n == 0)
    return small, width // small


def factor(parts: dict[str, Tensor], name: str) -> Tensor:
    """One of LoKr's two matrices, whole or as a product."""
    return parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"].flatten(1)


def product(parts: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """What a layer's `parts` of any kind come to, of the weight's shape (out, in) or (out, in, 3,
    3), not scaled.
    """
    return matrix(parts, shape).view(shape)


def matrix(parts: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """product() as a matrix: (out, in) or (out, in x 3 x 3)."""
    if "hada_w1_a" in parts:
        one, two = (parts[f"hada_w{i}_a"] @ parts[f"hada_w{i}_b"].flatten(1) for i in (1, 2))
        return one * two
    if "lora_A" in parts:
        return parts["lora_B"].flatten(1) @ parts["lora_A"].flatten(1)
    w1, w2 = (factor(parts, name) for name in ("lokr_w1", "lokr_w2"))
    w2 = w2.reshape(len(w2), shape[1] // w1.shape[1], -1)  # of a convolution (b, d, 3 3)
    return torch.kron(w1[:, :, None], w2.contiguous()).flatten(1)


def rescaled(W: Tensor, update: Tensor, m: Tensor) -> Tensor:
    """DoRA's update: m V / ||V|| - W with V = W + `update`, a length m for each row, (out, 1), or
    as LyCORIS once had it for each column, (1, in).
    """
    V, axis = W + update, int(len(m) == 1 < len(W))  # which one is kept
    across = [i for i in range(V.ndim) if i != axis]
    m = m.view([-1 if i == axis else 1 for i in range(V.ndim)])
    return m * V / torch.linalg.vector_norm(V, dim=across, keepdim=True) - W


def shape_of(layer: nn.Module) -> tuple[int, ...]:
    """The weight's, of a 4-bit layer, too."""
    return layer.weight.shape if is_conv(layer) else (layer.out_features, layer.in_features)


KINDS = {"lora": lora.LoRALinear, "dora": DoRALinear, "loha": LoHaLinear, "lokr": LoKrLinear}

# ---- which layers --------------------------------------------------------------------------------


class Adapter(lora.Adapter):
    """Layers of any kind, each of its own rank. rank: of those that no pattern names; among: the
    names of all layers of the model.
    """

    among: tuple[str, ...] = ()

    def matrices(self) -> dict[str, Tensor]:
        layers = self.layers.items()
        return {f"{name}.{key}": getattr(each, key) for name, each in layers for key in keys(each)}

    @property
    def ranks(self) -> dict[str, int]:
        """Those of layers whose rank is another."""
        ranks = {name: rank_of(layer) for name, layer in self.layers.items()}
        return {name: rank for name, rank in ranks.items() if rank != self.rank}


def keys(layer: nn.Module) -> tuple[str, ...]:
    """A layer's trained parameters; the last is zero at the start."""
    return getattr(layer, "keys", ("lora_A", "lora_B"))


def rank_of(layer: nn.Module) -> int:
    return layer.rank if isinstance(layer, Beside) else len(layer.lora_A)


def kind_of(adapter: lora.Adapter) -> str:
    """Of KINDS; convolutions have LoRA alone."""
    types = {type(layer) for layer in adapter.layers.values()}
    return next((kind for kind, cls in KINDS.items() if cls in types), "lora")


def moved(adapter: lora.Adapter) -> bool:
    """Whether any layer does anything."""
    return any(getattr(layer, keys(layer)[-1]).any() for layer in adapter.layers.values())


def able(unet: nn.Module) -> dict[str, nn.Module]:
    """The Linear layers and convolutions of `unet` by name: a layer's own, if some are adapted."""
    plain = {n.replace(".base", ""): each for n, each in unet.named_modules()}
    return {n: m for n, m in plain.items() if hasattr(m, "in_features") or is_conv(m)}


def find(unet: nn.Module, wanted: Iterable[str]) -> dict[str, nn.Module]:
    """The Linear layers and convolutions of `unet` that `wanted` names: sets of GROUPS, or regular
    expressions, each found somewhere in a layer's dotted name. Raises Refusal, naming those that
    match nothing, and for a model with an adapter.
    """
    # diffusers takes the dtype of the first parameter, in conv_in, for that of the whole UNet.
    names, found, nothing = {n: m for n, m in able(unet).items() if n != "conv_in"}, {}, []
    for word in wanted:
        marks = [*GROUPS.values()][: SETS[word]] if word in SETS else [word]
        match = {n: each for n, each in names.items() if any(re.search(m, n) for m in marks)}
        nothing += [word] if not match else []
        found |= match
    adapted = [n for n, m in unet.named_modules() if isinstance(m, (lora.LoRALinear, Beside))]
    if nothing or adapted:
        raise Refusal(
            f"targets {', '.join(nothing) or '(all)'} match {', '.join(adapted[:1]) or 'nothing'}",
            f"{', '.join(SETS)}, or parts of names of a bare model's layers, such as "
            + max(names, key=lambda name: ("attn" in name, name)),
            "correct --targets or --rank-pattern" if nothing else "load the model again",
        )
    return {name: each for name, each in names.items() if name in found}


def inject(
    unet: nn.Module,
    targets: tuple[str, ...],
    rank: int = 16,
    alpha: float = 32,
    seed: int = 0,
    kind: str = "lora",
    rank_pattern: dict[str, int] | None = None,
) -> Adapter:
    """lora.inject() for every kind of KINDS, for the layers that find() finds, and with other ranks
    where a name of `rank_pattern` is found in a layer's; alpha stays, so that alpha / r is less.
    """
    names, layers, found, ranks = able(unet), {}, find(unet, targets), {}
    for word, other in (rank_pattern or {}).items():
        if not (hit := find(unet, [word]).keys() & found):
            what = f"--rank-pattern {word} is found in no layer of --targets {' '.join(targets)}"
            raise Refusal(what, "parts of names of layers that are adapted", "correct one")
        ranks |= dict.fromkeys(hit, other)
    if lost := [name for name, each in found.items() if kind != "lora" and is_conv(each)]:
        remedy = "--adapter lora, or --targets transformer"
        raise Refusal(f"{kind} on {len(lost)} convolutions such as {lost[0]}", "Linears", remedy)
    unet.requires_grad_(False)
    for name, base in found.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
        cls = LoRAConv2d if is_conv(base) else KINDS[kind]
        layers[name] = cls(base, ranks.get(name, rank), alpha, generator)
        unet.set_submodule(name, layers[name])
    adapter = Adapter(layers, rank, alpha, tuple(found))
    adapter.among = tuple(names)
    return adapter


def is_conv(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d)


def injector(config: Config) -> Callable:
    """What puts the run's adapter into its UNet: the book's own function where that does."""
    if not relatives(config):
        return lora.inject
    pairs = (each.rpartition("=") for each in config.rank_pattern)
    pattern = {word: int(rank) for word, _, rank in pairs}

    def put_in(unet: nn.Module, _, *how) -> Adapter:
        return inject(unet, config.targets, *how, kind=config.adapter, rank_pattern=pattern)

    return put_in


def check(config: Config, half: bool) -> None:
    """Raise inject()'s Refusal before an hour of encoding: on the base's shapes, without numbers.
    half: whether the fp16 variant is meant.
    """
    if relatives(config):
        unet = model.build_unet(hub.fetch(config.pretrained_model_name_or_path, "unet", half))
        with torch.device("meta"):
            injector(config)(unet, config.targets)


def makers(config: Config) -> list[str]:
    """The code that makes the numbers of such an adapter, by full name."""
    if not relatives(config):
        return []
    own = {"lora": "LoRAConv2d", "dora": "DoRALinear weight_of frozen_of", "loha": "LoHaLinear"}
    own |= {"lokr": "LoKrLinear factors factor"}
    names = f"GROUPS SETS Beside start find inject {own[config.adapter]}".split()
    return [f"{__name__}.{name}" for name in names]


def describe(adapter: lora.Adapter) -> str:
    """How many layers of each group are adapted, and how many numbers they learn, in words; "" of
    the book's, whose count is told anyway.
    """
    if type(adapter) is lora.Adapter:
        return ""
    counts: dict[str, list[int]] = {}
    for name, layer in adapter.layers.items():
        group = next((g for g, mark in GROUPS.items() if re.search(mark, name)), "others")
        count = counts.setdefault(group, [0, 0])
        count[0] += 1
        count[1] += sum(getattr(layer, key).numel() for key in keys(layer))
    told = (f"{group} {layers} layers with {n:,}" for group, (layers, n) in counts.items())
    return f"{kind_of(adapter)}: {'; '.join(told)} parameters"
