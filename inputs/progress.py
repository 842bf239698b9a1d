"""How far something is: a bar of at most 60 columns on a terminal, the notebook's own in a cell,
and in a file or a pipe a plain line now and then. And what is said only without --quiet.
"""

import math
import os
import sys
import time
from shutil import get_terminal_size

from tqdm import tqdm

# Columns of a bar, and of its blocks at least, else they are left out; seconds between two lines.
WIDTH, BLOCKS, SAY = 60, 4, 30
BAR = "{desc} {n_fmt}/{total_fmt} |{bar}| {remaining} left"
quiet = [False]  # whether only warnings, errors and the last lines are said: --quiet


def say(line: str) -> None:
    """Print what --quiet leaves out."""
    if line and not quiet[0]:
        print(line, flush=True)


def in_kernel() -> bool:
    """Whether this is the kernel of a notebook."""
    return hasattr(getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)(), "kernel")


def show(picture) -> None:
    """A PIL picture in the notebook's cell; nothing elsewhere."""
    if in_kernel() and not quiet[0]:
        from IPython.display import display

        display(picture)


def on_terminal() -> bool:
    """Whether a bar, of ours or of a library, may move its cursor there."""
    return sys.stderr.isatty() and not quiet[0]


def progress(items, phase: str, total=None, done=0, delay=0.0, leave=False, every=math.inf) -> tqdm:
    """tqdm's bar over `items`, or for None one to update(); without a terminal Lines.

    total: len(items) where it is not given; done: at the start; delay: seconds in which nothing is
    shown; leave: whether the bar stays; every: steps after which a plain line comes at the latest.
    """
    what = (items, phase, len(items) if total is None else total)
    silent = quiet[0] or bool(os.environ.get("TQDM_DISABLE"))
    how = {"initial": done, "delay": delay, "leave": leave, "mininterval": 1, "bar_format": BAR}
    if in_kernel():
        from tqdm.auto import tqdm as in_cell

        return in_cell(*what, disable=silent, **how)
    if silent or on_terminal():
        size = get_terminal_size()  # of a terminal that does not know its own: the usual one
        how |= {"ncols": min(WIDTH, size.columns), "nrows": size.lines}
        return tqdm(*what, disable=silent, **how)
    return Lines(*what, done, delay, every)


def tell(bar: tqdm, said: str, more: str = "") -> None:
    """Have a bar of progress() end with `said`, in a plain line followed by `more`."""
    head = f"{getattr(bar, 'desc', '')} {bar.total}/{bar.total}"  # one that is off has no desc
    blocks = "|{bar}| " * (WIDTH - len(f"{head} || {said}") >= BLOCKS)
    bar.bar_format, bar.said = f"{{desc}} {{n_fmt}}/{{total_fmt}} {blocks}{said}", f"{said}{more}"


def clock(seconds: float) -> str:
    """0:59, 59:59, 1h00."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}" if minutes > 59 else f"{minutes}:{rest:02}"


class Lines(tqdm):
    """A bar that is switched off, with plain lines in its place: after `every` steps or SAY
    seconds, and at the end.
    """

    def __init__(self, items, phase: str, total: int, done: int, delay: float, every: float):
        super().__init__(items, total=total, initial=done, disable=True)
        self.phase, self.delay, self.every, self.said, self.at = phase, delay, every, "", done
        self.began = self.when = time.monotonic()

    def __iter__(self):
        for item in self.iterable:
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        self.n, now = self.n + n, time.monotonic()
        due = now - self.when >= SAY or self.n - self.at >= self.every or self.n == self.total
        if due and now - self.began >= self.delay:
            said = self.said or f"in {clock(now - self.began)}"
            print(f"{self.phase} {self.n}/{self.total} {said}", file=sys.stderr, flush=True)
            self.when, self.at = now, self.n
