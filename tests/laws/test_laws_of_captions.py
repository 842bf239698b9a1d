"""The laws, for several captions a picture, tags in many orders, and captions of several chunks."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import data
import loop
import lora
from conftest import ink_rows, trainer, write_pictures
from inputs import blocks, options
from inputs.drawing import parse
from keep import drawing, training
from runs import adapter

TAGS = ("--shuffle-tags", "--keep-tags", "1", "--tag-dropout", "0.2", "--trigger", "ink")
TAGS += ("--caption-variants", "3", "--caption-dropout", "0.2", "--max-tokens", "150")
TAGS += ("--max-train-steps", "3")
WORDS = "red, round, small, on paper, drawn with a pen, in one line, by hand, seen from the side"


@pytest.fixture(scope="module")
def tagged(tmp_path_factory) -> Path:
    """Five ink drawings with tags, more than one chunk of them, one with two captions."""
    rows = [json.loads(row) for row in ink_rows(5)]
    for row in rows:
        row["text"] = f"{row['text']}, {WORDS}, {WORDS}"
    rows[1]["text"] = [rows[1]["text"], "a drawing"]
    return write_pictures(tmp_path_factory.mktemp("tagged") / "ink", [*map(json.dumps, rows)])


@pytest.fixture
def train(tagged, cache, tmp_path):
    return trainer(tmp_path, tagged, cache)


def test_laws_2_and_3_interrupted_and_uncached_equal_the_whole_run(
    train, tmp_path, monkeypatch, capsys
):
    assert train("whole", *TAGS) == 0
    said = capsys.readouterr().out
    assert "18 captions of 5 pictures, 57 kB each when encoded: 0.00 GB in" in said
    assert "captions: 0 missing or empty, " in said and "cut at the tokenizer's length" in said
    step = loop.optimizer_step

    def signalled(run):
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run)

    monkeypatch.setattr(loop, "optimizer_step", signalled)
    assert train("cut", *TAGS) == 128 + signal.SIGTERM
    monkeypatch.setattr(loop, "optimizer_step", step)
    assert train("cut", *TAGS) == 0
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    assert train("uncached", *TAGS, "--no-cache") == 0
    assert adapter(tmp_path / "uncached") == adapter(tmp_path / "whole")


def test_law_5_plain_equals_the_product_and_both_files_say_how_many_tokens(train, tmp_path):
    assert train("product", "--no-fused", *TAGS) == 0
    train("by-itself", *TAGS, "--plain")
    one, other = (lora.read(tmp_path / name) for name in ("product", "by-itself"))
    assert all(torch.equal(each, other.matrices[name]) for name, each in one.matrices.items())
    assert one.about["max_tokens"] == other.about["max_tokens"] == "150"
    with safe_open(tmp_path / "product" / "kohya" / "product.safetensors", "pt") as file:
        assert file.metadata()["max_tokens"] == "150"


def test_a_drawing_reads_as_many_tokens_as_the_run_did(train, tmp_path, monkeypatch):
    assert train("long", *TAGS, "--max-train-steps", "1") == 0
    lengths, encode = [], drawing.generate.encode

    def noted(*given):
        embeddings = encode(*given)
        lengths.append([each["context"].shape[1] for each in embeddings])
        return embeddings

    monkeypatch.setattr(drawing.generate, "encode", noted)
    words = [str(tmp_path / "long"), "--prompts", "a fox", "a cat", "--num-inference-steps", "1"]
    for more in ([], ["--max-tokens", "75"], ["--plain"]):
        assert more == ["--plain"] or drawing.main([*words, *more]) == 0
        if more == ["--plain"]:
            drawing.generate.draw_plain(parse([*words, *more]))
    assert lengths == [[64, 64], [32, 32], [64, 64]]


def test_another_way_with_captions_is_another_run(train, capsys):
    assert train("one", *TAGS, "--max-train-steps", "1") == 0
    for more, word in (
        (("--seed", "43"), "seed"),
        (("--max-tokens", "75"), "max_tokens"),
        (("--tag-dropout", "0.3"), "tag_dropout"),
        (("--trigger", "pen"), "trigger"),
        (("--caption-variants", "4"), "caption_variants"),
    ):
        assert train("one", *TAGS, *more) == 1
        assert f"and this command has {word} " in capsys.readouterr().err


def test_law_1_a_captions_variant_follows_from_the_example_however_a_step_is_cut(train):
    def numbers(*cut):
        config = options.parse(train.argv("cuts", *TAGS, *cut))
        examples = training.set_up(config, torch.device("cpu"))[0].run.examples
        return [examples.prompt(examples.example(i)) for i in range(40)]

    want = numbers()
    assert len(set(want)) > 10
    other = numbers("--train-batch-size", "4", "--gradient-accumulation-steps", "1")
    assert want == other


def test_one_of_the_captions_that_are_not_finite_is_found_by_the_row_that_was_drawn(
    train, tmp_path, capsys
):
    cache = ("--cache-dir", str(tmp_path / "own"))
    assert train("bad", *TAGS, *cache, "--max-train-steps", "1") == 0
    config = options.parse(train.argv("bad", *TAGS, *cache))
    examples = training.set_up(config, torch.device("cpu"))[0].run.examples
    row = examples.prompt(examples.example(5))
    path, at = examples.source.prompts[row]
    tensors = load_file(path)
    tensors["context"][at].view(-1)[-1] = float("nan")
    blocks.write_block(path, tensors)
    data.Cache.open.cache_clear()  # as in a process of its own
    assert train("bad", *TAGS, *cache) == 1
    said = capsys.readouterr().err
    name = examples.names[examples.example(5).picture]
    assert f"caption's embedding of picture {name} has NaN ({path})" in said
