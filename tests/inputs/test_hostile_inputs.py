"""Pictures, data folders and cache files from strangers: each is what a fuzzer (tests/stress/) or a
reader found.
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import INK
from inputs import blocks, pictures, sources
from made import encoded, picture
from sentences import refused
from stress import bad_pictures

# ---- pictures ------------------------------------------------------------------------------------


def test_postscript_is_not_given_to_ghostscript(monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: started.append(a))
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: started.append(a))
    postscript = bad_pictures.no_pictures()["PostScript that writes a file"]
    refused(lambda: pictures.decode(picture(postscript)))
    refused(lambda: pictures.decode(picture(encoded(Image.new("RGB", (16, 16)), "EPS"))), "a.png")
    assert not started


def test_floats_are_refused_and_whole_numbers_beyond_16_bits_too():
    floats = encoded(Image.new("F", (16, 16), 0.5), "TIFF")
    refused(lambda: pictures.decode(picture(floats)), "white")
    wide = Image.fromarray(np.full((16, 16), 70000, np.int32))
    refused(lambda: pictures.decode(picture(encoded(wide, "TIFF"))), "beyond 16 bits")
    grey = Image.fromarray(np.full((16, 16), 300 * 100, np.uint16))
    got = np.asarray(pictures.decode(picture(encoded(grey, "TIFF"))))
    assert (got == 30000 // 257).all()


# ---- data folders --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """a.png and a.txt in tmp_path/data, a picture outside in tmp_path/outside."""
    made = tmp_path / "data"
    for each in (made, tmp_path / "outside"):
        each.mkdir()
    first, second = sorted(INK.glob("*.png"))[:2]
    shutil.copy(first, made / "a.png")
    (made / "a.txt").write_text("a fox")
    shutil.copy(second, tmp_path / "outside" / "b.png")
    return made


def read(folder) -> list[sources.Picture]:
    return sources.read_dataset(str(folder))


def test_a_name_in_metadata_cannot_lead_outside_and_a_linked_file_may(folder, tmp_path):
    outside = tmp_path / "outside" / "b.png"
    lines = folder / "metadata.jsonl"
    names = ("../outside/b.png", str(outside), "x/../../outside/b.png", "..\\outside\\b.png")
    for name in (*names, "a.png/../../outside/b.png", "b\0.png", "\ud800", "x" * 5000, ""):
        rows = [{"file_name": "a.png", "text": "a fox"}, {"file_name": name, "text": "y"}]
        lines.write_text("\n".join(map(json.dumps, rows)))
        refused(lambda: read(folder), "1 captions without a picture")
    (folder / "b.png").symlink_to(outside)  # the user's own act
    lines.write_text(
        "\n".join(json.dumps({"file_name": n, "text": "a fox"}) for n in ("a.png", "b.png"))
    )
    assert [p.read() for p in read(folder)][1] == outside.read_bytes()


def test_a_linked_folder_is_not_followed_and_said(folder, tmp_path):
    """Through one, the name d/../b.png is inside by its letters and outside on the disk."""
    (folder / "d").symlink_to(tmp_path / "outside" / "deeper", target_is_directory=True)
    (tmp_path / "outside" / "deeper").mkdir()
    shutil.copy(folder / "a.png", tmp_path / "outside" / "deeper")
    found = read(folder)
    assert [p.name for p in found] == ["a.png"]
    assert found.notes == ["1 (the first: d) left out, since they are links to folders"]
    rows = [{"file_name": n, "text": "a fox"} for n in ("a.png", "d/../b.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused(lambda: read(folder), "1 captions without a picture")


def test_a_table_cannot_name_a_file_outside_the_data_set(tmp_path):
    for path in ("/etc/passwd", "../b.png", "https://x.org/a.png", str(tmp_path / "b.png")):
        refused(lambda path=path: sources.own_file("someone/set", path), "outside the data set")


@pytest.mark.parametrize("text", [0, False, [], {}, "\ud800", float("nan")])
def test_a_caption_that_is_no_text_is_refused_also_where_it_is_falsy(folder, text):
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": text}))
    refused(lambda: read(folder), "line 1 has the caption")


def test_endless_nesting_is_refused(folder):
    (folder / "metadata.jsonl").write_text("[" * 100_000)
    refused(lambda: read(folder), "line 1 is not a row")


def test_pipes_folders_links_to_nothing_and_terabytes_are_refused_by_name(folder):
    os.mkfifo(folder / "b.txt")
    shutil.copy(folder / "a.png", folder / "b.png")
    refused(lambda: read(folder), "b.txt (caption) cannot be read (no file)")
    (folder / "b.txt").unlink()
    (folder / "b.txt").write_text("b")
    with open(folder / "b.png", "wb") as file:
        file.truncate(2**40)
    refused(lambda: read(folder), "b.png (picture) cannot be read (1099511.6 MB)")
    (folder / "b.png").unlink()
    (folder / "b.png").symlink_to(folder / "gone.png")
    refused(lambda: read(folder), "b.png (picture) cannot be read", "No such file")


# ---- the cache -----------------------------------------------------------------------------------


def test_a_cache_file_that_is_cut_short_is_made_anew(tmp_path, capsys):
    def encode(blocks):
        for block in blocks:
            for i in block:
                yield {"mean": torch.full((3,), float(i))}

    keys = [str(i) for i in range(40)]
    places = blocks.fill(tmp_path, "latent", keys, encode)
    files = list(dict.fromkeys(file for file, _ in places))
    good = [file.read_bytes() for file in files]
    for bad in (good[0][:-1], good[0][:20], b"", b"\xff" * 99, good[0] + b"x"):
        files[0].write_bytes(bad)
        assert blocks.fill(tmp_path, "latent", keys, encode) == places
        assert [file.read_bytes() for file in files] == good
        assert capsys.readouterr().out == f"{files[0]} is damaged and is made anew\n"
    blocks.fill(tmp_path, "latent", keys, None)  # nothing is left to be encoded
    assert capsys.readouterr().out == ""
