"""The two commands, told apart before anything heavy is imported, and what may end the imports."""

import atexit
import contextlib
import gc
import importlib
import os
import signal
import sys

from inputs.drawing import Options
from inputs.files import Refusal, first_line
from inputs.options import SPEAKS, Config


def train(config: Config) -> int:
    """python loop.py RECIPE: a run that survives. Returns its exit code."""
    return imported_and_run("keep.training", config)


def draw(options: Options) -> int:
    """python generate.py ADAPTER. Returns its exit code."""
    return imported_and_run("keep.drawing", options)


def imported_and_run(name: str, asked: Config | Options) -> int:
    """Import a module, and with it torch and diffusers, for seconds, and run its main().

    Ctrl-C in the imports, or a library that does not load, ends the process with one sentence. The
    process ends with main()'s exit code as soon as threads and exit handlers have ended: to take
    apart all that torch and diffusers are made of costs Python two seconds and more.
    """
    codes = []

    def leave() -> None:
        with contextlib.suppress(OSError, AttributeError):  # its reader gone, or it was closed
            sys.stdout.flush()
        if codes:
            os._exit(codes[0])

    atexit.register(leave)  # before any library's handler, so that it runs after them
    try:
        module = importlib.import_module(name)
    except KeyboardInterrupt:
        said, exit_code = "\ninterrupted: nothing had begun", 128 + signal.SIGINT
    except Exception as error:  # built for another torch, half installed: any class
        said, exit_code = f"error: {not_loaded(error)}", 1
    else:
        gc.freeze()  # a collection goes no more through all that was imported: 0.3 s each
        codes.append(module.main(asked))
        return codes[0]
    if SPEAKS:
        print(said, file=sys.stderr)
    return exit_code


def not_loaded(error: BaseException) -> Refusal:
    """What to do where an import failed, said of the error that the others were raised for."""
    while error.__cause__:
        error = error.__cause__
    return Refusal(
        f"an import fails ({type(error).__name__}: {first_line(error)})",
        "libraries that fit each other",
        "pip install -r requirements.txt; if it is torchvision that fails, which no command here "
        "calls, pip uninstall -y torchvision; the same command then continues",
    )
