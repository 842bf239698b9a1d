"""From captioned pictures to the batch of optimizer step s.

Whatever the frozen encoders give for a picture or a caption is the same at every step, so it is
computed once and kept on disk. Whatever is random about example number i of a run is drawn from
(seed, i) alone, so a run needs no data-loader state to be continued, and its batches do not depend
on how they are cut up.

Letters: `R` training resolution in pixels, `F` views of a picture (2 with flips, else 1), `B C H W
T D P` as in model.py.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

import model
from inputs.ahead import work_ahead
from inputs.blocks import ROWS_PER_FILE, cut, every_block, fill
from inputs.code import makers, together
from inputs.files import digest, open_safetensors
from inputs.pictures import all_damaged_named, decode
from inputs.sources import Picture
from inputs.vetting import check_finite

# What a random stream is for. Never 0: numpy's SeedSequence takes [a, b, 0] for [a, b].
EXAMPLE, EPOCH, CROP = 1, 2, 3


# ---- one picture ---------------------------------------------------------------------------------


class Crop(NamedTuple):
    """Which square of a picture is trained on: R x R from its middle, or from where (seed, picture)
    says.
    """

    resolution: int
    random_crop: bool
    seed: int


def views(
    picture: Picture, resolution: int, random_crop: bool, seed: int, flips: tuple[bool, ...]
) -> tuple[Tensor, Tensor]:
    """Pixels (F, 3, R, R) in [-1, 1] and time ids (F, 6), one view for each of `flips`.

    Resize the short side to R (Lanczos), flip, cut R x R. The crop offset is in the frame of the
    picture that is cut: resized, and for a flipped view mirrored. From the middle it is the same
    for both (torchvision.transforms.functional.center_crop); a random crop shows the same part in
    both. Raises Refusal for a damaged picture.

    numpy, not torch: threads do this side by side, and each would start torch's own threads.
    """
    image = decode(picture)
    original = (image.height, image.width)  # told to the UNet: small pictures are blurred by now
    width, height = (resolution * side // min(image.size) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    spare = (height - resolution, width - resolution)  # one of them is 0
    top, left = (round(room / 2) for room in spare)  # a half to the even number, as torchvision
    if random_crop:  # once a picture, not once an example: so it can be encoded once
        stream = np.random.default_rng([seed, int(picture.digest[:8], 16), CROP])
        top, left = (int(stream.integers(0, room + 1)) for room in spare)
    lefts = [spare[1] - left if flip and random_crop else left for flip in flips]
    time_ids = [model.add_time_ids(original, (top, edge), (resolution,) * 2) for edge in lefts]
    frames = [np.asarray(ImageOps.mirror(image) if flip else image) for flip in flips]
    corners = [frame[top:, edge:] for frame, edge in zip(frames, lefts, strict=True)]
    # Bytes (F, R, R, 3) to numbers (F, 3, R, R) in [-1, 1], as the VAE takes them. Into C order: a
    # VAE's bits depend on its input's layout, too.
    squares = np.stack([each[:resolution, :resolution] for each in corners]).transpose(0, 3, 1, 2)
    pixels = np.ascontiguousarray(squares, np.float32) * np.float32(1 / 255) * 2 - 1
    return torch.from_numpy(pixels), torch.stack(time_ids)


# ---- encoded at every step, or once --------------------------------------------------------------


def in_batches(device: torch.device) -> bool:
    """Whether encoders get several pictures or captions in one call: a GPU does. On a CPU it is no
    faster, and one by one the cache holds the very bits that --no-cache gives.
    """
    return device.type != "cpu"


class Encoder:
    """Encodes at every call: the reference, and what --no-cache trains from.

    Index len(pictures) of prompt() is the unconditional embedding. The VAE ("vae") and the text
    encoders ("text") are loaded when they are first needed, and stay until free().
    """

    def __init__(
        self, pictures: list[Picture], load_vae: Callable, load_text: Callable, crop: Crop
    ):
        self.pictures, self.crop = pictures, crop
        self.load_vae, self.load_text = load_vae, load_text

    vae = functools.cached_property(lambda self: self.load_vae())
    text = functools.cached_property(lambda self: self.load_text())

    def free(self, part: str) -> None:
        if self.__dict__.pop(part, None):  # where cached_property keeps it
            model.free_memory()

    # A picture

    def at_once(self) -> int:
        """Views in one call of the VAE: on a GPU 4 at 512 px, 1 from 1024 px up, so that fp32
        activations stay within a few GiB.
        """
        return max(1, 4 * 512**2 // self.crop.resolution**2) if in_batches(self.vae.device) else 1

    def posterior(self, pixels: Tensor, names: list[str]) -> tuple[Tensor, Tensor]:
        """mean, std (B, C, H, W) of the views (B, 3, R, R) of pictures `names`, on the CPU. Raises
        Refusal, naming the picture, for NaN or Inf.
        """
        each = [model.encode_images(part, self.vae) for part in pixels.split(self.at_once())]
        mean, std = (torch.cat(column).cpu() for column in zip(*each, strict=True))
        check_finite("the VAE gives NaN or Inf for picture", names, mean, std)
        return mean, std

    def latent(self, index: int, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
        """mean, std (C, H, W) of the picture's posterior and time ids (6,), fp32."""
        pixels, time_ids = views(self.pictures[index], *self.crop, (flip,))
        mean, std = self.posterior(pixels, [self.pictures[index].name])  # (1, C, H, W) each
        return mean[0], std[0], time_ids[0]

    def encode_pictures(self, blocks: Iterable[range], flips: tuple) -> Iterator[dict[str, Tensor]]:
        """mean, std (F, C, H, W) and time ids (F, 6) of each picture of `blocks`, in order; threads
        decode the next pictures meanwhile. No call of the VAE crosses a block's end: its bits
        depend on what is in it.
        """
        work, count = (lambda i: views(self.pictures[i], *self.crop, flips)), len(flips)
        blocks, ahead = itertools.tee(blocks)
        with work_ahead(work, itertools.chain.from_iterable(ahead), ROWS_PER_FILE) as prepared:
            size = max(1, self.at_once() // count)  # pictures
            for part in itertools.chain.from_iterable(cut(block, size) for block in blocks):
                pixels, time_ids = zip(*itertools.islice(prepared, len(part)), strict=True)
                names = [self.pictures[i].name for i in part for _ in flips]
                mean, std = self.posterior(torch.cat(pixels), names)  # (pictures x F, C, H, W)
                for row in zip(mean.split(count), std.split(count), time_ids, strict=True):
                    yield dict(zip(("mean", "std", "time_ids"), row, strict=True))

    # A caption

    def caption(self, index: int) -> str:
        """Empty where there is none: the unconditional embedding is meant."""
        return self.pictures[index].caption.strip() if index < len(self.pictures) else ""

    def embed(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """context (B, T, D) and pooled (B, P) of captions, on the CPU; unconditional for [""].
        Raises Refusal, naming the caption, for NaN or Inf.
        """
        if captions == [""]:
            context, pooled = model.encode_unconditional(self.text)
        else:
            context, pooled = model.encode_prompts(captions, self.text)
        context, pooled = context.cpu(), pooled.cpu()
        check_finite("the text encoders give NaN or Inf for", map(repr, captions), context, pooled)
        return context, pooled

    def prompt(self, index: int) -> tuple[Tensor, Tensor]:
        """context (T, D) and pooled (P,) of a picture's caption, fp32; unconditional where there is
        no caption.
        """
        context, pooled = self.embed([self.caption(index)])
        return context[0], pooled[0]

    def encode_captions(self, blocks: Iterable[range]) -> Iterator[tuple[Tensor, Tensor]]:
        """What prompt() gives for each index of `blocks`, in order; equal captions of a block are
        encoded once, on a GPU all of a block in one call, on a CPU one by one.
        """
        for block in blocks:
            captions = list(dict.fromkeys(self.caption(i) for i in block))
            texts = [caption for caption in captions if caption]
            size = ROWS_PER_FILE if in_batches(self.text.encoders[0].device) else 1
            known = {}
            for group in cut(texts, size) + [[""]] * ("" in captions):
                known |= dict(zip(group, zip(*self.embed(group), strict=True), strict=True))
            yield from (known[self.caption(i)] for i in block)


class Cache:
    """latent() and prompt() as Encoder has them, read from the files that fill_cache() has written;
    context and pooled in the UNet's dtype then.
    """

    def __init__(self, latents: list[Path], prompts: list[Path]):
        self.latents, self.prompts = latents, prompts

    @staticmethod
    @functools.lru_cache(maxsize=128)
    def open(path: Path):
        return open_safetensors(path)

    def row(self, files: list[Path], index: int, key: str) -> Tensor:
        """Row `index` of all files' rows: only its bytes are read."""
        return self.open(files[index // ROWS_PER_FILE]).get_slice(key)[index % ROWS_PER_FILE]

    def latent(self, index: int, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
        rows = (self.row(self.latents, index, key) for key in ("mean", "std", "time_ids"))
        return tuple(row[int(flip)] for row in rows)  # (F, ...) -> the one view

    def prompt(self, index: int) -> tuple[Tensor, Tensor]:
        return self.row(self.prompts, index, "context"), self.row(self.prompts, index, "pooled")


def fill_cache(
    folder: Path,
    encoder: Encoder,
    random_flip: bool,
    dtype: torch.dtype,
    fingerprints: dict[str, str],
    claim: Callable[[str], bool] = every_block,
) -> Cache:
    """Encode what is not on disk yet, captions first, each encoder freed when it is done.

    dtype: the UNet's, in which contexts are kept: they would be rounded to it in the step anyway.
    fingerprints: of the "vae" and of all that makes a "text" embedding. Both are part of the keys,
    with all else that a row depends on, the code that makes it included, so a file that is there is
    never a wrong one. claim: as for fill().
    """
    flips = (False, True) if random_flip else (False,)

    def prompts_in_dtype(blocks: Iterable[range]) -> Iterator[dict[str, Tensor]]:
        for context, pooled in encoder.encode_captions(blocks):
            yield {"context": context.to(dtype), "pooled": pooled.to(dtype)}

    captions = [encoder.caption(i) for i in range(len(encoder.pictures) + 1)]
    by = together("data.Encoder", "model.encode_prompts", "model.encode_unconditional")
    prompt_keys = [digest(caption, fingerprints["text"], str(dtype), by) for caption in captions]
    resolution, random_crop, seed = encoder.crop
    crop = f"{resolution} {f'random {seed}' if random_crop else 'centre'} {flips}"
    encoding = ("data.Encoder", "data.views", "data.CROP", "model.encode_images")
    by = together(*encoding, "model.add_time_ids", *makers("inputs.pictures"))
    latent_keys = [digest(p.digest, fingerprints["vae"], crop, by) for p in encoder.pictures]
    prompts = fill(folder, "prompt", prompt_keys, prompts_in_dtype, claim)
    encoder.free("text")
    encode = functools.partial(encoder.encode_pictures, flips=flips)
    with all_damaged_named(encoder.pictures):
        latents = fill(folder, "latent", latent_keys, encode, claim)
    encoder.free("vae")
    return Cache(latents, prompts)


# ---- what example i of the run is ----------------------------------------------------------------


@dataclass
class Example:
    """Everything random about one example of the run. eps and noise: (C, H, W) fp32."""

    number: int
    picture: int
    flip: bool
    drop_caption: bool
    t: int
    eps: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Chances:
    """How often an example is mirrored (half the time, or never) and loses its caption, and how
    strongly its noise is offset.
    """

    random_flip: bool = False
    caption_dropout: float = 0.0
    noise_offset: float = 0.0


def offset_noise(noise: np.ndarray, stream: np.random.Generator, amount: float) -> np.ndarray:
    """noise (C, H, W) plus `amount` times one normal number a channel, so that a picture's mean is
    learned, too (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
    """
    return noise + np.float32(amount) * stream.standard_normal((len(noise), 1, 1), dtype=np.float32)


def drawn_timesteps(examples: list[Example]) -> Tensor:
    """Each example's own timestep, (B,) int64: drawn uniformly (Ho et al. 2020, algorithm 1)."""
    return torch.tensor([e.t for e in examples])


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. From pinned memory: out of any other a copy to a GPU waits for what the
    GPU still has to do.
    """
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class Examples:
    """The run's examples, by number; an epoch shows every picture once, in an order of its own.

    source: an Encoder or a Cache; names: of its pictures; num_train_timesteps: of the noise
    schedule; shape: (C, H, W).
    """

    def __init__(
        self, source, names: list, seed: int, chances: Chances, num_train_timesteps: int, shape
    ):
        self.source, self.names, self.count, self.seed = source, names, len(names), seed
        self.chances, self.num_train_timesteps, self.shape = chances, num_train_timesteps, shape
        self.order = functools.lru_cache(maxsize=2)(self._order)  # a batch may span two epochs

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
        t = int(stream.integers(0, self.num_train_timesteps))
        eps, noise = stream.standard_normal((2, *self.shape), dtype=np.float32)
        noise = offset_noise(noise, stream, self.chances.noise_offset)
        picture = int(self.order(i // self.count)[i % self.count])
        flip = bool(self.chances.random_flip and flip < 0.5)
        drop = bool(drop < self.chances.caption_dropout)
        return Example(i, picture, flip, drop, t, *map(torch.from_numpy, (eps, noise)))

    def batch(self, numbers: range, device: torch.device, timesteps=drawn_timesteps) -> dict:
        """Examples `numbers` (B of them) on `device`: mean, std, eps, noise (B, C, H, W), t (B,),
        context (B, T, D), pooled (B, P), time_ids (B, 6). timesteps: t from the examples.
        """
        examples = [self.example(i) for i in numbers]
        # A dropped caption is the unconditional embedding: number `count`, after the pictures' own.
        captions = [self.count if e.drop_caption else e.picture for e in examples]
        latents = zip(*(self.source.latent(e.picture, e.flip) for e in examples), strict=True)
        mean, std, time_ids = map(torch.stack, latents)
        context, pooled = map(torch.stack, zip(*map(self.source.prompt, captions), strict=True))
        eps, noise = map(torch.stack, zip(*((e.eps, e.noise) for e in examples), strict=True))
        batch = {"mean": mean, "std": std, "eps": eps, "noise": noise, "t": timesteps(examples)}
        batch |= {"context": context, "pooled": pooled, "time_ids": time_ids}
        return {key: send(value, device) for key, value in batch.items()}
