"""Several processes, one run: torchrun --nproc-per-node 2 loop.py t4

torchrun starts one process for each GPU and tells it its number, its rank. Each computes its share
of a step's examples, and the sum of their gradients is one all-reduce of the flat vector, the
step's socket exchange. What is here is that, and what is around it: who has which share, who
encodes which block of pictures, who speaks, and that all are alike.

They may be on several hosts, one torchrun on each. Hosts need not share a disk: each encodes for
itself, and only rank 0 reads and writes the run's folder; what it finds there it tells the others.

Who dies or hangs is noticed by torchrun and by torch.distributed. What that looks like:

A process dies: torchrun asks the others to end, kills them 30 s later, and names the dead one's
rank and signal in its report, under "Root Cause". On a CPU the others fail at once in the step's
exchange and say one sentence; rank 0, if it is one of them, saves the last whole step. On a GPU
they wait within NCCL and hear nothing. What is not saved then is lost: the steps since the newest
checkpoint.

A process hangs: --ddp-timeout seconds later the exchange fails. On a CPU one sentence names the
rank, rank 0 saves the last whole step, unless it is the one, and torchrun kills the one that hangs
30 s after that; its "Root Cause" is then the first that noticed. On a GPU NCCL's watchdog ends all
that wait, with a page of its own that names none, and the steps since the newest checkpoint are
lost (two H200s, a timeout of 20 s: ended 80 s after the other had stopped, which torchrun killed 30
s later).

A process refuses (a damaged picture, say): its sentence is said once, with its rank, and torchrun
ends the others. torchrun itself killed: its processes end before the next step's exchange.

After each of them the same command continues from the newest checkpoint. The timeout is also for
what one process does between two meeting points: one that downloads for longer than the others by
more than that counts as hanging.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from inputs.files import Refusal, digest, first_line

GRACE = timedelta(seconds=5)  # for finding out who is missing
AGAIN = "give the same command again: it continues from its newest checkpoint"


class Team:
    """One of `size` processes, of which `here` are on this host, as torchrun's variables say;
    timeout in seconds.

    asked: whether this process was asked to stop. What all answered in a step's exchange is known
    as `stop`.
    """

    def __init__(self, timeout: float):
        self.timeout = timedelta(seconds=timeout)
        names = ("GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        self.host, self.number, self.here = (int(os.environ[name]) for name in names)
        store, self.rank, self.size = next(dist.rendezvous("env://", timeout=self.timeout))
        self.torchrun = os.getppid()
        # With --max-restarts the store outlives the processes, and what they have said in it.
        self.store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        self.first = self.rank == 0
        self.asked: Callable[[], bool] = lambda: False
        self.how_many_asked = torch.zeros(())

    def __enter__(self):
        if not self.first:
            sys.stdout = open(os.devnull, "w")  # what is said of the run is said by the first
        with self.answered():  # on the host, also where GPUs compute: for all but the exchange
            dist.init_process_group("gloo", None, self.timeout, self.size, self.rank, self.store)
        return self

    def __exit__(self, kind, error, trace):
        if error is None:
            self.leave()  # after an error the group stays: taking it down would wait for the others
        elif isinstance(error, Exception):
            get_error_handler().record_exception(error)  # for torchrun's report

    def start(self, device: torch.device) -> torch.device:
        """The device that this process computes on. Raises Refusal where there are fewer GPUs than
        processes, or GPUs of two kinds.
        """
        if device.type == "cuda":
            found = torch.cuda.device_count()
            if self.here > found or device.index is not None:
                said = f"{self.here} processes on device {device}, and {found} GPUs are here"
                expected = "a GPU for each process, and no number in --device"
                remedy = f"make train GPUS={found}, or --nproc-per-node {found}, with --device cuda"
                raise Refusal(said, expected, remedy)
            device = torch.device("cuda", self.number)
            # Before anything touches a GPU: pinned memory, bitsandbytes and Triton use the current.
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        with self.answered():
            self.group = dist.new_group(backend=backend, timeout=self.timeout)
        if device.type == "cuda":
            # NCCL makes its connections and buffers at the first sum: here, so that what fails does
            # so before an hour of encoding, and so that the memory plan sees what they leave.
            self.all_reduce(torch.zeros(2**24, device=device))
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            # Whose roundings, and the dtype that "auto" takes, are its own.
            kind = {"name": torch.cuda.get_device_name(device)}
            self.check_equal("the kind of GPU", {}, kind)
        return device

    def leave(self) -> None:
        """This process needs the others no more."""
        if dist.is_initialized():
            dist.destroy_process_group()

    # ---- the step

    def share(self, numbers: range) -> range:
        """This process's part of `numbers`: as many as the others', or one more or fewer, or none.

        The last ranks have the larger parts, since the first also logs and saves.
        """
        n = len(numbers)
        return numbers[self.rank * n // self.size : (self.rank + 1) * n // self.size]

    def exchange(self, run) -> None:
        """The step's socket: the gradient, run.loss_sum and how many processes were asked to stop
        become their sums over all processes, the same bits in each.

        All that a step decides is decided on these sums, so every process decides the same. The
        small ones go apart from the vector, whose own end is the adapter's.
        """
        if os.getppid() != self.torchrun:  # or the other hosts' would wait at the run's end
            raise Refusal("torchrun, which started this, is gone", "it to the run's end", AGAIN)
        for group in run.optimizer.param_groups:
            for vector in group["params"]:
                self.all_reduce(vector.grad)
        asked = torch.full_like(run.loss_sum, bool(self.asked()))
        self.all_reduce(small := torch.stack([run.loss_sum, asked]))  # (2,)
        run.loss_sum.copy_(small[0])
        self.how_many_asked = small[1]  # read when the step has waited for its loss anyway

    @property
    def stop(self) -> bool:
        """Whether any process was asked to stop before the last step's exchange; to be read after
        that step.
        """
        return self.how_many_asked.item() > 0

    def all_reduce(self, sums: Tensor) -> None:
        """`sums`, in place, becomes the sum over all processes, the same bits in each."""
        with self.answered():
            try:
                # Gloo waits here; NCCL's is a kernel, and the host goes on.
                dist.all_reduce(sums, group=self.group)
            except RuntimeError:
                self.wait(GRACE)  # names who is missing, which this sum's error does not
                raise

    # ---- around the steps

    def claim(self, name: str) -> bool:
        """Whether the work `name` is this process's to do: it is the first of its host to ask.
        Hosts need not share a disk, so what is on it each has to make for itself.
        """
        with self.answered():
            return self.store.add(f"claim {self.host} {name}", 1) == 1

    def wait(self, timeout: timedelta | None = None) -> None:
        """Until all processes are here. Raises Refusal where one is not within `timeout`."""
        with self.answered():
            dist.monitored_barrier(timeout=timeout or self.timeout)

    def told(self, value) -> list:
        """Every process's `value`, by rank."""
        self.wait()
        said = [None] * self.size
        with self.answered():
            dist.all_gather_object(said, value)
        return said

    def from_first(self, work: Callable):
        """What `work()` gives in rank 0, or the Refusal that it raises there, in every process."""
        said = [None]
        if self.first:
            try:
                said = [work()]
            except Refusal as refusal:
                said = [refusal]
        self.wait()
        with self.answered():
            dist.broadcast_object_list(said)
        if isinstance(said[0], Refusal):
            raise said[0]
        return said[0]

    def check_equal(self, what: str, tensors: dict, texts: dict | None = None) -> None:
        """Raise Refusal, naming rank and text, where `tensors`, in their order, or `texts` are not
        the same in all processes.
        """
        each = (tensor.detach().cpu().contiguous().numpy() for tensor in tensors.values())
        found = self.told({"numbers": digest(*(n.tobytes() for n in each))} | (texts or {}))
        usual = max(found, key=found.count)  # of equally many, rank 0's
        for rank, theirs in enumerate(found):
            if other := [key for key in usual | theirs if theirs.get(key) != usual.get(key)]:
                said = f"{what} is not the same in all processes: {', '.join(other)} of rank {rank}"
                remedy = "the same code, options, model, pictures and kind of GPU on every host; "
                remedy += f"where they are, {AGAIN}; and if it happens again, GPUS=1 (one process)"
                raise Refusal(said, "the same bits, since all take the same steps", remedy)

    def say(self, sentence: str) -> None:
        """An error, said by one process of each host for all: by the first that has one."""
        try:
            earlier = self.store.add(f"said {self.host}", 1) - 1
        except RuntimeError:  # the store is gone with the first host, or its torchrun
            earlier = self.number
        if not earlier:
            print(f"{sentence} (rank {self.rank} of {self.size})", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def answered(self):
        """Raises Refusal where the others do not answer."""
        try:
            yield
        except RuntimeError as error:
            # torchrun reports the earliest error as the cause, in whole seconds, so it is to see
            # the death of a process before this; and the first knows best who is missing.
            time.sleep(2 if self.first else 4)
            said = f"the other processes do not answer ({first_line(error)})"
            expected = f"an answer from all {self.size} within {self.timeout.total_seconds():g} s"
            remedy = f"{AGAIN}; who died is in torchrun's report, who hangs is named here only"
            raise Refusal(said, expected, remedy) from error
