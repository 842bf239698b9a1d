"""Files of the cache: each holds ROWS_PER_FILE rows and is written whole or not at all. One that is
cut short is noticed at the start of a run, and made anew.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from inputs.files import digest, open_safetensors, safetensors_bytes, sweep_parts, write_whole
from inputs.progress import progress

ROWS_PER_FILE = 16  # pictures or captions in one file: what an interruption may cost
Place = tuple[Path, int]  # a file, and the row in it


def cut(items: list | range, size: int) -> list:
    """`items` in pieces of `size`; the last may be shorter."""
    return [items[at : at + size] for at in range(0, len(items), size)]


def every_block(name: str) -> bool:
    """The claim of a process that is alone: each block is its to encode."""
    return True


def fill(
    folder: Path,
    kind: str,
    keys: list[str],
    encode: Callable[[Iterable[list]], Iterator[dict[str, Tensor]]],
    claim: Callable[[str], bool] = every_block,
    alike: list[list[int]] | None = None,
) -> list[Place]:
    """Where the row of each key is: one file for each ROWS_PER_FILE of those that are `alike` (in
    shape; without it all), encoding only the blocks that are not on disk yet.

    keys: what each row depends on (content, encoder, resolution); a block's file is named by its
    keys, so changed data or encoders give other files and nothing stale is ever read; a damaged one
    is made anew. encode(blocks): the rows of these blocks of numbers, in order; it is called only
    where there is something to encode, so that no encoder is loaded for nothing.
    claim(name): whether this process encodes that block. Of several, one that is told no leaves it
    to another; all files are there once each has ended.
    """
    rows = alike or [list(range(len(keys)))]
    blocks = [block for each in rows for block in cut(each, ROWS_PER_FILE)]
    files = [folder / f"{kind}-{digest(*(keys[i] for i in block))}.safetensors" for block in blocks]
    sweep_parts(folder)
    phase = {"prompt": "texts", "latent": "pictures"}.get(kind, kind)
    pairs = list(zip(files, blocks, strict=True))
    if todo := [(file, block) for file, block in pairs if not is_whole(file)]:
        total = sum(len(block) for _, block in todo)
        with progress(None, phase, total, leave=True) as bar:
            write_blocks(todo, encode, claim, bar)
    places = {}
    for file, block in pairs:
        places |= {i: (file, row) for row, i in enumerate(block)}
    return [places[i] for i in range(len(keys))]


def write_blocks(todo: list[tuple[Path, list]], encode: Callable, claim: Callable, bar) -> None:
    """Encode the blocks of `todo`, of each its file and numbers, and write each when it is whole.

    A block is claimed when encode() asks for its numbers: a process claims what it comes to, not
    all.
    """

    def claimed() -> Iterator[tuple[Path, list]]:
        for file, block in todo:
            if claim(file.name):
                yield file, block
            else:
                bar.total -= len(block)

    told, mine = itertools.tee(claimed())
    # closing: whatever goes wrong here, what encodes ahead stops at once
    with contextlib.closing(encode(block for _, block in told)) as rows:
        for file, block in mine:
            block_rows = []
            for row in itertools.islice(rows, len(block)):
                block_rows.append(row)
                bar.update()
            stacked = {key: torch.stack([row[key] for row in block_rows]) for key in block_rows[0]}
            write_block(file, stacked)


def write_block(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file of the cache."""
    write_whole(path, safetensors_bytes(tensors, {}))


def is_whole(path: Path) -> bool:
    """Whether a file of the cache is as long as its header states; says so where it is not."""
    if not path.exists():
        return False
    with contextlib.suppress(Exception):
        open_safetensors(path)
        return True
    print(f"{path} is damaged and is made anew")
    return False
