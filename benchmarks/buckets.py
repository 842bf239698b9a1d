"""Do buckets learn more than squares from pictures of mixed shapes? Both on the pocket model.

    python -m benchmarks.buckets               writes benchmarks/results/buckets_pocket.json

The recipe pocket at 128 px on compositions of the ink drawings: a third of them one drawing, a
third two or three side by side, 2:1 to 3:1, a third the same one above another; with --buckets and
with --no-buckets, all else equal. Judged on compositions of drawings that neither run has seen,
each in its own whole shape (of wide and tall ones that is nobody's bucket): by the loss, at the
same timesteps and noise for all, and by pictures drawn of the captions, against the true ones.
"""

import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image

import data
import generate
import loop
import lora
import model
from benchmarks.asked import Count, Seeds, asked
from benchmarks.pocket import ROOT, cpu, rounded
from inputs import vetting
from inputs.hub import encoder_fingerprints
from inputs.options import POCKET, Within
from inputs.pictures import decode, upright_size
from inputs.sources import Pictures, read_dataset
from keep import faster, training
from pocket import drawings, measure

# Height and width of each, about as many pixels as 128 x 128, and how many drawings it shows.
WIDE = {(88, 176): 2, (80, 200): 2, (72, 216): 3}
KINDS = {"square": {(128, 128): 1}, "wide": WIDE, "tall": {(w, h): n for (h, w), n in WIDE.items()}}
RUNS = {"squares": False, "buckets": True}
RATIO = "buckets / squares, of each seed"
EACH = 4  # held-out compositions of each shape; of squares as many as of all wide ones
NAME, DEVICE = POCKET.pretrained_model_name_or_path, vetting.check_device("auto")
DTYPE = model.choose_dtype(POCKET.mixed_precision, DEVICE)[0]


@dataclass
class Options:
    """Buckets against squares."""

    steps: Count = POCKET.max_train_steps
    seeds: Seeds = (0, 1, 2)
    # Compositions of each kind to train on: square, wide, tall.
    pictures: Count = 40
    # Drawings of pocket/ink that are kept out of training.
    away: Annotated[int, Within(3, 157)] = 40
    # How often each held-out composition is judged by its loss, each time with other noise.
    rounds: Count = 24
    # Held-out compositions of each kind that are drawn.
    prompts: Count = 6
    num_inference_steps: Count = 20
    out: Path = Path("benchmarks/results/buckets_pocket.json")


# ---- the set -------------------------------------------------------------------------------------


def compose(shape: data.Size, pictures: list[Image.Image]) -> Image.Image:
    """The drawings along the longer side of a canvas of that shape, at equal distances."""
    side, (height, width) = drawings.SIDE, shape
    long = side * max(shape) // min(shape)
    size = (long, side) if width > height else (side, long)
    canvas = Image.new("RGB", size, tuple(drawings.STYLES["ink"][0]))
    for i, picture in enumerate(pictures):
        at = round((i + 0.5) * long / len(pictures) - side / 2)
        canvas.paste(picture, (at, 0) if width > height else (0, at))
    return canvas


def write_set(folder: Path, rows: list[dict], count: int, dice: random.Random) -> Pictures:
    """`count` compositions of each kind, made of the drawings that `rows` of pocket/ink name."""
    folder.mkdir()
    told = []
    for kind, shapes in KINDS.items():
        for i in range(count):
            shape = list(shapes)[i % len(shapes)]
            chosen = dice.sample(rows, shapes[shape])
            pictures = [Image.open(ROOT / "pocket" / "ink" / row["file_name"]) for row in chosen]
            name, text = f"{kind}-{i:03}.png", " and ".join(row["text"] for row in chosen)
            compose(shape, pictures).save(folder / name)
            told.append(json.dumps({"file_name": name, "text": text}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(told))
    return read_dataset(str(folder))


def kind_of(size: data.Size) -> str:
    return next(kind for kind, shapes in KINDS.items() if size in shapes)


# ---- the judge -----------------------------------------------------------------------------------


class Whole(data.Crop):
    """Nothing is cut away: each composition at its own shape."""

    def size(self, picture: data.Size) -> data.Size:
        shapes = [shape for each in KINDS.values() for shape in each]
        return max(shapes, key=lambda shape: data.share_kept(picture, shape))


class Judge:
    """Judges every UNet on the same held-out compositions."""

    def __init__(self, pictures: Pictures, options: Options, cache: Path):
        self.options, half = options, DTYPE != torch.float32
        self.schedule = model.load_noise_schedule(NAME, DEVICE)
        self.scaling = model.latent_scaling(NAME)
        vae = partial(model.load_vae, NAME, DEVICE)
        text = partial(model.load_text_encoders, NAME, DEVICE, half)
        source = data.Encoder(pictures, vae, text, Whole((128,), False, False, 0))
        sizes, steps = source.sizes, len(self.schedule.alphas_cumprod)
        source = data.fill_cache(cache, source, False, DTYPE, encoder_fingerprints(NAME, half))
        names = [picture.name for picture in pictures]
        self.examples = data.Examples(source, names, sizes, EACH, 0, data.Chances(), steps)
        self.vae, self.sampler = vae(), partial(vetting.load_sampler, NAME)
        self.drawn = []  # of each composition to draw: its size, its pixels, its embedding
        for kind in KINDS:
            own = [i for i, size in enumerate(sizes) if kind_of(size) == kind]
            for i in own[: options.prompts]:
                height, width = sizes[i]
                true = decode(pictures[i]).resize((width, height), Image.Resampling.LANCZOS)
                self.drawn.append((sizes[i], np.asarray(true), pictures[i].captions[0]))
        captions = [caption for *_, caption in self.drawn]
        self.embeddings = generate.encode(NAME, captions, "", DEVICE, half)

    @torch.no_grad()
    def losses(self, unet: torch.nn.Module) -> dict[str, float]:
        """The mean squared error of each kind, and of the three kinds together."""
        found, n = {kind: [] for kind in KINDS}, EACH
        for step in range(self.options.rounds * len(self.examples.sizes) // n):
            batch = self.examples.batch(range(step * n, (step + 1) * n), unet.device)
            each = loop.diffusion_loss(unet, batch, self.schedule, self.scaling)
            found[kind_of(self.examples.sizes[self.examples.decks.picture(step * n)])].append(each)
        means = {f"loss, {kind}": torch.cat(each).mean().item() for kind, each in found.items()}
        return means | {"loss": statistics.mean(means.values())}

    def pictures(self, unet: torch.nn.Module, seed: int) -> dict[str, float]:
        """How far the drawn compositions are from the true ones, by kind and together."""
        steps, found = self.options.num_inference_steps, {}
        for i, (size, true, _) in enumerate(self.drawn):
            latent_size = tuple(side // 8 for side in size)
            sampler = self.sampler("", steps, POCKET.prediction_type)
            how = (seed + i, latent_size, steps, POCKET.guidance_scale)
            latent = generate.sample(unet, sampler, self.embeddings[i], *how)
            (picture,) = generate.decode(self.vae, [latent], self.scaling)
            for name in ("pixel_l1", "palette_distance"):
                far = getattr(measure, name)(np.asarray(picture), true)
                for key in (name, f"{name}, {kind_of(size)}"):
                    found.setdefault(key, []).append(far)
        return {key: statistics.mean(each) for key, each in sorted(found.items())}

    def measures(self, unet: torch.nn.Module, seed: int) -> dict[str, float]:
        return {k: round(v, 5) for k, v in (self.losses(unet) | self.pictures(unet, seed)).items()}


# ---- the runs ------------------------------------------------------------------------------------


def train(folder: Path, name: str, seed: int, steps: int) -> tuple[loop.Run, dict]:
    """The recipe at 128 px in that way, as its command trains it; and its seconds."""
    begun = time.perf_counter()
    config = replace(
        POCKET, dataset_name=(str(folder / "set"),), buckets=RUNS[name], resolution=(128,),
        cache_dir=str(folder / "cache"), output_dir=str(folder / f"{name}-{seed}"), seed=seed,
        max_train_steps=steps, tensorboard=False, validation_prompts=(),
    )  # fmt: skip
    run = training.set_up(config, DEVICE)[0].run
    started = time.perf_counter()
    losses = [loss for _, loss, _ in loop.fit(run)]
    seconds = {"seconds to start": started - begun, "seconds": time.perf_counter() - started}
    faster.by_definition(run)
    return run, rounded(seconds) | {
        "training loss, last 50": round(statistics.mean(losses[-50:]), 5)
    }


def cut_away(sizes: list[data.Size], pictures: Pictures) -> dict[str, float]:
    """The share of the pictures of each kind that no step sees."""
    found = {kind: [] for kind in KINDS}
    for size, picture in zip(sizes, pictures, strict=True):
        kept = data.share_kept(upright_size(picture), size)
        found[picture.name.partition("-")[0]].append(1 - kept)
    return rounded({kind: statistics.mean(each) for kind, each in found.items()})


def main() -> None:
    options, dice = asked(Options), random.Random(0)
    lines = (ROOT / "pocket" / "ink" / "metadata.jsonl").read_text().splitlines()
    ink = dice.sample([json.loads(line) for line in lines], len(lines))
    rows, cut, by_run = [], {}, {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pictures = write_set(folder / "set", ink[options.away :], options.pictures, dice)
        heldout = write_set(folder / "heldout", ink[: options.away], EACH * len(WIDE), dice)
        judge, bare = Judge(heldout, options, folder / "judged"), {}
        for seed in options.seeds:
            for name in RUNS:
                run, about = train(folder, name, seed, options.steps)
                cut[name] = cut_away(run.examples.sizes, pictures)
                if not bare:
                    lora.set_strength(run.adapter, 0)
                    bare = judge.measures(run.unet, seed)
                    lora.set_strength(run.adapter, 1)
                by_run[name].append(judge.measures(run.unet, seed))
                rows.append({"run": name, "seed": seed} | about | by_run[name][-1])
                print(rows[-1], flush=True)
    three = {"mean": statistics.mean, "lowest": min, "highest": max}
    pairs = list(zip(by_run["buckets"], by_run["squares"], strict=True))
    result = {
        "command": " ".join(["python -m benchmarks.buckets", *sys.argv[1:]]),
        "on": torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu(),
        "torch": torch.__version__,
        "unet": str(DTYPE),
        "steps": options.steps,
        "pictures": {"to train": len(pictures), "held out": len(heldout)},
        "cut away on average": cut,
        "bare model": bare,
        **{
            f"{name}, {word}": {k: round(f([one[k] for one in each]), 5) for k in bare}
            for name, each in by_run.items()
            for word, f in three.items()
        },
        RATIO: {key: [round(one[key] / other[key], 4) for one, other in pairs] for key in bare},
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for key in ("cut away on average", "bare model", *(f"{name}, mean" for name in RUNS), RATIO):
        print(key, json.dumps(result[key]))


if __name__ == "__main__":
    main()
