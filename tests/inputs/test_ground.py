"""The ground: a sentence that a terminal can show, and a folder that one run holds at a time."""

import errno
import fcntl
import os

import pytest

from inputs import files
from inputs.files import Refusal, sayable


def test_a_sentence_shows_no_escape_sequence_and_no_megabyte():
    said = str(Refusal("\x1b[2J\n\ud800 " + "x" * 10**6, "a", "b"))
    assert said.isprintable() and len(said) < 2000 and said.startswith(r"\x1b[2J\n\ud800 xx")
    assert sayable("füchse 🦊") == "füchse 🦊"


def test_a_folder_is_held_by_one_run_and_free_again_after_it(tmp_path):
    for _ in range(2):
        with files.only_run(tmp_path / "out"):
            with pytest.raises(Refusal, match="another run"), files.only_run(tmp_path / "out"):
                pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_does_not_keep_a_run_from_its_folder(
    tmp_path, monkeypatch, number
):
    """And leaves nothing that would keep a later one from it, on whichever machine."""

    def unsupported(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with files.only_run(tmp_path / "out"):
        (tmp_path / "out" / "picture.png").touch()
    assert (tmp_path / "out" / "picture.png").is_file()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(Refusal) as refusal, files.only_run(folder):
            pass
        assert str(folder) in str(refusal.value) and "--output-dir" in str(refusal.value)


def test_each_trouble_keeps_its_own_remedy():
    """What is expected and mended alike is one sentence; in the order in which it was met."""
    rows = [("a", "X", "do x"), ("b", "Y", "do y"), ("c", "X", "do x"), ("a", "X", "do x")]
    rows += [("d", "X", "do z")]
    with pytest.raises(Refusal) as refusal:
        files.refuse(rows)
    assert str(refusal.value) == (
        "a and c; expected X. What to do: do x | b; expected Y. What to do: do y | "
        "d; expected X. What to do: do z"
    )
    assert refusal.value.parts == ("a and c | b | d", "X | Y | X", "do x | do y | do z")
    files.refuse([])


def test_ten_of_each_kind_are_named_and_the_rest_counted():
    rows = [(f"found {i}", "X", "do x") for i in range(12)]
    with pytest.raises(Refusal) as refusal:
        files.refuse([*rows, ("other", "Y", "do y")])
    said = str(refusal.value)
    assert "found 9 and 2 more; expected X. What to do: do x | other; expected Y" in said
    assert "found 10" not in said
    with pytest.raises(Refusal) as refusal:
        files.refuse(("f" * 5000, f"X{i}", f"do {i}") for i in range(3))
    assert all(f"expected X{i}. What to do: do {i}" in str(refusal.value) for i in range(3))
