"""plan.py's prediction against the GPU: two optimizer steps of SDXL's UNet with random weights.

`python benchmarks/memory_check.py predict PREDICTED.json` (CPU, minutes) writes what plan.py
counts for each of CASES; `python benchmarks/memory_check.py measure PREDICTED.json OUT.json` (GPU)
runs them through loop.py's own optimizer_step() and compares. The reserve is fitted on the two
FITTED cases alone; the others say how good the prediction is. `--tiny` does both with a UNet of a
million parameters on the CPU, whose tensors are then counted by the same mode.
"""

import contextlib
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402

import loop  # noqa: E402
import lora  # noqa: E402
import model  # noqa: E402
from benchmarks import synthetic  # noqa: E402
from fast import nf4, plan  # noqa: E402
from inputs.options import RECIPES, Config  # noqa: E402
from inputs.vetting import SDXL_UNET  # noqa: E402
from keep import faster  # noqa: E402

GIB = 2**30
# Some of the blocks that are cheapest to recompute for what they keep.
SOME = ("mid_block.attentions.0", *(f"up_blocks.0.attentions.{i}" for i in range(3)))
SOME_TINY = ("mid_block.attentions.0",)


@dataclass(frozen=True)
class Case:
    """cap_gib: what torch may use. cuDNN takes workspaces for fp32 as large as it is let (20 GiB
    were seen), so that fp32 is measured within a T4's memory."""

    dtype: str
    resolution: int
    batch: int
    checkpointing: str = "none"  # none, some or all
    rank: int = 16
    fused: bool = True
    cuda_graph: bool = True
    cap_gib: float = 0.0
    nf4: bool = False

    def config(self, tiny: bool) -> Config:
        some = SOME_TINY if tiny else SOME
        return replace(
            RECIPES["t4"][1],
            resolution=(self.resolution // 8 if tiny else self.resolution,),
            train_batch_size=self.batch,
            gradient_accumulation_steps=2,
            lora_rank=self.rank,
            fused=self.fused,
            cuda_graph=self.cuda_graph,
            gradient_checkpointing=self.checkpointing != "none",
            checkpointed_blocks=some if self.checkpointing == "some" else (),
            use_8bit_adam=True,
            base_quantization="nf4" if self.nf4 else "none",
        )


FITTED = (0, 19)  # in CASES: the lightest with a base as it is, and with one in 4 bits
CASES = [
    Case("fp16", 512, 1),
    Case("fp16", 1024, 1, "all"),
    Case("fp16", 512, 1, fused=False, cuda_graph=False),
    Case("fp16", 512, 1, "all", fused=False, cuda_graph=False),
    Case("fp16", 512, 4),
    Case("fp16", 512, 2, "some"),
    Case("fp16", 768, 1),
    Case("fp16", 768, 2, "all"),
    Case("fp16", 1024, 1),
    Case("fp16", 1024, 1, "some"),
    Case("fp16", 1024, 2, "some", cuda_graph=False),
    Case("fp16", 512, 4, "all", rank=64),
    Case("bf16", 512, 1, rank=4),
    Case("bf16", 1024, 1, rank=64, fused=False),
    Case("bf16", 768, 4, "some"),
    Case("bf16", 1024, 4, "all"),
    Case("fp32", 512, 1, "all", fused=False, cuda_graph=False, cap_gib=14.5),
    Case("fp32", 512, 1, "none", cap_gib=14.5),
    Case("fp32", 768, 1, "all", cap_gib=14.5),
    Case("fp16", 512, 1, "all", nf4=True),
    Case("fp16", 512, 4, "all", nf4=True),
    Case("fp16", 1024, 1, "all", nf4=True),
]


def unet_config(tiny: bool) -> dict:
    if tiny:
        from conftest import TINY

        return TINY
    return SDXL_UNET


def predict(out: Path, tiny: bool) -> None:
    """What plan.py counts for each case, its reserve left out, in bytes."""
    rehearsals, rows = {}, []
    for case in CASES:
        config, dtype = case.config(tiny), model.DTYPES[case.dtype]
        same = (case.dtype, case.rank, case.fused, case.nf4)
        if same not in rehearsals:
            rehearsals.clear()
            rehearsals[same] = plan.Rehearsal(config, dtype, unet_config(tiny))
        began = time.perf_counter()
        found = rehearsals[same].predict(config)
        rows.append({"case": asdict(case), "parts": found.parts, "flop": found.work["flop"]})
        rows[-1]["counted"] = found.peak - plan.RESERVE
        seconds = time.perf_counter() - began
        print(f"{found.peak / GIB:6.2f} GiB, {seconds:4.1f} s: {case}", flush=True)
    out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


class Batches:
    """Stands in for data.Examples and its source: the same random batch whatever is asked for."""

    def __init__(self, config: Config, unet: UNet2DConditionModel, device: torch.device):
        self.made = {}
        for name, empty in plan.fake_batch(config, unet).items():
            values = (
                torch.randint(0, 1000, empty.shape) if name == "t" else torch.randn(empty.shape)
            )
            self.made[name] = values.to(device)
        self.source = self

    def prompt(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.made["context"][0], self.made["pooled"][0]

    def batch(self, numbers: range, device: torch.device, _) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.made.items()}


def set_up(config: Config, unet, device: torch.device) -> loop.Run:
    """What keep.training.set_up() does, without data, files and checkpoints."""
    schedule = model.NoiseSchedule(torch.linspace(0.99, 0.01, 1000, device=device), "epsilon")
    examples = Batches(config, unet, device)
    model.use_attention(unet, config.attention, device, unet.dtype)
    run = loop.assemble(config, unet, examples, schedule, (0.13025, 0.0))
    faster.faster(run, faster.Alone(), print)
    return run


def in_four_bits(unet: UNet2DConditionModel) -> None:
    """The Linears of `unet` as an NF4 base has them, in place."""
    for name, layer in list(unet.named_modules()):
        if isinstance(layer, torch.nn.Linear) and not name.startswith(nf4.WHOLE):
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, synthetic.four_bits(layer))


def bare(unet, adapter: lora.Adapter, processors: dict) -> None:
    """The UNet as it was before set_up()."""
    for name, layer in adapter.layers.items():
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, layer.base)
    for name, module in unet.named_modules():
        if name in processors:
            module.processor = processors[name]
        module.__dict__.pop("forward", None)
    unet.disable_gradient_checkpointing()


def measure_case(case, config, unet, processors, device, live) -> dict:
    """Two optimizer steps, and a third that is timed: peak bytes and seconds."""
    on_gpu = device.type == "cuda"
    gc.collect()
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        share = case.cap_gib * GIB / total if case.cap_gib else 1.0
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        live.start()
    run = set_up(config, unet, device)
    try:
        for _ in range(2):
            loss, norm = loop.optimizer_step(run)
        peak = torch.cuda.max_memory_allocated() if on_gpu else live.peak
        reserved = torch.cuda.max_memory_reserved() if on_gpu else live.peak
        began = time.perf_counter()
        loop.optimizer_step(run)
        seconds = time.perf_counter() - began
    finally:
        bare(unet, run.adapter, processors)
    recorded = getattr(run.micro_step, "eager", None) is False
    return {
        "measured": peak,
        "reserved": reserved,
        "seconds_per_step": round(seconds, 4),
        "recorded": recorded,
        "loss": loss,
        "grad_norm": norm,
    }


def measure(predicted: Path, out: Path, tiny: bool) -> None:
    device = torch.device("cpu" if tiny else "cuda")
    rows, unets = json.loads(predicted.read_text())["rows"], {}
    live = plan.Live() if tiny else contextlib.nullcontext()
    results = {
        "command": "python benchmarks/memory_check.py measure PREDICTED.json OUT.json",
        "gpu": "none" if tiny else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": rows,
    }
    with live:
        for row in rows:
            case = Case(**row["case"])
            kind = (case.dtype, case.nf4)
            if kind not in unets:
                unets.clear()
                gc.collect()
                with device:
                    unet = UNet2DConditionModel.from_config(unet_config(tiny))
                torch.nn.Module.to(unet, model.DTYPES[case.dtype])  # diffusers' own to() warns
                if case.nf4:
                    in_four_bits(unet.requires_grad_(False))
                named = unet.requires_grad_(False).eval().named_modules()
                found = {n: m.processor for n, m in named if type(m).__name__ == "Attention"}
                unets[kind] = (unet, found)
                del unet, named
            try:
                row |= measure_case(case, case.config(tiny), *unets[kind], device, live)
            except Exception as error:  # the others are still worth their time
                row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                print(row["error"], case, flush=True)
            judge(results)
            out.write_text(json.dumps(results, indent=1))
            print(f"{row.get('measured', 0) / GIB:6.2f} GiB: {case}", flush=True)
    print(json.dumps({k: v for k, v in results.items() if k != "rows"}, indent=1))


def judge(results: dict) -> None:
    """The reserve that the FITTED cases ask for, and with it every case's error in per cent."""
    rows = results["rows"]
    over = [rows[i]["measured"] - rows[i]["counted"] for i in FITTED if "measured" in rows[i]]
    reserve = sum(over) / len(over) if over else plan.RESERVE
    largest = 0.0
    for i, row in enumerate(rows):
        if "measured" not in row:
            continue
        row["gib_counted"] = round(row["counted"] / GIB, 3)
        row["gib_measured"] = round(row["measured"] / GIB, 3)
        row["gib_reserved"] = round(row["reserved"] / GIB, 3)
        row["error_percent"] = round(100 * ((row["counted"] + reserve) / row["measured"] - 1), 2)
        row["error_percent_as_shipped"] = round(
            100 * ((row["counted"] + plan.RESERVE) / row["measured"] - 1), 2
        )
        if i not in FITTED:
            largest = max(largest, abs(row["error_percent"]))
    results["fitted_on"] = list(FITTED)
    results["reserve_fitted_gib"] = round(reserve / GIB, 4)
    results["reserve_shipped_gib"] = round(plan.RESERVE / GIB, 4)
    results["largest_error_percent_of_the_others"] = largest
    results["others"] = sum("measured" in r for i, r in enumerate(rows) if i not in FITTED)


if __name__ == "__main__":
    tiny = "--tiny" in sys.argv
    command, *paths = [arg for arg in sys.argv[1:] if arg != "--tiny"] or [""]
    if len(paths) < 1 + (command == "measure"):
        sys.exit(__doc__)
    if command == "predict":
        predict(Path(paths[0]), tiny)
    elif command != "measure":
        sys.exit(f"error: {command}; expected predict or measure. What to do: see the top of here")
    else:
        measure(Path(paths[0]), Path(paths[1]), tiny)
