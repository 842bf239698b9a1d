"""A data set is read whole, in an order of its own, or refused by the name of what does not fit."""

import json
import random
from pathlib import Path

import datasets
import pytest

from conftest import INK
from inputs import pictures as decoding
from inputs.files import Refusal, digest
from inputs.sources import Picture, read_dataset
from made import BLUE, RED, encoded, noisy, write_folder


def contents(pictures: list[Picture]) -> list[tuple]:
    return [(p.name, p.caption, p.digest) for p in pictures]


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
    assert all(p.caption.strip() for p in pictures)
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
    rows = [{"file_name": "a.png", "text": None}, {"file_name": "b.png", "text": ""}]
    files = {"metadata.jsonl": rows, "a.png": RED, "b.png": BLUE}
    assert [p.caption for p in read_dataset(str(write_folder(tmp_path / "m", files)))] == ["", ""]
    files = {"a.png": RED, "a.txt": "", "b.png": BLUE, "b.txt": "\n"}
    assert [p.caption for p in read_dataset(str(write_folder(tmp_path / "t", files)))] == ["", ""]


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_the_usual_caption_columns_are_found(tmp_path, column):
    rows = [{"other": "no", "file_name": "a.png", column: "yes"}]
    folder = write_folder(tmp_path, {"metadata.jsonl": rows, "a.png": RED})
    assert read_dataset(str(folder))[0].caption == "yes"


def test_a_named_caption_column_is_taken(tmp_path):
    rows = [{"file_name": "a.png", "text": "no", "title": "yes"}]
    folder = write_folder(tmp_path, {"metadata.jsonl": rows, "a.png": RED})
    assert read_dataset(str(folder), caption_column="title")[0].caption == "yes"


def test_a_wrong_caption_column_is_refused_with_those_that_are_there(tmp_path):
    rows = [{"file_name": "a.png", "title": "t"}]
    folder = write_folder(tmp_path, {"metadata.jsonl": rows, "a.png": RED})
    for wanted, expected in (("", "text or caption or prompt"), ("label", "label")):
        with pytest.raises(Refusal) as refusal:
            read_dataset(str(folder), caption_column=wanted)
        said = str(refusal.value)
        assert "title" in said and expected in said and "--caption-column" in said


GOOD = {"file_name": "a.png", "text": "a"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not a row"),
        ('{"file_name": "a.png", "text": "a"', "line 2 is not a row"),
        ("a.png a red square", "line 2 is not a row"),
        ("[]", "line 2 is not a row"),
        ("7", "line 2 is not a row"),
        ('{"text": "a"}', "line 2 is not a row.*file_name"),
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
        ('{"file_name": "a.png", "text": ["a"]}', "line 2 has the caption"),
        ('{"file_name": "a.png"}', "line 2 has the columns file_name"),
    ],
)
def test_a_bad_metadata_line_is_refused_by_number(tmp_path, line, said):
    write_folder(tmp_path, {"x.png": RED})  # what ../x.png would reach
    files = {"metadata.jsonl": json.dumps(GOOD) + "\n" + line, "a.png": RED}
    folder = write_folder(tmp_path / "set", files)
    with pytest.raises(Refusal, match=said) as refusal:
        read_dataset(str(folder))
    assert str(folder) in str(refusal.value)


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


def test_a_picture_without_a_metadata_line_is_refused(tmp_path):
    files = {"metadata.jsonl": [GOOD], "a.png": RED, "sub/b.png": BLUE}
    with pytest.raises(Refusal, match=r"1 pictures without a caption .*such as 'b\.png'"):
        read_dataset(str(write_folder(tmp_path, files)))


def test_two_captions_for_one_picture_are_never_reduced_to_one_in_silence(tmp_path):
    rows = [{"file_name": "a.png", "text": "first"}, {"file_name": "a.png", "text": "second"}]
    folder = write_folder(tmp_path, {"metadata.jsonl": rows, "a.png": RED})
    try:
        captions = sorted(p.caption for p in read_dataset(str(folder)))
    except Refusal as refusal:
        assert "a.png" in str(refusal)
    else:
        assert captions == ["first", "second"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.png": RED, "a.txt": "a", "b.png": BLUE}, r"1 pictures without a caption .*b\.png"),
        ({"a.png": RED, "a.txt": "a", "b.txt": "b"}, r"1 captions without a picture .*b\.txt"),
        (
            {"x/a.png": RED, "y/a.txt": "a"},
            r"1 pictures without .*a\.png.* and 1 captions without .*a\.txt",
        ),
    ],
)
def test_a_picture_or_a_caption_file_alone_is_refused(tmp_path, files, said):
    with pytest.raises(Refusal, match=said):
        read_dataset(str(write_folder(tmp_path, files)))


def test_two_pictures_that_share_a_caption_file_are_never_reduced_to_one_in_silence(tmp_path):
    folder = write_folder(tmp_path, {"a.png": RED, "a.jpg": BLUE, "a.txt": "a"})
    try:
        names = {p.name for p in read_dataset(str(folder))}
    except Refusal as refusal:
        assert "a.png" in str(refusal) or "a.jpg" in str(refusal)
    else:
        assert names == {"a.png", "a.jpg"}


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    bom = b"\xef\xbb\xbf"  # as Windows' editors write it
    files = {"a.png": RED, "a.txt": bom + b"a red square"}
    assert read_dataset(str(write_folder(tmp_path / "t", files)))[0].caption == "a red square"
    files = {"a.png": RED, "metadata.jsonl": bom + json.dumps(GOOD).encode()}
    assert read_dataset(str(write_folder(tmp_path / "m", files)))[0].caption == "a"


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

    def write(folder: Path = tmp_path / "set", **columns) -> str:
        kinds = {
            name: datasets.Image() if isinstance(cells[0], dict) else None
            for name, cells in columns.items()
        }
        table = datasets.Dataset.from_dict(columns)
        for name, kind in kinds.items():
            table = table.cast_column(name, kind) if kind else table
        (folder / "data").mkdir(parents=True)
        table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
        return str(folder)

    return write


def cell(content: bytes | None) -> dict:
    return {"bytes": content, "path": None}


def test_a_parquet_folder_is_read_with_its_columns_found(parquet):
    name = parquet(image=[cell(RED), cell(BLUE)], text=["red", None])
    pictures = read_dataset(name)
    assert [(p.caption, p.digest) for p in pictures] == [("red", digest(RED)), ("", digest(BLUE))]
    assert [p.read() for p in pictures] == [RED, BLUE]
    assert len({p.name for p in pictures}) == 2 and all("row" in p.name for p in pictures)


def test_a_parquet_folders_columns_can_be_named(parquet):
    name = parquet(
        first=[cell(BLUE), cell(BLUE)],
        second=[cell(RED), cell(RED)],
        text=["no", "no"],
        title=["yes", "yes"],
    )
    pictures = read_dataset(name, "second", "title")
    assert [p.read() for p in pictures] == [RED, RED]
    assert [p.caption for p in pictures] == ["yes", "yes"]
    assert [p.read() for p in read_dataset(name, caption_column="title")] == [BLUE, BLUE]


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
        read_dataset(name, image, caption)


def test_a_parquet_folder_without_a_picture_column_is_refused(parquet):
    name = parquet(text=["red"], number=[1])
    with pytest.raises(Refusal, match=r"expected a column of pictures.*--image-column"):
        read_dataset(name)


def test_a_parquet_caption_that_is_no_text_is_refused(parquet, tmp_path):
    for i, captions in enumerate([[1, 2], [["a"], ["b", "c"]]]):
        name = parquet(tmp_path / f"set{i}", image=[cell(RED), cell(BLUE)], text=captions)
        with pytest.raises(Refusal, match="text"):
            read_dataset(name)


@pytest.mark.parametrize("bad", [None, cell(None), cell(b"")], ids=["none", "nothing", "empty"])
def test_a_parquet_row_without_a_picture_is_refused_by_its_number(parquet, bad):
    name = parquet(image=[cell(RED), bad, cell(BLUE)], text=["a", "b", "c"])
    with pytest.raises(Refusal, match="row 1"):
        decoding.check_pictures(read_dataset(name))


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
