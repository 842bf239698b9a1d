"""The adapter files are what was trained, or are refused; a finished run stays finished."""

import dataclasses
import json

import pytest
import torch

import lora
from adapters import files, foreign, kinds
from inputs import code
from inputs.files import Refusal
from inputs.options import RECIPES
from keep import export, identity
from tiny_run import assembled, keep, step


@pytest.fixture
def trained(tmp_path, request):
    return step(keep(assembled(tmp_path / "run", **getattr(request, "param", {})), vector=True), 2)


@pytest.mark.parametrize("trained", [{}, {"save_dtype": "fp16"}], indirect=True)
def test_both_files_hold_what_was_trained_and_leave_the_run_as_it_was(trained):
    trained.code_changes = "code changed after step 1: loop.f"
    before = {name: each.clone() for name, each in trained.run.trained.items()}
    paths = export.export(trained)
    assert [path.parent.name for path in paths] == ["run", "kohya"]
    for path in paths:
        about = files.read(path).about
        assert (
            about["code_changes"] == "code changed after step 1: loop.f" and about["steps"] == "2"
        )
    assert all(torch.equal(each, before[name]) for name, each in trained.run.trained.items())


def test_an_adapter_that_did_not_move_or_does_nothing_is_refused(tmp_path):
    kept = keep(assembled(tmp_path))
    with pytest.raises(Refusal, match="did not move"):
        export.export(kept)
    name = next(iter(kept.run.trained))
    kept.run.trained[name].data += 1  # an A alone: every B is zero
    with pytest.raises(Refusal, match="did not move"):
        export.export(kept)


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_a_file_that_is_not_what_was_trained_is_refused_and_the_run_left_alone(
    trained, monkeypatch, layout
):
    write = files.save

    def wrong(adapter, path, kind, *rest):
        last = list(adapter.matrices().values())[-1]
        last.data[0, 0] += 2 * (kind == layout)
        write(adapter, path, kind, *rest)
        last.data[0, 0] -= 2 * (kind == layout)

    monkeypatch.setattr(export.files, "save", wrong)
    with pytest.raises(Refusal, match="read back, gives another UNet"):
        export.export(trained)


def test_what_no_file_can_hold_stays_in_place_while_files_are_read_back(tmp_path, monkeypatch):
    def gated(self, x):
        return self.base(x) + self.gate * self.scale * self.up(self.down(x))

    made = lora.LoRALinear.__init__

    def with_gate(self, *rest):
        made(self, *rest)
        self.gate = torch.nn.Parameter(torch.ones(self.out_features))

    monkeypatch.setattr(lora.LoRALinear, "__init__", with_gate)
    monkeypatch.setattr(lora.LoRALinear, "forward", gated)
    kept = step(keep(assembled(tmp_path / "run"), vector=True), 2)
    gates = [each for name, each in kept.run.trained.items() if name.endswith("gate")]
    assert len(export.export(kept)) == 2
    assert gates and all((gate != 1).any() for gate in gates)


def test_a_finished_run_says_so_and_names_other_code_but_not_for_changed_files(
    trained, monkeypatch, tmp_path
):
    config = trained.run.config
    monkeypatch.setattr(export, "place", lambda _: tmp_path / "none")  # no base and no pictures
    trained.identity |= {"dtype": "torch.float32"} | identity.fixed_options(config)
    trained.identity["start_from"] = ""
    trained.code = code.digests()
    enough = dataclasses.replace(config, max_train_steps=2)
    assert export.finished(enough) == ""
    (path, _) = export.export(trained)
    export.mark_finished(trained)
    note = json.loads((config.out / "finished.json").read_text())
    assert note["code"] == code.digests() and "commit" in note
    assert export.finished(enough).startswith(f"{config.out} is finished: 2 steps on ")
    assert export.finished(config) == ""  # which asks for more steps
    note["code"]["loop.diffusion_loss"] = "other"
    (config.out / "finished.json").write_text(json.dumps(note))
    said = export.finished(enough)
    assert f"{config.out} is finished, by other code (loop.diffusion_loss): 2 steps" in said
    with pytest.raises(Refusal, match="holds a run with seed"):
        export.finished(dataclasses.replace(enough, seed=7))
    path.write_bytes(b"cut")
    assert export.finished(enough) == ""


@pytest.mark.parametrize("note", ["[]", "{}", "5", "null", '{"files": {}}', "{"])
def test_a_finished_json_that_is_not_ours_is_as_none(tmp_path, note):
    (tmp_path / "finished.json").write_text(note)
    assert (
        export.finished(dataclasses.replace(RECIPES["pocket"][1], output_dir=str(tmp_path))) == ""
    )


@pytest.mark.slow
def test_as_lora_is_of_the_last_step_and_not_of_the_running_mean(train, tmp_path, capsys):
    """LoHa of rank 2 has at most rank 4, so nothing is lost."""
    asked = ("--adapter", "loha", "--lora-rank", "2", "--as-lora", "4", "--ema-decay", "0.5")
    assert train("r", *asked, "--preview-steps", "0") == 0
    assert "as LoRA of rank 4: nothing of it is lost" in capsys.readouterr().out
    whole = []
    for folder in ("", "as-lora", "ema"):
        found = foreign.read(tmp_path / "r" / folder / lora.FILE_NAME).corrections
        parts = [c.parts for c in found]
        tall = [p["hada_w1_a"] if "hada_w1_a" in p else p["lora_B"] for p in parts]
        wide = [p["hada_w1_b"] if "hada_w1_a" in p else p["lora_A"] for p in parts]
        shapes = [(len(a), b.shape[1]) for a, b in zip(tall, wide, strict=True)]
        scales = [c.alpha / c.rank for c in found]
        pairs = zip(parts, shapes, scales, strict=True)
        whole.append(torch.cat([k * kinds.product(p, s).flatten() for p, s, k in pairs]))
    last, made, mean = (each.norm() for each in whole)
    assert abs(made - last) < 1e-3 * last < abs(mean - last)
