"""Whether the layers compute what an adapter file means. Whoever edits LoRALinear trains that very
edit, but a file holds A, B and alpha alone, and every other program reads them as
base(x) + alpha / r * B A x.

Letters as in lora.py.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
from inputs.files import first_line


def meaning(run) -> list[str]:
    """What to say before the first step: nothing where the layers and the files mean the same.

    run: loop.assemble()'s; its layers are only copied, and no global generator is drawn from.
    """
    adapter, generator = run.adapter, torch.Generator(run.unet.device).manual_seed(0)
    off, failed, weights, lines = {}, {}, {}, []
    for name, layer in adapter.layers.items():
        try:
            off[name] = distance(layer, adapter.alpha / adapter.rank, generator, weights)
        except Exception as error:  # an edited layer may need what a plain fp32 base has not
            off[name], failed[name] = (
                torch.tensor(math.inf, device=run.unet.device),
                first_line(error),
            )
    far = dict(zip(off, torch.stack([*off.values()]).tolist(), strict=True))  # one wait for all
    if wrong := [name for name, each in far.items() if not each <= 1e-4]:  # nan is wrong, too
        how = failed.get(wrong[0], f"off by {far[wrong[0]]:.1e}")
        lines.append(
            f"{len(wrong)} of {len(far)} layers do not compute base(x) + alpha / r * B A x, as "
            f"does {wrong[0]} ({how}): this run goes on with what they compute, and its files "
            "will act otherwise in other programs"
        )
    matrices = adapter.matrices()
    ranks = {each.shape[0 if name.endswith("A") else 1] for name, each in matrices.items()}
    if ranks != {adapter.rank}:
        lines.append(f"the layers' ranks are {sorted(ranks)}: no file of one rank can hold them")
    if beyond := sorted(run.trained.keys() - matrices.keys()):
        lines.append(
            f"{len(beyond)} trained parameters, such as {beyond[0]}, have no place in an adapter "
            "file: they are kept in the checkpoints alone"
        )
    return lines


@torch.no_grad()
def distance(
    layer: lora.LoRALinear, scale: float, generator: torch.Generator, weights: dict
) -> Tensor:
    """How far a copy of `layer` with random numbers is from what a file means by alpha / r =
    `scale`, relative, (), in fp32. weights: those drawn so far, by shape: SDXL's 560 take seconds.
    """
    base = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    if base.weight.shape not in weights:
        weights[base.weight.shape] = drawn(base.weight.shape, generator)
    base.weight = nn.Parameter(weights[base.weight.shape], requires_grad=False)
    copied = copy.deepcopy(layer, {id(layer.base): base})  # what is in the memo stands for its copy
    for each in copied.parameters():
        if each.requires_grad:
            each.data = drawn(each.shape, generator)
    A, B = copied.lora_A, copied.lora_B
    B.data /= scale  # so that the branch is as large as the base's answer
    x = torch.randn(2, 3, layer.in_features, generator=generator, device=generator.device)
    meant = base(x) + scale * F.linear(F.linear(x, A), B)  # (2, 3, in) -> (2, 3, out)
    return (copied(x) - meant).norm() / meant.norm()


def drawn(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Normal numbers, a matrix (out, in) divided by sqrt(in): it keeps a vector's length."""
    numbers = torch.randn(shape, generator=generator, device=generator.device)
    return numbers / shape[-1] ** 0.5 if len(shape) > 1 else numbers
