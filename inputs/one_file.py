"""A model in one .safetensors file, as its first trainers wrote it (SGM's layout) and as Civitai
and ComfyUI hand it on: UNet, VAE and both text encoders, under other names than diffusers' and
without a configuration.

What the file does not hold lies in inputs/sdxl/: SDXL base's configurations and CLIP's vocabulary.
What it says of itself, in tensors that are marks and in its header, is read and never guessed.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from inputs.files import Refusal, open_safetensors, refuse, refusing

SHIPPED = Path(__file__).parent / "sdxl"
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
# Under these prefixes, too, and not used by SDXL; the projection is one that ComfyUI adds.
BARE_VAE = re.compile(r"(encoder|decoder|(post_)?quant_conv)\.")
UNUSED = re.compile(r"position_ids$|logit_scale$|embedders\.0\.transformer\.text_projection\.")
NUMBERS = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
EXPECTED = "a one-file SDXL model: UNet, VAE and both text encoders in SGM's layout"
OTHER = "choose an SDXL model, such as SDXL base, Illustrious, NoobAI or Pony"
# What a file may be instead, told by a tensor's name, and what else than OTHER to do then.
KINDS = {
    "an adapter, no model": r"[._]lora[._](A|B|up|down)\b|lora_(unet|te\d?)_|\.(hada_w1|lokr_w1)",
    "a Flux model": r"\b(double|single)_blocks\.",
    "a Stable Diffusion 3 model": r"\bjoint_blocks\.",
    "a Stable Diffusion 1 model": r"^cond_stage_model\.transformer\.",
    "a Stable Diffusion 2 model": r"^cond_stage_model\.model\.",
    "SDXL's refiner": r"^conditioner\.embedders\.0\.model\.",
    "a ControlNet, no model": r"^control(_model|net_)",
    "one part in diffusers' layout": r"^(down_blocks|mid_block|text_model)\.",
    "one part alone": r"^(diffusion_model|input_blocks|encoder|decoder)\.",
}
A_VAE = "SDXL's kind of VAE (AutoencoderKL, 4 channels, not SD 1's or 2's): its folder, a model's "
A_VAE += "or a Hub name of either, or a .safetensors file"
VAE = ": a VAE, taken to have SDXL's scaling 0.13025, which no file tells; SD 1's looks the same"
MARKS = {  # of a file with all of SDXL's parts, too
    "a model of EDM's noise, as CosXL and Playground 2.5": r"^edm_(mean|std|vpred\.)",
    "quantised with scales of its own, as scaled fp8 is": r"(^|\.)(scaled_fp8|scale_weight|"
    r"weight_scale|comfy_quant|absmax|qweight)$",
}
REMEDIES = {
    "an adapter": "name the model that it was trained on",
    "one part in": "name the folder, in diffusers' layout, that has model_index.json",
    "one part alone": "take the checkpoint, which has VAE and text encoders in it",
    "quantised": "take its fp16, bf16 or fp32 file; --base-quantization nf4 saves memory here",
}
# ModelSpec's entry of the header, ComfyUI's and sd-scripts' for the same, and their words.
HEADER = ("modelspec.prediction_type", "modelspec.predict_key", "ss_v_parameterization")
PREDICTS = dict.fromkeys(("v", "v_prediction", "true"), "v_prediction")
PREDICTS |= dict.fromkeys(("epsilon", "eps", "false"), "epsilon")


class Source(NamedTuple):
    """Where a tensor is: under `key`, and what is to be made of it: "q", "k" or "v" is a third of a
    fused one, "T" transposed, "1x1" a convolution that is a matrix to diffusers.
    """

    key: str
    cut: str = ""


def read_kind(path: Path, parts: Collection[str] = tuple(PREFIXES)) -> tuple[dict, str]:
    """What `path` is: entries on top of those in inputs/sdxl/scheduler, and a sentence for a run's
    first lines. Raises Refusal for all but an SDXL model that predicts noise or v, with those
    `parts` in it, in numbers that are read here.
    """
    with open_safetensors(path) as file:
        header, keys = file.metadata() or {}, sorted(file.keys())
        used = {part: keys_of(part, keys).values() for part in parts}
        taken = [key for of_part in used.values() for key in of_part]
        dtypes = Counter(file.get_slice(key).get_dtype() for key in taken)
        first = PREFIXES["unet"] + "input_blocks.0.0.weight"
        channels = file.get_slice(first).get_shape()[1:2] if first in keys else [4]
    known, lacking = {"v_pred", "ztsnr", *taken}, [part for part in parts if not used[part]]
    alone = not lacking and "unet" not in used  # a VAE, or the file that one is taken from
    others = [key for key in keys if not alone or key not in known]
    for kind, mark in (KINDS | MARKS if lacking or alone else MARKS).items():
        for key in filter(re.compile(mark).search, others):
            remedy = next((REMEDIES[k] for k in REMEDIES if kind.startswith(k)), OTHER)
            raise Refusal(f"{path} is {kind}: it has {key}", EXPECTED, remedy)
    if lacking:
        said, least = header.get("modelspec.architecture"), min(keys, default=None)
        found = f"{path} lacks {', '.join(lacking)}; its header says {said}, its first tensor is "
        remedy = OTHER + "; without VAE: --vae NAME" * (lacking == ["vae"])
        raise Refusal(f"{found}{least}", EXPECTED, remedy)
    if channels != [4]:
        found = f"{path} is an inpainting or editing model: its UNet takes {channels[0]} channels"
        raise Refusal(found, "4", OTHER)
    if wrong := dtypes.keys() - {*NUMBERS}:
        found = f"{path} has tensors in {', '.join(sorted(wrong))}"
        raise Refusal(found, ", ".join(NUMBERS), REMEDIES["quantised"])
    scheduler, why = noise(path, header, keys)
    left = [k for k in keys if k not in known and not k.startswith(tuple(PREFIXES.values()))]
    words = [f"{path.name}{VAE if alone else f' is SDXL in one file: {why}'}"]
    words += [f"{count} tensors in {dtype.lower()}" for dtype, count in sorted(dtypes.items())]
    words += [f"{len(left)} tensors of no part are not read, such as {m}" for m in left[:1]]
    return scheduler, ", ".join(words)


def noise(path: Path, header: dict[str, str], keys: Collection[str]) -> tuple[dict, str]:
    """The scheduler's entries that a file's marks and header change, and in words what said so.

    The mark v_pred decides, since other programs obey it, then the header. Raises Refusal for a
    header's other word.
    """
    said = {"v_pred": "v"} if "v_pred" in keys else {}
    said |= {name: header[name] for name in HEADER if header.get(name, "None") != "None"}
    refuse(
        (f"{path}'s header says {name} {word!r:.50}", "epsilon or v", OTHER)
        for name, word in said.items()
        if word.lower() not in PREDICTS
    )
    predicts = PREDICTS[next(iter(said.values()), "epsilon").lower()]
    by = ", ".join(": ".join(each) for each in said.items()) or "nothing says another"
    entries, why = {"prediction_type": predicts}, f"{predicts} ({by})"
    if "ztsnr" in keys:
        entries |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        why += ", zero terminal SNR (ztsnr)"
    return entries, why


def keys_of(part: str, keys: Iterable[str]) -> dict[str, str]:
    """Of a file's `keys` those of `part`, without its prefix: {"conv_in.weight": whole key}. A VAE
    alone has none, as training code and ComfyUI save it.
    """
    keys, prefix = list(keys), PREFIXES[part]
    if part == "vae" and not any(key.startswith(prefix) for key in keys):
        return {key: key for key in keys if BARE_VAE.match(key)}
    keys = (key for key in keys if key.startswith(prefix) and not UNUSED.search(key))
    return {key.removeprefix(prefix): key for key in keys}


def names(keys: Collection[str], part: str) -> dict[str, Source]:
    """Of a file's `keys` those of `part`, by diffusers' or transformers' names for them, for the
    sizes that inputs/sdxl/ has.
    """
    config, found = json.loads((SHIPPED / part / "config.json").read_text()), {}
    lines = (Path(__file__).parent / "sdxl" / "names.txt").read_text().splitlines()
    table = [line.split()[1:] for line in lines if line.startswith(f"{part} ")]
    for name, key in keys_of(part, keys).items():
        name, cut = in_its_block(name, config), ""
        for pattern, instead, *how in table:
            name, times = re.subn(pattern, instead, name)
            cut = how[0] if how and times else cut
        for third in "qkv" if cut == "qkv" else [cut]:
            found[name.replace("*", third)] = Source(key, third)
    return found


def in_its_block(name: str, config: dict) -> str:
    """LDM counts the VAE decoder's blocks from its end, and the UNet's rows through: a block has
    layers_per_block, on its way down and one that halves the size, on its way up one more.
    """
    if found := re.fullmatch(r"decoder\.up\.(\d+)(\..*)", name):
        block = len(config["block_out_channels"]) - 1 - int(found[1])
        return f"decoder.up_blocks.{block}{found[2]}"
    found = re.fullmatch(r"(in|out)put_blocks\.(\d+)\.(\d)\.(?:(op|conv)\.)?(.*)", name)
    if not found or name.startswith("input_blocks.0."):  # conv_in
        return name
    way, row, column, sampler, rest = found.groups()
    block, layer = divmod(int(row) - (way == "in"), config["layers_per_block"] + 1)
    way = "down" if way == "in" else "up"
    if sampler:
        return f"{way}_blocks.{block}.{way}samplers.0.conv.{rest}"
    kind = "attentions" if column == "1" else "resnets"
    return f"{way}_blocks.{block}.{kind}.{layer}.{rest}"


def check_names(path: Path, part: str, found: dict[str, Source], wanted: set[str]) -> None:
    """Raise Refusal where the names `found` in a file are not those that the part is made of."""
    lacking, more = wanted - found.keys(), {found[name].key for name in found.keys() - wanted}
    remedy = "download it again; of another size, such as SSD-1B, take the folder for diffusers"
    refuse(
        (f"{path} ({part}) {what} {len(which)} tensors, such as {min(which)}", EXPECTED, remedy)
        for what, which in (("lacks", lacking), ("has, unused,", more))
        if which
    )


def read(file, source: Source):
    """One tensor of an open file as diffusers and transformers have it, in the file's dtype."""
    tensor = file.get_tensor(source.key)
    if source.cut in tuple("qkv"):  # a copy, or each third would hold all three
        return tensor.chunk(3)["qkv".index(source.cut)].clone()
    if source.cut == "T":
        return tensor.T.contiguous()
    return tensor.flatten(1) if source.cut == "1x1" else tensor


def tensors(path: Path, part: str, device) -> Iterator[tuple]:
    """(name, tensor) of a part, one read after another onto `device`, in the file's dtype."""
    with open_safetensors(path, str(device)) as file:
        for name, source in names(file.keys(), part).items():
            yield name, read(file, source)


def build_encoder(cls: type, path: Path, part: str, device):
    """An encoder of diffusers' or transformers' class from a file, its weights on `device` in fp32,
    one after another. Raises Refusal where they are not those of inputs/sdxl/'s configuration.
    """
    import torch

    folder = SHIPPED / part
    with torch.device("meta"):
        if hasattr(cls, "load_config"):  # diffusers'
            encoder = cls.from_config(cls.load_config(folder))
        else:
            encoder = cls(cls.config_class.from_pretrained(folder))
    wanted = set(encoder.state_dict())
    # transformers 5 has CLIPTextModel's names without the prefix that files have.
    spare = "" if any(name.startswith("text_model.") for name in wanted) else "text_model."
    with open_safetensors(path) as file:
        found = names(file.keys(), part).items()
    check_names(path, part, {name.removeprefix(spare): source for name, source in found}, wanted)
    read = tensors(path, part, device)
    with refusing(f"{path} holds no {part} of SDXL's shape", EXPECTED, OTHER):
        weights = {name.removeprefix(spare): tensor.float() for name, tensor in read}
        encoder.load_state_dict(weights, assign=True)
    for module in encoder.modules():
        if hasattr(module, "position_ids"):  # in no file, and so still without numbers
            module.position_ids = torch.arange(module.position_ids.shape[-1], device=device)[None]
    return encoder


def fingerprint(path: Path, part: str) -> str:
    """16 hex digits that tell one part from another: what all of its tensors are, and the first row
    of 64 of them.
    """
    import torch

    sha = hashlib.sha256()
    with open_safetensors(path) as file:
        found = sorted({source.key for source in names(file.keys(), part).values()})
        for key in found:
            about = file.get_slice(key)
            sha.update(f"{key} {about.get_dtype()} {about.get_shape()}".encode())
        for key in found[:: -(-len(found) // 64)]:
            about = file.get_slice(key)
            row = (about[:1] if about.get_shape() else file.get_tensor(key)[None]).contiguous()
            sha.update(row.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]
