"""Every choice of a run, with the reason for it, and the recipes. Light on purpose: a wrong option
is answered before torch and diffusers are imported, which takes some twelve seconds.
"""

import functools
import logging
import math
import os
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from inputs.files import Refusal

# How long an idle OpenMP thread spins before it sleeps. With libgomp's default and another program
# on the same cores, a step of the pocket recipe took up to 10 s; so it takes 0.3 s, and alone no
# longer than before. To be set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Of several processes (torchrun numbers them), the first shows bars and says what is wrong with an
# option; tqdm reads its variable when it is imported.
SPEAKS = os.environ.get("RANK", "0") == "0"
if not SPEAKS:
    os.environ["TQDM_DISABLE"] = "1"

# It says on a CPU that its fused 4-bit kernels are missing; they are not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

NARUTO_PROMPTS = (
    "Naruto Uzumaki eating ramen",
    "Bill Gates in Naruto style",
    "A boy with blue eyes in Naruto style",
)
POCKET_PROMPTS = (
    "red apple",
    "cat face",
    "rocket",
    "house with garden",
    "bicycle",
    "guitar",
    "mushroom",
    "snowman",
)


@dataclass(frozen=True)
class Config:
    """SDXL LoRA fine-tuning. Give a recipe and change what you like."""

    recipe: Annotated[str, tyro.conf.Suppress] = "original"

    # The SDXL model to adapt: a Hub name, or a folder in diffusers' layout.
    pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-xl-base-1.0"
    # The pictures: a Hub data set, or a folder (metadata.jsonl, or name.txt beside name.jpg).
    dataset_name: str = "lambdalabs/naruto-blip-captions"
    # Column that holds the pictures of a Hub data set; empty finds the first column of pictures.
    image_column: str = ""
    # Column that holds the captions; empty finds text, caption or prompt.
    caption_column: str = ""
    # Where adapters, checkpoints, logs and pictures go; empty means runs/RECIPE, with -quick and
    # -plain behind it where these are asked for.
    output_dir: str = ""
    # Where encoded pictures and captions are kept; runs share it, and it may go between runs.
    cache_dir: str = "cache"
    # Encode once and keep it; --no-cache encodes at every step, with the encoders in memory.
    cache: bool = True

    # Side of the training square in pixels; a multiple of 8, the VAE's factor.
    resolution: int = 512
    # Cut a random square, drawn once per picture, instead of the middle.
    random_crop: bool = False
    # Show every other example mirrored; wrong for writing and for faces that must not be mirrored.
    random_flip: bool = True

    # Numbers in the bottleneck of each adapted layer: 1,451,520 parameters per unit of rank in
    # SDXL.
    lora_rank: int = 16
    # The adapter acts with alpha / rank, so that the rank can change without a new learning rate.
    lora_alpha: float = 32
    # Everything random follows from it; two runs with one seed are one run.
    seed: int = 42

    # Examples in one forward and backward pass: more is faster and needs more memory.
    train_batch_size: int = 1
    # Passes summed into one optimizer step; the run depends only on batch x accumulation.
    gradient_accumulation_steps: int = 4
    # Optimizer steps of the whole run.
    max_train_steps: int = 1000
    # Only as long as the change needs to be seen: about a minute after start-up, in the recipe
    # pocket. Changes options that are not given.
    quick: bool = False
    # Step size of AdamW, as published; higher learns faster and forgets sooner.
    learning_rate: float = 5e-5
    # constant, as published, or a cosine down to --lr-end of the learning rate.
    lr_scheduler: Literal["constant", "cosine"] = "constant"
    # Steps over which the learning rate rises from zero: Adam's first estimates are poor.
    lr_warmup_steps: int = 0
    # Where the cosine ends, as a share of the learning rate.
    lr_end: float = 0.0
    # Keep AdamW's two moments in 8 bits (bitsandbytes): a quarter of the memory. Of every matrix:
    # bitsandbytes' own default keeps those under 4,096 numbers in 32 bits.
    use_8bit_adam: bool = True
    # AdamW's decay of the adapter towards zero per step, times the learning rate.
    adam_weight_decay: float = 1e-2
    # Gradients longer than this are shortened to it; inf switches clipping off.
    max_grad_norm: float = 0.5
    # Weigh each example by min(SNR, gamma) / SNR, so that easy timesteps do not drown the rest; 0
    # is off, 5 usual.
    snr_gamma: float = 0.0
    # Share of noise that is constant over the picture, so that overall brightness is learned too; 0
    # is off.
    noise_offset: float = 0.0
    # Share of examples trained without caption, so that guidance keeps something to move away from.
    caption_dropout: float = 0.0

    # auto, cpu or cuda.
    device: str = "auto"
    # The frozen UNet's dtype; auto asks the GPU: bf16 from sm_80, fp16 with loss scaling below,
    # fp32 on a CPU.
    mixed_precision: Literal["auto", "fp32", "fp16", "bf16"] = "fp32"
    # Keep the frozen UNet's Linear weights as NF4, 4-bit numbers that are expanded to that dtype
    # where they are multiplied: far less memory for a base that is not quite the same.
    base_quantization: Literal["none", "nf4"] = "none"
    # PyTorch's attention, or xFormers' where it is usable.
    attention: Literal["sdpa", "xformers"] = "sdpa"
    # On a GPU, record the forward and backward pass once and replay it, since launching kernels one
    # by one takes longer than they run. Off is the reference, and for debugging.
    cuda_graph: bool = True
    # Layers that read the same input share their matrix products; off, each is computed by itself.
    fused: bool = True
    # Compile the convolution blocks (torch.compile): a few per cent, for a minute or two at the
    # start, which a long run earns back; how long it took is said.
    compile: bool = False
    # Only kernels that add in one fixed order, so that a continued run equals an uninterrupted one
    # to the bit on a GPU, too, with the same GPU, torch and memory options. Without it the backward
    # pass of self-attention adds in another order each time. No memory plan.
    deterministic: bool = False
    # Keep only block inputs and compute the rest twice: less memory, about a third more time.
    gradient_checkpointing: bool = False
    # Which modules of the UNet recompute with --gradient-checkpointing, such as
    # mid_block.attentions.0; left empty, all of them.
    checkpointed_blocks: tuple[str, ...] = ()
    # On a GPU, cut the step and choose what is recomputed by the free memory: the fastest that
    # fits, unless another batch size or checkpointing than the recipe's is asked for. The run is
    # the same.
    memory_plan: bool = False
    # Train by the book's lines alone (lora.py, model.py, data.py, loop.py): the reference that the
    # faster ways are measured against. One process, no checkpoints, no pictures, no comparison of
    # the file; options about these have nothing to act on.
    plain: bool = False
    # Train nothing; say what the run would need on this card, such as T4 (make plan CARD=T4).
    plan_for: str = ""

    # Seconds that several processes (torchrun) wait for one of them before the run ends; so many
    # that a slow download is no reason.
    ddp_timeout: float = 1800

    # Optimizer steps between checkpoints; what a lost connection costs at most.
    checkpointing_steps: int = 200
    # Checkpoints kept; two, so that damage to the newest costs one interval and not the run.
    checkpoints_total_limit: int = 2
    # Continue a run although the code that makes its numbers is not the one that it began with;
    # which functions changed is noted in the log, config.json and the adapter files.
    accept_code_change: bool = False
    # dtype of the adapter files: fp32 is exactly what was trained, fp16 half the size.
    save_dtype: Literal["fp32", "fp16"] = "fp32"
    # Write TensorBoard scalars beside the JSON lines.
    tensorboard: bool = True

    # Prompts of the before/after picture drawn at the end; none draws nothing.
    validation_prompts: tuple[str, ...] = NARUTO_PROMPTS
    # How strongly those pictures follow their prompt.
    guidance_scale: float = 5.0
    # Denoising steps of those pictures.
    num_inference_steps: int = 30

    @property
    def examples_per_step(self) -> int:
        """n: the examples whose loss one optimizer step sums."""
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def out(self) -> Path:
        kind = ("-quick" if self.quick else "") + ("-plain" if self.plain else "")
        return Path(self.output_dir or f"runs/{self.recipe}{kind}")


RECIPES = {
    "original": (
        "The published run: fp32, xFormers, gradient checkpointing, 512 px.",
        Config(
            recipe="original",
            gradient_checkpointing=True,
            attention="xformers",
            fused=False,
        ),
    ),
    "t4": (
        "The same mathematics for a 16 GB T4: frozen UNet in half precision, as fast as fits.",
        Config(recipe="t4", mixed_precision="auto", memory_plan=True),
    ),
    "native": (
        "The recipe t4 at 1024 px, SDXL's own size.",
        Config(recipe="native", mixed_precision="auto", resolution=1024, memory_plan=True),
    ),
    "lowmem": (
        "For cards of 6 to 8 GB: t4 with the frozen UNet's Linear weights in 4 bits; smallest with "
        "--no-memory-plan.",
        Config(
            recipe="lowmem",
            mixed_precision="auto",
            memory_plan=True,
            gradient_checkpointing=True,
            base_quantization="nf4",
        ),
    ),
    "pocket": (
        "The small embedded SDXL and its ink drawings: minutes on a CPU, no network.",
        Config(
            recipe="pocket",
            pretrained_model_name_or_path="pocket/model",
            dataset_name="pocket/ink",
            resolution=128,
            random_flip=False,
            lora_alpha=16,
            train_batch_size=16,
            gradient_accumulation_steps=1,
            max_train_steps=450,
            learning_rate=4e-3,
            lr_scheduler="cosine",
            lr_warmup_steps=20,
            lr_end=0.05,
            max_grad_norm=1.0,
            snr_gamma=5.0,
            caption_dropout=0.1,
            mixed_precision="auto",
            validation_prompts=POCKET_PROMPTS,
            guidance_scale=2.0,
        ),
    ),
}


# What --quick changes, unless it was asked for.
QUICK = {
    "pocket": {
        "max_train_steps": 80,
        "lr_warmup_steps": 5,
        "validation_prompts": POCKET_PROMPTS[:4],
    }
}


def parse(argv: list[str] | None = None) -> Config:
    """The command line as a checked Config. Leaves with exit code 2 and a sentence for an unknown
    option or recipe.
    """
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] not in RECIPES and not words[0].startswith("-"):
        wrong = Refusal(f"recipe {words[0]!r}", f"one of {', '.join(RECIPES)}", "python loop.py t4")
        print(f"error: {wrong}", file=sys.stderr)
        sys.exit(2)
    read = functools.partial(tyro.extras.overridable_config_cli, args=argv, prog="loop.py")
    config = read(RECIPES)
    # --quick: the same words again, where what is not given has another value.
    return check(read(RECIPES | quick(config.recipe)) if config.quick else config)


def quick(recipe: str) -> dict[str, tuple[str, Config]]:
    """The recipe with its quick values, as RECIPES holds it. Raises Refusal where it has none."""
    if recipe not in QUICK:
        raise Refusal(
            f"--quick with the recipe {recipe}",
            f"{' or '.join(QUICK)}, whose whole run takes minutes",
            "--max-train-steps 100 for a short run",
        )
    about, usual = RECIPES[recipe]
    return {recipe: (about, replace(usual, **QUICK[recipe]))}


def parse_or_leave(argv: list[str] | None = None) -> Config:
    """The command line's Config. Leaves with an error now if it has one."""
    if not SPEAKS:
        return be_silent_or_leave(argv)
    try:
        config = parse(argv)
    except Refusal as refusal:
        sys.exit(f"error: {refusal}")
    if not config.plain and not (Path(__file__).parent.parent / "keep").is_dir():
        sys.exit("error: there is no folder keep/ beside loop.py: only --plain trains without it")
    return config


def be_silent_or_leave(argv: list[str] | None) -> Config:
    """parse_or_leave() of a process beside the one that speaks. torchrun ends all with the first
    that leaves, so it leaves later.
    """
    try:
        with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
            return parse(argv)
    except (SystemExit, Refusal) as why:
        time.sleep(10)
        sys.exit(why.code if isinstance(why, SystemExit) else 1)


def check_texts(options) -> None:
    """Raise Refusal for an option whose text no file name, log or terminal can hold."""
    for name, value in vars(options).items():
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and (
                "\0" in text or text.encode(errors="replace").decode() != text
            ):
                raise Refusal(
                    f"{name} is {text!a:.200}",
                    "text in UTF-8 without NUL",
                    f"another --{name.replace('_', '-')}; rename the folder if it is one",
                )


def check_plain(config: Config) -> None:
    """Raise Refusal, naming all of it, where --plain is asked for with what the book's lines do not
    do.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    troubles = []  # each: what was found, what is expected, what to do
    if processes > 1:
        troubles.append(
            (f"{processes} processes", "one", "start it without torchrun (make: GPUS=1)")
        )
    if config.base_quantization == "nf4":
        troubles.append(("an NF4 base", "an unquantized one", "--base-quantization none"))
    for name in ("checkpoints", "finished.json", "pytorch_lora_weights.safetensors"):
        if os.path.exists(config.out / name):
            found = f"{config.out}, which holds {name}"
            troubles.append((found, "a folder without", "another --output-dir"))
            break
    for name in ("plan_for", "deterministic", "compile"):
        if getattr(config, name):
            option = f"--{name.replace('_', '-')}"
            troubles.append((option, "the book's lines, which know no such thing", "leave it out"))
    if troubles:
        found, expected, remedy = (" and ".join(texts) for texts in zip(*troubles, strict=True))
        raise Refusal(f"--plain with {found}", expected, remedy)


def check(config: Config) -> Config:
    """`config` itself, or a Refusal naming the first value that cannot be."""
    check_texts(config)
    bounds = {  # name: (smallest, largest), both allowed
        "resolution": (8, 4096),
        "lora_rank": (1, 640),
        "lora_alpha": (1e-6, 1e6),
        "seed": (0, 2**32 - 1),
        "train_batch_size": (1, 4096),
        "gradient_accumulation_steps": (1, 4096),
        "max_train_steps": (1, 10**8),
        "learning_rate": (1e-12, 10),
        "lr_warmup_steps": (0, 10**8),
        "lr_end": (0, 1),
        "adam_weight_decay": (0, 10),
        "max_grad_norm": (1e-9, math.inf),
        "snr_gamma": (0, 1e6),
        "noise_offset": (0, 1),
        "caption_dropout": (0, 1),
        "ddp_timeout": (1, 10**6),
        "checkpointing_steps": (1, 10**8),
        "checkpoints_total_limit": (1, 10**6),
        "guidance_scale": (0, 100),
        "num_inference_steps": (1, 1000),
    }
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if not low <= value <= high:  # False for nan, too
            usual = getattr(RECIPES[config.recipe][1], name)
            raise Refusal(
                f"{name} is {value}",
                f"{low:g} to {high:g}",
                f"--{name.replace('_', '-')} {usual}, as the recipe has it",
            )
    if config.deterministic and config.attention == "xformers":
        raise Refusal(
            "deterministic is on with xFormers' attention, which does not know of it",
            "PyTorch's attention, whose backward pass then adds in one order",
            "--attention sdpa",
        )
    if config.plain:
        check_plain(config)
    if config.resolution % 8:
        near = config.resolution // 8 * 8
        raise Refusal(
            f"resolution is {config.resolution}",
            "a multiple of 8, the VAE's factor",
            f"--resolution {near} or --resolution {near + 8}",
        )
    return config
