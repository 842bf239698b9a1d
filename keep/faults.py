"""What is not finite, and where: a step's NaN or Inf traced to a picture, a caption, a weight, or a
matrix of the adapter. None of it runs in a step while all is well.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator

import torch

import data
from inputs.files import Refusal

AGAIN = (
    "the same command, which continues from the newest checkpoint, saved before that; if it comes "
    "back, with a new --output-dir a lower --learning-rate, or check this machine's memory"
)
ANEW = (
    "rm that file, then the same command: it is encoded anew, and the run continues; if it comes "
    "back, --mixed-precision fp32 with a new --output-dir"
)
BASE = "the same command; if it comes back, the base model's file holds it: get it anew"
PRECISION = (
    "with a new --output-dir, a lower --learning-rate or --mixed-precision fp32 (bf16 from sm_80) "
    "if the UNet overflows in fp16; or look at the picture"
)


def bad(named: Iterable[tuple]) -> str:
    """The first of these pairs of a name and a tensor that holds NaN or Inf, in words; "" where all
    are finite. What is no tensor of floats, such as the bytes of 8-bit AdamW, always is.
    """
    for name, value in named:
        if torch.is_tensor(value) and value.is_floating_point():
            # Without a temporary of its size: this is also called where a GPU is full.
            peak = torch.linalg.vector_norm(value.detach(), math.inf).item()
            if not math.isfinite(peak):
                return f"{name} has {'NaN' if math.isnan(peak) else 'Inf'}"
    return ""


# ---- the places to look --------------------------------------------------------------------------


def of_state(kept) -> Iterator[tuple]:
    """The optimizer's state, the adapter and the loss scale. What is bad there must not be saved: a
    run that continued from it could not be mended.
    """
    # The optimizer's first: what has gone bad there spoils the adapter in its step.
    for name, moments in kept.moments.read().items():
        for key, value in moments.items():
            yield f"the optimizer's {key} of {name}", value
    for name, matrix in kept.run.trained.items():
        yield f"the adapter's {name}", matrix
    yield "the loss scale", torch.tensor(kept.run.loss_scale.value)


def of_cache(run) -> Iterator[tuple]:
    """The cached latents and embeddings of the step's pictures and captions."""
    cache = run.examples.source
    for e in examples(run) if isinstance(cache, data.Cache) else ():
        prompt, name = run.examples.prompt(e), run.examples.names[e.picture]
        for what, rows, file in (
            ("latent", cache.latent(e.picture, e.flip), cache.latents[e.picture][0]),
            ("caption's embedding", cache.prompt(prompt), cache.prompts[prompt][0]),
        ):
            for row in rows:
                yield f"the cached {what} of picture {name}, in {file},", row


def of_base(run) -> Iterator[tuple]:
    """The frozen UNet's weights."""
    for name, weight in itertools.chain(run.unet.named_parameters(), run.unet.named_buffers()):
        state = getattr(weight, "quant_state", None)  # of NF4: bytes, and what they are scaled by
        for part in state.as_dict().values() if state else [weight]:
            yield f"the base model's {name.replace('.base.', '.')}", part


@torch.no_grad()
def in_unet(run) -> str:
    """The step's examples one by one: which of them overflows."""
    for e in examples(run):
        with contextlib.suppress(Exception):  # a full GPU, say: what was found is told without this
            numbers = range(e.number, e.number + 1)
            batch = run.examples.batch(numbers, run.unet.device, run.timesteps)
            if bad([("", run.loss(run.unet, batch, run.schedule, run.latent_scaling))]):
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
    causes = ((of_cache(run), ANEW), (of_state(kept), AGAIN), (of_base(run), BASE))
    found = ((bad(place), remedy) for place, remedy in causes)
    what, remedy = next((cause for cause in found if cause[0]), ("", PRECISION))
    if not math.isfinite(loss):
        found, what = f"the loss of step {run.step + 1} is {loss}", what or in_unet(run)
    else:
        skips = f", after {scale.skipped} skipped steps, at loss scale {scale.value:g}"
        found = f"the gradient of step {run.step + 1} is not finite{skips * scale.enabled}"
        gradients = ((f"that of {name}", matrix.grad) for name, matrix in run.trained.items())
        what = what or f"{bad(gradients) or 'its sum'} ({pictures(run)})"
    run.optimizer.zero_grad(set_to_none=False)
    return Refusal(f"{found}: {what}", "finite numbers", remedy)
