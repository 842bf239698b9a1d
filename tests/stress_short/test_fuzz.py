"""The fuzzer in short (PYTHONPATH=tests python -m stress --only fuzz), and whether it notices."""

import os
import random
from pathlib import Path

import pytest

from inputs.files import Refusal
from stress import bad_pictures, fuzz


@pytest.mark.slow
def test_a_thousand_inputs_hold_every_kind_of_picture_that_they_should():
    pairs, turns = bad_pictures.writable(), [fuzz.kind_and_turn(i) for i in range(1000)]
    whole = [turn // 4 for kind, turn in turns if kind == "picture" and turn % 4 == 0]
    met = {pairs[at % len(pairs)] for at in whole}
    assert {mode for _, mode in met} >= {"CMYK", "I;16", "LA", "P", "F", "RGBA"}
    assert (
        ("JPEG", "CMYK") in met and ("PNG", "I;16") in met and len({name for name, _ in met}) > 10
    )


@pytest.mark.slow
def test_sixty_inputs_of_the_fuzzer_are_answered_rightly_or_with_a_sentence(tmp_path):
    said = []
    answer = fuzz.run(0, 60, tmp_path, said.append)
    assert answer["failures"] == [], said
    assert answer["inputs"] == 60 and answer["kinds"].keys() == fuzz.SHARES.keys()
    assert answer["refused"] > 20 and answer["accepted"] > 15
    assert not list(tmp_path.iterdir())


# ---- the fuzzer notices --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "act, said",
    [
        (lambda case: (case.elsewhere / "x").touch(), "reached outside"),
        (lambda case: (case.sandbox.parent / "x").touch(), "reached outside"),
        (lambda case: os.system("true"), "reached outside"),
        (lambda case: {}["x"], "KeyError"),
        (lambda case: os._exit(3), "exit code 3"),
        (lambda case: refuse("a\nb"), ""),
    ],
    ids=["a file", "a file elsewhere", "a program", "another error", "a crash", "a refusal"],
)
def test_the_fuzzer_notices(tmp_path, monkeypatch, act, said):
    monkeypatch.setattr(fuzz, "prepare", lambda base: None)
    for kind in fuzz.SHARES:
        monkeypatch.setitem(fuzz.KINDS, kind, lambda case: lambda: act(case))
    answer = fuzz.run(0, 1, tmp_path, lambda line: None)
    assert [said in each["said"] for each in answer["failures"]] == ([True] if said else [])
    assert answer["refused"] == (not said)


def refuse(found: str):
    raise Refusal(found, "x", "y")


def test_an_input_is_made_again_by_its_number():
    kinds = [fuzz.kind_and_turn(number) for number in range(1000)]
    assert len(set(kinds)) == 1000 and {kind for kind, _ in kinds[:60]} == fuzz.SHARES.keys()
    again = [random.Random("0 417").random() for _ in range(2)]
    assert fuzz.Case(0, 417, "picture", 1, Path("x")).rng.random() == again[0]
