"""What an uninterrupted run leaves, and whether another left the same and nothing else."""

import io
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from keep import checkpoint
from stress import tiny
from stress.child import Forked, Room, warm


@dataclass
class Reference:
    """The model, the pictures and the uninterrupted run, made anew under `folder`.

    seconds: of that run; spans: (phase, its first, second, ... time: (begin, end)) in seconds.
    """

    folder: Path
    argv: list[str]
    files: dict[str, bytes]
    log: list[dict]
    seconds: float
    spans: dict[str, list[tuple[float, float]]]


def content(room: Room) -> dict[str, bytes]:
    """Every file of OUT and the cache by its path, less the streams, the page with its times, and
    the lock.
    """
    but = {f"out/{name}" for name in ("log.jsonl", "events.jsonl", "report.html", ".lock")}
    files = {}
    for path in sorted(p for p in room.folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(room.folder))
        if not name.startswith("out/tensorboard/") and name not in but:
            files[name] = path.read_bytes()
    return files


def log_lines(room: Room) -> list[dict]:
    """log.jsonl without what the clock and the memory say."""
    rows = [json.loads(line) for line in (room.out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "gib")} for row in rows]


def make(folder: Path, seed: int, *options: str) -> Reference:
    """Build model and pictures, warm this process up, and let one run go to its end, twice: the
    first also imports, the second is timed. Raises RuntimeError where the two differ.
    """
    tiny.build(folder / "model", seed)
    tiny.draw_pictures(folder / "pictures", seed)
    argv = tiny.arguments(folder / "model", folder / "pictures", Path("cache"), Path("out"))
    argv += options
    first = Room(folder / "first").make()
    warm(first, argv)
    room = Room(folder / "whole").make()
    run = Forked(room, argv)
    if run.wait():
        raise RuntimeError(f"the uninterrupted run failed:\n{run.output()}")
    seconds = max(when for _, when in run.marks.entries()) - run.began
    spans: dict[str, list[tuple[float, float]]] = {}
    entries = [*run.marks.entries(), ("ended", run.began + seconds)]
    for (phase, begin), (_, end) in itertools.pairwise(entries):
        spans.setdefault(phase, []).append((begin - run.began, end - run.began))
    reference = Reference(folder, argv, content(room), log_lines(room), seconds, spans)
    if wrong := differences(first, reference):
        raise RuntimeError(f"two uninterrupted runs differ: {'; '.join(wrong)}")
    return reference


def state_of(blob: bytes) -> dict:
    return torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)


def equal(a, b) -> bool:
    """Whether two checkpoints' states hold the same numbers."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def differences(room: Room, reference: Reference, but: tuple[str, ...] = ()) -> list[str]:
    """What is not as the uninterrupted run left it: contents, names, the log; anything besides.

    but: paths that may be otherwise, or their beginnings.
    """
    files, wanted = (
        {name: blob for name, blob in each.items() if not name.startswith(but)}
        for each in (content(room), reference.files)
    )
    wrong = [f"{name} is missing" for name in wanted.keys() - files]
    wrong += [f"{name} is left behind" for name in files.keys() - wanted]
    for name in sorted(files.keys() & wanted):
        same = files[name] == reference.files[name]
        if not same and name.endswith("state.pt"):  # pickle's bytes tell which strings are shared
            same = equal(state_of(files[name]), state_of(reference.files[name]))
        if not same and name.endswith("state.sha256"):
            blob = files[name.replace("state.sha256", "state.pt")]
            same = checkpoint.sum_of(blob).encode() == files[name]
        if not same:
            wrong.append(f"{name} differs")
    if not (room.out / "log.jsonl").is_file() or log_lines(room) != reference.log:
        wrong.append("log.jsonl tells another run")
    rooms = {"out", "cache", "home", "tmp"}
    wrong += [f"{p.name} is left behind" for p in room.folder.iterdir() if p.name not in rooms]
    left = [p for p in room.folder.rglob("*") if p.name.endswith(".part")]
    wrong += [f"{p.relative_to(room.folder)} is left half-written" for p in left]
    return wrong


def misbehaviour(said: str) -> list[str]:
    """Signs in a run's output that something was not meant."""
    return [
        f"the output has {sign!r}" for sign in ("Traceback", "Exception ignored") if sign in said
    ]
