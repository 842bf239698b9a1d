"""Whole runs with held-out pictures: the same run, its best step, an interruption, several
processes.
"""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

import lora
from conftest import ink_rows, trainer, write_pictures
from inputs.files import data_section
from keep import checkpoint, training
from learn.judge import Judge
from runs import Killed, adapter, log, matrices

QUICK = ("--preview-steps", "0", "--no-fused")


@pytest.fixture(scope="module")
def held(tmp_path_factory) -> tuple[str, str]:
    """Four drawings that no run here trains on."""
    folder = write_pictures(tmp_path_factory.mktemp("held") / "ink", ink_rows(10)[6:])
    return "--validation-data", str(folder)


@pytest.fixture
def worse(monkeypatch):
    """worse(3): from the fourth validation on the held-out loss is higher by a constant."""
    losses = held_losses()

    def after(count: int) -> None:
        calls = []

        def measured(self, run, team):
            calls.append(1)
            return [each + 0.1 * max(0, len(calls) - count) for each in losses(self, run, team)]

        monkeypatch.setattr("learn.held_out.HeldOut.losses", measured)

    return after


def held_losses():
    from learn.held_out import HeldOut

    return HeldOut.losses


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.slow
def test_when_and_how_often_it_is_measured_changes_no_bit(train, tmp_path, held, capsys):
    assert train("often", *QUICK, *held, "--validation-steps", "1") == 0
    said = capsys.readouterr()
    assert "4 held out, not trained on: '" in said.out
    assert said.out.count("to the bare model's") == 4 + 1  # and the last lines
    assert train("never", *QUICK) == 0
    files = [data_section(adapter(tmp_path / name)) for name in ("often", "never")]
    assert files[0] == files[1]
    states = [matrices(tmp_path / name) for name in ("often", "never")]
    assert all(each.equal(states[1][name]) for name, each in states[0].items())
    losses = [[row["loss"] for row in log(tmp_path / name)] for name in ("often", "never")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    told = metrics(tmp_path / "often")
    assert [*told["rows"]] == ["1", "2", "3", "4"] and len(told["held_out"]) == 4
    assert all(len(row) == 6 and row[0][1] > 0 for row in told["rows"].values())
    losses = told["losses"]
    gain = {step: losses[step] - losses["0"] for step in told["rows"]}
    assert gain == pytest.approx({step: row[0][0] for step, row in told["rows"].items()})
    assert set(told["fits"]) <= {json.loads(row)["file_name"] for row in ink_rows(6)}
    sizes = told["sizes"]
    assert set(sizes["0"].values()) == {0} and [*sizes] == ["0", "1", "2", "3", "4"]
    assert 0 < min(sizes["2"].values()) and sizes["2"].keys() == sizes["0"].keys()


@pytest.mark.slow
def test_how_often_may_change_and_the_file_is_the_same(train, tmp_path, held):
    assert train("often", *QUICK, *held, "--validation-steps", "1") == 0
    assert train("seldom", *QUICK, *held, "--max-train-steps", "2") == 0
    assert train("seldom", *QUICK, *held, "--validation-steps", "3") == 0
    assert adapter(tmp_path / "often") == adapter(tmp_path / "seldom")
    assert [*metrics(tmp_path / "seldom")["rows"]] == ["1", "2", "3", "4"]


@pytest.mark.slow
def test_a_begun_run_is_refused_with_other_held_out_pictures(train, tmp_path, held, few, capsys):
    assert train("r", *QUICK, *held, "--max-train-steps", "1") == 0
    assert train("r", *QUICK) == 1  # without them it would be another run
    other = write_pictures(tmp_path / "other", ink_rows(12)[7:])
    assert train("r", *QUICK, held[0], str(other)) == 1
    assert capsys.readouterr().err.count(" validation_data ") == 4


@pytest.mark.slow
def test_the_best_step_is_kept_and_exported_beside_the_last(train, tmp_path, held, worse, capsys):
    worse(2)  # of the bare model and step 1: so step 1 is best
    limit = ("--checkpoints-total-limit", "1", "--validation-steps", "1")
    drawn = ("--validation-prompts", "red apple", "--num-inference-steps", "1")
    assert train("r", *QUICK, *held, *limit, *drawn) == 0
    out, said = tmp_path / "r", capsys.readouterr().out
    assert sorted(each.name for each in (out / "checkpoints").iterdir()) == ["000001", "000004"]
    best = lora.read(out / "best" / lora.FILE_NAME)
    assert best.about["steps"] == "1" and lora.read(out / lora.FILE_NAME).about["steps"] == "4"
    assert (out / "best" / "kohya" / "r-best.safetensors").is_file()
    state = checkpoint.torch.load(out / "checkpoints/000001/state.pt", weights_only=True)
    assert all(state["trained"][name].equal(each) for name, each in best.matrices.items())
    assert "step 4: held-out loss " in said and "; risen beyond its error 3 times" in said
    assert "lowest held-out loss: step 1, " in said and "style may still have sharpened" in said
    sheet = Image.open(out / "pictures" / "before-after.png")
    assert sheet.height > 3 * 32 and metrics(out)["best"] == 1


@pytest.mark.slow
def test_a_run_ends_where_it_is_worse_if_that_is_asked_for(train, tmp_path, held, worse, capsys):
    worse(2)
    asked = (*QUICK, *held, "--validation-steps", "1", "--max-train-steps", "6")
    assert train("r", *asked, "--stop-when-worse") == 0
    assert "done: 4 of 6 steps" in capsys.readouterr().out and len(log(tmp_path / "r")) == 4
    assert train("r", *asked, "--stop-when-worse") == 0
    assert "is finished: 4 steps" in capsys.readouterr().out
    assert train("r", *asked) == 0  # without it the run goes on to its end
    assert "done: 6 steps" in capsys.readouterr().out and len(log(tmp_path / "r")) == 6


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("out of memory", marks=pytest.mark.slow),
        pytest.param("killed after measuring", marks=pytest.mark.slow),
        pytest.param("killed before saving", marks=pytest.mark.slow),
        pytest.param("signal", marks=pytest.mark.slow),
    ],
)
def test_interrupted_equals_uninterrupted_best_step_included(
    train, tmp_path, held, monkeypatch, how
):
    asked = (*QUICK, *held, "--validation-steps", "2", "--max-train-steps", "5")
    assert train("whole", *asked) == 0
    save, fit, measure = checkpoint.save_state, training.loop.fit, Judge.validate

    def dying(kept):
        if kept.run.step == 4:
            raise Killed
        save(kept)

    def signalled(run):
        for told in fit(run):
            if run.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield told

    def full(self, *how):
        if self.run.step == 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return measure(self, *how)

    def lost(self, *how):
        measure(self, *how)
        if self.run.step == 4:
            raise Killed

    if how == "signal":
        monkeypatch.setattr(training.loop, "fit", signalled)
        assert train("cut", *asked) == 128 + signal.SIGTERM
    elif how == "out of memory":  # step 4 is saved, and measured at the next start
        monkeypatch.setattr(Judge, "validate", full)
        assert train("cut", *asked) == 1
        assert (tmp_path / "cut" / "checkpoints" / "000004").is_dir()
    else:
        owner = (checkpoint, "save_state", dying) if "before" in how else (Judge, "validate", lost)
        monkeypatch.setattr(*owner)
        with pytest.raises(Killed):
            train("cut", *asked)
    monkeypatch.undo()
    assert train("cut", *asked) == 0
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    assert adapter(tmp_path / "cut" / "best") == adapter(tmp_path / "whole" / "best")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    files = [
        sorted(p.name for p in (tmp_path / n / "checkpoints").iterdir()) for n in ("cut", "whole")
    ]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--buckets",), ("--no-cache",), ("--base-quantization", "nf4")])
def test_it_is_measured_in_buckets_without_a_cache_and_on_a_base_in_4_bits(
    train, tmp_path, held, more
):
    if "nf4" in more:
        pytest.importorskip("bitsandbytes")
    assert train("r", *QUICK, *held, *more, "--max-train-steps", "2") == 0
    told = metrics(tmp_path / "r")
    assert [*told["rows"]] == ["1", "2"] and min(told["sizes"]["2"].values()) > 0


@pytest.mark.slow
def test_with_masks_the_loss_is_weighted_as_in_training(few, cache, tmp_path):
    folder = write_pictures(tmp_path / "masked", ink_rows(10))
    name = Path(json.loads(ink_rows(1)[0])["file_name"])
    mask = Image.new("L", Image.open(folder / name).size, 255)
    mask.paste(0, (0, 0, mask.width // 2, mask.height))
    mask.save(folder / f"{name.stem}.mask.png")
    train = trainer(tmp_path, folder, cache)
    assert train("r", *QUICK, "--validation-share", "0.5", "--max-train-steps", "1") == 0
    assert [*metrics(tmp_path / "r")["rows"]] == ["1"]
