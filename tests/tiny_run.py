"""A kept run of the tiny UNet, without the command: two examples a step, drawn by number."""

import dataclasses
from types import SimpleNamespace

import torch

import loop
import model
from adapters import kinds
from conftest import make_batch, make_unet
from data import drawn_timesteps
from inputs.options import RECIPES
from keep import checkpoint

SCHEDULE = model.NoiseSchedule(torch.linspace(0.999, 0.005, 1000), "epsilon")


class Examples:
    source = SimpleNamespace(prompt=lambda index: (torch.zeros(7, 48), torch.zeros(24)))
    names = ["a.png"]

    def at_once(self, step, batch):
        return batch

    def example(self, i):
        return SimpleNamespace(picture=0, flip=False, drop_caption=False)

    def batch(self, numbers, device, timesteps=drawn_timesteps):
        return make_batch(len(numbers), seed=numbers.start)


def assembled(out, **options) -> loop.Run:
    """loop.assemble() on a new tiny UNet."""
    settings = {"output_dir": str(out), "train_batch_size": 2, "gradient_accumulation_steps": 1}
    settings |= {"lora_rank": 5, "learning_rate": 1e-2, "max_train_steps": 10}
    config = dataclasses.replace(RECIPES["pocket"][1], **settings | options)
    parts = (Examples(), SCHEDULE, (0.13, 0.0), kinds.injector(config))
    return loop.assemble(config, make_unet(), *parts)


def keep(run: loop.Run, vector: bool = False) -> SimpleNamespace:
    """The fields of keep.training.Kept; `vector`: with everything in one vector."""
    kept = SimpleNamespace(
        run=run,
        identity={"base": "0"},
        code={"lora.LoRALinear": "1"},
        team=SimpleNamespace(first=True),
        code_changes="",
        unfused="",
        losses={},
        judge=SimpleNamespace(known={}, best=None),
        half_done=False,
    )
    if vector:
        from fast.flat import Flat, FlatMoments

        flat = Flat(run.unet, run.trained)
        run.trained, run.optimizer = flat.views, loop.make_optimizer(run.config, [flat.vector])
        run.micro_step = flat.micro_step(run.micro_step)
        kept.moments = FlatMoments([flat], run.optimizer)
    else:
        kept.moments = checkpoint.PlainMoments(run.optimizer, run.trained)
    return kept


def step(kept: SimpleNamespace, count: int) -> SimpleNamespace:
    for _ in range(count):
        loop.optimizer_step(kept.run)
    return kept
