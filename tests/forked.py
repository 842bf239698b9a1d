"""Several processes of one run, forked from the test process: they need no imports of their own."""

import contextlib
import gc
import multiprocessing
import os
import sys
import time
import types

import pytest
import torch
import torch.distributed as dist

from conftest import TINY_SDXL
from inputs.files import Refusal
from keep import faster, training

FORK = multiprocessing.get_context("fork")
CPU = torch.device("cpu")


def stopped(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"
    return False


def as_torchrun(rank: int, size: int, port: int, here: int = 0) -> dict[str, str]:
    """The variables that torchrun sets for one of its processes, of which `here` (0: all) are on
    each host; its store is at the port.
    """
    here = here or size
    sizes = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(here), "RANK": str(rank)}
    sizes |= {"GROUP_RANK": str(rank // here), "LOCAL_RANK": str(rank % here)}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    store |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return sizes | store


@pytest.fixture
def together(tmp_path):
    """together(size, work, timeout) forks `size` processes that each do work(team) or, with
    command=True, work() under torchrun's variables, `here` (0: all) on each host. Returns
    each one's exit code and result, and what each said on stderr. Whoever is still there `patience`
    seconds on is killed: code -9.
    """

    def child(rank, size, port, here, work, timeout, command, answers):
        all_forked.wait()
        torch.set_num_threads(1)  # more would be started by threads that a fork does not have
        sys.stderr = open(tmp_path / f"stderr-{rank}", "w", buffering=1)
        os.environ |= as_torchrun(rank, size, port, here)
        if command:
            code = work()
            sys.stderr.flush()
            os._exit(code)
        team = faster.join(timeout)
        try:
            with team:
                team.start(CPU)
                answers.put((rank, work(team)))
                answers.close()
                answers.join_thread()
        except Refusal as refusal:
            team.say(f"error: {refusal}")
            os._exit(1)
        os._exit(0)

    # The store's thread looks up the name of whoever connects, under a lock of the C library: a
    # process forked just then would wait for that lock for ever.
    all_forked = FORK.Event()

    def run(size, work, timeout=60.0, command=False, patience=90.0, here=0):
        # As torchrun does it: the store is not in one of the processes.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        all_forked.clear()
        answers, results, what = FORK.Queue(), {}, (work, timeout, command)
        gc.collect()  # a store that a child frees would wait for a thread that is not there
        started = [
            FORK.Process(target=child, args=(rank, size, store.port, here, *what, answers))
            for rank in range(size)
        ]
        for process in started:
            process.start()
        all_forked.set()
        until = time.monotonic() + patience
        while any(p.is_alive() for p in started) and time.monotonic() < until:
            while not answers.empty():
                results.update([answers.get()])
            if all(stopped(p.pid) for p in started if p.is_alive()):
                break
            time.sleep(0.02)
        while not answers.empty():
            results.update([answers.get()])
        for process in started:
            process.kill()
            process.join()
        said = [(tmp_path / f"stderr-{rank}").read_text() for rank in range(size)]
        codes = [process.exitcode for process in started]
        return types.SimpleNamespace(codes=codes, results=results, said=said)

    return run


@pytest.fixture
def train_by(few, cache, tmp_path, together):
    """train_by(size, "name", "--option", ...): the command in `size` processes, four short steps of
    4 examples.
    """

    def run(size, name, *options, **more):
        settings = "--resolution 64 --train-batch-size 4 --gradient-accumulation-steps 1 "
        settings += "--checkpointing-steps 2 --learning-rate 1e-3 --lr-scheduler constant "
        settings += "--lr-warmup-steps 0 --max-train-steps 4 --no-tensorboard --random-flip "
        settings += "--validation-prompts"
        argv = ["pocket", "--pretrained-model-name-or-path", str(TINY_SDXL)]
        argv += ["--dataset-name", str(few), "--cache-dir", str(cache)]
        argv += ["--output-dir", str(tmp_path / name), *settings.split(), *options]
        return together(size, lambda: training.main(argv), command=True, **more)

    return run
