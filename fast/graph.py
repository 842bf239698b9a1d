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
import torch.distributed as dist
from torch import Tensor

from inputs.files import Refusal, first_line

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
        # NCCL's watchdog asks the GPU for news from its own thread, which would spoil a recording
        # that holds for all threads.
        mode = {"capture_error_mode": "thread_local"} if dist.is_initialized() else {}
        try:
            with torch.cuda.graph(recording, pool=self.pool, **mode):
                self.micro_step(run, inputs)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an operation that no recording can hold
            if isinstance(error.__context__, torch.cuda.OutOfMemoryError):
                raise error.__context__ from None  # ending the recording failed in its wake
            if torch.are_deterministic_algorithms_enabled():  # its bits were promised as recorded
                raise Refusal(
                    f"--deterministic, and steps cannot be recorded ({first_line(error)})",
                    "a step that a CUDA graph can hold",
                    "--no-cuda-graph with a new --output-dir, or no --deterministic",
                ) from error
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
