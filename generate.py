"""From an adapter to pictures: the same prompts and seeds with it off and on, side by side.

`python generate.py runs/t4 --compare` draws the before/after picture of a run;
`python generate.py my.safetensors --prompts "a fox" --seeds 1 2` draws single pictures.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from inputs import options as configuration
from inputs.files import Refusal, first_line, write_whole


@dataclass(frozen=True)
class Options:
    """Draw with an adapter: a file in PEFT or kohya keys, or the folder of a run."""

    # Adapter file or run folder; empty takes the newest under runs/.
    adapter: tyro.conf.Positional[str] = ""
    # What to draw; empty takes the prompts of the recipe that trained the adapter.
    prompts: tuple[str, ...] = ()
    # One picture of every prompt for each seed.
    seeds: tuple[int, ...] = (0,)
    # How much of the adapter acts, 0 to 1.
    strength: float = 1.0
    # One picture that shows every prompt with the adapter off (above) and on (below).
    compare: bool = False
    # Where pictures go; empty means beside the adapter.
    output_dir: str = ""
    # Side in pixels, a multiple of 8; 0 is the model's own size.
    resolution: int = 0
    # Denoising steps.
    num_inference_steps: int = 30
    # How strongly pictures follow their prompt; negative takes the recipe's.
    guidance_scale: float = -1.0
    # The base model; empty takes the one that the adapter's header names.
    pretrained_model_name_or_path: str = ""
    # Draw even though the adapter was trained on another base.
    any_base: bool = False
    # auto, cpu or cuda.
    device: str = "auto"
    # The UNet's dtype: auto, fp32, fp16 or bf16.
    mixed_precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    # The UNet's Linear weights: nf4 is 4 bits; auto takes what the adapter was trained on.
    base_quantization: Literal["auto", "none", "nf4"] = "auto"
    # Where the 4-bit numbers of a base are kept; empty takes the run's.
    cache_dir: str = ""


def parse(argv: list[str] | None = None) -> Options:
    """The command line as checked Options; a Refusal names the first value that cannot be."""
    options = tyro.cli(Options, args=argv, prog="generate.py")
    refusals = {
        "resolution": (
            options.resolution % 8 or not 0 <= options.resolution <= 4096,
            "a multiple of 8 up to 4096",
            "1024",
        ),
        "num_inference_steps": (not 1 <= options.num_inference_steps <= 1000, "1 to 1000", "30"),
        "seeds": (not options.seeds or not all(0 <= s < 2**63 for s in options.seeds), "0 up", "0"),
        "strength": (not -10 <= options.strength <= 10, "usually 0 to 1", "1"),
        "guidance_scale": (not -100 <= options.guidance_scale <= 100, "up to 100", "5"),
    }
    configuration.check_texts(options)
    for name, (wrong, expected, remedy) in refusals.items():
        if wrong:
            option = f"--{name.replace('_', '-')} {remedy}"
            raise Refusal(f"{name} is {getattr(options, name)}", expected, option)
    return options


if __name__ == "__main__":  # a wrong option is answered before twelve seconds of imports
    try:
        parse()
    except Refusal as refusal:
        sys.exit(f"error: {refusal}")

import diffusers  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

import lora  # noqa: E402
import model  # noqa: E402
from fast import nf4  # noqa: E402
from inputs import hub, vetting  # noqa: E402


def load_pipeline(
    name: str, unet: torch.nn.Module, device: torch.device
) -> diffusers.StableDiffusionXLPipeline:
    """diffusers' SDXL pipeline around `unet`, with an fp32 VAE and the model's own sampler.

    It has no text encoders: prompts are encoded before, so that they and the UNet never share
    the memory.
    """
    folder, index = hub.fetch(name, "scheduler"), hub.fetch(name, "") / "model_index.json"
    with vetting.refused(f"{folder} describes no sampler"):
        scheduler = vetting.scheduler_class(index).from_pretrained(folder)
    return diffusers.StableDiffusionXLPipeline(
        vae=model.load_vae(name, device),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )


@torch.no_grad()
def encode(
    name: str, prompts: list[str], device: torch.device, half: bool
) -> list[dict[str, Tensor]]:
    """For each prompt the pipeline's four embedding arguments, on the CPU; the encoders are freed
    again.
    """
    text = model.load_text_encoders(name, device, half)
    empty, empty_pooled = model.encode_unconditional(text)
    embeddings = []
    for prompt in prompts:
        context, pooled = model.encode_prompts([prompt], text)  # (1, T, D), (1, P)
        embeddings.append(
            {
                "prompt_embeds": context.cpu(),
                "pooled_prompt_embeds": pooled.cpu(),
                "negative_prompt_embeds": empty.cpu(),
                "negative_pooled_prompt_embeds": empty_pooled.cpu(),
            }
        )
    del text
    model.free_memory()
    return embeddings


@torch.no_grad()
def sample(
    pipe: diffusers.StableDiffusionXLPipeline,
    adapter: lora.Adapter,
    embeddings: list[dict[str, Tensor]],
    seeds: list[int],
    strength: float,
    resolution: int,
    num_inference_steps: int,
    guidance_scale: float,
) -> list[Tensor]:
    """One latent (1, C, H, W) for each prompt and its seed, drawn with the adapter at `strength`.

    The starting noise comes from the CPU in fp32, so that a seed means the same picture on every
    device and dtype.
    """
    pipe.set_progress_bar_config(disable=True)
    channels, side = pipe.unet.config.in_channels, resolution // pipe.vae_scale_factor
    device, dtype = pipe.unet.device, pipe.unet.dtype
    latents = []
    lora.set_strength(adapter, strength)
    for embedding, seed in tqdm(
        list(zip(embeddings, seeds, strict=True)),
        desc=f"drawing at strength {strength:g}",
        mininterval=1,
        leave=False,
    ):
        noise = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(seed))
        latents.append(
            pipe(
                **{key: value.to(device, dtype) for key, value in embedding.items()},
                latents=noise.to(device, dtype),
                generator=torch.Generator().manual_seed(seed),
                height=resolution,
                width=resolution,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                output_type="latent",
            )
            .images.float()
            .cpu()
        )
    lora.set_strength(adapter, 1.0)
    return latents


def use_small_tiles(vae: diffusers.AutoencoderKL, side: int) -> None:
    """Have `vae` decode latents `side` wide by overlapping tiles of half that: a quarter of the
    memory.
    """
    print("a whole picture does not fit this GPU's memory: decoding in tiles", flush=True)
    model.free_memory()
    scale = vae.tile_sample_min_size // vae.tile_latent_min_size
    vae.use_tiling, vae.tile_latent_min_size = True, side // 2
    vae.tile_sample_min_size = scale * vae.tile_latent_min_size


@torch.no_grad()
def decode(
    vae: diffusers.AutoencoderKL, latents: list[Tensor], scaling: tuple[float, float]
) -> list[Image.Image]:
    """Latents to pictures, in fp32 and one at a time; above 1024 px, and where a whole one does not
    fit the GPU (5 GiB at 1024 px), in tiles.
    """
    factor, shift = scaling
    vae.use_tiling = latents[0].shape[-1] > 128
    pictures = []
    for latent in latents:
        scaled = latent.to(vae.device) / factor + shift
        try:
            pixels = vae.decode(scaled).sample  # (1, 3, 8H, 8W)
        except torch.cuda.OutOfMemoryError:
            pixels = None  # again below, where the error no longer holds what filled the memory
        if pixels is None:
            use_small_tiles(vae, scaled.shape[-1])
            pixels = vae.decode(scaled).sample
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


def grid(rows: dict[str, list[Image.Image]], titles: list[str]) -> Image.Image:
    """A picture of pictures: a row for each label, a column for each title."""
    side = max(next(iter(rows.values()))[0].size)
    size = max(11, side // 22)
    font = ImageFont.load_default(size)
    margin = int(size * 1.5)
    lines = [wrap(title, font, side - size) for title in titles]
    head = int(size * 1.3) * max(len(each) for each in lines) + size // 2
    left = margin + int(max(font.getlength(label) for label in rows))
    sheet = Image.new(
        "RGB", (left + margin // 2 + side * len(titles), head + side * len(rows)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for column, each in enumerate(lines):
        pen.multiline_text(
            (left + side * column + size // 2, 2), "\n".join(each), fill="black", font=font
        )
    for row, (label, pictures) in enumerate(rows.items()):
        middle = head + side * row + side // 2
        pen.text((margin // 3, middle), label, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (left + side * column, head + side * row))
    return sheet


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """`text` in at most three lines that are no wider than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines[:3]


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    png = io.BytesIO()
    picture.save(png, "PNG")
    write_whole(path, png.getvalue())


def own_resolution(pipe: diffusers.StableDiffusionXLPipeline) -> int:
    """The picture size the model was made for, in pixels: 1024 for SDXL base."""
    size = pipe.unet.config.sample_size
    if type(size) is not int or not 8 <= size * pipe.vae_scale_factor <= 4096:
        found = f"the UNet's config.json has a sample_size of {size!r:.50}"
        raise Refusal(found, "a size in latents, such as 128", "--resolution 1024")
    return size * pipe.vae_scale_factor


# ---- the command ---------------------------------------------------------------------------------


def find_adapter(path: str) -> Path:
    """The adapter file that `path` names, or the newest run's."""
    if path:
        file = Path(path) / lora.FILE_NAME if Path(path).is_dir() else Path(path)
        if file.exists():
            return file
        raise Refusal(
            f"{file}: no such file",
            "an adapter, or the folder of a finished run",
            "check the name; the command that began a run finishes it",
        )
    found = sorted(Path("runs").glob(f"*/{lora.FILE_NAME}"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise Refusal(
            "there is no finished run under runs/",
            "an adapter",
            "make train, or name an adapter file",
        )
    return found[-1]


def find_base(options: Options, file: lora.AdapterFile, half: bool) -> str:
    """The name of the base model to draw with. Raises Refusal where it is not the adapter's own."""
    name = options.pretrained_model_name_or_path or of_run(
        file.path, "pretrained_model_name_or_path"
    )
    name = name or file.about.get("base_model", "")
    if not name:
        raise Refusal(
            f"{file.path} does not say which base it was trained on",
            "an SDXL model to put it on",
            "--pretrained-model-name-or-path stabilityai/stable-diffusion-xl-base-1.0",
        )
    trained_on, here = file.about.get("base_fingerprint"), hub.unet_fingerprint(name, half)
    if trained_on not in (None, here) and not options.any_base:
        raise Refusal(
            f"{file.path} was trained on {file.about.get('base_model')} ({trained_on}), and "
            f"{name} is {here}",
            "the base that the adapter was trained on",
            "--pretrained-model-name-or-path BASE, or --any-base to draw all the same",
        )
    return name


def load_base(
    options: Options,
    file: lora.AdapterFile,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.nn.Module:
    """The UNet, quantised as the options say or else as the adapter's own base was."""
    said = file.about.get("base_quantization", "none")
    if (said if options.base_quantization == "auto" else options.base_quantization) == "nf4":
        cache_dir = options.cache_dir or of_run(file.path, "cache_dir") or "cache"
        return nf4.load_unet_nf4(name, device, dtype, Path(cache_dir))
    return model.load_unet(name, device, dtype)


def of_run(path: Path, option: str) -> str:
    """An option as the config.json of the run around `path` has it, or nothing."""
    for folder in list(path.resolve().parents)[:3]:  # OUT/, OUT/kohya/, OUT/checkpoints/000200/
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            value = json.loads((folder / "config.json").read_text())[option]
            if isinstance(value, str) or is_texts(value):
                return value
    return ""


def is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def targets_of(file: lora.AdapterFile) -> tuple[str, ...]:
    """Which of the usual targets the file adapts."""
    modules = [module.replace("_", ".") for module in file.matrices]
    return tuple(t for t in lora.TARGETS if any(m.endswith(t.replace("_", ".")) for m in modules))


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0 drawn, 1 refused (said on stderr), 130 interrupted."""
    try:
        run(parse(argv))
        return 0
    except Refusal as refusal:
        said = f"error: {refusal}"
    except torch.cuda.OutOfMemoryError as error:
        said = (
            f"error: the GPU's memory is full ({first_line(error)}). What to do: --resolution 512"
        )
    except OSError as error:
        said = f"error: {error}. What to do: mend that, then the same command"
    except KeyboardInterrupt:
        print("\ninterrupted: pictures drawn so far are not kept", file=sys.stderr)
        return 130
    print(said, file=sys.stderr)
    return 1


def run(options: Options) -> None:
    """Encode the prompts, sample with the UNet, decode with the VAE: one in memory at a time."""
    device = model.check_device(options.device)
    dtype, _ = model.choose_dtype(options.mixed_precision, device)
    half = dtype != torch.float32
    path = find_adapter(options.adapter)
    file = lora.read(path)
    recipe = configuration.RECIPES.get(file.about.get("recipe"), configuration.RECIPES["t4"])[1]
    prompts = options.prompts or of_run(path, "validation_prompts") or recipe.validation_prompts
    guidance = recipe.guidance_scale if options.guidance_scale < 0 else options.guidance_scale
    pairs = [(prompt, seed) for prompt in prompts for seed in options.seeds]
    name = find_base(options, file, half)

    embeddings = encode(name, [prompt for prompt, _ in pairs], device, half)
    unet = load_base(options, file, name, device, dtype)
    vetting.check_widths(unet, *list(embeddings[0].values())[:2])
    adapter = lora.inject(unet, targets_of(file) or lora.TARGETS, file.rank, file.alpha)
    lora.load(adapter, path)
    pipe = load_pipeline(name, unet, device)
    settings = (options.resolution or own_resolution(pipe), options.num_inference_steps, guidance)
    seeds = [seed for _, seed in pairs]
    strengths = {"before": 0.0, "after": 1.0} if options.compare else {"": options.strength}
    latents = {
        label: sample(pipe, adapter, embeddings, seeds, strength, *settings)
        for label, strength in strengths.items()
    }
    vae, scaling = pipe.vae, model.latent_scaling(name)
    del unet, adapter, pipe  # their memory goes to the VAE, whose decoder needs about as much
    model.free_memory()
    pictures = {label: decode(vae, each, scaling) for label, each in latents.items()}

    folder = Path(options.output_dir) if options.output_dir else path.parent / "pictures"
    if options.compare:
        drawn = {folder / "before-after.png": grid(pictures, [prompt for prompt, _ in pairs])}
    else:
        slugs = [re.sub(r"[^a-z0-9]+", "-", p.lower()).strip("-")[:60] for p, _ in pairs]
        drawn = {
            folder / f"{i:02d}-{slug}-{seed}-{options.strength:g}.png": picture
            for i, (slug, seed, picture) in enumerate(zip(slugs, seeds, pictures[""], strict=True))
        }
    for target, picture in drawn.items():
        save_picture(picture, target)
        print(target)


if __name__ == "__main__":
    sys.exit(main())
