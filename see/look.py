"""The pictures and captions before any training: python -m see.look t4 --dataset-name FOLDER

Takes a run's own options and cuts as that run will, without its model, network or GPU: a sheet of
the crops, by the size at which they train, and what is odd about the set, by name.
"""

import collections
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from inputs import options
from inputs.ahead import work_ahead
from inputs.files import Refusal, place, write_whole
from inputs.one_file import SHIPPED
from inputs.pictures import changes, refuse_small, table_of_sizes, upright_size
from inputs.progress import progress
from inputs.sources import Picture, read_datasets, ten
from see import sheet

MOST = 120  # crops on the sheet, and one more of some sizes: a file of a few MB
SIDE = 144  # width of a crop on the sheet, in pixels


def look(config: options.Config) -> bool:
    """Print what is odd about the set and where the sheet of all others is. Returns whether a run
    stops at none of its pictures. Raises Refusal for a data set that a run cannot read at all.
    """
    import data  # here: it imports torch, and a wrong option is answered before that

    pictures = read_datasets(config)
    print(pictures)
    crop = data.Crop(config.resolution, config.buckets, config.random_crop, config.seed)

    def stops(picture: Picture) -> str:
        """Why a run stops at it; "" where it does not."""
        try:
            size, flips = crop.size(upright_size(picture)), (False, config.random_flip)
            data.views(picture, size, config.random_crop, config.seed, flips)
            if not config.upscale:
                refuse_small([picture], [size])
        except Refusal as refusal:
            return str(refusal).partition(". What to do")[0]
        return ""

    bar = progress(pictures, "reading")
    with work_ahead(stops, bar, 16) as found:
        why = dict(zip(pictures, found, strict=True))
    whole = [picture for picture in pictures if not why[picture]]
    sizes = [crop.size(upright_size(picture)) for picture in whole]
    for each in filter(None, why.values()):
        print(f"a run stops at this: {each}")
    if not whole:
        return False
    said = [*odd(whole, config), table_of_sizes(whole, sizes), changes(whole, sizes)]
    print(*filter(None, said), sep="\n")

    def shown(i: int) -> tuple[Image.Image, str]:
        pixels = data.views(whole[i], sizes[i], config.random_crop, config.seed, (False,))[0][0]
        levels = (pixels.permute(1, 2, 0) + 1) * 127.5  # (3, H, W) of [-1, 1] to (H, W, 3) of 255
        image = Image.fromarray(levels.round().byte().numpy())
        image.thumbnail((SIDE, 4 * SIDE))  # the width decides: words stand above it
        words = "(no caption)" if whole[i].bare else " | ".join(whole[i].captions)
        return image, f"{whole[i].name}: {words}"

    rows, every = {}, -(-len(whole) // MOST)
    for group in data.alike(sizes):
        (height, width), crops = sizes[group[0]], [*map(shown, group[::every])]
        rows[f"{width} x {height} px: {len(crops)} of {len(group)} pictures"] = crops
    names = [*(place(each).resolve().name for each in config.dataset_name), config.recipe]
    path = Path(f"runs/look-{'-'.join(names)}.png")
    path = config.out / "look.png" if config.output_dir else path
    drawn(rows).save(file := io.BytesIO(), "PNG")
    write_whole(path, file.getvalue())
    count = sum(map(len, rows.values()))
    print(f"{path}: {count} of {len(pictures)} pictures as the run cuts them, none mirrored")
    return len(whole) == len(pictures)


def odd(pictures: list[Picture], config: options.Config) -> Iterator[str]:
    """What there is to know of a set's sizes, captions and files, a line for each."""
    from transformers import CLIPTokenizer  # here, as above

    import model

    # A model of the Hub may not be here; every SDXL has the same tokenizer.
    own = place(config.pretrained_model_name_or_path) / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(own if own.is_dir() else SHIPPED / "tokenizer")
    whose = f"{'the model' if own.is_dir() else 'SDXL'}'s tokenizer"
    chunks = config.max_tokens // 75
    captions = [each.strip() for p in pictures for each in p.captions]
    files: dict[str, list[str]] = {}
    for p in pictures:
        files.setdefault(p.digest, []).append(p.name)
    sizes = [(h * w, f"{w} x {h} px ({p.name})") for p in pictures for h, w in [upright_size(p)]]
    yield f"sizes: from {min(sizes)[1]} to {max(sizes)[1]}"
    counts = collections.Counter(filter(None, captions))
    for what, names in {
        "pictures without a caption": [p.name for p in pictures if p.bare],
        f"captions cut after {chunks * (tokenizer.model_max_length - 2)} tokens by {whose}": [
            p.name for p in pictures if model.too_long([*p.captions], tokenizer, chunks)
        ],
        "captions of several pictures": [f"{n} x {c}" for c, n in counts.items() if n > 1],
        "files there several times": [" = ".join(each) for each in files.values() if each[1:]],
    }.items():
        yield f"{what}: {len(names)}" + f", {ten(names)}" * bool(names)


def drawn(rows: dict[str, list[tuple[Image.Image, str]]]) -> Image.Image:
    """The sheet. rows: by the heading beside them crops of one size, each with its words."""
    grids = []
    for heading, crops in rows.items():
        images, words = zip(*crops, strict=True)
        grids.append(sheet.grid({heading: [*images]}, words))
    return sheet.stacked(grids)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code: 1 where a run would stop. Raises Refusal."""
    config = options.parse(argv)
    options.announce(f"looking at {' and '.join(config.dataset_name)} as {config.recipe}")
    return 0 if look(config) else 1


if __name__ == "__main__":
    sys.exit(options.or_leave(main))
