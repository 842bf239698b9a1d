"""What steps, rate and rank suit 20, 100 and 1,000 pictures, and what too much looks like.

    python -m pocket.build --stages render     once, with a network: the true drawings
    python -m benchmarks.advice                on one GPU, about 20 minutes at most

The recipe pocket on nested sets of ink drawings: a hint for SDXL base, not a measurement of it. A
run took 5 to 30 s, its pictures included, while three shared an H200. OUT.json has means over the
48 held-out subjects, over 20 training subjects that all sets hold, and of how far four seeds of a
new combination are apart. OUT_N.png beside it shows the first seed's drawings with N pictures.
"""

import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image

import model
from benchmarks.asked import Count, Counts, Seeds, asked
from benchmarks.pocket import ROOT, cpu, rounded, seed_l1, true_ink
from inputs.files import Refusal
from inputs.options import POCKET
from keep import faster, training
from pocket import drawings, measure
from see import sheet

SHOWN = ["panda", "helicopter", "beetle", "dumpling", "orange book", "nerd face"]  # on the sheets
MEASURES = ("heldout palette_distance", "heldout pixel_l1", "trained pixel_l1", "seed_l1")
MEANS = "mean, lowest and highest over the seeds"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Options:
    """Advice by the number of pictures."""

    counts: Counts = (20, 100, 1000)
    steps: Counts = (50, 150, 450, 1350)
    seeds: Seeds = (0, 1, 2)
    prompts: Count = 48
    num_inference_steps: Count = 30
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


def grid(options: Options) -> list[dict]:
    """The settings with one number of pictures: the steps; with the last, rates and ranks."""
    rate = POCKET.learning_rate
    usual = {"learning_rate": rate, "lora_rank": POCKET.lora_rank}
    settings = [usual | {"max_train_steps": steps} for steps in options.steps]
    changes = {"learning_rate": rate / 4}, {"learning_rate": rate * 4}, {"lora_rank": 4}
    return settings + [settings[-1] | change for change in (*changes, {"lora_rank": 64})]


def train(data: Path, adapter: Path, what: dict) -> None:
    """The recipe with `what` changed. Raises Refusal where it cannot be done, for NaN, say."""
    config = replace(
        POCKET, dataset_name=(str(data),), cache_dir=f"{data}-cache", output_dir=str(adapter),
        lora_alpha=what["lora_rank"], checkpointing_steps=what["max_train_steps"],
        tensorboard=False, validation_prompts=(), **what,
    )  # fmt: skip
    if code := training.train(config, faster.Alone()):
        sys.exit(code)  # interrupted


def pipeline(device: torch.device) -> diffusers.StableDiffusionXLPipeline:
    """The small model in diffusers' hands, without bars."""
    loader = diffusers.StableDiffusionXLPipeline.from_pretrained
    pipe = loader(POCKET.pretrained_model_name_or_path, add_watermarker=False).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, prompts: list[str], seeds: list[int], num_inference_steps: int) -> np.ndarray:
    """(N, H, W, 3) uint8: each prompt at its seed, whose noise is the same on every device."""
    dice = [torch.Generator().manual_seed(seed) for seed in seeds]
    how = {"guidance_scale": POCKET.guidance_scale, "num_inference_steps": num_inference_steps}
    images = pipe(prompts, generator=dice, output_type="np", **how).images
    return (images * 255).round().astype(np.uint8)


class Drawer:
    """Draws and measures the same prompts with every adapter."""

    def __init__(self, options: Options):
        heldout = json.loads((ROOT / "pocket" / "heldout.json").read_text())
        names = [subject.name for subject in drawings.read_subjects(options.work)]
        self.options, self.order = options, training_order(heldout, names)
        others = [name for name in heldout["measured"] if name not in SHOWN]
        subjects = [*SHOWN, *others][: options.prompts] + self.order[: min(20, *options.counts)]
        self.true = true_ink(options.work)[[names.index(name) for name in subjects]]
        new = [row["prompt"] for row in heldout["combinations"] for _ in range(4)]
        self.prompts = subjects + new
        self.pipe = pipeline(DEVICE)

    def measures(self, seed: int) -> tuple[dict, np.ndarray]:
        """The measures, and the pictures for the sheet."""
        n, end = self.options.prompts, len(self.true)
        seeds = [seed + max(0, i - end) % 4 for i in range(len(self.prompts))]
        pictures = drawn(self.pipe, self.prompts, seeds, self.options.num_inference_steps)
        pairs = list(zip(pictures[:end], self.true, strict=True))
        l1 = [measure.pixel_l1(*pair) for pair in pairs]
        palettes = [measure.palette_distance(*pair) for pair in pairs[:n]]
        means = map(np.mean, (palettes, l1[:n], l1[n:], seed_l1(pictures[end:])))
        return rounded(dict(zip(MEASURES, means, strict=True))), pictures[: len(SHOWN)]


def study(count: int, drawer: Drawer, scratch: Path, result: dict) -> dict:
    """All runs with `count` pictures, into `result`. Returns the sheet: {label: pictures}."""
    options, shown = drawer.options, {}
    drawings.style_set("ink", scratch / "data", options.work, drawer.order[:count])
    for setting in grid(options):
        key, each = {"pictures": count, **setting}, []
        label = ", ".join(f"{name} {value:g}" for name, value in setting.items())
        for seed in options.seeds:
            begun, adapter = time.time(), scratch / f"{label}, seed {seed}"
            try:
                train(scratch / "data", adapter, setting | {"seed": seed})
            except Refusal as refusal:
                result["failed"].append(key | {"seed": seed, "why": str(refusal)})
                continue
            drawer.pipe.load_lora_weights(adapter)
            measures, pictures = drawer.measures(seed)
            drawer.pipe.unload_lora_weights()
            seconds = round(time.time() - begun, 1)
            each.append(key | {"seed": seed} | measures | {"seconds": seconds})
            shown.setdefault(label, pictures)  # the first seed's
        if each:
            columns = {name: [row[name] for row in each] for name in MEASURES}
            three = (statistics.mean, min, max)
            means = {k: [round(f(column), 3) for f in three] for k, column in columns.items()}
            result[MEANS].append(key | {"seeds": len(each)} | means)
            result["rows"] += each
    return shown


def main() -> None:
    options = asked(Options)
    diffusers.utils.logging.set_verbosity_error()
    drawer = Drawer(options)
    bare, bare_shown = drawer.measures(options.seeds[0])
    result = {
        "command": " ".join(["python -m benchmarks.advice", *sys.argv[1:]]),
        "on": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu(),
        "torch": torch.__version__,
        "unet": str(model.choose_dtype(POCKET.mixed_precision, DEVICE)[0]),
        "prompts": options.prompts,
        "bare model": bare,
        "failed": [],
        MEANS: [],
        "rows": [],
    }
    for count in options.counts:
        with tempfile.TemporaryDirectory() as scratch:
            shown = {"bare": bare_shown} | study(count, drawer, Path(scratch), result)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        shown["true"] = drawer.true[: len(SHOWN)]
        images = {label: [Image.fromarray(p) for p in each] for label, each in shown.items()}
        picture = options.out.with_name(f"{options.out.stem}_{count}.png")
        sheet.grid(images, SHOWN).quantize(32).save(picture, optimize=True)


if __name__ == "__main__":
    main()
