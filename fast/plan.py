"""Which way of computing a run fits a card and is fastest there, and what a recipe needs on it.

What a step takes is found out by the real step, run on tensors without numbers: on the meta device
every operation of the micro-step runs for its shapes alone, and a mode above it follows which
storages are alive, and counts the work. An operator that is not named here counts by what it makes,
whoever registered it. What the GPU's libraries take besides (their workspaces) is a stated reserve.
Then: what cards offer, how long a step takes by arithmetic, the choice, and `make plan`'s table.
Deleting this module leaves every run as it is.

A step's n examples are cut into passes of one size, a divisor of n. An uneven cut (3 + 1, which is
the same run) is never the fastest that fits: what a pass costs besides its examples is its
launches, so only fewer passes are faster, and for the recipes' n = 4 three at once need two passes,
as two at once do, for more memory. Only an n without a divisor near would gain: 3 + 3 + 1 on a T4
takes 4 % less than seven passes of one (7 x 345 ms), where n = 8 in two passes takes 5 % less per
image by itself.
"""

import functools
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import loop
import lora
import model
from fast import layers, nf4
from fast.flat import Flat
from inputs import hub
from inputs.drawing import previews, steps_worth, times
from inputs.files import Refusal, first_line
from inputs.options import RECIPES, Config
from inputs.vetting import SDXL_UNET, widths

GIB = 2**30
# What the libraries keep besides torch's tensors (matrix products' and convolutions' workspaces),
# in bytes: fitted on the lightest configuration with a base as it is and the lightest with one in
# 4 bits of benchmarks/results/memory_check.json.
RESERVE = int(0.125 * GIB)

# ---- what is alive -------------------------------------------------------------------------------

aten = torch.ops.aten
PRODUCTS = flop_registry | {aten.addmm_: flop_registry[aten.addmm]}
NO_KERNEL = ("empty", "_unsafe_view", "split_with_sizes", "chunk")  # views are left out anyway

# What is done, by kind. flop: the arithmetic of matrix products, convolutions and attention; moved:
# the bytes that all other operators read and write, as if nothing stayed in a cache; launches: how
# many operators compute.
Work = Counter


@functools.cache
def computes(func: torch._ops.OpOverload) -> bool:
    """Whether an operator runs a kernel, as far as its name tells."""
    return not func.is_view and not any(word in func.name() for word in NO_KERNEL)


def tensors(tree) -> list[Tensor]:
    """All in nested arguments or answers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def nbytes(tree) -> int:
    return sum(tensor.nbytes for tensor in tensors(tree))


class Live(TorchDispatchMode):
    """Follows every storage made inside, from the operation that makes it until it is freed.

    bytes: alive now; peak: the most that were alive at once, a convolution's workspace included,
    which is `workspace` of them; work: what was done so far.
    """

    def __init__(self):
        super().__init__()
        self.bytes, self.known = 0, weakref.WeakSet()
        self.start()

    def start(self) -> None:
        """Begin a new peak and a new count of work here."""
        self.peak, self.workspace, self.work = self.bytes, 0, Work()

    def __enter__(self):
        # While this is kept, attention without numbers is the fused kernel: torch would take the
        # definition, which keeps the weight of every pair.
        self.fused = torch.library.Library("aten", "IMPL")
        self.fused.impl("scaled_dot_product_attention", attention, "AutogradMeta")
        return super().__enter__()

    def __exit__(self, *error):
        del self.fused
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out, operation = func(*args, **kwargs), func.overloadpacket
        if operation is aten.convolution and out.is_meta and gives_nhwc(*args[:2]):  # so is a GPU's
            out = torch.empty_like(out, memory_format=torch.channels_last)
        if operation in PRODUCTS:
            self.work["flop"] += PRODUCTS[operation](*args, **kwargs, out_val=out)
        elif computes(func):
            self.work["moved"] += nbytes((args, kwargs, out))
        self.work["launches"] += computes(func)
        for tensor in tensors(out):
            self.follow(tensor.untyped_storage())
        # cuDNN computes in the order NHWC: tensors in torch's order are copied into it and back.
        convolved = operation in (aten.convolution, aten.convolution_backward)
        lying = [each for each in tensors((args, out)) if not in_nhwc(each)] if convolved else []
        workspace = nbytes(lying)
        if self.bytes + workspace > self.peak:
            self.peak, self.workspace = self.bytes + workspace, workspace
        return out

    def follow(self, storage: torch.UntypedStorage) -> None:
        # The Python object of a storage lives as long as the storage, whoever holds that.
        if storage not in self.known:
            self.known.add(storage)
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self.freed, storage.nbytes())

    def freed(self, size: int) -> None:
        self.bytes -= size


def in_nhwc(x: Tensor) -> bool:
    """Whether x is no picture, or one whose channels lie side by side in memory."""
    return x.ndim != 4 or x.is_contiguous(memory_format=torch.channels_last)


def gives_nhwc(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution answers in NHWC: as its weight lies; one of 1x1 lies in both orders."""
    return in_nhwc(x if weight.shape[2:] == (1, 1) else weight)


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_, **__) -> Tensor:
    """The fused kernel that a T4 takes."""
    return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True)[0]


# ---- the recipe's step, on tensors without numbers -----------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """What one micro-step needs. parts: bytes at its peak, by part; work: of its two passes; again:
    for each module of model.checkpointable() the work that recomputing it would cost, and under
    "kept" the bytes that it would save (meant only where nothing is recomputed).
    """

    parts: dict[str, int]
    work: Work
    again: dict[str, Work]

    @property
    def peak(self) -> int:
        """Bytes, reserve included."""
        return sum(self.parts.values())


def fake_batch(config: Config, unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """A batch as data.Examples makes it, without numbers; keys and shapes are the same."""
    B, (context, pooled) = config.train_batch_size, widths(unet)
    side = max(config.resolution) // 8  # no bucket is larger than the square
    latent = (B, unet.config.in_channels, side, side)
    return {
        **{name: torch.empty(latent) for name in ("mean", "std", "eps", "noise")},
        "t": torch.empty(B, dtype=torch.int64),
        "context": torch.empty(B, 77 * (config.max_tokens // 75), context),
        "pooled": torch.empty(B, pooled),
        "time_ids": torch.empty(B, 6),
    }


def optimizer_bytes(config: Config, count: int) -> int:
    """AdamW's two moments of `count` numbers: fp32, or 8 bits and an fp32 factor for each 256, with
    the two tables of 256 values that tell what the bits mean; Prodigy's four of fp32; and the
    running mean, if there is one.
    """
    mean = 4 * count * bool(config.ema_decay)
    if config.optimizer == "prodigy":
        return mean + 4 * 4 * count
    if config.use_8bit_adam:
        return mean + 2 * (count + 4 * count // 256 + 4 * 256)
    return mean + 2 * 4 * count


class Rehearsal:
    """A recipe's UNet with its adapter, made without numbers, and what its micro-step needs.

    One rehearsal serves every size of micro-batch and every choice of blocks to recompute.
    """

    def __init__(self, config: Config, dtype: torch.dtype, about: dict, inject=lora.inject):
        self.live = Live()
        with torch.device("meta"), self.live:
            unet = UNet2DConditionModel.from_config(about).requires_grad_(False).eval()
            nn.Module.to(unet, dtype)  # diffusers' own to() warns of numbers that are lost
            if config.base_quantization != "none":
                quantise(unet, dtype)
            adapter = inject(unet, lora.TARGETS, config.lora_rank)
            if config.fused and config.attention == "sdpa":
                layers.wrap(unet)  # before, as a run does: the vector hides what is trained
            self.flat = Flat(unet, lora.trained(unet))
            # No examples and no optimizer: a micro-step reads neither.
            more = ((1.0, 0.0), None, *torch.empty(2), None)
            schedule = model.NoiseSchedule(torch.empty(1000), "epsilon")
            self.run = loop.Run(config, unet, adapter, self.flat.views, None, schedule, *more)
        for name, module in model.checkpointable(unet).items():
            # what diffusers hands to checkpoint() one by one where `module` has the flag
            kind = "transformer_blocks" if hasattr(module, "transformer_blocks") else "resnets"
            for part in getattr(module, kind):
                part.register_forward_pre_hook(self.enter)
                part.register_forward_hook(functools.partial(self.leave, name))

    def predict(self, config: Config) -> Prediction:
        """config: this rehearsal's, with another batch size or other blocks to recompute."""
        unet, live, count = self.run.unet, self.live, self.flat.vector.numel()
        unet.disable_gradient_checkpointing()
        if config.gradient_checkpointing:
            model.use_gradient_checkpointing(unet, config.checkpointed_blocks)
        self.again, before, vector = defaultdict(Work), live.bytes, 4 * count
        with torch.device("meta"), live:
            batch = fake_batch(config, unet)
            live.start()
            self.flat.micro_step(loop.micro_step)(replace(self.run, config=config), batch)
        parts = {
            "weights": before - 2 * vector,
            "adapter": vector,
            "gradients": vector,
            "activations": max(live.peak - live.workspace - before, preview_bytes(config)),
            "workspace": live.workspace + RESERVE,
            "optimizer": optimizer_bytes(config, count),
        }
        return Prediction(parts, live.work, self.again)

    def enter(self, *_) -> None:
        self.began = (self.live.bytes, Work(self.live.work))

    def leave(self, name: str, part, _, answer) -> None:
        """Add what a part has left alive, its answer aside, and its work."""
        bytes_before, work_before = self.began
        kept = self.live.bytes - bytes_before - answer.untyped_storage().nbytes()
        self.again[name] += self.live.work - work_before + Work(kept=kept)


# ---- an NF4 base: the same sizes without the numbers ---------------------------------------------


def quantise(unet: nn.Module, dtype: torch.dtype) -> None:
    """Replace the Linears of `unet` that an NF4 base keeps in 4 bits by bitsandbytes' own."""
    for key, shape in nf4.shapes_to_quantise(unet).items():
        name = key.removesuffix(".weight")
        linear, scales = unet.get_submodule(name), -(-shape.numel() // nf4.PER_SCALE)
        state = {"quant_type": "nf4", "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
        state |= {"absmax": torch.empty(scales, dtype=torch.uint8), "blocksize": nf4.PER_SCALE}
        nested = torch.empty(-(-scales // nf4.SCALES_PER_SCALE))
        state |= {"nested_absmax": nested, "nested_blocksize": nf4.SCALES_PER_SCALE}
        state |= {"nested_dtype": "float32", "nested_offset": 0.0}
        state |= {"quant_map": torch.empty(16), "nested_quant_map": torch.empty(256)}
        weight = torch.empty((shape.numel() + 1) // 2, 1, dtype=torch.uint8)
        layer = nf4.linear_4bit(linear, weight, state, dtype)
        layer.bias = linear.bias
        unet.set_submodule(name, layer)


# ---- cards, and how long a step takes there ------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """name: words of what torch calls it; gib: about what torch reports as its memory; tflops: peak
    TFLOP/s of fp16 (or bf16) products summed in fp32, which GeForce cards do at half the rate of
    sums in fp16; tflops_fp32 of fp32 products, dense; bf16: whether it
    computes that.
    """

    name: str
    gib: float
    tflops: float
    tflops_fp32: float
    gb_per_s: int
    bf16: bool = True


# As sold, at the boost clock, but T4 and L4 in fp16 at their base clocks (65 x 585 / 1590 and 121 x
# 795 / 2040): 70 W sustain no more. NVIDIA names that as why a T4's large products reach 24 TFLOP/s
# (https://forums.developer.nvidia.com/t/about-gpu-peak-performance/264462), and a user's 10.8 s for
# a step of diffusers' script at 1024 px, 84 TFLOP with checkpointing, are 8. What of all this a run
# reaches is SHARES' assumption.
CARDS = (
    Card("T4", 14.56, 24, 8.1, 300, bf16=False),
    Card("RTX 2060", 5.79, 26, 6.5, 336, bf16=False),
    Card("RTX 2070", 7.78, 30, 7.5, 448, bf16=False),
    Card("RTX 3060", 11.75, 25.5, 12.7, 360),
    Card("RTX 3090", 23.68, 71, 35.6, 936),
    Card("RTX 4090", 23.64, 165, 82.6, 1008),
    Card("L4", 22.03, 47, 30.3, 300),
    Card("A100", 39.4, 312, 19.5, 1555),
    Card("H100", 79.1, 989, 67, 3350),
    Card("H200", 139.8, 989, 67, 4800),
)
# The share of the free memory that a plan may fill. What torch reserves is more than what is
# allocated at the peak, since blocks of other sizes lie between: 1 to 12 % more in 15 of the 19
# cases of benchmarks/results/memory_check.json that load a base as it is, 14 to 23 % in four (none
# was short of memory, where torch gives blocks back).
FILL = 0.84
SHARES = (0.45, 0.25)  # of the peak, reached by products, convolutions and attention: assumed
# s that a recorded kernel takes besides its arithmetic and bytes. With 45 % it gives the H200's
# 0.097, 0.044 and 0.198 s of benchmarks/results/kernels.json within a tenth, and its 0.145 s (1024
# px, 4 x 1) a seventh too long.
LAUNCH = 3.1e-6


def seconds(work: Work, card: Card, share: float = SHARES[0]) -> float:
    """Of the recorded kernels that do `work`, estimated."""
    other = work["moved"] / (1e9 * card.gb_per_s) + LAUNCH * work["launches"]
    return work["flop"] / (share * 1e12 * card.tflops) + other


def step_seconds(config: Config, work: Work, *about) -> float:
    """seconds() of an optimizer step, each of whose passes over train_batch_size examples has
    `work` to do, forward and backward.
    """
    return config.examples_per_step / config.train_batch_size * seconds(work, *about)


def named_card(name: str) -> Card:
    """The card of CARDS that `name` means. Raises Refusal for none."""
    known = {card.name.replace(" ", "").lower(): card for card in CARDS}
    if card := known.get(name.replace(" ", "").lower()):
        return card
    listed = ", ".join(card.name for card in CARDS)
    raise Refusal(f"card {name}", f"one of {listed}", "make plan CARD=T4, or --plan-for T4")


def this_card() -> Card:
    """The card of CARDS that torch sees, or a middling one for one that is not there: the plan's
    line says which.
    """
    words = torch.cuda.get_device_name().replace("-", " ").split()
    known = (card for card in CARDS if set(card.name.split()) <= set(words))
    return next(known, named_card("RTX 3090"))


def in_dtype(card: Card, dtype: torch.dtype) -> Card:
    """`card` with the peak of products in `dtype`."""
    return replace(card, tflops=card.tflops_fp32) if dtype == torch.float32 else card


# ---- previews, which are drawn between two steps ------------------------------------------------

# Bytes of SDXL's VAE in fp32, and for each pixel that it decodes at once; its FLOP for a pixel.
# Counted as a step is. Before it, the UNet's passes for two examples need less.
VAE, DECODING, VAE_FLOP = 335e6, 4900, 9.6e6


def preview_bytes(config: Config) -> int:
    """What a preview takes where a step has its activations, which are gone by then: the VAE, and
    what it decodes at once in the smallest tiles, a quarter of a picture.
    """
    drawn = previews(config, config.validation_prompts)
    return int(max((VAE + DECODING * p.width * p.height / 4 for p in drawn), default=0))


def in_previews(config: Config, work: Work, card: Card) -> str:
    """What previews cost, in words, where passes over train_batch_size examples have `work` to do;
    as if the previews' passes were recorded, which they are not: a slow host takes longer.
    """
    drawn, step = previews(config, config.validation_prompts), step_seconds(config, work, card)
    if not drawn:
        return "none"
    decoding = Work(flop=VAE_FLOP * sum(p.width * p.height for p in drawn))
    each = steps_worth(config, drawn) * step + seconds(decoding, in_dtype(card, torch.float32))
    share = each * times(config) / (config.max_train_steps * step)
    return f"at least {each:.1f} s each time, {times(config)} times: {share:.1%} of the run"


# ---- the plan ------------------------------------------------------------------------------------


def predictor(config: Config, *about) -> Callable[[Config], Prediction]:
    """A function from a Config that differs in batch size and recomputed blocks to a Prediction,
    some five seconds each. about: as Rehearsal takes it.
    """
    return functools.cache(Rehearsal(config, *about).predict)


def shaped(config: Config, size: int, blocks: tuple[str, ...] | None) -> Config:
    """config in passes of `size` examples that recompute `blocks`; None recomputes nothing, and ()
    everything.
    """
    return replace(
        config,
        train_batch_size=size,
        gradient_accumulation_steps=config.examples_per_step // size,
        gradient_checkpointing=blocks is not None,
        checkpointed_blocks=blocks or (),
    )


def enlarged(work: Work, size: int) -> Work:
    """The work of one example's pass for `size` examples at once: as many launches."""
    return Work({kind: n * (1 if kind == "launches" else size) for kind, n in work.items()})


def candidates(
    config: Config, predict: Callable, card: Card, sizes: list[int]
) -> list[tuple[int, Config]]:
    """Every way to cut the step into passes of one of `sizes` and to recompute blocks, fastest
    first: its bytes and its Config.

    Blocks are added in the order of bytes saved per second lost. Bytes and work are scaled up from
    one example, which is somewhat too much; choose_plan() looks at the real number before it
    believes one.
    """
    plain, found = predict(shaped(config, 1, None)), []
    for size in sizes:
        again = {n: enlarged(work, size) for n, work in plain.again.items() if work["kept"]}
        order = sorted(again, key=lambda name: -again[name]["kept"] / seconds(again[name], card))
        for blocks in (tuple(order[:count]) for count in range(len(order) + 1)):
            work = sum((again[name] for name in blocks), enlarged(plain.work, size))
            needed = plain.peak + (size - 1) * plain.parts["activations"] - work["kept"]
            way = shaped(config, size, blocks or None)
            found.append((step_seconds(way, work, card), needed, way))
    return [way for _, *way in sorted(found, key=lambda each: each[0])]


def choose_plan(
    config: Config, predict: Callable, card: Card, free: int, most: int = 0
) -> tuple[Config, Prediction]:
    """The fastest way that fits into FILL of `free` bytes, in passes of at most `most` examples (0:
    of all); `config` itself where it is not to be planned. Raises Refusal where none does.
    """
    n, planned = config.examples_per_step, config.memory_plan
    sizes = [size for size in range(1, (most or n) + 1) if n % size == 0]
    fastest = shaped(config, sizes[-1], None) if planned else config
    if (found := predict(fastest)).peak <= FILL * free:  # most cards: nothing else is asked
        return fastest, found
    for estimate, way in candidates(config, predict, card, sizes) if planned else ():
        if estimate <= 1.05 * FILL * free and (found := predict(way)).peak <= FILL * free:
            return way, found
    least = shaped(config, 1, ()) if planned else config
    needed = predict(least).peak / GIB
    smaller = "the recipe lowmem, " if config.base_quantization == "none" else ""
    raise Refusal(
        f"{in_words(least)} needs {needed:.1f} GiB; {free / GIB:.1f} are free, {FILL:.0%} usable",
        f"at least {needed / FILL:.1f} GiB free",
        f"close what else uses this GPU; or take {smaller}a smaller --resolution; or "
        "--no-memory-plan, which tries it all the same",
    )


def in_words(config: Config) -> str:
    again = "nothing"
    if config.gradient_checkpointing:
        count = len(config.checkpointed_blocks)
        again = f"{count} block{'s' * (count > 1)}" if count else "everything"
    return f"{config.train_batch_size} x {config.gradient_accumulation_steps}, {again} recomputed"


def unet_config(config: Config, dtype: torch.dtype) -> dict:
    """What the folder of the recipe's model says of its UNet."""
    folder = hub.fetch(config.pretrained_model_name_or_path, "unet", dtype != torch.float32)
    return UNet2DConditionModel.load_config(folder)


def free_bytes() -> int:
    """What torch may still allocate on this process's GPU: what is free, or less where it is held
    to a share (torch.cuda.set_per_process_memory_fraction).
    """
    free, total = torch.cuda.mem_get_info()
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)()
    return min(free, int(share * total) - torch.cuda.memory_reserved())


def choose(
    config: Config, device: torch.device, dtype: torch.dtype, most: int = 0, inject=lora.inject
) -> tuple[Config, str]:
    """`config` cut and recomputed as this GPU allows, and a line that says so. most: the examples
    of a step that this process has; 0 means all; inject: what puts the adapter in.

    The run is the same whatever is chosen. Only where the recipe asks for it and batch size and
    checkpointing are still the recipe's own: what was asked for is obeyed.
    """
    if not config.memory_plan or device.type != "cuda":
        return config, ""
    if config.deterministic:
        return config, "memory plan: none, since what is free is no function of the options"
    if not config.cache:
        return config, "memory plan: none, since --no-cache keeps the encoders in memory, too"
    usual = RECIPES[config.recipe][1]
    names = ("train_batch_size", "gradient_checkpointing", "checkpointed_blocks")
    if asked := [name for name in names if getattr(config, name) != getattr(usual, name)]:
        return config, f"memory plan: none, since {', '.join(asked)} was asked for"
    try:
        predict = predictor(config, dtype, unet_config(config, dtype), inject)
        card, free = in_dtype(this_card(), dtype), free_bytes()
        way, found = choose_plan(config, predict, card, free, most)
    except Refusal:
        raise
    except Exception as error:  # another torch's meta kernels may lack something: train anyway
        return config, f"memory plan: none, since it failed ({first_line(error)})"
    return way, (
        f"memory plan: {in_words(way)}: {found.peak / GIB:.1f} GiB predicted, "
        f"{free / GIB:.1f} GiB free, of which {FILL:.0%} may be filled; speed counted as "
        f"{card.name}'s"
    )


# ---- make plan -----------------------------------------------------------------------------------


def table(config: Config, inject: Callable = lora.inject) -> str:
    """What a recipe needs on the card that config.plan_for names, without that card."""
    card, local = named_card(config.plan_for), Path(config.pretrained_model_name_or_path).is_dir()
    auto = torch.bfloat16 if card.bf16 else torch.float16
    dtype, free = model.DTYPES.get(config.mixed_precision, auto), int(card.gib * GIB)
    about = unet_config(config, dtype) if local else SDXL_UNET  # which needs no download
    card = in_dtype(card, dtype)
    head = f"recipe {config.recipe} on {card.name}, {max(config.resolution)} px, UNet in {dtype}"
    try:
        way, found = choose_plan(config, predictor(config, dtype, about, inject), card, free)
    except Refusal as refusal:
        return f"{head}\ndoes NOT fit: {refusal}"
    work, steps = found.work, way.max_train_steps
    low, high = (steps * step_seconds(way, work, card, share) / 60 for share in SHARES)
    launching = steps * step_seconds(way, Work(launches=work["launches"]), card) / 60
    rows = [
        head,
        f"{in_words(way)}, of {way.examples_per_step} images per optimizer step",
        *(f"{'recomputed':>16} {name}" for name in way.checkpointed_blocks),
        *(f"{part:>16} {size / GIB:6.2f} GiB" for part, size in found.parts.items()),
        f"{'peak':>16} {found.peak / GIB:6.2f} GiB of {card.gib}, {FILL:.0%} usable: fits",
        f"{'time':>16} {low:6.1f} to {high:.1f} minutes for {steps:,} steps, estimated by CARDS in "
        f"fast/plan.py: a pass has {work['flop'] / 1e12:.2f} TFLOP at {SHARES[0]:.0%} or "
        f"{SHARES[1]:.0%} of {card.tflops:g} TFLOP/s, {work['moved'] / 1e9:.1f} GB at "
        f"{card.gb_per_s:,} GB/s",
        f"{'launches':>16} {work['launches']:6,} a pass: {launching:.1f} min of it",
        f"{'previews':>16} {in_previews(way, work, card)}",
    ]
    return "\n".join(rows)
