"""--deterministic: the modes it sets, what it promises, and fp16 with loss scaling continued to the
byte. What it does to a GPU's kernels is shown by benchmarks/deterministic.py.
"""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch

import loop
import lora
import model
from fast import deterministic, plan
from inputs import files
from inputs import options as configuration
from keep import checkpoint, faster, identity, training
from stress import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.build(folder / "model", 0)
    tiny.draw_pictures(folder / "pictures", 0)
    return folder


@pytest.fixture
def train(folder, tmp_path, one_thread):
    """train("name", "--option", ...): a run of the tiny SDXL in tmp_path/name; its exit code."""

    def run(name: str, *options: str) -> int:
        argv = tiny.arguments(
            folder / "model", folder / "pictures", folder / "cache", tmp_path / name
        )
        return training.main([*argv, "--no-tensorboard", "--validation-prompts", *options])

    return run


def modes() -> tuple:
    cuda = torch.backends.cuda
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        cuda.cudnn_sdp_enabled(),
    )


@pytest.mark.slow
def test_the_modes_are_set_while_the_run_lasts_and_as_before_afterwards(train, monkeypatch):
    monkeypatch.delenv(deterministic.WORKSPACE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before, seen = modes(), []
    predict = model.predict

    def looking(*given):
        seen.append((*modes(), os.environ.get(deterministic.WORKSPACE)))
        return predict(*given)

    monkeypatch.setattr(model, "predict", looking)
    assert train("on", "--deterministic") == 0
    assert set(seen) == {(True, True, False, False, ":4096:8")}
    assert modes() == before
    seen.clear()
    monkeypatch.delenv(deterministic.WORKSPACE)
    assert train("off") == 0
    assert set(seen) == {(*before, None)}


def test_modes_are_as_before_after_a_refusal_too():
    before = modes()
    with pytest.raises(files.Refusal), deterministic.mode():
        raise files.Refusal("a", "b", "c")
    assert modes() == before


def test_a_workspace_that_was_chosen_stays(monkeypatch):
    monkeypatch.setenv(deterministic.WORKSPACE, ":16:8")
    with deterministic.mode():
        assert os.environ[deterministic.WORKSPACE] == ":16:8"


def test_xformers_is_refused_and_the_memory_plan_falls_away(monkeypatch):
    with pytest.raises(files.Refusal, match="--attention sdpa"):
        configuration.parse(["original", "--deterministic"])
    chosen = configuration.parse(["t4", "--deterministic"])
    monkeypatch.setattr(plan, "choose_plan", lambda *_: pytest.fail("planned"))
    same, why = plan.choose(chosen, torch.device("cuda"), torch.float16)
    assert same == chosen and "memory plan: none" in why


@pytest.mark.slow
def test_the_promise_may_be_given_up_and_not_taken_up(train, capsys):
    short = ("--max-train-steps", "2", "--lr-scheduler", "constant")
    assert train("with", *short, "--deterministic") == train("without", *short) == 0
    longer = ("--max-train-steps", "3", "--lr-scheduler", "constant")
    capsys.readouterr()
    assert train("without", *longer, "--deterministic") == 1
    said = capsys.readouterr().err
    assert "holds a run with deterministic False" in said and "has deterministic True" in said
    cut = ("--train-batch-size", "4", "--gradient-accumulation-steps", "1")
    assert train("with", *longer, "--deterministic", *cut) == 1
    said = capsys.readouterr().err
    assert "train_batch_size 2" in said and "train_batch_size 4" in said
    assert train("with", *longer, *cut) == 0
    longer = ("--max-train-steps", "4", "--lr-scheduler", "constant")
    assert train("with", *longer, "--deterministic") == 1


def test_it_is_promised_for_one_gpu_and_one_torch_only(monkeypatch):
    on = dataclasses.replace(configuration.RECIPES["pocket"][1], deterministic=True)
    assert faster.promise(configuration.RECIPES["pocket"][1], CPU, 1) == {}
    assert f"torch {torch.__version__}" in deterministic.promise(on, CPU)["computed by"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert "Tesla T4" in deterministic.promise(on, torch.device("cuda"))["computed by"]


def test_what_changes_the_order_of_additions_may_change_only_without_it():
    assert set(deterministic.ORDER) <= identity.MAY_CHANGE
    assert set(deterministic.ORDER) <= {f.name for f in dataclasses.fields(configuration.Config)}


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--deterministic", "--no-deterministic"])
def test_fp16_with_loss_scaling_killed_and_continued_is_byte_identical(
    train, tmp_path, monkeypatch, flag
):
    """The scale overflows, is halved, grows again; the run stops while it does."""
    scale, step = loop.LossScale, loop.optimizer_step
    monkeypatch.setattr(
        loop, "LossScale", lambda enabled, value: scale(enabled, 2.0**21, growth_interval=2)
    )

    def stopping(run):
        if run.step == stop_at[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run)

    monkeypatch.setattr(loop, "optimizer_step", stopping)
    fp16, stop_at = ("--mixed-precision", "fp16", flag), [None]
    assert train("whole", *fp16) == 0
    for stop_at[0] in (1, 3, 4):
        assert train("cut", *fp16) == 128 + signal.SIGTERM
    stop_at[0] = None
    assert train("cut", *fp16) == 0
    whole, cut = (tmp_path / name for name in ("whole", "cut"))
    assert (whole / lora.FILE_NAME).read_bytes() == (cut / lora.FILE_NAME).read_bytes()
    states = [checkpoint.newest_state(out / "checkpoints")["scale"] for out in (whole, cut)]
    assert states[0] == states[1] and states[0]["skipped"] > 0 and states[0]["good_steps"] > 0
    assert scales(whole) == scales(cut) and len(set(scales(whole))) > 2


def scales(out: Path) -> list[float]:
    return [json.loads(line)["loss_scale"] for line in (out / "log.jsonl").read_text().splitlines()]
