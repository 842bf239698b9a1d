"""The training loop, written out: python loop.py t4 --max-train-steps 500

diffusion_loss() and optimizer_step() are the method; fit() is the run around it. A run is a
function of its Config: the same options give the same adapter, however often it was interrupted and
however its batches were cut up.

Letters: `n` examples per optimizer step (batch x accumulation), `B` examples in one pass, others as
in model.py.
"""

import sys

from fast import start
from inputs import options as configuration

if __name__ == "__main__":
    # A wrong option is answered before the imports, and what waits for hardware begins.
    start.leave_when_interrupted()
    start.begin(configuration.parse_or_leave())

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import generate
import lora
import model
from fast import deterministic, graph, nf4, parallel, plan
from fast import layers as fused
from inputs import sources, vetting
from inputs.files import Refusal, first_line, only_run, write_whole
from inputs.options import Config
from keep import checkpoint, report
from keep import faults as diagnose

# ---- the method ----------------------------------------------------------------------------------


def diffusion_loss(
    unet: torch.nn.Module,
    batch: dict[str, Tensor],
    schedule: model.NoiseSchedule,
    scaling: tuple[float, float],
    snr_gamma: float = 0.0,
) -> Tensor:
    """The loss of each example, (B,) fp32: the mean squared error between the UNet's answer and the
    noise (Ho et al. 2020, eq. 14), at timestep t, under the picture's caption and sizes.
    """
    (factor, shift), t, noise = scaling, batch["t"], batch["noise"]
    latent = batch["mean"] + batch["std"] * batch["eps"]  # (B, C, H, W): one of the posterior
    x0 = (latent - shift) * factor
    x_t = model.add_noise(x0, noise, t, schedule)  # (B, C, H, W)
    answer = model.predict(unet, x_t, batch)  # (B, C, H, W) fp32
    target = model.training_target(x0, noise, t, schedule)
    each = F.mse_loss(answer, target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
    return each * snr_weight(t, schedule, snr_gamma)


def snr_weight(t: Tensor, schedule: model.NoiseSchedule, gamma: float) -> Tensor | float:
    """min(SNR, gamma) / SNR, (B,): min-SNR weighting; for v_prediction over SNR + 1. 0 is off.

    Hang et al. 2023, https://arxiv.org/abs/2303.09556, section 3.4.
    """
    if not gamma:
        return 1.0
    abar = schedule.alphas_cumprod[t]
    snr = abar / (1 - abar)
    if schedule.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)  # finite at SNR 0, too


def learning_rate(step: int, config: Config) -> float:
    """The rate of step `step` (from 0): warm-up, then constant or a cosine to lr_end of it."""
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    if config.lr_scheduler == "constant":
        return config.learning_rate
    done = (step - config.lr_warmup_steps) / max(1, config.max_train_steps - config.lr_warmup_steps)
    return config.learning_rate * (
        config.lr_end + (1 - config.lr_end) * (1 + math.cos(math.pi * done)) / 2
    )


@dataclass
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section
    3.2): fp16 gradients vanish below 6e-8, so the loss is multiplied, and the gradient divided,
    by a scale that halves when a gradient overflows and doubles after `growth_interval` good
    steps. Not enabled, it is 1. An overflow that it cannot halve for is an error: no step is
    skipped for ever.
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
            return
        self.good_steps += 1
        if self.enabled and self.good_steps % self.growth_interval == 0:
            self.value *= 2


def micro_batches(
    step: int, n: int, size: int, team: parallel.Alone = parallel.ALONE
) -> Iterator[range]:
    """The numbers of step `step`'s n examples that are this process's, at most `size` at a time:
    the last may be fewer. Of several processes one may have none.
    """
    mine = team.share(range(step * n, (step + 1) * n))
    for first in range(0, len(mine), size):
        yield mine[first : first + size]


@dataclass
class Run:
    """Everything that a step touches.

    identity: what makes it this run and no other; start: the untrained vector, on the CPU; factor:
    the loss scale and loss_sum: the step's loss so far, () fp32 on the device; forward_backward:
    micro_step(), as it is or recorded; coming: the batch that begins the next step; team: the
    processes that share the run; stop: whether one of them was asked to stop; half_done: whether
    the optimizer is at work, or has failed at it.
    """

    config: Config
    device: torch.device
    unet: torch.nn.Module
    adapter: lora.Adapter
    optimizer: torch.optim.Optimizer
    scale: LossScale
    schedule: model.NoiseSchedule
    scaling: tuple[float, float]
    examples: data.Examples
    identity: dict[str, str]
    factor: Tensor
    loss_sum: Tensor
    start: Tensor | None = None
    step: int = 0
    forward_backward: Callable[[dict[str, Tensor]], None] | None = None
    coming: dict[range, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    team: parallel.Alone = parallel.ALONE
    interrupts: report.Interrupts = dataclasses.field(default_factory=report.Interrupts)
    stop: bool = False
    half_done: bool = False


def micro_step(run: Run, batch: dict[str, Tensor]) -> None:
    """Forward and backward over one micro-batch: adds to the flat gradient and to run.loss_sum.

    The host reads no number in here, so that graph.py can record it once and replay it.
    """
    with run.adapter.cast_once(run.unet.dtype) as cast:  # (N,) all A and B in the UNet's dtype
        each = diffusion_loss(run.unet, batch, run.schedule, run.scaling, run.config.snr_gamma)
        loss = each.sum() / run.config.examples_per_step  # (B,) -> ()
        (grad,) = torch.autograd.grad(loss * run.factor, cast)
    run.adapter.flat.grad.add_(grad)
    run.loss_sum.add_(loss.detach())


def optimizer_step(run: Run) -> tuple[float, float]:
    """One step over n examples. Returns their mean loss and the gradient's norm before clipping.

    The loss is a sum over the step's examples divided by n, so 1 x 4, 2 x 2, 3 + 1 and 4 x 1 are
    the same step, in one process or in several that each take a share. Raises Refusal, before
    anything has moved, where loss, adapter or optimizer are not finite, or the gradient is not and
    the loss scale cannot halve.
    """
    config, grad, team = run.config, run.adapter.flat.grad, run.team
    n, size = config.examples_per_step, config.train_batch_size
    cut = functools.partial(micro_batches, n=n, size=size, team=team)
    run.factor.fill_(run.scale.value)
    run.loss_sum.zero_()
    for numbers in cut(run.step):
        batch = run.coming.pop(numbers, None) or run.examples.batch(numbers, run.device)
        run.forward_backward(batch)
    # The step's gradient is a sum over its examples, so over the processes: one all-reduce of the
    # flat vector. All that is decided below is decided on sums, so every process decides the same.
    # The loss and who was asked to stop go apart: the vector's own end is the adapter's.
    asked = torch.full_like(run.loss_sum, bool(run.interrupts.caught))
    team.all_reduce(grad)
    team.all_reduce(small := torch.stack([run.loss_sum, asked]))  # (2,)
    grad.div_(run.factor)
    # A GPU is still at work now; the host makes the next step's first batch before it waits. (Under
    # --no-cache a picture that cannot be encoded is met one step early, and that step is redone.)
    if run.step + 1 < config.max_train_steps:
        for numbers in itertools.islice(cut(run.step + 1), 1):
            run.coming = {numbers: run.examples.batch(numbers, run.device)}
    # Here, and nowhere else in the step, the host waits for a result.
    sums = torch.cat([small, torch.stack([grad.norm(), diagnose.largest(run)])])
    mean_loss, asked, norm, largest = sums.tolist()
    run.stop, overflow = asked > 0, not math.isfinite(norm)
    if not math.isfinite(mean_loss + largest) or (overflow and not run.scale.can_halve()):
        raise diagnose.refusal(run, mean_loss, norm, diffusion_loss)
    if not overflow:
        grad.mul_(min(1.0, config.max_grad_norm / (norm + 1e-6)))  # clip: one vector, one norm
        run.optimizer.param_groups[0]["lr"] = learning_rate(run.step, config)
        run.half_done = True  # what fails from here on leaves numbers that must not be saved
        run.optimizer.step()
        run.half_done = False
    grad.zero_()  # not zero_grad(), which would cut the gradients loose from the flat vector
    run.scale.update(finite=not overflow)
    run.step += 1
    return mean_loss, norm


# ---- everything below is around the method: setting up, continuing, saving, saying ---------------


def make_optimizer(config: Config, flat: torch.nn.Parameter) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101) on the flat parameter."""
    settings = {"lr": config.learning_rate, "weight_decay": config.adam_weight_decay}
    if not config.use_8bit_adam:
        return torch.optim.AdamW([flat], **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception as error:  # not installed, or built for another CUDA
        raise Refusal(
            f"bitsandbytes does not load here ({first_line(error)})",
            "bitsandbytes 0.50 or newer for 8-bit AdamW",
            "pip install --upgrade bitsandbytes, or --no-use-8bit-adam",
        ) from error

    class AdamW8bitWithoutWaiting(AdamW8bit):
        """The library's step() ends by waiting for the GPU; optimizer_step() has done that."""

        @torch.no_grad()
        def step(self):
            if not self.initialized:
                return super().step()
            self.update_step(self.param_groups[0], flat, 0, 0)

    return AdamW8bitWithoutWaiting([flat], **settings)


def prepare(
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    pictures: list[sources.Picture],
    prints: dict[str, str],
    timesteps: int,
    team: parallel.Alone = parallel.ALONE,
) -> data.Examples:
    """The run's examples, from the cache, its gaps filled; or encoded anew every step."""
    name, half = config.pretrained_model_name_or_path, dtype != torch.float32
    encoder = data.Encoder(
        pictures,
        lambda: model.load_vae(name, device),
        lambda: model.load_text_encoders(name, device, half),
        config.resolution,
        config.random_crop,
        config.seed,
    )
    source = encoder
    if config.cache:
        folder = Path(config.cache_dir)
        source = data.fill_cache(folder, encoder, config.random_flip, dtype, prints, team)
    else:
        data.check_pictures(pictures)
    side = config.resolution // 8  # check() refuses what the VAE's factor does not divide
    return data.Examples(
        source,
        [p.name for p in pictures],
        config.seed,
        config.random_flip,
        config.caption_dropout,
        config.noise_offset,
        timesteps,
        (4, side, side),
    )


# ---- the run -------------------------------------------------------------------------------------


def set_up(
    config: Config, device: torch.device, team: parallel.Alone = parallel.ALONE
) -> tuple[Run, str]:
    """The data, encoded and the encoders freed; the UNet with its adapter; the checkpoint.

    Returns the run and the lines it begins with.
    """
    name, out = config.pretrained_model_name_or_path, config.out
    dtype, reason = model.choose_dtype(config.mixed_precision, device)
    pictures = sources.read_dataset(config.dataset_name, config.image_column, config.caption_column)
    prints = checkpoint.encoder_prints(name, dtype != torch.float32)
    schedule = model.load_noise_schedule(name, device)
    noise = f"{schedule.prediction_type} {schedule.alphas_cumprod.tolist()}"
    same = checkpoint.identity(config, dtype, pictures, prints, noise)
    same |= deterministic.promise(config, device, team.size)
    state = checkpoint.newest_state(out / "checkpoints")
    checkpoint.check_same(config, same, state)  # before an hour of encoding, as are the next lines
    most = team.largest_share(config.examples_per_step)
    config, planned = plan.choose(config, device, dtype, micro_step, most)
    if team.first:
        write_whole(out / "config.json", json.dumps(dataclasses.asdict(config), indent=1).encode())
    examples = prepare(config, device, dtype, pictures, prints, len(schedule.alphas_cumprod), team)

    with model.HostMemory() as host:
        if config.base_quantization == "nf4":
            unet = nf4.load_unet_nf4(name, device, dtype, Path(config.cache_dir))
        else:
            unet = model.load_unet(name, device, dtype)
    vetting.check_widths(unet, *examples.source.prompt(0))
    run, how = assemble(config, unet, examples, schedule, model.latent_scaling(name), same)
    run.start, run.team = run.adapter.flat.detach().cpu().clone(), team
    checkpoint.restore(run, state)
    team.check_equal("the run's start", run.adapter.flat, f"{run.step} {same}")
    lines = report.describe(run, pictures, f"{reason}; {how}", host)
    return run, f"{lines}\n{planned}".rstrip()


def assemble(
    config: Config,
    unet: torch.nn.Module,
    examples: data.Examples,
    schedule: model.NoiseSchedule,
    scaling: tuple[float, float],
    identity: dict[str, str],
) -> tuple[Run, str]:
    """A run at its first step from a bare UNet, and how that UNet computes, in words."""
    device, dtype = unet.device, unet.dtype
    how = model.use_attention(unet, config.attention, device, dtype)
    if config.gradient_checkpointing:
        model.use_gradient_checkpointing(unet, config.checkpointed_blocks)
    adapter = lora.inject(unet, lora.TARGETS, config.lora_rank, config.lora_alpha, config.seed)
    if config.fused and how.startswith("SDPA"):
        how += f"; {fused.use(unet)}"
    if config.compile:
        model.compile_resnets(unet)
    half = dtype == torch.float16
    run = Run(
        config=config,
        device=device,
        unet=unet,
        adapter=adapter,
        optimizer=make_optimizer(config, adapter.flat),
        scale=LossScale(enabled=half, value=2.0**16 if half else 1.0),
        schedule=schedule,
        scaling=scaling,
        examples=examples,
        identity=identity,
        factor=torch.ones((), device=device),
        loss_sum=torch.zeros((), device=device),
    )
    run.forward_backward = functools.partial(micro_step, run)
    if config.cuda_graph and device.type == "cuda":
        sums = [adapter.flat.grad, run.loss_sum]
        warm_up = 2 if config.compile else 1  # what is compiled may be compiled again when called
        run.forward_backward = graph.Recorded(run.forward_backward, sums, tqdm.write, warm_up)
    return run, how


def fit(config: Config, interrupts: report.Interrupts, team: parallel.Alone) -> int:
    """Set up, continue, step, save, export. Returns 0, or the exit code of an interrupted run."""
    device = team.start(model.check_device(config.device))
    if device.type == "cpu" and config.recipe != "pocket":
        print(
            "no GPU is used: full-size SDXL takes minutes a step on a CPU (pocket is made for one)",
            flush=True,  # before a download of gigabytes
        )
    run, lines = set_up(config, device, team)
    run.interrupts = interrupts
    print(lines)
    if run.step:
        print(f"continuing after step {run.step} of {config.max_train_steps}")
    run.adapter.check_tied()
    interrupts.gently = True
    with report.Log(config.out, run.step, config, team.first) as log:
        while run.step < config.max_train_steps:
            began, first = time.perf_counter(), run.step
            try:
                loss, norm = optimizer_step(run)
            except (Refusal, torch.cuda.OutOfMemoryError):
                if run.step == first:  # this step did not happen; those before it are whole
                    checkpoint.save_state_once(run)
                raise
            # ---- diagnostics: without them the run is the same. Before saving: a saved step is not
            # done again, so its line would be missing if the run were killed in between.
            log.write(run, loss, norm, learning_rate(first, config), time.perf_counter() - began)
            # ---- once in a while
            last = run.step == config.max_train_steps
            if run.step % config.checkpointing_steps == 0 or last or run.stop:
                team.check_equal(f"the adapter after step {run.step}", run.adapter.flat)
                checkpoint.save_state(run)
            if run.stop:
                team.wait("saving")  # the first to leave has torchrun end the others
                break
    interrupts.gently = False  # now a signal may leave at once: the same command does the rest
    if run.stop or interrupts.caught:  # one may have come after the last step had asked
        print(f"\ninterrupted: step {run.step} is saved; the same command continues")
        return 128 + (interrupts.caught or signal.SIGTERM)
    run.forward_backward = None  # a recording holds the memory of a whole step
    if config.compile:
        model.uncompile(run.unet)  # else the check would compile the forward pass alone
    model.free_memory()
    team.leave()
    if not team.first:
        return 0
    for path in checkpoint.export(run):
        print(f"saved, read back and compared: {path}")
    checkpoint.mark_finished(config, run)
    print(f"done: {run.step} steps, {run.scale.skipped} of them skipped for overflow in fp16")
    return 0


def draw(config: Config) -> None:
    """The before/after picture, drawn from the exported file as anyone would draw with it."""
    target = config.out / "pictures" / "before-after.png"
    if not config.validation_prompts or target.is_file():
        return
    options = generate.Options(
        adapter=str(config.out),
        prompts=config.validation_prompts,
        seeds=(config.seed,),
        compare=True,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        pretrained_model_name_or_path=config.pretrained_model_name_or_path,
        device=config.device,
        mixed_precision=config.mixed_precision,
        base_quantization=config.base_quantization,
        cache_dir=config.cache_dir,
    )
    try:
        generate.run(options)
    except torch.cuda.OutOfMemoryError as error:
        raise Refusal(
            "the adapter is saved, but drawing its picture ran out of GPU memory",
            "room for the model at its own size",
            f"python generate.py {config.out} --compare --resolution {config.resolution}",
        ) from error


def train(config: Config, team: parallel.Alone) -> int:
    """The run and its picture, unless they are there already. Returns the command's exit code."""
    alone = only_run(config.out) if team.first else contextlib.nullcontext()
    with report.Interrupts() as interrupts, team, alone, deterministic.mode(config.deterministic):
        with team.first_alone("looking for a finished run"):
            steps = checkpoint.finished(config)
        if steps:
            print(
                f"{config.out} is finished: {steps} steps on {config.dataset_name}. To go on: "
                "a larger --max-train-steps; to start anew: another --output-dir; to draw: "
                "make generate"
            )
        elif code := fit(config, interrupts, team):
            return code
        team.leave()
        model.free_memory()
        if team.first:
            draw(config)
        return 0


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0 done, 1 a refusal (said on stderr), 128 + signal
    interrupted.
    """
    team = parallel.ALONE
    try:
        config = configuration.parse(argv)
        if config.plan_for:
            print(plan.table(config, micro_step))
            return 0
        team = parallel.join(config.ddp_timeout)
        return train(config, team)
    except Refusal as refusal:
        team.say(f"error: {refusal}")
        return 1
    except torch.cuda.OutOfMemoryError as error:
        less = [] if config.gradient_checkpointing else ["--gradient-checkpointing"]
        if config.train_batch_size > 1:
            less.append(
                f"--train-batch-size 1 --gradient-accumulation-steps {config.examples_per_step}"
            )
        if config.memory_plan:
            less.insert(0, "--no-memory-plan")
        advice = f"add {', or '.join(less)}; the same run continues"
        if not less:
            advice = "with another --output-dir, take the recipe lowmem or a smaller --resolution"
        team.say(
            f"error: the GPU's memory is full ({first_line(error)}). What to do: close what else "
            f"uses this GPU, or {advice}"
        )
        return 1
    except OSError as error:  # a disk that fills up while the log is written, say
        team.say(f"error: {error}. What to do: mend that, then the same command")
        return 1
    except KeyboardInterrupt as interrupt:
        team.say(
            team.why() or "\ninterrupted: what is saved is whole, and the same command continues"
        )
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
