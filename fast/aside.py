"""Small products beside large ones: a recording with two branches.

At rank 16 a product of LoRA keeps a few of a GPU's processors busy, and the frozen product beside
it not all of them. On a second stream of a recording they run at the same time
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-streams). The numbers stay those of one
stream, since what is computed and in which order it is added does. What is not recorded has one
stream: there the host is what is waited for.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def recorded(x: Tensor) -> bool:
    """Whether what is computed of x now is recorded and not done."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class Aside:
    """The second stream of a pass that is being recorded; else nothing."""

    def __init__(self):
        self.stream: torch.cuda.Stream | None = None  # one for all recordings: each keeps memory
        self.recording = False
        self.apart = False  # whether it has work that nobody has waited for
        self.held: list[Tensor] = []

    @contextlib.contextmanager
    def while_recorded(self, part: Tensor) -> Iterator[None]:
        """Inside there is a second stream, if a pass is being recorded. part: made by the one node
        of the backward pass that reads the gradients which were computed there.
        """
        if recorded(part):
            self.stream, self.recording = self.stream or torch.cuda.Stream(), True
            part.grad_fn.register_prehook(lambda _: self.meet())
        try:
            yield
        finally:
            self.recording = self.apart = False
            self.held.clear()

    @contextlib.contextmanager
    def branch(self, *reads: Tensor, go_on: bool = False) -> Iterator[None]:
        """Inside, kernels are the second stream's. They wait for all before them, or where they
        `go_on`, only for that stream's own. What they read is kept until the streams meet: its
        memory would otherwise be given to others while they run.
        """
        if not self.recording:
            yield
            return
        self.apart = True
        self.held += reads
        if not go_on:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def meet(self) -> None:
        """What follows waits for the second stream. One that no kernel has used is not part of the
        recording, and waiting for it would spoil that.
        """
        if self.apart:
            torch.cuda.current_stream().wait_stream(self.stream)
            self.apart = False
            self.held.clear()


ASIDE = Aside()
