"""What makes a run learn otherwise: each trick is its formula, off it is nothing, and a run with it
goes on to the same bytes.
"""

from dataclasses import replace
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import loop
import lora
import model
import tiny_run
from adapter_tools import answer, off, pipeline
from adapters import files
from conftest import make_batch, make_unet
from inputs import code, options
from inputs.drawing import Options
from inputs.files import Refusal
from inputs.options import Config
from keep import checkpoint, drawing, export, faster, identity
from learn import tricks

pytestmark = pytest.mark.usefixtures("one_thread")
POCKET = options.RECIPES["pocket"][1]
T = 1000


def drawn(numbers, count: int = T, seed: int = 3) -> list:
    """Examples by number, each with the timestep that it draws by itself."""
    each = [np.random.default_rng([seed, i, data.EXAMPLE]).integers(0, count) for i in numbers]
    return [
        SimpleNamespace(number=i, t=int(t), picture=0) for i, t in zip(numbers, each, strict=True)
    ]


def asked(**changes) -> Config:
    return replace(POCKET, **{"train_batch_size": 8, "gradient_accumulation_steps": 1} | changes)


def taken(numbers, count: int = T, **changes) -> list[int]:
    return tricks.timesteps(drawn(numbers, count), asked(**changes), count).tolist()


# ---- strata --------------------------------------------------------------------------------------


def test_each_step_has_one_timestep_in_each_stratum_in_an_order_of_its_own():
    orders = set()
    for step in range(30):
        found = taken(range(8 * step, 8 * step + 8), stratified_timesteps=True)
        assert sorted(t * 8 // T for t in found) == list(range(8))
        orders.add(tuple(t * 8 // T for t in found))
    assert len(orders) > 25


@pytest.mark.parametrize("cut", [[3, 5], [1] * 8, [4, 4], [8]])
def test_whatever_the_cut_into_passes_and_processes_the_timesteps_are_the_same(cut):
    whole, found, at = taken(range(16, 24), stratified_timesteps=True), [], 16
    for size in cut:
        found += taken(range(at, at + size), stratified_timesteps=True)
        at += size
    assert found == whole and whole != taken(range(16, 24))
    other = taken(range(16, 24), stratified_timesteps=True, seed=POCKET.seed + 1)
    assert other != whole


def test_each_example_alone_is_as_uniform_as_it_was():
    """Over all that it may draw, and all strata, each timestep comes equally often: exactly."""
    n, count, found = 4, 50, []
    for j in range(n):  # all n strata, since a permutation has each once
        for t in range(count):
            example = SimpleNamespace(number=j, t=t)
            config = asked(train_batch_size=n, stratified_timesteps=True)
            found += tricks.timesteps([example], config, count).tolist()
    assert np.bincount(found).tolist() == [n] * count


@pytest.mark.slow
def test_the_variance_of_the_gradients_estimate_falls_and_its_mean_stays():
    """On the tiny UNet, one picture and its noise fixed: what timesteps alone add to the variance,
    of 8 examples drawn independently and of 8 strata.
    """
    count, n, steps = 30, 8, 200
    schedule = model.NoiseSchedule(torch.linspace(0.999, 0.005, count), "epsilon")
    unet, batch = make_unet(), make_batch(1)
    adapter = lora.inject(unet, rank=2, alpha=2)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B.copy_(0.05 * torch.randn(layer.lora_B.shape, generator=g))
    learned, each = [*lora.trained(unet).values()], []
    for t in range(count):
        loss = loop.diffusion_loss(unet, batch | {"t": torch.tensor([t])}, schedule, (0.13, 0.0))
        grads = torch.autograd.grad(loss.sum(), learned)
        each.append(torch.cat([grad.flatten() for grad in grads]))
    each = torch.stack(each)  # (T, numbers)
    spread = {}
    for on in (False, True):
        of = [range(s * n, (s + 1) * n) for s in range(steps)]
        means = [each[taken(i, count, stratified_timesteps=on)].mean(0) for i in of]
        off_by = torch.stack(means) - each.mean(0)  # (steps, numbers)
        spread[on] = off_by.square().sum(1).mean().item()
        assert off_by.mean(0).norm() < 4 * (spread[on] / steps) ** 0.5
    by_definition = (each - each.mean(0)).square().sum(1).mean().item() / n
    assert spread[False] == pytest.approx(by_definition, rel=0.25)
    assert spread[True] < 0.35 * spread[False]


# ---- logit-normal --------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_the_logit_of_a_timesteps_share_is_normal(mean, std):
    how = {"weighting_scheme": "logit_normal", "logit_mean": mean, "logit_std": std}
    share = (np.array(taken(range(4000), **how)) + 0.5) / T
    logit = np.log(share / (1 - share))
    assert logit.mean() == pytest.approx(mean, abs=0.05)
    assert logit.std() == pytest.approx(std, rel=0.05)
    for quantile in (0.1, 0.5, 0.9):
        want = NormalDist(mean, std).inv_cdf(quantile)
        assert np.quantile(logit, quantile) == pytest.approx(want, abs=0.08)


def test_strata_of_the_logit_normal_are_of_equal_chance():
    """Both at once: the strata are those of the density, not of the timesteps."""
    how = {"weighting_scheme": "logit_normal", "stratified_timesteps": True}
    edges = [T * tricks.logit_normal(k / 8, 0.0, 1.0) for k in range(1, 8)]
    for step in range(20):
        found = taken(range(8 * step, 8 * step + 8), **how)
        assert np.searchsorted(edges, [t + 0.5 for t in sorted(found)]).tolist() == list(range(8))
    far = taken(range(400), **how | {"logit_std": 10.0})
    assert 0 <= min(far) and max(far) == T - 1


# ---- Huber ---------------------------------------------------------------------------------------

SCHEDULE = tiny_run.SCHEDULE
ERRORS = torch.tensor([0.0, 1e-4, 0.05, 0.3, 2.0, 40.0])


@pytest.mark.parametrize("kind", ["constant", "exponential", "snr"])
def test_the_threshold_is_sd_scripts(kind):
    t, c = torch.tensor([0, 10, 400, 999]), 0.1
    found = tricks.huber_threshold(t, SCHEDULE, kind, c).double()
    abar = SCHEDULE.alphas_cumprod[t].double()
    sigmas = ((1.0 - abar) / abar) ** 0.5
    want = {
        "constant": torch.full((4,), c).double(),
        "exponential": torch.exp(-(-np.log(c) / T) * t.double()),
        "snr": (1 - c) / (1 + sigmas) ** 2 + c,
    }[kind]
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)
    zero = model.NoiseSchedule(torch.tensor([0.9, 0.0]), "v_prediction")  # zero terminal SNR
    assert tricks.huber_threshold(torch.tensor([1]), zero, kind, c).isfinite().all()


def test_pseudo_huber_is_its_formula_squared_where_small_and_linear_where_large():
    c, t = 0.1, torch.zeros(1, dtype=torch.int64)
    squares = ERRORS.square()[None, :, None, None]
    found = tricks.pseudo_huber(squares, t, SCHEDULE, "constant", c).flatten().double()
    want = 2 * c * ((ERRORS.double() ** 2 + c**2).sqrt() - c)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-12)
    assert found[1] == pytest.approx(1e-8, rel=1e-3)  # e^2
    assert found[5] == pytest.approx(2 * c * 40, rel=5e-3)  # 2 c |e|
    e = torch.tensor([[[[50.0]]]], requires_grad=True)
    tricks.pseudo_huber(e.square(), t, SCHEDULE, "constant", c).sum().backward()
    assert e.grad.item() == pytest.approx(2 * c, rel=1e-3)  # no larger for a larger error


def test_masks_and_min_snr_weigh_hubers_loss_as_they_weigh_the_squared_error(unet):
    run = tiny_run.assembled("unused", loss_type="huber", huber_schedule="exponential")
    tricks.plug_in(run)
    batch = make_batch(2) | {"mask": torch.rand(2, 1, 8, 8)}
    each = run.loss(unet, batch, SCHEDULE, (0.13, 0.0), 5.0)
    t, x0 = batch["t"], (batch["mean"] + batch["std"] * batch["eps"]) * 0.13
    e = model.predict(unet, model.add_noise(x0, batch["noise"], t, SCHEDULE), batch)
    e, c = e - batch["noise"], (0.1 ** (t / T))[:, None, None, None]
    want = (2 * c * ((e**2 + c**2).sqrt() - c) * batch["mask"]).mean((1, 2, 3))
    torch.testing.assert_close(each, want * model.snr_weight(t, SCHEDULE, 5.0), rtol=1e-4, atol=0)
    plain = loop.diffusion_loss(unet, batch, SCHEDULE, (0.13, 0.0), 5.0)
    assert (each < plain).all()
    same = loop.diffusion_loss(unet, batch, SCHEDULE, (0.13, 0.0), 5.0, lambda squares, *_: squares)
    assert torch.equal(same, plain)


def test_the_held_out_loss_is_the_squared_error_whatever_is_trained(tmp_path):
    from test_held_out import examples

    found = []
    for kind in ("l2", "huber"):
        run = tiny_run.assembled(tmp_path, loss_type=kind)
        tricks.plug_in(run)
        found.append(examples(4, 2).losses(run, faster.Alone()))
    assert found[0] == found[1]


# ---- rsLoRA --------------------------------------------------------------------------------------


def test_rslora_acts_with_alpha_over_the_root_of_the_rank_in_every_reader(tmp_path):
    run = tiny_run.assembled(tmp_path, use_rslora=True, lora_alpha=6)  # rank 5
    layer = next(iter(run.adapter.layers.values()))
    assert layer.scale == pytest.approx(6 / 5**0.5, rel=1e-12)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in run.adapter.layers.values():
            each.lora_B.copy_(0.1 * torch.randn(each.lora_B.shape, generator=g))
    want, bare = answer(run.unet, make_batch()), answer(make_unet(), make_batch())
    for layout in ("peft", "kohya"):
        path = tmp_path / f"{layout}.safetensors"
        files.save(run.adapter, path, layout, torch.float32, {})
        file = files.read(path)
        assert file.alpha / file.rank == pytest.approx(layer.scale, rel=1e-6)
        pipe = pipeline(make_unet())
        pipe.load_lora_weights(path)  # diffusers and peft
        assert off(answer(pipe.unet, make_batch()), want) < 1e-5 < off(want, bare)
    assert replace(POCKET, lora_alpha=16).alpha == 16 and type(POCKET.alpha) is int


@pytest.mark.slow
def test_rslora_trains_what_that_alpha_trains_in_the_books_lines_too(train, tmp_path):
    short = ("--max-train-steps", "2", "--lora-rank", "4", "--no-fused")
    assert train("rs", *short, "--lora-alpha", "8", "--use-rslora") == 0
    assert train("plain", *short, "--lora-alpha", "8", "--use-rslora", "--plain") == 0
    assert train("same", *short, "--lora-alpha", "16") == 0
    found = [lora.read(tmp_path / name) for name in ("rs", "plain", "same")]
    assert [file.alpha for file in found] == [16.0] * 3
    for name, matrix in found[0].matrices.items():
        assert all(matrix.equal(file.matrices[name]) for file in found[1:])


# ---- a run with them -----------------------------------------------------------------------------


def kept_run(out, monkeypatch, fast: bool = True, **changes):
    """A kept run of the tiny UNet as the command makes it, by the book's layers."""
    monkeypatch.setattr(faster, "fast", fast)
    run = tiny_run.assembled(out, **{"fused": False, "cuda_graph": False} | changes)
    kept = tiny_run.keep(run)
    kept.moments, _, kept.unfused = faster.faster(run, faster.Alone(), print)
    return kept


def same(one, other) -> None:
    for name, matrix in one.run.trained.items():
        assert torch.equal(matrix, other.run.trained[name]), name
    ours, theirs = one.moments.read(), other.moments.read()
    for name in ours:
        assert ours[name].keys() == theirs[name].keys()
        for key, value in ours[name].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[name][key])), key


ALONE = ("LoRA+", "EMA")
WAYS = {
    "LoRA+": {"loraplus_lr_ratio": 4.0, "use_8bit_adam": False},
    "EMA": {"ema_decay": 0.9},
    "EMA and LoRA+": {"ema_decay": 0.9, "loraplus_lr_ratio": 4.0},
    "Prodigy and EMA": {"optimizer": "prodigy", "learning_rate": 1.0, "ema_decay": 0.9},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_interrupted_equals_uninterrupted_with_and_without_the_vector(tmp_path, monkeypatch, way):
    """Two steps, a checkpoint by matrix, two more; with one form or the other before and after.
    Prodigy has the vector alone.
    """
    forms = [(True, False), (False, True), (True, True)]
    whole = tiny_run.step(kept_run(tmp_path / "whole", monkeypatch, **WAYS[way]), 4)
    for first, then in forms[2:] if "Prodigy" in way else forms[:1] if way not in ALONE else forms:
        out = tmp_path / f"{first}{then}"
        begun = kept_run(out, monkeypatch, first, **WAYS[way])
        checkpoint.save_state(tiny_run.step(begun, 2))
        again = kept_run(out, monkeypatch, then, **WAYS[way])
        checkpoint.restore(again, checkpoint.newest_state(out / "checkpoints"))
        same(tiny_run.step(again, 2), whole)


def test_off_a_run_is_the_run_that_it_was(tmp_path, monkeypatch):
    """The same numbers, and nothing more in its state, than without learn/."""
    plain = tiny_run.step(tiny_run.keep(tiny_run.assembled(tmp_path)), 3)
    kept = kept_run(tmp_path, monkeypatch)
    assert kept.run.timesteps is data.drawn_timesteps and kept.run.loss is loop.diffusion_loss
    assert len(kept.run.optimizer.param_groups) == 1
    same(tiny_run.step(kept, 3), plain)
    assert faster.digests(POCKET).keys() == code.digests().keys()


def test_a_run_says_what_makes_it_learn_otherwise():
    assert tricks.describe(POCKET) == tricks.describe(options.RECIPES["original"][1]) == ""
    said = tricks.describe(options.parse(["pocket", "--better", "--stratified-timesteps"]))
    huber = "--loss-type huber, --huber-schedule constant, --huber-c 0.03"
    assert said == f"learns with --stratified-timesteps, {huber}"


# ---- LoRA+ ---------------------------------------------------------------------------------------


def test_the_rate_of_b_is_so_many_times_that_of_a(tmp_path, monkeypatch):
    """AdamW's first step is as long as its rate."""
    how = {"use_8bit_adam": False, "adam_weight_decay": 0.0, "lr_scheduler": "constant"}
    how |= {"lr_warmup_steps": 0}
    moved = {}
    for ratio in (1.0, 4.0):
        kept = kept_run(tmp_path, monkeypatch, **how, loraplus_lr_ratio=ratio)
        g = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, each in kept.run.trained.items():
                if name.endswith("lora_B"):  # or A has no gradient
                    each.copy_(0.1 * torch.randn(each.shape, generator=g))
        before = {name: each.clone() for name, each in kept.run.trained.items()}
        tiny_run.step(kept, 1)
        moved[ratio] = {name: each - before[name] for name, each in kept.run.trained.items()}
    for name, each in moved[4.0].items():
        times = 4 if name.endswith("lora_B") else 1
        torch.testing.assert_close(each, times * moved[1.0][name], rtol=1e-3, atol=1e-6)
        assert each.abs().max() > 0.009
    assert [len(group["params"]) for group in kept.run.optimizer.param_groups] == [1, 1]


# ---- EMA -----------------------------------------------------------------------------------------


def test_the_running_mean_is_its_recursion_from_the_first_step_on(tmp_path, monkeypatch):
    kept, want = kept_run(tmp_path, monkeypatch, ema_decay=0.2), {}
    for step in range(5):
        tiny_run.step(kept, 1)
        decay = min(0.2, (1 + step) / (10 + step))
        for name, each in kept.run.trained.items():
            want[name] = decay * want.get(name, each.double()) + (1 - decay) * each.double()
    for name, state in kept.moments.read().items():
        torch.testing.assert_close(state["ema"].double(), want[name], rtol=0, atol=1e-6)
        assert not torch.equal(state["ema"], kept.run.trained[name])


@pytest.mark.slow
def test_the_running_mean_is_exported_beside_the_last_step(tmp_path, monkeypatch):
    kept = tiny_run.step(kept_run(tmp_path / "r", monkeypatch, ema_decay=0.9), 3)
    mean = {name: state["ema"].clone() for name, state in kept.moments.read().items()}
    export.export(kept)
    paths = [str(path.relative_to(tmp_path / "r")) for path in export.export_ema(kept)]
    assert paths == ["ema/pytorch_lora_weights.safetensors", "ema/kohya/r-ema.safetensors"]
    last, ema = lora.read(tmp_path / "r"), lora.read(tmp_path / "r" / "ema")
    assert ema.about["ema_decay"] == "0.9" and "ema_decay" not in last.about
    for name, matrix in ema.matrices.items():
        assert matrix.equal(mean[kept_name(kept, name)]) and not matrix.equal(last.matrices[name])
    without = tiny_run.step(kept_run(tmp_path / "w", monkeypatch), 1)
    assert export.export_ema(without) == [] and not (tmp_path / "w" / "ema").exists()


def kept_name(kept, name: str) -> str:
    return name if name in kept.run.trained else f"{name}.weight"


@pytest.mark.slow
def test_a_stopped_command_ends_on_the_same_mean(train, tmp_path):
    ema = ("--ema-decay", "0.9", "--loraplus-lr-ratio", "2", "--stratified-timesteps")
    ema += ("--loss-type", "huber")
    assert train("whole", *ema) == 0
    assert train("halves", *ema, "--max-train-steps", "2") == 0
    assert train("halves", *ema) == 0
    for file in ("", "ema/"):
        name = f"{file}{lora.FILE_NAME}"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()


# ---- Prodigy -------------------------------------------------------------------------------------

PRODIGY = {"optimizer": "prodigy", "learning_rate": 1.0, "lr_warmup_steps": 0}
PRODIGY |= {"lr_scheduler": "constant"}


@pytest.mark.slow
def test_prodigy_finds_a_rate_and_the_loss_scale_is_taken_off_before(tmp_path, monkeypatch):
    plain, scaled = (kept_run(tmp_path, monkeypatch, **PRODIGY) for _ in range(2))
    scaled.run.loss_scale = loop.LossScale(enabled=True, value=2.0**10)
    means = []
    for kept in (plain, scaled):
        kept.run.batches = lambda run, step: [make_batch(2)]
        tiny_run.step(kept, 2)
        means.append(torch.cat([s["exp_avg"].flatten() for s in kept.moments.read().values()]))
    assert off(means[1], means[0]) < 1e-4 and means[0].any()
    rates = []
    for _ in range(16):
        tiny_run.step(plain, 1)
        rates.append(plain.run.optimizer.param_groups[0]["d"])
    assert rates[0] == 1e-6 and rates == sorted(rates) and rates[-1] > 1.3e-6


@pytest.mark.parametrize("gone", ["fast/", "an edit"])
def test_prodigy_without_the_vector_is_refused(tmp_path, monkeypatch, gone):
    if gone == "an edit":
        monkeypatch.setitem(faster.WRITTEN_FOR, "loop.unscale_and_clip", "0" * 32)
    with pytest.raises(Refusal) as refusal:
        kept_run(tmp_path, monkeypatch, gone == "an edit", **PRODIGY)
    said = "there is no folder fast/" if gone == "fast/" else "loop.unscale_and_clip is edited"
    assert f"--optimizer prodigy, and {said}" in str(refusal.value)


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--optimizer prodigy", "with --learning-rate 0.004; expected a factor of the rate"),
        ("--optimizer prodigy --learning-rate 1 --loraplus-lr-ratio 4", "with --loraplus-lr-ratio"),
        ("--logit-mean 1", "--logit-mean alone; expected --weighting-scheme logit_normal with it"),
        ("--huber-c 0.2 --huber-schedule constant", "--huber-schedule and --huber-c alone"),
        ("--plain --ema-decay 0.9 --loss-type huber", "--plain with --loss-type and --ema-decay"),
        ("--plain --stratified-timesteps", "--plain with --stratified-timesteps"),
        ("--plain --optimizer prodigy --learning-rate 1", "--plain with --optimizer"),
    ],
)
def test_what_does_not_go_together_is_refused(words, said):
    with pytest.raises(Refusal) as refusal:
        options.parse(["pocket", *words.split()])
    assert said in str(refusal.value)


def test_prodigy_without_its_package_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refusal, match=r"no package prodigyopt; .* pip install prodigyopt"):
        options.parse(["pocket", "--optimizer", "prodigy", "--learning-rate", "1"])


EACH = {
    "stratified_timesteps": True,
    "weighting_scheme": "logit_normal",
    "loss_type": "huber",
    "ema_decay": 0.9,
    "loraplus_lr_ratio": 4.0,
    "optimizer": "prodigy",
}


@pytest.mark.parametrize("name", EACH)
def test_each_makes_another_run_by_its_value_and_its_code(name):
    other = replace(POCKET, **{name: EACH[name]})
    was = identity.fixed_options(POCKET)
    was.pop(name)  # of a run from before there was the option
    state = {"identity": was, "step": 1}
    identity.check_same(POCKET, identity.fixed_options(POCKET), state)
    with pytest.raises(Refusal, match=f"holds a run with {name} .*, and this command has {name} "):
        identity.check_same(other, identity.fixed_options(other), state)
    more = faster.digests(other).keys() - faster.digests(POCKET).keys()
    assert more and all(each.startswith("learn.tricks.") for each in more)
    assert all(faster.digests(other).values())


def test_off_they_leave_a_files_header_as_it_was(tmp_path, monkeypatch):
    def header(**changes) -> str:
        kept = tiny_run.keep(tiny_run.assembled(tmp_path, **changes))
        kept.identity = {"base": "0"} | identity.fixed_options(kept.run.config)
        before = {k: v for k, v in kept.identity.items() if k not in options.OTHERWISE}
        before.pop("use_rslora")
        told = identity.about(kept)["run"]
        kept.identity = before
        return told, identity.about(kept)["run"]

    now, before = header()
    assert now == before
    assert all(header(**{name: EACH[name]})[0] != now for name in EACH)
    assert header(use_rslora=True)[0] != now


# ---- memory and the sheet -----------------------------------------------------------------------


@pytest.mark.parametrize(("way", "least"), [("Prodigy and EMA", 20), ("LoRA+", 8), ("EMA", 6)])
def test_the_memory_plan_counts_what_the_optimizer_keeps(tmp_path, monkeypatch, way, least):
    from fast.plan import optimizer_bytes

    kept = tiny_run.step(kept_run(tmp_path, monkeypatch, **WAYS[way]), 1)
    count, counted = sum(group["params"][0].numel() for group in kept.run.optimizer.param_groups), 0
    for group in kept.run.optimizer.param_groups:
        for each in kept.run.optimizer.state[group["params"][0]].values():
            counted += each.nbytes if torch.is_tensor(each) else 0
    planned = optimizer_bytes(kept.run.config, count)
    assert planned == pytest.approx(counted, rel=1e-3) and planned >= least * count


@pytest.mark.slow
def test_the_sheet_shows_the_running_mean_behind_the_last_step(tmp_path, monkeypatch):
    kept = tiny_run.step(kept_run(tmp_path / "r", monkeypatch, ema_decay=0.9), 2)
    export.export(kept)
    export.export_ema(kept)
    file = files.read(tmp_path / "r")
    rows, name = drawing.rows_of(Options(str(tmp_path / "r"), compare=True), file)
    assert list(rows) == ["before", "after", "running mean"] and name == "before-after.png"
    assert rows["running mean"][0].about["ema_decay"] == "0.9"
