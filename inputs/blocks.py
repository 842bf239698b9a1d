"""Files of the cache that say of themselves what they are: damage, and another file's content under
their name, are noticed at the start of a run, and the file is made anew.
"""

import json
import re
import zlib
from pathlib import Path

from inputs.files import Refusal, safetensors_bytes, write_whole

LARGEST = 10**9  # bytes: 16 pictures of 4096 px, mirrored too, take a quarter
SUM = '"crc32":"{:08x}"'


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
