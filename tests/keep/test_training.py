"""What surrounds a run's steps: its log, its checkpoints, and whether its folder holds this run."""

import json
import shutil
import signal
import threading
from dataclasses import fields, replace
from importlib import metadata

import pytest
from safetensors.torch import load_file, save_file

import lora
from conftest import INK, TINY_SDXL, ink_rows, trainer, write_pictures
from inputs import hub
from inputs.options import NOTES, RECIPES, Config, parse
from keep import checkpoint, report, training
from runs import Killed, adapter, log


@pytest.fixture(scope="module")
def first_run(few, cache, tmp_path_factory):
    root = tmp_path_factory.mktemp("first")
    assert trainer(root, few, cache)("r", "--max-train-steps", "2") == 0
    return root / "r"


@pytest.fixture
def r(first_run, tmp_path):
    """The folder r of a run of two steps, as it ended."""
    return shutil.copytree(first_run, tmp_path / "r")


# ---- the log -------------------------------------------------------------------------------------


def test_tensorboards_thread_says_nothing_of_a_full_disk_that_the_next_write_says(
    tmp_path, monkeypatch
):
    said = []
    monkeypatch.setattr(threading, "excepthook", said.append)

    def fail(error):
        raise error

    for error, told in ((OSError(28, "No space left on device"), 0), (ValueError(), 1)):
        with report.Log(replace(RECIPES["pocket"][1], output_dir=str(tmp_path)), 0):
            thread = threading.Thread(target=fail, args=(error,))
            thread.start()
            thread.join()
        assert threading.excepthook == said.append and len(said) == told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name"),
    [(checkpoint, "save_state"), (report.Log, "write")],
    ids=["saving", "logging"],
)
def test_a_step_is_in_the_log_though_the_run_was_killed_while_saving_or_logging_it(
    train, tmp_path, monkeypatch, owner, name
):
    function = getattr(owner, name)

    def dying(*args):
        run = args[1] if owner is report.Log else args[0].run
        if run.step == 4:
            raise Killed
        function(*args)

    monkeypatch.setattr(owner, name, dying)
    with pytest.raises(Killed):
        train("r")
    monkeypatch.setattr(owner, name, function)
    assert train("r") == 0
    assert [row["step"] for row in log(tmp_path / "r")] == [1, 2, 3, 4]


def test_a_damaged_log_loses_its_damaged_lines_only(tmp_path):
    lines = ['{"step": 1}', '{"st', "", "\0" * 512, '{"step": 2}', '{"step": 9}']
    (tmp_path / "log.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe{}\n{}\n[]\n5\n")
    config = replace(RECIPES["pocket"][1], tensorboard=False, output_dir=str(tmp_path))
    with report.Log(config, 2):
        pass
    assert (tmp_path / "log.jsonl").read_text().splitlines() == ['{"step": 1}', '{"step": 2}']


# ---- which checkpoints are kept ------------------------------------------------------------------


@pytest.mark.slow
def test_only_the_newest_checkpoints_are_kept_each_with_a_loadable_adapter(train, tmp_path):
    assert train("r", "--checkpointing-steps", "1", "--checkpoints-total-limit", "2") == 0
    kept = sorted((tmp_path / "r" / "checkpoints").iterdir())
    assert [folder.name for folder in kept] == ["000003", "000004"]
    assert lora.read(kept[0]).about["steps"] == "3"
    assert adapter(kept[1]) == adapter(tmp_path / "r")


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_damaged_checkpoint_is_never_kept_for_a_whole_one(train, r, tmp_path):
    shutil.copytree(tmp_path / "r/checkpoints/000002", tmp_path / "r/checkpoints/1000009")
    (tmp_path / "r/checkpoints/1000009/state.sha256").write_bytes(b"\xff" * 64)
    assert train("r", "--max-train-steps", "3", "--checkpoints-total-limit", "1") == 0
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == ["000003"]


@pytest.mark.slow
def test_no_whole_checkpoint_left_is_refused_with_the_way_out(train, r, capsys):
    for file in r.rglob("state.pt"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert train("r") == 1
    assert "no checkpoint" in (said := capsys.readouterr().err) and "rm -r" in said


@pytest.mark.slow
def test_the_state_file_holds_each_matrix_by_name_and_what_the_run_is(train, tmp_path):
    """It is read with weights_only: nothing in it needs code."""
    assert train("r") == 0
    state = checkpoint.newest_state(tmp_path / "r" / "checkpoints")
    assert state["step"] == 4 and state["config"]["resolution"] == (64,)
    assert state["identity"]["dtype"] == "torch.float32"
    assert state["identity"]["base"] == hub.unet_fingerprint(str(TINY_SDXL), half=False)
    file = lora.read(tmp_path / "r")
    assert state["trained"].keys() == state["moments"].keys() == file.matrices.keys()
    for name, matrix in state["trained"].items():
        assert matrix.equal(file.matrices[name])
        assert state["moments"][name]["state1"].shape == matrix.shape


# ---- whether the folder holds this run -----------------------------------------------------------


@pytest.mark.slow
def test_a_finished_run_writes_another_dtype(train, r):
    size = (r / lora.FILE_NAME).stat().st_size
    assert train("r", "--max-train-steps", "2", "--save-dtype", "fp16") == 0
    assert (r / lora.FILE_NAME).stat().st_size < 0.6 * size


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--learning-rate", "2e-3"),
            "learning_rate 0.001, and this command has learning_rate 0.002",
        ),
        pytest.param(
            ("--lora-rank", "8"),
            "lora_rank 16, and this command has lora_rank 8",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--train-batch-size", "3"),
            "gradient_accumulation_steps 4, and this command has",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--mixed-precision", "bf16"),
            "dtype torch.float32, and this command has dtype torch.bfloat16",
            marks=pytest.mark.slow,
        ),
        (("--dataset-name", str(INK)), "r holds a run with the pictures in its pictures.json, and"),
    ],
)
def test_another_run_in_the_same_folder_is_refused_by_field(train, r, capsys, options, said):
    """Finished, which is not asked for its dtype, and to be continued."""
    before = adapter(r)
    for steps in ("4",) if "bf16" in options else ("2", "4"):
        assert train("r", *options, "--max-train-steps", steps) == 1
        assert said in capsys.readouterr().err
    assert adapter(r) == before


def test_other_pictures_are_told_by_name(train, tmp_path, capsys):
    """With a finished run and with one that goes on."""
    rows = [json.loads(row) for row in ink_rows(5)]
    data = write_pictures(tmp_path / "data", list(map(json.dumps, rows)))
    own = ("--dataset-name", str(data), "--max-train-steps", "2")
    assert train("r", *own) == 0
    listed = (tmp_path / "r" / "pictures.json").read_text()
    assert set(json.loads(listed)) == {row["file_name"] for row in rows}
    shutil.copy(data / rows[0]["file_name"], data / "new.png")
    gone, changed, renamed = (row["file_name"] for row in rows[1:4])
    (data / gone).unlink()
    (data / changed).write_bytes((data / changed).read_bytes() + b"x")
    rows[3]["text"] = "other words"
    rows = [rows[0], *rows[2:], {"file_name": "new.png", "text": "new"}]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    both = ", ".join(map(repr, sorted([changed, renamed])))
    told = {
        f"1 gone ('{gone}')",
        f"2 changed in picture, mask, weight or caption ({both})",
        "1 added ('new.png')",
    }
    capsys.readouterr()
    for more in ((), ("--max-train-steps", "4")):
        assert train("r", *own, *more) == 1
        said = capsys.readouterr().err
        said_of_pictures = said.partition("this command has ")[2].partition(";")[0]
        assert all(each in said_of_pictures for each in told)
        assert "r holds a run with the pictures in its pictures.json, and" in said
        assert (tmp_path / "r" / "pictures.json").read_text() == listed


def test_pictures_without_captions_need_a_word_for_it(train, few, tmp_path, capsys):
    """Which caption they get is part of what the run is."""
    data = tmp_path / "data"
    shutil.copytree(few, data)
    (data / "metadata.jsonl").unlink()
    own = ("--dataset-name", str(data), "--max-train-steps", "1")
    assert train("r", *own) == 1
    said = capsys.readouterr().err
    assert f"none of the 6 pictures of {data} has a caption, such as '" in said
    assert '--caption "a photo of sks dog", --caption "" (the empty prompt)' in said
    assert train("r", *own, "--caption", "a", "--caption-from-name") == 1
    assert "--caption with --caption-from-name; expected one of them" in capsys.readouterr().err
    assert train("r", *own, "--caption", "a photo of sks dog") == 0
    said = capsys.readouterr().out
    assert "without a caption of their own, called 'a photo of sks dog'" in said
    assert "captions: 0 missing or empty" in said
    for other in (("--caption", ""), ("--caption-from-name",)):
        assert train("r", *own, *other) == 1
        assert "this command has 6 changed in picture, " in capsys.readouterr().err
    assert train("r", *own, "--caption", "a photo of sks dog") == 0
    assert "is finished" in capsys.readouterr().out


def replaced_unet(folder) -> None:
    """The weights of an SDXL folder's UNet, replaced in place as a merged adapter would."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    changed = {key: w * 1.01 if key.endswith("to_q.weight") else w for key, w in weights.items()}
    save_file(changed, file, metadata={"format": "pt"})


@pytest.mark.slow
def test_a_finished_run_notices_what_was_replaced_in_place(train, few, tmp_path, capsys):
    """The base's UNet, its text encoder, a caption, a picture: each under the old name; what is put
    back is the old run again.
    """
    base, data = tmp_path / "base", tmp_path / "data"
    shutil.copytree(TINY_SDXL, base)
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
            f"r holds a run with base {was}, and this command has",
        ),
        (encoder, base, "r holds a run with text encoders, tokenizers and VAE "),
        (caption, data, "this command has 1 changed in picture, mask, weight or caption ('"),
        (
            lambda: name.write_bytes(name.read_bytes() + b"x"),
            data,
            f"this command has 1 changed in picture, mask, weight or caption ('{name.name}')",
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


@pytest.mark.slow
def test_memory_options_may_change_between_two_starts(train, r):
    cut = ("--train-batch-size", "4", "--gradient-accumulation-steps", "1")
    assert train("r", *cut, "--gradient-checkpointing") == 0
    assert json.loads((r / "finished.json").read_text())["steps"] == 4


# ---- a run again, and on -------------------------------------------------------------------------


@pytest.mark.slow
def test_config_json_gives_the_run_again_and_says_what_made_it(train, tmp_path, capsys):
    own = ("--max-train-steps", "2", "--lora-rank", "8", "--max-grad-norm", "inf")
    own += ("--train-batch-size", "1", "--gradient-accumulation-steps", "1")
    assert train("r", *own) == 0
    said = capsys.readouterr()  # on a CPU without a word of a loss scale or of a GPU's memory
    assert "\ndone: 2 steps\nadapter: " in said.out
    assert "s/step" in said.err and "skipped" not in said.err and "GiB" not in said.err
    file = tmp_path / "r" / "config.json"
    told = json.loads(file.read_text())
    assert told.keys() - NOTES == {field.name for field in fields(Config)}
    makers = ("torch", "diffusers", "transformers", "bitsandbytes")
    assert told["versions"] == {name: metadata.version(name) for name in makers}
    assert training.main(["--config", str(file), "--output-dir", str(tmp_path / "again")]) == 0
    assert adapter(tmp_path / "again") == adapter(tmp_path / "r")
    capsys.readouterr()
    assert training.main(["--config", str(tmp_path / "r")]) == 0  # its own folder
    assert f"{tmp_path / 'r'} is finished: 2 steps" in capsys.readouterr().out


FALLING = ("--lr-scheduler", "cosine", "--lr-end", "0.1", "--lr-warmup-steps", "1")
FALLING += ("--train-batch-size", "1", "--gradient-accumulation-steps", "1")


@pytest.mark.slow
def test_a_run_lengthened_later_is_the_longer_run_with_the_schedule_of_its_start(
    train, tmp_path, capsys
):
    """Of which it is said that it has ended; another length of it is another run."""
    assert train("r", *FALLING, "--max-train-steps", "2") == 0
    assert "learning rate ends" not in capsys.readouterr().out
    assert train("r", *FALLING, "--max-train-steps", "4", "--lr-schedule-steps", "4") == 1
    said = capsys.readouterr().err
    assert "lr_schedule_steps 2, and this command has lr_schedule_steps 4" in said
    assert train("r", *FALLING, "--max-train-steps", "4") == 0
    said = "the learning rate ends at 0.0001, where its schedule ends at step 2 and it stays"
    assert capsys.readouterr().out.count(said) == 1
    assert train("one", *FALLING, "--max-train-steps", "4", "--lr-schedule-steps", "2") == 0
    assert adapter(tmp_path / "one") == adapter(tmp_path / "r")
    mine, theirs = (train.log(name) for name in ("r", "one"))
    assert [row["lr"] for row in mine] == [row["lr"] for row in theirs]
    assert [row["lr"] for row in mine][-2:] == [0.1 * 1e-3] * 2
    assert train("r", *FALLING, "--max-train-steps", "4") == 0  # as the finished one's
    assert "r is finished: 4 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--lr-warmup-steps", "20"), "ends at 0.0002: the run is shorter than its warm-up (--lr-"),
        (("--lr-warmup-steps", "4"), ""),
        (("--lr-warmup-steps", "5"), "ends at 0.0008: the run is shorter"),
        (("--lr-schedule-steps", "2"), ""),  # constant
        (("--lr-scheduler", "cosine"), ""),
        (("--lr-scheduler", "cosine", "--lr-schedule-steps", "9"), ""),
        (
            ("--lr-scheduler", "cosine", "--lr-schedule-steps", "3", "--lr-end", "0"),
            "ends at 0, where",
        ),
        (("--lr-scheduler", "cosine", "--lr-schedule-steps", "4"), ""),
    ],
)
def test_a_rate_that_is_not_what_one_would_think_is_said(train, options, said):
    config = parse(train.argv("r", *options))
    found = report.describe_rate(config)
    assert found.startswith("the learning rate " + said) if said else not found


@pytest.mark.slow
def test_what_was_exported_under_the_folders_old_name_goes_and_nothing_else(
    train, tmp_path, capsys
):
    assert train("old", "--max-train-steps", "1") == 0
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    mine, others = tmp_path / "new" / "kohya" / "old.safetensors", tmp_path / "new" / "kohya"
    shutil.copy(mine, others / "copy.safetensors")
    assert train("new", "--max-train-steps", "1") == 0
    assert f"removed: {mine}, which this run wrote" in capsys.readouterr().out
    assert {path.stem for path in others.iterdir()} == {"copy", "new"}
    (tmp_path / "new").rename(tmp_path / "newer")
    others = tmp_path / "newer" / "kohya"
    (others / "new.safetensors").write_bytes(b"of another program")
    assert train("newer", "--max-train-steps", "2") == 0
    assert "removed" not in capsys.readouterr().out
    assert {path.stem for path in others.iterdir()} == {"copy", "new", "newer"}


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_a_closed_terminal_lets_the_step_finish_unless_nohup_keeps_it_away():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with report.Interrupts() as interrupts:
            interrupts.gently = True
            for _ in range(2):  # of the kernel, and of the shell
                signal.raise_signal(signal.SIGHUP)
        assert interrupts.caught == signal.SIGHUP
        assert signal.signal(signal.SIGHUP, signal.SIG_IGN) == signal.SIG_DFL
        with report.Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
        assert not interrupts.caught and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
