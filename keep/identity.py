"""What makes two starts one run: the options, files and pictures that must be the same, as text."""

import dataclasses
from pathlib import Path

import torch

from inputs import hub
from inputs.code import changed, commit
from inputs.files import Refusal, digest
from inputs.options import Config
from inputs.sources import Picture, read_dataset

# What may change between two starts of one run; everything else is part of what the run is.
MAY_CHANGE = {
    *("max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "save_dtype"),
    *("tensorboard", "validation_prompts", "guidance_scale", "num_inference_steps"),
    *("output_dir", "cache_dir", "cache", "device", "attention", "gradient_checkpointing"),
    *("cuda_graph", "fused", "compile", "checkpointed_blocks", "memory_plan", "plan_for"),
    *("ddp_timeout", "plain", "accept_code_change"),
    *("train_batch_size", "gradient_accumulation_steps"),  # their product may not
    "deterministic",  # may be given up, not taken up: see deterministic.promise()
    # base, data and dtype are told by content, not by the name they were asked for
    *("pretrained_model_name_or_path", "dataset_name", "image_column", "caption_column"),
    "mixed_precision",
}
FINGERPRINTS = {  # of what the values of identity() are no options
    "base": "a base of fingerprint",
    "encoders": "text encoders, tokenizers and VAE of fingerprint",
    "data": "pictures and captions of fingerprint",
}


def fixed_options(config: Config) -> dict[str, str]:
    """The options that are part of what the run is, as text."""
    fixed = {k: str(v) for k, v in dataclasses.asdict(config).items() if k not in MAY_CHANGE}
    both = "train_batch_size x gradient_accumulation_steps"
    return fixed | {both: str(config.examples_per_step)}


def identity(
    config: Config,
    dtype: torch.dtype,
    pictures: list[Picture],
    fingerprints: dict[str, str],
    noise: str,
) -> dict[str, str]:
    """What must be the same for a checkpoint to be continued, as text.

    fingerprints: hub.encoder_fingerprints(); noise: the noise schedule.
    """
    return fixed_options(config) | {
        "dtype": str(dtype),
        "base": hub.unet_fingerprint(config.pretrained_model_name_or_path, dtype != torch.float32),
        "encoders": digest(str(fingerprints)),
        "noise schedule": digest(noise),
        "data": data_print(pictures),
    }


def data_print(pictures: list[Picture]) -> str:
    return digest(*(part for p in pictures for part in (p.digest, p.caption)))


def local_identity(config: Config, half: bool) -> dict[str, str]:
    """identity() as far as it is of folders on this disk, which can be replaced in place and looked
    at without a download.
    """
    name, found = config.pretrained_model_name_or_path, {}
    if Path(name).expanduser().is_dir():
        found["base"] = hub.unet_fingerprint(name, half)
        found["encoders"] = digest(str(hub.encoder_fingerprints(name, half)))
    if Path(config.dataset_name).expanduser().is_dir():
        columns = (config.image_column, config.caption_column)
        found["data"] = data_print(read_dataset(config.dataset_name, *columns))
    return found


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


def check_code(config: Config, mine: dict[str, str], state: dict | None) -> str:
    """What the adapter's header, config.json and the log say of changed code: the checkpoint's
    earlier changes, and those since where they are accepted; "" where there are none.

    Raises Refusal, naming every function that changed, where they are not accepted.
    """
    if state is None:
        return ""
    names, theirs = changed(mine, state["code"]), state["commit"]
    if names and not config.accept_code_change:
        back = f"git checkout {theirs.removesuffix('+')}" if theirs else "put the old code back"
        if theirs and theirs.removesuffix("+") == commit().removesuffix("+"):
            back = "put the old code back (git diff shows what is edited, git stash takes it away)"
        back += ", with the edits that were not committed then" if theirs.endswith("+") else ""
        raise Refusal(
            f"since step {state['step']} of the run in {config.out} its code has changed: "
            f"{', '.join(names)}",
            "the code that it began with (comments, docstrings and layout may change)",
            f"{back}; or --accept-code-change, to go on with this code and have that noted; or "
            "another --output-dir for a new run",
        )
    new = f"code changed after step {state['step']}: {', '.join(names)}" if names else ""
    return "; ".join(filter(None, (state["code_changes"], new)))


def about(kept) -> dict[str, str]:
    """What an adapter's header says. Nothing that depends on the clock or on where the run lies."""
    config = kept.run.config
    header = {
        "base_model": public_name(config.pretrained_model_name_or_path),
        "base_fingerprint": kept.identity["base"],
        "base_quantization": config.base_quantization,
        "dataset": public_name(config.dataset_name),
        "recipe": config.recipe,
        "resolution": str(config.resolution),
        "steps": str(kept.run.step),
    }
    return header | ({"code_changes": kept.code_changes} if kept.code_changes else {})


def public_name(name: str) -> str:
    """A Hub name as it is; of a folder its last part, since where it lies is nobody's business."""
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.exists() else name
