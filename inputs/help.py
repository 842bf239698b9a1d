"""What the options are, in words: for --help and docs/options.md, from the dataclasses themselves.
The reason for an option is the comment above its field, and a group begins at a `# ---- Name`.
"""

import inspect
import re
import shutil
import textwrap
from dataclasses import Field, fields
from typing import Any, Literal, get_args, get_origin

FIRST = "What most people change"
CHANGED = (  # what that is of a run; all else follows in its groups
    "dataset_name pretrained_model_name_or_path output_dir max_train_steps learning_rate lora_rank "
    "resolution train_batch_size validation_prompts seed"
).split()
PART = re.compile(r"    # ---- (.+)|((?:    # .+\n)+)    (\w+): ")


def groups(cls: type) -> dict[str, dict[Field, str]]:
    """{group: {field: the reason for it}} of a dataclass of options; "" is that of one without
    groups.
    """
    by_name, group = {field.name: field for field in fields(cls)}, ""
    found: dict[str, dict[Field, str]] = {}
    for title, comment, name in PART.findall(inspect.getsource(cls)):
        if title:
            group = title
            found.setdefault(FIRST, {by_name[each]: "" for each in CHANGED if each in by_name})
        else:
            at = FIRST if group and name in CHANGED else group
            reason = re.sub(r"\s*# ", " ", comment).strip()
            found.setdefault(at, {})[by_name[name]] = reason
    return found


def shown(value: Any) -> str:
    """A value as one types it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(f"`{each}`" for each in value) or "none"
    return f"`{value}`" if value != "" else "empty"


def takes(field: Field) -> str:
    """What an option's type allows, in words."""
    kind = field.type
    for bounds in getattr(kind, "__metadata__", ()):
        if hasattr(bounds, "least"):  # options.Within, which says itself in words
            number = get_args(kind)[0]
            several = "each " if get_origin(number) is tuple else ""
            return f"{several}{'' if number is float else 'whole, '}{bounds}"
    if get_origin(kind) is Literal:
        return " or ".join(f"`{each}`" for each in get_args(kind))
    if kind is bool:
        return f"or `--no-{field.name.replace('_', '-')}`"
    if get_origin(kind) is tuple:
        return "numbers" if float in get_args(kind) else "texts"
    return "text"


def called(field: Field) -> str:
    """What an option is typed as."""
    name = field.name.replace("_", "-")
    return name.upper() if "Positional" in str(field.type) else f"--{name}"


def page(prog: str, what: Any, words: list[str]) -> str:
    """What --help prints. what: the recipes, each a sentence and its values, or a dataclass."""
    recipes, named, cls = (what, words[0], None) if isinstance(what, dict) else ({}, "", what)
    usage = f"usage: python {prog} {'RECIPE' if recipes else '[ADAPTER]'} [--OPTION VALUE ...]"
    if named in recipes:
        sentence, values = recipes[named]
        parts = [usage.replace("RECIPE", named), sentence]
    elif recipes:  # no values then, and not all options
        values, cls = None, type(next(iter(recipes.values()))[1])
        parts = [usage, "\n".join(f"  {name:9} {said}" for name, (said, _) in recipes.items())]
        parts.append(f"All options, and their values in a recipe: python {prog} t4 --help")
    else:
        values, parts = cls(), [usage, cls.__doc__]
    found = groups(cls or type(values))
    for group in [FIRST] if recipes and not values else found:
        parts += [group] * bool(group)
        parts.append("\n".join(option(*each, values) for each in found[group].items()))
    return "\n\n".join(parts)


def option(field: Field, reason: str, values: Any) -> str:
    """An option with its value among `values`, and below it the reason; in 100 columns or fewer."""
    told = f"{called(field)} · {takes(field)}".replace("`", "")
    if values:
        value = shown(getattr(values, field.name))
        told += f" · default {value}".replace("`", "'" * (" " in value))
    how = {"width": min(100, shutil.get_terminal_size().columns), "break_on_hyphens": False}
    return "\n".join(
        textwrap.fill(text, initial_indent=" " * first, subsequent_indent=" " * 6, **how)
        for text, first in ((told, 2), (reason, 6))
    )
