"""The stress suite in short: PYTHONPATH=tests python -m stress on a few runs, and every cut of a
checkpoint.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from inputs import files
from keep import checkpoint
from stress import reference
from stress.child import Room


def stress(tmp_path, *options: str) -> dict:
    """What `python -m stress` with these options writes; it must end with 0, its folder gone."""
    out, tmp = tmp_path / "stress.json", tmp_path / "tmp"
    tmp.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "stress", *options, "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp), "PYTHONPATH": str(ROOT / "tests")},
        timeout=900,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(tmp.iterdir())
    return json.loads(out.read_text())


@pytest.mark.slow
def test_five_runs_killed_and_five_on_full_disks_end_as_they_should(tmp_path):
    """Seed and number of runs are such that the moments fall into several phases."""
    result = stress(tmp_path, "--only", "kills", "disk", "--runs", "5", "--seed", "1")
    kills = result["kills"]
    assert kills["runs"] == kills["runs_that_died"] == result["disk"]["runs"] == 5
    assert kills["deaths"] == sum(kills["deaths_by_phase"].values()) >= 5
    assert sum(count > 0 for count in kills["deaths_by_phase"].values()) >= 3
    assert result["failed"] == 0 and result["command"].startswith(
        "PYTHONPATH=tests python -m stress --only kills"
    )


# ---- damaged checkpoints, by their reader --------------------------------------------------------


def state(step: int, numbers: torch.Tensor) -> dict:
    """A checkpoint's state, as far as its reader looks at it."""
    return {"step": step, "trained": {"a.lora_A": numbers}}


@pytest.fixture
def checkpoints(tmp_path):
    """Two whole checkpoints, of steps 2 and 1000004, as save_state() writes them."""
    root = tmp_path / "checkpoints"
    for step in (2, 1000004):
        folder = root / f"{step:06d}"
        folder.mkdir(parents=True)
        torch.save(state(step, torch.arange(5000.0)), folder / "state.pt")
        content = (folder / "state.pt").read_bytes()
        (folder / "state.sha256").write_text(checkpoint.sum_of(content))
    return root


@pytest.mark.parametrize("name", ["state.pt", "state.sha256"])
def test_a_checkpoint_cut_at_any_twentieth_or_with_a_flipped_bit_is_passed_over(
    checkpoints, name, capsys
):
    assert checkpoint.newest_state(checkpoints)["step"] == 1000004  # by number, not by name
    file = checkpoints / "1000004" / name
    whole = file.read_bytes()
    cuts = [whole[: len(whole) * i // 20] for i in range(20)]
    flips = [
        whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
        for at in range(0, len(whole), len(whole) // 30)
    ]
    for damaged in cuts + flips:
        file.write_bytes(damaged)
        assert checkpoint.newest_state(checkpoints)["step"] == 2
        assert "1000004 was cut short or damaged and is passed over" in capsys.readouterr().out
    file.write_bytes(whole)
    assert checkpoint.newest_state(checkpoints)["step"] == 1000004


def test_where_all_checkpoints_are_damaged_it_says_so_and_keeps_them(checkpoints):
    for file in checkpoints.rglob("state.pt"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(files.Refusal, match="rm -r"):
        checkpoint.newest_state(checkpoints)
    assert len(list(checkpoints.rglob("state.pt"))) == 2


# ---- the suite's own eyes ------------------------------------------------------------------------


def test_the_suite_sees_what_a_run_did_otherwise(tmp_path, checkpoints):
    room = Room(tmp_path / "room").make()
    shutil.copytree(checkpoints, room.out / "checkpoints")
    (room.out / "adapter").write_bytes(b"numbers")
    (room.out / "log.jsonl").write_text('{"step": 1, "loss": 0.5, "seconds": 1, "gib": 1}\n')
    whole = reference.Reference(
        tmp_path, [], reference.content(room), reference.log_lines(room), 1.0, {}
    )
    assert reference.differences(room, whole) == []
    file = room.out / "checkpoints" / "000002" / "state.pt"
    for change, seen in (
        (lambda: (room.out / "adapter").write_bytes(b"other"), "out/adapter differs"),
        (lambda: (room.out / "adapter").unlink(), "out/adapter is missing"),
        (lambda: (room.out / ".a.1.part").touch(), "out/.a.1.part is left half-written"),
        (lambda: (room.folder / "core").touch(), "core is left behind"),
        (lambda: (room.folder / "tmp" / "x").touch(), "tmp/x is left behind"),
        (lambda: (room.out / "log.jsonl").write_text(""), "log.jsonl tells another run"),
        (
            lambda: torch.save(state(2, torch.ones(5000)), file),
            "out/checkpoints/000002/state.pt differs",
        ),
    ):
        change()
        assert seen in reference.differences(room, whole)
