"""Several processes, one run: torchrun --nproc-per-node 2 loop.py t4

torchrun starts one process for each GPU and tells it its number, its rank. Each computes its share
of a step's examples, and the sum of their gradients is one all-reduce of the flat vector, the
step's socket exchange. What is here is that, and what is around it: who has which share, who
encodes which block of pictures, who speaks, and how the others learn that one has died or hangs.

A GPU that hangs inside a sum is ended by NCCL's own watchdog, a minute after the timeout and
without a rank's name: all processes have reached that meeting point.

For the last, every process keeps a sign in torchrun's store: how many meeting points (sums and
waits) it has reached, and a number that moves while it works between two of them. One that is
behind and shows no new sign within the timeout, or whose process is gone, ends the others.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from inputs.files import Refusal, digest, first_line

POLL = 0.05  # s between two looks at the others while waiting for them
GRACE = 5.0  # s that a process gets to end by itself, its state saved, before it is ended
DONE = sys.maxsize  # the count of a process that nobody waits for any more
AGAIN = "give the same command again: it continues from its newest checkpoint"


class Team:
    """One of `size` processes of this host, whose store is at host:port; timeout in seconds.

    host_store: whether rank 0 has to provide the store, as without torchrun. attempt: which start
    of these processes it is, counted by torchrun --max-restarts. asked: whether this process was
    asked to stop; what all answered in a step's exchange is known as `stop`.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        host: str,
        port: int,
        timeout: float,
        host_store: bool = False,
        attempt: str = "0",
    ):
        self.rank, self.size, self.first, self.timeout = rank, size, rank == 0, timeout
        self.count, self.beats, self.arrived = 0, 0, time.monotonic()
        self.seen: dict[int, tuple[tuple, float]] = {}  # a rank's last sign, and when it was new
        self.noticed, self.left = threading.Event(), False
        self.asked: Callable[[], bool] = lambda: False
        self.how_many_asked = torch.zeros(())  # on the host
        # Two connections, since one is blocked while it waits for a key: the watch needs its own.
        self.store, self.watched = (
            dist.PrefixStore(
                attempt,
                dist.TCPStore(
                    *(host, port),
                    is_master=server,
                    timeout=timedelta(seconds=timeout),
                    wait_for_workers=False,
                ),
            )
            for server in (host_store and self.first, False)
        )
        self.sign("starting")

    def __enter__(self):
        self.stdout = sys.stdout
        if not self.first:
            sys.stdout = open(os.devnull, "w")  # what is said of the run is said by the first
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, error, *_):
        self.noticed.set()
        if not self.first:
            sys.stdout.close()
        sys.stdout = self.stdout
        if error is None:
            self.leave()  # after an error the group stays: taking it down would wait for the others

    def start(self, device: torch.device) -> torch.device:
        """The device that this process computes on; from here on it can be reached by the others.

        Raises Refusal where there are fewer GPUs than processes, or the others do not come.
        """
        if device.type == "cuda":
            found = torch.cuda.device_count()
            if self.size > found or device.index is not None:
                raise Refusal(
                    f"{self.size} processes on device {device}, and {found} GPUs are here",
                    "a GPU for each process, and no number in --device",
                    f"torchrun --nproc-per-node {found}, or make train GPUS={found}, with "
                    "--device cuda",
                )
            device = torch.device("cuda", self.rank)
            # Before anything touches a GPU: pinned memory, bitsandbytes and Triton use the current.
            torch.cuda.set_device(device)
            self.how_many_asked = self.how_many_asked.pin_memory()  # exchange() says why
        self._arrive("starting")
        # NCCL ends a process that waits too long with a page of its own: after our one sentence.
        seconds = self.timeout + (60 if device.type == "cuda" else 0)
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=seconds),
                device_id=device if device.type == "cuda" else None,
            )
            if device.type == "cuda":
                connect(device)
        except RuntimeError as error:
            raise self._gone(error) from error
        if device.type == "cuda":  # whose roundings, and the dtype that "auto" takes, are its own
            self.check_equal("the kind of GPU", None, torch.cuda.get_device_name(device))
        return device

    def leave(self) -> None:
        """This process needs the others no more."""
        if not self.left:
            self.left = True
            self.noticed.set()
            self.count = DONE
            with contextlib.suppress(Refusal):  # nobody is there to be told
                self.sign("done")
            if dist.is_initialized():
                dist.destroy_process_group()

    def share(self, numbers: range) -> range:
        """This process's part of `numbers`: as many as the others', or one more or fewer, or none.

        The last ranks have the larger parts, since the first also logs and saves.
        """
        n = len(numbers)
        return numbers[self.rank * n // self.size : (self.rank + 1) * n // self.size]

    def largest_share(self, n: int) -> int:
        return -(-n // self.size)

    def exchange(self, run) -> None:
        """The step's socket: the gradient, run.loss_sum and how many processes were asked to stop
        become their sums over all processes, the same bits in each.

        All that a step decides is decided on these sums, so every process decides the same. The
        small ones go apart from the vector, whose own end is the adapter's.
        """
        for group in run.optimizer.param_groups:
            for vector in group["params"]:
                self.all_reduce(vector.grad)
        asked = torch.full_like(run.loss_sum, bool(self.asked()))
        self.all_reduce(small := torch.stack([run.loss_sum, asked]))  # (2,)
        run.loss_sum.copy_(small[0])
        # Into pinned memory and without waiting: the number is there once the step has waited for
        # its loss, which comes later in the same stream.
        self.how_many_asked.copy_(small[1], non_blocking=True)

    @property
    def stop(self) -> bool:
        """Whether any process was asked to stop before the last step's exchange; to be read after
        that step.
        """
        return self.how_many_asked.item() > 0

    def all_reduce(self, sums: Tensor) -> None:
        """`sums`, in place, becomes the sum over all processes, the same bits in each."""
        self._arrive("training")
        try:
            dist.all_reduce(sums)  # Gloo waits here; NCCL's is a kernel, and the host goes on
        except RuntimeError as error:
            raise self._gone(error) from error

    def claim(self, name: str) -> bool:
        """Whether the work `name` is this process's to do: it is the first to ask. Who asks is at
        work, so this is a sign of life, too.
        """
        self.sign("encoding")
        with self._store_at_work():
            return self.store.add(f"claim {name}", 1) == 1

    def sign(self, what: str) -> None:
        """At work on `what`: the others can see that this process goes on."""
        self.beats += 1
        with self._store_at_work():
            self.store.set(f"sign {self.rank}", f"{self.count} {self.beats} {os.getpid()} {what}")

    def wait(self, what: str) -> None:
        """Until all processes are here. Raises Refusal if one dies or hangs."""
        self._arrive(what)
        while not self._all_here():
            if lost := self._lost(self.store):
                self.noticed.set()
                raise lost
            time.sleep(POLL)

    @contextlib.contextmanager
    def first_alone(self, what: str):
        """The first process does the block before the others do."""
        if not self.first:
            self.wait(what)
        yield
        if self.first:
            self.wait(what)

    def check_equal(self, what: str, tensors: dict[str, Tensor] | None, text: str = "") -> None:
        """Raise Refusal, naming the ranks, where `tensors`, in their order, or `text` are not the
        same in all processes.
        """
        each = (tensor.detach().cpu().contiguous().numpy() for tensor in (tensors or {}).values())
        bits = digest(*(numbers.tobytes() for numbers in each), text)
        found = self._told(bits, what)
        usual = Counter(found).most_common(1)[0][0]  # of equally many, rank 0's
        if others := [str(rank) for rank, theirs in enumerate(found) if theirs != usual]:
            raise Refusal(
                f"{what} is not the same in all processes: rank {', '.join(others)} differs",
                "the same bits, since all take the same steps",
                f"{AGAIN}; if it happens again, GPUS=1 (one process), or GPUs of one kind",
            )

    def first_says(self, key: str, value: str) -> str:
        """Rank 0's `value`, in every process. key: what it is about."""
        return self._told(value, key)[0].decode()

    def _told(self, value: str, what: str) -> list[bytes]:
        """Every process's `value`, by rank."""
        key = f"told {self.count}"  # that no other meeting point has
        with self._store_at_work():
            self.store.set(f"{key} {self.rank}", value)
            self.wait(what)
            return [self.store.get(f"{key} {rank}") for rank in range(self.size)]

    def why(self) -> str:
        """Which process has died or hangs, if this one was told to end for that; else empty."""
        try:
            return f"error: {lost}" if (lost := self._lost(self.store)) else ""
        except Refusal as no_store:
            return f"error: {no_store}"

    def say(self, sentence: str, store: dist.Store | None = None) -> None:
        """An error, said by one process for all: by the first that has one."""
        with contextlib.suppress(RuntimeError):  # without a store, each speaks for itself
            if (store or self.store).add("said", 1) > 1:
                return
        alone = "; GPUS=1 keeps to the first GPU" if torch.cuda.is_initialized() else ""
        said = f"{sentence} (rank {self.rank} of {self.size}{alone})"
        print(said, file=sys.stderr, flush=True)

    # ---- who has died, who hangs

    @contextlib.contextmanager
    def _store_at_work(self):
        """Raises Refusal where the store cannot be reached any more: it is torchrun's."""
        try:
            yield
        except RuntimeError as error:
            self.noticed.set()
            raise Refusal(
                f"rank {self.rank} has no store ({first_line(error)}): torchrun has died",
                "torchrun at work beside its processes",
                AGAIN,
            ) from error

    def _arrive(self, what: str) -> None:
        self.count, self.arrived = self.count + 1, time.monotonic()
        self.sign(what)

    def _signs(self, store: dist.Store) -> dict[int, tuple[int, int, int, str]]:
        """Each other rank's count, beats, process and words; zeros until it has begun."""
        signs = dict.fromkeys(range(self.size), (0, 0, 0, "not yet started"))
        del signs[self.rank]
        with self._store_at_work():
            for rank in signs:
                if store.check([key := f"sign {rank}"]):
                    *numbers, what = store.get(key).decode().split(maxsplit=3)
                    signs[rank] = (*map(int, numbers), what)
        return signs

    def _all_here(self) -> bool:
        return all(count >= self.count for count, *_ in self._signs(self.store).values())

    def _lost(self, store: dist.Store) -> Refusal | None:
        """What there is to say of a process that will not come; None while all may yet come."""
        now = time.monotonic()
        for rank, sign in self._signs(store).items():
            count, _, process, what = sign
            if self.seen.get(rank, (None,))[0] != sign:
                self.seen[rank] = (sign, now)
            silent = now - max(self.seen[rank][1], self.arrived)
            if process and count < DONE and not alive(process):
                found = f"rank {rank} has died (process {process}, last seen {what})"
            elif count < self.count < DONE and silent > self.timeout:
                found = f"rank {rank} gives no sign for {silent:.0f} s (last seen {what})"
            else:
                continue
            return Refusal(
                found, f"signs of life from all {self.size} within {self.timeout:g} s", AGAIN
            )
        return None

    def _gone(self, error: RuntimeError) -> Refusal:
        """An exchange failed: who is the reason? What torch says where nobody is found to be."""
        self.noticed.set()
        until = time.monotonic() + GRACE
        while time.monotonic() < until:
            if lost := self._lost(self.store):
                return lost
            time.sleep(POLL)
        return Refusal(
            f"rank {self.rank} lost touch with the others ({first_line(error)})",
            f"{self.size} processes that reach each other",
            AGAIN,
        )

    def _watch(self) -> None:
        """In a thread of its own: while NCCL waits, the process itself can do nothing."""
        while not self.noticed.wait(min(1.0, self.timeout / 4)):
            try:
                lost = self._lost(self.watched)
            except Refusal as no_store:
                lost = no_store
                self.noticed.clear()  # the process itself may not have met it yet
            if lost and not self.noticed.wait(GRACE):
                self.say(f"error: {lost}", self.watched)  # self.store may be waiting for a key
                os._exit(1)


def connect(device: torch.device) -> None:
    """A first sum, at which NCCL makes its connections and buffers: here, so that what fails does
    so before an hour of encoding, and so that the memory plan sees what they leave.
    """
    dist.all_reduce(torch.zeros(2**24, device=device))
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


def alive(pid: int) -> bool:
    """Whether the process is there and not a zombie, which has ended and waits for its parent."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # no /proc, or another user's
        return True


def join(timeout: float) -> Team | None:
    """The processes that torchrun started, this one among them; None where it is alone."""
    env = os.environ
    size, local = int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_WORLD_SIZE", 0))
    if size == 1:
        return None
    if local != size:  # the cache is shared by its disk, and a death is seen by its process number
        raise Refusal(
            f"{size} processes, of which {local} are on this host",
            "all of them on one host",
            "torchrun --standalone --nproc-per-node GPUS loop.py RECIPE",
        )
    try:
        return Team(
            int(env["RANK"]),
            size,
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
            timeout,
            host_store=env.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            attempt=env.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )
    except (KeyError, RuntimeError) as error:
        raise Refusal(
            f"rank {env.get('RANK')} of {size} does not reach the others ({first_line(error)})",
            "the variables and the store that torchrun provides",
            "start them with torchrun --standalone --nproc-per-node GPUS loop.py RECIPE",
        ) from error
