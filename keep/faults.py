"""What is not finite, and where: a step's NaN or Inf traced to a picture, a caption, a weight, or a
matrix of the adapter. Of all this only largest() runs while all is well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import data
from inputs.files import Refusal
from lora import padded

if TYPE_CHECKING:
    from loop import Run

AGAIN = (
    "the same command, which continues from the newest checkpoint, saved before that; if it comes "
    "back, with a new --output-dir a lower --learning-rate, or check this machine's memory"
)
PRECISION = (
    "with a new --output-dir, a lower --learning-rate or --mixed-precision fp32 (bf16 from sm_80) "
    "if the UNet overflows in fp16; or look at the picture"
)


def moments(run: Run) -> dict[str, Tensor]:
    """The optimizer's floating-point state by name: what 8-bit AdamW keeps as bytes is finite."""
    state = run.optimizer.state.get(run.adapter.flat, {})
    floats = {k: v for k, v in state.items() if torch.is_tensor(v) and v.is_floating_point()}
    return {name: tensor for name, tensor in floats.items() if tensor.numel()}


def largest(run: Run) -> Tensor:
    """The largest absolute value in the adapter and the optimizer's state, () fp32 on the device;
    NaN where there is one.

    A step reads it together with its loss, before the optimizer moves anything. So what has gone
    bad is met in the very step that would have used it, the host waits no second time, and since
    AdamW makes finite numbers of finite ones, what a step leaves behind is sound again. Costs one
    pass over the vector and the state: 0.2 GB of reading at rank 16 and 8 bits, 0.4 GB at 32.
    """
    flat = run.adapter.flat.detach()
    # AdamW counts its steps on the host; from there to the GPU would be a wait.
    here = [tensor for tensor in moments(run).values() if tensor.device == flat.device]
    peaks = [torch.linalg.vector_norm(tensor.float(), math.inf) for tensor in (flat, *here)]
    return torch.stack(peaks).amax()  # both hand NaN on


def kind(tensor: Tensor) -> str:
    """NaN or Inf, whichever is in `tensor`; empty where all is finite."""
    # Looked at without a temporary of its size: this is also called where a GPU is full.
    peak = torch.linalg.vector_norm(tensor.detach(), math.inf).item()
    return "" if math.isfinite(peak) else "NaN" if math.isnan(peak) else "Inf"


def matrix_at(run: Run, along: Tensor) -> str:
    """The adapter's matrix in which `along` is not finite first: a tensor with a number for each
    number of the flat vector, or one for each block of them.
    """
    first = int((~along.detach().cpu().isfinite()).nonzero()[0])
    at, end = first * run.adapter.flat.numel() // along.numel(), 0
    for name, matrix in run.adapter.parts():
        end += padded(matrix.numel())
        if at < end:
            return name
    return "no matrix"


# ---- the places to look --------------------------------------------------------------------------


def in_state(run: Run) -> str:
    """Where the adapter, the optimizer's state or the loss scale is not finite; empty if nowhere.

    What is so must not be saved: a run that continued from it could not be mended.
    """
    flat = run.adapter.flat
    for what, tensor in {"adapter": flat, **moments(run)}.items():
        if bad := kind(tensor):
            whose = "the adapter has" if tensor is flat else f"the optimizer's {what} has"
            along = tensor.numel() * 256 >= flat.numel()
            return f"{whose} {bad}" + (f" in {matrix_at(run, tensor)}" if along else "")
    value = run.scale.value
    return "" if math.isfinite(value) else f"the loss scale is {value}"


def numbers(run: Run) -> range:
    """The numbers of the step's examples."""
    n = run.config.examples_per_step
    return range(run.step * n, (run.step + 1) * n)


def in_cache(run: Run) -> tuple[str, str]:
    """The first of the step's pictures whose cached latent or embedding is not finite, and what to
    do; empty where there is none.
    """
    source = run.examples.source
    for i in numbers(run) if isinstance(source, data.Cache) else ():
        e = run.examples.example(i)
        caption = run.examples.count if e.drop_caption else e.picture
        latent, prompt = source.latent(e.picture, e.flip), source.prompt(caption)
        for what, tensors, files, row in (
            ("latent", latent, source.latents, e.picture),
            ("caption's embedding", prompt, source.prompts, caption),
        ):
            if bad := next(filter(None, map(kind, tensors)), ""):
                file = files[row // data.BLOCK]
                name = run.examples.names[e.picture]
                return (
                    f"the cached {what} of picture {name} has {bad} ({file})",
                    f"rm {file}, then the same command: it is encoded anew, and the run continues; "
                    "if it comes back, --mixed-precision fp32 with a new --output-dir",
                )
    return "", ""


def in_base(run: Run) -> str:
    """The first of the frozen UNet's weights that is not finite; empty where there is none."""
    trained = {id(matrix) for _, matrix in run.adapter.parts()}
    for name, weight in (*run.unet.named_parameters(), *run.unet.named_buffers()):
        state = getattr(weight, "quant_state", None)  # of NF4: its bytes are finite, their scales
        inner = getattr(state, "state2", None)  # may not be, which may be quantised themselves
        for floats in (state.absmax, state.offset, inner and inner.absmax) if state else (weight,):
            bad = torch.is_tensor(floats) and floats.is_floating_point() and kind(floats)
            if bad and id(weight) not in trained:
                return f"the base model's {name.replace('.base.', '.')} has {bad}"
    return ""


def in_gradient(run: Run) -> str:
    """The matrices whose gradient is not finite, and the step's pictures."""
    parts = run.adapter.parts()
    bad = [name for name, matrix in parts if kind(matrix.grad)]
    which = f"{len(bad)} of {len(parts)} matrices, such as {bad[0]}" if bad else "its sum"
    return f"in {which} ({pictures(run)})"


def pictures(run: Run) -> str:
    rows = {run.examples.example(i).picture for i in numbers(run)}
    return "pictures " + ", ".join([run.examples.names[row] for row in sorted(rows)][:8])


def first_module(unet: nn.Module, work: Callable[[], Tensor]) -> tuple[str, bool]:
    """The module of `unet` that is the first to answer NaN or Inf in work(), and whether its result
    is finite.
    """
    names, found = {id(module): name for name, module in unet.named_modules()}, []

    def look(module, _, answer):
        answer = answer[0] if isinstance(answer, tuple) else answer
        if not found and id(module) in names and torch.is_tensor(answer) and kind(answer):
            found.append(names[id(module)].replace(".base", "") or "its answer")

    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        with torch.no_grad():
            finite = not kind(work())
    finally:
        handle.remove()
    return (found or [""])[0], finite


def in_unet(run: Run, loss_of: Callable) -> str:
    """The step's examples one by one: which of them overflows, and in which module first."""
    for i in numbers(run):
        batch = run.examples.batch(range(i, i + 1), run.device)
        try:
            module, finite = first_module(
                run.unet, lambda b=batch: loss_of(run.unet, b, run.schedule, run.scaling)
            )
        except Exception:  # a full GPU, say: what was found is told without this
            break
        if not finite:
            name = run.examples.names[run.examples.example(i).picture]
            first = f", first in {module}" if module else ""
            return f"the UNet overflows on picture {name} at timestep {int(batch['t'])}{first}"
    return pictures(run)


def causes(run: Run, loss_of: Callable) -> Iterator[tuple[str, str]]:
    """Where to look and what to do, from what is read to what is computed from it."""
    yield in_cache(run)
    yield in_state(run), AGAIN
    yield (
        in_base(run),
        "the same command; if it comes back, the base model's file holds it: get it anew",
    )


def refusal(run: Run, loss: float, gradient: float, loss_of: Callable) -> Refusal:
    """Why run's step cannot be done, and the gradient is cleared. loss_of: diffusion_loss()."""
    what, remedy = next((c for c in causes(run, loss_of) if c[0]), ("", PRECISION))
    if not math.isfinite(loss):
        found, what = f"the loss of step {run.step + 1} is {loss}", what or in_unet(run, loss_of)
    elif not math.isfinite(gradient):
        skips = f", after {run.scale.skipped} skipped steps, at loss scale {run.scale.value:g}"
        skips = skips if run.scale.enabled else ""
        found = f"the gradient of step {run.step + 1} is not finite{skips}"
        what = what or in_gradient(run)
    else:
        found = f"step {run.step + 1} would not be finite"
    run.adapter.flat.grad.zero_()
    return Refusal(f"{found}: {what}", "finite numbers", remedy)
