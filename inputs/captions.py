"""The texts that a picture is trained under: its captions, or what is made of their tags."""

import re

import numpy as np

from inputs.files import digest
from inputs.options import Config

TAGS = 4  # what a random stream is for, beside those of data.py


def variants(captions: tuple[str, ...], options: Config) -> tuple[str, ...]:
    """The texts that a picture with these `captions` is trained under; for each example one of them
    is drawn. Where nothing varies they are the captions; else --caption-variants of each, so that
    all can be encoded before the first step.
    """
    count = options.caption_variants if options.shuffle_tags or options.tag_dropout else 1
    made = [variant(caption, k, options) for caption in captions for k in range(count)]
    return tuple(made) if len(set(made)) > 1 else (made[0],)


def variant(caption: str, k: int, options: Config) -> str:
    """Text number k of a caption, from (seed, caption, k) alone: tags behind the first --keep-tags
    left out or in another order, never all left out, and the trigger in front where it is lacking.
    """
    text = caption
    if options.shuffle_tags or options.tag_dropout:
        tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
        kept, others = tags[: options.keep_tags], tags[options.keep_tags :]
        stream = np.random.default_rng([options.seed, int(digest(caption)[:8], 16), TAGS, k])
        # Both are drawn whether used or not: without shuffling the same tags are left out.
        order, stays = stream.permutation(len(others)), stream.random(len(others))
        order = order if options.shuffle_tags else range(len(others))
        kept = kept + [others[i] for i in order if stays[i] >= options.tag_dropout]
        text = ", ".join(kept or tags[:1])
    word = rf"(?<!\w){re.escape(options.trigger)}(?!\w)"  # CLIP knows no capitals
    if not options.trigger or re.search(word, text, re.IGNORECASE):
        return text
    return ", ".join(filter(None, (options.trigger, text.strip())))
