"""A second stream beside the first: no kernel may read what another has not yet written, or write
what another still reads. There is no GPU here, so streams are stand-ins that know what each has
waited for (Lamport 1978, https://doi.org/10.1145/359545.359563), and every operation of a pass is
looked at.
"""

import contextlib
import weakref

import pytest
import torch
from test_layers import adapted, gradient
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import loop
import model
import tiny_run
from conftest import make_batch
from fast import aside, layers
from fast.aside import ASIDE
from keep import faster

pytestmark = pytest.mark.usefixtures("one_thread")


class Stream:
    """What it has done, and what of others came before that: {stream: how many operations}."""

    def __init__(self, races, recorded=False):
        self.seen, self.races, self.recorded = {self: 0}, races, recorded

    def wait_stream(self, other):
        if not other.recorded:
            self.races.append("what is not recorded is waited for")
        self.recorded = True
        for each, count in other.seen.items():
            self.seen[each] = max(self.seen.get(each, 0), count)

    def after(self, what) -> bool:
        stream, count = what
        return self.seen.get(stream, 0) >= count


class Watch(TorchDispatchMode):
    """Notes who reads and writes which memory, and what is not in order."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.races, self.streams, self.beside = [], set(), 0
        self.main = self.now = Stream(self.races, recorded=True)
        self.wrote, self.read, self.born = {}, {}, {}
        self.freed = []  # (the stream it came from, who used it, what made it)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(self.races))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(aside, "recorded", lambda part: True)
        monkeypatch.setattr(ASIDE, "stream", None)

    @contextlib.contextmanager
    def on(self, stream):
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    def free(self, place, name):
        users = [*self.read.pop(place, []), *filter(None, [self.wrote.pop(place, None)])]
        self.freed.append((self.born.pop(place), users, name))

    def given_again(self):
        """Memory goes back to the stream it came from, and may be what that one asks for next."""
        for stream, users, name in self.freed:
            if stream is self.now and not all(map(stream.after, users)):
                self.races.append(f"what {name} made is overwritten while it is used")
        self.freed = [each for each in self.freed if each[0] is not self.now]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shares = [each.alias_info for each in func._schema.returns]
        if any(each and not each.is_write for each in shares):  # a view, which no kernel makes
            return func(*args, **(kwargs or {}))
        self.streams.add(self.now)
        if self.now is self.main and "mm" in str(func):
            self.beside += any(
                each.seen[each] > self.now.seen.get(each, 0) for each in self.streams
            )
        inputs = [each for each in tree_iter((args, kwargs)) if torch.is_tensor(each)]
        read = {each.untyped_storage()._cdata for each in inputs}
        named = {each.name: each for each in func._schema.arguments}
        values = [*zip([*named.values()][: len(args)], args, strict=True)]
        values += [(named[name], value) for name, value in (kwargs or {}).items()]
        written = {
            value.untyped_storage()._cdata
            for argument, value in values
            if argument.is_write and torch.is_tensor(value)
        }
        self.now.seen[self.now] += 1
        event = self.now, self.now.seen[self.now]
        for place in read:
            before = [self.wrote[place]] if place in self.wrote else []
            if not all(map(self.now.after, before + self.read.get(place, []) * (place in written))):
                self.races.append(f"{func} does not wait")
        answer = func(*args, **(kwargs or {}))
        for place in read - written:
            self.read.setdefault(place, []).append(event)
        for place in written:
            self.wrote[place], self.read[place] = event, []
        for made in filter(torch.is_tensor, tree_iter(answer)):
            storage = made.untyped_storage()
            if storage._cdata not in read | self.born.keys():
                self.given_again()
                self.born[storage._cdata], self.wrote[storage._cdata] = self.now, event
                weakref.finalize(storage, self.free, storage._cdata, str(func))
        return answer


def watched(monkeypatch, rank=4, checkpointing=None, dtype=torch.float32):
    unet, _, vector, _ = adapted(True, rank, dtype)
    if checkpointing is not None:
        model.use_gradient_checkpointing(unet.train(), checkpointing)
    with Watch(monkeypatch) as watch:
        loss, grad = gradient(unet, vector, make_batch(2))
    return watch, loss, grad


BLOCKS = ("mid_block.attentions.0",)


SLOW = [pytest.param(*each, marks=pytest.mark.slow) for each in ((1, None), (4, ()), (4, BLOCKS))]


@pytest.mark.parametrize("rank, checkpointing", [(4, None), *SLOW])
def test_nothing_is_read_too_early_or_freed_too_soon(monkeypatch, rank, checkpointing):
    """Rank 1 leaves padding between the matrices, so that they are copied together."""
    watch, loss, grad = watched(monkeypatch, rank, checkpointing)
    assert len(watch.streams) == 2 and watch.races == []
    monkeypatch.undo()
    unet, _, vector, _ = adapted(True, rank)
    if checkpointing is not None:
        model.use_gradient_checkpointing(unet.train(), checkpointing)
    for got, alone in zip((loss, grad), gradient(unet, vector, make_batch(2)), strict=True):
        assert torch.equal(got, alone)
    assert not (ASIDE.recording or ASIDE.apart or ASIDE.held)


def test_a_pass_without_fused_layers_waits_for_nothing(monkeypatch):
    unet, _, vector, _ = adapted(False)
    with Watch(monkeypatch) as watch:
        gradient(unet, vector, make_batch(2))
    assert len(watch.streams) == 1 and watch.races == []


def test_frozen_products_run_beside_the_small_ones(monkeypatch):
    """93 do, of 16 attention layers and 8 gates; 60 where either pass waits before its product."""
    watch, *_ = watched(monkeypatch)
    assert watch.beside > 90


def test_what_is_not_recorded_after_a_recording_has_one_stream(monkeypatch):
    unet, _, vector, _ = adapted(True)
    with Watch(monkeypatch) as watch:
        gradient(unet, vector, make_batch(2))
        monkeypatch.setattr(aside, "recorded", lambda part: False)
        watch.streams.clear()
        gradient(unet, vector, make_batch(2))
    assert watch.streams == {watch.main} and watch.races == []


def test_half_precision_reads_no_cast_too_early(monkeypatch):
    watch, *_ = watched(monkeypatch, dtype=torch.bfloat16)
    assert len(watch.streams) == 2 and watch.races == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"loraplus_lr_ratio": 4.0}, {"targets": ("all",), "gradient_checkpointing": True}],
)
def test_two_vectors_further_layers_and_recomputed_ones(tmp_path, monkeypatch, options):
    run = tiny_run.assembled(tmp_path, cuda_graph=False, **options)
    faster.faster(run, faster.Alone(), print)
    with Watch(monkeypatch) as watch:
        run.micro_step(run, make_batch(2))
    assert len(watch.streams) == 2 and watch.races == []


def test_after_an_error_nothing_is_left_on_the_second_stream(monkeypatch):
    """Or the recording ends with an error of its own, in the place of this one."""
    unet, _, vector, _ = adapted(True)
    back, calls = layers.Project.backward, iter(range(2))
    broken = staticmethod(lambda ctx, g: (next(calls), back(ctx, g))[1])
    monkeypatch.setattr(layers.Project, "backward", broken)
    with Watch(monkeypatch) as watch, pytest.raises(StopIteration):
        gradient(unet, vector, make_batch(2))
    (second,) = watch.streams - {watch.main}
    assert watch.main.after((second, second.seen[second])) and watch.races == []
    assert not (ASIDE.recording or ASIDE.apart or ASIDE.held)


class Forgetful(list):
    def __iadd__(self, others):
        return self


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, broken, said",
    [
        ("meet", lambda: None, "does not wait"),
        ("branch", lambda *_, **how: type(ASIDE).branch(ASIDE, go_on=True), "does not wait"),
        ("held", Forgetful(), "overwritten"),
    ],
)
def test_what_does_not_wait_is_seen(monkeypatch, name, broken, said):
    monkeypatch.setattr(ASIDE, name, broken)
    watch, *_ = watched(monkeypatch)
    assert any(said in race for race in watch.races), watch.races


def test_what_is_not_recorded_has_one_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", None)  # calling it would raise
    unet, _, vector, _ = adapted(True)
    assert gradient(unet, vector, make_batch(2))[1].norm() > 0


@pytest.mark.slow
@pytest.mark.parametrize("other", ["plugged in", "loop.diffusion_loss", "model.predict"])
def test_a_loss_of_another_form_has_one_stream(tmp_path, monkeypatch, other):
    """It may read the matrices, whose gradients are then added up before all are there."""
    run = tiny_run.assembled(tmp_path, cuda_graph=False)
    if other == "plugged in":
        run.loss = twice(loop.diffusion_loss)
    monkeypatch.setitem(faster.WRITTEN_FOR, other, "0" * 32)
    faster.faster(run, faster.Alone(), print)
    with Watch(monkeypatch) as watch:
        run.micro_step(run, make_batch(2))
    assert len(watch.streams) == 1 and watch.races == []


@pytest.mark.slow
@pytest.mark.parametrize("seen", [True, False])
def test_the_gradients_of_a_layer_that_acts_twice_are_waited_for(tmp_path, monkeypatch, seen):
    run = tiny_run.assembled(tmp_path, cuda_graph=False)
    faster.faster(run, faster.Alone(), print)
    run.loss = twice(loop.diffusion_loss)
    if not seen:
        monkeypatch.setattr(ASIDE, "gave", lambda layer: None)
    with Watch(monkeypatch) as watch:
        run.micro_step(run, make_batch(2))
    assert len(watch.streams) == 2 and bool(watch.races) != seen


def twice(loss):
    return lambda *given: loss(*given) + loss(*given)
