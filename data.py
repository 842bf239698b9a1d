"""From captioned pictures to the batch of optimizer step s.

Whatever the frozen encoders give for a picture or a caption is the same at every step, so it is
computed once and kept on disk. Whatever is random about example number i of a run is drawn from
(seed, i) alone, so a run needs no data-loader state to be continued, and its batches do not depend
on how they are cut up.

Letters: `R` training resolution in pixels, `F` views of a picture (2 with flips, else 1), `B C H W
T D P` as in model.py.
"""

import functools
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import model
from files import Refusal, digest, open_safetensors, safetensors_bytes, sweep_parts, write_whole
from sources import Picture

BLOCK = 16  # pictures or captions in one cache file: written whole or not at all
LONGEST_SIDE = 20  # times the short one; a 1 x 60000 picture would be resized to gigabytes
# What a random stream is for. Never 0: numpy's SeedSequence takes [a, b, 0] for [a, b].
EXAMPLE, EPOCH, CROP = 1, 2, 3

# ---- one picture ---------------------------------------------------------------------------------


def decode(picture: Picture) -> Image.Image:
    """The picture upright (EXIF) and in RGB, transparency onto white. Raises Refusal, naming it, if
    it is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(picture.read()))
            image.load()
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits: Pillow's convert would clip at 255
            image = Image.fromarray(
                (np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8)
            )
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if max(image.size) > LONGEST_SIDE * min(image.size):
            raise ValueError(
                f"{image.width} x {image.height} pixels: longer than {LONGEST_SIDE} times its "
                "short side"
            )
        return image
    except Exception as error:  # Pillow raises nearly every class for damaged files
        raise Refusal(
            f"picture {picture.name} cannot be read ({type(error).__name__}: {error})",
            f"a whole picture of at most {Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels that "
            "Pillow can open",
            "replace or remove it; what is encoded already is kept",
        ) from error


def prepare(
    picture: Picture, resolution: int, random_crop: bool, seed: int, flip: bool
) -> tuple[Tensor, Tensor]:
    """Pixels (3, R, R) in [-1, 1] and time ids (6,) of one view.

    Resize the short side to R (Lanczos), cut R x R from the middle or from where (seed, picture)
    says, flip. The crop offset is in the resized picture's frame; a flipped view is a crop of the
    flipped picture, whose left edge lies where the right edge was.
    """
    image = decode(picture)
    original = (image.height, image.width)
    image = TF.resize(image, [resolution], interpolation=TF.InterpolationMode.LANCZOS)
    spare = (image.height - resolution, image.width - resolution)
    top, left = spare[0] // 2, spare[1] // 2
    if random_crop:
        stream = np.random.default_rng([seed, int(picture.digest[:8], 16), CROP])
        top, left = (int(stream.integers(0, room + 1)) for room in spare)
    pixels = TF.to_dtype(
        TF.to_image(TF.crop(image, top, left, resolution, resolution)), torch.float32, scale=True
    )
    if flip:
        pixels, left = TF.horizontal_flip(pixels), spare[1] - left
    pixels = TF.normalize(pixels, [0.5] * 3, [0.5] * 3)  # [0, 1] -> [-1, 1]
    return torch.Tensor(pixels), model.add_time_ids(original, (top, left), (resolution, resolution))


def check_pictures(pictures: list[Picture]) -> None:
    """Decode every picture, so that all damaged ones are named at once, not one a run."""
    refusals = []
    for picture in tqdm(pictures, desc="checking pictures", leave=False, mininterval=1):
        try:
            decode(picture)
        except Refusal as refusal:
            refusals.append(refusal)
    if len(refusals) > 1:
        raise Refusal(
            "; ".join(str(r).partition("; expected")[0] for r in refusals[:10])
            + (f"; and {len(refusals) - 10} more" if len(refusals) > 10 else ""),
            "whole pictures that Pillow can open",
            "replace or remove them",
        )
    if refusals:
        raise refusals[0]


# ---- encoded once, or at every step --------------------------------------------------------------


class Encoder:
    """Encodes at every call: the reference, and what --no-cache trains from.

    Index len(pictures) of prompt() is the unconditional embedding. The VAE ("vae") and the text
    encoders ("text") are loaded when they are first needed, and stay until free().
    """

    def __init__(
        self,
        pictures: list[Picture],
        load_vae: Callable,
        load_text: Callable,
        resolution: int,
        random_crop: bool,
        seed: int,
    ):
        self.pictures, self.load_vae, self.load_text = pictures, load_vae, load_text
        self.crop = (resolution, random_crop, seed)

    vae = functools.cached_property(lambda self: self.load_vae())
    text = functools.cached_property(lambda self: self.load_text())

    def free(self, part: str) -> None:
        self.__dict__.pop(part, None)  # where cached_property keeps it
        model.free_memory()

    def latent(self, index: int, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
        """mean, std (C, H, W) of the picture's posterior and time ids (6,), fp32."""
        pixels, time_ids = prepare(self.pictures[index], *self.crop, flip)
        # one at a time: the bits of a VAE's answer depend on the batch that a picture is in
        mean, std = model.encode_images(pixels[None], self.vae)
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise Refusal(
                f"the VAE gives NaN or Inf for picture {self.pictures[index].name}",
                "finite latents",
                "look at the picture; with a VAE of your own, check that its fp32 weights are "
                "finite",
            )
        return mean[0].cpu(), std[0].cpu(), time_ids

    def prompt(self, index: int) -> tuple[Tensor, Tensor]:
        """context (T, D) and pooled (P,) of a picture's caption, fp32; unconditional where there is
        no caption.
        """
        caption = self.pictures[index].caption.strip() if index < len(self.pictures) else ""
        context, pooled = (
            model.encode_prompts([caption], self.text)
            if caption
            else model.encode_unconditional(self.text)
        )
        if not (context.isfinite().all() and pooled.isfinite().all()):
            raise Refusal(
                f"the text encoders give NaN or Inf for {caption!r}",
                "finite numbers",
                "check their weights",
            )
        return context[0].cpu(), pooled[0].cpu()


class Cache:
    """The same two methods, read from disk; fill() must have run."""

    def __init__(self, latents: list[Path], prompts: list[Path]):
        self.latents, self.prompts = latents, prompts

    @staticmethod
    @functools.lru_cache(maxsize=128)
    def open(path: Path):
        return open_safetensors(path)

    def row(self, files: list[Path], index: int, key: str) -> Tensor:
        return self.open(files[index // BLOCK]).get_slice(key)[index % BLOCK]

    def latent(self, index: int, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
        mean, std, time_ids = (
            self.row(self.latents, index, k)[int(flip)] for k in ("mean", "std", "time_ids")
        )
        return mean, std, time_ids

    def prompt(self, index: int) -> tuple[Tensor, Tensor]:
        return self.row(self.prompts, index, "context"), self.row(self.prompts, index, "pooled")


def fill(
    folder: Path, kind: str, keys: list[str], encode: Callable[[int], dict[str, Tensor]]
) -> list[Path]:
    """One file for each BLOCK of keys, encoding only the blocks that are not on disk yet.

    keys: what each row depends on (content, encoder, resolution); a block's file is named by its
    keys, so changed data or encoders give other files and nothing stale is ever read. Returns the
    files in order.
    """
    blocks = [range(at, min(at + BLOCK, len(keys))) for at in range(0, len(keys), BLOCK)]
    files = [folder / f"{kind}-{digest(*(keys[i] for i in block))}.safetensors" for block in blocks]
    todo = [(file, block) for file, block in zip(files, blocks, strict=True) if not file.is_file()]
    if todo:
        sweep_parts(folder)
        with tqdm(
            total=sum(len(b) for _, b in todo), desc=f"encoding {kind}s", unit="", mininterval=1
        ) as bar:
            for file, block in todo:
                rows = []
                for i in block:
                    rows.append(encode(i))
                    bar.update()
                stacked = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
                write_whole(file, safetensors_bytes(stacked, {"kind": kind}))
    return files


def fill_cache(
    folder: Path,
    encoder: Encoder,
    random_flip: bool,
    dtype: torch.dtype,
    prints: dict[str, str],
) -> Cache:
    """Encode what is not on disk yet, captions first, each encoder freed when it is done.

    dtype: the UNet's, in which contexts are kept: they would be rounded to it in the step anyway.
    prints: the fingerprints of "vae" and "text", part of every key.
    """
    views = (False, True) if random_flip else (False,)

    def encode_prompt(i: int) -> dict[str, Tensor]:
        context, pooled = encoder.prompt(i)
        return {"context": context.to(dtype), "pooled": pooled.to(dtype)}

    def encode_latent(i: int) -> dict[str, Tensor]:
        each = [encoder.latent(i, flip) for flip in views]
        return {
            key: torch.stack(part)
            for key, part in zip(("mean", "std", "time_ids"), zip(*each, strict=True), strict=True)
        }

    captions = [p.caption.strip() for p in encoder.pictures] + [""]
    prompt_keys = [digest(caption, prints["text"], str(dtype)) for caption in captions]
    resolution, random_crop, seed = encoder.crop
    crop = f"{resolution} {f'random {seed}' if random_crop else 'centre'} {views}"
    latent_keys = [digest(p.digest, prints["vae"], crop) for p in encoder.pictures]
    prompts = fill(folder, "prompt", prompt_keys, encode_prompt)
    encoder.free("text")
    try:
        latents = fill(folder, "latent", latent_keys, encode_latent)
    except Refusal:
        check_pictures(encoder.pictures)  # name every damaged picture, not the first alone
        raise
    encoder.free("vae")
    return Cache(latents, prompts)


# ---- what example i of the run is ----------------------------------------------------------------


@dataclass
class Example:
    """Everything random about one example of the run. eps and noise: (C, H, W) fp32."""

    picture: int
    flip: bool
    drop_caption: bool
    t: int
    eps: Tensor
    noise: Tensor


def offset_noise(noise: np.ndarray, stream: np.random.Generator, amount: float) -> np.ndarray:
    """noise (C, H, W) plus `amount` times one normal number a channel, so that a picture's mean is
    learned, too (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
    """
    return noise + np.float32(amount) * stream.standard_normal((len(noise), 1, 1), dtype=np.float32)


class Examples:
    """The run's examples, by number; an epoch shows every picture once, in an order of its own."""

    def __init__(
        self,
        source: Encoder | Cache,
        names: list[str],
        seed: int,
        random_flip: bool,
        caption_dropout: float,
        noise_offset: float,
        timesteps: int,
        latent_shape: tuple[int, int, int],
    ):
        self.source, self.names, self.count, self.seed = source, names, len(names), seed
        self.random_flip, self.caption_dropout = random_flip, caption_dropout
        self.noise_offset, self.timesteps, self.latent_shape = noise_offset, timesteps, latent_shape
        self.order = functools.lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch, EPOCH]).permutation(self.count)

    def example(self, i: int) -> Example:
        """Example number i of the run, from (seed, i) alone. numpy's generator: the same on every
        device.

        All is drawn whether used or not, so that switching flips or dropout off leaves t, eps and
        noise as they are.
        """
        stream = np.random.default_rng([self.seed, i, EXAMPLE])
        flip, drop = stream.random(2)
        t = int(stream.integers(0, self.timesteps))
        eps, noise = stream.standard_normal((2, *self.latent_shape), dtype=np.float32)
        noise = offset_noise(noise, stream, self.noise_offset)
        return Example(
            picture=int(self.order(i // self.count)[i % self.count]),
            flip=bool(self.random_flip and flip < 0.5),
            drop_caption=bool(drop < self.caption_dropout),
            t=t,
            eps=torch.from_numpy(eps),
            noise=torch.from_numpy(noise),
        )

    def batch(self, numbers: range, device: torch.device) -> dict[str, Tensor]:
        """Examples `numbers` (B of them) on `device`: mean, std, eps, noise (B, C, H, W), t (B,),
        context (B, T, D), pooled (B, P), time_ids (B, 6).
        """
        rows = []
        for e in map(self.example, numbers):
            mean, std, time_ids = self.source.latent(e.picture, e.flip)
            context, pooled = self.source.prompt(self.count if e.drop_caption else e.picture)
            rows.append((mean, std, e.eps, e.noise, torch.tensor(e.t), context, pooled, time_ids))
        keys = ("mean", "std", "eps", "noise", "t", "context", "pooled", "time_ids")
        return {
            key: torch.stack(column).to(device, non_blocking=True)
            for key, column in zip(keys, zip(*rows, strict=True), strict=True)
        }
