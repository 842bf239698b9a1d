"""What comes from outside and is not trusted, and the ground that all stands on."""

from importlib.util import find_spec

if not find_spec("tyro"):  # the first library that a command needs
    raise SystemExit(
        "error: this Python has no tyro; expected what requirements.txt names. What to do: make "
        "setup, then source .venv/bin/activate; or pip install -r requirements.txt"
    )
