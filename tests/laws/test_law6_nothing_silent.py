"""Law 6, nothing fails silently. NaN and Inf wherever numbers are kept: keep/test_faults.py; what a
file or a picture is refused for: inputs/ and adapters/.
"""

import torch
from bitsandbytes.optim import AdamW8bit

import loop
import lora
from keep import checkpoint


def test_an_adapter_that_did_not_move_is_an_error(train, tmp_path, monkeypatch, capsys):
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


def test_captions_missing_and_cut_are_counted_and_shown(train, few, tmp_path, capsys):
    """Of six pictures, and beside them what else a run says of itself at its start."""
    folder = tmp_path / "captions"
    folder.mkdir()
    for picture in sorted(few.glob("*.png")):
        (folder / picture.name).write_bytes(picture.read_bytes())
        (folder / picture.name).with_suffix(".txt").write_text(picture.stem)
    texts = sorted(folder.glob("*.txt"))
    texts[0].write_text("  ")
    texts[1].write_text("very " * 100 + "long")
    own = ("--dataset-name", str(folder), "--max-train-steps", "1", "--tensorboard")
    assert train("r", *own) == 0
    said = capsys.readouterr().out
    assert f"captions: 1 missing or empty (the first: {texts[0].stem}." in said
    assert "6 pictures at 64 px" in said and ", 1 cut at the tokenizer's length" in said
    assert "1 optimizer steps x 4 images (2 x 2) = 0.7 epochs" in said
    # rank 16, width 32, four blocks of eight layers; keys and values of captions are 40 wide
    assert f"{16 * 4 * (6 * 64 + 2 * 72):,} trainable parameters in 32 layers" in said
    assert any((tmp_path / "r" / "tensorboard").glob("events*"))
