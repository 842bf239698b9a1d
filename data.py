"""From captioned pictures to the batch of optimizer step s.

Whatever the frozen encoders give for a picture or a caption is the same at every step, so it is
computed once and kept on disk. Whatever is random about example number i of a run is drawn from
(seed, i) alone, so a run needs no data-loader state to be continued, and its batches do not depend
on how they are cut up.

Letters: `R` training resolution in pixels, `F` views of a picture (2 with flips, else 1), `B C H W
T D P` as in model.py.
"""

import contextlib
import functools
import io
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import model
from fast import parallel
from inputs.ahead import Ahead
from inputs.blocks import whole_block, write_block
from inputs.files import Refusal, digest, open_safetensors, sweep_parts
from inputs.sources import Picture

BLOCK = 16  # pictures or captions in one cache file: written whole or not at all
LONGEST_SIDE = 20  # times the short one; a 1 x 60000 picture would be resized to gigabytes
# decode() raises instead. Here, since a filter set and taken back in one thread unsettles others.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# What a random stream is for. Never 0: numpy's SeedSequence takes [a, b, 0] for [a, b].
EXAMPLE, EPOCH, CROP = 1, 2, 3


def cut(items: list | range, size: int) -> list:
    """`items` in pieces of `size`; the last may be shorter."""
    return [items[at : at + size] for at in range(0, len(items), size)]


# ---- one picture ---------------------------------------------------------------------------------


def decode(picture: Picture) -> Image.Image:
    """The picture upright (EXIF) and in RGB, transparency onto white. Raises Refusal, naming it, if
    it is damaged.
    """
    try:
        image = Image.open(io.BytesIO(picture.read()), formats=picture_formats())
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow refuses twice as many
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits: Pillow's convert would clip at 255
            image = Image.fromarray(from_16_bits(np.asarray(image)))
        if image.mode == "F":
            raise ValueError("numbers with a point do not say which of them is white")
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


@functools.cache
def picture_formats() -> list[str]:
    """All that Pillow reads but PostScript, for which it would start Ghostscript: a program that
    the picture writes.
    """
    Image.init()
    return sorted(set(Image.ID) - {"EPS"})


def from_16_bits(pixels: np.ndarray) -> np.ndarray:
    """Whole numbers 0 to 65535 as 0 to 255. Raises ValueError for others: white is unknown then."""
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"pixels from {pixels.min()} to {pixels.max()}, beyond 16 bits")
    return (pixels // 257).astype(np.uint8)


def views(
    picture: Picture, resolution: int, random_crop: bool, seed: int, flips: tuple[bool, ...]
) -> tuple[Tensor, Tensor]:
    """Pixels (F, 3, R, R) in [-1, 1] and time ids (F, 6), one view for each of `flips`.

    Resize the short side to R (Lanczos), cut R x R from the middle or from where (seed, picture)
    says, flip. The crop offset is in the resized picture's frame; a flipped view is a crop of the
    flipped picture, whose left edge lies where the right edge was.

    numpy, not torch: threads do this side by side, and each would start torch's own threads.
    """
    image = decode(picture)
    original = (image.height, image.width)
    width, height = (resolution * side // min(image.size) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    spare = (height - resolution, width - resolution)
    top, left = spare[0] // 2, spare[1] // 2
    if random_crop:
        stream = np.random.default_rng([seed, int(picture.digest[:8], 16), CROP])
        top, left = (int(stream.integers(0, room + 1)) for room in spare)
    square = image.crop((left, top, left + resolution, top + resolution))
    pixels = np.asarray(square, np.float32) * np.float32(1 / 255) * 2 - 1  # (R, R, 3) in [-1, 1]
    pixels = pixels.transpose(2, 0, 1)
    sides = [pixels[:, :, ::-1] if flip else pixels for flip in flips]
    lefts = [spare[1] - left if flip else left for flip in flips]
    target = (resolution, resolution)
    time_ids = [model.add_time_ids(original, (top, edge), target) for edge in lefts]
    # Into C order, which np.stack would not choose: a VAE's bits depend on its input's layout, too.
    stacked = np.stack(sides, out=np.empty((len(flips), 3, *target), np.float32))
    return torch.from_numpy(stacked), torch.stack(time_ids)


def prepare(
    picture: Picture, resolution: int, random_crop: bool, seed: int, flip: bool
) -> tuple[Tensor, Tensor]:
    """Pixels (3, R, R) and time ids (6,) of one view."""
    pixels, time_ids = views(picture, resolution, random_crop, seed, (flip,))
    return pixels[0], time_ids[0]


def refusal_of(picture: Picture) -> Refusal | None:
    try:
        decode(picture)
    except Refusal as refusal:
        return refusal
    return None


def check_pictures(pictures: list[Picture]) -> None:
    """Decode every picture, so that all damaged ones are named at once, not one a run."""
    with Ahead(refusal_of, pictures, BLOCK) as answers:
        bar = tqdm(answers, "checking pictures", len(pictures), leave=False, mininterval=1)
        refusals = [refusal for refusal in bar if refusal]
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


def in_batches(device: torch.device) -> bool:
    """Whether encoders get several pictures or captions in one call: a GPU does. On a CPU it is no
    faster, and one by one the cache holds the very bits that --no-cache gives.
    """
    return device.type != "cpu"


class Encoder:
    """Encodes at every call: the reference, and what --no-cache trains from.

    Index len(pictures) of prompt() is the unconditional embedding. The VAE ("vae") and the text
    encoders ("text") are loaded when they are first needed, and stay until free(). speed: what to
    say of the last encode_pictures(); empty if none was at work.
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
        self.crop, self.speed = (resolution, random_crop, seed), ""

    vae = functools.cached_property(lambda self: self.load_vae())
    text = functools.cached_property(lambda self: self.load_text())

    def free(self, part: str) -> None:
        if self.__dict__.pop(part, None):  # where cached_property keeps it
            model.free_memory()

    def at_once(self) -> int:
        """Views in one call of the VAE: on a GPU 4 at 512 px, 1 from 1024 px up, so that fp32
        activations stay within a few GiB.
        """
        return max(1, 4 * 512**2 // self.crop[0] ** 2) if in_batches(self.vae.device) else 1

    def posterior(self, pixels: Tensor, names: list[str]) -> tuple[Tensor, Tensor]:
        """mean, std (B, C, H, W) of the views (B, 3, R, R) of pictures `names`, on the CPU."""
        each = [model.encode_images(part, self.vae) for part in pixels.split(self.at_once())]
        mean, std = (torch.cat(column).cpu() for column in zip(*each, strict=True))
        for name, *numbers in zip(names, mean, std, strict=True):
            if not all(part.isfinite().all() for part in numbers):
                raise Refusal(
                    f"the VAE gives NaN or Inf for picture {name}",
                    "finite latents",
                    "look at the picture; with a VAE of your own, check that its fp32 weights are "
                    "finite",
                )
        return mean, std

    def latent(self, index: int, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
        """mean, std (C, H, W) of the picture's posterior and time ids (6,), fp32."""
        pixels, time_ids = prepare(self.pictures[index], *self.crop, flip)
        mean, std = self.posterior(pixels[None], [self.pictures[index].name])
        return mean[0], std[0], time_ids

    def encode_pictures(
        self, blocks: Iterable[range], flips: tuple[bool, ...]
    ) -> Iterator[dict[str, Tensor]]:
        """mean, std (F, C, H, W) and time ids (F, 6) of each picture of `blocks`, in order; the
        pictures are decoded ahead. No call of the VAE crosses a block's end: its bits depend on
        what is in it.
        """
        work, count = (lambda i: views(self.pictures[i], *self.crop, flips)), len(flips)
        blocks, ahead = itertools.tee(blocks)
        with Ahead(work, itertools.chain.from_iterable(ahead), depth=BLOCK) as prepared:
            size = max(1, self.at_once() // count)  # pictures
            for part in itertools.chain.from_iterable(cut(block, size) for block in blocks):
                pixels, time_ids = zip(*itertools.islice(prepared, len(part)), strict=True)
                names = [self.pictures[i].name for i in part for _ in flips]
                mean, std = self.posterior(torch.cat(pixels), names)
                for row in zip(mean.split(count), std.split(count), time_ids, strict=True):
                    yield dict(zip(("mean", "std", "time_ids"), row, strict=True))
        self.speed = prepared.said("pictures")

    def caption(self, index: int) -> str:
        """Empty where there is none: the unconditional embedding is meant."""
        return self.pictures[index].caption.strip() if index < len(self.pictures) else ""

    def embed(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """context (B, T, D) and pooled (B, P) of captions, on the CPU; unconditional for [""]."""
        if captions == [""]:
            context, pooled = model.encode_unconditional(self.text)
        else:
            context, pooled = model.encode_prompts(captions, self.text)
        context, pooled = context.cpu(), pooled.cpu()
        for caption, *numbers in zip(captions, context, pooled, strict=True):
            if not all(part.isfinite().all() for part in numbers):
                raise Refusal(
                    f"the text encoders give NaN or Inf for {caption!r}",
                    "finite numbers",
                    "check their weights",
                )
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
            size = BLOCK if in_batches(self.text.encoders[0].device) else 1
            known = {}
            for group in cut(texts, size) + [[""]] * ("" in captions):
                known |= dict(zip(group, zip(*self.embed(group), strict=True), strict=True))
            yield from (known[self.caption(i)] for i in block)


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
    folder: Path,
    kind: str,
    keys: list[str],
    encode: Callable[[Iterable[range]], Iterator[dict[str, Tensor]]],
    team: parallel.Alone = parallel.ALONE,
) -> list[Path]:
    """One file for each BLOCK of keys, encoding only the blocks that are not on disk yet. Several
    processes claim them block by block; all are there once each has ended.

    keys: what each row depends on (content, encoder, resolution); a block's file is named by its
    keys, so changed data or encoders give other files and nothing stale is ever read; a damaged one
    is made anew. encode: gives the rows of the blocks that it is told, in order. Returns the files
    in order.
    """
    blocks = cut(range(len(keys)), BLOCK)
    files = [folder / f"{kind}-{digest(*(keys[i] for i in block))}.safetensors" for block in blocks]
    # The first of several looks at every byte; where it finds damage, it alone has that to do.
    there = whole_block if team.first else Path.is_file
    shown = tqdm(files, f"reading encoded {kind}s", leave=False, mininterval=1, delay=2)
    todo = [(file, block) for file, block in zip(shown, blocks, strict=True) if not there(file)]
    if team.first:
        sweep_parts(folder)
    claimed = (pair for pair in todo if team.claim(pair[0].name))
    if first := next(claimed, None):
        told, mine = itertools.tee(itertools.chain([first], claimed))
        count = sum(len(block) for _, block in todo) // team.size  # of several, about as many each
        # closing: whatever goes wrong here, what encodes ahead stops at once
        with contextlib.closing(encode(block for _, block in told)) as rows:
            bar = iter(tqdm(rows, f"encoding {kind}s", count, unit="", mininterval=1))
            for file, block in mine:
                block_rows = list(itertools.islice(bar, len(block)))
                stacked = {key: torch.stack([r[key] for r in block_rows]) for key in block_rows[0]}
                write_block(file, stacked, kind)
                team.sign(f"encoding {kind}s")
            next(bar, None)  # past the last row, so that bar and encode() come to their ends
    return files


def fill_cache(
    folder: Path,
    encoder: Encoder,
    random_flip: bool,
    dtype: torch.dtype,
    prints: dict[str, str],
    team: parallel.Alone = parallel.ALONE,
) -> Cache:
    """Encode what is not on disk yet, captions first, each encoder freed when it is done.

    dtype: the UNet's, in which contexts are kept: they would be rounded to it in the step anyway.
    prints: the fingerprints of "vae" and "text", part of every key.
    """
    flips = (False, True) if random_flip else (False,)

    def prompts_in_dtype(blocks: Iterable[range]) -> Iterator[dict[str, Tensor]]:
        for context, pooled in encoder.encode_captions(blocks):
            yield {"context": context.to(dtype), "pooled": pooled.to(dtype)}

    captions = [encoder.caption(i) for i in range(len(encoder.pictures) + 1)]
    prompt_keys = [digest(caption, prints["text"], str(dtype)) for caption in captions]
    resolution, random_crop, seed = encoder.crop
    crop = f"{resolution} {f'random {seed}' if random_crop else 'centre'} {flips}"
    latent_keys = [digest(p.digest, prints["vae"], crop) for p in encoder.pictures]
    prompts = fill(folder, "prompt", prompt_keys, prompts_in_dtype, team)
    encoder.free("text")
    try:
        encode = functools.partial(encoder.encode_pictures, flips=flips)
        latents = fill(folder, "latent", latent_keys, encode, team)
    except Refusal:
        check_pictures(encoder.pictures)  # name every damaged picture, not the first alone
        raise
    encoder.free("vae")
    team.wait("encoding")
    if encoder.speed and team.first:
        share = f" (by the first of {team.size} processes)" if team.size > 1 else ""
        # With the progress bars, on stderr: it is said at a first start only.
        print(f"{encoder.speed}{share}", file=sys.stderr)
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


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. From pinned memory: out of any other a copy to a GPU waits for what the
    GPU still has to do.
    """
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


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
            key: send(torch.stack(column), device)
            for key, column in zip(keys, zip(*rows, strict=True), strict=True)
        }
