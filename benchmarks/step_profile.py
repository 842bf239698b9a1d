"""Where a step's time goes, by kind of kernel, and the least that a card could take for it.

    python -m benchmarks.step_profile profile --resolution 512 1024      writes runs/bench/...
    python -m benchmarks.step_profile floor

The runs are ladder.py's, and so are the options.
"""

from benchmarks import (
    ladder as bench,  # first: it sets how long idle threads spin, before torch asks
)

# isort: split
import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

import loop
import model
from benchmarks import synthetic
from benchmarks.asked import asked
from benchmarks.ladder import ROOT, Common, Row, Rows, changed, matrix_peak, wait
from inputs import options as configuration


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Where a step's time goes, on random weights and random pictures."""

    # The kernels of one step, or the card's fastest matrix product and what follows from it.
    command: tyro.conf.Positional[Literal["profile", "floor"]]


def floor(options: Options) -> Rows:
    """The matrix product, and the seconds in which it would do the ladder's work."""
    for precision in [options.mixed_precision] if options.mixed_precision else model.DTYPES:
        yield precision, functools.partial(floor_row, options, model.DTYPES[precision])


def floor_row(options: Options, dtype: torch.dtype) -> Row:
    peak = matrix_peak(options.on, dtype)
    row: Row = {"tflop_per_s": round(peak / 1e12, 1)}
    for side in options.sides:
        row[f"tflop_per_image_{side}"] = round(synthetic.flop_of(options.folder, side) / 1e12, 4)
        row[f"s_floor_{side}_4_images"] = round(
            4 * synthetic.flop_of(options.folder, side) / peak, 4
        )
    return row


# The first that matches: a convolution may be called a gemm, and a copy an element-wise kernel.
KINDS = {
    "optimizer": r"optimizer|adam|foreach",
    "attention": r"flash|fmha|sdpa|attention|softmax",
    "dequantising": r"quantize",
    "copies": r"copy|CatArray|concat|memcpy|memset|cat\b|nchwTonhwc|nhwcTonchw|transpose|_to_copy",
    "convolutions": r"conv|cudnn|fprop|dgrad|wgrad|winograd|im2col|col2im",
    "norms": r"norm|RowwiseMoments|welford|GammaBeta|InternalGradients|FusedParams|batch_norm",
    "products": r"gemm|gemv|nvjet|cutlass|splitk|cublas|::(add|b|badd)?mm|matmul|_int_mm",
    "elementwise": r"elementwise|gelu|silu|reduce|unrolled|index|fill|scatter|::(mul|add|sum)",
}


def kind_of(kernel: str) -> str:
    found = (kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE))
    return next(found, "other")


def profile(options: Options) -> Rows:
    for side in options.sides:
        for row in options.rows or ("graph",):
            config = changed(options, side, row)
            name = f"{side} px, {config.mixed_precision}, {row}"
            yield name, functools.partial(profile_row, options, config, row == "nf4")


def profile_row(options: Options, config: configuration.Config, nf4: bool) -> Row:
    """Milliseconds and number of one step's kernels (on a CPU: of its operators), by kind."""
    from torch.profiler import ProfilerActivity

    device = options.on
    run, said = synthetic.assemble(config, device, options.folder, nf4=nf4)
    for _ in range(options.warm_up):
        loop.optimizer_step(run)
    cuda = device.type == "cuda"
    for _ in range(2):  # the first pass only starts the profiler, which takes seconds
        with torch.profiler.profile(
            activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
        ) as profiler:
            began = wait(device)
            loop.optimizer_step(run)
            wall = wait(device) - began
    spent = dict.fromkeys([*KINDS, "other"], (0.0, 0))
    longest = []
    for event in profiler.key_averages():
        span = event.key.startswith(("Optimizer.", "ProfilerStep"))  # others lie in it
        if span or ("CUDA" in str(event.device_type)) != cuda:
            continue
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = kind_of(event.key)
        spent[kind] = (spent[kind][0] + us / 1000, spent[kind][1] + event.count)
        longest.append((us / 1000, event.count, kind, event.key[:160]))
    row: Row = {"ms_wall_profiled": round(1000 * wall, 1)}
    row["ms_kernels"] = round(sum(ms for ms, _ in spent.values()), 1)
    row["kernels"] = sum(count for _, count in spent.values())
    for kind, (ms, count) in spent.items():
        row |= {f"ms_{kind}": round(ms, 2), f"n_{kind}": count}
    row["longest"] = [
        f"{ms:.2f} ms, {n} x, {k}: {key}" for ms, n, k, key in sorted(longest)[:-41:-1]
    ]
    return row | {"said": "; ".join(said)}


def main(argv: list[str] | None = None) -> int:
    options = asked(Options, argv, prog="step_profile")
    rows = {"profile": profile, "floor": floor}[options.command](options)
    path = Path(options.out or ROOT / "runs" / "bench" / f"step_{options.command}.json")
    words = sys.argv[1:] if argv is None else argv
    typed = " ".join(["python -m benchmarks.step_profile", *words])
    return int(
        any(
            "error" in r
            for r in bench.measure(rows, path, typed, bench.machine(options.on)).values()
        )
    )


if __name__ == "__main__":
    sys.exit(main())
