"""The training loop, written out: python loop.py pocket --plain

diffusion_loss(), micro_step() and optimizer_step() are the method. With --plain they run as they
stand here, from the pictures to the adapter's file. Without it the same fit() and optimizer_step()
run with other things in the six sockets of a Run, which keep/faster.py fills; it lays all matrices
into one vector and fuses layers of the UNet, too. Options of learn/ fill `loss` and `timesteps`.

Letters: `n` examples per optimizer step (batch x accumulation), `B` examples in one pass, others as
in model.py.
"""

import sys

if __name__ == "__main__":  # before torch, whose import takes seconds
    from inputs.options import parse_or_leave

    CONFIG = parse_or_leave()
    if not CONFIG.plain:
        from keep.command import train

        sys.exit(train(CONFIG))

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import lora
import model
from inputs.drawing import header
from inputs.files import Refusal
from inputs.hub import use_revision
from inputs.options import Config
from inputs.sources import in_steps, read_datasets
from inputs.vetting import check_device, check_widths, load_bitsandbytes

# ---- the method ----------------------------------------------------------------------------------


def diffusion_loss(
    unet: torch.nn.Module,
    batch: dict[str, Tensor],
    schedule: model.NoiseSchedule,
    latent_scaling: tuple[float, float],
    snr_gamma: float = 0.0,
    robust: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The loss of each example, (B,) fp32: the mean squared error between the UNet's answer and its
    target, the noise (Ho et al. 2020, eq. 14) or v, each latent pixel weighted where the run has
    masks, times the min-SNR weight. batch: as data.Examples.batch() gives it; robust: what of the
    squared errors (B, C, H, W) counts, with t and schedule, such as Huber's (learn/tricks.py).
    """
    (scaling_factor, shift_factor), t, noise = latent_scaling, batch["t"], batch["noise"]
    latent = batch["mean"] + batch["std"] * batch["eps"]  # (B, C, H, W): a sample of the posterior
    x0 = (latent - shift_factor) * scaling_factor
    x_t = model.add_noise(x0, noise, t, schedule)  # (B, C, H, W)
    answer = model.predict(unet, x_t, batch)  # (B, C, H, W) fp32
    target = model.training_target(x0, noise, t, schedule)
    each = F.mse_loss(answer, target, reduction="none")  # (B, C, H, W)
    if robust:
        each = robust(each, t, schedule)
    if "mask" in batch:  # weights (B, 1, H, W) of mean 1, the same in all channels
        each = each * batch["mask"]
    return each.mean(dim=(1, 2, 3)) * model.snr_weight(t, schedule, snr_gamma)  # (B,)


def learning_rate(step: int, config: Config) -> float:
    """The rate of step `step` (from 0): it rises over the warm-up, then stays, or falls along a
    line or a cosine to lr_end times itself, which it has one step after the schedule's last, and
    keeps.
    """
    if step < (warmup := config.lr_warmup_steps):
        return config.learning_rate * (step + 1) / warmup
    done = min(1, (step - warmup) / max(1, config.schedule_steps - warmup))
    left = {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.learning_rate * (config.lr_end + (1 - config.lr_end) * left[config.lr_scheduler])


@dataclass
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section
    3.2): fp16 gradients vanish below 6e-8, so the loss is multiplied, and the gradient divided, by
    a value that halves when a gradient overflows and doubles after `growth_interval` good steps.
    Not enabled, it is 1. At 1 it cannot be halved any more: then an overflow ends the run instead
    of skipping every step.
    """

    enabled: bool
    value: float = 1.0
    good_steps: int = 0
    skipped: int = 0
    growth_interval: int = 2000

    def can_halve(self) -> bool:
        return self.enabled and 1 < self.value < math.inf  # False for nan, too

    def update(self, finite: bool) -> None:
        if not finite:
            self.good_steps, self.skipped, self.value = 0, self.skipped + 1, self.value / 2
        elif self.enabled:
            self.good_steps += 1
            self.value *= 2 if self.good_steps % self.growth_interval == 0 else 1


def step_batches(
    run: "Run", step: int, share: Callable[[range], range] = lambda numbers: numbers
) -> Iterator[dict[str, Tensor]]:
    """The n examples of step `step`, train_batch_size in each batch, or more if they are small.
    share: which of them this process computes where there are several; alone, all.
    """
    n = run.config.examples_per_step
    size = run.examples.at_once(step, run.config.train_batch_size)
    for numbers in data.cut(share(range(step * n, (step + 1) * n)), size):
        # Not unet.device, which looks through all modules.
        yield run.examples.batch(numbers, run.loss_sum.device, run.timesteps)


def micro_step(run: "Run", batch: dict[str, Tensor]) -> None:
    """Forward and backward over one batch: adds to the gradients of A and B, and to run.loss_sum.

    No number is read from the GPU in here, so that the whole of it can be recorded once and
    replayed (fast/graph.py).
    """
    each = run.loss(run.unet, batch, run.schedule, run.latent_scaling, run.config.snr_gamma)  # (B,)
    # Divided by n, not by B: so 4 examples give the same gradient, up to rounding, in one pass of
    # 4, in two of 2, or in one of 3 and one of 1.
    loss = each.sum() / run.config.examples_per_step
    (loss * run.scale_on_device).backward()
    run.loss_sum.add_(loss.detach())


def gradient_norm(trained: dict[str, Tensor]) -> Tensor:
    """The norm of the matrices' norms, () on the device: the length of the whole gradient.

    Always matrix by matrix, also where fast/flat.py keeps all gradients in one vector: one norm
    over the vector is summed in another order, and its last digits would change every byte of a
    clipped step.
    """
    return torch.nn.utils.get_total_norm([matrix.grad for matrix in trained.values()])


def unscale_and_clip(run: "Run", norm: float) -> None:
    """Divide the gradient by the loss scale, and shorten it to max_grad_norm where `norm`, its
    length without the scale, is longer (Pascanu et al. 2013, https://arxiv.org/abs/1211.5063).
    """
    shrink = min(1.0, run.config.max_grad_norm / (norm + 1e-6)) / run.loss_scale.value
    # Over the optimizer's own list, not run.trained: it may hold one vector for all matrices.
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.mul_(shrink)


def optimizer_step(run: "Run") -> tuple[float, float]:
    """One step over n examples. Returns their mean loss and the gradient's norm before clipping.

    Raises FloatingPointError, before anything has moved, where the loss is not finite, or the
    gradient is not and the loss scale cannot halve.
    """
    run.scale_on_device.fill_(run.loss_scale.value)
    run.loss_sum.zero_()
    for batch in run.batches(run, run.step):  # socket: where the step's examples come from
        run.micro_step(run, batch)  # socket: as it is, or recorded and replayed
    run.exchange(run)  # socket: several processes add their gradients and losses here
    norm = gradient_norm(run.trained) / run.scale_on_device  # ()
    # Here, and only here, the CPU waits for the GPU: .tolist() needs the numbers.
    loss, norm = torch.stack([run.loss_sum, norm]).tolist()
    finite = math.isfinite(loss + norm)
    if finite:
        unscale_and_clip(run, norm)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run.step, run.config)
        run.optimizer.step()  # socket: AdamW, over every matrix or over one vector of them all
    elif not (math.isfinite(loss) and run.loss_scale.can_halve()):
        raise FloatingPointError(f"step {run.step + 1}: loss {loss}, gradient norm {norm}")
    run.optimizer.zero_grad(set_to_none=False)  # not to None: a recorded graph knows their place
    run.loss_scale.update(finite)
    run.step += 1
    return loss, norm


def fit(run: "Run") -> Iterator[tuple[int, float, float]]:
    """Step until max_train_steps, and give (step, loss, gradient norm) after each. Printing, saving
    and stopping are not done here: the caller's for loop does them between two steps.
    """
    while run.step < run.config.max_train_steps:
        loss, norm = optimizer_step(run)
        yield run.step, loss, norm


# ---- what a step touches, and how it is put together ---------------------------------------------


@dataclass
class Run:
    """Everything that a step touches. trained: every matrix that learns, fp32, by its name;
    latent_scaling: the VAE's (scaling_factor, shift_factor); scale_on_device: loss_scale.value as a
    tensor, since a recorded graph can read a tensor but not a Python number; loss_sum: the step's
    loss so far, both () fp32 on the device.
    """

    config: Config
    unet: torch.nn.Module
    adapter: lora.Adapter
    trained: dict[str, Tensor]
    examples: data.Examples
    schedule: model.NoiseSchedule
    latent_scaling: tuple[float, float]
    loss_scale: LossScale
    scale_on_device: Tensor
    loss_sum: Tensor
    # The six sockets. Functions in fields are not bound: batches, micro_step and exchange are
    # handed the run.
    optimizer: torch.optim.Optimizer
    batches: Callable[["Run", int], Iterator[dict[str, Tensor]]] = step_batches
    timesteps: Callable[[list[data.Example]], Tensor] = data.drawn_timesteps
    loss: Callable[..., Tensor] = diffusion_loss
    micro_step: Callable[["Run", dict[str, Tensor]], None] = micro_step
    exchange: Callable[["Run"], None] = lambda run: None  # one process has all of them already
    step: int = 0


def make_optimizer(config: Config, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101), its two moments in 8 bits
    (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861) or in 32.
    """
    settings = {"lr": config.learning_rate, "weight_decay": config.adam_weight_decay}
    if not config.use_8bit_adam:
        return torch.optim.AdamW(parameters, **settings)
    bitsandbytes = load_bitsandbytes("8-bit AdamW", "--no-use-8bit-adam")
    # 8 bits for every matrix: by default those under 4,096 numbers would keep 32, and a run whose
    # matrices lie in one vector (fast/flat.py) would end on other numbers.
    return bitsandbytes.optim.AdamW8bit(parameters, **settings, min_8bit_size=1)


def assemble(
    config: Config,
    unet: torch.nn.Module,
    examples: data.Examples,
    schedule: model.NoiseSchedule,
    latent_scaling: tuple[float, float],
    inject: Callable = lora.inject,
) -> Run:
    """A run at its first step, from a bare UNet, the examples, and what puts an adapter into it."""
    check_widths(unet, *examples.source.prompt(0))
    if config.gradient_checkpointing:
        model.use_gradient_checkpointing(unet, config.checkpointed_blocks)
    adapter = inject(unet, lora.TARGETS, config.lora_rank, config.alpha, config.seed)
    trained = lora.trained(unet)
    for matrix in trained.values():
        matrix.grad = torch.zeros_like(matrix)  # backward adds to it, in place
    fp16 = unet.dtype == torch.float16  # bf16 has fp32's range and needs no loss scale
    loss_scale = LossScale(enabled=fp16, value=2.0**16 if fp16 else 1.0)
    scale_on_device, loss_sum = torch.zeros(2, device=unet.device)
    optimizer = make_optimizer(config, list(trained.values()))
    parts = (unet, adapter, trained, examples, schedule, latent_scaling)
    return Run(config, *parts, loss_scale, scale_on_device, loss_sum, optimizer)


def train_plain(config: Config) -> None:
    """--plain: from the pictures to the adapter's file, by the lines of this book alone."""
    name, device = config.pretrained_model_name_or_path, check_device(config.device)
    use_revision(name, config.revision, config.vae)
    dtype, reason = model.choose_dtype(config.mixed_precision, device)
    schedule = model.load_noise_schedule(name, device, *config.noise)
    pictures = read_datasets(config)
    config = in_steps(config, pictures)
    examples = data.examples_of(config, pictures, device, dtype, len(schedule.alphas_cumprod))
    unet = model.load_unet(name, device, dtype)
    how = model.use_attention(unet, config.attention, device, dtype)
    print(f"{pictures}; UNet in {str(dtype)[6:]} ({reason}; {how})", flush=True)
    run = assemble(config, unet, examples, schedule, model.latent_scaling(name))
    for step, loss, norm in fit(run):
        print(f"step {step}: loss {loss:.4f}, gradient norm {norm:.4f}", flush=True)
    if lost := run.trained.keys() - run.adapter.matrices().keys():
        print(f"the file holds A and B alone, not {min(lost)}: it will act otherwise than trained")
    path = config.out / lora.FILE_NAME
    about = {"base_model": name, "recipe": config.recipe, "steps": str(run.step)}
    lora.save(run.adapter, path, model.DTYPES[config.save_dtype], about | header(config, schedule))
    print(f"saved {path}")


if __name__ == "__main__":
    try:
        train_plain(CONFIG)
    except (Refusal, FloatingPointError) as error:
        sys.exit(f"error: {error}")
