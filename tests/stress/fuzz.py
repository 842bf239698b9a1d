"""Files from strangers, damaged and hostile, made from a seed.

Every input goes to the public function or command that a user would give it to, in a forked
process with limits on time and memory, which is watched for what it writes, starts and connects
to. What may come back: the right answer, or one sentence (a Refusal, or the usage of a
command line). Anything else is a failure, and its number makes the input again.
"""

import contextlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from inputs.files import Refusal
from keep import training
from stress import bad_folders, bad_pictures, bad_weights
from stress.case import Case, command, sentence_is_whole

# Of every 50 inputs. A kind's own turn counts up, so that each goes through all of its variants.
SHARES = {"picture": 15, "caption": 6, "metadata": 8, "model": 8, "adapter": 9, "command": 4}
SECONDS = 120  # for one input, also on a busy machine; the slowest takes a few
ROOM = 3 * 2**30  # bytes that one input may add to the process
SMALL = 300  # MB that refusing a bomb may take: it must not be decoded first


def kind_and_turn(number: int) -> tuple[str, int]:
    """Kinds are spread over every 50 inputs, the rarest too in the first 20."""
    order = sorted(
        ((i + 0.5) / share, kind, i) for kind, share in SHARES.items() for i in range(share)
    )
    block, place = divmod(number, len(order))
    _, kind, i = order[place]
    return kind, block * SHARES[kind] + i


# ---- what is made --------------------------------------------------------------------------------


def prepare(base: Path) -> None:
    """Three captioned pictures, a finished run of two steps on them, and its cache."""
    (base / "data").mkdir(exist_ok=True)
    lines = []
    for picture in bad_folders.PICTURES[:3]:
        shutil.copy(picture, base / "data")
        lines.append(json.dumps({"file_name": picture.name, "text": picture.stem}))
    (base / "data" / "metadata.jsonl").write_text("\n".join(lines))
    case = Case(0, 0, "command", 0, base.parent)
    case.out = base
    if not (base / "run" / "finished.json").is_file():
        assert command(training.main, bad_folders.small_run(case)) == "accepted"
    bad_folders.text_encoders(), bad_weights.pocket_adapter(), bad_pictures.writable()


def whole_command(case: Case):
    """python loop.py, which meets a bad picture or a caption on its way."""
    pictures = case.folder / "data"
    shutil.copytree(case.base / "data", pictures)
    first, *_ = sorted(pictures.glob("*.png"))
    if case.turn % 2:
        first.write_bytes(bad_pictures.any_bytes(case))
    else:
        text = bad_folders.TEXTS[case.turn // 2 % len(bad_folders.TEXTS)]
        rows = [{"file_name": each.name, "text": text} for each in pictures.glob("*.png")]
        (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        case.what = f"caption {text[:30]!a}"
    case.bomb = False  # a whole run takes more than the picture
    argv = bad_folders.small_run(case, dataset_name=str(pictures))
    return lambda: command(training.main, argv)


KINDS = {
    "picture": bad_pictures.picture,
    "caption": bad_folders.caption,
    "metadata": bad_folders.metadata,
    "model": bad_weights.model_,
    "adapter": bad_weights.adapter,
    "command": whole_command,
}


# ---- what an input may not do --------------------------------------------------------------------

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.chown")
TWO_PATHS = ("os.rename", "os.link", "os.symlink")
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn")


class Watch:
    """An audit hook: what the interpreter writes, starts or connects to while `armed`."""

    def __init__(self, sandbox: Path):
        self.allowed = [os.path.realpath(sandbox / name) + "/" for name in ("out", "tmp")]
        self.allowed += ["/dev/null/", "/proc/self/"]
        self.armed, self.seen = False, []
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple) -> None:
        if not self.armed:
            return
        if event == "open" and not isinstance(args[0], int):
            if isinstance(args[2], int) and args[2] & WRITES:
                self.check(event, args[0], -1)
        elif event in CHANGES:
            self.check(event, args[0], args[-1] if isinstance(args[-1], int) else -1)
        elif event in TWO_PATHS:
            self.check(event, args[1], args[-1])
        elif event in PROCESSES or event in ("socket.connect", "socket.getaddrinfo"):
            self.seen.append(f"{event} {str(args)[:200]}")

    def check(self, event: str, path, folder: int) -> None:
        if isinstance(path, int):
            return
        path = os.fsdecode(path)
        if folder >= 0 and not os.path.isabs(path):
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        parent, name = os.path.split(os.path.abspath(path))
        real = os.path.join(os.path.realpath(parent), name) + "/"
        if not real.startswith(tuple(self.allowed)):
            self.seen.append(f"{event} {real[:-1]}")


def memory(name: str) -> float:
    """MB of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1000
    return 0.0


# ---- one input -----------------------------------------------------------------------------------


def run_one(case: Case, watch: Watch) -> dict:
    """Make the input, give it to its entry point, and say what came of it."""
    for folder in (case.folder, case.out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    about = {"number": case.number, "kind": case.kind, "what": case.what}
    try:
        act = KINDS[case.kind](case)
    except Exception:  # a fault of the fuzzer's own, which it must not hide
        said = f"not made: {traceback.format_exc()[-900:]}"
        return about | {"outcome": "failure", "said": said, "seconds": 0, "mb": 0}
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    held, began, outcome, said = memory("VmRSS"), time.perf_counter(), "failure", ""
    # Held to what this input adds: threads and caches of the inputs before are no fault of its own.
    most = int(memory("VmData") * 1000 * 1024) + ROOM
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
    watch.seen.clear()
    watch.armed = True
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            outcome = act() or "accepted"
    except Refusal as refusal:
        outcome, said = "refused", str(refusal)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"[:500] + "\n" + traceback.format_exc()[-1500:]
    watch.armed = False
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    seconds, grown = time.perf_counter() - began, memory("VmHWM") - held
    try:
        if said and outcome == "refused":
            sentence_is_whole(said)
        assert not watch.seen, f"reached outside the output folder: {watch.seen[:5]}"
        assert not case.bomb or (outcome == "refused" and grown < SMALL), (
            f"a bomb was {outcome} with {grown:.0f} MB"
        )
    except AssertionError as error:
        outcome, said = "failure", f"{error}; {said}"[:2000]
    about |= {"what": case.what, "outcome": outcome, "said": said}
    return about | {"seconds": round(seconds, 3), "mb": round(grown)}


# ---- the process that meets them, and the one that watches it ------------------------------------


def serve(connection, seed: int, sandbox: Path) -> None:
    """Meet the inputs whose numbers come through `connection`; the first, -1, makes what they are
    made of.
    """
    said = os.open(sandbox / "out.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1), os.dup2(said, 2)
    os.chdir(sandbox / "cwd")
    tempfile.tempdir = None
    for name, folder in (("HOME", "home"), ("TMPDIR", "tmp"), ("XDG_CACHE_HOME", "home")):
        os.environ[name] = str(sandbox / folder)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    watch = Watch(sandbox)
    prepare(sandbox / "base")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send("ready")
    while True:
        number = connection.recv()
        kind, turn = kind_and_turn(number)
        connection.send(run_one(Case(seed, number, kind, turn, sandbox), watch))


class Worker:
    """A forked process; killed and replaced when an input kills or hangs it."""

    def __init__(self, seed: int, sandbox: Path):
        self.seed, self.sandbox = seed, sandbox
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, self.seed, self.sandbox)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        if not self.connection.poll(300) or self.connection.recv() != "ready":
            raise RuntimeError(f"the worker did not start: see {self.sandbox / 'out.txt'}")

    def meet(self, number: int) -> dict:
        kind, _ = kind_and_turn(number)
        failed = {"number": number, "kind": kind, "what": "", "outcome": "failure", "mb": 0}
        self.connection.send(number)
        try:
            if self.connection.poll(SECONDS):
                return self.connection.recv()
            said = f"no answer in {SECONDS} s"
        except EOFError:
            self.process.join()
            said = f"the process ended with exit code {self.process.exitcode}"
        self.stop()
        self.start()
        return failed | {"said": said, "seconds": SECONDS}

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def run(
    seed: int, count: int, folder: Path, say: Callable[[str], None], first: int | None = None
) -> dict:
    """Meet `count` inputs of `seed`, from number `first` on, in a sandbox made in `folder`.

    Returns inputs, kinds (how many of each, refused, accepted, the most MB and seconds that one
    took), refused, accepted and failures, each with its number.
    """
    sandbox = Path(tempfile.mkdtemp(prefix="fuzz-", dir=folder))
    for name in ("in", "out", "base", "elsewhere", "home", "tmp", "cwd"):
        (sandbox / name).mkdir()
    worker, began, results = Worker(seed, sandbox), time.perf_counter(), []
    try:
        for number in range(first or 0, (first or 0) + count):
            results.append(result := worker.meet(number))
            if result["outcome"] == "failure" or first is not None:
                say(f"{number} {result['kind']} ({result['what']}): {result['outcome']}")
                say(f"    {result['said'][:2500]}")
            if (number + 1) % 100 == 0:
                bad = sum(each["outcome"] == "failure" for each in results)
                say(f"{number + 1} inputs in {time.perf_counter() - began:.0f} s, {bad} failures")
    finally:
        worker.stop()
        shutil.rmtree(sandbox, ignore_errors=True)
    return summary(seed, results)


def summary(seed: int, results: list[dict]) -> dict:
    kinds = {}
    for kind in SHARES:
        if mine := [each for each in results if each["kind"] == kind]:
            most = {f"most {unit}": max(each[unit] for each in mine) for unit in ("mb", "seconds")}
            outcomes = Counter(each["outcome"] for each in mine)
            kinds[kind] = {"inputs": len(mine), **outcomes, **most}
    outcomes = Counter(each["outcome"] for each in results)
    again = f"PYTHONPATH=tests python -m stress --only fuzz --seed {seed} --inputs 1 --first"
    return {
        "seed": seed,
        "inputs": len(results),
        "refused": outcomes["refused"],
        "accepted": outcomes["accepted"],
        "kinds": kinds,
        "failures": [
            each | {"repeat": f"{again} {each['number']}"}
            for each in results
            if each["outcome"] == "failure"
        ],
    }
