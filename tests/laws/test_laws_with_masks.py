"""The laws, for a run with masks: each holds as without."""

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
from conftest import ink_rows, trainer, write_pictures
from inputs import options
from keep import training
from runs import adapter, in_one


def draw_masks(folder, white: bool = False):
    """White ones, or a disc beside the middle in every picture but the last, which has none."""
    for row in ink_rows(6)[: 6 if white else 5]:
        path = folder / json.loads(row)["file_name"]
        y, x = np.mgrid[: Image.open(path).height, : Image.open(path).width]
        disc = np.hypot(x - 0.4 * x.max(), y - 0.5 * y.max()) < 0.35 * x.max()
        mask = np.where(disc | white, 255, 0).astype(np.uint8)
        Image.fromarray(mask).save(path.with_suffix(".mask.png"))


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    folder = write_pictures(tmp_path_factory.mktemp("discs") / "ink", ink_rows(6))
    draw_masks(folder)
    return folder


@pytest.fixture
def train(discs, cache, tmp_path):
    return trainer(tmp_path, discs, cache)


def test_a_mask_of_ones_is_the_unmasked_run_to_the_bit_and_a_disc_is_not(few, cache, tmp_path):
    folder = write_pictures(tmp_path / "white", ink_rows(6))
    draw_masks(folder, white=True)
    more = ("--max-train-steps", "3", "--random-crop")
    ends = {}
    for name, pictures in (("none", few), ("ones", folder)):
        run = trainer(tmp_path, pictures, cache)
        assert run(name, *more) == 0
        ends[name] = lora.read(tmp_path / name).matrices
        ends[f"{name}'s loss"] = [line["loss"] for line in run.log(name)]
    assert ends["none's loss"] == ends["ones's loss"]
    assert all(torch.equal(ends["none"][key], ends["ones"][key]) for key in ends["none"])
    draw_masks(folder)
    run = trainer(tmp_path, folder, cache)
    assert run("disc", *more) == 0
    assert [line["loss"] for line in run.log("disc")] != ends["none's loss"]


def test_law_1_however_a_step_is_cut_its_first_gradient_is_the_same(train):
    run = training.set_up(options.parse(train.argv("cuts")), torch.device("cpu"))[0].run
    run.scale_on_device.fill_(1)
    gradients = []
    for size in (1, 2, 3, 4):
        run.optimizer.zero_grad(set_to_none=False)
        for numbers in data.cut(range(4), size):
            batch = run.examples.batch(numbers, run.unet.device)
            assert batch["mask"].shape == (len(numbers), 1, 8, 8)
            run.micro_step(run, batch)
        gradients.append(in_one({name: each.grad for name, each in run.trained.items()}))
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() <= 1e-4 * gradients[0].norm()


def test_laws_2_and_3_interrupted_and_uncached_equal_the_whole_run(train, tmp_path, monkeypatch):
    more = ("--max-train-steps", "5", "--checkpointing-steps", "4")
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


def test_law_6_masks_are_counted_and_a_changed_one_is_another_run(cache, tmp_path, capsys):
    folder = write_pictures(tmp_path / "ink", ink_rows(6))
    draw_masks(folder)
    train = trainer(tmp_path, folder, cache)
    names = [json.loads(row)["file_name"] for row in ink_rows(6)]
    assert train("r", "--max-train-steps", "1") == 0
    said = capsys.readouterr().out
    assert f"5 with a mask; 1 (the first: {names[5]}) without a mask, learned whole" in said
    path = (folder / names[0]).with_suffix(".mask.png")
    Image.new("L", Image.open(path).size, "white").save(path)
    assert train("r", "--max-train-steps", "2") == 1
    assert f"1 changed in picture, mask or caption ('{names[0]}')" in capsys.readouterr().err
    for name, size in ((names[0], (9, 9)), (names[1], (7, 9))):
        Image.new("L", size, "white").save((folder / name).with_suffix(".mask.png"))
    assert train("other", "--max-train-steps", "2") == 1
    said = capsys.readouterr().err
    assert all(f"{name[:-4]}.mask.png of" in said for name in names[:2])
    assert train("floor", "--mask-floor", "1.5") == 1
