"""The five laws, through the command: main(argv) on the pocket model, which draws."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import datasets
import diffusers
import numpy as np
import pytest
import torch

import generate
import loop
import lora
import model
from conftest import INK, POCKET, ROOT, ink_rows, make_batch, write_pictures
from inputs import ahead, files, hub, sources
from inputs.options import RECIPES
from keep import checkpoint, report
from test_adapter_files import answer, off, pipeline


@pytest.fixture
def train(few, cache, tmp_path):
    """train("name", "--option", ...): one run in tmp_path/name, 64 px, 4 examples a step; returns
    its exit code.
    """

    def run(name: str, *options: str) -> int:
        return loop.main(
            [
                "pocket",
                "--pretrained-model-name-or-path",
                str(POCKET),
                "--dataset-name",
                str(few),
                "--cache-dir",
                str(cache),
                "--output-dir",
                str(tmp_path / name),
                "--resolution",
                "64",
                "--train-batch-size",
                "2",
                "--gradient-accumulation-steps",
                "2",
                "--max-train-steps",
                "4",
                "--checkpointing-steps",
                "2",
                "--learning-rate",
                "1e-3",
                "--lr-scheduler",
                "constant",
                "--lr-warmup-steps",
                "0",
                "--no-tensorboard",
                "--random-flip",
                "--validation-prompts",
                *options,
            ]
        )

    return run


def adapter(folder) -> bytes:
    return (folder / lora.FILE_NAME).read_bytes()


def vector(folder) -> torch.Tensor:
    state = torch.load(max((folder / "checkpoints").iterdir()) / "state.pt", weights_only=True)
    return state["flat"]


def moved(folder, few) -> torch.Tensor:
    """What training added to the start."""
    unet = model.load_unet(str(POCKET), torch.device("cpu"), torch.float32)
    start = lora.inject(unet, lora.TARGETS, 16, 16, RECIPES["pocket"][1].seed).flat.detach()
    return vector(folder) - start


# ---- law 1: a run is a function of its config ----------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "bound"),
    [
        pytest.param("--no-use-8bit-adam", 1e-3, marks=pytest.mark.slow),
        ("--use-8bit-adam", 1e-2),
    ],
)
def test_1x4_equals_2x2_equals_4x1_equals_3_and_1(
    train, tmp_path, few, monkeypatch, optimizer, bound
):
    """No option asks for 3 + 1 yet, so there the function that cuts the step is told so."""
    cut = loop.micro_batches
    for size in (1, 2, 3, 4):
        if size == 3:
            monkeypatch.setattr(loop, "micro_batches", lambda *a, **k: cut(*a, **k | {"size": 3}))
        batch = 4 if size == 3 else size
        shape = ("--train-batch-size", batch, "--gradient-accumulation-steps", 4 // batch)
        assert train(f"b{size}", *map(str, shape), "--max-train-steps", "20", optimizer) == 0
        monkeypatch.setattr(loop, "micro_batches", cut)
    want = moved(tmp_path / "b1", few)
    for size in (2, 3, 4):
        got = moved(tmp_path / f"b{size}", few)
        assert 0 < (got - want).norm() <= bound * want.norm()  # another order of additions


def test_the_first_gradient_does_not_depend_on_how_the_step_is_cut_up(few, cache, tmp_path):
    """Through the very micro-step of the loop: 1 + 1 + 1 + 1, 2 + 2, 3 + 1 and 4."""
    base = dataclasses.replace(
        RECIPES["pocket"][1],
        pretrained_model_name_or_path=str(POCKET),
        dataset_name=str(few),
        resolution=64,
        cache_dir=str(cache),
        output_dir=str(tmp_path / "g"),
        train_batch_size=4,
        gradient_accumulation_steps=1,
    )
    run, _ = loop.set_up(base, torch.device("cpu"))
    gradients, losses = [], []
    for size in (1, 2, 3, 4):
        run.adapter.flat.grad.zero_()
        run.loss_sum.zero_()
        passes = [len(numbers) for numbers in loop.micro_batches(0, 4, size)]
        assert passes == {1: [1] * 4, 2: [2, 2], 3: [3, 1], 4: [4]}[size]
        for numbers in loop.micro_batches(0, 4, size):
            run.forward_backward(run.examples.batch(numbers, run.device))
        gradients.append(run.adapter.flat.grad.clone())
        losses.append(run.loss_sum.item())
    assert gradients[0].norm() > 0
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() <= 1e-4 * gradients[0].norm()


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """33 ink drawings, three blocks of the cache, with their captions in metadata.jsonl."""
    folder = tmp_path_factory.mktemp("first") / "many"
    write_pictures(folder, ink_rows(33))
    return folder


def test_threads_the_caches_state_and_the_order_on_disk_change_no_byte(
    train, many, tmp_path, monkeypatch
):
    """Twenty examples, from all three blocks of pictures."""

    def trained(name, cache, pictures=many):
        options = ("--dataset-name", str(pictures), "--cache-dir", str(tmp_path / cache))
        assert train(name, *options, "--random-crop", "--max-train-steps", "5") == 0
        return adapter(tmp_path / name)

    monkeypatch.setattr(ahead, "usable_cores", lambda: 1)
    want = trained("cold", "first cache")
    blocks = sorted((tmp_path / "first cache").glob("*.safetensors"))
    content = {path.name: path.read_bytes() for path in blocks}
    assert len(content) == 6
    for path in blocks[::2]:  # one of the captions' files and two of the pictures', or the reverse
        path.unlink()
    monkeypatch.setattr(ahead, "usable_cores", lambda: 2)
    assert trained("half", "first cache") == want
    monkeypatch.setattr(ahead, "usable_cores", lambda: 7)
    backwards = tmp_path / "second" / "many"  # written in the reverse order, listed in any
    write_pictures(backwards, (many / "metadata.jsonl").read_text().splitlines()[::-1])
    shuffled_listings(monkeypatch)
    assert trained("order", "second cache", backwards) == want
    for cache in ("first cache", "second cache"):
        assert content == {p.name: p.read_bytes() for p in (tmp_path / cache).glob("*.safe*")}


def shuffled_listings(monkeypatch):
    """Whatever lists a folder gives its names in an order of its own each time."""
    stream, scandir, listdir = random.Random(1), os.scandir, os.listdir

    class Shuffled:
        def __init__(self, path="."):
            with scandir(path) as found:
                self.entries = list(found)
            stream.shuffle(self.entries)

        def __iter__(self):
            return iter(self.entries)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    def listed(path="."):
        return stream.sample(names := listdir(path), len(names))

    monkeypatch.setattr(os, "scandir", Shuffled)
    monkeypatch.setattr(os, "listdir", listed)


def test_caption_files_and_parquet_are_read_in_one_order_whatever_the_disk_lists(
    many, tmp_path, monkeypatch
):
    rows = [json.loads(row) for row in (many / "metadata.jsonl").read_text().splitlines()]
    (tmp_path / "txt").mkdir()
    (tmp_path / "parquet").mkdir()
    for number, row in enumerate(rows):
        file = tmp_path / "txt" / row["file_name"]
        shutil.copy(many / row["file_name"], file)
        file.with_suffix(".txt").write_text(row["text"])
        part = datasets.Dataset.from_dict(
            {"image": [{"bytes": file.read_bytes(), "path": None}], "text": [row["text"]]}
        ).cast_column("image", datasets.Image())
        if number < 4:
            part.to_parquet(tmp_path / "parquet" / f"train-{number:05d}-of-00004.parquet")

    def contents(kind):
        pictures = sources.read_dataset(str(tmp_path / kind))
        return [(p.name, p.caption, p.digest) for p in pictures]

    kinds = ("txt", "parquet")
    want = {kind: contents(kind) for kind in kinds}
    assert [len(want[kind]) for kind in kinds] == [33, 4]
    shuffled_listings(monkeypatch)
    for _ in range(3):
        assert {kind: contents(kind) for kind in kinds} == want


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(train, tmp_path):
    assert train("a") == train("b") == train("c", "--seed", "7") == 0
    assert adapter(tmp_path / "a") == adapter(tmp_path / "b") != adapter(tmp_path / "c")


# ---- law 2: interrupted equals uninterrupted -----------------------------------------------------


class Killed(BaseException):
    """Stands for the process being gone: nothing of ours catches it."""


def test_killed_while_writing_and_started_again_equals_uninterrupted(
    train, tmp_path, few, monkeypatch
):
    """Every file is written through os.replace; the run dies before one of them, at every third of
    them in turn.
    """
    cold = ("--cache-dir", str(tmp_path / "cold"))
    assert train("whole", *cold) == 0
    replace, left = os.replace, [0]

    def dying(source, target):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        replace(source, target)

    at, deaths = 1, 0
    while True:
        shutil.rmtree(tmp_path / "cold")
        left[0] = at
        monkeypatch.setattr(files.os, "replace", dying)
        try:
            assert train(f"killed{at}", *cold) == 0
            finished = True
        except Killed:
            finished, deaths = False, deaths + 1
        monkeypatch.setattr(files.os, "replace", replace)
        assert train(f"killed{at}", *cold) == 0
        assert adapter(tmp_path / f"killed{at}") == adapter(tmp_path / "whole")
        assert not list((tmp_path / f"killed{at}").rglob("*.part"))
        if finished:
            break
        at += 3
    assert deaths >= 4


@pytest.mark.slow  # tests/test_stress.py kills forked ones
def test_sigkill_in_a_process_of_its_own_then_the_same_command(train, tmp_path, few, cache):
    assert train("whole", "--max-train-steps", "30") == 0
    script = "import sys, loop; sys.exit(loop.main(sys.argv[1:]))"
    state = json.loads((tmp_path / "whole" / "config.json").read_text())
    argv = ["pocket", "--validation-prompts", "--no-tensorboard", "--random-flip"]
    for key in (
        "pretrained_model_name_or_path",
        "dataset_name",
        "cache_dir",
        "resolution",
        "train_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "checkpointing_steps",
        "learning_rate",
        "lr_scheduler",
        "lr_warmup_steps",
    ):
        argv += ["--" + key.replace("_", "-"), str(state[key])]
    argv += ["--output-dir", str(tmp_path / "killed")]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *argv],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log, until = tmp_path / "killed" / "log.jsonl", time.monotonic() + 120
    while (
        not (log.is_file() and len(log.read_text().splitlines()) >= 7) and time.monotonic() < until
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / lora.FILE_NAME).exists()
    assert train("killed", "--max-train-steps", "30") == 0
    assert adapter(tmp_path / "killed") == adapter(tmp_path / "whole")
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 31))  # no step is logged twice


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_so(train, tmp_path, monkeypatch, capsys, number):
    assert train("whole") == 0
    step = loop.optimizer_step

    def signalled(run):
        if run.step == 2:
            os.kill(os.getpid(), number)
        return step(run)

    monkeypatch.setattr(loop, "optimizer_step", signalled)
    assert train("stopped") == 128 + number
    assert "step 3 is saved; the same command continues" in capsys.readouterr().out
    monkeypatch.setattr(loop, "optimizer_step", step)
    assert train("stopped") == 0
    assert "continuing after step 3 of 4" in capsys.readouterr().out
    assert adapter(tmp_path / "stopped") == adapter(tmp_path / "whole")


def test_a_signal_in_the_last_step_leaves_before_the_export(train, tmp_path, monkeypatch, capsys):
    assert train("whole") == 0
    save = checkpoint.save_state

    def signalled(run):
        save(run)
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "save_state", signalled)
    assert train("stopped") == 128 + signal.SIGTERM
    assert "step 4 is saved; the same command continues" in capsys.readouterr().out
    assert not (tmp_path / "stopped" / lora.FILE_NAME).exists()
    assert train("stopped") == 0
    assert adapter(tmp_path / "stopped") == adapter(tmp_path / "whole")


def test_tensorboards_thread_says_nothing_of_a_full_disk_that_the_next_write_says(
    tmp_path, monkeypatch
):
    said = []
    monkeypatch.setattr(threading, "excepthook", said.append)

    def fail(error):
        raise error

    for error, told in ((OSError(28, "No space left on device"), 0), (ValueError(), 1)):
        with report.Log(tmp_path, 0, RECIPES["pocket"][1]):
            thread = threading.Thread(target=fail, args=(error,))
            thread.start()
            thread.join()
        assert threading.excepthook == said.append and len(said) == told


def test_an_error_that_a_library_makes_of_an_interruption_is_none(
    train, tmp_path, monkeypatch, capsys
):
    read = lora.read

    def interrupted(path):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:  # as safetensors' loader was seen to do
            raise ValueError("could not determine the shape of an object") from None
        return read(path)

    monkeypatch.setattr(lora, "read", interrupted)
    assert train("r") == 128 + signal.SIGTERM
    assert "the same command continues" in capsys.readouterr().err
    monkeypatch.setattr(lora, "read", read)
    assert train("r") == 0


def test_a_signal_while_encoding_leaves_at_once_and_the_next_start_goes_on(
    train, tmp_path, monkeypatch, capsys
):
    encode = model.encode_images

    def signalled(pixels, vae):
        os.kill(os.getpid(), signal.SIGTERM)
        return encode(pixels, vae)

    monkeypatch.setattr(model, "encode_images", signalled)
    assert train("r", "--cache-dir", str(tmp_path / "own")) == 128 + signal.SIGTERM
    assert "the same command continues" in capsys.readouterr().err
    monkeypatch.setattr(model, "encode_images", encode)
    assert train("r", "--cache-dir", str(tmp_path / "own")) == 0


def test_a_checkpoint_cut_short_is_passed_over_for_the_one_before(train, tmp_path, capsys):
    assert train("whole") == 0
    assert train("cut", "--max-train-steps", "2") == 0
    shutil.copytree(
        tmp_path / "whole" / "checkpoints" / "000004", tmp_path / "cut" / "checkpoints" / "000004"
    )
    file = tmp_path / "cut" / "checkpoints" / "000004" / "state.pt"
    file.write_bytes(file.read_bytes()[:-100])
    assert train("cut") == 0
    assert "000004 was cut short or damaged and is passed over" in (said := capsys.readouterr().out)
    assert "continuing after step 2" in said
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")


def test_a_step_is_in_the_log_though_the_run_was_killed_while_saving_or_logging_it(
    train, tmp_path, monkeypatch
):
    for owner, name in ((checkpoint, "save_state"), (report.Log, "write")):
        function = getattr(owner, name)

        def dying(*args, function=function):
            run = args[0] if isinstance(args[0], loop.Run) else args[1]
            if run.step == 4:
                raise Killed
            function(*args)

        monkeypatch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            train(name)
        monkeypatch.setattr(owner, name, function)
        assert train(name) == 0
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.parametrize("dies", [lambda _: None, lambda folder: (folder / "state.pt").unlink()])
def test_killed_while_an_old_checkpoint_is_removed_leaves_no_half_of_one(
    train, tmp_path, monkeypatch, dies
):
    remove = shutil.rmtree

    def dying(folder, *rest, **options):
        if "000002" in str(folder) and folder.is_dir():
            dies(folder)
            raise Killed
        remove(folder, *rest, **options)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", dying)
    every = ("--checkpointing-steps", "2", "--checkpoints-total-limit", "1")
    with pytest.raises(Killed):
        train("r", *every)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", remove)
    assert train("r", *every) == 0
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == ["000004"]


def test_a_damaged_checkpoint_is_never_kept_for_a_whole_one(train, tmp_path):
    assert train("r", "--max-train-steps", "2") == 0
    shutil.copytree(tmp_path / "r/checkpoints/000002", tmp_path / "r/checkpoints/1000009")
    (tmp_path / "r/checkpoints/1000009/state.sha256").write_bytes(b"\xff" * 64)
    assert train("r", "--max-train-steps", "3", "--checkpoints-total-limit", "1") == 0
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == ["000003"]


def test_no_whole_checkpoint_left_is_refused_with_the_way_out(train, tmp_path, capsys):
    assert train("r", "--max-train-steps", "2") == 0
    for file in (tmp_path / "r").rglob("state.pt"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert train("r") == 1
    assert "no checkpoint" in (said := capsys.readouterr().err) and "rm -r" in said


def test_more_steps_go_on_where_a_finished_run_ended(train, tmp_path, capsys):
    assert train("once") == 0
    assert train("twice", "--max-train-steps", "2") == train("twice") == 0
    assert adapter(tmp_path / "once") == adapter(tmp_path / "twice")
    capsys.readouterr()
    assert train("twice") == 0
    assert "is finished: 4 steps" in capsys.readouterr().out
    assert train("twice", "--max-train-steps", "1") == 0
    assert "is finished: 4 steps" in capsys.readouterr().out


def test_a_finished_run_refuses_other_options_and_writes_another_dtype(train, tmp_path, capsys):
    assert train("r") == 0
    assert train("r", "--learning-rate", "2e-3") == 1
    assert (
        "learning_rate 0.001, and this command has learning_rate 0.002" in capsys.readouterr().err
    )
    size = (tmp_path / "r" / lora.FILE_NAME).stat().st_size
    assert train("r", "--save-dtype", "fp16") == 0
    assert (tmp_path / "r" / lora.FILE_NAME).stat().st_size < 0.6 * size


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--learning-rate", "2e-3"),
            "learning_rate 0.001, and this command has learning_rate 0.002",
        ),
        (("--lora-rank", "8"), "lora_rank 16, and this command has lora_rank 8"),
        (("--train-batch-size", "3"), "gradient_accumulation_steps 4, and this command has"),
        (
            ("--mixed-precision", "bf16"),
            "dtype torch.float32, and this command has dtype torch.bfloat16",
        ),
        (("--dataset-name", str(INK)), "pictures and captions of fingerprint "),
    ],
)
def test_another_run_in_the_same_folder_is_refused_by_field(train, tmp_path, capsys, options, said):
    assert train("r", "--max-train-steps", "2") == 0
    before = adapter(tmp_path / "r")
    assert train("r", *options) == 1
    assert said in capsys.readouterr().err
    assert adapter(tmp_path / "r") == before


def replaced_unet(folder) -> None:
    """The weights of an SDXL folder's UNet, replaced in place as a merged adapter would."""
    from safetensors.torch import load_file, save_file

    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    changed = {key: w * 1.01 if key.endswith("to_q.weight") else w for key, w in weights.items()}
    save_file(changed, file, metadata={"format": "pt"})


def test_a_finished_run_notices_what_was_replaced_in_place(train, few, tmp_path, capsys):
    """The base's UNet, its text encoder, a caption, a picture: each under the old name; what is put
    back is the old run again.
    """
    base, data = tmp_path / "base", tmp_path / "data"
    shutil.copytree(POCKET, base)
    shutil.copytree(few, data)
    own = ("--pretrained-model-name-or-path", str(base), "--dataset-name", str(data))
    assert train("r", *own) == 0
    before = adapter(tmp_path / "r")
    was = hub.unet_fingerprint(str(base), half=False)
    name = sorted(data.glob("*.png"))[0]

    def caption():
        file = data / "metadata.jsonl"
        file.write_text(file.read_text().replace('"text": "', '"text": "a ', 1))

    def encoder():
        file = base / "text_encoder" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-64:] = bytes(64)
        content[len(content) // 2 : len(content) // 2 + 4096] = bytes(4096)
        file.write_bytes(content)

    for change, folder, words in (
        (
            lambda: replaced_unet(base),
            base,
            f"r holds a run with a base of fingerprint {was}, and this command has",
        ),
        (encoder, base, "r holds a run with text encoders, tokenizers and VAE of fing"),
        (caption, data, "r holds a run with pictures and captions of fingerprint "),
        (
            lambda: name.write_bytes(name.read_bytes() + b"x"),
            data,
            "r holds a run with pictures and captions of fingerprint ",
        ),
    ):
        shutil.copytree(folder, tmp_path / "kept")
        change()
        capsys.readouterr()
        assert train("r", *own) == 1
        said = capsys.readouterr().err
        assert words in said and "the same options, base model, pictures and captions" in said
        assert adapter(tmp_path / "r") == before
        shutil.rmtree(folder)
        (tmp_path / "kept").rename(folder)
        assert train("r", *own) == 0
        assert "r is finished: 4 steps" in capsys.readouterr().out
    shutil.rmtree(data)  # a run that is done needs its pictures no more
    assert train("r", *own) == 0


def test_memory_options_may_change_between_two_starts(train, tmp_path):
    assert train("r", "--max-train-steps", "2") == 0
    cut = (
        "--train-batch-size",
        "4",
        "--gradient-accumulation-steps",
        "1",
        "--gradient-checkpointing",
    )
    assert train("r", *cut) == 0
    assert json.loads((tmp_path / "r" / "finished.json").read_text())["steps"] == 4


def test_only_the_newest_checkpoints_are_kept_each_with_a_loadable_adapter(train, tmp_path):
    assert train("r", "--checkpointing-steps", "1", "--checkpoints-total-limit", "2") == 0
    kept = sorted((tmp_path / "r" / "checkpoints").iterdir())
    assert [folder.name for folder in kept] == ["000003", "000004"]
    assert lora.read(kept[0]).about["steps"] == "3"
    assert adapter(kept[1]) == adapter(tmp_path / "r")


# ---- law 3: cached equals uncached ---------------------------------------------------------------


def test_training_from_the_cache_equals_encoding_at_every_step(train, tmp_path):
    options = ("--random-crop", "--caption-dropout", "0.5", "--resolution", "56")
    assert train("cached", *options, "--cache-dir", str(tmp_path / "new")) == 0
    assert train("warm", *options, "--cache-dir", str(tmp_path / "new")) == 0
    assert train("uncached", *options, "--no-cache") == 0
    assert (
        adapter(tmp_path / "cached") == adapter(tmp_path / "warm") == adapter(tmp_path / "uncached")
    )


def test_a_second_run_loads_no_encoder(train, monkeypatch):
    assert train("first") == 0

    def never(*_):
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(model, "load_vae", never)
    monkeypatch.setattr(model, "load_text_encoders", never)
    assert train("second") == 0


# ---- law 4: exported equals trained --------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_diffusers_draws_our_picture_from_our_files(train, tmp_path, dtype):
    """Both files, loaded by load_lora_weights (peft), draw what generate.py draws; strength 0 is
    the bare model.
    """
    assert train("r", "--save-dtype", dtype, "--learning-rate", "1e-2") == 0
    options = ("--prompts", "red apple", "--seeds", "3", "--num-inference-steps", "4")
    for strength in ("1", "0", "0.5"):
        assert generate.main([str(tmp_path / "r"), *options, "--strength", strength]) == 0
    ours = {
        s: picture(tmp_path / "r" / "pictures" / f"00-red-apple-3-{s}.png")
        for s in ("0", "0.5", "1")
    }
    bare = reference(None)
    assert np.array_equal(ours["0"], bare)
    assert np.abs(ours["1"] - bare).mean() > 2
    half = np.abs(ours["0.5"] - bare).mean()
    assert 0 < half < np.abs(ours["1"] - bare).mean()
    for path in (tmp_path / "r", tmp_path / "r" / "kohya" / "r.safetensors"):
        assert np.abs(ours["1"] - reference(path)).max() <= 1  # of 255
    assert np.abs(ours["0.5"] - reference(tmp_path / "r", 0.5)).max() <= 1


def test_what_a_resumed_run_exports_is_what_it_trained(train, tmp_path):
    """Ended after step 2 and gone on with otherwise cut steps: each file in each dtype, read by us
    and by diffusers, against the vector that the last checkpoint holds.
    """
    device = torch.device("cpu")
    rate = ("--learning-rate", "1e-2")
    assert train("r", *rate, "--max-train-steps", "2") == 0
    shape = ("--train-batch-size", "4", "--gradient-accumulation-steps", "1")
    assert train("r", *rate, *shape) == 0
    batch = make_batch() | {
        "context": torch.randn(2, 32, 224, generator=torch.Generator().manual_seed(1)),
        "pooled": torch.randn(2, 128, generator=torch.Generator().manual_seed(2)),
    }
    unet = model.load_unet(str(POCKET), device, torch.float32)
    bare = answer(unet, batch)
    mine = lora.inject(unet, lora.TARGETS, 16, 16, seed=5)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        assert train("r", *rate, *shape, "--save-dtype", f"fp{8 * dtype.itemsize}") == 0
        with torch.no_grad():
            mine.flat.copy_(vector(tmp_path / "r"))
        numbers = [matrix.clone() for _, matrix in mine.parts()]
        for file in (tmp_path / "r" / lora.FILE_NAME, tmp_path / "r" / "kohya" / "r.safetensors"):
            with torch.no_grad():
                for (_, matrix), number in zip(mine.parts(), numbers, strict=True):
                    matrix.copy_(number)
            want = answer(unet, batch)
            pipe = pipeline(model.load_unet(str(POCKET), device, torch.float32))
            pipe.load_lora_weights(file)
            assert off(answer(pipe.unet, batch), want) < bound < 0.1 * off(bare, want)
            lora.load(mine, file)
            assert all(
                torch.equal(matrix, number.to(dtype).float())
                for (_, matrix), number in zip(mine.parts(), numbers, strict=True)
            )


def picture(path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path)).astype(int)


def reference(path, strength: float = 1.0) -> np.ndarray:
    """The same prompt and seed through diffusers alone."""
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(POCKET, torch_dtype=torch.float32)
    if path:
        pipe.load_lora_weights(path, adapter_name="ours")
        pipe.set_adapters("ours", strength)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    guidance = RECIPES["pocket"][1].guidance_scale
    image = pipe("red apple", latents=noise, num_inference_steps=4, guidance_scale=guidance).images[
        0
    ]
    return np.asarray(image).astype(int)


def test_a_file_that_is_not_what_was_trained_ends_the_run_without_done(
    train, tmp_path, monkeypatch, capsys
):
    save = lora.save

    def wrong(adapter, path, *rest):
        with torch.no_grad():
            adapter.flat[0] += 1e-3 if "kohya" in str(path) else 0
            save(adapter, path, *rest)
            adapter.flat[0] -= 1e-3 if "kohya" in str(path) else 0

    monkeypatch.setattr(lora, "save", wrong)
    assert train("r") == 1
    assert "read back, gives another UNet" in (said := capsys.readouterr()).err
    assert "done" not in said.out
    monkeypatch.setattr(lora, "save", save)
    assert train("r") == 0


# ---- law 5: nothing fails silently (NaN and Inf: test_faults.py) ---------------------------------


def test_an_adapter_that_did_not_move_is_an_error(train, tmp_path, monkeypatch, capsys):
    from bitsandbytes.optim import AdamW8bit

    monkeypatch.setattr(AdamW8bit, "step", lambda self: None)
    assert train("r") == 1
    assert "did not move" in capsys.readouterr().err
    assert not (tmp_path / "r" / lora.FILE_NAME).exists()


def test_running_out_of_memory_says_what_to_change_and_keeps_the_steps_before(
    train, tmp_path, monkeypatch, capsys
):
    step = loop.optimizer_step

    def full(run):
        if run.step == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(run)

    monkeypatch.setattr(loop, "optimizer_step", full)
    assert train("r") == 1
    assert "--gradient-checkpointing" in capsys.readouterr().err
    assert checkpoint.newest_state(tmp_path / "r" / "checkpoints")["step"] == 3


def test_out_of_memory_inside_the_optimizer_saves_no_half_step(
    train, tmp_path, monkeypatch, capsys
):
    options = ("--no-use-8bit-adam", "--checkpoints-total-limit", "1", "--checkpointing-steps", "2")
    assert train("whole", *options) == 0
    step, left = torch.optim.AdamW.step, [3]

    def full(optimizer):  # after everything has moved
        step(optimizer)
        left[0] -= 1
        if left[0] == 0:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 89 MiB.")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    assert train("r", *options) == 1
    assert "the GPU's memory is full" in capsys.readouterr().err
    assert train("r", *options) == 0
    assert "continuing after step 2 of 4" in capsys.readouterr().out
    assert adapter(tmp_path / "r") == adapter(tmp_path / "whole")


@pytest.mark.slow  # tests/test_deterministic.py has one that is killed
def test_fp16_resumed_equals_uninterrupted_loss_scale_included(train, tmp_path, monkeypatch):
    scale = loop.LossScale
    monkeypatch.setattr(
        loop, "LossScale", lambda enabled, value: scale(enabled, 2.0**17, growth_interval=2)
    )
    fp16 = ("--mixed-precision", "fp16", "--max-train-steps", "6")
    assert train("whole", *fp16) == 0
    assert train("cut", *fp16[:2], "--max-train-steps", "3") == 0
    monkeypatch.setattr(loop, "LossScale", scale)
    assert train("cut", *fp16) == 0
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    scales = [
        json.loads(x)["loss_scale"]
        for x in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()
    ]
    assert scales == [
        json.loads(x)["loss_scale"]
        for x in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    ]
    assert len(set(scales)) > 1


def test_the_state_file_holds_what_the_run_is_and_loads_weights_only(train, tmp_path):
    assert train("r") == 0
    state = checkpoint.newest_state(tmp_path / "r" / "checkpoints")
    assert state["step"] == 4 and state["config"]["resolution"] == 64
    assert state["identity"]["dtype"] == "torch.float32"
    assert state["identity"]["base"] == hub.unet_fingerprint(str(POCKET), half=False)
    assert vector(tmp_path / "r").shape == state["flat"].shape
