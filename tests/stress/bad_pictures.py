"""Pictures as nobody should have to meet them: every format and mode that this Pillow writes, and
what damage, malice and odd cameras make of them.
"""

import functools
import io
import random
import struct
import zlib
from collections import Counter

import numpy as np
import torch
from PIL import Image

import data
from inputs.files import digest
from inputs.pictures import decode
from inputs.sources import Picture
from stress.case import Case

MODES = (
    *("1", "L", "P", "LA", "La", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"),
    *("I", "F", "I;16", "I;16B"),
)
NEEDS_A_HANDLER = {"BUFR", "GRIB", "HDF5", "WMF", "PDF", "PALM"}  # Pillow reads none of these
LOSSLESS = {"PNG", "BMP", "TIFF", "PPM", "TGA", "PCX", "DIB", "SGI", "QOI"}
# Pillow reads these without writing them: their first bytes, and a header that leads further in.
ONLY_READ = {
    "CUR": b"\0\0\2\0\1\0\x10\x10\0\0\1\0\1\0\x28\1\0\0\x16\0\0\0",
    "DCX": struct.pack("<3I", 0x3ADE68B1, 12, 0),
    "FITS": b"SIMPLE  =                    T".ljust(80)
    + b"BITPIX  =                    8".ljust(80)
    + b"NAXIS   =                    2".ljust(80)
    + b"NAXIS1  =                   16".ljust(80)
    + b"NAXIS2  =                   16".ljust(80)
    + b"END".ljust(2880 - 400),
    "FLI": struct.pack("<IHHHHHH", 400, 0xAF11, 2, 16, 16, 8, 0).ljust(128, b"\0"),
    "FTEX": b"FTEX" + struct.pack("<9i", 1, 16, 16, 1, 1, 0, 40, 0, 0),
    "GBR": struct.pack(">5I4sI", 40, 2, 16, 16, 4, b"GIMP", 10) + b"brush".ljust(12, b"\0"),
    "IPTC": b"\x1c\x03\x3c\0\x04\1\0\0\0\x1c\x03\x14\0\x02\0\x10",
    "MCIDAS": b"\0\0\0\0\0\0\0\4".ljust(256, b"\0"),
    "MPEG": b"\0\0\1\xb3\x01\x00\x10\x13",
    "MSP": b"DanM" + struct.pack("<2H", 16, 16).ljust(28, b"\0"),
    "PCD": b"\0" * 2048 + b"PCD_" + b"\0" * 2044,
    "PIXAR": b"\200\350\000\000".ljust(416, b"\0") + struct.pack("<HHHHHH", 16, 16, 0, 0, 0, 14),
    "PSD": b"8BPS" + struct.pack(">H6xHIIHHIIIH", 1, 3, 16, 16, 8, 3, 0, 0, 0, 0),
    "SUN": struct.pack(">8I", 0x59A66A95, 16, 16, 24, 768, 1, 0, 0),
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH", 0, 0, 16, 16, 72) + b"\0" * 20,
    "XPM": b'/* XPM */\nstatic char *a[] = {\n"4 4 2 1",\n"a c #ff0000",\n"b c #0000ff",\n',
    "XVTHUMB": b"P7 332\n#XVVERSION\n#END_OF_COMMENTS\n16 16 255\n",
}


def drawing(case: Case, width: int = 0, height: int = 0) -> np.ndarray:
    """A smooth picture (H, W, 3) whose four corners differ, so that every turn of it shows."""
    width, height = width or case.rng.randrange(12, 60), height or case.rng.randrange(12, 60)
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
    if mode.startswith("I"):
        wide = np.asarray(grey).astype(np.uint16) * 257
        if mode == "I":
            return Image.fromarray(wide.astype(np.int32)), looks
        made = Image.fromarray(wide)
        return (made if mode == "I;16" else made.convert("I").convert("I;16B")), looks
    if mode == "F":
        return Image.fromarray(np.asarray(grey).astype(np.float32)), looks
    if mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        alpha = Image.fromarray(
            np.where(np.arange(rgb.shape[1]) % 8 < 4, 255, 0)
            .astype(np.uint8)[None]
            .repeat(rgb.shape[0], 0)
        )
        base = "LA" if mode[0] == "L" else "RGBA"
        made = grey.convert("LA") if base == "LA" else image.convert("RGBA")
        made.putalpha(alpha)
        white = Image.new("RGBA", made.size, "white")
        looks = np.asarray(Image.alpha_composite(white, made.convert("RGBA")).convert("RGB"))
        return (made if mode == base else made.convert(mode)), looks
    made = image.convert(mode)
    return made, np.asarray(made.convert("RGB")) if mode == "P" else rgb


@functools.cache
def writable() -> list[tuple[str, str]]:
    """(format, mode) of all that this Pillow writes and reads again."""
    Image.init()
    kinds, rgb = [], np.zeros((16, 16, 3), np.uint8)
    for name in sorted(set(Image.SAVE) - NEEDS_A_HANDLER):
        for mode in MODES:
            try:
                image = in_mode(rgb, mode)[0]
                again = Image.open(io.BytesIO(saved(image, name)))
                same_depth = mode[0] not in "IF" or again.mode[0] == mode[0]
                if same_depth and again.has_transparency_data >= image.has_transparency_data:
                    kinds.append((name, mode))  # else the writer has cut it, without a word
            except Exception:  # this format has not this mode: nearly every class says so
                continue
    nth = Counter()  # every format once before any comes again
    order = [(nth.update([name]) or nth[name], name, mode) for name, mode in kinds]
    return [(name, mode) for _, name, mode in sorted(order)]


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
        how = rng.choice(("cut", "flip", "flip head", "noise", "drop", "double", "zeros", "insert"))
        case.what += f", {how}"
        at = rng.randrange(len(blob)) if blob else 0
        size = rng.choice((1, 4, 16, 200))
        if how == "cut":
            del blob[at:]
        elif how in ("flip", "flip head") and blob:
            for _ in range(rng.choice((1, 3, 20))):
                limit = min(len(blob), 64) if how == "flip head" else len(blob)
                blob[rng.randrange(limit)] ^= 1 << rng.randrange(8)
        elif how == "noise":
            blob[at : at + size] = rng.randbytes(min(size, len(blob) - at))
        elif how == "drop":
            del blob[at : at + size]
        elif how == "double":
            blob[at:at] = blob[at : at + size]
        elif how == "zeros":
            blob[at : at + size] = bytes(min(size, len(blob) - at))
        else:
            blob[at:at] = rng.randbytes(size)
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
    bmp = bytearray(saved(Image.fromarray(tiny), "BMP"))
    bmp[18:26] = struct.pack("<2i", 60000, 60000)
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
        "PNG of 2^31 x 1": png(2**31 - 1, 1, 8, 2, b""),
        "PNG with 400 MP in it": png(20000, 20000, 1, 0, row * 20000),
        "PNG with 100 MP in it": png(20000, 5000, 1, 0, row * 5000),
        "PNG with 100 MB of text": png(16, 16, 8, 0, bytes(17 * 16), text),
        "PNG with 100 MB of profile": png(
            *(16, 16, 8, 0, bytes(17 * 16)),
            chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8))),
        ),
        "GIF of 65535 x 65535": bytes(gif),
        "BMP of 60000 x 60000": bytes(bmp),
        "JPEG of 65500 x 65500": bytes(jpeg),
        "TIFF of 50000 x 50000": bytes(tiff),
        "PPM of 99999 x 99999": b"P6 99999 99999 255\n",
        "PFM of 99999 x 99999": b"PF\n99999 99999\n-1.0\n",
        "QOI of 2^31 x 2^31": b"qoif" + struct.pack(">2I2B", 2**31, 2**31, 4, 0) + b"\0" * 8,
        "TGA of 65535 x 65535": b"\0\0\x0a" + bytes(9) + struct.pack("<2H2B", 65535, 65535, 24, 0),
        "PSD of 30000 x 30000": b"8BPS" + struct.pack(">H6xHII", 1, 3, 30000, 30000),
        "the largest that is allowed": png(11000, 8000, 1, 0, bytes(1 + 11000 // 8) * 8000),
        "1 x 60000": png(1, 60000, 1, 0, b"\0\0" * 60000),
        "60000 x 1": png(60000, 1, 1, 0, bytes(1 + 60000 // 8)),
    }


def no_pictures() -> dict[str, bytes]:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9"/></svg>'
    return {
        "nothing": b"",
        "one byte": b"\x89",
        "text": b"a red fox in the snow\n" * 9,
        "SVG": svg,
        "HTML": b"<!DOCTYPE html><title>404</title>",
        "zeros": bytes(5000),
        "a zip": b"PK\3\4" + bytes(60),
        "a width of zero": png(0, 16, 8, 0, b""),
        "a height of zero": png(16, 0, 8, 0, b""),
        "PPM of 0 x 0": b"P6 0 0 255\n",
        "a PNG without data": b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""),
        "PostScript that writes a file": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n"
            b"(written-by-eps) (w) file closefile\nshowpage\n%%EOF\n"
        ),
    }


# ---- pictures whose answer is known --------------------------------------------------------------

TURNS = {  # EXIF orientation: how the stored picture comes from the upright one
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


def turned(case: Case) -> tuple[bytes, np.ndarray]:
    """A picture as a turned camera stores it."""
    tag = case.rng.choice((*TURNS, *TURNS, 0, 9, 65535))
    name = ("JPEG", "PNG", "WEBP", "TIFF")[case.turn % 4]
    rgb = drawing(case)
    exif = Image.Exif()
    exif[0x0112] = tag
    case.what = f"{name} with EXIF orientation {tag}"
    stored = np.ascontiguousarray(TURNS.get(tag, TURNS[1])(rgb))
    return saved(Image.fromarray(stored), name, exif=exif), rgb


def animated(case: Case) -> tuple[bytes, np.ndarray]:
    name = ("GIF", "PNG", "WEBP", "TIFF")[case.turn % 4]
    rgb = drawing(case)
    others = [Image.fromarray(255 - rgb), Image.fromarray(rgb[::-1].copy())]
    case.what = f"{name} of three frames"
    options = {"save_all": True, "append_images": others}
    if name != "TIFF":
        options["duration"] = 9
    blob = saved(Image.fromarray(rgb), name, **options)
    return blob, rgb


def palette(case: Case) -> tuple[bytes, np.ndarray]:
    """A palette with one transparent colour."""
    rgb = drawing(case)
    image = Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    clear = int(np.asarray(image)[0, 0])
    looks = np.asarray(image.convert("RGB")).copy()
    looks[np.asarray(image) == clear] = 255
    name = ("PNG", "GIF")[case.turn % 2]
    case.what = f"{name} with a transparent colour"
    return saved(image, name, transparency=clear), looks


@functools.cache
def in_turn() -> list[tuple[str, str]]:
    """writable() so that a few dozen meet what is rare in most formats: those modes first."""
    pairs = writable()[:]
    random.Random(0).shuffle(pairs)
    rare = ("CMYK", "I;16", "P", "PA", "LA", "RGBA", "F")
    return sorted(pairs, key=lambda pair: pair[1] not in rare)


def as_written(case: Case) -> tuple[bytes, np.ndarray]:
    pairs = in_turn()
    name, mode = (
        pairs[case.turn // 4 % len(pairs)] if case.turn % 4 == 0 else case.rng.choice(pairs)
    )
    case.what = f"{name} in {mode}"
    image, looks = in_mode(drawing(case), mode)
    return saved(image, name), looks


def known(case: Case) -> tuple[bytes, np.ndarray]:
    """A whole picture and the pixels (H, W, 3) it must give."""
    if case.turn % 4 == 0:
        return as_written(case)
    return case.rng.choice((as_written, turned, turned, animated, palette))(case)


def any_bytes(case: Case) -> bytes:
    """A damaged or impossible picture, told in case.what."""
    rng = case.rng
    how = rng.choice(("damaged",) * 5 + ("only read",) * 2 + ("none", "bomb", "joined"))
    if how == "only read":
        name = rng.choice(sorted(ONLY_READ))
        case.what = f"{name} by hand"
        blob = ONLY_READ[name] + rng.randbytes(rng.choice((0, 300, 3000)))
        return damaged(case, blob) if rng.random() < 0.4 else blob
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
    given = Picture("a.png", "", digest(blob), lambda: blob)
    kind = case.what

    def act():
        try:
            image = decode(given)
        except Exception:
            # Of whole pictures only those without a defined brightness or colour may be refused.
            if (
                whole
                and not kind.endswith((" in F", " in I", " in LAB", " in HSV"))
                and not kind.startswith(("EPS", "SPIDER"))
            ):
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
    pixels, ids = data.views(given, side, crop, case.seed, (False, True))
    assert pixels.shape == (2, 3, side, side) and pixels.dtype == torch.float32
    assert pixels.isfinite().all() and pixels.min() >= -1 and pixels.max() <= 1
    assert torch.equal(pixels[1], pixels[0].flip(-1))
    assert ids.shape == (2, 6) and (ids >= 0).all()
    assert ids[0].tolist()[:2] == [image.height, image.width]
