"""How files call the layers of a UNet: by diffusers' names, or by those in Stability's own UNet."""

import re
from collections.abc import Iterable

BLOCK = r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(?:(attentions|resnets)\.(\d+)|(.+samplers)\.0)\.(.+)"
# What lies in a block without attention is called otherwise there.
IN_SGM = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
IN_SGM |= {"conv_shortcut": "skip_connection"}
OUTSIDE = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
OUTSIDE |= {f"time_embedding.linear_{i}": f"time_embed.{2 * i - 2}" for i in (1, 2)}
OUTSIDE |= {f"add_embedding.linear_{i}": f"label_emb.0.{2 * i - 2}" for i in (1, 2)}


def sgm_names(modules: Iterable[str], among: Iterable[str] = ()) -> dict[str, str]:
    """The modules' names in Stability's own UNet, which numbers its blocks through all levels:
    down_blocks.1.attentions.0.x is input_blocks.4.1.x. Empty unless every module lies in a block:
    to diffusers a file has one spelling or the other. among: all of the model's, where `modules`
    are few of them: a number depends on how many blocks a level has.
    """
    parts = {name: re.fullmatch(BLOCK, name) for name in modules}
    if not all(parts.values()):
        return {}
    # A level's blocks: two layers, and one that halves the size on the way down; three on the way
    # up. (The very first block is conv_in.)
    every = [*parts.values(), *(re.fullmatch(BLOCK, name) for name in among)]
    found = [part.groups() for part in every if part and part[2] and part[3]]
    level = max((int(layer) + 1 + (way == "down") for way, _, _, layer, *_ in found), default=3)
    return {name: sgm_name(level, *part.groups()) for name, part in parts.items()}


def sgm_name(
    level: int, way: str, block: str, kind: str, layer: str, sampler: str, rest: str
) -> str:
    """One of sgm_names(), from the parts of BLOCK; level: how many blocks each level has."""
    rest = IN_SGM.get(rest, rest) if kind == "resnets" else rest
    if way == "mid":  # resnet, transformer, resnet
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}.{rest}"
    first, place = level * int(block) + (way == "down"), int(kind == "attentions")
    if sampler == "downsamplers":
        return f"input_blocks.{first + level - 1}.0.op"
    if sampler:  # behind the last resnet of its level and its transformer
        return f"output_blocks.{first + level - 1}.2.{rest}"
    return f"{'input' if way == 'down' else 'output'}_blocks.{first + int(layer)}.{place}.{rest}"


def spellings(names: Iterable[str], among: Iterable[str] = ()) -> dict[str, str]:
    """Of a UNet's layers, by every spelling that files have for them, with underscores for dots.
    among: as for sgm_names().
    """
    blocks = [name for name in names if re.fullmatch(BLOCK, name)]
    sgm = sgm_names(blocks, among) | OUTSIDE
    both = ((each, name) for name in names for each in (name, sgm.get(name, name)))
    return {each.replace(".", "_"): name for each, name in both}
