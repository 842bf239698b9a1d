"""What generate.py is asked to draw, with which adapter, and what its pictures are called and say
of themselves. Light on purpose, as options.py is.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from inputs import hub
from inputs import options as configuration
from inputs.files import FILE_NAME, Refusal, data_section, digest, place, refuse, refusing
from inputs.options import RECIPES, Config, Within


@dataclass(frozen=True)
class Options:
    """Draw with an adapter, or several: files of any kind, or the folder of a run."""

    # Adapter file or run folder; empty takes the newest under runs/. A number behind a colon, such
    # as a.safetensors:0.8, is how strongly it acts.
    adapter: tyro.conf.Positional[str] = ""
    # Further ones that act with it, each with a strength of its own, if not 1.
    more: tyro.conf.Positional[tuple[str, ...]] = ()
    # What to draw; empty takes the prompts of the recipe that trained the adapter.
    prompts: tuple[str, ...] = ()
    # One picture of every prompt for each seed.
    seeds: Annotated[tuple[int, ...], Within(0, 2**63 - 1)] = (0,)
    # How much of the adapter acts: 0 nothing, 1 as trained, more is allowed.
    strength: Annotated[float, Within(-10, 10)] = 1.0
    # One picture that shows every prompt with the adapter off (above) and at --strength (below).
    compare: bool = False
    # One picture that shows every prompt with the adapter off, then as it was at each step that
    # the run kept (see --keep-adapters of training).
    checkpoints: bool = False
    # One picture that shows every prompt at each of these strengths, where they are not 1 alone.
    strengths: Annotated[tuple[float, ...], Within(-10, 10)] = (1.0,)
    # Where pictures go; empty means beside the adapter.
    output_dir: str = ""
    # Side in pixels, a multiple of 8; 0 is the model's own size.
    resolution: Annotated[int, Within(0, 4096, step=8)] = 0
    # Width in pixels where it is not the side.
    width: Annotated[int, Within(0, 4096, step=8)] = 0
    # Height in pixels where it is not the side.
    height: Annotated[int, Within(0, 4096, step=8)] = 0
    # What pictures should not show; acts where the guidance scale is above 1.
    negative_prompt: str = ""
    # Tokens of a prompt that are read: 75, 150 or 225; 0 takes what the adapter was trained with.
    max_tokens: Literal[0, 75, 150, 225] = 0
    # diffusers' class that takes the denoising steps, such as DPMSolverMultistepScheduler; empty
    # takes the model's own.
    scheduler: str = ""
    # What the UNet predicts, epsilon (the noise) or v_prediction; auto is as the adapter was
    # trained, else as the model's scheduler_config.json says.
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    # Whether drawing begins at pure noise (zero terminal SNR): yes, no; auto is as the adapter was
    # trained, else as the model says.
    zero_terminal_snr: Literal["auto", "yes", "no"] = "auto"
    # Denoising steps; 0 takes the recipe's 30, or what a base that was distilled to few steps is
    # made for.
    num_inference_steps: Annotated[int, Within(0, 1000)] = 0
    # How strongly pictures follow their prompt; negative takes the recipe's, or what a base that
    # was distilled to few steps is made for.
    guidance_scale: Annotated[float, Within(-100, 100)] = -1.0
    # How far the contrast that guidance adds is taken back, from 0 to 1; negative takes 0.7 with
    # zero terminal SNR, as its paper does, else 0.
    guidance_rescale: Annotated[float, Within(-1, 1)] = -1.0
    # The base model; empty takes the one that the adapter's header names.
    pretrained_model_name_or_path: str = ""
    # Branch, tag or commit of a Hub model; empty takes the one that the adapter was trained on.
    revision: str = ""
    # Another VAE than the model's own, as in training: a folder, a Hub name, or a .safetensors
    # file; empty takes the one that the adapter was trained with.
    vae: str = ""
    # Draw even though the adapter was trained on another base.
    any_base: bool = False
    # auto, cpu or cuda.
    device: str = "auto"
    # The UNet's dtype: auto, fp32, fp16 or bf16.
    mixed_precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    # The UNet's Linear weights: nf4 is 4 bits; auto takes what the adapter was trained on.
    base_quantization: Literal["auto", "none", "nf4"] = "auto"
    # Where the 4-bit numbers of a base are kept; empty takes the run's.
    cache_dir: str = ""
    # Draw by the lines of generate.py alone: single pictures, with a file in PEFT keys.
    plain: bool = False

    noise = Config.noise

    @property
    def pictures(self) -> list[tuple[str, int]]:
        """(prompt, seed) of every picture, in the order in which they are drawn and numbered."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]


def parse(argv: list[str] | None = None) -> Options:
    """The command line as checked Options. Raises Refusal, naming all of it, for what cannot be."""
    configuration.refuse_unknown(sys.argv[1:] if argv is None else argv, Options)
    options = configuration.read_words(tyro.cli, Options, argv, "generate.py")
    acting = [with_strength(word, find=str)[1] for word in (options.adapter, *options.more)]
    names = ("strength", "plain", "compare", "checkpoints", "strengths")
    given = [f"--{n}" for n in names if getattr(options, n) != getattr(Options, n)]
    alone = {"--checkpoints", "--strengths"} & {*given} or {"--plain", "--compare"} <= {*given}
    several = len(given) > 1 and alone
    alone = "--plain or --checkpoints with several adapters, or a strength behind a colon"
    one = acting != [1] and (options.plain or options.checkpoints)
    against = [
        (several, " with ".join(given), "one of them", "leave the others out"),
        (not all(abs(k) <= 10 for k in acting), f"strengths {acting}", "-10 to 10", "correct that"),
        (one, alone, "one adapter as it is", "--strength, or leave the others out"),
    ]
    configuration.refuse_wrong(options, Options(), against)
    # No shell does so behind --output-dir=.
    return replace(options, output_dir=os.path.expanduser(options.output_dir))


def parse_or_leave(argv: list[str] | None = None) -> Options:
    """The command line's Options, with the adapter's file in them, and the command's first line.
    Leaves with an error now if it has one.
    """
    options = configuration.or_leave(parse, argv)
    words = (options.adapter, *options.more)
    found = [configuration.or_leave(with_strength, word) for word in words]
    first, *more = [f"{path}" + f":{strength}" * (strength != 1) for path, strength in found]
    configuration.announce(f"drawing with {' and '.join([first, *more])}")
    return replace(options, adapter=first, more=tuple(more))


def with_strength(word: str, find: Callable | None = None) -> tuple[Path, float]:
    """An adapter's file and how strongly it acts: the number behind its last colon, if no file or
    folder is called so; else 1. find: find_adapter().
    """
    name, colon, number = word.rpartition(":")
    split = colon and re.fullmatch(r"-?\d*\.?\d+", number) and not place(word).exists()
    return (find or find_adapter)(name if split else word), float(number) if split else 1.0


def find_adapter(name: str | Path = "") -> Path:
    """The adapter file that `name` means: itself, in a folder a run's, else the only one, else that
    of its newest checkpoint; "" is the newest finished run's. Raises Refusal.
    """
    runs = sorted(Path("runs").glob(f"*/{FILE_NAME}"), key=lambda path: path.stat().st_mtime)
    path = place(str(name)) if name else (runs or [Path("runs")])[-1]
    files = [p for p in (path, path / FILE_NAME) if p.exists() and not p.is_dir()]
    files = files or sorted(p for p in path.glob("[!.]*") if p.suffix.lower() == ".safetensors")
    files = files or sorted(path.glob(f"checkpoints/*/{FILE_NAME}"))[-1:]  # of a run that goes on
    if len(files) != 1:
        there = ", ".join(map(str, files[:10])) or "no adapter file"
        remedy = "name one, or make train"
        found = f"{path} has {there}" if path.is_dir() else f"{path}: no such file or folder"
        raise Refusal(found, "an adapter file, or the folder of a run or of one", remedy)
    return files[0]


def of_run(path: Path, option: str, default: str | list[str] = "") -> str | list[str]:
    """An option as the config.json of the run around `path` has it: a text, or a list of texts if
    `default` is one. `default` where it has none.
    """
    for folder in list(path.resolve().parents)[:3]:  # OUT/, OUT/kohya/, OUT/checkpoints/000200/
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            value = json.loads((folder / "config.json").read_text())[option]
            texts = value if isinstance(value, list) else [value]
            if type(value) is type(default) and all(isinstance(each, str) for each in texts):
                return value
    return default


def sampler_of(name: str) -> str:
    """diffusers' class that a model's model_index.json names."""
    return hub.read_config(hub.fetch(name, "") / "model_index.json").get("scheduler", [""])[-1]


def few_steps(name: str, sampler: str, settings: dict) -> tuple[str, int, float]:
    """What the base `name` was distilled to, "" where its own sampler and that one's settings leave
    a doubt, and the steps and guidance scale that its makers give.

    https://huggingface.co/docs/diffusers/api/pipelines/stable_diffusion/sdxl_turbo
    https://huggingface.co/ByteDance/SDXL-Lightning, https://arxiv.org/abs/2311.05556 (LCM-LoRA)
    """
    if sampler == "LCMScheduler":
        return "LCM", 8, 1.0
    # Models of v-prediction or zero terminal SNR are drawn with trailing timesteps as well.
    trailing = settings.get("timestep_spacing") == "trailing"
    trailing = trailing and settings.get("prediction_type", "epsilon") == "epsilon"
    trailing = trailing and not settings.get("rescale_betas_zero_snr")
    if trailing and sampler == "EulerAncestralDiscreteScheduler":
        return "Turbo", 4, 0.0
    lightning = trailing and sampler == "EulerDiscreteScheduler" and "lightning" in name.lower()
    return ("Lightning" if lightning else "", 4, 0.0)


RESCALE = 0.7  # of guidance, with zero terminal SNR (Lin et al. 2023, section 3.4)
# Of an adapter's header: what is taken where it says nothing, and what it may say.
TOLD = {
    "prediction_type": ("auto", "epsilon", "v_prediction"),
    "zero_terminal_snr": ("auto", "yes", "no"),
    "max_tokens": ("75", "150", "225"),
    "base_quantization": ("none", "nf4"),
}


def complete(options: Options, path: Path, about: dict[str, str]) -> Options:
    """`options` where what was left open is as the config.json of the run around the adapter file
    `path` has it, else as the file's header, its recipe and the base do. Raises Refusal where no
    base is named, or none is where the file says, and for a header that says what cannot be.
    """
    recipe = RECIPES.get(about.get("recipe"), RECIPES["t4"])[1]
    if options.any_base:  # what another base predicts only its own file knows
        about = about | {"prediction_type": "auto", "zero_terminal_snr": "auto"}
    told = {name: str(getattr(options, name)) for name in TOLD}
    told = {n: about.get(n, TOLD[n][0]) if it in ("auto", "0") else it for n, it in told.items()}
    refuse(
        (f"{path} says {name} {word!r:.50}", " or ".join(TOLD[name]), f"give --{name} yourself")
        for name, word in told.items()
        if word not in TOLD[name]
    )
    base, revision, vae = take_base(options, path, about)
    sampler, settings = sampler_of(base), hub.read_scheduler(base)
    steps, guidance = options.num_inference_steps, options.guidance_scale
    kind, few, little = few_steps(base, sampler, settings)
    if kind and (steps == 0 or guidance < 0):
        said = f"its sampler says that {base} is a {kind} base: {few} steps, guidance scale "
        said += f"{little:g}, where --num-inference-steps and --guidance-scale say nothing else"
        print(said, file=sys.stderr)
    else:
        few, little = recipe.num_inference_steps, recipe.guidance_scale
    zero, rescale = told["zero_terminal_snr"], options.guidance_rescale
    pure = zero == "yes" or (zero == "auto" and settings.get("rescale_betas_zero_snr"))
    prompts = options.prompts or of_run(path, "validation_prompts", [])
    return replace(
        options,
        **told | {"max_tokens": int(told["max_tokens"])},
        adapter=str(path),
        prompts=tuple(prompts or recipe.validation_prompts),
        scheduler=options.scheduler or sampler,
        num_inference_steps=steps or few,
        guidance_scale=guidance if guidance >= 0 else little,
        guidance_rescale=rescale if rescale >= 0 else RESCALE * bool(pure),
        vae=vae,
        pretrained_model_name_or_path=base,
        revision=revision,
        cache_dir=options.cache_dir or of_run(path, "cache_dir") or "cache",
    )


def take_base(options: Options, path: Path, about: dict[str, str]) -> tuple[str, str, str]:
    """The base, its revision and the VAE in the place of its own, all of them taken from here on:
    those asked for, else those of training, which the run around `path` or its header tells of.
    Raises Refusal where one of these is gone.
    """
    given = options.pretrained_model_name_or_path
    its = of_run(path, "pretrained_model_name_or_path")
    base = given or its or about.get("base_model", "")
    if not base:
        found = f"{path} does not say which base it was trained on"
        raise Refusal(found, "an SDXL model to put it on", f"{hub.OPTION} {hub.SDXL}")
    commit = of_run(path, "base_commit") or about.get("base_commit", "")
    own = base in (about.get("base_model"), its)
    revision = options.revision or commit * own  # another model has other commits
    vae = options.vae or ("" if options.any_base else of_run(path, "vae") or about.get("vae", ""))
    hub.use_revision(base, revision, vae)
    if given:  # and so not the file's word
        hub.fetch(base, "")
    try:
        hub.fetch(base, "")
        if vae != options.vae:
            hub.fetch(base, "vae")
    except Refusal as refusal:
        found, expected, remedy = refusal.parts
        said = f"{path} says, in its header or its run's config.json, that its base is {base}"
        said += f" and its VAE {vae}" * bool(vae)
        remedy += f"; where it lies elsewhere, {hub.OPTION} WHERE/IT/IS/{Path(base).name}"
        remedy += f"; for the base's own VAE --vae {base}" * bool(vae)
        raise Refusal(f"{said}: {found}", expected, remedy) from refusal
    return base, revision, vae


def header(config: Config, schedule) -> dict[str, str]:
    """What of a run's options and noise schedule its adapter's header tells, so that complete()
    draws as was trained.
    """
    zero = "no" if schedule.alphas_cumprod[-1] else "yes"
    told = {"prediction_type": schedule.prediction_type, "zero_terminal_snr": zero}
    told |= {"max_tokens": str(config.max_tokens)} if config.max_tokens > 75 else {}
    return told | ({"vae": public_name(config.vae)} if config.vae else {})


def public_name(name: str) -> str:
    """A Hub name as it is; of a folder its last part, since where it lies is nobody's business."""
    folder = place(name)
    return folder.resolve().name if folder.exists() else name


def check_base(options: Options | Config, path: Path, about: dict[str, str], half: bool) -> None:
    """Raise Refusal where the base is not the one that the header of the adapter file `path` tells
    of. half: whether the fp16 variant is meant.
    """
    name = options.pretrained_model_name_or_path
    trained_on, here = about.get("base_fingerprint"), hub.unet_fingerprint(name, half)
    if trained_on not in (None, here) and not options.any_base:
        found = f"{path} was trained on {about.get('base_model')} ({trained_on}), and {name} is "
        remedy = f"{hub.OPTION} BASE, or --any-base to take it all the same"
        raise Refusal(found + here, "the base that the adapter was trained on", remedy)


# ---- previews ------------------------------------------------------------------------------------

# https://github.com/kohya-ss/sd-scripts/blob/10bfcb9a/library/train_util.py (line_to_prompt_dict)
MARKS = {"n": "negative_prompt", "d": "seeds", "w": "width", "h": "height"}
MARKS |= {"s": "num_inference_steps", "l": "guidance_scale"}
MARKED = "--n and words, or --d, --w, --h, --s or --l and a number"


def previews(config: Config, usual: Sequence[str]) -> list[Options]:
    """What a run draws while it trains, of each one prompt, seed and size: --preview-prompts, else
    the first of the `usual` prompts. Raises Refusal for a file that cannot be read and for every
    wrong mark.
    """
    side, steps, lines = max(config.resolution), config.preview_steps, config.preview_prompts
    how = {"num_inference_steps": steps, "guidance_scale": config.guidance_scale}
    drawn = Options(seeds=(config.seed,), width=side, height=side, **how)
    if not (steps and lines):
        return [replace(drawn, prompts=(prompt,)) for prompt in usual[:1] if steps]
    if len(lines) == 1 and (lines[0].lower().endswith(".txt") or place(lines[0]).is_file()):
        with refusing(f"{lines[0]} cannot be read", "a prompt a line", "correct that file"):
            lines = place(lines[0]).read_text("utf-8-sig").splitlines()
        lines = [line for line in lines if line.strip()[:1] != "#"]
    lines = [line.strip() for line in lines if line.strip()]
    found, troubles = [], [] if lines else [("no prompt for previews", "one a line", "add one")]
    for line in lines:
        prompt, *marks = re.split(r"(?:^|\s+)--(?=[a-zA-Z])", line)
        found.append(replace(drawn, prompts=(prompt,)))
        for mark, _, value in (each.partition(" ") for each in marks):
            try:
                name, read = MARKS[mark], type(getattr(drawn, MARKS[mark]))
                given = (int(value),) if name == "seeds" else read(value.strip())
                if given == 0 and name != "guidance_scale":  # which Options takes for an open one
                    raise ValueError
                found[-1] = replace(found[-1], **{name: given})
                configuration.refuse_wrong(found[-1], Options(), [])
            except (KeyError, ValueError, Refusal):
                troubles.append((f"--{mark} {value} in {line!r}", MARKED, "correct that mark"))
    refuse(troubles)
    return found


def times(config: Config, step: int = 0) -> int:
    """How often a run draws its previews from `step` on: at step 0, at each save and at its end."""
    every = config.checkpointing_steps
    return -(-config.max_train_steps // every) - step // every + (step == 0)


def steps_worth(config: Config, drawn: list[Options]) -> float:
    """How many training steps are as much work as drawing once, the VAE aside: a pass backward
    takes as long as one forward, since the base's weights have no gradient.
    """
    passes = sum(
        each.num_inference_steps * (1 + (each.guidance_scale > 1)) * each.width * each.height
        for each in drawn
    )
    return passes / max(config.resolution) ** 2 / (2 * config.examples_per_step)


# ---- what pictures are called, and say of themselves ---------------------------------------------


def file_name(number: int, prompt: str, seed: int, strength: float) -> str:
    """A picture's: that of its prompt, and how much of the adapter acts."""
    return f"{stem(number, prompt, seed)}-{strength:g}.png"


def stem(number: int, prompt: str, seed: int) -> str:
    """A name that every file system takes and every terminal shows: Latin letters and digits of the
    prompt, or where it has none a digest, so that two prompts have two names.
    """
    latin = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", latin).strip("-")[:60] or digest(prompt)[:8]
    return f"{number:02d}-{slug}-{seed}"


def how_drawn(options: Options) -> dict[str, str]:
    """How the pictures of complete()'s `options` are drawn, under A1111's names where it has some:
    what a PNG says besides its prompt. The adapter's hash is A1111's of a LoRA, of its tensors.
    """
    names, hashes, strengths = [], [], []
    for path, strength in map(with_strength, (options.adapter, *options.more)):
        names.append(path.parent.resolve().name if path.name == FILE_NAME else path.stem)
        sha256 = hashlib.sha256(data_section(path.read_bytes())).hexdigest()
        hashes.append(f"{names[-1]}: {sha256[:12]}")
        strengths.append(f"{strength * options.strength:g}")
    said = {
        "Steps": options.num_inference_steps,
        "Sampler": options.scheduler,
        "CFG scale": f"{options.guidance_scale:g}",
        "CFG rescale": f"{options.guidance_rescale:g}" if options.guidance_rescale > 0 else "",
        "VAE": public_name(options.vae) if options.vae else "",
        "Model": place(options.pretrained_model_name_or_path).resolve().name,
        "Lora": ", ".join(names),
        "Lora strength": ", ".join(strengths),
        "Lora hashes": ", ".join(hashes),
    }
    return {key: str(value) for key, value in said.items() if value != ""}


def parameters(
    options: Options, drawn: list[tuple[str, int]], size: tuple[int, int], how: dict[str, str]
) -> str:
    """The text of a PNG's chunk "parameters", as A1111 writes it and others read it. drawn: prompt
    and seed, or of a sheet all of them; size: (W, H) of a picture; how: how_drawn() of them.
    """
    prompts, seeds = (list(dict.fromkeys(map(str, each))) for each in zip(*drawn, strict=True))
    negative = [f"Negative prompt: {options.negative_prompt}"] if options.negative_prompt else []
    said = how | {"Seed": ", ".join(seeds), "Size": "{}x{}".format(*size)}
    for key, value in said.items():
        said[key] = json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value
    return "\n".join([*prompts, *negative, ", ".join(map(": ".join, said.items()))])


def free_path(path: Path, content: bytes) -> Path:
    """`path`, or with the next free number where another picture has that name."""
    stem = path.stem
    for number in itertools.count(2):
        if not path.exists() or path.read_bytes() == content:
            return path
        path = path.with_stem(f"{stem}_{number}")
