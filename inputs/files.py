"""Refusals that help, and files that are either whole or absent.

Small things every other module needs: the one exception that is shown as a sentence instead of a
traceback, an atomic write, one run in one folder, and a safetensors writer whose bytes depend on
nothing but its input.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import safe_open

# An adapter's: what diffusers' load_lora_weights(folder) looks for.
FILE_NAME = "pytorch_lora_weights.safetensors"
# torch.save's files, which run code when they are read.
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
CONVERT = "such files may run code when they are read: take its .safetensors, or convert it"


class Refusal(Exception):
    """Something the user can mend. The commands print it as one sentence and exit with 1.

    `found`: what is there, with its value; `expected`: what should be there; `remedy`: what to type
    or do.
    """

    def __init__(self, found: str, expected: str, remedy: str):
        self.parts = tuple(map(sayable, (found, expected, remedy)))
        super().__init__("{}; expected {}. What to do: {}".format(*self.parts))

    def __reduce__(self):  # pickled, for another process, it is the same sentence
        return Refusal, self.parts, vars(self) | {"args": self.args}


def refuse(troubles: Iterable[Iterable[str]]) -> None:
    """Raise one Refusal that names all troubles, each (found, expected, remedy); none raises
    nothing. What is expected alike and mended alike is one sentence, any other a sentence of its
    own behind " | ".
    """
    alike: dict[tuple, list[str]] = {}
    for found, *rest in dict.fromkeys(map(tuple, troubles)):
        alike.setdefault(tuple(rest), []).append(found)
    for each in alike.values():
        each[10:] = [f"{len(each) - 10} more"] if len(each) > 10 else []
    if said := [Refusal(" and ".join(each), *rest) for rest, each in alike.items()]:
        said[0].parts = tuple(map(" | ".join, zip(*(each.parts for each in said), strict=True)))
        said[0].args = (" | ".join(map(str, said)),)
        raise said[0]


def place(name: str) -> Path:
    """The path that a person means by `name`; the repository's own pocket/model and pocket/ink are
    found from every working directory.
    """
    own = Path(__file__).parent.parent / name
    path = Path(os.path.expanduser(name))  # Path's own raises for a user who is not there
    return own if name.startswith("pocket/") and not path.exists() and own.is_dir() else path


def folder_of(name: str, option: str, expected: str) -> Path | None:
    """The folder called `name`; None where there is none and the Hub may be meant. Raises Refusal
    for a file, saying of what kind, and for a path that leads nowhere.
    """
    path = place(name)
    if path.is_dir():
        return path
    if path.is_file():
        remedy = f"unpack it, or name the folder that it lies in: {option} FOLDER"
        remedy = CONVERT if path.suffix.lower() in PICKLES else remedy
        raise Refusal(f"{name} is a {path.suffix or 'plain'} file, no folder", expected, remedy)
    if "://" in name:
        hub_name = "/".join(re.sub(r"^\w+://[^/]*/(datasets/)?", "", name).split("/")[:2])
        raise Refusal(f"{name} is an address", expected, f"{option} {hub_name}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise Refusal(f"there is no folder {name}", expected, f"correct {option} FOLDER")
    return None


@contextlib.contextmanager
def refusing(found: str, expected: str, remedy: str) -> Iterator[None]:
    """Whatever is raised inside becomes a Refusal that ends `found` with the reason: libraries
    raise nearly every class for a damaged file or an absent network.
    """
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        # datasets and huggingface_hub often tell the reason only in what raised their error.
        cause = f"; {first_line(error.__cause__)}" if error.__cause__ else ""
        raise Refusal(f"{found} ({kind}{first_line(error)}{cause})", expected, remedy) from error


def sayable(text: str, longest: int = 1200) -> str:
    """`text` on one line that a terminal shows as it is: names and captions come from anywhere, and
    may hold line ends, escape sequences or a megabyte. Its middle gives way to `longest`.
    """
    if len(text) > longest:
        text = f"{text[: longest * 3 // 4]} ... {text[-longest // 4 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """An exception's first line, or its class where it says nothing; with the second where that
    lists what there is.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line[:200] for line in lines[: 2 if "available" in str(error) else 1])


def digest(*parts: bytes | str) -> str:
    """32 hex digits of SHA-256 over the parts, each preceded by its length: ab, c is not a, bc."""
    sha = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()[:32]


def writing(path: Path) -> contextlib.AbstractContextManager[None]:
    """Inside, what keeps `path` from being written becomes a Refusal."""
    expected = "a folder that this user may write to, with room"
    remedy = "free some space or name another --output-dir or --cache-dir, then the same command"
    return refusing(f"{path} could not be written", expected, remedy)


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds all of it or is untouched: write aside, fsync, rename.

    Raises Refusal where the folder cannot be written or the disk is full; the part file is removed
    then, and on Ctrl-C.
    """
    aside = part_of(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)  # gone already where it was renamed


def part_of(path: Path) -> Path:
    """Where `path` is half-written until it is renamed: in its folder, under the number of this
    process and its host's name, since several hosts may share a disk.
    """
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")


@contextlib.contextmanager
def only_run(folder: Path):
    """Hold `folder` for this process. Raises Refusal where another run holds it, or where it cannot
    be written.

    The lock is the kernel's: it goes with the process, however that ends. On a file system without
    locks, such as some network mounts, nothing is held.
    """
    from filelock import FileLock, Timeout  # here: a wrong option is answered before such imports

    # No soft lock, a file that counts as a lock while it is there: it would outlive a lost machine.
    lock = FileLock(folder / ".lock", timeout=0, fallback_to_soft=False)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    try:
        lock.acquire()
    except Timeout:
        found = f"another run is at work in {folder}"
        remedy = "wait for it, or name another --output-dir"
        raise Refusal(found, "one run for each output folder", remedy) from None
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    try:
        yield
    finally:
        lock.release()


def sweep_parts(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`; living ones' parts stay. To be
    called before this process writes there: a part of its number is a dead one's, too, since in a
    container every start may have the same.
    """
    for part in list(folder.rglob(".*.part")):
        with contextlib.suppress(OSError):  # a read-only cache, say: it does no harm there
            if is_left(part):
                shutil.rmtree(part) if part.is_dir() else part.unlink()


def is_left(part: Path) -> bool:
    """Whether who was writing `part` is gone. Other hosts' processes cannot be asked for: what is
    theirs is taken for left when it is a day old.
    """
    ours = re.fullmatch(r"(\..+)\.(\d+)\.part", part.name)  # others' hidden files may end so, too
    if ours and ours[1].endswith(f".{socket.gethostname()}"):
        return int(ours[2]) == os.getpid() or not Path("/proc", ours[2]).exists()
    return bool(ours) and time.time() - part.stat().st_mtime > 24 * 3600


def safetensors_bytes(tensors: dict, metadata: dict[str, str]) -> bytes:
    """The safetensors file of `tensors` with `metadata` in the given order.

    The library's own writer puts metadata in random order, so equal adapters would be unequal
    files; here the library lays out the tensors and only its header is written again. Format:
    https://github.com/huggingface/safetensors#format
    """
    import safetensors.torch  # here, since it imports torch, and options are checked before that

    blob = safetensors.torch.save(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    )
    size = int.from_bytes(blob[:8], "little")
    entries = json.loads(blob[8 : 8 + size])
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data begins at a multiple of 8 bytes
    return len(header).to_bytes(8, "little") + header + blob[8 + size :]


def data_section(blob: bytes) -> bytes:
    """What follows the header in a safetensors file."""
    return blob[8 + int.from_bytes(blob[:8], "little") :]


def open_safetensors(path: Path, device: str = "cpu"):
    """`safe_open(path)` whose failures are Refusals that name the file."""
    size = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
    found = f"{path} is not a whole safetensors file ({size})"
    remedy = "copy or download it again (what this project wrote can go: it is made anew)"
    remedy = CONVERT if path.suffix.lower() in PICKLES else remedy
    with refusing(found, "a file as its writer left it", remedy):
        if not path.is_file():  # opening a pipe would wait for ever
            raise OSError("not a file")
        return safe_open(path, framework="pt", device=device)


def read_tensors(path: Path) -> tuple[dict, dict[str, str]]:
    """A safetensors file's tensors, sorted by name, and what its header says. Raises Refusal."""
    expected, remedy = "numbers that this torch and this safetensors know", "use another file"
    with open_safetensors(path) as file, refusing(f"{path} cannot be read", expected, remedy):
        return {key: file.get_tensor(key) for key in sorted(file.keys())}, file.metadata() or {}
