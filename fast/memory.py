"""What a recipe's step needs, before it starts: the real step, run on tensors without numbers.

On the meta device every operation of the micro-step runs for its shapes alone; a mode above it
follows which storages are alive, and counts the work. (Fake tensors would do, too, and take three
times as long.) Everything that the GPU's libraries take besides (their workspaces) is a stated
reserve. plan.py chooses by what is found here.

Letters: `n` examples per optimizer step, `B` examples in one pass, `N` numbers of the adapter.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections import Counter
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import loop
import lora
import model
from fast import layers, nf4
from fast.flat import Flat
from inputs.options import Config

GIB = 2**30
GRAIN = 512  # CUDA's caching allocator hands out multiples of this many bytes
# What the libraries keep besides torch's tensors (matrix products' and convolutions' workspaces),
# in bytes: fitted on two configurations of benchmarks/results/memory_check.json.
RESERVE = int(0.16 * GIB)


# ---- what is alive -------------------------------------------------------------------------------

aten = torch.ops.aten
PRODUCTS = flop_registry | {aten.addmm_: flop_registry[aten.addmm]}
ATTENTION = {  # x 2 FLOP x batch x heads x T x T' x D/heads: two products forward, five backward
    aten._scaled_dot_product_flash_attention_for_cpu: 2,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: 5,
}
NO_KERNEL = ("empty", "detach", "_unsafe_view", "split", "as_strided", "chunk", "unbind")

# What is done, by kind. flop: the arithmetic of matrix products, convolutions and attention; moved:
# the bytes that all other operators read and write, as if nothing stayed in a cache; launches: how
# many operators compute.
Work = dict[str, float]
NOTHING: Work = {"flop": 0, "moved": 0, "launches": 0}


def plus(one: Work, other: Work, sign: int = 1) -> Work:
    return {kind: one[kind] + sign * other[kind] for kind in NOTHING}


@functools.cache
def computes(func: torch._ops.OpOverload) -> bool:
    """Whether an operator runs a kernel, as far as its name tells."""
    return not func.is_view and not any(word in func.name() for word in NO_KERNEL)


def rounded(storage: torch.UntypedStorage) -> int:
    return -(-storage.nbytes() // GRAIN) * GRAIN


class Live(TorchDispatchMode):
    """Follows every storage made inside, from the operation that makes it until it is freed.

    live: bytes by part; new storages belong to `part`. peak: the most bytes that were alive at
    once, a convolution's workspace included, and at_peak: how they were divided; work: what was
    done so far.
    """

    def __init__(self):
        super().__init__()
        self.part, self.live, self.known, self.work = "weights", Counter(), {}, dict(NOTHING)
        self.start()

    def start(self) -> None:
        """Begin a new peak and a new count of work here."""
        self.peak, self.at_peak, self.work = 0, {}, dict(NOTHING)
        self.note(0)

    def total(self) -> int:
        return sum(self.live.values())

    def note(self, workspace: int) -> None:
        if self.total() + workspace > self.peak:
            self.peak = self.total() + workspace
            self.at_peak = dict(self.live) | {"workspace": workspace}

    def __torch_dispatch__(self, func, types_, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        operation = func._overloadpacket
        new = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if operation in PRODUCTS:
            self.work["flop"] += PRODUCTS[operation](*args, **(kwargs or {}), out_val=out)
        elif operation in ATTENTION:
            q, k = args[:2] if ATTENTION[operation] == 2 else args[1:3]
            self.work["flop"] += ATTENTION[operation] * 2 * q.numel() * k.shape[2]
        elif computes(func):
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.work["moved"] += sum(t.numel() * t.element_size() for t in (*read, *new))
        self.work["launches"] += computes(func)
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
    """What one micro-step needs. parts: bytes at its peak, by part; work: of its two passes; kept
    and again: for each module of model.checkpointable(), the bytes that recomputing it would save,
    and the work that it would cost (both empty where something is recomputed already).
    """

    parts: dict[str, int]
    work: Work
    kept: dict[str, int]
    again: dict[str, Work]

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
def without_numbers():
    """New tensors are on the meta device, and attention is a fused kernel, as on a GPU: for that
    device torch would take the definition, which keeps the attention weights.
    """
    usual = F.scaled_dot_product_attention

    def fused_kernel(q, k, v, attn_mask=None, **about):
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=attn_mask)[0]

    F.scaled_dot_product_attention = fused_kernel
    try:
        with torch.device("meta"):
            yield
    finally:
        F.scaled_dot_product_attention = usual


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

    One rehearsal serves every size of micro-batch and every choice of blocks to recompute.
    """

    def __init__(self, config: Config, dtype: torch.dtype, about: dict):
        self.config, self.live = config, Live()
        with without_numbers(), self.live:
            with default_dtype(dtype):
                self.unet = UNet2DConditionModel.from_config(about).requires_grad_(False).eval()
                if quantised(config):
                    quantise(self.unet, dtype)
            self.live.part = "adapter"
            lora.inject(self.unet, lora.TARGETS, config.lora_rank)
            self.flat = Flat(self.unet, lora.trained(self.unet))  # inject()'s own matrices are gone
            self.live.part = "weights"  # which it lays together anew
            if config.fused and config.attention == "sdpa":
                layers.wrap(self.unet)
        half = rounded(self.flat.vector.untyped_storage())  # Flat made a vector and its gradient
        self.live.live["adapter"] -= half
        self.live.live["gradients"] += half

    def predict(self, config: Config) -> Prediction:
        """config: this rehearsal's, with another batch size or other blocks to recompute."""
        self.unet.disable_gradient_checkpointing()
        if config.gradient_checkpointing:
            model.use_gradient_checkpointing(self.unet, config.checkpointed_blocks)
        kept, again, live = Counter(), {}, self.live
        with without_numbers(), live, self.measured(kept, again):
            live.part = "activations"
            run = types.SimpleNamespace(  # what loop.micro_step() reads of a Run
                config=config,
                unet=self.unet,
                loss=loop.diffusion_loss,
                schedule=model.NoiseSchedule(torch.empty(1000), "epsilon"),
                latent_scaling=(0.13025, 0.0),
                scale_on_device=torch.empty(()),
                loss_sum=torch.empty(()),
            )
            batch = fake_batch(config, self.unet)
            live.start()
            self.flat.micro_step(loop.micro_step)(run, batch)
        state = optimizer_bytes(config, self.flat.vector)
        parts = {name: size for name, size in live.at_peak.items() if size}
        parts |= {"optimizer": state, "workspace": parts.get("workspace", 0) + RESERVE}
        if config.gradient_checkpointing:
            kept, again = {}, {}
        return Prediction(parts, live.work, dict(kept), again)

    @contextlib.contextmanager
    def measured(self, kept: Counter, again: dict[str, Work]):
        """Adds to `kept` what the parts of each checkpointable module leave alive after their
        forward pass, their answers aside, and to `again` their work.
        """
        began, handles = {}, []

        def enter(part, _):
            began[part] = (self.live.total(), dict(self.live.work))

        def leave(name, part, _, answer):
            answer = answer[0] if isinstance(answer, tuple) else answer
            bytes_before, work_before = began[part]
            grown = self.live.total() - bytes_before - rounded(answer.untyped_storage())
            kept[name] += max(0, grown)
            done = plus(self.live.work, work_before, -1)
            again[name] = plus(again.get(name, NOTHING), done)

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
        return nn.functional.linear(x, layers.dense(layer), layer.bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ layers.dense(ctx.layer), None


class FakeLinear4bit(nn.Module):
    """What takes as much room as bitsandbytes' Linear4bit: 4 bits a number, an 8-bit factor for
    each nf4.PER_SCALE of them, and an fp32 factor for each nf4.SCALES_PER_SCALE of those.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        from bitsandbytes.functional import QuantState

        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, count = linear.bias, linear.weight.numel()
        packed = torch.empty((count + 1) // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        factors = -(-count // nf4.PER_SCALE)
        nested = QuantState(
            torch.empty(-(-factors // nf4.SCALES_PER_SCALE)),
            code=torch.empty(256),
            blocksize=nf4.SCALES_PER_SCALE,
            dtype=torch.float32,
        )
        self.weight.quant_state = QuantState(
            torch.empty(factors, dtype=torch.uint8),
            shape=linear.weight.shape,
            dtype=dtype,
            blocksize=nf4.PER_SCALE,
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
