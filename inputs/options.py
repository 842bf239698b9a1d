"""Every choice of a run, with the reason for it, and the recipes. Light on purpose: the command
says its first line, and answers a wrong option, before torch and diffusers are imported, which
takes some ten seconds.
"""

import difflib
import errno
import functools
import importlib.util
import io
import json
import logging
import math
import os
import re
import sys
import time
import tomllib
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from inputs import help
from inputs.files import Refusal, folder_of, refuse, refusing

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
QUICK_PROMPTS = ("red apple", "cat face", "rocket", "house with garden")
POCKET_PROMPTS = (*QUICK_PROMPTS, "bicycle", "guitar", "mushroom", "snowman")


@dataclass(frozen=True)
class Within:
    """The least and the most that a number may be, both allowed."""

    least: float
    most: float
    # Of which it must be a multiple; 0 is any number.
    step: int = 0

    def hold(self, value: float | tuple) -> bool:
        """Whether the number is in here, or all of several are; nan never is."""
        numbers = value if isinstance(value, tuple) else (value,)
        inside = [self.least <= n <= self.most for n in numbers]
        stepped = [not self.step or n % self.step == 0 for n in numbers]
        return numbers != () and all(inside + stepped)

    def __str__(self) -> str:
        steps = f" in steps of {self.step}" if self.step else ""
        return f"{self.least:.10g} to {self.most:.10g}{steps}"


@dataclass(frozen=True)
class Config:
    """SDXL LoRA fine-tuning. Give a recipe and change what you like."""

    recipe: Annotated[str, tyro.conf.Suppress] = "original"

    # ---- What most people change

    # The pictures: a Hub data set, or a folder (metadata.jsonl, or name.txt beside name.jpg), or
    # several of these.
    dataset_name: tuple[str, ...] = ("lambdalabs/naruto-blip-captions",)
    # The SDXL model to adapt: a Hub name, a folder in diffusers' layout, or one file that holds all
    # of it, FILE.safetensors here or USER/REPOSITORY/FILE.safetensors on the Hub.
    pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-xl-base-1.0"
    # Where adapters, checkpoints, logs and pictures go; empty means runs/RECIPE, with -quick,
    # -better and -plain behind it where these are asked for.
    output_dir: str = ""
    # Optimizer steps of the whole run.
    max_train_steps: Annotated[int, Within(1, 1e8)] = 1000
    # Step size of AdamW, as published; higher learns faster and forgets sooner.
    learning_rate: Annotated[float, Within(1e-12, 10)] = 5e-5
    # Numbers in the bottleneck of each adapted layer: 1,451,520 parameters per unit of rank in
    # SDXL.
    lora_rank: Annotated[int, Within(1, 640)] = 16
    # Side of the training square in pixels; a multiple of 8, the VAE's factor. Of several, each
    # picture has the largest that it fills without being enlarged.
    resolution: Annotated[tuple[int, ...], Within(8, 4096, step=8)] = (512,)
    # Examples in one forward and backward pass: more is faster and needs more memory. Of pictures
    # in a smaller size than others as many as fill as much memory.
    train_batch_size: Annotated[int, Within(1, 4096)] = 1
    # Prompts of the before/after picture drawn at the end; none draws nothing.
    validation_prompts: tuple[str, ...] = NARUTO_PROMPTS
    # Everything random follows from it; two runs with one seed are one run.
    seed: Annotated[int, Within(0, 2**32 - 1)] = 42

    # ---- Model

    # Another VAE than the model's own: a folder, a Hub name, or a .safetensors file, here or as
    # USER/REPOSITORY/FILE.
    vae: str = ""
    # Branch, tag or commit of a Hub model; empty takes main as it is at the start, and a begun run
    # goes on with the commit that it began with.
    revision: str = ""
    # What the UNet predicts, epsilon (the noise) or v_prediction; auto is what the model's
    # scheduler_config.json, or its file's mark v_pred or header, says.
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    # Whether the last timestep is pure noise (zero terminal SNR), so that darkest and brightest
    # pictures are learned; auto is what the model's scheduler_config.json, or its file's mark
    # ztsnr, says.
    zero_terminal_snr: Literal["auto", "yes", "no"] = "auto"

    # ---- Pictures and captions

    # How many times each picture of these data sets is shown where another is shown once, a whole
    # number for each data set, as kohya's repeats; left empty, all alike.
    dataset_weights: tuple[float, ...] = ()
    # Of sub-folders in kohya's layout show what lies in 10_style so many times, and leave out reg,
    # reg_NAME and regularisation.
    folder_repeats: bool = True
    # Split of the data set; of a folder, the sub-folder in which its metadata.jsonl may lie.
    dataset_split: str = "train"
    # Config of a data set that has several, also called subset; empty takes its default.
    dataset_config: str = ""
    # Column that holds the pictures of a Hub data set; empty finds image, or else the first column
    # of pictures, which is said.
    image_column: str = ""
    # Column that holds the captions; empty finds text, caption or prompt.
    caption_column: str = ""
    # Caption of every picture that has none of its own, such as "a photo of sks dog"; with "" these
    # are trained under the empty prompt, even if that is all of them.
    caption: str | None = None
    # Let the file's name be the caption of every picture that has none of its own, without ending
    # and a number at its end: red_apple (2).png is red apple.
    caption_from_name: bool = False
    # Let each line of a caption's own file be a caption, of which every example draws one; as it
    # does of a list in a table.
    caption_lines: bool = False
    # Show a caption's comma-separated tags in many orders.
    shuffle_tags: bool = False
    # How many tags in front keep their place and are never left out.
    keep_tags: Annotated[int, Within(0, 1000)] = 0
    # Chance of each other tag to be left out; one of them always stays.
    tag_dropout: Annotated[float, Within(0, 1)] = 0.0
    # Word to put in front of every caption that lacks it.
    trigger: str = ""
    # Texts made of each caption where its tags are shuffled or left out; all are encoded before the
    # first step, and each example draws one.
    caption_variants: Annotated[int, Within(1, 1000)] = 8
    # Tokens of a caption that are read, in parts of 75 that are encoded one by one; 75 is CLIP's
    # own limit. Pictures are drawn with as many.
    max_tokens: Literal[75, 150, 225] = 75
    # Train each picture in its own shape, one of several as large as the square (steps of 64
    # pixels), so that less is cut away.
    buckets: bool = False
    # Enlarge pictures that are smaller than the smallest resolution; --no-upscale refuses them.
    upscale: bool = True
    # Cut a random square, drawn once per picture, instead of the middle.
    random_crop: bool = False
    # Take a picture's transparency as its mask where no NAME.mask.png lies beside it.
    mask_from_alpha: bool = False
    # How much what a mask hides (black) still counts in the loss, against 1 for white.
    mask_floor: Annotated[float, Within(0, 1)] = 0.1
    # Show every other example mirrored; wrong for writing and for faces that must not be mirrored.
    random_flip: bool = True

    # ---- Adapter

    # Which layers are adapted: attention (560 of SDXL's), transformer (with feed-forward, proj_in
    # and proj_out kohya's 722), all (with the 3x3 convolutions), or regular expressions, each of
    # which is found in a layer's name, such as up_blocks.*attn2.
    targets: tuple[str, ...] = ("attention",)
    # Other ranks of some layers, such as mid_block=32: a regular expression that is found in their
    # names, and a rank. alpha stays.
    rank_pattern: tuple[str, ...] = ()
    # LoRA or a relative, on Linear layers: dora (magnitude and direction apart), loha (an
    # element-wise product of two), lokr (Kronecker's product: far fewer numbers).
    adapter: Literal["lora", "dora", "loha", "lokr"] = "lora"
    # Save another kind as LoRA of this rank, too, in OUT/as-lora, for programs that read LoRA
    # alone; what is lost is said. 0 does not.
    as_lora: Annotated[int, Within(0, 640)] = 0
    # The adapter acts with alpha / rank, so that the rank can change without a new learning rate.
    lora_alpha: Annotated[float, Within(1e-6, 1e6)] = 32
    # Let it act with alpha / sqrt(rank) instead (rsLoRA). The files say alpha * sqrt(rank), so that
    # every program draws what was trained.
    use_rslora: bool = False
    # Begin with an adapter's numbers instead of at zero: a file in PEFT, kohya or SGM keys, or a
    # run's folder. A smaller rank is filled up, a larger one cut by SVD, with what is lost said.
    start_from: str = ""
    # Start from an adapter even though it was trained on another base, or with other noise.
    any_base: bool = False

    # ---- Steps

    # Passes summed into one optimizer step; the run depends only on batch x accumulation.
    gradient_accumulation_steps: Annotated[int, Within(1, 4096)] = 4
    # In their place, how many times each picture is shown, its weight included; with buckets some
    # once more or less; 0 is off.
    max_train_epochs: Annotated[int, Within(0, 1e6)] = 0
    # Only as long as the change needs to be seen: about a minute after start-up, in the recipe
    # pocket. Changes options that are not given.
    quick: bool = False
    # What helped as measured, on the small model: Huber's loss and all layers, with which an SDXL
    # step takes 1.3 times as long and 1.6 GiB more (one H200, 512 px); in the recipe pocket a
    # quarter of the steps (for pictures of your own rather 225), drawn in 20. Changes options that
    # are not given.
    better: bool = False

    # ---- Learning

    # constant, as published, or a line or a cosine down to --lr-end of the learning rate.
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    # Steps over which the learning rate rises from zero: Adam's first estimates are poor.
    lr_warmup_steps: Annotated[int, Within(0, 1e8)] = 0
    # Steps of that fall, warm-up included; 0 is --max-train-steps at the run's first start. A run
    # lengthened later keeps it and stays at its end: who plans to lengthen gives the whole length.
    lr_schedule_steps: Annotated[int, Within(0, 1e8)] = 0
    # Where it ends, as a share of the learning rate.
    lr_end: Annotated[float, Within(0, 1)] = 0.0
    # Keep AdamW's two moments in 8 bits (bitsandbytes): a quarter of the memory. Of every matrix:
    # bitsandbytes' own default keeps those under 4,096 numbers in 32 bits.
    use_8bit_adam: bool = True
    # AdamW's decay of the adapter towards zero per step, times the learning rate.
    adam_weight_decay: Annotated[float, Within(0, 10)] = 1e-2
    # Gradients longer than this are shortened to it; inf switches clipping off.
    max_grad_norm: Annotated[float, Within(1e-9, math.inf)] = 0.5
    # Weigh each example by min(SNR, gamma) / SNR, so that easy timesteps do not drown the rest; 0
    # is off, 5 usual.
    snr_gamma: Annotated[float, Within(0, 1e6)] = 0.0
    # Share of noise that is constant over the picture, so that overall brightness is learned too; 0
    # is off.
    noise_offset: Annotated[float, Within(0, 1)] = 0.0
    # Share of examples trained without caption, so that guidance keeps something to move away from.
    caption_dropout: Annotated[float, Within(0, 1)] = 0.0

    # ---- Learning otherwise, all off

    # Of the timesteps cut into as many equal parts as an optimizer step has examples, give each
    # example one from a part of its own, so that no step sees many alike.
    stratified_timesteps: bool = False
    # Draw timesteps as often in the middle as logit_normal says (SD3); none draws all alike.
    weighting_scheme: Literal["none", "logit_normal"] = "none"
    # Mean of the logit of the timestep's share of all: below 0 draws more of those with little
    # noise.
    logit_mean: Annotated[float, Within(-10, 10)] = 0.0
    # Its standard deviation: smaller draws more of the middle.
    logit_std: Annotated[float, Within(1e-2, 10)] = 1.0
    # The squared error, or Huber's, to which large errors count less. The held-out loss is the
    # squared error with either.
    loss_type: Literal["l2", "huber"] = "l2"
    # Which errors are large to Huber's: over --huber-c at each timestep (constant), or where there
    # is little noise only over 1, from where it falls as sd-scripts' snr or exponential do.
    huber_schedule: Literal["snr", "exponential", "constant"] = "snr"
    # Where that ends at most noise.
    huber_c: Annotated[float, Within(1e-4, 1)] = 0.1
    # Keep the running mean of the adapter over the last 1 / (1 - decay) steps or so, and export it
    # to OUT/ema besides; 0 is off, 0.99 to 0.999 usual.
    ema_decay: Annotated[float, Within(0, 1 - 1e-6)] = 0.0
    # The rate of every B, as a multiple of A's, which is --learning-rate (LoRA+); 1 is off, 16 its
    # authors'.
    loraplus_lr_ratio: Annotated[float, Within(1e-3, 1e3)] = 1.0
    # adamw, or prodigy, which finds the rate by itself and takes --learning-rate 1 as a factor of
    # it (pip install prodigyopt); its numbers have 32 bits.
    optimizer: Literal["adamw", "prodigy"] = "adamw"

    # ---- Knowing when it is enough

    # Share of the pictures, chosen by the seed, that is never trained on: their loss (the held-out
    # loss) says whether what is learned holds for other pictures; 0 is off, 0.05 usual.
    validation_share: Annotated[float, Within(0, 0.5)] = 0.0
    # In its place, a folder or data set of pictures with captions to hold out.
    validation_data: str = ""
    # Steps from one held-out loss to the next; 0 is a tenth of the run, for ten make a curve, or as
    # little as a fifth where ten would take more than 3 % of its time.
    validation_steps: Annotated[int, Within(0, 1e8)] = 0
    # End the run where the held-out loss has risen beyond its error three times in a row; without
    # it that is said. By eye a style may still sharpen then.
    stop_when_worse: bool = False

    # ---- Memory and speed

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
    # Compute layers in fewer kernels: those that read the same input share their products, and LoRA
    # is added inside a product. Off, each is computed by its definition.
    fused: bool = True
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
    # Train nothing; say what the run would need on this card, such as T4 (make plan CARD=T4). Of
    # several resolutions the time is the largest's, an upper bound.
    plan_for: str = ""
    # Seconds that several processes (torchrun) wait for one of them before the run ends; so many
    # that a slow download is no reason.
    ddp_timeout: Annotated[float, Within(1, 1e6)] = 1800
    # Encode once and keep it; --no-cache encodes at every step, with the encoders in memory.
    cache: bool = True
    # Where encoded pictures and captions are kept; runs share it, and it may go between runs.
    cache_dir: str = "cache"

    # ---- Saving

    # A file of options in JSON or TOML, such as a run's config.json, or that run's folder; options
    # on the command line go before it.
    config: str = ""
    # Optimizer steps between checkpoints; what a lost connection costs at most.
    checkpointing_steps: Annotated[int, Within(1, 1e8)] = 200
    # Checkpoints kept; two, so that damage to the newest costs one interval and not the run.
    checkpoints_total_limit: Annotated[int, Within(1, 1e6)] = 2
    # Keep the adapter of every checkpoint, in both layouts: OUT/adapters/000200.safetensors and
    # OUT/adapters/kohya/NAME-000200.safetensors. Any of them can be the one that is taken.
    keep_adapters: bool = False
    # Continue a run although the code that makes its numbers is not the one that it began with;
    # which functions changed is noted in the log, config.json and the adapter files.
    accept_code_change: bool = False
    # dtype of the adapter files: fp32 is exactly what was trained, fp16 half the size.
    save_dtype: Literal["fp32", "fp16"] = "fp32"
    # Write TensorBoard scalars beside the JSON lines.
    tensorboard: bool = True
    # Say nothing but warnings, errors and the last lines: no bars, nothing of how it goes.
    quiet: bool = False

    # ---- Drawing

    # How strongly those pictures follow their prompt.
    guidance_scale: Annotated[float, Within(0, 100)] = 5.0
    # Denoising steps of those pictures.
    num_inference_steps: Annotated[int, Within(1, 1000)] = 30
    # Denoising steps of a preview, a picture drawn while it trains: before the first step, every
    # --checkpointing-steps and at the end, at the training size; 0 draws none. It changes no bit of
    # the run.
    preview_steps: Annotated[int, Within(0, 1000)] = 12
    # Prompts of the previews, each with kohya's marks if you like (a fox --n blurry --d 1 --w 768
    # --h 512 --s 20 --l 7: negative, seed, width, height, steps, guidance), or one .txt file with a
    # prompt a line; left empty, the first of the prompts of the picture at the end.
    preview_prompts: tuple[str, ...] = ()

    @property
    def examples_per_step(self) -> int:
        """n: the examples whose loss one optimizer step sums."""
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def noise(self) -> tuple[str, str]:
        """What overrules the model's word on its noise, where it is not "auto"."""
        return self.prediction_type, self.zero_terminal_snr

    @property
    def alpha(self) -> float:
        """What the files say: divided by the rank it is the adapter's scale, which of rsLoRA is
        lora_alpha / sqrt(rank) (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        """
        return self.lora_alpha * (math.sqrt(self.lora_rank) if self.use_rslora else 1)

    @property
    def schedule_steps(self) -> int:
        """The steps that the learning rate's schedule is made for."""
        return self.lr_schedule_steps or self.max_train_steps

    @property
    def out(self) -> Path:
        kind = "".join(f"-{n}" for n in ("quick", "better", "plain") if getattr(self, n))
        return Path(self.output_dir or f"runs/{self.recipe}{kind}")


ORIGINAL = Config("original", gradient_checkpointing=True, attention="xformers", fused=False)
T4 = Config("t4", buckets=True, mixed_precision="auto", memory_plan=True)
POCKET = Config(
    "pocket",
    pretrained_model_name_or_path="pocket/model",
    dataset_name=("pocket/ink",),
    resolution=(128,),
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
)
NATIVE = replace(T4, recipe="native", resolution=(1024,))
LOWMEM = replace(T4, recipe="lowmem", gradient_checkpointing=True, base_quantization="nf4")
RECIPES = {
    "original": ("The published run: fp32, xFormers, gradient checkpointing, 512 px.", ORIGINAL),
    "t4": ("The same mathematics for a 16 GB T4: UNet in half precision, as fast as fits.", T4),
    "native": ("t4 at 1024 px, SDXL's own size.", NATIVE),
    "lowmem": ("t4 for 6 to 8 GB: UNet in 4 bits; least: add --no-memory-plan.", LOWMEM),
    "pocket": ("The small SDXL and its ink drawings: minutes on a CPU, no network.", POCKET),
}
# What --quick takes for a recipe; what is asked for besides is as asked.
SHORT = replace(POCKET, max_train_steps=80, lr_warmup_steps=5, validation_prompts=QUICK_PROMPTS)
QUICK = {"pocket": ("The recipe pocket in about a minute.", SHORT)}
# What --better takes, by docs/learning.md.
HELPED = {"loss_type": "huber", "huber_schedule": "constant", "huber_c": 0.03, "targets": ("all",)}
BETTER = {
    "pocket": (
        "The recipe pocket's pictures, nearly, in a quarter of its steps.",
        replace(POCKET, max_train_steps=112, num_inference_steps=20, **HELPED),
    ),
    "t4": ("t4 with what helped the small model.", replace(T4, **HELPED)),
}


def usual(recipe: str, quick: bool, better: bool) -> Config:
    """What a recipe has where nothing else is asked for."""
    return (RECIPES | (QUICK if quick else BETTER if better else {}))[recipe][1]


def parse(argv: list[str] | None = None) -> Config:
    """The command line, and before it the --config file that it names, as a checked Config."""
    words = list(sys.argv[1:] if argv is None else argv)
    given = typed(words)  # without what a file says: there, steps may be what epochs came to
    if file := re.findall("\0--config[=\0]([^\0]+)", "\0".join(["", *words])):
        words = of_file(file[-1], words)
    refuse_unknown(words, Config)
    on = {
        name: [w for w in typed(words) if w in (name, f"no-{name}")] for name in ("quick", "better")
    }
    refuse(
        (f"--{each[-1]} with --config, and --{each[0]} in that file", "one", "leave it out")
        for each in on.values()
        if file and len({*each}) > 1  # the file may hold every option: nothing would be changed
    )
    kinds = [on[name][-1:] == [name] for name in ("quick", "better")]
    recipes = RECIPES | (QUICK if kinds[0] else BETTER if kinds[1] else {})
    if (first := "".join(words[:1])) not in (*recipes, "-h", "--help"):
        found = f"the recipe {first}" if first else "no recipe"
        raise Refusal(found, f"one of {', '.join(recipes)}", "loop.py t4, say, or make train")
    asked = read_words(tyro.extras.overridable_config_cli, recipes, words, "loop.py")
    # A typed alpha of 16 is read as 16.0; as the recipe's own 16 it is the same run and file.
    same = {k: v for k, v in vars(recipes[first][1]).items() if v == getattr(asked, k)}
    if asked.max_train_epochs and "max-train-steps" in given:
        if "max-train-epochs" in given:
            found = "--max-train-steps with --max-train-epochs"
            raise Refusal(found, "one of them", "leave one out")
        same["max_train_epochs"] = 0  # a file's: what is typed goes before it
    # No shell does so behind --output-dir=.
    same |= {k: os.path.expanduser(getattr(asked, k)) for k in ("output_dir", "cache_dir")}
    return check(replace(asked, **same))


def read_words(cli: Callable, what: Any, words: list[str] | None, prog: str) -> Any:
    """What tyro reads of a command line. Raises Refusal, of one line, where it draws a box."""
    words, told = sys.argv[1:] if words is None else words, io.StringIO()
    if {"-h", "--help"} & {*words}:
        print(help.page(prog, what, words), flush=True)
        sys.exit(0)
    try:
        with redirect_stderr(told):
            return cli(what, args=words, prog=prog)
    except SystemExit as left:
        # Before the first ruled line may stand a title, behind the last how to get help.
        parts = re.split(".*(?:─{3}|-{9}).*", told.getvalue().replace("│", " "))[1:-1]
        why = "; ".join(" ".join(part.split()).rstrip(".") for part in parts)
        why = why.partition("; Argument helptext:")[0]
        found, remedy = f"a command line that cannot be read: {why}", f"python {prog} --help"
        raise Refusal(found, "options as docs/options.md lists them", remedy) from left


# What a run's config.json says besides its options.
NOTES = ("commit", "code_changes", "versions", "base_commit", "started_from")


def of_file(name: str, words: list[str]) -> list[str]:
    """A command line: its `words`, and before them, so that they win, those that say the same as a
    JSON or TOML file, or as the config.json of the folder `name`. Raises Refusal.
    """
    path = Path(name, "config.json") if os.path.isdir(name) else Path(name)
    read, remedy = tomllib.loads if path.suffix == ".toml" else json.loads, f"correct {path}"
    with refusing(f"--config {path} cannot be read", "options in JSON, or in NAME.toml", remedy):
        given = {key.replace("-", "_"): each for key, each in read(path.read_text("utf-8")).items()}
    named = [words.pop(0)] if words[0][:1] != "-" else []
    recipe = [str(given.pop("recipe"))] if "recipe" in given else named
    if given.pop("compile", False):  # an option of earlier versions, which changed no run
        why = "--fused has the faster convolution blocks"
        print(f"compile in {path} is passed over: {why}", file=sys.stderr)
    troubles = []
    if named not in ([], recipe):
        found = f"the recipe {named[0]}, and {recipe[0]} in {path}"
        troubles.append((found, "one recipe", f"leave {named[0]} out"))
    for key in given.keys() - NOTES:
        value = given[key]
        several = value if isinstance(value, list) else [value]
        told = [each for each in several if isinstance(each, str | int | float)]
        # tyro checks the rest; but of null or a table it would make a text.
        if told != several and (key, value) != ("caption", None):
            expected = "texts, numbers, true or false"
            troubles.append((f"{key} is {value!r:.200}", expected, remedy))
        option = f"--no-{key}" if value is False else f"--{key}"
        if value is several:
            recipe += [option, *map(str, several)]
        else:
            recipe.append(option if isinstance(value, bool) else f"{option}={value}")
    refuse(sorted(troubles))
    return recipe + words


ELSEWHERE = {  # names that are not like ours, of other trainers or earlier versions: ours
    "cache-latents": "--cache, which is on",
    "network-dim": "--lora-rank",
    "lr": "--learning-rate",
    "unet-lr": "--learning-rate",
    "train-data-dir": "--dataset-name FOLDER",
    "instance-data-dir": "--dataset-name FOLDER",
    "instance-prompt": "--caption",
    "num-repeats": "--dataset-weights",
    "alpha-mask": "--mask-from-alpha",
    "network-weights": "--start-from",
    "caption-tag-dropout-rate": "--tag-dropout",
    "save-every-n-steps": "--checkpointing-steps",
    "optimizer-type": "--optimizer prodigy, --use-8bit-adam",
    "use-ema": "--ema-decay 0.99",
    "v-parameterization": "--prediction-type v_prediction",
    "pretrained-vae-model-name-or-path": "--vae",
    "xformers": "--attention xformers",
    "compile": "--fused, whose convolution blocks are faster",  # ours until 2026-11
}


def typed(words: list[str]) -> list[str]:
    """The names of the options among the `words`, without their dashes."""
    return [word[2:].partition("=")[0].replace("_", "-") for word in words if word[:2] == "--"]


def refuse_unknown(words: list[str], options: type) -> None:
    """Raise one Refusal for every option among the `words` that the dataclass lacks, each with the
    one that is likely meant, and for every word that is no text.
    """
    names = [field.name.replace("_", "-") for field in fields(options)]
    opposite = [f"no-{name}" for name in names]
    known = {"help", *names, *opposite}
    troubles = []
    for name in (name for name in typed(words) if name not in known):
        likely = opposite if name[:3] == "no-" else names
        near = [f"--{each}" for each in difflib.get_close_matches(name, likely, 1)]
        meant = ELSEWHERE.get(name) or "".join(near) or "nothing alike"
        found = f"the option --{name} (here: {meant})"
        troubles.append((found, "options that docs/options.md lists", "correct that"))
    for word in words:  # a shell passes any bytes on, and JSON half a letter
        if word.encode(errors="ignore").decode() != word or "\0" in word:
            remedy = "type it in a UTF-8 terminal, rename what is called so"
            troubles.append((f"{word!r}, which is no UTF-8", "text that all can read", remedy))
    refuse(troubles)


class Outlet(io.FileIO):
    """A terminal or pipe: what is said when its reader has gone goes nowhere, and ends no run."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a file on a full disk, say
                raise
            return len(data)


def keep_speaking() -> None:
    """Let stdout and stderr show a letter that they have not as its number, and need no reader."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        if old and old is getattr(sys, f"__{name}__"):  # else a notebook's
            old.flush()
            raw = io.BufferedWriter(Outlet(number, "w", closefd=False))
            lines = {"errors": "backslashreplace", "line_buffering": True}
            setattr(sys, name, io.TextIOWrapper(raw, old.encoding, **lines))


def or_leave(parse: Callable, argv: list[str] | None = None) -> Any:
    """parse(argv). Leaves with exit code 1 and a sentence where that is refused; of several
    processes the first says it.
    """
    keep_speaking()
    try:
        return parse(argv)
    except Refusal as refusal:
        if SPEAKS:
            print(f"error: {refusal}", file=sys.stderr)
        else:
            time.sleep(10)  # torchrun ends all with the first that leaves
        sys.exit(1)


def parse_or_leave(argv: list[str] | None = None) -> Config:
    """The command line's Config, and the run's first line: what is going to be done. Leaves with an
    error now if it has one.
    """
    config = or_leave(parse, argv)
    sets = [(name, "--dataset-name") for name in config.dataset_name]
    sets += [(config.validation_data, "--validation-data")] * bool(config.validation_data)
    models = [(config.pretrained_model_name_or_path, "--pretrained-model-name-or-path")]
    models += [(config.vae, "--vae")] * bool(config.vae)
    looked = [(name, option, "a folder of pictures") for name, option in sets]
    looked += [(n, option, "a model") for n, option in models if not n.endswith(".safetensors")]
    for name, option, expected in looked:  # a mistyped folder is answered now
        or_leave(functools.partial(folder_of, name, option), expected)
    what = f"plan for {config.plan_for}" if config.plan_for else f"output to {config.out}"
    if SPEAKS and not config.quiet:
        announce(f"recipe {config.recipe}, {what}")
    return config


def announce(what: str) -> None:
    """Say at once what the command will do: the imports that follow are silent. On stderr, since on
    stdout generate.py names its pictures and nothing else.
    """
    print(f"{what}; importing torch and diffusers takes some seconds", file=sys.stderr, flush=True)


def refuse_wrong(options: Any, usual: Any, against: list[tuple]) -> None:
    """Raise one Refusal for each option out of its bounds and for what does not go together.

    usual: options within their bounds; against: whether it is so, what was found, what is expected,
    what to do.
    """
    troubles = [words for so, *words in against if so]
    for field in fields(options):
        value, good = getattr(options, field.name), getattr(usual, field.name)
        remedy = f"--{field.name.replace('_', '-')} {str(good).strip('(,)')}"
        for bounds in getattr(field.type, "__metadata__", ()):
            if value != good and isinstance(bounds, Within) and not bounds.hold(value):
                said = " ".join(map(str, value)) if isinstance(value, tuple) else value
                troubles.append((f"{field.name} is {said}", str(bounds), remedy))
    refuse(troubles)


# What makes a run learn otherwise by what learn/ plugs in, which the book's own lines do not have.
OTHERWISE = ("stratified_timesteps", "weighting_scheme", "logit_mean", "logit_std", "loss_type")
OTHERWISE += ("huber_schedule", "huber_c", "ema_decay", "loraplus_lr_ratio", "optimizer")
RELATIVES = ("adapter", "targets", "rank_pattern")  # by which the adapter is another


def set_apart(config: Config, *names: str) -> list[str]:
    """Those of the options `names` that are not as without them, as they are typed."""
    other = [name for name in names if getattr(config, name) != getattr(Config, name)]
    return [f"--{name.replace('_', '-')}" for name in other]


def odd_learning(config: Config) -> list[tuple]:
    """What cannot be of the options that make a run learn otherwise, as refuse_wrong() takes it."""
    logit, huber = ("logit_mean", "logit_std"), ("huber_schedule", "huber_c")
    needs = [(logit, "weighting_scheme", "logit_normal"), (huber, "loss_type", "huber")]
    against = []
    for names, option, value in needs:
        alone, to = getattr(config, option) != value, f"--{option.replace('_', '-')} {value}"
        told = " and ".join(set_apart(config, *names))
        # By --better Huber's numbers stand there: with --loss-type l2 nobody has typed them.
        alone = alone and not (option == "loss_type" and config.better)
        against.append((told and alone, f"{told} alone", f"{to} with it", "add that"))
    if config.optimizer == "prodigy":
        found, rate, ratio = "--optimizer prodigy", config.learning_rate, config.loraplus_lr_ratio
        absent, far = not importlib.util.find_spec("prodigyopt"), rate < 0.01
        factor, one = "a factor of the rate that it finds, 0.01 to 10", "one rate for A and B"
        against += [
            (absent, f"{found}, and no package prodigyopt", "it", "pip install prodigyopt"),
            (far, f"{found} with --learning-rate {rate:g}", factor, "--learning-rate 1"),
            (ratio != 1, f"{found} with --loraplus-lr-ratio", one, "leave one out"),
        ]
    return against


def relatives(config: Config) -> list[str]:
    """The options by which the adapter is another than the book's, as they are typed."""
    return set_apart(config, *RELATIVES)


def check_adapter(config: Config) -> list[tuple]:
    """What is wrong with the adapter's options, as refuse_wrong() takes it."""
    wrong = next((pair for pair in config.rank_pattern if not ranked(pair)), "")
    unread = next((word for word in config.targets if not readable(word)), "")
    other, kind = config.start_from and " ".join(relatives(config)), config.adapter
    rates = config.loraplus_lr_ratio != 1 and kind in ("loha", "lokr")
    ranks = config.use_rslora and config.rank_pattern
    if other and config.better:
        other += " of --better"
    apart = "leave one out" + ", or type --targets attention" * config.better
    return [
        (not config.targets, "--targets without any", "one or more", "--targets attention"),
        (unread, f"--targets {unread}", "a regular expression", "--targets attention"),
        (wrong, f"--rank-pattern {wrong}", "NAME=RANK, 1 to 640", "--rank-pattern mid_block=32"),
        (config.as_lora and kind == "lora", "--as-lora of LoRA", "another", "leave it out"),
        (rates, f"--loraplus-lr-ratio with {kind}", "lora or dora, with A and B", "leave one out"),
        (ranks, "--use-rslora with --rank-pattern", "one rank", "leave one out"),
        (other, f"--start-from with {other}", "LoRA on attention", apart),
    ]


def readable(pattern: str) -> bool:
    """Whether it is a regular expression."""
    try:
        return bool(re.compile(pattern))
    except re.error:
        return False


def ranked(pair: str) -> bool:
    """Whether it is a regular expression, = and a rank."""
    name, _, rank = pair.rpartition("=")
    return bool(name) and readable(name) and rank.isdecimal() and 1 <= int(rank) <= 640


def check(config: Config) -> Config:
    """`config` itself. Raises Refusal, naming all of it, for what cannot be or go together."""
    too_long = config.quick and config.recipe not in QUICK
    unknown = config.better and config.recipe not in BETTER
    twice = config.caption is not None and config.caption_from_name
    in_any_order = config.deterministic and config.attention == "xformers"
    unit = 64 if config.buckets else 8
    good = sorted({max(1, round(side / unit)) * unit for side in config.resolution})
    odd = good != sorted(config.resolution) and not any(side % 8 for side in config.resolution)
    sides, good = (" ".join(map(str, each)) for each in (config.resolution, good))
    units = f"multiples of {unit}{' (with --no-buckets of 8)' * config.buckets}, each once"
    sets, weights = len(config.dataset_name), config.dataset_weights
    wrong = weights and (len(weights) != sets or not {*weights} <= {*range(1, 1000)})
    told = " ".join(f"{weight:g}" for weight in weights)
    given = f"--dataset-weights {told} with {sets} data set{'s' * (sets > 1)}"
    unseen = config.plan_for and config.max_train_epochs
    alone = config.any_base and not config.start_from
    kept = config.keep_tags and not (config.shuffle_tags or config.tag_dropout)
    epochs = "--plan-for with --max-train-epochs, and a plan sees no pictures"
    held_out = [n for n in ("validation_share", "validation_data") if getattr(config, n)]
    judged = config.validation_steps or config.stop_when_worse
    lone = "--validation-steps or --stop-when-worse alone"
    against = [
        (too_long, f"--quick with {config.recipe}", " or ".join(QUICK), "--max-train-steps 100"),
        (unknown, f"--better with {config.recipe}", " or ".join(BETTER), "leave it out"),
        (config.quick and config.better, "--quick with --better", "one of them", "leave one out"),
        (twice, "--caption with --caption-from-name", "one of them", "leave one out"),
        (in_any_order, "--deterministic with xFormers' attention", "PyTorch's", "--attention sdpa"),
        (not sets, "--dataset-name without a name", "one or more", "--dataset-name FOLDER"),
        (wrong, given, "a whole number for each, 1 to 999", "--dataset-weights 3 1, say"),
        (unseen, epochs, "a number of steps", "--max-train-steps 1000"),
        (odd, f"resolution {sides}", units, f"--resolution {good}"),
        (kept, "--keep-tags alone", "--shuffle-tags or --tag-dropout", "add one or leave it out"),
        *check_adapter(config),
        (alone, "--any-base alone", "--start-from with it", "add one or leave it out"),
        (held_out[1:], "--validation-share with --validation-data", "one", "leave one out"),
        (judged and not held_out, lone, "held-out pictures", "--validation-share 0.05 with it"),
        *odd_learning(config),
    ]
    if config.plain:
        processes = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
        nf4, ours = config.base_quantization == "nf4", "what the book's lines do"
        left = ("checkpoints", "finished.json", "pytorch_lora_weights.safetensors")
        held = " and ".join(name for name in left if os.path.exists(config.out / name))
        folder = f"--plain with {config.out}, which holds {held}"
        more = ("plan_for", "deterministic", "start_from", "quiet", *held_out)
        more += ("adapter", "rank_pattern")  # and targets, where they are not --better's
        more += ("better",) if config.better else ("targets", *OTHERWISE)
        more = " and ".join(set_apart(config, *more))
        against += [
            (processes > 1, f"--plain with {processes} processes", "one", "go without torchrun"),
            (nf4, "--plain with an NF4 base", "an unquantized one", "--base-quantization none"),
            (held, folder, "a folder without", "another --output-dir"),
            (more, f"--plain with {more}", ours, "leave one out"),
        ]
    refuse_wrong(config, RECIPES[config.recipe][1], against)
    return config
