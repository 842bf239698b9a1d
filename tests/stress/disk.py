"""Full disks, damaged checkpoints, read-only folders, and two runs at once.

A run that cannot go on must end with a sentence, lose nothing that was saved, and go on to the
uninterrupted run's bytes once the cause is gone. Small and read-only file systems are mounted in a
mount namespace of this process's own, which ends with it; where the system forbids that, files are
held to a size (RLIMIT_FSIZE) alone. The result says which.
"""

import ctypes
import os
import random
import resource
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from stress import tiny
from stress.child import PATIENCE, Forked, Room
from stress.kills import ENOUGH, side_by_side
from stress.reference import Reference, differences, make, misbehaviour

SIZES = 12  # of full disks for OUT, and half as many for the cache
POINTS = 20  # a file is cut at every 1/20 of its length
FLIPS = 5  # bits flipped in each file
NEWEST, BEFORE = f"{tiny.STEPS - 2:06d}", f"{tiny.STEPS - 4:06d}"  # of the run that is damaged
AIMS = ("caching", "stepping", "saving", "exporting", "drawing")
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


def own_mounts() -> bool:
    """Put this process into a mount namespace of its own. Whether it may mount there."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    try:
        if libc.unshare(CLONE_NEWNS):
            if libc.unshare(CLONE_NEWNS | CLONE_NEWUSER):
                return False
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        return mount("--make-rprivate", "/")
    except (OSError, AttributeError):  # no such file, no such call: not Linux
        return False


def mount(*words: str | Path) -> bool:
    return not subprocess.run(["mount", *map(str, words)], capture_output=True).returncode


def unmount(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def to_the_end(room: Room, reference: Reference, but: tuple[str, ...] = ()) -> list[str]:
    """The same command again must end well, with the uninterrupted run's bytes."""
    run = Forked(room, reference.argv, said="last")
    wrong = [f"the continued run ended with {run.code}"] if run.wait() else []
    return wrong + (misbehaviour(run.output()) or differences(room, reference, but))


def refused(run: Forked, *words: str) -> list[str]:
    """The run must end with 1 and a sentence that has each of `words`."""
    wrong = [f"it ended with {run.code} and not with a refusal"] if run.wait() != 1 else []
    said = run.output()
    if "error: " not in said or "What to do: " not in said:
        wrong.append(f"no sentence: {said[-300:]!r}")
    wrong += [f"its sentence lacks {word!r}" for word in words if word not in said]
    return wrong + misbehaviour(said)


def last_phase(run: Forked) -> str:
    phases = [phase for phase, _ in run.marks.entries() if phase != "starting"]
    return phases[-1] if phases else "starting"


# ---- full disks ----------------------------------------------------------------------------------


def full_disk(room: Room, reference: Reference, which: str, size: int) -> tuple[list[str], str]:
    """OUT or the cache on a file system of `size` bytes, which then gets room. Also returns the
    phase in which it was full.
    """
    folder = getattr(room, which)
    if not mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder):
        return ["tmpfs could not be mounted"], ""
    try:
        run = Forked(room, reference.argv)
        wrong = refused(run)
        if not mount("-o", "remount,size=64m", folder):
            return ["tmpfs could not be enlarged"], ""
        return wrong + to_the_end(room, reference), last_phase(run)
    finally:
        unmount(folder)


def short_file(
    room: Room, reference: Reference, phase: str, time_of_it: int, size: int
) -> tuple[list[str], str]:
    """From that phase on, no file may be longer than `size`: writes break off in the middle."""

    def limit(entered: str, count: int) -> None:
        if (entered, count) == (phase, time_of_it):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    run = Forked(room, reference.argv, at_entry=limit)
    return refused(run) + to_the_end(room, reference), phase


def full_disks(reference: Reference, stream: random.Random, mounts: bool) -> list[tuple]:
    """(name, function of room) of each case."""
    sizes = {
        which: sum(len(b) for name, b in reference.files.items() if name.startswith(prefix))
        for which, prefix in (("out", "out/"), ("cache", "cache/"))
    }
    cases = []
    for which, count in (("out", SIZES), ("cache", SIZES // 2)) if mounts else ():
        # one in each of `count` equal parts; less than all that is left, so it must fill up
        for i in range(count):
            size = int(sizes[which] * (i + stream.random()) / count * 0.95)
            size = max(1, size // 4096) * 4096  # in pages
            cases.append(
                (
                    f"{which} on a disk of {size} bytes",
                    lambda room, w=which, s=size: full_disk(room, reference, w, s),
                )
            )
    adapter = len(reference.files["out/pytorch_lora_weights.safetensors"])
    for phase, nth, size in (
        ("caching", 1, 3000),
        ("saving", 1, 100),
        ("saving", 2, adapter // 2),
        ("saving", 3, adapter + 100),
        ("logging", 1, 50),
        ("logging", 4, 500),
        ("exporting", 1, adapter // 3),
        ("exporting", 2, 200),
        ("drawing", 1, 300),
    ):
        cases.append(
            (
                f"files of at most {size} bytes from {phase} {nth} on",
                lambda room, a=(phase, nth, size): short_file(room, reference, *a),
            )
        )
    return cases


# ---- damaged checkpoints -------------------------------------------------------------------------


def killed_late(folder: Path, reference: Reference) -> Room:
    """A run killed in its last step but one: it has two checkpoints."""
    room, nth = Room(folder).make(), tiny.STEPS - 1

    def die(phase: str, count: int) -> None:
        if (phase, count) == ("stepping", nth):
            os.kill(os.getpid(), signal.SIGKILL)

    if Forked(room, reference.argv, at_entry=die).wait() != -signal.SIGKILL:
        raise RuntimeError("the run that should be killed late was not")
    return room


def damaged(
    room: Room, reference: Reference, template: Room, name: str, damage: Callable[[bytes], bytes]
) -> tuple[list[str], str]:
    """A file of the newest checkpoint damaged: the run goes on from the one before. Its adapter
    file is not what training continues from: damage there costs nothing.
    """
    shutil.rmtree(room.folder)
    shutil.copytree(template.folder, room.folder)
    file = room.out / "checkpoints" / NEWEST / name
    before = file.read_bytes()
    file.write_bytes(damage(before))
    harmless = file.read_bytes() == before or name.endswith(".safetensors")
    kept = (f"out/checkpoints/{NEWEST}/{name}",) if name.endswith(".safetensors") else ()
    wrong = to_the_end(room, reference, kept)
    said = room.folder.with_suffix(".last").read_text()
    step = int(NEWEST if harmless else BEFORE)
    if f"continuing after step {step} of" not in said:
        wrong.append(f"it did not continue after step {step}")
    if not harmless and "is passed over" not in said:
        wrong.append("it did not say that a checkpoint is passed over")
    return wrong, name


def both_damaged(room: Room, reference: Reference, template: Room) -> tuple[list[str], str]:
    """No whole checkpoint: refused, and nothing is removed."""
    shutil.rmtree(room.folder)
    shutil.copytree(template.folder, room.folder)
    for file in room.out.rglob("state.pt"):
        file.write_bytes(file.read_bytes()[:-1])
    wrong = refused(Forked(room, reference.argv), "no checkpoint under", "rm -r")
    return wrong + ["a checkpoint is gone"] * (len(list(room.out.rglob("state.pt"))) != 2), ""


def flip(blob: bytes, bit: int) -> bytes:
    changed = bytearray(blob)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def damages(reference: Reference, template: Room, stream: random.Random) -> list[tuple]:
    folder = template.out / "checkpoints" / NEWEST
    cases = [("both checkpoints", lambda room: both_damaged(room, reference, template))]
    for name in sorted(path.name for path in folder.iterdir()):
        length = (folder / name).stat().st_size
        bits = [stream.randrange(8 * length) for _ in range(FLIPS)]
        changes = [
            (f"cut at {i}/{POINTS}", lambda b, i=i: b[: len(b) * i // POINTS])
            for i in range(POINTS)
        ]
        changes += [(f"bit {bit} flipped", lambda b, bit=bit: flip(b, bit)) for bit in bits]
        cases += [
            (
                f"{name}, {words}",
                lambda room, n=name, c=change: damaged(room, reference, template, n, c),
            )
            for words, change in changes
        ]
    return cases


# ---- read-only folders, two runs at once ---------------------------------------------------------


def read_only(room: Room, reference: Reference, which: str, filled: bool) -> tuple[list[str], str]:
    """OUT or the cache that cannot be written: refused, unless all is in the cache already."""
    folder = getattr(room, which)
    if filled:
        shutil.copytree(reference.folder / "whole" / which, folder, dirs_exist_ok=True)
    if not (mount("--bind", folder, folder) and mount("-o", "remount,bind,ro", folder)):
        return ["a read-only folder could not be mounted"], ""
    try:
        if filled:
            return to_the_end(room, reference), ""
        wrong = refused(Forked(room, reference.argv), "could not be written")
    finally:
        unmount(folder)
    return wrong + to_the_end(room, reference), ""


def second(room: Room, reference: Reference, aim: str) -> tuple[list[str], str]:
    """A second run is started on the output folder of a first one that is in phase `aim`."""
    first = Forked(room, reference.argv)
    until = time.monotonic() + PATIENCE
    while last_phase(first) != aim and first.poll() is None and time.monotonic() < until:
        time.sleep(0.0003)
    first.kill(signal.SIGSTOP)
    try:
        other = Forked(room, reference.argv, said="second")
        wrong = refused(other, "another run is at work", "--output-dir")
    finally:
        first.kill(signal.SIGCONT)
    wrong += [f"the first ended with {first.code}"] if first.wait() else []
    return wrong + (misbehaviour(first.output()) or differences(room, reference)), aim


def one_cache(
    room: Room, reference: Reference, stream: random.Random, dies: bool
) -> tuple[list[str], str]:
    """Two runs fill one cold cache at once; where `dies`, the first is killed meanwhile."""
    other = Room(room.folder.with_name(f"{room.folder.name}-other")).make()
    other.cache.rmdir()
    other.cache.symlink_to(room.cache.resolve())
    runs = [Forked(room, reference.argv), Forked(other, reference.argv)]
    wrong = []
    if dies:
        begin, end = reference.spans["caching"][0]
        time.sleep(stream.uniform(begin, end))
        runs[0].kill(signal.SIGKILL)
        runs[0].wait()
        wrong += [f"the one left ended with {runs[1].code}"] if runs[1].wait() else []
        wrong += to_the_end(room, reference)
    else:
        wrong += [f"one ended with {run.code}" for run in runs if run.wait()]
        wrong += differences(room, reference)
    wrong += misbehaviour(runs[0].output() + runs[1].output())
    wrong += differences(other, reference, ("cache/",))
    if not wrong:
        shutil.rmtree(other.folder)
    return wrong, ""


def meetings(reference: Reference, seed: int, mounts: bool) -> list[tuple]:
    cases = [
        (f"a second run while {aim}", lambda room, a=aim: second(room, reference, a))
        for aim in AIMS
    ]
    for i in range(4):
        stream = random.Random(f"{seed} caches {i}")
        cases.append(
            (
                f"two runs on one cold cache{', one killed' * (i % 2)}",
                lambda room, s=stream, d=bool(i % 2): one_cache(room, reference, s, d),
            )
        )
    for which, filled in (("cache", True), ("cache", False), ("out", False)) if mounts else ():
        cases.append(
            (
                f"read-only {which}, {'filled' if filled else 'empty'}",
                lambda room, w=which, f=filled: read_only(room, reference, w, f),
            )
        )
    return cases


# ---- the part ------------------------------------------------------------------------------------


def one(number: int, name: str, case: Callable, folder: Path) -> dict:
    """Case `number`; its room is kept where it failed."""
    room = Room(folder / f"case{number}").make()
    try:
        wrong, phase = case(room)
    except Exception as error:  # of the suite itself, or a run that hangs
        traceback.print_exc()
        wrong, phase = [f"{type(error).__name__}: {error}"], ""
    if not wrong:
        shutil.rmtree(room.folder)
    return {"run": number, "case": name, "wrong": wrong, "phase": phase}


def run(
    seed: int, count: int, folder: Path, say, first: int | None = None, workers: int = 2
) -> dict:
    """`count` of the cases, spread over all of them, or those from number `first` on. Returns runs,
    how disks were made full, and failures, each with how to repeat it.
    """
    began = time.perf_counter()
    reference = make(folder, seed)
    template = killed_late(folder / "late", reference)

    def task(numbers: list[int]) -> list[dict]:
        mounts = own_mounts()
        stream = random.Random(f"{seed} disk")
        cases = damages(reference, template, stream) + meetings(reference, seed, mounts)
        cases += full_disks(reference, stream, mounts)
        rows = [{"run": -1, "mounts": mounts}]
        if first is None and count < len(cases):
            numbers = [number * len(cases) // count for number in numbers]
        for at, number in enumerate(n for n in numbers if n < len(cases)):
            if sum(bool(row.get("wrong")) for row in rows) >= ENOUGH:
                say("disk: enough; this worker stops")
                break
            rows.append(one(number, *cases[number], folder))
            if rows[-1]["wrong"]:
                say(f"disk: {cases[number][0]} FAILED: {'; '.join(rows[-1]['wrong'])}")
            elif at % 10 == 9:
                say(f"disk: {at + 1} cases of this worker done")
        return rows

    numbers = list(range(first or 0, (first or 0) + count))
    rows = side_by_side(workers, numbers, folder, task)
    mounts, results = rows[0]["mounts"], [row for row in rows if row["run"] >= 0]
    full = [row["phase"] for row in results if "disk of" in row["case"] or "most" in row["case"]]
    repeat = f"PYTHONPATH=tests python -m stress --only disk --seed {seed} --runs 1 --first"
    return {
        "runs": len(results),
        "full_disks_by": "tmpfs and RLIMIT_FSIZE" if mounts else "RLIMIT_FSIZE: no mounts allowed",
        "read_only_by": "read-only bind mounts" if mounts else "not run: no mounts allowed",
        "full_while": {phase: full.count(phase) for phase in dict.fromkeys(full)},
        "seconds": round(time.perf_counter() - began, 1),
        "failures": [
            {"run": row["run"], "case": row["case"], "wrong": row["wrong"]}
            | {"repeat": f"{repeat} {row['run']}", "kept": str(folder / f"case{row['run']}")}
            for row in results
            if row["wrong"]
        ],
    }
