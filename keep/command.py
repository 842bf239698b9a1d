"""The two commands, told apart before anything heavy is imported, and what may end the imports."""

import atexit
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator

from inputs.drawing import Options
from inputs.files import Refusal, first_line
from inputs.options import SPEAKS, Config


def train(config: Config) -> int:
    """python loop.py RECIPE: a run that survives. Returns its exit code."""
    codes = leaving()
    with importing():
        from keep import training

    codes.append(training.main(config))
    return codes[0]


def draw(options: Options) -> int:
    """python generate.py ADAPTER. Returns its exit code."""
    codes = leaving()
    with importing():
        from keep import drawing

    codes.append(drawing.main(options))
    return codes[0]


def leaving() -> list[int]:
    """A list: the process ends with the exit code that is put into it, as soon as threads and exit
    handlers have ended. To take apart all that torch and diffusers are made of costs Python two
    seconds and more, after everything is written.
    """
    codes = []

    def leave() -> None:
        if codes:
            with contextlib.suppress(OSError):  # its reader may have gone
                sys.stdout.flush()
            os._exit(codes[0])

    atexit.register(leave)  # before any library's handler, so that it runs after them
    return codes


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Inside, torch and diffusers are imported, for seconds. Ctrl-C, or a library that does not
    load, ends the process with one sentence.
    """
    try:
        yield
    except KeyboardInterrupt:
        said, exit_code = "\ninterrupted: nothing had begun", 128 + signal.SIGINT
    except Exception as error:  # built for another torch, half installed: any class
        said, exit_code = f"error: {not_loaded(error)}", 1
    else:
        return
    if SPEAKS:
        print(said, file=sys.stderr)
    sys.exit(exit_code)


def not_loaded(error: BaseException) -> Refusal:
    """What to do where an import failed, said of the error that the others were raised for."""
    while error.__cause__:
        error = error.__cause__
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Refusal(
        f"an import fails ({type(error).__name__}: {first_line(error)}, in {last.filename}, line "
        f"{last.lineno})",
        "libraries that fit each other",
        "pip install -r requirements.txt; if it is torchvision that fails, which no command here "
        "calls, pip uninstall -y torchvision; the same command then continues",
    )
