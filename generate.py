"""From an adapter to pictures: the prompts are encoded, latents are sampled with the adapted UNet,
and the VAE decodes them.

`python generate.py runs/t4 --plain --prompts "a fox" --seeds 1 2` draws by these lines alone;
without --plain the same lines draw, and more is read and shown: kohya's files, 4-bit bases, the
sheet of --compare.

Letters: `T` tokens, `D` and `P` width of the context and of the pooled embedding, `C H W` latent.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path

from inputs.drawing import Options, check_base, complete, parse_or_leave
from inputs.files import Refusal, write_whole
from inputs.progress import progress

if __name__ == "__main__":  # before torch, whose import takes seconds
    options = parse_or_leave()
    if not options.plain:
        from keep.command import draw

        sys.exit(draw(options))

import diffusers
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

import lora
import model
from inputs import drawing, vetting


@torch.no_grad()
def encode(
    name: str,
    prompts: Sequence[str],
    negative_prompts: Sequence[str],
    device: torch.device,
    half: bool,
    max_tokens: int = 75,
) -> list[dict[str, Tensor]]:
    """For each prompt its "context" (2, T, D) and "pooled" (2, P), on the CPU. Row 0 is what
    guidance leads away from, its negative prompt or, if that is empty, the model's own
    unconditional embedding; row 1 is the prompt's. The encoders are freed, so that they and the
    UNet never share the memory.
    """
    text = model.load_text_encoders(name, device, half, max_tokens)
    told = list(dict.fromkeys([*prompts, *negative_prompts]))
    if cut := model.too_long(told, text.tokenizers[0], text.chunks):
        most = text.chunks * (text.tokenizers[0].model_max_length - 2)
        print(f"{len(cut)} prompts lose their end, beyond {most} tokens, such as {cut[0][:60]!r}")
    embeddings, away = [], {"": model.encode_unconditional(text)}
    away |= {each: model.encode_prompts([each], text) for each in {*negative_prompts} - {""}}
    for prompt, negative in zip(prompts, negative_prompts, strict=True):
        pairs = zip(away[negative], model.encode_prompts([prompt], text), strict=True)
        context, pooled = (torch.cat(pair).cpu() for pair in pairs)
        embeddings.append({"context": context, "pooled": pooled})
    del text
    model.free_memory()
    return embeddings


@torch.no_grad()
def sample(
    unet: torch.nn.Module,
    sampler: diffusers.SchedulerMixin,
    embedding: dict[str, Tensor],
    seed: int,
    size: tuple[int, int],
    steps: int,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
) -> Tensor:
    """One latent (1, C, H, W), fp32: the noise of `seed`, denoised in `steps` steps under one of
    encode()'s embeddings, as StableDiffusionXLPipeline does. sampler: diffusers calls it scheduler.

    size: (H, W). guidance_scale: of classifier-free guidance, 1 + w of Ho & Salimans (2022,
    https://arxiv.org/abs/2207.12598, eq. 6), the README's w; at 1 or less there is none.
    guidance_rescale: how much of the contrast that guidance adds is taken back (Lin et al. 2023,
    https://arxiv.org/abs/2305.08891, eq. 15 and 16).
    """
    device, guided = unet.device, guidance_scale > 1
    # One generator for the first noise and for noise that a sampler adds later; on the CPU and in
    # fp32, so that a seed means the same noise on every device and in every dtype.
    generator = torch.Generator().manual_seed(seed)
    more = {"generator": generator} if "generator" in signature(sampler.step).parameters else {}
    pixels = (8 * size[0], 8 * size[1])  # asked for: a picture that was never larger, nor cropped
    batch = embedding | {"time_ids": model.add_time_ids(pixels, (0, 0), pixels).expand(2, 6)}
    batch = {key: value[0 if guided else 1 :].to(device) for key, value in batch.items()}
    sampler.set_timesteps(steps, device=device)
    x = torch.randn(1, unet.config.in_channels, *size, generator=generator).to(device)
    x = x * sampler.init_noise_sigma  # Euler's noise is larger than 1: 11.5 in 30 steps of SDXL
    for t in sampler.timesteps:
        # The same x for both rows, as large as the UNet was trained on: Euler's x / sqrt(s^2 + 1).
        x_t = sampler.scale_model_input(torch.cat([x] * (1 + guided)), t)  # (2 or 1, C, H, W)
        answer = model.predict(unet, x_t, batch | {"t": t.expand(len(x_t))})
        if guided:
            away, towards = answer.chunk(2)
            answer = away + guidance_scale * (towards - away)  # beyond the prompt's own answer
            if guidance_rescale > 0:
                calm = answer * (towards.std() / answer.std())  # as varied as the prompt's own
                answer = guidance_rescale * calm + (1 - guidance_rescale) * answer
        x = sampler.step(answer, t, x, **more).prev_sample  # to the next lower noise
    return x


@torch.no_grad()
def decode(
    vae: diffusers.AutoencoderKL, latents: list[Tensor], scaling: tuple[float, float]
) -> list[Image.Image]:
    """Latents (1, C, H, W) to pictures, in fp32 and one at a time; above 1024 px in tiles, since a
    whole one takes 5 GiB at 1024 px. Raises Refusal for a picture that is not finite.
    """
    factor, shift = scaling
    if max(latents[0].shape) > 128:
        vae.enable_tiling()
    pictures = []
    for latent in latents:
        pixels = vae.decode(latent.to(vae.device) / factor + shift).sample  # (1, 3, 8H, 8W)
        if not pixels.isfinite().all():
            remedy = "draw with --mixed-precision fp32, or with an earlier checkpoint's adapter"
            raise Refusal("a picture came out as NaN or Inf", "finite pixels", remedy)
        pixels = (pixels[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)  # (8H, 8W, 3) in [0, 1]
        pictures.append(Image.fromarray((pixels * 255).round().byte().cpu().numpy()))
    return pictures


def targets_of(file: lora.AdapterFile) -> tuple[str, ...]:
    """Which of the usual targets the file adapts. Modules have dots or, in kohya's, underscores."""
    modules = [name.rpartition(".")[0].replace("_", ".") for name in file.matrices]
    return tuple(t for t in lora.TARGETS if any(m.endswith(t.replace("_", ".")) for m in modules))


def png_bytes(picture: Image.Image, parameters: str) -> bytes:
    """A PNG that says how it was drawn."""
    png, said = io.BytesIO(), PngImagePlugin.PngInfo()
    said.add_text("parameters", parameters)
    picture.save(png, "PNG", pnginfo=said)
    return png.getvalue()


def save_picture(picture: Image.Image, path: Path, parameters: str) -> None:
    """Write it, whole or not at all, and print where: at `path`, or beside another picture of that
    name.
    """
    path = drawing.free_path(path, png := png_bytes(picture, parameters))
    write_whole(path, png)
    print(path)


def save_pictures(options: Options, pictures: list[Image.Image], folder: Path) -> None:
    """Write each under its number, prompt, seed and strength."""
    how = drawing.how_drawn(options)
    for i, (drawn, picture) in enumerate(zip(options.pictures, pictures, strict=True)):
        path = folder / drawing.file_name(i, *drawn, options.strength)
        save_picture(picture, path, drawing.parameters(options, [drawn], picture.size, how))


def draw_at(
    rows: dict[str, tuple[lora.AdapterFile, float]],
    options: Options,
    load_unet: Callable = model.load_unet,
    load_adapter: Callable = lora.load,
    decode: Callable = decode,
    inject: Callable = lora.inject,
) -> list[list[Image.Image]]:
    """For each of `rows`, by its name an adapter's file and its strength, a picture of every prompt
    and seed; the files are of one rank and alpha. options: as complete() gives them.

    Text encoders, UNet and VAE are in memory one after another. The last four arguments
    are what the command plugs in, to read more bases and files and to decode in less memory.
    """
    device, steps = vetting.check_device(options.device), options.num_inference_steps
    dtype, _ = model.choose_dtype(options.mixed_precision, device)
    half, name = dtype != torch.float32, options.pretrained_model_name_or_path
    for file, _ in rows.values():
        check_base(options, file.path, file.about, half)
    sampler = vetting.load_sampler(name, options.scheduler, steps, *options.noise)
    prompts, seeds = zip(*options.pictures, strict=True)
    away = [options.negative_prompt] * len(prompts)
    embeddings = encode(name, prompts, away, device, half, options.max_tokens)
    unet = load_unet(name, device, dtype)
    vetting.check_widths(unet, *embeddings[0].values())
    # The last file's layers, rank and alpha: all have the same.
    adapter = inject(unet, targets_of(file) or lora.TARGETS, file.rank, file.alpha)
    unet.eval()  # what an edited layer does in training only, such as dropout, is not drawn
    side = options.resolution // 8 or unet.config.sample_size  # the size the model was made for
    size = (options.height // 8 or side, options.width // 8 or side)
    how = (size, steps, options.guidance_scale, options.guidance_rescale)
    drawn = []
    for row, (file, strength) in rows.items():
        load_adapter(adapter, file)
        lora.set_strength(adapter, strength)
        bar = progress(list(zip(embeddings, seeds, strict=True)), f"drawing {row}".strip())
        drawn.append([sample(unet, sampler, *pair, *how).cpu() for pair in bar])
    del unet, adapter  # their memory goes to the decoder, which needs about as much
    model.free_memory()
    vae = model.load_vae(name, device)
    return [decode(vae, latents, model.latent_scaling(name)) for latents in drawn]


def draw_plain(options: Options) -> None:
    """Draw with a file in PEFT keys, by the lines of the book alone."""
    file = lora.read(options.adapter)
    options = complete(options, file.path, file.about)
    if options.base_quantization == "nf4":
        found, expected = "--plain with a base in 4 bits", "a base whose weights are whole"
        raise Refusal(found, expected, "--base-quantization none, or leave --plain out")
    folder = Path(options.output_dir or file.path.parent / "pictures")
    # Before drawing: what cannot be written costs nothing.
    folder.mkdir(parents=True, exist_ok=True)
    save_pictures(options, *draw_at({"": (file, options.strength)}, options), folder)


if __name__ == "__main__":
    try:
        draw_plain(options)
    except (Refusal, OSError) as error:
        sys.exit(f"error: {error}")
