"""How far a picture is from a style, and whether it still shows its subject.

Pictures are (H, W, 3) uint8 arrays. Every measure is a plain number over pixels, so that a test, a
benchmark and an experiment mean the same by it. The names are those of pocket/heldout.json.
"""

import numpy as np
from PIL import Image

COLOURS = {  # word: (hue in turns, saturation, value) of HSV
    "red": (0.00, 0.85, 0.95),
    "orange": (0.08, 0.88, 1.00),
    "yellow": (0.145, 0.82, 1.00),
    "green": (0.36, 0.75, 0.75),
    "blue": (0.59, 0.85, 0.90),
    "purple": (0.76, 0.60, 0.80),
    "pink": (0.92, 0.45, 1.00),
    "brown": (0.06, 0.62, 0.52),
    "grey": (0.60, 0.05, 0.62),
    "black": (0.60, 0.10, 0.17),
}

BINS = 8  # per channel of a palette


def pixel_l1(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference, 0 to 255. A line that is moved by its width counts twice."""
    return float(np.abs(a.astype(np.float32) - b).mean())


def palette(picture: np.ndarray) -> np.ndarray:
    """(512,) shares of the pixels in 8 x 8 x 8 boxes of RGB; sums to 1."""
    box = (picture // (256 // BINS)).astype(np.int64)
    place = (box[..., 0] * BINS + box[..., 1]) * BINS + box[..., 2]
    return np.bincount(place.ravel(), minlength=BINS**3) / place.size


def palette_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Half the L1 between two pictures' palettes: the share of pixels to be recoloured, 0 to 1."""
    return float(np.abs(palette(a) - palette(b)).sum() / 2)


def style_distance(pictures: list[np.ndarray], style: list[np.ndarray]) -> float:
    """As `palette_distance`, between the mean palettes of two sets: needs no pairs."""
    means = [np.mean([palette(p) for p in some], axis=0) for some in (pictures, style)]
    return float(np.abs(means[0] - means[1]).sum() / 2)


def saturation(picture: np.ndarray) -> float:
    """Mean saturation of HSV, 0 to 1; ink has next to none."""
    return float(hsv(picture)[..., 1].mean())


def hsv(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) float in [0, 1]."""
    return np.asarray(Image.fromarray(picture).convert("HSV"), np.float32) / 255


def rank(picture: np.ndarray, own: int, drawings: np.ndarray) -> int:
    """How many of `drawings` (N, H, W, 3) are nearer to `picture` by pixel L1 than number `own`."""
    distances = np.abs(drawings.astype(np.int16) - picture.astype(np.int16)).mean((1, 2, 3))
    return int((distances < distances[own]).sum())


def colour_share(picture: np.ndarray, colour: str) -> float:
    """Share of the coloured pixels whose hue is within 30 degrees of `colour`, 0 to 1.

    Coloured is a saturation over 0.25 and a value over 0.25. `colour` is a hued one of
    `COLOURS`; not brown, grey or black.
    """
    h, s, v = np.moveaxis(hsv(picture), -1, 0)
    coloured = (s > 0.25) & (v > 0.25)
    away = np.abs((h - COLOURS[colour][0] + 0.5) % 1 - 0.5)
    return float((coloured & (away < 1 / 12)).sum() / max(1, coloured.sum()))


def shows(picture: np.ndarray, row: dict) -> bool:
    """Whether `picture` has the number and the colour of a combination in heldout.json.

    A colour is there if two fifths of the coloured pixels, and a twentieth of all, have it: the
    beak of a red penguin stays orange and a rocket's hull white.
    """
    right = objects(picture) == row["count"]
    if row["colour"]:
        _, s, v = np.moveaxis(hsv(picture), -1, 0)
        share = colour_share(picture, row["colour"])
        coloured = ((s > 0.25) & (v > 0.25)).mean()
        right = right and share >= 0.4 and share * coloured >= 0.05
    return bool(right)


def objects(picture: np.ndarray, smallest: float = 0.01) -> int:
    """Connected areas that are not nearly white, of at least `smallest` of the picture."""
    found = picture.min(-1) < 225
    label = np.where(found, np.arange(1, found.size + 1).reshape(found.shape), 0)
    while True:  # every pixel takes the greatest number among itself and its neighbours
        spread = np.pad(label, 1)
        shifts = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
        near = [np.roll(spread, shift, (0, 1))[1:-1, 1:-1] for shift in shifts]
        grown = np.where(found, np.max(near, axis=0), 0)
        if (grown == label).all():
            break
        label = grown
    sizes = np.bincount(label.ravel())[1:]
    return int((sizes >= smallest * found.size).sum())
