"""What pip asks to build this repository (pyproject.toml): it answers with how to run it."""

import sys


def build_wheel(*_, **__):
    sys.exit(
        "this is a repository to run, not a package to install. What to do: make train in a clone "
        "of it; make help lists the rest"
    )


build_editable = build_sdist = build_wheel
