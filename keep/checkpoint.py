"""Checkpoints: what continues a run to the bit.

OUT/checkpoints/000200/ holds the adapter, state.pt and its sum, state.sha256: a folder without a
matching sum was cut short and is passed over. A state holds, under each matrix's name, its numbers
and what the optimizer keeps for it, so it does not matter in which form they were trained.
"""

import dataclasses
import hashlib
import io
import os
import re
import shutil
import zipfile
from pathlib import Path

import torch
from torch import Tensor

import lora
import model
from inputs import code
from inputs.files import Refusal, first_line, sync_folder, write_whole
from keep import faults
from keep.identity import about

PARTS = {  # what a state holds, and of which types; type() and not isinstance(): True is no step
    **dict.fromkeys(("trained", "moments", "scale", "identity", "code", "config"), dict),
    **dict.fromkeys(("code_changes", "commit", "unfused"), str),
    "step": int,
}


class PlainMoments:
    """An optimizer's state over separate matrices, by their names, as fast.flat.FlatMoments reads
    and writes it over one vector.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, trained: dict[str, Tensor]):
        self.state, self.trained = optimizer.state, trained

    def read(self) -> dict[str, dict]:
        """{name: what the optimizer keeps for that matrix}; nothing before the first step."""
        return {name: dict(self.state.get(each, {})) for name, each in self.trained.items()}

    def write(self, moments: dict[str, dict]) -> None:
        """Put back what read() gave, here or of a vector."""
        for name, matrix in self.trained.items():
            kept = dict(moments[name])
            for key, value in kept.items():
                if torch.is_tensor(value):
                    # AdamW counts its step up in place, on the host: each matrix needs its own.
                    kept[key] = value.clone() if key == "step" else value.to(matrix.device)
            if kept:
                self.state[matrix] = kept


def on_the_host(tensors: dict) -> dict:
    """Dicts of tensors as copies on the CPU, each of its own size: torch.save() writes the whole
    vector for a view of it. What several names share is written once.
    """
    copies = {}

    def copy(value):
        if isinstance(value, dict):
            return {key: copy(each) for key, each in value.items()}
        if not torch.is_tensor(value):
            return value
        if id(value) not in copies:
            copies[id(value)] = value.detach().to("cpu", copy=True)
        return copies[id(value)]

    return copy(tensors)


def save_state(kept) -> None:
    """Write the checkpoint of run.step, whole or not at all; remove what is over the limit. Of
    several processes, which all hold the same, the first writes.

    Raises Refusal where a number of it is not finite: a run cannot be continued from that.
    """
    run, config = kept.run, kept.run.config
    if bad := faults.in_state(kept):
        found = f"after step {run.step} {bad}, so that it is not saved"
        raise Refusal(found, "finite numbers", faults.AGAIN)
    if not kept.team.first:
        return
    root = config.out / "checkpoints"
    folder = root / f"{run.step:06d}"
    aside = root / f".{folder.name}.{os.getpid()}.part"
    buffer = io.BytesIO()
    state = on_the_host({"trained": run.trained, "moments": kept.moments.read()}) | {
        "step": run.step,
        "scale": dataclasses.asdict(run.loss_scale),
        "identity": kept.identity,
        "code": kept.code,
        "code_changes": kept.code_changes,
        "commit": code.commit(),
        "unfused": kept.unfused,
        "config": dataclasses.asdict(config),
    }
    torch.save(state, buffer)
    try:
        path, dtype = aside / lora.FILE_NAME, model.DTYPES[config.save_dtype]
        lora.save(run.adapter, path, dtype, about(kept))
        write_whole(aside / "state.pt", buffer.getvalue())
        write_whole(aside / "state.sha256", sum_of(buffer.getvalue()).encode())
    except (Refusal, KeyboardInterrupt):
        shutil.rmtree(aside, ignore_errors=True)  # a full disk needs the room
        raise
    shutil.rmtree(folder, ignore_errors=True)  # one that was cut short, and passed over
    os.replace(aside, folder)
    sync_folder(root)
    remove_old(root, run.step, config.checkpoints_total_limit)


def remove_old(root: Path, step: int, limit: int) -> None:
    """Leave the newest `limit` checkpoints up to `step`. One of a later step is damaged: the run
    would have continued from it. Each is renamed first: a run killed here leaves no half of it.
    """
    folders = checkpoints(root)
    kept = [folder for folder in folders if int(folder.name) <= step][-limit:]
    for folder in folders:
        if folder not in kept:
            aside = root / f".{folder.name}.old.{os.getpid()}.part"
            os.replace(folder, aside)
            shutil.rmtree(aside)


def save_state_once(kept) -> None:
    """save_state(), unless there is nothing trained, it is saved already, or it is half a step or
    not finite.
    """
    run = kept.run
    there = (run.config.out / "checkpoints" / f"{run.step:06d}").exists()
    if run.step and not there and not kept.half_done and not faults.in_state(kept):
        save_state(kept)


def checkpoints(root: Path) -> list[Path]:
    """The folders of checkpoints under `root`, whole or not, by their steps: 1000000 after 999999,
    which their names do not say.
    """
    found = [p for p in root.glob("*") if re.fullmatch(r"[0-9]{6,9}", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name))


def newest_state(root: Path) -> dict | None:
    """The newest whole checkpoint's state, on the CPU; None where there is no checkpoint. Whether
    it is of this run, check_same(), check_code() and restore() say.
    """
    folders = checkpoints(root)[::-1]
    for folder in folders:
        sum_file, file = folder / "state.sha256", folder / "state.pt"
        if sum_file.is_file() and file.is_file():
            content = file.read_bytes()
            if sum_of(content).encode() == sum_file.read_bytes().strip():
                return read(file, content)
        print(f"{folder} was cut short or damaged and is passed over")
    if folders:
        raise Refusal(
            f"no checkpoint under {root} is whole",
            "a whole one to continue from",
            f"rm -r {root} to start again from step 1, or another --output-dir",
        )
    return None


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
        old = "flat" in state
        wrong = [k for k, kind in PARTS.items() if not old and type(state[k]) is not kind]
        if wrong:
            raise TypeError(f"{wrong[0]} is a {type(state[wrong[0]]).__name__}")
        if state["step"] != int(path.parent.name):
            raise ValueError(f"it is of step {state['step']}")
    except Exception as error:  # a pickle raises whatever it likes
        raise foreign(path, f"{type(error).__name__}: {first_line(error)}") from error
    if old:
        raise Refusal(
            f"{path} is of an earlier version of this project: it holds the adapter as one vector",
            "a checkpoint that holds each matrix under its name",
            "another --output-dir for a new run, or git checkout the commit that it ran with",
        )
    return state


def foreign(path: Path, why: str) -> Refusal:
    """The refusal of the state at `path`."""
    return Refusal(
        f"{path} is no state that this project saved ({why})",
        "a checkpoint of this run",
        f"rm -r {path.parent} to continue from the checkpoint before, or another --output-dir",
    )


def restore(kept, state: dict | None) -> None:
    """Put a checkpoint's numbers into the run. Raises Refusal, before anything is changed, where
    they are of other layers, or of another shape or type: copying would stretch them, and
    bitsandbytes' kernels would read beyond their end.
    """
    if state is None:
        return
    run = kept.run
    if other := state["trained"].keys() ^ run.trained.keys():
        name = min(other, key=str)
        raise Refusal(
            f"the checkpoint adapts other layers: {name} is in one of the two alone",
            f"the {len(run.trained)} matrices that this run trains",
            "use the code and the diffusers that it ran with, or another --output-dir",
        )
    if wrong := wrong_numbers(run, state):
        folder = run.config.out / "checkpoints" / f"{state['step']:06d}"
        raise foreign(folder / "state.pt", wrong)
    with torch.no_grad():
        for name, matrix in run.trained.items():
            matrix.copy_(state["trained"][name])
    kept.moments.write(state["moments"])
    run.loss_scale = type(run.loss_scale)(**state["scale"])
    run.step = state["step"]


def wrong_numbers(run, state: dict) -> str:
    """What in `state`, whose matrices have this run's names, cannot have come from its adapter,
    optimizer or loss scale, or "".
    """
    theirs = state["scale"]
    if {k: type(v) for k, v in theirs.items()} != {
        k: type(v) for k, v in vars(run.loss_scale).items()
    }:
        return f"the loss scale is {theirs}"
    for name, matrix in run.trained.items():
        numbers, moments = state["trained"][name], state["moments"].get(name, {})
        found = {key: looks(value) for key, value in {"numbers": numbers, **moments}.items()}
        want = {"numbers": f"float32 {[*matrix.shape]}"}
        if state["step"] != theirs["skipped"]:  # else the optimizer has kept nothing yet
            want |= kept_by(run.optimizer, matrix.shape) or found
        if found != want:
            unlike, like = dict(found.items() - want.items()), dict(want.items() - found.items())
            return f"of {name} it holds {unlike}, not {like}"
    return ""


def kept_by(optimizer: torch.optim.Optimizer, shape: torch.Size) -> dict[str, str]:
    """What AdamW keeps for a matrix; bitsandbytes in 8 bits: two moments, what their 256 codes
    stand for, and a scale for each block of 256 numbers. Empty for another optimizer.
    """
    names, same = [each.__name__ for each in type(optimizer).__mro__], f"float32 {[*shape]}"
    if "AdamW8bit" in names:
        kinds = {"state": f"uint8 {[*shape]}", "qmap": "float32 [256]"}
        kinds["absmax"] = f"float32 [{-(-shape.numel() // 256)}]"
        return {"step": "int"} | {f"{key}{i}": kinds[key] for key in kinds for i in (1, 2)}
    return {"step": "float32 []", "exp_avg": same, "exp_avg_sq": same} if "AdamW" in names else {}


def looks(value) -> str:
    """dtype and shape of a tensor of finite numbers; of anything else what it is."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or not value.is_cpu:
        return type(value).__name__  # on "meta" a tensor has a shape without numbers
    return f"{str(value.dtype)[6:]} {[*value.shape]}" + " not finite" * (not value.isfinite().all())


def sum_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
