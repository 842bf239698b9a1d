"""A run that survives: it sets up, continues, logs, saves, exports, draws, and says what is wrong.

The run itself is loop.fit(). All that is here is around its steps: without it a run would be the
same numbers, and lost with the first closed lid.
"""

import contextlib
import dataclasses
import json
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

import torch
from tqdm import tqdm

import data
import loop
import model
from adapters import kinds, start
from inputs import code, hub, options
from inputs.drawing import Options
from inputs.files import Refusal, first_line, only_run, place, write_whole
from inputs.options import Config
from inputs.progress import quiet, say
from inputs.sources import Pictures, in_steps
from inputs.vetting import check_device
from keep import checkpoint, drawing, export, faster, faults, identity, meaning, noise, report
from learn import tricks
from learn.held_out import chosen
from learn.judge import Judge
from see import preview


@dataclass
class Kept:
    """A run with what makes it survive.

    moments: reads and writes the optimizer's state by matrix; unfused: why its layers are computed
    by the book's lines, where fused ones were asked for; identity: what makes it this run and no
    other, and code: a digest of each function that makes its numbers; code_changes: which functions
    were changed under it, with leave; losses: the bare base's (keep/noise.py); judge: what it has
    found out about itself; previews: what is drawn after each save; encoding: the
    seconds that its pictures and captions took; half_done: whether the optimizer is at work, or has
    failed at it: its numbers must not be saved.
    """

    run: loop.Run
    team: faster.Alone
    moments: checkpoint.PlainMoments
    unfused: str
    identity: dict[str, str]
    code: dict[str, str]
    code_changes: str
    losses: dict[str, list[float]]
    judge: Judge
    previews: preview.Previews
    encoding: float = 0.0
    half_done: bool = False


# What may change between two starts, and not between two processes: all save and judge at once.
TOGETHER = ("max_train_steps", "checkpointing_steps", "validation_steps", "stop_when_worse")

# ---- setting up ----------------------------------------------------------------------------------


def set_up(
    config: Config, device: torch.device, team: faster.Alone | None = None
) -> tuple[Kept, str]:
    """The data, encoded and the encoders freed; the UNet with its adapter; the checkpoint. Returns
    the run and the lines it begins with.
    """
    team, name = team or faster.Alone(), config.pretrained_model_name_or_path
    dtype, reason = model.choose_dtype(config.mixed_precision, device)
    everything, pictures, held = chosen(config)
    config = in_steps(config, pictures)
    wanted = preview.wanted(config, prompts_of(config, pictures))
    schedule = model.load_noise_schedule(name, device, *config.noise)
    commit = hub.commit_of(name)
    state = checkpoint.state_of_first(team, config.out / "checkpoints")
    config = identity.on_schedule(config, state)
    # Whether the folder holds this run is looked at before an hour of encoding.
    same = identity.identity(config, dtype, everything, schedule)
    same["validation_data"] = identity.of_data(held) if config.validation_data else ""
    same |= faster.promise(config, device, team.size)
    begin, same["start_from"] = identity.start_of(config, dtype != torch.float32, state, schedule)
    digests = faster.digests(config)
    meeting = {name: str(getattr(config, name)) for name in TOGETHER}
    team.check_equal("the run", {}, same | digests | meeting)
    identity.check_same(config, same, state)
    changes = identity.check_code(config, digests, state)
    say("planning the memory" * (config.memory_plan and device.type == "cuda"))
    config, planned = faster.plan(config, device, dtype, team.size)
    say(report.disk(config, pictures, dtype))  # before they are encoded
    how = (device, dtype, len(schedule.alphas_cumprod), team.claim)
    examples, held, encoding = encode(config, pictures, held, *how)
    said, plugged_in = [], {"decode": drawing.decode, "room": faster.between_steps}
    previews = preview.made(config, wanted * team.first, device, dtype, said.append, **plugged_in)
    team.wait()
    unet = faster.unet_loader(config)(name, device, dtype)
    attention = model.use_attention(unet, config.attention, device, dtype)
    parts = (examples, schedule, model.latent_scaling(name), kinds.injector(config))
    run = loop.assemble(config, unet, *parts)
    losses = state.get("losses", {}) if state else noise.losses(run)
    predicts = noise.judge(config, schedule.prediction_type, losses)
    # Of a begun run the checkpoint's numbers count.
    started = start.start(run.adapter, begin) if begin and not state else ""
    notes = meaning.meaning(run)
    unfused = (state or {}).get("unfused", "")
    moments, faster_by, unfused = faster.faster(run, team, tqdm.write, unfused)
    judge = Judge(run, team, (state or {}).get("known", {}), held, between_steps)
    found = (judge, previews, encoding)
    kept = Kept(run, team, moments, unfused, same, digests, changes, losses, *found)
    run.optimizer.register_step_pre_hook(lambda *_: setattr(kept, "half_done", True))
    run.optimizer.register_step_post_hook(lambda *_: setattr(kept, "half_done", False))
    checkpoint.restore(kept, state)
    team.check_equal("the run's start", run.trained)
    if team.first:  # not before: a start that is refused writes nothing
        told = {"base_commit": commit, "validation_prompts": prompts_of(config, pictures)}
        write_down(kept, told, everything)
    how = "; ".join(filter(None, (reason, attention, faster_by)))
    drawn = preview.describe(config, previews.previews, run.step)
    usual = [kinds.describe(run.adapter), tricks.describe(config), planned, drawn]
    base = describe_base(config, commit, predicts) + usual * (not config.quiet)
    lines = [report.describe(kept, pictures, how), *base, changes, started, *notes, *said]
    return kept, "".join(f"{each}\n" for each in lines if each)


def encode(config: Config, pictures: Pictures, held: Pictures, *how) -> tuple:
    """The examples, those of held-out pictures or None, and the seconds that both took."""
    began = time.perf_counter()
    examples = data.examples_of(config, pictures, *how)
    held = data.examples_of(dataclasses.replace(config, cache=True), held, *how) if held else None
    return examples, held, time.perf_counter() - began


def describe_base(config: Config, commit: str, predicts: str) -> list[str]:
    """Which base, and what it predicts."""
    if config.quiet:  # the model's own word is usual, an overruled one comes behind a semicolon
        return [predicts] * ("; " in predicts)
    at = [f"{config.pretrained_model_name_or_path} at commit {commit}"] * bool(commit)
    return [*at, *[f"the VAE is {config.vae}"] * bool(config.vae), predicts]


def write_down(kept: Kept, more: dict, pictures: Pictures) -> None:
    """Into the run's folder: its options with what made it, and digests of its pictures."""
    config = kept.run.config
    told = dataclasses.asdict(config) | {"commit": code.commit(), "code_changes": kept.code_changes}
    makers = ("torch", "diffusers", "transformers", "bitsandbytes")
    installed = [each for name in makers for each in metadata.distributions(name=name)]
    told["versions"] = {each.name: each.version for each in installed}
    told |= more | identity.started_from(config, kept.identity)
    write_whole(config.out / "config.json", json.dumps(told, indent=1).encode())
    write_whole(config.out / identity.PICTURES, json.dumps(identity.listed(pictures)).encode())


# ---- the run -------------------------------------------------------------------------------------


def fit(config: Config, interrupts: report.Interrupts, team: faster.Alone) -> int:
    """Set up, continue, step, save, export. Returns 0, or the exit code of an interrupted run."""
    device = team.start(check_device(config.device))
    if device.type == "cpu" and config.recipe != "pocket":
        slow = "full-size SDXL takes minutes a step on a CPU (pocket is made for one)"
        print(f"no GPU is used: {slow}", flush=True)  # before a download of gigabytes
    if config.recipe == "pocket" and has_own(config):
        print("the small model knows emoji alone: of photographs it makes blots", flush=True)
    began = time.perf_counter()
    if (others := options.relatives(config)) and (why := faster.edited("lora.inject")):
        found = f"{' '.join(others)}, which put in layers by adapters/kinds.py, and {why}"
        raise Refusal(found, "inject() as it was, or attention's LoRA", "leave one out")
    kinds.check(config, model.choose_dtype(config.mixed_precision, device)[0] != torch.float32)
    kept, lines = set_up(config, device, team)
    run, seconds = kept.run, time.perf_counter() - began
    team.asked = lambda: bool(interrupts.caught)
    print(lines, end="", flush=True)
    if run.step:
        say(f"continuing after step {run.step} of {run.config.max_train_steps}")
    interrupts.gently = True
    with report.Log(run.config, run.step, team.first, kept.code_changes) as log:
        log.began(kept, lines, seconds)
        kept.previews.say = lambda said: log.say(run.step, said)
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
    if team.first:
        say("saving the adapter")
        last, told = export.export(kept), export.export_as_lora(kept)  # before others are put in
        for path in (*last, *export.export_ema(kept), *export.export_best(kept)):
            say(f"saved, read back and compared: {path}")
        for path in told:
            say(f"saved: {path}")
        export.mark_finished(kept)
        skipped = f", {run.loss_scale.skipped} of them skipped for overflow in fp16"
        say(kept.judge.worst())
        most = run.config.max_train_steps
        early = f" of {most}" * (run.step < most)  # where it was stopped by its loss
        print(f"done: {run.step}{early} steps{skipped * run.loss_scale.enabled}")
        print(kept.judge.verdict(), end="")
    return 0


def step_and_save(kept: Kept, log: report.Log) -> None:
    """loop.fit(), and what is done after each step, until its end or until one is asked to stop."""
    run, team = kept.run, kept.team
    config, judge = run.config, kept.judge
    with log.timed("held-out loss", run):
        lowest = judge.validate(log)  # of the bare model, or a step after which a run was killed
    if lowest:
        checkpoint.save_state(kept)
    if run.step % config.checkpointing_steps == 0 or run.step == config.max_train_steps:
        judge.note()
        # Of step 0, or where a run was killed drawing. A step saved for a signal has no picture.
        with log.timed("previews", run):
            kept.previews.draw(run, log.show, lacking=True)
        with log.timed("the page", run):
            report.write_page(config, team.first)
    if config.stop_when_worse and judge.risen:
        return
    began = time.perf_counter()
    for step, loss, norm in loop.fit(run):
        # Before saving: a saved step is not done again, so its line would be missing if the run
        # were killed in between.
        rate = loop.learning_rate(step - 1, config)
        rate *= run.optimizer.param_groups[0].get("d", 1)  # Prodigy's own
        log.write(run, loss, norm, rate, time.perf_counter() - began)
        judge.after_step()
        with log.timed("held-out loss", run):
            lowest = judge.validate(log)
        worse = config.stop_when_worse and judge.risen
        due = step % config.checkpointing_steps == 0 or step == config.max_train_steps or worse
        if due or lowest:
            judge.note()
        if due or lowest or team.stop:
            with log.timed("saving", run):
                team.check_equal(f"the adapter after step {step}", run.trained)
                checkpoint.save_state(kept)
            if due and not team.stop:  # else the next start draws
                with log.timed("previews", run):
                    kept.previews.draw(run, log.show)
            with log.timed("the page", run):
                report.write_page(config, team.first)
        if team.stop:
            team.wait()  # the first to leave has torchrun end the others
        if team.stop or worse:
            return
        began = time.perf_counter()


@contextlib.contextmanager
def between_steps(run: loop.Run) -> Iterator[None]:
    """A context for looking at the run between two steps, in their memory, as it draws."""
    with faster.between_steps(run), preview.as_drawn(run):
        yield


def has_own(config: Config) -> bool:
    """Whether the pictures are others than the recipe's."""
    usual = options.RECIPES[config.recipe][1]
    ours, theirs = ([place(n).resolve() for n in each.dataset_name] for each in (config, usual))
    return ours != theirs


def asks_for_own(config: Config) -> bool:
    """Whether the prompts are still the recipe's, and the pictures are others."""
    usual = options.usual(config.recipe, config.quick, config.better)
    return has_own(config) and config.validation_prompts == usual.validation_prompts


def prompts_of(config: Config, pictures: Pictures) -> list[str]:
    """What the picture at the end shows: own pictures without --validation-prompts have three of
    their own captions drawn, chosen by the seed; the empty one where there is no other.
    """
    if not asks_for_own(config):
        return list(config.validation_prompts)
    told = dict.fromkeys(caption.strip() for p in pictures for caption in p.captions)
    captions = [*filter(None, told)] or [""]
    few = random.Random(config.seed).sample(range(len(captions)), min(3, len(captions)))
    return [captions[i] for i in sorted(few)]


def draw(config: Config) -> None:
    """The before/after picture, drawn from the exported file as anyone would draw with it."""
    if not config.validation_prompts or (config.out / "pictures" / "before-after.png").is_file():
        return
    usual = options.RECIPES[config.recipe][1]
    given = {"device": config.device, "mixed_precision": config.mixed_precision}
    given |= {"seeds": (config.seed,), "compare": True}  # the rest says config.json
    for name in ("num_inference_steps", "guidance_scale"):  # a distilled base has others
        if getattr(config, name) != getattr(usual, name):
            given[name] = getattr(config, name)
    if asks_for_own(config):
        say("the picture at the end shows captions that were trained on")
    else:
        given["prompts"] = config.validation_prompts
    try:
        drawing.run(Options(str(config.out), **given))
    except Refusal as refusal:  # of a full GPU, say; it speaks of generate.py's options
        found, expected, remedy = refusal.parts
        found = f"the adapter is saved, but its picture is not drawn: {found}"
        remedy = f"python generate.py {config.out} --compare, with what helps: {remedy}"
        raise Refusal(found, expected, remedy) from refusal


def train(config: Config, team: faster.Alone) -> int:
    """The run and its picture, unless they are there already. Returns the command's exit code."""
    name, held = config.pretrained_model_name_or_path, contextlib.ExitStack()
    with report.Interrupts() as interrupts, team, held, faster.deterministic(config.deterministic):
        # The output folder is the first process's: others may be on hosts that do not see it.
        team.from_first(lambda: held.enter_context(only_run(config.out)))
        revision = team.from_first(lambda: identity.revision(config))
        hub.use_revision(name, revision, config.vae)
        said = team.from_first(lambda: export.finished(config))
        if said:
            print(said)
        elif exit_code := fit(config, interrupts, team):
            return exit_code
        model.free_memory()
        if team.first:
            try:
                draw(config)
            finally:  # also where the last picture does not fit the GPU
                report.write_page(config)
            print(report.last_lines(config))
        return 0


def main(argv: list[str] | Config | None = None) -> int:
    """The command. Returns its exit code: 0 done, 1 a refusal (said on stderr), 128 + signal
    interrupted.
    """
    team = faster.Alone()
    try:
        config = argv if isinstance(argv, Config) else options.parse(argv)
        quiet[0] = config.quiet
        if config.plan_for:
            hub.use_revision(config.pretrained_model_name_or_path, config.revision, config.vae)
            plan = faster.part("plan", f"--plan-for {config.plan_for}")
            print(plan.table(config, kinds.injector(config)))
            return 0
        team = faster.join(config.ddp_timeout)
        return train(config, team)
    except KeyboardInterrupt as interrupt:
        team.say(
            "\ninterrupted at once: what is saved is whole, and the same command continues from it"
        )
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    except Refusal as refusal:
        found = str(refusal)
    except torch.cuda.OutOfMemoryError as error:
        found = f"the GPU's memory is full ({first_line(error)}). What to do: close what else "
        found += f"uses this GPU, or {report.less_memory(config)}"
    except OSError as error:  # a disk that fills up while the log is written, say
        found = f"{error}. What to do: mend that, then the same command"
    finally:
        quiet[0] = False
    team.say(f"error: {found}")
    return 1
