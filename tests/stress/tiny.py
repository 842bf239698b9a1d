"""What most tests train: a random SDXL of some 100,000 parameters in diffusers' layout; and twenty
pictures for the stress suite. A run from start to picture takes about a second, so hundreds can be
killed.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging

POCKET = Path(__file__).parents[2] / "pocket" / "model"
STEPS, EVERY, LIMIT = 8, 2, 2  # optimizer steps, steps between checkpoints, checkpoints kept

VAE = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 32,
    "scaling_factor": 0.5,
}
UNET = {
    "sample_size": 4,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (2, 4),
    "norm_num_groups": 8,
    "cross_attention_dim": 16 + 24,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
    "max_position_embeddings": 32,
    "vocab_size": 1700,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
TEXT_2 = TEXT | {"hidden_size": 24, "projection_dim": 24}


def build(folder: Path, seed: int) -> None:
    """An SDXL with random weights under `folder`; tokenizers and scheduler are the pocket's."""
    logging.disable_progress_bar()  # tqdm would leave a thread, and this process forks
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    shutil.copy(POCKET / "model_index.json", folder)
    for part in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(POCKET / part, folder / part)
    parts = {
        "vae": AutoencoderKL(**VAE),
        "unet": UNet2DConditionModel(**UNET),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_2)),
    }
    # or nothing that an adapter or a prompt changes would be seen in a picture
    louder(parts["unet"], r"(proj_out|to_out\.0)\.weight", 8)
    louder(parts["vae"], r"decoder\.conv_out\.weight", 4)
    for name, part in parts.items():
        part.save_pretrained(folder / name)


@torch.no_grad()
def louder(part: torch.nn.Module, names: str, times: float) -> None:
    for name, weight in part.named_parameters():
        if re.search(names, name):
            weight *= times


def draw_pictures(folder: Path, seed: int, count: int = 20) -> None:
    """`count` captioned pictures of random colours: two cache files of latents."""
    stream = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = []
    for i in range(count):
        coarse = stream.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:02d}.png")
        rows.append(json.dumps({"file_name": f"{i:02d}.png", "text": f"{i} red apples"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def arguments(model: Path, pictures: Path, cache: Path, out: Path) -> list[str]:
    """The command line of one run, after `loop.py`."""
    return [
        *("pocket", "--device", "cpu", "--pretrained-model-name-or-path", str(model)),
        *("--dataset-name", str(pictures), "--cache-dir", str(cache), "--output-dir", str(out)),
        *("--resolution", "32", "--random-flip", "--lora-rank", "4"),
        *("--train-batch-size", "2", "--gradient-accumulation-steps", "2"),
        *("--max-train-steps", str(STEPS), "--checkpointing-steps", str(EVERY)),
        *("--checkpoints-total-limit", str(LIMIT), "--lr-warmup-steps", "2"),
        *("--validation-prompts", "red apple", "--num-inference-steps", "3"),
    ]
