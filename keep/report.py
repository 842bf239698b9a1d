"""What a run says, and how it hears signals. Deleting any of it changes no number of the run."""

import collections
import contextlib
import functools
import json
import math
import os
import shlex
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from tqdm.std import EMA

import model
from inputs.files import sayable, write_whole
from inputs.hub import fetch, read_config
from inputs.options import Config
from inputs.pictures import changes, table_of_sizes
from inputs.progress import clock, progress, show, tell
from inputs.sources import Pictures, named
from keep.export import files_of
from loop import Run, learning_rate
from see import page
from see.preview import in_words

SPILL = (
    "On Windows and WSL the driver moves what does not fit into the host's memory without a word, "
    "and steps take many times as long; on Linux another program shares this GPU, or heat holds it "
    "back (nvidia-smi shows both). What to do: close what else uses this GPU, or "
)


class Log:
    """A bar or plain lines, one JSON line and one set of TensorBoard scalars for each step; a JSON
    line in events.jsonl for what is said and what takes time beside the steps; nothing of it in a
    process that does not speak for the run.
    """

    def __init__(self, config: Config, start: int, speaks: bool = True, code_changes: str = ""):
        self.board, self.hook, self.watch = None, threading.excepthook, Watch(config)
        self.also = {"code_changes": code_changes} if code_changes else {}  # in every line
        self.config, self.step, self.speaks = config, start, speaks
        # Of some 50 losses, since timesteps differ more than steps; of 10 times, which change. Both
        # are corrected for their start, as TensorBoard's smoothing is.
        self.steps, self.loss, self.seconds = config.max_train_steps, EMA(0.02), EMA(0.1)
        if not speaks:
            self.file, self.events = open(os.devnull, "w"), open(os.devnull, "wb", 0)
            self.bar = tqdm(disable=True)
            return
        self.file = open(going_on(config.out / page.LOG, start), "a")
        self.events = open(going_on(config.out / page.EVENTS, start), "ab", 0)
        self.bar = progress(None, "training", config.max_train_steps, start, leave=True, every=50)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(config.out / "tensorboard"), purge_step=start + 1)
            threading.excepthook = self._in_a_thread

    def __enter__(self):
        return self

    def __exit__(self, _, error, __) -> None:
        threading.excepthook = self.hook
        if isinstance(error, Exception):
            self.event(self.step, said=f"the run ended: {in_words(error)}")
            write_page(self.config, self.speaks)
        self.bar.close()
        self.file.close()
        self.events.close()
        if self.board:
            self.board.close()

    def _in_a_thread(self, what) -> None:
        """No traceback of a full disk from TensorBoard's thread: the next write raises it again."""
        if not isinstance(what.exc_value, OSError):
            self.hook(what)

    def write(self, run: Run, loss: float, norm: float, rate: float, seconds: float) -> None:
        scale, device = run.loss_scale, run.loss_sum.device
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
        values = {"loss": loss, "lr": rate, "grad_norm": norm, "loss_scale": scale.value}
        values |= {"skipped": scale.skipped, "seconds": seconds, "gib": peak}
        told = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no Inf
        print(json.dumps({"step": run.step} | told | self.also), file=self.file, flush=True)
        self.step = run.step
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, run.step)
        if not math.isfinite(norm):
            tqdm.write(
                f"step {run.step} is skipped ({scale.skipped} so far): its gradient overflowed "
                f"in fp16; the loss scale is now {scale.value:g}"
            )
        if device.type == "cuda":
            for warning in self.watch.after(run.step, seconds, device):
                self.say(run.step, warning)
        each = self.seconds(seconds)
        said = f"loss {self.loss(loss):.3f} {each:.2f} s/step "
        said += f"{clock((self.steps - run.step) * each)} left" + f" {peak:.1f} GiB" * bool(peak)
        tell(self.bar, said, f" lr {rate:.1e}" + f" {scale.skipped} skipped" * scale.enabled)
        self.bar.update()

    def event(self, step: int, **told) -> None:
        """Note what is not of a step, for the run's page; for its sake no run ends."""
        with contextlib.suppress(OSError):  # a full disk, on which the log's next line ends it
            self.events.write(json.dumps({"step": step} | told).encode() + b"\n")

    def say(self, step: int, said: str) -> None:
        tqdm.write(said)
        self.event(step, said=said)

    def began(self, kept, lines: str, seconds: float) -> None:
        """Note what a start has said, how long it took, its encoding apart, and on which card."""
        step, device = kept.run.step, kept.run.unet.device
        for line in lines.splitlines():
            self.event(step, said=line)
        self.event(step, phase="encoding", seconds=kept.encoding)
        self.event(step, phase="start", seconds=seconds - kept.encoding)
        if device.type == "cuda":
            card = torch.cuda.get_device_properties(device)
            self.event(step, card=card.name, gib=card.total_memory / 2**30)

    @contextlib.contextmanager
    def timed(self, phase: str, run: Run) -> Iterator[None]:
        """Note how long something between two steps takes, unless nothing was to be done."""
        began = time.perf_counter()
        yield
        if (seconds := time.perf_counter() - began) > 0.001:
            self.event(run.step, phase=phase, seconds=seconds)

    def measured(self, name: str, value: float, step: int) -> None:
        """Hand a number that is not of every step to TensorBoard."""
        if self.board:
            self.board.add_scalar(name, value, step)

    def show(self, name: str, picture, step: int) -> None:
        """Hand a picture to the notebook's cell, and to TensorBoard where it is written."""
        show(picture)
        if self.board:
            self.board.add_image(name, np.asarray(picture), step, dataformats="HWC")


def going_on(path: Path, start: int) -> Path:
    """A file of JSON lines without those that a killed run wrote after its last checkpoint: these
    steps are done again, and are not told twice. At step 0 a run begins anew.
    """
    rows = page.read_lines(path, {}) if start else []
    kept = [f"{json.dumps(row)}\n" for row in rows if row["step"] <= start]
    write_whole(path, "".join(kept).encode())
    return path


def write_page(config: Config, first: bool = True) -> None:
    """The run's page, anew, by the first of several processes. What keeps it from being made is
    said once, and ends no run.
    """
    try:
        if first:
            page.write(config.out)
    except Exception as error:  # a full disk, or whatever it is
        say_once(config.out, f"no {page.NAME}, and the run goes on: {in_words(error)}")


@functools.cache
def say_once(out: Path, said: str) -> None:
    tqdm.write(said)


class Watch:
    """The commonest loss that nobody is told of: a driver that moves what does not fit the GPU into
    the host's memory, and a GPU that has become slow. Each is said once.
    """

    def __init__(self, config: Config):
        self.config, self.usual = config, collections.deque(maxlen=20)
        self.slow, self.slow_in_a_row, self.fullest = 0, 5, 0.95

    def after(self, step: int, seconds: float, device: torch.device) -> list[str]:
        """What to say after a step on a GPU that took so many seconds, saving not counted."""
        usual = statistics.median(self.usual) if len(self.usual) == 20 else math.inf
        self.slow = self.slow + 1 if seconds > 2 * usual else 0
        if not self.slow:  # else slowness would become usual
            self.usual.append(seconds)
        found = []
        if self.slow == self.slow_in_a_row:  # a single one is a hiccup
            found.append(f"the last {self.slow} steps took over twice the usual {usual:.2f} s")
            self.slow_in_a_row = math.inf
        if step % 20 == 0:  # 0.1 ms of the host, and it does not wait for the GPU
            free, total = (count / 2**30 for count in torch.cuda.mem_get_info(device))
            if total - free > self.fullest * total:
                found.append(f"{total - free:.1f} of the GPU's {total:.1f} GiB are in use")
                self.fullest = math.inf
        return [f"after step {step}: {each}. {SPILL}{less_memory(self.config)}" for each in found]


def less_memory(config: Config) -> str:
    """What to type so that a run takes less of the GPU's memory."""
    return (
        "add --no-memory-plan --gradient-checkpointing --train-batch-size 1 "
        f"--gradient-accumulation-steps {config.examples_per_step} (the same run continues); if "
        "that is not enough, take the recipe lowmem with another --output-dir"
    )


class Interrupts:
    """Ctrl-C, SIGTERM and, without nohup, a closed terminal. While `gently` is set they let the
    step finish, else they leave at once: nothing is lost, since encoded blocks and checkpoints are
    whole. A second one leaves anyway, but for a terminal's, which comes twice: of shell and kernel.
    """

    def __init__(self):
        self.gently, self.caught, self.raised = False, 0, False

    def __enter__(self):
        heard = {signal.SIGINT, signal.SIGTERM}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            heard.add(signal.SIGHUP)
        self.old = {s: signal.signal(s, self._handle) for s in heard}
        return self

    def __exit__(self, _, error, __):
        for number, handler in self.old.items():
            signal.signal(number, handler)
        # A library that is interrupted within its own C code may answer with an error of its own.
        if self.raised and isinstance(error, Exception):
            raise KeyboardInterrupt(self.caught) from error

    def _handle(self, number, _frame):
        second_time = bool(self.caught) and number != signal.SIGHUP
        self.caught = number
        if not self.gently or second_time:
            self.raised = True
            raise KeyboardInterrupt(number)


def describe(kept, pictures: Pictures, how: str) -> str:
    """The lines a run begins with; every number is computed. With --quiet only what is odd."""
    run, config, size = kept.run, kept.run.config, kept.team.size
    n, device = config.examples_per_step, run.unet.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    nf4 = ", its Linear weights in NF4" if config.base_quantization == "nf4" else ""
    at, used = f"{', '.join(map(str, config.resolution))} px", len(set(run.examples.sizes))
    if config.buckets:
        at += f" in {used} bucket{'s' * (used > 1)}"
    epochs = config.max_train_steps * n / pictures.cards
    cards = f" of {pictures.cards}, by their weights" if pictures.cards > len(pictures) else ""
    several = f", shared by {size} processes" if size > 1 else ""
    learning = sum(matrix.numel() for matrix in run.trained.values())
    usual = (
        f"recipe {config.recipe} on {where}, UNet in {str(run.unet.dtype)[6:]}{nf4} ({how})",
        f"{len(pictures)} pictures at {at}",
        table_of_sizes(pictures, run.examples.sizes) * (used > 1),
        f"{config.max_train_steps} optimizer steps x {n} images ({config.train_batch_size} x "
        f"{config.gradient_accumulation_steps}) = {epochs:.1f} epochs{cards}{several}",
        f"{learning:,} trainable parameters in {len(run.adapter.layers)} layers",
    )
    rare = never_shown(run)
    odd = (
        describe_captions(config, pictures),
        "; ".join(pictures.notes),
        changes(pictures, run.examples.sizes),
        f"{named(rare)} come in none of these steps: few are of their size" if rare else "",
        describe_rate(config),
    )
    return "\n".join(filter(None, odd if config.quiet else usual + odd))


def describe_captions(config: Config, pictures: Pictures) -> str:
    """How many are missing and how many will lose their end; "" with --quiet where none is."""
    bare = [p.name for p in pictures if not all(map(str.strip, p.captions))]
    first = f" (the first: {bare[0]})" if bare else ""
    cut = cut_captions([each for p in pictures for each in p.captions], config)
    more = f"; --max-tokens {config.max_tokens + 75} reads more" * (config.max_tokens < 225)
    such = f" (the first: {sayable(cut[0], 60)}{more})" if cut else ""
    if config.quiet and not (bare or cut):
        return ""
    said = f"captions: {len(bare)} missing or empty{first}, "
    return f"{said}{len(cut)} cut at the tokenizer's length{such}"


def last_lines(config: Config) -> str:
    """Where the adapter and its pictures are, and the two commands that are typed next."""
    files, picture = files_of(config), config.out / "pictures" / "before-after.png"
    told = config.out / page.NAME
    steps, epochs, out = config.max_train_steps, config.max_train_epochs, str(config.out)
    longer = f"--max-train-epochs {2 * epochs}" if epochs else f"--max-train-steps {2 * steps}"
    longer += " --no-stop-when-worse" * config.stop_when_worse
    anew = ""
    # Has the rate fallen, to go on would learn little.
    if learning_rate(steps - 1, config) < config.learning_rate and steps > config.lr_warmup_steps:
        longer += f" --lr-schedule-steps 0 --output-dir {shlex.quote(f'{out}-longer')}"
        anew = ", from the start, since the rate has fallen"
    python = Path(sys.executable)  # as it is typed here: the one of .venv, say
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else "python"
    unread = {"loha": "reads neither", "lokr": "reads neither", "dora": "reads the first alone"}
    lines = (
        f"adapter: {files['peft']}\nthe same for ComfyUI, Forge and others: {files['kohya']}",
        f"of {config.adapter} diffusers {unread.get(config.adapter)}: --as-lora R saves a LoRA, too"
        * (config.adapter in unread and not config.as_lora),
        f"pictures: {picture}" * picture.is_file(),
        f"all of it on a page: {told}" * told.is_file(),
        f"draw your own: {python} generate.py {shlex.quote(out)} --prompts 'YOUR PROMPT'",
        f"train longer{anew}: {python} loop.py --config {shlex.quote(out)} {longer}",
    )
    return "\n".join(filter(None, lines))


def never_shown(run: Run) -> list[str]:
    """The pictures that no step shows though the run has an epoch of steps: of a size that only few
    have, whose turn comes late.
    """
    decks, n = run.examples.decks, run.config.examples_per_step
    steps = min(run.config.max_train_steps, decks.count)
    if steps * n < decks.count:
        return []
    shown = {decks.picture(i) for i in range(steps * n)}
    return [name for i, name in enumerate(run.examples.names) if i not in shown]


def describe_rate(config: Config) -> str:
    """Where the learning rate is not what one would think: a warm-up that outlasts the run, and a
    run that outlasts its schedule; "" elsewhere.
    """
    steps, warmup = config.max_train_steps, config.lr_warmup_steps
    turn = max(config.schedule_steps, warmup + 1) if config.lr_scheduler != "constant" else steps
    ends = f"the learning rate ends at {learning_rate(steps - 1, config):.3g}"
    if steps < warmup:
        return f"{ends}: the run is shorter than its warm-up (--lr-warmup-steps {warmup})"
    stays = f"{ends}, where its schedule ends at step {turn} and it stays (--lr-schedule-steps)"
    return stays if turn < steps else ""


def cut_captions(captions: list[str], config: Config) -> list[str]:
    """Those that are longer than the tokenizer's chunks and will lose their end."""
    tokenizer = model.load_tokenizers(config.pretrained_model_name_or_path)[0]  # both cut alike
    return model.too_long(captions, tokenizer, config.max_tokens // 75)


def disk(config: Config, pictures: Pictures, dtype: torch.dtype) -> str:
    """What the cache will hold of captions, in words; "" where that is one chunk for a picture."""
    rows, chunks = sum(len(p.captions) for p in pictures), config.max_tokens // 75
    if not config.cache or rows * chunks == len(pictures):
        return ""
    name, parts = config.pretrained_model_name_or_path, ("text_encoder", "text_encoder_2")
    width = sum(read_config(fetch(name, part) / "config.json")["hidden_size"] for part in parts)
    tokens = chunks * model.load_tokenizers(name)[0].model_max_length
    each = tokens * width * dtype.itemsize
    told = f"{rows} captions of {len(pictures)} pictures, {each / 1e3:.0f} kB each when encoded"
    return f"{told}: {rows * each / 1e6:,.1f} MB in {config.cache_dir}"
