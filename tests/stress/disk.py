"""Full disks, read-only folders, and a cache that two runs fill at once.

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
from functools import partial
from pathlib import Path

from stress.child import Forked, Room
from stress.kills import ENOUGH, attempt, side_by_side
from stress.reference import Reference, differences, make, misbehaviour

SIZES = 12  # of full disks for OUT, and half as many for the cache
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


def to_the_end(room: Room, reference: Reference) -> list[str]:
    """The same command again must end well, with the uninterrupted run's bytes."""
    run = Forked(room, reference.argv, said="last")
    wrong = [f"the continued run ended with {run.code}"] if run.wait() else []
    return wrong + (misbehaviour(run.output()) or differences(room, reference))


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


def full_disk(room: Room, reference: Reference, which: str, size: int) -> dict:
    """OUT or the cache on a file system of `size` bytes, which then gets room. Also returns the
    phase in which it was full.
    """
    folder = getattr(room, which)
    if not mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder):
        return {"wrong": ["tmpfs could not be mounted"]}
    try:
        run = Forked(room, reference.argv)
        wrong = refused(run)
        if not mount("-o", "remount,size=64m", folder):
            return {"wrong": ["tmpfs could not be enlarged"]}
        wrong += to_the_end(room, reference)
        return {"wrong": wrong, "phase": last_phase(run)}
    finally:
        unmount(folder)


def short_file(room: Room, reference: Reference, phase: str, time_of_it: int, size: int) -> dict:
    """From that phase on, no file may be longer than `size`: writes break off in the middle."""

    def limit(entered: str, count: int) -> None:
        if (entered, count) == (phase, time_of_it):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    run = Forked(room, reference.argv, at_entry=limit)
    return {"wrong": refused(run) + to_the_end(room, reference), "phase": phase}


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
            act = partial(full_disk, reference=reference, which=which, size=size)
            cases.append((f"{which} on a disk of {size} bytes", act))
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
        act = partial(short_file, reference=reference, phase=phase, time_of_it=nth, size=size)
        cases.append((f"files of at most {size} bytes from {phase} {nth} on", act))
    return cases


# ---- read-only folders, one cache for two runs ---------------------------------------------------


def read_only(room: Room, reference: Reference, which: str, filled: bool) -> dict:
    """OUT or the cache that cannot be written: refused, unless all is in the cache already."""
    folder = getattr(room, which)
    if filled:
        shutil.copytree(reference.folder / "whole" / which, folder, dirs_exist_ok=True)
    if not (mount("--bind", folder, folder) and mount("-o", "remount,bind,ro", folder)):
        return {"wrong": ["a read-only folder could not be mounted"]}
    try:
        if filled:
            return {"wrong": to_the_end(room, reference)}
        wrong = refused(Forked(room, reference.argv), "could not be written")
    finally:
        unmount(folder)
    return {"wrong": wrong + to_the_end(room, reference)}


def one_cache(room: Room, reference: Reference, stream: random.Random, dies: bool) -> dict:
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
    return {"wrong": wrong}


def meetings(reference: Reference, seed: int, mounts: bool) -> list[tuple]:
    cases = []
    for i in range(4):
        dies, stream = bool(i % 2), random.Random(f"{seed} caches {i}")
        act = partial(one_cache, reference=reference, stream=stream, dies=dies)
        cases.append((f"two runs on one cold cache{', one killed' * dies}", act))
    for which, filled in (("cache", True), ("cache", False), ("out", False)) if mounts else ():
        act = partial(read_only, reference=reference, which=which, filled=filled)
        cases.append((f"read-only {which}, {'filled' if filled else 'empty'}", act))
    return cases


# ---- the part ------------------------------------------------------------------------------------


def run(
    seed: int, count: int, folder: Path, say, first: int | None = None, workers: int = 2
) -> dict:
    """`count` of the cases, spread over all of them, or those from number `first` on. Returns runs,
    how disks were made full, and failures, each with how to repeat it.
    """
    began = time.perf_counter()
    reference = make(folder, seed)

    def task(numbers: list[int]) -> list[dict]:
        mounts = own_mounts()
        stream = random.Random(f"{seed} disk")
        cases = full_disks(reference, stream, mounts) + meetings(reference, seed, mounts)
        rows = [{"run": -1, "mounts": mounts}]
        if first is None and count < len(cases):
            numbers = [number * len(cases) // count for number in numbers]
        for at, number in enumerate(n for n in numbers if n < len(cases)):
            if sum(bool(row.get("wrong")) for row in rows) >= ENOUGH:
                say("disk: enough; this worker stops")
                break
            name, case = cases[number]
            result = attempt(Room(folder / f"case{number}"), case)
            rows.append({"run": number, "case": name, "phase": ""} | result)
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
