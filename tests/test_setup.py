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
