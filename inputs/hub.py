"""Where an SDXL model's files are, what they may say, and what tells one model from another.

A folder in diffusers' layout, or the Hub, of which only what is needed is downloaded, part by part;
or one file, with inputs/sdxl/ in the place of such a folder.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Collection
from pathlib import Path

from inputs import one_file
from inputs.files import Refusal, folder_of, open_safetensors, place, refuse, refusing

PARTS = {  # and the file without which each is nothing
    **dict.fromkeys(("unet", "vae", "text_encoder", "text_encoder_2"), "config.json"),
    **dict.fromkeys(("tokenizer", "tokenizer_2"), "tokenizer_config.json"),
    "scheduler": "scheduler_config.json",
}
SDXL, OPTION = "stabilityai/stable-diffusion-xl-base-1.0", "--pretrained-model-name-or-path"
EXPECTED = (
    f"a Hub name such as {SDXL}, a folder in diffusers' layout, or one .safetensors file in SGM's, "
    "here or as USER/REPOSITORY/FILE"
)
AGAIN = (
    "download the model again, or choose another SDXL model (no inpainting or refiner model), or "
    "pip install --upgrade diffusers transformers"
)
# What an entry may be that would else be met late, or never: in words, and as a test.
# EDM and flow matching are other objectives, and latents with a mean of their own another scale:
# both would train to the end, and draw nonsense.
ENTRIES = {
    "_class_name": (
        "a sampler for DDPM's noise, as SDXL's EulerDiscreteScheduler is",
        lambda v: not str(v).startswith(("EDM", "FlowMatch")),
    ),
    "use_flow_sigmas": ("false", lambda v: not v),
    **dict.fromkeys(("latents_mean", "latents_std"), ("null", lambda v: v is None)),
    "prediction_type": ("epsilon or v_prediction", lambda v: v in ("epsilon", "v_prediction")),
    "beta_schedule": ("linear or scaled_linear", lambda v: v in ("linear", "scaled_linear")),
    "trained_betas": ("null", lambda v: not v),
    "beta_start": ("between 0 and 1", lambda v: is_number(v) and 0 < v < 1),
    "beta_end": ("between 0 and 1", lambda v: is_number(v) and 0 < v < 1),
    "num_train_timesteps": ("2 to 100,000", lambda v: type(v) is int and 1 < v <= 10**5),
    "scaling_factor": ("a number such as 0.13025", lambda v: is_number(v) and 0 < v < 1e3),
    "shift_factor": ("null or a number", lambda v: v is None or (is_number(v) and abs(v) < 1e3)),
    "num_hidden_layers": ("1 to 256", lambda v: type(v) is int and 0 < v <= 256),
    "latent_channels": ("4", lambda v: v == 4),
    "sample_size": ("a size such as 128", lambda v: type(v) is int and 0 < v <= 4096),
    "force_zeros_for_empty_prompt": ("true or false", lambda v: type(v) is bool),
}


def is_number(value) -> bool:
    return type(value) in (int, float)


def fetch(name: str, part: str, half: bool = False) -> Path:
    """The local folder of one part of an SDXL model, downloaded if `name` is a Hub name.

    name: a folder in diffusers' layout, a Hub repository or a file, whose folder is the shipped
    one; part: "unet", "vae", ..., or "" for the top; half: download the fp16 variant where there is
    one. Raises Refusal for what is no SDXL model.
    """
    if file_of(name):
        return one_file.SHIPPED / part
    root = folder_of(name, OPTION, EXPECTED)
    if root is None:
        if name.count("/") != 1:
            raise Refusal(f"there is no folder {name}", EXPECTED, f"correct {OPTION}")
        root = fetch_from_hub(name, part, half)
    needed = ["model_index.json", *([f"{part}/{PARTS[part]}"] if part else [])]
    lacking = [file for file in needed if not (root / file).is_file()]
    kind = "" if lacking else str(read_config(root / "model_index.json").get("_class_name"))
    if "StableDiffusionXL" not in kind:
        found = f"no {lacking[0]}" if lacking else f"a model_index.json of {kind}"
        raise Refusal(
            f"{name} has {found}",
            "an SDXL model in diffusers' layout: model_index.json (StableDiffusionXLPipeline) and "
            f"the folders {', '.join(PARTS)}",
            f"correct {OPTION}, or name a .safetensors file that holds all of a model",
        )
    return root / part


@functools.cache  # read and said once
def file_of(name: str) -> Path | None:
    """The file, here or from the Hub, that holds all of the model `name`; None for a folder or a
    repository. Raises Refusal for a file that is no SDXL model.
    """
    path = place(name)
    if path.suffix != ".safetensors" or path.is_dir():
        return None
    if not path.is_file():
        user, _, rest = name.partition("/")
        repository, _, file = rest.partition("/")
        if not file or name.startswith((".", "/", "~")):
            raise Refusal(f"there is no file {name}", EXPECTED, f"correct {OPTION}")
        from huggingface_hub import hf_hub_download

        remedy = f"check the name and the network, or download it yourself: {OPTION} FILE"
        with refusing(f"{name} is not here, nor did the Hub give it", "a reachable Hub", remedy):
            path = Path(hf_hub_download(f"{user}/{repository}", file))
    # Not on stdout, where generate.py names its pictures and nothing else.
    print(one_file.read_kind(path)[1], file=sys.stderr, flush=True)
    return path


def read_scheduler(name: str, **usual) -> dict:
    """The model's scheduler_config.json on top of `usual`, with what a file says of itself."""
    config = read_config(fetch(name, "scheduler") / "scheduler_config.json", **usual)
    return config | (one_file.read_kind(file)[0] if (file := file_of(name)) else {})


def read_config(path: Path, **usual) -> dict:
    """The object in a model's JSON file, on top of the `usual` entries. Raises Refusal where there
    is none, naming all entries that cannot be: what it describes is built before its weights are
    compared with it, and would take all memory, or all time.
    """
    found = f"{path} is no configuration of an SDXL model"
    with refusing(found, "a JSON object as diffusers wrote it", AGAIN):
        config = usual | json.loads(path.read_text())
        wrong = {key: value for key, value in config.items() if not may_be(key, value)}
    words = {key: ENTRIES.get(key, ["numbers of an SDXL model"])[0] for key in wrong}
    refuse((f"{path} has {key} {wrong[key]!r:.50}", words[key], AGAIN) for key in wrong)
    return config


def may_be(key: str, value) -> bool:
    """Whether a model's entry is one that ENTRIES allows, and no number in it beyond all models."""
    if key in ENTRIES:
        return ENTRIES[key][1](value)
    if isinstance(value, list):
        return all(may_be(key, each) for each in value)
    most = 256 if "layers" in key else 10**6  # SDXL has 32 layers and 49,408 words
    return not is_number(value) or -most <= value <= most  # False for nan, too


def zeros_for_empty_prompt(name: str) -> bool:
    """Whether the unconditional embedding is zeros (SDXL base) or the encoded empty text."""
    index = fetch(name, "") / "model_index.json"
    return read_config(index, force_zeros_for_empty_prompt=True)["force_zeros_for_empty_prompt"]


@functools.cache  # a run asks for the same parts many times
def fetch_from_hub(name: str, part: str, half: bool) -> Path:
    """The snapshot's folder with `part` in it; an earlier download serves where the Hub is away."""
    from huggingface_hub import HfApi, snapshot_download

    found = f"{name} ({part or 'model_index.json'}) is not on this disk, nor did the Hub give it"
    remedy = (
        "check the name and the network (hf auth login for gated models), or copy the model here "
        f"and pass {OPTION} FOLDER"
    )
    with refusing(found, "a reachable Hub, or the model on this disk", remedy):
        try:
            files = HfApi().list_repo_files(name)
            files = [f for f in files if part and f.rpartition("/")[0] == part]
            small = [f"{part}/*.json", f"{part}/*.txt"]
            wanted = ["model_index.json", *small, *pick_weights(files, half)]
            return Path(snapshot_download(name, allow_patterns=wanted))
        except Exception:  # offline, a proxy's answer, a time-out: many classes, one meaning
            folder = Path(snapshot_download(name, local_files_only=True))
            main = PARTS.get(part, "model_index.json")
            weights = pick_weights([p.name for p in (folder / part).glob("*")], half)
            fit = bool(weights) and (half or ".fp16" not in weights[0])
            if not (folder / part / main).is_file() or (main == "config.json" and not fit):
                raise  # what lies here is not what is needed: the first error is the one to tell
            return folder


def pick_weights(files: list[str], half: bool) -> list[str]:
    """Of a part's files those that hold the weights, one file or shards, in the variant to read:
    fp16 first where `half`.

    Names are diffusers': model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, ...
    """
    weights = [f for f in files if f.endswith(".safetensors")]
    variant = [f for f in weights if ".fp16" in f]
    plain = [f for f in weights if ".fp16" not in f and not f.endswith("non_ema.safetensors")]
    return (variant or plain) if half else (plain or variant)


def weight_files(folder: Path, half: bool) -> list[Path]:
    """The safetensors files of `folder`, all of one variant. Raises Refusal for none."""
    names = pick_weights(sorted(path.name for path in folder.glob("*")), half)
    if not names:
        expected = "the weights of an SDXL model in diffusers' layout"
        remedy = "download the model again, or write it with pipe.save_pretrained(folder)"
        raise Refusal(f"{folder} has no .safetensors file", expected, remedy)
    return [folder / name for name in names]


def unet_files(
    name: str, half: bool, wanted: Collection[str] = ()
) -> list[tuple[Path, dict[str, str]]]:
    """Each file of the UNet's weights, with its own names by diffusers' names. wanted: those of the
    UNet, which a one-file model must have exactly.
    """
    if file := file_of(name):
        with open_safetensors(file) as opened:
            names = one_file.names(opened.keys(), "unet")
        if wanted:
            one_file.check_names(file, "unet", names, set(wanted))
        return [(file, {name: source.key for name, source in names.items()})]
    found = []
    for path in weight_files(fetch(name, "unet", half), half):
        with open_safetensors(path) as opened:
            found.append((path, {key: key for key in opened.keys()}))
    return found


def fingerprint(name: str, part: str, half: bool = False) -> str:
    """16 hex digits that tell one encoder or tokenizer from another: its small files whole, 64
    samples of its weights.

    Samples of 4 KiB cost milliseconds where hashing 2 GB costs seconds; a fine-tuned model differs
    everywhere.
    """
    folder, sha = fetch(name, part, half), hashlib.sha256()
    if (file := file_of(name)) and part in one_file.PREFIXES:
        return one_file.fingerprint(file, part)
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
    text.append(f"zeros: {zeros_for_empty_prompt(name)}")
    return {"vae": fingerprint(name, "vae"), "text": " ".join(text)}


def unet_fingerprint(name: str, half: bool) -> str:
    """16 hex digits of ten of the UNet's tensors, rounded to fp16: the same for a model's fp32 file
    and its fp16 variant, different for a fine-tuned or merged one. Adapters carry it, so that a
    wrong base is noticed.
    """
    where = {}
    for path, names in unet_files(name, half):
        where |= {key: (path, theirs) for key, theirs in names.items()}
    keys = {"conv_in.weight", "conv_out.weight"} & where.keys()
    for ending in ("to_q.weight", "to_k.weight", "to_out.0.weight", "ff.net.2.weight"):
        same = sorted(key for key in where if key.endswith(ending))
        keys |= {*same[:1], *same[-1:]}
    sha = hashlib.sha256()
    for key in sorted(keys):
        path, theirs = where[key]
        with open_safetensors(path) as file:
            sha.update(file.get_tensor(theirs).half().numpy().tobytes())
    return sha.hexdigest()[:16]
