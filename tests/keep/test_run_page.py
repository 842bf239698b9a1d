"""The run's page while it trains: when it is made, what it is told, that it costs no step."""

import json
from types import SimpleNamespace

import pytest
import torch

from inputs.files import Refusal
from keep import checkpoint, training
from runs import Killed, adapter, log
from see import page

SHOWN = ("--preview-prompts", "red apple", "--preview-steps", "1")


def events(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / page.EVENTS).read_text().splitlines()]


@pytest.mark.slow
def test_it_is_made_before_the_first_step_at_every_save_and_at_the_end(
    train, tmp_path, monkeypatch, capsys
):
    seen, write = [], page.write

    def noted(out):
        seen.append(write(out).read_text())

    monkeypatch.setattr(page, "write", noted)
    assert train("r", *SHOWN, "--validation-prompts", "cat face", "--num-inference-steps", "1") == 0
    assert len(seen) == 4  # of steps 0, 2 and 4, and with the last picture
    for text, steps in zip(seen, ("0 of 4", "2 of 4", "4 of 4", "4 of 4"), strict=True):
        assert f"<b>{steps}</b>" in text
    assert ["Finished ·" in text for text in seen] == [False] * 3 + [True]
    assert "step 2: red apple" in seen[1] and "after: cat face" in seen[3]
    said = capsys.readouterr().out
    assert f"all of it on a page: {tmp_path / 'r' / page.NAME}\n" in said
    assert "captions: 0 missing or empty, 0 cut" in seen[3]
    assert not list((tmp_path / "r").glob(".*.part"))


@pytest.mark.slow
def test_what_takes_time_is_told_once_each_also_where_a_run_was_killed(
    train, tmp_path, monkeypatch
):
    save = checkpoint.save_state

    def dying(kept):
        if kept.run.step == 4:
            raise Killed
        save(kept)

    monkeypatch.setattr(checkpoint, "save_state", dying)
    with pytest.raises(Killed):
        train("r", *SHOWN)
    monkeypatch.setattr(checkpoint, "save_state", save)
    assert train("r", *SHOWN) == 0
    told = events(tmp_path / "r")
    phases = {(each["step"], each["phase"]) for each in told if "phase" in each}
    twice = {(0, "start"), (0, "encoding"), (2, "start"), (2, "encoding"), (2, "the page")}
    assert phases == twice | {(s, p) for s in (0, 2, 4) for p in ("previews", "the page")} | {
        (s, "saving") for s in (2, 4)
    }
    assert all(each["seconds"] > 0 for each in told if "phase" in each)
    assert [each["step"] for each in told] == sorted(each["step"] for each in told)


@pytest.mark.slow
def test_an_error_of_the_page_is_said_once_and_costs_no_byte(train, tmp_path, monkeypatch, capsys):
    assert train("with") == 0
    before = capsys.readouterr().out
    monkeypatch.setattr(page, "contents", lambda out: open(f"{out}/no such file"))
    assert train("without") == 0
    said = "".join(capsys.readouterr())
    assert said.count(f"no {page.NAME}, and the run goes on: FileNotFoundError") == 1
    assert not (tmp_path / "without" / page.NAME).exists() and "on a page" not in said
    assert "on a page" in before and adapter(tmp_path / "with") == adapter(tmp_path / "without")
    losses = [[row["loss"] for row in log(tmp_path / name)] for name in ("with", "without")]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_preview_that_is_not_drawn_is_told_on_the_page(train, tmp_path, monkeypatch):
    monkeypatch.setattr("generate.sample", lambda *_: 1 / 0)
    assert train("r", *SHOWN) == 0
    assert "no preview of step 2, and the run goes on: ZeroDivisionError" in (
        (tmp_path / "r" / page.NAME).read_text()
    )


@pytest.mark.slow
def test_what_ended_a_run_is_told_on_its_page(train, tmp_path, monkeypatch):
    fit = training.loop.fit

    def refused(run):
        for told in fit(run):
            yield told
            if run.step == 3:
                raise Refusal("a <disk>", "another", "mend it")

    monkeypatch.setattr(training.loop, "fit", refused)
    assert train("r") == 1
    text = (tmp_path / "r" / page.NAME).read_text()
    assert "<b>3 of 4</b>" in text and "Not finished ·" in text
    assert "the run ended: a &lt;disk&gt;; expected another. What to do: mend it" in text
    monkeypatch.setattr(training.loop, "fit", fit)
    assert train("r") == 0
    assert "Finished ·" in (tmp_path / "r" / page.NAME).read_text()


def test_on_a_gpu_its_name_and_memory_are_told(tmp_path, monkeypatch):
    card = SimpleNamespace(name="Tesla T4", total_memory=15 * 2**30)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: card)
    run = SimpleNamespace(step=7, unet=SimpleNamespace(device=torch.device("cuda:0")))
    config = training.Config(output_dir=str(tmp_path), tensorboard=False)
    with training.report.Log(config, 0) as told:
        told.began(SimpleNamespace(run=run, encoding=2.0), "one\ntwo\n", 5.0)
    assert events(tmp_path) == [
        {"step": 7, "said": "one"},
        {"step": 7, "said": "two"},
        {"step": 7, "phase": "encoding", "seconds": 2.0},
        {"step": 7, "phase": "start", "seconds": 3.0},
        {"step": 7, "card": "Tesla T4", "gib": 15.0},
    ]


def test_a_full_disk_ends_no_run_for_the_sake_of_what_is_said(tmp_path, capsys):
    config = training.Config(output_dir=str(tmp_path), tensorboard=False)
    with training.report.Log(config, 0) as told:
        told.events.close()
        told.events = open("/dev/full", "ab", 0)
        told.say(1, "no preview")
    assert "no preview\n" in capsys.readouterr().out


def test_the_first_of_several_processes_makes_it_and_plain_makes_none(train, tmp_path):
    training.report.write_page(training.Config(output_dir=str(tmp_path)), first=False)
    with training.report.Log(training.Config(output_dir=str(tmp_path)), 0, speaks=False) as told:
        told.event(0, said="nothing")
    assert not list(tmp_path.iterdir())
    assert train("p", "--plain", "--max-train-steps", "1") == 0
    assert [path.name for path in (tmp_path / "p").iterdir()] == [
        "pytorch_lora_weights.safetensors"
    ]
