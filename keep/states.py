"""A checkpoint's state, read without trusting it: nothing in it is run, and only what can have come
from this run's adapter, optimizer and loss scale goes on.
"""

from __future__ import annotations

import dataclasses
import io
import math
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import lora
from inputs.files import Refusal, first_line

if TYPE_CHECKING:
    from loop import Run

# What a state holds; type() and not isinstance(): True is no step.
PARTS = {
    **{"step": int, "flat": torch.Tensor, "modules": list},
    **{"optimizer": dict, "scale": dict, "identity": dict},
}


def read(path: Path, content: bytes) -> dict:
    """The state that save_state() wrote as `content`. Its sum says that it is as it was written,
    not by whom, so nothing that it says is run (weights_only) and nothing in it unpacks to more
    than its own size. Raises Refusal for anything else than a state.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            packed = [each.filename for each in archive.infolist() if each.compress_type]
        if packed:
            raise ValueError(f"{packed[0]} in it is compressed")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        wrong = [key for key, kind in PARTS.items() if type(state[key]) is not kind]
        if wrong:
            raise TypeError(f"{wrong[0]} is a {type(state[wrong[0]]).__name__}")
        if state["step"] != int(path.parent.name):
            raise ValueError(f"it is of step {state['step']}")
    except Exception as error:  # a pickle raises whatever it likes
        raise foreign(path, f"{type(error).__name__}: {first_line(error)}") from error
    return state


def foreign(path: Path, why: str) -> Refusal:
    """The refusal of the state at `path`."""
    return Refusal(
        f"{path} is no state that this project saved ({why})",
        "a checkpoint of this run",
        f"rm -r {path.parent} to continue from the checkpoint before, or another --output-dir",
    )


def wrong_numbers(run: Run, state: dict) -> str:
    """What in `state` cannot have come from this run's adapter, optimizer or loss scale, or ""."""
    mine, n = dataclasses.asdict(run.scale), run.adapter.flat.numel()
    theirs, kept = state["scale"], state["optimizer"].get("state")
    if {k: type(v) for k, v in theirs.items()} != {k: type(v) for k, v in mine.items()} or not (
        theirs["value"] > 0 and math.isfinite(theirs["value"]) and theirs["growth_interval"] > 0
    ):
        return f"the loss scale is {theirs}"
    want, found = {"flat": (torch.float32, n)}, {"flat": state["flat"]}
    if kept != {} or state["step"] != theirs["skipped"]:  # else no step was taken yet
        if type(kept) is not dict or kept.keys() != {0} or type(kept[0]) is not dict:
            return "its optimizer has not one parameter"
        for key, value in kept[0].items():  # bitsandbytes keeps its numbers one level deeper
            found |= value if type(value) is dict else {key: value}
        step = found.pop("step", None)
        if torch.is_tensor(step) and step.numel() == 1 and step.device.type == "cpu":
            step = step.item()
        if type(step) not in (int, float) or not 0 <= step <= state["step"]:
            return f"its optimizer is at step {step}"
        want |= kept_by_adamw(n, run.config.use_8bit_adam)
    if found.keys() != want.keys():
        return f"it holds {', '.join(map(str, found))}, not {', '.join(want)}"
    for key, (dtype, size) in want.items():
        tensor = found[key]
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            return f"{key} is no tensor"
        if tensor.device.type != "cpu":  # "meta": a shape without numbers
            return f"{key} is on {tensor.device}"
        if tensor.dtype != dtype or tensor.shape != (size,):
            return f"{key} is {str(tensor.dtype)[6:]} {[*tensor.shape]}, not {dtype} [{size}]"
        if not tensor.isfinite().all():
            return f"{key} holds NaN or Inf"
    return ""


def kept_by_adamw(n: int, eight_bit: bool) -> dict[str, tuple[torch.dtype, int]]:
    """dtype and length of what AdamW keeps for n parameters; bitsandbytes in 8 bits from 4,096 up:
    two moments, what their 256 codes stand for, and a scale for each block of lora.BLOCK.
    """
    if not eight_bit:
        return dict.fromkeys(("exp_avg", "exp_avg_sq"), (torch.float32, n))
    if n < 4096:
        return dict.fromkeys(("state1", "state2"), (torch.float32, n))
    return {
        **dict.fromkeys(("state1", "state2"), (torch.uint8, n)),
        **dict.fromkeys(("qmap1", "qmap2"), (torch.float32, 256)),
        **dict.fromkeys(("absmax1", "absmax2"), (torch.float32, -(-n // lora.BLOCK))),
    }
