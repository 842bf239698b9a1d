"""What a model's files may say, and whether this machine has what they need. The files come from
anywhere; what they describe is built before their weights are compared with it, so a number too
many would take all memory, and a wrong one would only be met by the first step.
"""

import contextlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from inputs.files import Refusal, first_line
from inputs.hub import read_config, weight_files

AGAIN = "download the model again, or choose another SDXL model (no inpainting or refiner model)"

# SDXL base's UNet where it differs from diffusers' default, so that a plan needs no download and a
# start no trial. A test holds it to the model's own file.
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@contextlib.contextmanager
def refused(found: str) -> Iterator[None]:
    """Whatever is raised inside becomes a Refusal that begins with `found`: libraries raise nearly
    every class for a damaged model.
    """
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise Refusal(f"{found} ({why})", "an SDXL model's own files", AGAIN) from error


def unet_inputs(unet: torch.nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """x_t (1, 4, H, W) and the rest of a batch, as model.predict() takes them, of the sizes that
    `unet` says it was made for; on the default device and without meaning.
    """
    about = unet.config
    pooled = about.projection_class_embeddings_input_dim - 6 * about.addition_time_embed_dim
    side = 2 ** len(about.block_out_channels)
    return torch.empty(1, 4, side, side), {
        "t": torch.zeros(1, dtype=torch.long),
        "context": torch.empty(1, 2, about.cross_attention_dim),
        "pooled": torch.empty(1, pooled),
        "time_ids": torch.empty(1, 6),
    }


def is_sdxl_base(unet: torch.nn.Module) -> bool:
    """Whether unet.config is SDXL base's to the last entry, as nearly every SDXL model's is."""
    usual = inspect.signature(type(unet).__init__).parameters
    wanted = {name: entry.default for name, entry in usual.items() if name != "self"} | SDXL_UNET
    found = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    found["upcast_attention"] = bool(found["upcast_attention"])  # null there, false in its heirs
    return json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True)  # (1,) is [1]


def check_widths(unet: torch.nn.Module, context: Tensor, pooled: Tensor) -> None:
    """Raise Refusal where the text encoders' context (..., T, D) and pooled embedding (..., P) are
    not of the widths that `unet` was made for: parts of two models, or a wrong config.json.
    """
    about = unet.config
    rest = about.projection_class_embeddings_input_dim - 6 * about.addition_time_embed_dim
    want, got = (about.cross_attention_dim, rest), (context.shape[-1], pooled.shape[-1])
    if want != got:
        raise Refusal(
            f"the text encoders give embeddings of width {got[0]} and {got[1]}",
            f"{want[0]} and {want[1]}, as the UNet's config.json has it",
            AGAIN,
        )


def load_encoder(cls: type, folder: Path, half: bool, device: torch.device) -> torch.nn.Module:
    """A frozen encoder of diffusers' or transformers' class, in fp32. half: from the fp16 files
    where there are some.

    Raises Refusal where weights are missing or do not fit: the libraries would go on with random
    numbers and a warning.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()  # a file is read in a second
    variant = "fp16" if ".fp16" in weight_files(folder, half)[0].name else None
    read_config(folder / "config.json")
    try:
        encoder, info = cls.from_pretrained(
            folder, variant=variant, use_safetensors=True, output_loading_info=True
        )
        missing = [k for k in info["missing_keys"] if "position_ids" not in k]
        problem = f"lacks {len(missing)} tensors, such as {min(missing)}" if missing else ""
        if not problem:
            encoder = encoder.to(device).float().requires_grad_(False).eval()
            problem = try_encoder(encoder)
    except Exception as error:  # damaged or misfitting files: many classes, one meaning
        problem = f"cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
    if problem:
        raise Refusal(
            f"{folder} {problem}",
            "a config.json and the weights that fit it",
            "download the model again, or pip install --upgrade transformers diffusers",
        )
    return encoder


@torch.no_grad()
def try_encoder(encoder: torch.nn.Module) -> str:
    """What is wrong with an encoder's answer to two tokens, or to 16 x 16 pixels, or "": weights
    may fit a config.json whose other numbers make no model.
    """
    if not hasattr(encoder, "encode"):  # a text encoder
        encoder(torch.zeros(1, 2, dtype=torch.long, device=encoder.device))
        return ""
    shape = [
        *encoder.encode(torch.zeros(1, 3, 16, 16, device=encoder.device)).latent_dist.mean.shape
    ]
    return "" if shape == [1, 4, 2, 2] else f"makes {shape} of (1, 3, 16, 16), not (1, 4, 2, 2)"


def check_tokenizer(name: str, tokenizer, encoder: torch.nn.Module) -> None:
    """Raise Refusal where a tokenizer gives more tokens, or others, than its encoder has."""
    longest, words = encoder.config.max_position_embeddings, encoder.config.vocab_size
    asked = tokenizer.model_max_length
    if type(asked) is not int or not 1 < asked <= longest or len(tokenizer) > words:
        raise Refusal(
            f"{name}'s tokenizer has a model_max_length of {asked!r:.50} and {len(tokenizer)} "
            f"words, and its text encoder {longest} places and {words} words",
            "a tokenizer and a text encoder of one model",
            AGAIN,
        )


def zeros_for_empty_prompt(index: Path) -> bool:
    """force_zeros_for_empty_prompt of a model_index.json."""
    zeros = read_config(index).get("force_zeros_for_empty_prompt", True)
    if not isinstance(zeros, bool):
        found = f"{index} has force_zeros_for_empty_prompt {zeros!r:.50}"
        raise Refusal(found, "true or false", AGAIN)
    return zeros


def scheduler_class(index: Path) -> type:
    """The sampler's class that a model_index.json names: one of diffusers', and a sampler."""
    import diffusers

    named = read_config(index).get("scheduler")
    kind = named[1] if isinstance(named, list) and len(named) == 2 else named
    found = getattr(diffusers, kind, None) if isinstance(kind, str) else None
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        raise Refusal(
            f"{index} names the sampler {kind!r:.50}", "one of diffusers' samplers", AGAIN
        )
    return found


def latent_scaling(path: Path) -> tuple[float, float]:
    """(scaling_factor, shift_factor) of a VAE's config.json."""
    config = read_config(path)
    factor, shift = config.get("scaling_factor"), config.get("shift_factor") or 0.0
    if not all(type(n) in (int, float) and abs(n) < 1e3 for n in (factor, shift)) or factor <= 0:
        raise Refusal(
            f"{path} has scaling_factor {factor!r:.50} and shift_factor {shift!r:.50}",
            "two numbers, such as 0.13025 and 0",
            AGAIN,
        )
    return factor, shift


def check_schedule(name: str, config: dict) -> None:
    """Raise Refusal where a scheduler's config tells of another objective, or makes no noise
    schedule.
    """
    prediction, kind = config["prediction_type"], config["beta_schedule"]
    if (
        prediction not in ("epsilon", "v_prediction")
        or kind not in ("linear", "scaled_linear")
        or config.get("trained_betas")
    ):
        raise Refusal(
            f"{name}'s scheduler has prediction_type {prediction}, beta_schedule {kind} and "
            f"trained_betas {config.get('trained_betas')}",
            "epsilon or v_prediction, linear or scaled_linear, and none",
            "choose an SDXL model: others train by another objective",
        )
    start, end, steps = (config[k] for k in ("beta_start", "beta_end", "num_train_timesteps"))
    numbers = all(type(beta) is float for beta in (start, end)) and type(steps) is int
    if not numbers or not (0 < start <= end < 1 and 1 < steps <= 10**5):
        raise Refusal(
            f"{name}'s scheduler has betas {start!r:.50} to {end!r:.50} in {steps!r:.50} steps",
            "numbers between 0 and 1 that do not fall, in 2 to 100,000 steps",
            AGAIN,
        )


def check_latents(names: list[str], mean: Tensor, std: Tensor) -> None:
    """Raise Refusal for NaN or Inf in the VAE's answer (B, C, H, W) to pictures `names`."""
    for name, *numbers in zip(names, mean, std, strict=True):
        if not all(part.isfinite().all() for part in numbers):
            raise Refusal(
                f"the VAE gives NaN or Inf for picture {name}",
                "finite latents",
                "look at the picture; with a VAE of your own, check that its fp32 weights are "
                "finite",
            )


def check_embeddings(captions: list[str], context: Tensor, pooled: Tensor) -> None:
    """Raise Refusal for NaN or Inf in the embeddings (B, T, D) and (B, P) of captions."""
    for caption, *numbers in zip(captions, context, pooled, strict=True):
        if not all(part.isfinite().all() for part in numbers):
            raise Refusal(
                f"the text encoders give NaN or Inf for {caption!r}",
                "finite numbers",
                "check their weights",
            )


def load_bitsandbytes(needed_for: str, way_out: str) -> ModuleType:
    """bitsandbytes. Raises Refusal where it does not load, with the option that does without it."""
    try:
        import bitsandbytes

        return bitsandbytes
    except Exception as error:  # not installed, or built for another CUDA
        raise Refusal(
            f"bitsandbytes does not load here ({first_line(error)})",
            f"bitsandbytes 0.50 or newer for {needed_for}",
            f"pip install --upgrade bitsandbytes, or {way_out}",
        ) from error


def check_device(name: str) -> torch.device:
    """The device that `name` means: auto is the first GPU, else the CPU.

    Raises Refusal for a GPU that torch does not see.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise Refusal(f"device {name}", "auto, cpu, cuda or cuda:1", "leave --device out")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise Refusal(
            f"device {name}, and torch sees no GPU", "a CUDA GPU and its driver", "--device cpu"
        )
    return torch.device(name)
