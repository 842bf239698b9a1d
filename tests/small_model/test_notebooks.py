"""The check of the stored notebooks, and the one cell that they do not run on the small model."""

import importlib.util
import json
import subprocess
from pathlib import Path

import nbformat
import nbformat.v4 as v4
import pytest

from conftest import ROOT

place = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
execute = importlib.util.module_from_spec(place)
place.loader.exec_module(execute)


def notebook(*said: str):
    """One code cell for each of `said`; "" shows nothing."""
    outputs = [[v4.new_output("stream", text=text)] if text else [] for text in said]
    return v4.new_notebook(cells=[v4.new_code_cell("run()", outputs=each) for each in outputs])


@pytest.mark.parametrize(
    "stored, now, other",
    [
        ("loss 0.1769, norm -1.2e-03\n", "loss  0.18, norm 4e+01\n", {}),
        ("torch 2.15.0", "torch 2.14.1+cpu", {}),
        ("a\ndone: 200 steps", "a\nstopped: 200 steps", {2: "- done: # steps\n+ stopped: # steps"}),
        ("base f50e", "base 1c52", {2: "- base f#e\n+ base #c#"}),  # another model
        ("draw: python loop.py", "draw: .venv/bin/python loop.py", {}),
    ],
)
def test_stored_words_are_compared_and_numbers_are_not(stored, now, other):
    old, new = notebook("same", stored), notebook("same", now)
    assert not execute.clean(new)
    assert execute.with_other_words(old, new) == other
    assert len(execute.problems("a.ipynb", new, old)) == bool(other)


def test_a_cell_that_shows_nothing_as_stored_is_named_once():
    old, new = notebook("", "b"), notebook("a", "b")
    assert execute.without_outputs(old, new) == [1]
    assert len(execute.problems("a.ipynb", new, old)) == 1


@pytest.mark.parametrize(
    "repository, on_sdxl, suffix, content",
    [
        ("address", True, "", "first"),
        ("address", True, "+", "first"),
        ("", True, "", "second"),  # a clone of one's own stays as it is
        ("address", False, "", "second"),  # on the small model the run starts anew
    ],
)
def test_a_run_begun_on_colab_gets_back_the_code_that_it_began_with(
    tmp_path, monkeypatch, repository, on_sdxl, suffix, content
):
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(
            ["git", *who, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    for text in ("first", "second"):
        Path("code").write_text(text)
        git("add", "code")
        git("commit", "--quiet", "--message", text)
    commit = git("rev-parse", "HEAD~") + suffix
    cells = nbformat.read(ROOT / "notebooks" / "train.ipynb", 4).cells
    (source,) = (cell.source for cell in cells if '"git", "checkout"' in cell.source)
    names = {"ON_SDXL": on_sdxl, "REPOSITORY": repository, "Path": Path, "subprocess": subprocess}
    exec(source, names)  # nothing is begun
    assert Path("code").read_text() == "second"
    out = Path(names["ARGS"][names["ARGS"].index("--output-dir") + 1])
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps({"commit": commit}))
    exec(source, names)
    assert Path("code").read_text() == content


def first_cell() -> str:
    cells = nbformat.read(ROOT / "notebooks" / "train.ipynb", 4).cells
    (source,) = (cell.source for cell in cells if "REPOSITORY = " in cell.source)
    return source


@pytest.mark.parametrize("address, why", [("nowhere", "'nowhere' does not exist"), ("other", "")])
def test_a_wrong_repository_gets_one_sentence(tmp_path, monkeypatch, address, why):
    """No such repository, and one that is another project's."""
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "--quiet", "other"], check=True)
    source = first_cell().replace('REPOSITORY = ""', f'REPOSITORY = "{address}"')
    for _ in range(2):  # a second try meets what the first has left
        with pytest.raises(SystemExit) as left:
            exec(source, {})
        said = str(left.value)
        assert said.startswith(f"REPOSITORY is '{address}', from which git clone brings no loop.py")
        assert "\n" not in said and "; expected " in said and ". What to do: set " in said
        assert f"delete {tmp_path / 'sdxl-lora'}" in said
        assert why in said and Path.cwd() == tmp_path


def test_a_notebook_that_came_alone_asks_for_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="needs its repository"):
        exec(first_cell(), {})


@pytest.mark.slow
def test_the_cell_that_measures_this_card_is_off_and_needs_the_first_cell_alone(
    monkeypatch, capsys
):
    cells = nbformat.read(ROOT / "notebooks" / "train.ipynb", 4).cells
    (source,) = (cell.source for cell in cells if "MEASURE_THIS_CARD = False" in cell.source)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(first_cell(), names)
    capsys.readouterr()
    exec(source, names)
    assert capsys.readouterr().out == ""
    exec(source.replace("MEASURE_THIS_CARD = False", "MEASURE_THIS_CARD = True"), names)
    (said,) = capsys.readouterr().out.splitlines()  # no test sees a GPU
    assert said.startswith("error: no GPU is seen")
