"""torchrun --nproc-per-node 2 loop.py: the command as it is typed, killed, stopped and repeated.

Each process imports torch, some ten seconds, so all of it is slow. The same cases, forked, are in
test_parallel.py.
"""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import lora
from conftest import POCKET, ROOT

pytestmark = pytest.mark.slow


@pytest.fixture
def torchrun(few, cache, tmp_path):
    """torchrun("name", "--option", ..., how=[...]) starts two processes with 30 steps of 4."""
    started = []

    def start(name, *options, how=()):
        settings = "--resolution 64 --train-batch-size 4 --gradient-accumulation-steps 1 "
        settings += "--checkpointing-steps 4 --learning-rate 1e-3 --max-train-steps 30 "
        settings += "--no-tensorboard --random-flip --validation-prompts"
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        argv += ["--nproc-per-node", "2", *how, "loop.py", "pocket", "--device", "cpu"]
        argv += ["--pretrained-model-name-or-path", str(POCKET), "--dataset-name", str(few)]
        argv += ["--cache-dir", str(cache), "--output-dir", str(tmp_path / name)]
        process = subprocess.Popen(
            [*argv, *settings.split(), *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            for pid in ranks(process.pid).values():
                os.kill(pid, signal.SIGKILL)
            process.kill()


def ranks(pid: int) -> dict[int, int]:
    """The processes that torchrun, process `pid`, has started, by rank."""
    found = {}
    for other in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{other}/stat") as stat, open(f"/proc/{other}/environ") as environ:
                if int(stat.read().rpartition(")")[2].split()[1]) == pid:
                    pairs = (line.partition("=") for line in environ.read().split("\0"))
                    found[int({key: value for key, _, value in pairs}["RANK"])] = int(other)
        except (OSError, KeyError):
            continue
    return found


def after_step(tmp_path, name: str, step: int) -> None:
    log, until = tmp_path / name / "log.jsonl", time.monotonic() + 200
    while not (log.is_file() and len(log.read_text().splitlines()) >= step):
        assert time.monotonic() < until
        time.sleep(0.01)


def logged(tmp_path, name: str) -> list[int]:
    lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def adapter(tmp_path, name: str) -> bytes:
    return (tmp_path / name / lora.FILE_NAME).read_bytes()


@pytest.fixture
def whole(torchrun, tmp_path) -> bytes:
    """The adapter of the run that nobody interrupts."""
    process = torchrun("whole")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "shared by 2 processes" in said and said.count("done: 30 steps") == 1
    return adapter(tmp_path, "whole")


def test_killed_signalled_restarted_and_hung_it_ends_as_uninterrupted(torchrun, tmp_path, whole):
    # One process is killed: the other saves and says so once, torchrun's report says who it was,
    # and the same command continues.
    process = torchrun("killed")
    after_step(tmp_path, "killed", 6)
    os.kill(ranks(process.pid)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=100)
    assert process.returncode != 0 and said.count("error: the other processes do not") == 1
    assert re.search(r"Root Cause.*\n.*\n.*\n.*\n  rank +: 1 .*\n  exitcode +: -9", said), said
    step = max(logged(tmp_path, "killed"))
    assert (tmp_path / "killed" / "checkpoints" / f"{step:06d}").is_dir()
    process = torchrun("killed")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "continuing after step" in said
    assert adapter(tmp_path, "killed") == whole
    assert logged(tmp_path, "killed") == list(range(1, 31))

    # One is killed, and torchrun starts both again by itself.
    process = torchrun("restarted", how=["--max-restarts", "2"])
    after_step(tmp_path, "restarted", 6)
    os.kill(ranks(process.pid)[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "continuing after step" in said
    assert adapter(tmp_path, "restarted") == whole

    # torchrun is told to stop: both stop after the same step, which is saved.
    process = torchrun("stopped")
    after_step(tmp_path, "stopped", 6)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=100)
    assert process.returncode != 0 and said.count("is saved; the same command continues") == 1
    step = max(logged(tmp_path, "stopped"))
    assert f"interrupted: step {step} is saved" in said
    assert (tmp_path / "stopped" / "checkpoints" / f"{step:06d}").is_dir()

    # One hangs: the other saves and says which, and torchrun ends it, 30 s after asking it to.
    process = torchrun("hung", "--ddp-timeout", "5")
    after_step(tmp_path, "hung", 6)
    began = time.monotonic()
    os.kill(ranks(process.pid)[1], signal.SIGSTOP)
    said, _ = process.communicate(timeout=100)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert process.returncode != 0 and len(errors) == 1 and "Rank 1 failed to pass" in errors[0]
    assert "an answer from all 2 within 5 s" in errors[0]
    assert time.monotonic() - began < 80
    step = max(logged(tmp_path, "hung"))
    assert (tmp_path / "hung" / "checkpoints" / f"{step:06d}").is_dir()
    process = torchrun("hung")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert adapter(tmp_path, "hung") == whole


def test_a_wrong_option_is_said_once(torchrun):
    process = torchrun("wrong", "--learning-rate", "0")
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 1 and said.count("learning_rate is 0") == 1


def test_an_output_folder_in_use_is_said_once(torchrun, tmp_path):
    (tmp_path / "used").mkdir()
    with open(tmp_path / "used" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = torchrun("used")
        said, _ = process.communicate(timeout=100)
    assert process.returncode == 1 and said.count("error: ") == 1 and "another run" in said
