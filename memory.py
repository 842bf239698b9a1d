"""What a recipe needs on a card, before it starts: the real step, run on tensors without numbers.

FakeTensorMode runs every operation of the micro-step for its shapes alone; a second mode above it
follows which storages are alive, and counts the arithmetic. Everything that the GPU's libraries
take besides (their workspaces) is a stated reserve. Deleting this module leaves every run as it is.

Letters: `n` examples per optimizer step, `B` examples in one pass, `N` numbers of the adapter.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import fused
import hub
import lora
import model
import nf4
from config import RECIPES, Config
from files import Refusal, digest, first_line, write_whole

GIB = 2**30
BLOCK = 512  # CUDA's caching allocator hands out multiples of this many bytes
# What the libraries keep besides torch's tensors (matrix products' and convolutions' workspaces),
# in bytes: fitted on two configurations of benchmarks/memory_check.json.
RESERVE = int(0.16 * GIB)

# SDXL base's UNet where it differs from diffusers' default, so that a plan needs no download. A
# test holds it to the model's own file.
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

# ---- what is alive -------------------------------------------------------------------------------

aten = torch.ops.aten
PRODUCTS = flop_registry | {aten.addmm_: flop_registry[aten.addmm]}
ATTENTION = {  # x 2 FLOP x batch x heads x T x T' x D/heads: two products forward, five backward
    aten._scaled_dot_product_flash_attention_for_cpu: 2,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: 5,
}


def rounded(storage: torch.UntypedStorage) -> int:
    return -(-storage.nbytes() // BLOCK) * BLOCK


class Live(TorchDispatchMode):
    """Follows every storage made inside, from the operation that makes it until it is freed.

    live: bytes by part; new storages belong to `part`. peak: the most bytes that were alive at
    once, a convolution's workspace included, and at_peak: how they were divided; flop: the
    arithmetic of matrix products, convolutions and attention so far.
    """

    def __init__(self):
        super().__init__()
        self.part, self.live, self.known, self.flop = "weights", Counter(), {}, 0
        self.start()

    def start(self) -> None:
        """Begin a new peak and a new count of FLOP here."""
        self.peak, self.at_peak, self.flop = 0, {}, 0
        self.note(0)

    def total(self) -> int:
        return sum(self.live.values())

    def note(self, workspace: int) -> None:
        if self.total() + workspace > self.peak:
            self.peak = self.total() + workspace
            self.at_peak = dict(self.live) | {"workspace": workspace}

    def __torch_dispatch__(self, func, types_, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # asked forty times as often as anything else
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        operation = func._overloadpacket
        if operation in PRODUCTS:
            self.flop += PRODUCTS[operation](*args, **(kwargs or {}), out_val=out)
        elif operation in ATTENTION:
            q, k = args[:2] if ATTENTION[operation] == 2 else args[1:3]
            self.flop += ATTENTION[operation] * 2 * q.numel() * k.shape[2]
        new = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in new:
            self.follow(tensor.untyped_storage())
        if operation in (aten.convolution, aten.convolution_backward):
            # cuDNN computes in the order NHWC: tensors in torch's order are copied into it and back
            given = [leaf for leaf in args if isinstance(leaf, Tensor)]
            self.note(sum(t.numel() * t.element_size() for t in (*given, *new)))
        return out

    def follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        part, size = self.part, rounded(storage)

        def gone(_):
            del self.known[key]
            self.live[part] -= size

        # The storage's Python object lives as long as the storage itself, whoever holds that.
        self.known[key] = weakref.ref(storage, gone)
        self.live[part] += size
        self.note(0)


# ---- the recipe's step, on tensors without numbers -----------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """What one micro-step needs. parts: bytes at its peak, by part; flop: of its two passes; kept
    and again: for each module of model.checkpointable(), the bytes that recomputing it would save,
    and the FLOP that it would cost (both empty where something is recomputed already).
    """

    parts: dict[str, int]
    flop: float
    kept: dict[str, int]
    again: dict[str, float]

    @property
    def peak(self) -> int:
        """Bytes, reserve included."""
        return sum(self.parts.values())


def fake_batch(config: Config, unet: UNet2DConditionModel, tokens: int = 77) -> dict[str, Tensor]:
    """A batch as data.Examples makes it, without numbers; keys and shapes are the same."""
    B, side, about = config.train_batch_size, config.resolution // 8, unet.config
    pooled = about.projection_class_embeddings_input_dim - 6 * about.addition_time_embed_dim
    latent = (B, about.in_channels, side, side)
    return {
        **{name: torch.empty(latent) for name in ("mean", "std", "eps", "noise")},
        "t": torch.empty(B, dtype=torch.int64),
        "context": torch.empty(B, tokens, about.cross_attention_dim),
        "pooled": torch.empty(B, pooled),
        "time_ids": torch.empty(B, 6),
    }


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    """Modules made inside have this dtype from the beginning."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def optimizer_bytes(config: Config, flat: Tensor) -> int:
    """AdamW's two moments: fp32, or 8 bits and an fp32 factor for each 256 numbers, with the two
    tables of 256 values that tell what the bits mean.
    """
    moments = 2 * flat.numel()
    if not config.use_8bit_adam:
        return 4 * moments
    return moments + 4 * moments // 256 + 2 * 4 * 256


class Rehearsal:
    """A recipe's UNet with its adapter, made without numbers, and what its micro-step needs.

    step: loop.micro_step, called with what that reads of a Run. One rehearsal serves every size of
    micro-batch and every choice of blocks to recompute.
    """

    def __init__(self, config: Config, dtype: torch.dtype, step: Callable, about: dict):
        self.config, self.step = config, step
        self.fake, self.live = FakeTensorMode(), Live()
        with self.fake, self.live:
            with default_dtype(dtype):
                self.unet = UNet2DConditionModel.from_config(about).requires_grad_(False).eval()
                if quantised(config):
                    quantise(self.unet, dtype)
            self.live.part = "adapter"
            self.adapter = lora.inject(self.unet, lora.TARGETS, config.lora_rank)
            self.live.part = "weights"  # which it lays together anew
            if config.fused and config.attention == "sdpa":
                fused.use(self.unet)
        half = rounded(self.adapter.flat.untyped_storage())  # inject() made a vector and its grad
        self.live.live["adapter"] -= half
        self.live.live["gradients"] += half

    def predict(self, config: Config) -> Prediction:
        """config: this rehearsal's, with another batch size or other blocks to recompute."""
        self.unet.disable_gradient_checkpointing()
        if config.gradient_checkpointing:
            model.use_gradient_checkpointing(self.unet, config.checkpointed_blocks)
        kept, again, live = Counter(), Counter(), self.live
        with self.fake, live, self.measured(kept, again):
            live.part = "activations"
            run = types.SimpleNamespace(
                config=config,
                unet=self.unet,
                adapter=self.adapter,
                schedule=model.NoiseSchedule(torch.empty(1000), "epsilon"),
                scaling=(0.13025, 0.0),
                factor=torch.empty(()),
                loss_sum=torch.empty(()),
            )
            batch = fake_batch(config, self.unet)
            live.start()
            self.step(run, batch)
        state = optimizer_bytes(config, self.adapter.flat)
        parts = {name: size for name, size in live.at_peak.items() if size}
        parts |= {"optimizer": state, "workspace": parts.get("workspace", 0) + RESERVE}
        if config.gradient_checkpointing:
            kept, again = {}, {}
        return Prediction(parts, live.flop, dict(kept), dict(again))

    @contextlib.contextmanager
    def measured(self, kept: Counter, again: Counter):
        """Adds to `kept` what the parts of each checkpointable module leave alive after their
        forward pass, their answers aside, and to `again` their FLOP.
        """
        began, handles = {}, []

        def enter(part, _):
            began[part] = (self.live.total(), self.live.flop)

        def leave(name, part, _, answer):
            answer = answer[0] if isinstance(answer, tuple) else answer
            bytes_before, flop_before = began[part]
            grown = self.live.total() - bytes_before - rounded(answer.untyped_storage())
            kept[name] += max(0, grown)
            again[name] += self.live.flop - flop_before

        for name, module in model.checkpointable(self.unet).items():
            for part in recomputed_parts(module):
                handles.append(part.register_forward_pre_hook(enter))
                handles.append(part.register_forward_hook(lambda *a, name=name: leave(name, *a)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def recomputed_parts(module: nn.Module) -> list[nn.Module]:
    """What diffusers hands to checkpoint() one by one where `module` has the flag."""
    if hasattr(module, "transformer_blocks"):
        return list(module.transformer_blocks)
    middle = type(module).__name__.startswith("UNetMidBlock")  # its first resnet is never handed
    return list(module.resnets)[1 if middle else 0 :]


# ---- an NF4 base: the same sizes without the numbers ---------------------------------------------


def quantised(config: Config) -> bool:
    return config.base_quantization != "none"


class Expanded(torch.autograd.Function):
    """x (..., in) -> (..., out): the whole weight is there for the moment of each product only."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return nn.functional.linear(x, fused.dense(layer), layer.bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ fused.dense(ctx.layer), None


class FakeLinear4bit(nn.Module):
    """What takes as much room as bitsandbytes' Linear4bit: 4 bits a number, an 8-bit factor for
    each nf4.BLOCK of them, and an fp32 factor for each nf4.SCALE_BLOCK of those.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        from bitsandbytes.functional import QuantState

        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, count = linear.bias, linear.weight.numel()
        packed = torch.empty((count + 1) // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        factors = -(-count // nf4.BLOCK)
        nested = QuantState(
            torch.empty(-(-factors // nf4.SCALE_BLOCK)),
            code=torch.empty(256),
            blocksize=nf4.SCALE_BLOCK,
            dtype=torch.float32,
        )
        self.weight.quant_state = QuantState(
            torch.empty(factors, dtype=torch.uint8),
            shape=linear.weight.shape,
            dtype=dtype,
            blocksize=nf4.BLOCK,
            quant_type="nf4",
            offset=torch.empty(()),
            state2=nested,
        )

    def forward(self, x: Tensor) -> Tensor:
        return Expanded.apply(x, self)


def quantise(unet: nn.Module, dtype: torch.dtype) -> None:
    """Replace the Linears of `unet` that an NF4 base keeps in 4 bits; the embeddings stay whole."""
    found = [(n, m) for n, m in unet.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in found:
        parent, _, child = name.rpartition(".")
        if not name.startswith(nf4.WHOLE):
            setattr(unet.get_submodule(parent), child, FakeLinear4bit(linear, dtype))


# ---- cards, and how long a step takes there ------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """name: as torch says it, or a part of it; gib: about what torch reports as its memory; half
    and single: peak TFLOP/s of fp16 (or bf16) and fp32 products, dense; capability: sm_XY.
    """

    name: str
    gib: float
    half: float
    single: float
    gb_per_s: int
    capability: tuple[int, int]


CARDS = {  # as sold; what of it a run reaches is SHARES' assumption
    card.name: card
    for card in (
        Card("T4", 14.56, 65, 8.1, 300, (7, 5)),
        Card("P100", 15.89, 18.7, 9.3, 732, (6, 0)),
        Card("V100", 15.77, 112, 14.0, 900, (7, 0)),
        Card("RTX 2060", 5.79, 52, 6.5, 336, (7, 5)),
        Card("RTX 2070", 7.78, 60, 7.5, 448, (7, 5)),
        Card("RTX 3060", 11.75, 51, 12.7, 360, (8, 6)),
        Card("RTX 3090", 23.68, 71, 35.6, 936, (8, 6)),
        Card("RTX 4090", 23.64, 165, 82.6, 1008, (8, 9)),
        Card("L4", 22.03, 121, 30.3, 300, (8, 9)),
        Card("A10G", 22.06, 70, 31.2, 600, (8, 6)),
        Card("A100 40GB", 39.4, 312, 19.5, 1555, (8, 0)),
        Card("A100 80GB", 79.15, 312, 19.5, 2039, (8, 0)),
        Card("H100", 79.1, 989, 67, 3350, (9, 0)),
        Card("H200", 139.8, 989, 67, 4800, (9, 0)),
    )
}
# The share of the free memory that a plan may fill. What torch reserves is more than what is
# allocated at the peak, since blocks of other sizes lie between: 1 to 11 % more in 13 of 16 cases
# of benchmarks/memory_check.json, 14 to 19 % in three. The prediction is within 2 % there.
FILL = 0.84
SHARES = (0.25, 0.45)  # of the peak, reached by large products: an assumption, as a range
# A GPU reaches r / (r + h) of that, r being images a pass in units of 512 x 512 pixels: small
# products leave its units idle. h is proportional to its peak. On an H100, h = 4.2 and 33 % give
# all of 0.205, 0.081, 0.350 and 0.216 s (1 x 4 and 4 x 1 at 512 px, then at 1024 px) within 5 %.
HALF_FULL = 4.2 / 989
PASS = {True: 0.002, False: 0.4}  # s of host work a pass, recorded or not: the least it takes


def seconds_per_step(
    config: Config, flop: float, weights: int, card: Card, half: bool, share: float
) -> float:
    """One optimizer step, estimated; flop: of one pass of config.train_batch_size examples, which
    reads the `weights`, in bytes, at least twice.
    """
    peak = card.half if half else card.single
    r = config.train_batch_size * (config.resolution / 512) ** 2
    computing = flop / (1e12 * peak * share * r / (r + HALF_FULL * peak))
    passes = config.examples_per_step / config.train_batch_size
    return passes * max(computing, 2 * weights / card.gb_per_s / 1e9, PASS[config.cuda_graph])


def named_card(name: str) -> Card:
    """The card of CARDS that `name` means. Raises Refusal for none."""
    for key, card in CARDS.items():
        if name.replace(" ", "").lower() == key.replace(" ", "").lower():
            return card
    raise Refusal(
        f"card {name}", f"one of {', '.join(CARDS)}", "make plan CARD=T4, or --plan-for T4"
    )


def this_card(device: torch.device) -> Card:
    """The card that torch sees, its peak from CARDS, or a middling one's where it is not there."""
    about = torch.cuda.get_device_properties(device)
    gib = about.total_memory / GIB
    alike = [
        c for c in CARDS.values() if re.search(rf"\b{re.sub(' [48]0GB', '', c.name)}\b", about.name)
    ]
    found = min(alike, key=lambda c: abs(c.gib - gib), default=CARDS["A10G"])
    return replace(found, name=about.name, gib=gib, capability=(about.major, about.minor))


# ---- the plan ------------------------------------------------------------------------------------

Predict = Callable[[Config], Prediction]


@dataclass
class Plan:
    """The fastest way that fits, and the next faster one, which does not, with its bytes (none
    where the fastest of all fits).
    """

    config: Config
    prediction: Prediction
    faster: tuple[Config, int] | None = None


def predictor(
    config: Config, dtype: torch.dtype, step: Callable, about: dict, folder: Path | None
) -> Predict:
    """A function from a Config that differs in batch size and recomputed blocks to a Prediction.

    It looks in `folder` first and writes there what it had to find out. What is written is named by
    all that it depends on: the choices, the UNet, the libraries and the modules' own text.
    """
    sources = [sys.modules[name].__file__ for name in (__name__, "lora", "fused", "model")]
    sources += [sys.modules[step.__module__].__file__]
    texts = [Path(source).read_bytes() for source in sources]
    versions = f"{torch.__version__} {diffusers.__version__} {dtype} {json.dumps(dict(about))}"
    reads = ("resolution", "train_batch_size", "lora_rank", "fused", "attention", "use_8bit_adam")
    reads += ("gradient_checkpointing", "checkpointed_blocks", "snr_gamma")
    known, rehearsals = {}, []

    def predict(asked: Config) -> Prediction:
        choices = {name: getattr(asked, name) for name in reads} | {"nf4": quantised(asked)}
        key = digest(versions, json.dumps(choices), *texts)
        path = folder / "memory" / f"{key}.json" if folder else None
        if key not in known and path and path.is_file():
            with contextlib.suppress(ValueError, TypeError):  # damaged: it is found out anew
                known[key] = Prediction(**json.loads(path.read_text()))
        if key not in known:
            if not rehearsals:
                rehearsals.append(Rehearsal(config, dtype, step, about))
            known[key] = rehearsals[0].predict(asked)
            if path:
                write_whole(path, json.dumps(asdict(known[key])).encode())
        return known[key]

    return predict


def shaped(config: Config, size: int, blocks: tuple[str, ...] | None) -> Config:
    """config in passes of `size` examples that recompute `blocks`; None recomputes nothing."""
    return replace(
        config,
        train_batch_size=size,
        gradient_accumulation_steps=config.examples_per_step // size,
        gradient_checkpointing=blocks is not None,
        checkpointed_blocks=blocks or (),
    )


def candidates(
    config: Config, predict: Predict, card: Card, half: bool, most: int
) -> list[tuple[float, int, Config]]:
    """Every way to cut the step into passes of at most `most` and to recompute blocks, fastest
    first: its seconds at the full peak, its bytes and its Config.

    Blocks are added in the order of bytes saved per FLOP. The bytes are scaled up from one example
    without and one with everything recomputed, which is somewhat too much; choose_plan() looks at
    the real number before it believes one.
    """
    plain, all_again = (predict(shaped(config, 1, blocks)) for blocks in (None, ()))
    useful = [name for name, size in plain.kept.items() if size]
    order = sorted(useful, key=lambda name: -plain.kept[name] / plain.again[name])
    fixed = plain.peak - plain.parts["activations"]
    found = []
    n = config.examples_per_step
    for size in (size for size in range(1, most + 1) if n % size == 0):
        lowest = fixed + size * all_again.parts["activations"]
        bytes_, flop = fixed + size * plain.parts["activations"], size * plain.flop
        ways = [(bytes_, flop, None)]
        for count, name in enumerate(order, 1):
            bytes_ -= size * plain.kept[name]
            flop += size * plain.again[name]
            ways.append((max(bytes_, lowest), flop, tuple(order[:count])))
        for bytes_, flop, blocks in ways:
            way = shaped(config, size, blocks)
            seconds = seconds_per_step(way, flop, plain.parts["weights"], card, half, 1.0)
            found.append((seconds, flop, bytes_, way))
    # Where the host or the weights' reading sets the time, less arithmetic goes first.
    return [(c[0], *c[2:]) for c in sorted(found, key=lambda c: c[:2])]


def choose_plan(
    config: Config, predict: Predict, card: Card, half: bool, free: int, most: int = 0
) -> Plan:
    """The fastest way that fits into FILL of `free` bytes, in passes of at most `most` examples (0:
    of all). Raises Refusal where none does.
    """
    faster, off = None, {}  # off: by size of pass, how far its last estimate was from what came out
    for _, estimate, way in candidates(
        config, predict, card, half, most or config.examples_per_step
    ):
        size = way.train_batch_size
        needed = estimate + off.get(size, 0)
        if needed <= FILL * free * (1 if size in off else 1.05):  # at first estimates are too high
            found = predict(way)
            if found.peak <= FILL * free:
                return Plan(way, found, faster)
            needed, off[size] = found.peak, found.peak - estimate
        faster = (way, needed)
    least = predict(shaped(config, 1, ())).peak
    smaller = "" if quantised(config) else "the recipe lowmem (a 4-bit base), or "
    raise Refusal(
        f"one example with everything recomputed needs {least / GIB:.1f} GiB on the GPU, and "
        f"of {free / GIB:.1f} GiB free {FILL:.0%} may be filled",
        f"at least {least / FILL / GIB:.1f} GiB free",
        f"close what else uses this GPU; or take {smaller}a smaller --resolution; "
        "--no-memory-plan tries it all the same",
    )


def in_words(config: Config) -> str:
    count = len(config.checkpointed_blocks)
    again = f"{count} block{'s' * (count > 1)}" if count else "everything"
    again = again if config.gradient_checkpointing else "nothing"
    return f"{config.train_batch_size} x {config.gradient_accumulation_steps}, {again} recomputed"


def why_not_more(plan: Plan) -> str:
    if not plan.faster:
        return "no way is faster"
    way, needed = plan.faster
    return f"the next faster way ({in_words(way)}) needs {needed / GIB:.1f} GiB"


def free_bytes(device: torch.device) -> int:
    """What torch may still allocate on the GPU: what is free, or less where the process is held to
    a share (torch.cuda.set_per_process_memory_fraction).
    """
    free, total = torch.cuda.mem_get_info(device)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    return min(free, int(share * total) - torch.cuda.memory_reserved(device))


def choose(
    config: Config, device: torch.device, dtype: torch.dtype, step: Callable, most: int = 0
) -> tuple[Config, str]:
    """`config` cut and recomputed as this GPU allows, and a line that says so. most: the examples
    of a step that this process has; 0 means all.

    Only where the recipe asks for it and batch size and checkpointing are still the recipe's own:
    what was asked for is obeyed. The run is the same whatever is chosen.
    """
    usual = RECIPES[config.recipe][1]
    names = ("train_batch_size", "gradient_checkpointing", "checkpointed_blocks")
    asked = [name for name in names if getattr(config, name) != getattr(usual, name)]
    if not config.memory_plan or device.type != "cuda":
        return config, ""
    if config.deterministic:
        return config, "memory plan: none, since what is free is no function of the options"
    if not config.cache:
        return config, "memory plan: none, since --no-cache keeps the encoders in memory, too"
    if asked:
        return config, f"memory plan: none, since {', '.join(asked)} was asked for"
    try:
        if device.index is None:  # CUDA's own calls want a number
            device = torch.device("cuda", torch.cuda.current_device())
        folder = hub.fetch(config.pretrained_model_name_or_path, "unet", dtype != torch.float32)
        about = UNet2DConditionModel.load_config(folder)
        predict = predictor(config, dtype, step, about, Path(config.cache_dir))
        free = free_bytes(device)
        card, half = this_card(device), dtype != torch.float32
        plan = choose_plan(config, predict, card, half, free, most)
    except Refusal:
        raise
    except Exception as error:  # another torch's fake tensors may lack something: train anyway
        return config, f"memory plan: none, since it failed ({first_line(error)})"
    return plan.config, (
        f"memory plan: {in_words(plan.config)}: {plan.prediction.peak / GIB:.1f} GiB predicted, "
        f"{free / GIB:.1f} GiB free, of which {FILL:.0%} may be filled; {why_not_more(plan)}"
    )


# ---- make plan -----------------------------------------------------------------------------------

# SDXL base's files in GB, fp16 variant and fp32: UNet, second and first text encoder; VAE in fp32.
DOWNLOAD_GB = {True: 5.14 + 1.39 + 0.25 + 0.33, False: 10.27 + 2.78 + 0.49 + 0.33}
# GiB of its own that a run's process took at most, and of mapped file pages, which the kernel can
# drop: benchmarks/full_size.json (fp32's from its earlier run, with fp32 files).
HOST_GIB = {True: (2.0, 5.4), False: (2.8, 10.2)}


def table(config: Config, step: Callable) -> str:
    """What a recipe needs on the card that config.plan_for names, without that card."""
    card = named_card(config.plan_for)
    dtype = model.DTYPES.get(config.mixed_precision)
    if dtype is None:
        dtype = torch.bfloat16 if card.capability >= (8, 0) else torch.float16
    half, about, free = dtype != torch.float32, SDXL_UNET, int(card.gib * GIB)
    if Path(config.pretrained_model_name_or_path).is_dir():
        folder = hub.fetch(config.pretrained_model_name_or_path, "unet", half)
        about = UNet2DConditionModel.load_config(folder)
    predict = predictor(config, dtype, step, about, Path(config.cache_dir))
    plan = Plan(config, predict(config))
    if config.memory_plan:
        try:
            plan = choose_plan(config, predict, card, half, free)
        except Refusal:  # nothing fits: the smallest is shown
            plan.config = shaped(config, 1, ())
            plan.prediction = predict(plan.config)
    found, way = plan.prediction, plan.config
    fits = found.peak <= FILL * free
    work = (way, found.flop, found.parts["weights"], card, half)
    minutes = [seconds_per_step(*work, share) * config.max_train_steps / 60 for share in SHARES]
    own, mapped = HOST_GIB[half]
    saved = 2 * (found.parts["optimizer"] + 2 * found.parts["gradients"]) / 1e9
    rows = [
        f"recipe {config.recipe} on {card.name}, {config.resolution} px, UNet in {str(dtype)[6:]}",
        f"{in_words(way)}, of {config.examples_per_step} images per optimizer step",
        *(f"{part:>16} {size / GIB:6.2f} GiB" for part, size in found.parts.items()),
        f"{'peak':>16} {found.peak / GIB:6.2f} GiB of {card.gib:.2f}, of which {FILL:.0%} may be "
        f"filled: {'fits' if fits else 'does NOT fit'}",
        f"{'host memory':>16} {own:6.1f} GiB of its own, {mapped:.1f} GiB mapped file pages",
        f"{'download':>16} {DOWNLOAD_GB[half]:6.1f} GB for SDXL base, once, and the pictures",
        f"{'disk':>16} {DOWNLOAD_GB[half] + saved:6.1f} GB: that, {saved:.1f} GB of checkpoints, "
        "about 1 MB a picture",
        f"{'time':>16} {minutes[1]:6.1f} to {minutes[0]:.1f} minutes for {config.max_train_steps} "
        f"steps: an estimate, from {SHARES[1]:.0%} and {SHARES[0]:.0%} of the peak",
    ]
    if config.memory_plan and fits:
        rows.append(f"why not faster: {why_not_more(plan)}")
    elif not fits:
        largest = max(found.parts, key=found.parts.get)
        rows.append(
            f"why not: {largest} alone take {found.parts[largest] / GIB:.1f} GiB. Recipes t4 and "
            "native choose batch and checkpointing by the card; lowmem has a 4-bit base"
        )
    return "\n".join(rows)
