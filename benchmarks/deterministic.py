"""What --deterministic is worth on this GPU: which kernels differ from call to call, and whether a
killed fp16 run equals an uninterrupted one.

`python benchmarks/deterministic.py kernels OUT.json` calls each kernel of a step, and a whole
recorded step, again and again on the same numbers, and counts the answers that differ; with
--deterministic under its modes. It takes no model.
`python benchmarks/full_size.py make MODEL PHOTOS` writes SDXL with random weights (7 GB) once; then
`python benchmarks/deterministic.py runs MODEL PHOTOS OUT` makes, with the flag and without, two
uninterrupted runs and one that is killed (SIGKILL) and started again, each a process of its own,
and OUT/deterministic.json: whether adapters and loss-scale counters are equal to the bit, how many
numbers differ and how far. Exits with 1 where runs with the flag differ. So that something can go
wrong with the loss scale, it starts at 2^22 there and doubles after every second good step: it
overflows, is halved and grows again all the time.

`--options ...` after all else goes to loop.py. Tried out on a CPU, where both ways are equal, by
`--device cpu --options --resolution 32 ...` on the stress suite's tiny model.
"""

import argparse
import contextlib
import dataclasses
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
CALLS = 20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_kernels = commands.add_parser("kernels")
    of_kernels.add_argument("out", type=Path)
    of_kernels.add_argument("--deterministic", action="store_true")
    of_runs = commands.add_parser("runs")
    for name in ("model", "photos", "out"):
        of_runs.add_argument(name, type=Path)
    of_runs.add_argument("--recipes", nargs="+", default=["t4", "lowmem"])
    of_runs.add_argument("--flags", nargs="+", choices=["with", "without"], default=list(FLAGS))
    of_runs.add_argument("--steps", type=int, default=40)
    of_runs.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="for loop.py")
    for each in (of_kernels, of_runs):
        each.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.command == "runs" and options.steps < 2:
        parser.error(f"--steps is {options.steps}: one run is stopped in its middle, so 2 or more")
    return options


# ---- runs ----------------------------------------------------------------------------------------

FLAGS = {"without": "--no-deterministic", "with": "--deterministic"}


def child(argv: list[str]) -> int:
    """loop.py with a loss scale that moves."""
    import inputs.options  # noqa: F401  it sets how long idle threads spin, before torch asks
    import loop  # isort: skip
    from keep import training

    whole = loop.LossScale

    def moving(enabled: bool, value: float):
        return whole(enabled, 2.0**22 if enabled else value, growth_interval=2)

    loop.LossScale = moving
    return training.main(argv)


def one(out: Path, argv: list[str], kill_after: int = 0) -> int:
    """`loop.py argv` into `out`, to its end or, once it has logged `kill_after` steps, to its
    death. Returns the exit code.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".txt"), "a") as said:
        process = subprocess.Popen(
            [sys.executable, __file__, "child", *argv, "--output-dir", str(out)],
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

    import lora
    from keep import checkpoint

    states = [checkpoint.newest_state(folder / "checkpoints") for folder in (one, other)]
    a, b = (torch.cat([m.flatten() for m in state["trained"].values()]) for state in states)
    moved = [m.flatten() for name, m in lora.read(one).matrices.items() if name.endswith("lora_B")]
    length = torch.cat(moved).float().norm().item()
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


def all_runs(options: argparse.Namespace) -> int:
    results, failed = about(options), False
    results["command"] = "python benchmarks/deterministic.py runs MODEL PHOTOS OUT"
    results["steps"] = options.steps
    for recipe in options.recipes:
        argv = command_line(options, recipe)
        for name in options.flags:
            folders = runs(options.out / recipe / name, [*argv, FLAGS[name]], options.steps)
            pairs = {
                kind: apart(folders["first"], folders[kind]) for kind in ("second", "continued")
            }
            row = pairs | {"seconds_per_step_median": seconds(folders["first"])}
            results.setdefault(recipe, {})[name] = row
            (options.out / "deterministic.json").write_text(json.dumps(results, indent=1) + "\n")
            print(recipe, name, json.dumps(row), flush=True)
            failed |= name == "with" and not all(map(same, pairs.values()))
    return failed


# ---- kernels -------------------------------------------------------------------------------------


def works(device) -> dict:
    """Name -> a function without arguments that returns tensors: what a step calls, forward and
    backward, at the sizes of four images at 512 px (on a CPU of one at 64 px).
    """
    import torch

    dtype, B, side = (torch.float16, 4, 64) if device.type == "cuda" else (torch.float32, 1, 8)
    stream = torch.Generator(device).manual_seed(0)

    def some(*shape, grad=True):
        numbers = torch.randn(shape, generator=stream, device=device).to(dtype)
        return numbers.requires_grad_(grad)

    def differentiated(function, *inputs):
        moving, along = [x for x in inputs if x.requires_grad], []

        def work():
            answer = function(*inputs)
            along.append(along[0] if along else some(*answer.shape, grad=False))
            return [answer.detach(), *torch.autograd.grad(answer, moving, along[0])]

        return work

    flat = torch.randn(23_224_320 // (1 if device.type == "cuda" else 1000), device=device)
    return {
        **attentions(some, differentiated, B, side),
        **convolutions(some, differentiated, B, side),
        **others(some, differentiated, B, side),
        **of_the_optimizer(flat),
    }


def attentions(some, differentiated, B: int, side: int) -> dict:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attention(backend, keys):
        def work(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return differentiated(work, some(B, 10, tokens, 64), *keys)

    tokens, found = side * side // 4, {}
    own, words = ([some(B, 10, n, 64) for _ in "kv"] for n in (tokens, 77))
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    if not torch.are_deterministic_algorithms_enabled():  # where it is excluded
        backends["cuDNN's"] = SDPBackend.CUDNN_ATTENTION
    for name, backend in backends.items():
        found[f"{name} attention, self"] = attention(backend, own)
        found[f"{name} attention, cross"] = attention(backend, words)
    return found


def convolutions(some, differentiated, B: int, side: int) -> dict:
    import torch.nn.functional as F

    found = {}
    for width, at in ((320, side), (640, side // 2), (1280, side // 4)):
        weight = some(width, width, 3, 3, grad=False)
        found[f"convolution, {width} wide"] = differentiated(
            lambda x, w: F.conv2d(x, w, padding=1), some(B, width, at, at), weight
        )
    found["convolution, stride 2"] = differentiated(
        lambda x, w: F.conv2d(x, w, stride=2, padding=1),
        some(B, 320, side, side),
        some(320, 320, 3, 3, grad=False),
    )
    found["upsampling"] = differentiated(
        lambda x: F.interpolate(x, scale_factor=2.0), some(B, 640, side // 2, side // 2)
    )
    return found


def others(some, differentiated, B: int, side: int) -> dict:
    """Norms, products, the fused gate and a weight in 4 bits."""
    import torch.nn.functional as F
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from fast import geglu

    rows = B * side * side // 4
    gate = [some(rows, 2560, grad=False) for _ in range(3)]
    packed, state = quantize_4bit(some(1280, 1280, grad=False), quant_type="nf4")
    return {
        "group norm": differentiated(lambda x: F.group_norm(x, 32), some(B, 320, side, side)),
        "layer norm": differentiated(lambda x: F.layer_norm(x, (640,)), some(rows, 640)),
        "product": differentiated(lambda x, w: x @ w, some(rows, 640), some(640, 5120, grad=False)),
        "A's and B's gradients": differentiated(
            lambda x, A, B: x @ A.t() @ B.t(), some(rows, 640), some(16, 640), some(640, 16)
        ),
        "gate": lambda: [geglu.forward(*gate[:2]), *geglu.backward(*gate)],
        "NF4": lambda: [dequantize_4bit(packed, state)],
    }


def of_the_optimizer(flat) -> dict:
    """flat: as many numbers as an adapter has."""
    import torch

    matrices = flat.split(20_736)  # as many of them as the adapter has
    return {
        "norm of the gradient": lambda: [torch.nn.utils.get_total_norm(matrices)],
        "AdamW8bit": eight_bit_step(flat),
    }


def eight_bit_step(flat):
    import torch

    import loop
    from inputs.options import RECIPES

    config = dataclasses.replace(RECIPES["t4"][1], use_8bit_adam=True)

    def work():
        vector = torch.nn.Parameter(flat.clone())
        vector.grad = flat.clone()
        optimizer = loop.make_optimizer(config, [vector])
        for _ in range(2):
            optimizer.step()
        return [vector.detach()]

    return work


def whole_step(device) -> dict:
    """A recorded micro-step of four images, as recipe t4 has it, on random weights: how often its
    gradient differs, by how much, and its seconds. (On a CPU: the pocket's shape.)
    """
    import torch

    from benchmarks import ladder as bench
    from benchmarks import synthetic

    cuda = device.type == "cuda"
    options = bench.Options(command="ladder", device=device.type, tiny=not cuda)
    config = bench.changed(options, 512 if cuda else 64, "4x1")
    run, said = synthetic.assemble(config, device, options.folder)
    synthetic.leave_zero(run)
    batch, grads, spent = run.examples.batch(range(4), device), [], []
    run.scale_on_device.fill_(run.loss_scale.value)
    for _ in range(CALLS):
        run.optimizer.zero_grad(set_to_none=False)
        began = bench.wait(device)
        run.micro_step(run, batch)
        spent.append(bench.wait(device) - began)
        grads.append(synthetic.gradient(run))
    off = [((g - grads[0]).norm() / grads[0].norm()).item() for g in grads]
    return {
        "answers_that_differ": sum(not torch.equal(g, grads[0]) for g in grads),
        "largest_relative_difference": max(off),
        "seconds_median": round(statistics.median(spent[3:]), 5),
        "said": "; ".join(said),
    }


def kernels(options: argparse.Namespace) -> int:
    """Counts the answers of CALLS that differ from the first. Returns 1 where the flag is on and
    one does.
    """
    import torch

    from fast import deterministic
    from inputs.files import first_line

    device, way = torch.device(options.device), "with" if options.deterministic else "without"
    counts = {"of": CALLS - 1}

    def store() -> None:
        results = about(options)
        results["command"] = "python benchmarks/deterministic.py kernels OUT.json [--deterministic]"
        stored = json.loads(options.out.read_text()) if options.out.is_file() else {}
        options.out.write_text(json.dumps(stored | results | {way: counts}, indent=1) + "\n")

    only = deterministic.mode() if options.deterministic else contextlib.nullcontext()
    with only:  # first: it must come before CUDA starts
        for name, work in works(device).items():
            try:
                first = work()
                equal = (all(map(torch.equal, first, work())) for _ in range(CALLS - 1))
                counts[name] = CALLS - 1 - sum(equal)
            except RuntimeError as error:  # a kernel that this GPU or this mode has not
                counts[name] = f"not available: {first_line(error)}"
            print(way, name, counts[name], flush=True)
        store()
        counts["whole step"] = whole_step(device)
        print(way, counts["whole step"], flush=True)
    store()
    differ = [n for n, c in counts.items() if isinstance(c, int) and c and n != "of"]
    return options.deterministic and bool(differ or counts["whole step"]["answers_that_differ"])


# ---- the command ---------------------------------------------------------------------------------


def about(options: argparse.Namespace) -> dict:
    import torch

    cuda = options.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
    }


def main() -> int:
    options = parse()
    return kernels(options) if options.command == "kernels" else all_runs(options)


if __name__ == "__main__":
    sys.exit(child(sys.argv[2:]) if sys.argv[1:2] == ["child"] else main())
