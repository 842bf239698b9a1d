"""The kinds of bad input, what they are made of, and whole commands that meet several at once."""

import functools
import json
import shutil
from pathlib import Path

import torch

import lora
import model
from keep import drawing, training
from stress import bad_folders, bad_pictures, bad_weights
from stress.case import Case, command

CPU = torch.device("cpu")
DRAW_OPTIONS = (
    *("seeds", "strength", "guidance_scale", "device", "any_base", "prompts"),
    *("base_quantization", "mixed_precision", "cache_dir"),
)
RUN_OPTIONS = (
    *("seed", "device", "caption_dropout", "learning_rate", "lr_end", "save_dtype"),
    *("max_grad_norm", "noise_offset", "snr_gamma", "checkpointed_blocks", "output_dir"),
    *("cache_dir", "lora_alpha", "caption_column", "image_column", "random_flip"),
    *("adam_weight_decay", "dataset_name", "pretrained_model_name_or_path"),
)


@functools.cache
def text_encoders() -> model.TextEncoders:
    return model.load_text_encoders(str(bad_folders.MODEL), CPU)


@functools.cache
def vae() -> torch.nn.Module:
    return model.load_vae(str(bad_folders.MODEL), CPU)


def prepare(base: Path) -> None:
    """Three captioned pictures, a finished run of two steps on them, and its cache."""
    (base / "data").mkdir(exist_ok=True)
    lines = []
    for picture in bad_folders.PICTURES[:3]:
        shutil.copy(picture, base / "data")
        lines.append(json.dumps({"file_name": picture.name, "text": picture.stem}))
    (base / "data" / "metadata.jsonl").write_text("\n".join(lines))
    case = Case(0, 0, "command", 0, base.parent)
    case.out = base
    if not (base / "run" / "finished.json").is_file():
        assert command(training.main, bad_folders.small_run(case)) == "accepted"
    text_encoders(), vae(), bad_weights.pocket_adapter()
    bad_weights.small_run(base), bad_weights.true_rows(base), bad_pictures.writable()


def whole_command(case: Case):
    """python loop.py or generate.py, met by a bad file or a bad word somewhere on its way."""
    how = ("picture", "caption", "checkpoint", "option", "adapter", "draw option")[case.turn % 6]
    return draw_command(case, how) if how in ("adapter", "draw option") else run_command(case, how)


def draw_command(case: Case, how: str):
    path = case.folder / "a.safetensors"
    shutil.copy(case.base / "run" / lora.FILE_NAME, path)
    if how == "adapter":
        path.write_bytes(bad_weights.adapter_file(case))
        return lambda: command(drawing.main, bad_folders.draw_small(case, path))
    words = bad_folders.odd_words(case, list(DRAW_OPTIONS))
    case.what = f"generate.py {' '.join(words)!a}"[:300]
    return lambda: command(drawing.main, [*bad_folders.draw_small(case, path), *words])


def run_command(case: Case, how: str):
    shutil.copytree(case.base / "data", case.folder / "data")
    bad_folders.copy_run(case)
    argv = bad_folders.small_run(case, dataset_name=str(case.folder / "data"), max_train_steps="3")
    if how == "checkpoint":
        newest = max((case.out / "run" / "checkpoints").iterdir())
        bad_weights.bad_state(case, newest)
    elif how == "option":
        words = bad_folders.odd_words(case, list(RUN_OPTIONS))
        case.what = " ".join(words)[:300].encode("ascii", "backslashreplace").decode()
        # odd folders are made where the sandbox allows it
        argv += [w.replace("../..", str(case.out / "deep")) for w in words]
    else:
        shutil.rmtree(case.out / "run")
        first = sorted((case.folder / "data").glob("*.png"))[0]
        if how == "picture":
            first.write_bytes(bad_pictures.any_bytes(case))
        else:
            text = bad_folders.TEXTS[case.turn // 6 % len(bad_folders.TEXTS)]
            rows = [{"file_name": p.name, "text": text} for p in first.parent.glob("*.png")]
            lines = "\n".join(map(json.dumps, rows))
            (case.folder / "data" / "metadata.jsonl").write_text(lines)
            case.what = f"caption {text[:30]!a}"
    case.bomb = False  # a whole run takes more than the picture
    case.what = f"{how}: {case.what}"
    return lambda: command(training.main, argv)


KINDS = {
    "picture": bad_pictures.picture,
    "caption": bad_folders.caption,
    "metadata": bad_folders.metadata,
    "option": bad_folders.option,
    "run folder": bad_folders.run_folder,
    "model": bad_weights.model_,
    "adapter": bad_weights.adapter,
    "checkpoint": bad_weights.checkpoint_,
    "cache": bad_weights.cache,
    "command": whole_command,
}
