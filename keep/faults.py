"""What is not finite, and where: a step's NaN or Inf traced to a picture, a caption, a weight, or a
matrix of the adapter. None of it runs in a step while all is well.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

import data
from inputs.blocks import ROWS_PER_FILE
from inputs.files import Refusal

AGAIN = (
    "the same command, which continues from the newest checkpoint, saved before that; if it comes "
    "back, with a new --output-dir a lower --learning-rate, or check this machine's memory"
)
PRECISION = (
    "with a new --output-dir, a lower --learning-rate or --mixed-precision fp32 (bf16 from sm_80) "
    "if the UNet overflows in fp16; or look at the picture"
)


def kind(tensor: Tensor) -> str:
    """NaN or Inf, whichever is in `tensor`; empty where all is finite."""
    # Looked at without a temporary of its size: this is also called where a GPU is full.
    peak = torch.linalg.vector_norm(tensor.detach(), math.inf).item()
    return "" if math.isfinite(peak) else "NaN" if math.isnan(peak) else "Inf"


# ---- the places to look --------------------------------------------------------------------------


def in_state(kept) -> str:
    """Where the adapter, the optimizer's state or the loss scale is not finite; empty if nowhere.

    What is so must not be saved: a run that continued from it could not be mended.
    """
    state = []  # the optimizer's first: what has gone bad there spoils the adapter in its step
    for name, moments in kept.moments.read().items():
        state += [(f"the optimizer's {key}", name, value) for key, value in moments.items()]
    state += [("the adapter", *each) for each in kept.run.trained.items()]
    floats = [each for each in state if torch.is_tensor(each[2]) and each[2].is_floating_point()]
    # All at once first, since each answer is a wait for the GPU. Bytes of 8-bit AdamW are finite.
    if not get_total_norm([tensor for *_, tensor in floats], math.inf).isfinite():
        return next(f"{what} has {kind(t)} in {name}" for what, name, t in floats if kind(t))
    value = kept.run.loss_scale.value
    return "" if math.isfinite(value) else f"the loss scale is {value}"


def numbers(run) -> range:
    """The numbers of the step's examples."""
    n = run.config.examples_per_step
    return range(run.step * n, (run.step + 1) * n)


def in_cache(run) -> tuple[str, str]:
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
                file, name = files[row // ROWS_PER_FILE], run.examples.names[e.picture]
                return (
                    f"the cached {what} of picture {name} has {bad} ({file})",
                    f"rm {file}, then the same command: it is encoded anew, and the run continues; "
                    "if it comes back, --mixed-precision fp32 with a new --output-dir",
                )
    return "", ""


def in_base(run) -> str:
    """The first of the frozen UNet's weights that is not finite; empty where there is none."""
    trained = {id(matrix) for matrix in run.trained.values()}
    for name, weight in (*run.unet.named_parameters(), *run.unet.named_buffers()):
        state = getattr(weight, "quant_state", None)  # of NF4: its bytes are finite, their scales
        inner = getattr(state, "state2", None)  # may not be, which may be quantised themselves
        for floats in (state.absmax, state.offset, inner and inner.absmax) if state else (weight,):
            bad = torch.is_tensor(floats) and floats.is_floating_point() and kind(floats)
            if bad and id(weight) not in trained:
                return f"the base model's {name.replace('.base.', '.')} has {bad}"
    return ""


def in_gradient(run) -> str:
    """The matrices whose gradient is not finite, and the step's pictures."""
    bad = [name for name, matrix in run.trained.items() if kind(matrix.grad)]
    count = len(run.trained)
    which = f"{len(bad)} of {count} matrices, such as {bad[0]}" if bad else "its sum"
    return f"in {which} ({pictures(run)})"


def pictures(run) -> str:
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


def in_unet(run) -> str:
    """The step's examples one by one: which of them overflows, and in which module first."""
    for i in numbers(run):
        batch = run.examples.batch(range(i, i + 1), run.unet.device, run.timesteps)
        try:
            module, finite = first_module(
                run.unet, lambda b=batch: run.loss(run.unet, b, run.schedule, run.latent_scaling)
            )
        except Exception:  # a full GPU, say: what was found is told without this
            break
        if not finite:
            name = run.examples.names[run.examples.example(i).picture]
            first = f", first in {module}" if module else ""
            return f"the UNet overflows on picture {name} at timestep {int(batch['t'])}{first}"
    return pictures(run)


def causes(kept) -> Iterator[tuple[str, str]]:
    """Where to look and what to do, from what is read to what is computed from it."""
    yield in_cache(kept.run)
    yield in_state(kept), AGAIN
    yield (
        in_base(kept.run),
        "the same command; if it comes back, the base model's file holds it: get it anew",
    )


def refusal(kept) -> Refusal:
    """Why the step that raised FloatingPointError cannot be done. Its loss and gradients are still
    there; they are cleared now.
    """
    run, loss = kept.run, kept.run.loss_sum.item()
    what, remedy = next((c for c in causes(kept) if c[0]), ("", PRECISION))
    if not math.isfinite(loss):
        found, what = f"the loss of step {run.step + 1} is {loss}", what or in_unet(run)
    else:
        scale = run.loss_scale
        skips = f", after {scale.skipped} skipped steps, at loss scale {scale.value:g}"
        skips = skips if scale.enabled else ""
        found = f"the gradient of step {run.step + 1} is not finite{skips}"
        what = what or in_gradient(run)
    run.optimizer.zero_grad(set_to_none=False)
    return Refusal(f"{found}: {what}", "finite numbers", remedy)
