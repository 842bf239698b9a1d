"""The two commands under bad input: one sentence with what was found, what was expected and what to
do, exit code 1 (2 for an unknown option), no traceback, and nothing lost.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import generate
import loop
import lora
import model
from conftest import INK, POCKET, ROOT
from inputs import files, hub
from inputs import options as configuration
from inputs.files import Refusal


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
def train(pictures, cache, tmp_path, capsys):
    """train("--option", ...) -> (exit code, what was said on stderr) of a run of two steps."""

    def run(*options: str) -> tuple[int, str]:
        argv = [
            "pocket",
            "--pretrained-model-name-or-path",
            str(POCKET),
            "--dataset-name",
            str(pictures),
            "--cache-dir",
            str(cache),
            "--output-dir",
            str(tmp_path / "out"),
            "--resolution",
            "64",
            "--train-batch-size",
            "1",
            "--max-train-steps",
            "2",
            "--no-tensorboard",
            "--validation-prompts",
        ]
        code = loop.main(argv + list(options))
        return code, capsys.readouterr().err.split("\r")[-1].strip().splitlines()[
            -1
        ] if code else ""

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
        ("resolution", "500", "--resolution 496 or --resolution 504"),
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
def test_a_value_that_cannot_be_is_refused_by_name(train, tmp_path, option, value, said):
    refused(train(f"--{option}={value}"), said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv",
    [["t4", "--leerning-rate", "1"], ["orignal"], ["t4", "--lora-rank", "many"]],
)
def test_an_unknown_option_leaves_with_2_before_anything_heavy_is_imported(argv):
    guard = (
        "import sys
from inputs import options as config
try:\n    config.parse_or_leave(sys.argv[1:])\n"
        "finally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", guard, *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert argv[-1].lstrip("-").split("-")[0] in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("word", ["orignal", "low-mem", "my pictures", "runs/t4", ""])
def test_a_recipe_that_is_none_is_answered_in_one_line(word, capsys):
    with pytest.raises(SystemExit, match="2"):
        configuration.parse([word])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: recipe {word!r}; expected one of original, t4,")
    assert line.endswith("What to do: python loop.py t4")


def test_the_scripts_check_their_options_first():
    """In both commands the check stands above the first import of torch."""
    for name in ("loop.py", "generate.py"):
        source = (ROOT / name).read_text()
        assert 0 < source.index('if __name__ == "__main__":') < source.index("import torch")


# ---- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["zero bytes", "garbage", "cut", "bomb"])
def test_a_damaged_picture_is_named(train, pictures, monkeypatch, damage):
    victim = sorted(pictures.glob("*.png"))[1]
    if damage == "bomb":
        Image.new("RGB", (200, 200)).save(victim)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    else:
        whole = victim.read_bytes()
        victim.write_bytes(
            {"zero bytes": b"", "garbage": b"no picture", "cut": whole[: len(whole) // 2]}[damage]
        )
    refused(train(), victim.name, "replace or remove it")
    refused(train("--no-cache"), victim.name)


def test_a_picture_without_caption_file_and_the_reverse_are_named(train, pictures):
    lonely = sorted(pictures.glob("*.txt"))[0]
    text = lonely.read_text()
    lonely.unlink()
    refused(train(), lonely.with_suffix(".png").name)
    lonely.write_text(text)
    (pictures / "ghost.txt").write_text("no picture")
    refused(train(), "ghost.txt")


def test_an_empty_data_set_and_one_that_is_not_there_are_refused(train, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(train("--dataset-name", str(tmp_path / "empty")), "holds no pictures")
    refused(train("--dataset-name", "nobody/nothing"), "nobody/nothing", "--dataset-name FOLDER")


def test_a_wrong_column_is_refused_with_the_columns_there_are(train, tmp_path):
    table = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (64, 64))] * 2, "words": ["a", "b"]}
    )
    (tmp_path / "table").mkdir()
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "table" / "train.parquet")
    refused(train("--dataset-name", str(tmp_path / "table")), "image, words", "--caption-column")
    assert train("--dataset-name", str(tmp_path / "table"), "--caption-column", "words") == (0, "")


def test_a_picture_that_does_not_fit_the_gpu_is_decoded_in_tiles(monkeypatch, capsys):
    vae = model.load_vae(str(POCKET), torch.device("cpu"))
    with Image.open(sorted((ROOT / "pocket" / "ink").glob("*.png"))[0]) as image:
        pixels = np.asarray(image.convert("RGB").resize((256, 256)), np.float32)
    pixels = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    latents = [model.encode_images(pixels, vae)[0]] * 2
    (whole, _), decoder = generate.decode(vae, latents, (1.0, 0.0)), vae.decoder.forward
    assert capsys.readouterr().out == ""

    def small(z, *args, **kwargs):
        if z.shape[-1] > latents[0].shape[-1] // 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return decoder(z, *args, **kwargs)

    monkeypatch.setattr(vae.decoder, "forward", small)
    tiled, again = generate.decode(vae, latents, (1.0, 0.0))
    assert capsys.readouterr().out.count("in tiles") == 1
    assert tiled.tobytes() == again.tobytes() and tiled.size == whole.size == (256, 256)
    off = np.abs(np.asarray(tiled, float) - np.asarray(whole, float))
    assert 0 < off.mean() < 5  # 2.1 of 255: norms see a tile, not the picture


def test_captions_missing_and_cut_are_counted_and_shown(pictures, cache, tmp_path, capsys):
    texts = sorted(pictures.glob("*.txt"))
    texts[0].write_text("  ")
    texts[1].write_text("very " * 100 + "long")
    assert (
        loop.main(
            [
                "pocket",
                "--pretrained-model-name-or-path",
                str(POCKET),
                "--dataset-name",
                str(pictures),
                "--cache-dir",
                str(cache),
                "--output-dir",
                str(tmp_path / "out"),
                "--resolution",
                "64",
                "--max-train-steps",
                "1",
                "--train-batch-size",
                "1",
                "--validation-prompts",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert f"captions: 1 missing or empty (the first: {texts[0].stem}." in said
    assert "3 pictures at 64 px" in said and ", 1 cut at the tokenizer's length" in said
    assert "1 optimizer steps x 1 images (1 x 1) = 0.3 epochs" in said
    assert "293,888 trainable parameters" in said
    assert any((tmp_path / "out" / "tensorboard").glob("events*"))


# ---- model and adapters --------------------------------------------------------------------------


def test_a_folder_that_is_no_model_is_refused(train, pictures, tmp_path):
    refused(
        train("--pretrained-model-name-or-path", str(pictures)), "model_index.json", str(pictures)
    )
    refused(
        train("--pretrained-model-name-or-path", str(tmp_path / "none")), str(tmp_path / "none")
    )


def test_a_model_that_is_not_on_this_disk_names_the_way_out(train, monkeypatch):
    refused(train("--pretrained-model-name-or-path", "nobody/sdxl"), "nobody/sdxl", "FOLDER")


@pytest.fixture
def trained(train, tmp_path):
    assert train() == (0, "")
    return tmp_path / "out"


def draw(capsys, *argv: str) -> tuple[int, str]:
    capsys.readouterr()
    code = generate.main([*argv, "--prompts", "red apple", "--num-inference-steps", "1"])
    return code, capsys.readouterr().err.strip().splitlines()[-1] if code else ""


def test_an_adapter_of_another_base_is_refused_unless_told_so(trained, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(POCKET, other)
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    for key in weights:  # as a merged adapter would
        if key.endswith("to_q.weight"):
            weights[key] = weights[key] * 1.01
    save_file(weights, file, metadata={"format": "pt"})
    base = ("--pretrained-model-name-or-path", str(other))
    prints = [hub.unet_fingerprint(str(folder), half=False) for folder in (POCKET, other)]
    assert prints[0] != prints[1]
    kohya = trained / "kohya" / f"{trained.name}.safetensors"
    for adapter in (trained, kohya):
        refused(draw(capsys, str(adapter), *base), "was trained on", "--any-base", *prints)
        assert draw(capsys, str(adapter), *base, "--any-base") == (0, "")


def test_an_adapter_of_another_architecture_rank_or_format_is_refused(trained, tmp_path, capsys):
    file = trained / lora.FILE_NAME
    tensors = {
        f"unet.{k}": torch.zeros(s)
        for k, s in (("a.lora_A.weight", (4, 8)), ("a.lora_B.weight", (8, 4)))
    }
    alien = tmp_path / "alien.safetensors"
    alien.write_bytes(files.safetensors_bytes(tensors, {}))
    base = ("--pretrained-model-name-or-path", str(POCKET))
    refused(draw(capsys, str(alien), *base), "alien.safetensors")
    alien.write_bytes(files.safetensors_bytes({"lora_unet_x.hada_w1_a": torch.zeros(2, 2)}, {}))
    refused(draw(capsys, str(alien), *base), "hada_w1_a", "convert")
    alien.write_bytes(file.read_bytes()[:-7])
    refused(draw(capsys, str(alien), *base), "alien.safetensors is not a whole safetensors file")
    refused(draw(capsys, str(tmp_path / "none.safetensors"), *base), "no such file")
    unet = model.load_unet(str(POCKET), torch.device("cpu"), torch.float32)
    eight = lora.inject(unet, lora.TARGETS, 8, 16)
    with pytest.raises(Refusal, match="rank 16 and alpha 16; expected rank 8 and alpha 16"):
        lora.load(eight, file)


@pytest.mark.parametrize(
    "bad", [["--num-inference-steps", "0"], ["--seeds"], ["--seeds", "-1"], ["--resolution", "100"]]
)
def test_a_drawing_that_cannot_be_is_refused_by_name(trained, capsys, bad):
    name = bad[0].removeprefix("--").replace("-", "_")
    capsys.readouterr()
    assert generate.main([str(trained), *bad]) == 1
    assert (
        f"error: {name} is " in (said := capsys.readouterr().err)
        and f"What to do: {bad[0]}" in said
    )


def test_two_prompts_never_share_a_file(trained, tmp_path):
    out = ("--output-dir", str(tmp_path / "drawn"), "--num-inference-steps", "1")
    assert generate.main([str(trained), "--prompts", "猫", "犬", *out]) == 0
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2


def test_no_run_to_draw_from_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(draw(capsys), "no finished run under runs/", "make train")


# ---- disk ----------------------------------------------------------------------------------------


def test_an_output_folder_that_cannot_be_written_is_refused_before_any_work(
    train, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(loop, "prepare", lambda *_: pytest.fail("work was begun"))
    refused(
        train("--output-dir", str(tmp_path / "file" / "out")),
        "could not be written",
        "--output-dir",
    )


def test_a_full_disk_while_saving_loses_no_whole_checkpoint(train, trained, monkeypatch):
    kept = sorted((trained / "checkpoints").iterdir())
    fsync = os.fsync

    def full(descriptor):
        if os.fstat(descriptor).st_size > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    refused(train("--max-train-steps", "4"), "No space left on device", "MB free", "same command")
    assert sorted((trained / "checkpoints").iterdir()) == kept
    assert not list(trained.rglob("*.safetensors.*.part"))
    monkeypatch.setattr(files.os, "fsync", fsync)
    assert train("--max-train-steps", "4") == (0, "")


def test_a_second_run_in_one_output_folder_is_refused(train, tmp_path):
    with files.only_run(tmp_path / "out"):
        refused(train(), "another run is at work", "--output-dir")
    assert train() == (0, "")


# ---- what is drawn -------------------------------------------------------------------------------


def test_a_run_ends_with_its_before_after_picture_and_draws_it_again_if_it_is_gone(train, tmp_path):
    options = ("--validation-prompts", "red apple", "rocket", "--num-inference-steps", "2")
    assert train(*options) == (0, "")
    picture = tmp_path / "out" / "pictures" / "before-after.png"
    first = picture.read_bytes()
    with Image.open(picture) as image:
        assert image.width > 2 * 128 and image.height > 2 * 128
    picture.unlink()
    assert train(*options) == (0, "")
    assert picture.read_bytes() == first
    assert train(*options, "--max-train-steps", "3", "--learning-rate=4e-3") == (0, "")
    assert picture.read_bytes() != first  # longer training, another picture


def test_running_out_of_memory_while_drawing_says_that_the_adapter_is_safe(
    train, tmp_path, monkeypatch
):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generate, "run", full)
    refused(train("--validation-prompts", "red apple"), "the adapter is saved", "--resolution 64")
    assert (tmp_path / "out" / lora.FILE_NAME).is_file()


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


def test_a_folder_whose_name_cannot_be_is_refused(train):
    refused(train("--output-dir", "x" * 300), "could not be written", "--output-dir")


def test_a_refused_run_leaves_no_folder_of_its_own(train, tmp_path):
    refused(train("--dataset-name", str(tmp_path / "none")), "no folder here")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    refused(train("--dataset-name", str(tmp_path / "none")), "no folder here")
    assert (tmp_path / "out").is_dir()  # somebody else's
