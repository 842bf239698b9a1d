"""The figures that a run says: captions that are cut, and a GPU that is full or has become slow."""

import itertools
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import loop
import model
from conftest import POCKET, SDXL
from inputs.options import RECIPES, replace
from inputs.sources import Picture
from keep import report

GPU = torch.device("cuda:0")


@pytest.fixture
def watch(monkeypatch):
    """watch([seconds of each step], used) -> the sentences, by step. used: GiB of the GPU's 100, at
    each time that it is asked; watch.asked: how often it was.
    """

    def watch(seconds, used=()) -> dict[int, list[str]]:
        used = itertools.chain(used, itertools.repeat(50))

        def mem_get_info(device):
            assert device == GPU
            watch.asked += 1
            return (100 - next(used)) * 2**30, 100 * 2**30

        monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
        eyes = report.Watch(RECIPES["t4"][1])
        found = {i: eyes.after(i, each, GPU) for i, each in enumerate(seconds, start=1)}
        return {step: sentences for step, sentences in found.items() if sentences}

    watch.asked = 0
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


def test_a_gpu_that_is_over_95_percent_full_is_said_once_and_seldom_asked(watch):
    used = itertools.chain([94, 94, 95], itertools.repeat(96))
    ((step, (said,)),) = watch([1.0] * 200, used).items()
    assert step == 80 and "after step 80: 96.0 of the GPU's 100.0 GiB are in use. On W" in said
    assert watch.asked == 10


def test_a_log_says_what_the_watch_says(tmp_path, monkeypatch, capsys):
    """On a GPU; on a CPU nobody watches."""
    config, said = replace(RECIPES["pocket"][1], output_dir=str(tmp_path)), []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**31)
    monkeypatch.setattr(report.Watch, "after", lambda *given: said.append(given[1:]) or ["slow"])
    with report.Log(replace(config, tensorboard=False), 0) as log:
        for step, device in enumerate((torch.device("cpu"), GPU), start=1):
            scale, there = loop.LossScale(device == GPU), SimpleNamespace(device=device)
            run = SimpleNamespace(step=step, loss_scale=scale, loss_sum=there)
            log.write(run, 1.0, 1.0, 1e-4, 0.5)
    told = capsys.readouterr()
    assert said == [(2, 0.5, GPU)] and "slow" in told.out
    assert told.err == ""  # in a pipe a line in 50 steps
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["gib"] for row in rows] == [0.0, 2.0]


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_a_caption_counts_as_cut_when_its_tokens_exceed_its_chunks(chunks):
    tokenizer, _ = model.load_tokenizers(str(POCKET))
    length = tokenizer.model_max_length  # with begin and end
    word = "a"
    assert len(tokenizer(word).input_ids) == 3
    config, room = replace(RECIPES["pocket"][1], max_tokens=75 * chunks), chunks * (length - 2)
    fits, too_long = " ".join([word] * room), " ".join([word] * (room + 1))
    cut = partial(report.cut_captions, config=config)
    assert cut([fits]) == cut([]) == [] and cut([too_long]) == [too_long]
    assert cut(["", fits, too_long, too_long]) == [too_long, too_long]


def test_the_disk_that_captions_take_is_said_where_a_picture_has_several(monkeypatch):
    """At SDXL's size, in half precision: 77 x 2048 + 1280 numbers of 2 bytes, for each chunk."""
    monkeypatch.setattr(report, "fetch", lambda name, part: SDXL / part)
    monkeypatch.setattr(
        model, "load_tokenizers", lambda name: [SimpleNamespace(model_max_length=77)]
    )
    one, three = (Picture("a", ("a",) * n, "", bytes) for n in (1, 3))
    config = replace(RECIPES["t4"][1], cache_dir="/c")
    assert report.disk(config, [one, one], torch.float16) == ""
    said = report.disk(config, [one, three] * 1000, torch.float16)
    assert said == "4000 captions of 2000 pictures, 315 kB each when encoded: 1,261.6 MB in /c"
    long = replace(config, max_tokens=150)
    assert "1 captions of 1 pictures, 631 kB each" in report.disk(long, [one], torch.float16)
    assert report.disk(replace(config, cache=False), [three], torch.float16) == ""
