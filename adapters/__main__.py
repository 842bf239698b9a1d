"""Tools for adapter files: python -m adapters COMMAND FILE..."""

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from inputs import options as configuration
from inputs.drawing import of_run, with_strength
from inputs.files import place
from inputs.options import Within


@dataclass(frozen=True)
class Options:
    """Inspect adapter files of SDXL's UNet, convert them, add them up, cut them to a rank."""

    # inspect: what a file holds, how strongly it corrects each block, its traps in other programs;
    # convert: the same in other keys or numbers; merge: the sum of several, exactly (ranks add up)
    # or cut to a rank; resize: the nearest of a smaller rank.
    command: tyro.conf.Positional[Literal["inspect", "convert", "merge", "resize"]] = "inspect"
    # Adapter files or run folders, each with a strength such as :0.5 behind it, if not 1; without
    # any the newest run's.
    files: tyro.conf.Positional[tuple[str, ...]] = ()
    # The file to write; there must be none yet.
    output: str = ""
    # In which keys: kohya's are read by most programs, peft's by diffusers alone.
    to: Literal["kohya", "peft"] = "kohya"
    # auto is the files' own where that loses nothing, else fp32.
    save_dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    # To which rank a sum or a file is cut, by its singular values; 0 does not cut.
    rank: Annotated[int, Within(0, 640)] = 0
    # Which share of the squared length is kept, by the smallest rank that does; 0 does not cut.
    keep: Annotated[float, Within(0, 1)] = 0.0
    # The model that a file belongs to, if not to SDXL, or to the run around it. inspect measures
    # against its weights where they are on this disk.
    pretrained_model_name_or_path: str = ""


def parse(argv: list[str] | None = None) -> Options:
    """The command line as checked Options. Raises Refusal, naming all of it, for what cannot be."""
    configuration.refuse_unknown(sys.argv[1:] if argv is None else argv, Options)
    asked = configuration.read_words(tyro.cli, Options, argv, "-m adapters COMMAND")
    inspect, cuts = asked.command == "inspect", (asked.rank > 0) + (asked.keep > 0)
    allowed = {"merge": (0, 1), "resize": (1,)}.get(asked.command, (0,))
    sizes, out = f"--rank {asked.rank}, --keep {asked.keep:g}", f"--output '{asked.output}'"
    acting = [with_strength(word, find=str)[1] for word in asked.files or ("",)]
    several = len(acting) > 1 and asked.command != "merge"
    beyond = not all(0 < abs(each) <= 10 for each in acting)
    named = asked.output.endswith(".safetensors") if not inspect else not asked.output
    against = [
        (cuts not in allowed, sizes, "one to resize, at most one to merge, else none", "--rank 8"),
        (several, f"{len(acting)} files", "one", "name one, or merge them"),
        (beyond, f"strengths {acting}", "from -10 to 10, not 0", "correct that"),
        (inspect and acting != [1], "inspect at a strength", "the file alone", "leave it out"),
        (not named, out, "--output NEW.safetensors, to inspect none", "correct that"),
    ]
    configuration.refuse_wrong(asked, Options(), against)
    return asked


def run(argv: list[str] | None = None) -> None:
    """Do what the command line asks and print what was done. Raises Refusal."""
    asked = parse(argv)
    paths = [with_strength(word) for word in asked.files or ("",)]
    from adapters import describe, tools  # here: they import torch, what is typed is checked before

    base = asked.pretrained_model_name_or_path
    own = of_run(paths[0][0], "pretrained_model_name_or_path")
    base = base or (own if own and place(own).exists() else "")
    # What is not on this disk is SDXL itself, or has its layers.
    layers = tools.layers_of(base)
    if asked.command == "inspect" and (other := describe.other(paths[0][0])):
        print(other)
        return
    parts = [(tools.read(path, layers), strength) for path, strength in paths]
    if asked.command == "inspect":
        print(describe.describe(parts[0][0], layers if base else {}))
    else:
        print(tools.write(parts, place(asked.output), layers, asked))


if __name__ == "__main__":
    configuration.or_leave(run)
