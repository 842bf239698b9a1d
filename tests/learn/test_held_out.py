"""Held-out pictures: which they are, at which timesteps, and what their loss says."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny_run
from conftest import INK, ink_rows, write_pictures
from inputs.files import Refusal
from inputs.options import RECIPES, parse
from inputs.sources import Picture, Pictures
from keep.faster import Alone
from learn import held_out
from learn.judge import Judge, sizes

POCKET = RECIPES["pocket"][1]


def pictures(count: int) -> Pictures:
    return Pictures(Picture(f"{i}.png", ("",), f"content {i}", bytes) for i in range(count))


# ---- which pictures ------------------------------------------------------------------------------


def test_a_share_is_chosen_by_content_and_seed_alone():
    of = pictures(40)
    names = {p.name for p in held_out.split(of, 0.25, 1)}
    assert len(names) == 10
    assert {p.name for p in held_out.split(Pictures(of[::-1]), 0.25, 1)} == names
    assert {p.name for p in held_out.split(of, 0.25, 2)} != names
    twice = Pictures([*of, *(replace(p, name=f"again {p.name}") for p in of)])
    both = {p.name for p in held_out.split(twice, 0.25, 1)}
    assert both == names | {f"again {name}" for name in names}  # on one side, both of them


def test_a_share_is_left_out_of_training_and_told():
    everything, trained, held = held_out.chosen(parse(["pocket", "--validation-share", "0.05"]))
    assert (len(everything), len(trained), len(held)) == (160, 152, 8)
    assert not {p.digest for p in trained} & {p.digest for p in held}
    assert trained.notes[-1].startswith("8 held out, not trained on: 'brown-circle.png', ")
    _, trained, held = held_out.chosen(parse(["pocket"]))
    assert [p.name for p in trained] == [p.name for p in everything] and held == []


def test_what_a_folder_holds_out_is_not_trained_on_either(tmp_path):
    folder = write_pictures(tmp_path / "held", ink_rows(5))
    words = ["pocket", "--dataset-name", str(INK), "--validation-data", str(folder)]
    everything, trained, held = held_out.chosen(parse(words))
    assert (len(everything), len(trained), len(held)) == (160, 155, 5)


def test_a_picture_of_both_sets_is_not_trained_on_and_all_of_them_are_too_many(tmp_path):
    few = write_pictures(tmp_path / "few", ink_rows(6))
    held = write_pictures(tmp_path / "held", ink_rows(5)[1:])
    words = ["pocket", "--dataset-name", str(few), "--validation-data"]
    _, trained, _ = held_out.chosen(parse([*words, str(held)]))
    told = [note for note in trained.notes if "since they are held out, too" in note]
    assert (
        len(trained) == 2
        and len(told) == 1
        and all(json.loads(row)["file_name"] in told[0] for row in ink_rows(5)[1:])
    )
    with pytest.raises(Refusal, match="every picture is held out; expected some to train on"):
        held_out.chosen(parse([*words, str(few)]))


@pytest.mark.parametrize("asked", ["share", "data"])
def test_fewer_than_four_are_refused_with_the_number(tmp_path, asked):
    words = ["pocket", "--validation-share", "0.02"]
    if asked == "data":
        words[1:] = ["--validation-data", str(write_pictures(tmp_path / "held", ink_rows(3)))]
    with pytest.raises(Refusal, match=r"3 held-out pictures, of .*; expected 4 or more") as refusal:
        held_out.chosen(parse(words))
    remedy = refusal.value.parts[2]
    assert remedy == "more in --validation-data" if asked == "data" else "share 0.03" in remedy
    if asked == "share":  # what it says to type is taken
        assert len(held_out.chosen(parse(["pocket", *remedy.split()]))[2]) >= 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--validation-share", "0.1", "--validation-data", "x"], "with --validation-data"),
        (["--validation-steps", "5"], "alone; expected held-out pictures"),
        (["--stop-when-worse"], "alone; expected held-out pictures"),
        (["--validation-share", "0.6"], "validation_share is 0.6"),
        (["--validation-share", "0.1", "--plain"], "--plain with --validation-share"),
    ],
)
def test_what_does_not_go_together_is_refused(words, said):
    with pytest.raises(Refusal) as refusal:
        parse(["pocket", *words])
    assert said in str(refusal.value)


# ---- how often, at which timesteps ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "count", "every", "measured", "k"),
    [
        ("pocket", 8, 45, 8, 4),
        ("t4", 61, 200, 40, 1),
        ("t4", 12, 100, 12, 1),
        ("t4", 500, 200, 40, 1),
    ],
)
def test_the_budget_decides_how_many_pictures_are_measured_and_how(
    recipe, count, every, measured, k
):
    plan = held_out.plan(RECIPES[recipe][1], count)
    assert (plan["every"], plan["pictures"], plan["timesteps"]) == (every, measured, k)
    assert 0.01 < plan["share"] <= held_out.BUDGET


def test_each_band_has_two_pictures_whatever_the_budget():
    few = replace(POCKET, max_train_steps=4)
    assert held_out.plan(few, 4)["timesteps"] == 3 and held_out.plan(few, 99)["pictures"] == 10


class Latents:
    """A source of the tiny UNet's latents, by picture."""

    captions_of = [range(i, i + 1) for i in range(6)]

    def latent(self, index, flip):
        g = torch.Generator().manual_seed(index)
        mean, std = torch.randn(4, 8, 8, generator=g), torch.rand(4, 8, 8, generator=g)
        return mean, std, torch.tensor([512.0, 683, 0, 85, 512, 512])

    def prompt(self, index):
        g = torch.Generator().manual_seed(index)
        return torch.randn(7, 48, generator=g), torch.randn(24, generator=g)


def drawings(count: int = 6) -> held_out.data.Examples:
    chances = held_out.data.Chances()
    names = [f"{i}.png" for i in range(count)]
    return held_out.data.Examples(Latents(), names, [(64, 64)] * count, 2, 42, chances, 1000)


def examples(count: int = 6, k: int = 5) -> held_out.HeldOut:
    return held_out.HeldOut(drawings(count), count, k)


def test_of_many_pictures_the_seed_picks_those_that_are_measured(tmp_path):
    held, every = held_out.HeldOut(drawings(6), 4, 5), examples(6, 5)
    shown = [held.example(number).picture for number in range(20)]
    assert len({*shown}) == 4 and shown == np.repeat(held.picked, 5).tolist()
    assert [every.example(number).picture for number in range(0, 30, 5)] == list(range(6))
    kept = tiny_run.keep(tiny_run.assembled(tmp_path))
    assert len(held.losses(kept.run, Alone())) == 20
    assert sorted(n for each in held.passes for n in each) == list(range(20))


def test_timesteps_are_at_equal_distances_and_each_picture_has_one_in_each_part():
    held = examples(6, 5)
    assert np.diff(np.sort(held.t.ravel())).max() <= 34  # 1000 / 30
    assert (held.t * 5 // 1000 == np.arange(5)).all()
    assert (held.bands == np.arange(5)).all()
    for k in (1, 2, 3):  # two pictures in each band at the least, where there are ten numbers
        bands = examples(6, k).bands
        assert k == 1 or all((bands == band).any(1).sum() >= 2 for band in range(5))


class Shared(Alone):
    """One of several processes, whose sum is given by hand."""

    def __init__(self, rank, size):
        self.rank, self.size, self.parts = rank, size, []

    def share(self, numbers):
        n = len(numbers)
        return numbers[self.rank * n // self.size : (self.rank + 1) * n // self.size]


def test_the_same_weights_have_the_same_loss_however_it_is_cut_and_when_it_is_taken(tmp_path):
    kept = tiny_run.keep(tiny_run.assembled(tmp_path))
    held = examples()
    held.passes = held_out.cut(list(range(30)), 8)
    alone = held.losses(kept.run, Alone())
    assert held.losses(kept.run, Alone()) == alone and min(alone) > 0
    parts = [held.losses(kept.run, Shared(rank, 3)) for rank in range(3)]
    assert [sum(each) for each in zip(*parts, strict=True)] == alone
    kept.run.config = replace(kept.run.config, train_batch_size=1, gradient_accumulation_steps=2)
    assert held.losses(kept.run, Alone()) == alone
    before = torch.get_rng_state()
    tiny_run.step(kept, 1)
    assert held.losses(kept.run, Alone()) != alone and torch.get_rng_state().equal(before)


# ---- what it says --------------------------------------------------------------------------------


def judge(tmp_path, rows: dict[int, list[float]]) -> Judge:
    run = tiny_run.assembled(tmp_path)
    run.examples.num_train_timesteps = 1000
    made = Judge(run, Alone(), {"rows": rows}, None, None)
    made.held_out = examples(4, 5)
    return made


def test_differences_are_paired_by_picture_and_by_band(tmp_path):
    bare = np.arange(20.0)  # how hard a picture is drops out
    change = np.array([[1.0, 2, 3, 4, 5], [1, 2, 3, 4, 7], [3, 2, 3, 4, 5], [3, 2, 3, 4, 7]])
    told = judge(tmp_path, {0: bare.tolist(), 10: (bare + change.ravel()).tolist()}).against(10)
    each = change.mean(1)
    assert told[0] == pytest.approx((each.mean(), each.std(ddof=1) / 2))
    assert [mean for mean, _ in told[1:]] == pytest.approx([2, 2, 3, 4, 6])
    errors = [2 / 3**0.5 / 2, 0, 0, 0, 2 / 3**0.5 / 2]
    assert [error for _, error in told[1:]] == pytest.approx(errors)


def test_the_lowest_is_best_and_a_rise_is_three_in_a_row_beyond_its_error(tmp_path):
    noise = np.random.default_rng(0).normal(size=20) * 0.001
    at = lambda level, spread=1.0: (level + spread * noise).tolist()  # noqa: E731
    rows = {0: at(9), 10: at(3), 20: at(2), 30: at(2.5, 2), 40: at(2.5, 3), 50: at(2.5, 4)}
    assert judge(tmp_path, rows).best == 20 and judge(tmp_path, rows).risen
    assert not judge(tmp_path, {s: rows[s] for s in (0, 10, 20, 30, 40)}).risen
    assert not judge(tmp_path, rows | {50: at(2.5, 900)}).risen  # within its error
    assert not judge(tmp_path, rows | {60: at(1)}).risen
    assert judge(tmp_path, {0: at(1)}).best is None
    assert judge(tmp_path, rows | {10: [float("nan")] * 20}).best == 20
    told = judge(tmp_path, rows).verdict()
    assert told.startswith("lowest held-out loss: step 20, -7.0000 ± 0.0000 to the bare model's")
    assert "; the last is 0.4995 higher, " in told and "style may still have sharpened" in told


# ---- pictures that fit worst, and the adapter's size ---------------------------------------------


def test_a_pictures_loss_is_held_against_what_is_usual_at_its_timesteps(tmp_path):
    found = judge(tmp_path, {})
    names = found.run.examples.names = ["easy", "hard", "late", "never"]
    fits = torch.zeros(2, 4, 5, dtype=torch.float64)
    fits[1, :3] = torch.tensor([[4, 4, 0, 0, 0], [4, 4, 0, 0, 0], [0, 0, 0, 0, 8.0]])
    fits[0, :3] = torch.tensor([[4, 8, 0, 0, 0], [12, 24, 0, 0, 0], [0, 0, 0, 0, 80.0]])
    found.known["fits"] = fits
    # the late one has the largest losses, and they are usual where it was drawn
    assert found.fit_worst() == pytest.approx({"hard": 1.5}) and len(names) == 4
    assert found.worst().endswith(
        "hard 1.50 (fewer than ten losses of each are known: much of it is chance)"
    )
    found.known["fits"] = 3 * fits
    assert found.worst().endswith("hard 1.50")


def test_the_losses_of_a_steps_examples_are_the_runs_own(tmp_path):
    """Their mean is the loss that the step has; and the step is the same to the bit."""
    run, other = tiny_run.assembled(tmp_path), tiny_run.assembled(tmp_path)
    run.examples.num_train_timesteps = 1000
    run.examples.decks = type("Decks", (), {"picture": staticmethod(lambda i: 0)})
    found = Judge(run, Alone(), {}, None, None)
    one, same = tiny_run.loop.optimizer_step(run), tiny_run.loop.optimizer_step(other)
    found.after_step()
    losses, counts = found.known["fits"]
    assert one == same and counts.sum() == 2
    assert losses.sum().item() / 2 == pytest.approx(one[0], rel=1e-6)
    assert not found.of_step.any()


def test_a_loss_of_one_number_for_a_pass_is_trained_and_judged_by_no_picture(tmp_path):
    run = tiny_run.assembled(tmp_path)
    run.examples.num_train_timesteps = 1000
    run.examples.decks = type("Decks", (), {"picture": staticmethod(lambda i: 0)})
    own = run.loss
    run.loss = lambda *args: own(*args).sum()
    found = Judge(run, Alone(), {}, None, None)
    loss, _ = tiny_run.loop.optimizer_step(run)
    found.after_step()
    assert loss > 0 and found.fit_worst() == {}
    assert found.worst().startswith("which pictures fit worst is not known")


def test_a_held_out_loss_of_one_number_for_a_pass_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(held_out.loop, "diffusion_loss", lambda *_: torch.tensor(1.0))
    run = tiny_run.assembled(tmp_path)
    held = held_out.HeldOut(drawings(4), 4, 2)
    monkeypatch.setattr(held, "batch", lambda numbers, device: {})
    with pytest.raises(Refusal, match=r"diffusion_loss\(\) gives \(\) for 8 examples"):
        held.losses(run, Alone())


def test_one_process_is_a_team_of_itself():
    with Alone() as team:
        assert team.first and team.start("cpu") == "cpu"


def test_sizes_are_those_of_the_products(tmp_path):
    run = tiny_run.assembled(tmp_path)
    assert set(sizes(run.adapter, torch.float32).values()) == {0.0}
    g = torch.Generator().manual_seed(0)
    squares: dict[str, list[float]] = {}
    with torch.no_grad():
        for name, layer in run.adapter.layers.items():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=g))
            branch = layer.scale * layer.lora_B @ layer.lora_A
            of = squares.setdefault(name.split(".transformer_blocks")[0], [0.0, 0.0])
            of[0] += branch.square().sum().item()
            of[1] += layer.base.weight.square().sum().item()
    found = sizes(run.adapter, torch.float32)
    assert found == pytest.approx({k: (a / b) ** 0.5 for k, (a, b) in squares.items()}, rel=1e-4)
    assert len(found) >= 2
