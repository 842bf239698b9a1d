"""What tests read of the folders that runs leave."""

import json
from pathlib import Path

import torch
from torch import Tensor

import lora
import model
from conftest import TINY_SDXL
from inputs.options import RECIPES
from keep import checkpoint


class Killed(BaseException):
    """Stands for the process being gone: nothing of ours catches it."""


def adapter(folder: Path) -> bytes:
    """The exported file."""
    return (folder / lora.FILE_NAME).read_bytes()


def matrices(folder: Path) -> dict[str, Tensor]:
    """What the newest checkpoint holds, by name."""
    return checkpoint.newest_state(folder / "checkpoints")["trained"]


def in_one(tensors: dict[str, Tensor]) -> Tensor:
    """Copies of all numbers in one vector."""
    return torch.cat([each.detach().flatten() for each in tensors.values()])


def moved(folder: Path) -> Tensor:
    """What training added to the start, in one vector."""
    unet = model.load_unet(str(TINY_SDXL), torch.device("cpu"), torch.float32)
    start = lora.inject(unet, lora.TARGETS, 16, 16, RECIPES["pocket"][1].seed).matrices()
    return in_one({name: end - start[name] for name, end in matrices(folder).items()})


def log(folder: Path) -> list[dict]:
    """log.jsonl, a dict for each step."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
