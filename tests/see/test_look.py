"""python -m see.look: what it shows is what is trained, and every oddity is told by name."""

import numpy as np
import pytest
from PIL import Image

import data
from inputs import options
from inputs.sources import read_dataset
from made import encoded, noisy, write_folder
from see import look

OPTIONS = ("--resolution", "128", "192", "--buckets")


@pytest.fixture
def odd(tmp_path):
    """A folder in which nearly everything is odd."""
    wide, tall = encoded(noisy(300, 200)), encoded(noisy(150, 260, seed=1))
    files = {"wide.png": wide, "wide.txt": "a fox", "tall.png": tall, "tall.txt": "a fox"}
    files |= {"again.png": wide, "again.txt": "日本語 " + "a very long caption " * 40}
    files |= {"bare.png": encoded(noisy(140, 140, seed=2)), "cut.jpg": encoded(noisy(99, 99))[:500]}
    files |= {"text.png": "no picture", "film.mp4": "", "small.png": encoded(noisy(60, 90))}
    return write_folder(tmp_path / "odd set", files)


def run(folder, *words) -> int:
    given = ["--dataset-name", str(folder), "--output-dir", str(folder.parent)]
    return options.or_leave(look.main, ["t4", *given, *words])


def test_every_oddity_is_told_by_name_and_the_rest_is_shown(odd, capsys):
    assert run(odd, *OPTIONS) == 1  # since a run stops
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0].startswith("7 pictures; 1 (the first: film.mp4) left out")
    stops = [line for line in lines if line.startswith("a run stops at this")]
    assert len(stops) == 2 and "cut.jpg" in stops[0] and "text.png" in stops[1]  # all, and no more
    assert "sizes: from 60 x 90 px (small.png) to 300 x 200 px (wide.png)" in lines
    assert "pictures without a caption: 2, 'bare.png', 'small.png'" in lines
    assert "captions cut after 75 tokens by SDXL's tokenizer: 1, 'again.png'" in lines
    assert "captions of several pictures: 1, '2 x a fox'" in lines
    assert "files there several times: 1, 'again.png = wide.png'" in lines
    assert "(the first: small.png) are enlarged over 1.5 times" in said
    assert f"{odd.parent / 'look.png'}: 5 of 7 pictures" in lines[-1]


def test_what_a_run_would_refuse_for_its_size_is_told(odd, capsys):
    assert run(odd, *OPTIONS, "--no-upscale") == 1
    said = capsys.readouterr().out
    assert "a run stops at this: small.png of 60 x 90 pixels; expected at least" in said


@pytest.mark.parametrize("crop", ["--no-random-crop", "--random-crop"])
def test_the_crops_are_those_that_a_run_encodes(odd, monkeypatch, crop):
    """One by one and whole, where they are not made smaller for the sheet."""
    monkeypatch.setattr(look, "SIDE", 1024)
    shown = {}
    monkeypatch.setattr(look, "drawn", lambda rows: shown.update(rows) or Image.new("RGB", (1, 1)))
    words = ["t4", "--dataset-name", str(odd), *OPTIONS, crop, "--output-dir", str(odd.parent)]
    assert look.main(words) == 1
    config = options.parse(words)
    pictures = [p for p in read_dataset(str(odd), config) if p.name not in ("cut.jpg", "text.png")]
    rule = data.Crop(config.resolution, config.buckets, config.random_crop, config.seed)
    encoder = data.Encoder(pictures, None, None, rule)
    for i, picture in enumerate(pictures):
        want, (height, width) = encoder.views(i, (False,))[0][0], encoder.sizes[i]
        of_size = [crops for head, crops in shown.items() if head.startswith(f"{width} x {height}")]
        images = [
            np.asarray(image) for image, words in of_size[0] if words.startswith(picture.name)
        ]
        levels = ((want + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        assert any(np.array_equal(levels, image) for image in images), picture.name
    assert sum(map(len, shown.values())) == len(pictures)


def test_the_sheet_holds_every_crop_under_its_heading_with_its_caption(tmp_path):
    """Of a set of many, some from each size, and how many is said."""
    colours = [(i, 255 - i, 40) for i in range(0, 200, 5)]
    files = {f"{i:03}.png": encoded(Image.new("RGB", (128, 128), c)) for i, c in enumerate(colours)}
    files |= {f"t{i}.png": encoded(Image.new("RGB", (128, 256), (9, 9, 200 + i))) for i in range(2)}
    files |= {name.replace(".png", ".txt"): f"picture {name}" for name in [*files]}
    folder = write_folder(tmp_path / "many", files)
    look.MOST, before = 10, look.MOST
    try:
        assert run(folder, "--resolution", "128", "--buckets") == 0
    finally:
        look.MOST = before
    sheet = np.asarray(Image.open(tmp_path / "look.png").convert("RGB"))
    seen = {tuple(c) for c in sheet.reshape(-1, 3)}
    assert len(seen & set(colours)) == 8  # every fifth of 40
    assert len(seen & {(9, 9, 200), (9, 9, 201)}) == 1  # a size of few is not passed over
    assert (sheet[0] == 255).all() and (sheet < 60).all(-1).any()  # words, and none is cut


def test_nothing_to_look_at_is_said(tmp_path, capsys):
    folder = write_folder(tmp_path / "bad", {"a.png": "no picture", "a.txt": "a"})
    assert run(folder) == 1
    assert "a.png cannot be read" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        run(tmp_path / "nowhere")
    assert "there is no folder" in capsys.readouterr().err
    assert not (tmp_path / "look.png").exists()


def test_masks_that_stop_a_run_are_told_and_the_rest_is_drawn(tmp_path, capsys):
    edge = Image.new("L", (256, 128))
    edge.paste(255, (0, 0, 8, 128))
    masks = {"b": Image.new("L", (64, 64)), "c": Image.new("L", (256, 128)), "d": edge}
    files = {f"{x}.mask.png": encoded(mask) for x, mask in masks.items()} | {"e.mask.png": "none"}
    files |= {f"{x}.png": encoded(noisy(256, 128, seed=i)) for i, x in enumerate("abcde")}
    folder = write_folder(tmp_path / "masks", files)
    assert run(folder, "--resolution", "128", "--no-buckets", "--caption", "x") == 1
    said = capsys.readouterr().out
    stops = [line for line in said.splitlines() if line.startswith("a run stops at this")]
    whys = ("b.mask.png of 64 x 64", "c.mask.png is all black", "d.png is black in all that is cut")
    for stop, why in zip(stops, (*whys, "e.mask.png cannot be read"), strict=True):
        assert why in stop
    assert "look.png: 1 of 5 pictures" in said and (tmp_path / "look.png").exists()


def test_captions_are_counted_with_the_tokenizer_of_the_run(tmp_path, capsys):
    """The pocket model reads 30 tokens, SDXL 75."""
    files = {"a.png": encoded(noisy(64, 64)), "a.txt": "cat " * 45}
    folder = write_folder(tmp_path / "set", files)
    assert look.main(["pocket", "--dataset-name", str(folder), "--output-dir", str(tmp_path)]) == 0
    assert "captions cut after 30 tokens by the model's tokenizer: 1, 'a.png'" in (
        capsys.readouterr().out
    )
    assert run(folder) == 0
    assert "captions cut after 75 tokens by SDXL's tokenizer: 0" in capsys.readouterr().out
