"""What a run says on a terminal, in a pipe and with --quiet, and its last lines."""

import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import struct
import sys
import termios
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import loop
from inputs import drawing, options
from inputs.files import Refusal
from inputs.options import RECIPES
from keep import report, training

pytestmark = pytest.mark.slow

GPU = torch.device("cuda", 0)


def steps(log: report.Log, numbers: range, device=GPU, loss: float = 0.08) -> None:
    """Write these steps, of which each takes 1.5 s and none is on a real GPU."""
    scale = loop.LossScale(device.type == "cuda", 2.0**16)
    for step in numbers:
        run = SimpleNamespace(step=step, loss_scale=scale, loss_sum=SimpleNamespace(device=device))
        log.write(run, loss, 1.0 if step != 3 else float("inf"), 1e-4, 1.5)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: int(9.8 * 2**30))
    monkeypatch.setattr(report.Watch, "after", lambda *_: [])


CONFIG = replace(RECIPES["pocket"][1], tensorboard=False, max_train_steps=1000)


def test_on_a_terminal_a_step_is_one_line_that_fits_60_columns(tmp_path, monkeypatch, gpu):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    monkeypatch.setenv("COLUMNS", "120")
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as there:
        there.setattr(sys, "stderr", terminal)
        there.setattr(sys, "stdout", terminal)
        with report.Log(replace(CONFIG, output_dir=str(tmp_path)), 0) as log:
            steps(log, range(1, 6))
    pieces = []
    with contextlib.suppress(OSError):  # so Linux tells that all is read
        while piece := os.read(ours, 2**16):
            pieces.append(piece)
    os.close(ours)
    said = b"".join(pieces).decode()
    *bars, last = [each.strip() for each in re.split("[\r\n]+", said) if "training" in each]
    assert max(map(len, [*bars, last])) <= 60
    assert last == "training 5/1000 loss 0.080 1.50 s/step 24:53 left 9.8 GiB"
    assert "step 3 is skipped (0 so far)" in said  # beside the bar


def test_in_a_pipe_a_step_is_no_line_and_a_run_goes_on_where_it_was(tmp_path, capsys, gpu):
    with report.Log(replace(CONFIG, output_dir=str(tmp_path)), 0) as log:
        steps(log, range(1, 121))
    said = capsys.readouterr().err
    assert "\r" not in said
    assert said.splitlines() == [
        "training 50/1000 loss 0.080 1.50 s/step 23:45 left 9.8 GiB lr 1.0e-04 0 skipped",
        "training 100/1000 loss 0.080 1.50 s/step 22:30 left 9.8 GiB lr 1.0e-04 0 skipped",
    ]
    with report.Log(replace(CONFIG, output_dir=str(tmp_path)), 110) as log:
        steps(log, range(111, 161), torch.device("cpu"), loss=0.2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "training 160/1000 loss 0.200 1.50 s/step 21:00 left lr 1.0e-04"


# ---- whole runs ----------------------------------------------------------------------------------


def typed(said: str, begin: str) -> list[str]:
    """The words behind the script's name in one of the last lines."""
    (line,) = (line for line in said.splitlines() if line.startswith(begin))
    return shlex.split(line.partition(".py ")[2])


def test_a_run_in_a_pipe_says_few_lines_and_its_last_ones_hold(train, tmp_path, capsys):
    assert train("a run", "--max-train-steps", "1") == 0
    said, err = capsys.readouterr()
    assert "\r" not in said + err and "\x1b" not in said + err
    assert len(err.splitlines()) <= 4 and err.splitlines()[-1].startswith("training 1/1 loss 0.")
    adapter, kohya, page = said.splitlines()[-5:-2]
    files = [line.partition(": ")[2] for line in (adapter, kohya, page)]
    assert all(Path(file).is_file() for file in files) and len(set(files)) == 3
    asked = drawing.parse(typed(said, "draw your own: "))
    assert str(drawing.find_adapter(asked.adapter)) == files[0]
    assert asked.prompts == ("YOUR PROMPT",)
    assert training.main(typed(said, "train longer")) == 0
    again = capsys.readouterr().out
    assert "continuing after step 1 of 2" in again and "done: 2 steps\n" in again


def test_with_quiet_only_warnings_and_the_last_lines_are_said(train, few, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, path in enumerate(sorted(few.glob("*.png"))[:3]):
        (folder / f"{i}.png").write_bytes(path.read_bytes())
        (folder / f"{i}.txt").write_text("a fox" if i else "")
    own = ("--dataset-name", str(folder), "--max-train-steps", "1")
    assert train("r", *own, "--quiet") == 0
    out, err = capsys.readouterr()
    last = report.last_lines(options.parse(train.argv("r", *own))).splitlines()
    blots, warning, *rest = out.splitlines()
    assert blots == "the small model knows emoji alone: of photographs it makes blots"
    assert warning.startswith("captions: 1 missing or empty (the first: 0.png), 0 cut")
    assert rest == ["done: 1 steps", *last] and err == ""
    assert train("r", *own) == 0  # it is no part of what the run is
    assert capsys.readouterr().out.splitlines()[1:] == last


def test_a_run_whose_rate_has_fallen_is_made_longer_anew(tmp_path):
    config = replace(CONFIG, output_dir=str(tmp_path / "a run"), lr_schedule_steps=1000)
    config.out.mkdir()
    (config.out / "config.json").write_text(json.dumps(asdict(config)))
    words = typed(report.last_lines(config), "train longer")
    again = options.parse(words)
    assert again.out == tmp_path / "a run-longer" and again.schedule_steps == 2000
    told = report.last_lines(replace(config, max_train_epochs=3, lr_scheduler="constant"))
    assert typed(told, "train longer")[2:] == ["--max-train-epochs", "6"]


def test_plain_with_quiet_is_refused(tmp_path):
    """The book prints each step."""
    with pytest.raises(Refusal, match="--plain with --quiet"):
        options.parse(["pocket", "--plain", "--quiet", "--output-dir", str(tmp_path)])
