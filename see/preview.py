"""Pictures while a run trains: the same prompts and seeds at step 0, every --checkpointing-steps
and at the end, drawn by generate.py's own lines with the UNet that is trained, as it stands. They
change no bit of the run.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from PIL import Image

import generate
import model
from inputs import drawing, hub, vetting
from inputs.drawing import Options
from inputs.files import Refusal, first_line, place, write_whole
from inputs.options import RECIPES, Config
from inputs.progress import progress

LESS = "fewer --preview-prompts or smaller ones (--w, --h), or --preview-steps 0"


def wanted(config: Config, usual: list[str]) -> list[Options]:
    """What a run draws, as drawing.previews() has it; with a base that was distilled to few steps
    in so many, and under its guidance, where nothing else is asked for.
    """
    name, recipe = config.pretrained_model_name_or_path, RECIPES[config.recipe][1]
    kind, steps, scale = drawing.few_steps(name, drawing.sampler_of(name), hub.read_scheduler(name))
    if kind and config.preview_steps == recipe.preview_steps:
        config = replace(config, preview_steps=steps)
    if kind and config.guidance_scale == recipe.guidance_scale:
        config = replace(config, guidance_scale=scale)
    return drawing.previews(config, usual)


def describe(config: Config, previews: list[Options], step: int) -> str:
    """How many there will be from `step` on, and how much of the run they are, in words."""
    if not previews:
        return ""
    work, times = drawing.steps_worth(config, previews), drawing.times(config, step)
    share = work * times / max(1, config.max_train_steps - step)
    # A preview that takes more than a twentieth of a run is hardly what was meant.
    less = f"; for less: a larger --checkpointing-steps, {LESS}" if share > 0.05 else ""
    count = f"{len(previews)} preview{'s' * (len(previews) > 1)}, {times} time{'s' * (times != 1)}"
    said = f"{count}, in {config.out / 'pictures'}: each time the work of about {work:.1f} training"
    said += f" steps, in all {share:.1%} of the run, more where a GPU waits for its host"
    return f"{said}{less}"


def rescale(run) -> float:
    """How far guidance is rescaled, by the schedule that is trained."""
    return drawing.RESCALE * (not run.schedule.alphas_cumprod[-1])


def in_words(error: Exception) -> str:
    """An error as its user reads it; one of the code, which may have no text, with its kind."""
    known = isinstance(error, Refusal)
    return str(error) if known else f"{type(error).__name__}: {first_line(error)}"


@contextlib.contextmanager
def as_drawn(run) -> Iterator[None]:
    """Within, the run's layers do nothing that they do in training only; each is as it was then."""
    modes = {module: module.training for module in run.unet.modules()}
    try:
        run.unet.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@dataclass
class Previews:
    """What a run draws while it trains, of each its prompt's embedding. decode: generate.decode(),
    or one that needs less memory; room: a context of the run in which memory is taken; say: gets a
    sentence where a preview is not drawn, which never ends the run.
    """

    previews: list[Options]
    embeddings: list[dict]
    sampler: object
    say: Callable[[str], None]
    decode: Callable
    room: Callable

    def draw(self, run, show: Callable, lacking: bool = False) -> None:
        """Draw those of run.step into OUT/pictures, all or only what is `lacking` there; show(name,
        picture, step) gets each.
        """
        folder, failed = run.config.out / "pictures", ""
        names = [drawing.stem(i, *each.pictures[0]) for i, each in enumerate(self.previews)]
        todo = {i: folder / f"{run.step:06d}-{name}.png" for i, name in enumerate(names)}
        if lacking and run.step:  # at step 0 what is there is an earlier run's
            todo = {i: path for i, path in todo.items() if not path.exists()}
        if not todo:
            return
        try:
            with self.room(run):
                pictures = self.drawn(run, [*todo])
            for i, picture in zip(todo, pictures, strict=True):
                write_whole(todo[i], generate.png_bytes(picture, self.about(run, i)))
                show(names[i], picture, run.step)
        except Exception as error:  # a full GPU, or whatever it is: it is not worth a run
            failed = in_words(error)
        if failed:  # out here the error no longer holds what filled the memory
            model.free_memory()
            said = f"no preview of step {run.step}, and the run goes on: {failed}"
            self.say(f"{said}; to have less drawn: {LESS}")

    def drawn(self, run, numbers: list[int]) -> list[Image.Image]:
        """The pictures of these numbers. The VAE is in memory only for them."""
        latents = []
        with as_drawn(run):
            for i in progress(numbers, "drawing previews", delay=2):
                each, row = self.previews[i], self.embeddings[i]
                size, how = (each.height // 8, each.width // 8), each.num_inference_steps
                how = (each.seeds[0], size, how, each.guidance_scale, rescale(run))
                latents.append(generate.sample(run.unet, self.sampler, row, *how).cpu())
        vae = model.load_vae(run.config.pretrained_model_name_or_path, run.unet.device)
        return [self.decode(vae, [latent], run.latent_scaling)[0] for latent in latents]

    def about(self, run, i: int) -> str:
        """What a preview's PNG says of it."""
        each, base = self.previews[i], place(run.config.pretrained_model_name_or_path)
        how = {"Steps": str(each.num_inference_steps), "Sampler": type(self.sampler).__name__}
        how |= {"CFG scale": f"{each.guidance_scale:g}", "Model": base.resolve().name}
        how |= {"VAE": drawing.public_name(run.config.vae)} if run.config.vae else {}
        how |= {"CFG rescale": f"{rescale(run):g}"} if rescale(run) else {}
        how["Lora steps"] = str(run.step)
        return drawing.parameters(each, each.pictures, (each.width, each.height), how)


def made(
    config: Config, previews: list[Options], device, dtype, say: Callable, **plugged_in: Callable
) -> Previews:
    """Encoded, before the UNet is loaded: text encoders and UNet never share the memory."""
    rows, sampler, name = [], None, config.pretrained_model_name_or_path
    half = dtype != torch.float32
    try:
        if previews:
            steps = max(each.num_inference_steps for each in previews)
            with torch.random.fork_rng([]):  # some samplers draw noise when they are tried
                sampler = vetting.load_sampler(name, "", steps, *config.noise)
            prompts, away = [p.prompts[0] for p in previews], [p.negative_prompt for p in previews]
            rows = generate.encode(name, prompts, away, device, half, config.max_tokens)
    except Exception as error:  # a sampler that is not known here, say
        say(f"no previews, and the run goes on: {in_words(error)}")
        previews = []
    return Previews(previews, rows, sampler, say, **plugged_in)
