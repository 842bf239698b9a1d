"""The whole job at full size: SDXL with random weights in the Hub's folder layout, a T4's memory.

`python benchmarks/full_size.py make MODEL` writes the model (20 GB), once;
`python benchmarks/full_size.py run MODEL PHOTOS OUT` makes the runs below and OUT/full_size.json.

Runs, each a process of its own that may use 14.5 GiB of the GPU: recipe t4 in fp16 for 60 steps,
killed (SIGKILL) after step 27 and started again; the same uninterrupted; recipe original for 10
steps. Then diffusers' load_lora_weights reads the adapter of t4, in both layouts, and is compared
with ours. PHOTOS is a folder of pictures with metadata.jsonl.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
CAP_GIB = 14.5
SEEN_LAST = 27  # t4 is killed once it has logged this step


def make(folder: Path) -> None:
    """SDXL base's folder with random weights: fp32 and fp16 files, as on the Hub. Tokenizers: the
    pocket's own, with 77 tokens (no CLIP vocabulary lies here), and the text encoders' end token
    set to theirs.
    """
    import diffusers
    import torch
    import transformers

    configs = ROOT / "tests" / "sdxl"
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(ROOT / "pocket" / "model" / name, folder / name)
        file = folder / name / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 77}))
    shutil.copytree(configs / "scheduler", folder / "scheduler")
    shutil.copy(configs / "model_index.json", folder)
    eos = json.loads((ROOT / "pocket/model/text_encoder/config.json").read_text())["eos_token_id"]
    torch.manual_seed(0)
    with torch.device("cuda"):
        for part, cls in (
            ("text_encoder", transformers.CLIPTextModel),
            ("text_encoder_2", transformers.CLIPTextModelWithProjection),
        ):
            config = transformers.CLIPTextConfig.from_pretrained(configs / part)
            config.eos_token_id = eos
            encoder = cls(config)
            encoder.save_pretrained(folder / part)
            encoder.half().save_pretrained(folder / part, variant="fp16")
        for part, cls in (
            ("vae", diffusers.AutoencoderKL),
            ("unet", diffusers.UNet2DConditionModel),
        ):
            module = cls.from_config(cls.load_config(configs / part))
            module.save_pretrained(folder / part, max_shard_size="20GB")
            module.half().save_pretrained(folder / part, variant="fp16", max_shard_size="20GB")


def child(report: Path, argv: list[str]) -> int:
    """One run of loop.py under the cap; writes what the process took to `report`."""
    import torch

    import loop
    import model

    torch.cuda.set_per_process_memory_fraction(
        CAP_GIB * 2**30 / torch.cuda.get_device_properties(0).total_memory
    )
    with model.HostMemory() as host:
        code = loop.main(argv)
    report.write_text(
        json.dumps(
            {
                "exit": code,
                "gpu_peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
                "gpu_peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
                "host_peak_own_gib": round(host.own, 2),
                "host_peak_mapped_gib": round(host.mapped, 2),
            }
        )
    )
    return code


def start(out: Path, name: str, argv: list[str]) -> subprocess.Popen:
    """One child; what it says goes to OUT/NAME.log, what it took to OUT/NAME.json."""
    print("+ loop.py", " ".join(argv), flush=True)
    command = [sys.executable, __file__, "child", str(out / f"{name}.json"), *argv]
    with open(out / f"{name}.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def said(out: Path, name: str) -> list[str]:
    """The lines with which a run began."""
    lines = (out / f"{name}.log").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("recipe "))
    return lines[first : first + 5]


def measured(out: Path) -> dict:
    """What the run's own log says."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if line["step"] > 3]
    return {
        "steps": [lines[0]["step"], lines[-1]["step"], len(lines)],
        "seconds_per_step_median": round(statistics.median(seconds), 3),
        "training_peak_gib": round(max(line["gib"] for line in lines), 2),
        "loss_first_last": [lines[0]["loss"], lines[-1]["loss"]],
        "loss_scale_last": lines[-1]["loss_scale"],
    }


def run(folder: Path, photos: Path, out: Path) -> None:
    import torch

    common = f"--pretrained-model-name-or-path {folder} --dataset-name {photos}".split()
    common += ["--cache-dir", str(out / "cache")]
    results = {"command": "python benchmarks/full_size.py run MODEL PHOTOS OUT", "cap_gib": CAP_GIB}
    results["gpu"], results["torch"] = torch.cuda.get_device_name(), torch.__version__
    steps = "--mixed-precision fp16 --max-train-steps 60 --checkpointing-steps 20".split()
    t4 = ["t4", *common, *steps]
    original = ["original", *common, *"--max-train-steps 10 --num-inference-steps 10".split()]
    original += ["--validation-prompts", "a dog on a beach"]

    process = start(out, "t4_killed", [*t4, "--output-dir", str(out / "t4")])
    log, began = out / "t4" / "log.jsonl", time.time()
    while process.poll() is None:
        if log.is_file() and len(log.read_text().splitlines()) >= SEEN_LAST:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    wall = round(time.time() - began, 1)
    results["t4_killed"] = {"exit": process.returncode, "wall_s": wall} | measured(out / "t4")
    results["t4_killed"]["said"] = said(out, "t4_killed")
    for name, argv in (
        ("t4", t4),
        ("t4_uninterrupted", [*t4, "--validation-prompts"]),
        ("original", original),
    ):
        began = time.time()
        start(out, name, [*argv, "--output-dir", str(out / name)]).wait()
        results[name] = {"wall_s": round(time.time() - began, 1)}
        results[name] |= json.loads((out / f"{name}.json").read_text()) | measured(out / name)
        results[name]["said"] = said(out, name)
        (out / "full_size.json").write_text(json.dumps(results, indent=1))
    results["resumed_against_uninterrupted"] = compare(out / "t4", out / "t4_uninterrupted")
    results["load_lora_weights"] = check(folder, out / "t4")
    (out / "full_size.json").write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))


def compare(one: Path, other: Path) -> dict:
    """How far two runs' adapters lie apart, against how far training moved B from zero."""
    import torch

    import lora

    pairs = [lora.read(folder).matrices for folder in (one, other)]
    a, b = (torch.cat([m["B"].flatten() for m in matrices.values()]) for matrices in pairs)
    same = (one / lora.FILE_NAME).read_bytes() == (other / lora.FILE_NAME).read_bytes()
    return {"bytes_equal": same, "difference_over_moved": ((a - b).norm() / b.norm()).item()}


def check(folder: Path, run_folder: Path) -> dict:
    """diffusers' load_lora_weights on both files against ours: UNet outputs in fp16 on one random
    batch.
    """
    import diffusers
    import torch

    import lora
    import model

    torch.manual_seed(1)
    device, dtype = torch.device("cuda"), torch.float16
    batch = {
        "t": torch.tensor([500], device=device),
        "context": torch.randn(1, 77, 2048, device=device),
        "pooled": torch.randn(1, 1280, device=device),
        "time_ids": torch.tensor([[683.0, 1024, 0, 128, 512, 512]], device=device),
    }
    x = torch.randn(1, 4, 64, 64, device=device)
    unet = model.load_unet(str(folder), device, dtype)
    adapter = lora.inject(unet, lora.TARGETS, 16, 32)
    file = lora.load(adapter, run_folder)
    with torch.no_grad():
        ours = model.predict(unet, x, batch)
        lora.set_strength(adapter, 0)
        bare = model.predict(unet, x, batch)
    results = {"trainable": adapter.trainable, "header_steps": file.about["steps"]}
    results["adapter_moves_output_by"] = ((ours - bare).norm() / bare.norm()).item()
    del unet, adapter
    for layout, path in (("peft", run_folder), ("kohya", run_folder / "kohya" / "t4.safetensors")):
        pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
            folder, torch_dtype=dtype, variant="fp16"
        )
        pipe.load_lora_weights(path)
        pipe.unet.to(device)
        theirs = [p for name, p in pipe.unet.named_parameters() if "lora_" in name]
        with torch.no_grad():
            off = (model.predict(pipe.unet, x, batch) - ours).norm() / ours.norm()
        results[layout] = {
            "parameters": sum(p.numel() for p in theirs),
            "relative_difference": off.item(),
        }
        del pipe
        model.free_memory()
    return results


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    elif sys.argv[1] == "child":
        sys.exit(child(Path(sys.argv[2]), sys.argv[3:]))
    else:
        Path(sys.argv[4]).mkdir(parents=True, exist_ok=True)
        run(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
