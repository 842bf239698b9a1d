"""From captioned pictures to the batch of optimizer step s.

Whatever the frozen encoders give for a picture or a caption is the same at every step, so it is
computed once and kept on disk. Whatever is random about example number i of a run follows from the
pictures, n, the seed and i alone, so a run needs no data-loader state to be continued, and its
batches do not depend on how they are cut up.

Letters: `R` training resolution in pixels, `F` views of a picture (2 with flips, else 1), `n`
examples per optimizer step, `B C H W T D P` as in model.py.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import model
from inputs.ahead import work_ahead
from inputs.blocks import ROWS_PER_FILE, Place, cut, every_block, fill
from inputs.code import makers, together
from inputs.files import Refusal, digest, open_safetensors
from inputs.hub import encoder_fingerprints
from inputs.options import Config
from inputs.pictures import (
    all_damaged_named,
    check_pictures,
    decode,
    mask_of,
    refuse_small,
    upright_size,
)
from inputs.sources import Picture
from inputs.vetting import check_finite

# What a random stream is for. Never 0: numpy's SeedSequence takes [a, b, 0] for [a, b].
EXAMPLE, EPOCH, CROP = 1, 2, 3


# ---- one picture ---------------------------------------------------------------------------------


Size = tuple[int, int]  # height and width in pixels


class Crop(NamedTuple):
    """Which part of a picture is trained on: a square of one of the `resolutions`, or with
    `buckets` one of several shapes of at most its area; from the picture's middle, or with
    `random_crop` from where (seed, picture) says.
    """

    resolutions: tuple[int, ...]
    buckets: bool
    random_crop: bool
    seed: int

    def shapes(self, resolution: int) -> list[Size]:
        """Those of a resolution R: R x R alone, or as width each multiple of 64 from R / 2 to 2 R,
        and as height the greatest multiple of 64 that keeps the area within R x R.
        """
        if not self.buckets:
            return [(resolution, resolution)]
        widths = (w for w in range(64, 2 * resolution + 1, 64) if 2 * w >= resolution)
        return [(h, w) for w in widths if (h := resolution**2 // w // 64 * 64)]

    def size(self, picture: Size) -> Size:
        """The size at which a picture is trained: of the largest resolution that it fills without
        being enlarged, else of the smallest, the shape that cuts the least away.
        """
        for resolution in sorted(self.resolutions, reverse=True):
            shape = max(self.shapes(resolution), key=lambda shape: share_kept(picture, shape))
            if shape[0] <= picture[0] and shape[1] <= picture[1]:
                break
        return shape


def share_kept(picture: Size, shape: Size) -> float:
    """The share of a picture that is left when it is made to just cover `shape` and is cut."""
    across, down = picture[1] * shape[0], picture[0] * shape[1]  # aspects times both heights
    return min(across, down) / max(across, down)


def views(
    picture: Picture, size: Size, random_crop: bool, seed: int, flips: tuple[bool, ...]
) -> tuple[Tensor, Tensor]:
    """Pixels (F, 3, *size) in [-1, 1] and time ids (F, 6), one view for each of `flips`. With
    a mask (F, 4, *size): the fourth channel is 1 where the mask is white, -1 where it is black.

    Resize until the picture just covers `size` (Lanczos), flip, cut. The crop offset is in the
    frame of the picture that is cut: resized, and for a flipped view mirrored. From the middle it
    is the same for both (torchvision.transforms.functional.center_crop); a random crop shows the
    same part in both. Raises Refusal for a damaged picture or mask, and for a mask that hides all
    that is cut out.

    numpy, not torch: threads do this side by side, and each would start torch's own threads.
    """
    image = decode(picture)
    original = (image.height, image.width)  # told to the UNet: a small picture will be blurred
    wide = size[0] * image.width > size[1] * image.height  # wider than `size`: the height decides
    whole, part = (image.height, size[0]) if wide else (image.width, size[1])
    height, width = (side * part // whole for side in original)
    layers = [image, mask_of(picture, image.size)] if picture.mask else [image]
    resized = [layer.resize((width, height), Image.Resampling.LANCZOS) for layer in layers]
    spare = (height - size[0], width - size[1])  # one of them is 0
    top, left = (round(room / 2) for room in spare)  # a half to the even number, as torchvision
    if random_crop:  # once a picture, not once an example: so it can be encoded once
        stream = np.random.default_rng([seed, int(picture.digest[:8], 16), CROP])
        top, left = (int(stream.integers(0, room + 1)) for room in spare)
    lefts = [spare[1] - left if flip and random_crop else left for flip in flips]
    time_ids = [model.add_time_ids(original, (top, edge), size) for edge in lefts]
    frame = np.dstack(resized)  # (height, width, channels)
    frames = [frame[:, ::-1] if flip else frame for flip in flips]
    corners = [each[top:, edge:] for each, edge in zip(frames, lefts, strict=True)]
    # Bytes (F, 8H, 8W, 3) to numbers (F, 3, 8H, 8W) in [-1, 1], as the VAE takes them; 4 for 3
    # with a mask. Into C order: a VAE's bits depend on its input's layout, too.
    inside = np.stack([each[: size[0], : size[1]] for each in corners]).transpose(0, 3, 1, 2)
    if picture.mask and not all(view[3].any() for view in inside):
        found = f"the mask of {picture.name} is black in all that is cut out of it"
        raise Refusal(found, "white in it", "--buckets, remove the mask, or cut the picture")
    pixels = np.ascontiguousarray(inside, np.float32) * np.float32(1 / 255) * 2 - 1
    return torch.from_numpy(pixels), torch.stack(time_ids)


# ---- encoded at every step, or once --------------------------------------------------------------

LATENT = ("mean", "std", "time_ids", "mask")  # of a picture; the last where the run has masks


def in_batches(device: torch.device) -> bool:
    """Whether encoders get several pictures or captions in one call: a GPU does. On a CPU it is no
    faster, and one by one the cache holds the very bits that --no-cache gives.
    """
    return device.type != "cpu"


class Encoder:
    """Encodes at every call: the reference, and what --no-cache trains from.

    Index i of prompt() is captions[i]: all of the first picture's, then of the second's, ..., and
    last "", the unconditional embedding; captions_of: the range of each picture's. sizes: height
    and width at which each is trained. The VAE ("vae") and the text encoders ("text") are loaded
    when they are first needed, and stay until free().
    """

    def __init__(
        self, pictures: list[Picture], load_vae: Callable, load_text: Callable, crop: Crop
    ):
        self.pictures, self.crop = pictures, crop
        self.sizes = [crop.size(upright_size(picture)) for picture in pictures]
        self.captions = [each.strip() for picture in pictures for each in picture.captions] + [""]
        ends = itertools.accumulate((len(picture.captions) for picture in pictures), initial=0)
        self.captions_of = list(itertools.starmap(range, itertools.pairwise(ends)))
        self.load_vae, self.load_text = load_vae, load_text

    vae = functools.cached_property(lambda self: self.load_vae())
    text = functools.cached_property(lambda self: self.load_text())

    def free(self, part: str) -> None:
        if self.__dict__.pop(part, None):  # where cached_property keeps it
            model.free_memory()

    # A picture

    def views(self, index: int, flips: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
        crop = self.crop
        picture, size = self.pictures[index], self.sizes[index]
        return views(picture, size, crop.random_crop, crop.seed, flips)

    def views_at_once(self, size: Size) -> int:
        """Views in one call of the VAE: on a GPU 4 at 512 px, 1 from 1024 px up, so that fp32
        activations stay within a few GiB.
        """
        return max(1, 4 * 512**2 // (size[0] * size[1])) if in_batches(self.vae.device) else 1

    def posterior(self, pixels: Tensor, names: list[str]) -> tuple[Tensor, ...]:
        """mean, std (B, C, H, W) of the views (B, 3, 8H, 8W) of pictures `names`, on the CPU; with
        masks (B, 4, 8H, 8W) also these (B, 1, H, W), each number the mean of 8 x 8 pixels. Raises
        Refusal, naming the picture, for NaN or Inf.
        """
        pixels, mask = pixels[:, :3].contiguous(), pixels[:, 3:] / 2 + 0.5  # from [-1, 1] to [0, 1]
        parts = pixels.split(self.views_at_once(pixels.shape[2:]))
        each = [model.encode_images(part, self.vae) for part in parts]
        mean, std = (torch.cat(column).cpu() for column in zip(*each, strict=True))
        check_finite("the VAE gives NaN or Inf for picture", names, mean, std)
        return mean, std, *([torch.nn.functional.avg_pool2d(mask, 8)] if mask.numel() else [])

    def latent(self, index: int, flip: bool) -> tuple[Tensor, ...]:
        """mean, std (C, H, W) of the picture's posterior, time ids (6,), and where the run has
        masks the mask (1, H, W), fp32.
        """
        pixels, time_ids = self.views(index, (flip,))
        mean, std, *mask = self.posterior(pixels, [self.pictures[index].name])  # (1, C, H, W) each
        return mean[0], std[0], time_ids[0], *(each[0] for each in mask)

    def encode_pictures(self, blocks: Iterable[list], flips: tuple) -> Iterator[dict[str, Tensor]]:
        """mean, std (F, C, H, W), time ids (F, 6) and a mask (F, 1, H, W) where the run has them,
        of each picture of `blocks`, in order, each block of one size; threads decode the next
        pictures meanwhile. No call of the VAE crosses a block's end: its bits depend on what is in
        it.
        """
        work, count = (lambda i: self.views(i, flips)), len(flips)
        blocks, ahead = itertools.tee(blocks)
        with work_ahead(work, itertools.chain.from_iterable(ahead), ROWS_PER_FILE) as prepared:
            for block in blocks:
                size = max(1, self.views_at_once(self.sizes[block[0]]) // count)  # pictures
                for part in cut(block, size):
                    pixels, time_ids = zip(*itertools.islice(prepared, len(part)), strict=True)
                    names = [self.pictures[i].name for i in part for _ in flips]
                    parts = self.posterior(torch.cat(pixels), names)  # (pictures x F, ., H, W) each
                    mean, std, *mask = (each.split(count) for each in parts)
                    for row in zip(mean, std, time_ids, *mask, strict=True):
                        yield dict(zip(LATENT, row, strict=False))

    # A caption

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
        """context (T, D) and pooled (P,) of a caption, fp32; unconditional where it is empty."""
        context, pooled = self.embed([self.captions[index]])
        return context[0], pooled[0]

    def encode_captions(self, blocks: Iterable[list]) -> Iterator[tuple[Tensor, Tensor]]:
        """What prompt() gives for each index of `blocks`, in order; equal captions of a block are
        encoded once, on a GPU all of a block in one call, on a CPU one by one.
        """
        for block in blocks:
            captions = list(dict.fromkeys(self.captions[i] for i in block))
            texts = [caption for caption in captions if caption]
            size = ROWS_PER_FILE if in_batches(self.text.encoders[0].device) else 1
            known = {}
            for group in cut(texts, size) + [[""]] * ("" in captions):
                known |= dict(zip(group, zip(*self.embed(group), strict=True), strict=True))
            yield from (known[self.captions[i]] for i in block)


class Cache:
    """latent() and prompt() as Encoder has them, read from the files that fill_cache() has written;
    context and pooled in the UNet's dtype then.
    """

    def __init__(self, latents: list[Place], prompts: list[Place], captions_of: list[range]):
        self.latents, self.prompts, self.captions_of = latents, prompts, captions_of

    open = staticmethod(functools.lru_cache(maxsize=128)(open_safetensors))

    def row(self, place: Place, key: str) -> Tensor:
        """Only that row's bytes are read."""
        return self.open(place[0]).get_slice(key)[place[1]]

    def latent(self, index: int, flip: bool) -> tuple[Tensor, ...]:
        place = self.latents[index]
        there = self.open(place[0]).keys()
        rows = (self.row(place, key) for key in LATENT if key in there)
        return tuple(row[int(flip)] for row in rows)  # (F, ...) -> the one view

    def prompt(self, index: int) -> tuple[Tensor, Tensor]:
        place = self.prompts[index]
        return self.row(place, "context"), self.row(place, "pooled")


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

    def prompts_in_dtype(blocks: Iterable[list]) -> Iterator[dict[str, Tensor]]:
        for context, pooled in encoder.encode_captions(blocks):
            yield {"context": context.to(dtype), "pooled": pooled.to(dtype)}

    encoding = ("data.Encoder", "model.tokens_of", "model.encode_prompts")
    by, like = together(*encoding, "model.encode_unconditional"), (fingerprints["text"], str(dtype))
    prompt_keys = [digest(caption, *like, by) for caption in encoder.captions]
    crop = f"{f'random {encoder.crop.seed}' if encoder.crop.random_crop else 'centre'} {flips}"
    encoding = ("data.Encoder", "data.views", "data.CROP", "model.encode_images")
    by = together(*encoding, "model.add_time_ids", *makers("inputs.pictures"))
    latent_keys = [
        digest(p.digest, fingerprints["vae"], f"{size} {crop}", by, p.mask.digest if p.mask else "")
        for p, size in zip(encoder.pictures, encoder.sizes, strict=True)
    ]
    prompts = fill(folder, "prompt", prompt_keys, prompts_in_dtype, claim)
    encoder.free("text")
    encode = functools.partial(encoder.encode_pictures, flips=flips)
    with all_damaged_named(lambda i: encoder.views(i, flips), range(len(encoder.pictures))):
        latents = fill(folder, "latent", latent_keys, encode, claim, alike(encoder.sizes))
    encoder.free("vae")
    return Cache(latents, prompts, encoder.captions_of)


# ---- what example i of the run is ----------------------------------------------------------------


@dataclass
class Example:
    """Everything random about one example of the run. eps and noise: (C, H, W) fp32; caption: which
    of its picture's, as a share of their count, [0, 1).
    """

    number: int
    picture: int
    flip: bool
    drop_caption: bool
    t: int
    eps: Tensor
    noise: Tensor
    caption: float


@dataclass(frozen=True)
class Chances:
    """How often an example is mirrored (half the time, or never) and loses its caption, how
    strongly its noise is offset, and how much what a mask hides still counts.
    """

    random_flip: bool = False
    caption_dropout: float = 0.0
    noise_offset: float = 0.0
    mask_floor: float = 0.1


def offset_noise(noise: np.ndarray, stream: np.random.Generator, amount: float) -> np.ndarray:
    """noise (C, H, W) plus `amount` times one normal number a channel, so that a picture's mean is
    learned, too (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
    """
    return noise + np.float32(amount) * stream.standard_normal((len(noise), 1, 1), dtype=np.float32)


def loss_weights(mask: Tensor, floor: float) -> Tensor:
    """Of each latent pixel, (B, 1, H, W): from floor where its mask is 0 to 1 where it is 1, then
    scaled so that each example's have the mean 1. Of a white mask they are 1 to the bit.
    """
    weights = 1 - (1 - floor) * (1 - mask)
    return weights * (mask[0].numel() / weights.sum(dim=(1, 2, 3), keepdim=True))


def drawn_timesteps(examples: list[Example]) -> Tensor:
    """Each example's own timestep, (B,) int64: drawn uniformly (Ho et al. 2020, algorithm 1)."""
    return torch.tensor([e.t for e in examples])


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. From pinned memory: out of any other a copy to a GPU waits for what the
    GPU still has to do.
    """
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def alike(sizes: list[Size]) -> list[list[int]]:
    """The numbers of the pictures of each size, most first."""
    found = {size: [i for i, each in enumerate(sizes) if each == size] for size in sorted({*sizes})}
    return sorted(found.values(), key=len, reverse=True)


class Decks:
    """Which picture an example shows. A step's examples may be one tensor, so pictures of one size
    are a deck, in which each lies as often as its weight says (once, without), and each step takes
    its n examples from one deck, shuffled anew when it is used up, in mid-step, too. In as many
    steps as there are cards each is shown n times; in fewer, one alone in its deck may never be.
    """

    def __init__(self, sizes: list[Size], n: int, seed: int, weights: list[int] | None = None):
        cards = np.array(weights or [1] * len(sizes))
        self.decks = [np.repeat(deck, cards[deck]) for deck in alike(sizes)]
        self.n, self.seed, self.count = n, seed, int(cards.sum())
        self.turns: list[tuple[int, int]] = []  # of each step its deck, and that deck's turn number
        self.taken = [0] * len(self.decks)  # turns so far
        self.order = functools.lru_cache(maxsize=2 * len(self.decks))(self._order)

    def _order(self, deck: int, round_: int) -> np.ndarray:
        # numpy takes [a, b, c, 0] for [a, b, c]: a lone deck has the order it had before decks.
        stream = np.random.default_rng([self.seed, round_, EPOCH, deck])
        return stream.permutation(self.decks[deck])

    def turn(self, step: int) -> tuple[int, int]:
        """The deck of a step, and how many steps have had it before. A deck with a share p of the
        cards has its k-th turn (from 0) in the time from k / p to (k + 1) / p; step s is that from
        s to s + 1. Of the turns begun before its end, it is the one that ends first: no deck is a
        whole turn behind or ahead (EEVDF, Stoica & Abdel-Wahab 1995).
        """
        while len(self.turns) <= step:
            sizes = [len(deck) for deck in self.decks]
            now = len(self.turns) + 1
            ready = [d for d, k in enumerate(self.taken) if k * self.count < now * sizes[d]]
            deck = min(ready, key=lambda d: (self.taken[d] + 1) / sizes[d])
            self.turns.append((deck, self.taken[deck]))
            self.taken[deck] += 1
        return self.turns[step]

    def picture(self, i: int) -> int:
        """The picture of example number i of the run."""
        deck, turn = self.turn(i // self.n)
        round_, card = divmod(turn * self.n + i % self.n, len(self.decks[deck]))
        return int(self.order(deck, round_)[card])


class Examples:
    """The run's examples, by number.

    source: an Encoder or a Cache; names, sizes and weights: of its pictures; n: examples per
    optimizer step; num_train_timesteps: of the noise schedule.
    """

    def __init__(
        self,
        source,
        names: list[str],
        sizes: list[Size],
        n: int,
        seed: int,
        chances: Chances,
        num_train_timesteps: int,
        weights: list[int] | None = None,
    ):
        self.source, self.names, self.sizes, self.seed = source, names, sizes, seed
        self.chances, self.num_train_timesteps = chances, num_train_timesteps
        self.decks = Decks(sizes, n, seed, weights)

    def at_once(self, step: int, batch: int) -> int:
        """How many of a step's examples are in one pass: `batch`, or, if more, the largest divisor
        of n whose pixels are no more than those of `batch` pictures of the largest size.
        """
        n, pixels = self.decks.n, [height * width for height, width in self.sizes]
        room = batch * max(pixels) // pixels[self.decks.picture(step * n)]
        return max(batch, *(size for size in range(1, min(n, room) + 1) if n % size == 0))

    def example(self, i: int) -> Example:
        """Example number i of the run: its picture as the decks say, all else from (seed, i) alone.
        numpy's generator: the same on every device.

        All is drawn whether used or not, so that switching flips or dropout off leaves t, eps and
        noise as they are.
        """
        picture = self.decks.picture(i)
        shape = (4, *(side // 8 for side in self.sizes[picture]))  # as the VAE's latents are
        stream = np.random.default_rng([self.seed, i, EXAMPLE])
        flip, drop = stream.random(2)
        t = int(stream.integers(0, self.num_train_timesteps))
        eps, noise = stream.standard_normal((2, *shape), dtype=np.float32)
        noise = offset_noise(noise, stream, self.chances.noise_offset)
        flip = bool(self.chances.random_flip and flip < 0.5)
        drop = bool(drop < self.chances.caption_dropout)
        eps, noise = map(torch.from_numpy, (eps, noise))
        return Example(i, picture, flip, drop, t, eps, noise, stream.random())

    def prompt(self, example: Example) -> int:
        """The number of the example's caption, for source.prompt(): one of its picture's, or, where
        that is dropped, the unconditional one, which comes after all of them.
        """
        own = self.source.captions_of[example.picture]
        last = self.source.captions_of[-1].stop
        return last if example.drop_caption else own[int(example.caption * len(own))]

    def batch(self, numbers: range, device: torch.device, timesteps=drawn_timesteps) -> dict:
        """Examples `numbers` (B of them) on `device`: mean, std, eps, noise (B, C, H, W), t (B,),
        context (B, T, D), pooled (B, P), time_ids (B, 6), and where the run has masks the weights
        (B, 1, H, W) of the loss, "mask". timesteps: t from the examples.
        """
        examples = [self.example(i) for i in numbers]
        captions = map(self.prompt, examples)
        latents = zip(*(self.source.latent(e.picture, e.flip) for e in examples), strict=True)
        mean, std, time_ids, *mask = map(torch.stack, latents)
        context, pooled = map(torch.stack, zip(*map(self.source.prompt, captions), strict=True))
        eps, noise = map(torch.stack, zip(*((e.eps, e.noise) for e in examples), strict=True))
        batch = {"mean": mean, "std": std, "eps": eps, "noise": noise, "t": timesteps(examples)}
        batch |= {"context": context, "pooled": pooled, "time_ids": time_ids}
        if mask:
            batch["mask"] = loss_weights(*mask, self.chances.mask_floor)
        return {key: send(value, device) for key, value in batch.items()}


# ---- all of it, for a run ------------------------------------------------------------------------


def examples_of(
    config: Config, pictures: list[Picture], device, dtype, timesteps: int, claim=every_block
) -> Examples:
    """The run's examples: every picture and caption is encoded once and read from the cache, or,
    with --no-cache, anew in every step. device and dtype: the UNet's; timesteps: how many its
    noise schedule has; claim: see fill_cache().
    """
    name, half = config.pretrained_model_name_or_path, dtype != torch.float32
    vae = functools.partial(model.load_vae, name, device)
    text = functools.partial(model.load_text_encoders, name, device, half, config.max_tokens)
    crop = Crop(config.resolution, config.buckets, config.random_crop, config.seed)
    source = encoder = Encoder(pictures, vae, text, crop)  # the source becomes the cache, if asked
    if not config.upscale:
        refuse_small(pictures, encoder.sizes)
    if config.cache:
        folder, fingerprints = Path(config.cache_dir), encoder_fingerprints(name, half)
        fingerprints["text"] += f" {config.max_tokens} tokens"
        source = fill_cache(folder, encoder, config.random_flip, dtype, fingerprints, claim)
    else:
        flips = (False, config.random_flip)
        check_pictures(lambda i: encoder.views(i, flips), range(len(pictures)))
    chances = (config.random_flip, config.caption_dropout, config.noise_offset, config.mask_floor)
    drawn = (config.examples_per_step, config.seed, Chances(*chances), timesteps)
    names, weights = [p.name for p in pictures], [p.weight for p in pictures]
    return Examples(source, names, encoder.sizes, *drawn, weights)
