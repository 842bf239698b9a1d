"""The seconds before a run: the command speaks at once, and ends with one sentence where Ctrl-C or
a broken library ends it. Each in a new process.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, ink_rows, write_pictures
from inputs.files import Refusal
from keep import command

IMPORTING = "importing torch and diffusers takes some seconds"


def begun(words: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": ""} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and hands that down to what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def first_line(words: list[str]) -> tuple[float, str]:
    """The processor's seconds until a command's first line on stderr, and that line. The command is
    ended.

    Of the processor and not of the clock: on a machine that does other things, too, the clock tells
    of those.
    """
    with begun(words) as process:
        line = process.stderr.readline()
        used = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        process.kill()
    return (int(used[11]) + int(used[12])) / os.sysconf("SC_CLK_TCK"), line


@pytest.fixture(scope="module")
def bare():
    """The processor's seconds of Python's own start."""
    return min(first_line(["-c", "import sys; print(file=sys.stderr)"])[0] for _ in range(3))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("loop.py t4 --output-dir runs/mine", "recipe t4, output to runs/mine"),
        ("loop.py pocket --plain --output-dir runs/none", "recipe pocket, output to runs/none"),
        ("loop.py t4 --plan-for T4", "recipe t4, plan for T4"),
        ("generate.py LICENSE --plain", "drawing with LICENSE"),  # a file that is there
    ],
)
def test_the_command_says_its_first_line_half_a_second_after_pythons_own_start(bare, words, said):
    seconds, line = first_line(words.split())
    if seconds - bare >= 0.5:  # the first may find files not yet read
        seconds, line = first_line(words.split())
    assert line == f"{said}; {IMPORTING}\n"
    assert seconds - bare < 0.5


def test_of_several_processes_the_first_alone_says_it():
    code = "from inputs import options; options.parse_or_leave(['pocket'])"
    with begun(["-c", code], RANK="1", WORLD_SIZE="2") as process:
        assert process.stderr.read() == ""


@pytest.mark.slow
@pytest.mark.parametrize("words", [["loop.py", "pocket"], ["generate.py", "LICENSE"]])
def test_ctrl_c_during_the_imports_ends_with_a_sentence(words, tmp_path):
    """A torch that takes for ever stands in for the real one, which takes seconds."""
    (tmp_path / "torch.py").write_text("import sys, time; print(file=sys.stderr); time.sleep(60)")
    with begun(words, PYTHONPATH=str(tmp_path)) as process:
        assert IMPORTING in process.stderr.readline()
        assert process.stderr.readline() == "\n"  # torch's import has begun
        time.sleep(0.2)  # caught while it returns from that write, it would write it again
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "\ninterrupted: nothing had begun\n"
    assert process.returncode == 128 + signal.SIGINT


@pytest.mark.slow
@pytest.mark.parametrize("words", [["loop.py", "pocket"], ["generate.py", "LICENSE"]])
def test_a_library_that_does_not_load_is_said_in_a_sentence(words, tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    with begun(words, PYTHONPATH=str(tmp_path)) as process:
        said = process.stderr.read().splitlines()
    assert process.returncode == 1 and len(said) == 2  # after the first line
    assert said[1].startswith("error: an import fails (OSError: libcudart.so.12: cannot open); ")
    assert "libraries that fit each other. What to do: pip install -r" in said[1]


def test_of_a_chain_of_failed_imports_the_first_is_named_and_no_remedy_changes_torch():
    """As diffusers raises it where torchvision was built for another torch."""
    try:
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise RuntimeError("Failed to import diffusers.loaders.peft") from error
    except RuntimeError as error:
        refusal = command.not_loaded(error)
    assert isinstance(refusal, Refusal)
    said = str(refusal)
    assert "nms does not exist)" in said and "pip uninstall -y torchvision" in said
    assert "upgrade" not in said


@pytest.mark.slow
@pytest.mark.parametrize("words", ["loop.py --help", "loop.py t4 --help", "generate.py --help"])
def test_help_whose_reader_has_left_ends_without_a_word(words):
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, *words.split()]
    done = subprocess.run(argv, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "given"), [("train", "training"), ("draw", "drawing")])
def test_the_process_ends_as_soon_as_all_is_written_and_all_handlers_have_run(name, given):
    """What takes long at the end of Python is stood in for by an object that says so."""
    code = f"""
import atexit, os, sys, threading, types
from inputs.options import or_leave
from keep import command

class Slow:
    def __del__(self):
        os.write(1, b"taken apart ")

def main(asked):
    sys.slow, sys.slow.itself = Slow(), sys
    atexit.register(print, "handler")
    threading.Timer(0.2, print, ("thread",)).start()
    print(asked)
    return 7

sys.modules["keep.{given}"] = types.SimpleNamespace(main=main)
or_leave(str, "")
sys.exit(command.{name}("asked"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout.split() == ["asked", "thread", "handler"]


@pytest.mark.slow
def test_a_run_and_its_refusals_go_through_a_terminal_without_the_letters(tmp_path):
    """In Windows' Western code page: the second picture is damaged first, then replaced."""
    folder = write_pictures(tmp_path / "絵", ink_rows(2))
    name = "日本語.png"
    first = next(folder.glob("*.png")).rename(folder / name)
    (folder / "metadata.jsonl").unlink()
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text("a drawing")
    whole = first.read_bytes()
    words = (
        f"loop.py pocket --dataset-name {folder} --resolution 64 --max-train-steps 1 --output-dir"
    )
    words += f" {tmp_path}/出 --cache-dir {tmp_path}/cache --no-tensorboard --validation-prompts"
    argv = [sys.executable, *words.split()]
    env = os.environ | {"PYTHONIOENCODING": "cp1252"}
    shown = name.encode("cp1252", "backslashreplace")
    first.write_bytes(b"no picture")
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert b"picture " + shown + b" cannot be read" in done.stderr
    first.write_bytes(whole)
    first.with_suffix(".txt").write_text("")  # so that its name is said
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr[-2000:]
    assert b"(the first: " + shown in done.stdout and b"done: 1 steps" in done.stdout
    assert b"\\u51fa.safetensors" in done.stdout  # the folder's name


def test_options_are_read_without_torch_and_numpy():
    code = "import sys; from keep import command; from inputs import drawing, options; "
    code += "sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("words", ["loop.py orignal", "generate.py nothing"])
def test_a_command_without_a_stdout_says_its_refusal(words):
    code = f"exec {sys.executable} {words} >&-"
    done = subprocess.run(["bash", "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_what_nobody_reads_any_more_ends_no_run():
    code = "from inputs.options import or_leave; or_leave(str, ''); print('x' * 9, flush=True)"
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, "-c", f"{code}; import os; os._exit(7)"]
    done = subprocess.run(argv, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (7, b"")
