"""What a run says, and how it hears signals. Deleting any of it changes no number of the run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
from pathlib import Path

import torch
from tqdm import tqdm

import model
from inputs.files import write_whole
from inputs.hub import fetch
from inputs.options import Config
from inputs.sources import Picture
from loop import Run


class Log:
    """A progress bar, one JSON line and one set of TensorBoard scalars for each step; nothing of
    it in a process that does not speak for the run.
    """

    def __init__(self, out: Path, start: int, config: Config, speaks: bool = True):
        self.board, self.hook = None, threading.excepthook
        self.also: dict[str, str] = {}  # what every line of log.jsonl says besides
        if not speaks:
            self.file, self.bar = open(os.devnull, "w"), tqdm(disable=True)
            return
        path = out / "log.jsonl"
        old = path.read_text(errors="replace").splitlines() if path.is_file() else []
        # Steps that a killed run did after its last checkpoint are done again, not said twice.
        kept = [line for line in old if step_of(line) <= start]
        write_whole(path, "".join(line + "\n" for line in kept).encode())
        self.file = open(path, "a")
        self.bar = tqdm(total=config.max_train_steps, initial=start, desc="training", mininterval=1)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
            threading.excepthook = self._in_a_thread

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_) -> None:
        threading.excepthook = self.hook
        self.bar.close()
        self.file.close()
        if self.board:
            self.board.close()

    def _in_a_thread(self, what) -> None:
        """No traceback of a full disk from TensorBoard's thread: the next write raises it again."""
        if not isinstance(what.exc_value, OSError):
            self.hook(what)

    def write(self, run: Run, loss: float, norm: float, rate: float, seconds: float) -> None:
        scale = run.loss_scale
        values = {
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "loss_scale": scale.value,
            "skipped": scale.skipped,
            "seconds": seconds,
            "gib": peak_gib(run.unet.device),
        }
        sayable = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no Inf
        print(json.dumps({"step": run.step} | sayable | self.also), file=self.file, flush=True)
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, run.step)
        skipped = f", {scale.skipped} skipped" if scale.skipped else ""
        if not math.isfinite(norm):
            tqdm.write(
                f"step {run.step} is skipped ({scale.skipped} so far): its gradient overflowed "
                f"in fp16; the loss scale is now {scale.value:g}"
            )
        self.bar.set_postfix_str(
            f"loss {loss:.4f}, lr {rate:.1e}, {seconds:.2f} s/step, {values['gib']:.1f} "
            f"GiB{skipped}"
        )
        self.bar.update()


def step_of(line: str) -> float:
    """The step that a line of log.jsonl tells of; inf where a killed run cut it short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return math.inf


class Interrupts:
    """Ctrl-C and SIGTERM. While `gently` is set they let the step finish, else they leave at once:
    nothing is lost, since encoded blocks and checkpoints are whole. A second one leaves anyway.
    """

    def __init__(self):
        self.gently, self.caught, self.raised = False, 0, False

    def __enter__(self):
        self.old = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, _, error, __):
        for number, handler in self.old.items():
            signal.signal(number, handler)
        # A library that is interrupted within its own C code may answer with an error of its own.
        if self.raised and isinstance(error, Exception):
            raise KeyboardInterrupt(self.caught) from error

    def _handle(self, number, _frame):
        second_time, self.caught = bool(self.caught), number
        if not self.gently or second_time:
            self.raised = True
            raise KeyboardInterrupt(number)


def peak_gib(device: torch.device) -> float:
    """GiB: the GPU's peak, or on a CPU this process's own memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return process_gib("RssAnon")


def parameter_count(parameter: torch.nn.Parameter) -> int:
    """How many numbers it stands for: bitsandbytes packs two 4-bit ones in a byte."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state else parameter.numel()


def describe(kept, pictures: list[Picture], how: str, host: HostMemory) -> str:
    """The lines a run begins with; every number is computed."""
    run, team = kept.run, kept.team
    config, n = run.config, run.config.examples_per_step
    learning = sum(matrix.numel() for matrix in run.trained.values())
    frozen = (each for each in run.unet.parameters() if not each.requires_grad)
    total = learning + sum(parameter_count(each) for each in frozen)
    names = [p.name for p in pictures if not p.caption.strip()]
    bare = f"{len(names)} missing or empty" + (f" (the first: {names[0]})" if names else "")
    cut = count_cut(
        [p.caption for p in pictures if p.caption.strip()], config.pretrained_model_name_or_path
    )
    device = (
        torch.cuda.get_device_name(run.unet.device) if run.unet.device.type == "cuda" else "CPU"
    )
    several = f", shared by {team.size} processes" if team.size > 1 else ""
    if team.size > n:
        several += f", of which {team.size - n} have no example: GPUS={n} would do as well"
    how += "; deterministic kernels" if config.deterministic else ""
    nf4 = ", its Linear weights in NF4" if config.base_quantization == "nf4" else ""
    lines = (
        f"recipe {config.recipe} on {device}, UNet in {str(run.unet.dtype)[6:]}{nf4} ({how})",
        f"host memory while the UNet was loaded: {host.own:.1f} GiB own, {host.mapped:.1f} GiB "
        "mapped file pages",
        f"{len(pictures)} pictures at {config.resolution} px; captions: {bare}, "
        f"{cut} cut at the tokenizer's length",
        f"{config.max_train_steps} optimizer steps x {n} images ({config.train_batch_size} x "
        f"{config.gradient_accumulation_steps}) = "
        f"{config.max_train_steps * n / len(pictures):.1f} epochs{several}",
        f"{learning:,} trainable parameters of {total:,} "
        f"({100 * learning / total:.2f} %) in {len(run.adapter.layers)} layers",
    )
    return "\n".join(lines)


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


def count_cut(prompts: list[str], name: str) -> int:
    """How many prompts are longer than the tokenizer's model_max_length (77) and will lose their
    end.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        # A token has a byte at least, and two mark the ends: most need not be counted.
        about = json.loads((fetch(name, "tokenizer") / "tokenizer_config.json").read_text())
        short = about["model_max_length"] - 2
        prompts = [p for p in prompts if not p.isascii() or len(p) > short]
    if not prompts:
        return 0
    tokenizer = model.load_tokenizers(name)[0]  # both cut at one length
    ids = tokenizer(prompts, truncation=False, verbose=False).input_ids
    return sum(len(tokens) > tokenizer.model_max_length for tokens in ids)
