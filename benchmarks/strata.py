"""By how much stratified timesteps calm an optimizer step's gradient, on the small model.

    python -m benchmarks.strata            writes benchmarks/results/strata.json; CPU, some minutes

The recipe pocket is trained for a while; then, with its weights held, the gradients of as many
steps are taken with each way to draw timesteps, all else (pictures, noise) the same. Told: the
variance of the gradient, summed over its numbers, less that of independent draws, as a ratio, with
its error by leaving out one step after another; and the same of the step's loss.
"""

import json
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.asked import Count, asked
from benchmarks.pocket import cpu
from inputs import options
from inputs.files import Refusal
from keep import training

WAYS = {"independent": (), "strata": ("--stratified-timesteps",)}
WAYS |= {"logit-normal": ("--weighting-scheme", "logit_normal")}
WAYS |= {"strata, logit-normal": WAYS["strata"] + WAYS["logit-normal"]}


@dataclass
class Options:
    """Compare ways to draw timesteps."""

    # Steps of the run whose weights are held.
    trained: Count = 100
    # Steps whose gradients are taken.
    steps: Count = 64
    # Further options of loop.py for all, as one text.
    train: str = ""
    out: Path = Path("benchmarks/results/strata.json")


def gradients(words: list[str], steps: int) -> tuple[torch.Tensor, np.ndarray]:
    """Inner products (steps, steps) of the gradients of a run's first steps, its weights held, and
    their losses.
    """
    run = training.set_up(options.parse(words), torch.device("cpu"))[0].run
    found, losses = [], []
    run.scale_on_device.fill_(1.0)
    for step in range(steps):
        run.loss_sum.zero_()
        run.optimizer.zero_grad(set_to_none=False)
        for batch in run.batches(run, step):
            run.micro_step(run, batch)
        found.append(torch.cat([each.grad.flatten() for each in run.trained.values()]))
        losses.append(run.loss_sum.item())
    all_of_them = torch.stack(found)
    return (all_of_them @ all_of_them.T).double(), np.array(losses)


def variance(products: torch.Tensor) -> float:
    """The sum of the variances of all numbers of n vectors, from their inner products (n, n)."""
    n = len(products)
    return ((products.trace() - products.sum() / n) / (n - 1)).item()


def ratio(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """variance(one) / variance(other) and its standard error (the jackknife's)."""
    n, rest = len(one), []
    for i in range(n):
        kept = [j for j in range(n) if j != i]
        rest.append(variance(one[kept][:, kept]) / variance(other[kept][:, kept]))
    error = ((n - 1) * np.var(rest)) ** 0.5
    return round(variance(one) / variance(other), 3), round(float(error), 3)


def main(argv: list[str] | None = None) -> None:
    given = asked(Options, argv)
    with tempfile.TemporaryDirectory() as folder:
        base = ["pocket", "--device", "cpu", "--quiet", "--no-tensorboard", *given.train.split()]
        base += ["--preview-steps", "0", "--cache-dir", f"{folder}/cache", "--validation-prompts"]
        first = ["--max-train-steps", str(given.trained), "--output-dir", f"{folder}/first"]
        if exit_code := training.main(options.parse([*base, *first])):
            sys.exit(exit_code)
        start = ["--start-from", f"{folder}/first"]
        found = {
            name: gradients([*base, *start, "--output-dir", f"{folder}/{name}", *more], given.steps)
            for name, more in WAYS.items()
        }
    products, losses = found["independent"]
    other = {name: each for name, each in found.items() if name != "independent"}
    mean = products.sum().item() / given.steps**2
    result = {
        "command": f"python -m benchmarks.strata {shlex.join(argv or sys.argv[1:])}",
        "on": cpu(),
        "torch": torch.__version__,
        "steps": given.steps,
        "variance of independent draws / squared length of the mean": round(
            variance(products) / mean, 2
        ),
        "variance / independent's, and error": {
            name: ratio(each, products) for name, (each, _) in other.items()
        },
        "variance of the loss / independent's": {
            name: round(float(each.var() / losses.var()), 3) for name, (_, each) in other.items()
        },
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    try:
        main()
    except Refusal as refusal:
        sys.exit(f"error: {refusal}")
