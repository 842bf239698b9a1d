"""Whether the layers compute what an adapter file means. Whoever edits LoRALinear or LoRAConv2d
trains that very edit, but a file holds A, B and alpha alone, and every other program reads them as
base(x) + alpha / r * B A x.

Letters as in lora.py.
"""

import copy
import functools

import torch
from torch import nn

import lora
from adapters.kinds import LoRAConv2d
from inputs.files import first_line


def meaning(run) -> list[str]:
    """What to say before the first step: nothing where the layers and the files mean the same.

    run: loop.assemble()'s; its layers are only copied, and no global generator is drawn from.
    """
    adapter, generator = run.adapter, torch.Generator(run.unet.device).manual_seed(0)
    wrong, lines = {}, []
    # Of other kinds no other program's formula is known here: tests hold them to their definition.
    kinds = (lora.LoRALinear, LoRAConv2d)
    plain = {n: each for n, each in adapter.layers.items() if type(each) in kinds}
    for name, layer in plain.items():
        try:
            off = distance(layer, adapter.alpha / len(layer.lora_A), generator)
            if not off <= 1e-4:  # nan is wrong, too
                wrong[name] = f"off by {off:.1e}"
        except Exception as error:  # an edited layer may need what a plain fp32 base has not
            wrong[name] = first_line(error)
    if wrong:
        name, how = next(iter(wrong.items()))
        lines.append(
            f"{len(wrong)} of {len(plain)} layers do not compute base(x) + alpha / r * B A x (of a "
            f"convolution B * (A * x)), as does {name} ({how}): this run goes on with what they "
            "compute, and its files will act otherwise in other programs"
        )
    if beyond := sorted(run.trained.keys() - adapter.matrices().keys()):
        lines.append(
            f"{len(beyond)} trained parameters, such as {beyond[0]}, have no place in an adapter "
            "file: they are kept in the checkpoints alone"
        )
    return lines


@torch.no_grad()
def distance(layer: nn.Module, scale: float, generator: torch.Generator) -> float:
    """How far a copy of `layer` with random numbers is from what a file means by alpha / r =
    `scale`, relative, in fp32.
    """
    normal = functools.partial(torch.randn, generator=generator, device=generator.device)
    if isinstance(layer, LoRAConv2d):
        how = {name: getattr(layer.base, name) for name in ("kernel_size", "stride", "padding")}
        sizes = layer.base.in_channels, layer.base.out_channels
        base = nn.Conv2d(*sizes, **how, bias=False, device="meta")
        x = normal(2, sizes[0], 5, 7)
    else:
        base = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        x = normal(2, 3, layer.in_features)
    # Each row is divided by the root of its length, so that the weight keeps a vector's length.
    weight = normal(base.weight.shape)
    base.weight = nn.Parameter(weight / weight[0].numel() ** 0.5, requires_grad=False)
    copied = copy.deepcopy(layer, {id(layer.base): base})  # what is in the memo stands for its copy
    for each in copied.parameters():
        if each.requires_grad:
            each.data = normal(each.shape) / (each[0].numel() ** 0.5 if each.ndim > 1 else 1)
    A, B = copied.lora_A, copied.lora_B
    B.data /= scale  # so that the branch is as large as the base's answer
    with torch.backends.cudnn.flags(enabled=False):  # some of its fp32 convolutions round more
        found = copied(x)
        base.weight += scale * (B.flatten(1) @ A.flatten(1)).view(weight.shape)
        meant = base(x)
    return ((found - meant).norm() / meant.norm()).item()
