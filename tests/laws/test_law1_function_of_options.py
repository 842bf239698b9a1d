"""Law 1, a run is a function of its options: of nothing else, and not of how a step is cut up."""

import dataclasses
import json
import os
import random
import shutil

import datasets
import pytest
import torch

import data
import loop
from conftest import TINY_SDXL, ink_rows, write_pictures
from inputs import ahead, sources
from inputs.options import RECIPES
from keep import training
from runs import adapter, in_one, moved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "bound"), [("--no-use-8bit-adam", 1e-3), ("--use-8bit-adam", 1e-2)]
)
def test_1x4_equals_2x2_equals_4x1_equals_3_and_1(train, tmp_path, monkeypatch, optimizer, bound):
    """No option asks for 3 + 1, so there the run's own socket is told so."""
    assemble = loop.assemble

    def uneven(*parts):
        run = assemble(*parts)
        run.batches = in_threes
        return run

    for size in (1, 2, 3, 4):
        monkeypatch.setattr(loop, "assemble", uneven if size == 3 else assemble)
        batch = 4 if size == 3 else size
        shape = ("--train-batch-size", batch, "--gradient-accumulation-steps", 4 // batch)
        assert train(f"b{size}", *map(str, shape), "--max-train-steps", "20", optimizer) == 0
    want = moved(tmp_path / "b1")
    for size in (2, 3, 4):
        got = moved(tmp_path / f"b{size}")
        assert 0 < (got - want).norm() <= bound * want.norm()  # another order of additions


def in_threes(run, step, share=lambda numbers: numbers):
    """A step's four examples as 3 + 1."""
    for numbers in data.cut(share(range(4 * step, 4 * (step + 1))), 3):
        yield run.examples.batch(numbers, run.unet.device, run.timesteps)


def test_the_first_gradient_does_not_depend_on_how_the_step_is_cut_up(few, cache, tmp_path):
    """Through the very micro-step of the run: 1 + 1 + 1 + 1, 2 + 2, 3 + 1 and 4."""
    config = dataclasses.replace(
        RECIPES["pocket"][1],
        pretrained_model_name_or_path=str(TINY_SDXL),
        dataset_name=(str(few),),
        resolution=(64,),
        cache_dir=str(cache),
        output_dir=str(tmp_path / "g"),
        train_batch_size=4,
        gradient_accumulation_steps=1,
    )
    run = training.set_up(config, torch.device("cpu"))[0].run
    run.scale_on_device.fill_(1)
    gradients, losses = [], []
    for size in (1, 2, 3, 4):
        run.optimizer.zero_grad(set_to_none=False)
        run.loss_sum.zero_()
        passes = data.cut(range(4), size)
        assert [len(numbers) for numbers in passes] == [[1] * 4, [2, 2], [3, 1], [4]][size - 1]
        for numbers in passes:
            run.micro_step(run, run.examples.batch(numbers, run.unet.device))
        gradients.append(in_one({name: each.grad for name, each in run.trained.items()}))
        losses.append(run.loss_sum.item())
    assert gradients[0].any()
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() <= 1e-4 * gradients[0].norm()


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """33 ink drawings, three blocks of the cache, with their captions in metadata.jsonl."""
    return write_pictures(tmp_path_factory.mktemp("first") / "many", ink_rows(33))


@pytest.mark.slow
def test_threads_the_caches_state_and_the_order_on_disk_change_no_byte(
    train, many, tmp_path, monkeypatch
):
    """Twenty examples, from all three blocks of pictures."""

    def trained(name, cache, pictures=many):
        options = ("--dataset-name", str(pictures), "--cache-dir", str(tmp_path / cache))
        assert train(name, *options, "--random-crop", "--max-train-steps", "5") == 0
        return adapter(tmp_path / name)

    monkeypatch.setattr(ahead, "usable_cores", lambda: 1)
    want = trained("cold", "first cache")
    blocks = sorted((tmp_path / "first cache").glob("*.safetensors"))
    content = {path.name: path.read_bytes() for path in blocks}
    assert len(content) == 6
    for path in blocks[::2]:  # one of the captions' files and two of the pictures', or the reverse
        path.unlink()
    monkeypatch.setattr(ahead, "usable_cores", lambda: 2)
    assert trained("half", "first cache") == want
    monkeypatch.setattr(ahead, "usable_cores", lambda: 7)
    backwards = tmp_path / "second" / "many"  # written in the reverse order, listed in any
    write_pictures(backwards, (many / "metadata.jsonl").read_text().splitlines()[::-1])
    shuffled_listings(monkeypatch)
    assert trained("order", "second cache", backwards) == want
    for cache in ("first cache", "second cache"):
        assert content == {p.name: p.read_bytes() for p in (tmp_path / cache).glob("*.safe*")}


def shuffled_listings(monkeypatch):
    """Whatever lists a folder gives its names in an order of its own each time."""
    stream, scandir, listdir = random.Random(1), os.scandir, os.listdir

    class Shuffled:
        def __init__(self, path="."):
            with scandir(path) as found:
                self.entries = list(found)
            stream.shuffle(self.entries)

        def __iter__(self):
            return iter(self.entries)

        def __next__(self):  # os.walk() asks so
            if not self.entries:
                raise StopIteration
            return self.entries.pop()

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    def listed(path="."):
        return stream.sample(names := listdir(path), len(names))

    monkeypatch.setattr(os, "scandir", Shuffled)
    monkeypatch.setattr(os, "listdir", listed)


def test_caption_files_and_parquet_are_read_in_one_order_whatever_the_disk_lists(
    many, tmp_path, monkeypatch
):
    rows = [json.loads(row) for row in (many / "metadata.jsonl").read_text().splitlines()]
    (tmp_path / "txt").mkdir()
    (tmp_path / "parquet").mkdir()
    for number, row in enumerate(rows):
        file = tmp_path / "txt" / row["file_name"]
        shutil.copy(many / row["file_name"], file)
        file.with_suffix(".txt").write_text(row["text"])
        part = datasets.Dataset.from_dict(
            {"image": [{"bytes": file.read_bytes(), "path": None}], "text": [row["text"]]}
        ).cast_column("image", datasets.Image())
        if number < 4:
            part.to_parquet(tmp_path / "parquet" / f"train-{number:05d}-of-00004.parquet")

    def contents(kind):
        pictures = sources.read_dataset(str(tmp_path / kind))
        return [(p.name, p.captions[0], p.digest) for p in pictures]

    kinds = ("txt", "parquet")
    want = {kind: contents(kind) for kind in kinds}
    assert [len(want[kind]) for kind in kinds] == [33, 4]
    shuffled_listings(monkeypatch)
    for _ in range(3):
        assert {kind: contents(kind) for kind in kinds} == want


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(train, tmp_path):
    short = ("--max-train-steps", "2")
    assert train("a", *short) == train("b", *short) == train("c", *short, "--seed", "7") == 0
    assert adapter(tmp_path / "a") == adapter(tmp_path / "b") != adapter(tmp_path / "c")
