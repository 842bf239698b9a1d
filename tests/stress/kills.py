"""Interrupted equals uninterrupted: runs killed at random moments, each continued by the same
command until it is done, and compared byte for byte with one that nobody disturbed.

Half of the moments are spread evenly over the run's time. The other half aim at a phase (every
other run first at one of AIMS in turn), so that short ones get their share: the run is killed a
random part of the phase's usual length after entering it. What counts is the phase in which it
died, which the run notes in memory that outlives it.
"""

import json
import os
import random
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from keep import checkpoint
from stress import tiny
from stress.child import PATIENCE, PHASES, Forked, Room
from stress.reference import Reference, differences, make, misbehaviour

AIMS = ("saving", "exporting", "drawing", "caching", "stepping", "logging")
TERM_SHARE = 0.15  # of the signals are SIGTERM, the others SIGKILL
ENOUGH = 5  # failures after which a worker stops: each may be a run that hung


def strike(run: Forked, number: signal.Signals, due: Callable[[Forked], bool]) -> str:
    """Send the signal when `due`, and wait. The phase the run was in, or "" if it ended before, or
    while it drew its last.
    """
    until = time.monotonic() + PATIENCE
    while not due(run):
        if run.poll() is not None:
            return ""
        if time.monotonic() > until:  # it hangs, before its moment has come
            run.kill(signal.SIGKILL)
            raise TimeoutError(f"no end and no such moment in {PATIENCE} s")
        time.sleep(0.0003)
    entries = run.marks.entries()
    run.kill(number)
    if run.wait() == 0 and entries[-1][0] in ("drawing", "starting"):
        return ""
    return entries[-1][0] if number != signal.SIGKILL else run.marks.entries()[-1][0]


def moment(
    stream: random.Random, reference: Reference, aim: str = ""
) -> tuple[str, Callable[[Forked], bool]]:
    """A random moment to strike at, in phase `aim` or any: in words, and whether it has come."""
    if not aim:
        seconds = stream.uniform(0, reference.seconds)
        return f"after {seconds:.3f} s", lambda run: time.monotonic() >= run.began + seconds
    spans = reference.spans[aim]
    k = stream.randrange(len(spans))
    after = stream.random() * (spans[k][1] - spans[k][0])

    def due(run: Forked) -> bool:
        begun = [when for phase, when in run.marks.entries() if phase == aim]
        return len(begun) > k and time.monotonic() >= begun[k] + after

    return f"{after * 1000:.1f} ms into {aim} {k + 1}", due


def unlucky(room: Room, reference: Reference, seed: int, number: int) -> dict:
    """Run `number`: interrupted one to three times, then left alone. How it went.

    A machine that is faster than before may be done before the first blow falls: then another run.
    """
    stream = random.Random(f"{seed} kills {number}")
    deaths, wrong, plans = [], [], []
    aim = AIMS[number // 2 % len(AIMS)] if number % 2 == 0 else ""
    blows = 1 + (stream.random() < 0.4) + (stream.random() < 0.2)
    while blows and len(plans) < 10:
        words, due = moment(stream, reference, aim)
        signal_number = signal.SIGTERM if stream.random() < TERM_SHARE else signal.SIGKILL
        run = Forked(room, reference.argv)
        phase = strike(run, signal_number, due)
        plans.append(f"{signal_number.name} {words}")
        aim = stream.choice(AIMS) if stream.random() < 0.5 else ""
        if phase:
            deaths.append((signal_number.name, phase))
            wrong += impolite(run.code, phase) if signal_number == signal.SIGTERM else []
        elif run.code:
            wrong.append(f"left to itself it ended with {run.code}")
        elif not deaths and not wrong:
            shutil.rmtree(room.folder)
            room.make()
            continue
        blows -= 1
    run = Forked(room, reference.argv)
    if run.wait():
        wrong.append(f"the continued run ended with {run.code}")
    # SIGTERM saves the step it falls into: that one may be kept instead of the last but one.
    extra = tuple(f"out/checkpoints/{step:06d}/" for step in range(tiny.STEPS))
    polite = any(name == "SIGTERM" for name, _ in deaths)
    wrong += misbehaviour(run.output()) or differences(room, reference, extra if polite else ())
    if polite:
        wrong += kept_checkpoints(room)
    return {"deaths": deaths, "wrong": wrong, "plan": plans}


def kept_checkpoints(room: Room) -> list[str]:
    """What is wrong with the checkpoints that a run has kept: two, each as its own sum says."""
    folders = sorted((room.out / "checkpoints").iterdir())
    wrong = [] if len(folders) == tiny.LIMIT else [f"{len(folders)} checkpoints are kept"]
    for folder in folders:
        said = (folder / "state.sha256").read_text().strip()
        if checkpoint.sum_of((folder / "state.pt").read_bytes()) != said:
            wrong.append(f"checkpoint {folder.name} is damaged")
    return wrong


def impolite(code: int, phase: str) -> list[str]:
    """SIGTERM ends a run with 143; in its first milliseconds, before it listens, by the kernel."""
    right = (128 + signal.SIGTERM, *[-signal.SIGTERM] * (phase == "starting"))
    return [] if code in right else [f"SIGTERM while {phase} ended it with {code}"]


# ---- the part ------------------------------------------------------------------------------------


def attempt(room: Room, act: Callable[[Room], dict]) -> dict:
    """What act(room) says; its "wrong" lists complaints. A room without any is removed."""
    room.make()
    try:
        result = act(room)
    except Exception as error:  # of the suite itself, or a run that hangs
        traceback.print_exc()
        result = {"wrong": [f"{type(error).__name__}: {error}"]}
    if not result["wrong"]:
        shutil.rmtree(room.folder)
    return result


def work(reference: Reference, folder: Path, seed: int, numbers: list[int], say) -> list[dict]:
    """The runs `numbers`, one after the other, until ENOUGH have failed."""
    results = []
    for at, number in enumerate(numbers, 1):
        if sum(bool(row["wrong"]) for row in results) >= ENOUGH:
            say("kills: enough; this worker stops")
            break
        room = Room(folder / f"run{number}")
        result = attempt(room, partial(unlucky, reference=reference, seed=seed, number=number))
        results.append({"run": number, "deaths": [], "plan": []} | result)
        if result["wrong"]:
            say(f"kills: run {number} FAILED: {'; '.join(result['wrong'])}")
        elif at % 10 == 0:
            say(f"kills: {at} of this worker's {len(numbers)} runs, all equal so far")
    return results


def side_by_side(workers: int, numbers: list[int], folder: Path, task: Callable) -> list[dict]:
    """task(numbers) in `workers` forks, each with its share; their results in order."""
    pids = []
    for worker in range(workers):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                results = task(numbers[worker::workers])
                (folder / f"worker{worker}.json").write_text(json.dumps(results))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(ended):
        raise RuntimeError(f"workers ended with {ended}")
    found = [json.loads((folder / f"worker{w}.json").read_text()) for w in range(workers)]
    return sorted((row for rows in found for row in rows), key=lambda row: row["run"])


def run(
    seed: int, count: int, folder: Path, say, first: int | None = None, workers: int = 2
) -> dict:
    """`count` interrupted runs. first: the number of the first one, to repeat a single run. Returns
    runs, deaths, their number in each phase, and failures, each with how to repeat it.
    """
    began = time.perf_counter()
    reference = make(folder, seed)
    say(f"kills: one run takes {reference.seconds:.1f} s in a fork; {count} follow")
    numbers = list(range(first or 0, (first or 0) + count))

    def task(share: list[int]) -> list[dict]:
        return work(reference, folder, seed, share, say)

    results = side_by_side(workers, numbers, folder, task)
    deaths = [death for row in results for death in row["deaths"]]
    repeat = f"PYTHONPATH=tests python -m stress --only kills --seed {seed} --runs 1 --first"
    by_phase = {p: sum(phase == p for _, phase in deaths) for p in PHASES}
    spared = [phase for phase in AIMS if count >= 50 and not by_phase[phase]]
    return {
        "runs": len(results),
        "runs_that_died": sum(bool(row["deaths"]) for row in results),
        "deaths": len(deaths),
        "deaths_by_signal": dict(Counter(name for name, _ in deaths)),
        "deaths_by_phase": by_phase,
        "seconds_of_one_run": round(reference.seconds, 2),
        "seconds": round(time.perf_counter() - began, 1),
        "failures": [
            {key: row[key] for key in ("run", "wrong", "plan", "deaths")}
            | {"repeat": f"{repeat} {row['run']}", "kept": str(folder / f"run{row['run']}")}
            for row in results
            if row["wrong"]
        ]
        + [{"wrong": [f"no run died while {phase}"]} for phase in spared],
    }
