"""torchrun --nproc-per-node 2 loop.py, and two torchruns as on two hosts: the command as it is
typed, killed, stopped and repeated.

Each process imports torch, some ten seconds, so all of it is slow, and the run that nobody
interrupts is forked. More such cases, forked, are in test_parallel.py.
"""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

import lora
from conftest import ROOT, TINY_SDXL
from keep import training
from runs import moved

pytestmark = pytest.mark.slow
pytest_plugins = "forked"


@pytest.fixture
def argv(few, cache, tmp_path):
    """argv("name", "--option", ...): what is typed behind loop.py, for 30 steps of 4."""

    def words(name, *options):
        settings = "--resolution 64 --train-batch-size 4 --gradient-accumulation-steps 1 "
        settings += "--checkpointing-steps 4 --learning-rate 1e-3 --max-train-steps 30 "
        settings += "--no-tensorboard --random-flip --validation-prompts"
        argv = ["pocket", "--device", "cpu", "--pretrained-model-name-or-path", str(TINY_SDXL)]
        argv += ["--dataset-name", str(few), "--cache-dir", str(cache)]
        return [*argv, "--output-dir", str(tmp_path / name), *settings.split(), *options]

    return words


@pytest.fixture
def torchrun(argv):
    """torchrun("name", "--option", ..., how=[...]) starts two processes, or what `how` says.

    What torchrun itself warns of is left out, since tests compare what the processes say: of two
    hosts that are done, one may leave first, and the other then warns that its store is gone.
    """
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", "LOGLEVEL": "ERROR"}
    started = []

    def start(name, *options, how=("--standalone", "--nproc-per-node", "2")):
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *how, "loop.py", *argv(name, *options)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | quiet | {"OMP_NUM_THREADS": "1"},
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
def whole(together, argv, tmp_path) -> bytes:
    """The adapter of the run of two processes, each on a host, that nobody interrupts."""
    done = together(2, lambda: training.main(argv("whole")), command=True, here=1)
    assert done.codes == [0, 0], done.said
    return adapter(tmp_path, "whole")


def test_killed_signalled_restarted_and_hung_it_ends_as_uninterrupted(torchrun, tmp_path, whole):
    # One process is killed: the other saves and says so once; torchrun's report says who it was.
    process = torchrun("killed")
    after_step(tmp_path, "killed", 6)
    os.kill(ranks(process.pid)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=100)
    assert process.returncode != 0 and said.count("error: the other processes do not") == 1
    assert re.search(r"Root Cause.*\n.*\n.*\n.*\n  rank +: 1 .*\n  exitcode +: -9", said), said
    step = max(logged(tmp_path, "killed"))
    assert (tmp_path / "killed" / "checkpoints" / f"{step:06d}").is_dir()

    # One is killed, and torchrun starts both again by itself.
    how = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    process = torchrun("restarted", how=how)
    after_step(tmp_path, "restarted", 6)
    os.kill(ranks(process.pid)[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "continuing after step" in said
    assert "shared by 2 processes" in said and said.count("done: 30 steps") == 1
    assert adapter(tmp_path, "restarted") == whole
    assert logged(tmp_path, "restarted") == list(range(1, 31))

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


@pytest.fixture
def hosts(torchrun, tmp_path):
    """hosts(2, ["a", "b"], "--option", ...): two torchruns, as on two hosts, of two processes each,
    the first in the folders a and cache-a, the second in b and cache-b, which may be the same.
    """

    def start(each, names, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            end = f"127.0.0.1:{free.getsockname()[1]}"
        how = ["--nnodes", "2", "--nproc-per-node", str(each), "--rdzv-backend", "c10d"]
        how += ["--rdzv-endpoint", end, "--local-addr"]  # by which the first host is the first
        started = []
        for number, name in enumerate(names, 1):
            own = ("--cache-dir", str(tmp_path / f"cache-{name}"), *options)
            started.append(torchrun(name, *own, how=[*how, f"127.0.0.{number}"]))
        return started

    return start


def test_two_hosts_of_two_are_the_run_of_one_process(hosts, together, argv, tmp_path):
    """That share a disk; two that do not, and which folder is not there, are in the next test."""
    few = ("--max-train-steps", "10")
    processes = hosts(2, ["shared", "shared"], *few)
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and said[1] == "", said
    assert not list(tmp_path.rglob("*.part"))
    assert together(1, lambda: training.main(argv("alone", *few)), command=True).codes == [0]
    one, four = moved(tmp_path / "alone"), moved(tmp_path / "shared")
    assert 0 < (four - one).norm() <= 1e-2 * one.norm()


def test_two_hosts_without_a_shared_disk_killed_and_continued_end_as_one_run(
    hosts, together, argv, tmp_path, whole
):
    names = ["host-1", "host-2"]
    # torchrun of one host is killed, of the second, then of the first, which has the store and
    # writes: its process ends, and so does the other host.
    for killed, until in ((1, 6), (0, 14)):
        started = hosts(1, names, "--ddp-timeout", "20")
        after_step(tmp_path, "host-1", until)
        began = time.monotonic()
        started[killed].kill()
        said = [host.communicate(timeout=60)[0] for host in started]
        assert time.monotonic() - began < 20 + 10 and started[1 - killed].returncode == 1
        errors = [[x for x in each.splitlines() if x.startswith("error: ")] for each in said]
        assert [len(each) for each in errors] == [1, 1], said
        assert "error: the other processes do not answer (" in errors[1 - killed][0]
        assert "error: torchrun, which started this, is gone" in errors[killed][0]
        step = max(logged(tmp_path, "host-1"))
        assert (tmp_path / "host-1" / "checkpoints" / f"{step:06d}").is_dir()

    # The same two commands continue, and the second host has nothing but what it encoded.
    said = [host.communicate(timeout=300)[0] for host in hosts(1, names)]
    assert f"continuing after step {step} of 30" in said[0] and said[1] == "", said
    assert logged(tmp_path, "host-1") == list(range(1, 31))
    # Once more, both are told that it is finished, though the second has no such folder.
    again = hosts(1, names)
    said = [host.communicate(timeout=300)[0] for host in again]
    assert [host.returncode for host in again] == [0, 0] and said[1] == "", said
    assert "finished" in said[0] and not (tmp_path / "host-2").exists()
    encoded = [sorted(os.listdir(tmp_path / f"cache-{name}")) for name in names]
    assert encoded[0] == encoded[1] and len(encoded[0]) == 2
    assert adapter(tmp_path, "host-1") == whole
    assert together(1, lambda: training.main(argv("alone")), command=True).codes == [0]
    one, two = moved(tmp_path / "alone"), moved(tmp_path / "host-1")
    assert 0 < (two - one).norm() <= 1e-2 * one.norm()


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
