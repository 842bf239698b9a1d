"""How exact each technique is, on random weights and pictures.

    python -m benchmarks.exactness --resolution 512            writes runs/bench/exactness.json
    python -m benchmarks.exactness plain --mixed-precision bf16

fp32: loss and gradient of each of the ladder's rows against fp32. The reference is computed by the
definitions, from weights that were rounded to the dtype that is compared with it.
plain: what the recipes compute against what the book's lines do as --plain runs them, in one dtype:
the first gradient, and how far the adapter is off after --steps.

The runs are ladder.py's, and so are the options.
"""

from benchmarks import (
    ladder as bench,  # first: it sets how long idle threads spin, before torch asks
)

# isort: split
import dataclasses
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

import loop
import model
from benchmarks import synthetic
from benchmarks.asked import Count, asked
from benchmarks.ladder import LADDER, ROOT, Common, Row, Rows, changed
from inputs import options as configuration


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """How exact each technique is."""

    # What to compare with.
    against: tyro.conf.Positional[tuple[Literal["fp32", "plain"], ...]] = ("fp32", "plain")
    # Optimizer steps of "plain".
    steps: Count = 20

    def precisions(self, usual: tuple[str, ...]) -> tuple[str, ...]:
        return (self.mixed_precision,) if self.mixed_precision else usual


def first_gradient(run: loop.Run) -> tuple[float, Tensor]:
    """(mean loss, gradient (N,) fp32 on the CPU) of the examples of step 0, with an adapter whose B
    are not zero. The step itself is left to be done.
    """
    run.scale_on_device.fill_(run.loss_scale.value)
    run.loss_sum.zero_()
    for batch in loop.step_batches(run, 0):
        run.micro_step(run, batch)
    found = run.loss_sum.item(), synthetic.gradient(run)
    run.optimizer.zero_grad(set_to_none=False)
    return found


def relative(found: Tensor, want: Tensor, scale: Tensor | None = None) -> float:
    """|found - want| / |scale|; scale: `want` unless given."""
    scale = want if scale is None else scale
    return float(f"{(found - want).norm() / scale.norm():.3g}")


# ---- against fp32 --------------------------------------------------------------------------------


def gradient(
    options: Common, config: configuration.Config, rounded=None, nf4: bool = False
) -> tuple[float, Tensor]:
    run, _ = synthetic.assemble(config, options.on, options.folder, rounded, nf4)
    synthetic.leave_zero(run)
    return first_gradient(run)


@functools.lru_cache(maxsize=1)
def reference(options: Common, side: int, rounded: torch.dtype) -> tuple[float, Tensor]:
    """gradient() by the definitions in fp32, of weights rounded as those compared to it."""
    return gradient(options, changed(options, side, "eager", "fp32"), rounded)


def fp32(options: Options) -> Rows:
    rows = options.rows or [row for row in LADDER if row != "nf4"]
    for side in options.sides:
        for precision in options.precisions(("fp16", "bf16")):
            for row in rows:
                yield (
                    f"{side} px, {precision}, {row}",
                    functools.partial(fp32_row, options, side, row, precision),
                )


def fp32_row(options: Options, side: int, row: str, precision: str) -> Row:
    """Relative differences from reference(). cosine: between the two gradients."""
    torch.backends.cudnn.allow_tf32 = False  # the reference's convolutions in fp32 indeed
    want_loss, want = reference(options, side, model.DTYPES[precision])
    model.free_memory()
    loss, grad = gradient(options, changed(options, side, row, precision), nf4=row == "nf4")
    cosine = torch.nn.functional.cosine_similarity(grad.double(), want.double(), dim=0)
    return {
        "loss": loss,
        "loss_off": float(f"{abs(loss - want_loss) / abs(want_loss):.3g}"),
        "gradient_off": relative(grad, want),
        "one_minus_cosine": float(f"{1 - cosine:.3g}"),
        "gradient_norm": float(f"{want.norm():.4g}"),
    }


# ---- against the book's own lines ----------------------------------------------------------------


def plain(options: Options) -> Rows:
    for side in options.sides:
        for precision in options.precisions(("fp32", "fp16", "bf16")):
            yield (
                f"{side} px, {precision}, against --plain",
                functools.partial(plain_row, options, side, precision),
            )


def plain_row(options: Options, side: int, precision: str) -> Row:
    """The first gradient's relative difference, and for both optimizers |difference| / |moved|
    after options.steps, in passes of two examples.
    """
    torch.backends.cudnn.allow_tf32 = False  # roundings of 10 bits would hide all others
    config = changed(options, side, "graph", precision)
    config = dataclasses.replace(config, train_batch_size=2, gradient_accumulation_steps=2)
    row: Row = {}
    for name, eight_bit in (("adamw", False), ("adamw8bit", True)):
        config = dataclasses.replace(config, use_8bit_adam=eight_bit)
        pair = []
        for make in (synthetic.by_the_book, synthetic.assemble):
            pair.append(gradient_and_way(make(config, options.on, options.folder)[0], options))
            model.free_memory()
        (grad, moved, skipped), (grads, ways, skips) = pair
        row["gradient_off"] = relative(grads, grad)
        row |= {f"{name}_off": relative(ways, moved), f"{name}_skipped": [skipped, skips]}
    return row | {"gradient_norm": float(f"{grad.norm():.4g}"), "steps": options.steps}


def gradient_and_way(run: loop.Run, options: Options) -> tuple[Tensor, Tensor, int]:
    """The first gradient at a B that is not zero, how far options.steps move each number from its
    real start, (N,) each, and how many of them were skipped for overflow.
    """
    start = {name: matrix.detach().clone() for name, matrix in run.trained.items()}
    synthetic.leave_zero(run)
    _, grad = first_gradient(run)
    with torch.no_grad():
        for name, matrix in run.trained.items():
            matrix.copy_(start[name])
    for _ in range(options.steps):
        loop.optimizer_step(run)
    way = (run.trained[name].detach() - before for name, before in start.items())
    return grad, synthetic.flattened(way), run.loss_scale.skipped


def main(argv: list[str] | None = None) -> int:
    options = asked(Options, argv, prog="exactness", description=__doc__)
    path = Path(options.out or ROOT / "runs" / "bench" / "exactness.json")
    typed = " ".join(["python -m benchmarks.exactness", *(sys.argv[1:] if argv is None else argv)])
    ways = {"fp32": fp32, "plain": plain}
    rows = (row for name in options.against for row in ways[name](options))
    found = bench.measure(rows, path, typed, bench.machine(options.on))
    return int(any("error" in row for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
