"""The ladder's rows of two versions of this project in turn, on one card: seconds, new over old.

    git worktree add ../before 5b006f2
    python -m benchmarks.old_and_new ../before --resolution 512 1024 --out old_and_new.json

Each version runs its own ladder in a process of its own; in turn, since a card's clock changes over
minutes. A row's seconds are the median of its turns. s_start, from before the weights are drawn to
the end of the first step, is that of a command only in a process's first row.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.asked import Count, Sides, asked

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Options:
    """Time the ladder's rows of two versions in turn."""

    # The folder of the earlier version.
    before: tyro.conf.Positional[Path]
    # Rows of the ladder.
    rows: tuple[str, ...] = ("eager", "fused", "graph", "4x1", "checkpointing", "nf4")
    # Sides of the training square in pixels.
    resolution: Sides = (512,)
    # How often each version has its turn.
    turns: Count = 3
    # More of the ladder's options, in one word: --more="--tiny --device cpu"
    more: str = ""
    out: Path = Path("benchmarks/results/old_and_new.json")


def ladder(tree: Path, words: list[str], out: Path) -> dict[str, dict]:
    """The rows of the version in `tree`, whose ladder may still be bench.py."""
    script = ["bench.py"] if (tree / "bench.py").is_file() else ["-m", "benchmarks.ladder"]
    command = [sys.executable, *script, "ladder", *words, "--out", str(out)]
    if code := subprocess.run(command, cwd=tree, stdout=subprocess.DEVNULL).returncode:
        found = out.read_text() if out.is_file() else ""
        sys.exit(f"the ladder of {tree} ended with {code}: {found}")
    return json.loads(out.read_text())["rows"]


def compare(old: list[dict], new: list[dict]) -> dict:
    """One row's turns: new / old of the medians of its seconds, and what they are medians of."""
    row = {}
    for name, turns in (("old", old), ("new", new)):
        row |= {f"s_{name}": [turn["s_per_step"] for turn in turns]}
        row |= {f"s_start_{name}": [turn.get("s_start") for turn in turns]}
        row |= {f"{key}_{name}": turns[0].get(key) for key in ("gib_allocated", "loss")}
    ratio = statistics.median(row["s_new"]) / statistics.median(row["s_old"])
    return {"new / old": round(ratio, 4)} | row


def main(argv: list[str] | None = None) -> None:
    options = asked(Options, argv)
    words = ["--rows", *options.rows, "--resolution", *map(str, options.resolution)]
    words += options.more.split()
    old, new = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.turns):
            for tree, rows in ((options.before.resolve(), old), (ROOT, new)):
                rows.append(ladder(tree, words, Path(folder) / f"{len(old) + len(new)}.json"))
                print(tree.name, {k: r["s_per_step"] for k, r in rows[-1].items()}, flush=True)
    found = {name: compare([r[name] for r in old], [r[name] for r in new]) for name in new[0]}
    on = sorted({row["on"] for rows in (*old, *new) for row in rows.values()})
    typed = ["python -m benchmarks.old_and_new BEFORE", *words, f"--turns {options.turns}"]
    result = {"command": " ".join(typed), "on": on, "rows": found}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: row["new / old"] for name, row in found.items()}, indent=1))


if __name__ == "__main__":
    main()
