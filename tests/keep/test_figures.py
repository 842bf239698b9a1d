"""The figures that a run says: captions that are cut, and a GPU that is full or has become slow."""

import itertools

import pytest
import torch

import model
from conftest import POCKET
from inputs.options import RECIPES
from keep import report

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def watch():
    """watch([seconds of each step], device) -> the sentences, by step."""

    def watch(seconds, device=CPU) -> dict[int, list[str]]:
        watch = report.Watch(RECIPES["t4"][1])
        found = {i: watch.after(i, each, device) for i, each in enumerate(seconds, start=1)}
        return {step: sentences for step, sentences in found.items() if sentences}

    return watch


def test_steps_that_take_twice_their_usual_time_are_said_once_with_the_reason(watch):
    """Five in a row: the first step, which records, hiccups and slow drifts are nothing."""
    slow = [9.0] + [1.0] * 30 + [2.5] * 50 + [1.0] * 30 + [9.0] * 9
    ((step, (said,)),) = watch(slow).items()
    assert step == 36 and said.startswith("after step 36: the last 5 steps took over twice the")
    for words in ("usual 1.00 s", "Windows and WSL", "on Linux another program", "What to do: "):
        assert words in said
    assert "--gradient-checkpointing --train-batch-size 1 --gradient-accumulation-steps 4" in said
    assert watch([1.0] * 30 + ([5.0] * 4 + [1.0]) * 9) == {}
    assert watch([1.0 + i / 50 for i in range(400)]) == {}
    assert watch([1.0] * 5 + [5.0] * 14) == {}  # before anything is usual


def test_a_gpu_that_is_over_95_percent_full_is_said_once_and_seldom_asked(watch, monkeypatch):
    asked, free = [], itertools.chain([6, 6, 5], itertools.repeat(4))

    def mem_get_info(device):
        asked.append(device)
        return next(free) * 2**30, 100 * 2**30

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    assert watch([1.0] * 100) == {} and not asked  # on a CPU there is nothing to ask
    ((step, (said,)),) = watch([1.0] * 200, GPU).items()
    assert step == 80 and "after step 80: 96.0 of the GPU's 100.0 GiB are in use. On W" in said
    assert asked == [GPU] * 10


def test_a_prompt_is_counted_as_cut_when_its_tokens_exceed_the_tokenizers_length():
    tokenizer, _ = model.load_tokenizers(str(POCKET))
    length = tokenizer.model_max_length  # with begin and end
    word = "a"
    assert len(tokenizer(word).input_ids) == 3
    fits, too_long = " ".join([word] * (length - 2)), " ".join([word] * (length - 1))
    assert report.count_cut([fits], str(POCKET)) == 0
    assert report.count_cut([too_long], str(POCKET)) == 1
    assert report.count_cut(["", fits, too_long, too_long], str(POCKET)) == 2
    assert report.count_cut([], str(POCKET)) == 0
