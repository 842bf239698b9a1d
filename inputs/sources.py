"""Captioned pictures from a folder or the Hub. What does not fit is refused by name, never left
out.
"""

import collections
import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from inputs.files import Refusal, digest, refuse, refusing

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jfif")
CAPTIONS = ("text", "caption", "prompt")  # how data sets call their column
# Bytes. Files are read whole; decode() takes no picture over 89 megapixels, 0.7 GB in 16 bits.
LARGEST = {"picture": 10**9, "metadata": 10**9, "caption": 10**6}


@dataclass(frozen=True)
class Picture:
    """One picture of the data set. read() gives the encoded file; digest tells its content."""

    name: str
    caption: str
    digest: str
    read: Callable[[], bytes]


def read_dataset(name: str, image_column: str = "", caption_column: str = "") -> list[Picture]:
    """The captioned pictures of a local folder or a Hub data set.

    A folder holds metadata.jsonl (file_name and a caption column), or name.txt beside name.jpg, or
    files that the `datasets` library reads (parquet). A folder's pictures come sorted by name, so
    that the order on disk is nothing. A link to a file, laid into the folder, is followed; a name
    that leads outside and a link to a folder are not. Raises Refusal for these, for a picture
    without caption and the reverse, a column that is not there, and an empty set.
    """
    folder, columns = Path(name).expanduser(), (caption_column,) if caption_column else CAPTIONS
    by_line = (folder / "metadata.jsonl").is_file()
    if not folder.is_dir() or (not by_line and any(folder.rglob("*.parquet"))):
        found = str(folder) if folder.is_dir() else name
        pictures = from_hub(found, image_column, columns)
    elif by_line:
        pictures = from_metadata(folder, columns)
    else:
        pictures = from_caption_files(folder)
    if not pictures:
        expected = "metadata.jsonl and its pictures, name.txt beside name.jpg, or a Hub data set"
        raise Refusal(f"{name} holds no pictures", expected, "--dataset-name FOLDER")
    return pictures


def for_all(work: Callable, items: Iterable) -> list:
    """[work(item), ...]. Raises one Refusal for all that are refused."""
    done, troubles = [], []
    for item in items:
        try:
            done.append(work(item))
        except Refusal as refusal:
            troubles.append(refusal.parts)
    refuse(troubles)
    return done


# ---- a folder ------------------------------------------------------------------------------------


def from_metadata(folder: Path, columns: tuple[str, ...]) -> list[Picture]:
    """metadata.jsonl: one JSON object a line with file_name, relative to the folder, and the
    caption.
    """
    file = folder / "metadata.jsonl"
    pictures = [(path.relative_to(folder).as_posix(), path) for path in picture_files(folder)]
    numbered = enumerate(content_of(file, "metadata").split("\n"), 1)
    lines = [(line, f"{file} line {number}") for number, line in numbered if line.strip()]
    return paired(folder, pictures, for_all(lambda line: row_of(*line, columns), lines))


def row_of(line: str, where: str, columns: tuple[str, ...]) -> tuple[str, str]:
    """The name of the picture and the caption in a line of metadata.jsonl. Raises Refusal."""
    expected = '{"file_name": "a.png", "text": "a caption"}'
    with refusing(f"{where} is not a row", expected, "correct the line"):
        row = json.loads(line)
        name = Path(row["file_name"]).as_posix()
    return name, caption_of(row[find_column(list(row), columns, where)], where)


def from_caption_files(folder: Path) -> list[Picture]:
    """name.txt beside name.jpg."""

    def key(path: Path) -> str:
        return path.with_suffix(".txt").relative_to(folder).as_posix()

    def caption(path: Path) -> tuple[str, str]:
        return key(path), content_of(path, "caption").strip()

    pictures = [(key(path), path) for path in picture_files(folder)]
    return paired(folder, pictures, for_all(caption, sorted(folder.rglob("*.txt"))))


def paired(folder: Path, pictures: list[tuple], captions: list[tuple]) -> list[Picture]:
    """The pictures of a folder, sorted by name, each with its caption. pictures: (key, path);
    captions: (key, text). Raises Refusal where a key does not stand once in both.
    """
    here, told = (collections.Counter(key for key, _ in each) for each in (pictures, captions))
    pictureless = [key for key in told if told[key] > here[key]]
    captionless = [path.name for key, path in pictures if here[key] > told[key]]
    odd = {"pictures without a caption": captionless, "captions without a picture": pictureless}
    expected = f"one caption for each picture ({', '.join(ENDINGS)})"
    remedy = "add, rename or remove what is odd"
    refuse(
        (f"{len(names)} {wrong} of their own in {folder}, such as {min(names)!r}", expected, remedy)
        for wrong, names in odd.items()
        if names
    )
    texts = dict(captions)

    def picture(item: tuple[str, Path]) -> Picture:
        key, path = item
        read = functools.partial(content_of, path, "picture")
        return Picture(path.relative_to(folder).as_posix(), texts[key], digest(read()), read)

    return for_all(picture, sorted(pictures, key=lambda item: item[1]))


def picture_files(folder: Path) -> set[Path]:
    """The pictures below `folder`. Raises Refusal for a link to a folder: it may lead anywhere,
    also in a circle, and what it holds would otherwise be left out without a word.
    """
    paths = list(folder.rglob("*"))
    refuse(
        (f"{path} is a link to a folder", "links to single files only", "move its pictures here")
        for path in sorted(paths)
        if path.is_symlink() and path.is_dir()
    )
    return {p for p in paths if p.suffix.lower() in ENDINGS and (p.is_file() or p.is_symlink())}


def content_of(path: Path, kind: str) -> bytes | str:
    """The bytes of a picture, or the text of a caption or metadata file, without its byte order
    mark. Raises Refusal for what cannot be read, is no file (opening a pipe would wait for ever),
    is too large to be one of its kind or is text in another encoding than UTF-8.
    """
    what = "a file" if kind == "picture" else "text in UTF-8"
    expected = f"{what} of at most {LARGEST[kind] / 1e6:.0f} MB"
    with refusing(f"{path} ({kind}) cannot be read", expected, "replace or remove it"):
        size = path.stat().st_size
        if not path.is_file():
            raise OSError("no file")
        if size > LARGEST[kind]:
            raise OSError(f"{size / 1e6:.1f} MB")
        content = path.read_bytes()
        return content if kind == "picture" else content.decode("utf-8-sig")


def caption_of(value: Any, where: str) -> str:
    """A caption, empty where there is none. Raises Refusal for what is no text, or none that UTF-8
    holds: JSON lets half a surrogate pair through.
    """
    value = "" if value is None else value
    if isinstance(value, str) and value.encode(errors="ignore").decode() == value:
        return value
    raise Refusal(f"{where} has the caption {value!r:.200}", "text", "another --caption-column")


# ---- the Hub -------------------------------------------------------------------------------------


def from_hub(name: str, image_column: str, columns: tuple[str, ...]) -> list[Picture]:
    """A Hub data set, or a folder of parquet files, through `datasets`; pictures stay encoded."""
    import datasets

    if not Path(name).is_dir():  # a mistyped folder is looked for half a minute
        print(f"{name} is no folder here: asking the Hub for a data set", file=sys.stderr)
    found = f"the data set {name} is no folder here and could not be loaded"
    expected = "a folder of pictures with captions, or a reachable Hub data set with a train split"
    remedy = "check the name and the network, or pass --dataset-name FOLDER"
    with refusing(found, expected, remedy):
        table = datasets.load_dataset(name, split="train")
    where = f"{name} (columns {', '.join(table.column_names)})"
    images = [c for c, feature in table.features.items() if isinstance(feature, datasets.Image)]
    image_column = find_column(images, (image_column,) if image_column else images[:1], where)
    captions = table[find_column(table.column_names, columns, where)]
    table = table.cast_column(image_column, datasets.Image(decode=False))

    def read(i: int) -> bytes:
        cell = table[i][image_column] or {}
        if cell.get("path") and not cell.get("bytes"):
            return content_of(own_file(name, cell["path"]), "picture")
        return cell.get("bytes") or b""  # decode() then names the row

    def picture(i: int) -> Picture:
        row = f"{name} row {i}"
        caption = caption_of(captions[i], row)
        return Picture(row, caption, digest(read(i)), functools.partial(read, i))

    return for_all(picture, tqdm(range(len(table)), "reading pictures", leave=False, mininterval=1))


def own_file(name: str, path: str) -> Path:
    """The file that a row of the data set `name` names: in its folder, or where `datasets` keeps
    what it downloaded. A table from anywhere could name any other file of this disk.
    """
    import datasets
    import huggingface_hub

    kept = (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    folders = [Path(name)] if Path(name).is_dir() else [Path(each) for each in kept]
    target = (folders[0] / path).resolve()  # `path` itself where it is absolute
    if not any(target.is_relative_to(folder.resolve()) for folder in folders):
        found = f"a row of {name} names the picture {path!r}, which is outside the data set"
        raise Refusal(found, "pictures inside the data set", "put them into the table or beside it")
    return target


def find_column(columns: list[str], names: Sequence[str], where: str) -> str:
    """The first of `names` that is there. Raises Refusal."""
    for name in names:
        if name in columns:
            return name
    found = f"{where} has the columns {', '.join(columns) or 'none that hold pictures'}"
    remedy = '--caption-column NAME or --image-column NAME; "text": "" trains without a caption'
    raise Refusal(found, " or ".join(names) or "a column of pictures", remedy)
