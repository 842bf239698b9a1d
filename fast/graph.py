"""The micro-step recorded in a CUDA graph: the very function that loop.py defines, less the host.

An SDXL micro-step is some ten thousand kernels of a few microseconds each, and a host that launches
them one by one takes longer than a GPU that runs them. Recorded once, they are replayed by a single
call (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). A recording holds for one
shape of batch and reads and writes fixed addresses, so each shape has its own, and a batch is
copied into the tensors that its recording reads.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from inputs.files import first_line

Batch = dict[str, Tensor]


class Recorded:
    """A run's `micro_step(run, batch)`, recorded once for each shape of batch, then replayed.

    sums: the tensors that it adds to; they are put back after the `warm_up` passes before
    recording, in which libraries choose their kernels and make workspaces. Where recording fails,
    `micro_step` itself is called from then on. `say` gets the reason, or the seconds that it took.
    """

    def __init__(self, micro_step: Callable, sums: list[Tensor], say=print, warm_up=1):
        self.micro_step, self.sums, self.say, self.warm_up = micro_step, sums, say, warm_up
        self.recordings: dict[tuple, tuple[torch.cuda.CUDAGraph, Batch]] = {}
        self.pool = None  # one for all recordings: only one of them runs at a time
        self.eager = False

    def __call__(self, run, batch: Batch) -> None:
        key = tuple((name, t.shape, t.dtype) for name, t in batch.items())
        if not self.eager and key not in self.recordings:
            self.record(key, run, batch)
        if self.eager:
            return self.micro_step(run, batch)
        recording, inputs = self.recordings[key]
        for name, tensor in batch.items():
            inputs[name].copy_(tensor, non_blocking=True)
        recording.replay()

    def record(self, key: tuple, run, batch: Batch) -> None:
        """Warm up and record the step for batches like this one; `sums` end as they were."""
        began = time.perf_counter()
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        # On the host, since a peak of the GPU's memory is a peak, however short.
        before = [tensor.to("cpu", copy=True) for tensor in self.sums]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.warm_up):
                self.micro_step(run, inputs)
        torch.cuda.current_stream().wait_stream(side)
        recording = torch.cuda.CUDAGraph()
        try:
            # thread_local: NCCL's watchdog asks the GPU for news from a thread of its own, which
            # would spoil a recording that holds for all threads.
            with torch.cuda.graph(recording, self.pool, capture_error_mode="thread_local"):
                self.micro_step(run, inputs)
        except RuntimeError as error:  # an operation that no recording can hold
            for cause in (error, error.__context__):  # ending the recording fails in its wake
                if isinstance(cause, torch.cuda.OutOfMemoryError):
                    raise cause from None
            self.eager = True
            self.recordings.clear()
            self.say(f"steps are not recorded in a CUDA graph: {first_line(error)}")
        else:
            self.pool = recording.pool()
            self.recordings[key] = (recording, inputs)
            count, seconds = len(next(iter(batch.values()))), time.perf_counter() - began
            self.say(f"recorded a pass over {count} in {seconds:.1f} s, compilation included")
        for tensor, was in zip(self.sums, before, strict=True):
            tensor.copy_(was)
