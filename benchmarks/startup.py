"""From command to first optimizer step, phase by phase, beside an earlier version of this code.

    python benchmarks/startup.py pocket                    writes benchmarks/results/startup.json
    python benchmarks/startup.py t4 --than 0d5804a --out runs/startup.json

Both versions run in turn, since a machine's speed changes over minutes, with encoded pictures in
the cache. The clock starts before the process does and stops when the first step is logged; the
process ends there. `cpu_s` is what both versions make the processor do: less noisy where others
share it, but blind to what is done while a disk or a GPU is waited for.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import json
import os
import platform
import runpy
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
# What a start passes through, by module: imports as a whole, and functions. One inside another is
# counted in both; those that a version lacks are left out there.
IMPORTS = (
    *("torch", "torch._dynamo", "bitsandbytes", "diffusers", "transformers", "peft"),
    *("inputs.options", "model", "generate", "fast.plan", "torch.utils.tensorboard"),
)
FUNCTIONS = {
    "inputs.options": ("parse",),
    "inputs.sources": ("read_dataset",),
    "inputs.hub": ("fingerprint", "encoder_fingerprints", "unet_fingerprint"),
    "keep.checkpoint": ("encoder_prints", "identity", "newest_state"),
    "keep.identity": ("identity",),
    "inputs.code": ("digests", "commit"),
    "keep.meaning": ("meaning",),
    "fast.plan": ("choose",),
    "data": ("fill_cache",),
    "fast.nf4": ("load_unet_nf4",),
    "model": ("load_unet", "build_unet", "fill_unet", "load_noise_schedule", "count_cut"),
    "lora": ("inject",),
    "fast.layers": ("use", "disagreement", "wrap"),
    "keep.report": ("cut_captions", "describe", "Log.__init__"),
    "fast.graph": ("Recorded.record",),
}
# What an earlier version called them, when all modules lay side by side.
NOW = {name.rpartition(".")[2]: name for name in (*IMPORTS, *FUNCTIONS) if "torch" not in name}
NOW |= {"config": "inputs.options", "fused": "fast.layers"}


# ---- inside a run --------------------------------------------------------------------------------


class Clock(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Times the imports of IMPORTS and the FUNCTIONS of this run, and ends it when its first step
    is logged.
    """

    def __init__(self, report: Path, began: float):
        self.report, self.began, self.spans = report, began, {}
        self.at: dict[str, float] = {}  # when each began for the first time
        self.loaders: dict[str, importlib.abc.Loader] = {}

    @contextlib.contextmanager
    def span(self, name: str):
        began = time.perf_counter()
        self.at.setdefault(name, time.time() - self.began)
        try:
            yield
        finally:
            self.spans[name] = self.spans.get(name, 0.0) + time.perf_counter() - began

    def find_spec(self, name, path=None, target=None):
        if NOW.get(name, name) not in (*IMPORTS, *FUNCTIONS):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec and spec.loader:
            self.loaders[name], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loaders[spec.name].create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loaders[module.__name__]
        name = NOW.get(module.__name__, module.__name__)
        with self.span(f"import {name}") if name in IMPORTS else contextlib.nullcontext():
            module.__loader__.exec_module(module)
        for key in FUNCTIONS.get(name, ()):
            *inside, key = key.split(".")
            holder = getattr(module, *inside) if inside else module
            if hasattr(holder, key):
                setattr(holder, key, self.timed(f"{name}.{key}", getattr(holder, key)))
        if name == "keep.report":
            module.Log.write = self.end

    def timed(self, name, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            with self.span(name):
                return function(*args, **kwargs)

        return call

    def end(self, run, loss, norm, rate, seconds) -> None:
        """In the place of the log's first line."""
        self.spans |= {"first step": seconds, "all": time.time() - self.began}
        times = os.times()
        result = {"seconds": self.spans, "at": self.at, "loss": loss}
        result["cpu_s"] = times.user + times.system
        self.report.write_text(json.dumps(result))
        sys.stdout.flush()
        os._exit(0)


def child(tree: Path, report: Path, began: float, argv: list[str]) -> None:
    """`python loop.py` of the version in `tree`, timed."""
    os.chdir(tree)
    sys.path[0], sys.argv = str(tree), ["loop.py", *argv]
    sys.meta_path.insert(0, Clock(report, began))
    runpy.run_path("loop.py", run_name="__main__")


# ---- around it -----------------------------------------------------------------------------------


@dataclass
class Options:
    """Time the start of a recipe."""

    # Recipe of loop.py.
    recipe: tyro.conf.Positional[str] = "pocket"
    # The earlier version: anything that git knows, or a folder that holds it; empty for none.
    than: str = "0d5804a"
    # Starts of each version.
    times: int = 5
    # More options for loop.py, as one word.
    train: str = ""
    # What to write.
    out: Path = Path("benchmarks/results/startup.json")


def start(tree: Path, scratch: Path, argv: list[str]) -> dict:
    """One start of the version in `tree`, with nothing in its output folder."""
    report, words = scratch / "report.json", [*argv, "--output-dir", str(scratch / "out")]
    report.unlink(missing_ok=True)
    subprocess.run(["rm", "-rf", str(scratch / "out")], check=True)
    script = [sys.executable, __file__, "child", str(tree), str(report), str(time.time())]
    done = subprocess.run([*script, *words], capture_output=True, text=True)
    if not report.is_file():
        sys.exit(f"{tree}: no first step\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(report.read_text())


def middle(starts: list[dict]) -> dict:
    """Medians of several starts, phase by phase."""
    spans = {name: [s["seconds"].get(name, 0.0) for s in starts] for name in starts[0]["seconds"]}
    return {
        "seconds": {name: round(statistics.median(values), 3) for name, values in spans.items()},
        "begins at, in one of them": {n: round(at, 3) for n, at in starts[0]["at"].items()},
        "lowest": round(min(spans["all"]), 2),
        "highest": round(max(spans["all"]), 2),
        "cpu_s": round(statistics.median(s["cpu_s"] for s in starts), 2),
        "loss": starts[0]["loss"],
    }


def table(versions: dict[str, dict]) -> str:
    names = list(dict.fromkeys(name for v in versions.values() for name in v["seconds"]))
    lines = ["| seconds | " + " | ".join(versions) + " |", "|---|" + "---|" * len(versions)]
    for name in [*(n for n in names if n != "all"), "all"]:
        cells = [str(v["seconds"].get(name, "")) for v in versions.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@contextlib.contextmanager
def earlier(than: str, scratch: Path) -> Iterator[dict[str, Path]]:
    """The folders of both versions by name, the earlier one checked out where git has it."""
    if not than or Path(than).is_dir():
        yield {"before": Path(than).resolve()} if than else {}
        return
    folder, git = scratch / "before", ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", str(folder), than], check=True)
    try:
        yield {than: folder}
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def gpu_name() -> str:
    import torch

    return f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""


def main() -> None:
    options = tyro.cli(Options)
    if options.times < 1:
        sys.exit(f"error: times is {options.times}; expected 1 or more. What to do: --times 5")
    argv = [options.recipe, *shlex.split(options.train)]
    argv += ["--max-train-steps", "1", "--validation-prompts"]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        argv += ["--cache-dir", str(scratch / "cache")]
        with earlier(options.than, scratch) as trees:
            trees = trees | {"now": ROOT}
            starts = {name: [] for name in trees}
            for turn in range(options.times + 1):
                for name, tree in trees.items():
                    found = start(tree, scratch, argv)
                    print(name, round(found["seconds"]["all"], 2), flush=True)
                    if turn:  # the first fills the caches: pictures, bytecode, plan, files' pages
                        starts[name].append(found)
    versions = {name: middle(found) for name, found in starts.items()}
    result = {
        "command": " ".join(["python benchmarks/startup.py", *sys.argv[1:]]),
        "on": f"{gpu_name()}{platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
        f"Python {platform.python_version()}, {options.times} starts each, in turn",
    }
    if len(versions) == 2:
        old, new = versions.values()
        shares = [
            b["seconds"]["all"] / a["seconds"]["all"] for a, b in zip(*starts.values(), strict=True)
        ]
        result["now / before, median of pairs"] = round(statistics.median(shares), 3)
        result["of cpu_s"] = round(new["cpu_s"] / old["cpu_s"], 3)
    (ROOT / options.out).write_text(json.dumps(result | {"versions": versions}, indent=1) + "\n")
    print(f"{table(versions)}\n\n{json.dumps(result)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]), sys.argv[5:])
    else:
        main()
