"""--start-from, as a person meets it: the run begins with the file's numbers, is another run by the
file's content, and goes on without the file once it has begun."""

import json
import shutil

import pytest
import safetensors.torch

import lora
from adapters import files
from keep import checkpoint
from runs import adapter, in_one, matrices

STEPS = "--max-train-steps"


@pytest.fixture(scope="module")
def first(few, cache, tmp_path_factory):
    """The folder of a finished run of rank 16 that others start from."""
    from conftest import trainer

    root = tmp_path_factory.mktemp("first")
    assert trainer(root, few, cache)("run", STEPS, "2") == 0
    return root / "run"


def header(folder) -> dict[str, str]:
    with safetensors.safe_open(folder / lora.FILE_NAME, "pt") as file:
        return file.metadata()


def said_of(folder) -> str:
    return json.loads((folder / "config.json").read_text())["started_from"]


@pytest.mark.slow
def test_a_run_begins_with_the_numbers_of_a_run_or_of_its_file(train, first, tmp_path, capsys):
    """AdamW's first step moves no number further than the learning rate, 1e-3, and its decay."""
    began = in_one(files.read(first).matrices)
    kohya = next((first / "kohya").iterdir())
    for name, start in {"of a run": first, "of a file": kohya}.items():
        assert train(name, "--start-from", str(start), STEPS, "1") == 0
        assert f"starts from {start}" in capsys.readouterr().out
        moved = in_one(files.read(tmp_path / name).matrices) - began
        assert 5e-4 < moved.abs().max() < 1.1e-3 < 2e-3 < began.abs().max()
        name_, digest = header(tmp_path / name)["started_from"].rsplit(" ", 1)
        assert said_of(tmp_path / name) == f"{name_} {digest}"
        assert name_ == start.name and len(digest) == 32  # where it lies is nobody's business
    assert train("of none", STEPS, "1") == 0
    assert "started_from" not in header(tmp_path / "of none")
    for name, counts in {"of a run": True, "of none": False}.items():  # the code that cuts
        made_by = checkpoint.newest_state(tmp_path / name / "checkpoints")["code"]
        assert ("adapters.start.nearest" in made_by) == counts


@pytest.mark.slow
def test_an_interrupted_run_goes_on_without_the_file_and_ends_on_the_same_bytes(
    train, first, tmp_path, capsys
):
    start = tmp_path / "start.safetensors"
    for name in ("whole", "halves"):
        shutil.copy(first / lora.FILE_NAME, start)
        if name == "halves":
            assert train(name, "--start-from", str(start), STEPS, "1") == 0
            start.unlink()
        assert train(name, "--start-from", str(start), STEPS, "2") == 0
    assert adapter(tmp_path / "whole") == adapter(tmp_path / "halves")
    assert said_of(tmp_path / "whole") == said_of(tmp_path / "halves")
    capsys.readouterr()
    assert train("halves", "--start-from", str(start), STEPS, "2") == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_another_file_or_none_is_another_run(train, first, tmp_path, capsys):
    """By content: the same bytes under another name are the same run."""
    assert train("a", "--start-from", str(first), STEPS, "1") == 0
    copy = tmp_path / "copy.safetensors"
    shutil.copy(first / lora.FILE_NAME, copy)
    assert train("a", "--start-from", str(copy), STEPS, "2") == 0
    before = matrices(tmp_path / "a")
    assert train("b", STEPS, "1") == 0
    capsys.readouterr()
    other = ["--start-from", str(tmp_path / "b")]
    for name, words in {"a": other, "b": ["--start-from", str(first)]}.items():
        for steps in ("1", "4"):  # finished, and to be continued
            assert train(name, *words, STEPS, steps) == 1
            assert "this command has start_from " in capsys.readouterr().err
    assert train("a") == 1
    assert "this command has start_from (none)" in capsys.readouterr().err
    assert all(before[name].equal(each) for name, each in matrices(tmp_path / "a").items())


@pytest.mark.slow
def test_another_base_is_refused_unless_it_is_meant(train, first, tmp_path, capsys):
    file = files.read(first)
    path = tmp_path / "elsewhere.safetensors"
    tensors = {f"unet.{name}.weight": each for name, each in file.matrices.items()}
    about = file.about | {"base_fingerprint": "0123456789abcdef", "base_model": "some/base"}
    safetensors.torch.save_file(tensors, path, about)
    assert train("a", "--start-from", str(path), STEPS, "1") == 1
    assert "was trained on some/base (0123456789abcdef)" in capsys.readouterr().err
    assert not (tmp_path / "a" / "config.json").exists()
    assert train("a", "--start-from", str(path), STEPS, "1", "--any-base") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "about, said",
    [
        (
            {"prediction_type": "v_prediction"},
            "with prediction_type v_prediction, not epsilon",
        ),
        (
            {"modelspec.prediction_type": "v", "prediction_type": None},
            "with prediction_type v_prediction, not ep",
        ),
        (
            {"zero_terminal_snr": "yes"},
            "zero_terminal_snr yes, not no",
        ),
    ],
)
def test_other_noise_is_refused_unless_it_is_meant(train, first, tmp_path, capsys, about, said):
    file = files.read(first)
    path = tmp_path / "v.safetensors"
    tensors = {f"unet.{name}.weight": each for name, each in file.matrices.items()}
    told = {key: each for key, each in (file.about | about).items() if each}
    safetensors.torch.save_file(tensors, path, told)
    assert train("a", "--start-from", str(path), STEPS, "1") == 1
    assert said in capsys.readouterr().err
    if "zero_terminal_snr" in about:
        assert train("a", "--start-from", str(path), STEPS, "1", "--any-base") == 0
        assert train("a", "--start-from", str(path), STEPS, "2", "--any-base") == 0


def test_what_is_no_adapter_is_refused_before_anything_is_written(train, tmp_path, capsys):
    assert train("a", "--start-from", str(tmp_path / "nowhere.safetensors")) == 1
    assert "nowhere.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "a" / "config.json").exists()


def test_the_book_alone_starts_at_zero(train, first):
    with pytest.raises(Exception, match="--plain with --start-from"):
        train("a", "--plain", "--start-from", str(first))
