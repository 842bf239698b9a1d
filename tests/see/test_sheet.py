"""A sheet shows every picture whole, in its row and column, and no title leaves its column."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
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


def test_a_sheet_tells_where_each_picture_lies_in_the_titles_order():
    """Also where its columns go below each other: there a run's page cuts the pictures out."""
    rows = {
        name: [Image.new("RGB", (40, 64), (i * 15, 9, shade)) for i in range(13)]
        for name, shade in (("before", 0), ("after", 200))
    }
    drawn = sheet.grid(rows, [f"a rather long title {i}" for i in range(13)])
    boxes = drawn.info["boxes"]
    assert [*boxes] == [*rows]
    for name, row in rows.items():
        assert [drawn.crop(b).tobytes() for b in boxes[name]] == [p.tobytes() for p in row]


FONT = sheet.load_font(11)


def test_a_title_has_three_lines_at_most_and_none_is_wider_than_its_column():
    assert sheet.fit("a fox", FONT, 100) == "a fox" and sheet.fit("", FONT, 100) == ""
    text = sheet.fit("a lighthouse " + "in the evening sun " * 9 + "end", FONT, 80)
    first, _, last = text.split("\n")
    assert first.startswith("a lightho") and last.endswith("end")
    assert " ... " in text.replace("\n", " ")  # a cut is marked
    assert all(FONT.getlength(line) <= 80 for line in text.split("\n"))
    long = "a lighthouse in the evening sun over the sea " * 4
    one, two = (sheet.fit(f"{long}, seed {seed}", FONT, 120) for seed in (1, 2))
    assert one != two and one.endswith("seed 1") and two.endswith("seed 2")


def test_a_word_that_is_wider_than_its_column_is_broken_and_loses_no_letter():
    word = "Donaudampfschifffahrtsgesell"
    lines = sheet.fit(word, FONT, 80).split("\n")
    assert "".join(lines) == word and len(lines) == 3
    assert all(FONT.getlength(line) <= 80 for line in lines)
    assert sheet.fit("xyz", FONT, 1) == "x\ny\nz"  # no column is too narrow to end


def test_the_font_has_latin_greek_and_cyrillic_letters_and_needs_no_matplotlib_import():
    letters = "Café Zürich Łódź Đà Nẵng Huế ẤỀỘ Ο Οδυσσέας ταξιδεύει Кот с голубыми глазами їґў"
    assert all(sheet.can_draw(c, FONT) for c in letters)
    assert not any(sheet.can_draw(c, FONT) for c in "猫犬한न🚀\u200d")
    code = "import sys; from see import sheet; sheet.load_font(11); assert 'matplotlib' not in "
    code += "sys.modules and sheet.load_font(11).getname()[0] == 'DejaVu Sans Mono'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_what_the_font_lacks_is_drawn_as_its_number_and_said_once(capsys):
    picture = Image.new("RGB", (256, 256), "red")
    given = ["猫 \u0436", "犬 e\u0301"]  # it has the second, and joined the third
    spelt = [" U+732B  \u0436", " U+72AC  é"]
    drawn = sheet.grid({"a": [picture] * 2}, given)
    said = "the titles' font lacks 2 characters, drawn as their numbers: U+72AC U+732B\n"
    assert capsys.readouterr().err == said
    assert drawn.tobytes() == sheet.grid({"a": [picture] * 2}, spelt).tobytes()
    assert capsys.readouterr().err == ""  # nothing is lacking in the numbers


@pytest.mark.parametrize("size", [(8, 512), (64, 256), (512, 64), (128, 128)])
def test_no_title_covers_a_picture_or_leaves_its_column(size):
    long = "Ẫ quick lighthouse in the gjpqy evening sun, Donaudampfschifffahrtsgesellschaft " * 3
    picture = Image.new("RGB", size, "red")
    for titles in ([long, "", ""], ["", long, ""], ["", "", long]):
        titles = [title or "." for title in titles]
        drawn = np.asarray(sheet.grid({"": [picture] * 3, "b": [picture] * 3}, titles)).astype(int)
        red = (drawn == (255, 0, 0)).all(-1)
        assert red.sum() == 6 * size[0] * size[1]
        starts = np.flatnonzero(np.diff(red.any(0).astype(int), prepend=0) == 1)
        column = (starts[1] - starts[0]) if len(starts) == 3 else size[0]
        top, left = np.argwhere(red)[0][0], np.flatnonzero(red.any(0))[0]
        head = drawn[:top].min(-1) < 128  # (height, width): where letters are
        which = titles.index(long)
        inside = head[:, left + column * which : left + column * (which + 1)]
        dots = sum(head[:, left + column * i : left + column * (i + 1)].sum() for i in range(3))
        assert inside.sum() > 50 and dots == head.sum()
        others = head.sum() - inside.sum()
        assert others <= 0.2 * inside.sum()  # the two full stops
