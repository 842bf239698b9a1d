"""The check of the stored notebooks."""

import importlib.util

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
        ("loss 0.1769, norm -1.2e-03\n", "loss  0.18, norm 4e+01\n", []),
        ("torch 2.15.0", "torch 2.14.1+cpu", []),
        ("done: 200 steps", "stopped: 200 steps", [2]),
        ("base f50e90ae3954b579", "base 1c52d8aab0217ed6", [2]),  # another model
    ],
)
def test_stored_words_are_compared_and_numbers_are_not(stored, now, other):
    old, new = notebook("same", stored), notebook("same", now)
    assert execute.with_other_words(old, new) == other
    assert len(execute.problems("a.ipynb", new, old)) == bool(other)


def test_a_cell_that_shows_nothing_as_stored_is_named_once():
    old, new = notebook("", "b"), notebook("a", "b")
    assert execute.without_outputs(old, new) == [1]
    assert len(execute.problems("a.ipynb", new, old)) == 1
