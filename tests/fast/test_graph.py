"""Recording and replaying a step, with a stand-in for the GPU: here nothing can be recorded."""

import contextlib

import pytest
import torch

from fast import graph


class Stage:
    """A step that adds its batch to a sum, and CUDA's calls as far as Recorded makes them."""

    def __init__(self, monkeypatch, error=None):
        self.sum, self.steps, self.recorded, self.said = torch.zeros(3), 0, 0, []
        self.stuck = None
        stage, self.error = self, error

        class Graph:
            def replay(self):
                stage.step(stage, self.inputs)

        @contextlib.contextmanager
        def record(recording, pool=None, **mode):
            """What is recorded is not carried out."""
            stage.mode = mode
            before, stage.recorded, stage.pool = stage.sum.clone(), stage.recorded + 1, pool
            try:
                yield
                recording.inputs = stage.inputs
            except RuntimeError:
                stage.stuck = pool  # as torch 2.11 leaves it
                raise
            finally:
                stage.sum.copy_(before)

        class Stream:
            def wait_stream(self, other):
                pass

        class Pool:
            id = property(id)

        @contextlib.contextmanager
        def use(pool):
            assert pool.id != stage.stuck, "already recording to mempool_id"
            yield

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", record)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "MemPool", Pool)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "use_mem_pool", use)
        self.recorded_step = graph.Recorded(self.step, [self.sum], self.said.append)

    def recorder(self, batch):
        self.recorded_step(self, batch)

    def step(self, run, batch):
        assert run is self
        self.steps, self.inputs = self.steps + 1, batch
        if self.error and self.steps > 2:
            error, self.error = self.error, None
            raise error
        self.sum += batch["x"].sum(0)


def batch(rows, value):
    return {"x": torch.full((rows, 3), float(value))}


def test_a_shape_is_recorded_when_it_comes_again_and_each_batch_is_added_once(monkeypatch):
    stage = Stage(monkeypatch)
    for rows, value in ((3, 1), (1, 10)):  # micro-batches of 3 + 1
        stage.recorder(batch(rows, value))
    assert stage.sum.tolist() == [3 + 10] * 3 and stage.recorded == 0 and stage.steps == 2
    for rows, value in ((3, 100), (1, 1000), (3, 10**4), (1, 10**5)):
        stage.recorder(batch(rows, value))
    assert stage.sum.tolist() == [3 + 10 + 300 + 1000 + 3 * 10**4 + 10**5] * 3
    # the second shape shares the first's pool
    assert stage.recorded == 2 and stage.pool == stage.recorded_step.pool.id
    assert len(stage.said) == 2 and "recorded a pass over 3 in" in stage.said[0]


def test_beyond_twelve_shapes_the_others_go_on_unrecorded_which_is_said_once(monkeypatch):
    stage = Stage(monkeypatch)
    for _ in range(3):
        for rows in range(1, 16):
            stage.recorder(batch(rows, 1))
    assert stage.sum.tolist() == [3 * sum(range(1, 16))] * 3 and stage.recorded == 12
    assert len(stage.said) == 13 and "12 shapes" in stage.said[-1]


def test_before_it_is_recorded_a_step_is_computed_twice(monkeypatch):
    """What is compiled may be compiled again in its second pass."""
    stage = Stage(monkeypatch)
    for _ in range(2):
        stage.recorder(batch(2, 3))
    assert stage.steps == 2 + 2  # the recording, and the replay
    assert stage.sum.tolist() == [12] * 3


def test_a_batch_is_copied_and_may_change_afterwards(monkeypatch):
    stage = Stage(monkeypatch)
    mine = batch(2, 1)
    stage.recorder(batch(2, 0))  # seen
    stage.recorder(mine)
    mine["x"].fill_(7)
    stage.recorder(batch(2, 5))
    assert stage.sum.tolist() == [2 + 10] * 3


def test_where_recording_fails_the_step_itself_goes_on_and_the_reason_is_said(monkeypatch):
    stage = Stage(monkeypatch, RuntimeError("operation not permitted when stream is capturing\nx"))
    for value in (1, 10, 100):
        stage.recorder(batch(2, value))
    assert stage.sum.tolist() == [222] * 3
    want = "steps are not recorded in a CUDA graph: operation not permitted"
    assert len(stage.said) == 1 and stage.said[0].startswith(want)


def test_a_recording_holds_for_its_own_thread(monkeypatch):
    """Beside other processes NCCL's watchdog is at work in another one."""
    stage = Stage(monkeypatch)
    for _ in range(2):
        stage.recorder(batch(1, 1))
    del stage.mode["stream"]
    assert stage.mode == {"capture_error_mode": "thread_local"}


def twice(stage):
    for _ in range(2):
        stage.recorder(batch(2, 1))


def test_running_out_of_memory_is_not_taken_for_a_failed_recording(monkeypatch):
    full = torch.cuda.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        twice(Stage(monkeypatch, full))
    in_its_wake = RuntimeError("capture was invalidated")
    in_its_wake.__context__ = full
    with pytest.raises(torch.cuda.OutOfMemoryError):
        twice(Stage(monkeypatch, in_its_wake))
