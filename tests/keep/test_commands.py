"""python loop.py under bad input: one sentence with what was found, what was expected and what to
do, exit code 1, no traceback, and nothing lost.
"""

import errno
import json
import os
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import data
import generate
import lora
from conftest import INK, ROOT
from inputs import files
from inputs import options as configuration
from keep import training


@pytest.fixture
def pictures(tmp_path):
    """Three ink drawings with name.txt beside name.png."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for row in map(json.loads, (INK / "metadata.jsonl").read_text().splitlines()[:3]):
        shutil.copy(INK / row["file_name"], folder)
        (folder / row["file_name"]).with_suffix(".txt").write_text(row["text"])
    return folder


@pytest.fixture
def command(train, pictures, capsys):
    """command("--option", ...) -> (exit code, the last line said on stderr) of a run of two steps
    in tmp_path/out, or (0, "").
    """
    short = ("--dataset-name", str(pictures), "--train-batch-size", "1")
    short += ("--gradient-accumulation-steps", "1", "--max-train-steps", "2")

    def run(*options: str) -> tuple[int, str]:
        code = train("out", *short, *options)
        said = capsys.readouterr().err.split("\r")[-1].strip().splitlines()
        return code, said[-1] if code else ""

    return run


def refused(answer: tuple[int, str], *words: str) -> None:
    """Exit code 1 and one sentence that has all the words, what was expected and what to do."""
    code, said = answer
    assert code == 1
    for word in ("error: ", "; expected ", "What to do: ", *words):
        assert word in said


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("resolution", "500", "resolution is 500; expected 8 to 4096 in steps of 8"),
        ("lora-rank", "0", "--lora-rank 16"),
        ("lora-rank", "-3", "lora_rank is -3"),
        ("max-train-steps", "0", "--max-train-steps 450"),
        ("train-batch-size", "0", "train_batch_size is 0"),
        ("learning-rate", "0", "learning_rate is 0"),
        ("learning-rate", "nan", "learning_rate is nan"),
        ("lora-alpha", "0", "lora_alpha is 0"),
        ("seed", "-1", "seed is -1"),
        ("caption-dropout", "1.5", "caption_dropout is 1.5"),
        ("checkpointing-steps", "0", "checkpointing_steps is 0"),
        ("max-grad-norm", "0", "max_grad_norm is 0"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(command, tmp_path, option, value, said):
    refused(command(f"--{option}={value}"), said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv",
    [
        *(["t4", "--leerning-rate", "1"], ["orignal"], ["t4", "--lora-rank", "many"]),
        ["t4", "--pretrained-model-name-or-path", "./modle"],
        ["t4", "--vae", "/no/such/vae"],
        ["t4", "--dataset-name", "~/none"],
    ],
)
def test_an_unknown_option_or_recipe_is_answered_before_anything_heavy_is_imported(argv):
    guard = (
        "import sys\nfrom inputs import options\ntry:\n    options.parse_or_leave(sys.argv[1:])\n"
        "finally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", guard, *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    refused((1, done.stderr), argv[-1] if argv[-1] != "1" else argv[-2])


def test_the_scripts_check_their_options_first():
    """In both commands the check stands above the first import of torch."""
    for name in ("loop.py", "generate.py"):
        source = (ROOT / name).read_text()
        check = source.index('if __name__ == "__main__":')
        assert check < source.index("parse_or_leave()") < source.index("import torch")


def test_options_that_are_read_already_are_run(train, few, tmp_path, capsys):
    """As loop.py hands them on."""
    config = configuration.parse(["pocket", "--dataset-name", str(few / "none")])
    config = configuration.replace(config, output_dir=str(tmp_path / "out"))
    assert training.main(config) == 1
    assert "there is no folder" in capsys.readouterr().err


# ---- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["zero bytes", "garbage", "cut", "bomb"])
def test_a_damaged_picture_is_named(command, pictures, monkeypatch, damage):
    victim = sorted(pictures.glob("*.png"))[1]
    if damage == "bomb":
        Image.new("RGB", (200, 200)).save(victim)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    else:
        whole = victim.read_bytes()
        victim.write_bytes(
            {"zero bytes": b"", "garbage": b"no picture", "cut": whole[: len(whole) // 2]}[damage]
        )
    refused(code_and_said := command(), victim.name, "replace or remove it")
    assert "BytesIO" not in code_and_said[1]
    assert ("no picture that Pillow knows" in code_and_said[1]) == (damage[-1] in "es")
    refused(command("--no-cache"), victim.name)
    assert not (victim.parent.parent / "out" / "config.json").exists()  # nothing had begun


def test_a_caption_without_picture_is_refused_and_so_are_pictures_without_any(command, pictures):
    (pictures / "ghost.txt").write_text("no picture")
    refused(command(), "ghost.txt")
    for path in pictures.glob("*.txt"):  # then they were forgotten
        path.unlink()
    refused(command(), "none of the 3 pictures of ", "sks dog")


def test_an_empty_data_set_and_one_that_is_not_there_are_refused(command, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(command("--dataset-name", str(tmp_path / "empty")), "holds no pictures")
    refused(command("--dataset-name", "nobody/nothing"), "nobody/nothing", "--dataset-name FOLDER")


# What lies in a folder of three pictures, and what a run of it says. Each row's reader has tests
# of its own in tests/inputs; here it is the command that says it.
ODD = {
    "a zip alone": (
        lambda f: emptied(f) / "set.zip",
        b"PK",
        1,
        "holds no pictures, but set.zip; unpack",
    ),
    "UTF-16": (lambda f: a_text(f), "a café".encode("utf-16"), 1, "iconv -f UTF-16"),
    "control": (lambda f: a_text(f), b"a\x00b", 1, "control"),
    "two tables": (lambda f: f / "metadata.csv", b"file_name,text\nnone.png,a", 1, "none.png"),
    "nearly": (lambda f: f / "captions.csv", b"", 0, "1 (the first: captions.csv) left out"),
    "phone": (lambda f: f / "a.heic", b"x", 0, "1 (the first: a.heic) left out"),
    "hidden": (lambda f: f / "._a.png", b"x", 0, "1 (the first: ._a.png) left out"),
    "small": (
        lambda f: a_text(f).with_suffix(".png"),
        40,
        0,
        "1 (the first: NAME) are enlarged over",
    ),
    "16 bits": (lambda f: a_text(f).with_suffix(".png"), 64, 0, "1 (the first: NAME) have 16 bits"),
}


def emptied(folder):
    for path in folder.iterdir():
        path.unlink()
    return folder


def a_text(folder):
    return min(folder.glob("*.txt"))


@pytest.mark.slow
@pytest.mark.parametrize("odd", ODD)
def test_what_is_odd_in_a_folder_is_said_by_the_command(train, pictures, capsys, odd):
    """Refused in one sentence, or said in the lines that a run begins with."""
    at, content, code, said = ODD[odd]
    path = at(pictures)
    if isinstance(content, int):
        grey = np.full((content, content), 30000, np.uint16)
        Image.fromarray(grey).save(path)
    else:
        path.write_bytes(content)
    assert train("odd", "--dataset-name", str(pictures), "--max-train-steps", "1") == code
    told = capsys.readouterr()
    assert said.replace("NAME", path.name) in (told.err if code else told.out)


def test_a_wrong_column_is_refused_with_the_columns_there_are(command, tmp_path):
    table = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (64, 64))] * 2, "words": ["a", "b"]}
    )
    (tmp_path / "table").mkdir()
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "table" / "train.parquet")
    own = ("--dataset-name", str(tmp_path / "table"))
    refused(command(*own), "image, words", "--caption-column")
    assert command(*own, "--caption-column", "words") == (0, "")


# ---- models --------------------------------------------------------------------------------------


def test_a_folder_that_is_no_model_is_refused(command, pictures, tmp_path):
    base = "--pretrained-model-name-or-path"
    refused(command(base, str(pictures)), "model_index.json", str(pictures))
    refused(command(base, str(tmp_path / "none")), str(tmp_path / "none"))


def test_a_model_that_is_not_on_this_disk_names_the_way_out(command):
    refused(command("--pretrained-model-name-or-path", "nobody/sdxl"), "nobody/sdxl", "FOLDER")


# ---- disk ----------------------------------------------------------------------------------------


def test_an_output_folder_that_cannot_be_written_is_refused_before_any_work(
    command, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(data, "examples_of", lambda *_: pytest.fail("work was begun"))
    out = ("--output-dir", str(tmp_path / "file" / "out"))
    refused(command(*out), "could not be written", "--output-dir")


@pytest.mark.slow
def test_a_full_disk_while_saving_loses_no_whole_checkpoint(command, tmp_path, monkeypatch):
    assert command() == (0, "")
    kept = sorted((tmp_path / "out" / "checkpoints").iterdir())
    fsync = os.fsync

    def full(descriptor):
        if os.fstat(descriptor).st_size > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    more = ("--max-train-steps", "4")
    refused(command(*more), "No space left on device", "with room", "same command")
    assert sorted((tmp_path / "out" / "checkpoints").iterdir()) == kept
    assert not list((tmp_path / "out").rglob("*.safetensors.*.part"))
    monkeypatch.setattr(files.os, "fsync", fsync)
    assert command(*more) == (0, "")


def test_a_second_run_in_one_output_folder_is_refused(command, tmp_path):
    with files.only_run(tmp_path / "out"):
        refused(command(), "another run is at work", "--output-dir")


def test_a_folder_whose_name_cannot_be_is_refused(command):
    refused(command("--output-dir", "x" * 300), "could not be written", "--output-dir")


# ---- the picture at its end ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_ends_with_its_before_after_picture_and_draws_it_again_if_it_is_gone(
    command, tmp_path
):
    options = ("--validation-prompts", "red apple", "rocket", "--num-inference-steps", "2")
    assert command(*options) == (0, "")
    picture = tmp_path / "out" / "pictures" / "before-after.png"
    first = picture.read_bytes()
    with Image.open(picture) as image:
        assert image.width > 2 * 32 and image.height > 2 * 32
    picture.unlink()
    assert command(*options) == (0, "")
    assert picture.read_bytes() == first
    assert command(*options, "--max-train-steps", "3") == (0, "")
    assert picture.read_bytes() != first  # longer training, another picture


@pytest.mark.slow
def test_running_out_of_memory_while_drawing_says_that_the_adapter_is_safe(
    command, tmp_path, monkeypatch
):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generate, "draw_at", full)
    refused(
        command("--validation-prompts", "red apple"), "the adapter is saved", "--resolution 512"
    )
    assert (tmp_path / "out" / lora.FILE_NAME).is_file()
