"""A copy of this project's tree, to be edited, and commands in it."""

import multiprocessing
import os
import runpy
import shutil
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch

from conftest import ROOT

BOOK = ("lora", "model", "data", "loop", "generate")
WINGS = ("inputs", "adapters", "fast", "learn", "see", "keep")


def copied(folder: Path, *wings: str) -> Path:
    """The book and `wings` (all, if none is named) in a new `folder`."""
    folder.mkdir()
    for name in BOOK:
        shutil.copy(ROOT / f"{name}.py", folder)
    for wing in wings or WINGS:
        shutil.copytree(ROOT / wing, folder / wing, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def python(tree: Path, *words: str) -> SimpleNamespace:
    """What `python WORDS` in `tree` leaves: returncode, stdout, stderr. A fork of this process, in
    which torch and diffusers are imported already (six seconds of each start) and nothing of ours.
    """
    out, err = tree / "stdout.txt", tree / "stderr.txt"
    process = multiprocessing.get_context("fork").Process(
        target=_command, args=(tree, words, out, err)
    )
    process.start()
    process.join(600)
    assert process.exitcode is not None, f"{words} has not ended"
    return SimpleNamespace(
        returncode=process.exitcode, stdout=out.read_text(), stderr=err.read_text()
    )


def _command(tree: Path, words: tuple[str, ...], out: Path, err: Path) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.chdir(tree)
    torch.set_num_threads(1)  # libgomp's threads do not live on in a fork
    for name in list(sys.modules):
        if name.split(".")[0] in BOOK + WINGS:
            del sys.modules[name]
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path) != ROOT)]
    code = 0
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(words[1], {"__name__": "__main__"})
        else:
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
