"""The page of --help, from the dataclass of options itself: the reason for an option is the comment
above its field, and a group begins at `# ---- Name`. docs/make_options.py takes both from here.
"""

import inspect
import re
import shutil
import textwrap
from dataclasses import Field, fields
from typing import Any, Literal, get_args, get_origin

PART = re.compile(r"    # ---- (.+)|((?:    # .+\n)+)    (\w+): ")


def groups(cls: type) -> dict[str, dict[Field, str]]:
    """{group: {field: the reason for it}}; the group is "" above the first."""
    by_name, found, group = {field.name: field for field in fields(cls)}, {}, ""
    for title, comment, name in PART.findall(inspect.getsource(cls)):
        group = title or group
        if name:
            found.setdefault(group, {})[by_name[name]] = re.sub(r"\s*# ", " ", comment).strip()
    return found


def option(field: Field, reason: str, values: Any) -> str:
    """An option with what it allows and its value among `values`; below it the reason."""
    name = field.name.replace("_", "-")
    told = [name.upper() if "Positional" in str(field.type) else f"--{name}"]
    if get_origin(field.type) is Literal:
        told.append(" or ".join(map(str, get_args(field.type))))
    if values:
        told.append(f"default {str(getattr(values, field.name)).strip('(,)') or 'empty'}")
    how = {"width": min(100, shutil.get_terminal_size().columns), "subsequent_indent": " " * 6}
    lines = (f"  {' · '.join(told)}", f"      {reason}")
    return "\n".join(textwrap.fill(line, break_on_hyphens=False, **how) for line in lines)


def page(prog: str, what: Any, words: list[str]) -> str:
    """What --help prints. what: the recipes, each a sentence and its values, or a dataclass.

    Without a recipe the first group alone, and no values.
    """
    recipes = what if isinstance(what, dict) else {words[0]: (what.__doc__, what())}
    first = "RECIPE" if recipes is what else "[ADAPTER]"
    table = "\n".join(f"  {name:9} {said}" for name, (said, _) in recipes.items())
    said, values = recipes.get(words[0], (table, None))
    more = f"--no-NAME switches off. All options: python {prog} {first} --help"
    parts = [f"usage: python {prog} {first} [--NAME VALUE ...]", said, more]
    found = groups(type(values or recipes["t4"][1]))
    for group in found if values else [*found][:1]:
        parts += [group] * bool(group)
        parts.append("\n".join(option(*each, values) for each in found[group].items()))
    return "\n\n".join(parts)
