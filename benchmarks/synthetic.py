"""A run without files: loop.py's own, on a UNet of random weights and on pictures of random numbers
in the place of the cache. Nothing is downloaded or read. ladder.py and others measure such runs.
"""

from inputs import (
    options as configuration,  # first: it sets how long idle threads spin, before torch asks
)

# isort: split
import functools
from collections.abc import Iterable
from pathlib import Path

import bitsandbytes
import diffusers
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import data
import loop
import model
from adapters import kinds
from fast.nf4 import WHOLE
from keep import faster

ROOT = Path(__file__).resolve().parent.parent
# TFLOP of one image: forward, and backward to the noisy latent with frozen weights; the adapter not
# counted. Counted by useful_flop(), which takes seconds; other sizes are counted when asked for.
USEFUL_TFLOP = {512: 3.172, 768: 7.468, 1024: 14.222}


def random_unet(
    folder: Path, device: torch.device, dtype: torch.dtype, rounded=None, nf4: bool = False
) -> diffusers.UNet2DConditionModel:
    """A UNet of the shape in `folder`, drawn on `device`: matrices normal with deviation 0.02,
    norms 1, biases 0, which keeps fp16 finite. rounded: the dtype that the numbers are rounded to
    first, so that two dtypes can have one model. nf4: Linears in 4 bits, each when it is drawn.
    """
    with torch.device("meta"):
        config = diffusers.UNet2DConditionModel.load_config(folder / "unet")
        unet = diffusers.UNet2DConditionModel.from_config(config)
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    for name, module in list(unet.named_modules()):
        for key, was in list(module.named_parameters(recurse=False)):
            if was.ndim > 1:
                numbers = 0.02 * torch.randn(was.shape, generator=generator, device=device)
            else:
                numbers = torch.full(was.shape, float(key == "weight"), device=device)
            numbers = numbers.to(rounded or dtype).to(dtype)
            setattr(module, key, torch.nn.Parameter(numbers, requires_grad=False))
        if nf4 and isinstance(module, torch.nn.Linear) and not name.startswith(WHOLE):
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, four_bits(module))
    return unet.requires_grad_(False).eval()


def four_bits(linear: torch.nn.Linear) -> torch.nn.Module:
    """The same layer with its weight in NF4 (Dettmers et al. 2023, arXiv:2305.14314, section 3)."""
    weight, bias = linear.weight, linear.bias
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=bias is not None,
        compute_dtype=weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    packed = bitsandbytes.nn.Params4bit(weight.data, requires_grad=False, quant_type="nf4")
    layer.weight = packed.to(weight.device)  # this quantises
    layer.bias = bias
    layer.support_avx512bf16_for_cpu = False  # as nf4.linear_4bit() says
    return layer


class RandomPictures:
    """In the cache's place: `count` encoded pictures of `side` pixels with their captions."""

    def __init__(self, unet: diffusers.UNet2DConditionModel, side: int, count: int = 16):
        g, config = torch.Generator().manual_seed(0), unet.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        self.mean = 5 * torch.randn(count, 4, side // 8, side // 8, generator=g)
        self.context = torch.randn(count + 1, 77, config.cross_attention_dim, generator=g)
        self.context = self.context.to(unet.dtype)  # as the cache keeps it
        self.pooled = torch.randn(count + 1, pooled, generator=g).to(unet.dtype)
        self.captions_of = [range(i, i + 1) for i in range(count)]
        self.time_ids = model.add_time_ids((683, 1024), (0, 128), (side, side))

    def latent(self, index: int, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
        mean = self.mean[index].flip(-1) if flip else self.mean[index]
        return mean, torch.full_like(mean, 0.01), self.time_ids

    def prompt(self, index: int) -> tuple[Tensor, Tensor]:
        return self.context[index], self.pooled[index]


def by_the_book(
    config: configuration.Config,
    device: torch.device,
    folder: Path,
    rounded=None,
    nf4: bool = False,
) -> tuple[loop.Run, list[str]]:
    """A run at its first step as loop.assemble() leaves it, on random weights and pictures: what
    --plain steps. Returns the run, and what is to be said about it.
    """
    dtype, _ = model.choose_dtype(config.mixed_precision, device)
    unet = random_unet(folder, device, dtype, rounded, nf4)
    how = model.use_attention(unet, config.attention, device, dtype)
    schedule = model.load_noise_schedule(str(ROOT / "inputs/sdxl"), device)
    examples = examples_of(
        unet, max(config.resolution), config.examples_per_step, config.seed, True
    )
    scaling = model.latent_scaling(str(ROOT / "inputs/sdxl"))
    parts = (examples, schedule, scaling, kinds.injector(config))
    return loop.assemble(config, unet, *parts), [how]


def assemble(
    config: configuration.Config,
    device: torch.device,
    folder: Path,
    rounded=None,
    nf4: bool = False,
    team: faster.Alone | None = None,
) -> tuple[loop.Run, list[str]]:
    """The same run as the product steps it: with what `config` asks for plugged in. team: the
    processes that share it, if there are several.
    """
    run, said = by_the_book(config, device, folder, rounded, nf4)
    _, how, _ = faster.faster(run, team or faster.Alone(), said.append)
    said += filter(None, [how])
    return run, said


def examples_of(
    unet: diffusers.UNet2DConditionModel, side: int, n: int, seed: int, random_flip: bool = False
) -> data.Examples:
    """Examples of RandomPictures, whose timesteps are drawn from 1,000."""
    pictures = RandomPictures(unet, side)
    names = [f"random {i}" for i in range(len(pictures.mean))]
    chances, sizes = data.Chances(random_flip=random_flip), [(side, side)] * len(names)
    return data.Examples(pictures, names, sizes, n, seed, chances, 1000)


def flattened(matrices: Iterable[Tensor]) -> Tensor:
    """All numbers of `matrices`, one after another, (N,) fp32: a copy on the CPU."""
    return torch.cat([matrix.detach().flatten().float().cpu() for matrix in matrices])


def gradient(run: loop.Run) -> Tensor:
    """What has been added to the gradients of all that learns, the loss scale taken out, (N,)."""
    return flattened(matrix.grad for matrix in run.trained.values()) / run.scale_on_device.cpu()


@torch.no_grad()
def leave_zero(run: loop.Run) -> None:
    """Add the same small random numbers to every A and B of any such run. Where B is zero the
    gradient of A is, too, whatever is wrong with it.
    """
    generator = torch.Generator().manual_seed(1)
    for matrix in run.trained.values():
        noise = 0.01 * torch.randn(matrix.shape, generator=generator)
        matrix.add_(noise.to(matrix.device))


@functools.cache
def useful_flop(folder: Path, side: int) -> float:
    """FLOP of one image of `side` pixels, as USEFUL_TFLOP says."""
    unet = random_unet(folder, torch.device("meta"), torch.float16)
    batch = meta_batch(unet, side)
    x_t = batch["noise"].requires_grad_()
    with FlopCounterMode(display=False) as counted:
        model.predict(unet, x_t, batch).sum().backward()
    return counted.get_total_flops()


def meta_batch(unet: diffusers.UNet2DConditionModel, side: int) -> dict[str, Tensor]:
    """One example's batch in shapes only."""
    return examples_of(unet, side, 1, 0).batch(range(1), torch.device("meta"))


def flop_of(folder: Path, side: int) -> float:
    """useful_flop(), known already for SDXL at its usual sizes."""
    if folder.name == "sdxl" and side in USEFUL_TFLOP:
        return USEFUL_TFLOP[side] * 1e12
    return useful_flop(folder, side)
