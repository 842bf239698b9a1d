"""Nothing fails silently, as a table: NaN and Inf put wherever numbers are kept. Each is met in the
step that would use it, or as that step ends, and named by a sentence; no checkpoint takes it up,
and the same command, the fault gone, ends with the bytes of a run that never had one.
"""

import contextlib
import functools
import itertools
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data
import loop
import lora
from conftest import TINY_SDXL, ink_rows, write_pictures
from fast import nf4
from inputs import blocks, sources
from inputs.options import RECIPES
from keep import checkpoint, faults, training
from runs import in_one

SEED = RECIPES["pocket"][1].seed
STEPS, DUE, FAULT = 5, 2, 4  # a checkpoint is due after step 2; step 4 begins with the fault


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_all():
    """So that all runs are the same to the byte, and none waits for another's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Eight of the ink drawings."""
    return write_pictures(tmp_path_factory.mktemp("few") / "ink", ink_rows(8))


@pytest.fixture(scope="module")
def train(few, tmp_path_factory):
    """train("name", "--option", ...) -> exit code: a short run, two examples a step."""
    root = tmp_path_factory.mktemp("runs")

    def run(name: str, *options: str) -> int:
        data.Cache.open.cache_clear()  # a new process would have no file open
        fixed = {
            "pretrained-model-name-or-path": TINY_SDXL,
            "dataset-name": few,
            "cache-dir": root / "cache",
            "output-dir": root / name,
            "resolution": 64,
            "train-batch-size": 1,
            "gradient-accumulation-steps": 2,
            "max-train-steps": STEPS,
            "checkpointing-steps": DUE,
            "learning-rate": 1e-3,
            "lr-scheduler": "constant",
            "lr-warmup-steps": 0,
            "caption-dropout": 0,
        }
        argv = [part for k, v in fixed.items() for part in (f"--{k}", str(v))]
        return training.main(
            ["pocket", *argv, "--no-tensorboard", "--validation-prompts", *options]
        )

    run.root, run.few = root, few
    return run


@pytest.fixture(scope="module")
def whole(train):
    """whole(optimizer) -> the adapter file of a run that was let alone."""

    @functools.cache
    def run(optimizer: str) -> bytes:
        assert train(f"whole{optimizer}", optimizer) == 0
        return (train.root / f"whole{optimizer}" / lora.FILE_NAME).read_bytes()

    run(STATE8)  # which fills the cache
    return run


@contextlib.contextmanager
def before_step(number: int, spoil):
    """spoil(run) is called as step `number` begins."""
    step = loop.optimizer_step

    def spoiled(run):
        if run.step == number - 1:
            spoil(run)
        return step(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "optimizer_step", spoiled)
        yield


# ---- where a fault is put: each a context that holds while one command runs ----------------------


def in_cache(kind: str, key: str):
    """One number in the cached row of the first picture that step FAULT is the first to see."""

    @contextlib.contextmanager
    def fault(value, train):
        names = [p.name for p in sources.read_dataset(str(train.few))]
        sizes = [(64, 64)] * len(names)
        examples = data.Examples(None, names, sizes, 2, SEED, data.Chances(), 1000)
        seen = [examples.example(i).picture for i in range(2 * FAULT)]
        row = next(row for row in seen[-2:] if row not in seen[:-2])
        (file,) = (train.root / "cache").glob(f"{kind}-*")
        tensors = load_file(file)
        tensors[key][row].view(-1)[-1] = value
        blocks.write_block(file, tensors)  # whole: only its numbers are bad
        yield [names[row], f", in {file}, has", "rm that file"]
        file.unlink()  # as told

    return fault


def in_run(spoil, *words: str):
    @contextlib.contextmanager
    def fault(value, _train):
        with before_step(FAULT, lambda run: spoil(run, value)):
            yield list(words)

    return fault


def base_weight(run, value):
    run.unet.mid_block.attentions[0].proj_in.weight.data[3, 4] = value


def adapted_weight(run, value):
    run.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.base.weight.data[0] = value


def adapter_weight(run, value):
    run.trained[LAST].data[5, 3] = value


def gradient(run, value):
    """What the backward pass gives in this step: one number of one matrix."""
    add = run.micro_step

    def spoiled(run, batch):
        add(run, batch)
        if run.step == FAULT - 1:
            list(run.trained.values())[7].grad[0, 0] = value

    run.micro_step = spoiled


def optimizer_state(key: str):
    def spoil(run, value):
        (vector,) = run.optimizer.param_groups[0]["params"]
        run.optimizer.state[vector][key].view(-1)[-1] = value

    return spoil


def loss_scale(run, value):
    run.loss_scale.value = value


PROJ = "mid_block.attentions.0.proj_in.weight"
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
LAST = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_B"
AGAIN = "the same command, which continues from the newest checkpoint"
STATE32, STATE8 = "--no-use-8bit-adam", "--use-8bit-adam"
# How it is put there, a part of the sentence, and the optimizer.
TABLE = {
    "latent's mean": (in_cache("latent", "mean"), "the cached latent of picture", STATE8),
    "context": (in_cache("prompt", "context"), "the cached caption's embedding of", STATE8),
    "base weight": (in_run(base_weight, PROJ), "the base model's", STATE8),
    "adapted weight": (in_run(adapted_weight, TO_Q), "the base model's", STATE8),
    "adapter": (in_run(adapter_weight, LAST, AGAIN), "the adapter's", STATE8),
    "gradient": (in_run(gradient, "that of ", ".png"), "the gradient of", STATE8),
    "8-bit moments": (in_run(optimizer_state("absmax2"), LAST, AGAIN), "after step", STATE8),
    "second moment": (in_run(optimizer_state("exp_avg_sq"), LAST, AGAIN), "exp_avg_sq", STATE32),
    "loss scale": (in_run(loss_scale, AGAIN), "the loss scale has", STATE8),
}
QUICK = "adapter"  # the others go to make slow
INF = ("context", "gradient", "second moment")  # the others are NaN


@pytest.mark.parametrize(
    ("place", "value"),
    [
        pytest.param(
            place,
            math.inf if place in INF else math.nan,
            marks=[] if place == QUICK else [pytest.mark.slow],
        )
        for place in TABLE
    ],
)
def test_a_fault_is_met_in_its_step_named_and_never_saved(train, whole, capsys, place, value):
    fault, said, optimizer = TABLE[place]
    name = re.sub(r"\W", "", f"{place}{value}")
    with fault(value, train) as words:
        assert train(name, optimizer) == 1
    error = capsys.readouterr().err.split("error: ")[-1]
    for word in (f"step {FAULT}", said, *words, "; expected finite", "What to do: "):
        assert word in error
    kind = "NaN" if math.isnan(value) else "Inf"  # and Inf - Inf, in AdamW's step, is NaN
    assert kind in error or place == "gradient"
    # The step before is sound and saved, though no checkpoint was due: the fault came after it. Not
    # so where the fault is in what would be saved.
    state = checkpoint.newest_state(train.root / name / "checkpoints")
    assert state["step"] == (DUE if AGAIN in words else FAULT - 1)
    assert all(tensor.isfinite().all() for tensor in tensors_in(state))
    assert not (train.root / name / lora.FILE_NAME).exists()
    assert train(name, optimizer) == 0
    assert (train.root / name / lora.FILE_NAME).read_bytes() == whole(optimizer)


def tensors_in(state) -> list[torch.Tensor]:
    if torch.is_tensor(state):
        return [state]
    return [t for v in state.values() for t in tensors_in(v)] if isinstance(state, dict) else []


def test_a_bad_scale_of_a_4_bit_base_is_named(tmp_path):
    """NF4's numbers are bytes; what multiplies each block of them can go bad."""
    unet = nf4.load_unet_nf4(str(TINY_SDXL), torch.device("cpu"), torch.float32, tmp_path)
    run = SimpleNamespace(unet=unet, adapter=lora.inject(unet), trained=lora.trained(unet))
    assert faults.bad(faults.of_base(run)) == ""
    weight = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.base.weight
    weight.quant_state.state2.absmax[0] = math.nan
    assert faults.bad(faults.of_base(run)) == f"the base model's {TO_Q} has NaN"


# ---- what a step computes and leaves behind ------------------------------------------------------


@pytest.mark.slow
def test_what_the_optimizer_spoils_is_not_saved_and_names_its_step(train, whole, capsys):
    """A fault between a step's check and its end: here the update itself writes Inf."""

    def spoil(run):
        step = run.optimizer.step

        def writes():
            step()
            next(iter(run.trained.values())).data[0, 1] = math.inf

        run.optimizer.step = writes

    with before_step(2 * DUE, spoil):
        assert train("update") == 1
    said = capsys.readouterr().err
    assert f"after step {2 * DUE} the adapter's down_blocks" in said and "has Inf, so that" in said
    folders = sorted((train.root / "update" / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == [f"{DUE:06d}"]
    assert train("update") == 0
    assert (train.root / "update" / lora.FILE_NAME).read_bytes() == whole(STATE8)


def test_the_picture_on_which_the_unet_overflows_is_named_with_its_timestep(train, capsys):
    """One example of the step gives Inf in the middle of the UNet, as fp16 does."""
    at = {}

    def spoil(run):
        e = run.examples.example(2 * FAULT - 1)
        at.update(name=run.examples.names[e.picture], t=e.t)
        block, context = run.unet.mid_block.resnets[0], run.examples.source.prompt(e.picture)[0]
        forward = block.forward

        def overflow(*inputs):
            (rows,) = (at["context"] == context).all(dim=(1, 2)).nonzero(as_tuple=True)
            return forward(*inputs).index_fill(0, rows, math.inf)

        block.forward = overflow
        note = lambda module, args, kw: at.update(context=args[2])  # noqa: E731
        run.unet.register_forward_pre_hook(note, with_kwargs=True)

    with before_step(FAULT, spoil):
        assert train("overflow") == 1
    said = capsys.readouterr().err
    want = f"the UNet overflows on picture {at['name']} at timestep {at['t']}"
    assert f"the loss of step {FAULT} is nan: {want}" in said
    assert "--mixed-precision fp32" in said


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [STATE8, STATE32])
def test_the_host_waits_once_in_a_step_whatever_is_checked(train, monkeypatch, optimizer):
    """Whatever brings a number of a GPU's tensor to the host is a wait; one tolist() is allowed.
    (32-bit AdamW reads its own step count, which is on the host.)
    """
    reads = []

    def counted(name):
        read = getattr(torch.Tensor, name)

        def count(tensor, *rest):
            reads.append((name, tensor.numel()))
            return read(tensor, *rest)

        return count

    step = loop.optimizer_step

    def watched(run):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
                patch.setattr(torch.Tensor, name, counted(name))
            return step(run)

    monkeypatch.setattr(loop, "optimizer_step", watched)
    assert train(f"reads{optimizer}", optimizer) == 0
    own = [("item", 1)] * (optimizer == STATE32)
    assert reads == [("tolist", 2), *own] * STEPS


# ---- fp16: overflow is counted, and ends --------------------------------------------------------

FP16 = ("--mixed-precision", "fp16")


def overflowing(monkeypatch, overflows) -> None:
    """The gradient has an Inf in the steps (from 1) for which overflows(step) is true."""
    step = loop.optimizer_step

    def spoiled(run):
        exchange = run.exchange

        def spoil(run):
            exchange(run)
            if overflows(run.step + 1):
                next(iter(run.trained.values())).grad.view(-1)[7] = math.inf

        run.exchange = spoil
        try:
            return step(run)
        finally:
            run.exchange = exchange

    monkeypatch.setattr(loop, "optimizer_step", spoiled)


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_real_overflow_in_fp16_skips_steps_until_the_scale_fits(train, monkeypatch, capsys):
    scale = loop.LossScale
    monkeypatch.setattr(loop, "LossScale", lambda enabled, value: scale(enabled, 2.0**24))
    assert train("real", *FP16, "--max-train-steps", "8") == 0
    lines = log_of(train.root / "real")
    skipped = [line for line in lines if line["grad_norm"] is None]
    assert 1 < len(skipped) < 8
    assert lines[-1]["loss_scale"] == 2.0 ** (24 - len(skipped))
    assert f"done: 8 steps, {len(skipped)} of them skipped" in capsys.readouterr().out


@pytest.mark.slow
def test_overflows_are_counted_and_shown_also_after_a_resume(train, monkeypatch, capsys):
    """And a step that is skipped moves nothing."""
    overflowing(monkeypatch, lambda step: step in (1, 3))
    options = (*FP16, "--checkpointing-steps", "1", "--checkpoints-total-limit", "4")
    assert train("counted", *options, "--max-train-steps", "2") == 0
    first = capsys.readouterr()
    assert "step 1 is skipped (1 so far)" in first.out and "loss scale is now 32768" in first.out
    assert "done: 2 steps, 1 of them skipped" in first.out and first.err.endswith(" 1 skipped\n")
    assert train("counted", *options, "--max-train-steps", "4") == 0
    second = capsys.readouterr()
    assert "step 3 is skipped (2 so far)" in second.out and second.err.endswith(" 2 skipped\n")
    assert "done: 4 steps, 2 of them skipped" in second.out
    lines = log_of(train.root / "counted")
    assert [line["skipped"] for line in lines] == [1, 1, 2, 2]
    assert [line["grad_norm"] is None for line in lines] == [True, False, True, False]
    assert [line["loss_scale"] for line in lines] == [2.0**15, 2.0**15, 2.0**14, 2.0**14]
    ends = [
        in_one(torch.load(folder / "state.pt", weights_only=True)["trained"])
        for folder in sorted((train.root / "counted" / "checkpoints").iterdir())
    ]
    one_and_two, two_and_three, three_and_four = itertools.starmap(
        torch.equal, itertools.pairwise(ends)
    )
    assert two_and_three and not one_and_two and not three_and_four


@pytest.mark.slow
@pytest.mark.parametrize(("every", "ends"), [(2, 13)])
def test_a_loss_scale_that_collapses_ends_the_run_with_advice(
    train, monkeypatch, capsys, every, ends
):
    """From 2**6 six halvings lead to 1, in a row or with good steps between; the next overflow ends
    the run, which keeps the steps before. (A run begins at 2**16.)
    """
    scale = loop.LossScale
    monkeypatch.setattr(loop, "LossScale", lambda enabled, value: scale(enabled, 2.0**6))
    overflowing(monkeypatch, lambda step: step % every == 1 % every)
    options = (*FP16, "--max-train-steps", "100", "--gradient-accumulation-steps", "1")
    name = f"collapse{every}"
    assert train(name, *options) == 1
    said = capsys.readouterr().err.split("error: ")[-1]
    for words in (
        f"the gradient of step {ends} is not finite, after 6 skipped steps, at loss scale 1",
        "that of down_blocks.1.attentions.0",
        ".png",
        "a lower --learning-rate or --mixed-precision fp32",
    ):
        assert words in said
    assert len(log_of(train.root / name)) == ends - 1
    assert checkpoint.newest_state(train.root / name / "checkpoints")["step"] == ends - 1


def test_loss_scale_grows_halves_and_knows_its_end():
    scale = loop.LossScale(True, 4.0, growth_interval=3)
    for _ in range(3):
        scale.update(finite=True)
    assert scale.value == 8
    for want in (4, 2, 1):
        assert scale.can_halve()
        scale.update(finite=False)
        assert scale.value == want
    assert not scale.can_halve() and scale.skipped == 3
    for value in (math.nan, math.inf, 0, -1):
        assert not loop.LossScale(True, value).can_halve()
    assert not loop.LossScale(False, 2.0**16).can_halve()
