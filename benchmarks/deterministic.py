"""What --deterministic is worth on this GPU: the same fp16 run three times, with it and without.

`python benchmarks/full_size.py make MODEL PHOTOS` writes SDXL with random weights (7 GB) once; then
`python benchmarks/deterministic.py MODEL PHOTOS OUT` makes, with the flag and without, two
uninterrupted runs and one that is killed (SIGKILL) and started again, each a process of its own,
and OUT/deterministic.json: whether adapters and loss-scale counters are equal to the bit, how many
numbers differ and how far, and what the flag costs in seconds per step. Exits with 1 where runs
with the flag differ.

`--options ...` after all else goes to loop.py. Tried out on a CPU, where both ways are equal, by
`--device cpu --options --resolution 32 ...` on the stress suite's tiny model.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name in ("model", "photos", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--recipes", nargs="+", default=["t4", "lowmem"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="for loop.py")
    return parser.parse_args()


def one(out: Path, argv: list[str], kill_after: int = 0) -> int:
    """`loop.py argv` into `out`, to its end or, once it has logged `kill_after` steps, to its
    death. Returns the exit code.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".txt"), "a") as said:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "loop.py"), *argv, "--output-dir", str(out)],
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    while process.poll() is None:
        time.sleep(0.02)
        log = out / "log.jsonl"
        if kill_after and log.is_file() and len(log.read_text().splitlines()) >= kill_after:
            process.send_signal(signal.SIGKILL)
    return process.returncode


def runs(out: Path, argv: list[str], steps: int) -> dict[str, Path]:
    """Two uninterrupted runs and a killed and continued one. Raises RuntimeError where one
    fails.
    """
    folders = {name: out / name for name in ("first", "second", "continued")}
    if one(folders["continued"], argv, kill_after=steps * 5 // 8) != -signal.SIGKILL:
        raise RuntimeError(f"the run to be killed ended before: see {out}/continued.txt")
    for folder in folders.values():
        if code := one(folder, argv):
            raise RuntimeError(f"{folder} ended with {code}: see {folder.with_suffix('.txt')}")
    return folders


def apart(one: Path, other: Path) -> dict:
    """How two runs differ: adapters, loss-scale counters, losses."""
    import torch

    import checkpoint
    import lora

    states = [checkpoint.newest_state(folder / "checkpoints") for folder in (one, other)]
    (a, b), moved = (state["flat"] for state in states), lora.read(one).matrices
    length = torch.cat([pair["B"].flatten() for pair in moved.values()]).norm().item()
    lines = [(folder / "log.jsonl").read_text().splitlines() for folder in (one, other)]
    losses = [[json.loads(line)["loss"] for line in each] for each in lines]
    return {
        "bytes_equal": (one / lora.FILE_NAME).read_bytes() == (other / lora.FILE_NAME).read_bytes(),
        "numbers_that_differ": int((a != b).sum()),
        "of": a.numel(),
        "difference_over_moved": ((a - b).norm() / length).item(),
        "loss_scale": [state["scale"] for state in states],
        "losses_that_differ": sum(x != y for x, y in zip(*losses, strict=True)),
    }


def seconds(folder: Path) -> float:
    """The median over the steps after the third."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return round(statistics.median(line["seconds"] for line in lines if line["step"] > 3), 4)


def same(row: dict) -> bool:
    scales = row["loss_scale"]
    return row["bytes_equal"] and not row["numbers_that_differ"] and scales[0] == scales[1]


def command_line(options: argparse.Namespace, recipe: str) -> list[str]:
    """What follows loop.py, but for the flag and the output folder."""
    return [
        *(recipe, "--pretrained-model-name-or-path", str(options.model)),
        *("--dataset-name", str(options.photos), "--cache-dir", str(options.out / "cache")),
        *("--device", options.device, "--mixed-precision", "fp16", "--no-memory-plan"),
        *("--max-train-steps", str(options.steps), "--checkpointing-steps", "10"),
        *("--no-tensorboard", "--validation-prompts", *options.options),
    ]


def main() -> int:
    options = parse()
    import torch

    cuda = options.device.startswith("cuda")
    results = {
        "command": "python benchmarks/deterministic.py MODEL PHOTOS OUT",
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "steps": options.steps,
    }
    failed = False
    for recipe in options.recipes:
        argv = command_line(options, recipe)
        for name, flag in (("without", "--no-deterministic"), ("with", "--deterministic")):
            folders = runs(options.out / recipe / name, [*argv, flag], options.steps)
            pairs = {
                kind: apart(folders["first"], folders[kind]) for kind in ("second", "continued")
            }
            row = pairs | {"seconds_per_step_median": seconds(folders["first"])}
            results.setdefault(recipe, {})[name] = row
            (options.out / "deterministic.json").write_text(json.dumps(results, indent=1) + "\n")
            print(recipe, name, json.dumps(row), flush=True)
            failed |= name == "with" and not all(map(same, pairs.values()))
    return failed


if __name__ == "__main__":
    sys.exit(main())
