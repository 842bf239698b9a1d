"""A sheet shows every picture whole, in its row and column, and no title leaves its column."""

import numpy as np
from PIL import Image, ImageFont

from see import sheet


def test_a_grid_holds_every_picture_in_its_row_and_column():
    colours = {"before": ["red", "lime", "blue"], "after": ["aqua", "fuchsia", "yellow"]}
    rows = {k: [Image.new("RGB", (64, 64), c) for c in row] for k, row in colours.items()}
    drawn = np.asarray(sheet.grid(rows, ["a red apple", "a cat", "a rocket " * 20]))
    places = []
    for row in rows.values():
        for picture in row:
            ys, xs = np.where((drawn == np.asarray(picture)[0, 0]).all(-1))
            assert len(ys) == 64 * 64  # whole, and nothing drawn over it
            assert (np.ptp(ys), np.ptp(xs)) == (63, 63)
            places.append((int(ys.min()), int(xs.min())))
    tops, lefts = sorted({y for y, _ in places}), sorted({x for _, x in places})
    assert places == [(y, x) for y in tops for x in lefts] and (len(tops), len(lefts)) == (2, 3)
    assert (drawn[: tops[0]] < 128).any() and (drawn[:, : lefts[0]] < 128).any()  # words


def test_many_columns_go_below_each_other_and_none_is_lost():
    picture = Image.new("RGB", (40, 64), "red")
    for count, want in ((1, (1, 1)), (6, (6, 1)), (7, (4, 2)), (13, (5, 3)), (30, (6, 5))):
        drawn = np.asarray(sheet.grid({"a": [picture] * count}, ["x"] * count))
        red = (drawn == (255, 0, 0)).all(-1)
        assert red.sum() == count * 40 * 64  # none is cut, whatever its shape
        runs = [
            int((np.diff(np.concatenate([[0], line])) == 1).sum())
            for line in (red.any(0), red.any(1))
        ]
        assert runs == [1, want[1]], runs  # neighbours in a row touch
        assert red.any(0).sum() == want[0] * 40


def test_titles_are_cut_after_three_lines_and_none_is_wider_than_its_column():
    font = ImageFont.load_default(11)
    assert sheet.wrap("a fox", font, 100) == ["a fox"]
    assert sheet.wrap("", font, 100) == [""]
    lines = sheet.wrap("a lighthouse in the evening sun " * 5, font, 80)
    assert len(lines) == 3 and all(font.getlength(line) <= 80 for line in lines)
    assert sheet.wrap("x" * 50, font, 20) == ["x" * 50]  # one word is not cut
