"""Checkpoints by matrix: in whatever form a run trains, it goes on to the same bytes; and a state
is read without trusting it.
"""

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from inputs.files import Refusal
from keep import checkpoint
from tiny_run import assembled, keep, step

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = "checkpoints"


def restored(out: Path, **options):
    """A new run that has read the newest checkpoint under `out`."""
    vector = options.pop("vector", False)
    kept = keep(assembled(out, **options), vector)
    checkpoint.restore(kept, checkpoint.newest_state(out / ROOT))
    return kept


@pytest.mark.parametrize("eight_bit", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("first, then", [(True, False), (False, True), (False, False)])
def test_a_run_goes_on_to_the_same_bytes_with_and_without_the_vector(
    tmp_path, first, then, eight_bit
):
    whole = step(keep(assembled(tmp_path, use_8bit_adam=eight_bit)), 4)
    checkpoint.save_state(step(keep(assembled(tmp_path, use_8bit_adam=eight_bit), first), 2))
    again = restored(tmp_path, vector=then, use_8bit_adam=eight_bit)
    assert again.run.step == 2
    step(again, 2)
    assert again.run.trained.keys() == whole.run.trained.keys()
    for name, matrix in again.run.trained.items():
        assert torch.equal(matrix, whole.run.trained[name]), name
    ours, theirs = again.moments.read(), whole.moments.read()
    for name in ours:
        assert ours[name].keys() == theirs[name].keys()
        assert all(torch.as_tensor(v == theirs[name][k]).all() for k, v in ours[name].items())


def test_a_view_does_not_take_its_whole_vector_along(tmp_path):
    sizes = []
    for vector in (False, True):
        kept = step(keep(assembled(tmp_path / str(vector)), vector), 1)
        checkpoint.save_state(kept)
        sizes.append((tmp_path / str(vector) / ROOT / "000001" / "state.pt").stat().st_size)
    numbers = sum(each.numel() for each in kept.run.trained.values())
    assert abs(sizes[1] - sizes[0]) < 2e4 and sizes[1] < 12 * numbers + 2e5


def test_a_run_whose_every_step_was_skipped_has_no_moments_and_goes_on(tmp_path):
    kept = keep(assembled(tmp_path))
    kept.run.step = kept.run.loss_scale.skipped = 2
    checkpoint.save_state(kept)
    for vector in (False, True):
        assert restored(tmp_path, vector=vector).run.loss_scale.skipped == 2
    state = checkpoint.newest_state(tmp_path / ROOT)
    state["scale"]["skipped"] = 1
    assert "it holds" in checkpoint.wrong_numbers(kept.run, state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(eight_bit) -> the run, and its state after two steps, read anew."""
    made = {}
    for eight_bit in (True, False):
        out = tmp_path_factory.mktemp("saved")
        made[eight_bit] = out, step(keep(assembled(out, use_8bit_adam=eight_bit)), 2)
        checkpoint.save_state(made[eight_bit][1])
    return lambda eight_bit: (
        made[eight_bit][1],
        checkpoint.newest_state(made[eight_bit][0] / ROOT),
    )


@pytest.mark.parametrize("eight_bit", [True, False])
def test_numbers_of_another_shape_never_reach_the_run(saved, eight_bit):
    """A copy would stretch one number over all; bitsandbytes would read beyond a short one."""
    kept, state = saved(eight_bit)
    assert checkpoint.wrong_numbers(kept.run, state) == ""
    name = list(state["trained"])[3]
    moments = state["moments"][name]
    assert len(moments) == (7 if eight_bit else 3)
    for holder, key in [(state["trained"], name), *((moments, key) for key in list(moments))]:
        good = holder[key]
        bads = [torch.zeros(1, 3), None, "x", torch.zeros(3, device="meta")]
        for bad in [*bads, torch.full_like(torch.as_tensor(good), 7, dtype=torch.float64)]:
            holder[key] = bad
            assert f"of {name} it holds" in checkpoint.wrong_numbers(kept.run, state)
        if torch.is_tensor(good) and good.is_floating_point():
            holder[key] = torch.full_like(good, torch.nan)
            assert "not finite" in checkpoint.wrong_numbers(kept.run, state)
        holder[key] = good
    del moments["step"]
    before = {n: each.detach().clone() for n, each in kept.run.trained.items()}
    with pytest.raises(Refusal, match=r"no state that this project saved .*'step'"):
        checkpoint.restore(kept, state)
    assert all(torch.equal(each, before[n]) for n, each in kept.run.trained.items())


def test_other_layers_are_refused_and_one_is_named(saved):
    kept, state = saved(True)
    state["trained"]["mid.to_x.lora_A"] = torch.zeros(1)
    with pytest.raises(Refusal, match=r"adapts other layers: mid.to_x.lora_A"):
        checkpoint.restore(kept, state)


@pytest.mark.parametrize("after", [torch.nan, -torch.inf])
def test_what_is_not_finite_is_not_saved_and_is_named(tmp_path, after):
    for vector in (False, True):
        kept = step(keep(assembled(tmp_path), vector), 1)
        (*_, name), last = kept.run.trained, list(kept.moments.read().values())[-1]
        kept.run.trained[name].data[0, 1] = after
        with pytest.raises(Refusal, match=f"the adapter has (NaN|Inf) in {name}, so that it is"):
            checkpoint.save_state(kept)
        last["absmax2"][-1] = after  # which the adapter has it from
        with pytest.raises(Refusal, match=f"after step 1 the optimizer's absmax2 has .*{name}"):
            checkpoint.save_state(kept)
        checkpoint.save_state_once(kept)
        assert not (tmp_path / ROOT).exists()


# ---- a state is read without trusting it ---------------------------------------------------------


def put(root: Path, content: bytes, step: int = 2) -> Path:
    """A checkpoint whose sum is right, whatever it holds."""
    folder = root / f"{step:06d}"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(content)
    (folder / "state.sha256").write_text(checkpoint.sum_of(content))
    return root


class Malice:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def packed(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


GOOD = {kind: {} for kind in ("trained", "moments", "scale", "identity", "code", "config")}
GOOD |= {"step": 2, "code_changes": "", "commit": "", "unfused": ""}


def test_a_malicious_pickle_with_a_right_sum_does_nothing(tmp_path):
    mark = tmp_path / "done"
    for i, content in enumerate((packed({"step": Malice(mark)}), pickle.dumps(Malice(mark)))):
        with pytest.raises(Refusal, match=r"no state .* rm -r "):
            checkpoint.newest_state(put(tmp_path / str(i), content))
        assert not mark.exists()
    with pytest.raises(FileExistsError):  # and it is malicious: read carelessly, it acts, twice
        for _ in range(2):
            torch.load(io.BytesIO(packed(Malice(mark))), weights_only=False)


def test_a_state_that_unpacks_to_more_than_its_size_is_not_unpacked(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(Refusal, match="is compressed"):
        checkpoint.newest_state(put(tmp_path, file.getvalue()))


@pytest.mark.parametrize(
    "change", [{"step": True}, {"step": 3}, {"trained": [1]}, {"identity": None}, {"code": "x"}]
)
def test_a_state_of_other_types_or_of_another_step_is_refused(tmp_path, change):
    assert checkpoint.newest_state(put(tmp_path / "good", packed(GOOD)))["step"] == 2
    with pytest.raises(Refusal, match="no state that this project saved"):
        checkpoint.newest_state(put(tmp_path / "bad", packed(GOOD | change)))
    with pytest.raises(Refusal, match="KeyError"):
        checkpoint.newest_state(put(tmp_path / "less", packed({"step": 2})))


def test_a_checkpoint_of_the_format_before_is_refused_by_a_sentence(tmp_path):
    old = {"step": 2, "flat": torch.zeros(1), "modules": [], "optimizer": {}, "identity": {}}
    with pytest.raises(Refusal, match=r"earlier version .*one vector; expected .*--output-dir"):
        checkpoint.newest_state(put(tmp_path, packed(old)))


def test_the_newest_checkpoint_is_that_of_most_steps_whatever_its_name_sorts_as(tmp_path):
    for number in (999_999, 1_000_000):
        put(tmp_path, packed(GOOD | {"step": number}), number)
    (tmp_path / "²").mkdir()
    (tmp_path / "999999999").touch()
    assert checkpoint.newest_state(tmp_path)["step"] == 1_000_000
