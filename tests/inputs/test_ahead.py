"""Work is done ahead, in order, no further than it may, and stops when it is left."""

import threading
import time

import pytest

from inputs import ahead

# ---- ahead ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "depth"), [(1, 4), (3, 1), (3, 4), (3, 100)])
def test_ahead_keeps_the_order_and_never_runs_further_ahead_than_it_may(
    monkeypatch, workers, depth
):
    monkeypatch.setattr(ahead, "usable_cores", lambda: workers)
    begun = []

    def work(i):
        begun.append(i)
        time.sleep(0.003 * (i % 3))
        return i * i

    with ahead.work_ahead(work, range(30), depth) as results:
        for i, result in enumerate(results):
            assert result == i * i
            assert max(begun) <= i + depth
    assert sorted(begun) == list(range(30))


def test_ahead_raises_an_error_when_its_turn_comes_and_starts_nothing_after_it():
    def work(i):
        if i == 5:
            raise ValueError("five")
        return i

    given = []
    with (
        pytest.raises(ValueError, match="five"),
        ahead.work_ahead(work, range(100), 8) as results,
    ):
        for result in results:
            given.append(result)
    assert given == [0, 1, 2, 3, 4]


def test_ahead_waits_for_nothing_when_it_is_left(monkeypatch):
    monkeypatch.setattr(ahead, "usable_cores", lambda: 2)
    release, begun, before = threading.Event(), [], set(threading.enumerate())

    def work(i):
        begun.append(i)
        release.wait(10)

    asked = time.perf_counter()
    with pytest.raises(KeyboardInterrupt), ahead.work_ahead(work, range(100), 16):
        while len(begun) < 2:
            time.sleep(0.001)
        raise KeyboardInterrupt
    assert time.perf_counter() - asked < 5
    release.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    # No new thread is left; one of an earlier test may end meanwhile.
    assert sorted(begun) == [0, 1] and not set(threading.enumerate()) - before
