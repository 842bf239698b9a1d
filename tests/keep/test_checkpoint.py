"""Checkpoints by matrix: in whatever form a run trains, it goes on to the same bytes; and a state
of another run is not taken.
"""

import copy
from pathlib import Path

import pytest
import torch

import lora
from adapters import files
from inputs.files import Refusal
from keep import checkpoint, identity
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


@pytest.mark.parametrize("save_dtype", ["fp32", "fp16"])
def test_the_adapter_of_every_save_is_kept_in_both_layouts(tmp_path, save_dtype):
    """Also of those whose state is gone; and nothing else that draws lies in the run's folder."""
    asked = {"keep_adapters": True, "save_dtype": save_dtype, "checkpoints_total_limit": 1}
    kept, out = keep(assembled(tmp_path / "mine", **asked)), tmp_path / "mine"
    for count in (1, 2):
        checkpoint.save_state(step(kept, 1))
        state = out / f"{ROOT}/{count:06d}" / lora.FILE_NAME
        whole, peft = state.read_bytes(), out / f"adapters/{count:06d}.safetensors"
        assert peft.read_bytes() == whole
        ours = files.read(state).matrices
        theirs = files.read(out / f"adapters/kohya/mine-{count:06d}.safetensors")
        assert theirs.about["steps"] == str(count) and theirs.rank == 5
        for name, matrix in ours.items():
            assert any(matrix.equal(each) for each in theirs.matrices.values()), name
    assert len([*out.glob(f"{ROOT}/*")]) == 1 and len([*out.glob("adapters/*.safetensors")]) == 2
    assert not [*out.glob("*.safetensors")]
    checkpoint.save_state(step(keep(assembled(tmp_path / "other")), 1))
    assert not (tmp_path / "other" / "adapters").exists()


def test_a_view_does_not_take_its_whole_vector_along(tmp_path):
    sizes = []
    for vector in (False, True):
        kept = step(keep(assembled(tmp_path / str(vector)), vector), 1)
        checkpoint.save_state(kept)
        sizes.append((tmp_path / str(vector) / ROOT / "000001" / "state.pt").stat().st_size)
    numbers = sum(each.numel() for each in kept.run.trained.values())
    qmaps = 2 * 256 * 4 * len(kept.run.trained)
    assert abs(sizes[1] - sizes[0]) < 2e4 and sizes[1] < 12 * numbers + 2e5 + qmaps


def test_a_run_whose_every_step_was_skipped_has_no_moments_and_goes_on(tmp_path):
    kept = keep(assembled(tmp_path))
    kept.run.step = kept.run.loss_scale.skipped = 2
    checkpoint.save_state(kept)
    for vector in (False, True):
        again = restored(tmp_path, vector=vector)
        assert again.run.loss_scale.skipped == 2 and not again.run.optimizer.state


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


def refused(kept, state) -> str:
    """What the refusal of `state` says; the run's own numbers are as they were."""
    before = {name: each.detach().clone() for name, each in kept.run.trained.items()}
    with pytest.raises(Refusal, match="What to do: use the code") as refusal:
        checkpoint.restore(kept, state)
    assert all(torch.equal(each, before[name]) for name, each in kept.run.trained.items())
    return str(refusal.value)


@pytest.mark.parametrize("eight_bit", [True, False])
def test_numbers_of_another_shape_never_reach_the_run(saved, eight_bit):
    """A copy would stretch one number over all; bitsandbytes would read beyond a short one."""
    kept, state = saved(eight_bit)
    name = list(state["trained"])[3]
    moments = state["moments"][name]
    assert len(moments) == (7 if eight_bit else 3)
    for holder, key in [(state["trained"], name), *((moments, key) for key in list(moments))]:
        good = holder[key]
        for bad in (torch.zeros(1, 3), torch.as_tensor(good).to(torch.float64), "x"):
            holder[key] = bad
            assert f"1 differences; {'trained' if key == name else 'moments'} {name}" in refused(
                kept, state
            )
        holder[key] = good
    checkpoint.restore(kept, copy.deepcopy(state))
    del moments["step"]
    assert f"moments {name} step: nothing, not " in refused(kept, state)


def test_all_that_differs_is_counted_and_the_first_are_named(saved):
    kept, state = saved(True)
    state["trained"]["mid.to_x.lora_A"] = torch.zeros(1)
    lost = next(iter(state["trained"]))
    del state["trained"][lost], state["moments"][lost]
    said = refused(kept, state)
    assert "other layers or another optimizer (9 differences; " in said
    for words in (f"trained {lost}: nothing, not torch.float32 [", f"moments {lost} step: nothing"):
        assert words in said
    state["moments"][lost] = kept.moments.read()[lost]
    assert "; trained mid.to_x.lora_A: torch.float32 [1], not nothing)" in refused(kept, state)


def test_the_optimizer_of_another_start_is_noticed(saved):
    """As where its options are edited in the code, and the run goes on with leave."""
    (_, eight), (kept, _) = saved(True), saved(False)
    assert "exp_avg: nothing, not torch.float32 [" in refused(kept, eight)


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


# ---- which one is read ---------------------------------------------------------------------------


def put(root: Path, step: int, state: dict) -> None:
    """A checkpoint that is whole."""
    folder = root / f"{step:06d}"
    folder.mkdir(parents=True)
    torch.save(state, folder / "state.pt")
    (folder / "state.sha256").write_text(checkpoint.sum_of((folder / "state.pt").read_bytes()))


def test_a_checkpoint_of_an_earlier_format_is_refused_by_a_sentence(tmp_path):
    """It kept no digests of code, so all of it counts as changed, and holds no matrix by name."""
    put(tmp_path, 2, {"step": 2, "flat": torch.zeros(1), "modules": [], "identity": {}})
    state, kept = checkpoint.newest_state(tmp_path), keep(assembled(tmp_path))
    with pytest.raises(Refusal, match=r"its code has changed: lora.LoRALinear;.*--output-dir"):
        identity.check_code(kept.run.config, kept.code, state)
    assert "trained" in refused(kept, state)


def test_the_newest_checkpoint_is_that_of_most_steps_whatever_its_name_sorts_as(tmp_path):
    for number in (999_999, 1_000_000):
        put(tmp_path, number, {"step": number})
    (tmp_path / "²").mkdir()
    (tmp_path / "999999999").touch()
    assert checkpoint.newest_state(tmp_path)["step"] == 1_000_000
