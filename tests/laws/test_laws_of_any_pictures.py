"""The laws for pictures of several shapes and sizes, with masks and with tags, all in one run: each
holds as for squares with one caption.
"""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import data
import loop
import lora
from conftest import INK, ink_rows, trainer, write_pictures
from inputs import blocks, options
from inputs.drawing import parse
from inputs.sources import read_datasets
from keep import drawing, training
from runs import adapter, in_one

BUCKETS = ("--buckets", "--resolution", "128", "--random-crop")
TAGS = ("--shuffle-tags", "--keep-tags", "1", "--tag-dropout", "0.2", "--trigger", "ink")
TAGS += ("--caption-variants", "3", "--caption-dropout", "0.2", "--max-tokens", "150")
SHORT = ("--max-train-steps", "3", "--train-batch-size", "1", "--max-grad-norm", "0.03")
WORDS = "red, round, small, on paper, drawn with a pen, in one line, by hand, seen from the side"


def draw_mask(path, white: bool = False):
    """A disc beside the middle, or all of the picture."""
    y, x = np.mgrid[: Image.open(path).height, : Image.open(path).width]
    disc = np.hypot(x - 0.4 * x.max(), y - 0.5 * y.max()) < 0.35 * x.max()
    mask = np.where(disc | white, 255, 0).astype(np.uint8)
    Image.fromarray(mask).save(path.with_suffix(".mask.png"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Eleven ink drawings as squares, strips and pillars, four decks, the smallest of one; masks of
    all but the last; tags of more than one chunk, and one picture with two captions.
    """
    folder = tmp_path_factory.mktemp("mixed")
    shapes, rows = [(128, 128)] * 4 + [(256, 70)] * 3 + [(210, 90)] * 3 + [(80, 300)], []
    for i, (size, row) in enumerate(zip(shapes, map(json.loads, ink_rows(11)), strict=True)):
        path = folder / row["file_name"]
        Image.open(INK / path.name).convert("RGB").resize(size).save(path)
        if i < 10:
            draw_mask(path)
        row["text"] = f"{row['text']}, {WORDS}, {WORDS}"
        rows.append(row | {"text": [row["text"], "a drawing"] if i == 1 else row["text"]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def train(mixed, cache, tmp_path):
    run = trainer(tmp_path, mixed, cache)
    told, all_of_it = run.argv, (*BUCKETS, *TAGS, *SHORT)

    def with_all(name, *more):
        return run(name, *all_of_it, *more)

    with_all.argv = lambda name, *more: told(name, *all_of_it, *more)
    return with_all


def begun(train, name, *more):
    """A run before its first step."""
    return training.set_up(options.parse(train.argv(name, *more)), torch.device("cpu"))[0].run


def examples(train, *more) -> data.Examples:
    """Those of such a run, without its UNet."""
    config = options.parse(train.argv("drawn", *more))
    pictures = read_datasets(config)
    return data.examples_of(config, pictures, torch.device("cpu"), torch.float32, 1000)


@pytest.mark.slow
def test_law_1_however_a_step_is_cut_its_first_gradient_is_the_same(train):
    run = begun(train, "cuts", "--train-batch-size", "2")
    run.scale_on_device.fill_(1)
    steps = [run.examples.batch(range(4 * s, 4 * s + 4), run.unet.device) for s in range(8)]
    assert len({batch["mean"].shape for batch in steps}) >= 3
    gradients = []
    for size in (1, 2, 3, 4):
        run.optimizer.zero_grad(set_to_none=False)
        for numbers in data.cut(range(4), size):
            batch = run.examples.batch(numbers, run.unet.device)
            assert batch["mask"].shape == (len(numbers), 1, *batch["mean"].shape[2:])
            run.micro_step(run, batch)
        gradients.append(in_one({name: each.grad for name, each in run.trained.items()}))
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() <= 1e-4 * gradients[0].norm()


def test_law_1_a_captions_variant_follows_from_the_example_however_a_step_is_cut(train):
    def rows(*cut):
        drawn = examples(train, *cut)
        return [drawn.prompt(drawn.example(i)) for i in range(40)]

    want = rows()
    assert len(set(want)) > 10
    assert rows("--train-batch-size", "2", "--gradient-accumulation-steps", "1") == want


@pytest.mark.slow  # of squares each law is in a file of its own
def test_laws_2_3_and_5_interrupted_uncached_and_plain_equal_the_whole_run(
    train, tmp_path, monkeypatch, capsys
):
    assert train("whole", "--no-fused") == 0
    said = capsys.readouterr().out
    assert "36 captions of 11 pictures, 10 kB each when encoded: 0.4 MB in" in said
    assert "captions: 0 missing or empty, " in said and "cut at the tokenizer's length" in said
    step = loop.optimizer_step

    def signalled(run):
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run)

    monkeypatch.setattr(loop, "optimizer_step", signalled)
    assert train("cut", "--no-fused") == 128 + signal.SIGTERM
    monkeypatch.setattr(loop, "optimizer_step", step)
    assert train("cut", "--no-fused") == 0
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    assert train("uncached", "--no-fused", "--no-cache") == 0
    assert adapter(tmp_path / "uncached") == adapter(tmp_path / "whole")
    train("plain", "--plain")
    one, other = (lora.read(tmp_path / name) for name in ("whole", "plain"))
    assert one.matrices.keys() == other.matrices.keys()
    assert all(torch.equal(each, other.matrices[key]) for key, each in one.matrices.items())
    assert one.about["max_tokens"] == other.about["max_tokens"] == "150"
    with safe_open(tmp_path / "whole" / "kohya" / "whole.safetensors", "pt") as file:
        assert file.metadata()["max_tokens"] == "150"


@pytest.mark.slow  # tests/book/test_masks.py has the loss itself
def test_a_mask_of_ones_is_the_unmasked_run_to_the_bit_and_a_disc_is_not(few, cache, tmp_path):
    folder, more = write_pictures(tmp_path / "ink", ink_rows(6)), ("--max-train-steps", "2")
    run, ends = trainer(tmp_path, folder, cache), {}
    paths = [folder / json.loads(row)["file_name"] for row in ink_rows(6)]
    for name, masks in (("none", []), ("ones", [True] * 6), ("disc", [False] * 6)):
        for path, white in zip(paths, masks, strict=False):
            draw_mask(path, white)
        assert run(name, *more, "--random-crop") == 0
        ends[name] = (lora.read(tmp_path / name).matrices, [row["loss"] for row in run.log(name)])
    assert ends["none"][1] == ends["ones"][1] != ends["disc"][1]
    assert all(torch.equal(each, ends["ones"][0][key]) for key, each in ends["none"][0].items())


def test_law_6_the_start_says_what_is_cut_from_which_shape(train):
    config = options.parse(train.argv("said"))
    said = training.set_up(config, torch.device("cpu"))[1]
    assert "11 pictures at 128 px in 4 buckets" in said
    for row in ("128 x  128 px:     4 pictures,   0% cut", "256 x   64 px:     3 pictures,"):
        assert row in said
    assert "64 x  256 px:     1 pictures,   6% cut" in said


@pytest.mark.slow
def test_law_6_masks_are_counted_and_a_changed_one_is_another_run(cache, tmp_path, capsys):
    folder = write_pictures(tmp_path / "ink", ink_rows(6))
    names = [json.loads(row)["file_name"] for row in ink_rows(6)]
    for name in names[:5]:
        draw_mask(folder / name)
    train = trainer(tmp_path, folder, cache)
    assert train("r", "--max-train-steps", "1") == 0
    said = capsys.readouterr().out
    assert f"5 with a mask; 1 (the first: {names[5]}) without a mask, learned whole" in said
    draw_mask(folder / names[0], white=True)
    assert train("r", "--max-train-steps", "2") == 1
    assert (
        f"1 changed in picture, mask, weight or caption ('{names[0]}')" in capsys.readouterr().err
    )
    for name, size in ((names[0], (9, 9)), (names[1], (7, 9))):
        Image.new("L", size, "white").save((folder / name).with_suffix(".mask.png"))
    assert train("other", "--max-train-steps", "2") == 1
    said = capsys.readouterr().err
    assert all(f"{name[:-4]}.mask.png of" in said for name in names[:2])
    assert train("floor", "--mask-floor", "1.5") == 1


def test_squares_of_several_sizes_are_decks_too(train):
    drawn = examples(train, "--no-buckets", "--resolution", "64", "128")
    assert sorted(set(drawn.sizes)) == [(64, 64), (128, 128)]
    counts = np.bincount([drawn.example(i).picture for i in range(11 * 40)])
    assert counts.min() >= 36 and counts.max() <= 44


@pytest.mark.slow
def test_a_drawing_reads_as_many_tokens_as_the_run_did(train, tmp_path, monkeypatch):
    assert train("long", "--max-train-steps", "1") == 0
    lengths, encode = [], drawing.generate.encode

    def noted(*given):
        embeddings = encode(*given)
        lengths.append([each["context"].shape[1] for each in embeddings])
        return embeddings

    monkeypatch.setattr(drawing.generate, "encode", noted)
    words = [str(tmp_path / "long"), "--prompts", "a fox", "a cat", "--num-inference-steps", "1"]
    words += ["--resolution", "64"]
    for more in ([], ["--max-tokens", "75"], ["--plain"]):
        assert more == ["--plain"] or drawing.main([*words, *more]) == 0
        if more == ["--plain"]:
            drawing.generate.draw_plain(parse([*words, *more]))
    assert lengths == [[64, 64], [32, 32], [64, 64]]


@pytest.mark.slow
def test_another_way_with_captions_is_another_run(train, capsys):
    assert train("one", "--max-train-steps", "1") == 0
    for more in ("--seed 43", "--max-tokens 75"):
        assert train("one", *more.split()) == 1
        word = more.split()[0][2:].replace("-", "_")
        assert f"and this command has {word} " in capsys.readouterr().err
    same = ("--dataset-weights", "1", "--no-folder-repeats", "--caption-lines")  # by content
    assert train("one", "--max-train-steps", "1", *same) == 0
    for more in ("--tag-dropout 0.3", "--trigger pen"):
        assert train("one", *more.split()) == 1
        said = "and this command has 11 changed in picture, mask, weight or caption"
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_one_of_the_captions_that_are_not_finite_is_found_by_the_row_that_was_drawn(
    tmp_path, capsys
):
    rows = [row | {"text": "red, round, small"} for row in map(json.loads, ink_rows(3))]
    folder = write_pictures(tmp_path / "ink", [*map(json.dumps, rows)])
    train, tags = trainer(tmp_path, folder, tmp_path / "own"), ("--shuffle-tags",)
    assert train("bad", *tags, "--max-train-steps", "1") == 0
    drawn = examples(train, *tags)
    row = drawn.prompt(drawn.example(5))
    path, at = drawn.source.prompts[row]
    tensors = load_file(path)
    tensors["context"][at].view(-1)[-1] = float("nan")
    blocks.write_block(path, tensors)
    data.Cache.open.cache_clear()  # as in a process of its own
    assert train("bad", *tags) == 1
    said = capsys.readouterr().err
    name = drawn.names[drawn.example(5).picture]
    assert f"caption's embedding of picture {name}, in {path}, has NaN" in said
