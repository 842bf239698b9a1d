"""Law 2, interrupted equals uninterrupted, byte for byte."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import loop
import lora
import model
from adapters import files as adapter_files
from conftest import ROOT, TINY_SDXL, trainer
from inputs import files
from keep import checkpoint
from runs import Killed, adapter, log


@pytest.fixture(scope="module")
def whole(few, cache, tmp_path_factory) -> Path:
    """The folder of a run that nobody interrupted."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert trainer(root, few, cache)("whole") == 0
    return root / "whole"


@pytest.mark.slow
def test_killed_while_writing_and_started_again_equals_uninterrupted(train, tmp_path, monkeypatch):
    """Every file is written through os.replace; the run dies before one of them, at every third of
    them in turn.
    """
    cold = ("--cache-dir", str(tmp_path / "cold"))
    assert train("whole", *cold) == 0
    replace, left = os.replace, [0]

    def dying(source, target):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        replace(source, target)

    at, deaths = 1, 0
    while True:
        shutil.rmtree(tmp_path / "cold")
        left[0] = at
        monkeypatch.setattr(files.os, "replace", dying)
        try:
            assert train(f"killed{at}", *cold) == 0
            finished = True
        except Killed:
            finished, deaths = False, deaths + 1
        monkeypatch.setattr(files.os, "replace", replace)
        assert train(f"killed{at}", *cold) == 0
        assert adapter(tmp_path / f"killed{at}") == adapter(tmp_path / "whole")
        assert not list((tmp_path / f"killed{at}").rglob("*.part"))
        if finished:
            break
        at += 3
    assert deaths >= 4


@pytest.mark.slow  # tests/stress_short/ kills forked ones
def test_sigkill_in_a_process_of_its_own_then_the_same_command(few, cache, train, tmp_path):
    more = ("--max-train-steps", "30")
    assert train("whole", *more) == 0
    script = (
        "import sys; from pathlib import Path; import conftest\n"
        "conftest.TINY_SDXL, root, few, cache, *options = sys.argv[1:]\n"
        "sys.exit(conftest.trainer(Path(root), few, cache)('killed', *options))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, (TINY_SDXL, tmp_path, few, cache)), *more],
        cwd=ROOT / "tests",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    file, until = tmp_path / "killed" / "log.jsonl", time.monotonic() + 120
    while time.monotonic() < until:
        if file.is_file() and len(file.read_text().splitlines()) >= 7:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / lora.FILE_NAME).exists()
    assert train("killed", *more) == 0
    assert adapter(tmp_path / "killed") == adapter(tmp_path / "whole")
    steps = [row["step"] for row in log(tmp_path / "killed")]
    assert steps == list(range(1, 31))  # no step is logged twice


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],  # the next test sends it
)
def test_a_signal_finishes_the_step_saves_and_says_so(
    train, whole, tmp_path, monkeypatch, capsys, number
):
    step = loop.optimizer_step

    def signalled(run):
        if run.step == 2:
            os.kill(os.getpid(), number)
        return step(run)

    monkeypatch.setattr(loop, "optimizer_step", signalled)
    assert train("stopped") == 128 + number
    assert "step 3 is saved; the same command continues" in capsys.readouterr().out
    monkeypatch.setattr(loop, "optimizer_step", step)
    assert train("stopped") == 0
    assert "continuing after step 3 of 4" in capsys.readouterr().out
    assert adapter(tmp_path / "stopped") == adapter(whole)


@pytest.mark.slow
def test_a_signal_in_the_last_step_leaves_before_the_export(
    train, whole, tmp_path, monkeypatch, capsys
):
    save = checkpoint.save_state

    def signalled(kept):
        save(kept)
        if kept.run.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "save_state", signalled)
    assert train("stopped") == 128 + signal.SIGTERM
    assert "step 4 is saved; the same command continues" in capsys.readouterr().out
    assert not (tmp_path / "stopped" / lora.FILE_NAME).exists()
    assert train("stopped") == 0
    assert adapter(tmp_path / "stopped") == adapter(whole)


@pytest.mark.slow
def test_an_error_that_a_library_makes_of_an_interruption_is_none(
    train, tmp_path, monkeypatch, capsys
):
    read = adapter_files.read

    def interrupted(path):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:  # as safetensors' loader was seen to do
            raise ValueError("could not determine the shape of an object") from None
        return read(path)

    monkeypatch.setattr(adapter_files, "read", interrupted)
    assert train("r") == 128 + signal.SIGTERM
    assert "the same command continues" in capsys.readouterr().err
    monkeypatch.setattr(adapter_files, "read", read)
    assert train("r") == 0


@pytest.mark.slow
def test_a_signal_while_encoding_leaves_at_once_and_the_next_start_goes_on(
    train, tmp_path, monkeypatch, capsys
):
    encode = model.encode_images

    def signalled(pixels, vae):
        os.kill(os.getpid(), signal.SIGTERM)
        return encode(pixels, vae)

    monkeypatch.setattr(model, "encode_images", signalled)
    assert train("r", "--cache-dir", str(tmp_path / "own")) == 128 + signal.SIGTERM
    assert "the same command continues" in capsys.readouterr().err
    monkeypatch.setattr(model, "encode_images", encode)
    assert train("r", "--cache-dir", str(tmp_path / "own")) == 0


@pytest.mark.slow
def test_a_checkpoint_cut_short_is_passed_over_for_the_one_before(train, whole, tmp_path, capsys):
    assert train("cut", "--max-train-steps", "2") == 0
    shutil.copytree(whole / "checkpoints" / "000004", tmp_path / "cut" / "checkpoints" / "000004")
    file = tmp_path / "cut" / "checkpoints" / "000004" / "state.pt"
    file.write_bytes(file.read_bytes()[:-100])
    assert train("cut") == 0
    assert "000004 was cut short or damaged and is passed over" in (said := capsys.readouterr().out)
    assert "continuing after step 2" in said
    assert adapter(tmp_path / "cut") == adapter(whole)


@pytest.mark.slow
def test_a_finished_run_whose_rate_has_fallen_says_so(train, capsys):
    for _ in range(2):
        assert train("fallen", "--max-train-steps", "1", "--lr-scheduler", "cosine") == 0
    assert "To go on at the rate where its schedule ended: a larger" in capsys.readouterr().out


@pytest.mark.slow
def test_more_steps_go_on_where_a_finished_run_ended(train, whole, tmp_path, capsys):
    assert train("twice", "--max-train-steps", "2") == train("twice") == 0
    assert adapter(whole) == adapter(tmp_path / "twice")
    capsys.readouterr()
    assert train("twice") == 0
    assert "is finished: 4 steps" in capsys.readouterr().out
    assert train("twice", "--max-train-steps", "1") == 0
    assert "is finished: 4 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_out_of_memory_inside_the_optimizer_saves_no_half_step(
    train, tmp_path, monkeypatch, capsys
):
    options = ("--no-use-8bit-adam", "--checkpoints-total-limit", "1", "--checkpointing-steps", "2")
    assert train("whole", *options) == 0
    step, left = torch.optim.AdamW.step, [3]

    def full(optimizer):  # after everything has moved
        step(optimizer)
        left[0] -= 1
        if left[0] == 0:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 89 MiB.")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    assert train("r", *options) == 1
    assert "the GPU's memory is full" in capsys.readouterr().err
    assert train("r", *options) == 0
    assert "continuing after step 2 of 4" in capsys.readouterr().out
    assert adapter(tmp_path / "r") == adapter(tmp_path / "whole")


@pytest.mark.slow  # tests/fast/test_deterministic.py has one that is killed
def test_fp16_resumed_equals_uninterrupted_loss_scale_included(train, tmp_path, monkeypatch):
    scale = loop.LossScale
    monkeypatch.setattr(
        loop, "LossScale", lambda enabled, value: scale(enabled, 2.0**17, growth_interval=2)
    )
    fp16 = ("--mixed-precision", "fp16", "--max-train-steps", "6")
    assert train("whole", *fp16) == 0
    assert train("cut", *fp16[:2], "--max-train-steps", "3") == 0
    monkeypatch.setattr(loop, "LossScale", scale)
    assert train("cut", *fp16) == 0
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    cut, whole = ([row["loss_scale"] for row in log(tmp_path / n)] for n in ("cut", "whole"))
    assert cut == whole and len(set(cut)) > 1
