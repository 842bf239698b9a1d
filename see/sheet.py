"""A sheet: pictures side by side on white, with a title above each column and a label before each
row.
"""

from PIL import Image, ImageDraw, ImageFont

COLUMNS = 6  # more are hard to see on a screen


def grid(rows: dict[str, list[Image.Image]], titles: list[str]) -> Image.Image:
    """One picture of many. rows: {label: its pictures, one for each title}, all of one size; where
    there are more than COLUMNS, blocks of rows below each other.
    """
    blocks = -(-len(titles) // COLUMNS)
    wide = -(-len(titles) // blocks)
    cuts = [slice(x, x + wide) for x in range(0, len(titles), wide)]
    made = [block({k: row[cut] for k, row in rows.items()}, titles[cut]) for cut in cuts]
    sheet = Image.new("RGB", (made[0].width, sum(each.height for each in made)), "white")
    for y, each in enumerate(made):
        sheet.paste(each, (0, sum(above.height for above in made[:y])))
    return sheet


def block(rows: dict[str, list[Image.Image]], titles: list[str]) -> Image.Image:
    """A title above each column, a label before each row."""
    across, down = next(iter(rows.values()))[0].size
    size = max(11, max(across, down) // 22)  # the letters grow with the pictures
    font = ImageFont.load_default(size)
    words = [wrap(title, font, across - size) for title in titles]
    head = int(size * 1.3) * max(len(lines) for lines in words) + size // 2
    margin = int(size * 1.5)
    left = margin + int(max(font.getlength(label) for label in rows))
    width, height = left + across * len(titles) + margin // 2, head + down * len(rows)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for x, lines in enumerate(words):
        place = (left + across * x + size // 2, 2)
        pen.multiline_text(place, "\n".join(lines), fill="black", font=font)
    for y, (label, pictures) in enumerate(rows.items()):
        place = (margin // 3, head + down * y + down // 2)
        pen.text(place, label, fill="black", font=font, anchor="lm")
        for x, picture in enumerate(pictures):
            sheet.paste(picture, (left + across * x, head + down * y))
    return sheet


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """`text` in at most three lines that are no wider than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines[:3]
