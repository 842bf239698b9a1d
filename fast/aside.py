"""Small products beside large ones: a recording with two branches.

At rank 16 a product of LoRA occupies a few of a GPU's processors, while the frozen product beside it
leaves some idle. On a second stream of the same recording it runs at the same time
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-streams). The numbers are those of one
stream: what is computed, and in which order it is added, stays. Launched one by one, everything
stays on one stream, since there the host is what is waited for.
"""

import contextlib
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

LAG = 6  # layers whose gradients may still be on their way; so long their inputs stay in memory


class Aside:
    """What `while_recorded` opens, for the one recording that is made at a time."""

    def __init__(self):
        self.stream: torch.cuda.Stream | None = None  # the second one, while a recording uses it
        self.held: deque[tuple[torch.cuda.Event, tuple]] = deque()

    @contextlib.contextmanager
    def while_recorded(self, last: torch.autograd.graph.Node) -> Iterator[None]:
        """Inside, if it is recorded, a second stream may be used; node `last` of the backward pass,
        the first that reads what was computed there, waits for it.
        """
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            yield
            return
        self.stream = self.stream or torch.cuda.Stream()
        last.register_prehook(lambda _: self.wait())
        try:
            yield
        finally:
            self.stream = None
            self.held.clear()

    @contextlib.contextmanager
    def branch(self) -> Iterator[None]:
        """Inside, kernels are of the second stream, where there is one; they wait for all before."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """What the branch has come to."""
        return self.stream and self.stream.record_event()

    def reach(self, mark: torch.cuda.Event | None) -> None:
        """Have what follows wait for a mark."""
        if mark:
            torch.cuda.current_stream().wait_event(mark)

    def keep(self, mark: torch.cuda.Event | None, *tensors: Tensor) -> None:
        """Keep tensors, which the branch reads, until it has come to `mark`: freed earlier, their
        memory would be written anew beside it.
        """
        if mark:
            self.held.append((mark, tensors))
        while len(self.held) > LAG:
            self.reach(self.held.popleft()[0])

    def wait(self) -> None:
        """Have what follows wait for all of the branch."""
        while self.held:
            self.reach(self.held.popleft()[0])


ASIDE = Aside()
