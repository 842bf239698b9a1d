"""What is not finite, and where: a step's NaN or Inf traced to a picture, a caption, a weight, or a
matrix of the adapter. None of it runs in a step while all is well.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator

import torch

import data
from inputs.files import Refusal

AGAIN = (
    "the same command, which continues from the newest checkpoint, saved before that; if it comes "
    "back, with a new --output-dir a lower --learning-rate, or check this machine's memory"
)
ANEW = (
    "rm {}, then the same command: it is encoded anew, and the run continues; if it comes back, "
    "--mixed-precision fp32 with a new --output-dir"
)
BASE = "the same command; if it comes back, the base model's file holds it: get it anew"
PRECISION = (
    "with a new --output-dir, a lower --learning-rate or --mixed-precision fp32 (bf16 from sm_80) "
    "if the UNet overflows in fp16; or look at the picture"
)


def kind(value) -> str:
    """NaN or Inf, whichever is in a tensor of floats; empty where all is finite, and for anything
    else, such as the bytes of 8-bit AdamW.
    """
    if not torch.is_tensor(value) or not value.is_floating_point():
        return ""
    # Looked at without a temporary of its size: this is also called where a GPU is full.
    peak = torch.linalg.vector_norm(value.detach(), math.inf).item()
    return "" if math.isfinite(peak) else "NaN" if math.isnan(peak) else "Inf"


# ---- the places to look --------------------------------------------------------------------------


def in_state(kept) -> str:
    """Where the adapter, the optimizer's state or the loss scale is not finite; empty if nowhere.

    What is so must not be saved: a run that continued from it could not be mended.
    """
    # The optimizer's first: what has gone bad there spoils the adapter in its step.
    for name, moments in kept.moments.read().items():
        for key, value in moments.items():
            if bad := kind(value):
                return f"the optimizer's {key} has {bad} in {name}"
    for name, matrix in kept.run.trained.items():
        if bad := kind(matrix):
            return f"the adapter has {bad} in {name}"
    scale = kept.run.loss_scale.value
    return "" if math.isfinite(scale) else f"the loss scale is {scale}"


def in_cache(run) -> tuple[str, str]:
    """The first of the step's pictures whose cached latent or embedding is not finite, and what to
    do; empty where there is none.
    """
    cache = run.examples.source
    for e in examples(run) if isinstance(cache, data.Cache) else ():
        prompt = run.examples.prompt(e)
        for what, rows, file in (
            ("latent", cache.latent(e.picture, e.flip), cache.latents[e.picture][0]),
            ("caption's embedding", cache.prompt(prompt), cache.prompts[prompt][0]),
        ):
            if bad := next(filter(None, map(kind, rows)), ""):
                name = run.examples.names[e.picture]
                found = f"the cached {what} of picture {name} has {bad} ({file})"
                return found, ANEW.format(file)
    return "", ""


def in_base(run) -> str:
    """The first of the frozen UNet's weights that is not finite; empty where there is none."""
    for name, weight in itertools.chain(run.unet.named_parameters(), run.unet.named_buffers()):
        state = getattr(weight, "quant_state", None)  # of NF4: bytes, and what they are scaled by
        for part in state.as_dict().values() if state else [weight]:
            if bad := kind(part):
                return f"the base model's {name.replace('.base.', '.')} has {bad}"
    return ""


def in_gradient(run) -> str:
    """The matrices whose gradient is not finite, and the step's pictures."""
    bad = [name for name, matrix in run.trained.items() if kind(matrix.grad)]
    which = f"{len(bad)} of {len(run.trained)} matrices, such as {bad[0]}" if bad else "its sum"
    return f"in {which} ({pictures(run)})"


@torch.no_grad()
def in_unet(run) -> str:
    """The step's examples one by one: which of them overflows."""
    for e in examples(run):
        with contextlib.suppress(Exception):  # a full GPU, say: what was found is told without this
            numbers = range(e.number, e.number + 1)
            batch = run.examples.batch(numbers, run.unet.device, run.timesteps)
            if kind(run.loss(run.unet, batch, run.schedule, run.latent_scaling)):
                name, t = run.examples.names[e.picture], int(batch["t"])
                return f"the UNet overflows on picture {name} at timestep {t}"
    return pictures(run)


def examples(run) -> Iterator[data.Example]:
    """The step's."""
    n = run.config.examples_per_step
    return map(run.examples.example, range(run.step * n, (run.step + 1) * n))


def pictures(run) -> str:
    rows = sorted({e.picture for e in examples(run)})
    return "pictures " + ", ".join([run.examples.names[row] for row in rows][:8])


def refusal(kept) -> Refusal:
    """Why the step that raised FloatingPointError cannot be done. Its loss and gradients are still
    there; they are cleared now.
    """
    run, scale, loss = kept.run, kept.run.loss_scale, kept.run.loss_sum.item()
    # From what is read to what is computed from it.
    causes = [in_cache(run), (in_state(kept), AGAIN), (in_base(run), BASE)]
    what, remedy = next((cause for cause in causes if cause[0]), ("", PRECISION))
    if not math.isfinite(loss):
        found, what = f"the loss of step {run.step + 1} is {loss}", what or in_unet(run)
    else:
        skips = f", after {scale.skipped} skipped steps, at loss scale {scale.value:g}"
        found = f"the gradient of step {run.step + 1} is not finite{skips * scale.enabled}"
        what = what or in_gradient(run)
    run.optimizer.zero_grad(set_to_none=False)
    return Refusal(f"{found}: {what}", "finite numbers", remedy)
