"""What may make a run learn better, each by an option of its own that is off: timesteps drawn in
another way, Huber's loss, two rates, a running mean of the adapter, an optimizer that finds its
rate. docs/learning.md has each formula, and what was measured.

Letters: `n` examples per optimizer step, `T` timesteps of the noise schedule.
"""

import contextlib
import math
from functools import partial
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

import data
import loop
import model
from inputs import options
from inputs.options import Config

STRATA = 5  # what a random stream is for, beside data.EXAMPLE, EPOCH, CROP and held_out.HELD_OUT
# Of Prodigy's numbers those that it keeps for all matrices at once, and goes on from.
OF_ALL = ("k", "d", "d_max", "d_numerator")


def describe(config: Config) -> str:
    """What of these a run has, as it is typed: the losses that it tells mean something by it."""
    told = [
        f"--{name.replace('_', '-')}" + f" {value}" * (value is not True)
        for name in options.OTHERWISE
        if (value := getattr(config, name)) != getattr(Config, name)
    ]
    return f"learns with {', '.join(told)}" if told else ""


# ---- timesteps -----------------------------------------------------------------------------------


def stratum(u: float, number: int, n: int, seed: int) -> float:
    """Of the share u in (0, 1) that an example has drawn, the share within its stratum: of n equal
    ones example j of a step has one, by a permutation of (seed, step), so that the n together lie
    over all timesteps (stratified sampling: Cochran 1977, chapter 5). Each alone is as uniform as
    it was. number: of the example, in the whole run.
    """
    step, j = divmod(number, n)
    order = np.random.default_rng([seed, step, STRATA]).permutation(n)
    return (int(order[j]) + u) / n


def logit_normal(u: float, mean: float, std: float) -> float:
    """u in (0, 1), uniform, as a share whose logit is normal (Esser et al. 2024,
    https://arxiv.org/abs/2403.03206, section 3.1): the inverse of its distribution, so that strata
    stay strata. A mean below 0 is nearer to the picture.
    """
    return 1 / (1 + math.exp(-NormalDist(mean, std).inv_cdf(u)))


def timesteps(examples: list[data.Example], config: Config, count: int) -> Tensor:
    """The socket: (B,) int64 below T = count, each from what its example has drawn anyway."""
    found = []
    for example in examples:
        u = (example.t + 0.5) / count
        if config.stratified_timesteps:
            u = stratum(u, example.number, config.examples_per_step, config.seed)
        if config.weighting_scheme == "logit_normal":
            u = logit_normal(u, config.logit_mean, config.logit_std)
        found.append(min(count - 1, int(u * count)))
    return torch.tensor(found)


# ---- loss ----------------------------------------------------------------------------------------


def huber_threshold(t: Tensor, schedule: model.NoiseSchedule, kind: str, c: float) -> Tensor:
    """Where an error (B,) begins to count as large: c, or from 1 at no noise down to c (Khrapov et
    al. 2024, https://arxiv.org/abs/2403.16728), as sd-scripts has its --huber_schedule:
    https://github.com/kohya-ss/sd-scripts/blob/10bfcb9a/library/train_util.py
    (get_huber_threshold_if_needed). kind: constant, exponential or snr.
    """
    if kind == "exponential":
        return c ** (t / len(schedule.alphas_cumprod))
    abar = schedule.alphas_cumprod[t]
    sigma = ((1 - abar) / abar).sqrt()  # infinite at no signal: then it is c
    return torch.full_like(abar, c) if kind == "constant" else (1 - c) / (1 + sigma) ** 2 + c


def pseudo_huber(
    squares: Tensor, t: Tensor, schedule: model.NoiseSchedule, kind: str, c: float
) -> Tensor:
    """2 c (sqrt(e^2 + c^2) - c) of squared errors e^2 (B, C, H, W): e^2 where e is small, 2 c |e|
    where it is large (Charbonnier et al. 1997, https://doi.org/10.1109/83.551699).
    """
    c = huber_threshold(t, schedule, kind, c)[:, None, None, None]
    return squares * (2 * c / ((squares + c**2).sqrt() + c))  # the same, and exact for small e


# ---- the optimizer -------------------------------------------------------------------------------


def parts(config: Config, trained: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """`trained` in parts that each have a rate: all together, or for LoRA+ what is no B, and B."""
    if config.loraplus_lr_ratio == 1:
        return [trained]
    B = {name: each for name, each in trained.items() if name.endswith("lora_B")}
    return [{name: each for name, each in trained.items() if name not in B}, B]


def make_optimizer(run, parameters: list[list[torch.nn.Parameter]]) -> torch.optim.Optimizer:
    """The run's, over the parameters of each of parts(), one vector or every matrix."""
    config, groups = run.config, parameters[0]
    if config.loraplus_lr_ratio != 1:
        ratios = (1.0, config.loraplus_lr_ratio)
        pairs = zip(parameters, ratios, strict=True)
        groups = [{"params": each, "lr_ratio": ratio} for each, ratio in pairs]
    make = prodigy if config.optimizer == "prodigy" else loop.make_optimizer
    optimizer = make(config, groups)
    if config.loraplus_lr_ratio != 1:
        optimizer.register_step_pre_hook(own_rates)
    if config.ema_decay:
        optimizer.register_step_post_hook(partial(average, run))
    return optimizer


def own_rates(optimizer: torch.optim.Optimizer, *_) -> None:
    """LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354): the rate that the step has set
    is A's, and B's is lr_ratio times that.
    """
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_ratio"]


@torch.no_grad()
def average(run, optimizer: torch.optim.Optimizer, *_) -> None:
    """After a step: ema <- d ema + (1 - d) weights, with d = min(decay, (1 + s) / (10 + s)) at step
    s (from 0), so that the start is soon forgotten, as diffusers' EMAModel has it
    (src/diffusers/training_utils.py). It lies with the optimizer's state, so that it is saved and
    read with that, by matrix.
    """
    decay = min(run.config.ema_decay, (1 + run.step) / (10 + run.step))
    for group in optimizer.param_groups:
        for each in group["params"]:
            state = optimizer.state[each]
            state.setdefault("ema", each.detach().clone()).lerp_(each, 1 - decay)


def prodigy(config: Config, parameters: list) -> torch.optim.Optimizer:
    """Prodigy (Mishchenko & Defazio 2023, https://arxiv.org/abs/2306.06101): Adam with a rate d
    that grows with what was travelled, set as its authors advise for diffusion models
    (https://github.com/konstmish/prodigy). d is of all matrices, and stands in the state of each,
    so that a checkpoint holds it.
    """
    from prodigyopt import Prodigy

    how = {"use_bias_correction": True, "safeguard_warmup": True}
    with contextlib.redirect_stdout(None):  # it says what --adam-weight-decay is
        made = Prodigy(parameters, weight_decay=config.adam_weight_decay, **how)

    def go_on(*_) -> None:
        for group in made.param_groups:
            state = made.state.get(group["params"][0], {})
            group.update({key: state[key] for key in OF_ALL if key in state})

    def keep(*_) -> None:
        for group in made.param_groups:
            for each in group["params"]:
                made.state[each].update({key: group[key] for key in OF_ALL})

    made.register_step_pre_hook(go_on)
    made.register_step_post_hook(keep)
    return made


# ---- plugged in ----------------------------------------------------------------------------------


def plug_in(run) -> None:
    """Fill the sockets timesteps and loss of `run` as its options say."""
    config = run.config
    if config.stratified_timesteps or config.weighting_scheme != "none":
        count = run.examples.num_train_timesteps
        run.timesteps = partial(timesteps, config=config, count=count)
    if config.loss_type == "huber":
        robust = partial(pseudo_huber, kind=config.huber_schedule, c=config.huber_c)
        run.loss = partial(loop.diffusion_loss, robust=robust)


def makers(config: Config) -> list[str]:
    """What of this module makes the run's numbers, by full name."""
    used = {
        "timesteps": config.stratified_timesteps or config.weighting_scheme != "none",
        "stratum": config.stratified_timesteps,
        "logit_normal": config.weighting_scheme != "none",
        "pseudo_huber": config.loss_type == "huber",
        "huber_threshold": config.loss_type == "huber",
        **dict.fromkeys(("parts", "make_optimizer", "own_rates"), config.loraplus_lr_ratio != 1),
        "average": config.ema_decay,
        "prodigy": config.optimizer == "prodigy",
    }
    return [f"learn.tricks.{name}" for name, on in used.items() if on]
