"""What generate.py is asked to draw. Light on purpose, as options.py is."""

import contextlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from inputs import options as configuration
from inputs.files import Refusal
from inputs.hub import OPTION, SDXL, unet_fingerprint
from inputs.options import RECIPES, Within


@dataclass(frozen=True)
class Options:
    """Draw with an adapter: a file in PEFT or kohya keys, or the folder of a run."""

    # Adapter file or run folder; empty takes the newest under runs/.
    adapter: tyro.conf.Positional[str] = ""
    # What to draw; empty takes the prompts of the recipe that trained the adapter.
    prompts: tuple[str, ...] = ()
    # One picture of every prompt for each seed.
    seeds: Annotated[tuple[int, ...], Within(0, 2**63 - 1)] = (0,)
    # How much of the adapter acts: 0 nothing, 1 as trained, more is allowed.
    strength: Annotated[float, Within(-10, 10)] = 1.0
    # One picture that shows every prompt with the adapter off (above) and on (below).
    compare: bool = False
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
    # Denoising steps.
    num_inference_steps: Annotated[int, Within(1, 1000)] = 30
    # How strongly pictures follow their prompt; negative takes the recipe's.
    guidance_scale: Annotated[float, Within(-100, 100)] = -1.0
    # The base model; empty takes the one that the adapter's header names.
    pretrained_model_name_or_path: str = ""
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

    @property
    def pictures(self) -> list[tuple[str, int]]:
        """(prompt, seed) of every picture, in the order in which they are drawn and numbered."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]


def parse(argv: list[str] | None = None) -> Options:
    """The command line as checked Options. Raises Refusal, naming all of it, for what cannot be."""
    configuration.refuse_unknown(sys.argv[1:] if argv is None else argv, Options)
    options = tyro.cli(Options, args=argv, prog="generate.py")
    plain, remedy = options.plain, "leave --plain out, which then finds the newest run, or name one"
    typed = " ".join([*options.prompts, options.negative_prompt])
    text = typed.encode(errors="ignore").decode() == typed  # a shell passes any bytes on
    against = [
        (plain and options.compare, "--plain with --compare", "single pictures", "leave one out"),
        (plain and not options.adapter, "--plain without an adapter", "a file or a run", remedy),
        (not text, "a prompt that is no UTF-8", "text", "type it in a UTF-8 terminal"),
    ]
    configuration.refuse_wrong(options, Options(), against)
    return options


def parse_or_leave(argv: list[str] | None = None) -> Options:
    """The command line's Options, and the command's first line. Leaves with an error now if it has
    one.
    """
    options = configuration.or_leave(parse, argv)
    configuration.announce(f"drawing with {options.adapter or 'the newest run'}")
    return options


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


def complete(options: Options, path: Path, about: dict[str, str]) -> Options:
    """`options` where what was left open is as the config.json of the run around the adapter file
    `path` has it, else as the file's header and its recipe do.
    """
    recipe = RECIPES.get(about.get("recipe"), RECIPES["t4"])[1]
    guidance, weights = options.guidance_scale, options.base_quantization
    base = options.pretrained_model_name_or_path or of_run(path, "pretrained_model_name_or_path")
    named = about.get("base_model", "")
    if not base and named and "/" not in named and not Path(named).exists():
        found = f"{path} says that its base is called {named}, and not where that lies"
        raise Refusal(found, "the model that it was trained on", f"{OPTION} WHERE/IT/IS/{named}")
    told = about.get("max_tokens", "75")
    if not options.max_tokens and told not in ("75", "150", "225"):
        found = f"{path} says max_tokens {told!r:.50}"
        raise Refusal(found, "75, 150 or 225", "--max-tokens 75, or what it was trained with")
    prompts = options.prompts or of_run(path, "validation_prompts", [])
    return replace(
        options,
        prompts=tuple(prompts or recipe.validation_prompts),
        max_tokens=options.max_tokens or int(told),
        guidance_scale=guidance if guidance >= 0 else recipe.guidance_scale,
        pretrained_model_name_or_path=base or named,
        base_quantization=weights if weights != "auto" else about.get("base_quantization", "none"),
        cache_dir=options.cache_dir or of_run(path, "cache_dir") or "cache",
    )


def check_base(options: Options, path: Path, about: dict[str, str], half: bool) -> None:
    """Raise Refusal where no base is named, or where it is not the one that the header of the
    adapter file `path` tells of. half: whether the fp16 variant is meant.
    """
    name = options.pretrained_model_name_or_path
    if not name:
        found = f"{path} does not say which base it was trained on"
        raise Refusal(found, "an SDXL model to put it on", f"{OPTION} {SDXL}")
    trained_on, here = about.get("base_fingerprint"), unet_fingerprint(name, half)
    if trained_on not in (None, here) and not options.any_base:
        raise Refusal(
            f"{path} was trained on {about.get('base_model')} ({trained_on}), and {name} is {here}",
            "the base that the adapter was trained on",
            f"{OPTION} BASE, or --any-base to draw all the same",
        )
