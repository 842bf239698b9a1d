"""A sheet: pictures side by side on white, with a title above each column and a label before each
row.
"""

from PIL import Image, ImageDraw, ImageFont


def grid(rows: dict[str, list[Image.Image]], titles: list[str]) -> Image.Image:
    """One picture of many. rows: {label: its pictures, one for each title}, all of one size."""
    side = max(next(iter(rows.values()))[0].size)
    size = max(11, side // 22)  # the letters grow with the pictures
    font = ImageFont.load_default(size)
    margin = int(size * 1.5)
    lines = [wrap(title, font, side - size) for title in titles]
    head = int(size * 1.3) * max(len(each) for each in lines) + size // 2
    left = margin + int(max(font.getlength(label) for label in rows))
    sheet = Image.new(
        "RGB", (left + margin // 2 + side * len(titles), head + side * len(rows)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for column, each in enumerate(lines):
        pen.multiline_text(
            (left + side * column + size // 2, 2), "\n".join(each), fill="black", font=font
        )
    for row, (label, pictures) in enumerate(rows.items()):
        middle = head + side * row + side // 2
        pen.text((margin // 3, middle), label, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (left + side * column, head + side * row))
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
