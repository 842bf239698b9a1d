"""What the small SDXL is taught: pictures composed from the drawings, each with its caption.

A lesson names a subject and what is done to it: which family drew it, its colour, how many there
are, how it is rendered, and which part of it is shown. Colours and numbers are combined freely, so
that the model has to read the words; the combinations in heldout.json never occur. The part shown
goes into SDXL's micro-conditioning (original size, crop offset), as it does in any SDXL training.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import inflect
import numpy as np
import torch
import torch.nn.functional as F

from pocket.drawings import FAMILIES, LINES, SIDE, Subject
from pocket.measure import COLOURS

NUMBERS = {"two": 2, "three": 3, "four": 4}
RENDERINGS = {  # name: how often, against the others
    "outlined": 3,
    "pastel outlined": 3,
    "lines": 4,
    "stencil": 1,
    "neon": 2,
    "posterised": 1,
    "duotone": 2,
    "inverted": 1,
    "at night": 1,
    "sepia": 1,
    "greyscale": 1,
    "ground": 3,
}
COLOUR_IN_NAME = {*COLOURS, "white"}
NUMBERED = re.compile(r"\b(one|two|three|four|eight|double|hundred)\b")


@dataclass
class Lesson:
    """One picture and its caption. `colour`, if any, is the main colour's aim; else `shift` moves
    hue (added), saturation and value (factors), and tints what is grey.
    """

    subject: int
    family: str
    caption: str
    colour: str = ""
    number: int = 1
    rendering: str = ""
    tint: str = ""  # the colour that a rendering uses
    pen: str = "thin"
    shift: tuple[float, float, float, float] = (0.0, 1.0, 1.0, 0.0)  # the last: a tint for grey
    original: int = SIDE  # side of the picture that this is a part of, or was before enlarging
    crop: tuple[int, int] = (0, 0)
    seed: int = 0


def noun_of(name: str) -> str:
    """The subject without the colour that its name begins with: red apple -> apple."""
    first, _, rest = name.partition(" ")
    return rest if first in COLOUR_IN_NAME and rest else name


def may_be_coloured(noun: str) -> bool:
    """Whether a colour before `noun` reads as its colour: not "blue two hearts"."""
    return not NUMBERED.search(noun) and not set(noun.split()) & COLOUR_IN_NAME


def forbidden(heldout: dict) -> set[tuple[str, str, int]]:
    """(noun, colour, number) of the combinations to be kept for the test; "" is any colour."""
    plural = inflect.engine()
    kept = set()  # a colour that is kept is kept in groups, too
    for row in heldout["combinations"]:
        words = [w for w in row["prompt"].split() if w not in NUMBERS and w != row["colour"]]
        noun = " ".join(words)
        noun = (plural.singular_noun(noun) or noun) if row["count"] > 1 else noun
        kept.add((noun, row["colour"], row["count"]))
    return kept


def plural_of(noun: str) -> str:
    """house with garden -> houses with garden; "" for what is many already, or has a number."""
    engine = inflect.engine()
    head, preposition, rest = re.match(
        r"(.*?)( (?:with|of|in|on|over|behind|and|showing) |$)(.*)", noun
    ).groups()
    last = head.rpartition(" ")[2]
    # It takes octopus and bus for plurals.
    single = not last.endswith(("us", "ss")) and engine.singular_noun(last)
    if (single and engine.plural(single) == last and last != single) or NUMBERED.search(noun):
        return ""
    return engine.plural(head) + preposition + rest


def plan(subjects: list[Subject], heldout: dict, count: int, seed: int) -> list[Lesson]:
    """`count` lessons, a function of `seed`; every subject as often as any other."""
    chance = random.Random(seed)
    kept = forbidden(heldout)
    plural = {subject.name: plural_of(noun_of(subject.name)) for subject in subjects}
    return [
        lesson(i % len(subjects), subjects[i % len(subjects)], kept, plural, chance)
        for i in range(count)
    ]


def lesson(place: int, subject: Subject, kept: set, plural: dict, chance) -> Lesson:
    """One lesson on `subject`: what the dice say, among what it can be."""
    weights = {"flat": 0.55, "glossy": 0.2, "soft": 0.15, "blob": 0.1}
    family = chance.choices(subject.families, [weights[f] for f in subject.families])[0]
    made = Lesson(place, family, subject.name, seed=chance.randrange(2**31))
    kind = chance.choices(["plain", "family", "colour", "number", "rendering"], [40, 8, 18, 12, 22])
    noun = noun_of(subject.name)
    if kind[0] in ("plain", "family"):
        made.shift = (
            chance.uniform(-0.09, 0.09),
            chance.uniform(0.7, 1.15),
            chance.uniform(0.85, 1.08),
            chance.choice([0.0, chance.uniform(0.1, 0.35)]),
        )
        if subject.tags and chance.random() < 0.25:
            made.caption += ", " + ", ".join(chance.sample(subject.tags, min(2, len(subject.tags))))
    if kind[0] == "family":
        made.caption += f", {family}"
    elif kind[0] == "colour":
        colour = chance.choice(list(COLOURS))
        if (noun, colour, 1) not in kept and may_be_coloured(noun):
            made.colour, made.caption = colour, f"{colour} {noun}"
    elif kind[0] == "number" and plural[subject.name]:
        word = chance.choice(list(NUMBERS))
        colour = chance.choice(["", *COLOURS])
        here = {(noun, "", NUMBERS[word]), (noun, colour, NUMBERS[word]), (noun, colour, 1)}
        if not here & kept:
            made.number, made.colour = NUMBERS[word], colour
            made.caption = " ".join(filter(None, (word, colour, plural[subject.name])))
    elif kind[0] == "rendering":
        render(made, noun, kept, chance)
    if made.number == 1 and chance.random() < 0.12:
        part(made, chance)
    return made


def render(made: Lesson, noun: str, kept: set, chance) -> None:
    """Choose how `made` is rendered, and say so in its caption."""
    made.rendering = chance.choices(list(RENDERINGS), list(RENDERINGS.values()))[0]
    made.pen = chance.choice(list(LINES))
    if made.rendering in ("outlined", "pastel outlined", "lines", "stencil", "neon"):
        made.family = "flat"  # the family whose lines are known
    words = made.rendering
    if made.rendering in ("lines", "stencil", "neon", "duotone", "ground"):
        # Black lines on white are what the pictures of pocket/ink shall teach, so never here.
        made.tint = chance.choice(
            [c for c in COLOURS if c not in ("black", "grey") and (noun, c, 1) not in kept]
        )
        words = {"ground": f"on {made.tint}"}.get(made.rendering, f"{made.tint} {made.rendering}")
    colour = chance.choice(list(COLOURS))
    if made.rendering in ("outlined", "ground") and chance.random() < 0.5:
        if (noun, colour, 1) not in kept and may_be_coloured(noun):
            made.colour, made.caption = colour, f"{colour} {noun}"
    made.caption += f", {words}"


def part(made: Lesson, chance) -> None:
    """Show a part of a larger picture, or an enlarged small one; either goes into the time ids."""
    if chance.random() < 0.75:
        made.original = chance.randrange(SIDE, SIDE * 3 // 2)
        room = made.original - SIDE
        made.crop = (chance.randint(0, room), chance.randint(0, room))
    else:
        made.original = chance.choice([32, 48, 64, 96])


def time_ids(made: Lesson) -> tuple[int, ...]:
    """SDXL's six: original height and width, crop top and left, target height and width."""
    return (made.original, made.original, *made.crop, SIDE, SIDE)


class Palette:
    """The drawings on a device, and how lessons are painted from them."""

    def __init__(self, folder: Path, device: str):
        packed = np.load(folder / "drawings.npz")
        drawn = np.stack([packed[f] for f in FAMILIES])  # (4, N, H, W, 4)
        self.drawn = torch.from_numpy(drawn).to(device)
        lines = np.stack([packed[p] for p in LINES])  # (2, N, H, W)
        self.lines = torch.from_numpy(lines).to(device)
        self.device = device
        self.colour = torch.tensor(list(COLOURS.values()), device=device)
        self.main = torch.stack([main_colour(family) for family in self.drawn])  # (4, N, 3)

    @torch.no_grad()
    def paint(self, lessons: list[Lesson]) -> torch.Tensor:
        """(B, 3, 128, 128) in [-1, 1], one picture a lesson."""
        rgb, alpha, line = self.gather(lessons)
        rgb = self.recolour(rgb, lessons)
        rgb, alpha, ground = self.draw_lines(rgb, alpha, line, lessons)
        rgb, alpha = arrange(rgb, alpha, lessons)
        picture = finish(rgb * alpha + ground * (1 - alpha), self, lessons)
        return show_part(picture, lessons).clamp(0, 1) * 2 - 1

    def gather(self, lessons):
        """rgb (B, 3, H, W), alpha and pen (B, 1, H, W), all in [0, 1]."""
        family, subject, pen = self.places(lessons)
        rgba = self.drawn[family, subject].permute(0, 3, 1, 2).float() / 255
        line = self.lines[pen, subject].float()[:, None] / 255
        return rgba[:, :3], rgba[:, 3:], line

    def places(self, lessons) -> torch.Tensor:
        """(3, B): numbers of family, subject and pen."""
        families, pens = list(FAMILIES), list(LINES)
        rows = [(families.index(x.family), x.subject, pens.index(x.pen)) for x in lessons]
        return torch.tensor(rows, device=self.device).T

    def tints(self, lessons, word) -> torch.Tensor:
        """(B, 3, 1, 1): HSV of the colour that each lesson names, any where it names none."""
        names = list(COLOURS)
        rows = [names.index(word(x) or names[0]) for x in lessons]
        return self.colour[torch.tensor(rows, device=self.device)][:, :, None, None]

    def flags(self, lessons, holds) -> torch.Tensor:
        """(B, 1, 1, 1) bool."""
        found = torch.tensor([holds(x) for x in lessons], device=self.device)
        return found[:, None, None, None]

    def recolour(self, rgb, lessons):
        """Shift all hues a little, or turn the main colour of the subject into the one it names."""
        hsv = to_hsv(rgb)
        shift = torch.tensor([x.shift for x in lessons], device=self.device)[:, :, None, None]
        # Grey has no hue to shift, so it is tinted instead: by a hue that is as random.
        grey = (hsv[:, 1:2] < 0.2) & (hsv[:, 2:] > 0.3) & (hsv[:, 2:] < 0.93)
        tint = torch.where(grey, shift[:, 3:], torch.zeros_like(hsv[:, :1]))
        moved = torch.cat(
            [
                (torch.where(tint > 0, shift[:, :1] * 5.5, hsv[:, :1]) + shift[:, :1]) % 1,
                (hsv[:, 1:2] * shift[:, 1:2] + tint).clamp(0, 1),
                (hsv[:, 2:] * shift[:, 2:3]).clamp(0, 1),
            ],
            1,
        )
        aim = self.tints(lessons, lambda x: x.colour)
        family, subject, _ = self.places(lessons)
        main = self.main[family, subject][:, :, None, None]
        # A subject with a colour keeps its other colours; a grey one takes the colour all over.
        near = ((hsv[:, :1] - main[:, :1] + 0.5) % 1 - 0.5).abs() < 0.11
        where = torch.where(main[:, 1:2] > 0.2, near & (hsv[:, 1:2] > 0.15), hsv[:, 2:] > 0.3)
        gain = (aim[:, 1:] / main[:, 1:].clamp(min=0.2)).clamp(max=4)
        painted = torch.cat(
            [
                aim[:, :1].expand_as(near),
                torch.where(
                    main[:, 1:2] > 0.2, hsv[:, 1:2] * gain[:, :1], aim[:, 1:2].expand_as(near)
                ).clamp(0, 1),
                (hsv[:, 2:] * gain[:, 1:]).clamp(0, 1),
            ],
            1,
        )
        painted = torch.where(where, painted, hsv)
        named = self.flags(lessons, lambda x: bool(x.colour))
        return to_rgb(torch.where(named, painted, moved))

    def draw_lines(self, rgb, alpha, line, lessons):
        """Renderings that show the pen, and every picture's ground (B, 3, 1, 1)."""
        tint = to_rgb(self.tints(lessons, lambda x: x.tint))
        white = torch.ones_like(tint)
        is_ = {r: self.flags(lessons, lambda x, r=r: x.rendering == r) for r in RENDERINGS}
        dark = torch.full_like(tint, 0.12)
        ink = torch.where(is_["lines"] | is_["stencil"] | is_["neon"], tint, dark)
        fill = torch.where(is_["pastel outlined"], rgb * 0.4 + 0.6, rgb)
        fill = torch.where(is_["lines"], white, torch.where(is_["neon"], dark, fill))
        cut = torch.where(brightness(rgb) < 0.5, tint.expand_as(rgb), white)
        fill = torch.where(is_["stencil"], cut, fill)
        lined = ("outlined", "pastel outlined", "lines", "stencil", "neon")
        shown = line * torch.stack([is_[name] for name in lined]).any(0)
        rgb = fill * (1 - shown) + ink * shown
        ground = torch.where(is_["neon"], dark, torch.where(is_["ground"], tint, white))
        return rgb, torch.maximum(alpha, shown), ground


def main_colour(rgba: torch.Tensor) -> torch.Tensor:
    """(N, H, W, 4) uint8 -> (N, 3): hue, saturation and value of each drawing's main colour.

    The saturation is 0 where less than a quarter of the drawing has a colour.
    """
    found = []
    for drawing in rgba.split(1):
        picture = drawing.permute(0, 3, 1, 2).float() / 255
        hsv = to_hsv(picture[:, :3])[0].flatten(1)
        weight = picture[0, 3].flatten()
        coloured = weight * (hsv[1] > 0.25) * (hsv[2] > 0.2)
        if coloured.sum() < 0.25 * weight.sum().clamp(min=1):
            value = (hsv[2] * weight).sum() / weight.sum().clamp(min=1)
            found.append(torch.stack([value * 0, value * 0, value]))
            continue
        bins = torch.zeros(24, device=rgba.device)
        bins.index_add_(0, (hsv[0] * 24).long().clamp(max=23), coloured)
        # Neighbouring bins together, so that a hue on the border of two is not halved.
        hue = ((bins + bins.roll(1) + bins.roll(-1)).argmax().float() + 0.5) / 24
        near = coloured * (((hsv[0] - hue + 0.5) % 1 - 0.5).abs() < 0.11)
        mean = (hsv * near).sum(1) / near.sum().clamp(min=1e-6)
        found.append(torch.stack([hue, mean[1], mean[2]]))
    return torch.stack(found)


def to_hsv(rgb: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) RGB -> HSV, all in [0, 1]."""
    top, where = rgb.max(1, keepdim=True)
    span = top - rgb.min(1, keepdim=True).values
    red, green, blue = rgb.split(1, 1)
    safe = span.clamp(min=1e-6)
    sextant = torch.where(
        where == 0,
        (green - blue) / safe % 6,
        torch.where(where == 1, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = torch.where(span > 1e-6, sextant / 6, 0.0)
    return torch.cat([hue, span / top.clamp(min=1e-6), top], 1)


def to_rgb(hsv: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) HSV -> RGB, all in [0, 1]."""
    hue, saturation, value = hsv.split(1, 1)
    offset = torch.tensor([5.0, 3.0, 1.0], device=hsv.device)[None, :, None, None]
    k = (offset + hue * 6) % 6
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


def brightness(rgb: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 1, H, W), as the eye weighs the channels (ITU-R BT.601)."""
    weights = rgb.new_tensor([0.299, 0.587, 0.114])[None, :, None, None]
    return (rgb * weights).sum(1, keepdim=True)


def arrange(rgb, alpha, lessons):
    """Two side by side, three in a triangle, four in a square; a single one stays as it is."""
    many = [i for i, x in enumerate(lessons) if x.number > 1]
    if not many:
        return rgb, alpha
    small = F.interpolate(
        torch.cat([rgb[many] * alpha[many], alpha[many]], 1), size=(60, 60), antialias=True,
        mode="bilinear",
    )  # colour times alpha, so that the ground's colour does not bleed in  # fmt: skip
    sheet = torch.zeros(len(many), 4, SIDE, SIDE, device=rgb.device)
    for row, i in enumerate(many):
        for top, left in slots(lessons[i]):
            sheet[row, :, top : top + 60, left : left + 60] = small[row]
    rgb, alpha = rgb.clone(), alpha.clone()
    rgb[many] = sheet[:, :3] / sheet[:, 3:].clamp(min=1e-3)
    alpha[many] = sheet[:, 3:]
    return rgb, alpha


def slots(made: Lesson) -> list[tuple[int, int]]:
    """Top left corners of the `number` copies, each moved a little."""
    chance = random.Random(made.seed)
    corners = {
        2: [(34, 2), (34, 66)],
        3: [(3, 34), (65, 2), (65, 66)],
        4: [(2, 2), (2, 66), (66, 2), (66, 66)],
    }[made.number]
    return [(top + chance.randint(-2, 2), left + chance.randint(-2, 2)) for top, left in corners]


def finish(picture, palette: Palette, lessons):
    """Renderings of the whole picture, by its brightness or level by level."""
    grey = brightness(picture)
    tint = to_rgb(palette.tints(lessons, lambda x: x.tint))
    sepia = picture.new_tensor([0.36, 0.22, 0.10])[None, :, None, None]
    night = picture.new_tensor([0.07, 0.09, 0.28])[None, :, None, None]
    made = {
        "posterised": (picture * 2).round() / 2,
        "duotone": tint * (1 - grey) + grey,
        "inverted": 1 - picture,
        "at night": night + picture * 0.45 * picture.new_tensor([0.6, 0.7, 1])[None, :, None, None],
        "sepia": sepia * (1 - grey)
        + grey * picture.new_tensor([1, 0.95, 0.84])[None, :, None, None],
        "greyscale": grey.expand_as(picture),
    }
    for name, version in made.items():
        flag = palette.flags(lessons, lambda x, name=name: x.rendering == name)
        picture = torch.where(flag, version, picture)
    return picture


def show_part(picture, lessons):
    """Enlarge and cut where a lesson shows a part; blur where it was small before."""
    picture = picture.clone()
    for i, made in enumerate(lessons):
        if made.original == SIDE:
            continue
        size = (made.original, made.original)
        whole = F.interpolate(picture[i : i + 1], size=size, mode="bilinear", antialias=True)
        if made.original < SIDE:
            picture[i] = F.interpolate(whole, size=(SIDE, SIDE), mode="bilinear")[0]
        else:
            top, left = made.crop
            picture[i] = whole[0, :, top : top + SIDE, left : left + SIDE]
    return picture
