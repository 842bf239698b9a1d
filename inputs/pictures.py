"""A picture file from anywhere as upright RGB pixels, or a refusal that names it.

Pictures come from phones, scanners and strangers: turned by a note in the file, with transparency,
in 16 bits, cut short, or made to take all memory. None may be shown to the VAE as something else
than what a person sees, and none may stop a run without its name.
"""

import contextlib
import functools
import io
import warnings

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from inputs.files import Refusal
from inputs.sources import Picture, for_all

LONGEST_SIDE = 20  # times the short one; a 1 x 60000 picture would be resized to gigabytes
# decode() raises instead. Here, since a filter set and taken back in one thread unsettles others.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(picture: Picture) -> Image.Image:
    """The picture upright (EXIF) and in RGB, transparency onto white. Raises Refusal, naming it, if
    it is damaged.
    """
    try:
        image = Image.open(io.BytesIO(picture.read()), formats=picture_formats())
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow refuses twice as many
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits: Pillow's convert would clip at 255
            image = Image.fromarray(from_16_bits(np.asarray(image)))
        if image.mode == "F":
            raise ValueError("numbers with a point do not say which of them is white")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if max(image.size) > LONGEST_SIDE * min(image.size):
            raise ValueError(
                f"{image.width} x {image.height} pixels: longer than {LONGEST_SIDE} times its "
                "short side"
            )
        return image
    except Exception as error:  # Pillow raises nearly every class for damaged files
        raise Refusal(
            f"picture {picture.name} cannot be read ({type(error).__name__}: {error})",
            f"a whole picture of at most {Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels that "
            "Pillow can open",
            "replace or remove it; what is encoded already is kept",
        ) from error


@functools.cache
def picture_formats() -> list[str]:
    """All that Pillow reads but PostScript, for which it would start Ghostscript: a program that
    the picture writes.
    """
    Image.init()
    return sorted(set(Image.ID) - {"EPS"})


def from_16_bits(pixels: np.ndarray) -> np.ndarray:
    """Whole numbers 0 to 65535 as 0 to 255. Raises ValueError for others: white is unknown then."""
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"pixels from {pixels.min()} to {pixels.max()}, beyond 16 bits")
    return (pixels // 257).astype(np.uint8)


def check_pictures(pictures: list[Picture]) -> None:
    """Decode every picture, so that all damaged ones are named at once, not one a run. Raises
    Refusal.
    """

    bar = tqdm(pictures, "checking pictures", leave=False, mininterval=1)
    for_all(lambda picture: decode(picture).close(), bar)


@contextlib.contextmanager
def all_damaged_named(pictures: list[Picture]):
    """A Refusal inside, which names the first damaged picture, becomes one that names all."""
    try:
        yield
    except Refusal:
        check_pictures(pictures)
        raise  # no picture is damaged: it is another trouble
