"""Captioned pictures from a folder or the Hub. What does not fit is refused by name, never left
out.
"""

import codecs
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from inputs.files import Refusal, digest, first_line

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
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
    without caption file and the reverse, a column that is not there, and an empty set.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and (folder / "metadata.jsonl").is_file():
        pictures = from_metadata(folder, caption_column)
    elif folder.is_dir() and not any(folder.rglob("*.parquet")):
        pictures = from_caption_files(folder)
    else:
        found = str(folder) if folder.is_dir() else name
        pictures = from_hub(found, image_column, caption_column)
    if not pictures:
        raise Refusal(
            f"{name} holds no pictures",
            "metadata.jsonl with its pictures, or name.txt beside name.jpg, or a Hub data set "
            "with an image column",
            "--dataset-name FOLDER",
        )
    return pictures


def from_files(captions: dict[Path, str], folder: Path) -> list[Picture]:
    """Pictures of local files, sorted by their name inside `folder`."""
    pictures = []
    for path in sorted(captions):
        read = functools.partial(content_of, path, "picture")
        name = path.relative_to(folder).as_posix()
        pictures.append(Picture(name, captions[path], digest(read()), read))
    return pictures


def content_of(path: Path, kind: str) -> bytes:
    """The bytes of a picture, caption or metadata file. Raises Refusal for what cannot be read, is
    no file (opening a pipe would wait for ever) or is too large to be one of its kind.
    """
    try:
        size = path.stat().st_size
        if path.is_file() and size <= LARGEST[kind]:
            return path.read_bytes()
        problem = f"{size / 1e6:.1f} MB" if path.is_file() else "no file"
    except OSError as error:
        problem = error.strerror or first_line(error)
    raise Refusal(
        f"{path} cannot be read as a {kind} ({problem})",
        f"a readable file of at most {LARGEST[kind] / 1e6:.0f} MB",
        "replace or remove it",
    )


def picture_files(folder: Path) -> set[Path]:
    """The pictures below `folder`. Raises Refusal for a link to a folder: it may lead anywhere,
    also in a circle, and what it holds would otherwise be left out without a word.
    """
    paths = list(folder.rglob("*"))
    if linked := sorted(p for p in paths if p.is_symlink() and p.is_dir()):
        raise Refusal(
            f"{linked[0]} is a link to a folder",
            "pictures in the data folder itself; links to single files are followed",
            "link the pictures one by one, or move them here",
        )
    return {p for p in paths if p.suffix.lower() in ENDINGS and (p.is_file() or p.is_symlink())}


def json_row(line: bytes) -> dict:
    """A line of metadata.jsonl. Raises ValueError for a key that is there twice."""

    def once(pairs: list[tuple]) -> dict:
        row = dict(pairs)
        if len(row) < len(pairs):
            raise ValueError(f"a key twice among {', '.join(key for key, _ in pairs)}")
        return row

    return json.loads(line, object_pairs_hook=once)


def is_text(value: object) -> bool:
    """Whether `value` is a string that UTF-8 can hold: JSON lets half a surrogate pair through."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def from_metadata(folder: Path, caption_column: str) -> list[Picture]:
    """metadata.jsonl: one JSON object a line with file_name, relative to the folder, and the
    caption.
    """
    captions: dict[Path, str] = {}
    found = picture_files(folder)
    content = content_of(folder / "metadata.jsonl", "metadata").removeprefix(codecs.BOM_UTF8)
    lines = content.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{folder / 'metadata.jsonl'} line {number}"
        try:
            row = json_row(line)
            name = row["file_name"]
            # By name: links to files are allowed (a Hub snapshot is made of them).
            path, parts = folder / name, Path(name)
            inside = not parts.anchor and ".." not in parts.parts
            there = inside and path.is_file()
        except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
            raise Refusal(
                f"{where} is not a row ({type(error).__name__}: {first_line(error)})",
                '{"file_name": "a.png", "text": "a caption"}',
                "correct the line",
            ) from error
        if not there:
            raise Refusal(
                f"{where} names {name!r}, which is "
                f"{'no file' if inside else 'outside the data folder'}",
                f"a picture inside {folder}",
                f"copy the picture into {folder} and name it there, or remove the line",
            )
        remedy = 'add one ("text": "" trains without), or --caption-column NAME'
        usual = ("text", "caption", "prompt")
        column = find_column(list(row), caption_column, usual, where, remedy)
        caption = "" if row[column] is None else row[column]
        if not is_text(caption):
            raise Refusal(
                f"{where} has the caption {caption!r:.200}", "text", "put the caption in quotes"
            )
        if path in captions:
            raise Refusal(
                f"{where} names {name} again",
                "one line for each picture",
                "remove one, or copy the picture under another name",
            )
        captions[path] = caption
    forgotten = sorted(found - captions.keys())
    if forgotten:
        raise Refusal(
            f"pictures in {folder} have no line in metadata.jsonl ({len(forgotten)}, such as "
            f"{forgotten[0].name})",
            "a line for each picture",
            "add the lines or move the pictures elsewhere",
        )
    return from_files(captions, folder)


def from_caption_files(folder: Path) -> list[Picture]:
    """name.txt beside name.jpg."""
    pictures: dict[Path, Path] = {}
    for path in sorted(picture_files(folder)):
        twin = pictures.setdefault(path.with_suffix(""), path)
        if twin != path:
            raise Refusal(
                f"{twin.name} and {path.name} in {path.parent} share one caption file",
                "a name of its own for each picture",
                "rename one and give it a .txt file",
            )
    texts = {p.with_suffix(""): p for p in sorted(folder.rglob("*.txt"))}
    for kind, found, other in (("picture", pictures, texts), ("caption file", texts, pictures)):
        lonely = sorted(found.keys() - other.keys())
        if lonely:
            want = "a .txt file" if kind == "picture" else "a picture"
            raise Refusal(
                f"{len(lonely)} {kind}s in {folder}, such as {found[lonely[0]].name}, stand alone",
                f"{want} of the same name beside each",
                f"add {want} or remove the {kind}",
            )
    captions = {path: read_text(texts[stem]).strip() for stem, path in pictures.items()}
    return from_files(captions, folder)


def read_text(path: Path) -> str:
    """A UTF-8 file without its byte order mark. Raises Refusal for other encodings."""
    try:
        return content_of(path, "caption").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal(
            f"{path} is not UTF-8 ({error})", "text in UTF-8", "save it as UTF-8"
        ) from error


def from_hub(name: str, image_column: str, caption_column: str) -> list[Picture]:
    """A Hub data set, or a folder of parquet files, through `datasets`; pictures stay encoded."""
    import datasets

    if not Path(name).is_dir():  # a mistyped folder is looked for half a minute
        print(f"{name} is no folder here: asking the Hub for a data set", file=sys.stderr)
    try:
        table = datasets.load_dataset(name, split="train")
    except Exception as error:  # offline, gated, misspelt: many classes, one meaning
        raise Refusal(
            f"the data set {name} is no folder here and could not be loaded ({first_line(error)})",
            "a folder of pictures with captions, or a reachable Hub data set with a train split",
            "check the name and the network, or pass --dataset-name FOLDER",
        ) from error
    where = f"{name} (columns {', '.join(table.column_names)})"
    images = [c for c, feature in table.features.items() if isinstance(feature, datasets.Image)]
    image_column = find_column(images, image_column, tuple(images[:1]), where)
    usual = ("text", "caption", "prompt")
    caption_column = find_column(table.column_names, caption_column, usual, where)
    kind = getattr(table.features[caption_column], "dtype", "")
    if kind not in ("string", "large_string", "string_view", "null"):
        raise Refusal(
            f"the column {caption_column} of {name} holds {kind or 'lists'}",
            "text",
            "--caption-column NAME",
        )
    table = table.cast_column(image_column, datasets.Image(decode=False))

    def read(i: int) -> bytes:
        cell = table[i][image_column] or {}
        if cell.get("path") and not cell.get("bytes"):
            return content_of(own_file(name, cell["path"]), "picture")
        return cell.get("bytes") or b""  # decode() then names the row

    captions = table[caption_column]
    return [
        Picture(f"{name} row {i}", captions[i] or "", digest(read(i)), functools.partial(read, i))
        for i in tqdm(range(len(table)), desc="reading pictures", leave=False, mininterval=1)
    ]


def own_file(name: str, path: str) -> Path:
    """The file that a row of the data set `name` names: in its folder, or where `datasets` keeps
    what it downloaded. A table from anywhere could name any other file of this disk.
    """
    import datasets
    import huggingface_hub

    kept = (
        *(datasets.config.HF_CACHE_HOME, huggingface_hub.constants.HF_HUB_CACHE),
        *(datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH),
        datasets.config.EXTRACTED_DATASETS_PATH,
    )
    folders = [Path(name)] if Path(name).is_dir() else [Path(each) for each in kept]
    target = (folders[0] / path).resolve()  # `path` itself where it is absolute
    if any(target.is_relative_to(folder.resolve()) for folder in folders):
        return target
    raise Refusal(
        f"a row of {name} names the picture {path!r}, which is outside the data set",
        "pictures inside the data set",
        "put the pictures into the table, or beside it",
    )


def find_column(
    columns: list[str],
    wanted: str,
    usual: tuple[str, ...],
    where: str,
    remedy: str = "--caption-column NAME (or --image-column NAME)",
) -> str:
    """`wanted`, or the first of the usual names that is there."""
    found = [c for c in ((wanted,) if wanted else usual) if c in columns]
    if not found:
        raise Refusal(
            f"{where} has the columns {', '.join(columns) or 'none that hold pictures'}",
            f"{' or '.join((wanted,) if wanted else usual) or 'a column of pictures'}",
            remedy,
        )
    return found[0]
