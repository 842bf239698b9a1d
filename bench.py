"""Seconds and GiB per technique, on this machine's card: python bench.py ladder

The UNet has SDXL base's shape and random weights, drawn on the device, and the pictures are random
numbers in the place of the cache: nothing is downloaded or read. What is timed is loop.py's own
optimizer_step(), with the examples that the host prepares for it.

ladder: one technique after the other. recipe: a recipe with its own batch (the memory plan is not
asked), under --cap-gib. against: the ladder's file beside other trainers' numbers. floor: the
card's fastest matrix product. profile: where a step's time goes. same: how far each technique's
loss and gradient are from fp32. t4: what a T4 would need, by arithmetic.
"""

import config as configuration  # first: it sets how long idle threads spin, before torch asks

# isort: split
import dataclasses
import functools
import json
import platform
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import bitsandbytes
import diffusers
import torch
import tyro
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import data
import graph
import loop
import model
from files import Refusal, first_line, write_whole
from nf4 import WHOLE

ROOT = Path(__file__).parent
Row = dict[str, str | float]
Rows = Iterator[tuple[str, Callable[[], Row]]]

# Each row is the one above with one thing changed, down to compile; the last two stand beside
# "graph".
LADDER = {
    "eager": {"fused": False, "cuda_graph": False},  # the definitions, 1x4
    "fused": {"cuda_graph": False},
    "graph": {},
    "4x1": {"train_batch_size": 4, "gradient_accumulation_steps": 1},
    "compile": {"train_batch_size": 4, "gradient_accumulation_steps": 1, "compile": True},
    "checkpointing": {"gradient_checkpointing": True},
    "nf4": {"gradient_checkpointing": True},
}
ONE_BY_FOUR = {
    "train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing": False,
    "cuda_graph": True,
    "fused": True,
    "use_8bit_adam": True,
    "lora_rank": 16,
}
PEERS = {  # (seconds per optimizer step, peak GiB allocated) by resolution
    "diffusers' script, fp16, checkpointing": {512: (4.63, 7.77), 1024: (4.83, 10.03)},
    "kohya sd-scripts, fp16, checkpointing, all cached": {512: (3.06, 5.58), 1024: (3.19, 6.13)},
    "kohya sd-scripts, fp8 base, checkpointing, all cached": {512: (3.12, 3.22)},
}
PEERS_SOURCE = (
    "The peers' numbers were measured once, not by this script: on an H100 with torch 2.11, "
    "full-size SDXL with random weights, rank 16, AdamW8bit, 4 images per optimizer step."
)
# TFLOP of one image: forward, and backward to the noisy latent with frozen weights; the adapter not
# counted. Counted by useful_flop(), which takes seconds; other sizes are counted when asked for.
USEFUL_TFLOP = {512: 3.172, 768: 7.468, 1024: 14.222}

T4_PEAK, T4_BYTES, T4_LAUNCH = 65e12, 300e9, 5e-6  # FLOP/s in fp16 and B/s, as sold; s, assumed
PUBLISHED_MINUTES = 118  # of 1,000 steps of the published run, on a T4


@dataclass(frozen=True)
class Options:
    """Seconds and GiB per technique, on random weights and random pictures."""

    # What to measure; see the top of bench.py.
    command: tyro.conf.Positional[
        Literal["ladder", "recipe", "against", "floor", "profile", "same", "t4"]
    ]
    # The recipes of "recipe"; none means all of the full size.
    recipes: tyro.conf.Positional[tuple[str, ...]] = ()
    # Sides of the training square in pixels; recipes have their own unless this is given.
    resolution: tuple[int, ...] = ()
    # Rows of the ladder, for "ladder", "profile" and "same"; none means all ("profile": graph).
    rows: tuple[Literal[tuple(LADDER)], ...] = ()
    # The UNet's dtype; empty is fp16 (on a CPU fp32), and for "recipe" the recipe's own.
    mixed_precision: Literal["", "fp32", "fp16", "bf16"] = ""
    # Steps that are timed; 0 means 10, eager ones 3 and those of "recipe" 50.
    steps: int = 0
    # Steps before them, in which libraries choose kernels and the graph is recorded.
    warm_up: int = 3
    # Leave this much of the GPU's memory to the process; 0 is all of it. 14.5 is a T4's.
    cap_gib: float = 0.0
    # auto, cpu or cuda.
    device: str = "auto"
    # The pocket model's shape instead of SDXL's: to try this script on a CPU.
    tiny: bool = False
    # Where the rows go as JSON, beside those already there; empty is runs/bench/bench_COMMAND.json.
    out: str = ""
    # The ladder's file, which "against" reads.
    ladder: str = "benchmarks/bench_ladder.json"

    @property
    def folder(self) -> Path:
        """Where the UNet's config.json lies."""
        return ROOT / ("pocket/model" if self.tiny else "tests/sdxl")

    @property
    def sides(self) -> tuple[int, ...]:
        return self.resolution or (512,)

    @property
    def on(self) -> torch.device:
        return model.check_device(self.device)

    def precision(self) -> str:
        return self.mixed_precision or ("fp16" if self.on.type == "cuda" else "fp32")


# ---- a run without files -------------------------------------------------------------------------


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
        self.time_ids = model.add_time_ids((683, 1024), (0, 128), (side, side))

    def latent(self, index: int, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
        mean = self.mean[index].flip(-1) if flip else self.mean[index]
        return mean, torch.full_like(mean, 0.01), self.time_ids

    def prompt(self, index: int) -> tuple[Tensor, Tensor]:
        return self.context[index], self.pooled[index]


def assemble(
    config: configuration.Config,
    device: torch.device,
    folder: Path,
    rounded=None,
    nf4: bool = False,
) -> tuple[loop.Run, list[str]]:
    """What loop.set_up() does, on random weights and pictures. Returns the run, and what is to be
    said about it.
    """
    where = torch.device("cpu") if device.type == "meta" else device
    dtype, _ = model.choose_dtype(config.mixed_precision, where)
    unet = random_unet(folder, device, dtype, rounded, nf4)
    said: list[str] = []
    schedule = model.load_noise_schedule(str(ROOT / "tests/sdxl"), device)
    pictures = RandomPictures(unet, config.resolution)
    names = [f"random {i}" for i in range(len(pictures.mean))]
    shape = tuple(pictures.mean.shape[1:])
    examples = data.Examples(pictures, names, config.seed, True, 0.0, 0.0, 1000, shape)
    scaling = model.latent_scaling(str(ROOT / "tests/sdxl"))
    run, how = loop.assemble(config, unet, examples, schedule, scaling, {})
    if isinstance(run.forward_backward, graph.Recorded):
        run.forward_backward.say = said.append
    said.append(how)
    return run, said


# ---- what is measured ----------------------------------------------------------------------------


def wait(device: torch.device) -> float:
    """The time when the device has done all it was given, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@functools.cache
def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the median of 10: what this card can do at all."""
    side = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        began = wait(device)
        for _ in range(4):
            a @ b
        seconds.append((wait(device) - began) / 4)
    return 2 * side**3 / statistics.median(seconds[2:])


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
    examples = data.Examples(
        RandomPictures(unet, side), ["random"], 0, False, 0.0, 0.0, 1000, (4, side // 8, side // 8)
    )
    return examples.batch(range(1), torch.device("meta"))


def flop_of(options: Options, side: int) -> float:
    if not options.tiny and side in USEFUL_TFLOP:
        return USEFUL_TFLOP[side] * 1e12
    return useful_flop(options.folder, side)


def time_row(options: Options, config: configuration.Config, nf4: bool, steps: int) -> Row:
    """Seconds and GiB of optimizer_step() under `config`."""
    device = options.on
    dtype, _ = model.choose_dtype(config.mixed_precision, device)
    peak, cuda = matrix_peak(device, dtype), device.type == "cuda"
    if cuda:
        torch._C._cuda_clearCublasWorkspaces()  # of the rows before: each stream keeps its own
    model.free_memory()
    row: Row = {"gib_before": gib(torch.cuda.memory_allocated()) if cuda else 0.0}
    run, said = assemble(config, device, options.folder, nf4=nf4)
    model.free_memory()
    if cuda:  # a base quantised in place was whole for a moment; one that nf4.py loads never is
        torch.cuda.reset_peak_memory_stats()
    seconds, losses, began = [], [], wait(device)
    try:
        for _ in range(options.warm_up + steps):
            # As the loop runs: a step ends when its loss is known, while the GPU still updates.
            losses.append(loop.optimizer_step(run)[0])
            seconds.append(time.perf_counter() - began)
            began += seconds[-1]
    except torch.cuda.OutOfMemoryError as error:
        row["error"] = f"out of memory in step {run.step + 1}: {first_line(error)}"
    else:
        timed, n = seconds[options.warm_up :], config.examples_per_step
        middle = statistics.median(timed)
        useful = n * flop_of(options, config.resolution) / middle
        row |= {"s_per_step": round(middle, 4), "s_lowest": round(min(timed), 4)}
        row |= {"s_highest": round(max(timed), 4), "images_per_s": round(n / middle, 2)}
        row |= {"mfu": round(useful / peak, 3), "s_first_step": round(seconds[0], 2)}
        row |= {"loss": round(losses[-1], 4), "skipped": run.scale.skipped, "steps": steps}
        row["losses"] = [round(loss, 4) for loss in losses]
    if cuda:
        row["gib_allocated"] = gib(torch.cuda.max_memory_allocated())
        row["gib_reserved"] = gib(torch.cuda.max_memory_reserved())
    return row | {"said": "; ".join(said)}


def gib(count: int) -> float:
    return round(count / 2**30, 2)


def changed(options: Options, side: int, row: str, precision: str = "") -> configuration.Config:
    """Row `row` of the ladder as a Config: t4's mathematics, with everything a row is about set."""
    settings = ONE_BY_FOUR | LADDER[row] | {"resolution": side, "max_train_steps": 10**6}
    precision = precision or options.precision()
    return dataclasses.replace(
        configuration.RECIPES["t4"][1], **settings, mixed_precision=precision
    )


def ladder(options: Options) -> Rows:
    for side in options.sides:
        for row in options.rows or LADDER:
            config = changed(options, side, row)
            steps = options.steps or (10 if config.cuda_graph else 3)
            name = f"{side} px, {config.mixed_precision}, {row}"
            yield name, functools.partial(time_row, options, config, row == "nf4", steps)


def recipe(options: Options) -> Rows:
    """Recipes as they are. An unknown one is a row with an error: the others are measured."""
    for name in options.recipes or [r for r in configuration.RECIPES if r != "pocket"]:
        for side in options.resolution or (0,):
            cap = f", cap {options.cap_gib:g} GiB" if options.cap_gib else ""
            size = f" at {side} px" if side else ""
            yield f"{name}{size}{cap}", functools.partial(recipe_row, options, name, side)


def recipe_row(options: Options, name: str, side: int) -> Row:
    if name not in configuration.RECIPES:
        raise Refusal(
            f"recipe {name}", ", ".join(configuration.RECIPES), "python bench.py recipe t4"
        )
    config = configuration.RECIPES[name][1]
    config = dataclasses.replace(
        config,
        max_train_steps=10**6,
        resolution=side or config.resolution,
        mixed_precision=options.mixed_precision or config.mixed_precision,
    )
    nf4 = "nf4" in dataclasses.asdict(config).values()
    settings = {"px": config.resolution, "dtype": config.mixed_precision}
    settings["batch"] = f"{config.train_batch_size}x{config.gradient_accumulation_steps}"
    return settings | time_row(options, config, nf4, options.steps or 50)


def floor(options: Options) -> Rows:
    """The matrix product, and the seconds in which it would do the ladder's work."""
    for precision in [options.mixed_precision] if options.mixed_precision else model.DTYPES:
        yield precision, functools.partial(floor_row, options, model.DTYPES[precision])


def floor_row(options: Options, dtype: torch.dtype) -> Row:
    peak = matrix_peak(options.on, dtype)
    row: Row = {"tflop_per_s": round(peak / 1e12, 1)}
    for side in options.sides:
        row[f"tflop_per_image_{side}"] = round(flop_of(options, side) / 1e12, 4)
        row[f"s_floor_{side}_4_images"] = round(4 * flop_of(options, side) / peak, 4)
    return row


# ---- where the time goes -------------------------------------------------------------------------

# The first that matches: a convolution may be called a gemm, and a copy an element-wise kernel.
KINDS = {
    "optimizer": r"optimizer|adam|foreach",
    "attention": r"flash|fmha|sdpa|attention|softmax",
    "dequantising": r"quantize",
    "copies": r"copy|CatArray|concat|memcpy|memset|cat\b|nchwTonhwc|nhwcTonchw|transpose|_to_copy",
    "convolutions": r"conv|cudnn|fprop|dgrad|wgrad|winograd|im2col|col2im",
    "norms": r"norm|RowwiseMoments|welford|GammaBeta|InternalGradients|FusedParams|batch_norm",
    "products": r"gemm|gemv|nvjet|cutlass|splitk|cublas|::(add|b|badd)?mm|matmul|_int_mm",
    "elementwise": r"elementwise|gelu|silu|reduce|unrolled|index|fill|scatter|::(mul|add|sum)",
}


def kind_of(kernel: str) -> str:
    found = (kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE))
    return next(found, "other")


def profile(options: Options) -> Rows:
    for side in options.sides:
        for row in options.rows or ("graph",):
            config = changed(options, side, row)
            name = f"{side} px, {config.mixed_precision}, {row}"
            yield name, functools.partial(profile_row, options, config, row == "nf4")


def profile_row(options: Options, config: configuration.Config, nf4: bool) -> Row:
    """Milliseconds and number of one step's kernels (on a CPU: of its operators), by kind."""
    from torch.profiler import ProfilerActivity

    device = options.on
    run, said = assemble(config, device, options.folder, nf4=nf4)
    for _ in range(options.warm_up):
        loop.optimizer_step(run)
    cuda = device.type == "cuda"
    for _ in range(2):  # the first pass only starts the profiler, which takes seconds
        with torch.profiler.profile(
            activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
        ) as profiler:
            began = wait(device)
            loop.optimizer_step(run)
            wall = wait(device) - began
    spent = dict.fromkeys([*KINDS, "other"], (0.0, 0))
    longest = []
    for event in profiler.key_averages():
        span = event.key.startswith(("Optimizer.", "ProfilerStep"))  # others lie in it
        if span or ("CUDA" in str(event.device_type)) != cuda:
            continue
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = kind_of(event.key)
        spent[kind] = (spent[kind][0] + us / 1000, spent[kind][1] + event.count)
        longest.append((us / 1000, event.count, kind, event.key[:160]))
    row: Row = {"ms_wall_profiled": round(1000 * wall, 1)}
    row["ms_kernels"] = round(sum(ms for ms, _ in spent.values()), 1)
    row["kernels"] = sum(count for _, count in spent.values())
    for kind, (ms, count) in spent.items():
        row |= {f"ms_{kind}": round(ms, 2), f"n_{kind}": count}
    row["longest"] = [
        f"{ms:.2f} ms, {n} x, {k}: {key}" for ms, n, k, key in sorted(longest)[:-41:-1]
    ]
    return row | {"said": "; ".join(said)}


# ---- whether it is the same ----------------------------------------------------------------------


def gradient(
    options: Options, config: configuration.Config, rounded=None, nf4: bool = False
) -> tuple:
    """(mean loss, flat gradient (N,) fp32 on the CPU) of the examples of step 0, with an adapter
    whose B are not zero: the gradient of A is zero else, whatever is wrong with it.
    """
    run, _ = assemble(config, options.on, options.folder, rounded, nf4)
    noise = torch.randn(run.adapter.flat.shape, generator=torch.Generator().manual_seed(1))
    run.adapter.flat.data.add_(0.01 * noise.to(options.on))
    run.factor.fill_(run.scale.value)
    for numbers in loop.micro_batches(0, config.examples_per_step, config.train_batch_size):
        run.forward_backward(run.examples.batch(numbers, options.on))
    return run.loss_sum.item(), (run.adapter.flat.grad / run.factor).cpu()


@functools.lru_cache(maxsize=1)
def reference(options: Options, side: int, rounded: torch.dtype) -> tuple:
    """gradient() by the definitions in fp32, of weights rounded as those compared to it."""
    return gradient(options, changed(options, side, "eager", "fp32"), rounded)


def same(options: Options) -> Rows:
    rows = options.rows or [row for row in LADDER if row != "nf4"]
    for side in options.sides:
        for precision in [options.mixed_precision] if options.mixed_precision else ["fp16", "bf16"]:
            for row in rows:
                yield (
                    f"{side} px, {precision}, {row}",
                    functools.partial(same_row, options, side, row, precision),
                )


def same_row(options: Options, side: int, row: str, precision: str) -> Row:
    """Relative differences from reference(). cosine: between the two gradients."""
    torch.backends.cudnn.allow_tf32 = False  # the reference's convolutions in fp32 indeed
    want_loss, want = reference(options, side, model.DTYPES[precision])
    model.free_memory()
    loss, grad = gradient(options, changed(options, side, row, precision), nf4=row == "nf4")
    cosine = torch.nn.functional.cosine_similarity(grad.double(), want.double(), dim=0)
    return {
        "loss": loss,
        "loss_off": float(f"{abs(loss - want_loss) / abs(want_loss):.3g}"),
        "gradient_off": float(f"{(grad - want).norm() / want.norm():.3g}"),
        "one_minus_cosine": float(f"{1 - cosine:.3g}"),
        "gradient_norm": float(f"{want.norm():.4g}"),
    }


# ---- by arithmetic -------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Counts operators that compute, and the bytes that those other than matrix products and
    convolutions read and write, as if nothing stayed in a cache.
    """

    operators = moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if not func.is_view and not re.search(r"empty|detach|_unsafe_view|split|as_strided", name):
            self.operators += 1
            if not re.search(r"mm|convolution", name):
                tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
                self.moved += sum(t.numel() * t.element_size() for t in tensors)
        return out


def t4(options: Options) -> Rows:
    side = options.sides[0]
    yield (
        f"1,000 steps of t4 at {side} px on a T4 (estimate)",
        functools.partial(t4_row, options, side),
    )


def t4_row(options: Options, side: int) -> Row:
    """Minutes of 4,000 images: the arithmetic at two shares of the T4's peak; the bytes of what is
    no matrix product, and the launches, which the slower end adds.
    """
    config = changed(options, side, "graph", "fp16")
    run, _ = assemble(
        dataclasses.replace(config, use_8bit_adam=False), torch.device("meta"), options.folder
    )
    with Traffic() as traffic:
        loop.micro_step(run, meta_batch(run.unet, side))
    flop, images = flop_of(options, side), 4 * 1000
    products = {share: images * flop / (share * T4_PEAK) / 60 for share in (0.25, 0.45)}
    moved = images * traffic.moved / T4_BYTES / 60
    launches = images * traffic.operators * T4_LAUNCH / 60
    row: Row = {"tflop_per_image": round(flop / 1e12, 4), "min_at_45%": round(products[0.45], 1)}
    row |= {"min_at_25%": round(products[0.25], 1), "gb_moved": round(traffic.moved / 1e9, 2)}
    row |= {"min_bytes": round(moved, 1), "operators": traffic.operators}
    row |= {"min_launches": round(launches, 1), "min_from": round(products[0.45], 1)}
    row |= {"min_to": round(products[0.25] + moved + launches, 1), "published": PUBLISHED_MINUTES}
    print(
        f"Estimate, not a measurement. FLOP: {flop / 1e12:.2f} TFLOP x {images} images / "
        f"({T4_PEAK / 1e12:.0f} TFLOP/s x 45 % and 25 %) = {products[0.45]:.1f} and "
        f"{products[0.25]:.1f} min.\nBytes of all but matrix products and convolutions: "
        f"{traffic.moved / 1e9:.2f} GB x {images} / {T4_BYTES / 1e9:.0f} GB/s = {moved:.1f} min."
        f"\nLaunches in a graph: {traffic.operators} operators x {images} x "
        f"{T4_LAUNCH * 1e6:.0f} us = {launches:.1f} min.\nRange: {products[0.45]:.0f} to "
        f"{products[0.25] + moved + launches:.0f} min (the slower end adds all three); published: "
        f"{PUBLISHED_MINUTES} min.\nTo check on a T4: python bench.py recipe t4 --steps 20, and "
        "report its table: s_per_step x 1000 / 60 is the minutes, gib_reserved the memory."
    )
    return row


def against(options: Options) -> Rows:
    """The peers' rows, then the ladder's: seconds and GiB. All peers' rows are with checkpointing,
    so they are compared with our row that is, too.
    """
    file = Path(options.ladder)
    if not file.is_file():
        raise Refusal(f"no {file}", "the ladder's JSON", "python bench.py ladder first")
    ours = {k: r for k, r in json.loads(file.read_text())["rows"].items() if "s_per_step" in r}
    for side in options.resolution or (512, 1024):
        mine = {k: r for k, r in ours.items() if k.startswith(f"{side} px,")}
        same = [r["s_per_step"] for k, r in mine.items() if k.endswith(", checkpointing")]
        for name, numbers in PEERS.items():
            if side in numbers:
                seconds, memory = numbers[side]
                row = {"s_per_step": seconds, "gib_allocated": memory}
                if same:
                    row["ours_with_checkpointing_is_times_faster"] = round(seconds / same[0], 1)
                yield f"{side} px, {name}", functools.partial(dict, row | {"source": PEERS_SOURCE})
        for name, row in mine.items():
            keep = {k: row[k] for k in ("s_per_step", "gib_allocated", "mfu") if k in row}
            yield f"{name} (ours)", functools.partial(dict, keep | {"source": row["on"]})


# ---- the command ---------------------------------------------------------------------------------


def attempt(measure: Callable[[], Row]) -> Row:
    """The row, or what went wrong: one failing row must not cost the others."""
    try:
        return measure()
    except Exception as error:  # any class: it is the row's result
        if not isinstance(error, Refusal):
            traceback.print_exc()
        full = isinstance(error, torch.cuda.OutOfMemoryError)
        return {
            "error": f"{'out of memory' if full else type(error).__name__}: {first_line(error)}"
        }


def machine(device: torch.device) -> str:
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return f"{card or device.type}, {versions}, bitsandbytes {bitsandbytes.__version__}"


def store(path: Path, name: str, row: Row) -> None:
    """Add the row to the file's, in place of one of its name: several calls make one table."""
    rows = json.loads(path.read_text())["rows"] if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps({"rows": rows | {name: row}}, indent=1) + "\n").encode())


def table(rows: dict[str, Row]) -> str:
    """Rows as Markdown; sentences and lists stay in the JSON."""
    hidden = ("said", "longest", "losses", "on", "command", "gib_before", "source")
    keys = list(dict.fromkeys(k for row in rows.values() for k in row if k not in hidden))
    lines = ["| | " + " | ".join(keys) + " |", "|" + "---|" * (len(keys) + 1)]
    for name, row in rows.items():
        cells = [str(row.get(key, "")).replace("|", "/") for key in keys]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns 0, or 1 where a row failed or the options cannot be."""
    options = tyro.cli(Options, args=argv, prog="bench.py")
    commands = (ladder, recipe, against, floor, profile, same, t4)
    path = Path(options.out or ROOT / "runs" / "bench" / f"bench_{options.command}.json")
    typed = " ".join(["python bench.py", *(sys.argv[1:] if argv is None else argv)])
    typed = re.sub(r" --(out|ladder)[ =]\S+", "", typed)  # a path of this machine tells nobody much
    rows = {}
    try:
        on = "" if options.command == "against" else machine(options.on)  # of several machines
        if options.cap_gib and options.on.type == "cuda":
            whole = torch.cuda.get_device_properties(options.on).total_memory
            torch.cuda.set_per_process_memory_fraction(options.cap_gib * 2**30 / whole)
        for name, measure in {f.__name__: f for f in commands}[options.command](options):
            row = attempt(measure)
            model.free_memory()
            rows[name] = row | {"on": on, "command": typed}
            store(path, name, rows[name])
            shown = {k: v for k, v in row.items() if k not in ("longest", "source")}
            print(f"{name}: {json.dumps(shown)}", flush=True)
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 1
    print(f"\n{on}\n\n{table(rows)}\n\nwritten to {path}")
    if options.command == "against":
        print(PEERS_SOURCE)
    return int(any("error" in row for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
