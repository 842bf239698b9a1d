"""What an adapter file holds, as python -m adapters inspect tells it."""

import re
from collections import Counter
from pathlib import Path

import lora
from adapters import foreign
from adapters.tools import joined, modules_of, squared_length
from inputs.files import open_safetensors, sayable
from inputs.one_file import HEADER
from inputs.progress import progress

# Entries of a header that tell of the base and of what it predicts.
BASE = ("base_model", "ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
BASE += HEADER
# What keys that begin so meet elsewhere: seen with diffusers, read in the other programs' code.
TRAPS = {
    r"unet\.": "ComfyUI skips the attention layers, A1111 and Forge leave the file out",
    r"(?!unet|lora_unet|diffusion)": "diffusers' load_lora_weights loads it and changes nothing",
    r"diffusion_model\.": "diffusers' load_lora_weights refuses ComfyUI's own keys",
    r"lora_unet_(down|mid|up)_": "sd-scripts merges and trains on SGM's block names alone",
}
KOHYA = "convert --to kohya mends it"
WORDS = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}


def describe(file: lora.AdapterFile, weights: dict[str, tuple]) -> str:
    """All that is known of a file that tools.read() gave, in lines. weights: tools.layers_of() the
    base against which its corrections are measured, {} for none.
    """
    with open_safetensors(file.path) as opened:
        keys = sorted(opened.keys())
    about, size, modules = file.about, file.path.stat().st_size / 1e6, modules_of(file)
    dtypes = {str(matrix.dtype)[6:] for matrix in file.matrices.values()}
    targets = Counter(re.sub(r".*(attentions|_blocks|attn\d)\.(\d+\.)?", "", m) for m in modules)
    base = [f"{key} {about[key]}" for key in BASE if key in about]
    scale = f"{file.alpha:g} / {file.rank} = {file.alpha / file.rank:g}"
    lines = [
        f"{file.path}: LoRA of SDXL's UNet, {size:.1f} MB, {' and '.join(sorted(dtypes))}",
        f"{len(modules)} modules, all of rank {file.rank} and scale alpha / rank = {scale}",
        f"targets: {', '.join(f'{count} {name}' for name, count in sorted(targets.items()))}",
        f"base: {', '.join(base) or 'not told'}",
        f"keys such as {keys[-1]}; its header has {len(about)} entries:",
        *(f"  {key}: {sayable(value, 160)}" for key, value in sorted(about.items())),
        "||scale BA||" + (" / ||W||:" if weights else " itself, since no base was named:"),
    ]
    lengths = lengths_by_block(file, weights)
    for block, length in lengths.items():
        bar = "█" * round(30 * length / (max(lengths.values()) or 1.0))
        lines.append(f"  {block:26} {length:8.2g} {bar}")
    lines += [f"trap: {trap}" for trap in traps(file, keys)] or ["traps: none known"]
    return "\n".join(map(sayable, lines))


def other(path: Path) -> str:
    """What a file holds that is more than LoRA of one rank and alpha on attention, in lines; "" of
    one that is just that. Raises Refusal as foreign.read() does.
    """
    file = foreign.read(path)
    found, alike = file.corrections, {(each.rank, each.alpha) for each in file.corrections}
    conv = [" on a convolution" * any(p.ndim > 2 for p in each.parts.values()) for each in found]
    kinds = Counter(WORDS[foreign.kind_of(e.parts)] + on for e, on in zip(found, conv, strict=True))
    attention = all("attn" in each.module and "to_" in each.module for each in found)
    if [*kinds] == ["LoRA"] and attention and len(alike) == 1 and not file.left_out:
        return ""
    pairs = Counter(f"rank {each.rank} alpha {each.alpha:g}" for each in found)
    layers = Counter(re.sub(r"\d+", "#", each.module) for each in found)
    told = [f"{path}: {', '.join(f'{n} layers of {kind}' for kind, n in kinds.items())}"]
    told += [f"  {n} of {pair}" for pair, n in pairs.most_common(10)]
    told += [f"layers, of {len(layers)} kinds:"]
    told += [f"  {n:4} {name}" for name, n in layers.most_common(20)]
    told += [f"  and {len(layers) - 20} kinds more"] * (len(layers) > 20)
    told += [file.left_out] * bool(file.left_out)
    told += [f"  {key}: {sayable(value, 160)}" for key, value in sorted(file.about.items())]
    return "\n".join(map(sayable, told))


def lengths_by_block(file: lora.AdapterFile, weights: dict[str, tuple]) -> dict[str, float]:
    """The length of all corrections of a block with attention, as a share of that of the weights
    that they correct; the length itself without `weights`.
    """
    ours, theirs = Counter(), Counter()
    for module in progress(sorted(modules_of(file)), "measuring", delay=2):
        block = re.match(r".*?attentions\.\d+", module)[0]
        ours[block] += squared_length(*joined([(file, 1.0)], module))
        if weights:
            path, key = weights[module]
            theirs[block] += open_safetensors(path).get_tensor(key).float().norm().item() ** 2
    return {block: (ours[block] / theirs.get(block, 1.0)) ** 0.5 for block in ours}


def traps(file: lora.AdapterFile, keys: list[str]) -> list[str]:
    """What the file is going to meet in other programs."""
    found = [f"{trap}; {KOHYA}" for start, trap in TRAPS.items() if re.match(start, keys[-1])]
    version = file.about.get("ss_base_model_version", "sdxl_" * (not file.about))
    if keys[-1].startswith("lora_unet_") and not version.startswith("sdxl_"):
        found.append(f"A1111 hides it: its ss_base_model_version is not sdxl_...; {KOHYA}")
    told = "lora_adapter_metadata" in file.about or any(key.endswith(".alpha") for key in keys)
    if any(re.match(r"unet\..*\.alpha$", key) for key in keys):
        found.append(f"diffusers' load_lora_weights refuses .alpha beside PEFT's keys; {KOHYA}")
    if not told and not keys[-1].startswith("base_model."):  # peft's is in a file beside it
        found.append("nothing tells alpha: to every program it is the rank, and the scale 1")
    if not any(each.any() for name, each in file.matrices.items() if name.endswith("B")):
        found.append("every correction is zero: it changes nothing")
    return found
