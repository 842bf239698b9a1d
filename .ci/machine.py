"""Whether the pinned versions (constraints.txt) run on this machine: asked by make setup before it
downloads 5.5 GB.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

PYTHON = (3, 11)  # the oldest that every pinned version exists for
# For each major version of CUDA the oldest driver, "minimum driver version" in
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
DRIVER = {12: 525, 13: 580}


def pinned(package: str) -> str:
    """Its version in constraints.txt."""
    pins = (Path(__file__).parent / "constraints.txt").read_text()
    return re.search(f"^{package}==(.+)$", pins, re.MULTILINE).group(1)


def driver() -> str:
    """The NVIDIA driver's version; empty where none is at work."""
    if not shutil.which("nvidia-smi"):
        return ""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):  # a broken one, or a GPU that does not answer
        return ""
    found = re.match(r"\d+[\d.]*", said)
    return found.group() if found else ""


def troubles() -> list[str]:
    """A sentence for each thing that does not fit."""
    said = []
    if sys.version_info < PYTHON:
        said.append(
            f"python3 is {sys.version_info[0]}.{sys.version_info[1]}; expected "
            f"{PYTHON[0]}.{PYTHON[1]} or newer. What to do: put a newer python3 first on the PATH"
        )
    here, cuda = driver(), pinned("cuda-toolkit")
    oldest = DRIVER[int(cuda.split(".")[0])]
    if here and int(here.split(".")[0]) < oldest:
        said.append(
            f"the NVIDIA driver is {here}; expected {oldest} or newer, which torch "
            f"{pinned('torch')} with CUDA {cuda} needs. What to do: update the driver, or take a "
            "Python of your own with a torch that fits it: pip install torch torchvision "
            "--index-url https://download.pytorch.org/whl/cu126, pip install -r requirements.txt, "
            "and then make train PYTHON=python3"
        )
    return said


if __name__ == "__main__":
    sys.exit("\n".join(f"error: {each}" for each in troubles()) or 0)
