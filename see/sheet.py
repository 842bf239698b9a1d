"""A sheet: pictures side by side on white, with a title above each column and a label before each
row.
"""

import importlib.util
import sys
import textwrap
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLUMNS = 6  # more are hard to see on a screen, but where there are many rows, too
LINES = 3  # of a title


def grid(rows: dict[str, list[Image.Image]], titles: list[str]) -> Image.Image:
    """One picture of many. rows: {label: its pictures, one for each title}, all of one size; where
    there are more than COLUMNS and the sheet would be wider than high, blocks below each other.
    Says on stderr which of the titles' characters the font lacks. info["boxes"] of the sheet has
    {label: its pictures' boxes, in the titles' order}.
    """
    font = load_font(max(11, max(next(iter(rows.values()))[0].size) // 22))  # grows with pictures
    titles = [unicodedata.normalize("NFC", title) for title in titles]  # a letter and its accent
    if lacking := sorted(c for c in set("".join(titles)) if not can_draw(c, font)):
        codes = {ord(c): f" U+{ord(c):04X} " for c in lacking}
        titles = [title.translate(codes) for title in titles]
        first = " ".join(map(str.strip, [*codes.values()][:10]))
        said = f"the titles' font lacks {len(codes)} characters, drawn as their numbers: {first}"
        print(said, file=sys.stderr)
    blocks = -(-len(titles) // max(COLUMNS, round((len(titles) * len(rows)) ** 0.5)))
    wide = -(-len(titles) // blocks)
    cuts = [slice(x, x + wide) for x in range(0, len(titles), wide)]
    made = [block({k: row[cut] for k, row in rows.items()}, titles[cut], font) for cut in cuts]
    return stacked(made)


def stacked(pictures: list[Image.Image]) -> Image.Image:
    """One below the other, on white, apart, so that a heading is seen to be of what follows it."""
    width, height = max(each.width for each in pictures), sum(each.height for each in pictures)
    gap, y = width // 40, 0
    sheet = Image.new("RGB", (width, height + gap * (len(pictures) - 1)), "white")
    boxes = sheet.info["boxes"] = {}
    for each in pictures:
        sheet.paste(each, (0, y))
        for label, row in each.info["boxes"].items():
            boxes.setdefault(label, []).extend((x, top + y, r, b + y) for x, top, r, b in row)
        y += each.height + gap
    return sheet


def block(
    rows: dict[str, list[Image.Image]], titles: list[str], font: ImageFont.FreeTypeFont
) -> Image.Image:
    """A title above each column, a label before each row."""
    across, down = next(iter(rows.values()))[0].size
    size = int(font.size)
    column = max(across, 3 * size)  # a picture may be narrower than any word
    words = [fit(title or "(no words)", font, column - size) for title in titles]
    head = int(size * 1.3) * max(text.count("\n") + 1 for text in words) + size // 2
    margin, labels = int(size * 1.5), [fit(label, font, column) for label in rows]
    left = margin + int(max(font.getlength(line) for each in labels for line in each.split("\n")))
    width, height = left + column * len(titles) + margin // 2, head + down * len(rows)
    sheet = Image.new("RGB", (width, height), "white")
    boxes, pen = sheet.info.setdefault("boxes", {}), ImageDraw.Draw(sheet)
    for x, text in enumerate(words):
        place = (left + column * x + size // 2, 2)
        pen.text(place, text, fill="black", font=font, spacing=size // 5)
    for y, (label, words, pictures) in enumerate(zip(rows, labels, rows.values(), strict=True)):
        place = (margin // 3, head + down * y + down // 2)
        pen.text(place, words, fill="black", font=font, anchor="lm")
        for x, picture in enumerate(pictures):
            box = (left + column * x, head + down * y)
            box += (box[0] + across, box[1] + down)
            sheet.paste(picture, box)
            boxes.setdefault(label, []).append(box)
    return sheet


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans Mono, which matplotlib brings along (https://dejavu-fonts.github.io/License.html),
    of `size` pixels: it has the Latin, Greek and Cyrillic letters, all of one width.
    """
    found = importlib.util.find_spec("matplotlib").origin  # not imported: that takes a second
    return ImageFont.truetype(Path(found).parent / "mpl-data/fonts/ttf/DejaVuSansMono.ttf", size)


def can_draw(character: str, font: ImageFont.FreeTypeFont) -> bool:
    """Whether the font has more than its sign for what it lacks."""
    lacking = bytes(font.getmask("\U0010ffff"))  # no character, in no font
    return character.isspace() or bytes(font.getmask(character)) not in (lacking, b"")


def fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`text` in at most LINES lines no wider than `width` pixels. What is too long loses its
    middle, marked: prompts often differ at their end, and so do two seeds of one.
    """
    columns = max(1, int(width / font.getlength("m")))
    lines, kept = textwrap.wrap(text, columns), min(len(text), LINES * columns)
    while len(lines) > LINES and kept:
        kept -= 1
        less = f"{text[: kept - kept // 3]} ... {text[len(text) - kept // 3 :]}"
        lines = textwrap.wrap(less, columns)
    return "\n".join(lines)
