"""Write docs/options.md from the options themselves: python docs/make_options.py

The reason for an option is the comment above its field, as in --help.
"""

import sys
import textwrap
from pathlib import Path
from typing import Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adapters.__main__ import Options as Tools  # noqa: E402
from inputs import drawing, options  # noqa: E402
from inputs.help import groups  # noqa: E402
from inputs.options import BETTER, QUICK, RECIPES, Within  # noqa: E402
from keep.identity import MAY_CHANGE  # noqa: E402

WITH = " with --"  # between a recipe and the option that gives it other values
PAGE = ROOT / "docs" / "options.md"
TRAINING = """# Every option

This page is made from the code: `python docs/make_options.py` writes it, and a test holds it to the
code. `python loop.py t4 --help` and `python generate.py --help` say the same.

## Training: `python loop.py RECIPE`

A recipe is a set of values:

RECIPES

A line below shows what an option takes, its default, and the recipes that have another value. An
option that takes several values gets them one after the other:
`--validation-prompts "a fox" "a house"`. With make: `make train RECIPE=t4 ARGS="--seed 1"`.

**fixed** means: the value is part of what the run is. With another one, a begun run is refused.
The others may change between two starts of one run, with four limits:

- `--train-batch-size` times `--gradient-accumulation-steps` must stay.
- Base model, pictures and captions may be named in another way, but their content must stay.
- So must the precision that the UNet ends up in.
- `--deterministic` may be given up later, but not taken up. While it is on, what changes the order
  of additions must stay, too."""
DRAWING = "\n## Drawing: `python generate.py ADAPTER`\n"
FILES = "\n## Adapter files: `python -m adapters COMMAND FILES`, with [examples](adapters.md)\n"


def shown(value) -> str:
    """A value as one types it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(f"`{each}`" for each in value) or "none"
    return f"`{value}`" if value != "" else "empty"


def takes(kind, name: str) -> str:
    """What an option's type allows, in words."""
    if bounds := [str(each) for each in getattr(kind, "__metadata__", ()) if type(each) is Within]:
        number = get_args(kind)[0]
        several = "each " if get_origin(number) is tuple else ""
        whole = "" if float in (number, *get_args(number)) else "whole, "
        return f"{several}{whole}{bounds[0]}"
    if get_origin(kind) is Literal:
        return " or ".join(f"`{each}`" for each in get_args(kind))
    if kind is bool:
        return f"or `--no-{name}`"
    if get_origin(kind) is tuple:
        return "numbers" if float in get_args(kind) else "texts"
    return "text"


def usual(recipe: str, values: dict, field):
    """The value that a recipe need not say: the default, and with --quick the recipe's own."""
    return values[recipe.partition(WITH)[0]] if WITH in recipe else field.default


def entries(cls: type, recipes: dict) -> list[str]:
    """A paragraph for each option of a dataclass, with the headings of their groups."""
    parts = []
    for group, found in groups(cls).items():
        parts += [f"\n### {group}\n"] * bool(group)
        for field, reason in found.items():
            name = field.name.replace("_", "-")
            typed = name.upper() if "Positional" in str(field.type) else f"--{name}"
            line = f"**`{typed}`** · {takes(field.type, name)} · default {shown(field.default)}"
            values = {recipe: getattr(config, field.name) for recipe, config in recipes.items()}
            other = [f"{r} {shown(v)}" for r, v in values.items() if v != usual(r, values, field)]
            line += f" ({'; '.join(other)})" if other else ""
            line += " · **fixed**" if recipes and field.name not in MAY_CHANGE else ""
            hang = {"subsequent_indent": "  ", "break_on_hyphens": False, "break_long_words": False}
            parts.append(textwrap.fill(f"- {line}", 100, **hang) + "  ")
            parts.append(textwrap.fill(f"  {reason}", 100, **hang))
    return parts


def page() -> str:
    """The whole page."""
    recipes = {name: config for name, (_, config) in RECIPES.items()}
    for option, others in (("quick", QUICK), ("better", BETTER)):
        recipes |= {f"{name}{WITH}{option}": config for name, (_, config) in others.items()}
    told = "\n".join(f"- **{name}**: {what}" for name, (what, _) in RECIPES.items())
    parts = [TRAINING.replace("RECIPES", told)]
    parts += entries(options.Config, recipes)
    parts += [DRAWING, *entries(drawing.Options, {}), FILES, *entries(Tools, {})]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE.relative_to(ROOT))
