"""Which trick helps? Variants of the recipe pocket, trained one after another in one process.

    python -m pocket.build --stages render          once, with a network: the true drawings
    python -m benchmarks.sweep run                  a row of benchmarks/results/sweep.jsonl a run
    python -m benchmarks.sweep table                what the rows say, as a table of Markdown

Each run is the command that its row names, here on --device and in fp32, so that a CPU repeats it
but for rounding: after `python -m benchmarks.sweep prepare`, which writes the held-out drawings,
the row's "command" trains, and "then" measures what that left. A row is written when its run is
measured, and a run that has a row is not done again. A variant is a name of
VARIANTS, or several joined by +, of which the last has the last word.

Measured: 48 held-out subjects at three drawing seeds against their true drawings (pixel L1, palette
distance, own drawing nearest of all), and the held-out loss of the same 48 drawings, less the bare
model's. With a running mean its adapter is drawn (OUT/ema); the held-out loss is the last step's.
"""

import json
import math
import shlex
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import diffusers
import numpy as np
import torch
import tyro

import lora
from adapters import foreign
from benchmarks.advice import drawn, pipeline
from benchmarks.asked import Count, Counts, Seeds, asked
from benchmarks.pocket import ROOT, cpu, rounded, true_ink
from inputs import code, options
from inputs.files import Refusal
from inputs.options import Within
from inputs.vetting import check_device
from keep import training
from pocket import drawings, measure

VARIANTS = {
    "plain": "",
    "strata": "--stratified-timesteps",
    "logit-normal": "--weighting-scheme logit_normal",
    "huber": "--loss-type huber",
    "huber-constant": "--loss-type huber --huber-schedule constant",
    "huber-0.03": "--loss-type huber --huber-schedule constant --huber-c 0.03",
    "huber-0.01": "--loss-type huber --huber-schedule constant --huber-c 0.01",
    "ema": "--ema-decay 0.99",
    "loraplus": "--loraplus-lr-ratio 4",
    "loraplus-16": "--loraplus-lr-ratio 16",
    "rank-64": "--lora-rank 64 --lora-alpha 64",
    "rslora-64": "--lora-rank 64 --use-rslora",  # alpha 16: twice the scale of rank 64 above
    "prodigy": "--optimizer prodigy --learning-rate 1 --lr-warmup-steps 0",
    "linear": "--lr-scheduler linear",
    "constant": "--lr-scheduler constant",
    "rate-1.5": "--learning-rate 6e-3",
    "rate-2": "--learning-rate 8e-3",
    "half-dropout": "--caption-dropout 0.05",
    "no-dropout": "--caption-dropout 0",
    "no-snr": "--snr-gamma 0",
    "transformer": "--targets transformer",
    "all": "--targets all",
    "dora": "--adapter dora",
    "loha": "--adapter loha --lora-rank 8",
    "lokr": "--adapter lokr",
}
# What the pictures are measured by, and whether more is better.
MEASURES = {"pixel_l1": False, "palette_distance": False, "first": True}


@dataclass
class Options:
    """Train variants of the recipe pocket and measure them."""

    # run them, print the table, write the held-out drawings for a row's command, or measure the
    # adapter that it has left.
    do: tyro.conf.Positional[Literal["run", "table", "prepare", "measure"]]
    variants: tuple[str, ...] = tuple(VARIANTS)
    style: Literal["ink", "blueprint"] = "ink"
    steps: Counts = (75, 150, 225, 300, 450)
    seeds: Seeds = (0, 1, 2)
    # Seeds of each subject's drawings.
    drawing_seeds: Seeds = (0, 1, 2)
    subjects: Count = 48
    num_inference_steps: Count = 30
    # The plain recipe's steps, which the table compares with.
    end: Count = options.POCKET.max_train_steps
    device: str = "auto"
    # The steps of the runs that the table sets beside it; 0 is as many.
    at: Annotated[int, Within(0, 10**6)] = 0
    # Further options of loop.py for every run, as one text.
    train: str = ""
    # Where `python -m pocket.build --stages render` left the drawings.
    work: Path = Path("runs/pocket-build")
    # Where held-out drawings, runs and the cache go; of a run nothing stays.
    scratch: Path = Path("runs/sweep")
    # What to measure: a run's folder, or an adapter's.
    adapter: Path = Path("runs/sweep/run")
    out: Path = Path("benchmarks/results/sweep.jsonl")


# ---- a run ---------------------------------------------------------------------------------------


def words(asked: Options, variant: str, steps: int, seed: int) -> list[str]:
    """The command line of one run, behind loop.py. Raises Refusal for an unknown variant."""
    if unknown := [name for name in variant.split("+") if name not in VARIANTS]:
        raise Refusal(f"the variant {unknown[0]}", ", ".join(VARIANTS), "correct --variants")
    fixed = f"pocket --dataset-name pocket/{asked.style} --seed {seed} --max-train-steps {steps} "
    fixed += f"--checkpointing-steps {steps} --validation-steps {steps} --mixed-precision fp32 "
    fixed += "--device cpu --no-tensorboard --preview-steps 0 --validation-prompts"
    places = ["--validation-data", str(held_out(asked)), "--output-dir", str(asked.scratch / "run")]
    places += ["--cache-dir", str(asked.scratch / "cache")]
    tricks = " ".join(VARIANTS[name] for name in variant.split("+"))
    return [*fixed.split(), *places, *asked.train.split(), *tricks.split()]


def held_out(asked: Options) -> Path:
    return asked.scratch / f"held-out-{asked.style}"


def subjects(asked: Options) -> list[str]:
    """The held-out ones: none of them is in pocket/ink or pocket/blueprint."""
    heldout = json.loads((ROOT / "pocket" / "heldout.json").read_text())
    return heldout["measured"][: asked.subjects]


def row(asked: Options, variant: str, steps: int, seed: int, judge: "Judge") -> dict:
    """Train and measure one run. Of one that cannot be trained the row says why."""
    typed, began = words(asked, variant, steps, seed), time.perf_counter()
    found = {"style": asked.style, "variant": variant, "steps": steps, "seed": seed}
    found |= commands(asked, typed)
    config = replace(options.parse(typed), device=str(judge.device), quiet=True)
    shutil.rmtree(config.out, ignore_errors=True)
    if exit_code := training.main(config):
        if exit_code > 1:
            sys.exit(exit_code)  # interrupted
        found["failed"] = "refused, as the command says"
    else:
        found["trained_s"] = round(time.perf_counter() - began, 1)
        found |= judge.measures(config.out)
    found |= {"on": judge.on, "torch": torch.__version__, "commit": code.commit()}
    shutil.rmtree(config.out, ignore_errors=True)
    return found


def commands(asked: Options, typed: list[str]) -> dict[str, str]:
    """What repeats a run, `typed` behind loop.py, and its measures."""
    seeds = map(str, asked.drawing_seeds)
    again = ["--style", asked.style, "--adapter", str(asked.scratch / "run")]
    again += ["--drawing-seeds", *seeds, "--subjects", str(asked.subjects)]
    again += ["--num-inference-steps", str(asked.num_inference_steps)]
    then = ["python", "-m", "benchmarks.sweep", "measure", *again]
    return {"command": shlex.join(["python", "loop.py", *typed]), "then": shlex.join(then)}


class Judge:
    """Draws the held-out subjects with an adapter, with the model kept loaded, and measures."""

    def __init__(self, asked: Options):
        self.asked, self.device = asked, check_device(asked.device)
        self.on = torch.cuda.get_device_name() if self.device.type == "cuda" else cpu()
        self.names, self.pipe = subjects(asked), pipeline(self.device)
        self.adapter = foreign.Drawn(self.pipe.unet)
        self.true = true_ink(asked.work, asked.style)  # (N, H, W, 3)
        place = {each.name: i for i, each in enumerate(drawings.read_subjects(asked.work))}
        self.own = [place[name] for name in self.names for _ in asked.drawing_seeds]

    def measures(self, out: Path) -> dict:
        """The means over subjects and drawing seeds, and the held-out loss where the folder has
        one: less the bare model's, and its standard error.
        """
        seeds = [*self.asked.drawing_seeds] * len(self.names)
        prompts = [name for name in self.names for _ in self.asked.drawing_seeds]
        out_or_mean = out / "ema" if (out / "ema").is_dir() else out
        foreign.load(self.adapter, foreign.read(out_or_mean / lora.FILE_NAME))  # of any kind
        pictures = drawn(self.pipe, prompts, seeds, self.asked.num_inference_steps)
        pairs = [*zip(pictures, self.true[self.own], strict=True)]
        values = {
            "pixel_l1": np.mean([measure.pixel_l1(*pair) for pair in pairs]),
            "palette_distance": np.mean([measure.palette_distance(*pair) for pair in pairs]),
            "first": np.mean(ranks(pictures, self.own, self.true, self.device) == 0),
        }
        told = out / "metrics.json"
        rows = json.loads(told.read_text())["rows"] if told.is_file() else {}
        last = {"heldout_loss": rows[max(rows, key=int)][0]} if rows else {}
        return rounded(values) | last


def ranks(
    pictures: np.ndarray, own: list[int], true: np.ndarray, device: torch.device
) -> np.ndarray:
    """measure.rank() of each picture, (N,), at once: sums of whole numbers below 2^24, which fp32
    holds exactly.
    """
    flat = [
        torch.from_numpy(each).flatten(1).to(device, torch.float32) for each in (pictures, true)
    ]
    apart = torch.cdist(*flat, p=1)  # (N, drawings)
    mine = apart.gather(1, torch.tensor(own, device=device)[:, None])
    return (apart < mine).sum(1).cpu().numpy()


def prepare(asked: Options) -> None:
    """Write the held-out drawings, a data set for --validation-data."""
    drawings.style_set(asked.style, held_out(asked), asked.work, subjects(asked))


def run(asked: Options) -> None:
    """Every run that has no row yet, the seeds of one setting after another."""
    prepare(asked)
    judge, done = Judge(asked), [(each["command"], each["then"]) for each in rows_of(asked.out)]
    for steps in asked.steps:
        for variant in asked.variants:
            for seed in asked.seeds:
                typed = commands(asked, words(asked, variant, steps, seed))
                if (typed["command"], typed["then"]) not in done:
                    found = row(asked, variant, steps, seed, judge)
                    with asked.out.open("a") as file:
                        print(json.dumps(found), file=file, flush=True)
                    print(json.dumps(found), flush=True)


def rows_of(path: Path) -> list[dict]:
    """The whole rows of a file; of one that was cut short the run is done again."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            print(f"{path}: a row was cut short", file=sys.stderr)
    return found


# ---- the table -----------------------------------------------------------------------------------


def steps_to(curve: dict[int, float], aim: float, more: bool) -> float:
    """The steps at which a curve {steps: measure} first reaches `aim`, between two runs along the
    logarithm of the steps; infinite where none of its runs does. more: whether more is better.
    """
    sign, before = (1 if more else -1), None
    for steps, value in sorted(curve.items()):
        if sign * (value - aim) >= 0:
            if before is None:
                return float(steps)
            share = (aim - before[1]) / (value - before[1])
            return math.exp(math.log(before[0]) + share * math.log(steps / before[0]))
        before = (steps, value)
    return math.inf


def curves(rows: list[dict], style: str) -> dict[str, dict[int, dict[int, dict]]]:
    """{variant: {seed: {steps: row}}} of what was trained."""
    found: dict = {}
    for each in rows:
        if each["style"] == style and "failed" not in each:
            of = found.setdefault(each["variant"], {}).setdefault(each["seed"], {})
            of[each["steps"]] = each
    return found


def summary(rows: list[dict], style: str, end: int, at: int) -> list[dict]:
    """For each variant, against the plain recipe's run of `end` steps with the same seed: its steps
    to reach all three of that run's measures over `end`, for each seed; and by how much it is
    better after `at` steps, mean and standard error over the seeds.
    """
    of, told = curves(rows, style), []
    ends = {seed: each[end] for seed, each in of.get("plain", {}).items() if end in each}
    for variant, seeds in of.items():
        seeds = {s: each for s, each in seeds.items() if s in ends and at in each}
        found = {"variant": variant, "seeds": len(seeds), "ratio": []}
        for seed, each in seeds.items():
            reached = [
                steps_to({s: r[name] for s, r in each.items()}, ends[seed][name], more)
                for name, more in MEASURES.items()
            ]
            found["ratio"].append(max(reached) / end)
        for name, more in [*MEASURES.items(), ("heldout_loss", False)]:
            both = [(each[at], ends[seed]) for seed, each in seeds.items() if at in each]
            pairs = [(value(a, name), value(b, name)) for a, b in both]
            better = [(a - b) * (1 if more else -1) for a, b in pairs if None not in (a, b)]
            error = statistics.stdev(better) / len(better) ** 0.5 if len(better) > 1 else math.nan
            found[name] = (statistics.mean(better) if better else math.nan, error)
        told += [found] * bool(seeds)
    return told


def value(row: dict, name: str) -> float | None:
    """A row's measure; of the held-out loss its difference to the bare model's."""
    found = row.get(name)
    return found[0] if isinstance(found, list) else found


def table(asked: Options) -> None:
    """Print the table: a ratio is mean ± standard deviation over the seeds."""
    at = asked.at or asked.end
    if not (found := summary(rows_of(asked.out), asked.style, asked.end, at)):
        remedy = f"python -m benchmarks.sweep run --variants plain --style {asked.style}"
        why = f"{asked.out} has no row of the plain recipe at {asked.end} steps"
        raise Refusal(why, "some to compare with", remedy)
    print(
        f"Better after {at} steps than the plain recipe after {asked.end}, mean ± standard error:\n"
    )
    print("| variant | seeds | steps to reach all three / the plain recipe's |", end="")
    print(" pixel L1 | palette distance | own drawing nearest | held-out loss |")
    print("|---|---|---|---|---|---|---|")
    for each in found:
        ratio = each["ratio"]
        if missed := sum(map(math.isinf, ratio)):
            reached = f"not in {missed} of {len(ratio)}"
        else:
            spread = statistics.stdev(ratio) if len(ratio) > 1 else math.nan
            reached = f"{statistics.mean(ratio):.2f} ± {spread:.2f}"
        cells = [each["variant"], str(each["seeds"]), reached]
        for name in (*MEASURES, "heldout_loss"):
            (better, error), digits = each[name], 2 if name == "pixel_l1" else 4
            cells.append(f"{better:+.{digits}f} ± {error:.{digits}f}")
        print(f"| {' | '.join(cells)} |")


def main(argv: list[str] | None = None) -> None:
    given = asked(Options, argv)
    diffusers.utils.logging.set_verbosity_error()
    if given.do == "measure":
        print(json.dumps(Judge(given).measures(given.adapter)))
    else:
        {"run": run, "table": table, "prepare": prepare}[given.do](given)


if __name__ == "__main__":
    try:
        main()
    except Refusal as refusal:
        sys.exit(f"error: {refusal}")
