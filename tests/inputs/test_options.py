"""Options that cannot go together are refused at once, with what to type."""

import io
import json
import os
import sys
from dataclasses import asdict, fields, replace
from functools import partial

import pytest

from inputs import drawing, options
from inputs.files import Refusal
from made import write_folder
from sentences import refused


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
    assert f"{rate} | {rank}" in said


def test_options_of_other_trainers_and_slips_are_answered_with_ours_all_at_once():
    words = [
        "t4",
        "--lr=1e-3",
        "--network_dim",
        "8",
        "--train-batch-sise",
        "2",
        "--zzz",
        "--enable_bucket",
        "--buckets-on",
        "--no-bucket",
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
        ("enable-bucket", "--buckets"),
        ("buckets-on", "--buckets"),  # not its opposite
        ("no-bucket", "--no-buckets"),
    ):
        assert f"the option --{typed} (here: {ours})" in said
    assert "--seed " not in said
    named = {each.split()[0].rstrip(",")[2:] for each in options.ELSEWHERE.values()}
    assert named <= {field.name.replace("_", "-") for field in fields(options.Config)}


def test_a_recipes_own_value_is_the_same_to_the_letter_where_it_is_typed():
    """A whole alpha, say: the adapter file's header and what the run is would differ."""
    for name, (_, usual) in options.RECIPES.items():
        typed = options.parse([name, "--lora-alpha", f"{usual.lora_alpha}", "--lora-rank", "16"])
        assert str(typed) == str(usual)


def test_underscores_are_read_as_dashes():
    assert options.parse(["t4", "--lora_rank", "8", "--no_fused"]).lora_rank == 8


def test_the_values_of_every_recipe_can_be():
    for name in options.RECIPES:
        assert options.parse([name]) == options.RECIPES[name][1]


@pytest.mark.parametrize(
    ("parse", "typed", "words"),
    [
        (options.parse, "t4 --lora-rank many", ("--lora-rank", "'many'", "python loop.py --help")),
        (options.parse, "t4 --lora-rank", ("Missing value", "'--lora-rank'")),
        (options.parse, "t4 --lr-scheduler falling", ("'falling'", "'linear', 'cosine'")),
        (options.parse, "t4 --fused=maybe", ("maybe",)),
        (options.parse, "t4 pictures", ("Unrecognized options: pictures",)),
        (options.parse, "t4 -x", ("-x",)),
        (
            options.parse,
            "orignal",
            ("the recipe orignal", "one of original, t4, native, lowmem, pocket"),
        ),
        (options.parse, "--seed 1", ("the recipe --seed", "one of original, t4")),
        (options.parse, "", ("no recipe; expected one of original", "make train")),
        (drawing.parse, "--seeds a", ("--seeds", "'a'", "python generate.py --help")),
        (drawing.parse, "--mixed-precision fp8", ("'fp8'", "'fp16'")),
        (drawing.parse, "one --strength", ("Missing value", "'--strength'")),
        (drawing.parse, "one --network-mul 2", ("the option --network-mul",)),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(monkeypatch, parse, typed, words):
    monkeypatch.setenv("COLUMNS", "60")
    refused(lambda: parse(typed.split()), *words)


def test_a_terminal_in_which_tyro_draws_no_box_gets_the_same_line(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    refused(lambda: options.parse(["t4", "--lora-rank", "many"]), "--lora-rank", "'many'")


def test_help_is_printed_and_not_refused(capsys):
    for parse, argv in (
        (options.parse, ["--help"]),
        (options.parse, ["-h"]),
        (options.parse, ["pocket", "--quick", "--help"]),
        (drawing.parse, ["--help"]),
    ):
        with pytest.raises(SystemExit) as left:
            parse(argv)
        assert not left.value.code and "usage: " in capsys.readouterr().out


# ---- a file of options ---------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    """file("a.toml", content): its path."""
    return lambda name, content: str(write_folder(tmp_path, {name: content}) / name)


def test_a_runs_own_note_gives_all_its_options_back_and_its_notes_are_none(file):
    run = options.parse(["pocket", "--quick", "--lora-rank", "8", "--max-grad-norm", "inf"])
    run = replace(run, lr_schedule_steps=80)
    notes = {"commit": "a+", "code_changes": "", "versions": {"torch": "2"}}
    path = file("run/config.json", json.dumps(asdict(run) | notes))
    for given in (path, os.path.dirname(path)):
        assert options.parse(["--config", given]) == replace(run, config=given)
        assert options.parse(["pocket", f"--config={given}"]) == replace(run, config=given)


@pytest.mark.parametrize("asked", [True, False])
def test_an_option_of_earlier_versions_is_passed_over_and_said_where_it_acted(file, capsys, asked):
    run = options.parse(["pocket", "--lora-rank", "8"])
    path = file("config.json", json.dumps(asdict(run) | {"compile": asked}))
    assert options.parse(["--config", path]) == replace(run, config=path)
    assert ("compile in" in capsys.readouterr().err) == asked
    with pytest.raises(Refusal, match=r"--compile \(here: --fused, whose conv"):
        options.parse(["pocket", "--compile"])


def test_a_file_written_by_hand_is_laid_over_its_recipe_and_the_command_line_over_it(file):
    text = 'recipe = "native"\nlora_rank = 8\nlora-alpha = 4\nrandom_flip = false\n'
    path = file("a.toml", text + 'validation_prompts = ["a fox", "two foxes"]\n')
    usual = options.RECIPES["native"][1]
    mine = replace(usual, lora_rank=8, lora_alpha=4, random_flip=False, config=path)
    mine = replace(mine, validation_prompts=("a fox", "two foxes"))
    assert options.parse(["--config", path]) == mine
    typed = ["--lora-rank", "2", "--random-flip", "--validation-prompts", "a cat"]
    found = options.parse(["--config", path, *typed])
    assert found == replace(mine, lora_rank=2, random_flip=True, validation_prompts=("a cat",))
    assert options.parse([*typed[:2], "--config", path]) == replace(mine, lora_rank=2)
    quick = file("b.toml", 'quick = true\nrecipe = "pocket"')
    assert options.parse(["--config", quick]) == replace(options.SHORT, quick=True, config=quick)


WRONG = {  # in a file: what is said of it
    "network_dim": (4, "the option --network-dim (here: --lora-rank)"),
    "lora-rankk": (4, "the option --lora-rankk (here: --lora-rank)"),
    "out": ("runs/x", "the option --out (here: "),  # a property of Config
    "training": ({"seed": 1}, "training is {'seed': 1}"),  # [training] in TOML
    "resolution": ({}, "resolution is {}"),
    "dataset_name": (None, "dataset_name is None"),
    "validation_prompts": (["a", None], "validation_prompts is ['a', None]"),
}


def test_all_that_is_wrong_with_a_file_is_said_at_once(file):
    for names in (list(WRONG)[:3], list(WRONG)[3:]):  # the names, then the values
        path = file("a.json", json.dumps({name: WRONG[name][0] for name in names}))
        refused(partial(options.parse, ["t4", "--config", path]), *(WRONG[n][1] for n in names))
        refused(partial(options.parse, ["t4", "--config", path]), "correct ")
    bounds = file("a.json", '{"lora_rank": 0, "seed": -1}')
    refused(lambda: options.parse(["t4", "--config", bounds]), "lora_rank is 0", "seed is -1")
    whole = file("a.json", '{"lora_rank": 8.5}')
    refused(lambda: options.parse(["t4", "--config", whole]), "--lora-rank", "'8.5'")
    either = file("a.json", '{"lr_scheduler": "falling"}')
    refused(lambda: options.parse(["t4", "--config", either]), "'falling'", "'linear', 'cosine'")


@pytest.mark.parametrize(
    ("name", "content", "typed", "words"),
    [
        (
            "a.json",
            '{"recipe": "native"}',
            ["t4"],
            ("the recipe t4, and native in", "leave t4 out"),
        ),
        ("a.json", '{"seed": 1}', [], ("the recipe --seed=1", "native")),
        ("a.json", '{"recipe": "nativ"}', [], ("the recipe nativ;",)),
        ("a.json", "seed = 1", ["t4"], ("a.json cannot be read", "NAME.toml")),
        ("a.toml", '{"seed": 1}', ["t4"], ("a.toml cannot be read", "TOML")),
        ("a.json", "[1]", ["t4"], ("a.json cannot be read",)),
        ("a.json", b"\xff\xfe", ["t4"], ("a.json cannot be read", "utf-8")),
        ("run/log.jsonl", "", ["t4"], ("config.json cannot be read", "No such file")),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(file, name, content, typed, words):
    path = file(name, content)
    path = os.path.dirname(path) if "run" in name else path
    refused(lambda: options.parse([*typed, "--config", path]), *words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"caption": {"a": 1}}, ("caption is {'a': 1}",)),
        ({"resolution": [[64]]}, ("resolution is [[64]]", "numbers")),
        ({"learning_rate": True}, ("'--learning-rate'", "Missing value")),
        ({"fused": 1}, ("Unrecognized options: 1",)),
        ({"seed": "x"}, ("'x'", "--seed")),
        ({"output_dir": "a\0b"}, ("'--output_dir=a\\x00b'", "no UTF-8")),
        ({"dataset_name": "\ud800"}, ("'--dataset_name=\\ud800'", "no UTF-8")),
    ],
)
def test_a_files_value_of_another_kind_is_never_made_a_text_in_silence(file, given, words):
    path = file("a.json", json.dumps(given))
    refused(lambda: options.parse(["t4", "--config", path]), *words)


def test_null_is_no_caption_and_an_empty_one_is_one(file):
    for value in (None, "", "a"):
        path = file("a.json", json.dumps({"caption": value}))
        assert options.parse(["t4", "--config", path]).caption == value


def test_a_prompt_that_is_no_utf8_is_refused_before_the_run(monkeypatch):
    argv = ["t4", "--validation-prompts", "a", "\udcff"]
    refused(lambda: options.parse(argv), "'\\udcff', which is no UTF-8")
    monkeypatch.setenv("HOME", "/home/x")
    found = options.parse(["t4", "--output-dir=~/y", "--cache-dir", "~/z"])
    assert (str(found.out), found.cache_dir) == ("/home/x/y", "/home/x/z")


# ---- streams -------------------------------------------------------------------------------------


def test_a_name_that_the_terminal_has_no_letters_for_is_shown_by_its_numbers(
    monkeypatch, capfdbinary
):
    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(io.BytesIO(), "cp1252")
        monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, f"__{name}__", stream)
    with pytest.raises(SystemExit):
        options.parse_or_leave(["日本語"])
    print("é 語.png")
    out, err = capfdbinary.readouterr()
    for got, said in ((err, "the recipe 日本語; "), (out, "é 語.png\n")):
        expected = said.encode("cp1252", "backslashreplace")
        assert expected in got and b"\\u8a9e" in expected
