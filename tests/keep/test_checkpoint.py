"""Checkpoints by matrix: in whatever form a run trains, it goes on to the same bytes; and a state
of another run is not taken.
"""

from pathlib import Path

import pytest
import torch

import lora
from adapters import files
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
@pytest.mark.parametrize(
    "first, then",
    [(True, False), (False, True), pytest.param(False, False, marks=pytest.mark.slow)],
)
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


@pytest.mark.slow
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


def test_a_state_of_other_layers_or_of_another_optimizer_never_reaches_the_run(tmp_path):
    """As where the code is edited, and the run goes on with leave. A copy would stretch one number
    over a matrix.
    """
    kept = step(keep(assembled(tmp_path)), 2)
    checkpoint.save_state(kept)
    first, second, *_ = kept.run.trained

    def refused(said: str, **changed) -> None:
        state = checkpoint.newest_state(tmp_path / ROOT)
        state |= {k: state[k] | v if k == "trained" else v for k, v in changed.items()}
        before = {name: each.detach().clone() for name, each in kept.run.trained.items()}
        with pytest.raises(Refusal, match="What to do: use the code") as refusal:
            checkpoint.restore(kept, state)
        assert all(torch.equal(each, before[name]) for name, each in kept.run.trained.items())
        assert said in str(refusal.value)

    one, other = {first: torch.zeros(1)}, {second: torch.zeros(1), "x": torch.ones(1)}
    refused(f"AdamW8bit, and of other shapes {first};", trained=one)
    refused(f"of other shapes {second}, x;", trained=other)
    refused("AdamW, and of other shapes nothing; expected AdamW8bit", optimizer="AdamW")


@pytest.mark.parametrize("after", [torch.nan, -torch.inf])
def test_what_is_not_finite_is_not_saved_and_is_named(tmp_path, after):
    for vector in (False, True):
        kept = step(keep(assembled(tmp_path), vector), 1)
        (*_, name), last = kept.run.trained, list(kept.moments.read().values())[-1]
        kept.run.trained[name].data[0, 1] = after
        with pytest.raises(Refusal, match=f"the adapter's {name} has (NaN|Inf), so that it is"):
            checkpoint.save_state(kept)
        last["absmax2"][-1] = after  # which the adapter has it from
        with pytest.raises(Refusal, match=f"after step 1 the optimizer's absmax2 of {name} has"):
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


def test_the_newest_checkpoint_is_that_of_most_steps_whatever_its_name_sorts_as(tmp_path):
    for number in (999_999, 1_000_000):
        put(tmp_path, number, {"step": number})
    (tmp_path / "²").mkdir()
    (tmp_path / "999999999").touch()
    assert checkpoint.newest_state(tmp_path)["step"] == 1_000_000
