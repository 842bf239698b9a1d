"""Does speed cost learning? Loss curves of three ways to compute one run, on the pocket model.

    python -m benchmarks.curves            writes benchmarks/results/curves.json

By law 1 the examples, timesteps and noise of a step are the same in every run, so the curves are
compared step by step: `original` computes as the definitions do, in fp32; `t4` as its recipe does,
in fp16 with loss scaling and fused layers; `lowmem` on an NF4 base, fused, in fp32 (fp16 is slow on
a CPU, and t4 shows what it does). All else is the recipe pocket.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.asked import Count, asked

ROOT = Path(__file__).resolve().parent.parent
RUNS = {
    "original": ("--mixed-precision", "fp32", "--no-fused"),
    "t4": ("--mixed-precision", "fp16"),
    "lowmem": ("--mixed-precision", "fp32", "--base-quantization", "nf4"),
}
WINDOW = 50  # steps in one mean: one step's loss says more about its timesteps than about learning


@dataclass
class Options:
    """Compare the loss curves."""

    steps: Count = 300
    out: Path = Path("benchmarks/results/curves.json")


def losses(name: str, steps: int, scratch: Path) -> list[float]:
    """The loss of every step of one run, through the command."""
    words = ["pocket", "--max-train-steps", str(steps), "--output-dir", str(scratch / name)]
    words += ["--cache-dir", str(scratch / "cache"), *RUNS[name], "--validation-prompts"]
    environment = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "loop.py", *words]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    lines = (scratch / name / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def windows(curve: torch.Tensor) -> torch.Tensor:
    """Means over WINDOW steps, one after another."""
    return curve[: len(curve) // WINDOW * WINDOW].view(-1, WINDOW).mean(1)


def main() -> None:
    options = asked(Options)
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: torch.tensor(losses(name, options.steps, Path(folder))) for name in RUNS}
    want = windows(curves["original"])
    result = {
        "command": " ".join(["python -m benchmarks.curves", *sys.argv[1:]]),
        "torch": torch.__version__,
        "steps": options.steps,
        "options": {name: " ".join(words) for name, words in RUNS.items()},
        f"loss, means over {WINDOW} steps": {
            name: [round(value, 5) for value in windows(curve).tolist()]
            for name, curve in curves.items()
        },
        "largest distance of those means from original's, of its own": {
            name: round(((windows(curve) - want).abs() / want).max().item(), 4)
            for name, curve in curves.items()
            if name != "original"
        },
        "of the mean over the last third": {
            name: round((curve[-options.steps // 3 :].mean() / base - 1).item(), 4)
            for base in [curves["original"][-options.steps // 3 :].mean()]
            for name, curve in curves.items()
            if name != "original"
        },
    }
    (ROOT / options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
