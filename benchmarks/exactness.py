"""How far each technique's loss and gradient are from fp32, on random weights and pictures.

    python -m benchmarks.exactness --resolution 512

The reference is computed by the definitions, in fp32, from weights that were rounded to the dtype
that is compared with it. The runs are bench.py's, and so are the options.
"""

from benchmarks import (
    ladder as bench,  # first: it sets how long idle threads spin, before torch asks
)

# isort: split
import functools
import sys
from pathlib import Path

import torch
import tyro

import loop
import model
from benchmarks import synthetic
from benchmarks.ladder import LADDER, ROOT, Common, Row, Rows, changed
from inputs import options as configuration


def gradient(
    options: Common, config: configuration.Config, rounded=None, nf4: bool = False
) -> tuple:
    """(mean loss, flat gradient (N,) fp32 on the CPU) of the examples of step 0, with an adapter
    whose B are not zero: the gradient of A is zero else, whatever is wrong with it.
    """
    run, _ = synthetic.assemble(config, options.on, options.folder, rounded, nf4)
    noise = torch.randn(run.adapter.flat.shape, generator=torch.Generator().manual_seed(1))
    run.adapter.flat.data.add_(0.01 * noise.to(options.on))
    run.factor.fill_(run.scale.value)
    for numbers in loop.micro_batches(0, config.examples_per_step, config.train_batch_size):
        run.forward_backward(run.examples.batch(numbers, options.on))
    return run.loss_sum.item(), (run.adapter.flat.grad / run.factor).cpu()


@functools.lru_cache(maxsize=1)
def reference(options: Common, side: int, rounded: torch.dtype) -> tuple:
    """gradient() by the definitions in fp32, of weights rounded as those compared to it."""
    return gradient(options, changed(options, side, "eager", "fp32"), rounded)


def same(options: Common) -> Rows:
    rows = options.rows or [row for row in LADDER if row != "nf4"]
    for side in options.sides:
        for precision in [options.mixed_precision] if options.mixed_precision else ["fp16", "bf16"]:
            for row in rows:
                yield (
                    f"{side} px, {precision}, {row}",
                    functools.partial(same_row, options, side, row, precision),
                )


def same_row(options: Common, side: int, row: str, precision: str) -> Row:
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


def main(argv: list[str] | None = None) -> int:
    options = tyro.cli(Common, args=argv, prog="exactness", description=__doc__)
    path = Path(options.out or ROOT / "runs" / "bench" / "exactness.json")
    typed = " ".join(["python -m benchmarks.exactness", *(sys.argv[1:] if argv is None else argv)])
    found = bench.measure(same(options), path, typed, bench.machine(options.on))
    return int(any("error" in row for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
