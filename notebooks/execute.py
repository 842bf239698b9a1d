"""Run the notebooks from top to bottom, each in a fresh kernel at the repository's root.

`python notebooks/execute.py` is the check that CI makes: it stores nothing and fails where a cell
raises, where a stored notebook lacks the outputs that its cells give or says other words than they
say now, where an output names a path of this machine, and where a notebook is too large to be shown
on the web.
`python notebooks/execute.py --write` stores the outputs in the notebooks.
"""

import argparse
import difflib
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ("train.ipynb", "inference.ipynb")  # in this order: the second draws with the first's
LARGEST = 600_000  # bytes of one notebook file
LONGEST = 600  # seconds of one cell
# Numbers are not compared: memory, losses and versions vary from one machine to another.
NUMBER = re.compile(r"-?\d[\d.,]*(?:e[-+]?\d+)?(?:\+\w+)?")
INTERPRETER = re.compile(r"(?<=\s)\S*/bin/python(?=\s)")  # .venv's, in CI
# What Jupyter writes here varies with the machine, so it is replaced by what a reader needs.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run every cell, in place. Raises CellExecutionError at the first that raises."""
    client = NotebookClient(
        notebook,
        timeout=LONGEST,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT)}},  # the kernel's working directory
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=40"],  # errors: it warns of its own local sockets
    )
    client.execute()


def clean(notebook: nbformat.NotebookNode) -> str:
    """Leave only what a second execution gives again, in place. Returns what was said on stderr.

    Object addresses, a second copy of every picture (as JPEG), stderr and metadata go, and an
    interpreter within the repository is what its reader types: python.
    """
    said = []
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in code_cells(notebook):
        cell.metadata = nbformat.from_dict({})
        kept = []
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                said.append(output.text)
                continue
            if output.output_type == "stream":
                output.text = INTERPRETER.sub("python", output.text)
            if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text  # where stdout is cut is a matter of timing
                continue
            bundle = output.get("data", {})
            if "image/png" in bundle:
                bundle.pop("image/jpeg", None)
            if "text/plain" in bundle:
                bundle["text/plain"] = re.sub(r" at 0x[0-9A-Fa-f]+", "", bundle["text/plain"])
            kept.append(output)
        cell.outputs = kept
    return "".join(said)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def without_outputs(stored: nbformat.NotebookNode, fresh: nbformat.NotebookNode) -> list[int]:
    """The numbers (from 1) of the code cells that show something now and nothing as stored."""
    pairs = zip(code_cells(stored), code_cells(fresh), strict=True)
    return [i for i, (old, new) in enumerate(pairs, 1) if new.outputs and not old.outputs]


def words(cell: nbformat.NotebookNode) -> list[str]:
    """The lines that a cell's outputs say, each number as # and each stretch of blanks as one."""
    said = [o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    lines = (" ".join(line.split()) for line in NUMBER.sub("#", "\n".join(said)).splitlines())
    return [line for line in lines if line]


def with_other_words(stored: nbformat.NotebookNode, fresh: nbformat.NotebookNode) -> dict[int, str]:
    """By the number (from 1) of each code cell that says something else now than as stored: the
    lines that differ, stored ones with a -, those of now with a +.
    """
    found = {}
    for i, pair in enumerate(zip(code_cells(stored), code_cells(fresh), strict=True), 1):
        old, new = map(words, pair)
        if old and old != new:
            found[i] = "\n".join(each for each in difflib.ndiff(old, new) if each[0] in "-+")
    return found


def paths_of_this_machine(notebook: nbformat.NotebookNode) -> list[str]:
    """Folders of this machine that an output names."""
    texts = []
    for output in (output for cell in code_cells(notebook) for output in cell.outputs):
        texts += [output.get("text", ""), *output.get("traceback", [])]
        texts += [str(v) for k, v in output.get("data", {}).items() if not k.startswith("image/")]
    folders = {str(ROOT), str(Path.home()), sys.prefix, tempfile.gettempdir()} - {"/"}
    named = (
        f for f in folders if re.search(rf"(?<![\w.]){re.escape(f)}(?![\w-])", "\n".join(texts))
    )
    return sorted(named)


def problems(name: str, fresh: nbformat.NotebookNode, stored: nbformat.NotebookNode) -> list[str]:
    """What is wrong with an executed notebook and with its stored form, as sentences."""
    found = []
    bare = without_outputs(stored, fresh)
    if bare:
        found.append(
            f"{name} has no stored output in code cell {', '.join(map(str, bare))}; expected what "
            "the cell shows. What to do: python notebooks/execute.py --write"
        )
    for i, told in with_other_words(stored, fresh).items():
        found.append(
            f"{name} says other words than stored in code cell {i}:\n{told}\nexpected the same but "
            "for numbers. What to do: python notebooks/execute.py --write"
        )
    for folder in sorted({*paths_of_this_machine(fresh), *paths_of_this_machine(stored)}):
        found.append(
            f"{name} has an output that names {folder}; expected no path of one machine. What to "
            "do: print paths relative to the repository's root"
        )
    size = max(len(nbformat.writes(each).encode()) for each in (fresh, stored))
    if size > LARGEST:
        found.append(
            f"{name} has {size:,} bytes; expected at most {LARGEST:,}. What to do: show smaller "
            "pictures"
        )
    return found


def run(name: str, write: bool, folder: Path) -> list[str]:
    """Execute one notebook into `folder`; with `write`, store it where nothing is wrong."""
    path = ROOT / "notebooks" / name
    stored, fresh = (nbformat.read(path, as_version=4) for _ in range(2))
    began = time.perf_counter()
    try:
        execute(fresh)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return [f"{name} does not run: {error}"]
    finally:
        said = clean(fresh)
        nbformat.write(fresh, folder / name)
        if said:
            print(f"{name} said on stderr, which is not stored:\n{said}", file=sys.stderr)
    found = problems(name, fresh, fresh if write else stored)
    if write and not found:
        nbformat.write(fresh, path)
    print(f"{name}: {time.perf_counter() - began:.0f} s{', stored' if write and not found else ''}")
    return found


def main() -> int:
    """The command. Returns its exit code: 0, or 1 where something is wrong (said on stderr)."""
    parser = argparse.ArgumentParser(description="Run the notebooks; without --write only check.")
    parser.add_argument("--write", action="store_true", help="store the outputs in the notebooks")
    write = parser.parse_args().write
    os.environ["TQDM_DISABLE"] = "1"  # progress bars are for people
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the small model needs no network
    folder = Path(tempfile.mkdtemp(prefix="notebooks-"))
    os.environ["IPYTHONDIR"] = str(folder / "ipython")  # nobody's own start-up files
    for name in NOTEBOOKS:
        found = run(name, write, folder)
        if found:
            print("\n".join(found), f"as executed: {folder / name}", sep="\n", file=sys.stderr)
            return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
