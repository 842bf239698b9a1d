"""Previews: what is drawn when, that the run is the same with them, and that none ends it."""

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import model
from conftest import ink_rows, trainer, write_pictures
from inputs import drawing
from inputs.files import Refusal
from inputs.options import parse
from keep import training
from runs import Killed, adapter, log, matrices
from see import preview

pytestmark = pytest.mark.slow

# Two steps of one prompt: long enough to be a picture.
SHOWN = ("--preview-prompts", "red apple", "--preview-steps", "2")
CPU = torch.device("cpu")


def pictures(folder) -> list[str]:
    return sorted(path.name for path in (folder / "pictures").glob("*.png"))


def drawn(step: int) -> str:
    return f"{step:06d}-00-red-apple-42.png"


# ---- the run is the same -------------------------------------------------------------------------


def test_a_run_with_previews_is_the_run_without_to_the_byte(train, tmp_path, monkeypatch, capsys):
    """Also where the memory of a GPU is full in one of them, which loses no step."""
    assert train("without", SHOWN[0], "red apple", "--preview-steps", "0") == 0
    assert "1 preview" not in capsys.readouterr().out and pictures(tmp_path / "without") == []
    sample, calls = generate.sample, []

    def full_once(*how):
        calls.append(how)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return sample(*how)

    monkeypatch.setattr(generate, "sample", full_once)
    assert train("with", *SHOWN) == 0
    said = capsys.readouterr()
    assert (
        "1 preview, 3 times, in " in said.out
        and "about 0.5 training steps, in all 37.5%" in said.out
    )
    assert "for less: a larger --checkpointing-steps" in said.out
    told = "no preview of step 2, and the run goes on: OutOfMemoryError: CUDA out of memory.; to"
    assert told in said.out + said.err and "--preview-steps 0\n" in said.out + said.err
    assert pictures(tmp_path / "with") == [drawn(0), drawn(4)]
    assert adapter(tmp_path / "with") == adapter(tmp_path / "without")
    states = [matrices(tmp_path / name) for name in ("with", "without")]
    assert all(each.equal(states[1][name]) for name, each in states[0].items())
    losses = [[row["loss"] for row in log(tmp_path / name)] for name in ("with", "without")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    shown = [Image.open(tmp_path / "with/pictures" / drawn(step)) for step in (0, 4)]
    about = shown[1].info["parameters"]
    assert (
        about.startswith("red apple\nSteps: 2") and "Lora steps: 4, Seed: 42, Size: 64x64" in about
    )
    one, other = map(np.asarray, shown)
    assert one.shape == (64, 64, 3) and not np.array_equal(one, other)


def test_a_preview_is_what_generate_draws_with_that_checkpoint(train, tmp_path):
    """The run computes with its layers fused: a pixel may round to the next number."""
    assert train("r", *SHOWN, "--keep-adapters") == 0
    out = tmp_path / "r"
    words = [str(out / "adapters/000002.safetensors"), "--prompts", "red apple", "--seeds", "42"]
    words += ["--resolution", "64", "--num-inference-steps", "2", "--guidance-scale", "2"]
    generate.draw_plain(drawing.parse([*words, "--plain", "--output-dir", str(tmp_path)]))
    one = np.asarray(Image.open(tmp_path / "00-red-apple-42-1.png"), int)
    assert np.abs(one - np.asarray(Image.open(out / "pictures" / drawn(2)), int)).max() <= 1


def test_a_preview_and_the_held_out_loss_are_in_tensorboard(train, tmp_path):
    held = write_pictures(tmp_path / "held", ink_rows(12)[6:])
    assert train("r", *SHOWN, "--tensorboard", "--validation-data", str(held)) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    assert [each.step for each in board.Images("00-red-apple-42")] == [0, 2, 4]
    bands = [f"held-out loss less the bare model's {band}".strip() for band in ("", *range(1, 6))]
    assert {*bands, "held-out loss", "loss"} <= {*board.Tags()["scalars"]}
    assert board.Scalars(bands[0])[0].value == 0


# ---- once each, also where a run goes on ---------------------------------------------------------


def test_a_run_that_goes_on_draws_nothing_twice(train, tmp_path, monkeypatch):
    """Nor is the picture lost of a run that was killed between saving and drawing."""
    made, draw, sample = [], preview.Previews.draw, generate.sample

    def dying(self, run, show, **lacking):
        if run.step == 2:
            raise Killed
        draw(self, run, show, **lacking)

    monkeypatch.setattr(preview.Previews, "draw", dying)
    with pytest.raises(Killed):
        train("r", *SHOWN)
    assert pictures(tmp_path / "r") == [drawn(0)]
    monkeypatch.setattr(preview.Previews, "draw", draw)
    monkeypatch.setattr(generate, "sample", lambda *how: made.append(1) or sample(*how))
    first = (tmp_path / "r/pictures" / drawn(0)).stat().st_mtime_ns
    assert train("r", *SHOWN) == 0
    assert pictures(tmp_path / "r") == [drawn(0), drawn(2), drawn(4)] and len(made) == 2
    assert (tmp_path / "r/pictures" / drawn(0)).stat().st_mtime_ns == first


# ---- none of them ends a run ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory, few, cache):
    """A run at its first step, as the command sets it up; what it says of previews is kept."""
    command = trainer(tmp_path_factory.mktemp("begun"), few, cache).argv("r", *SHOWN)
    kept, _ = training.set_up(parse(command), CPU)
    kept.said = []
    kept.previews.say = kept.said.append
    return kept


def test_drawing_leaves_random_numbers_and_the_mode_of_every_layer(begun):
    run, shown = begun.run, []
    next(iter(run.adapter.layers.values())).train()  # as an edited layer may be, in a UNet that
    modes = [module.training for module in run.unet.modules()]  # is not
    before = torch.get_rng_state()
    begun.previews.draw(run, lambda *picture: shown.append(picture))
    assert torch.get_rng_state().equal(before)
    assert modes == [module.training for module in run.unet.modules()] and any(modes)
    assert [(name, step) for name, _, step in shown] == [("00-red-apple-42", 0)]
    assert begun.said == []


@pytest.mark.parametrize(
    ("owner", "name", "gives", "said"),
    [
        (
            generate,
            "sample",
            lambda *_: torch.full((1, 4, 8, 8), torch.nan),
            "a picture came out as",
        ),
        (preview, "write_whole", OSError(28, "No space left on device"), "No space left on device"),
        (model, "load_vae", RuntimeError("no kernel"), "RuntimeError: no kernel"),
        (generate, "sample", AssertionError(), "AssertionError"),  # of an edit, say: without words
    ],
    ids=["NaN", "disk", "VAE", "edit"],
)
def test_what_goes_wrong_with_a_preview_is_one_line(begun, monkeypatch, owner, name, gives, said):
    def fails(*_):
        raise gives

    begun.said.clear()
    modes = [module.training for module in begun.run.unet.modules()]
    monkeypatch.setattr(owner, name, fails if isinstance(gives, Exception) else gives)
    begun.previews.draw(begun.run, print)
    (line,) = begun.said
    assert line.startswith("no preview of step 0, and the run goes on: ") and said in line
    assert "\n" not in line and modes == [m.training for m in begun.run.unet.modules()]


def test_prompts_that_cannot_be_encoded_are_said_and_the_run_goes_on(monkeypatch):
    def fails(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    told, config = [], parse(["pocket", "--no-cache"])
    monkeypatch.setattr(generate, "encode", fails)
    how = {"decode": None, "room": contextlib.nullcontext}
    wanted = preview.wanted(config, ["a"])
    got = preview.made(config, wanted, CPU, torch.float32, told.append, **how)
    said = "no previews, and the run goes on: OutOfMemoryError: CUDA out of memory."
    assert got.previews == [] and said in told[0]


# ---- what is asked for ---------------------------------------------------------------------------


def asked(*words: str) -> list:
    return drawing.previews(parse(["t4", *words]), ["a house", "a boat"])


def test_by_default_one_prompt_is_drawn_at_the_training_size():
    (one,) = asked("--resolution", "512", "768", "--seed", "7")
    assert (one.prompts, one.seeds, one.width, one.height) == (("a house",), (7,), 768, 768)
    assert one.num_inference_steps == 12 and one.guidance_scale == 5
    assert asked("--preview-steps", "0") == [] == asked("--preview-steps", "0", SHOWN[0], "a fox")
    assert drawing.previews(parse(["t4"]), []) == []


def test_a_file_of_prompts_has_kohyas_marks(tmp_path):
    file = tmp_path / "prompts.TXT"
    text = "\ufeff# drawn\na fox, red --n blurry, dark --d 7 --w 768 --h 256 --s 9 --l 1.5\n\n"
    file.write_text(f"{text} a -- b --2\n--n dark\n")
    first, second, third = asked(SHOWN[0], str(file))
    assert (first.prompts, first.negative_prompt) == (("a fox, red",), "blurry, dark")
    assert (first.seeds, first.width, first.height) == ((7,), 768, 256)
    assert (first.num_inference_steps, first.guidance_scale) == (9, 1.5)
    assert second.prompts == ("a -- b --2",) and second.seeds == (42,) and second.width == 512
    assert third.prompts == ("",) and third.negative_prompt == "dark"
    assert asked(SHOWN[0], "x --d 3", "y")[0].seeds == (3,)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["a --q 3", "b --seed 4"], ["--q 3 in 'a --q 3' and --seed 4 in 'b --", "--n and words"]),
        (["a --w 7", "a --d many"], ["--w 7 in 'a --w 7'", "--d many in", "and a number"]),
        (["none.txt"], ["none.txt cannot be read"]),
        ([""], ["no prompt for previews"]),
    ],
)
def test_marks_that_are_not_known_are_refused_by_name(lines, said):
    with pytest.raises(Refusal) as refusal:
        asked(SHOWN[0], *lines)
    assert all(each in str(refusal.value) for each in said)


def test_a_wrong_mark_is_refused_before_anything_is_encoded(train, tmp_path, capsys):
    assert train("r", SHOWN[0], "a fox --q 1") == 1
    assert "--q 1 in 'a fox --q 1'" in capsys.readouterr().err
    assert not (tmp_path / "r" / "config.json").exists()


def test_a_sampler_that_adds_noise_is_tried_without_the_random_numbers_of_others(monkeypatch):
    config = parse(["pocket", "--no-cache"])
    monkeypatch.setattr(generate, "encode", lambda *_: [])
    load = preview.vetting.load_sampler
    ancestral = "EulerAncestralDiscreteScheduler"
    monkeypatch.setattr(
        preview.vetting, "load_sampler", lambda n, _, *how: load(n, ancestral, *how)
    )
    before, wanted = torch.get_rng_state(), preview.wanted(config, ["a"])
    how = {"decode": None, "room": contextlib.nullcontext}
    got = preview.made(config, wanted, CPU, torch.float32, print, **how)
    assert type(got.sampler).__name__ == ancestral and torch.get_rng_state().equal(before)


def test_each_has_its_own_negative_prompt():
    config = parse(["pocket", SHOWN[0], "red apple --n grey", "red apple"])
    how = {"decode": None, "room": contextlib.nullcontext}
    wanted = preview.wanted(config, [])
    one, other = preview.made(config, wanted, CPU, torch.float32, print, **how).embeddings
    assert not one["context"][0].equal(other["context"][0])
    assert one["context"][1].equal(other["context"][1])


def test_a_distilled_base_has_its_own_steps_unless_others_are_asked_for(monkeypatch):
    monkeypatch.setattr(drawing, "sampler_of", lambda name: "LCMScheduler")
    for words, want in (([], (8, 1.0)), (["--preview-steps", "9"], (9, 1.0))):
        (one,) = preview.wanted(parse(["pocket", *words]), ["a"])
        assert (one.num_inference_steps, one.guidance_scale) == want


def test_how_often_and_how_much_of_a_run_they_are():
    config = parse(["t4", "--max-train-steps", "450"])
    assert [drawing.times(config, step) for step in (0, 1, 200, 437)] == [4, 3, 2, 1]
    one = drawing.previews(config, ["a"])
    assert drawing.steps_worth(config, one) == 12 * 2 / (2 * 4)
    assert "in all 2.7% of the run" in preview.describe(config, one, 0)
    assert preview.describe(config, [], 0) == ""
