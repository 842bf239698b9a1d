"""make setup installs the tested versions where they run, and says what to do where they do not.
pip install . says that there is nothing to install.
"""

import os
import subprocess
import sys
import tomllib

import pytest

from conftest import ROOT


@pytest.fixture
def machine(tmp_path):
    """machine(what nvidia-smi prints, its exit code, argv...): the process that ran with it."""

    def run(prints: str, code: int, *argv: str) -> subprocess.CompletedProcess:
        smi = tmp_path / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\nprintf '{prints}'\nexit {code}\n")
        smi.chmod(0o755)
        env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "PYTHON", "VENV")}
        env["PATH"] = f"{tmp_path}:{env['PATH']}"
        return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)

    return run


def test_setup_stops_before_the_download_where_the_driver_is_too_old(machine, tmp_path):
    venv = tmp_path / "venv"
    done = machine("535.104.05\\n535.104.05\\n", 0, "make", "setup", f"VENV={venv}")
    assert done.returncode and not venv.exists()
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    for word in ("driver is 535.104.05; expected 580 or newer", "torch 2.", "PYTHON=python3"):
        assert word in said


@pytest.mark.parametrize(
    ("prints", "code"),
    [
        ("580.65.06\\n", 0),
        ("610.1\\n", 0),
        ("NVIDIA-SMI has failed because it could not reach the driver", 9),  # no GPU, then
        ("[N/A]\\n", 0),
        ("", 0),
    ],
)
def test_a_machine_with_a_new_driver_or_none_fits(machine, prints, code):
    done = machine(prints, code, sys.executable, ".ci/machine.py")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_old_python_and_an_old_driver_are_said_at_once(machine):
    code = "import runpy, sys; sys.version_info = (3, 9, 2); "
    code += "runpy.run_path('.ci/machine.py', run_name='__main__')"
    done = machine("470.1\\n", 0, sys.executable, "-c", code)
    assert done.returncode == 1
    first, second = done.stderr.strip().splitlines()
    assert first.startswith("error: python3 is 3.9; expected 3.11 or newer. What to do: ")
    assert "driver is 470.1;" in second


def test_setup_installs_the_tested_versions_and_a_python_of_ones_own_is_left_alone(machine):
    does = machine("", 0, "make", "-n", "setup", "VENV=nowhere").stdout.splitlines()
    (install,) = (line for line in does if "requirements.txt" in line)
    assert install.endswith("-r requirements.txt -c .ci/constraints.txt")
    does = machine("", 0, "make", "-n", "setup", "test", "PYTHON=python3").stdout
    assert "pytest" in does and "pip" not in does and "machine.py" not in does


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable", "build_sdist"])
def test_pip_install_is_told_that_this_is_a_repository_to_run(hook):
    system = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    (folder,), module = system["backend-path"], system["build-backend"]
    code = f"import {module}; {module}.{hook}('somewhere', config_settings={{}})"
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=ROOT / folder, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("this is a repository to run") and "make train" in done.stderr


@pytest.fixture
def typed(tmp_path):
    """typed("make's words"...): what make train, or another target, hands its module, and its first
    line; a Python that only prints stands in for the real one. No GPU.
    """
    python, smi = tmp_path / "python", tmp_path / "nvidia-smi"
    python.write_text('#!/bin/sh\nshift\nprintf "%s\\n" "$@"\n')
    smi.write_text("#!/bin/sh\n")
    for file in (python, smi):
        file.chmod(0o755)

    def run(*words: str, target: str = "train", **environment: str) -> tuple[str, list[str]]:
        made = ("MAKEFLAGS", "PYTHON", "DATA", "ARGS", "RECIPE", "GPUS", "FILE", "RUN")
        env = {k: v for k, v in os.environ.items() if k not in made} | environment
        env["PATH"] = f"{tmp_path}:{env['PATH']}"
        argv = ["make", "--no-print-directory", target, f"PYTHON={python}", *words]
        done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        first, *rest = done.stdout.splitlines()
        return first, rest

    return run


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("my_pictures", "my_pictures"),
        ("my $pictures", "my $pictures"),
        ('$HOME/$(date) `date`/it\'s "mine"/', 'it\'s "mine"'),
        ("two words/and three more", "and three more"),
        ("somebody/dataset", "dataset"),
        ("$x", "$x"),
        ("a#b;c&d|e", "a#b;c&d|e"),
    ],
)
def test_makes_data_is_handed_on_as_it_was_typed(typed, data, name):
    own = ["pocket", "--dataset-name", data, "--output-dir", f"runs/pocket-{name}"]
    assert typed(f"DATA={data}") == ("recipe pocket (no GPU found)", own)
    assert typed(DATA=data)[1] == own  # of the environment
    argv = typed(f"DATA={data}", "RECIPE=t4", "ARGS=--quick --validation-prompts 'a fox' fish")[1]
    own = ["t4", *own[1:4], f"runs/t4-{name}-quick", "--quick"]
    assert argv == [*own, "--validation-prompts", "a fox", "fish"]
    plain = typed(f"DATA={data}", "RECIPE=pocket --better", "ARGS=--plain --seed 1")[1]
    assert plain[-4] == f"runs/pocket-{name}-better-plain"
    look = typed(f"DATA={data}", "RECIPE=native", "ARGS=--seed 1", target="look")[1]
    assert look[-4:] == ["--dataset-name", data, "--seed", "1"] and "native" in look
    assert typed(f"RUN={data}", target="report") == ("see.page", [data])
    assert typed(f"FILE={data}", "ARGS=--a b", target="inspect")[1] == ["inspect", data, "--a", "b"]


@pytest.mark.parametrize("names", [["data"], ["DTA", "seed"]])
def test_a_name_that_make_does_not_know_stops_it(names):
    """`make train data=mine` would train on the recipe's pictures."""
    argv = ["make", "-n", "--no-print-directory", "train", *(f"{name}=mine" for name in names)]
    env = {k: v for k, v in os.environ.items() if k != "MAKEFLAGS"}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "expected names of PYTHON" in done.stderr
    assert {*done.stderr.split("found ")[1].split("=;")[0].split()} == {*names}


def test_make_names_no_recipe_where_a_file_does(typed):
    assert typed() == ("recipe pocket --better (no GPU found)", ["pocket", "--better"])
    for word in ("--quick", "--plain", "--no-better", "--dataset-name=x"):
        assert typed(f"ARGS={word}") == ("recipe pocket (no GPU found)", ["pocket", word])
    argv = typed("DATA=x", "RECIPE=pocket --better")[1]
    assert argv == [
        "pocket",
        "--better",
        "--dataset-name",
        "x",
        "--output-dir",
        "runs/pocket-x-better",
    ]
    said, argv = typed("ARGS=--seed 1 --config runs/x/config.json")
    assert said == "recipe of the file (--config)"
    assert argv == ["--seed", "1", "--config", "runs/x/config.json"]
    assert typed("RECIPE=t4", "ARGS=--config=a.toml")[1] == ["t4", "--config=a.toml"]
    assert typed("DATA=ink", "ARGS=--config a.toml")[1][-3:] == [
        "runs/config-ink",
        "--config",
        "a.toml",
    ]
