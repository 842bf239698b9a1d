"""The ground: a sentence that a terminal can show, and a folder that one run holds at a time."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from inputs import files
from inputs.files import Refusal, sayable


def test_a_sentence_shows_no_escape_sequence_and_no_megabyte():
    said = str(Refusal("\x1b[2J\n\ud800 " + "x" * 10**6, "a", "b"))
    assert said.isprintable() and len(said) < 2000 and said.startswith(r"\x1b[2J\n\ud800 xx")
    assert sayable("füchse 🦊") == "füchse 🦊"


def once(monkeypatch, place, name: str, first):
    """`place`.`name` is preceded by first() the next time it is called."""
    kept = getattr(place, name, open)

    def called(*words, **options):
        monkeypatch.setattr(place, name, kept, raising=False)
        first()
        return kept(*words, **options)

    monkeypatch.setattr(place, name, called, raising=False)


@pytest.mark.parametrize("before", ["mkdir", "open", "flock"])
def test_a_folder_that_another_run_removes_meanwhile_is_made_and_held_anew(
    tmp_path, monkeypatch, before
):
    folder = tmp_path / "out"
    place = {"open": files, "flock": files.fcntl, "mkdir": Path}[before]

    def gone():
        shutil.rmtree(folder, ignore_errors=True)
        if before == "mkdir":  # there when mkdir made it, gone when it looked
            raise FileExistsError(errno.EEXIST, "File exists")

    once(monkeypatch, place, before, gone)
    with files.only_run(folder):
        with pytest.raises(Refusal, match="another run"), files.only_run(folder):
            pass
        assert (folder / ".lock").is_file()
    assert not folder.exists()


@pytest.mark.parametrize("without", ["flock", "inodes"])
def test_a_file_system_without_locks_does_not_keep_a_run_from_its_folder(
    tmp_path, monkeypatch, without
):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if without == "flock":
        monkeypatch.setattr(files.fcntl, "flock", unsupported)
    else:
        monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    with files.only_run(tmp_path / "out"):
        (tmp_path / "out" / "picture.png").touch()
    assert (tmp_path / "out" / "picture.png").is_file()


def test_without_flock_no_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    with files.only_run(tmp_path / "out"):
        assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(Refusal) as refusal, files.only_run(folder):
            pass
        assert str(folder / ".lock") in str(refusal.value) and "--output-dir" in str(refusal.value)
        assert "MB" not in str(refusal.value)
