"""Tried: the frozen Linears on int8 matrix units, forward and backward. Not part of the product.

    python -m benchmarks.int8 gradients                        CPU, a minute, 4 GB
    python -m benchmarks.int8 train          CPU, minutes; needs what benchmarks/pocket.py needs
    python -m benchmarks.int8 full                             GPU, a minute: full-size gradients
    python -m benchmarks.int8 time                             GPU, a minute

Weights have one scale per output channel, activations one per token, found as they come (Dettmers
et al. 2022, https://arxiv.org/abs/2208.07339, section 3.1, without the outliers' own product): the
forward product, and in the backward pass the one that gives the gradient of the inputs, for which
the weights' scales are first multiplied into the incoming gradient. int8 times int8 is summed in
int32 (torch._int_mm). Results go to benchmarks/results/int8.json, under the command's name.
"""

import contextlib
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks import (
    ladder as bench,  # first: it sets how long idle threads spin, before torch asks
)

# isort: split
import numpy as np
import torch
import tyro
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

import loop
import lora
import model
from benchmarks import synthetic
from benchmarks.asked import Count, Seeds, asked
from fast.nf4 import WHOLE
from inputs import options as configuration
from inputs.sources import read_dataset
from keep import training

ROOT = Path(__file__).resolve().parent.parent
POCKET = ROOT / "pocket" / "model"

# ---- the layer -----------------------------------------------------------------------------------


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, n) as int8 in -127..127 and one scale a row, (rows, 1), so that x is about their
    product.
    """
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp_(min=1e-12) / 127
    return (x / scale).round_().to(torch.int8), scale


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, k) times b (k, n), int8, summed in int32 without rounding; (M, n) int32.

    CUDA's kernel wants at least 17 rows: fewer are filled up.
    """
    missing = 17 - len(a) if a.is_cuda else 0
    if missing > 0:
        return torch._int_mm(nn.functional.pad(a, (0, 0, 0, missing)), b)[: len(a)]
    return torch._int_mm(a, b)


class Multiply(torch.autograd.Function):
    """x (M, in) -> W x, (M, out), W being layer.weight times layer.scale."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        numbers, scale = rounded(x)
        return (product(numbers, layer.weight.t()) * scale * layer.scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        numbers, scale = rounded(grad * ctx.layer.scale)
        return (product(numbers, ctx.layer.weight) * scale).to(grad.dtype), None


class Int8Linear(nn.Module):
    """In a frozen Linear's place. weight: (out, in) int8; scale: (out,) fp32."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = rounded(linear.weight.detach())
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), linear.bias
        self.register_buffer("scale", scale.flatten())

    def forward(self, x: Tensor) -> Tensor:
        y = Multiply.apply(x.flatten(0, -2), self).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def replace_linears(module: nn.Module, make=Int8Linear) -> int:
    """Every Linear of `module` that an NF4 base would keep in 4 bits. Returns how many."""
    found = [(n, m) for n, m in module.named_modules() if type(m) is nn.Linear]
    found = [(name, linear) for name, linear in found if not name.startswith(WHOLE)]
    for name, linear in found:
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, make(linear))
    return len(found)


# ---- how far off a gradient is -------------------------------------------------------------------

WAYS = {  # name: (what is computed in, what is put in the Linears' place)
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "nf4, else fp32": (torch.float32, synthetic.four_bits),
    "int8, else fp32": (torch.float32, Int8Linear),
    "int8, else fp16": (torch.float16, Int8Linear),
}


@torch.no_grad()
def adapted(module: nn.Module) -> list[nn.Parameter]:
    """The A and B of an adapter, of which no B is zero, else no gradient would reach A."""
    lora.inject(module, lora.TARGETS, 16, 32)
    generator = torch.Generator().manual_seed(1)
    matrices = list(lora.trained(module).values())
    for matrix in matrices:
        matrix.add_(0.01 * torch.randn(matrix.shape, generator=generator))
    return matrices


def whole_unet(dtype: torch.dtype, make) -> tuple[Tensor, Tensor]:
    """(the UNet's answer, the gradient) of 16 ink drawings under the pocket's own weights."""
    device = torch.device("cpu")
    unet = model.load_unet(str(POCKET), device, torch.float32)
    replace_linears(unet, make) if make else None
    matrices = adapted(unet.to(dtype))
    config = configuration.RECIPES["pocket"][1]
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(
            config, cache_dir=folder, pretrained_model_name_or_path=str(POCKET)
        )
        pictures = read_dataset(str(ROOT / "pocket" / "ink"))[:16]
        examples = loop.examples_of(config, pictures, device, torch.float32, 1000)
        batch = examples.batch(range(16), device)
    schedule = model.load_noise_schedule(str(POCKET), device)
    answer = model.predict(unet, batch["noise"], batch).detach()
    scaling = model.latent_scaling(str(POCKET))
    loss = loop.diffusion_loss(unet, batch, schedule, scaling, config.snr_gamma).mean()
    grads = torch.autograd.grad(2.0**16 * loss, matrices)  # as LossScale begins in fp16
    return answer.float(), synthetic.flattened(grads)


def full_width(dtype: torch.dtype, make) -> tuple[Tensor, Tensor]:
    """The same of SDXL's down_blocks.2.attentions.0, ten layers 1,280 wide, on 16 x 16 latents as
    at 512 px. Weights are random, so they have no outliers: to int8's advantage.
    """
    torch.manual_seed(0)
    block = Transformer2DModel(
        20,
        64,
        in_channels=1280,
        num_layers=10,
        cross_attention_dim=2048,
        use_linear_projection=True,
    )
    block.requires_grad_(False).eval()
    for parameter in block.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
    replace_linears(block, make) if make else None
    matrices = adapted(block.to(dtype))
    g = torch.Generator().manual_seed(2)
    x, context, along = (
        torch.randn(shape, generator=g)
        for shape in ((1, 1280, 16, 16), (1, 77, 2048), (1, 1280, 16, 16))
    )
    answer = block(x.to(dtype), context.to(dtype), return_dict=False)[0].float()
    grads = torch.autograd.grad((answer * along).mean() * 2.0**16, matrices)
    return answer.detach(), synthetic.flattened(grads)


@contextlib.contextmanager
def random_unet_with(make) -> Iterator[None]:
    """Inside, synthetic's UNets have `make`'s layers in their Linears' place; None: as they are."""
    whole = synthetic.random_unet

    def unet(*args, **kwargs):
        unet = whole(*args, **kwargs)
        replace_linears(unet, make) if make else None
        return unet

    synthetic.random_unet = unet
    try:
        yield
    finally:
        synthetic.random_unet = whole


def full_size(dtype: torch.dtype, make, device: str = "cuda", tiny: bool = False):
    """The same of full-size SDXL, its random weights rounded to fp16 in every way: four random
    pictures at 512 px in one pass of loop.micro_step(), without fused layers.
    """
    options = bench.Options(command="ladder", device=device, tiny=tiny)
    precision = next(name for name, known in model.DTYPES.items() if known == dtype)
    config = bench.changed(options, 64 if tiny else 512, "4x1", precision)
    config = dataclasses.replace(config, fused=False, cuda_graph=False)
    with random_unet_with(make):
        run, _ = synthetic.assemble(config, torch.device(device), options.folder, torch.float16)
    synthetic.leave_zero(run)
    batch = run.examples.batch(range(4), run.unet.device)
    run.scale_on_device.fill_(2.0**16 / 4)  # as LossScale begins in fp16
    run.micro_step(run, batch)
    with torch.no_grad():
        answer = model.predict(run.unet, batch["noise"], batch).cpu()
    return answer, synthetic.gradient(run)


def gradients(works=(whole_unet, full_width)) -> dict:
    """Relative distance from fp32's, and 1 - cosine."""
    results = {}
    for work in works:
        reference, rows = None, {}
        for name, (dtype, make) in WAYS.items():
            found = work(dtype, make)
            model.free_memory()
            if reference is None:
                reference = found
                continue
            cosine = nn.functional.cosine_similarity(
                found[1].double(), reference[1].double(), dim=0
            )
            off = [
                ((a - b).norm() / b.norm()).item() for a, b in zip(found, reference, strict=True)
            ]
            rows[name] = {
                "output_off": float(f"{off[0]:.3g}"),
                "gradient_off": float(f"{off[1]:.3g}"),
                "one_minus_cosine": float(f"{1 - cosine:.3g}"),
            }
            print(work.__name__, name, rows[name], flush=True)
        results[work.__name__] = {"of": " ".join(work.__doc__.split()), "rows": rows}
    return results


# ---- whether the adapter learns as well ----------------------------------------------------------


def one_run(way: str, argv: list[str]) -> int:
    """loop.py with the UNet's Linears replaced after loading."""
    load, make = model.load_unet, {"int8": Int8Linear, "fp32": None}[way]

    def changed(*args):
        unet = load(*args)
        replace_linears(unet, make) if make else None
        return unet

    model.load_unet = changed
    return training.main(argv)


def train(steps: int, seeds: tuple[int, ...], work: Path) -> dict:
    """The recipe pocket, cut short, by the same seeds; both adapters are drawn on the fp32 base, as
    an adapter is used, and measured as benchmarks/pocket.py does.
    """
    from benchmarks import pocket

    heldout = json.loads((ROOT / "pocket" / "heldout.json").read_text())
    scratch, rows = Path(tempfile.mkdtemp()), {}
    for way in ("fp32", "int8"):
        runs = []
        for seed in seeds:
            out = scratch / f"{way}{seed}"
            words = ["pocket", "--max-train-steps", str(steps), "--no-fused", "--seed", str(seed)]
            words += ["--cache-dir", str(scratch / "cache"), "--output-dir", str(out)]
            pocket.command("-m", "benchmarks.int8", "child", way, *words, "--validation-prompts")
            lines = (out / "log.jsonl").read_text().splitlines()
            last = [json.loads(line)["loss"] for line in lines][-steps // 3 :]
            drawn = pocket.draw(out, str(POCKET), heldout["measured"], out / "drawn", 1.0, [seed])
            runs.append(pocket.figures(drawn, heldout["measured"], work))
            runs[-1]["loss, last third"] = statistics.mean(last)
            print(way, seed, pocket.rounded(runs[-1]), flush=True)
        names = runs[0]
        rows[way] = {
            "mean": {n: round(float(np.mean([r[n] for r in runs])), 4) for n in names},
            "each": [{n: round(float(r[n]), 4) for n in names} for r in runs],
        }
    shutil.rmtree(scratch)
    return {"steps": steps, "seeds": seeds, "prompts": len(heldout["measured"]), "rows": rows}


# ---- how long it takes, on a GPU -----------------------------------------------------------------


def time_it() -> dict:
    """Seconds of a step of full-size SDXL, recorded, at two ways to cut it: fp16 as shipped, fp16
    without the fused layers, and int8, which has to do without them.
    """
    rows = {}
    base = configuration.RECIPES["t4"][1]
    for size in (1, 4):
        for name in ("fp16, fused", "fp16", "int8, else fp16"):
            config = dataclasses.replace(
                base,
                mixed_precision="fp16",
                fused=name.endswith("fused"),
                train_batch_size=size,
                gradient_accumulation_steps=4 // size,
                max_train_steps=10**6,
            )
            options = bench.Options(command="ladder")
            with random_unet_with(Int8Linear if name.startswith("int8") else None):
                row = bench.time_row(options, config, False, 10)
            rows[f"{size}x{4 // size}, {name}"] = row
            print(size, name, {k: v for k, v in row.items() if k != "losses"}, flush=True)
    return {"on": torch.cuda.get_device_name(), "rows": rows}


# ---- the command ---------------------------------------------------------------------------------


@dataclass
class Options:
    """int8 for the frozen Linears: what it does to gradients, to learning and to time."""

    command: tyro.conf.Positional[Literal["gradients", "full", "train", "time"]]
    # Optimizer steps of each run of "train".
    steps: Count = 150
    # Its seeds.
    seeds: Seeds = (0,)
    # Where `python -m pocket.build --stages render` left the drawings.
    work: Path = Path("runs/pocket-build")
    out: Path = Path("benchmarks/results/int8.json")


def main() -> None:
    options = asked(Options)
    work = {
        "gradients": gradients,
        "full": lambda: gradients((full_size,)) | {"on": torch.cuda.get_device_name()},
        "train": lambda: train(options.steps, options.seeds, options.work),
        "time": time_it,
    }
    began = time.perf_counter()
    result = work[options.command]() | {"torch": torch.__version__}
    result["seconds"] = round(time.perf_counter() - began)
    words = [word for word in sys.argv[1:] if "/" not in word and word not in ("--work", "--out")]
    path = ROOT / options.out
    stored = json.loads(path.read_text()) if path.is_file() else {}
    stored[" ".join(["python -m benchmarks.int8", *words])] = result
    path.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        sys.exit(one_run(sys.argv[2], sys.argv[3:]))
    main()
