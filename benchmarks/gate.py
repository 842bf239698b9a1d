"""The gate's kernels (fast/geglu.py) against the book's formula, and what they take, on a GPU.

    python benchmarks/gate.py                     writes benchmarks/results/gate.json

Answers and gradients, in fp32, fp16 and bf16, of every shape below, of odd sizes and of tensors
that are not contiguous (which PyTorch's lines compute), against value * gelu(gate) in double
precision: a kernel may be off by what rounding to its dtype costs. Then the time of one call at
SDXL's shapes, beside PyTorch's lines and beside a copy, launched one by one and replayed from a
CUDA graph. Exits with 1 where an answer differs, or where there is no kernel. It needs neither a
model nor diffusers.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fast import geglu, kernels  # noqa: E402

# (M, F) of SDXL's two widths in a batch of 4: 1024 and 256 tokens at 512 px, four times as many at
# 1024 px.
SHAPES = {
    512: [(4 * 1024, 2560), (4 * 256, 5120)],
    1024: [(4 * 4096, 2560), (4 * 1024, 5120)],
}
ODD = [(1, 8), (3, 7), (5, 2049), (1023, 2560), (1, 1)]
CALLS = 50  # in one measurement


def numbers(shape: tuple[int, int], dtype: torch.dtype, count: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    made = (torch.randn(shape, generator=generator, device="cuda") for _ in range(count))
    return [(2 * each).to(dtype) for each in made]


# ---- what they compute ---------------------------------------------------------------------------


def compare(value: Tensor, gate: Tensor, grad: Tensor) -> dict[str, float]:
    """How far answer and gradients are off at most, in units of rounding: to the dtype at the
    answer's size, and to fp32 at the size of what is multiplied, since 1 + erf may cancel.
    """
    v, g = (each.double().requires_grad_() for each in (value, gate))
    d, answer = grad.double(), v * F.gelu(g)
    wanted = [answer.detach(), *torch.autograd.grad(answer, (v, g), d)]
    sizes = [(v * g).abs(), (d * g).abs(), (d * v).abs() * (1 + g.abs())]
    found = [geglu.forward(value, gate), *geglu.backward(value, gate, grad)]
    about, apart = torch.finfo(value.dtype), {}
    for name, f, w, size in zip(("answer", "dvalue", "dgate"), found, wanted, sizes, strict=True):
        unit = about.eps * w.abs() + torch.finfo(torch.float32).eps * size + about.smallest_normal
        apart[name] = round(((f.double() - w).abs() / unit).max().item(), 3)
    return apart


def recorded(value: Tensor, gate: Tensor, grad: Tensor) -> bool:
    """Whether a CUDA graph, replayed on other numbers, gives what a call gives, bit for bit."""
    inputs = [torch.zeros_like(each) for each in (value, gate, grad)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [geglu.forward(*inputs[:2]), *geglu.backward(*inputs)]
    for mine, each in zip(inputs, (value, gate, grad), strict=True):
        mine.copy_(each)
    graph.replay()
    wanted = [geglu.forward(value, gate), *geglu.backward(value, gate, grad)]
    return all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def differences() -> tuple[list[dict], bool]:
    """Each shape's differences, and whether all are within rounding."""
    rows, good = [], True
    for dtype in kernels.NUMBERS:
        for shape in [*ODD, *(shape for shapes in SHAPES.values() for shape in shapes)]:
            whole = numbers(shape, dtype, 3)
            twice = numbers((shape[0], 2 * shape[1]), dtype, 3)
            cut = [each.chunk(2, dim=1)[1] for each in twice]  # not contiguous
            for name, tensors in (("contiguous", whole), ("a half of twice as wide", cut)):
                apart = compare(*tensors)
                kernel = geglu.has_kernel(*tensors)
                row = {"dtype": str(dtype)[6:], "shape": shape, "lies": name, "kernel": kernel}
                row |= {"off": apart, "recorded": recorded(*tensors) if kernel else None}
                # A kernel rounds once, at its end; PyTorch's lines round in between, too.
                most = (4 if dtype == torch.float32 else 1) if kernel else 8
                within = max(apart.values()) <= most
                row["good"] = within and row["recorded"] is not False
                good = good and row["good"]
                rows.append(row)
    return rows, good


# ---- what they take ------------------------------------------------------------------------------


def microseconds(call: Callable[[], object], graph: bool) -> float:
    """The median of one call, by CUDA events around CALLS of them."""
    call()
    torch.cuda.synchronize()
    if graph:
        record = torch.cuda.CUDAGraph()
        with torch.cuda.graph(record):
            for _ in range(CALLS):
                call()
        many = record.replay
    else:

        def many():
            for _ in range(CALLS):
                call()

    many()
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        many()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * begin.elapsed_time(end) / CALLS)
    return statistics.median(times)


def lines_forward(value: Tensor, gate: Tensor) -> Tensor:
    return F.gelu(gate).mul_(value)


def lines_backward(value: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return F.gelu(gate).mul_(grad), torch.ops.aten.gelu_backward(grad * value, gate)


def times(side: int, shape: tuple[int, int], dtype: torch.dtype) -> dict:
    value, gate, grad = numbers(shape, dtype, 3)
    other = torch.empty_like(value)
    calls = {
        "forward": lambda: geglu.forward(value, gate),
        "forward, PyTorch's lines": lambda: lines_forward(value, gate),
        "backward": lambda: geglu.backward(value, gate, grad),
        "backward, PyTorch's lines": lambda: lines_backward(value, gate, grad),
        "copy": lambda: other.copy_(value),  # two tensors' bytes; forward has three, backward five
    }
    row: dict = {"px": side, "shape": shape, "dtype": str(dtype)[6:]}
    for way in ("launched", "recorded"):
        spent = {name: microseconds(call, way == "recorded") for name, call in calls.items()}
        row[f"us, {way}"] = {name: round(us, 2) for name, us in spent.items()}
    gigabytes = value.nbytes / 1e9
    spent = row["us, recorded"]
    row["GB/s, recorded"] = {
        name: round(tensors * gigabytes / spent[name] * 1e6)
        for name, tensors in (("forward", 3), ("backward", 5), ("copy", 2))
    }
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gate.json")
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        sys.exit("error: there is no GPU here; expected a CUDA GPU. What to do: run it on one")
    device = torch.device("cuda", torch.cuda.current_device())
    missing = {str(d)[6:]: geglu.unavailable(d, device) for d in kernels.NUMBERS}
    rows, good = differences()
    good = good and not any(missing.values())
    result = {
        "command": " ".join(["python benchmarks/gate.py", *sys.argv[1:]]),
        "on": f"{torch.cuda.get_device_name()}, torch {torch.__version__}",
        "no kernel, and why": {name: why for name, why in missing.items() if why},
        "good": good,
        "differences, in units of rounding": rows,
        "times": [
            times(side, shape, dtype)
            for side, shapes in SHAPES.items()
            for shape in shapes
            for dtype in (torch.float16, torch.bfloat16, torch.float32)
        ],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in list(result)[:4]}, indent=1))
    for row in (row for row in rows if not row["good"]):
        print(f"differs: {json.dumps(row)}")
    for row in result["times"]:
        print(json.dumps(row))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
