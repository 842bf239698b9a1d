"""Checkpoints: what continues a run to the bit.

OUT/checkpoints/000200/ holds the adapter, state.pt and its sum, state.sha256: a folder without a
matching sum was cut short and is passed over. A state holds, under each matrix's name, its numbers
and what the optimizer keeps for it, so it does not matter in which form they were trained.
"""

import dataclasses
import hashlib
import io
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

import lora
import model
from adapters import files as adapter_files
from inputs import code
from inputs.files import Refusal, part_of, write_whole
from keep import faults
from keep.identity import about


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


# ---- writing -------------------------------------------------------------------------------------


def folder_of(run) -> Path:
    """Where the checkpoint of run.step is, or will be."""
    return run.config.out / "checkpoints" / f"{run.step:06d}"


def save_state(kept) -> None:
    """Write the checkpoint of run.step, whole or not at all; remove what is over the limit. Of
    several processes, which all hold the same, the first writes.

    Raises Refusal where a number of it is not finite: a run cannot be continued from that.
    """
    run, config = kept.run, kept.run.config
    if bad := faults.bad(faults.of_state(kept)):
        found = f"after step {run.step} {bad}, so that it is not saved"
        raise Refusal(found, "finite numbers", faults.AGAIN)
    if not kept.team.first:
        return
    folder, buffer = folder_of(run), io.BytesIO()
    torch.save(state_of(kept), buffer)
    how = (model.DTYPES[config.save_dtype], about(kept))
    files = {
        lora.FILE_NAME: adapter_files.BYTES["peft"](run.adapter, *how),
        "state.pt": buffer.getvalue(),
        "state.sha256": sum_of(buffer.getvalue()).encode(),
    }
    if config.keep_adapters:  # before the state: a step that is saved is not done again
        named = f"kohya/{config.out.resolve().name}-{folder.name}"
        for layout, name in (("peft", folder.name), ("kohya", named)):
            path = config.out / "adapters" / f"{name}.safetensors"
            adapter_files.save(run.adapter, path, layout, *how)
    aside = part_of(folder)
    try:
        for name, content in files.items():
            write_whole(aside / name, content)
        shutil.rmtree(folder, ignore_errors=True)  # one that was cut short, and passed over
        os.replace(aside, folder)
    finally:  # gone already where it was renamed; a full disk needs the room
        shutil.rmtree(aside, ignore_errors=True)
    remove_old(folder.parent, run.step, config.checkpoints_total_limit, kept.judge.best)


def state_of(kept) -> dict:
    """All that a run is continued from."""
    run = kept.run
    return {
        "step": run.step,
        "trained": on_the_host(run.trained),
        "optimizer": type(run.optimizer).__name__,
        "moments": on_the_host(kept.moments.read()),
        "scale": dataclasses.asdict(run.loss_scale),
        "identity": kept.identity,
        "code": kept.code,
        "code_changes": kept.code_changes,
        "commit": code.commit(),
        "unfused": kept.unfused,
        "losses": kept.losses,
        "known": on_the_host(kept.judge.known),
        "config": dataclasses.asdict(run.config),
    }


def on_the_host(tree):
    """Dicts of tensors with copies on the CPU, each of its own size: torch.save() writes the whole
    vector for a view of it.
    """
    if isinstance(tree, dict):
        return {key: on_the_host(each) for key, each in tree.items()}
    return tree.detach().to("cpu", copy=True) if torch.is_tensor(tree) else tree


def remove_old(root: Path, step: int, limit: int, best: int | None) -> None:
    """Leave the newest `limit` checkpoints up to `step`, and that of step `best`. One of a later
    step is damaged: the run would have continued from it.
    """
    folders = checkpoints(root)
    kept = [folder for folder in folders if int(folder.name) <= step][-limit:]
    for folder in folders:
        if folder not in kept and int(folder.name) != best:
            shutil.rmtree(folder)


def save_state_once(kept) -> None:
    """save_state(), unless there is nothing trained, it is saved already, or it is half a step or
    not finite.
    """
    saved = folder_of(kept.run).exists()
    if kept.run.step and not saved and not kept.half_done and not faults.bad(faults.of_state(kept)):
        save_state(kept)


# ---- reading -------------------------------------------------------------------------------------


def checkpoints(root: Path) -> list[Path]:
    """The folders of checkpoints under `root`, whole or not, by their steps: 1000000 after 999999,
    which their names do not say.
    """
    found = [path for path in root.glob("*") if path.name.isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def newest_state(root: Path) -> dict | None:
    """The newest whole checkpoint's state, on the CPU; None where there is no checkpoint. Whether
    it is of this run, check_same(), check_code() and restore() say.
    """
    folders = checkpoints(root)[::-1]
    for folder in folders:
        file, sum_file = folder / "state.pt", folder / "state.sha256"
        if file.is_file() and sum_file.is_file():
            content = file.read_bytes()
            if sum_of(content).encode() == sum_file.read_bytes().strip():
                return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        print(f"{folder} was cut short or damaged and is passed over")
    if folders:
        remedy = f"rm -r {root} to start again from step 1, or another --output-dir"
        raise Refusal(f"no checkpoint under {root} is whole", "one to continue from", remedy)
    return None


def state_of_first(team, root: Path) -> dict | None:
    """newest_state() of the disk that the first process sees; other hosts need not see it. Raises
    Refusal where another host's holds a later step: which one is the first may have changed.
    """
    steps = team.told(max((int(folder.name) for folder in checkpoints(root)), default=0))
    if (newest := max(steps)) > steps[0]:
        found = f"{root} holds step {newest} on the host of rank {steps.index(newest)}, and step "
        expected = "the newest on the host of rank 0, which saves"
        remedy = f"copy {root} there, or give another --output-dir"
        raise Refusal(f"{found}{steps[0]} on that of rank 0", expected, remedy)
    return team.from_first(lambda: newest_state(root))


def restore(kept, state: dict | None) -> None:
    """Put a checkpoint's numbers into the run. Raises Refusal, with nothing of them taken over,
    where they are of other layers or another optimizer, as after an edit that was accepted.
    """
    if state is None:
        return
    run, optimizer = kept.run, type(kept.run.optimizer).__name__
    was = state.get("optimizer")
    mine = {name: each.shape for name, each in run.trained.items()}
    theirs = {name: each.shape for name, each in state["trained"].items()}
    wrong = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
    if wrong or was != optimizer:
        found = "the checkpoint holds other layers or another optimizer: "
        found += f"{was}, and of other shapes {', '.join(wrong[:4]) or 'nothing'}"
        expected = f"{optimizer}, and the {len(run.trained)} matrices that this run trains"
        remedy = "use the code and libraries that it ran with, or another --output-dir"
        raise Refusal(found, expected, remedy)
    with torch.no_grad():
        for name, matrix in run.trained.items():
            matrix.copy_(state["trained"][name])
    kept.moments.write(state["moments"])
    run.loss_scale = type(run.loss_scale)(**state["scale"])
    run.step = state["step"]


def sum_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
