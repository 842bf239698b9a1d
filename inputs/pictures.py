"""A picture file from anywhere as upright RGB pixels, or a refusal that names it.

Pictures come from phones, scanners and strangers: turned by a note in the file, with transparency,
in 16 bits, cut short, or made to take all memory. None may be shown to the VAE as something else
than what a person sees, and none may stop a run without its name.
"""

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from inputs.files import Refusal, refuse
from inputs.progress import progress
from inputs.sources import ALPHA, WHITE, Picture, for_all, named, picture_formats

LONGEST_SIDE = 20  # times the short one; a 1 x 60000 picture would be resized to gigabytes
# decode() raises instead. Here, since a filter set and taken back in one thread unsettles others.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(picture: Picture, behind: str = "white") -> Image.Image:
    """The picture upright (EXIF) and in sRGB, transparency onto the colour `behind`. Raises
    Refusal, naming it, if it is damaged or of a shape that would take all memory.
    """
    try:
        image = Image.open(io.BytesIO(picture.read()), formats=picture_formats())
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow refuses twice as many
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        image.load()
        profile = image.info.get("icc_profile")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits: Pillow's convert would clip at 255
            image = Image.fromarray(from_16_bits(np.asarray(image)))
        if image.mode == "F":
            raise ValueError("numbers with a point do not say which of them is white")
        image = to_srgb(image, profile) if profile else image
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, behind), image)
        image = image.convert("RGB")
    except Exception as error:  # Pillow raises nearly every class for damaged files
        unknown = isinstance(error, UnidentifiedImageError)  # it names the memory it read
        why = "no picture that Pillow knows" if unknown else f"{type(error).__name__}: {error}"
        most = f"{Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels"
        expected = f"a whole picture of at most {most} that Pillow can open"
        remedy = "replace or remove it; what is encoded already is kept"
        raise Refusal(f"picture {picture.name} cannot be read ({why})", expected, remedy) from error
    if max(image.size) > LONGEST_SIDE * min(image.size):
        found = f"picture {picture.name} of {image.width} x {image.height} pixels"
        expected = f"a long side of at most {LONGEST_SIDE} short ones, by which it may be enlarged"
        raise Refusal(found, expected, "cut or remove it")
    return image


def mask_of(picture: Picture, size: tuple[int, int]) -> Image.Image:
    """The picture's mask in 8 bits of grey, white where it has none; size: the picture's width and
    height. Where a mask is transparent it is black, as one is painted in a layer of its own.
    Raises Refusal for a mask of another size and for one that hides the whole picture.
    """
    if picture.mask in (None, WHITE):
        return Image.new("L", size, "white")
    if picture.mask.digest == ALPHA:
        image = Image.open(io.BytesIO(picture.read()), formats=picture_formats())
        mask = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
    else:
        mask = decode(picture.mask, "black").convert("L")
    name = f"the mask {picture.mask.name}"
    if mask.size != size:
        found = f"{name} of {mask.width} x {mask.height} pixels"
        expected = f"{size[0]} x {size[1]}, the size of {picture.name}"
        raise Refusal(found, expected, "draw it over the picture, or remove it")
    if not mask.getbbox():
        raise Refusal(f"{name} is all black", "white where the picture is learned", "remove it")
    return mask


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """`image`, whose numbers mean what its ICC profile says, as sRGB: what the VAE was trained on.
    As it is where the profile is damaged or another mode's, which viewers pass over, too.
    """
    seen = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    plain = image.convert(colours_of(image.mode))
    if not (transform := transform_to_srgb(profile, plain.mode)):
        return image
    image = transform.apply(plain)
    if seen:
        image.putalpha(seen)
    return image


def colours_of(mode: str) -> str:
    """The mode in which a picture of `mode` has no transparency, no palette and 8 bits."""
    return "L" if mode[0] in "1IL" and mode != "LAB" else mode if mode == "CMYK" else "RGB"


@functools.lru_cache(maxsize=16)  # most data sets have one or two
def transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From `mode` under an ICC profile to sRGB; None where they do not fit."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def from_16_bits(pixels: np.ndarray) -> np.ndarray:
    """Whole numbers 0 to 65535 as 0 to 255. Raises ValueError for others: white is unknown then."""
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"pixels from {pixels.min()} to {pixels.max()}, beyond 16 bits")
    return (pixels // 257).astype(np.uint8)


def check_pictures(view: Callable, items: Sequence) -> None:
    """view(item), which raises for a picture that cannot be trained on, of every item, so that all
    of these are named at once, not one a run. Raises Refusal.
    """
    bar = progress(items, "reading")
    for_all(lambda item: view(item) and None, bar)  # their pixels together may fill all memory


@contextlib.contextmanager
def all_damaged_named(view: Callable, items: Sequence):
    """A Refusal inside, which names the first damaged picture, becomes one that names all."""
    try:
        yield
    except Refusal:
        check_pictures(view, items)
        raise  # no picture is damaged: it is another trouble


@functools.cache  # by what is at hand: a run asks for it several times
def upright_size(picture: Picture) -> tuple[int, int]:
    """Height and width as decode() gives them, by the file's header; 1 x 1 for a damaged one, which
    is refused by name when it is encoded.
    """
    try:
        image = Image.open(io.BytesIO(picture.read()), formats=picture_formats())
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        if turned and image.format == "TIFF":  # Pillow turns these itself, and their size earlier
            image.load()
            turned = False
        return image.size[:2] if turned else image.size[1::-1]
    except Exception:  # Pillow raises nearly every class for damaged files
        return 1, 1


def refuse_small(pictures: list[Picture], sizes: list[tuple[int, int]]) -> None:
    """Raise Refusal, naming them, where pictures are smaller than what they are trained at."""
    remedy = "remove it, or leave --no-upscale out"
    about = [(p.name, *upright_size(p), *size) for p, size in zip(pictures, sizes, strict=True)]
    refuse(
        (f"{name} of {width} x {height} pixels", f"at least {across} x {down}", remedy)
        for name, height, width, down, across in about
        if height < down or width < across
    )


def made_to_fit(picture: Picture, size: tuple[int, int]) -> tuple[float, float]:
    """How many times as large a picture is made to just cover `size` (height, width), by its
    header, and the share of it that is cut away then.
    """
    height, width = upright_size(picture)
    scale = max(size[0] / height, size[1] / width)
    return scale, 1 - size[0] * size[1] / (scale**2 * height * width)


def table_of_sizes(pictures: list[Picture], sizes: list[tuple[int, int]]) -> str:
    """A line for each size (height, width) at which pictures train, most first: how many, and the
    mean share of them that is cut away.
    """
    lost: dict[tuple[int, int], list[float]] = {}
    for picture, size in zip(pictures, sizes, strict=True):
        lost.setdefault(size, []).append(made_to_fit(picture, size)[1])
    return "\n".join(
        f"  {size[1]:4} x {size[0]:4} px: {len(each):5} pictures, {sum(each) / len(each):4.0%} cut"
        for size, each in sorted(lost.items(), key=lambda row: -len(row[1]))
    )


def changes(pictures: list[Picture], sizes: list[tuple[int, int]]) -> str:
    """Which pictures train as something else than a person sees, at the sizes (height, width) at
    which they train, in words, by their headers.
    """
    found: dict[str, list[str]] = {}
    pairs = zip(pictures, sizes, strict=True)
    for picture, size in progress(list(pairs), "reading", delay=2):
        with contextlib.suppress(Exception):  # a damaged one is refused by name when it is encoded
            image = Image.open(io.BytesIO(picture.read()), formats=picture_formats())
            scale, lost = made_to_fit(picture, size)
            profile = image.info.get("icc_profile")
            # A phone's MPO has a preview behind the picture, a PSD its layers.
            frames = image.format not in ("MPO", "PSD") and getattr(image, "is_animated", False)
            deep = image.mode[0] == "I" or re.search(r";16[BLN]", str(getattr(image, "tile", "")))
            for change, so in {
                "are enlarged": scale > 1,
                "lose over 30 % to the crop": lost > 0.3,
                "are enlarged over 1.5 times": scale > 1.5,
                "have several frames, of which the first is used": frames,
                "have 16 bits, reduced to 8": deep,
                "have a colour profile that does not fit, read as sRGB": profile
                and not transform_to_srgb(profile, colours_of(image.mode)),
            }.items():
                if so:
                    found.setdefault(change, []).append(picture.name)
    said = "; ".join(f"{named(names)} {change}" for change, names in found.items())
    return f"changed: {said}" if said else ""
