"""Work done ahead of the one who needs it, by threads: pictures are decoded while the VAE encodes.

Threads, not processes: Pillow lets go of the interpreter while it decodes and resizes, so threads
run side by side; a process would import torch first (11 s and 0.5 GB each, measured on two cores)
and then hand back megabytes a picture through a pipe (27 pictures/s where threads gave 50).
"""

import collections
import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


def usable_cores() -> int:
    """Cores that this process may use; a container or taskset may allow fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def work_ahead(work: Callable, items: Iterable, depth: int) -> Iterator[Iterator]:
    """`work(item)` for each item, in the items' order, at most `depth` items ahead of the reader.

    Results depend on nothing but the item, so neither order nor content knows how many threads
    there are. An error in `work` is raised when its item's turn comes. Leaving the `with` block
    starts nothing more and waits for nothing: Ctrl-C is not kept waiting.
    """
    pool = ThreadPoolExecutor(min(usable_cores(), 8))  # more feed no encoder that exists
    begun = (pool.submit(work, item) for item in items)
    coming = collections.deque(itertools.islice(begun, depth))

    def results() -> Iterator:
        while coming:
            result = coming.popleft().result()
            coming.extend(itertools.islice(begun, 1))
            yield result

    try:
        yield results()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
