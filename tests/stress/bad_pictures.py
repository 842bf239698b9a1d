"""Pictures as nobody should have to meet them: every format and mode that this Pillow writes, and
what damage, malice and odd cameras make of them.
"""

import functools
import io
import random
import struct
import zlib

import numpy as np
import torch
from PIL import Image

import data
from inputs.files import digest
from inputs.pictures import decode
from inputs.sources import Picture
from stress.case import Case

MODES = ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "F", "I;16")
RARE = ("CMYK", "I;16", "P", "LA", "RGBA", "F")
NEEDS_A_HANDLER = {"BUFR", "GRIB", "HDF5", "WMF", "PDF", "PALM"}  # Pillow reads none of these
LOSSLESS = {"PNG", "BMP", "TIFF", "PPM", "TGA", "PCX", "DIB", "SGI", "QOI"}


def drawing(case: Case) -> np.ndarray:
    """A smooth picture (H, W, 3) whose four corners differ, so that every turn of it shows."""
    width, height = case.rng.randrange(12, 60), case.rng.randrange(12, 60)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    red, green, blue = x, y, (1 - x) * (1 - y)
    return (np.stack([red, green, blue], -1) * 200 + 20).astype(np.uint8)


def in_mode(rgb: np.ndarray, mode: str) -> tuple[Image.Image, np.ndarray]:
    """The picture in `mode`, and what it must look like on white."""
    image = Image.fromarray(rgb)
    grey = image.convert("L")
    looks = np.asarray(grey.convert("RGB"))
    if mode in ("L", "1"):
        return grey.convert(mode), np.asarray(grey.convert(mode).convert("RGB"))
    if mode == "I;16":
        return Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), looks
    if mode == "F":
        return Image.fromarray(np.asarray(grey).astype(np.float32)), looks
    if mode in ("LA", "RGBA"):
        stripes = np.where(np.arange(image.width) % 8 < 4, 255, 0).astype(np.uint8)
        made = (grey if mode == "LA" else image).convert(mode)
        made.putalpha(Image.fromarray(stripes[None].repeat(image.height, 0)))
        white = Image.new("RGBA", made.size, "white")
        return made, np.asarray(Image.alpha_composite(white, made.convert("RGBA")).convert("RGB"))
    made = image.convert(mode)
    return made, np.asarray(made.convert("RGB")) if mode == "P" else rgb


@functools.cache
def writable() -> list[tuple[str, str]]:
    """(format, mode) of all that this Pillow writes and reads again, rare modes first: a few dozen
    inputs meet those, too.
    """
    Image.init()
    kinds, rgb = [], np.zeros((16, 16, 3), np.uint8)
    for name in sorted(set(Image.SAVE) - NEEDS_A_HANDLER):
        for mode in MODES:
            try:
                image = in_mode(rgb, mode)[0]
                again = Image.open(io.BytesIO(saved(image, name)))
                same_depth = mode not in ("I;16", "F") or again.mode[0] == mode[0]
                if same_depth and again.has_transparency_data >= image.has_transparency_data:
                    kinds.append((name, mode))  # else the writer has cut it, without a word
            except Exception:  # this format has not this mode: nearly every class says so
                continue
    random.Random(0).shuffle(kinds)
    return sorted(kinds, key=lambda pair: pair[1] not in RARE)


def saved(image: Image.Image, name: str, **options) -> bytes:
    file = io.BytesIO()
    if name == "SPIDER" and image.mode != "F":
        raise ValueError("SPIDER converts everything to floats")
    image.save(file, name, **options)
    return file.getvalue()


# ---- damage --------------------------------------------------------------------------------------


def damaged(case: Case, blob: bytes) -> bytes:
    """`blob` after one to three accidents, told in case.what."""
    rng, blob = case.rng, bytearray(blob)
    for _ in range(rng.choice((1, 1, 2, 3))):
        how = rng.choice(("cut", "flip", "flip head", "noise", "drop", "zeros", "insert"))
        case.what += f", {how}"
        at, size = rng.randrange(len(blob) or 1), rng.choice((1, 4, 16, 200))
        if how == "cut":
            del blob[at:]
        elif how.startswith("flip") and blob:
            limit = min(len(blob), 64) if how == "flip head" else len(blob)
            for _ in range(rng.choice((1, 3, 20))):
                blob[rng.randrange(limit)] ^= 1 << rng.randrange(8)
        else:
            new = {"noise": rng.randbytes(size), "drop": b"", "zeros": bytes(size)}
            blob[at : at + size * (how != "insert")] = new.get(how, rng.randbytes(size))
    return bytes(blob)


def chunk(kind: bytes, content: bytes) -> bytes:
    sum_ = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", sum_)


def png(width: int, height: int, depth: int, color: int, rows: bytes, extra: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">2I5B", width, height, depth, color, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + extra + body


def bombs() -> dict[str, bytes]:
    """Small files that claim, or hold, pictures of gigabytes."""
    tiny = np.zeros((16, 16, 3), np.uint8)
    gif = bytearray(saved(Image.fromarray(tiny), "GIF"))
    gif[6:10] = b"\xff\xff\xff\xff"
    jpeg = bytearray(saved(Image.fromarray(tiny), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">2H", 65500, 65500)
    tiff = bytearray(saved(Image.fromarray(tiny), "TIFF"))
    ifd = struct.unpack("<I", tiff[4:8])[0]
    for i in range(struct.unpack("<H", tiff[ifd : ifd + 2])[0]):
        entry = ifd + 2 + 12 * i
        if struct.unpack("<H", tiff[entry : entry + 2])[0] in (256, 257):
            tiff[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, 50000)
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))
    row = bytes(1 + 20000 // 8)
    return {
        "PNG of 60000 x 60000": png(60000, 60000, 8, 2, b""),
        "PNG with 400 MP in it": png(20000, 20000, 1, 0, row * 20000),
        "PNG with 100 MP in it": png(20000, 5000, 1, 0, row * 5000),
        "PNG with 100 MB of text": png(16, 16, 8, 0, bytes(17 * 16), text),
        "PNG with 100 MB of profile": png(
            *(16, 16, 8, 0, bytes(17 * 16)),
            chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8))),
        ),
        "GIF of 65535 x 65535": bytes(gif),
        "JPEG of 65500 x 65500": bytes(jpeg),
        "TIFF of 50000 x 50000": bytes(tiff),
        "the largest that is allowed": png(11000, 8000, 1, 0, bytes(1 + 11000 // 8) * 8000),
        "1 x 60000": png(1, 60000, 1, 0, b"\0\0" * 60000),
        "60000 x 1": png(60000, 1, 1, 0, bytes(1 + 60000 // 8)),
    }


def no_pictures() -> dict[str, bytes]:
    return {
        "nothing": b"",
        "text": b"a red fox in the snow\n" * 9,
        "HTML": b"<!DOCTYPE html><title>404</title>",
        "zeros": bytes(5000),
        "a width of zero": png(0, 16, 8, 0, b""),
        "a height of zero": png(16, 0, 8, 0, b""),
        "a PNG without data": b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""),
        "PostScript that writes a file": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n"
            b"(written-by-eps) (w) file closefile\nshowpage\n%%EOF\n"
        ),
    }


# ---- pictures whose answer is known --------------------------------------------------------------


def known(case: Case) -> tuple[bytes, np.ndarray]:
    """A whole picture and the pixels (H, W, 3) it must give. (Turned, animated and transparent
    ones: tests/inputs/test_pictures.py.)
    """
    pairs = writable()
    name, mode = (
        pairs[case.turn // 4 % len(pairs)] if case.turn % 4 == 0 else case.rng.choice(pairs)
    )
    case.what = f"{name} in {mode}"
    image, looks = in_mode(drawing(case), mode)
    return saved(image, name), looks


def any_bytes(case: Case) -> bytes:
    """A damaged or impossible picture, told in case.what."""
    rng = case.rng
    how = rng.choice(("damaged",) * 5 + ("none", "bomb", "joined"))
    if how in ("none", "bomb"):
        group = no_pictures() if how == "none" else bombs()
        case.what = rng.choice(sorted(group))
        case.bomb = how == "bomb" and " of " in case.what and "MB" not in case.what
        return group[case.what]
    blob, _ = known(case)
    if how == "joined":
        case.what += ", followed by another file"
        return blob + saved(Image.fromarray(drawing(case)), "PNG")
    return damaged(case, blob)


def picture(case: Case):
    """decode() and views() of one picture."""
    whole = case.turn % 2 == 0
    blob, looks = known(case) if whole else (any_bytes(case), None)
    given = Picture("a.png", ("",), digest(blob), lambda: blob)
    kind = case.what

    def act():
        try:
            image = decode(given)
        except Exception:
            # Of whole pictures only those without a defined brightness or colour may be refused.
            if whole and not kind.endswith(" in F") and not kind.startswith(("EPS", "SPIDER")):
                raise AssertionError("a whole picture was refused") from None
            raise
        assert image.mode == "RGB" and image.width * image.height <= Image.MAX_IMAGE_PIXELS
        if looks is not None:
            compare(kind, np.asarray(image), looks)
        look_at_views(case, given, image)

    return act


def compare(kind: str, got: np.ndarray, looks: np.ndarray) -> None:
    """Whether a picture came out as it went in, as far as its format keeps it."""
    if kind.startswith(("ICNS", "ICO")):  # these choose a size of their own
        return
    assert got.shape == looks.shape, f"{got.shape} for {looks.shape}"
    off = np.abs(got.astype(int) - looks).mean()
    exact = kind.split()[0] in LOSSLESS and kind.split()[-1] in ("RGB", "L", "1", "P", "RGBA", "LA")
    assert off <= (0.5 if exact else 16), f"off by {off:.1f} of 255"


def look_at_views(case: Case, given: Picture, image: Image.Image) -> None:
    crop, side = case.rng.random() < 0.5, case.rng.choice((8, 64))
    pixels, ids = data.views(given, (side, side), crop, case.seed, (False, True))
    assert pixels.shape == (2, 3, side, side) and pixels.dtype == torch.float32
    assert pixels.isfinite().all() and pixels.min() >= -1 and pixels.max() <= 1
    # An odd rest has no middle: both views of a centre crop leave the larger half on one side.
    if crop or (side * image.width // min(image.size) - side) % 2 == 0:
        assert torch.equal(pixels[1], pixels[0].flip(-1))
    assert ids.shape == (2, 6) and (ids >= 0).all()
    assert ids[0].tolist()[:2] == [image.height, image.width]
