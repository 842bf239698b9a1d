"""The micro-step recorded in a CUDA graph: the very function that loop.py defines, less the host.

An SDXL micro-step is some ten thousand kernels of a few microseconds each, and a host that launches
them one by one takes longer than a GPU that runs them. Recorded once, they are replayed by a single
call (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). A recording holds for one
shape of batch and reads and writes fixed addresses, so each shape has its own, and a batch is
copied into the tensors that its recording reads.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from inputs.files import first_line

Batch = dict[str, Tensor]
MOST = 12  # shapes that are recorded: each takes seconds and keeps its kernels' parameters


class Recorded:
    """A run's `micro_step(run, batch)`, recorded for each shape of batch when that comes for the
    second time, then replayed; of more than MOST shapes the others are computed as they stand.

    sums: the tensors that it adds to; they are put back after the pass before recording, the second
    in which libraries choose kernels, make workspaces and compile. Where recording fails,
    `micro_step` itself is called from then on. `say` gets the reason, or the seconds that it took.
    """

    def __init__(self, micro_step: Callable, sums: list[Tensor], say=print):
        self.micro_step, self.sums, self.say = micro_step, sums, say
        self.recordings: dict[tuple, tuple[torch.cuda.CUDAGraph, Batch]] = {}
        self.eager, self.seen = False, set()
        # One memory for all recordings, and for what is not recorded: one of them runs at a time.
        self.pool, self.stream = torch.cuda.MemPool(), torch.cuda.Stream()

    def __call__(self, run, batch: Batch) -> None:
        key = tuple((name, t.shape, t.dtype) for name, t in batch.items())
        if key in self.seen and key not in self.recordings and not self.eager:
            self.record(key, run, batch)
        self.seen.add(key)
        if key not in self.recordings:
            return self.unrecorded(run, batch)
        recording, inputs = self.recordings[key]
        for name, tensor in batch.items():
            inputs[name].copy_(tensor, non_blocking=True)
        recording.replay()

    def unrecorded(self, run, batch: Batch) -> None:
        """The micro-step as it stands, in the recordings' memory: beside it there may be no room
        for a second step's.
        """
        # The memory of a pool is for the thread that asks: backward must not be another one's.
        with self.memory(), torch.autograd.set_multithreading_enabled(False):
            self.micro_step(run, batch)

    @contextlib.contextmanager
    def memory(self) -> Iterator[None]:
        """Inside, what is computed takes the recordings' memory, which is theirs only while one of
        them runs.
        """
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.use_mem_pool(self.pool), torch.cuda.stream(self.stream):
                yield
        finally:  # after an error, too: what was begun writes where the next step does
            torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, key: tuple, run, batch: Batch) -> None:
        """Warm up and record the step for batches like this one; `sums` end as they were. Of more
        than MOST shapes none is recorded, which is said once.
        """
        if len(self.recordings) == MOST:
            self.say(f"{MOST} shapes of batches are recorded; others are computed unrecorded")
            self.eager = True
            return
        began = time.perf_counter()
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        # On the host, since a peak of the GPU's memory is a peak, however short.
        before = [tensor.to("cpu", copy=True) for tensor in self.sums]
        self.unrecorded(run, inputs)
        recording = torch.cuda.CUDAGraph()
        try:
            # thread_local: NCCL's watchdog asks the GPU for news from a thread of its own, which
            # would spoil a recording that holds for all threads.
            how = {"stream": self.stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(recording, self.pool.id, **how):
                self.micro_step(run, inputs)
        except RuntimeError as error:  # an operation that no recording can hold
            for cause in (error, error.__context__):  # ending the recording fails in its wake
                if isinstance(cause, torch.cuda.OutOfMemoryError):
                    raise cause from None
            self.eager = True
            self.recordings.clear()
            # What failed may still hold the memory as being recorded.
            self.pool, self.stream = torch.cuda.MemPool(), torch.cuda.Stream()
            self.say(f"steps are not recorded in a CUDA graph: {first_line(error)}")
        else:
            self.recordings[key] = (recording, inputs)
            count, seconds = len(next(iter(batch.values()))), time.perf_counter() - began
            self.say(f"recorded a pass over {count} in {seconds:.1f} s, compilation included")
        for tensor, was in zip(self.sums, before, strict=True):
            tensor.copy_(was)
