"""Seconds and GiB per technique, on this machine's card: python -m benchmarks.ladder ladder

The UNet has SDXL base's shape and random weights, drawn on the device, and the pictures are random
numbers in the place of the cache: nothing is downloaded or read. What is timed is loop.py's own
optimizer_step(), with the examples that the host prepares for it.

ladder: one technique after the other. recipe: a recipe as the command runs it, with its memory
plan, under --cap-gib. options: what further options cost, each beside "4x1", and whether their
recorded steps have the losses of unrecorded ones. card: what this card does with this project, in
about five minutes and one file that is worth sharing. Where a step's time goes says `python -m
benchmarks.step_profile`, how exact it is `benchmarks.exactness`, and what another card needs `make
plan`. Other trainers' seconds lie in results/peers.json.
"""

from inputs import (
    options as configuration,  # first: it sets how long idle threads spin, before torch asks
)

# isort: split
import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import re
import runpy
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import bitsandbytes
import diffusers
import torch
import tyro

import loop
import model
from benchmarks import BEGAN, synthetic
from benchmarks.asked import Count, Sides, asked
from fast import plan
from inputs import code
from inputs.files import Refusal, first_line, write_whole
from inputs.options import Within
from inputs.vetting import check_device

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, str | float]
Rows = Iterator[tuple[str, Callable[[], Row]]]

# Each row is the one above with one thing changed, down to 8x1; the last two stand beside "graph".
LADDER = {
    "eager": {"fused": False, "cuda_graph": False},  # the definitions on one vector, 1x4
    "fused": {"cuda_graph": False},
    "graph": {},
    "4x1": {"train_batch_size": 4, "gradient_accumulation_steps": 1},
    "8x1": {"train_batch_size": 8, "gradient_accumulation_steps": 1},
    "checkpointing": {"gradient_checkpointing": True},
    "nf4": {"gradient_checkpointing": True},
}
# What `options` adds to "4x1"; with "nf4" on a base in 4 bits.
COSTS = {
    "lora": {},
    "strata, logit-normal": {"stratified_timesteps": True, "weighting_scheme": "logit_normal"},
    "huber": {"loss_type": "huber"},
    "ema": {"ema_decay": 0.99},
    "loraplus": {"loraplus_lr_ratio": 4.0},
    "rslora": {"use_rslora": True},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "transformer": {"targets": ("transformer",)},
    "all": {"targets": ("all",)},
    "dora": {"adapter": "dora"},
    "loha": {"adapter": "loha", "lora_rank": 8},
    "lokr": {"adapter": "lokr"},
    "nf4, lora": {},
    "nf4, dora": {"adapter": "dora"},
    "nf4, loha": {"adapter": "loha", "lora_rank": 8},
    "nf4, lokr": {"adapter": "lokr"},
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
CARD = ("t4", "native")  # what `card` measures, unless recipes are named
# The columns of its table; the JSON holds more.
SHORT = "px way s_per_step s_lowest s_highest gib_allocated gib_reserved gib_predicted s_start"


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every measurement has."""

    # Sides of the training square in pixels; recipes have their own unless this is given.
    resolution: Sides = ()
    # Rows of the ladder; none means all (step_profile: graph).
    rows: tuple[Literal[tuple(LADDER)], ...] = ()
    # The UNet's dtype; empty is fp16 (on a CPU fp32), and for "recipe" the recipe's own.
    mixed_precision: Literal["", "fp32", "fp16", "bf16"] = ""
    # Steps before those measured, in which libraries choose kernels and the graph is recorded.
    warm_up: Annotated[int, Within(0, 10**6)] = 3
    # auto, cpu or cuda.
    device: str = "auto"
    # The pocket model's shape instead of SDXL's: to try this script on a CPU.
    tiny: bool = False
    # Where the rows go as JSON, beside those already there; empty is a file under runs/bench.
    out: str = ""

    @property
    def folder(self) -> Path:
        """Where the UNet's config.json lies."""
        return ROOT / ("pocket/model" if self.tiny else "inputs/sdxl")

    @property
    def sides(self) -> tuple[int, ...]:
        return self.resolution or (512,)

    @property
    def on(self) -> torch.device:
        """Raises Refusal for a GPU that is not there, and for full-size SDXL on a CPU unasked."""
        device = check_device(self.device)
        if self.device == "auto" and not self.tiny and device.type == "cpu":
            found = "no GPU is seen, and full-size SDXL takes minutes a step on a CPU"
            remedy = "take one, such as Colab's T4 (notebooks/train.ipynb); or add --tiny for the "
            raise Refusal(found, "a CUDA GPU", f"{remedy}small model's shape, or --device cpu")
        return device

    def precision(self) -> str:
        return self.mixed_precision or ("fp16" if self.on.type == "cuda" else "fp32")


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Seconds and GiB per technique, on random weights and random pictures."""

    # What to measure; see the top of ladder.py.
    command: tyro.conf.Positional[Literal["ladder", "recipe", "options", "card"]]
    # The recipes of "recipe" and "card", rows of "options"; none means all of the full size, t4 and
    # native, and all.
    recipes: tyro.conf.Positional[tuple[str, ...]] = ()
    # Steps that are timed; 0 means 10, eager ones 3, those of "recipe" 50 and of "card" 20.
    steps: Count = 0
    # Leave this much of the GPU's memory to the process; 0 is all of it. 14.5 is a T4's.
    cap_gib: Annotated[float, Within(0, 10**4)] = 0.0


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
    """Seconds and GiB of optimizer_step() under `config`. s_start: from before the weights are
    drawn to the end of the first step.
    """
    device = options.on
    dtype, _ = model.choose_dtype(config.mixed_precision, device)
    peak, cuda = matrix_peak(device, dtype), device.type == "cuda"
    if cuda:
        torch._C._cuda_clearCublasWorkspaces()  # of the rows before: each stream keeps its own
    model.free_memory()
    opened = time.perf_counter()
    row: Row = {"px": max(config.resolution), "dtype": str(dtype).removeprefix("torch.")}
    row |= {"way": plan.in_words(config)}
    row |= {"gib_before": gib(torch.cuda.memory_allocated()) if cuda else 0.0}
    run, said = synthetic.assemble(config, device, options.folder, nf4=nf4)
    model.free_memory()
    if cuda:  # a base quantised in place was whole for a moment; one that nf4.py loads never is
        torch.cuda.reset_peak_memory_stats()
    seconds, losses, began = [], [], wait(device)
    ready = began - opened
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
        useful = n * synthetic.flop_of(options.folder, max(config.resolution)) / middle
        row |= {"s_per_step": round(middle, 4), "s_lowest": round(min(timed), 4)}
        row |= {"s_highest": round(max(timed), 4), "images_per_s": round(n / middle, 2)}
        row |= {"mfu": round(useful / peak, 3), "s_first_step": round(seconds[0], 2)}
        row["s_start"] = round(ready + seconds[0], 1)
        row |= {"loss": round(losses[-1], 4), "skipped": run.loss_scale.skipped, "steps": steps}
        row["losses"] = [round(loss, 4) for loss in losses]
    if cuda:
        row["gib_allocated"] = gib(torch.cuda.max_memory_allocated())
        row["gib_reserved"] = gib(torch.cuda.max_memory_reserved())
    numbers = sum(matrix.numel() for matrix in run.trained.values())
    return row | {"numbers": numbers, "said": "; ".join(said)}


def gib(count: int) -> float:
    return round(count / 2**30, 2)


def changed(options: Common, side: int, row: str, precision: str = "") -> configuration.Config:
    """Row `row` of the ladder as a Config: t4's mathematics, with everything a row is about set."""
    settings = ONE_BY_FOUR | LADDER[row] | {"resolution": (side,), "max_train_steps": 10**6}
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


def further(options: Options) -> Rows:
    for side in options.sides:
        for name, settings in COSTS.items():
            if name not in (options.recipes or COSTS):
                continue
            config = dataclasses.replace(changed(options, side, "4x1"), **settings)
            row = functools.partial(further_row, options, config, "nf4" in name)
            yield f"{side} px, {config.mixed_precision}, {name}", row


def further_row(options: Options, config: configuration.Config, nf4: bool) -> Row:
    """A row, and `unrecorded`: how far the losses of its first steps are from those of steps that
    the host launches kernel by kernel, the largest, relative. From the second on they are another
    adapter's.
    """
    row = time_row(options, config, nf4, options.steps or 20)
    few, plain = (
        dataclasses.replace(options, warm_up=0),
        dataclasses.replace(config, cuda_graph=False),
    )
    losses = time_row(few, plain, nf4, 5).get("losses", [])
    off = [abs(a / b - 1) for a, b in zip(row.get("losses", []), losses, strict=False)]
    return row | {"unrecorded": max(off, default=math.nan)}


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
        resolution=(side,) if side else config.resolution,
        mixed_precision=options.mixed_precision or config.mixed_precision,
        pretrained_model_name_or_path=str(options.folder),
        cache_dir=str(ROOT / "runs" / "bench"),  # of what the plan finds out
    )
    model.free_memory()
    dtype, _ = model.choose_dtype(config.mixed_precision, options.on)
    began = time.perf_counter()
    config, why = plan.choose(config, options.on, dtype)
    took = time.perf_counter() - began
    row = time_row(options, config, config.base_quantization == "nf4", options.steps or 50)
    if "s_start" in row:
        row["s_start"] = round(row["s_start"] + took, 1)
    if predicted := re.search(r"([\d.]+) GiB predicted", why):
        row["gib_predicted"] = float(predicted[1])
    return row | {"said": f"{why}; {row['said']}" if why else row["said"]}


def card(options: Options) -> Rows:
    """What this card does with this project: recipes as their command runs them, then by the
    definitions, one image a pass and each kernel launched by the host.
    """
    before = time.perf_counter() - BEGAN  # imports, and what the driver needs to begin
    asked = dataclasses.replace(options, recipes=options.recipes or CARD, steps=options.steps or 20)
    config = changed(options, options.sides[0], "eager", options.mixed_precision or "auto")
    plain = functools.partial(time_row, options, config, False, options.steps or 3)
    for name, row in (*recipe(asked), ("eager", plain)):
        yield name, functools.partial(as_a_command, row, before)


def as_a_command(measure: Callable[[], Row], before: float) -> Row:
    """A row whose s_start is that of a command of its own, which took `before` until it could
    begin.
    """
    row = measure()
    row.pop("losses", None)
    if "s_start" in row:
        row["s_start"] = round(row["s_start"] + before, 1)
    return row


# ---- the command ---------------------------------------------------------------------------------


def attempt(measure: Callable[[], Row]) -> Row:
    """The row, or what went wrong: one failing row must not cost the others."""
    try:
        return measure()
    except Refusal as refusal:
        return {"error": str(refusal)}
    except Exception as error:  # any class: it is the row's result
        traceback.print_exc()
        full = isinstance(error, torch.cuda.OutOfMemoryError)
        return {
            "error": f"{'out of memory' if full else type(error).__name__}: {first_line(error)}"
        }


def machine(device: torch.device) -> str:
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return f"{card or device.type}, {versions}, bitsandbytes {bitsandbytes.__version__}"


def about_this_machine(device: torch.device, typed: str) -> dict:
    """The head of the file of `card`, before it has rows."""
    about = {"command": typed, "card": device.type, "driver": ""}
    if device.type == "cuda":
        about |= {"card": torch.cuda.get_device_name(device)}
        about |= {"card_gib": gib(torch.cuda.get_device_properties(device).total_memory)}
        about |= {"driver": runpy.run_path(str(ROOT / ".ci" / "machine.py"))["driver"]()}
    about |= {"torch": torch.__version__, "diffusers": diffusers.__version__}
    about |= {"bitsandbytes": bitsandbytes.__version__, "cpu": cpu_name()}
    about |= {"cores": len(os.sched_getaffinity(0)), "commit": code.commit()}
    about["s_start"] = (
        "from the command to the end of the first step: imports, memory plan, weights drawn, the "
        "step recorded; a real run reads a model and encodes pictures besides"
    )
    return about | {"rows": {}}


def cpu_name() -> str:
    """The processor as Linux calls it."""
    with contextlib.suppress(OSError):
        if named := re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()):
            return named[1].strip()
    return platform.processor() or platform.machine()


def default_file(options: Options) -> Path:
    """Under runs/bench; a whole card's own, which are to be shared, under benchmarks/results."""
    whole = options.on.type == "cuda" and not (options.tiny or options.cap_gib)
    if options.command == "card" and whole:
        name = re.sub("[^a-z0-9]+", "_", torch.cuda.get_device_name(options.on).lower())
        return ROOT / "benchmarks" / "results" / f"card_{name.strip('_')}.json"
    return ROOT / "runs" / "bench" / f"bench_{options.command}.json"


def store(path: Path, name: str, row: Row) -> None:
    """Add the row to the file's, in place of one of its name: several calls make one table."""
    content = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
    content["rows"][name] = row
    write(path, content)


def write(path: Path, content: dict) -> None:
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def table(rows: dict[str, Row], only: str = "") -> str:
    """Rows as Markdown; sentences and lists stay in the JSON. only: the columns, if not all."""
    hidden = ("said", "longest", "losses", "on", "command", "gib_before")
    keys = list(dict.fromkeys(k for row in rows.values() for k in row if k not in hidden))
    keys = [key for key in keys if key in [*only.split(), "error"]] if only else keys
    lines = ["| | " + " | ".join(keys) + " |", "|" + "---|" * (len(keys) + 1)]
    for name, row in rows.items():
        cells = [str(row.get(key, "")).replace("|", "/") for key in keys]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(rows: Rows, path: Path, typed: str, on: str, only: str = "") -> dict[str, Row]:
    """Every row, stored and printed as soon as it is there. typed: empty where the file's head has
    it; only: the columns of the table.
    """
    typed, found = shareable(typed), {}
    for name, row in rows:
        result = attempt(row)
        model.free_memory()
        found[name] = result | ({"on": on, "command": typed} if typed else {})
        store(path, name, found[name])
        shown = {k: v for k, v in result.items() if k != "longest"}
        print(f"{name}: {json.dumps(shown)}", flush=True)
    print(f"\n{on}\n\n{table(found, only)}\n\nwritten to {path}")
    return found


def shareable(typed: str) -> str:
    """A command without paths of this machine, which tell nobody much."""
    return re.sub(r" --out[ =]\S+", "", typed)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns 0, or 1 where a row failed (of a card: all) or the options cannot be."""
    options = asked(Options, argv, prog="ladder")
    of_card = options.command == "card"
    rows = {"ladder": ladder, "recipe": recipe, "options": further, "card": card}
    rows = rows[options.command](options)
    typed = " ".join(["python -m benchmarks.ladder", *(sys.argv[1:] if argv is None else argv)])
    try:
        path = Path(options.out) if options.out else default_file(options)
        if options.cap_gib and options.on.type == "cuda":
            whole = torch.cuda.get_device_properties(options.on).total_memory
            torch.cuda.set_per_process_memory_fraction(options.cap_gib * 2**30 / whole)
        if of_card:  # its file begins anew: rows of another machine may lie there
            print("about five minutes on a T4; nothing is downloaded", flush=True)
            write(path, about_this_machine(options.on, shareable(typed)))
            typed = ""
        found = measure(rows, path, typed, machine(options.on), SHORT if of_card else "")
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 1
    failed = ["error" in row for row in found.values()]
    if of_card and all(failed):
        print("Nothing was measured. On a smaller card: make bench ARGS='card lowmem'")
    elif of_card and not options.tiny:
        print("Adding this file to the repository is welcome: CONTRIBUTING.md says how.")
    return int(all(failed) if of_card else any(failed))


if __name__ == "__main__":
    sys.exit(main())
