"""A run that survives: it sets up, continues, logs, saves, exports, draws, and says what is wrong.

The run itself is loop.fit(). All that is here is around its steps: without it a run would be the
same numbers, and lost with the first closed lid.
"""

import contextlib
import dataclasses
import json
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import loop
import model
from inputs import code, options
from inputs.drawing import Options
from inputs.files import Refusal, first_line, only_run, write_whole
from inputs.hub import encoder_fingerprints
from inputs.options import Config
from inputs.sources import Picture, read_dataset
from inputs.vetting import check_device
from keep import checkpoint, drawing, export, faster, faults, identity, meaning, report


@dataclass
class Kept:
    """A run with what makes it survive.

    identity: what makes it this run and no other, and code: a digest of each function that makes
    its numbers; untrained: every matrix at its start, on the CPU; moments: reads and writes the
    optimizer's state by matrix; code_changes: which functions were changed under it, with leave;
    unfused: why its layers are computed by the book's lines, where fused ones were asked for;
    notes: how its files will mean something else than it trains;
    half_done: whether the optimizer is at work, or has failed at it.
    """

    run: loop.Run
    identity: dict[str, str]
    code: dict[str, str]
    untrained: dict[str, Tensor]
    moments: checkpoint.PlainMoments
    team: faster.Alone = field(default_factory=faster.Alone)
    code_changes: str = ""
    unfused: str = ""
    notes: list[str] = field(default_factory=list)
    half_done: bool = False

    def watch_the_optimizer(self) -> None:
        """What fails inside its step leaves numbers that must not be saved."""

        def mark(half_done: bool) -> None:
            self.half_done = half_done

        self.run.optimizer.register_step_pre_hook(lambda *_: mark(True))
        self.run.optimizer.register_step_post_hook(lambda *_: mark(False))


# ---- setting up ----------------------------------------------------------------------------------


@dataclass
class Begun:
    """What is known of a run before an hour of encoding."""

    config: Config
    dtype: torch.dtype
    reason: str
    pictures: list[Picture]
    schedule: model.NoiseSchedule
    identity: dict[str, str]
    code: dict[str, str]
    code_changes: str
    state: dict | None
    planned: str


def look(config: Config, device: torch.device, team: faster.Alone) -> Begun:
    """Read data set and model as far as their names, and compare with the checkpoint, if any."""
    name = config.pretrained_model_name_or_path
    dtype, reason = model.choose_dtype(config.mixed_precision, device)
    pictures = read_dataset(config.dataset_name, config.image_column, config.caption_column)
    schedule = model.load_noise_schedule(name, device)
    fingerprints = encoder_fingerprints(name, dtype != torch.float32)
    noise = f"{schedule.prediction_type} {schedule.alphas_cumprod.tolist()}"
    same = identity.identity(config, dtype, pictures, fingerprints, noise)
    same |= faster.promise(config, device, team.size)
    state = checkpoint.newest_state(config.out / "checkpoints")
    identity.check_same(config, same, state)
    digests = code.digests(faster.code_of(config))
    changes = identity.check_code(config, digests, state)
    most = team.largest_share(config.examples_per_step)
    config, planned = faster.plan(config, device, dtype, most)
    return Begun(config, dtype, reason, pictures, schedule, same, digests, changes, state, planned)


def set_up(
    config: Config, device: torch.device, team: faster.Alone | None = None
) -> tuple[Kept, str]:
    """The data, encoded and the encoders freed; the UNet with its adapter; the checkpoint.

    Returns the run and the lines it begins with.
    """
    team = team or faster.Alone()
    begun = look(config, device, team)
    config, name = begun.config, config.pretrained_model_name_or_path
    if team.first:
        told = {"commit": code.commit(), "code_changes": begun.code_changes}
        written = json.dumps(dataclasses.asdict(config) | told, indent=1)
        write_whole(config.out / "config.json", written.encode())
    timesteps = len(begun.schedule.alphas_cumprod)
    examples = loop.examples_of(config, begun.pictures, device, begun.dtype, timesteps, team.claim)
    team.wait()
    if team.first and (speed := getattr(examples.source, "speed", "")):
        share = f" (by the first of {team.size} processes)" if team.size > 1 else ""
        # With the progress bars, on stderr: it is said at a first start only.
        print(f"{speed}{share}", file=sys.stderr)

    with report.HostMemory() as host:
        if config.base_quantization == "nf4":
            unet = faster.load_unet_nf4(name, device, begun.dtype, Path(config.cache_dir))
        else:
            unet = model.load_unet(name, device, begun.dtype)
    how = [begun.reason, model.use_attention(unet, config.attention, device, begun.dtype)]
    run = loop.assemble(config, unet, examples, begun.schedule, model.latent_scaling(name))
    notes = meaning.meaning(run)
    kept, said = keep(run, begun.identity, begun.code, team, begun.state)
    kept.code_changes, kept.notes = begun.code_changes, notes
    same = f"{run.step} {begun.identity} {begun.code}"
    team.check_equal("the run's start", run.trained, same)
    lines = report.describe(kept, begun.pictures, "; ".join(filter(None, [*how, said])), host)
    more = filter(None, [begun.planned, begun.code_changes, *notes])
    return kept, "\n".join([lines, *more])


def keep(
    run: loop.Run,
    same: dict[str, str],
    digests: dict[str, str],
    team: faster.Alone,
    state: dict | None = None,
) -> tuple[Kept, str]:
    """A run fresh from loop.assemble(), made faster and put where its checkpoint was."""
    moments, said, unfused = faster.faster(run, team, tqdm.write, (state or {}).get("unfused", ""))
    untrained = {name: each.detach().cpu().clone() for name, each in run.trained.items()}
    kept = Kept(run, same, digests, untrained, moments, team, unfused=unfused)
    kept.watch_the_optimizer()
    checkpoint.restore(kept, state)
    return kept, said


# ---- the run -------------------------------------------------------------------------------------


def fit(config: Config, interrupts: report.Interrupts, team: faster.Alone) -> int:
    """Set up, continue, step, save, export. Returns 0, or the exit code of an interrupted run."""
    device = team.start(check_device(config.device))
    if device.type == "cpu" and config.recipe != "pocket":
        print(
            "no GPU is used: full-size SDXL takes minutes a step on a CPU (pocket is made for one)",
            flush=True,  # before a download of gigabytes
        )
    kept, lines = set_up(config, device, team)
    run = kept.run
    team.asked = lambda: bool(interrupts.caught)
    print(lines)
    if run.step:
        print(f"continuing after step {run.step} of {run.config.max_train_steps}")
    interrupts.gently = True
    with report.Log(run.config.out, run.step, run.config, team.first) as log:
        log.also = {"code_changes": kept.code_changes} if kept.code_changes else {}
        try:
            step_and_save(kept, log)
        except FloatingPointError as error:
            refusal = faults.refusal(kept)
            checkpoint.save_state_once(kept)
            raise refusal from error
        except (Refusal, torch.cuda.OutOfMemoryError):  # the steps before this one are whole
            checkpoint.save_state_once(kept)
            raise
    interrupts.gently = False  # now a signal may leave at once: the same command does the rest
    if team.stop or interrupts.caught:  # one may have come after the last step had asked
        print(f"\ninterrupted: step {run.step} is saved; the same command continues")
        return 128 + (interrupts.caught or signal.SIGTERM)
    faster.by_definition(run)  # what is compared with the files is the book's own forward
    model.free_memory()
    team.leave()
    if not team.first:
        return 0
    for path in export.export(kept):
        print(f"saved, read back and compared: {path}")
    export.mark_finished(kept)
    print(f"done: {run.step} steps, {run.loss_scale.skipped} of them skipped for overflow in fp16")
    return 0


def step_and_save(kept: Kept, log: report.Log) -> None:
    """loop.fit(), and what is done after each step, until its end or until one is asked to stop."""
    run, team, began = kept.run, kept.team, time.perf_counter()
    for step, loss, norm in loop.fit(run):
        # Before saving: a saved step is not done again, so its line would be missing if the run
        # were killed in between.
        rate = loop.learning_rate(step - 1, run.config)
        log.write(run, loss, norm, rate, time.perf_counter() - began)
        last = step == run.config.max_train_steps
        if step % run.config.checkpointing_steps == 0 or last or team.stop:
            team.check_equal(f"the adapter after step {step}", run.trained)
            checkpoint.save_state(kept)
        if team.stop:
            team.wait()  # the first to leave has torchrun end the others
            return
        began = time.perf_counter()


def draw(config: Config) -> None:
    """The before/after picture, drawn from the exported file as anyone would draw with it."""
    target = config.out / "pictures" / "before-after.png"
    if not config.validation_prompts or target.is_file():
        return
    options = Options(
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
        drawing.run(options)
    except torch.cuda.OutOfMemoryError as error:
        raise Refusal(
            "the adapter is saved, but drawing its picture ran out of GPU memory",
            "room for the model at its own size",
            f"python generate.py {config.out} --compare --resolution {config.resolution}",
        ) from error


def train(config: Config, team: faster.Alone) -> int:
    """The run and its picture, unless they are there already. Returns the command's exit code."""
    alone = only_run(config.out) if team.first else contextlib.nullcontext()
    with report.Interrupts() as interrupts, team, alone, faster.deterministic(config.deterministic):
        said = team.first_says(export.finished(config) if team.first else "")
        if said:
            print(said)
        elif exit_code := fit(config, interrupts, team):
            return exit_code
        model.free_memory()
        if team.first:
            draw(config)
        return 0


def main(argv: list[str] | Config | None = None) -> int:
    """The command. Returns its exit code: 0 done, 1 a refusal (said on stderr), 128 + signal
    interrupted.
    """
    team = faster.Alone()
    try:
        config = argv if isinstance(argv, Config) else options.parse(argv)
        if config.plan_for:
            print(faster.plan_table(config))
            return 0
        team = faster.join(config.ddp_timeout)
        return train(config, team)
    except Refusal as refusal:
        team.say(f"error: {refusal}")
        return 1
    except torch.cuda.OutOfMemoryError as error:
        team.say(f"error: {of_memory(error, config)}")
        return 1
    except OSError as error:  # a disk that fills up while the log is written, say
        team.say(f"error: {error}. What to do: mend that, then the same command")
        return 1
    except KeyboardInterrupt as interrupt:
        team.say("\ninterrupted: what is saved is whole, and the same command continues")
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def of_memory(error: torch.cuda.OutOfMemoryError, config: Config) -> str:
    """What to do where the GPU's memory is full."""
    less = [] if config.gradient_checkpointing else ["--gradient-checkpointing"]
    if config.train_batch_size > 1:
        n = config.examples_per_step
        less.append(f"--train-batch-size 1 --gradient-accumulation-steps {n}")
    if config.memory_plan:
        less.insert(0, "--no-memory-plan")
    advice = f"add {', or '.join(less)}; the same run continues"
    if not less:
        advice = "with another --output-dir, take the recipe lowmem or a smaller --resolution"
    return (
        f"the GPU's memory is full ({first_line(error)}). What to do: close what else uses this "
        f"GPU, or {advice}"
    )
