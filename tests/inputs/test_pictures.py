"""A picture is upright RGB as a person sees it, or refused by its name."""

import io

import numpy as np
import pytest
from PIL import Image

from inputs import pictures
from inputs.files import Refusal
from inputs.sources import read_dataset
from made import PNG, RED, encoded, noisy, one_view, picture, write_folder

# ---- decoding ------------------------------------------------------------------------------------

STORED = {  # EXIF orientation: how the file holds an upright picture (TIFF 6.0, tag 274)
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,  # the camera was turned: shown turned clockwise
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_is_turned_upright_and_its_size_is_the_upright_one(orientation):
    upright, how = noisy(60, 40), STORED[orientation]
    stored = upright if how is None else upright.transpose(how)
    exif = Image.Exif()
    exif[274] = orientation
    turned = picture(encoded(stored, exif=exif))
    assert np.array_equal(np.asarray(pictures.decode(turned)), np.asarray(upright))
    _, time_ids = one_view(turned, 40, False, 0, False)
    assert time_ids.tolist() == [40, 60, 0, 10, 40, 40]


def test_jpegs_are_turned_too():
    exif = Image.Exif()
    exif[274] = 6
    turned = picture(encoded(noisy(60, 40), "JPEG", exif=exif), "a.jpg")
    assert pictures.decode(turned).size == (40, 60)


def with_palette(transparency: int | bytes) -> bytes:
    """Left half palette colour 0 (blue), right half 1 (red)."""
    image = Image.fromarray(np.repeat([[0] * 4 + [1] * 4], 8, axis=0).astype(np.uint8), "P")
    image.putpalette([0, 0, 255, 255, 0, 0])
    return encoded(image, transparency=transparency)


def left_and_right(content: bytes) -> tuple[tuple, tuple]:
    image = pictures.decode(picture(content))
    assert image.mode == "RGB"
    return image.getpixel((1, 4)), image.getpixel((6, 4))


def test_transparency_becomes_white():
    half = (255, 127, 127)  # half red on white
    white, red = (255, 255, 255), (255, 0, 0)
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    rgba.paste((0, 0, 255, 0), (0, 0, 4, 8))  # blue, but not to be seen
    assert left_and_right(encoded(rgba)) == (white, half)
    grey = Image.new("LA", (8, 8), (0, 128))
    grey.paste((0, 0), (0, 0, 4, 8))
    assert left_and_right(encoded(grey)) == (white, (127, 127, 127))
    assert left_and_right(with_palette(0)) == (white, red)
    assert left_and_right(with_palette(bytes([0, 128]))) == (white, half)
    key = Image.new("RGB", (8, 8), "red")
    key.paste((0, 0, 255), (0, 0, 4, 8))
    assert left_and_right(encoded(key, transparency=(0, 0, 255))) == (white, red)
    assert left_and_right(encoded(rgba, "WEBP", lossless=True, exact=True)) == (white, half)


def test_cmyk_becomes_rgb():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert left_and_right(encoded(red, "TIFF"))[0] == (255, 0, 0)
    r, g, b = left_and_right(encoded(red, "JPEG", quality=95))[0]
    assert r > 245 and g < 10 and b < 10


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_range(kind):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    image = pictures.decode(picture(encoded(Image.fromarray(grey * 257), kind)))
    assert np.array_equal(np.asarray(image), np.repeat(grey[..., None], 3, axis=2))


def test_one_bit_and_eight_bit_grey():
    bits = Image.new("1", (8, 8), 1)
    bits.paste(0, (0, 0, 4, 8))
    assert left_and_right(encoded(bits)) == ((0, 0, 0), (255, 255, 255))
    grey = Image.new("L", (8, 8), 77)
    assert left_and_right(encoded(grey)) == ((77, 77, 77), (77, 77, 77))


def test_of_an_animation_the_first_picture_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    for kind in ("GIF", "PNG", "WEBP"):
        more = {"lossless": True} if kind == "WEBP" else {}
        animation = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **more)
        assert Image.open(io.BytesIO(animation)).n_frames == 3
        assert left_and_right(animation)[0] == (255, 0, 0), kind


JPEG = encoded(noisy(64, 64), "JPEG")
DAMAGED = {
    "zero bytes": b"",
    "garbage": bytes(range(256)) * 20,
    "text": b"<html>404 Not Found</html>",
    "truncated png": PNG[: len(PNG) // 2],
    "truncated jpeg": JPEG[: len(JPEG) // 2],
    "only a header": PNG[:33],
    "damaged png": PNG[: len(PNG) // 2] + bytes(100) + PNG[len(PNG) // 2 + 100 :],
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_picture_is_refused_by_name(how):
    with pytest.raises(Refusal, match=r"picture sub/cat\.png cannot be read"):
        pictures.decode(picture(DAMAGED[how], "sub/cat.png"))


def test_a_picture_that_vanished_is_refused_by_name(tmp_path):
    folder = write_folder(tmp_path, {"a.png": RED, "a.txt": "a"})
    (gone,) = read_dataset(str(folder))
    (folder / "a.png").unlink()
    with pytest.raises(Refusal, match=r"picture a\.png cannot be read"):
        pictures.decode(gone)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest resets ours
@pytest.mark.parametrize("side", [33, 60])  # Pillow warns above the limit, and raises above twice
def test_a_decompression_bomb_is_refused(monkeypatch, side):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert pictures.decode(picture(noisy(31, 31))).size == (31, 31)
    with pytest.raises(Refusal, match=r"picture bomb\.png cannot be read \(Decompression"):
        pictures.decode(picture(noisy(side, side), "bomb.png"))


@pytest.mark.parametrize("size", [(1, 21), (21, 1), (5000, 3)])
def test_an_absurd_aspect_ratio_is_refused(size):
    with pytest.raises(Refusal, match=rf"strip\.png cannot be read.*{size[0]} x {size[1]}"):
        one_view(picture(noisy(*size), "strip.png"), 64, False, 0, False)
    assert pictures.decode(picture(noisy(20, 1))).size == (20, 1)


def test_all_damaged_pictures_are_named_at_once():
    given = [picture(PNG, f"good{i}.png") for i in range(3)]
    pictures.check_pictures(given)
    given[1:1] = [picture(b"", "bad1.png"), picture(PNG[:200], "bad2.png")]
    with pytest.raises(Refusal) as refusal:
        pictures.check_pictures(given)
    said = str(refusal.value)
    assert "bad1.png" in said and "bad2.png" in said and "good" not in said
    assert said.count("What to do") == 1
    many = [picture(b"", f"bad{i}.png") for i in range(25)]
    with pytest.raises(Refusal, match=r"bad0\.png.*and 15 more"):
        pictures.check_pictures(many)
    with pytest.raises(Refusal, match=r"^picture bad1\.png cannot be read"):
        pictures.check_pictures([picture(PNG), picture(b"", "bad1.png")])
