"""The norms' kernels (fast/groupnorm.py, fast/layernorm.py) against PyTorch's lines, and what they
take, on a GPU.

    python -m benchmarks.norms                    writes benchmarks/results/norms.json

Answers, moments and gradients in fp32, fp16 and bf16, at SDXL's shapes, odd sides and means of 1000
included, against PyTorch's lines in double precision on the same numbers. Each is computed twice,
and must be equal to the bit. Then the time of one call, replayed from a CUDA graph, beside a copy.
Exits with 1 where an answer differs by more than rounding, or where there is no kernel.
"""

import argparse
import copy
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gate import microseconds
from fast import groupnorm, kernels, layernorm

ROOT = Path(__file__).resolve().parent.parent
# (C, H, W) of SDXL at 512 px and of odd buckets; then sides of a latent at 1024 px.
SHAPES = [(320, 64, 64), (640, 32, 32), (960, 64, 64), (1280, 16, 16), (1920, 32, 32)]
SHAPES += [(2560, 16, 16), (320, 52, 76), (640, 17, 23), (1280, 13, 19), (1920, 1, 5), (32, 5, 7)]
# (M, D) of its transformers at 512 and 1024 px, one picture and four.
ROWS = [(256, 1280), (1024, 640), (1024, 1280), (4096, 640), (4096, 1280), (16384, 640), (7, 64)]
LARGE = [(320, 128, 128), (640, 64, 64), (1280, 32, 32), (2560, 32, 32)]


def numbers(shape: tuple, dtype: torch.dtype, mean: float = 0.0) -> tuple[list, nn.GroupNorm]:
    """x, its gradient and a residual in NHWC, and a shift; a norm."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator, device="cuda")  # noqa: E731
    C, norm = shape[1], nn.GroupNorm(32, shape[1], device="cuda", dtype=dtype)
    norm.weight.data, norm.bias.data = (draw(C) for _ in range(2))
    made = [draw(*shape) + mean, draw(*shape), draw(*shape)]
    made = [groupnorm.nhwc(each).to(dtype) for each in made]
    return [*made, draw(shape[0], C).to(dtype)], norm.to(dtype).requires_grad_(False)


def compare(shape: tuple, dtype: torch.dtype, mean: float, full: bool) -> dict:
    """full: with shift, SiLU and residual, as inside a block; else as at a transformer's door."""
    (x, grad, residual, shift), norm = numbers(shape, dtype, mean)
    if not full:
        shift = residual = None
    assert groupnorm.has_kernel(x, norm.weight, 32, grad, residual), (shape, dtype)
    x64, grad64, residual64, shift64 = (
        each if each is None else each.double() for each in (x, grad, residual, shift)
    )
    exact = copy.deepcopy(norm).double()
    want, moments = groupnorm.forward(x64, exact, shift64, full)
    want_dx = groupnorm.backward(grad64, x64, exact, shift64, moments, residual64, full)
    inverse = moments[..., 1]
    found, twice = [], []
    for kept in (found, twice):
        y, own = groupnorm.forward(x, norm, shift, full)
        kept += [y, own, groupnorm.backward(grad, x, norm, shift, own, residual, full)]
    pairs = {"answer": (found[0], want), "gradient": (found[2], want_dx)}
    row = differences(pairs, abs(mean) * inverse.max().item())
    spread = ((found[1][..., 1].double() - inverse).abs() / inverse).max().item()
    equal = all(torch.equal(a, b) for a, b in zip(found, twice, strict=True))
    row |= {"deviation off": float(f"{spread:.2g}"), "equal": equal}
    row["good"] = row["good"] and equal and spread < 1e-4
    return {"shape": shape, "dtype": str(dtype)[6:], "mean": mean, "in a block": full} | row


def differences(pairs: dict, means: float) -> dict:
    """|found - wanted| / |wanted| of each of `pairs`, and whether all are within rounding: half a
    unit of the dtype, and what fp32 costs. means: how many deviations a mean was at most, which
    rounds x - mean.
    """
    off = {name: ((f.double() - w).norm() / w.norm()).item() for name, (f, w) in pairs.items()}
    fp32 = torch.finfo(torch.float32).eps * (4 + means / 2)
    most = max(torch.finfo(found.dtype).eps / 2 + fp32 for found, _ in pairs.values())
    return {"off": {k: float(f"{v:.2g}") for k, v in off.items()}, "good": max(off.values()) < most}


def compare_rows(shape: tuple, dtype: torch.dtype, mean: float, added: bool) -> dict:
    """LayerNorm of x (M, D), with an addition or without."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator, device="cuda")  # noqa: E731
    x, more, grad = ((draw(*shape) + m).to(dtype) for m in (mean, 0, 0))
    affine = [draw(shape[1]).to(dtype) for _ in range(2)]
    more, beside, found, twice = more if added else None, more, [], []
    assert layernorm.has_kernel(affine[0], x, grad, more), (shape, dtype)
    for kept in (found, twice):
        total, y = layernorm.forward(x, more, affine, 1e-5)
        total = total if added else x
        kept += [total, y, layernorm.backward(grad, total, beside, affine, 1e-5)]
    exact = [each.double() for each in (grad, found[0], beside)], [a.double() for a in affine]
    want = F.layer_norm(exact[0][1], affine[0].shape, *exact[1], 1e-5)
    want_dx = layernorm.backward(*exact[0], exact[1], 1e-5)
    row = differences({"answer": (found[1], want), "gradient": (found[2], want_dx)}, abs(mean))
    equal = all(torch.equal(a, b) for a, b in zip(found, twice, strict=True))
    row["equal"] = equal and (not added or torch.equal(found[0], x + more))
    row["good"] = row["good"] and row["equal"]
    return {"shape": shape, "dtype": str(dtype)[6:], "mean": mean, "added": added} | row


def row_times(shape: tuple, dtype: torch.dtype) -> dict:
    x, more, grad = (torch.randn(shape, device="cuda").to(dtype) for _ in range(3))
    affine = [torch.randn(shape[1], device="cuda").to(dtype) for _ in range(2)]
    _, *moments = torch.native_layer_norm(x, affine[0].shape, *affine, 1e-5)
    how = (grad, x, affine[0].shape, *moments, *affine, (True, False, False))
    calls = {
        "forward": lambda: layernorm.forward(x, more, affine, 1e-5),
        "forward, PyTorch's": lambda: F.layer_norm(x + more, affine[0].shape, *affine, 1e-5),
        "backward": lambda: layernorm.backward(grad, x, more, affine, 1e-5),
        "backward, PyTorch's": lambda: torch.ops.aten.native_layer_norm_backward(*how)[0] + more,
    }
    spent = {name: round(microseconds(call, True), 2) for name, call in calls.items()}
    return {"shape": shape, "dtype": str(dtype)[6:], "MB": round(x.nbytes / 1e6, 1), "us": spent}


def times(shape: tuple, dtype: torch.dtype) -> dict:
    (x, grad, residual, shift), norm = numbers(shape, dtype)
    _, own = groupnorm.forward(x, norm, shift, True)
    calls = {
        "forward": lambda: groupnorm.forward(x, norm, shift, True),
        "backward": lambda: groupnorm.backward(grad, x, norm, shift, own, residual, True),
        "copy": lambda: residual.copy_(x),
    }
    spent = {name: round(microseconds(call, True), 2) for name, call in calls.items()}
    return {"shape": shape, "dtype": str(dtype)[6:], "MB": round(x.nbytes / 1e6, 1), "us": spent}


def furthest(rows: list[dict]) -> list[dict]:
    """Of all rows that are alike but for their shape that with the largest difference."""
    of_kind: dict[tuple, list[dict]] = {}
    for row in rows:
        kind = tuple(row.get(key) for key in ("dtype", "mean", "in a block", "added"))
        of_kind.setdefault(kind, []).append(row)
    return [max(alike, key=lambda row: max(row["off"].values())) for alike in of_kind.values()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    path = ROOT / "benchmarks" / "results" / "norms.json"
    parser.add_argument("--out", type=Path, default=path)
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        sys.exit("error: there is no GPU here; expected a CUDA GPU. What to do: run it on one")
    ways = itertools.product((1, 4), SHAPES, kernels.NUMBERS, (0.0, 1000.0), (True, False))
    rows = [compare((n, *shape), dtype, mean, full) for n, shape, dtype, mean, full in ways]
    ways = itertools.product(ROWS, kernels.NUMBERS, (0.0, 1000.0), (True, False))
    rows += [compare_rows(*way) for way in ways]
    result = {
        "command": " ".join(["python -m benchmarks.norms", *sys.argv[1:]]),
        "on": f"{torch.cuda.get_device_name()}, torch {torch.__version__}",
        "good": all(row["good"] for row in rows),
        "compared": len(rows),
        "furthest off of each kind": furthest(rows),
        "times": [times((n, *shape), torch.float16) for n in (1, 4) for shape in SHAPES[:6] + LARGE]
        + [row_times(shape, torch.float16) for shape in ROWS[:6]],
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    for row in (row for row in rows if not row["good"]):
        print(f"differs: {json.dumps(row)}")
    for row in result["times"]:
        print(json.dumps(row))
    print(f"good: {result['good']}, of {len(rows)}; {result['on']}")
    return 0 if result["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
