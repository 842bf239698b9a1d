"""Where an SDXL model's files are, what they may say, and what tells one model from another.

A folder in diffusers' layout, or the Hub, of which only what is needed is downloaded, part by part;
or one file, with inputs/sdxl/ in the place of such a folder.
"""

import functools
import hashlib
import json
import re
import sys
from collections.abc import Collection
from pathlib import Path

from inputs import one_file
from inputs.download import asked, check_room, listing, say
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
DDPM = "a sampler for DDPM's noise, as SDXL's EulerDiscreteScheduler is"
ENTRIES = {
    # As the scheduler's own file has it, and model_index.json with the library before it.
    "_class_name": (DDPM, lambda v: is_ddpm(v)),
    "scheduler": (DDPM, lambda v: type(v) is list and len(v) == 2 and is_ddpm(v)),
    "use_flow_sigmas": ("false", lambda v: not v),
    "timestep_type": ("discrete", lambda v: v in (None, "discrete")),  # continuous ones are EDM's
    "rescale_betas_zero_snr": ("true or false", lambda v: v in (None, True, False)),
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
    "in_channels": ("4, 9 is an inpainting model, 8 an editing one", lambda v: v in (3, 4)),
    "sample_size": ("a size such as 128", lambda v: type(v) is int and 0 < v <= 4096),
    "force_zeros_for_empty_prompt": ("true or false", lambda v: type(v) is bool),
}


def is_ddpm(sampler) -> bool:
    return "EDM" not in str(sampler) and "FlowMatch" not in str(sampler)


def is_number(value) -> bool:
    return type(value) in (int, float)


def fetch(name: str, part: str, half: bool = False) -> Path:
    """The local folder of one part of an SDXL model, downloaded if `name` is a Hub name.

    name: a folder in diffusers' layout, a Hub repository or a file, whose folder is the shipped
    one; part: "unet", "vae", ..., or "" for the top; half: download the fp16 variant where there is
    one. Raises Refusal for what is no SDXL model.
    """
    if source(name, part) != name:
        return fetch_vae(VAES[name])
    if file_of(name):
        return one_file.SHIPPED / part
    root = folder_of(name, OPTION, EXPECTED)
    if root is None:
        if name.count("/") != 1:
            raise Refusal(f"there is no folder {name}", EXPECTED, f"correct {OPTION}")
        if part:  # of another family no gigabytes
            fetch(name, "")
        root = fetch_from_hub(name, REVISIONS.get(name, "main"), part, half)
    needed = ["model_index.json", *([f"{part}/{PARTS[part]}"] if part else [])]
    lacking = [file for file in needed if not (root / file).is_file()]
    index = {} if lacking else read_config(root / "model_index.json")
    kind = str(index.get("_class_name"))
    refiner = index.get("text_encoder", "") in (None, [None, None])
    other = ": an inpainting model" * ("Inpaint" in kind) + ": the refiner" * refiner
    if "StableDiffusionXL" not in kind or other:
        found = f"no {lacking[0]}" if lacking else f"a model_index.json of {kind}{other}"
        raise Refusal(
            f"{name} has {found}",
            "an SDXL model in diffusers' layout: model_index.json (StableDiffusionXLPipeline) and "
            f"the folders {', '.join(PARTS)}",
            f"correct {OPTION}, or name a .safetensors file that holds all of a model",
        )
    return root / part


def fetch_vae(name: str) -> Path:
    """The folder of a VAE that stands in the place of a model's own: `name` is that folder, or a
    model's, here or on the Hub, or a file. Raises Refusal for another kind of VAE.
    """
    try:
        if file_of(name):
            return one_file.SHIPPED / "vae"
        root = folder_of(name, OPTION, EXPECTED)
        if root is None:
            return vae_from_hub(name, REVISIONS.get(name, "main"))
        return check_vae(root if (root / "config.json").is_file() else root / "vae")
    except Refusal as refusal:
        found, _, remedy = (part.replace(OPTION, "--vae") for part in refusal.parts)
        remedy = f"name another VAE with --vae, or leave it out ({remedy})"
        raise Refusal(found, one_file.A_VAE, remedy) from refusal


def check_vae(folder: Path) -> Path:
    """`folder`. Raises Refusal where its config.json describes no VAE that SDXL may have."""
    config = read_config(folder / "config.json", scaling_factor=None)
    kind, factor = config.get("_class_name"), config["scaling_factor"]
    if kind != "AutoencoderKL" or factor == 0.18215:  # SD 1's and 2's, whose latents are others
        found = f"{folder / 'config.json'} describes an {kind} with a scaling_factor of {factor}"
        raise Refusal(found, one_file.A_VAE, AGAIN)
    return folder


def source(name: str, part: str) -> str:
    """Where a part of the model `name` comes from: a VAE of use_revision(), else the model."""
    return (part == "vae" and VAES.get(name)) or name


def parts_of(name: str) -> list[str]:
    """What a file called `name` must hold: it may be a model, one without its VAE, or a VAE."""
    if name in VAES.values():
        return ["vae"]
    return [part for part in one_file.PREFIXES if source(name, part) == name]


@functools.cache  # read and said once
def file_of(name: str) -> Path | None:
    """The file, here or from the Hub, that holds all of the model `name`, or a VAE of that name;
    None for a folder or a repository. Raises Refusal for a file that is no SDXL model.
    """
    path = place(name)
    if path.suffix.lower() != ".safetensors" or path.is_dir():
        return None
    if not path.is_file():
        user, _, rest = name.partition("/")
        repository, _, file = rest.partition("/")
        if not file or name.startswith((".", "/", "~")):
            raise Refusal(f"there is no file {name}", EXPECTED, f"correct {OPTION}")
        path = snapshot(f"{user}/{repository}", REVISIONS.get(name, "main"), file)[0] / file
    # Not on stdout, where generate.py names its pictures and nothing else.
    print(one_file.read_kind(path, parts_of(name))[1], file=sys.stderr, flush=True)
    return path


def read_scheduler(name: str, **usual) -> dict:
    """The model's scheduler_config.json on top of `usual`, with what a file says of itself."""
    config = read_config(fetch(name, "scheduler") / "scheduler_config.json", **usual)
    file = file_of(name)
    return config | (one_file.read_kind(file, parts_of(name))[0] if file else {})


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


# ---- from the Hub --------------------------------------------------------------------------------

REVISIONS: dict[str, str] = {}  # the branch, tag or commit of each Hub model; else main
VAES: dict[str, str] = {}  # of each model the VAE to take in the place of its own, or ""
announced: set[Path] = set()  # the commits whose size was said
WAY_OUT = f"copy the model here and pass {OPTION} FOLDER"


def use_revision(name: str, revision: str, vae: str = "") -> None:
    """Take the model `name` as it is on that branch, tag or commit, and `vae` in the place of its
    VAE, in all of this process; "" is main, and its own. Raises Refusal for a revision of a folder.
    """
    if VAES != (mine := {name: vae if vae != name else ""}):
        file_of.cache_clear()  # other parts are read of the same files
        VAES.clear()  # of a run before in this process
        VAES.update(mine)
    if revision and place(name).exists():
        found = f"--revision {revision} with {name}, which is on this disk"
        raise Refusal(found, "a Hub model, which has revisions", "leave --revision out")
    REVISIONS[name] = revision or "main"


def commit_of(name: str) -> str:
    """The commit of a Hub model that this process takes; "" of what is on this disk."""
    if place(name).exists():
        return ""
    file = file_of(name)  # user/repository/... lies in snapshots/COMMIT/...
    return file.parents[name.count("/") - 2].name if file else fetch(name, "").name


@functools.cache  # a branch means one commit in all of a run
def snapshot(name: str, revision: str, file: str) -> tuple[Path, dict[str, int]]:
    """The folder of the commit that `revision` means now, with `file` in it, and the size of each
    file of that commit; of an earlier download, which is said, and without sizes, where the Hub
    does not answer.
    """
    from huggingface_hub import try_to_load_from_cache

    with refusing(f"{name} could not be downloaded", "a name on the Hub", f"correct {OPTION}"):
        try:
            commit, files = listing("model", name, revision, f"{name} ({file})", WAY_OUT)
            if file not in files:
                raise Refusal(f"{name} has no {file}", "a file that it has", f"correct {OPTION}")
            here = isinstance(try_to_load_from_cache(name, file, revision=commit), str)
            if files[file] > 1e6 and not here:
                check_room(files[file], f"{name}/{file}", WAY_OUT)
            # By the name of the branch, so that the client keeps which commit it is.
            return bring(name, revision, file, [file], files[file]), files
        except Refusal as refusal:
            path = try_to_load_from_cache(name, file, revision=revision)
            if not isinstance(path, str):
                raise
            root = Path(path).parents[file.count("/")]
            say(f"{refusal.parts[0]}; {name} is taken as downloaded before, commit {root.name}")
            return root, {}


@functools.cache
def vae_from_hub(name: str, revision: str) -> Path:
    """The folder of a VAE that is a Hub repository, or that is in a model's."""
    try:
        root, part = snapshot(name, revision, "config.json")[0], ""
    except Refusal:
        root, part = snapshot(name, revision, "vae/config.json")[0], "vae/"
    snapshot(name, root.name, f"{part}diffusion_pytorch_model.safetensors")
    return check_vae(root / part)


def fetch_from_hub(name: str, revision: str, part: str, half: bool) -> Path:
    """The folder of a Hub model's commit with `part` in it ("" brings model_index.json). What was
    downloaded before serves where the Hub is away.
    """
    root, files = snapshot(name, revision, "model_index.json")
    if not part or (not files and is_here(root / part, half)):
        return root
    files = files or listing("model", name, root.name, f"{name} ({part})", WAY_OUT)[1]
    coming = to_download(files, root, part, half)
    if sum(coming.values()) > 1e6 and root not in announced:
        announce(name, root, files, half)
    if coming:
        bring(name, root.name, part, [*coming], sum(coming.values()))
    return root


def is_here(folder: Path, half: bool) -> bool:
    """Whether a part lies in `folder`, as the names tell: all shards, and no fp16 for fp32."""
    main, names = PARTS[folder.name], [path.name for path in folder.glob("*")]
    weights = pick_weights(names, half)
    shards = re.findall(r"-of-(\d+)\.", " ".join(weights))
    fit = weights and (half or ".fp16" not in weights[0])
    whole = fit and all(int(count) == len(weights) for count in shards)
    return main in names and bool(whole or main != "config.json")


def bring(name: str, revision: str, part: str, files: list[str], total: int) -> Path:
    """Download these files of a Hub model, of `total` bytes. Returns the folder of their commit."""
    from huggingface_hub import snapshot_download

    call = functools.partial(snapshot_download, name, revision=revision, allow_patterns=files)
    return Path(asked("model", name, f"{name} ({part})", WAY_OUT, call, total))


def to_download(files: dict[str, int], root: Path, part: str, half: bool) -> dict[str, int]:
    """Of a part's files those that a run needs and that are not in `root`, with their sizes."""
    there = [file for file in files if file.rpartition("/")[0] == part]
    small = [file for file in there if file.endswith((".json", ".txt"))]
    wanted = [*small, *pick_weights(there, half)]
    return {file: files[file] for file in wanted if not (root / file).is_file()}


def announce(name: str, root: Path, files: dict[str, int], half: bool) -> None:
    """Say, of all parts, how much of the model comes and where to. Raises Refusal where it has no
    room. By the first part that comes: of another the half that is asked for is its own.
    """
    coming = {p: to_download(files, root, p, half and p != "vae").values() for p in PARTS}
    parts = ", ".join(f"{p} {sum(each) / 1e9:.2f}" for p, each in coming.items() if sum(each) > 1e7)
    check_room(sum(map(sum, coming.values())), f"{name} ({parts})", WAY_OUT)
    announced.add(root)


# ---- what tells one model from another -----------------------------------------------------------


def pick_weights(files: list[str], half: bool) -> list[str]:
    """Of a part's files those that hold the weights, one file or shards, in the variant to read:
    fp16 first where `half`.

    Names are diffusers': model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, ...
    """
    weights = [f for f in files if f.endswith(".safetensors")]
    # Beside a VAE's own there may lie the same in other layouts.
    weights = [f for f in weights if "diffusion_pytorch_model" in f] or weights
    variant = [f for f in weights if ".fp16" in f]
    plain = [f for f in weights if ".fp16" not in f and not f.endswith("non_ema.safetensors")]
    return (variant or plain) if half else (plain or variant)


def weight_files(folder: Path, half: bool) -> list[Path]:
    """The safetensors files of `folder`, all of one variant. Raises Refusal for none."""
    there = sorted(path.name for path in folder.glob("*") if path.is_file())  # no pipe: it waits
    if not (names := pick_weights(there, half)):
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
        check_numbers(path)
        with open_safetensors(path) as opened:
            found.append((path, {key: key for key in opened.keys()}))
    return found


def check_numbers(path: Path) -> None:
    """Raise Refusal for weights that are no numbers with a point: quantised ones mean nothing
    without their scales, and loaders cast them without a word.
    """
    with open_safetensors(path) as file:
        weights = [key for key in file.keys() if key.endswith((".weight", ".bias"))]
        dtypes = {key: file.get_slice(key).get_dtype() for key in weights}
    odd = [key for key, dtype in dtypes.items() if dtype not in ("F64", *one_file.NUMBERS)]
    if odd:
        found = f"{path} has {len(odd)} weights such as {min(odd)} in {dtypes[min(odd)]}"
        raise Refusal(found, ", ".join(one_file.NUMBERS), one_file.REMEDIES["quantised"])


def fingerprint(name: str, part: str, half: bool = False) -> str:
    """16 hex digits that tell one encoder or tokenizer from another: its small files whole, 64
    samples of its weights.

    Samples of 4 KiB cost milliseconds where hashing 2 GB costs seconds; a fine-tuned model differs
    everywhere.
    """
    folder, sha = fetch(name, part, half), hashlib.sha256()
    if part in one_file.PREFIXES and (file := file_of(source(name, part))):
        return one_file.fingerprint(file, part)
    small = [p for p in folder.iterdir() if p.suffix in (".json", ".txt") and p.is_file()]
    for path in sorted(small):
        sha.update(path.read_bytes())
    for path in weight_files(folder, half) if "tokenizer" not in part else []:
        check_numbers(path)
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
