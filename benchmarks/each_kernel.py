"""What each of fast/'s later parts brings alone, and all of them together.

    python -m benchmarks.each_kernel --resolution 512 1024 --rows 4x1 graph

Rows of the ladder (4x1 unless others are named), with attention's products and gates fused: with
"none" of PARTS, with one of them each, and with "all", as the product has them. Each is put
together anew in one process; "new / none" are its seconds over those of "none".
"""

import contextlib
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from benchmarks import ladder
from benchmarks.asked import Count, asked
from fast import convolution, flat, layernorm, layers

# What takes each part in, and what stands there without it.
PARTS = {
    "convolution blocks": (convolution, "fusible", lambda unet: {}),
    "LayerNorm with the addition": (layernorm, "is_known", lambda block: False),
    "keys and values at once": (layers, "of_one_size", lambda attention: []),
    "second stream": (flat.ASIDE, "while_recorded", lambda part: contextlib.nullcontext()),
}
ROWS = {"none": (), **{name: (name,) for name in PARTS}, "all": tuple(PARTS)}


@dataclass(frozen=True, kw_only=True)
class Options(ladder.Common):
    """Time the ladder's rows with each of fast/'s later parts alone."""

    # Steps that are timed.
    steps: Count = 10


def rows(options: Options) -> ladder.Rows:
    for side in options.sides:
        for way in options.rows or ("4x1",):
            none: list[float] = []
            for name in ROWS:
                label = f"{side} px, {options.precision()}, {way}, {name}"
                yield label, functools.partial(row, options, side, way, name, none)


def row(options: Options, side: int, way: str, name: str, none: list[float]) -> ladder.Row:
    """Row `way` with the parts of ROWS[name]. none: of the row "none" the seconds, which it puts
    there.
    """
    with contextlib.ExitStack() as without:
        for part in PARTS.keys() - set(ROWS[name]):
            without.enter_context(mock.patch.object(*PARTS[part]))
        config = ladder.changed(options, side, way)
        found = ladder.time_row(options, config, False, options.steps)
    none += [found["s_per_step"]] if name == "none" else []
    ratio = {"new / none": round(found["s_per_step"] / none[0], 4)} if none else {}
    return ratio | {key: value for key, value in found.items() if key != "losses"}


def main(argv: list[str] | None = None) -> int:
    options, words = asked(Options, argv), sys.argv[1:] if argv is None else argv
    path = Path(options.out or ladder.ROOT / "runs" / "bench" / "each_kernel.json")
    typed = " ".join(["python -m benchmarks.each_kernel", *words])
    found = ladder.measure(rows(options), path, typed, ladder.machine(options.on))
    return int(any("error" in row for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
