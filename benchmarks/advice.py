"""What steps, rate and rank suit 20, 100 and 1,000 pictures, and what too much looks like.

    python -m pocket.build --stages render     once, with a network: the true drawings
    python -m benchmarks.advice                on one GPU, under ten minutes

The recipe pocket on nested sets of ink drawings of the small SDXL: a hint for SDXL base, not a
measurement of it. Steps are tried first; at the best (least pixel L1 on held-out subjects) rates
and ranks (alpha is the rank). The warm-up is always the recipe's 20 steps. Each number of pictures
has its own process; they share the GPU. diffusers' pipeline draws, in fp32 and in batches, with
`load_lora_weights`. A sheet for each number, of the first seed, lies beside OUT.json in OUT_N.png.

No set holds a name of pocket/heldout.json outside its list `ink`. A row's measures:
heldout              as benchmarks/pocket.py has them, on the 48 held-out subjects
trained              the same on 20 training subjects, which all sets hold
copied               share of the held-out subjects for which the nearest of all drawings is one of
                     the training set: the more it holds, the more by chance (see the bare model)
nearest_training_l1  mean distance of their pictures from the nearest drawing of the training set
numbers_right        share of "two apples" and its like, at four seeds, with that number of areas
colour_saturation    of "blue elephant" and its like; ink has none
seed_l1              how far the seeds of one of these prompts are apart
"""

import contextlib
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw

from benchmarks.pocket import ROOT, cpu, rounded
from pocket import drawings, measure
from see import sheet

SHOWN = ("panda", "helicopter", "beetle", "dumpling", "orange book", "nerd face")  # on the sheets
USUAL = {"learning_rate": 4e-3, "lora_rank": 16}  # the recipe's
MODEL = ROOT / "pocket" / "model"


@dataclass
class Options:
    """Advice by the number of pictures."""

    counts: tuple[int, ...] = (20, 100, 1000)
    steps: tuple[int, ...] = (50, 150, 450, 1350)
    rates: tuple[float, ...] = (1e-3, 1.6e-2)
    ranks: tuple[int, ...] = (4, 64)
    # The third and later ones' rows come after all rows of the first two.
    seeds: tuple[int, ...] = (0, 1, 2)
    # Held-out prompts, and denoising steps of each picture.
    prompts: int = 48
    num_inference_steps: int = 30
    # No run is begun that may end later than this many seconds after the start.
    seconds: float = 480
    # Where `python -m pocket.build --stages render` left the drawings.
    work: Path = Path("runs/pocket-build")
    out: Path = Path("benchmarks/results/advice.json")


def training_order(heldout: dict, names: list[str]) -> list[str]:
    """What may be trained, those of pocket/ink first; a set of N pictures is the first N."""
    away = {*heldout["measured"], *heldout["recognisable"], *heldout["seeds"]}
    ink = [name for name in heldout["ink"] if name not in away]
    rest = sorted(set(names) - away - set(ink))
    dice = random.Random(0)
    return dice.sample(ink, len(ink)) + dice.sample(rest, len(rest))


def silhouette(picture: np.ndarray) -> np.ndarray:
    """Black wherever no white path leads to the picture's edge, so that an outline is one area."""
    lines = Image.fromarray(np.pad(picture.min(-1) < 225, 1).astype(np.uint8)).copy()
    ImageDraw.floodfill(lines, (0, 0), 2)
    outside = np.asarray(lines)[1:-1, 1:-1, None] == 2
    return np.where(outside, np.uint8(255), np.uint8(0)).repeat(3, axis=2)


class Study:
    """All runs with `count` pictures, or with all there are."""

    def __init__(self, count: int, options: Options, scratch: Path):
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        heldout = json.loads((ROOT / "pocket" / "heldout.json").read_text())
        names = [subject.name for subject in drawings.read_subjects(options.work)]
        chosen = training_order(heldout, names)[:count]
        drawings.style_set("ink", scratch / "data", options.work, chosen)
        self.options, self.scratch, self.rows, self.sheet = options, scratch, [], {}
        ink = np.load(options.work / "ink.npz")["ink"][..., None] / 255.0
        ground, pen = (np.array(colour, float) for colour in drawings.STYLES["ink"])
        self.true = (ground * (1 - ink) + pen * ink).round().astype(np.uint8)  # (N, H, W, 3)
        measured = [*SHOWN, *(name for name in heldout["measured"] if name not in SHOWN)]
        self.subjects = measured[: options.prompts] + chosen[:20]
        self.own = [names.index(name) for name in self.subjects]
        self.training = [names.index(name) for name in chosen]
        self.new = [row for row in heldout["combinations"] for _ in range(4)]  # at four seeds
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.flat = torch.from_numpy(self.true).flatten(1).to(device, torch.float32)
        self.pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
            MODEL, add_watermarker=False, local_files_only=True
        ).to(device)
        self.pipe.set_progress_bar_config(disable=True)

    def draw(self, seed: int) -> np.ndarray:
        """Every subject at `seed`, then the combinations, (N, H, W, 3) uint8."""
        prompts = self.subjects + [row["prompt"] for row in self.new]
        seeds = [seed] * len(self.subjects) + [seed + i % 4 for i in range(len(self.new))]
        drawn = self.pipe(
            prompts, generator=[torch.Generator().manual_seed(s) for s in seeds],
            num_inference_steps=self.options.num_inference_steps, guidance_scale=2.0,
            output_type="np",
        )  # fmt: skip
        return (drawn.images * 255).round().astype(np.uint8)

    def distances(self, pictures: np.ndarray) -> np.ndarray:
        """measure.pixel_l1 of each picture and drawing; fp32 holds these sums of bytes exactly."""
        flat = torch.from_numpy(pictures).flatten(1).to(self.flat)
        return (torch.cdist(flat, self.flat, p=1) / flat.shape[1]).cpu().numpy()

    def figures(self, pictures: np.ndarray, away: np.ndarray, own: list[int]) -> dict:
        """As benchmarks.pocket.figures(), from the distances `away`."""
        l1 = away[np.arange(len(own)), own]
        rank = (away < l1[:, None]).sum(1)
        pairs = zip(pictures, self.true[own], strict=True)
        figures = {
            "pixel_l1": l1.mean(),
            "palette_distance": np.mean([measure.palette_distance(*pair) for pair in pairs]),
            "saturation": np.mean([measure.saturation(p) for p in pictures]),
            "first": (rank == 0).mean(),
            "first_ten": (rank < 10).mean(),
        }
        return rounded(figures)

    def measures(self, seed: int, label: str) -> dict:
        """Draw and measure; of the first seed a row of the sheet, too."""
        pictures, n, end = self.draw(seed), self.options.prompts, len(self.subjects)
        if seed == self.options.seeds[0]:
            self.sheet[label] = [Image.fromarray(p) for p in pictures[: len(SHOWN)]]
        away, new = self.distances(pictures[:end]), list(zip(pictures[end:], self.new, strict=True))
        right = [measure.objects(silhouette(p)) == r["count"] for p, r in new if r["count"] > 1]
        four = pictures[end:].reshape(-1, 4, *pictures.shape[1:])
        apart = [measure.pixel_l1(p[a], p[b]) for p in four for a in range(4) for b in range(a)]
        others = {
            "copied": np.isin(away[:n].argmin(1), self.training).mean(),
            "nearest_training_l1": away[:n, self.training].min(1).mean(),
            "numbers_right": np.mean(right),
            "colour_saturation": np.mean([measure.saturation(p) for p, r in new if r["colour"]]),
            "seed_l1": np.mean(apart),
        }
        heldout = self.figures(pictures[:n], away[:n], self.own[:n])
        trained = self.figures(pictures[n:end], away[n:], self.own[n:])
        return {"heldout": heldout, "trained": trained, **rounded(others)}

    def train(self, out: Path, what: dict) -> bool:
        """The recipe with `what` changed; False where it is refused, for NaN, say."""
        from keep import training

        given = {"dataset-name": self.scratch / "data", "cache-dir": self.scratch / "cache"}
        given |= {"output-dir": out, "pretrained-model-name-or-path": MODEL}
        given |= {name.replace("_", "-"): value for name, value in what.items()}
        given |= {"lora-alpha": what["lora_rank"], "checkpointing-steps": what["max_train_steps"]}
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            return (
                training.main(["pocket", *words, "--no-tensorboard", "--validation-prompts"]) == 0
            )

    def grid(self) -> Iterator[dict]:
        """The runs: two seeds of the steps, of rates and ranks at the best steps, then the rest."""
        options, best = self.options, 0
        changes = [{"learning_rate": rate} for rate in options.rates]
        changes += [{"lora_rank": rank} for rank in options.ranks]
        for seeds in filter(None, (options.seeds[:2], options.seeds[2:])):
            for seed, steps in product(seeds, options.steps):
                yield USUAL | {"max_train_steps": steps, "seed": seed}
            means = summary(self.rows)
            best = best or min(means, key=lambda m: m["heldout pixel_l1"][0])["max_train_steps"]
            for seed, change in product(seeds, changes):
                yield USUAL | change | {"max_train_steps": best, "seed": seed}

    def run(self, end: float) -> None:
        """The bare model, then the grid until `end`; everything is written after each run."""
        out = self.options.out.with_name(f"{self.options.out.stem}_{len(self.training)}.json")
        near = self.distances(self.true[self.own[: self.options.prompts]])[:, self.training].min(1)
        about = {"pictures": len(self.training), "skipped": 0, "failed": []}
        about |= rounded({"nearest_training_l1 of the true drawings": near.mean()})
        about["bare model"] = self.measures(self.options.seeds[0], "bare")
        true = {"true": [Image.fromarray(self.true[i]) for i in self.own[: len(SHOWN)]]}
        for number, what in enumerate(self.grid()):
            begun, adapter = time.time(), self.scratch / f"run{number}"
            if begun + max((row["seconds"] for row in self.rows), default=0) > end:
                about["skipped"] += 1
                continue
            if not self.train(adapter, what):
                about["failed"].append(what)
                continue
            self.pipe.load_lora_weights(adapter)
            changed = [f"{k.split('_')[1]} {what[k]:g}" for k in USUAL if what[k] != USUAL[k]]
            label = f"{what['max_train_steps']} steps {' '.join(changed)}"
            row = {"pictures": len(self.training), **what} | self.measures(what["seed"], label)
            self.pipe.unload_lora_weights()
            self.rows.append(row | {"seconds": round(time.time() - begun, 1)})
            print(json.dumps(self.rows[-1]), flush=True)
            out.write_text(json.dumps(about | {"rows": self.rows}))
            picture = sheet.grid(self.sheet | true, list(SHOWN)).quantize(32)
            picture.save(out.with_suffix(".png"), optimize=True)


def summary(rows: list[dict]) -> list[dict]:
    """Mean, lowest and highest over the seeds of each setting."""
    settings: dict[tuple, list[dict]] = {}
    for row in rows:
        key = tuple((name, row[name]) for name in ("pictures", "max_train_steps", *USUAL))
        flat = {f"{p} {k}": value for p in ("heldout", "trained") for k, value in row[p].items()}
        flat |= {k: v for k, v in row.items() if isinstance(v, float) and k not in USUAL}
        settings.setdefault(key, []).append(flat)
    means = []
    for key, each in settings.items():
        values = {name: [row[name] for row in each] for name in each[0]}
        three = {
            k: [round(f(v), 3) for f in (statistics.mean, min, max)] for k, v in values.items()
        }
        means.append({**dict(key), "seeds": len(each), **three})
    return means


def study(count: int, options: Options, end: float) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // len(options.counts)))
    with tempfile.TemporaryDirectory() as scratch:
        Study(count, options, Path(scratch)).run(end)


def main() -> None:
    options, end = tyro.cli(Options), time.time()
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}  # for the processes to come
    options.out.parent.mkdir(parents=True, exist_ok=True)
    parts = options.out.stem + "_*.json"  # of the processes
    for old in options.out.parent.glob(parts):
        old.unlink()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(options.counts), mp_context=spawn) as pool:
        runs = [pool.submit(study, n, options, end + options.seconds) for n in options.counts]
    studies = [json.loads(part.read_text()) for part in options.out.parent.glob(parts)]
    studies.sort(key=lambda each: each["pictures"])
    rows = [row for each in studies for row in each.pop("rows")]
    result = {
        "command": " ".join(["python -m benchmarks.advice", *sys.argv[1:]]),
        "on": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu(),
        "torch": torch.__version__,
        "prompts": options.prompts,
        "sets": studies,
        "mean, lowest and highest over the seeds": summary(rows),
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for part in options.out.parent.glob(parts):
        part.unlink()
    for run in runs:
        run.result()  # raises what went wrong in one, now that the others' rows are kept


if __name__ == "__main__":
    main()
