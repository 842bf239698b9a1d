"""PYTHONPATH=tests python -m stress --seed 0 --runs 200 --inputs 1000 --out FILE.json

Runs of a tiny SDXL that are killed or meet full disks must end as undisturbed ones do, and files
from strangers must be answered rightly or refused with a sentence. On the CPU, without a network.
Exits with 1 where anything failed, and says how to repeat it.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

# Before torch is imported: one thread a run, so that runs can be forked and kept side by side.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from inputs.ahead import usable_cores  # noqa: E402
from inputs.files import write_whole  # noqa: E402
from stress import disk, fuzz, kills  # noqa: E402

# Each has run(seed, count, folder, say) -> {"runs" or "inputs", ..., "failures": [...]}.
PARTS = {
    "kills": kills.run,
    "disk": disk.run,
    "fuzz": fuzz.run,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stress", description=__doc__.split("\n\n")[1])
    parser.add_argument("--seed", type=int, default=0, help="everything random follows from it")
    parser.add_argument("--runs", type=int, default=200, help="interrupted runs; and disk cases")
    parser.add_argument("--inputs", type=int, default=1000, help="mutated inputs of the fuzzer")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts")
    parser.add_argument("--first", type=int, help="number of the first run or input, to repeat one")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    return parser.parse_args(argv)


def about(options: argparse.Namespace, argv: list[str]) -> dict:
    """What the numbers were made with."""
    packages = ("torch", "diffusers", "transformers", "bitsandbytes", "safetensors", "pillow")
    return {
        "command": " ".join(["PYTHONPATH=tests python -m stress", *argv]),
        "seed": options.seed,
        "threads_per_run": int(os.environ["OMP_NUM_THREADS"]),
        "cores": usable_cores(),
        "load_at_start": [round(load, 1) for load in os.getloadavg()],
        "python": sys.version.split()[0],
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def say(line: str) -> None:
    print(line, flush=True)


def main(argv: list[str]) -> int:
    options = parse(argv)
    result = about(options, argv)
    folder = Path(tempfile.mkdtemp(prefix="stress-"))
    began, failures = time.perf_counter(), 0
    for name in options.only:
        (folder / name).mkdir()
        count = options.inputs if name == "fuzz" else options.runs
        say(f"{name}: {count} at most, seed {options.seed}")
        result[name] = PARTS[name](options.seed, count, folder / name, say, options.first)
        failures += len(result[name]["failures"])
        told = {key: value for key, value in result[name].items() if key != "failures"}
        say(f"{name}: {json.dumps(told)}")
        for failure in result[name]["failures"]:
            say(f"{name} FAILED: {json.dumps(failure)}")
    result |= {"seconds": round(time.perf_counter() - began, 1), "failed": failures}
    if options.out:
        write_whole(options.out, (json.dumps(result, indent=1) + "\n").encode())
    if failures:
        say(f"{failures} failed; what they left is under {folder}")
    else:
        shutil.rmtree(folder)
        say(f"nothing failed, in {result['seconds']:.0f} s")
    gc.unfreeze()  # child.warm() froze what was imported: left so, libraries complain at the end
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
