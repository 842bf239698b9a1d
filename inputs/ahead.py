"""Work done ahead of the one who needs it, by threads: pictures are decoded while the VAE encodes.

Threads, not processes: Pillow lets go of the interpreter while it decodes and resizes, so threads
run side by side; a process would import torch first (11 s and 0.5 GB each, measured on two cores)
and then hand back megabytes a picture through a pipe (27 pictures/s where threads gave 50).
"""

import collections
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


def usable_cores() -> int:
    """Cores that this process may use; a container or taskset may allow fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Ahead:
    """`work(item)` for each item, in the items' order, at most `depth` items ahead of the reader.

    Results depend on nothing but the item, so neither order nor content knows how many `workers`
    there are. An error in `work` is raised when its item's turn comes. Leaving the `with` block
    starts nothing more and waits for nothing: Ctrl-C is not kept waiting.

    given: results handed out; waited: seconds for which the reader stood still; seconds: from the
    first result asked for to the end.
    """

    def __init__(self, work: Callable, items: Iterable, depth: int, workers: int = 0):
        workers = workers or min(usable_cores(), 8)  # more feed no encoder that there is
        self.work, self.items, self.pool = work, iter(items), ThreadPoolExecutor(workers)
        self.given, self.waited, self.began, self.seconds = 0, 0.0, 0.0, 0.0
        self.coming = collections.deque(self._submit(depth))

    def _submit(self, count: int) -> Iterator:
        return (self.pool.submit(self.work, i) for i in itertools.islice(self.items, count))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.began if self.given else 0.0
        self.pool.shutdown(wait=False, cancel_futures=True)

    def __iter__(self):
        return self

    def __next__(self):
        asked = time.perf_counter()
        self.began = self.began or asked
        if not self.coming:
            raise StopIteration
        result = self.coming.popleft().result()
        self.coming.extend(self._submit(1))
        self.given, self.waited = self.given + 1, self.waited + time.perf_counter() - asked
        return result

    def said(self, what: str) -> str:
        """The line that tells how fast it went."""
        rate, share = self.given / self.seconds, self.waited / self.seconds
        return (
            f"encoded {self.given:,} {what} in {self.seconds:.1f} s: {rate:.1f} {what}/s; the "
            f"encoder waited {share:.0%} of the time"
        )
