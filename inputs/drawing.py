"""What generate.py is asked to draw. Light on purpose, as options.py is."""

import contextlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from inputs.files import Refusal
from inputs.hub import unet_fingerprint
from inputs.options import RECIPES, announce, check_texts


@dataclass(frozen=True)
class Options:
    """Draw with an adapter: a file in PEFT or kohya keys, or the folder of a run."""

    # Adapter file or run folder; empty takes the newest under runs/.
    adapter: tyro.conf.Positional[str] = ""
    # What to draw; empty takes the prompts of the recipe that trained the adapter.
    prompts: tuple[str, ...] = ()
    # One picture of every prompt for each seed.
    seeds: tuple[int, ...] = (0,)
    # How much of the adapter acts, 0 to 1.
    strength: float = 1.0
    # One picture that shows every prompt with the adapter off (above) and on (below).
    compare: bool = False
    # Where pictures go; empty means beside the adapter.
    output_dir: str = ""
    # Side in pixels, a multiple of 8; 0 is the model's own size.
    resolution: int = 0
    # Denoising steps.
    num_inference_steps: int = 30
    # How strongly pictures follow their prompt; negative takes the recipe's.
    guidance_scale: float = -1.0
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
    """The command line as checked Options; a Refusal names the first value that cannot be. Leaves
    with exit code 2 and a sentence for an unknown option.
    """
    options = tyro.cli(Options, args=argv, prog="generate.py")
    refusals = {
        "resolution": (
            options.resolution % 8 or not 0 <= options.resolution <= 4096,
            "a multiple of 8 up to 4096",
            "1024",
        ),
        "num_inference_steps": (not 1 <= options.num_inference_steps <= 1000, "1 to 1000", "30"),
        "seeds": (not options.seeds or not all(0 <= s < 2**63 for s in options.seeds), "0 up", "0"),
        "strength": (not -10 <= options.strength <= 10, "usually 0 to 1", "1"),
        "guidance_scale": (not -100 <= options.guidance_scale <= 100, "up to 100", "5"),
    }
    check_texts(options)
    for name, (wrong, expected, remedy) in refusals.items():
        if wrong:
            option = f"--{name.replace('_', '-')} {remedy}"
            raise Refusal(f"{name} is {getattr(options, name)}", expected, option)
    if options.plain:
        check_plain(options)
    return options


def check_plain(options: Options) -> None:
    """Raise Refusal for what the lines of generate.py alone do not do."""
    if options.compare:
        raise Refusal(
            "--plain with --compare",
            "one of them: generate.py by itself draws single pictures",
            "leave --plain out, or draw with --strength 0 and with --strength 1",
        )
    if not options.adapter:
        raise Refusal(
            "--plain without an adapter",
            "an adapter file, or the folder of a run",
            "name it, or leave --plain out: then the newest run is found",
        )


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
    prompts = options.prompts or of_run(path, "validation_prompts", [])
    return replace(
        options,
        prompts=tuple(prompts or recipe.validation_prompts),
        guidance_scale=guidance if guidance >= 0 else recipe.guidance_scale,
        pretrained_model_name_or_path=base or about.get("base_model", ""),
        base_quantization=weights if weights != "auto" else about.get("base_quantization", "none"),
        cache_dir=options.cache_dir or of_run(path, "cache_dir") or "cache",
    )


def check_base(options: Options, path: Path, about: dict[str, str], half: bool) -> None:
    """Raise Refusal where no base is named, or where it is not the one that the header of the
    adapter file `path` tells of. half: whether the fp16 variant is meant.
    """
    name = options.pretrained_model_name_or_path
    if not name:
        raise Refusal(
            f"{path} does not say which base it was trained on",
            "an SDXL model to put it on",
            "--pretrained-model-name-or-path stabilityai/stable-diffusion-xl-base-1.0",
        )
    trained_on, here = about.get("base_fingerprint"), unet_fingerprint(name, half)
    if trained_on not in (None, here) and not options.any_base:
        raise Refusal(
            f"{path} was trained on {about.get('base_model')} ({trained_on}), and {name} is {here}",
            "the base that the adapter was trained on",
            "--pretrained-model-name-or-path BASE, or --any-base to draw all the same",
        )


def parse_or_leave(argv: list[str] | None = None) -> Options:
    """The command line's Options, and the command's first line. Leaves with an error now if it has
    one.
    """
    try:
        options = parse(argv)
    except Refusal as refusal:
        sys.exit(f"error: {refusal}")
    announce(f"drawing with {options.adapter or 'the newest run'}")
    return options
