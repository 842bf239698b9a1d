"""A data set is read whole, in an order of its own, or refused by the name of what does not fit."""

import json
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from PIL import Image, PngImagePlugin

from conftest import INK, ROOT
from inputs import hub, sources
from inputs import pictures as decoding
from inputs.files import Refusal, digest
from inputs.options import Config
from inputs.sources import Picture, read_dataset
from keep import identity
from made import BLUE, PNG, RED, cell, encoded, noisy, write_folder


def read(folder: Path | str, **options) -> sources.Pictures:
    return read_dataset(str(folder), Config(**options))


def contents(pictures: list[Picture]) -> list[tuple]:
    return [(p.name, p.captions[0], p.digest) for p in pictures]


# ---- sources -------------------------------------------------------------------------------------


def test_metadata_jsonl_gives_pictures_and_captions_also_in_sub_folders(tmp_path):
    rows = [
        {"file_name": "b/c/blue.png", "text": "a blue square"},
        {"file_name": "red.png", "text": "a red square", "extra": 1},
    ]
    files = {"metadata.jsonl": rows, "b/c/blue.png": BLUE, "red.png": RED}
    pictures = read_dataset(str(write_folder(tmp_path, files)))
    assert contents(pictures) == [
        ("b/c/blue.png", "a blue square", digest(BLUE)),
        ("red.png", "a red square", digest(RED)),
    ]
    assert [p.read() for p in pictures] == [BLUE, RED]


def test_name_txt_beside_name_jpg(tmp_path):
    files = {"x/a.b.JPG": RED, "x/a.b.txt": " a red square\n", "c.webp": BLUE, "c.txt": "blué"}
    pictures = read_dataset(str(write_folder(tmp_path, files)))
    assert contents(pictures) == [
        ("c.webp", "blué", digest(BLUE)),
        ("x/a.b.JPG", "a red square", digest(RED)),
    ]


def test_the_ink_pictures_are_160_and_captioned():
    pictures = read_dataset(str(INK))
    assert len(pictures) == len({p.digest for p in pictures}) == 160
    assert all(p.captions[0].strip() for p in pictures)
    assert [p.name for p in pictures] == sorted(p.name for p in pictures)


@pytest.mark.parametrize("kind", ["metadata", "txt"])
def test_the_order_on_disk_is_nothing(tmp_path, kind):
    names = [f"{folder}{i}" for folder in ("", "z/", "a-b/", "a/") for i in range(5)]
    pngs = {name: encoded(noisy(8, 8, i)) for i, name in enumerate(names)}
    read = []
    for turn in range(3):
        random.Random(turn).shuffle(names)
        files: dict = {f"{name}.png": pngs[name] for name in names}
        if kind == "metadata":
            rows = [{"file_name": f"{name}.png", "text": f"caption {name}"} for name in names]
            files["metadata.jsonl"] = rows
        else:
            files |= {f"{name}.txt": f"caption {name}" for name in reversed(names)}
        read.append(contents(read_dataset(str(write_folder(tmp_path / str(turn), files)))))
    assert read[0] == read[1] == read[2] and len(read[0]) == 20
    assert all(caption == f"caption {name[:-4]}" for name, caption, _ in read[0])


def test_a_missing_caption_is_an_empty_one(tmp_path):
    names, told = ("a.png", "b.png", "c.png"), ["", "", "c"]
    rows = [{"file_name": n, "text": t} for n, t in zip(names, (None, "", "c"), strict=True)]
    files = dict.fromkeys(names, RED)
    folder = write_folder(tmp_path / "m", {"metadata.jsonl": rows} | files)
    assert [p.captions[0] for p in read_dataset(str(folder))] == told
    files |= {"a.txt": "", "b.txt": "\n", "c.txt": "c"}
    assert [p.captions[0] for p in read_dataset(str(write_folder(tmp_path / "t", files)))] == told


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_the_usual_caption_columns_are_found(tmp_path, column):
    rows = [{"other": "no", "file_name": "a.png", column: "yes"}]
    folder = write_folder(tmp_path, {"metadata.jsonl": rows, "a.png": RED})
    assert read(folder)[0].captions[0] == "yes"


def test_a_named_caption_column_is_taken_as_it_is(tmp_path):
    rows = [{"file_name": "a.png", "text": "no", "title": " yes\n"}]
    folder = write_folder(tmp_path, {"metadata.jsonl": rows, "a.png": RED})
    assert read(folder, caption_column="title")[0].captions[0] == " yes\n"


def test_a_wrong_caption_column_is_refused_with_those_that_are_there(tmp_path):
    rows = [{"file_name": "a.png", "title": "t"}]
    folder = write_folder(tmp_path, {"metadata.jsonl": rows, "a.png": RED})
    for wanted, expected in (("", "text or caption or prompt"), ("label", "label")):
        with pytest.raises(Refusal) as refusal:
            read(folder, caption_column=wanted)
        said = str(refusal.value)
        assert "title" in said and expected in said and "--caption-column" in said


GOOD = {"file_name": "a.png", "text": "a"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not a row"),
        ('{"file_name": "a.png", "text": "a"', "line 2 is not a row"),
        ("a.png a red square", "line 2 is not a row"),
        ("[]", r"line 2 is not a row \(no file_name in \[\]\)"),
        ("7", "line 2 is not a row"),
        ('{"text": "a"}', r"line 2 is not a row \(no file_name in {\"text\": \"a\"}\)"),
        ('{"file_name;text": "a.png;a"}', "no file_name in .*file_name;text"),  # of a .csv
        ('{"file_name": 7, "text": "a"}', "line 2 is not a row"),
        ('{"file_name": "", "text": "a"}', "1 captions without a picture .*such as '\\.'"),
        (
            '{"file_name": "gone.png", "text": "a"}',
            "1 captions without a picture .*such as 'gone.png'",
        ),
        (
            '{"file_name": "../x.png", "text": "a"}',
            "1 captions without a picture .*such as '../x.png'",
        ),
        (
            '{"file_name": "/etc/hostname", "text": "a"}',
            "1 captions without a picture .*such as '/etc/hostname'",
        ),
        ('{"file_name": "a.png", "text": 7}', "line 2 has the caption 7"),
        ('{"file_name": "a.png", "text": ["a", 7]}', "line 2 has the caption 7"),
        ('{"file_name": "a.png", "text": [["a"]]}', "line 2 has the caption"),
        ('{"file_name": "a.png"}', "line 2 has the columns file_name"),
    ],
)
def test_a_bad_metadata_line_is_refused_by_number(tmp_path, line, said):
    write_folder(tmp_path, {"x.png": RED})  # what ../x.png would reach
    files = {"metadata.jsonl": json.dumps(GOOD) + "\n" + line, "a.png": RED}
    folder = write_folder(tmp_path / "set", files)
    with pytest.raises(Refusal, match=said):
        read_dataset(str(folder))


def test_all_bad_lines_and_all_odd_files_are_named_at_once(tmp_path):
    rows = '{"text": "a"}\nno row\n{"file_name": "a.png", "text": 7}'
    folder = write_folder(tmp_path / "lines", {"metadata.jsonl": rows, "a.png": RED})
    with pytest.raises(Refusal, match=r"line 1 .* line 2 .* line 3 "):
        read_dataset(str(folder))
    bad = b"caf\xe9"
    files = {"a.png": RED, "a.txt": bad, "b.png": BLUE, "b.txt": bad}
    folder = write_folder(tmp_path / "texts", files)
    with pytest.raises(Refusal, match=r"a\.txt .* cannot .*b\.txt .* cannot .*text in UTF-8"):
        read_dataset(str(folder))


def test_blank_lines_in_metadata_are_nothing(tmp_path):
    files = {"metadata.jsonl": "\n" + json.dumps(GOOD) + "\r\n\n  \n", "a.png": RED}
    assert len(read_dataset(str(write_folder(tmp_path, files)))) == 1


def test_of_some_pictures_without_a_caption_each_gets_an_empty_one(tmp_path):
    files = {"metadata.jsonl": [GOOD], "a.png": RED, "sub/b.png": BLUE}
    read = read_dataset(str(write_folder(tmp_path / "m", files)))
    assert [(p.name, p.captions[0]) for p in read] == [("a.png", "a"), ("sub/b.png", "")]
    files = {"a.png": RED, "a.txt": "a", "b.png": BLUE}
    read = read_dataset(str(write_folder(tmp_path / "t", files)))
    assert [(p.name, p.captions[0]) for p in read] == [("a.png", "a"), ("b.png", "")]


@pytest.mark.parametrize("more", [{}, {"metadata.jsonl": ""}])
def test_pictures_without_any_caption_are_refused_with_a_way_out(tmp_path, more):
    files = {f"x/{i:02}.png": RED for i in range(12)} | more
    with pytest.raises(Refusal) as refusal:
        read_dataset(str(write_folder(tmp_path, files)))
    said = str(refusal.value)
    assert f"none of the 12 pictures of {tmp_path} has a caption, such as 'x/00.png', 'x/01" in said
    assert "'x/09.png' and 2 more" in said and "x/10.png" not in said
    assert ("metadata.jsonl has no rows" in said) == bool(more)
    assert '--caption "a photo of sks dog", --caption "" (the empty prompt) or, in a fol' in said
    assert said.endswith("--caption-from-name")


@pytest.mark.parametrize("own", [{"a.txt": ""}, {"metadata.jsonl": [GOOD | {"text": None}]}])
def test_captions_that_are_all_empty_are_as_good_as_none(tmp_path, own):
    folder = write_folder(tmp_path, {"a.png": RED} | own)
    with pytest.raises(Refusal, match=r"none of the 1 pictures .*such as 'a\.png'"):
        read(folder)
    (found,) = read(folder, caption="")
    assert found.captions[0] == "" and not read(folder, caption="").notes


def test_a_caption_is_given_to_every_picture_that_has_none_of_its_own(tmp_path):
    files = {"a.png": RED, "b.png": BLUE, "b.txt": "own", "x/c.png": RED, "x/c.txt": " "}
    folder = write_folder(tmp_path, files)
    found = read(folder, caption="a photo of sks dog")
    assert [p.captions[0] for p in found] == ["a photo of sks dog", "own", "a photo of sks dog"]
    assert found.notes == [
        "2 (the first: a.png) without a caption of their own, called 'a photo of sks dog'"
    ]
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "class": "red"}')
    with pytest.raises(Refusal, match=r"metadata\.jsonl line 1 has the columns file_name, class"):
        read(folder)
    assert [p.captions[0] for p in read(folder, caption="x")] == ["x", "own", "x"]
    (folder / "b.txt").unlink()
    assert [p.captions[0] for p in read(folder, caption="x")] == ["x", "x", "x"]
    with pytest.raises(Refusal, match="expected title"):
        read(folder, caption="x", caption_column="title")
    with pytest.raises(Refusal, match="without control characters"):
        read(folder, caption="x\x07")


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("red_apple (2).png", "red apple"),
        ("x/red apple(12).jpg", "red apple"),
        ("red-apple-03.png", "red-apple"),
        ("Red_Apple_3.webp", "Red Apple"),
        ("R2D2.png", "R2D2"),
        ("cafe\u0301.v2.png", "caf\u00e9.v2"),
        ("3 apples.png", "3 apples"),
    ],
)
def test_a_files_name_can_be_its_caption(tmp_path, name, caption):
    files = {name: RED, "own.png": BLUE, "own.txt": "mine", "0012.png": BLUE}
    found = read(write_folder(tmp_path, files), caption_from_name=True)
    told = {p.name: p.captions[0] for p in found}
    assert told == {name: caption, "own.png": "mine", "0012.png": ""}
    assert found.notes == [
        f"1 (the first: {name}) without a caption of their own, called {caption!r} and so on, by "
        "their names"
    ]


def test_names_that_are_numbers_are_no_captions(tmp_path):
    folder = write_folder(tmp_path, {"1.png": RED, "02.png": BLUE})
    with pytest.raises(Refusal, match="none of the 2 pictures"):
        read(folder, caption_from_name=True)


def test_what_looks_like_captions_is_said_where_an_option_gives_them(tmp_path):
    folder = write_folder(tmp_path, {"a.png": RED, "a.json": "{}"})
    found = read(folder, caption="a")
    note = "1 (the first: a.json) left out, since they are not named as captions are"
    assert found[0].captions[0] == "a" and found.notes[0] == note


def test_a_caption_beside_a_table_that_lacks_it_is_taken_with_it(tmp_path):
    files = {"a.png": RED, "b.png": BLUE, "metadata.jsonl": [GOOD], "b.txt": "b", "LICENSE.txt": ""}
    folder = write_folder(tmp_path, files)
    found = read(folder)
    assert [p.captions[0] for p in found] == ["a", "b"] and not found.notes
    (folder / "b.txt").write_text("")
    found = read(folder)
    assert [p.captions[0] for p in found] == ["a", ""] and not found.notes


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_table_at_the_top_and_one_in_the_split_are_taken_together(tmp_path, split):
    files = {"a.png": RED, f"{split}/a.png": BLUE}
    files |= {"metadata.jsonl": [GOOD], f"{split}/metadata.csv": "file_name,text\na.png,other"}
    found = read(write_folder(tmp_path, files), dataset_split=split)
    assert {p.name: p.captions for p in found} == {"a.png": ("a",), f"{split}/a.png": ("other",)}
    assert not found.notes


def test_of_two_tables_none_is_taken_in_silence(tmp_path):
    files = {"metadata.jsonl": [GOOD], "metadata.csv": "file_name,text\na.png,other"}
    said = r"captions of a\.png disagree: 'other' in metadata\.csv and"
    with pytest.raises(Refusal, match=said):
        read(write_folder(tmp_path, files | {"a.png": RED}))


def test_a_table_whose_pictures_are_all_elsewhere_is_refused(tmp_path):
    rows = [{"file_name": f"old/{n}.png", "text": n} for n in "xyz"]
    folder = write_folder(tmp_path, {"metadata.jsonl": rows, "a.png": RED, "b.png": BLUE})
    for options in ({}, {"caption": "x"}):
        with pytest.raises(Refusal, match=r"3 captions without a picture .*'old/x"):
            read(folder, **options)


def test_a_folders_split_is_its_sub_folder_with_a_table(tmp_path):
    files = {f"{n}/{n}.png": RED for n in ("train", "test", "more")}
    rows = {n: [{"file_name": f"{n}.png", "text": n}] for n in ("train", "test")}
    tables = {f"{n}/metadata.jsonl": table for n, table in rows.items()}
    folder = write_folder(tmp_path, files | tables)
    for split in ("train", "test"):
        found = read(folder, dataset_split=split)
        assert [(p.name, p.captions[0]) for p in found] == [(f"{split}/{split}.png", split)]
        assert f"2 (the first: more/more.png) left out, since they lie outside {split}/" in str(
            found
        )
    for options in ({"dataset_split": "more"}, {"dataset_config": "x"}, {"dataset_split": "../x"}):
        with pytest.raises(Refusal, match="has no configs, and the splits test, train;"):
            read(folder, **options)


def test_two_captions_for_one_picture_are_never_reduced_to_one_in_silence(tmp_path):
    rows = [{"file_name": "a.png", "text": "first"}, {"file_name": "a.png", "text": "second"}]
    folder = write_folder(tmp_path, {"metadata.jsonl": rows, "a.png": RED})
    try:
        captions = sorted(p.captions[0] for p in read_dataset(str(folder)))
    except Refusal as refusal:
        assert "a.png" in str(refusal)
    else:
        assert captions == ["first", "second"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.png": RED, "a.txt": "a", "b.txt": "b"}, r"1 captions without a picture .*b\.txt"),
        (
            {"x/a.png": RED, "y/a.txt": "a"},
            r"1 captions without a picture .*'y/a\.txt'",
        ),
    ],
)
def test_a_caption_file_alone_is_refused(tmp_path, files, said):
    with pytest.raises(Refusal, match=said):
        read_dataset(str(write_folder(tmp_path, files)))


def test_two_pictures_share_a_caption_file_which_is_said(tmp_path):
    files = {"a.jpg": RED, "a.png": BLUE, "a.txt": "a square", "b.png": RED, "b.txt": "b"}
    pictures = read_dataset(str(write_folder(tmp_path, files)))
    assert [p.captions[0] for p in pictures] == ["a square", "a square", "b"]
    shared = "1 (the first: a.jpg) are called as another picture and share its caption's file"
    assert list(pictures.notes) == [shared]


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    bom = b"\xef\xbb\xbf"  # as Windows' editors write it
    files = {"a.png": RED, "a.txt": bom + b"a red square"}
    assert read_dataset(str(write_folder(tmp_path / "t", files)))[0].captions[0] == "a red square"
    files = {"a.png": RED, "metadata.jsonl": bom + json.dumps(GOOD).encode()}
    assert read_dataset(str(write_folder(tmp_path / "m", files)))[0].captions[0] == "a"


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("metadata.csv", 'file_name,text\r\na.png,"red, round"\r\nsub/b.png,blue\r\n'),
        ("train/metadata.csv", '\ufefffile_name,text\na.png,"red, round"\nsub/b.png,blue'),
        (
            "train/metadata.jsonl",
            [
                {"file_name": "a.png", "text": "red, round"},
                {"file_name": "sub/b.png", "text": "blue"},
            ],
        ),
    ],
)
def test_captions_of_a_table_and_of_train_are_read(tmp_path, table, text):
    top = "train/" if "/" in table else ""
    files = {table: text, f"{top}a.png": RED, f"{top}sub/b.png": BLUE}
    files |= {"test/c.png": BLUE} if top else {}
    read = read_dataset(str(write_folder(tmp_path, files)))
    captions = [(p.name, p.captions[0]) for p in read]
    assert captions == [(f"{top}a.png", "red, round"), (f"{top}sub/b.png", "blue")]
    assert ("1 (the first: test/c.png) left out, since they lie outside train/" in str(read)) == (
        top != ""
    )


@pytest.mark.parametrize("row", ["a.png,red, round", 'a.png,"red'])
def test_a_comma_without_quotes_never_cuts_a_caption(tmp_path, row):
    files = {"metadata.csv": f"file_name,text\n{row}", "a.png": RED}
    with pytest.raises(Refusal, match=r"metadata\.csv is no table .*quotes around a caption"):
        read_dataset(str(write_folder(tmp_path, files)))


def test_other_endings_of_caption_files_are_read(tmp_path):
    files = {"a.png": RED, "a.TXT": "red", "b.png": BLUE, "b.caption": "blue"}
    read = read_dataset(str(write_folder(tmp_path, files)))
    assert [p.captions[0] for p in read] == ["red", "blue"]


@pytest.mark.parametrize("kind", ["metadata", "txt"])
@pytest.mark.parametrize(("on_disk", "told"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_match_though_their_accents_are_written_in_two_ways(tmp_path, kind, on_disk, told):
    on_disk, told = (unicodedata.normalize(form, "caf\u00e9") for form in (on_disk, told))
    rows = [{"file_name": f"{told}.png", "text": "red"}]
    captions = {"metadata.jsonl": rows} if kind == "metadata" else {f"{told}.txt": "red"}
    files = {f"{on_disk}.png": RED} | captions
    assert read_dataset(str(write_folder(tmp_path, files)))[0].captions[0] == "red"
    both = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    twice = {f"{name}.png": RED for name in both} | {f"{name}.txt": name for name in both}
    with pytest.raises(Refusal, match="2 captions without a picture of their own"):
        read_dataset(str(write_folder(tmp_path / "twice", twice)))


@pytest.mark.parametrize(
    ("near", "content"),
    [
        *(("Meta_cap.json", "{}"), ("metadata.json1", "{}"), ("captions.csv", "")),
        *(("Metadata.JSONL", "{}"), ("train.csv", "x"), ("a.json", "{}"), ("a.tags", "x")),
        ("cats/metadata.jsonl", "{}"),
    ],
)
def test_what_is_nearly_captions_is_named(tmp_path, near, content):
    folder = write_folder(tmp_path, {"a.png": RED, near: content})
    with pytest.raises(Refusal, match=rf"1 \(the first: {near}\) left out, since they are not nam"):
        read_dataset(str(folder))
    (folder / "a.txt").write_text("own")
    assert f"1 (the first: {near}) left out" in str(read_dataset(str(folder)))


def test_a_caption_behind_the_whole_name_is_refused(tmp_path):
    folder = write_folder(tmp_path, {"a.png": RED, "a.png.txt": "red"})
    with pytest.raises(Refusal, match=r"'a\.png\.txt';.*\(not a\.jpg\.txt\)"):
        read_dataset(str(folder))


def test_pictures_whose_names_begin_as_a_tables_are_pictures(tmp_path):
    names = ("metal plate.png", "caption.png", "meta.jpg")
    files = dict.fromkeys(names, RED) | {"metal plate.txt": "grey", "captions.v1/b.png": BLUE}
    found = read_dataset(str(write_folder(tmp_path, files)))
    assert {p.name: p.captions[0] for p in found}["metal plate.png"] == "grey"
    assert len(found) == 4 and not found.notes


# ---- left out, and said --------------------------------------------------------------------------


def test_hidden_names_and_other_programs_copies_are_left_out_and_counted(tmp_path):
    ours = {"a.png": RED, "a.txt": "a"}
    names = ("._a", ".ipynb_checkpoints/a-checkpoint", ".Trash-0/b", ".thumbnails/c")
    names += ("__MACOSX/a", "x/@eaDir/a", "x/.hidden/d/e", "#recycle/f", "$RECYCLE.BIN/S-1-5/g")
    others = {f"{name}.{ending}": BLUE for name in names for ending in ("png", "txt")}
    folder = write_folder(tmp_path / ".inside", ours | others | {"Thumbs.db": b"", ".x": b""})
    (folder / ".linked").symlink_to(folder)
    read = read_dataset(str(folder))
    assert contents(read) == [("a.png", "a", digest(RED))]
    assert str(read) == (
        "1 pictures; 9 (the first: #recycle/f.png) left out, since they are hidden or another "
        "program's own"
    )
    rows = [{"file_name": name, "text": "a"} for name in ("a.png", "._a.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [p.captions[0] for p in read_dataset(str(folder))] == ["a"]


@pytest.mark.parametrize(
    "ending", ["jfif", "avif", "jpe", "jp2", "apng", "tga", "PPM", "qoi", "dib"]
)
def test_every_ending_that_pillow_opens_is_a_picture(tmp_path, ending):
    content = encoded(
        Image.new("RGB", (8, 8), "red"), Image.registered_extensions()[f".{ending.lower()}"]
    )
    (read,) = read_dataset(str(write_folder(tmp_path, {f"a.{ending}": content, "a.txt": "a"})))
    pixels = decoding.decode(read).getpixel((4, 4))
    assert all(abs(x - y) < 5 for x, y in zip(pixels, (255, 0, 0), strict=True))


def test_media_that_cannot_be_read_are_counted_with_what_to_do(tmp_path):
    ours = {"z.png": RED, "z.txt": "z"}
    names = ("a.heic", "b.JXL", "c.mp4", "d.mov", "e.svg", "f.pdf", "g.eps", "h.mpg")
    captions = {f"{name[0]}.txt": "x" for name in names}  # theirs, so not odd
    read = read_dataset(str(write_folder(tmp_path, ours | captions | dict.fromkeys(names, b"x"))))
    assert len(read) == 1 and "8 (the first: a.heic) left out" in str(read)
    assert "pip install pillow-heif" in str(read) and "pillow-jxl-plugin" in str(read)
    only = write_folder(tmp_path / "only", {"a.heic": b"x"})
    with pytest.raises(Refusal, match=r"holds no pictures; 1 \(the first: a.heic\) left out"):
        read_dataset(str(only))


def test_plug_ins_are_used_where_they_are_installed(tmp_path, monkeypatch):
    """A stand-in for pillow-heif: it registers its format when it is told to."""
    for name in ("OPEN", "EXTENSION"):
        monkeypatch.setattr(Image, name, dict(getattr(Image, name)))
    monkeypatch.setattr(Image, "ID", list(Image.ID))

    def register():
        Image.register_open("HEIF", PngImagePlugin.PngImageFile, lambda prefix: True)
        Image.register_extension("HEIF", ".heic")

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    sources.picture_formats.cache_clear()
    try:
        (read,) = read_dataset(str(write_folder(tmp_path, {"a.heic": RED, "a.txt": "a"})))
        assert decoding.decode(read).getpixel((4, 4)) == (255, 0, 0) and not read_notes(tmp_path)
    finally:
        sources.picture_formats.cache_clear()


def read_notes(folder: Path) -> list[str]:
    return list(read_dataset(str(folder)).notes)


# ---- text in another encoding, and control characters --------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "command"),
    [
        ("utf-16", "iconv -f UTF-16 -t UTF-8 FILE > FILE.new && mv FILE.new FILE"),
        ("cp1252", "iconv -f WINDOWS-1252 -t UTF-8 FILE > FILE.new && mv FILE.new FILE"),
    ],
)
def test_all_texts_in_another_encoding_are_named_with_the_command_that_mends(
    tmp_path, encoding, command
):
    files = {f"{name}.png": RED for name in "abc"} | {"c.txt": "good"}
    files |= {f"{name}.txt": "café".encode(encoding) for name in "ab"}
    folder = write_folder(tmp_path, files)
    with pytest.raises(Refusal, match=r"a\.txt .*b\.txt ") as refusal:
        read_dataset(str(folder))
    assert command in str(refusal.value) and "c.txt" not in str(refusal.value)
    assert f"What to do: in {folder}, for each file named" in str(refusal.value)
    for name in "ab":
        typed = command.replace("FILE", str(folder / f"{name}.txt"))
        subprocess.run(typed, shell=True, check=True)
    assert [p.captions[0] for p in read_dataset(str(folder))] == ["café", "café", "good"]


def test_of_many_unreadable_files_ten_are_named_and_the_rest_counted(tmp_path):
    names = [f"a-picture-of-a-house-{i:02}" for i in range(12)]
    files = {f"x/{n}.png": RED for n in names} | {f"x/{n}.txt": b"caf\xe9" for n in names}
    folder = write_folder(tmp_path / "texts", files)
    with pytest.raises(Refusal) as refusal:
        read_dataset(str(folder))
    told = str(refusal.value)
    assert all(
        f"x/{n}.txt (caption) cannot be read (no UTF-8 at byte 4, maybe WINDOWS-1252)" in told
        for n in names[:10]
    )
    assert "2 more; expected" in told and names[10] not in told
    folder = write_folder(tmp_path / "pictures", {f"x/{n}.png": b"junk" for n in names})
    with pytest.raises(Refusal) as refusal:
        decoding.check_pictures(decoding.decode, read(folder, caption="x"))
    told = str(refusal.value)
    assert all(f"x/{n}.png" in told for n in names[:10]) and "2 more" in told and "0x" not in told


def test_control_characters_are_refused_with_the_command_that_mends(tmp_path):
    files = {"a.png": RED, "a.txt": "a\x00 fox", "b.png": BLUE, "b.txt": "\x1b[31mred\x7f\tb"}
    folder = write_folder(tmp_path / "t", files)
    with pytest.raises(Refusal, match=r"a\.txt .*control.*'\\x00'.*b\.txt .*'\\x1b'") as refusal:
        read_dataset(str(folder))
    command = str(refusal.value).partition("FILE: ")[2]
    for name in "ab":
        typed = command.replace("FILE", str(folder / f"{name}.txt"))
        subprocess.run(typed, shell=True, check=True)
    assert [p.captions[0] for p in read_dataset(str(folder))] == ["a fox", "[31mred\tb"]
    rows = [{"file_name": "a.png", "text": "a\x07"}, {"file_name": "b.png", "text": "b\x08"}]
    folder = write_folder(tmp_path / "m", {"metadata.jsonl": rows, "a.png": RED, "b.png": BLUE})
    with pytest.raises(Refusal, match=r"line 1 has .* line 2 has .*without control characters"):
        read_dataset(str(folder))


# ---- a path that is no folder --------------------------------------------------------------------


@pytest.mark.parametrize("take", [read_dataset, lambda name: hub.fetch(name, "unet")])
def test_a_file_where_a_folder_is_meant_is_said_as_what_it_is(tmp_path, monkeypatch, take):
    monkeypatch.setattr(sources, "from_hub", None)
    monkeypatch.setattr(hub, "fetch_from_hub", None)
    monkeypatch.chdir(tmp_path)
    names = ("x.zip", "x.png", "sub/x.jsonl", "x.ckpt")
    write_folder(tmp_path, dict.fromkeys(names, b"x"))
    for name in names:
        with pytest.raises(Refusal, match=rf"{name} is a \.\w+ file, no folder") as refusal:
            take(name)
        remedy = {"x.zip": "unpack it", "x.ckpt": "take its .safetensors"}
        assert remedy.get(name, "name the folder that it lies in") in str(refusal.value)


@pytest.mark.parametrize("take", [read_dataset, lambda name: hub.fetch(name, "unet")])
@pytest.mark.parametrize("path", ["some/one", "datasets/some/one", "some/one/tree/main?x=1"])
def test_an_address_is_answered_with_the_name_in_it(take, path):
    with pytest.raises(Refusal, match=r"is an address; .*: --[a-z-]+ some/one$"):
        take(f"https://huggingface.co/{path}")


@pytest.mark.parametrize("take", [read_dataset, lambda name: hub.fetch(name, "unet")])
@pytest.mark.parametrize(
    "name", ["/no/where", "./nowhere", "~/no/where", "~nobody-here/x", "a/b/c"]
)
def test_a_path_that_leads_nowhere_is_not_asked_of_the_hub(monkeypatch, take, name):
    monkeypatch.setattr(sources, "from_hub", None)
    monkeypatch.setattr(hub, "fetch_from_hub", None)
    with pytest.raises(Refusal, match=f"there is no folder {name}"):
        take(name)


def test_the_repositorys_own_folders_are_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(read_dataset("pocket/ink")) == 160
    assert (hub.fetch("pocket/model", "unet") / "config.json").is_file()
    here = identity.of_base("pocket/model", False)
    assert identity.public_name("pocket/model") == "model"
    monkeypatch.chdir(ROOT)
    assert identity.of_base("pocket/model", False) == here
    write_folder(tmp_path / "pocket" / "ink", {"a.png": RED, "a.txt": "mine"})
    monkeypatch.chdir(tmp_path)  # what lies here comes first
    assert [p.captions[0] for p in read_dataset("pocket/ink")] == ["mine"]


@pytest.mark.parametrize("files", [{}, {"metadata.jsonl": ""}, {"notes.md": "nothing here"}])
def test_an_empty_data_set_is_refused(tmp_path, files):
    folder = write_folder(tmp_path, files)
    with pytest.raises(Refusal, match="holds no pictures") as refusal:
        read_dataset(str(folder))
    assert str(folder) in str(refusal.value) and "--dataset-name" in str(refusal.value)


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Writes a folder of one parquet file; `datasets` caches inside tmp_path."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")

    def write(
        folder: Path = tmp_path / "set", file: str = "data/train-00000-of-00001.parquet", **columns
    ) -> str:
        kinds = {
            name: datasets.Image() if cells[0] and isinstance(cells[0], dict) else None
            for name, cells in columns.items()
        }
        table = datasets.Dataset.from_dict(columns)
        for name, kind in kinds.items():
            table = table.cast_column(name, kind) if kind else table
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / file)
        return str(folder)

    return write


def test_a_parquet_folder_is_read_with_its_columns_found(parquet):
    name = parquet(image=[cell(RED), cell(BLUE)], text=["red", None])
    pictures = read_dataset(name)
    assert [(p.captions[0], p.digest) for p in pictures] == [
        ("red", digest(RED)),
        ("", digest(BLUE)),
    ]
    assert [p.read() for p in pictures] == [RED, BLUE]
    assert len({p.name for p in pictures}) == 2 and all("row" in p.name for p in pictures)


def test_a_parquet_folders_columns_can_be_named(parquet):
    name = parquet(
        first=[cell(BLUE), cell(BLUE)],
        second=[cell(RED), cell(RED)],
        text=["no", "no"],
        title=["yes", "yes"],
    )
    pictures = read(name, image_column="second", caption_column="title")
    assert [p.read() for p in pictures] == [RED, RED]
    assert [p.captions[0] for p in pictures] == ["yes", "yes"]
    assert [p.read() for p in read(name, caption_column="title")] == [BLUE, BLUE]


@pytest.mark.parametrize(
    ("image", "caption", "said"),
    [
        ("", "label", r"image, title.*expected label.*--caption-column"),
        ("", "", r"image, title.*expected text or caption or prompt.*--caption-column"),
        ("photo", "title", r"expected photo.*--image-column"),
        ("title", "title", r"expected title.*--image-column"),
    ],
)
def test_a_wrong_column_of_a_parquet_folder_is_refused(parquet, image, caption, said):
    name = parquet(image=[cell(RED)], title=["red"])
    with pytest.raises(Refusal, match=said):
        read(name, image_column=image, caption_column=caption)


def test_a_parquet_folder_without_a_picture_column_is_refused(parquet):
    name = parquet(text=["red"], number=[1])
    with pytest.raises(Refusal, match=r"expected a column of pictures.*--image-column"):
        read_dataset(name)


def test_splits_are_read_and_a_wrong_one_lists_what_there_is(parquet):
    for split, content in (("train", RED), ("test", BLUE)):
        name = parquet(file=f"data/{split}-0.parquet", image=[cell(content)], text=[split])
    for split, captions in (("train", ["train"]), ("test", ["test"]), ("train+test", None)):
        found = read(name, dataset_split=split)
        assert [p.captions[0] for p in found] == (captions or ["train", "test"])
    with pytest.raises(Refusal, match=r"\['train', 'test'\].*--dataset-split NAME"):
        read(name, dataset_split="validation")


def test_configs_are_read_and_a_wrong_or_missing_one_lists_what_there_is(parquet, tmp_path):
    entries = ""
    for config, content in (("red", RED), ("blue", BLUE)):
        name = parquet(file=f"{config}/train.parquet", image=[cell(content)], text=[config])
        entries += f"- config_name: {config}\n  data_files: {config}/*.parquet\n"
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    for config, content in (("red", RED), ("blue", BLUE)):
        (found,) = read(name, dataset_config=config)
        assert (found.captions[0], found.read()) == (config, content)
    for config in ("", "green"):
        with pytest.raises(Refusal, match=r"\['red', 'blue'\].*--dataset-config NAME"):
            read(name, dataset_config=config)


def test_the_reason_of_a_datasets_error_is_told(parquet):
    for i, images in enumerate(([RED], [[1]])):
        name = parquet(file=f"train-{i}.parquet", image=images, text=["a"])
    with pytest.raises(Refusal, match="Couldn't cast array of type"):
        read(name)


def test_columns_of_bytes_and_of_bytes_with_a_path_are_read(parquet, tmp_path):
    def plain(folder: Path, images: list) -> str:
        folder.mkdir()
        table = datasets.Dataset.from_dict({"image": images, "text": ["a", "b"]})
        table.to_parquet(folder / "train.parquet")
        return str(folder)

    kinds = {
        "bytes": [RED, BLUE],
        "struct": [cell(RED), {"bytes": BLUE, "path": "b.png"}],
        "wider": [cell(RED) | {"width": 8}, cell(BLUE) | {"width": 8}],
    }
    for kind, images in kinds.items():
        name = plain(tmp_path / kind, images)
        found = read(name)
        assert [(p.captions[0], p.read()) for p in found] == [("a", RED), ("b", BLUE)], kind
        assert [p.digest for p in found] == [digest(RED), digest(BLUE)]
    for kind, path in (("url", "https://example.com/a.png"), ("outside", "../a.png")):
        name = plain(tmp_path / kind, [cell(RED), {"bytes": None, "path": path}])
        with pytest.raises(Refusal, match=rf"picture '{path}', which is outside the data set"):
            read(name)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (
            ["https://example.com/a.png"],
            r"image \(string such as \['https://example.com/a.png'\]\)",
        ),
        (["a/b.png"], r"image \(string such as \['a/b.png'\]\)"),
        ([[RED, BLUE]], r"image \(List\)"),
        ([7], r"image \(int64\)"),
    ],
)
def test_columns_that_hold_no_pictures_are_said_as_what_they_are(parquet, images, said):
    name = parquet(image=images, text=["a"])
    for column in ("", "image"):
        with pytest.raises(
            Refusal, match=rf"{said}.*one picture a row.*none is fetched"
        ) as refusal:
            read(name, image_column=column)
        assert "text (string such as ['a'])" in str(refusal.value)


def test_the_column_called_image_is_taken_and_any_other_is_said(parquet, tmp_path):
    name = parquet(first=[cell(BLUE)], image=[cell(RED)], text=["a"])
    (found,) = read(name)
    assert found.read() == RED and not read(name).notes
    urls = ["https://example.com/a.png"]
    columns = {"blob": [b"sound"], "image": urls, "photo": [cell(BLUE)], "text": ["a"]}
    name = parquet(tmp_path / "other", **columns)
    found = read(name)
    assert found[0].read() == BLUE and found.notes == ["pictures taken from the column photo"]
    assert not read(name, image_column="photo").notes


def test_rows_without_a_caption_take_the_options(parquet):
    name = parquet(image=[cell(RED), cell(BLUE)], text=["own", None])
    assert [p.captions[0] for p in read(name, caption="sks")] == ["own", "sks"]
    with pytest.raises(Refusal, match="whose pictures are rows of a table"):
        read(name, caption_from_name=True)


def test_a_table_without_captions_takes_the_options(parquet):
    name = parquet(image=[cell(RED)], label=["x"])
    assert [p.captions[0] for p in read(name, caption="sks")] == ["sks"]
    with pytest.raises(Refusal, match=r"columns image, label.*--caption \"a photo of sks dog\""):
        read(name)


def test_a_parquet_caption_that_is_no_text_is_refused(parquet, tmp_path):
    for i, captions in enumerate([[1, 2], [[["a"]], [["b", "c"]]]]):
        name = parquet(tmp_path / f"set{i}", image=[cell(RED), cell(BLUE)], text=captions)
        with pytest.raises(Refusal, match="text"):
            read_dataset(name)


@pytest.mark.parametrize("bad", [None, cell(None), cell(b"")], ids=["none", "nothing", "empty"])
def test_a_parquet_row_without_a_picture_is_refused_by_its_number(parquet, bad):
    name = parquet(image=[cell(RED), bad, cell(BLUE)], text=["a", "b", "c"])
    with pytest.raises(Refusal, match="row 1"):
        decoding.check_pictures(decoding.decode, read_dataset(name))


def test_a_parquet_folder_below_the_home_folder_may_be_written_with_a_tilde(
    parquet, monkeypatch, tmp_path
):
    monkeypatch.setenv("HOME", str(tmp_path))
    parquet(image=[cell(RED)], text=["red"])
    assert read_dataset("~/set")[0].read() == RED


@pytest.mark.parametrize("name", ["nowhere", "./no/such/folder", "someone/pictures"])
def test_a_data_set_that_is_neither_folder_nor_reachable_is_one_refusal(
    monkeypatch, tmp_path, name
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    with pytest.raises(Refusal, match=name) as refusal:
        read_dataset(name)
    assert "--dataset-name FOLDER" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_large_folder_is_read_in_time_that_grows_as_it_does(tmp_path, monkeypatch):
    count, names = 60, []
    for i in range(count):
        (tmp_path / f"{i}.png").write_bytes(PNG)
        (tmp_path / f"{i}.txt").write_text(f"caption {i}")
    monkeypatch.setattr(sources, "normal", lambda name: names.append(name) or name)
    assert len(read_dataset(str(tmp_path))) == count
    assert len(names) <= 6 * count  # once for each pair of picture and caption would be 3,600


def test_what_is_no_file_or_may_not_be_looked_into_is_said(tmp_path, monkeypatch):
    """As root every folder may be read, so that one is refused by hand."""
    folder = write_folder(tmp_path / "d", {"a.png": RED, "a.txt": "a", "shut/b.png": BLUE})
    for name in ("b.png", "metadata.jsonl"):
        os.mkfifo(folder / name)
        with pytest.raises(Refusal, match=rf"{name} \(\w+\) cannot be read \(no file\)"):
            read_dataset(str(folder))
        (folder / name).unlink()
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    said = str(read_dataset(str(folder)))
    assert said.startswith("1 pictures; ")
    assert "1 (the first: shut) left out, since they are folders that this user may not" in said
