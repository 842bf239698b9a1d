"""Pictures and captions become the same examples whatever the order, the batch, the interruption;
what is damaged is refused by name."""

import dataclasses
import functools
import io
import itertools
import json
import os
import random
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import transforms

import data
import model
from conftest import INK, TINY_SDXL
from inputs import ahead, blocks, files, hub
from inputs.files import Refusal, digest
from inputs.options import RECIPES
from inputs.sources import Picture, read_dataset
from made import PNG, encoded, noisy, one_view, picture

CPU = torch.device("cpu")


def whole_numbers(pixels: torch.Tensor) -> np.ndarray:
    """(3, R, R) in [-1, 1] back to the (R, R, 3) bytes that it came from."""
    scaled = (pixels.double() + 1) * 127.5
    assert (scaled - scaled.round()).abs().max() < 1e-4
    return scaled.round().permute(1, 2, 0).numpy().astype(np.uint8)


# ---- one view ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "resolution", "flip", "time_ids"),
    [  # width x height; time ids: original height, width, crop top, left, target height, width
        ((300, 200), 100, False, [200, 300, 0, 25, 100, 100]),  # resized to 150 x 100
        ((300, 200), 100, True, [200, 300, 0, 25, 100, 100]),
        ((200, 300), 100, False, [300, 200, 25, 0, 100, 100]),
        ((200, 300), 100, True, [300, 200, 25, 0, 100, 100]),
        ((200, 200), 64, False, [200, 200, 0, 0, 64, 64]),
        ((200, 200), 64, True, [200, 200, 0, 0, 64, 64]),
        ((303, 200), 100, False, [200, 303, 0, 26, 100, 100]),  # to 151 x 100: 51 to spare
        ((303, 200), 100, True, [200, 303, 0, 26, 100, 100]),  # in the mirrored picture's frame
        ((200, 303), 100, False, [303, 200, 26, 0, 100, 100]),
        ((200, 303), 100, True, [303, 200, 26, 0, 100, 100]),
        ((301, 200), 100, False, [200, 301, 0, 25, 100, 100]),  # to 150 x 100
        ((305, 200), 100, False, [200, 305, 0, 26, 100, 100]),  # to 152 x 100
        ((67, 64), 64, False, [64, 67, 0, 2, 64, 64]),  # 1.5 to 2
        ((69, 64), 64, False, [64, 69, 0, 2, 64, 64]),  # 2.5 to 2
        ((101, 67), 64, False, [67, 101, 0, 16, 64, 64]),  # to 96 x 64
        ((50, 75), 100, False, [75, 50, 25, 0, 100, 100]),  # to 100 x 150
        ((64, 64), 64, False, [64, 64, 0, 0, 64, 64]),
        ((65, 64), 64, False, [64, 65, 0, 0, 64, 64]),
        ((65, 64), 64, True, [64, 65, 0, 0, 64, 64]),
    ],
)
def test_time_ids_by_hand(size, resolution, flip, time_ids):
    pixels, ids = one_view(picture(noisy(*size)), resolution, False, 0, flip)
    assert ids.tolist() == time_ids and ids.dtype == torch.float32
    assert pixels.shape == (3, resolution, resolution) and pixels.dtype == torch.float32


SIZES = [(303, 200), (200, 303), (151, 100), (97, 64), (64, 64), (300, 65)]


def resized(image: Image.Image, resolution: int) -> Image.Image:
    """The short side to `resolution`, by Pillow alone."""
    width, height = image.size
    short = min(width, height)
    return image.resize(
        (int(resolution * width / short), int(resolution * height / short)),
        Image.Resampling.LANCZOS,
    )


def cut(image: Image.Image, time_ids: torch.Tensor, side: int) -> np.ndarray:
    """The square whose corner the time ids tell."""
    top, left = (int(number) for number in time_ids[2:4])
    assert 0 <= top <= image.height - side and 0 <= left <= image.width - side
    return np.asarray(image.crop((left, top, left + side, top + side)))


@pytest.mark.parametrize("random_crop", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_pillows_lanczos_cut_where_the_time_ids_say(size, random_crop):
    image = noisy(*size)
    pixels, time_ids = one_view(picture(image), 64, random_crop, 5, False)
    assert np.array_equal(whole_numbers(pixels), cut(resized(image, 64), time_ids, 64))


@pytest.mark.parametrize("random_crop", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_flipped_view_is_cut_from_the_mirrored_picture_where_its_time_ids_say(
    size, random_crop
):
    image = noisy(*size)
    pixels, time_ids = one_view(picture(image), 64, random_crop, 5, True)
    mirrored = ImageOps.mirror(resized(image, 64))
    assert np.array_equal(whole_numbers(pixels), cut(mirrored, time_ids, 64))
    unflipped, _ = one_view(picture(image), 64, random_crop, 5, False)
    odd = (mirrored.width - 64) % 2 == 1  # then both centre crops lie half a pixel to one side
    shows_the_very_same_part = torch.equal(pixels, unflipped.flip(-1))
    assert shows_the_very_same_part == (random_crop or not odd)


@pytest.mark.parametrize("flip", [False, True])
def test_the_centre_crop_is_that_of_diffusers_script(flip):
    """torchvision's transforms in the script's order: resize, flip, crop, and its time ids."""
    side = 16
    resize = transforms.Resize(side, transforms.InterpolationMode.LANCZOS)
    crop, mirror = transforms.CenterCrop(side), transforms.RandomHorizontalFlip(p=float(flip))
    sizes = [(long, short) for short in (7, 16, 17, 24) for long in range(short, 3 * short + 2)]
    for width, height in {*sizes, *(size[::-1] for size in sizes)}:
        image = noisy(width, height)
        pixels, time_ids = one_view(picture(image), side, False, 0, flip)
        resized = mirror(resize(image))
        corner = [round((edge - side) / 2.0) for edge in (resized.height, resized.width)]
        assert time_ids.tolist() == [height, width, *corner, side, side], (width, height)
        assert np.array_equal(whole_numbers(pixels), np.asarray(crop(resized))), (width, height)
        normal = transforms.Normalize([0.5], [0.5])(transforms.ToTensor()(crop(resized)))
        torch.testing.assert_close(pixels, normal, rtol=0, atol=1e-6)


def test_pixels_range_from_minus_one_to_one():
    image = Image.new("RGB", (64, 64), "black")
    image.paste("white", (0, 0, 32, 64))
    pixels, _ = one_view(picture(image), 64, False, 0, False)
    assert pixels.min() == -1 and pixels.max() == 1
    assert (pixels[:, :, :32] == 1).all() and (pixels[:, :, 32:] == -1).all()
    colour, _ = one_view(picture(Image.new("RGB", (9, 9), (255, 0, 51))), 8, False, 0, False)
    torch.testing.assert_close(colour[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]))


def crop_of(image: Image.Image, seed: int, resolution: int = 64) -> tuple:
    _, ids = one_view(picture(image), resolution, True, seed, False)
    return tuple(ids[2:4].tolist())


def test_a_random_crop_is_drawn_once_from_seed_and_picture():
    wide = [noisy(96, 64, i) for i in range(60)]
    lefts = [crop_of(image, 1)[1] for image in wide]
    assert lefts == [crop_of(image, 1)[1] for image in wide]  # not from when or how often
    assert lefts != [crop_of(image, 2)[1] for image in wide]
    assert min(lefts) < 4 and max(lefts) > 28 and len(set(lefts)) > 20  # all of 0 to 32
    assert {crop_of(image, 1)[0] for image in wide} == {0}
    assert len({crop_of(wide[0], seed) for seed in range(60)}) > 20
    one_to_spare = {crop_of(noisy(65, 64, i), 0)[1] for i in range(20)}
    assert one_to_spare == {0, 1}  # both ends are reached


# ---- encoded once --------------------------------------------------------------------------------


pytestmark = pytest.mark.usefixtures("one_thread")
LONG = pytest.mark.slow


@functools.cache
def pocket_vae():
    return model.load_vae(str(TINY_SDXL), CPU)


@functools.cache
def pocket_text() -> model.TextEncoders:
    return model.load_text_encoders(str(TINY_SDXL), CPU)


def fake_vae(spoil=lambda mean, std: None):
    """What model.encode_images needs of a VAE: means of 8 x 8 pixels. `spoil` may change them."""

    def encode(pixels):
        mean = F.avg_pool2d(pixels, 8)[:, [0, 1, 2, 0]]
        std = mean.abs() + 0.1
        spoil(mean, std)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=std))

    return SimpleNamespace(device=CPU, encode=encode)


@functools.cache
def ink(count: int = 20) -> list[Picture]:
    """Ink drawings cut to many sizes, two with one caption and one with none."""
    pictures = read_dataset(str(INK))[:count]
    cuts = []
    for i, drawing in enumerate(pictures):
        image, less = Image.open(io.BytesIO(drawing.read())).convert("RGB"), 3 * i % 50
        size = (128 - less, 128) if i % 2 else (128, 128 - less)
        content = encoded(image.crop((0, 0, *size)))
        captions = {3: ("",), 5: pictures[4].captions}.get(i, drawing.captions)
        cuts.append(Picture(drawing.name, captions, digest(content), lambda c=content: c))
    return cuts


class Counting(data.Encoder):
    """An Encoder that notes which views and captions it was asked for."""

    def __init__(self, pictures=None, resolution=64, random_crop=False, seed=0, load_vae=fake_vae):
        pictures = ink() if pictures is None else pictures
        crop = data.Crop((resolution,), False, random_crop, seed)
        super().__init__(pictures, load_vae, pocket_text, crop)
        self.latents, self.prompts = [], []

    def latent(self, index, flip):
        self.latents.append(index)
        return super().latent(index, flip)

    def prompt(self, index):
        self.prompts.append(index)
        return super().prompt(index)

    def encode_pictures(self, blocks, flips):
        blocks = list(blocks)  # told one by one, as they are claimed
        self.latents += [i for block in blocks for i in block for _ in flips]
        return super().encode_pictures(blocks, flips)

    def encode_captions(self, blocks):
        blocks = list(blocks)
        self.prompts += [i for block in blocks for i in block]
        return super().encode_captions(blocks)


PRINTS = {"vae": "v", "text": "t"}


def fill(
    folder: Path, encoder: data.Encoder, flip=False, dtype=torch.float32, fingerprints=PRINTS
) -> data.Cache:
    return data.fill_cache(folder, encoder, flip, dtype, fingerprints)


def examples_of(source, count=20, seed=3, flip=False, dropout=0.0, offset=0.0) -> data.Examples:
    names = [str(i) for i in range(count)]
    chances = data.Chances(flip, dropout, offset)
    return data.Examples(source, names, [(64, 64)] * count, 4, seed, chances, 1000)


@pytest.mark.parametrize(
    ("random_flip", "random_crop"),
    [
        (True, True),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
)
def test_cached_equals_uncached_to_the_bit(tmp_path, random_flip, random_crop):
    uncached = Counting(random_crop=random_crop, load_vae=pocket_vae)
    cache = fill(tmp_path, Counting(random_crop=random_crop, load_vae=pocket_vae), random_flip)
    batches = [
        examples_of(source, flip=random_flip, dropout=0.3, offset=0.1).batch(range(30), CPU)
        for source in (uncached, cache)
    ]
    shapes = {key: tuple(value.shape) for key, value in batches[0].items()}
    latent = (30, 4, 8, 8)
    assert shapes == {
        **dict.fromkeys(("mean", "std", "eps", "noise"), latent),
        "t": (30,),
        "context": (30, 32, 40),
        "pooled": (30, 24),
        "time_ids": (30, 6),
    }
    unequal = [key for key in shapes if not torch.equal(batches[0][key], batches[1][key])]
    assert not unequal
    assert {value.dtype for key, value in batches[1].items() if key != "t"} == {torch.float32}


def test_both_views_are_cached_and_differ(tmp_path):
    cache, encoder = fill(tmp_path, Counting(random_crop=True), flip=True), Counting()
    encoder.crop = data.Crop((64,), False, True, 0)
    for index in range(20):
        for flip in (False, True):
            for got, want in zip(
                cache.latent(index, flip), encoder.latent(index, flip), strict=True
            ):
                assert torch.equal(got, want)
        assert not torch.equal(cache.latent(index, False)[0], cache.latent(index, True)[0])


def test_contexts_are_kept_in_the_unets_dtype_and_latents_in_fp32(tmp_path):
    cache, encoder = fill(tmp_path, Counting(), dtype=torch.bfloat16), Counting()
    for index in (0, 3, 20):
        for got, want in zip(cache.prompt(index), encoder.prompt(index), strict=True):
            assert torch.equal(got, want.bfloat16()) and got.dtype == torch.bfloat16
    assert {part.dtype for part in cache.latent(0, False)} == {torch.float32}


def test_an_empty_caption_is_the_unconditional_embedding(tmp_path):
    cache = fill(tmp_path, Counting())
    context, pooled = model.encode_unconditional(pocket_text())
    for index in (3, 20):  # the picture without caption, and what dropout uses
        assert torch.equal(cache.prompt(index)[0], context[0])
        assert torch.equal(cache.prompt(index)[1], pooled[0])
    assert not torch.equal(cache.prompt(0)[0], context[0])
    assert torch.equal(cache.prompt(4)[0], cache.prompt(5)[0])


def test_a_second_run_encodes_nothing_and_loads_no_encoder(tmp_path):
    first = fill(tmp_path, Counting(), flip=True)

    def load():
        raise AssertionError("an encoder was loaded")

    again = data.Encoder(ink(), load, load, data.Crop((64,), False, False, 0))
    second = fill(tmp_path, again, flip=True)
    assert (second.latents, second.prompts) == (first.latents, first.prompts)
    assert torch.equal(second.latent(7, True)[0], first.latent(7, True)[0])


def test_encoders_are_freed_when_they_are_done(tmp_path):
    encoder = Counting()
    fill(tmp_path, encoder)
    assert "vae" not in encoder.__dict__ and "text" not in encoder.__dict__


BLOCK0, ALL = list(range(16)), list(range(20))


def changed(pictures: list[Picture], index: int, **change) -> list[Picture]:
    pictures = list(pictures)
    pictures[index] = dataclasses.replace(pictures[index], **change)
    return pictures


def other_content() -> dict:
    content = encoded(noisy(80, 70))
    return {"digest": digest(content), "read": lambda: content}


@pytest.mark.parametrize(
    ("options", "fill_options", "latents", "prompts"),
    [
        pytest.param({}, {}, [], [], marks=LONG),
        ({"pictures": lambda: changed(ink(), 2, captions=("other",))}, {}, [], BLOCK0),
        pytest.param(
            {"pictures": lambda: changed(ink(), 17, captions=("other",))},
            {},
            [],
            [16, 17, 18, 19, 20],
            marks=LONG,
        ),
        ({"pictures": lambda: changed(ink(), 2, **other_content())}, {}, BLOCK0, []),
        pytest.param(
            {"pictures": lambda: changed(ink(), 2, name="renamed.png")}, {}, [], [], marks=LONG
        ),
        ({"resolution": 72}, {}, ALL, []),
        pytest.param({"seed": 1}, {}, [], [], marks=LONG),  # a centre crop knows no seed
        pytest.param({}, {"dtype": torch.float16}, [], [*ALL, 20], marks=LONG),
        pytest.param({}, {"fingerprints": {"vae": "other", "text": "t"}}, ALL, [], marks=LONG),
        pytest.param(
            {}, {"fingerprints": {"vae": "v", "text": "other"}}, [], [*ALL, 20], marks=LONG
        ),
        pytest.param({"random_crop": True}, {}, ALL, [], marks=LONG),
    ],
    ids=(
        "nothing caption last-caption picture name resolution seed dtype vae text random-crop"
    ).split(),
)
def test_what_changed_is_encoded_again_and_nothing_else(
    tmp_path, options, fill_options, latents, prompts
):
    """By blocks of 16, since a block is one file; row 20 is the unconditional embedding."""
    fill(tmp_path, Counting())
    options = {k: value() if callable(value) else value for k, value in options.items()}
    encoder = Counting(**options)
    cache = fill(tmp_path, encoder, **fill_options)
    assert (encoder.latents, encoder.prompts) == (latents, prompts)
    want = Counting(**options)
    for index in (2, 17):
        assert torch.equal(cache.latent(index, False)[0], want.latent(index, False)[0])
        dtype = fill_options.get("dtype", torch.float32)
        assert torch.equal(cache.prompt(index)[0], want.prompt(index)[0].to(dtype))


def test_another_seed_is_another_random_crop(tmp_path):
    fill(tmp_path, Counting(random_crop=True, seed=1))
    encoder = Counting(random_crop=True, seed=2)
    cache = fill(tmp_path, encoder)
    assert (encoder.latents, encoder.prompts) == (ALL, [])
    want = Counting(random_crop=True, seed=2).latent(1, False)
    assert all(torch.equal(a, b) for a, b in zip(cache.latent(1, False), want, strict=True))


def test_the_flip_is_part_of_what_is_encoded(tmp_path):
    fill(tmp_path, Counting())
    encoder = Counting()
    cache = fill(tmp_path, encoder, flip=True)
    assert len(encoder.latents) == 40 and encoder.prompts == []
    assert torch.equal(cache.latent(1, True)[0], Counting().latent(1, True)[0])


def test_a_new_picture_at_the_end_costs_its_own_block(tmp_path):
    fill(tmp_path, Counting(ink()[:19]))
    encoder = Counting(ink())
    fill(tmp_path, encoder)
    assert encoder.latents == [16, 17, 18, 19] and encoder.prompts == [16, 17, 18, 19, 20]


def row(i: int) -> dict[str, torch.Tensor]:
    return {"mean": torch.full((2, 3), float(i)), "time_ids": torch.tensor([i])}


def each(encode):
    """Rows made one by one, as data.fill() asks for them."""
    return lambda blocks: (encode(i) for block in blocks for i in block)


KEYS = [f"key {i}" for i in range(40)]


def files_in(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} if folder.exists() else set()


def filled(*args) -> list[Path]:
    """The files of data.fill(), in order."""
    return list(dict.fromkeys(path for path, _ in data.fill(*args)))


def test_the_bar_of_one_of_several_processes_ends_full(tmp_path, monkeypatch):
    bars, plain = [], blocks.progress
    monkeypatch.setattr(
        blocks, "progress", lambda *how, **s: bars.append(plain(*how, **s)) or bars[-1]
    )
    turns = iter([True, False, True])  # of 16, 16 and 8 rows
    data.fill(tmp_path, "latent", KEYS, each(row), lambda name: next(turns))
    assert (bars[-1].n, bars[-1].total) == (24, 24)


@pytest.mark.parametrize("error", [KeyboardInterrupt, Refusal("a", "b", "c"), MemoryError])
def test_an_interrupted_fill_leaves_whole_blocks_and_is_continued(tmp_path, error):
    whole = filled(tmp_path / "whole", "latent", KEYS, each(row))
    done = []

    def encode(i):
        if i == 20:
            raise error
        done.append(i)
        return row(i)

    folder = tmp_path / "cut"
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        filled(folder, "latent", KEYS, each(encode))
    assert files_in(folder) == {whole[0].name} and done == list(range(20))
    done.clear()
    rest = filled(folder, "latent", KEYS, each(lambda i: done.append(i) or row(i)))
    assert done == list(range(16, 40))
    assert [p.read_bytes() for p in rest] == [p.read_bytes() for p in whole]
    assert files_in(folder) == {p.name for p in whole}


def test_a_filled_block_is_not_encoded_again(tmp_path):
    def encode(i):
        raise AssertionError(f"row {i} was encoded")

    files = filled(tmp_path, "latent", KEYS, each(row))
    assert filled(tmp_path, "latent", KEYS, each(encode)) == files and len(files) == 3
    with pytest.raises(AssertionError, match="row 0"):
        data.fill(tmp_path, "prompt", KEYS, each(encode))  # another kind is another file


@pytest.mark.parametrize("count", [1, 15, 16, 17, 32, 33])
def test_rows_come_back_by_their_index_whatever_their_number(tmp_path, count):
    cache = data.Cache(data.fill(tmp_path, "latent", KEYS[:count], each(row)), [], [])
    assert [int(cache.row(cache.latents[i], "time_ids")) for i in range(count)] == list(
        range(count)
    )


def test_what_a_killed_process_left_half_written_is_swept_away(tmp_path):
    same = files.part_of(tmp_path / "latent-abc.safetensors")
    host = same.name.removesuffix(f".{os.getpid()}.part")
    dead, alive = (same.with_name(f"{host}.{pid}.part") for pid in (2**30, os.getppid()))
    # A number means nothing on another host, which may share this disk.
    new, old = (same.with_name(f"{host}er.{pid}.part") for pid in (2**30, os.getppid()))
    for _ in range(2):  # the second time nothing is left to encode
        for path in (dead, alive, same, new, old):
            path.write_bytes(b"half")
        os.utime(old, (0, time.time() - 90_000))
        data.fill(tmp_path, "latent", KEYS[:3], each(row))
        # In a container every start may have the same number, and this one has written nothing yet.
        assert not dead.exists() and not same.exists() and alive.exists()
        assert not old.exists() and new.exists()


def test_ctrl_c_while_a_file_is_written_leaves_no_half_of_it(tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(tmp_path / "a", b"whole")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_cache_file_cut_short_is_refused_by_name(tmp_path, size):
    cache = fill(tmp_path, Counting())
    file, _ = cache.latents[16]
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    cache.latent(0, False)
    with pytest.raises(Refusal, match=file.name) as refusal:
        cache.latent(18, False)
    assert "made anew" in str(refusal.value)
    file.unlink()  # as told
    encoder = Counting()
    assert torch.equal(
        fill(tmp_path, encoder).latent(18, False)[0], Counting().latent(18, False)[0]
    )
    assert encoder.latents == [16, 17, 18, 19]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["mean", "std"])
def test_latents_that_are_not_finite_stop_with_the_pictures_name(tmp_path, value, where):
    calls = []

    def spoil(mean, std):
        calls.append(1)
        if len(calls) == 18:
            {"mean": mean, "std": std}[where][0, 1, 2, 3] = value

    encoder = Counting(load_vae=lambda: fake_vae(spoil))
    with pytest.raises(Refusal, match=f"picture {ink()[17].name}"):
        fill(tmp_path, encoder)
    assert len([name for name in files_in(tmp_path) if name.startswith("latent")]) == 1


@pytest.mark.parametrize("part", [0, 1])
def test_embeddings_that_are_not_finite_stop_with_the_caption(tmp_path, monkeypatch, part):
    def encode_prompts(prompts, text):
        embeddings = torch.zeros(1, 32, 224), torch.zeros(1, 128)
        if prompts == [*ink()[2].captions]:
            embeddings[part][0, 0] = float("nan")
        return embeddings

    monkeypatch.setattr(model, "encode_prompts", encode_prompts)
    with pytest.raises(Refusal, match=ink()[2].captions[0]):
        fill(tmp_path, Counting())
    assert files_in(tmp_path) == set()


def test_a_damaged_picture_stops_the_fill_by_name_and_keeps_what_is_encoded(tmp_path):
    pictures = changed(ink(), 18, digest="0" * 32, read=lambda: b"")
    with pytest.raises(Refusal, match=f"picture {ink()[18].name} cannot be read"):
        fill(tmp_path, Counting(pictures))
    encoder = Counting()
    fill(tmp_path, encoder)
    assert encoder.latents == [16, 17, 18, 19] and encoder.prompts == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 7])
def test_the_cache_is_the_same_however_many_threads_decode(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(ahead, "usable_cores", lambda: workers)
    folders = []
    for turn in range(2):
        pictures = [
            dataclasses.replace(p, read=lambda p=p, turn=turn: slowly(p.read(), turn * workers))
            for p in ink()
        ]
        folders.append(tmp_path / str(turn))
        fill(folders[-1], Counting(pictures, random_crop=True), flip=True)
    first, second = ({p.name: p.read_bytes() for p in f.iterdir()} for f in folders)
    assert first == second and len(first) == 4


def slowly(content: bytes, how: int) -> bytes:
    time.sleep(0.004 * (len(content) % 3) * how)  # those after it are ready before
    return content


@pytest.mark.slow
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("resolution", [64, 768])
def test_what_a_gpu_encodes_in_batches_is_what_is_encoded_one_by_one(
    tmp_path, monkeypatch, flip, resolution
):
    """Up to the order of additions; law 3 to the byte is the CPU's."""
    pictures = ink()[:18] if resolution == 64 else ink()[:2]
    sizes, encode_images, encode_prompts = [], model.encode_images, model.encode_prompts

    def images(pixels, vae):
        sizes.append(len(pixels))
        return encode_images(pixels, vae)

    def prompts(captions, text):
        sizes.append(len(captions))
        return encode_prompts(captions, text)

    monkeypatch.setattr(data, "in_batches", lambda device: True)
    monkeypatch.setattr(model, "encode_images", images)
    monkeypatch.setattr(model, "encode_prompts", prompts)
    encoder = Counting(pictures, resolution, load_vae=pocket_vae)
    cache = fill(tmp_path, encoder, flip)
    # captions: 16 less an equal and an empty one; the last two; the unconditional one
    views = [16 * (1 + flip), 2 * (1 + flip)] if resolution == 64 else [1] * 2 * (1 + flip)
    assert sizes == [*([14, 1, 2] if resolution == 64 else [2]), 1, *views]
    monkeypatch.undo()
    want = Counting(pictures, resolution, load_vae=pocket_vae)
    for index in range(len(pictures)):
        for side in (False, True)[: 1 + flip]:
            close(cache.latent(index, side), want.latent(index, side))
        close(cache.prompt(index), want.prompt(index))
    close(cache.prompt(len(pictures)), want.prompt(len(pictures)))


def close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_of_a_batch_the_picture_that_is_not_finite_is_named(tmp_path, monkeypatch):
    def spoil(mean, std):
        if len(mean) == 8:  # the second block: views of pictures 16 to 19
            std[5, 1, 2, 3] = float("nan")

    monkeypatch.setattr(data, "in_batches", lambda device: True)
    with pytest.raises(Refusal, match=f"NaN or Inf for picture {ink()[18].name}"):
        fill(tmp_path, Counting(load_vae=lambda: fake_vae(spoil)), flip=True)
    assert len([name for name in files_in(tmp_path) if name.startswith("latent")]) == 1


@pytest.mark.slow
def test_ctrl_c_while_pictures_are_encoded_leaves_whole_blocks_and_no_thread_at_work(tmp_path):
    read, calls = [], []
    pictures = [
        dataclasses.replace(p, read=lambda p=p, i=i: read.append(i) or p.read())
        for i, p in enumerate(ink(60))
    ]

    def spoil(mean, std):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt

    before, encoder = (
        set(threading.enumerate()),
        Counting(pictures, load_vae=lambda: fake_vae(spoil)),
    )
    read.clear()  # their sizes, for the buckets
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, encoder)
    ours = [t for t in set(threading.enumerate()) - before if type(t).__name__ != "TMonitor"]
    for thread in ours:  # and not the bars' own
        thread.join(5)
        assert not thread.is_alive()
    assert max(read) < 20 + 2 * data.ROWS_PER_FILE  # the rest was not started
    assert len([name for name in files_in(tmp_path) if name.startswith("latent")]) == 1
    encoder = Counting(ink(60))
    fill(tmp_path, encoder)
    assert encoder.latents == list(range(16, 60)) and encoder.prompts == []


@pytest.mark.slow
@pytest.mark.parametrize("turn", [0, 1])
def test_blocks_that_another_process_claims_are_left_to_it(tmp_path, turn):
    """Two that claim by turns, one after the other, make the very files that one makes alone."""
    whole = fill(tmp_path / "alone", Counting(), flip=True)
    claims = {}

    def claim(rank):
        return lambda name: claims.setdefault(name, (len(claims) + turn) % 2) == rank

    encoders = [Counting(), Counting()]
    for rank, encoder in enumerate(encoders):
        cache = data.fill_cache(tmp_path, encoder, True, torch.float32, PRINTS, claim(rank))
    # two blocks of captions, 0 to 15 and the rest, then two of pictures, both views each
    want = [[*range(16)], [*range(16, 21)]]
    assert [encoder.prompts for encoder in encoders] == (want if turn == 0 else want[::-1])
    assert sorted(encoders[0].latents + encoders[1].latents) == sorted(ALL * 2)
    for ours, theirs in ((cache.latents, whole.latents), (cache.prompts, whole.prompts)):
        assert [p.read_bytes() for p, _ in ours] == [p.read_bytes() for p, _ in theirs]


def pocket_config(folder: Path, **change):
    return dataclasses.replace(
        RECIPES["pocket"][1],
        pretrained_model_name_or_path=str(TINY_SDXL),
        cache_dir=str(folder / "cache"),
        resolution=(64,),
        **change,
    )


@pytest.mark.slow
def test_models_that_differ_in_their_unconditional_embedding_do_not_share_it(tmp_path):
    """force_zeros_for_empty_prompt stands in model_index.json, outside the encoders' folders."""
    other = tmp_path / "model"
    other.mkdir()
    for part in hub.PARTS:
        (other / part).symlink_to(TINY_SDXL / part)
    index = json.loads((TINY_SDXL / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = False
    (other / "model_index.json").write_text(json.dumps(index))
    for name in (str(TINY_SDXL), str(other)):
        config = pocket_config(tmp_path)
        config = dataclasses.replace(config, pretrained_model_name_or_path=name)
        examples = data.examples_of(config, ink()[:3], CPU, torch.float32, 1000)
        want, _ = model.encode_unconditional(model.load_text_encoders(name, CPU))
        assert torch.equal(examples.source.prompt(3)[0], want[0]), name


@pytest.mark.parametrize("cache", [True, False])
def test_a_run_names_all_damaged_pictures_before_it_encodes(tmp_path, cache):
    pictures = changed(ink()[:4], 1, name="bad1.png", digest="0" * 32, read=lambda: b"")
    pictures = changed(pictures, 2, name="bad2.png", digest="1" * 32, read=lambda: PNG[:99])
    config = pocket_config(tmp_path, cache=cache)
    with pytest.raises(Refusal, match=r"bad1\.png.*bad2\.png"):
        data.examples_of(config, pictures, CPU, torch.float32, 1000)


# ---- what example i of the run is ----------------------------------------------------------------


def same(a: data.Example, b: data.Example, but: tuple[str, ...] = ()) -> bool:
    fields = [f.name for f in dataclasses.fields(a) if f.name not in but]
    return all(
        torch.equal(torch.as_tensor(getattr(a, name)), torch.as_tensor(getattr(b, name)))
        for name in fields
    )


EVERYTHING = {"flip": True, "dropout": 0.5, "offset": 0.1}


def test_an_example_is_a_function_of_seed_and_number_alone():
    in_order, at_random = (examples_of(None, **EVERYTHING) for _ in range(2))
    wanted = [in_order.example(i) for i in range(100)]
    numbers = list(range(100)) * 2
    random.Random(0).shuffle(numbers)
    assert all(same(at_random.example(i), wanted[i]) for i in numbers)
    other = examples_of(None, seed=4, **EVERYTHING)
    assert not any(same(other.example(i), wanted[i]) for i in range(100))
    assert len({(e.t, float(e.eps[0, 0, 0]), float(e.noise[0, 0, 0])) for e in wanted}) == 100


def test_every_epoch_shows_every_picture_once_in_an_order_of_its_own():
    examples = examples_of(None)
    epochs = [[examples.example(20 * e + i).picture for i in range(20)] for e in range(5)]
    assert all(sorted(epoch) == ALL for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    other = examples_of(None, seed=4)
    assert [other.example(i).picture for i in range(20)] not in epochs


@pytest.mark.parametrize(
    ("switched", "may_differ"),
    [
        ({"flip": True}, ("flip",)),
        ({"dropout": 0.5}, ("drop_caption",)),
        ({"offset": 0.1}, ("noise",)),
        ({"flip": True, "dropout": 1.0, "offset": 0.3}, ("flip", "drop_caption", "noise")),
    ],
)
def test_switching_one_thing_on_leaves_all_else_as_it_is(switched, may_differ):
    plain, other = examples_of(None), examples_of(None, **switched)
    pairs = [(plain.example(i), other.example(i)) for i in range(60)]
    assert all(same(a, b, but=may_differ) for a, b in pairs)
    assert not all(same(a, b) for a, b in pairs)


def test_more_dropout_drops_what_less_dropped_and_more():
    few, many = examples_of(None, dropout=0.2), examples_of(None, dropout=0.6)
    dropped = [
        {i for i in range(400) if e.example(i).drop_caption} for e in (examples_of(None), few, many)
    ]
    assert dropped[0] == set() < dropped[1] < dropped[2]


def test_what_is_drawn_has_the_distribution_that_the_method_asks_for():
    names = [str(i) for i in range(20)]
    chances = data.Chances(True, 0.3)
    examples = data.Examples(None, names, [(8, 16)] * 20, 4, 0, chances, 1000)
    drawn = [examples.example(i) for i in range(20000)]
    t = torch.tensor([e.t for e in drawn]).double()
    assert t.min() == 0 and t.max() == 999
    assert abs(t.mean() - 499.5) < 4 * 288.7 / 20000**0.5
    flips, drops = (
        torch.tensor([getattr(e, name) for e in drawn]).double()
        for name in ("flip", "drop_caption")
    )
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / 20000**0.5
    assert abs(drops.mean() - 0.3) < 4 * 0.46 / 20000**0.5
    table = torch.stack([torch.stack([e.eps, e.noise]).flatten() for e in drawn]).double()
    table = torch.cat([table, t[:, None], flips[:, None], drops[:, None]], dim=1)
    assert table[:, :16].mean(0).abs().max() < 4 / 20000**0.5
    assert (table[:, :16].std(0) - 1).abs().max() < 0.03
    correlation = torch.corrcoef(table.T) - torch.eye(19)
    assert correlation.abs().max() < 4.5 / 20000**0.5  # all independent of each other


def test_streams_of_different_purposes_never_coincide(monkeypatch):
    """numpy's SeedSequence takes [a, b, 0] for [a, b]: a purpose of 0 would be no purpose. The
    first deck's number, 0, comes after the purpose.
    """
    keys, default_rng = [], np.random.default_rng

    def noted(key):
        keys.append(tuple(key))
        return default_rng(key)

    monkeypatch.setattr(np.random, "default_rng", noted)
    image = encoded(Image.new("RGB", (10, 9)))
    for seed in (0, 1, 2, 2**32 - 1):
        examples = examples_of(None, count=1, seed=seed)  # one picture: every example an epoch
        for i in range(40):
            examples.example(i)
            chosen = Picture("a", ("a",), f"{i:08x}{'0' * 24}", lambda: image)
            one_view(chosen, 8, True, seed, False)
    states = [tuple(np.random.SeedSequence(key).generate_state(4)) for key in keys]
    assert len(keys) == 4 * 3 * 40 and len(set(states)) == len(states)
    assert all(key[2] for key in keys)


def test_caption_dropout_one_trains_the_unconditional_embedding_only():
    batch = examples_of(Counting(), dropout=1.0).batch(range(20), CPU)
    context, pooled = model.encode_unconditional(pocket_text())
    assert torch.equal(batch["context"], context.expand(20, -1, -1))
    assert torch.equal(batch["pooled"], pooled.expand(20, -1))
    encoder = Counting()
    examples_of(encoder, dropout=0.0).batch(range(20), CPU)
    assert sorted(encoder.prompts) == ALL


def test_of_several_captions_each_example_draws_one_and_each_equally_often(tmp_path):
    """Without a byte of all else that is drawn: dropping is drawn before, the caption after it."""
    pictures = changed(ink()[:3], 1, captions=("red", "  ", "blue"))
    encoder = Counting(pictures)
    assert encoder.captions == [*ink()[0].captions, "red", "", "blue", *ink()[2].captions, ""]
    assert encoder.captions_of == [range(1), range(1, 4), range(4, 5)]
    examples, one = (examples_of(each, count=3) for each in (encoder, Counting(ink()[:3])))
    dropping = examples_of(encoder, count=3, dropout=0.5)
    drawn = [examples.example(i) for i in range(3000)]
    assert all(same(e, one.example(e.number)) for e in drawn[:60])
    rows = [(e.picture, examples.prompt(e)) for e in drawn]
    counts = {row: rows.count(row) for row in set(rows)}
    assert counts.keys() == {(0, 0), (1, 1), (1, 2), (1, 3), (2, 4)}
    assert all(abs(counts[1, row] - 333) < 60 for row in (1, 2, 3))
    for e in map(dropping.example, range(60)):
        assert dropping.prompt(e) == (5 if e.drop_caption else examples.prompt(e))
    cache = fill(tmp_path, encoder)
    want = Counting(pictures)
    for row in range(6):
        assert all(map(torch.equal, cache.prompt(row), want.prompt(row)))
    assert torch.equal(cache.prompt(2)[0], cache.prompt(5)[0])  # an empty one is unconditional
    batches = [examples_of(each, count=3).batch(range(40), CPU) for each in (cache, want)]
    assert all(torch.equal(batches[0][key], value) for key, value in batches[1].items())


def test_noise_offset_shifts_each_channels_mean_and_nothing_else():
    plain, shifted = examples_of(None), examples_of(None, offset=0.1)
    twice = examples_of(None, offset=0.2)
    shifts = []
    for i in range(300):
        noise = plain.example(i).noise
        difference = shifted.example(i).noise - noise  # (C, H, W)
        shift = difference.mean(dim=(1, 2))
        assert (difference - shift[:, None, None]).abs().max() < 1e-6
        doubled = (twice.example(i).noise - noise).mean(dim=(1, 2))
        torch.testing.assert_close(doubled, 2 * shift, atol=1e-6, rtol=0)
        shifts.append(shift)
    shifts = torch.stack(shifts)  # (300, C)
    assert abs(shifts.std() - 0.1) < 0.01 and shifts.mean().abs() < 0.01
    assert (torch.corrcoef(shifts.T) - torch.eye(4)).abs().max() < 0.25


def test_a_batch_is_its_examples_however_they_are_cut_up():
    examples = examples_of(Counting(), **EVERYTHING)
    together = examples.batch(range(17, 25), CPU)
    for cuts in ([17, 25], [17, 18, 21, 25], list(range(17, 26))):
        parts = [examples.batch(range(a, b), CPU) for a, b in itertools.pairwise(cuts)]
        for key, value in together.items():
            assert torch.equal(torch.cat([part[key] for part in parts]), value), key


def test_a_batch_holds_what_its_examples_say():
    encoder = Counting()
    examples = examples_of(encoder, **EVERYTHING)
    batch = examples.batch(range(12), CPU)
    for i in range(12):
        e = examples.example(i)
        mean, std, time_ids = encoder.latent(e.picture, e.flip)
        context, pooled = encoder.prompt(20 if e.drop_caption else e.picture)
        want = {
            "mean": mean, "std": std, "eps": e.eps, "noise": e.noise, "t": torch.tensor(e.t),
            "context": context, "pooled": pooled, "time_ids": time_ids,
        }  # fmt: skip
        assert want.keys() == batch.keys()
        assert all(torch.equal(batch[key][i], value) for key, value in want.items())
    assert len({examples.example(i).flip for i in range(12)}) == 2


def test_timesteps_are_the_examples_own_unless_something_else_is_plugged_in():
    examples = examples_of(Counting())
    own = [examples.example(i).t for i in range(6)]
    batch = examples.batch(range(6), CPU)
    assert batch["t"].tolist() == own and batch["t"].dtype == torch.int64

    def by_number(given):
        return torch.tensor([e.number for e in given])

    other = examples.batch(range(6), CPU, by_number)
    assert other["t"].tolist() == list(range(6))
    assert all(torch.equal(batch[key], other[key]) for key in batch if key != "t")


def test_copied_pictures_are_two_examples_with_one_crop():
    """A picture is told by its content: the same file twice is the same view twice."""
    image = noisy(96, 64)
    encoder = Counting([picture(image, "a.png"), picture(image, "b.png")], random_crop=True)
    assert all(
        torch.equal(a, b)
        for a, b in zip(encoder.latent(0, False), encoder.latent(1, False), strict=True)
    )


def test_the_cache_may_be_deleted_at_any_time(tmp_path):
    first = fill(tmp_path / "cache", Counting()).latent(0, False)[0]
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(fill(tmp_path / "cache", Counting()).latent(0, False)[0], first)
