"""Where an SDXL model's files are, and what tells one model from another.

A folder in diffusers' layout, or the Hub, of which only what is needed is downloaded, part by part.
"""

import functools
import hashlib
import json
from pathlib import Path

from inputs.files import Refusal, first_line, open_safetensors

PARTS = {  # and the file without which each is nothing
    **dict.fromkeys(("unet", "vae", "text_encoder", "text_encoder_2"), "config.json"),
    **dict.fromkeys(("tokenizer", "tokenizer_2"), "tokenizer_config.json"),
    "scheduler": "scheduler_config.json",
}


def fetch(name: str, part: str, half: bool = False) -> Path:
    """The local folder of one part of an SDXL model, downloaded if `name` is a Hub name.

    name: a folder in diffusers' layout or a Hub repository; part: "unet", "vae", ..., or "" for the
    top; half: download the fp16 variant where there is one. Raises Refusal for what is no SDXL
    model.
    """
    root = Path(name).expanduser()
    if not root.is_dir():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise Refusal(
                f"there is no folder {name}",
                "a Hub name such as stabilityai/stable-diffusion-xl-base-1.0, or a folder in "
                "diffusers' layout",
                "correct --pretrained-model-name-or-path",
            )
        root = fetch_from_hub(name, part, half)
    check_layout(root, name, (part,) if part else ())
    return root / part


def read_config(path: Path) -> dict:
    """The object in a model's JSON file. Raises Refusal where there is none, or where a number in
    it is of no model: what it describes is built before its weights are compared with it, and would
    take all memory, or all time.
    """
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise TypeError(f"it holds a {type(config).__name__}")
        for key, value in config.items():
            numbers = [value] if not isinstance(value, list) else flat_list(value)
            most = 256 if "layers" in key else 10**6  # SDXL has 32 layers and 49,408 words
            wrong = [n for n in numbers if isinstance(n, int | float) and not -most <= n <= most]
            if wrong:
                raise ValueError(f"{key} is {wrong[0]:g}, beyond {most:,}")
        return config
    except (OSError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise Refusal(
            f"{path} is no configuration of an SDXL model ({first_line(error)})",
            "a JSON object as diffusers wrote it",
            "download the model again",
        ) from error


def flat_list(value: list) -> list:
    """The values in lists of lists."""
    return [x for each in value for x in (flat_list(each) if isinstance(each, list) else [each])]


def check_layout(root: Path, name: str, parts: tuple[str, ...]) -> None:
    """Raise Refusal where `root` is no SDXL model in diffusers' layout, or lacks one of `parts`."""
    index = root / "model_index.json"
    kind = str(read_config(index).get("_class_name", "something else")) if index.is_file() else ""
    missing = [part for part in parts if not (root / part / PARTS[part]).is_file()]
    if "StableDiffusionXL" in kind and not missing:
        return
    found = f"a model_index.json of {kind}" if kind else "no model_index.json"
    raise Refusal(
        f"{name} has {f'no {missing[0]}/{PARTS[missing[0]]}' if missing and kind else found}",
        "an SDXL model in diffusers' layout: model_index.json (StableDiffusionXLPipeline) and the "
        f"folders {', '.join(PARTS)}",
        "correct --pretrained-model-name-or-path; a one-file checkpoint is converted with "
        "diffusers' "
        "StableDiffusionXLPipeline.from_single_file(file).save_pretrained(folder)",
    )


@functools.cache
def hub_files(name: str) -> tuple[str, ...]:
    from huggingface_hub import HfApi

    return tuple(HfApi().list_repo_files(name))


@functools.cache  # a run asks for the same parts many times
def fetch_from_hub(name: str, part: str, half: bool) -> Path:
    """The snapshot's folder with `part` in it; an earlier download serves where the Hub is away."""
    from huggingface_hub import snapshot_download

    try:
        try:
            files = [f for f in hub_files(name) if part and f.rpartition("/")[0] == part]
            weights = pick_weights([f for f in files if f.endswith(".safetensors")], half)
            small = [f for f in files if f.endswith((".json", ".txt"))]
            wanted = ["model_index.json", *small, *weights]
            return Path(snapshot_download(name, allow_patterns=wanted))
        except Exception:  # offline, a proxy's answer, a time-out: many classes, one meaning
            folder = Path(snapshot_download(name, local_files_only=True))
            here = [p.name for p in (folder / part).glob("*") if p.is_file()]
            weights = pick_weights([n for n in here if n.endswith(".safetensors")], half)
            whole = PARTS.get(part, "model_index.json") in here
            needs_weights = PARTS.get(part) == "config.json"
            other_variant = not half and any(".fp16" in weight for weight in weights)
            if not whole or (needs_weights and (not weights or other_variant)):
                raise  # what lies here is not what is needed: the first error is the one to tell
            return folder
    except Exception as error:
        raise Refusal(
            f"{name} ({part or 'model_index.json'}) is not on this disk, and the Hub did not give "
            f"it ({first_line(error)})",
            "a reachable Hub, or the model on this disk",
            "check the name and the network (hf auth login for gated models), or copy the model "
            "here and pass --pretrained-model-name-or-path FOLDER",
        ) from error


def pick_weights(files: list[str], half: bool) -> list[str]:
    """Of a part's weight files, one file or shards, the variant to read: fp16 first where `half`.

    Names are diffusers': model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, ...
    """
    variant = [f for f in files if ".fp16" in f]
    plain = [f for f in files if ".fp16" not in f and not f.endswith("non_ema.safetensors")]
    return next((group for group in ((variant, plain) if half else (plain, variant)) if group), [])


def weight_files(folder: Path, half: bool) -> list[Path]:
    """The safetensors files of `folder`, all of one variant. Raises Refusal for none."""
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    files = [folder / name for name in pick_weights(names, half)]
    if not files:
        raise Refusal(
            f"{folder} has no .safetensors file",
            "the weights of an SDXL model in diffusers' layout",
            "download the model again, or write it with pipe.save_pretrained(folder)",
        )
    return files


def fingerprint(name: str, part: str, half: bool = False) -> str:
    """16 hex digits that tell one encoder or tokenizer from another: its small files whole, 64
    samples of its weights.

    Samples of 4 KiB cost milliseconds where hashing 2 GB costs seconds; a fine-tuned model differs
    everywhere.
    """
    folder, sha = fetch(name, part, half), hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".txt")):
        sha.update(path.read_bytes())
    for path in weight_files(folder, half) if "tokenizer" not in part else []:
        with open(path, "rb") as file:
            for i in range(64):
                file.seek(path.stat().st_size * i // 64)
                sha.update(file.read(4096))
    return sha.hexdigest()[:16]


def encoder_fingerprints(name: str, half: bool) -> dict[str, str]:
    """The fingerprints of the "vae" and of all that makes a "text" embedding."""
    parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    text = [fingerprint(name, part, half) for part in parts]
    index = read_config(fetch(name, "") / "model_index.json")
    zeros = f"zeros: {index.get('force_zeros_for_empty_prompt', True)}"
    return {"vae": fingerprint(name, "vae"), "text": " ".join([*text, zeros])}


def unet_fingerprint(name: str, half: bool) -> str:
    """16 hex digits of ten of the UNet's tensors, rounded to fp16: the same for a model's fp32 file
    and its fp16 variant, different for a fine-tuned or merged one. Adapters carry it, so that a
    wrong base is noticed.
    """
    where = {}
    for path in weight_files(fetch(name, "unet", half), half):
        with open_safetensors(path) as file:
            where |= dict.fromkeys(file.keys(), path)
    keys = {"conv_in.weight", "conv_out.weight"} & where.keys()
    for ending in ("to_q.weight", "to_k.weight", "to_out.0.weight", "ff.net.2.weight"):
        same = sorted(key for key in where if key.endswith(ending))
        keys |= {*same[:1], *same[-1:]}
    sha = hashlib.sha256()
    for key in sorted(keys):
        with open_safetensors(where[key]) as file:
            sha.update(file.get_tensor(key).half().numpy().tobytes())
    return sha.hexdigest()[:16]
