"""How far something is: on a terminal, in a pipe, in a notebook, and in none of them."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from types import ModuleType, SimpleNamespace

import pytest

from conftest import ROOT
from inputs import progress as shown
from inputs.progress import clock, progress, say, show, tell

# A bar with all that a run on a GPU says, one with less, and one over items.
BARS = """
import time
from inputs.progress import progress, tell
from tqdm import tqdm
for said in ("loss 0.083 1.71 s/step 17:53 left 9.8 GiB", "loss 0.083 1.71 s/step 17:53 left"):
    with progress(None, "training", 1000, 369, leave=True) as bar:
        tell(bar, said, " lr 1e-4")
        bar.update()
        bar.refresh()
        tqdm.write("a sentence")
for _ in progress(range(3), "texts"):
    pass
"""


def on_terminal(columns: int, script: str, **more) -> str:
    """What a terminal of so many columns is sent by a process of its own."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24 * (columns > 0), columns, 0, 0))
    own = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "TQDM_DISABLE")} | more
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=own, cwd=ROOT
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            said += (piece := os.read(ours, 2**16))
        except OSError:  # so Linux tells that nobody writes there any more
            break
        if not piece:
            break
    os.close(ours)
    assert process.wait() == 0, said
    return said.decode()


def test_a_terminal_that_does_not_know_its_size_has_a_bar():
    assert "training 370/1000" in on_terminal(0, BARS)


@pytest.mark.parametrize("columns", [40, 60, 120])
def test_a_bar_is_never_wider_than_60_columns_nor_than_the_terminal(columns):
    said = on_terminal(columns, BARS, NO_COLOR="1")
    lines = re.split(r"[\r\n]+", said)
    assert max(map(len, lines)) <= min(columns, 60)
    assert "a sentence" in lines and not re.search(r"\x1b\[[\d;]*m", said)  # no colours
    if columns >= 60:
        assert "training 370/1000 loss 0.083 1.71 s/step 17:53 left 9.8 GiB" in lines
        assert re.search(r"training 370/1000 \|.{4,}\| loss 0.083 1.71 s/step 17:53 left\r", said)
        assert re.search(r"\rtexts 0/3 \| +\| \? left", said)
    assert "lr 1e-4" not in said


def test_in_a_pipe_a_line_comes_after_so_many_steps_or_seconds_and_at_the_end(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: now[0])
    with progress(None, "training", 120, done=2, every=50) as bar:
        for step in range(3, 121):
            now[0] += 10.0 if step <= 12 else 0.1
            tell(bar, f"loss {step}", " lr 1")
            bar.update()
    said = capsys.readouterr().err
    assert "\r" not in said
    steps = [
        int(re.match(r"training (\d+)/120 loss \1 lr 1$", line)[1])
        for line in said.split("\n")[:-1]
    ]
    assert steps == [5, 8, 11, 61, 111, 120]  # thrice after 30 s, then after 50 steps


def test_a_phase_in_a_pipe_leaves_one_line_unless_it_is_short(capsys):
    assert list(progress(["a", "b"], "texts")) == ["a", "b"]
    assert list(progress(["a", "b"], "reading", delay=2)) == ["a", "b"]
    assert list(progress([], "texts")) == []
    assert capsys.readouterr().err == "texts 2/2 in 0:00\n"


def test_a_total_may_shrink_under_way(capsys):
    """As of several processes each encodes what the others leave."""
    with progress(None, "pictures", 4) as bar:
        bar.update(2)
        bar.total -= 1
        bar.update()
    assert capsys.readouterr().err == "pictures 3/3 in 0:00\n"


def test_quiet_and_tqdms_own_switch_show_nothing(capsys, monkeypatch):
    with monkeypatch.context() as there:
        there.setattr(shown, "quiet", [True])
        say("a word")
        with progress(None, "training", 2) as bar:
            tell(bar, "loss 1")
            bar.update(2)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert list(progress("ab", "texts")) == ["a", "b"]
    assert capsys.readouterr() == ("", "")
    say("a word")
    say("")
    assert capsys.readouterr().out == "a word\n"


def test_times_are_short():
    found = [clock(seconds) for seconds in (0, 59.9, 1073, 3599, 3600, 4 * 3600 + 61, 400_000)]
    assert found == ["0:00", "1:00", "17:53", "59:59", "1h00", "4h01", "111h06"]


def test_a_picture_is_shown_in_a_cell_and_nowhere_else(monkeypatch):
    pictures, python = [], ModuleType("IPython")
    python.get_ipython = lambda: None  # imported, by matplotlib say, and no shell runs
    monkeypatch.setitem(sys.modules, "IPython", python)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=pictures.append))
    show("a picture")
    assert not shown.in_kernel() and pictures == []
    python.get_ipython = lambda: SimpleNamespace(kernel="a kernel")
    show("a picture")
    assert shown.in_kernel() and pictures == ["a picture"]


@pytest.mark.slow
def test_in_a_real_kernel_the_bar_is_the_notebooks_and_the_picture_is_in_the_cell():
    nbformat = pytest.importorskip("nbformat")
    from nbclient import NotebookClient

    code = """
from PIL import Image
from inputs.progress import in_kernel, progress, show, tell
with progress(None, "training", 2, leave=True) as bar:
    tell(bar, "loss 0.083")
    bar.update(2)
    bar.refresh()
print(in_kernel(), type(bar).__module__)
show(Image.new("RGB", (8, 8)))
"""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(
        book, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    outputs = book.cells[0].outputs
    said = io.StringIO()
    said.writelines(each.get("text", "") for each in outputs)
    assert "True tqdm." in said.getvalue()
    assert any("image/png" in each.get("data", {}) for each in outputs)
