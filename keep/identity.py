"""What makes two starts one run: the options, files and pictures that must be the same, as text."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import torch

from adapters import files
from inputs import hub
from inputs.code import changed
from inputs.drawing import check_base, header, of_run, public_name
from inputs.files import Refusal, digest, place
from inputs.one_file import HEADER, PREDICTS
from inputs.options import OTHERWISE, RELATIVES, Config
from inputs.sources import WHITE, Picture, read_datasets, ten
from lora import AdapterFile
from model import NoiseSchedule

# What may change between two starts of one run; everything else is part of what the run is.
MAY_CHANGE = {
    *("max_train_steps", "max_train_epochs", "checkpointing_steps", "checkpoints_total_limit"),
    *("save_dtype", "tensorboard", "validation_prompts", "guidance_scale", "num_inference_steps"),
    *("stop_when_worse", "validation_steps", "validation_data"),  # of the last its content is told
    *("preview_steps", "preview_prompts", "keep_adapters"),
    *("output_dir", "cache_dir", "cache", "device", "attention", "gradient_checkpointing"),
    *("cuda_graph", "fused", "checkpointed_blocks", "memory_plan", "plan_for"),
    *("ddp_timeout", "plain", "accept_code_change", "config", "quiet", "better"),
    *("train_batch_size", "gradient_accumulation_steps"),  # their product may not
    "deterministic",  # may be given up, not taken up: see deterministic.promise()
    # base, data and dtype are told by content, not by the name they were asked for
    *("pretrained_model_name_or_path", "revision", "dataset_name"),
    *("image_column", "caption_column", "dataset_split", "dataset_config"),
    *("caption", "caption_from_name", "mixed_precision", "vae"),
    *("dataset_weights", "folder_repeats", "mask_from_alpha", "caption_lines", "trigger"),
    *("shuffle_tags", "keep_tags", "tag_dropout", "caption_variants"),
    *("start_from", "any_base", "upscale", "as_lora"),  # which only says no
}
# Of these a run's digest tells only where they act, so that the files of older runs stay as they
# are.
LATER = (*OTHERWISE, *RELATIVES, "use_rslora")
CHANGED = "changed in picture, mask, weight or caption"
PICTURES = "pictures.json"  # in the run's folder: what its pictures and captions were


def fixed_options(config: Config) -> dict[str, str]:
    """The options that are part of what the run is, as text."""
    fixed = {k: str(v) for k, v in dataclasses.asdict(config).items() if k not in MAY_CHANGE}
    both = "train_batch_size x gradient_accumulation_steps"
    return fixed | {both: str(config.examples_per_step)}


def on_schedule(config: Config, began: dict | None) -> Config:
    """`config` with its schedule's length: as asked, else as the run began with, which `began`, its
    checkpoint or the note of its end, tells.
    """
    kept = began["identity"]["lr_schedule_steps"] if began else config.max_train_steps
    return dataclasses.replace(config, lr_schedule_steps=config.lr_schedule_steps or int(kept))


def identity(
    config: Config, dtype: torch.dtype, pictures: list[Picture], schedule: NoiseSchedule
) -> dict[str, str]:
    """What must be the same for a checkpoint to be continued, as text."""
    noise = f"{schedule.prediction_type} {schedule.alphas_cumprod.tolist()}"
    told = {"dtype": str(dtype), "noise schedule": digest(noise), "data": of_data(pictures)}
    base = of_base(config.pretrained_model_name_or_path, dtype != torch.float32)
    return fixed_options(config) | base | told


def revision(config: Config) -> str:
    """The commit of the base that the run in config.out began with, unless another revision is
    asked for, or another base; else the revision that is asked for.
    """
    name, run = config.pretrained_model_name_or_path, config.out / "config.json"
    same = of_run(run, "pretrained_model_name_or_path") == name
    same = same and config.revision in ("", of_run(run, "revision"))
    return (same and of_run(run, "base_commit")) or config.revision


def of_base(name: str, half: bool) -> dict[str, str]:
    encoders = digest(str(hub.encoder_fingerprints(name, half)))
    return {"base": hub.unet_fingerprint(name, half), "text encoders, tokenizers and VAE": encoders}


def start_of(
    config: Config, half: bool, state: dict | None, schedule: NoiseSchedule | None = None
) -> tuple[AdapterFile | None, str]:
    """The adapter that a run starts from and its fingerprint; None and "" for none.

    A begun run, of which `state` tells, goes on where the file is gone: all that it needs of it is
    in its checkpoint. Raises Refusal for what is no adapter, and for one of another base or of
    other noise than the `schedule` of a run that begins.
    """
    begun = (state or {}).get("identity", {}).get("start_from", "")
    path = place(config.start_from)
    if not config.start_from or (begun and not path.exists()):
        return None, begun * bool(config.start_from)
    file = files.read(path)
    check_base(config, file.path, file.about, half)
    if schedule and not begun and not config.any_base:
        mine = header(config, schedule)
        theirs = {"prediction_type": PREDICTS.get(file.about.get(HEADER[0]))} | file.about
        for key in ("prediction_type", "zero_terminal_snr"):
            if theirs.get(key) not in (None, mine[key]):
                found = f"{file.path} was trained with {key} {theirs[key]}, not {mine[key]}"
                remedy = f"--{key.replace('_', '-')} {theirs[key]}, or --any-base to take it so"
                raise Refusal(found, "the noise that it was trained with", remedy)
    return file, digest(file.path.read_bytes(), str(file.alpha))


def started_from(config: Config, identity: dict[str, str]) -> dict[str, str]:
    """What config.json and an adapter's header say of the start."""
    told = f"{Path(config.start_from).name} {identity.get('start_from')}"
    return {"started_from": told} if config.start_from else {}


def of_data(pictures: list[Picture]) -> str:
    return digest(*(part for p in pictures for part in (p.digest, *p.captions, *more_of(p))))


def more_of(picture: Picture) -> list[str]:
    """What of a picture only some runs have, as text."""
    weight = [f"shown {picture.weight} times"] if picture.weight > 1 else []
    return weight + ([f"mask {picture.mask.digest}"] if picture.mask not in (None, WHITE) else [])


def listed(pictures: list[Picture]) -> dict[str, str]:
    """What OUT/pictures.json holds: by it a later start tells by name what has changed."""
    return {picture.name: of_data([picture]) for picture in pictures}


def other_pictures(config: Config) -> str:
    """What of the data set is not as in OUT/pictures.json, in words."""
    try:
        old = json.loads((config.out / PICTURES).read_text())
    except (OSError, ValueError):  # on the first process's host, or gone
        return "others"
    new, found = listed(read_datasets(config)), {}
    for name in (name for name in sorted(old | new) if old.get(name) != new.get(name)):
        how = "added" if name not in old else "gone" if name not in new else CHANGED
        found.setdefault(how, []).append(name)
    told = [f"{len(names)} {how} ({ten(names)})" for how, names in found.items()]
    return ", ".join(told) or "the same pictures in another order"


def typed(value: str) -> str:
    """An option's value, as the identity holds it, as it is typed: ('attn1', 'ff') is attn1 ff."""
    if re.fullmatch(r"\(\)|\([\"'\d].*,.*\)", value):
        value = " ".join(map(str, ast.literal_eval(value)))
    return value or "(none)"


def check_same(config: Config, mine: dict[str, str], state: dict | None) -> None:
    """Raise Refusal where the checkpoint `state` is of another run than `mine`, naming every field
    that differs and both its values.
    """
    if state is None:
        return
    # A run from before an option existed ran as the option's default does.
    theirs = {k: state["identity"].get(k, str(getattr(Config, k, "not set"))) for k in mine}
    if other := [key for key in mine if theirs[key] != mine[key]]:
        told = [{key: f"{key} {typed(each[key])}" for key in other} for each in (theirs, mine)]
        if "data" in other:
            told[0]["data"] = f"the pictures in its {PICTURES}"
            told[1]["data"] = other_pictures(config)
        was, now = (", ".join(each.values()) for each in told)
        found = f"{config.out} holds a run with {was}, and this command has {now}"
        expected = "the same options, base model, pictures and captions as at its start "
        expected += "(max_train_steps, saving, logging and memory options may change)"
        remedy = "give the old value or put the old content back, or another --output-dir"
        raise Refusal(found, expected, remedy)


def check_code(config: Config, mine: dict[str, str], state: dict | None) -> str:
    """What the adapter's header, config.json and the log say of changed code: the checkpoint's
    earlier changes, and those since where they are accepted; "" where there are none.

    Raises Refusal, naming every function that changed, where they are not accepted.
    """
    if state is None:
        return ""
    names = ", ".join(changed(mine, state["code"]))
    if names and not config.accept_code_change:
        commit = state["commit"].removesuffix("+")
        found = f"since step {state['step']} of the run in {config.out} its code has changed: "
        expected = "the code that it began with (comments, docstrings and layout may change)"
        then = f", git checkout {commit}, as it was committed then" if commit else ""
        remedy = f"put the old code back (git diff shows what is edited{then}); or "
        remedy += "--accept-code-change, to go on and have that noted; or another --output-dir"
        raise Refusal(found + names, expected, remedy)
    new = f"code changed after step {state['step']}: {names}" if names else ""
    return "; ".join(filter(None, (state["code_changes"], new)))


def about(kept) -> dict[str, str]:
    """What an adapter's header says. Nothing that depends on the clock or on where the run lies."""
    config = kept.run.config
    # A run that is lengthened stays this run, and of a constant rate the schedule's length is none.
    # So do runs that began before there were the options of LATER, which are off then.
    later = {k: str(getattr(Config, k)) for k in LATER}
    own = {k: v for k, v in kept.identity.items() if v != later.get(k) and k != "lr_schedule_steps"}
    told = {
        "base_model": public_name(config.pretrained_model_name_or_path),
        "base_fingerprint": kept.identity["base"],
        "base_quantization": config.base_quantization,
        "dataset": " ".join(map(public_name, config.dataset_name)),
        "recipe": config.recipe,
        "resolution": " ".join(map(str, config.resolution)),
        # ModelSpec's words for it (epsilon or v), and for what it belongs to: kohya's files have
        # more of them
        "modelspec.prediction_type": kept.run.schedule.prediction_type.split("_")[0],
        **files.MODELSPEC,
        "steps": str(kept.run.step),
        "run": digest(*(f"{k} {v}" for k, v in sorted(own.items())))[:12],
    }
    if commit := hub.commit_of(config.pretrained_model_name_or_path):
        told["base_commit"] = commit
    told |= header(config, kept.run.schedule) | started_from(config, kept.identity)
    return told | ({"code_changes": kept.code_changes} if kept.code_changes else {})
