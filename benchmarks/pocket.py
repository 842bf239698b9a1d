"""How well the recipe pocket learns a style on this machine, over several seeds.

    python -m pocket.build --stages render          once, with a network: the true drawings
    python -m benchmarks.pocket                     writes benchmarks/results/pocket.json

Each seed is a whole run: `loop.py pocket --seed N` from command to picture, timed, then the
prompts of pocket/heldout.json drawn with `generate.py` and measured as pocket/measure.py says.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.asked import Seeds, asked
from pocket import drawings, measure

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Options:
    """Measure the recipe pocket."""

    # Seeds of the runs.
    seeds: Seeds = (0, 1, 2)
    # Where `python -m pocket.build --stages render` left the drawings.
    work: Path = Path("runs/pocket-build")
    # Another model to measure in the place of pocket/model.
    model: str = "pocket/model"
    # What to write; also a picture of the same name.
    out: Path = Path("benchmarks/results/pocket.json")
    # Options for loop.py.
    train: tuple[str, ...] = ()


def command(*words: str) -> None:
    """Run one of the project's commands, quietly."""
    environment = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL
    )


def draw(adapter: Path, model: str, prompts: list[str], folder: Path, strength: float, seeds):
    """The prompts as (H, W, 3) arrays, through generate.py; every prompt at every seed."""
    command(
        "generate.py", str(adapter), "--prompts", *prompts, "--strength", str(strength),
        "--seeds", *map(str, seeds), "--output-dir", str(folder), "--any-base",
        "--pretrained-model-name-or-path", model,
    )  # fmt: skip
    return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))]


def true_ink(work: Path, style: str = "ink") -> np.ndarray:
    """(N, H, W, 3) uint8: the true drawings in a style, as drawings.read_subjects() has them."""
    ink = np.load(work / "ink.npz")["ink"][..., None] / 255.0
    ground, pen = (np.array(colour, float) for colour in drawings.STYLES[style])
    return (ground * (1 - ink) + pen * ink).round().astype(np.uint8)


def seed_l1(drawn: Sequence[np.ndarray]) -> float:
    """Mean pixel L1 between the seeds of a prompt; `drawn` has four of one, four of the next."""
    fours = [drawn[i : i + 4] for i in range(0, len(drawn), 4)]
    return np.mean([measure.pixel_l1(*pair) for four in fours for pair in combinations(four, 2)])


def figures(pictures: list[np.ndarray], names: list[str], work: Path) -> dict:
    """Mean measures of `pictures` against the true ink drawings of `names`."""
    place = {subject.name: i for i, subject in enumerate(drawings.read_subjects(work))}
    true = true_ink(work)
    own = [place[name] for name in names]
    ranks = [measure.rank(p, i, true) for p, i in zip(pictures, own, strict=True)]
    pairs = [(p, true[i]) for p, i in zip(pictures, own, strict=True)]
    return {
        "pixel_l1": np.mean([measure.pixel_l1(*pair) for pair in pairs]),
        "palette_distance": np.mean([measure.palette_distance(*pair) for pair in pairs]),
        "saturation": np.mean([measure.saturation(p) for p in pictures]),
        "first": np.mean([rank == 0 for rank in ranks]),
        "first_ten": np.mean([rank < 10 for rank in ranks]),
    }


def base_figures(adapter: Path, model: str, heldout: dict, folder: Path) -> dict:
    """What the bare model does with new combinations, and how far seeds differ."""
    rows = heldout["combinations"]
    prompts = [row["prompt"] for row in rows]
    new = draw(adapter, model, prompts, folder / "new", 0.0, [0])
    right = [measure.shows(picture, row) for picture, row in zip(new, rows, strict=True)]
    drawn = draw(adapter, model, heldout["seeds"], folder / "seeds", 0.0, range(4))
    return {"combinations_of_10": sum(right), "seed_l1": seed_l1(drawn)}


def main() -> None:
    options = asked(Options)
    heldout = json.loads((ROOT / "pocket" / "heldout.json").read_text())
    names = heldout["measured"]
    runs, seconds = [], []
    scratch = Path(tempfile.mkdtemp())
    for seed in options.seeds:
        adapter, start = scratch / f"run{seed}", time.perf_counter()
        command(
            "loop.py", "pocket", "--seed", str(seed), "--output-dir", str(adapter),
            "--pretrained-model-name-or-path", options.model,
            "--cache-dir", str(scratch / f"cache{seed}"), *options.train,
        )  # fmt: skip
        seconds.append(time.perf_counter() - start)
        pictures = draw(adapter, options.model, names, scratch / f"p{seed}", 1.0, [seed])
        runs.append(figures(pictures, names, options.work))
        print(seed, round(seconds[-1], 1), runs[-1], flush=True)
    first = scratch / f"run{options.seeds[0]}"
    before = figures(
        draw(first, options.model, names, scratch / "before", 0.0, [0]), names, options.work
    )
    result = {
        "command": " ".join(["python -m benchmarks.pocket", *sys.argv[1:]]),
        "cpu": cpu(),
        "torch": torch.__version__,
        "prompts": len(names),
        "drawings to choose from": len(drawings.read_subjects(options.work)),
        "seconds from command to picture": [round(s, 1) for s in seconds],
        "bare model": rounded(before | base_figures(first, options.model, heldout, scratch)),
        "after, mean": rounded({k: np.mean([r[k] for r in runs]) for k in runs[0]}),
        "after, lowest": rounded({k: min(r[k] for r in runs) for k in runs[0]}),
        "after, highest": rounded({k: max(r[k] for r in runs) for k in runs[0]}),
        "goals": heldout["thresholds"],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    chosen = draw(first, options.model, heldout["recognisable"], scratch / "chosen", 1.0, [7])
    rows = [np.concatenate(chosen[i : i + 12], axis=1) for i in (0, 12)]
    Image.fromarray(np.concatenate(rows)).save(options.out.with_suffix(".png"))
    shutil.rmtree(scratch)
    print(json.dumps(result, indent=1))


def rounded(values: dict) -> dict:
    return {name: round(float(value), 3) for name, value in values.items()}


def cpu() -> str:
    """The processor's name and the cores that this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown'}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    main()
