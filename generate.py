"""From an adapter to pictures: the prompts are encoded, latents are sampled with the adapted UNet,
and the VAE decodes them.

`python generate.py runs/t4 --plain --prompts "a fox" --seeds 1 2` draws by these lines alone;
without --plain the same lines draw, and more is read and shown: kohya's files, 4-bit bases, the
sheet of --compare.

Letters: `T` tokens, `D` and `P` width of the context and of the pooled embedding, `C H W` latent.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from inputs.drawing import Options, check_base, complete, parse_or_leave
from inputs.files import Refusal, write_whole

if __name__ == "__main__":  # before torch, whose import takes seconds
    options = parse_or_leave()
    if not options.plain:
        from keep.command import draw

        sys.exit(draw(options))

import diffusers
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import lora
import model
from inputs import vetting


def load_pipeline(
    name: str, unet: torch.nn.Module, device: torch.device
) -> diffusers.StableDiffusionXLPipeline:
    """diffusers' SDXL pipeline around `unet`, with an fp32 VAE and the model's own sampler.

    It has no text encoders: prompts are encoded before, so that they and the UNet never share
    the memory. Raises Refusal where the model's files describe no sampler.
    """
    return diffusers.StableDiffusionXLPipeline(
        vae=model.load_vae(name, device),
        unet=unet,
        scheduler=vetting.load_sampler(name),
        add_watermarker=False,
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    )


@torch.no_grad()
def encode(
    name: str, prompts: Sequence[str], device: torch.device, half: bool
) -> list[dict[str, Tensor]]:
    """For each prompt the pipeline's four embedding arguments, the prompt's own and those that
    guidance leads away from: contexts (1, T, D), pooled (1, P), on the CPU. The encoders are freed.
    """
    text = model.load_text_encoders(name, device, half)
    nothing = model.encode_unconditional(text)
    embeddings = []
    for prompt in prompts:
        pairs = {"": model.encode_prompts([prompt], text), "negative_": nothing}
        for_pipe = {}
        for begin, (context, pooled) in pairs.items():
            for_pipe[f"{begin}prompt_embeds"] = context.cpu()
            for_pipe[f"{begin}pooled_prompt_embeds"] = pooled.cpu()
        embeddings.append(for_pipe)
    del text
    model.free_memory()
    return embeddings


@torch.no_grad()
def sample(
    pipe: diffusers.StableDiffusionXLPipeline,
    adapter: lora.Adapter,
    embeddings: list[dict[str, Tensor]],
    seeds: Sequence[int],
    strength: float,
    how: dict[str, float],
) -> list[Tensor]:
    """One latent (1, C, H, W), fp32 on the CPU, for each prompt and its seed, drawn with the
    adapter at `strength`, which is 1 again afterwards.

    how: the pipeline's height and width in pixels, num_inference_steps and guidance_scale.
    """
    pipe.set_progress_bar_config(disable=True)  # one bar for all pictures instead
    shape = [1, pipe.unet.config.in_channels]
    shape += [how["height"] // pipe.vae_scale_factor, how["width"] // pipe.vae_scale_factor]
    device, dtype = pipe.unet.device, pipe.unet.dtype
    lora.set_strength(adapter, strength)
    pairs, latents = list(zip(embeddings, seeds, strict=True)), []
    bar = tqdm(pairs, f"drawing at strength {strength:g}", mininterval=1, leave=False)
    for embedding, seed in bar:
        # The noise comes from the CPU in fp32, so that a seed means the same picture on every
        # device and dtype.
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        drawn = pipe(
            **{key: value.to(device, dtype) for key, value in embedding.items()},
            latents=noise.to(device, dtype),
            generator=torch.Generator().manual_seed(seed),  # for samplers that add noise as they go
            output_type="latent",
            **how,
        )
        latents.append(drawn.images.float().cpu())
    lora.set_strength(adapter, 1.0)
    return latents


@torch.no_grad()
def decode(
    vae: diffusers.AutoencoderKL, latents: list[Tensor], scaling: tuple[float, float]
) -> list[Image.Image]:
    """Latents (1, C, H, W) to pictures, in fp32 and one at a time; above 1024 px in tiles, since a
    whole one takes 5 GiB at 1024 px. Raises Refusal for a picture that is not finite.
    """
    factor, shift = scaling
    if latents[0].shape[-1] > 128:
        vae.enable_tiling()
    pictures = []
    for latent in latents:
        pixels = vae.decode(latent.to(vae.device) / factor + shift).sample  # (1, 3, 8H, 8W)
        if not pixels.isfinite().all():
            raise Refusal(
                "a picture came out as NaN or Inf",
                "finite pixels",
                "draw with --mixed-precision fp32, or with an earlier checkpoint's adapter",
            )
        pixels = (pixels[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)  # (8H, 8W, 3) in [0, 1]
        pixels = (pixels * 255).round().byte()
        pictures.append(Image.fromarray(pixels.cpu().numpy()))
    return pictures


def own_resolution(pipe: diffusers.StableDiffusionXLPipeline) -> int:
    """The picture size the model was made for, in pixels: 1024 for SDXL base."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


def targets_of(file: lora.AdapterFile) -> tuple[str, ...]:
    """Which of the usual targets the file adapts; its modules have dots or, in kohya's, none."""
    modules = [name.rpartition(".")[0].replace("_", ".") for name in file.matrices]
    return tuple(t for t in lora.TARGETS if any(m.endswith(t.replace("_", ".")) for m in modules))


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all, and print where it is."""
    png = io.BytesIO()
    picture.save(png, "PNG")
    write_whole(path, png.getvalue())
    print(path)


def save_pictures(options: Options, pictures: list[Image.Image], folder: Path) -> None:
    """Write each under its number, else prompts without letters from a to z would share a file."""
    for i, ((prompt, seed), picture) in enumerate(zip(options.pictures, pictures, strict=True)):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
        save_picture(picture, folder / f"{i:02d}-{slug}-{seed}-{options.strength:g}.png")


def draw_at(
    strengths: list[float],
    options: Options,
    file: lora.AdapterFile,
    load_unet: Callable = model.load_unet,
    load_adapter: Callable = lora.load,
    decode: Callable = decode,
) -> list[list[Image.Image]]:
    """For each strength a picture of every prompt and seed. options: as complete() gives them.

    Text encoders, UNet and VAE decoder are in memory one after the other. The last three arguments
    are what the command plugs in, to read more bases and files and to decode in less memory.
    """
    device = vetting.check_device(options.device)
    dtype, _ = model.choose_dtype(options.mixed_precision, device)
    half, name = dtype != torch.float32, options.pretrained_model_name_or_path
    check_base(options, file.path, file.about, half)
    prompts, seeds = zip(*options.pictures, strict=True)
    embeddings = encode(name, prompts, device, half)
    unet = load_unet(name, device, dtype)
    vetting.check_widths(unet, *list(embeddings[0].values())[:2])
    adapter = lora.inject(unet, targets_of(file) or lora.TARGETS, file.rank, file.alpha)
    load_adapter(adapter, file)
    unet.eval()  # what an edited layer does in training only, such as dropout, is not drawn
    pipe = load_pipeline(name, unet, device)
    side = options.resolution or own_resolution(pipe)
    how = {"num_inference_steps": options.num_inference_steps, "height": side, "width": side}
    how["guidance_scale"] = options.guidance_scale
    latents = [sample(pipe, adapter, embeddings, seeds, each, how) for each in strengths]
    vae = pipe.vae
    del unet, adapter, pipe  # their memory goes to the decoder, which needs about as much
    model.free_memory()
    return [decode(vae, each, model.latent_scaling(name)) for each in latents]


def draw_plain(options: Options) -> None:
    """Draw with a file in PEFT keys, by the lines of the book alone."""
    file = lora.read(options.adapter)
    options = complete(options, file.path, file.about)
    if options.base_quantization == "nf4":
        found, expected = "--plain with a base in 4 bits", "a base whose weights are whole"
        raise Refusal(found, expected, "--base-quantization none, or leave --plain out")
    (pictures,) = draw_at([options.strength], options, file)
    save_pictures(options, pictures, Path(options.output_dir or file.path.parent / "pictures"))


if __name__ == "__main__":
    try:
        draw_plain(options)
    except Refusal as refusal:
        sys.exit(f"error: {refusal}")
