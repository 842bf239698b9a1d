"""The next step's first batch, made while a GPU is still at work on this step."""

import itertools
from collections.abc import Callable, Iterator

from torch import Tensor

Batches = Iterator[dict[str, Tensor]]


class Prefetch:
    """The step's socket `batches`: what `inner`, loop.step_batches(), gives for each step."""

    def __init__(self, inner: Callable[..., Batches]):
        self.inner, self.ready = inner, {}  # ready: the batches of the step to come, by its number

    def __call__(self, run, step: int) -> Batches:
        yield from self.ready.pop(step, None) or self.inner(run, step)
        # The host is here when it has launched the step's last pass, and before it waits for it.
        # (Under --no-cache a picture that cannot be encoded is met a step early, which is redone.)
        if step + 1 < run.config.max_train_steps:
            later = self.inner(run, step + 1)
            self.ready = {step + 1: itertools.chain(list(itertools.islice(later, 1)), later)}
