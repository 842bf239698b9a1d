"""The laws, for pictures of several shapes: each holds as for squares."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import data
import loop
import lora
from conftest import INK, ink_rows, trainer
from inputs import options
from keep import training
from runs import adapter, in_one

BUCKETS = ("--buckets", "--resolution", "128", "--random-crop")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Eleven ink drawings as squares, strips and pillars: four decks, the smallest of one."""
    folder = tmp_path_factory.mktemp("mixed")
    shapes, rows = [(128, 128)] * 4 + [(256, 70)] * 3 + [(210, 90)] * 3 + [(80, 300)], []
    for size, row in zip(shapes, map(json.loads, ink_rows(11)), strict=True):
        image = Image.open(INK / row["file_name"]).convert("RGB").resize(size)
        image.save(folder / row["file_name"])
        rows.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def train(mixed, cache, tmp_path):
    run = trainer(tmp_path, mixed, cache)
    told = run.argv

    def with_buckets(name, *more):
        return run(name, *BUCKETS, *more)

    with_buckets.argv = lambda name, *more: told(name, *BUCKETS, *more)
    return with_buckets


def test_law_1_however_a_step_is_cut_its_first_gradient_is_the_same(train):
    run = training.set_up(options.parse(train.argv("cuts")), torch.device("cpu"))[0].run
    run.scale_on_device.fill_(1)
    shapes = [
        run.examples.batch(range(4 * s, 4 * s + 4), run.unet.device)["mean"].shape for s in range(8)
    ]
    assert len(set(shapes)) >= 3
    gradients = []
    for size in (1, 2, 3, 4):
        run.optimizer.zero_grad(set_to_none=False)
        for numbers in data.cut(range(4), size):
            run.micro_step(run, run.examples.batch(numbers, run.unet.device))
        gradients.append(in_one({name: each.grad for name, each in run.trained.items()}))
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() <= 1e-4 * gradients[0].norm()


def test_laws_2_and_3_interrupted_and_uncached_equal_the_whole_run(train, tmp_path, monkeypatch):
    more = ("--max-train-steps", "6", "--checkpointing-steps", "4")
    assert train("whole", *more) == 0
    step = loop.optimizer_step

    def signalled(run):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run)

    monkeypatch.setattr(loop, "optimizer_step", signalled)
    assert train("cut", *more) == 128 + signal.SIGTERM
    monkeypatch.setattr(loop, "optimizer_step", step)
    assert train("cut", *more) == 0
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    assert train("uncached", *more, "--no-cache") == 0
    assert adapter(tmp_path / "uncached") == adapter(tmp_path / "whole")


def test_law_5_plain_equals_the_product(train, tmp_path):
    more = ("--max-train-steps", "5", "--max-grad-norm", "0.03")
    assert train("product", "--no-fused", *more) == 0
    train("by-itself", *more, "--plain")
    one, other = (lora.read(tmp_path / name).matrices for name in ("product", "by-itself"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_law_6_the_start_says_what_is_cut_from_which_shape(train, capsys):
    assert train("said", "--max-train-steps", "1") == 0
    said = capsys.readouterr().out
    assert "11 pictures at 128 px in 4 buckets" in said
    for row in ("128 x  128 px:     4 pictures,   0% cut", "256 x   64 px:     3 pictures,"):
        assert row in said
    assert "64 x  256 px:     1 pictures,   6% cut" in said


def test_squares_of_several_sizes_are_decks_too(train, tmp_path):
    more = ("--no-buckets", "--resolution", "64", "128", "--max-train-steps", "3")
    assert train("squares", *more) == 0
    config = options.parse(train.argv("sizes", *more))
    run = training.set_up(dataclasses.replace(config), torch.device("cpu"))[0].run
    assert sorted(set(run.examples.sizes)) == [(64, 64), (128, 128)]
    counts = np.bincount([run.examples.example(i).picture for i in range(11 * 40)])
    assert counts.min() >= 36 and counts.max() <= 44
