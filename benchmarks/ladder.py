"""Seconds and GiB per technique, on this machine's card: python -m benchmarks.ladder ladder

The UNet has SDXL base's shape and random weights, drawn on the device, and the pictures are random
numbers in the place of the cache: nothing is downloaded or read. What is timed is loop.py's own
optimizer_step(), with the examples that the host prepares for it.

ladder: one technique after the other. recipe: a recipe as the command runs it, with its memory
plan, under --cap-gib. against: the ladder's file beside other trainers' numbers. Where a step's
time goes says `python -m benchmarks.step_profile`, how exact it is `benchmarks.exactness`, and what
another card needs `make plan`.
"""

from inputs import (
    options as configuration,  # first: it sets how long idle threads spin, before torch asks
)

# isort: split
import dataclasses
import functools
import json
import platform
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import bitsandbytes
import diffusers
import torch
import tyro

import loop
import model
from benchmarks import synthetic
from fast import plan
from inputs.files import Refusal, first_line, write_whole
from inputs.vetting import check_device

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, str | float]
Rows = Iterator[tuple[str, Callable[[], Row]]]

# Each row is the one above with one thing changed, down to compile; the last two stand beside
# "graph".
LADDER = {
    "eager": {"fused": False, "cuda_graph": False},  # the definitions on one vector, 1x4
    "fused": {"cuda_graph": False},
    "graph": {},
    "4x1": {"train_batch_size": 4, "gradient_accumulation_steps": 1},
    "compile": {"train_batch_size": 4, "gradient_accumulation_steps": 1, "compile": True},
    "checkpointing": {"gradient_checkpointing": True},
    "nf4": {"gradient_checkpointing": True},
}
ONE_BY_FOUR = {
    "train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing": False,
    "cuda_graph": True,
    "fused": True,
    "use_8bit_adam": True,
    "lora_rank": 16,
}
PEERS = {  # (seconds per optimizer step, peak GiB allocated) by resolution
    "diffusers' script, fp16, checkpointing": {512: (4.63, 7.77), 1024: (4.83, 10.03)},
    "kohya sd-scripts, fp16, checkpointing, all cached": {512: (3.06, 5.58), 1024: (3.19, 6.13)},
    "kohya sd-scripts, fp8 base, checkpointing, all cached": {512: (3.12, 3.22)},
}
PEERS_SOURCE = (
    "The peers' numbers were measured once, not by this script: on an H100 with torch 2.11, "
    "full-size SDXL with random weights, rank 16, AdamW8bit, 4 images per optimizer step."
)


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every measurement has."""

    # Sides of the training square in pixels; recipes have their own unless this is given.
    resolution: tuple[int, ...] = ()
    # Rows of the ladder; none means all (step_profile: graph).
    rows: tuple[Literal[tuple(LADDER)], ...] = ()
    # The UNet's dtype; empty is fp16 (on a CPU fp32), and for "recipe" the recipe's own.
    mixed_precision: Literal["", "fp32", "fp16", "bf16"] = ""
    # Steps before those measured, in which libraries choose kernels and the graph is recorded.
    warm_up: int = 3
    # auto, cpu or cuda.
    device: str = "auto"
    # The pocket model's shape instead of SDXL's: to try this script on a CPU.
    tiny: bool = False
    # Where the rows go as JSON, beside those already there; empty is a file under runs/bench.
    out: str = ""

    @property
    def folder(self) -> Path:
        """Where the UNet's config.json lies."""
        return ROOT / ("pocket/model" if self.tiny else "tests/sdxl")

    @property
    def sides(self) -> tuple[int, ...]:
        return self.resolution or (512,)

    @property
    def on(self) -> torch.device:
        return check_device(self.device)

    def precision(self) -> str:
        return self.mixed_precision or ("fp16" if self.on.type == "cuda" else "fp32")


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Seconds and GiB per technique, on random weights and random pictures."""

    # What to measure; see the top of ladder.py.
    command: tyro.conf.Positional[Literal["ladder", "recipe", "against"]]
    # The recipes of "recipe"; none means all of the full size.
    recipes: tyro.conf.Positional[tuple[str, ...]] = ()
    # Steps that are timed; 0 means 10, eager ones 3 and those of "recipe" 50.
    steps: int = 0
    # Leave this much of the GPU's memory to the process; 0 is all of it. 14.5 is a T4's.
    cap_gib: float = 0.0
    # The ladder's file, which "against" reads.
    ladder: str = "benchmarks/results/bench_ladder.json"


# ---- what is measured ----------------------------------------------------------------------------


def wait(device: torch.device) -> float:
    """The time when the device has done all it was given, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@functools.cache
def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the median of 10: what this card can do at all."""
    side = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        began = wait(device)
        for _ in range(4):
            a @ b
        seconds.append((wait(device) - began) / 4)
    return 2 * side**3 / statistics.median(seconds[2:])


def time_row(options: Options, config: configuration.Config, nf4: bool, steps: int) -> Row:
    """Seconds and GiB of optimizer_step() under `config`."""
    device = options.on
    dtype, _ = model.choose_dtype(config.mixed_precision, device)
    peak, cuda = matrix_peak(device, dtype), device.type == "cuda"
    if cuda:
        torch._C._cuda_clearCublasWorkspaces()  # of the rows before: each stream keeps its own
    model.free_memory()
    row: Row = {"gib_before": gib(torch.cuda.memory_allocated()) if cuda else 0.0}
    run, said = synthetic.assemble(config, device, options.folder, nf4=nf4)
    model.free_memory()
    if cuda:  # a base quantised in place was whole for a moment; one that nf4.py loads never is
        torch.cuda.reset_peak_memory_stats()
    seconds, losses, began = [], [], wait(device)
    try:
        for _ in range(options.warm_up + steps):
            # As the loop runs: a step ends when its loss is known, while the GPU still updates.
            losses.append(loop.optimizer_step(run)[0])
            seconds.append(time.perf_counter() - began)
            began += seconds[-1]
    except torch.cuda.OutOfMemoryError as error:
        row["error"] = f"out of memory in step {run.step + 1}: {first_line(error)}"
    else:
        timed, n = seconds[options.warm_up :], config.examples_per_step
        middle = statistics.median(timed)
        useful = n * synthetic.flop_of(options.folder, config.resolution) / middle
        row |= {"s_per_step": round(middle, 4), "s_lowest": round(min(timed), 4)}
        row |= {"s_highest": round(max(timed), 4), "images_per_s": round(n / middle, 2)}
        row |= {"mfu": round(useful / peak, 3), "s_first_step": round(seconds[0], 2)}
        row |= {"loss": round(losses[-1], 4), "skipped": run.loss_scale.skipped, "steps": steps}
        row["losses"] = [round(loss, 4) for loss in losses]
    if cuda:
        row["gib_allocated"] = gib(torch.cuda.max_memory_allocated())
        row["gib_reserved"] = gib(torch.cuda.max_memory_reserved())
    return row | {"said": "; ".join(said)}


def gib(count: int) -> float:
    return round(count / 2**30, 2)


def changed(options: Common, side: int, row: str, precision: str = "") -> configuration.Config:
    """Row `row` of the ladder as a Config: t4's mathematics, with everything a row is about set."""
    settings = ONE_BY_FOUR | LADDER[row] | {"resolution": side, "max_train_steps": 10**6}
    precision = precision or options.precision()
    return dataclasses.replace(
        configuration.RECIPES["t4"][1], **settings, mixed_precision=precision
    )


def ladder(options: Options) -> Rows:
    for side in options.sides:
        for row in options.rows or LADDER:
            config = changed(options, side, row)
            steps = options.steps or (10 if config.cuda_graph else 3)
            name = f"{side} px, {config.mixed_precision}, {row}"
            yield name, functools.partial(time_row, options, config, row == "nf4", steps)


def recipe(options: Options) -> Rows:
    """Recipes as their command runs them. An unknown one is a row with an error."""
    for name in options.recipes or [r for r in configuration.RECIPES if r != "pocket"]:
        for side in options.resolution or (0,):
            cap = f", cap {options.cap_gib:g} GiB" if options.cap_gib else ""
            size = f" at {side} px" if side else ""
            yield f"{name}{size}{cap}", functools.partial(recipe_row, options, name, side)


def recipe_row(options: Options, name: str, side: int) -> Row:
    if name not in configuration.RECIPES:
        raise Refusal(
            f"recipe {name}",
            ", ".join(configuration.RECIPES),
            "python -m benchmarks.ladder recipe t4",
        )
    config = configuration.RECIPES[name][1]
    config = dataclasses.replace(
        config,
        max_train_steps=10**6,
        resolution=side or config.resolution,
        mixed_precision=options.mixed_precision or config.mixed_precision,
        pretrained_model_name_or_path=str(options.folder),
        cache_dir=str(ROOT / "runs" / "bench"),  # of what the plan finds out
    )
    model.free_memory()
    dtype, _ = model.choose_dtype(config.mixed_precision, options.on)
    config, why = plan.choose(config, options.on, dtype)
    row: Row = {"px": config.resolution, "dtype": config.mixed_precision}
    row["way"] = plan.in_words(config)
    row |= time_row(options, config, config.base_quantization == "nf4", options.steps or 50)
    return row | {"said": f"{why}; {row['said']}" if why else row["said"]}


def against(options: Options) -> Rows:
    """The peers' rows, then the ladder's: seconds and GiB. All peers' rows are with checkpointing,
    so they are compared with our row that is, too.
    """
    file = Path(options.ladder)
    if not file.is_file():
        raise Refusal(f"no {file}", "the ladder's JSON", "python -m benchmarks.ladder ladder first")
    ours = {k: r for k, r in json.loads(file.read_text())["rows"].items() if "s_per_step" in r}
    for side in options.resolution or (512, 1024):
        mine = {k: r for k, r in ours.items() if k.startswith(f"{side} px,")}
        same = [r["s_per_step"] for k, r in mine.items() if k.endswith(", checkpointing")]
        for name, numbers in PEERS.items():
            if side in numbers:
                seconds, memory = numbers[side]
                row = {"s_per_step": seconds, "gib_allocated": memory}
                if same:
                    row["ours_with_checkpointing_is_times_faster"] = round(seconds / same[0], 1)
                yield f"{side} px, {name}", functools.partial(dict, row | {"source": PEERS_SOURCE})
        for name, row in mine.items():
            keep = {k: row[k] for k in ("s_per_step", "gib_allocated", "mfu") if k in row}
            yield f"{name} (ours)", functools.partial(dict, keep | {"source": row["on"]})


# ---- the command ---------------------------------------------------------------------------------


def attempt(measure: Callable[[], Row]) -> Row:
    """The row, or what went wrong: one failing row must not cost the others."""
    try:
        return measure()
    except Exception as error:  # any class: it is the row's result
        if not isinstance(error, Refusal):
            traceback.print_exc()
        full = isinstance(error, torch.cuda.OutOfMemoryError)
        return {
            "error": f"{'out of memory' if full else type(error).__name__}: {first_line(error)}"
        }


def machine(device: torch.device) -> str:
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return f"{card or device.type}, {versions}, bitsandbytes {bitsandbytes.__version__}"


def store(path: Path, name: str, row: Row) -> None:
    """Add the row to the file's, in place of one of its name: several calls make one table."""
    rows = json.loads(path.read_text())["rows"] if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps({"rows": rows | {name: row}}, indent=1) + "\n").encode())


def table(rows: dict[str, Row]) -> str:
    """Rows as Markdown; sentences and lists stay in the JSON."""
    hidden = ("said", "longest", "losses", "on", "command", "gib_before", "source")
    keys = list(dict.fromkeys(k for row in rows.values() for k in row if k not in hidden))
    lines = ["| | " + " | ".join(keys) + " |", "|" + "---|" * (len(keys) + 1)]
    for name, row in rows.items():
        cells = [str(row.get(key, "")).replace("|", "/") for key in keys]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(rows: Rows, path: Path, typed: str, on: str) -> dict[str, Row]:
    """Every row, stored and printed as soon as it is there."""
    # without paths of this machine, which tell nobody much
    typed = re.sub(r" --(out|ladder)[ =]\S+", "", typed)
    found = {}
    for name, row in rows:
        result = attempt(row)
        model.free_memory()
        found[name] = result | {"on": on, "command": typed}
        store(path, name, found[name])
        shown = {k: v for k, v in result.items() if k not in ("longest", "source")}
        print(f"{name}: {json.dumps(shown)}", flush=True)
    print(f"\n{on}\n\n{table(found)}\n\nwritten to {path}")
    return found


def main(argv: list[str] | None = None) -> int:
    """The command. Returns 0, or 1 where a row failed or the options cannot be."""
    options = tyro.cli(Options, args=argv, prog="ladder")
    rows = {f.__name__: f for f in (ladder, recipe, against)}[options.command](options)
    path = Path(options.out or ROOT / "runs" / "bench" / f"bench_{options.command}.json")
    typed = " ".join(["python -m benchmarks.ladder", *(sys.argv[1:] if argv is None else argv)])
    try:
        here = options.command != "against" and options.device == "auto" and not options.tiny
        if here and options.on.type == "cpu":
            raise Refusal(
                "no GPU is seen, and full-size SDXL takes minutes a step on a CPU",
                "a CUDA GPU",
                "add --tiny for the small model's shape, or --device cpu",
            )
        on = "" if options.command == "against" else machine(options.on)  # of several machines
        if options.cap_gib and options.on.type == "cuda":
            whole = torch.cuda.get_device_properties(options.on).total_memory
            torch.cuda.set_per_process_memory_fraction(options.cap_gib * 2**30 / whole)
        found = measure(rows, path, typed, on)
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 1
    if options.command == "against":
        print(PEERS_SOURCE)
    return int(any("error" in row for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
