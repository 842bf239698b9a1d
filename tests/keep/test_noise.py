"""What the model's files say about its noise is obeyed or refused, and what they say wrongly is
found out before the first step; both commands, and the file between them, mean the same.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import generate
import loop
import lora
import model
from adapter_tools import drawable
from adapters import files
from conftest import POCKET, TINY_SDXL
from inputs.drawing import parse
from inputs.files import Refusal
from inputs.options import RECIPES
from keep import checkpoint, drawing, noise
from made import model_with
from runs import adapter
from tiny_run import assembled

EPSILON, V = noise.KINDS
CONFIG = replace(RECIPES["pocket"][1], pretrained_model_name_or_path=str(POCKET))


def model_saying(folder, part="scheduler", of=TINY_SDXL, index=None, **entries) -> str:
    """The model `of` with other entries in a part's config; None takes one away."""
    model_with(folder, part, of=of, **index or {})
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    config = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: each for key, each in config.items() if each is not None}))
    return str(folder)


def base(name: str) -> tuple[str, str]:
    return "--pretrained-model-name-or-path", name


# ---- what the files say --------------------------------------------------------------------------

OTHERS = {
    "EDM": ({"_class_name": "EDMEulerScheduler"}, "_class_name 'EDMEulerScheduler'"),
    "flow": (
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        "_class_name 'FlowMatchEulerDiscreteScheduler'",
    ),
    "flow sigmas": ({"use_flow_sigmas": True}, "use_flow_sigmas True"),
    "no betas": (dict.fromkeys(("beta_schedule", "beta_start", "beta_end")), "beta_start None"),
    "EDM in the index alone": (
        {"_class_name": None, "index": {"scheduler": ["diffusers", "EDMEulerScheduler"]}},
        "scheduler ['diffusers', 'EDMEulerScheduler']",
    ),
    "latents with a mean": (
        {"part": "vae", "latents_mean": [0.1, 0.2, 0.3, 0.4]},
        "latents_mean [0.1, 0.2, 0.3, 0.4]",
    ),
    "latents with a scale": ({"part": "vae", "latents_std": [1, 1, 1, 2]}, "latents_std"),
}


@pytest.mark.parametrize("entries, said", OTHERS.values(), ids=OTHERS)
def test_another_noise_is_refused_by_both_commands_before_anything_is_encoded(
    train, tmp_path, monkeypatch, capsys, entries, said
):
    name = model_saying(tmp_path / "m", **entries)
    monkeypatch.setattr(data, "examples_of", None)
    monkeypatch.setattr(generate, "encode", None)
    assert train("r", *base(name)) == 1
    assert said in (told := capsys.readouterr().err) and "; expected " in told
    assert drawing.main([str(drawable(tmp_path / "out")), *base(name)]) == 1
    assert said in (told := capsys.readouterr().err) and "; expected " in told


@pytest.mark.parametrize(
    "entries, said",
    [
        ({}, "epsilon (scheduler/scheduler_config.json says epsilon)"),
        ({"_class_name": None}, "epsilon (scheduler/scheduler_config.json says epsilon)"),
        (
            {"prediction_type": None},
            "epsilon (diffusers' default, since scheduler/scheduler_config.json does not say)",
        ),
    ],
)
def test_the_start_says_what_is_predicted_and_who_says_so(tmp_path, entries, said):
    name = model_saying(tmp_path / "m", **entries)
    schedule = model.load_noise_schedule(name, torch.device("cpu"))
    config = replace(CONFIG, pretrained_model_name_or_path=name)
    line = noise.judge(config, schedule.prediction_type, {})
    assert line == f"the UNet predicts {said}"


# ---- what the base does --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_base_that_does_not_predict_what_its_file_says_ends_the_run_unless_told_so(
    train, tmp_path, monkeypatch, capsys
):
    wrong = base(model_saying(tmp_path / "m", of=POCKET, prediction_type=V))
    assert train("wrong", *wrong) == 1
    told = capsys.readouterr().err
    assert f"the UNet predicts {V} (scheduler/scheduler_config.json says {V}), but" in told
    assert f"times nearer to {EPSILON}" in told and f"--prediction-type {EPSILON}" in told
    assert not (tmp_path / "wrong" / "checkpoints").exists()
    few = ("--max-train-steps", "1")
    assert train("told", *wrong, *few, "--prediction-type", EPSILON) == 0
    said = f"{EPSILON} (--prediction-type; scheduler/scheduler_config.json says {V})"
    assert f"the UNet predicts {said}\n" in capsys.readouterr().out
    monkeypatch.setattr(noise, "losses", lambda run: {})
    right = base(str(POCKET))  # a base whose file is right, and without the check
    assert train("right", *right, *few) == 0
    told, right = (lora.read(tmp_path / name).matrices for name in ("told", "right"))
    assert all(torch.equal(told[name], right[name]) for name in right)
    for path in (tmp_path / "told", tmp_path / "told" / "kohya"):
        about = files.read(path).about
        assert about["prediction_type"] == about["modelspec.prediction_type"] == EPSILON


@pytest.mark.slow
def test_who_asks_for_it_trains_it_and_is_told(train, tmp_path, capsys, monkeypatch):
    asked = (*base(str(POCKET)), "--prediction-type", V)
    assert train("r", *asked, "--max-train-steps", "1") == 0
    told = capsys.readouterr().out
    assert f"{V} (--prediction-type; scheduler/scheduler_config.json says {EPSILON}), but" in told
    state = checkpoint.newest_state(tmp_path / "r" / "checkpoints")
    assert state["losses"].keys() == {EPSILON, V} and state["identity"]["prediction_type"] == V

    def again(run):
        raise AssertionError("once a run is enough")

    monkeypatch.setattr(noise, "losses", again)
    before = adapter(tmp_path / "r")
    assert train("r", *base(str(POCKET))) == 1
    told = capsys.readouterr().err
    assert f"prediction_type {V}, and this command has prediction_type auto" in told
    assert adapter(tmp_path / "r") == before
    assert train("r", *asked, "--max-train-steps", "2") == 0
    assert "times nearer to" in capsys.readouterr().out


@pytest.mark.slow
def test_plain_trains_the_same_target_and_zero_terminal_snr(train, tmp_path):
    asked = ("--prediction-type", V, "--zero-terminal-snr", "yes", "--no-fused")
    asked += ("--max-train-steps", "2")
    assert train("plain", *asked, "--plain") == train("r", *asked) == 0
    plain, ours = lora.read(tmp_path / "plain"), lora.read(tmp_path / "r")
    assert all(torch.equal(plain.matrices[name], ours.matrices[name]) for name in ours.matrices)
    assert plain.about["prediction_type"] == ours.about["prediction_type"] == V
    assert plain.about["zero_terminal_snr"] == ours.about["zero_terminal_snr"] == "yes"


ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.slow
def test_zero_terminal_snr_by_option_is_the_run_of_a_model_that_says_so(train, tmp_path, capsys):
    few = ("--max-train-steps", "2", "--prediction-type", V)
    said = base(model_saying(tmp_path / "m", **ZERO))
    file = "scheduler/scheduler_config.json"
    assert train("asked", *few, "--zero-terminal-snr", "yes") == 0
    line = f", with zero terminal SNR (--zero-terminal-snr; {file} says no)"
    assert f"{line}\n" in capsys.readouterr().out.replace(", but the base", "\n")
    assert train("said", *few, *said) == 0
    assert f", with zero terminal SNR ({file} says yes)" in capsys.readouterr().out
    assert train("overruled", *few, *said, "--zero-terminal-snr", "no") == 0
    line = f", without zero terminal SNR (--zero-terminal-snr; {file} says yes)"
    assert line in capsys.readouterr().out
    assert train("usual", *few) == 0
    assert "zero terminal SNR" not in capsys.readouterr().out
    runs = ("asked", "said", "overruled", "usual")
    asked, theirs, overruled, usual = (lora.read(tmp_path / run).matrices for run in runs)
    for name in asked:
        assert torch.equal(asked[name], theirs[name]) and torch.equal(overruled[name], usual[name])
    assert any(not torch.equal(asked[name], usual[name]) for name in asked)
    for run, zero in zip(runs, ("yes", "yes", "no", "no"), strict=True):
        for path in (tmp_path / run, tmp_path / run / "kohya"):
            about = files.read(path).about
            assert about["zero_terminal_snr"] == zero
            assert about["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert train("asked", *few) == 1
    told = capsys.readouterr().err
    assert "zero_terminal_snr yes, and this command has zero_terminal_snr auto" in told


def sums(predicted: str, run) -> dict:
    """losses() of a UNet that predicts so, 0.1 of it noise."""
    both = {kind: replace(run.schedule, prediction_type=kind) for kind in noise.KINDS}

    def predict(unet, x_t, batch):
        assert len(x_t) <= run.config.train_batch_size and not torch.is_grad_enabled()
        x0 = batch["mean"] + batch["std"] * batch["eps"]
        assert torch.equal(x_t, model.add_noise(x0, batch["noise"], batch["t"], run.schedule))
        answer = model.training_target(x0, batch["noise"], batch["t"], both[predicted])
        return answer + 0.1**0.5 * torch.randn(x0.shape, generator=generator)

    generator = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "predict", predict)
        return noise.losses(run)


@pytest.mark.parametrize("kind", noise.KINDS)
def test_the_losses_are_the_mean_of_the_books_over_16_timesteps(tmp_path, monkeypatch, kind):
    run = assembled(tmp_path, train_batch_size=3)
    run.examples.names, run.latent_scaling = ["a.png"] * 8, (1.0, 0.0)
    monkeypatch.setattr(noise, "PICTURES", 8)  # as they are where no test runs before
    monkeypatch.setattr(noise, "TIMESTEPS", 16)
    taken = sums(kind, run)
    assert taken[kind][0] == pytest.approx(0.1, rel=0.05)
    s2 = 1 - run.schedule.alphas_cumprod[torch.arange(16) * 1000 // 16 + 31]
    means = {EPSILON: (s2 / (1 - s2)).mean().item(), V: s2.mean().item()}
    assert taken[kind][1] == pytest.approx(0.1 * means[kind], rel=0.15)
    (other,) = {*noise.KINDS} - {kind}
    assert f"predicts {kind} (" in noise.judge(CONFIG, kind, taken)
    with pytest.raises(Refusal, match=f"--prediction-type {kind}, or --prediction-type {other}"):
        noise.judge(CONFIG, other, taken)


def test_the_losses_are_of_the_bare_base_and_the_books_own(tmp_path, monkeypatch):
    run = assembled(tmp_path, train_batch_size=16)
    for layer in run.adapter.layers.values():
        layer.lora_B.data.fill_(1.0)
    monkeypatch.setattr(noise, "PICTURES", 8)  # as they are where no test runs before
    monkeypatch.setattr(noise, "TIMESTEPS", 16)
    taken = noise.losses(run)  # of the one picture that there is
    assert all(layer.strength == 1 for layer in run.adapter.layers.values())
    lora.set_strength(run.adapter, 0.0)
    one = run.examples.batch(range(1), run.unet.device)
    batch = {key: each.expand(16, *each.shape[1:]) for key, each in one.items()}
    batch |= {"t": (torch.arange(16) + 0.5).mul(62.5).long()}
    for kind in noise.KINDS:
        schedule = replace(run.schedule, prediction_type=kind)
        want = loop.diffusion_loss(run.unet, batch, schedule, run.latent_scaling).mean().item()
        assert taken[kind][0] == pytest.approx(want, rel=1e-5)
    # Random weights predict neither: nothing is said of them.
    assert all(each[0] > 0.5 * each[2] for each in taken.values())
    assert all("nearer" not in noise.judge(CONFIG, kind, taken) for kind in noise.KINDS)


@pytest.mark.parametrize(
    "mine, theirs, stops",  # the two errors; without an answer the loss would be 1
    [
        ([0.9, 20.0], [0.2, 0.2], True),
        ([0.9, 1.0], [0.2, 0.4], True),
        ([0.6, 1.0], [0.2, 0.4], False),  # 3 and 2.5 to 1
        ([0.2, 9.0], [0.9, 0.9], False),  # one error speaks for each
        ([5.0, 5.0], [0.6, 0.1], False),  # neither is a trained model's
        ([float("nan")] * 2, [float("nan")] * 2, False),  # which a step says, with its picture
        ([0.5, 0.5], [0.0, 0.0], True),
        ([1.09, 100.0], [0.48, 1.0, 0.48], False),  # random weights, whose answers are nothing
        ([1.09, 100.0], [0.2, 1.0, 0.48], True),
    ],
)
def test_what_stops_a_run(mine, theirs, stops):
    def judge(asked="auto"):
        config = replace(CONFIG, prediction_type=asked)
        return noise.judge(config, EPSILON, {EPSILON: [*mine, 1.0], V: [*theirs, 1.0]})

    assert ("nearer" in judge(EPSILON)) is stops
    if stops:
        with pytest.raises(Refusal, match=f"times nearer to {V}"):
            judge()
    else:
        assert "nearer" not in judge()


@pytest.mark.slow
def test_a_run_that_encodes_in_its_steps_is_checked_too(train, tmp_path, capsys):
    wrong = base(model_saying(tmp_path / "m", of=POCKET, prediction_type=V))
    assert train("r", *wrong, "--no-cache") == 1
    assert f"times nearer to {EPSILON}" in capsys.readouterr().err


# ---- what the adapter's file says ----------------------------------------------------------------


def draw(folder, *words: str) -> np.ndarray:
    quick = ("--prompts", "red apple", "--num-inference-steps", "2", "--resolution", "32")
    assert drawing.main([*words, *quick, "--output-dir", str(folder)]) == 0
    return np.asarray(Image.open(next(folder.glob("*.png")))).astype(int)


@pytest.mark.slow
def test_a_file_draws_by_what_it_was_trained_with_and_says_where_its_base_says_else(
    tmp_path, capsys
):
    run, plain = drawable(tmp_path / "v", prediction_type=V), drawable(tmp_path / "plain")
    said = f"drawing with {V}: {TINY_SDXL} itself says {EPSILON}"
    by_file = draw(tmp_path / "a", str(run / "kohya" / "v.safetensors"))
    assert said in capsys.readouterr().out
    asked = draw(tmp_path / "b", str(plain), "--prediction-type", V)
    assert said in capsys.readouterr().out
    bare = draw(tmp_path / "c", str(plain))
    overruled = draw(tmp_path / "d", str(run), "--prediction-type", EPSILON)
    other_base = draw(tmp_path / "e", str(run), "--any-base")  # whose own file knows it
    assert "drawing with" not in capsys.readouterr().out
    assert np.array_equal(by_file, asked) and np.abs(by_file - bare).mean() > 10
    assert np.array_equal(bare, overruled) and np.array_equal(bare, other_base)
    quick = ("--num-inference-steps", "1", "--resolution", "32", "--prompts", "a")
    generate.draw_plain(parse(["--plain", str(run), *quick]))
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_a_file_of_zero_terminal_snr_is_drawn_so_with_guidance_rescaled(tmp_path, capsys):
    run = drawable(tmp_path / "z", zero_terminal_snr="yes")
    by_file = draw(tmp_path / "a", str(run))
    assert f"drawing with zero terminal SNR: {TINY_SDXL} itself says otherwise" in (
        capsys.readouterr().out
    )
    with Image.open(next((tmp_path / "a").glob("*.png"))) as picture:
        assert "CFG rescale: 0.7, " in picture.info["parameters"]
    asked = ("--zero-terminal-snr", "yes", "--guidance-rescale", "0.7")
    plain = drawable(tmp_path / "plain", zero_terminal_snr="no")
    assert np.array_equal(draw(tmp_path / "b", str(plain), *asked), by_file)
    off = draw(tmp_path / "c", str(run), "--guidance-rescale", "0")
    bare = draw(tmp_path / "d", str(plain))
    assert np.abs(off - by_file).mean() > 0.1 and np.abs(off - bare).mean() > 1
    said = model_saying(tmp_path / "m", **ZERO)
    capsys.readouterr()
    of_base = draw(tmp_path / "e", str(drawable(tmp_path / "old")), *base(said))
    assert np.array_equal(of_base, by_file) and "drawing with" not in capsys.readouterr().out
    assert drawing.main([str(drawable(tmp_path / "x", zero_terminal_snr="x"))]) == 1
    assert "zero_terminal_snr 'x'; expected auto or yes or no" in capsys.readouterr().err


def test_a_file_that_says_what_nothing_predicts_is_refused(tmp_path, capsys):
    run = drawable(tmp_path / "out", prediction_type="sample")
    assert drawing.main([str(run)]) == 1
    told = capsys.readouterr().err
    assert "prediction_type 'sample'; expected auto or epsilon or v_prediction" in told
    assert "give --prediction_type yourself" in told
