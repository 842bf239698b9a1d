"""Files of the cache: each holds ROWS_PER_FILE rows, is written whole or not at all, and says of
itself what it is. Damage, and another file's content under its name, are noticed at the start of a
run, and the file is made anew.
"""

import contextlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from inputs.files import Refusal, digest, safetensors_bytes, sweep_parts, write_whole

ROWS_PER_FILE = 16  # pictures or captions in one file: what an interruption may cost
LARGEST = 10**9  # bytes: 16 pictures of 4096 px, mirrored too, take a quarter
SUM = '"crc32":"{:08x}"'


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
    encode: Callable[[Iterable[range]], Iterator[dict[str, Tensor]]],
    claim: Callable[[str], bool] = every_block,
) -> list[Path]:
    """One file for each ROWS_PER_FILE of keys, encoding only the blocks that are not on disk yet.

    keys: what each row depends on (content, encoder, resolution); a block's file is named by its
    keys, so changed data or encoders give other files and nothing stale is ever read; a damaged one
    is made anew. encode(blocks): the rows of these blocks of numbers, in order; it is called only
    where there is something to encode, so that no encoder is loaded for nothing.
    claim(name): whether this process encodes that block. Of several, one that is told no leaves it
    to another; all files are there once each has ended.
    """
    blocks = cut(range(len(keys)), ROWS_PER_FILE)
    files = [folder / f"{kind}-{digest(*(keys[i] for i in block))}.safetensors" for block in blocks]
    shown = tqdm(files, f"reading encoded {kind}s", leave=False, mininterval=1, delay=2)
    pairs = zip(shown, blocks, strict=True)
    todo = [(file, block) for file, block in pairs if not whole_block(file)]
    sweep_parts(folder)
    if not todo:
        return files
    total = sum(len(block) for _, block in todo)
    with tqdm(total=total, desc=f"encoding {kind}s", unit="", mininterval=1) as bar:

        def claimed() -> Iterator[tuple[Path, range]]:
            for file, block in todo:
                if claim(file.name):
                    yield file, block
                else:
                    bar.total -= len(block)

        write_blocks(claimed(), kind, encode, bar)
    return files


def write_blocks(pairs: Iterator[tuple[Path, range]], kind: str, encode: Callable, bar) -> None:
    """Encode the blocks of `pairs`, of each its file and numbers, and write each when it is whole.

    A pair is taken when encode() asks for its numbers: a process claims what it comes to, not all.
    """
    if not (first := next(pairs, None)):
        return
    told, mine = itertools.tee(itertools.chain([first], pairs))
    # closing: whatever goes wrong here, what encodes ahead stops at once
    with contextlib.closing(encode(block for _, block in told)) as rows:
        for file, block in mine:
            block_rows = []
            for row in itertools.islice(rows, len(block)):
                block_rows.append(row)
                bar.update()
            stacked = {key: torch.stack([row[key] for row in block_rows]) for key in block_rows[0]}
            write_block(file, stacked, kind)
        next(rows, None)  # past the last row, so that encode() comes to its end


def write_block(path: Path, tensors: dict, kind: str) -> None:
    """Write a safetensors file that says its own name and the CRC-32 of all its bytes: damage and
    another file's content under this name are then noticed. It is no guard against malice.
    """
    header = {"kind": kind, "name": path.name, "crc32": f"{0:08x}"}
    blob = safetensors_bytes(tensors, header)
    mine = SUM.format(zlib.crc32(blob)).encode()
    write_whole(path, blob.replace(SUM.format(0).encode(), mine, 1))


def whole_block(path: Path) -> bool:
    """Whether `path` is as write_block() left it; says so where it is there and is not."""
    if not path.exists():
        return False
    readable = path.is_file() and path.stat().st_size < LARGEST
    blob = path.read_bytes() if readable else b""
    header = blob[: 8 + int.from_bytes(blob[:8], "little")]
    said = re.search(SUM.format(0).replace("0" * 8, "([0-9a-f]{8})").encode(), header)
    if said and f'"name":{json.dumps(path.name)}'.encode() in header:
        bare = blob.replace(said[0], SUM.format(0).encode(), 1)
        if zlib.crc32(bare) == int(said[1], 16):
            return True
    earlier = b'"__metadata__"' in header and b'"crc32"' not in header
    print(f"{path} is {'of an earlier version' if earlier else 'damaged'} and is made anew")
    if path.is_dir():
        raise Refusal(f"{path} is a folder", "a file of the cache", f"rm -r {path}")
    return False
