"""One-file checkpoints for tests: the way back from diffusers' and transformers' names to SGM's,
written apart from inputs/one_file.py.
"""

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

CLASSES = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
VAE_ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "group_norm": "norm",
}
CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
CLIP_TOP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}


def of_part(part: str, name: str) -> str:
    """A tensor's name as files have it: transformers 5 drops a prefix of the first text encoder."""
    first = part == "text_encoder" and not name.startswith("text_model.")
    return f"text_model.{name}" if first else name


def old_name(
    part: str, name: str, layers: int = 2, attends: tuple[bool, ...] = (True, True, False)
):
    """SGM's name. layers: the UNet's layers_per_block; attends: whether its blocks upwards do."""
    if part == "unet":
        return "model.diffusion_model." + old_unet_name(name, layers, attends)
    if part == "vae":
        return "first_stage_model." + old_vae_name(name)
    if part == "text_encoder":
        return "conditioner.embedders.0.transformer." + of_part(part, name)
    if name in CLIP_TOP:
        return "conditioner.embedders.1.model." + CLIP_TOP[name]
    layer, inside, ending = re.fullmatch(
        r"text_model\.encoder\.layers\.(\d+)\.(.*)\.(\w+)", name
    ).groups()
    where = f"conditioner.embedders.1.model.transformer.resblocks.{layer}."
    if re.fullmatch(r"self_attn\.[qkv]_proj", inside):
        return f"{where}attn.in_proj_{ending}"
    return f"{where}{CLIP.get(inside, inside.replace('self_attn', 'attn'))}.{ending}"


def old_unet_name(name: str, layers: int, attends: tuple[bool, ...]) -> str:
    inside, _, ending = name.rpartition(".")
    if inside in TOP:
        return f"{TOP[inside]}.{ending}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)\.(\w+)", name):
        kind, i, inside, ending = found.groups()
        column = 1 if kind == "attentions" else 2 * int(i)
        return f"middle_block.{column}.{RESNET.get(inside, inside)}.{ending}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)\.(\w+)", name)
    way, block, kind, layer, inside, ending = found.groups()
    first = int(block) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op.{ending}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{2 if attends[int(block)] else 1}.conv.{ending}"
    row = (
        f"input_blocks.{1 + first + int(layer)}"
        if way == "down"
        else f"output_blocks.{first + int(layer)}"
    )
    return f"{row}.{int(kind == 'attentions')}.{RESNET.get(inside, inside)}.{ending}"


def old_vae_name(name: str) -> str:
    side, _, rest = name.partition(".")
    if found := re.fullmatch(r"mid_block\.resnets\.(\d)\.(.*)", rest):
        rest = f"mid.block_{int(found[1]) + 1}.{found[2]}"
    elif found := re.fullmatch(r"mid_block\.attentions\.0\.(.*)\.(\w+)", rest):
        rest = f"mid.attn_1.{VAE_ATTENTION[found[1]]}.{found[2]}"
    elif found := re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|\w+samplers)\.(\d)\.(.*)", rest):
        way, block, kind, layer, inside = found.groups()
        block = int(block) if way == "down" else 3 - int(block)
        inside = f"block.{layer}.{inside}" if kind == "resnets" else f"{way}sample.{inside}"
        rest = f"{way}.{block}.{inside}"
    elif rest.startswith("conv_norm_out"):
        rest = rest.removeprefix("conv_")
    return f"{side}.{rest}".replace("conv_shortcut", "nin_shortcut")


def checkpoint(folder: Path) -> dict[str, Tensor]:
    """The model in `folder`, which is in diffusers' layout, as one file's tensors."""
    config, tensors = json.loads((folder / "unet" / "config.json").read_text()), {}
    attends = tuple("CrossAttn" in kind for kind in config["up_block_types"])
    for part in CLASSES:
        weights = load_file(next((folder / part).glob("*.safetensors")))
        for name in sorted(weights):
            key = old_name(part, name, config["layers_per_block"], attends)
            if found := re.fullmatch(r"(.*\.)q_proj(\.\w+)", name) if "in_proj" in key else None:
                three = [weights[f"{found[1]}{c}_proj{found[2]}"] for c in "qkv"]
                tensors[key] = torch.cat(three)
            elif part == "vae" and weights[name].ndim == 2:
                tensors[key] = weights[name][:, :, None, None].contiguous()
            elif "in_proj" not in key:
                turned = key.endswith(".model.text_projection")
                tensors[key] = weights[name].T.contiguous() if turned else weights[name]
    return tensors
