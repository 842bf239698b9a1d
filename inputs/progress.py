"""How far something is: a bar of at most 60 columns on a terminal, the notebook's own in a cell,
and in a file or a pipe a plain line now and then. And what is said only without --quiet.
"""

import contextlib
import importlib
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

WIDTH, BLOCKS = 60, 4  # columns of a bar, and of its blocks at least: else they are left out
SAY = 30  # seconds between two plain lines
BAR = "{desc} {n_fmt}/{total_fmt} |{bar}| {remaining} left"
quiet = [False]  # whether only warnings, errors and the last lines are said


@contextlib.contextmanager
def quietly(on: bool) -> Iterator[None]:
    """Inside, with `on`, no bar is shown, and say() says nothing."""
    quiet[0] = on
    try:
        yield
    finally:
        quiet[0] = False


def say(line: str) -> None:
    """Print what --quiet leaves out."""
    if line and not quiet[0]:
        print(line, flush=True)


def in_kernel() -> bool:
    """Whether this is the kernel of a notebook."""
    return hasattr(getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)(), "kernel")


def show(picture: Any) -> None:
    """A PIL picture in the notebook's cell; nothing elsewhere."""
    if in_kernel() and not quiet[0]:
        importlib.import_module("IPython.display").display(picture)


def on_terminal() -> bool:
    """Whether a bar, of ours or of a library, may move its cursor there."""
    return sys.stderr.isatty() and not quiet[0]


def progress(
    items: Iterable | None,
    phase: str,
    total: int | None = None,
    done: int = 0,
    delay: float = 0.0,
    leave: bool = False,
    every: float = math.inf,
) -> Any:
    """tqdm's bar over `items`, or for None one to update(); without a terminal Lines.

    total: len(items) where it is not given; done: at the start; delay: seconds in which nothing is
    shown; leave: whether the bar stays; every: steps after which a plain line comes at the latest.
    """
    total = len(items) if total is None else total
    silent, cell = quiet[0] or bool(os.environ.get("TQDM_DISABLE")), in_kernel()
    if not (silent or cell or on_terminal()):
        return Lines(items, phase, total, done, delay, every)
    tqdm = importlib.import_module("tqdm.auto" if cell else "tqdm").tqdm
    how = {"initial": done, "delay": delay, "leave": leave, "mininterval": 1, "bar_format": BAR}
    if not cell:  # where it would be pixels
        how["ncols"] = min(WIDTH, shutil.get_terminal_size().columns)
    return tqdm(items, phase, total, disable=silent, **how)


def tell(bar: Any, phase: str, said: str, more: str = "") -> None:
    """Have a bar of progress() end with `said`, in a plain line followed by `more`."""
    room = WIDTH - len(f"{phase} {bar.total}/{bar.total} || {said}")
    bar.bar_format = f"{{desc}} {{n_fmt}}/{{total_fmt}} {'|{bar}| ' * (room >= BLOCKS)}{said}"
    bar.said = f"{said}{more}"


def clock(seconds: float) -> str:
    """0:59, 59:59, 1h00."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}" if minutes > 59 else f"{minutes}:{rest:02}"


class Lines:
    """What is used of tqdm, as plain lines: after `every` steps or SAY seconds, and at the end."""

    def __init__(self, items, phase: str, total: int, done: int, delay: float, every: float):
        self.items, self.phase, self.total, self.n = items, phase, total, done
        self.delay, self.every, self.said = delay, every, ""
        self.began = self.when = time.monotonic()
        self.at = done  # the step of the last line

    def __iter__(self) -> Iterator:
        for item in self.items:
            yield item
            self.update()

    def update(self, steps: int = 1) -> None:
        self.n, now = self.n + steps, time.monotonic()
        due = now - self.when >= SAY or self.n - self.at >= self.every or self.n == self.total
        if due and now - self.began >= self.delay:
            said = self.said or f"in {clock(now - self.began)}"
            print(f"{self.phase} {self.n}/{self.total} {said}", file=sys.stderr, flush=True)
            self.when, self.at = now, self.n

    def close(self) -> None:
        """Nothing is left to do: each line is whole."""

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()
