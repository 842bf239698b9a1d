"""Whether the base predicts what its files say. With a wrong word there a
model trains as smoothly as any, and its adapter draws noise.
"""

from dataclasses import replace
from pathlib import Path

import torch

import loop
import lora
import model
from inputs.files import Refusal
from inputs.hub import file_of
from inputs.options import Config
from inputs.progress import progress
from inputs.vetting import noise_settings

PICTURES, TIMESTEPS, KINDS = 8, 16, ("epsilon", "v_prediction")


@torch.no_grad()
def losses(run: loop.Run) -> dict[str, list[float]]:
    """The bare base's mean loss as one that predicts epsilon, and as one that predicts v; and with
    each the mean squared error of the picture (x0) that its answers then mean, and what the loss of
    no answer at all would be. Over the run's first 8 pictures, each with its example's noise at the
    middles of 16 equal parts of the timesteps, but for those that are all but pure noise.

    run: loop.assemble()'s, not yet made faster. No generator of the run's is drawn from, and less
    memory is needed than in a step.
    """
    (factor, shift), schedule, device = run.latent_scaling, run.schedule, run.unet.device
    count, length = min(PICTURES, len(run.examples.names)), len(schedule.alphas_cumprod)
    middles = ((torch.arange(TIMESTEPS, device=device) + 0.5) / TIMESTEPS * length).long()
    middles = middles[schedule.alphas_cumprod[middles] > 1e-3]  # where noise is all, x0 is a guess
    both = [replace(schedule, prediction_type=kind) for kind in KINDS]
    sums = torch.zeros(2, 3, device=device)
    lora.set_strength(run.adapter, 0.0)
    for i in progress(range(count), "checking the base"):
        one = run.examples.batch(range(i, i + 1), device)
        for t in middles.split(run.config.train_batch_size):
            batch = {key: each.expand(len(t), *each.shape[1:]) for key, each in one.items()}
            x0 = (batch["mean"] + batch["std"] * batch["eps"] - shift) * factor
            x_t = model.add_noise(x0, batch["noise"], t, schedule)
            answer = model.predict(run.unet, x_t, batch | {"t": t})
            targets = [model.training_target(x0, batch["noise"], t, each) for each in both]
            each = torch.stack([(answer - y).square().mean((1, 2, 3)) for y in targets])  # (2, B)
            abar = schedule.alphas_cumprod[t]
            x0_error = each * (1 - abar) / torch.stack([abar, torch.ones_like(abar)])
            silent = torch.stack([y.square().mean((1, 2, 3)) for y in targets])
            sums += torch.stack([each.sum(1), x0_error.sum(1), silent.sum(1)], 1)
    lora.set_strength(run.adapter, 1.0)
    model.free_memory()
    return dict(zip(KINDS, (sums / count / len(middles)).tolist(), strict=True))


def judge(config: Config, predicts: str, losses: dict[str, list[float]]) -> str:
    """The line that tells what the UNet is trained to predict and who says so. losses: losses(), or
    {} where none were taken.

    Raises Refusal where the files say one thing and the losses the other; it is only told where
    --prediction-type says it. Both errors must speak for the other, one by more than 4 to 1: the
    loss tells epsilon taken for v best, and x0 the reverse. Random weights predict neither: they do
    not halve the loss of no answer at all.
    """
    name, asked = config.pretrained_model_name_or_path, config.prediction_type != "auto"
    file = Path(name).name if file_of(name) else "scheduler/scheduler_config.json"
    _, said, own = noise_settings(name)
    where = f"{file} says {said}" if said else f"diffusers' default, since {file} does not say"
    line = f"the UNet predicts {predicts} ({'--prediction-type; ' * asked}{where})"
    zero, told = config.zero_terminal_snr, f"{file} says {'yes' if own else 'no'})"
    if own or zero != "auto":
        line += f", {'without' if zero == 'no' else 'with'} zero terminal SNR ("
        line += told if zero == "auto" else f"--zero-terminal-snr; {told}"
    (other,) = {*KINDS} - {predicts}
    mine, theirs = losses.get(predicts, [1.0] * 3), losses.get(other, [1.0] * 3)
    ratios = [a / max(b, 1e-9) for a, b in zip(mine[:2], theirs[:2], strict=True)]
    if theirs[0] > 0.5 * theirs[2] or not (min(ratios) > 1 and max(ratios) > 4):
        return line
    found = f"{line}, but the base's answers are {max(ratios):.3g} times nearer to {other} (their "
    found += f"loss is {theirs[0]:.3g} so, not {mine[0]:.3g}, on the first pictures)"
    if asked:
        return found
    remedy = f"--prediction-type {other}, or --prediction-type {predicts} to train so all the same"
    raise Refusal(found, "what the base was trained to predict", remedy)
