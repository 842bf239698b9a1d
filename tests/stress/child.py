"""One run in a process of its own, watched from outside: which phase it is in, and how it ended.

Forked from this process, which has imported everything, a run starts in no time. Forking is safe
while this process has one thread (torch's and bitsandbytes' OpenMP pools do not survive a fork, and
a child that asks for them hangs): the suite sets OMP_NUM_THREADS=1 before it imports torch.
"""

import contextlib
import gc
import importlib
import mmap
import os
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import data
import loop
from inputs import code
from keep import checkpoint, export, report, training

PHASES = ("starting", "caching", "stepping", "saving", "logging", "exporting", "drawing")
PARTS_OF = {  # phase: the functions that make it up
    "caching": [(data, "examples_of")],
    "stepping": [(loop, "optimizer_step")],
    "saving": [(checkpoint, "save_state")],
    "logging": [(report.Log, "write")],
    "exporting": [(export, "export"), (export, "mark_finished")],
    "drawing": [(training, "draw")],
}
PATIENCE = 300  # seconds until a run counts as hanging; one takes two


class Marks:
    """When a run entered which phase, in memory that outlives it however it dies."""

    ENTRY = struct.Struct("<Bd")

    def __init__(self):
        self.memory = mmap.mmap(-1, 1 << 16)
        self.enter(0)

    def enter(self, phase: int) -> None:
        count = struct.unpack_from("<I", self.memory)[0]
        self.ENTRY.pack_into(self.memory, 8 + self.ENTRY.size * count, phase, time.monotonic())
        struct.pack_into("<I", self.memory, 0, count + 1)  # last: a reader sees whole entries

    def entries(self) -> list[tuple[str, float]]:
        """(phase, seconds of time.monotonic()) in order."""
        count = struct.unpack_from("<I", self.memory)[0]
        rows = (self.ENTRY.unpack_from(self.memory, 8 + self.ENTRY.size * i) for i in range(count))
        return [(PHASES[phase], when) for phase, when in rows]


def mark(marks: Marks, at_entry: Callable[[str, int], None] | None = None) -> None:
    """Have the run in this process note its phases. at_entry: called with each phase and how often
    it has begun.
    """
    seen = dict.fromkeys(PHASES, 0)
    stack = ["starting"]

    def marked(function: Callable, phase: str) -> Callable:
        def call(*args, **kwargs):
            stack.append(phase)
            marks.enter(PHASES.index(phase))
            seen[phase] += 1
            if at_entry:
                at_entry(phase, seen[phase])
            try:
                return function(*args, **kwargs)
            finally:
                stack.pop()
                marks.enter(PHASES.index(stack[-1]))

        return call

    for phase, parts in PARTS_OF.items():
        for owner, name in parts:
            setattr(owner, name, marked(getattr(owner, name), phase))


@dataclass(frozen=True)
class Room:
    """The folder that a run works in. It names out/ and cache/ by relative paths, so that every
    file of it equals another run's; home/ and tmp/ should stay empty.
    """

    folder: Path

    out = property(lambda self: self.folder / "out")
    cache = property(lambda self: self.folder / "cache")

    def make(self) -> "Room":
        for name in ("out", "cache", "home", "tmp"):
            (self.folder / name).mkdir(parents=True)
        return self

    def variables(self) -> dict[str, str]:
        return {"HOME": str(self.folder / "home"), "TMPDIR": str(self.folder / "tmp")}


class Forked:
    """training.main(argv) in a fork of this process. prepare: called in the child before it. What
    the run says goes to a file beside the room.
    """

    def __init__(
        self,
        room: Room,
        argv: list[str],
        prepare: Callable[[], None] | None = None,
        at_entry: Callable[[str, int], None] | None = None,
        said: str = "txt",
    ):
        self.began, self.code, self.marks = time.monotonic(), None, Marks()
        self.said = room.folder.with_suffix(f".{said}")
        self.said.touch()
        sys.stdout.flush()
        sys.stderr.flush()
        # A pipe, since a run that is held to short files could write no long output to one.
        self.reader, self.writer = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(self.writer)
            os.set_blocking(self.reader, False)
        else:
            code = 70
            try:
                self._become(room, prepare, at_entry)
                code = training.main(argv)
            except SystemExit as leaving:  # a wrong option
                code = leaving.code
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)

    def _become(self, room: Room, prepare: Callable | None, at_entry: Callable | None) -> None:
        os.dup2(self.writer, 1)
        os.dup2(self.writer, 2)
        os.chdir(room.folder)
        os.environ.update(room.variables())
        tempfile.tempdir = None
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        mark(self.marks, at_entry)
        if prepare:
            prepare()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it lives."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            with contextlib.suppress(BlockingIOError):
                while part := os.read(self.reader, 1 << 16):
                    with open(self.said, "ab") as file:
                        file.write(part)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                os.close(self.reader)
        return self.code

    def kill(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, patience: float = PATIENCE) -> int:
        """The exit code; a run that hangs is killed and raises TimeoutError."""
        until = time.monotonic() + patience
        while self.poll() is None:
            if time.monotonic() > until:
                self.kill(signal.SIGKILL)
                while self.poll() is None:
                    time.sleep(0.002)
                raise TimeoutError(f"the run hung for {patience:.0f} s: see {self.said}")
            time.sleep(0.002)
        return self.code

    def output(self) -> str:
        return self.said.read_text(errors="replace").replace("\r", "\n")


def warm(room: Room, argv: list[str]) -> None:
    """Import whatever a run imports on its way, by asking one: its forks find it in memory."""
    reader, writer = os.pipe()
    before = set(sys.modules)

    def prepare():
        os.close(reader)
        leave = os._exit

        def tell(code):
            os.write(writer, "\n".join(set(sys.modules) - before).encode())
            leave(code)

        os._exit = tell

    run = Forked(room, argv, prepare)
    os.close(writer)
    with open(reader) as names:
        missing = names.read().split()
    if run.wait():
        raise RuntimeError(f"the first run failed:\n{run.output()}")
    for name in sorted(missing):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    code.commit()  # asked once: someone may commit while the suite is at work
    gc.collect()
    gc.freeze()  # or each collection in a fork goes through all that was imported: half its time
    threads = len(os.listdir("/proc/self/task")) if Path("/proc/self/task").is_dir() else 1
    if threads > 1:
        raise RuntimeError(f"{threads} threads in the process that forks: its children may hang")
