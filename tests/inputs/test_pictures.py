"""A picture is upright RGB as a person sees it, or refused by its name."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

import data
from inputs import code, pictures
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


# ---- colour profiles -----------------------------------------------------------------------------


def fixed(*numbers: float) -> bytes:
    return b"".join(struct.pack(">i", round(n * 65536)) for n in numbers)


def profile_of(space: bytes, between: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile (ICC.1:2001-04) by hand."""
    at, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, at + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s", at + len(body), bytes(4), 2 << 24, b"mntr", space, between)
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp"
    header = header.ljust(68, b"\0") + fixed(0.9642, 1.0, 0.8249)
    return header.ljust(128, b"\0") + table + body


WHITE = b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249)
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
P3 = ((0.5151, 0.2412, -0.0011), (0.2919, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
LINEAR = np.linspace(0, 1, 1024)
AS_SRGB = np.where(LINEAR <= 0.04045, LINEAR / 12.92, ((LINEAR + 0.055) / 1.055) ** 2.4)
AS_ADOBE = LINEAR ** (563 / 256)  # Adobe RGB (1998), 4.3.4.2
SPACES = {"Display P3": (P3, AS_SRGB), "Adobe RGB": (ADOBE, AS_ADOBE), "sRGB": (SRGB, AS_SRGB)}


def curve(values: np.ndarray) -> bytes:
    whole = np.round(values * 65535).astype(">u2")
    return b"curv" + bytes(4) + struct.pack(">I", len(whole)) + whole.tobytes()


def rgb_profile(name: str) -> bytes:
    matrix, values = SPACES[name]
    primaries = zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix, strict=True)
    tags = {tag: b"XYZ " + bytes(4) + fixed(*column) for tag, column in primaries}
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(values))
    return profile_of(b"RGB ", b"XYZ ", {b"wtpt": WHITE} | tags | curves)


def stored_in(name: str, srgb: tuple) -> tuple:
    """What a file in that space holds for an sRGB colour, by the spaces' definitions alone."""
    matrix, values = SPACES[name]
    xyz = np.array(SRGB).T @ np.interp(np.array(srgb) / 255, LINEAR, AS_SRGB)
    linear = np.linalg.solve(np.array(matrix).T, xyz).clip(0, 1)
    return tuple(int(n) for n in np.round(np.interp(linear, values, LINEAR) * 255))


def assert_near(got: tuple, want: tuple, most: int = 2) -> None:
    assert max(abs(a - b) for a, b in zip(got, want, strict=True)) <= most, (got, want)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("colour", [(40, 200, 60), (200, 60, 50), (30, 60, 180), (128, 128, 128)])
def test_a_picture_with_a_profile_becomes_the_srgb_that_is_seen(name, colour):
    stored, profile = stored_in(name, colour), rgb_profile(name)
    for kind, more in (("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100})):
        content = encoded(Image.new("RGB", (16, 16), stored), kind, icc_profile=profile, **more)
        assert_near(left_and_right(content)[0], colour, 3 if kind == "JPEG" else 2)


def test_display_p3_by_its_known_numbers():
    """CSS Color 4, 10.2: r = 0.1775 G, g = 0.9668 G, b = 0.0724 G + 0.9105 B in linear light."""
    assert stored_in("Display P3", (0, 200, 60)) == (90, 197, 81)
    content = encoded(
        Image.new("RGB", (8, 8), (90, 197, 81)), icc_profile=rgb_profile("Display P3")
    )
    assert_near(left_and_right(content)[0], (0, 200, 60))


def test_a_profile_counts_for_palettes_and_leaves_transparency_alone():
    profile, stored = rgb_profile("Display P3"), stored_in("Display P3", (0, 200, 60))
    clear = Image.new("RGBA", (8, 8), (*stored, 255))
    clear.paste((0, 0, 255, 0), (0, 0, 4, 8))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, *stored])
    palette.paste(0, (0, 0, 4, 8))
    key = clear.convert("RGB")
    for content in (
        encoded(clear, icc_profile=profile),
        encoded(palette, icc_profile=profile, transparency=0),
        encoded(key, icc_profile=profile, transparency=(0, 0, 255)),
    ):
        left, right = left_and_right(content)
        assert left == (255, 255, 255)
        assert_near(right, (0, 200, 60))


def test_a_profile_counts_for_grey_also_in_16_bits():
    linear = profile_of(b"GRAY", b"XYZ ", {b"wtpt": WHITE, b"kTRC": curve(LINEAR)})
    grey = round(255 * 0.2140)  # in linear light; sRGB 127.5
    for image in (
        Image.new("L", (8, 8), grey),
        Image.new("LA", (8, 8), (grey, 255)),
        Image.fromarray(np.full((8, 8), grey * 257, np.uint16)),
    ):
        assert_near(left_and_right(encoded(image, icc_profile=linear))[0], (128, 128, 128))


def test_cmyk_goes_by_its_profile():
    """Magenta and yellow ink are (200, 60, 50) on this press, as Lab: 46.0, 55.1, 37.8 (D50)."""
    linear = np.interp(np.array([200, 60, 50]) / 255, LINEAR, AS_SRGB)
    x, y, z = np.cbrt(np.array(SRGB).T @ linear / (0.9642, 1.0, 0.8249))
    lab = (116 * y - 16, 500 * (x - y), 200 * (y - z))
    corners = np.zeros((2, 2, 2, 2, 3), np.uint8) + np.array([0, 128, 128], np.uint8)
    corners[0, 0, 0, 0] = (255, 128, 128)
    corners[0, 1, 1, 0] = (round(lab[0] * 2.55), round(lab[1] + 128), round(lab[2] + 128))
    same = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += same * 4 + corners.tobytes() + same * 3
    press = profile_of(b"CMYK", b"Lab ", {b"wtpt": WHITE, b"A2B0": table})
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for kind, more in (("JPEG", {"quality": 100}), ("TIFF", {})):
        content = encoded(ink, kind, icc_profile=press, **more)
        assert_near(left_and_right(content)[0], (200, 60, 50))
        assert_near(left_and_right(encoded(ink, kind, **more))[0], (255, 0, 0))


@pytest.mark.parametrize("damaged", [b"x", rgb_profile("sRGB")[:200], "another mode's"])
def test_a_profile_that_does_not_fit_changes_nothing_and_is_said(damaged):
    if damaged == "another mode's":
        damaged = profile_of(b"GRAY", b"XYZ ", {b"wtpt": WHITE, b"kTRC": curve(LINEAR)})
    content = encoded(Image.new("RGB", (8, 8), (92, 196, 83)), icc_profile=damaged)
    assert left_and_right(content)[0] == (92, 196, 83)
    said = pictures.changes([picture(PNG), picture(content, "x/b.png")], [(8, 8)] * 2)
    assert "1 (the first: x/b.png) have a colour profile that does not fit, read as sRGB" in said


def test_how_colours_are_read_is_part_of_a_kept_picture_s_name(tmp_path, monkeypatch):
    """An edit of the conversion, as of what else decodes, makes encoded pictures anew."""
    makers = ("decode", "to_srgb", "colours_of", "transform_to_srgb", "from_16_bits")
    makers += ("upright_size", "mask_of")
    whole = {f"inputs.pictures.{name}" for name in makers}
    whole |= {"data.Encoder", "data.views", "data.CROP"}
    whole |= {"model.encode_images", "model.add_time_ids"}
    asked = []
    monkeypatch.setattr(data, "together", lambda *names: asked.append(names) or "")
    monkeypatch.setattr(data, "fill", lambda *_: [])
    encoder = data.Encoder([], None, None, data.Crop((8,), False, False, 0))
    monkeypatch.setattr(encoder, "caption", lambda i: "", raising=False)
    data.fill_cache(tmp_path, encoder, False, data.torch.float32, {"text": "", "vae": ""})
    assert set(asked[-1]) == whole and all(code.of_one(code.ROOT, name) for name in whole)


# ---- what a person would not expect, said at the start -------------------------------------------


def test_strong_changes_are_said_with_the_first_pictures_name():
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    grey = Image.fromarray(np.full((64, 64), 30000, np.uint16))
    deep = Image.new("RGB", (64, 64))
    given = {
        "long.png": encoded(noisy(100, 64)),
        "tall.png": encoded(noisy(64, 100)),
        "fair.png": encoded(noisy(90, 64)),  # 28.9 % are cut away
        "small.png": encoded(noisy(42, 42)),
        "nearly.png": encoded(noisy(43, 43)),  # 1.488 times
        "moves.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "phone.mpo": encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]),
        "grey.png": encoded(grey),
        "grey.tif": encoded(grey, "TIFF"),
        "damaged.png": b"",
        "deep.png": sixteen_bit_png(deep),
    }
    said = pictures.changes(
        [picture(v, name) for name, v in given.items()], [(64, 64)] * len(given)
    )
    assert said == (
        "changed: 2 (the first: long.png) lose over 30 % to the crop; "
        "2 (the first: small.png) are enlarged; "
        "1 (the first: small.png) are enlarged over 1.5 times; "
        "1 (the first: moves.gif) have several frames, of which the first is used; "
        "3 (the first: grey.png) have 16 bits, reduced to 8"
    )
    assert pictures.changes([picture(given["fair.png"])], [(64, 64)]) == ""
    several = [picture(noisy(100, 64)), picture(noisy(64, 64)), picture(noisy(64, 64))]
    assert pictures.table_of_sizes(several, [(64, 64), (64, 64), (64, 32)]).splitlines() == [
        "    64 x   64 px:     2 pictures,  18% cut",
        "    32 x   64 px:     1 pictures,  50% cut",
    ]


def sixteen_bit_png(image: Image.Image) -> bytes:
    """Pillow reads 16-bit colour, but does not write it."""
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + end

    row = b"\0" + bytes(6 * image.width)
    header = struct.pack(">IIBBBBB", *image.size, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * image.height))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


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
    with pytest.raises(Refusal, match=rf"strip\.png of {size[0]} x {size[1]} pixels; expected a l"):
        one_view(picture(noisy(*size), "strip.png"), 64, False, 0, False)
    assert pictures.decode(picture(noisy(20, 1))).size == (20, 1)


def test_all_damaged_pictures_are_named_at_once():
    given = [picture(PNG, f"good{i}.png") for i in range(3)]
    pictures.check_pictures(pictures.decode, given)
    given[1:1] = [picture(b"", "bad1.png"), picture(PNG[:200], "bad2.png")]
    with pytest.raises(Refusal) as refusal:
        pictures.check_pictures(pictures.decode, given)
    said = str(refusal.value)
    assert "bad1.png" in said and "bad2.png" in said and "good" not in said
    assert said.count("What to do") == 1
    many = [picture(b"", f"bad{i}.png") for i in range(25)]
    with pytest.raises(Refusal, match=r"bad0\.png.*and 15 more"):
        pictures.check_pictures(pictures.decode, many)
    with pytest.raises(Refusal, match=r"^picture bad1\.png cannot be read"):
        pictures.check_pictures(pictures.decode, [picture(PNG), picture(b"", "bad1.png")])


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_size_told_by_the_header_is_the_decoded_ones(kind, orientation):
    """Pillow turns a TIFF by itself: by its shape it would be put into the wrong bucket."""
    exif = Image.Exif()
    exif[274] = orientation
    given = picture(encoded(noisy(96, 48), kind, exif=exif))
    assert pictures.upright_size(given) == pictures.decode(given).size[::-1]
