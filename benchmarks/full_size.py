"""The whole job at full size: SDXL with random weights in the Hub's folder layout, a T4's memory.

`python benchmarks/full_size.py make MODEL PHOTOS` writes the model's fp16 files (7 GB) and 240
pictures of random shapes, once;
`python benchmarks/full_size.py run MODEL PHOTOS OUT` makes the runs below and OUT/full_size.json;
named after OUT, only some of them, and the file keeps what it had.

Runs, each a process of its own that may use 14.5 GiB of the GPU, 50 steps each: recipe t4 in fp16,
killed (SIGKILL) after step 27 and started again; native; lowmem without its plan, and once more for
its second start; lowmem as it plans for 5.5 GiB; original; t4 uninterrupted. Where it is named,
also buckets: t4 at 512, 768 and 1024 px in buckets, 400 steps (PHOTOS are photographs of all shapes
then: 76 of https://github.com/EliSchwartz/imagenet-sample-images), and one_file: t4 from the same
model as one file of 6.9 GB, 20 steps; t4_previews, native_previews and lowmem_previews: a preview
at step 0 and after each of three saves. Then diffusers'
load_lora_weights reads the adapter of t4, in both layouts, and is compared with ours.
"""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
CAP_GIB, SMALL_GIB = 14.5, 5.5
SMALL = ("lowmem_planned",)  # of the runs below, those held to SMALL_GIB
IN_BUCKETS = "--resolution 512 768 1024 --max-train-steps 400".split()
SEEN_LAST = 27  # t4 is killed once it has logged this step


class HostMemory:
    """Samples this process's memory while a block runs. own: peak RssAnon in GiB; mapped: peak
    RssFile in GiB.

    Pages of a mapped weight file count in RSS although the kernel can drop them at any time; a host
    runs out of its memory by the first number alone. Both stay 0.0 where there is no /proc.
    """

    def __enter__(self):
        self.own = self.mapped = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _sample(self):
        while True:
            self.own = max(self.own, process_gib("RssAnon"))
            self.mapped = max(self.mapped, process_gib("RssFile"))
            if self._stop.wait(0.02):
                return


def process_gib(field: str) -> float:
    """A field of /proc/self/status in GiB; 0.0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 2**20
    return 0.0


def make(folder: Path, photos: Path) -> None:
    """SDXL base's folder with random weights, in fp16 files as on the Hub. Tokenizers: the pocket's
    own, with 77 tokens (no CLIP vocabulary lies here), and the text encoders' end token set to
    theirs.
    """
    import diffusers
    import torch
    import transformers

    configs = ROOT / "inputs" / "sdxl"
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
            cls(config).half().save_pretrained(folder / part, variant="fp16")
        vae = diffusers.AutoencoderKL.from_config(configs / "vae")
        vae.save_pretrained(folder / "vae")
        unet = diffusers.UNet2DConditionModel.from_config(configs / "unet").half()
        unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size="20GB")
    draw_pictures(photos, 240)


def write_one_file(folder: Path, path: Path) -> None:
    """The model of `folder` as one file in the original layout, in fp16."""
    sys.path.insert(0, str(ROOT / "tests"))
    from safetensors.torch import save_file

    from one_file_names import checkpoint

    save_file({name: tensor.half() for name, tensor in checkpoint(folder).items()}, path)


def draw_pictures(folder: Path, count: int) -> None:
    """`count` JPEG files of 1024 x 683 pixels, large soft shapes with grain, and their captions."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    stream, lines = np.random.default_rng(0), []
    for i in range(count):
        shapes = Image.fromarray(stream.integers(0, 256, (6, 9, 3), dtype=np.uint8))
        picture = np.asarray(shapes.resize((1024, 683), Image.Resampling.BICUBIC), np.int16)
        grain = stream.integers(-12, 13, picture.shape, dtype=np.int16)
        picture = Image.fromarray((picture + grain).clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{i:03d}.jpg", quality=90)
        lines.append(json.dumps({"file_name": f"{i:03d}.jpg", "text": f"red apple number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def child(report: Path, cap_gib: float, argv: list[str]) -> int:
    """One run of loop.py under a cap; writes what the process took to `report`."""
    import inputs.options  # noqa: F401  it sets how long idle threads spin, before torch asks
    import torch  # isort: skip
    from keep import training

    cuda = torch.cuda.is_available()  # on a CPU only this script itself is tried out
    if cuda:
        torch.cuda.set_per_process_memory_fraction(
            cap_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
        )
    with HostMemory() as host:
        code = training.main(argv)
    report.write_text(
        json.dumps(
            {
                "exit": code,
                "gpu_peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)
                if cuda
                else 0.0,
                "gpu_peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2)
                if cuda
                else 0.0,
                "host_peak_own_gib": round(host.own, 2),
                "host_peak_mapped_gib": round(host.mapped, 2),
            }
        )
    )
    return code


def start(out: Path, name: str, argv: list[str]) -> subprocess.Popen:
    """One child; what it says goes to OUT/NAME.log, what it took to OUT/NAME.json."""
    print("+ loop.py", " ".join(argv), flush=True)
    cap = str(SMALL_GIB if name in SMALL else CAP_GIB)
    command = [sys.executable, __file__, "child", str(out / f"{name}.json"), cap, *argv]
    with open(out / f"{name}.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def said(out: Path, name: str) -> list[str]:
    """What a run said, without its progress bars."""
    lines = (out / f"{name}.log").read_text().splitlines()
    lines = [line.replace(str(out), "OUT") for line in lines]
    return [line[-400:] for line in lines if line and "it/s" not in line and "s/it" not in line]


def measured(out: Path) -> dict:
    """What the run's own log says."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if line["step"] > 3]
    return {
        "steps": [lines[0]["step"], lines[-1]["step"], len(lines)],
        "seconds_per_step_median": round(statistics.median(seconds), 4),
        "training_peak_gib": round(max(line["gib"] for line in lines), 2),
        "losses": [round(line["loss"], 4) for line in lines],
        "loss_scale_last": lines[-1]["loss_scale"],
    }


def one(out: Path, name: str, argv: list[str], folder: str, kill_at: int = 0) -> dict:
    """One run, and what was measured of it. kill_at: the step after which it is killed."""
    log, began, first, kept = out / folder / "log.jsonl", time.time(), None, None
    before = log.stat().st_mtime if log.is_file() else 0
    process = start(out, name, [*argv, "--output-dir", str(out / folder)])
    while process.poll() is None:
        done = 0
        if log.is_file() and log.stat().st_mtime > before:
            done = len(log.read_text().splitlines())
            kept = done if kept is None else kept  # lines of the run that is continued
        if first is None and done > (kept or 0):
            first = round(time.time() - began, 1)
        if kill_at and done >= kill_at:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    row = {"exit": process.returncode, "wall_s": round(time.time() - began, 1)}
    row["s_from_command_to_first_step"] = first
    with contextlib.suppress(OSError, ValueError):
        row |= json.loads((out / f"{name}.json").read_text())
    with contextlib.suppress(OSError, ValueError, IndexError):
        row |= measured(out / folder)
    if name.endswith("previews"):
        row["s_from_saved_to_drawn"] = drawn_after(out / folder)
    return row | {"said": said(out, name)}


def drawn_after(out: Path) -> dict[str, float]:
    """For each saved step the seconds from its checkpoint to its preview."""
    saved = {path.parent.name: path for path in out.glob("checkpoints/*/state.sha256")}
    drawn = {path.name[:6]: path for path in out.glob("pictures/0*.png")}
    both = sorted(saved.keys() & drawn.keys())
    return {k: round(drawn[k].stat().st_mtime - saved[k].stat().st_mtime, 2) for k in both}


def run(folder: Path, photos: Path, out: Path, only: list[str]) -> None:
    import torch

    common = f"--pretrained-model-name-or-path {folder} --dataset-name {photos}".split()
    common += ["--max-train-steps", "50"]
    small = [*common, "--cache-dir", str(out / "cache-of-small")]  # it encodes in its own memory
    common += ["--cache-dir", str(out / "cache")]
    half = "--mixed-precision fp16 --checkpointing-steps 20".split()
    t4, blank, least = ["t4", *common, *half], ["--validation-prompts"], "--no-memory-plan"
    drawn = ["--validation-prompts", "a dog on a beach", "--num-inference-steps", "10"]
    shown = ["--preview-prompts", "a dog on a beach", *blank]
    one_file = out / "model.safetensors"
    from_one_file = ["--pretrained-model-name-or-path", str(one_file), "--max-train-steps", "20"]
    file, results = out / "full_size.json", {}
    if only and file.is_file():
        results = json.loads(file.read_text())
    results["command"] = "python benchmarks/full_size.py run MODEL PHOTOS OUT"
    results |= {"cap_gib": CAP_GIB, "torch": torch.__version__}
    results["gpu"] = torch.cuda.get_device_name()
    runs = (
        ("t4_killed", [*t4, *drawn], "t4", SEEN_LAST),
        ("t4", [*t4, *drawn], "t4", 0),
        ("native", ["native", *common, *half, *blank], "native", 0),
        ("lowmem", ["lowmem", *common, *half, *blank, least], "lowmem", 0),
        ("original", ["original", *common, *blank], "original", 0),
        ("lowmem_second_start", ["lowmem", *common, *half, *blank, least], "lowmem_again", 0),
        ("lowmem_planned", ["lowmem", *small, *half, *drawn], "lowmem_planned", 0),
        ("t4_uninterrupted", [*t4, *blank], "t4_uninterrupted", 0),
        ("buckets", ["t4", *common, *half, *blank, *IN_BUCKETS], "buckets", 0),
        ("one_file", ["t4", *common, *half, *blank, *from_one_file], "one_file", 0),
        ("t4_previews", ["t4", *common, *half, *shown], "t4_previews", 0),
        ("native_previews", ["native", *common, *half, *shown], "native_previews", 0),
        ("lowmem_previews", ["lowmem", *common, *half, *shown, least], "lowmem_previews", 0),
    )
    if wrong := set(only) - {name for name, *_ in runs}:
        sys.exit(f"no run is called {', '.join(wrong)}; there are {[name for name, *_ in runs]}")
    for name, argv, into, kill_at in runs:
        if name not in (only or [name for name, *_ in runs[:-5]]):
            continue
        if name == "one_file" and not one_file.is_file():
            write_one_file(folder, one_file)
        results[name] = one(out, name, argv, into, kill_at)
        if name in SMALL:
            results[name]["cap_gib"] = SMALL_GIB
        if name == "buckets":
            results[name]["by_size"] = by_size(photos, out / into)
        file.write_text(json.dumps(results, indent=1))
        print({k: v for k, v in results[name].items() if k not in ("losses", "said")}, flush=True)
    if only and not {"t4", "t4_uninterrupted"} <= set(only):
        return
    results["resumed_against_uninterrupted"] = compare(out / "t4", out / "t4_uninterrupted")
    file.write_text(json.dumps(results, indent=1))
    results["load_lora_weights"] = check(folder, out / "t4")
    file.write_text(json.dumps(results, indent=1))
    print(results["resumed_against_uninterrupted"], results["load_lora_weights"])


def by_size(photos: Path, out: Path) -> dict:
    """Of each size (width x height): its pictures, how many steps it had, and their median seconds,
    without the first two, the second of which is recorded.
    """
    import data
    from inputs.options import Config
    from inputs.pictures import upright_size
    from inputs.sources import read_dataset

    config = json.loads((out / "config.json").read_text())
    crop = data.Crop(tuple(config["resolution"]), config["buckets"], False, config["seed"])
    sizes = [crop.size(upright_size(each)) for each in read_dataset(str(photos), Config())]
    n = config["train_batch_size"] * config["gradient_accumulation_steps"]
    decks, seconds = data.Decks(sizes, n, config["seed"]), {}
    for line in (out / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        size = sizes[decks.picture(n * (row["step"] - 1))]
        seconds.setdefault(size, []).append(row["seconds"])
    return {
        f"{w} x {h}": {
            "pictures": sizes.count((h, w)),
            "steps": len(each),
            "first_s": [round(s, 2) for s in each[:2]],
            "seconds_per_step_median": round(statistics.median(each[2:]), 4) if each[2:] else None,
        }
        for (h, w), each in sorted(seconds.items(), key=lambda item: -len(item[1]))
    }


def compare(one: Path, other: Path) -> dict:
    """How far two runs' adapters lie apart, against how far training moved B from zero."""
    import torch

    import lora

    pairs = [lora.read(folder).matrices for folder in (one, other)]
    a, b = (
        torch.cat([m.flatten().float() for name, m in each.items() if name.endswith("lora_B")])
        for each in pairs
    )
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
    file = lora.read(run_folder)
    lora.load(adapter, file)
    with torch.no_grad():
        ours = model.predict(unet, x, batch)
        lora.set_strength(adapter, 0)
        bare = model.predict(unet, x, batch)
    count = sum(each.numel() for each in adapter.matrices().values())
    results = {"trainable": count, "header_steps": file.about["steps"]}
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
    if len(sys.argv) < 4 + (sys.argv[1:2] == ["run"]):
        sys.exit(__doc__)
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), Path(sys.argv[3]))
    elif sys.argv[1] == "child":
        sys.exit(child(Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]))
    else:
        Path(sys.argv[4]).mkdir(parents=True, exist_ok=True)
        run(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
