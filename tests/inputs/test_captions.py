"""Several captions a picture, where they are read from, and what is made of their tags."""

import itertools
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest

from inputs.captions import variants
from inputs.files import Refusal
from inputs.options import Config, check, parse
from inputs.sources import read_dataset
from made import BLUE, RED, cell, write_folder

TWO = {"a.png": RED, "b.png": BLUE}
TAGS = "one, two,three , four"


def read(folder: Path | str, **options) -> dict[str, tuple[str, ...]]:
    return {p.name: p.captions for p in read_dataset(str(folder), Config(**options))}


def made(*captions: str, **options) -> tuple[str, ...]:
    return variants(captions, Config(**options))


# ---- where they are read from --------------------------------------------------------------------


def test_a_list_in_a_table_is_several_captions(tmp_path):
    told = {"a.png": ["red", "a red square"], "b.png": "blue"}
    rows = [{"file_name": name, "text": text} for name, text in told.items()]
    want = {"a.png": ("red", "a red square"), "b.png": ("blue",)}
    assert read(write_folder(tmp_path, TWO | {"metadata.jsonl": rows})) == want
    rows[0]["text"] = [None, ""]
    folder = write_folder(tmp_path, TWO | {"metadata.jsonl": rows})
    assert read(folder) == {"a.png": ("",), "b.png": ("blue",)}
    assert read(folder, caption="own")["a.png"] == ("own",)


def test_a_parquet_columns_lists_are_several_captions(tmp_path):
    columns = {"image": [cell(RED), cell(BLUE)], "text": [["red", "a red square"], ["blue"]]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "train.parquet")
    assert read(tmp_path) == {"row 0": ("red", "a red square"), "row 1": ("blue",)}


def test_each_line_of_a_captions_own_file_is_a_caption_if_asked(tmp_path):
    folder = write_folder(tmp_path, TWO | {"a.txt": "red\n\n  a red square \n", "b.txt": "\n"})
    assert read(folder) == {"a.png": ("red\n\n  a red square",), "b.png": ("",)}
    want = {"a.png": ("red", "a red square"), "b.png": ("",)}
    assert read(folder, caption_lines=True) == want


def test_metadata_parquet_beside_pictures_is_read_like_metadata_jsonl(tmp_path):
    rows = {"file_name": ["b.png", "a.png"], "text": [["blue"], ["red", "a red square"]]}
    write_folder(tmp_path, TWO)
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "metadata.parquet")
    assert read(tmp_path) == {"a.png": ("red", "a red square"), "b.png": ("blue",)}
    assert read(tmp_path, caption_column="file_name")["a.png"] == ("a.png",)
    (tmp_path / "a.png").unlink()
    with pytest.raises(Refusal, match=r"captions without a picture .*'a\.png'"):
        read(tmp_path)
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(Refusal, match=r"metadata\.parquet is no table"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["meta_cap.json", "meta_lat.json", "meta_cap_dd.json"])
def test_kohyas_tables_are_read(tmp_path, name):
    """Keyed by the name with or without ending, or by a path of another machine; the caption is
    caption and tags.
    """
    told = {
        "a": {"caption": "a red square", "tags": "red, 1square", "train_resolution": [8, 8]},
        "b.c": {"tags": "blue"},
        "/home/someone/set/d.png": {"caption": "dot"},
        "C:\\sets\\x\\e.png": {},
    }
    files = dict.fromkeys(("a.png", "x/b.c.png", "x/d.png", "x/e.png"), RED)
    folder = write_folder(tmp_path, files | {name: json.dumps(told)})
    want = {"a.png": ("a red square, red, 1square",), "x/b.c.png": ("blue",)}
    assert read(folder) == want | {"x/d.png": ("dot",), "x/e.png": ("",)}
    for row in told.values():
        row.setdefault("tags", "none")
    write_folder(folder, {name: json.dumps(told)})
    assert read(folder, caption_column="tags")["a.png"] == ("red, 1square",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "meta_cap.json is no table"),
        ('{"a": 7}', "meta_cap.json is no table"),
        ('{"a": {"tags": ["x"]}}', "meta_cap.json is no table"),
        ('{"a": {"tags": "x"}, "gone": {"tags": "x"}}', "captions without a picture .*'gone'"),
        ('{"a": {"tags": "x"}, "a.png": {"tags": "y"}}', "captions without a picture .*'a"),
    ],
)
def test_a_bad_table_of_kohyas_is_refused(tmp_path, content, said):
    with pytest.raises(Refusal, match=said):
        read(write_folder(tmp_path, TWO | {"meta_cap.json": content}))


def test_a_key_that_may_be_either_of_two_pictures_is_neither(tmp_path):
    files = {"x/a.png": RED, "y/a.png": BLUE, "meta_cap.json": '{"a": {"tags": "x"}}'}
    with pytest.raises(Refusal, match=r"1 captions without a picture of their own .*'a'"):
        read(write_folder(tmp_path, files))


ROWS = [{"file_name": "a.png", "text": "red"}, {"file_name": "b.png", "text": "blue"}]
KOHYA = json.dumps({"a": {"caption": "red"}, "b": {"caption": "blue"}})


def test_caption_files_that_agree_are_read(tmp_path):
    files = {"metadata.jsonl": ROWS, "meta_cap.json": KOHYA, "a.txt": "red\n", "b.txt": ""}
    files["metadata.csv"] = "file_name,text\na.png,red\n"
    assert read(write_folder(tmp_path, TWO | files)) == {"a.png": ("red",), "b.png": ("blue",)}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"meta_cap.json": KOHYA.replace("red", "rot")},
            r"captions of a\.png disagree: 'rot' in meta_cap\.json and "
            r"'red' in metadata\.jsonl; exp.* mv FILE FILE\.unused",
        ),
        (
            {"metadata.csv": "file_name,text\nb.png,b\n"},
            r"of b\.png disagree: 'b' in .*\.csv and 'blue' in",
        ),
        (
            {"a.txt": "rot", "b.txt": "b"},
            r"a\.png disagree: 'red' in .*\.jsonl and 'rot' in \*\.txt and captions of b\.png",
        ),
        (
            {"a.txt": "a" * 999, "metadata.jsonl": "", "a.caption": "b"},
            r"a\.png disagree: 'b' in \*\.caption and 'a+ \.\.\. a+' in \*\.txt",
        ),
    ],
)
def test_caption_files_that_disagree_are_refused_by_name(tmp_path, other, said):
    folder = write_folder(tmp_path, TWO | {"metadata.jsonl": ROWS} | other)
    with pytest.raises(Refusal, match=said) as refusal:
        read(folder)
    assert str(refusal.value).count("What to do") == 1


def test_caption_files_that_complete_each_other_are_taken_together(tmp_path):
    files = {"a.txt": "red", "a.caption": "red", "b.txt": "", "b.caption": "blue", "c.png": RED}
    files["meta_lat.json"] = '{"a": {"train_resolution": [8, 8]}, "b": {}, "c": {}}'
    folder = write_folder(tmp_path / "beside", TWO | files)
    found = read_dataset(str(folder))
    assert [p.captions for p in found] == [("red",), ("blue",), ("",)]
    files = {"metadata.jsonl": ROWS[:1], "b.txt": "blue", "b.caption": "blue"}
    found = read_dataset(str(write_folder(tmp_path / "table", TWO | files)))
    assert [p.captions for p in found] == [("red",), ("blue",)]


def test_kohyas_json_may_hold_lists_of_captions(tmp_path):
    table = {"a": {"caption": ["one", "two"], "tags": "t"}, "b": {"caption": []}}
    found = read(write_folder(tmp_path, TWO | {"meta_cap.json": json.dumps(table)}))
    assert found == {"a.png": ("one, t", "two, t"), "b.png": ("",)}


def test_pictures_beside_parquet_files_of_another_name_are_refused(tmp_path):
    folder = write_folder(tmp_path, TWO | {"a.txt": "red"})
    columns = {"file_name": ["a.png", "b.png"], "text": [["red", "rouge"], ["blue"]]}
    datasets.Dataset.from_dict(columns).to_parquet(folder / "captions.parquet")
    with pytest.raises(Refusal, match=r"a\.png and captions\.parquet;.*metadata\.parquet"):
        read(folder)


# ---- what is made of them ------------------------------------------------------------------------


def test_where_nothing_varies_the_captions_are_as_they_are():
    assert made(" red,  square , ") == (" red,  square , ",)
    assert made("red, square", caption_variants=5) == ("red, square",)
    assert made("one", "two") == ("one", "two")
    assert made("one word", shuffle_tags=True, tag_dropout=0.5) == ("one word",)
    assert made("", shuffle_tags=True) == ("",)


def test_tags_are_shuffled_behind_those_that_are_kept():
    texts = made(TAGS, shuffle_tags=True, keep_tags=1, caption_variants=200)
    counts = Counter(texts)
    assert len(texts) == 200 and len(counts) == 6  # all orders of three
    assert all(text.startswith("one, ") for text in texts)
    assert all(sorted(text.split(", ")) == ["four", "one", "three", "two"] for text in texts)
    assert min(counts.values()) >= 15


def test_tags_are_left_out_by_their_chance_but_never_all():
    texts = made(TAGS, tag_dropout=0.4, keep_tags=1, caption_variants=1000)
    for tag, chance in (("one", 0), ("two", 0.4), ("three", 0.4), ("four", 0.4)):
        missing = sum(tag not in text.split(", ") for text in texts) / 1000
        assert abs(missing - chance) < 0.07 and (chance or not missing)
    whole = "one, two, three, four"
    order = [whole.index(tag) for text in texts for tag in text.split(", ")]
    assert all(a < b or b == 0 for a, b in itertools.pairwise(order))
    assert made(TAGS, tag_dropout=1.0) == ("one",)


def test_a_variant_follows_from_seed_caption_and_number_alone():
    texts = made(TAGS, shuffle_tags=True, caption_variants=8)
    assert made(TAGS, shuffle_tags=True, caption_variants=20)[:8] == texts
    assert made("other, tags", TAGS, shuffle_tags=True, caption_variants=8)[8:] == texts
    assert made(TAGS, shuffle_tags=True, seed=7) != texts
    left_out, both = made(TAGS, tag_dropout=0.4), made(TAGS, tag_dropout=0.4, shuffle_tags=True)
    assert [set(text.split(", ")) for text in left_out] == [set(t.split(", ")) for t in both]


@pytest.mark.parametrize(
    ("caption", "want"),
    [
        ("a fox", "sks, a fox"),
        ("a photo of SKS, red", "a photo of SKS, red"),
        ("asksa", "sks, asksa"),
        ("", "sks"),
        ("(sks)", "(sks)"),
    ],
)
def test_the_trigger_is_put_in_front_where_it_is_missing(caption, want):
    assert made(caption, trigger="sks") == (want,)
    assert all("sks" in t.lower() for t in made("sks, b, c", trigger="sks", tag_dropout=0.9))


def test_a_picture_whose_caption_is_the_trigger_alone_is_said(tmp_path):
    folder = write_folder(tmp_path, TWO | {"a.txt": "red"})
    found = read_dataset(str(folder), Config(trigger="sks"))
    assert [p.captions for p in found] == [("sks, red",), ("sks",)]
    assert found.notes == ["1 (the first: b.png) without a caption of their own, called 'sks'"]
    (folder / "a.txt").unlink()
    with pytest.raises(Refusal, match="none of the 2 pictures"):
        read(folder, trigger="sks")


# ---- options -------------------------------------------------------------------------------------


def test_what_has_nothing_to_act_on_or_cannot_be_is_refused():
    with pytest.raises(Refusal, match=r"tag_dropout is 2\.0"):
        parse(["pocket", "--tag-dropout", "2"])
    with pytest.raises(Refusal, match="invalid choice '77' for argument '--max-tokens'"):
        parse(["pocket", "--max-tokens", "77"])
    assert check(parse(["pocket", "--max-tokens", "150"])).max_tokens == 150
