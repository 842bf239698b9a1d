"""The sweep's logic on runs of two steps: what is run, what a row holds, what the table says."""

import json
import math
import shlex

import numpy as np
import pytest
import torch

from benchmarks import strata, sweep
from conftest import ROOT, ink_rows, write_pictures
from inputs import options
from inputs.files import Refusal
from keep import training
from pocket import measure

pytestmark = pytest.mark.usefixtures("one_thread")


def asked(*words: str) -> sweep.Options:
    return sweep.asked(sweep.Options, list(words))


def test_every_variant_is_a_command_that_can_be_and_another_run_than_the_others():
    given, found = asked("run"), {}
    for name in sweep.VARIANTS:
        words = sweep.words(given, name, 75, 1)
        config = options.parse(words)
        assert (config.max_train_steps, config.seed, config.device) == (75, 1, "cpu")
        found[name] = str(config)
    assert len(set(found.values())) == len(sweep.VARIANTS)
    both = options.parse(sweep.words(given, "strata+rate-2+linear", 75, 1))
    assert (
        both.stratified_timesteps and both.learning_rate == 8e-3 and both.lr_scheduler == "linear"
    )
    with pytest.raises(Refusal, match="the variant nonesuch; expected plain, strata, "):
        sweep.words(given, "strata+nonesuch", 75, 1)


def test_steps_to_reach_lie_between_two_runs_along_the_logarithm():
    curve = {100: 8.0, 400: 4.0}
    assert sweep.steps_to(curve, 6.0, False) == pytest.approx(200)
    assert sweep.steps_to(curve, 8.0, False) == 100 and sweep.steps_to(curve, 9.0, False) == 100
    assert sweep.steps_to(curve, 4.0, False) == pytest.approx(400)
    assert sweep.steps_to(curve, 3.9, False) == math.inf
    assert sweep.steps_to({10: 0.1, 40: 0.5, 160: 0.2}, 0.3, True) == pytest.approx(20)


def made(variant: str, seed: int, steps: int, l1: float, first: float = 0.5) -> dict:
    found = {"style": "ink", "variant": variant, "seed": seed, "steps": steps, "pixel_l1": l1}
    return found | {"palette_distance": l1 / 100, "first": first, "heldout_loss": [-l1 / 50, 0.1]}


def test_the_table_compares_steps_and_measures_with_the_plain_recipes_end(tmp_path, capsys):
    rows = []
    for seed, level in ((0, 0.0), (1, 2.0)):
        rows += [made("plain", seed, 100, 60 + level, 0.25), made("plain", seed, 400, 50 + level)]
        rows += [made("quick", seed, 100, 55 + level), made("quick", seed, 400, 45 + 2 * level)]
        rows += [made("slow", seed, 400, 58 + level)]
    rows.append({"style": "ink", "variant": "slow", "seed": 2, "steps": 400, "failed": "refused"})
    rows.append(made("plain", 0, 900, 1.0) | {"style": "blueprint"})
    rows.append(made("quick", 5, 400, 1.0))  # there is no plain run of that seed
    plain, quick, slow = sweep.summary(rows, "ink", 400, 400)
    assert plain["ratio"] == pytest.approx([1.0, 1.0])
    # seed 0 is to reach 50 between 55 and 45, seed 1 to reach 52 between 57 and 49
    assert quick["ratio"] == pytest.approx([4 ** (0.5 - 1), 4 ** (5 / 8 - 1)])
    assert quick["pixel_l1"] == (pytest.approx(4.0), pytest.approx(1.0))  # by 5 and by 3
    assert plain["first"] == (0.0, 0.0) and slow["ratio"] == [math.inf] * 2
    assert slow["heldout_loss"] == (pytest.approx(0.16), pytest.approx(0))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"style": "in')
    sweep.main(["table", "--out", str(file), "--end", "400"])
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert (
        lines[0].startswith("Better after 400 steps than the plain recipe after 400")
        and "a row was cut short" in told.err
    )
    assert sweep.summary(rows, "ink", 400, 100)[1]["pixel_l1"][0] == pytest.approx(-5.0)
    ratio = quick["ratio"]
    assert f"| quick | 2 | {np.mean(ratio):.2f} ± {np.std(ratio, ddof=1):.2f} | +4.00 ± 1.00 |" in (
        told.out
    )
    assert "| slow | 2 | not in 2 of 2 | -8.00 ± 0.00 |" in told.out
    with pytest.raises(Refusal, match="no row of the plain recipe"):
        sweep.table(asked("table", "--out", str(tmp_path / "none.jsonl")))


def test_ranks_are_measures_own():
    g = np.random.default_rng(0)
    true, drawn = (g.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8) for n in (9, 4))
    true[7] = true[2]  # a twin is not nearer
    own = [2, 5, 0, 7]
    want = [measure.rank(picture, i, true) for picture, i in zip(drawn, own, strict=True)]
    assert sweep.ranks(drawn, own, true, torch.device("cpu")).tolist() == want
    assert sweep.ranks(true[own], own, true, torch.device("cpu")).tolist() == [0] * 4


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A few drawings as `pocket.build --stages render` leaves them: held-out ones and ink's."""
    folder = tmp_path_factory.mktemp("work")
    heldout = json.loads((ROOT / "pocket" / "heldout.json").read_text())
    names = heldout["measured"][:6] + heldout["ink"][:2]
    rows = [{"icon": n, "name": n, "group": "a", "tags": [], "families": []} for n in names]
    (folder / "subjects.json").write_text(json.dumps(rows))
    ink = np.random.default_rng(0).integers(0, 256, (len(names), 128, 128), dtype=np.uint8)
    np.savez_compressed(folder / "ink.npz", ink=ink)
    return folder


@pytest.mark.slow
def test_runs_are_measured_once_and_a_rows_commands_repeat_it(work, tmp_path, monkeypatch, capsys):
    """A sweep that was cut off goes on; what is there is not trained again; and what a row's two
    commands give is the row's.
    """
    write_pictures(tmp_path / "few", ink_rows(6))
    words, own = sweep.words, str(tmp_path / "few")

    def few(*given):
        return [own if word == "pocket/ink" else word for word in words(*given)]

    monkeypatch.setattr(sweep, "words", few)
    short = ["--steps", "2", "--seeds", "0", "--drawing-seeds", "0", "--subjects", "4"]
    short += ["--num-inference-steps", "2", "--device", "cpu", "--work", str(work)]
    short += ["--scratch", str(tmp_path / "scratch"), "--out", str(tmp_path / "rows.jsonl")]
    short += ["--train=--resolution 64 --train-batch-size 2 --lr-warmup-steps 0"]
    both = ["run", *short, "--variants", "plain", "strata+ema"]
    sweep.main(both)
    file = tmp_path / "rows.jsonl"
    rows = sweep.rows_of(file)
    assert [row["variant"] for row in rows] == ["plain", "strata+ema"]
    for row in rows:
        assert {*sweep.MEASURES, "heldout_loss", "trained_s", "then", "commit"} <= row.keys()
        assert row["steps"] == 2 and len(row["heldout_loss"]) == 2 and row["pixel_l1"] > 0
    trained = []
    main = training.main
    monkeypatch.setattr(
        sweep.training, "main", lambda config: trained.append(config) or main(config)
    )
    sweep.main(both)
    assert not trained and sweep.rows_of(file) == rows
    file.write_text(file.read_text()[:-30] + "\n")  # cut off while it was written
    sweep.main(both)
    assert len(trained) == 1 and trained[0].ema_decay == 0.99
    again = sweep.rows_of(file)[-1]
    same = (*sweep.MEASURES, "heldout_loss", "command", "then")
    assert {key: again[key] for key in same} == {key: rows[1][key] for key in same}
    # by hand, as the row says
    sweep.main(["prepare", *short])
    assert main(shlex.split(rows[1]["command"])[2:]) == 0
    capsys.readouterr()
    measured = shlex.split(rows[1]["then"])[3:]
    sweep.main([*measured, "--work", str(work), "--device", "cpu"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == {key: rows[1][key] for key in told} and "heldout_loss" in told


def test_variances_are_those_of_the_vectors():
    vectors = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)).double()
    want = vectors.var(0).sum().item()
    assert strata.variance(vectors @ vectors.T) == pytest.approx(want)
    half = vectors / 2**0.5
    assert strata.ratio(half @ half.T, vectors @ vectors.T) == (0.5, 0.0)
