"""Whether a model from anywhere is one that can be trained, and whether this machine has what that
needs. What the model's files may say, hub.py looks at; here is what shows only once they are built.
"""

import functools
import json
from collections.abc import Iterable
from inspect import signature
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from inputs import one_file
from inputs.files import Refusal, refusing
from inputs.hub import AGAIN, fetch, file_of, read_config, read_scheduler, source, weight_files

# SDXL base's UNet, so that a plan needs no download.
SDXL_UNET = json.loads((Path(__file__).parent / "sdxl/unet/config.json").read_text())


# Whatever is raised inside becomes a Refusal that begins with what it is given.
refused = functools.partial(refusing, expected="an SDXL model's own files", remedy=AGAIN)


def widths(unet: torch.nn.Module) -> tuple[int, int]:
    """D and P, of the context and of the pooled embedding, that `unet` was made for."""
    about = unet.config
    pooled = about.projection_class_embeddings_input_dim - 6 * about.addition_time_embed_dim
    return about.cross_attention_dim, pooled


def unet_inputs(unet: torch.nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """x_t (1, 4, H, W) and the rest of a batch, as model.predict() takes them, of the sizes that
    `unet` says it was made for; on the default device and without meaning.
    """
    context, pooled = widths(unet)
    side = 2 ** len(unet.config.block_out_channels)
    return torch.empty(1, 4, side, side), {
        "t": torch.zeros(1, dtype=torch.long),
        "context": torch.empty(1, 2, context),
        "pooled": torch.empty(1, pooled),
        "time_ids": torch.empty(1, 6),
    }


def check_widths(unet: torch.nn.Module, context: Tensor, pooled: Tensor) -> None:
    """Raise Refusal where the text encoders' context (..., T, D) and pooled embedding (..., P) are
    not of the widths that `unet` was made for: parts of two models, or a wrong config.json.
    """
    want, got = widths(unet), (context.shape[-1], pooled.shape[-1])
    if want != got:
        found = f"the text encoders give embeddings of width {got[0]} and {got[1]}"
        expected = f"{want[0]} and {want[1]}, as the UNet's config.json has it"
        raise Refusal(found, expected, AGAIN)


@torch.no_grad()
def load_encoder(
    cls: type, name: str, part: str, half: bool, device: torch.device
) -> torch.nn.Module:
    """A frozen encoder of diffusers' or transformers' class, through that library's own loader,
    which knows older files' names, in fp32: it is used once for each picture or caption, so
    precision costs seconds. half: from the fp16 files where there are some.

    Raises Refusal where weights are missing or do not fit, with which the libraries would go on
    with random numbers and a warning, and where the encoder fails at a trial.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()  # a file is read in a second
    folder = fetch(name, part, half)
    read_config(folder / "config.json")
    file = file_of(source(name, part))
    with refused(f"{file or folder} cannot be loaded"):
        if file:
            encoder = one_file.build_encoder(cls, file, part, device)
        else:
            variant = "fp16" if ".fp16" in weight_files(folder, half)[0].name else None
            encoder, info = cls.from_pretrained(
                folder, variant=variant, use_safetensors=True, output_loading_info=True
            )
            if missing := [key for key in info["missing_keys"] if "position_ids" not in key]:
                raise ValueError(f"it lacks {len(missing)} tensors, such as {min(missing)}")
        encoder = encoder.to(device).float().requires_grad_(False).eval()
        if part == "vae":
            latent = encoder.encode(torch.zeros(1, 3, 16, 16, device=device)).latent_dist.mean
            if latent.shape[-1] != 2:
                raise ValueError("its latents are not an eighth of a picture's side")
        else:
            encoder(torch.zeros(1, 2, dtype=torch.long, device=device))
    return encoder


def check_tokenizer(name: str, tokenizer, encoder: torch.nn.Module) -> None:
    """Raise Refusal where a tokenizer gives another number of tokens, or others, than its encoder
    has.
    """
    places, words = encoder.config.max_position_embeddings, encoder.config.vocab_size
    longest = tokenizer.model_max_length
    if longest != places or len(tokenizer) > words:
        found = f"{name}'s tokenizer has a model_max_length of {longest!r:.50} and "
        found += f"{len(tokenizer)} words, and its text encoder {places} places and {words} words"
        raise Refusal(found, "a tokenizer and a text encoder of one model", AGAIN)


# diffusers' samplers for DDPM's noise that need no further package; each gives the pipeline's
# pictures to the bit (tests/book/test_generate.py). The last is SDXL's own.
SAMPLERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
)


def noise_settings(
    name: str, prediction_type: str = "auto", zero_snr: str = "auto"
) -> tuple[dict, str | None, bool]:
    """What the model's scheduler_config.json says of its noise, and what it says that the UNet
    predicts, or None: diffusers then takes "epsilon"; and whether of zero terminal SNR. In the
    settings both are overruled by what is not "auto"; pure noise then goes with trailing
    timesteps, which begin at it (Lin et al. 2023, https://arxiv.org/abs/2305.08891, section 3.3).

    Raises Refusal for what is not DDPM's noise, by the names of its entries. A file without betas
    is of another kind of noise, or means the defaults of one of diffusers' classes.
    """
    # Here, too, since it is met before anything is encoded: latents of another scale.
    read_config(fetch(name, "vae") / "config.json")
    usual = dict.fromkeys(("beta_schedule", "beta_start", "beta_end"))
    settings = read_scheduler(name, **usual, num_train_timesteps=1000)
    said = settings.get("prediction_type")
    predicts = prediction_type if prediction_type != "auto" else said or "epsilon"
    zero = bool(settings.get("rescale_betas_zero_snr"))
    if zero_snr == ("no" if zero else "yes"):
        spacing = {} if zero else {"timestep_spacing": "trailing"}
        settings |= {"rescale_betas_zero_snr": not zero} | spacing
    return settings | {"prediction_type": predicts}, said, zero


def load_sampler(
    name: str, wanted: str = "", steps: int = 30, prediction_type: str = "auto", zero: str = "auto"
):
    """The sampler that the model's model_index.json names, or the one of SAMPLERS that `wanted`
    names, with the model's settings. Raises Refusal for another, and for one that does not come
    through `steps` steps, as a try without a UNet shows.
    """
    import diffusers

    folder = fetch(name, "scheduler")
    # Where nothing is said, some clip x0 to -1 ... 1, as pixels are; SDXL's latents go beyond.
    settings, said, zero_itself = noise_settings(name, prediction_type, zero)
    if settings["prediction_type"] != (said or "epsilon"):
        print(f"drawing with {prediction_type}: {name} itself says {said}")
    if zero == ("no" if zero_itself else "yes"):
        print(f"drawing with{'out' * zero_itself} zero terminal SNR: {name} itself says otherwise")
    settings = {"clip_sample": False} | settings
    kind = wanted or read_config(folder.parent / "model_index.json").get("scheduler", [""])[-1]
    if kind not in SAMPLERS:
        raise Refusal(f"the sampler {kind}", ", ".join(SAMPLERS), f"--scheduler {SAMPLERS[-1]}")
    make = getattr(diffusers, kind)
    known, zero_snr = signature(make).parameters, "rescale_betas_zero_snr"
    own = {key: settings[key] for key in known if key in settings}
    failed = f"{kind} with the settings of {folder} does not come through {steps} steps"
    remedy = f"--num-inference-steps 30, or --scheduler {SAMPLERS[-1]}, or mend that file"
    with refusing(failed, "one that ends on numbers", remedy):
        if settings.get(zero_snr) and zero_snr not in known:
            raise ValueError(f"it has not the model's {zero_snr}")
        sampler, x = make(**own), torch.ones(1, 4, 1, 1)
        sampler.set_timesteps(steps)
        for t in sampler.timesteps:
            x = sampler.step(sampler.scale_model_input(x, t), t, x).prev_sample
        if not x.isfinite().all() or max(sampler.timesteps) >= sampler.config.num_train_timesteps:
            raise ValueError("NaN, Inf or a timestep beyond the last")
    return make(**own)


def check_finite(found: str, names: Iterable[str], *answers: Tensor) -> None:
    """Raise Refusal, with `found` and the first name, for NaN or Inf in an encoder's `answers`
    (B, ...) to the B things called `names`.
    """
    remedy = "look at it; with an encoder of your own, check that its fp32 weights are finite"
    for name, *numbers in zip(names, *answers, strict=True):
        if not all(bool(part.isfinite().all()) for part in numbers):
            raise Refusal(f"{found} {name}", "finite numbers", remedy)


def load_bitsandbytes(needed_for: str, way_out: str) -> ModuleType:
    """bitsandbytes. Raises Refusal where it does not load, with the option that does without it."""
    expected = f"bitsandbytes 0.50 or newer for {needed_for}"
    remedy = f"pip install --upgrade bitsandbytes, or {way_out}"
    with refusing("bitsandbytes does not load here", expected, remedy):  # absent, or of other CUDA
        import bitsandbytes

        return bitsandbytes


def check_device(name: str) -> torch.device:
    """The device that `name` means: auto is the first GPU, else the CPU.

    Raises Refusal for a GPU that torch does not see.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name not in ("cpu", *gpus, "cuda" if gpus else ""):
        found = f"device {name}, and torch sees {', '.join(gpus) or 'no GPU'}"
        raise Refusal(found, "auto, cpu, or a CUDA GPU and its driver", "--device cpu")
    return torch.device(name)
