"""Options that cannot go together are refused at once, with what to type."""

import os
from dataclasses import fields

import pytest

from inputs import options
from inputs.files import Refusal


def test_a_plain_run_has_a_folder_of_its_own():
    folders = [
        str(options.parse(["pocket", *words]).out)
        for words in ([], ["--plain"], ["--plain", "--quick"], ["--plain", "--output-dir", "here"])
    ]
    assert folders == ["runs/pocket", "runs/pocket-plain", "runs/pocket-quick-plain", "here"]


def test_plain_is_refused_under_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert options.parse(["t4", "--plain"]).plain
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Refusal, match=r"--plain with 2 processes; expected one.*without torchrun"):
        options.parse(["t4", "--plain"])
    assert not options.parse(["t4"]).plain


def test_plain_is_refused_with_an_nf4_base():
    with pytest.raises(Refusal, match=r"--plain with an NF4 base.*--base-quantization none"):
        options.parse(["lowmem", "--plain"])
    assert options.parse(["lowmem", "--plain", "--base-quantization", "none"]).plain


def test_plain_is_refused_where_a_run_keeps_its_checkpoints(tmp_path):
    words = ["pocket", "--plain", "--output-dir", str(tmp_path)]
    assert options.parse(words).plain
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(Refusal, match=r"holds checkpoints.*another --output-dir") as refusal:
        options.parse(words)
    assert str(tmp_path) in str(refusal.value)


def test_all_that_stands_against_plain_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    os.mkdir(tmp_path / "checkpoints")
    with pytest.raises(Refusal) as refusal:
        options.parse(["lowmem", "--plain", "--output-dir", str(tmp_path)])
    said = str(refusal.value)
    assert all(word in said for word in ("4 processes", "NF4", str(tmp_path), "torchrun"))


def test_a_changed_code_is_accepted_only_where_it_was_asked_for():
    assert not options.parse(["pocket"]).accept_code_change
    assert options.parse(["pocket", "--accept-code-change"]).accept_code_change


def test_all_values_that_cannot_be_are_said_at_once():
    words = ["t4", "--quick", "--lora-rank", "0", "--learning-rate", "nan"]
    with pytest.raises(Refusal) as refusal:
        options.parse(words)
    said = str(refusal.value)
    for word in ("lora_rank is 0", "learning_rate is nan", "--quick with t4"):
        assert word in said
    rank = "lora_rank is 0; expected 1 to 640. What to do: --lora-rank 16"
    rate = "learning_rate is nan; expected 1e-12 to 10. What to do: --learning-rate 5e-05"
    assert f"{rank} | {rate}" in said


def test_options_of_other_trainers_and_slips_are_answered_with_ours_all_at_once():
    words = [
        "t4",
        "--lr=1e-3",
        "--network_dim",
        "8",
        "--train-batch-sise",
        "2",
        "--zzz",
        "--seed",
        "1",
    ]
    with pytest.raises(Refusal) as refusal:
        options.parse(words)
    said = str(refusal.value)
    for typed, ours in (
        ("lr", "--learning-rate"),
        ("network-dim", "--lora-rank"),
        ("train-batch-sise", "--train-batch-size"),
        ("zzz", "nothing alike"),
    ):
        assert f"the option --{typed} (here: {ours})" in said
    assert "--seed " not in said
    named = {each.split()[0].rstrip(",")[2:] for each in options.ELSEWHERE.values()}
    assert named <= {field.name.replace("_", "-") for field in fields(options.Config)}


def test_underscores_are_read_as_dashes():
    assert options.parse(["t4", "--lora_rank", "8", "--no_fused"]).lora_rank == 8


def test_the_values_of_every_recipe_can_be():
    for name in options.RECIPES:
        assert options.parse([name]) == options.RECIPES[name][1]
