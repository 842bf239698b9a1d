"""The options of a measurement, in bounds: a number that cannot be is answered before anything is
measured, as loop.py's are.
"""

from dataclasses import fields
from typing import Annotated, Any

import tyro

from inputs.files import refuse
from inputs.options import Within, or_leave

Count = Annotated[int, Within(1, 10**6)]
Counts = Annotated[tuple[int, ...], Within(1, 10**6)]
Seeds = Annotated[tuple[int, ...], Within(0, 2**63 - 1)]
Sides = Annotated[tuple[int, ...], Within(8, 4096, step=8)]


def asked(kind: type, argv: list[str] | None = None, **how) -> Any:
    """The command line as the dataclass `kind`, by tyro. Leaves with exit code 1 and a sentence for
    numbers that are neither the default nor in the bounds of the field's type, all at once, and
    where `kind` says by its property `on` that there is no device to measure on.
    """

    def parse(argv: list[str] | None) -> Any:
        options = tyro.cli(kind, args=argv, **how)
        values = [(each, getattr(options, each.name)) for each in fields(kind)]
        refuse(
            (f"{each.name} is {value}", f"{bounds}", f"correct --{each.name.replace('_', '-')}")
            for each, value in values
            for bounds in getattr(each.type, "__metadata__", ())
            if isinstance(bounds, Within) and value != each.default and not bounds.hold(value)
        )
        if hasattr(kind, "on"):
            _ = options.on
        return options

    return or_leave(parse, argv)
