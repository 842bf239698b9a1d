"""How far several GPUs of one host carry: measured, and on paper.

`python benchmarks/two_gpus.py run` measures the seconds of loop.py's own optimizer_step() with one
process and with two, at 512 and 1024 px, 16 examples a step in passes of 4: full-size SDXL with
random weights, nothing downloaded or read. It writes benchmarks/results/two_gpus.json. Beside the
step, the all-reduce is timed by itself, and the steps' losses are kept: they are the same run's.
`... run --device cpu --small` tries the script on the small model, over Gloo.
`python benchmarks/two_gpus.py paper` prints the README's table: where scaling stops, by arithmetic.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
GRADIENT = 4 * 23_224_320  # bytes: the flat fp32 gradient at rank 16
N, PASS = 16, 4  # examples a step, and in one pass of one process

# ---- on paper ------------------------------------------------------------------------------------

# B/s that one GPU sends while it receives as many, as sold: PCIe 3 x16, and NVLink of an H100. Two
# T4s whose driver forbids direct copies go through host memory, twice over the bus: about half.
LINKS = {"PCIe 3 x16": 16e9, "half of it, through host memory": 8e9, "NVLink, H100": 450e9}


def efficiency(
    n: int, gpus: int, seconds: Callable[[int], float], link: float, size: int = GRADIENT
) -> float:
    """Speed-up over one GPU, divided by the number of GPUs, where they share n examples.

    t(p) = seconds(ceil(n / p)) + 2 (p - 1) / p x size / link: the largest share's forward and
    backward passes, then a ring all-reduce of `size` bytes over links of `link` B/s (Patarasuk and
    Yuan 2009, section 3); nothing overlaps. seconds(m): of m examples on one GPU.
    """
    together = seconds(-(-n // gpus)) + 2 * (gpus - 1) / gpus * size / link
    return seconds(n) / (gpus * together)


def most_gpus(n: int, seconds: Callable[[int], float], link: float, least: float = 0.9) -> int:
    """The largest number of GPUs, of those that share n examples evenly, above `least`."""
    even = [gpus for gpus in range(1, n + 1) if n % gpus == 0]
    return max(gpus for gpus in even if efficiency(n, gpus, seconds, link) >= least)


def measured(side: int) -> Callable[[int], float]:
    """seconds(m) on the H100 of bench_ladder.json, in passes of 4 and one of the rest; passes of 2
    and 3 lie on the line between those of 1 and 4, which were measured.
    """
    rows = json.loads((ROOT / "benchmarks" / "results" / "bench_ladder.json").read_text())["rows"]
    one = rows[f"{side} px, fp16, graph"]["s_per_step"] / 4
    four = rows[f"{side} px, fp16, 4x1"]["s_per_step"]

    def seconds(m: int) -> float:
        whole, rest = divmod(m, 4)
        return whole * four + (one + (rest - 1) * (four - one) / 3 if rest else 0)

    return seconds


def estimated(minutes: float, launches: float) -> Callable[[int], float]:
    """seconds(m) of one pass of m examples on a T4 that takes `minutes` for 1,000 passes of 4, of
    which `launches` do not depend on m.
    """
    return lambda m: 60 / 1000 * ((minutes - launches) * m / 4 + launches)


def paper() -> list[str]:
    """The README's rows: efficiency by number of GPUs."""
    said = (ROOT / "benchmarks" / "results" / "plan_t4.txt").read_text()  # what make plan estimates
    low, high = map(float, re.search(r"time +(\S+) to (\S+) minutes", said).groups())
    launches = float(re.search(r"launches .*: (\S+) min", said)[1])
    fast, slow = estimated(low, launches), estimated(high, launches)
    pcie, half, nvlink = LINKS.values()
    cases = {
        f"T4, 512 px, {low:g} min for 1,000 steps · PCIe 3 x16": (4, fast, pcie),
        "the same, through host memory": (4, fast, half),
        f"T4, 512 px, {high:g} min for 1,000 steps · through host memory": (4, slow, half),
        "H100, 512 px · NVLink": (16, measured(512), nvlink),
        "H100, 1024 px · NVLink": (16, measured(1024), nvlink),
    }
    rows = ["| | examples | 2 GPUs | 4 | 8 | 90 % up to |", "|---|---|---|---|---|---|"]
    for name, (n, seconds, link) in cases.items():
        cells = (
            f"{100 * efficiency(n, p, seconds, link):.0f} %" if p <= n else "" for p in (2, 4, 8)
        )
        rows.append(f"| {name} | {n} | {' | '.join(cells)} | {most_gpus(n, seconds, link)} GPUs |")
    return rows


# ---- measured ------------------------------------------------------------------------------------


def child(options: argparse.Namespace) -> None:
    """One process of a measurement; the first writes the rows."""
    from benchmarks import ladder as bench  # first: it sets how long idle threads spin

    import loop  # isort: skip
    import model  # isort: skip
    import torch  # isort: skip
    from benchmarks import synthetic
    from inputs.vetting import check_device
    from keep import faster

    with faster.join(600) as team:
        device = team.start(check_device(options.device))
        given = bench.Options(command="ladder", tiny=options.small, device=options.device)
        rows = {}
        for side in options.sides:
            config = bench.changed(given, side, "4x1")
            config = bench.dataclasses.replace(
                config, train_batch_size=PASS, gradient_accumulation_steps=N // PASS
            )
            run, said = synthetic.assemble(config, device, given.folder, team=team)
            seconds, losses, began = [], [], bench.wait(device)
            for _ in range(options.warm_up + options.steps):
                losses.append(loop.optimizer_step(run)[0])
                seconds.append(time.perf_counter() - began)
                began += seconds[-1]
            timed = seconds[options.warm_up :]
            row = {"s_per_step": statistics.median(timed)}
            row |= {"s_lowest": min(timed), "s_highest": max(timed)}
            row["s_all_reduce"] = time_all_reduce(run, bench.wait)
            row = {key: round(value, 5) for key, value in row.items()}
            if device.type == "cuda":
                row["gib_allocated"] = bench.gib(torch.cuda.max_memory_allocated())
                torch.cuda.reset_peak_memory_stats()
            row |= {"losses": [round(loss, 5) for loss in losses], "said": "; ".join(said)}
            team.check_equal("the adapter", run.trained)
            rows[f"{side} px, {team.size} processes"] = row | {"on": bench.machine(device)}
            del run
            model.free_memory()
    if team.first:
        Path(options.out).write_text(json.dumps(rows))


def time_all_reduce(run, wait: Callable) -> float:
    """Seconds of the step's exchange by itself, which is the gradient's all-reduce and the loss's;
    the median of 10.
    """
    seconds = []
    for _ in range(12):
        began = wait(run.unet.device)
        run.exchange(run)
        seconds.append(wait(run.unet.device) - began)
    return statistics.median(seconds[2:])


def launch(options: argparse.Namespace) -> int:
    """One start of torchrun for each number of processes; their rows in one file."""
    out, rows = Path(options.out), {}
    out.parent.mkdir(parents=True, exist_ok=True)
    for size in options.processes:
        part = out.with_name(f".{out.name}.{size}.{os.getpid()}.part")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(size), __file__, "child", "--out", str(part)]
        command += ["--device", options.device, "--small"][: 3 if options.small else 2]
        command += ["--steps", str(options.steps), "--warm-up", str(options.warm_up)]
        command += ["--sides", *map(str, options.sides)]
        # As many threads in every measurement; on a GPU they decide nothing.
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // max(options.processes)))}
        if code := subprocess.run(command, cwd=ROOT, env=os.environ | threads).returncode:
            return code
        rows |= json.loads(part.read_text())
        part.unlink()
    first, last = options.processes[0], options.processes[-1]
    for side in options.sides:
        many = rows[f"{side} px, {last} processes"]
        speed_up = rows[f"{side} px, {first} processes"]["s_per_step"] / many["s_per_step"]
        many["speed_up"] = round(speed_up, 3)
        print(f"{side} px: {speed_up:.2f} times as fast with {last} processes as with {first}")
    typed = " ".join(["python benchmarks/two_gpus.py", *sys.argv[1:]])
    note = f"{N} examples a step, passes of {PASS}"
    content = {"command": typed.replace(str(ROOT), "."), "note": note, "rows": rows}
    out.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("run", "paper", "child"))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--small", action="store_true", help="the small model's shape")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "two_gpus.json"))
    options = parser.parse_args()
    if min(options.steps, *options.processes, *options.sides, options.warm_up + 1) < 1:
        parser.error("--steps, --processes and --sides are 1 or more, --warm-up 0 or more")
    if options.what == "paper":
        print("\n".join(paper()))
        return 0
    return child(options) or 0 if options.what == "child" else launch(options)


if __name__ == "__main__":
    sys.exit(main())
