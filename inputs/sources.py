"""Captioned pictures from a folder or the Hub. What does not fit is refused by name, or left out,
counted and said.
"""

import collections
import contextlib
import csv
import functools
import importlib
import io
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from inputs.files import Refusal, digest, folder_of, refuse, refusing, sayable

# Media that Pillow's own list of endings does not know without a plug-in, or at all.
MEDIA = set(
    ".heic .heif .hif .jxl .svg .xcf .psb .cr2 .cr3 .nef .arw .dng .raw "
    ".mp4 .m4v .mov .webm .mkv .avi".split()
)
# Of Pillow's formats: for PostScript it would start Ghostscript, a program that the picture writes;
# of the others it knows the name alone.
NO_PICTURES = {"EPS", "MPEG", "HDF5", "GRIB", "BUFR", "WMF"}
NOT_MADE_BY_PEOPLE = {"__MACOSX", "@eaDir", "Thumbs.db"}  # and what begins with a dot
TABLES = [f"{sub}metadata.{ending}" for sub in ("", "train/") for ending in ("jsonl", "csv")]
BESIDE = (".txt", ".caption")  # how a caption's own file ends
CAPTIONS = ("text", "caption", "prompt")  # how data sets call their column
CONTROL = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]")  # all of ASCII's but tab and line ends
DELETE = r"tr -d '\000-\010\013\014\016-\037\177' <"
ONE_FOR_ALL = 'for f in {}; do echo "a photo of sks dog" > "${{f%.*}}.txt"; done'
MEND = "for each file named, FILE: {} FILE > FILE.new && mv FILE.new FILE"
# Bytes. Files are read whole; decode() takes no picture over 89 megapixels, 0.7 GB in 16 bits.
LARGEST = {"picture": 10**9, "metadata": 10**9, "caption": 10**6}


@dataclass(frozen=True)
class Picture:
    """One picture of the data set. read() gives the encoded file; digest tells its content."""

    name: str
    caption: str
    digest: str
    read: Callable[[], bytes]


class Pictures(list[Picture]):
    """The pictures of a data set, and in notes what of it is not trained on as one may think."""

    notes: Sequence[str] = ()

    def __str__(self) -> str:
        return "; ".join([f"{len(self)} pictures", *self.notes])


def read_dataset(name: str, image_column: str = "", caption_column: str = "") -> Pictures:
    """The captioned pictures of a local folder or a Hub data set.

    A folder holds metadata.jsonl or .csv (file_name and a caption column), also in train/, or
    name.txt or .caption beside name.jpg, or files that the `datasets` library reads (parquet). A
    folder's pictures come sorted by name, so that the order on disk is nothing. A link to a file,
    laid into the folder, is followed; a name that leads outside and a link to a folder are not. A
    picture without a caption gets an empty one. Raises Refusal for what is said, for a caption
    without a picture, a column that is not there, no caption at all, and an empty set.
    """
    expected = "metadata.jsonl and its pictures, name.txt beside name.jpg, or a Hub data set"
    folder = folder_of(name, "--dataset-name", expected)
    columns = (caption_column,) if caption_column else CAPTIONS
    table = folder and next((folder / t for t in TABLES if (folder / t).is_file()), None)
    if not folder or (not table and any(p.suffix == ".parquet" for p in files_in(folder)[0])):
        pictures = Pictures(from_hub(str(folder or name), image_column, columns))
    else:
        pictures = from_folder(folder, table, columns)
    if not pictures:
        found = "; ".join([f"{name} holds no pictures", *pictures.notes])
        raise Refusal(found, expected, "--dataset-name FOLDER")
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


def from_folder(folder: Path, table: Path | None, columns: tuple[str, ...]) -> Pictures:
    """The pictures of a folder whose captions are in the file `table`, or in one each."""
    paths, left_out = files_in(folder)
    top = table.parent if table else folder

    def key(path: Path) -> str:
        """By what a picture and its caption find each other; Macs write accents as two letters."""
        path = path.relative_to(folder)
        return normal(path.as_posix() if table else path.with_suffix("").as_posix())

    def caption(path: Path) -> tuple[str, str, str]:
        return key(path), path.relative_to(folder).as_posix(), content_of(path, "caption").strip()

    def row(line: tuple[str, str]) -> tuple[str, str, str]:
        name, text = row_of(*line, columns)
        name = (top.relative_to(folder) / name).as_posix()
        return normal(name), name, text

    if table:
        captions = for_all(row, rows_of(table))
    else:
        captions = for_all(caption, [p for p in paths if p.suffix.lower() in BESIDE])
    pictures = [p for p in paths if is_picture(p) and (p.is_file() or p.is_symlink())]
    left_out["lie outside train/"] = [p for p in pictures if top not in p.parents]
    pictures = [p for p in pictures if top in p.parents]
    unused = {key(path) for each in left_out.values() for path in each} - set(map(key, pictures))
    captions = [each for each in captions if each[0] not in unused]
    found = Pictures(paired(folder, [(key(p), p) for p in pictures], captions, look_alikes(paths)))
    found.notes = [
        f"{named([p.relative_to(folder).as_posix() for p in left])} left out, since they {why}"
        for why, left in left_out.items()
        if left
    ]
    kohya = [p.name for p in found if re.match(r"\d+_", Path(p.name).parent.name)]
    if kohya:
        note = f"{named(kohya)} in folders like 10_style: each counts once, the number is no repeat"
        found.notes.append(note)
    return found


def normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def named(names: list[str]) -> str:
    """How many, and the first of them."""
    return f"{len(names)} (the first: {sayable(names[0])})"


def rows_of(table: Path) -> list[tuple[str, str]]:
    """The rows of metadata.jsonl or metadata.csv as JSON, and where each stands."""
    text = content_of(table, "metadata")
    if table.suffix == ".jsonl":
        numbered: Iterable = enumerate(text.split("\n"), 1)
    else:
        remedy = 'quotes around a caption with commas: a.png,"red, round"'
        with refusing(f"{table} is no table", "file_name,text and one row a picture", remedy):
            reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", strict=True)
            numbered = [(reader.line_num, json.dumps(row)) for row in reader]
            for line, row in numbered:
                if "" in json.loads(row):
                    raise ValueError(f"line {line} has more cells than there are columns")
    return [(line, f"{table} line {number}") for number, line in numbered if line.strip()]


def row_of(line: str, where: str, columns: tuple[str, ...]) -> tuple[str, str]:
    """The name of the picture and the caption in a line of metadata.jsonl. Raises Refusal."""
    expected = '{"file_name": "a.png", "text": "a caption"}'
    with refusing(f"{where} is not a row", expected, "correct the line"):
        row = json.loads(line)
        name = Path(row["file_name"]).as_posix()
    return name, caption_of(row[find_column(list(row), columns, where)], where)


def paired(
    folder: Path, pictures: list[tuple], captions: list[tuple], alike: list[Path]
) -> list[Picture]:
    """The pictures of a folder, sorted by name, each with its caption, empty where it has none.
    pictures: (key, path); captions: (key, name, text); alike: what may have been meant as captions.
    Raises Refusal where a key stands twice, where captions lack their picture, and where no picture
    has a caption.
    """
    here = collections.Counter(key for key, _ in pictures)
    told = collections.Counter(key for key, *_ in captions)
    none = alike or not here.keys() & told.keys()
    odd = {
        "pictures without a caption": [
            path.relative_to(folder).as_posix()
            for key, path in pictures
            if (here[key] > 1 and told[key]) or (none and not told[key])
        ],
        "captions without a picture": [
            name for key, name, _ in captions if told[key] > here[key] or told[key] > 1
        ],
    }
    expected = "one caption for each picture: metadata.jsonl, metadata.csv or a.txt beside a.jpg"
    remedy = "add, rename or remove what is odd"
    if pictures and not captions and not alike:
        endings = " ".join(sorted({f"*{path.suffix}" for _, path in pictures}))
        remedy += f"; for one caption, type where they lie: {ONE_FOR_ALL.format(endings)}"
    if any(odd.values()) and alike:
        looks = ", ".join(sorted(repr(p.relative_to(folder).as_posix()) for p in alike)[:10])
        remedy += f". Not read as captions, by its name: {looks} (write a.txt, not a.jpg.txt; "
        remedy += "kohya's JSON as one line a picture into metadata.jsonl)"
    refuse(
        (f"{len(names)} {wrong} of their own in {folder}, such as {ten(names)}", expected, remedy)
        for wrong, names in odd.items()
        if names
    )
    texts = {key: text for key, _, text in captions}

    def picture(item: tuple[str, Path]) -> Picture:
        key, path = item
        read = functools.partial(content_of, path, "picture")
        name = path.relative_to(folder).as_posix()
        return Picture(name, texts.get(key, ""), digest(read()), read)

    return for_all(picture, sorted(pictures, key=lambda item: item[1]))


def ten(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, sorted(names)[:10])) + more


def look_alikes(paths: list[Path]) -> list[Path]:
    """Files whose name is nearly one of captions: metadata.json1, meta_cap.json, a.png.txt."""
    tables = [p for p in paths if re.match(r"(?i)meta.*\.|captions?\.", p.name)]
    double = [p for p in paths if p.suffix.lower() in BESIDE and is_picture(Path(p.stem))]
    return [p for p in tables if p.name not in ("metadata.jsonl", "metadata.csv")] + double


def files_in(folder: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """What is below `folder`, sorted, and of the pictures and films there those that are left out,
    by the reason. Raises Refusal for a link to a folder: it may lead anywhere, also in a circle,
    and what it holds would otherwise be left out without a word.
    """
    hidden, shown = "are hidden or another program's own", []
    unread = "are no pictures that Pillow opens here (HEIC: pip install pillow-heif, JPEG XL: "
    unread += "pip install pillow-jxl-plugin, others: convert them to PNG)"
    left_out: dict[str, list[Path]] = {hidden: [], unread: []}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        by_itself = any(part[0] == "." or part in NOT_MADE_BY_PEOPLE for part in parts)
        ending = path.suffix.lower()
        medium = ending in MEDIA or ending in Image.registered_extensions()
        if by_itself:
            left_out[hidden] += [path] * medium
            continue
        left_out[unread] += [path] * (medium and not is_picture(path))
        shown.append(path)
    refuse(
        (f"{path} is a link to a folder", "links to single files only", "move its pictures here")
        for path in shown
        if path.is_symlink() and path.is_dir()
    )
    return shown, left_out


def is_picture(path: Path) -> bool:
    """Whether Pillow opens files of that ending."""
    formats = picture_formats()  # first, since plug-ins add endings
    return Image.registered_extensions().get(path.suffix.lower()) in formats


@functools.cache
def picture_formats() -> list[str]:
    """All that Pillow reads, HEIC and JPEG XL with their plug-ins where these are installed."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_jxl")
    Image.init()
    return sorted(set(Image.ID) - NO_PICTURES)


def content_of(path: Path, kind: str) -> bytes | str:
    """The bytes of a picture, or the text of a caption or metadata file, without its byte order
    mark. Raises Refusal for what cannot be read, is no file (opening a pipe would wait for ever),
    is too large to be one of its kind, is text in another encoding than UTF-8 or has control
    characters.
    """
    what = "a file" if kind == "picture" else "text in UTF-8"
    expected = f"{what} of at most {LARGEST[kind] / 1e6:.0f} MB"
    found = f"{path} ({kind}) cannot be read"
    with refusing(found, expected, "replace or remove it"):
        size = path.stat().st_size
        if not path.is_file():
            raise OSError("no file")
        if size > LARGEST[kind]:
            raise OSError(f"{size / 1e6:.1f} MB")
        content = path.read_bytes()
    if kind == "picture":
        return content
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")  # Windows' "Unicode"
    mend = f"iconv -f {'UTF-16' if wide else 'WINDOWS-1252'} -t UTF-8"
    with refusing(
        found, expected, MEND.format(mend) + " (or what else it was written in)" * (not wide)
    ):
        text = content.decode("utf-8-sig")
    with refusing(found, f"{what} without control characters", MEND.format(DELETE)):
        if control := CONTROL.search(text):
            raise OSError(f"it holds the control character {control[0]!r}")
    return text


def caption_of(value: Any, where: str) -> str:
    """A caption, empty where there is none. Raises Refusal for what is no text, or none that UTF-8
    holds (JSON lets half a surrogate pair through), or has control characters.
    """
    value = "" if value is None else value
    if not isinstance(value, str) or value.encode(errors="ignore").decode() != value:
        raise Refusal(f"{where} has the caption {value!r:.200}", "text", "another --caption-column")
    if CONTROL.search(value):
        expected = "text without control characters"
        raise Refusal(f"{where} has the caption {value!r:.200}", expected, "correct that caption")
    return value


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
