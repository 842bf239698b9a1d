"""SDXL's parts: how they are loaded, and what each does to a picture or a prompt on its way into
training.

SDXL (Podell et al. 2023, https://arxiv.org/abs/2307.01952) is a VAE, two CLIP text encoders and a
UNet. Nothing here knows of LoRA: the UNet that load_unet() returns is diffusers' own.

Letters: `B` batch, `C` latent channels (4), `H W` latent size (picture size / 8), `T` tokens of a
prompt (77 in each of its chunks), `D` width of the context (768 + 1280 = 2048), `P` width of the
pooled embedding (1280). The small model of `pocket` has 32 for 77, and other `D` and `P`.
"""

from __future__ import annotations

import functools
import gc
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from inputs import vetting
from inputs.files import Refusal, first_line, open_safetensors
from inputs.hub import fetch, read_config, unet_files, zeros_for_empty_prompt
from inputs.vetting import load_encoder

# ---- device and precision ------------------------------------------------------------------------

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The frozen UNet's dtype and the reason for it. wanted: "auto", "fp32", "fp16" or "bf16".

    Compute capability decides, not torch.cuda.is_bf16_supported(), which says True on a T4 and
    means emulation.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    sm = f"sm_{capability[0]}{capability[1]}" if capability else device.type
    if wanted == "bf16" and capability and capability < (8, 0):
        found = f"bf16 on {sm}, which only emulates it"
        raise Refusal(found, "sm_80 or newer", "--mixed-precision fp16")
    if wanted != "auto":
        return DTYPES[wanted], f"asked for, on {sm}"
    if capability is None:
        return torch.float32, f"{sm} has no fast half precision"
    if capability >= (8, 0):
        return torch.bfloat16, f"{sm} has bf16 tensor cores: fp32's range, so no loss scaling"
    return torch.float16, f"{sm} computes fp16 and only emulates bf16: with loss scaling"


def free_memory() -> None:
    """Give back what dropped references held, on the host and on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- the UNet ------------------------------------------------------------------------------------


READERS = 4  # threads that copy weights: one alone copies slower than a GPU takes


def load_unet(name: str, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """SDXL's UNet on `device` in `dtype`, each weight straight from its file: the host never holds
    the model. name: a Hub model, a folder, or one .safetensors file, which has names of its own.

    It is built without memory (meta device), then every tensor is read under its name in the file,
    cast on the device, and assigned under diffusers' name.
    """
    half = dtype != torch.float32
    folder = fetch(name, "unet", half)
    unet = build_unet(folder)
    weights = {}
    for path, keys in unet_files(name, half, unet.state_dict()):
        with open_safetensors(path, str(device)) as file, ThreadPoolExecutor(READERS) as pool:
            read = lambda key, file=file: file.get_tensor(key).to(dtype)  # noqa: E731
            weights |= zip(keys, pool.map(read, keys.values()), strict=True)
    return fill_unet(unet, weights, path)


def build_unet(folder: Path) -> UNet2DConditionModel:
    """The UNet that `folder`'s config.json describes, on the meta device: shapes, no numbers.

    Raises Refusal where diffusers cannot build it, or where SDXL's inputs do not pass through it.
    """
    config = read_config(folder / "config.json")
    no_unet = f"{folder / 'config.json'} describes no UNet of SDXL's kind"
    with vetting.refused(no_unet), torch.device("meta"), torch.no_grad():
        check_passes(json.dumps(config))
        return UNet2DConditionModel.from_config(config)


@functools.cache
def check_passes(config: str) -> None:
    """Raise whatever SDXL's inputs raise on their way through the UNet of this config (JSON). On
    the meta device, and with one layer in each transformer: ten in a row take what one takes.
    """
    settings = json.loads(config) | {"transformer_layers_per_block": 1}
    unet = UNet2DConditionModel.from_config(settings)
    predict(unet, *vetting.unet_inputs(unet))


def fill_unet(
    unet: UNet2DConditionModel, weights: dict[str, Tensor], path: Path
) -> UNet2DConditionModel:
    """`unet` with `weights`, strictly, frozen. Raises Refusal where they do not fit, naming one and
    the `path` of their file.
    """
    try:
        unet.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()[:200]
        found, expected = f"{path}'s weights do not fit its config.json ({first})", "its own"
        raise Refusal(found, expected, "download the model again") from error
    return unet.requires_grad_(False).eval()


def use_attention(
    unet: UNet2DConditionModel, kind: str, device: torch.device, dtype: torch.dtype
) -> str:
    """Set the UNet's attention kernels and return what was set, with the reason where it is not
    what was asked.

    "sdpa" is PyTorch's own; "xformers" is tried on a small tensor first, forward and backward,
    since an installed xformers may have no kernel for this GPU, dtype or torch.
    """
    if kind == "sdpa":
        return "SDPA"
    try:
        import xformers.ops

        q = torch.randn(1, 64, 2, 64, device=device, dtype=dtype, requires_grad=True)
        xformers.ops.memory_efficient_attention(q, q, q).sum().backward()
        unet.enable_xformers_memory_efficient_attention()
        return "xFormers"
    except Exception as error:  # not installed, built for another torch, no kernel for this GPU
        return f"SDPA (xFormers is not usable here: {first_line(error)})"


def use_gradient_checkpointing(unet: UNet2DConditionModel, names: tuple[str, ...] = ()) -> None:
    """Keep only block inputs in the forward pass; compute the rest again in the backward pass.

    names: the modules of checkpointable() to do so in; none means all. Raises Refusal for others.
    """
    able = checkpointable(unet)
    if wrong := [name for name in names if name not in able]:
        remedy = "--no-memory-plan --gradient-checkpointing, which recomputes all of them"
        raise Refusal(f"checkpointed_blocks names {wrong[0]}", ", ".join(able), remedy)
    unet.enable_gradient_checkpointing(
        # No RNG state: nothing in SDXL's UNet is random, and to save it the host would wait for
        # the GPU.
        functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    )
    for name, module in able.items():
        module.gradient_checkpointing = not names or name in names


def checkpointable(unet: UNet2DConditionModel) -> dict[str, torch.nn.Module]:
    """The modules that can recompute their parts: diffusers marks them by a flag. A block does so
    with its resnets, a transformer with its layers.
    """
    return {
        name: module
        for name, module in unet.named_modules()
        if name and hasattr(module, "gradient_checkpointing")
    }


def predict(unet: UNet2DConditionModel, x_t: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The UNet's answer (B, C, H, W), fp32, to x_t (B, C, H, W) at timesteps batch["t"] (B,), under
    batch["context"] (B, T, D) and batch["pooled"] (B, P), cast to the UNet's dtype, and
    batch["time_ids"] (B, 6), which stay fp32, since the UNet embeds them itself.
    """
    dtype = next(unet.parameters()).dtype  # as unet.dtype, which looks through all modules
    condition = {"text_embeds": batch["pooled"].to(dtype), "time_ids": batch["time_ids"]}
    context = batch["context"].to(dtype)
    answer = unet(
        x_t.to(dtype), batch["t"], context, added_cond_kwargs=condition, return_dict=False
    )
    return answer[0].float()


# ---- prompts -------------------------------------------------------------------------------------


@dataclass
class TextEncoders:
    """Both CLIPs with their tokenizers. zero_unconditional: the model's
    force_zeros_for_empty_prompt; chunks: how many a prompt is cut into, T = 77 x chunks.
    """

    tokenizers: list[CLIPTokenizer]
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    zero_unconditional: bool
    chunks: int = 1


def load_text_encoders(
    name: str, device: torch.device, half: bool = False, max_tokens: int = 75
) -> TextEncoders:
    """Both text encoders on `device`, computing in fp32. half: read the fp16 files where there are
    some; max_tokens: 75 for each chunk of a prompt.
    """
    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    encoders = [load_encoder(cls, name, part, half, device) for part, cls in classes.items()]
    tokenizers = load_tokenizers(name)
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        vetting.check_tokenizer(name, tokenizer, encoder)
    return TextEncoders(tokenizers, tuple(encoders), zeros_for_empty_prompt(name), max_tokens // 75)


def load_tokenizers(name: str) -> list[CLIPTokenizer]:
    folders = [fetch(name, part) for part in ("tokenizer", "tokenizer_2")]
    with vetting.refused(f"{folders[0].parent} holds no CLIP tokenizers"):
        return [CLIPTokenizer.from_pretrained(folder) for folder in folders]


def too_long(prompts: list[str], tokenizer: CLIPTokenizer, chunks: int) -> list[str]:
    """Those of `prompts` that lose their end."""
    ids = tokenizer(prompts, add_special_tokens=False, verbose=False).input_ids if prompts else []
    room = chunks * (tokenizer.model_max_length - 2)  # each chunk has a begin and an end
    return [prompt for prompt, each in zip(prompts, ids, strict=True) if len(each) > room]


def tokens_of(prompts: list[str], tokenizer: CLIPTokenizer, chunks: int) -> Tensor:
    """(B x chunks, 77): each prompt's tokens cut into chunks of 75, each between its own begin and
    end, then padded. A short prompt's last chunks are empty; a long one's end is lost.
    """
    length, rows = tokenizer.model_max_length, []
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    for ids in tokenizer(prompts, add_special_tokens=False, verbose=False).input_ids:
        for at in range(0, chunks * (length - 2), length - 2):
            row = [begin, *ids[at : at + length - 2], end]
            rows.append(row + [pad] * (length - len(row)))
    return torch.tensor(rows)


@torch.no_grad()
def encode_prompts(prompts: list[str], text: TextEncoders) -> tuple[Tensor, Tensor]:
    """What StableDiffusionXLPipeline.encode_prompt gives: context (B, T, D) and pooled (B, P),
    fp32.

    The context is the penultimate hidden state of both encoders side by side; pooled is the
    second's projection. Of several chunks, each encoded by itself, the contexts follow one another,
    and pooled is the first's, as the programs that draw with long prompts have it:
    https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/5ad03e65/modules/sd_hijack_clip.py
    (TextConditionalModel.forward).
    """
    states = []
    for tokenizer, encoder in zip(text.tokenizers, text.encoders, strict=True):
        tokens = tokens_of(prompts, tokenizer, text.chunks).to(encoder.device)  # (B x chunks, 77)
        output = encoder(tokens, output_hidden_states=True)
        states.append(output.hidden_states[-2])  # (B x chunks, 77, 768), then (.., 1280)
    context = torch.cat(states, dim=-1)
    context = context.reshape(len(prompts), -1, context.shape[-1])  # (B, T, 2048)
    # The second encoder alone ends in a projection, so the last output is the one that has it.
    return context, output.text_embeds[:: text.chunks]  # (B, 1280)


def encode_unconditional(text: TextEncoders) -> tuple[Tensor, Tensor]:
    """The embedding that guidance moves away from, (1, T, D) and (1, P), exactly as the pipeline
    makes it: zeros where the model says force_zeros_for_empty_prompt (SDXL base does), else the
    encoded empty text.
    """
    context, pooled = encode_prompts([""], text)
    if text.zero_unconditional:
        return torch.zeros_like(context), torch.zeros_like(pooled)
    return context, pooled


# ---- pictures ------------------------------------------------------------------------------------


def load_vae(name: str, device: torch.device) -> AutoencoderKL:
    """The VAE in fp32: in fp16 its activations overflow and pictures turn black."""
    return load_encoder(AutoencoderKL, name, "vae", False, device)


@torch.no_grad()
def encode_images(pixels: Tensor, vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, 8H, 8W) in [-1, 1] to mean and std (B, C, H, W) of the VAE's posterior, fp32,
    not yet scaled.

    Both, not one sample: mean + std * eps with a fresh eps at every step is then what encoding at
    every step gives.
    """
    posterior = vae.encode(pixels.to(vae.device, torch.float32)).latent_dist  # 3 x 8H x 8W -> C H W
    return posterior.mean, posterior.std


def latent_scaling(name: str) -> tuple[float, float]:
    """(scaling_factor, shift_factor) of the VAE's config: x0 = (latent - shift) * scaling."""
    config = read_config(fetch(name, "vae") / "config.json", scaling_factor=None)
    return config["scaling_factor"], config.get("shift_factor") or 0.0


def add_time_ids(original_size: tuple, crop_top_left: tuple, target_size: tuple) -> Tensor:
    """SDXL's size conditioning (Podell et al. 2023, section 2.2): (6,) fp32, heights before widths.

    original_size: before resizing; crop_top_left: in the resized picture's frame; target_size: as
    trained. fp32 until the UNet embeds them: bf16 would turn 1365 into 1368.
    """
    return torch.tensor([*original_size, *crop_top_left, *target_size], dtype=torch.float32)


# ---- noise ---------------------------------------------------------------------------------------


@dataclass
class NoiseSchedule:
    """DDPM's forward process. alphas_cumprod: (1000,) fp32; prediction_type: "epsilon" or
    "v_prediction".
    """

    alphas_cumprod: Tensor
    prediction_type: str


def load_noise_schedule(
    name: str, device: torch.device, prediction_type: str = "auto", zero_snr: str = "auto"
) -> NoiseSchedule:
    """The schedule that the model's scheduler_config.json describes (Ho et al. 2020,
    https://arxiv.org/abs/2006.11239). prediction_type, zero_snr ("yes", "no"): overrule the file's
    where they are not "auto". Raises Refusal for another objective, and for missing or impossible
    betas.
    """
    config, *_ = vetting.noise_settings(name, prediction_type, zero_snr)
    start, end, steps = (config[k] for k in ("beta_start", "beta_end", "num_train_timesteps"))
    if config["beta_schedule"] == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float32)  # (1000,)
    else:  # scaled_linear, which is SDXL's: linear in the root
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    if config.get("rescale_betas_zero_snr"):
        betas = rescale_zero_terminal_snr(betas)
    return NoiseSchedule(torch.cumprod(1.0 - betas, dim=0).to(device), config["prediction_type"])


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas (1000,) such that the last timestep is pure noise (Lin et al. 2023,
    https://arxiv.org/abs/2305.08891, alg. 1).
    """
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))  # last to 0, first where it was
    alphas_cumprod = root**2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


def add_noise(x0: Tensor, noise: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise (Ho et al. 2020, eq. 4): (B, C, H, W) each, t
    (B,).
    """
    abar = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)  # (B,) -> (B, 1, 1, 1)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


def training_target(x0: Tensor, noise: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """What the UNet should answer: the noise, or v = sqrt(abar) noise - sqrt(1 - abar) x0 (Salimans
    & Ho 2022, https://arxiv.org/abs/2202.00512, appendix D). (B, C, H, W).
    """
    if schedule.prediction_type == "epsilon":
        return noise
    abar = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    return abar.sqrt() * noise - (1 - abar).sqrt() * x0


def snr_weight(t: Tensor, schedule: NoiseSchedule, gamma: float) -> Tensor | float:
    """Weights (B,): min(SNR, gamma) / SNR, and for v_prediction min(SNR, gamma) / (SNR + 1). gamma
    = 0 switches this off.

    Hang et al. 2023, https://arxiv.org/abs/2303.09556, section 3.4.
    """
    if not gamma:
        return 1.0
    abar = schedule.alphas_cumprod[t]
    snr = abar / (1 - abar)
    if schedule.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)  # finite at SNR 0, too
