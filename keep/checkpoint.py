"""What a run leaves on disk: checkpoints that continue it to the bit, and the exported adapter,
read back and compared.

OUT/checkpoints/000200/ holds the adapter, state.pt and its sum, state.sha256: a folder
without a matching sum was cut short and is passed over. OUT/pytorch_lora_weights.safetensors and
OUT/kohya/NAME.safetensors are the result, and OUT/finished.json, written after both were compared,
says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import lora
import model
from inputs import hub, sources
from inputs.files import Refusal, digest, sweep_parts, sync_folder, write_whole
from inputs.options import Config
from keep import faults as diagnose
from keep import states

if TYPE_CHECKING:
    from loop import Run

# What may change between two starts of one run; everything else is part of what the run is.
MAY_CHANGE = {
    *("max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "save_dtype"),
    *("tensorboard", "validation_prompts", "guidance_scale", "num_inference_steps"),
    *("output_dir", "cache_dir", "cache", "device", "attention", "gradient_checkpointing"),
    *("cuda_graph", "fused", "compile", "checkpointed_blocks", "memory_plan", "plan_for"),
    "ddp_timeout",
    *("train_batch_size", "gradient_accumulation_steps"),  # their product may not
    "deterministic",  # may be given up, not taken up: see deterministic.promise()
    # base, data and dtype are told by content, not by the name they were asked for
    *("pretrained_model_name_or_path", "dataset_name", "image_column", "caption_column"),
    "mixed_precision",
}


def fixed_options(config: Config) -> dict[str, str]:
    """The options that are part of what the run is, as text."""
    fixed = {k: str(v) for k, v in dataclasses.asdict(config).items() if k not in MAY_CHANGE}
    both = "train_batch_size x gradient_accumulation_steps"
    return fixed | {both: str(config.examples_per_step)}


def encoder_prints(name: str, half: bool) -> dict[str, str]:
    """The fingerprints of the "vae" and of all that makes a "text" embedding."""
    text_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    text = [hub.fingerprint(name, part, half) for part in text_parts]
    zeros = f"zeros: {model.zeros_for_empty_prompt(name)}"
    return {"vae": hub.fingerprint(name, "vae"), "text": " ".join([*text, zeros])}


def identity(
    config: Config,
    dtype: torch.dtype,
    pictures: list[sources.Picture],
    prints: dict[str, str],
    noise: str,
) -> dict[str, str]:
    """What must be the same for a checkpoint to be continued, as text.

    prints: encoder_prints(); noise: the noise schedule.
    """
    return fixed_options(config) | {
        "dtype": str(dtype),
        "base": hub.unet_fingerprint(config.pretrained_model_name_or_path, dtype != torch.float32),
        "encoders": digest(str(prints)),
        "noise schedule": digest(noise),
        "data": data_print(pictures),
    }


FINGERPRINTS = {  # of what the values of identity() are no options
    "base": "a base of fingerprint",
    "encoders": "text encoders, tokenizers and VAE of fingerprint",
    "data": "pictures and captions of fingerprint",
}


def data_print(pictures: list[sources.Picture]) -> str:
    return digest(*(part for p in pictures for part in (p.digest, p.caption)))


def local_identity(config: Config, half: bool) -> dict[str, str]:
    """identity() as far as it is of folders on this disk, which can be replaced in place and looked
    at without a download.
    """
    name, found = config.pretrained_model_name_or_path, {}
    if Path(name).expanduser().is_dir():
        found["base"] = hub.unet_fingerprint(name, half)
        found["encoders"] = digest(str(encoder_prints(name, half)))
    if Path(config.dataset_name).expanduser().is_dir():
        columns = (config.image_column, config.caption_column)
        found["data"] = data_print(sources.read_dataset(config.dataset_name, *columns))
    return found


def save_state(run: Run) -> None:
    """Write the checkpoint of run.step, whole or not at all; remove what is over the limit. Of
    several processes, which all hold the same, the first writes.

    Raises Refusal where a number of it is not finite: a run cannot be continued from that.
    """
    if bad := diagnose.in_state(run):
        raise Refusal(
            f"after step {run.step} {bad}, so that it is not saved",
            "finite numbers",
            diagnose.AGAIN,
        )
    if not run.team.first:
        return
    root = run.config.out / "checkpoints"
    folder = root / f"{run.step:06d}"
    aside = root / f".{folder.name}.{os.getpid()}.part"
    buffer = io.BytesIO()
    state = {
        "step": run.step,
        "flat": run.adapter.flat.detach().cpu(),
        "optimizer": run.optimizer.state_dict(),
        "scale": dataclasses.asdict(run.scale),
        "modules": list(run.adapter.layers),
        "identity": run.identity,
        "config": dataclasses.asdict(run.config),
    }
    torch.save(state, buffer)
    dtype = model.DTYPES[run.config.save_dtype]
    try:
        lora.save(run.adapter, aside / lora.FILE_NAME, "peft", dtype, about(run))
        write_whole(aside / "state.pt", buffer.getvalue())
        write_whole(aside / "state.sha256", sum_of(buffer.getvalue()).encode())
    except (Refusal, KeyboardInterrupt):
        shutil.rmtree(aside, ignore_errors=True)  # a full disk needs the room
        raise
    shutil.rmtree(folder, ignore_errors=True)  # one that was cut short, and passed over
    os.replace(aside, folder)
    sync_folder(root)
    remove_old(root, run.step, run.config.checkpoints_total_limit)


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


def save_state_once(run: Run) -> None:
    """save_state(), unless there is nothing trained, it is saved already, or it is half a step or
    not finite.
    """
    there = (run.config.out / "checkpoints" / f"{run.step:06d}").exists()
    if run.step and not there and not run.half_done and not diagnose.in_state(run):
        save_state(run)


def checkpoints(root: Path) -> list[Path]:
    """The folders of checkpoints under `root`, whole or not, by their steps: 1000000 after 999999,
    which their names do not say.
    """
    found = [p for p in root.glob("*") if re.fullmatch(r"[0-9]{6,9}", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name))


def newest_state(root: Path) -> dict | None:
    """The newest whole checkpoint's state, on the CPU; None where there is no checkpoint."""
    folders = checkpoints(root)[::-1]
    for folder in folders:
        sum_file, file = folder / "state.sha256", folder / "state.pt"
        if sum_file.is_file() and file.is_file():
            content = file.read_bytes()
            if sum_of(content).encode() == sum_file.read_bytes().strip():
                return states.read(file, content)
        print(f"{folder} was cut short or damaged and is passed over")
    if folders:
        raise Refusal(
            f"no checkpoint under {root} is whole",
            "a whole one to continue from",
            f"rm -r {root} to start again from step 1, or another --output-dir",
        )
    return None


def check_same(config: Config, mine: dict[str, str], state: dict | None) -> None:
    """Raise Refusal where the checkpoint `state` is of another run than `mine`, naming field and
    values.
    """
    for key, value in mine.items() if state else ():
        # A run from before an option existed ran as the option's default does.
        theirs = state["identity"].get(key, str(getattr(Config, key, "not set")))
        if theirs != value:
            name = FINGERPRINTS.get(key, key)
            raise Refusal(
                f"{config.out} holds a run with {name} {theirs}, and this command has {name} "
                f"{value}",
                "the same options, base model, pictures and captions as at its start "
                "(max_train_steps, saving, logging and memory options may change)",
                "give the old value or put the old content back, or another --output-dir for a new "
                "run",
            )


def restore(run: Run, state: dict | None) -> None:
    """Put a checkpoint's numbers into `run`. Raises Refusal, before anything is changed, where they
    are of another shape or type: copying would stretch them, and bitsandbytes' kernels would read
    beyond their end.
    """
    if state is None:
        return
    if state["modules"] != list(run.adapter.layers):
        raise Refusal(
            "the checkpoint adapts other layers",
            "this diffusers' layers",
            "use the diffusers it ran with",
        )
    path = run.config.out / "checkpoints" / f"{state['step']:06d}" / "state.pt"
    if wrong := states.wrong_numbers(run, state):
        raise states.foreign(path, wrong)
    with torch.no_grad():
        run.adapter.flat.copy_(state["flat"])
    # The options' own groups: they are the run's identity, and their keys change with the library.
    groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
    run.scale = type(run.scale)(**state["scale"])
    run.step = state["step"]


# ---- the end: export, and proof that the files are what was trained ------------------------------


def about(run: Run) -> dict[str, str]:
    """What an adapter's header says. Nothing that depends on the clock or on where the run lies."""
    return {
        "base_model": public_name(run.config.pretrained_model_name_or_path),
        "base_fingerprint": run.identity["base"],
        "base_quantization": run.config.base_quantization,
        "dataset": public_name(run.config.dataset_name),
        "recipe": run.config.recipe,
        "resolution": str(run.config.resolution),
        "steps": str(run.step),
    }


def public_name(name: str) -> str:
    """A Hub name as it is; of a folder its last part, since where it lies is nobody's business."""
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.exists() else name


def export(run: Run) -> list[Path]:
    """Write the adapter in both layouts, read each file back, and refuse if it is not what was
    trained.

    fp32: every number equal and the UNet's answer to one batch equal to the bit; fp16: equal to the
    rounded numbers, the answer within 2e-3 of its own length.
    """
    flat, dtype = run.adapter.flat, model.DTYPES[run.config.save_dtype]
    if torch.equal(flat.detach().cpu(), run.start) or not any(
        layer.lora_B.any() for layer in run.adapter.layers.values()
    ):
        raise Refusal(
            "the adapter did not move: it equals its start",
            "a trained adapter",
            "a higher --learning-rate or more --max-train-steps"
            + f" ({run.scale.skipped} steps were skipped)",
        )
    batch = run.examples.batch(range(1), run.device)
    paths = {"peft": run.config.out / lora.FILE_NAME, "kohya": kohya_path(run.config)}
    with torch.no_grad():
        trained, answer = flat.clone(), model.predict(run.unet, batch["noise"], batch)
        before = [matrix.clone() for _, matrix in run.adapter.parts()]
        for layout, path in paths.items():
            lora.save(run.adapter, path, layout, dtype, about(run))
            flat.zero_()
            lora.load(run.adapter, path)
            again = model.predict(run.unet, batch["noise"], batch)
            off = ((again - answer).norm() / answer.norm()).item()
            # Matrix by matrix: the padding between them is in no file, and bitsandbytes moves it.
            numbers_equal = all(
                torch.equal(matrix, was.to(dtype).float())
                for (_, matrix), was in zip(run.adapter.parts(), before, strict=True)
            )
            flat.copy_(trained)
            if not numbers_equal or not off <= (0.0 if dtype == torch.float32 else 2e-3):
                raise Refusal(
                    f"{path}, read back, gives another UNet (outputs differ by {off:.2e})",
                    "the trained one",
                    "check the disk and give the same command again; the training is safe under "
                    "checkpoints/",
                )
    return list(paths.values())


def kohya_path(config: Config) -> Path:
    return config.out / "kohya" / f"{config.out.resolve().name}.safetensors"


def exported_sums(config: Config) -> dict[str, str]:
    """The exported files, by their names in config.out, and their SHA-256."""
    paths = (config.out / lora.FILE_NAME, kohya_path(config))
    return {path.relative_to(config.out).as_posix(): sum_of(path.read_bytes()) for path in paths}


def mark_finished(config: Config, run: Run) -> None:
    """Note that the exported files are whole and compared, and what they are of."""
    # Again, since the run may have been killed between its last checkpoint and this.
    remove_old(config.out / "checkpoints", run.step, config.checkpoints_total_limit)
    note = {"steps": run.step, "files": exported_sums(config), "save_dtype": config.save_dtype}
    note["options"], note["identity"] = fixed_options(config), run.identity
    (config.out / "pictures" / "before-after.png").unlink(missing_ok=True)  # of an earlier adapter
    write_whole(config.out / "finished.json", json.dumps(note, indent=1).encode())


def finished(config: Config) -> int:
    """The steps of a finished run whose exported files are still what they were, or 0.

    Raises Refusal where the run in config.out was of other options, or a local folder that it came
    from, base model or pictures, holds something else by now.
    """
    sweep_parts(config.out)
    try:
        said = json.loads((config.out / "finished.json").read_text())
        whole = said["files"] == exported_sums(config) and said["save_dtype"] == config.save_dtype
        steps, known = said["steps"], said["options"] | said.get("identity", {})
        half = known.get("dtype", "torch.float32") != "torch.float32"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 0  # not there, or not as it was written
    if type(steps) is not int:
        return 0
    state = {"identity": known}
    check_same(config, fixed_options(config), state)
    if config.deterministic:  # a promise about how it was computed, from the first step on
        check_same(config, {"deterministic": "True"}, state)
    if "identity" in said:  # not in a note of an earlier version
        check_same(config, local_identity(config, half), state)
    return steps if whole and steps >= config.max_train_steps else 0


def sum_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
