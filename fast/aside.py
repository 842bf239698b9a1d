"""Small products beside large ones: a recording with two branches.

At rank 16 a product of LoRA keeps a few of a GPU's processors busy, and the frozen product beside
it not all of them. On a second stream of a recording they run at the same time
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-streams). The numbers are the same as on
one stream: the same products, added in the same order. What is not recorded has one stream, since
there the host is what is waited for.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


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
        self.given: set[int] = set()  # layers whose gradients are there

    @contextlib.contextmanager
    def while_recorded(self, part: Tensor) -> Iterator[None]:
        """Inside there is a second stream, if a pass is being recorded. part: a piece of what all
        layers read; the node of the backward pass that made it, and no other, reads what the second
        stream computes.
        """
        if recorded(part):
            self.stream, self.recording = self.stream or torch.cuda.Stream(), True
            part.grad_fn.register_prehook(lambda _: self.meet())
        try:
            yield
        finally:
            with contextlib.suppress(RuntimeError):  # of a recording that has failed already
                self.meet()  # after an error, too, or that of the open branch would hide it
            self.recording = self.apart = False
            self.held.clear()
            self.given.clear()

    @contextlib.contextmanager
    def branch(self, *reads: Tensor, go_on: bool = False) -> Iterator[None]:
        """Inside, kernels are the second stream's. They wait for all before them, or where they
        `go_on`, only for that stream's own. What they read is kept until the streams meet: its
        memory would otherwise be given to others while they run. What was made on the second stream
        need not be named.
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

    def gave(self, layer: nn.Module) -> None:
        """The gradients of `layer` go their way. Those of a layer that acts twice in a pass are
        added up at once, so they must be there.
        """
        if id(layer) in self.given:
            self.meet()
        self.given.add(id(layer))

    def meet(self) -> None:
        """What follows waits for the second stream. One that no kernel has used is not part of the
        recording, which would fail by waiting for it.
        """
        if self.apart:
            torch.cuda.current_stream().wait_stream(self.stream)
            self.apart = False
            self.held.clear()


ASIDE = Aside()
