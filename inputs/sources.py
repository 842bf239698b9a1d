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
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from inputs.download import asked
from inputs.files import Refusal, digest, folder_of, refuse, refusing, sayable
from inputs.options import Config

# Media that Pillow's own list of endings does not know without a plug-in, or at all.
MEDIA = set(
    ".heic .heif .hif .jxl .svg .xcf .psb .cr2 .cr3 .nef .arw .dng .raw "
    ".mp4 .m4v .mov .webm .mkv .avi".split()
)
# Of Pillow's formats: for PostScript it would start Ghostscript, a program that the picture writes;
# of the others it knows the name alone.
NO_PICTURES = {"EPS", "MPEG", "HDF5", "GRIB", "BUFR", "WMF"}
NOT_MADE_BY_PEOPLE = {"__MACOSX", "@eaDir", "Thumbs.db"}  # and what begins with a dot
TABLES = ("metadata.jsonl", "metadata.csv")
BESIDE = (".txt", ".caption")  # how a caption's own file ends
# What may hold captions by its name: metadata.json1, kohya's meta_cap.json, train.csv, a.tags.
ALIKE = re.compile(r"(?i)(meta|caption).*\.|.*\.(jsonl?|csv|tsv|tags)$")
CAPTIONS = ("text", "caption", "prompt")  # how data sets call their column
CONTROL = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]")  # all of ASCII's but tab and line ends
DELETE = r"tr -d '\000-\010\013\014\016-\037\177' <"
# A number that is all of a name, or ends it after a blank, a hyphen or in brackets.
NUMBERING = re.compile(r"^\d+$|[\s-]+\d+$|\s*\(\d+\)$")
WAYS_OUT = '--caption "a photo of sks dog", --caption "" (the empty prompt) or, in a folder of '
WAYS_OUT += "picture files, --caption-from-name"
USUAL = Config()  # no column, split, config or caption is asked for
MEND = "in {}, for each file named, FILE: {} FILE > FILE.new && mv FILE.new FILE"
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


def read_dataset(name: str, options: Config = USUAL) -> Pictures:
    """The captioned pictures of a local folder or a Hub data set; options: which of its columns,
    splits and configs, and the caption of pictures without one.

    A folder holds metadata.jsonl or .csv (file_name and a caption column), also in the split's own
    folder, or name.txt or .caption beside name.jpg, or files that the `datasets` library reads
    (parquet). A folder's pictures come sorted by name, so that the order on disk is nothing. A link
    to a file, laid into the folder, is followed; a name that leads outside and a link to a folder
    are not. Raises Refusal for what is said, for a caption without a picture, a column, split or
    config that is not there, two tables, no caption at all, and an empty set.
    """
    expected = "metadata.jsonl and its pictures, name.txt beside name.jpg, or a Hub data set"
    folder = folder_of(name, "--dataset-name", expected)
    table = folder and table_of(folder, options)
    if folder and (not table or table.suffix != ".parquet"):
        pictures = from_folder(folder, table, options)
    elif options.caption_from_name:
        found = f"--caption-from-name with {name}, whose pictures are rows of a table"
        raise Refusal(found, "files with names", '--caption-column NAME or --caption "TEXT"')
    else:
        pictures = from_hub(str(folder or name), options)
        beside = files_in(folder)[0] if folder else []
        loose = [p.relative_to(folder).as_posix() for p in beside if is_picture(p)]
        if loose:
            pictures.notes = [*pictures.notes, f"{named(loose)} used only where a row names them"]
    if not pictures:
        found = "; ".join([f"{name} holds no pictures", *pictures.notes])
        raise Refusal(found, expected, "--dataset-name FOLDER")
    return with_captions(pictures, name, options)


def with_captions(pictures: Pictures, name: str, options: Config) -> Pictures:
    """`pictures`, those without a caption of their own with what the options say instead. Raises
    Refusal where none has one, unless it is said that this is meant.
    """

    def called(picture: Picture) -> Picture:
        words = name_in_words(picture.name) if options.caption_from_name else options.caption
        if picture.caption.strip() or not words:
            return picture
        return replace(picture, caption=caption_of(words, picture.name))

    found = Pictures(for_all(called, pictures))
    found.notes = list(pictures.notes)
    if new := [now for now, was in zip(found, pictures, strict=True) if now is not was]:
        note = f"{named([p.name for p in new])} without a caption of their own, called "
        note += repr(new[0].caption) + " and so on, by their names" * options.caption_from_name
        found.notes.append(note)
    bare = [picture.name for picture in found if not picture.caption.strip()]
    if options.caption is None and len(bare) == len(found):
        said = f"none of the {len(bare)} pictures of {name} has a caption, such as {ten(bare)}"
        expected = "captions: metadata.jsonl (of other JSON make one line a picture) or .csv at "
        expected += "the top or in train/, a.txt beside a.jpg (not a.jpg.txt), a data set's column"
        raise Refusal("; ".join([said, *found.notes]), expected, f"write some, or {WAYS_OUT}")
    return found


def name_in_words(name: str) -> str:
    """A file's name without folder, ending and numbering: x/red_apple (2).png is red apple."""
    return NUMBERING.sub("", normal(Path(name).stem).replace("_", " ").strip())


def has_caption(options: Config) -> bool:
    """Whether they give a caption to pictures that have none of their own."""
    return options.caption is not None or options.caption_from_name


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


def table_of(folder: Path, options: Config) -> Path | None:
    """The one file in which a folder's captions are: a table at its top or in the split's folder,
    or, for all of them, a parquet file; None where captions lie beside the pictures. Raises Refusal
    where there are several, and for a split or a config that a folder of pictures does not have.
    """
    paths, split = files_in(folder)[0], folder / options.dataset_split
    tables = [p for p in paths if p.name in TABLES and p.is_file()]
    parquet = [p for p in paths if p.suffix == ".parquet" and p.is_file()][:1]
    found = [p for p in tables if p.parent in (folder, split)] + parquet
    if len(found) > 1:
        told = " and ".join(p.relative_to(folder).as_posix() for p in found)
        raise Refusal(f"{folder} holds {told}", "one table", "rename or remove the others")
    there = sorted({p.parent.name for p in tables if p.parent.parent == folder})
    if not parquet and (options.dataset_config or split.name not in ("train", *there)):
        told = f"{folder} has no configs, and the splits {', '.join(there) or '(none)'}"
        remedy = "correct or leave out --dataset-split and --dataset-config, or name a sub-folder"
        raise Refusal(told, "SPLIT/metadata.jsonl, or parquet files", remedy)
    return next(iter(found), None)


def from_folder(folder: Path, table: Path | None, options: Config) -> Pictures:
    """The pictures of a folder whose captions are in the file `table`, or in one each."""
    paths, left_out = files_in(folder)
    top = table.parent if table else folder

    def named_in(path: Path) -> str:
        return path.relative_to(folder).as_posix()

    def key(path: Path) -> str:
        """By what a picture and its caption find each other; Macs write accents as two letters."""
        return normal(named_in(path if table else path.with_suffix("")))

    def caption(path: Path) -> tuple[str, str, str]:
        return key(path), named_in(path), content_of(folder, named_in(path), "caption").strip()

    def row(line: tuple[str, str]) -> tuple[str, str, str]:
        name, text = row_of(*line, options, folder)
        name = (top.relative_to(folder) / name).as_posix()
        return normal(name), name, text

    beside = [p for p in paths if p.suffix.lower() in BESIDE]
    captions = for_all(row, rows_of(folder, table)) if table else for_all(caption, beside)
    pictures = [p for p in paths if is_picture(p) and (p.is_file() or p.is_symlink())]
    left_out[f"lie outside {top.name}/"] = [p for p in pictures if top not in p.parents]
    pictures = [p for p in pictures if top in p.parents]
    unused = {key(path) for each in left_out.values() for path in each} - set(map(key, pictures))
    captions = [each for each in captions if each[0] not in unused]
    known = {table, *pictures, *beside}
    alike = [p for p in paths if ALIKE.match(p.name) and p.is_file() and top in p.parents]
    alike, why = [p for p in alike if p not in known], "are not named as captions are"
    if table:
        why, stems = f"are captions beside {named_in(table)}", {p.with_suffix("") for p in pictures}
        alike += [p for p in beside if p.with_suffix("") in stems]
    left_out[why] = alike
    found = Pictures(paired(folder, [(key(p), p) for p in pictures], captions))
    said = {f"left out, since they {why}": [*map(named_in, left)] for why, left in left_out.items()}
    kohya = "in folders like 10_style: each counts once, the number is no repeat"
    said[kohya] = [p.name for p in found if re.match(r"\d+_", Path(p.name).parent.name)]
    found.notes = [f"{named(names)} {what}" for what, names in said.items() if names]
    found.notes += [f"{named_in(table)} has no rows"] if table and not captions else []
    return found


def normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def named(names: list[str]) -> str:
    """How many, and the first of them."""
    return f"{len(names)} (the first: {sayable(names[0])})"


def rows_of(folder: Path, table: Path) -> list[tuple[str, str]]:
    """The rows of metadata.jsonl or metadata.csv as JSON, and where each stands."""
    name = table.relative_to(folder).as_posix()
    text = content_of(folder, name, "metadata")
    if table.suffix == ".jsonl":
        numbered: Iterable = enumerate(text.split("\n"), 1)
    else:
        remedy = f'in {folder}, quotes around a caption with commas: a.png,"red, round"'
        with refusing(f"{name} is no table", "file_name,text and one row a picture", remedy):
            reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", strict=True)
            numbered = [(reader.line_num, json.dumps(row)) for row in reader]
            for line, row in numbered:
                if "" in json.loads(row):
                    raise ValueError(f"line {line} has more cells than there are columns")
    return [(line, f"{name} line {number}") for number, line in numbered if line.strip()]


def row_of(line: str, where: str, options: Config, folder: Path) -> tuple[str, str]:
    """The name of the picture and the caption in a line of metadata.jsonl. Raises Refusal."""
    expected = '{"file_name": "a.png", "text": "a caption"}'
    with refusing(f"{where} is not a row", expected, f"correct that in {folder}"):
        row = json.loads(line)
        name = Path(row["file_name"]).as_posix()
    return name, caption_of(row.get(caption_column(list(row), options, where)), where)


def paired(folder: Path, pictures: list[tuple], captions: list[tuple]) -> list[Picture]:
    """The pictures of a folder, sorted by name, each with its caption, empty where it has none.
    pictures: (key, path); captions: (key, name, text). Raises Refusal where a key
    stands twice and where captions lack their picture.
    """
    here = collections.Counter(key for key, _ in pictures)
    told = collections.Counter(key for key, *_ in captions)
    none = captions and not here.keys() & told.keys()
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
    expected = "one caption for each picture: metadata.jsonl, metadata.csv or a.txt (not a.jpg.txt)"
    remedy = "add, rename or remove what is odd"
    refuse(
        (f"{len(names)} {wrong} of their own in {folder}, such as {ten(names)}", expected, remedy)
        for wrong, names in odd.items()
        if names
    )
    texts = {key: text for key, _, text in captions}

    def picture(item: tuple[str, Path]) -> Picture:
        key, path = item
        name = path.relative_to(folder).as_posix()
        read = functools.partial(content_of, folder, name, "picture")
        return Picture(name, texts.get(key, ""), digest(read()), read)

    return for_all(picture, sorted(pictures, key=lambda item: item[1]))


def ten(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, sorted(names)[:10])) + more


def files_in(folder: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """What is below `folder`, sorted, and of the pictures and films there those that are left out,
    by the reason. Raises Refusal for a link to a folder: it may lead anywhere, also in a circle,
    and what it holds would otherwise be left out without a word.
    """
    hidden, shown = "are hidden or another program's own", []
    unread = "are no pictures that Pillow opens here (HEIC: pip install pillow-heif, JPEG XL: "
    unread += "pip install pillow-jxl-plugin, others: convert them to PNG)"
    left_out: dict[str, list[Path]] = {hidden: [], unread: []}
    closed, no_files = "are folders that this user may not read", "are pipes, sockets or devices"
    left_out |= {closed: [], no_files: []}
    # Not rglob(): it passes over a folder that it may not read.
    walk = os.walk(folder, onerror=lambda error: left_out[closed].append(Path(error.filename)))
    for path in sorted(Path(top, name) for top, *names in walk for name in chain(*names)):
        parts = path.relative_to(folder).parts
        by_itself = any(part[0] == "." or part in NOT_MADE_BY_PEOPLE for part in parts)
        ending = path.suffix.lower()
        medium = ending in MEDIA or ending in Image.registered_extensions()
        if by_itself:
            left_out[hidden] += [path] * medium
            continue
        left_out[unread] += [path] * (medium and not is_picture(path))
        left_out[no_files] += [path] * (path.exists() and not path.is_file() and not path.is_dir())
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


def content_of(folder: Path, name: str, kind: str) -> bytes | str:
    """The bytes of the picture `name` in `folder`, or the text of a caption or metadata file,
    without its byte order mark. Raises Refusal for what cannot be read, is no file (opening a pipe
    would wait for ever), is too large to be one of its kind, is text in another encoding than UTF-8
    or has control characters.
    """
    what = "a file" if kind == "picture" else "text in UTF-8"
    expected = f"{what} of at most {LARGEST[kind] / 1e6:.0f} MB"
    path, found = folder / name, f"{name} ({kind}) cannot be read"
    with refusing(found, expected, f"replace or remove it in {folder}"):
        size = path.stat().st_size
        if not path.is_file():
            raise OSError("no file")
        if size > LARGEST[kind]:
            raise OSError(f"{size / 1e6:.1f} MB")
        content = path.read_bytes()
    if kind == "picture":
        return content
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")  # Windows' "Unicode"
    mend = MEND.format(folder, f"iconv -f {'UTF-16' if wide else 'WINDOWS-1252'} -t UTF-8")
    with refusing(found, expected, mend + " (or what else it was written in)" * (not wide)):
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:  # its own words are so long that ten are cut
            raise OSError(f"no UTF-8 at byte {error.start + 1}") from None
    with refusing(found, f"{what} without control characters", MEND.format(folder, DELETE)):
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


def from_hub(name: str, options: Config) -> Pictures:
    """A Hub data set, or a folder of parquet files, through `datasets`; pictures stay encoded."""
    import datasets

    if not Path(name).is_dir():  # a mistyped folder is looked for half a minute
        print(f"{name} is no folder here: asking the Hub for a data set", file=sys.stderr)
    split, config = options.dataset_split, options.dataset_config or None
    found = f"the data set {name} could not be loaded"
    expected = f"a folder of pictures with captions, or a Hub data set with the split {split}"
    remedy = "check the name and the network, pass --dataset-name FOLDER, or where splits or "
    remedy += "configs are listed --dataset-split NAME --dataset-config NAME"
    with refusing(found, expected, remedy):
        load = functools.partial(datasets.load_dataset, name, name=config, split=split)
        what, way_out = f"the data set {name} (no folder here)", "pass --dataset-name FOLDER"
        table = asked("datasets", name, what, way_out, load)
    taken = image_column(table, name, options)
    column = caption_column(table.column_names, options, name)
    captions = table[column] if column else [None] * len(table)
    table = table.cast_column(taken, datasets.Image(decode=False))  # bytes and structs, too

    def read(i: int) -> bytes:
        cell = table[i][taken] or {}
        if cell.get("path") and not cell.get("bytes"):
            return content_of(Path(name), str(own_file(name, cell["path"])), "picture")
        return cell.get("bytes") or b""  # decode() then names the row

    def picture(i: int) -> Picture:
        row = f"row {i}"  # without the data set's name, under which it may be gone tomorrow
        caption = caption_of(captions[i], row)
        return Picture(row, caption, digest(read(i)), functools.partial(read, i))

    bar = tqdm(range(len(table)), "reading pictures", leave=False, mininterval=1)
    pictures = Pictures(for_all(picture, bar))
    if taken not in ("image", options.image_column):
        pictures.notes = [f"taken from the column {taken}"]
    return pictures


def image_column(table: Any, name: str, options: Config) -> str:
    """The column of a data set that holds its pictures: the one asked for, else the one called
    image, else the first that can be read. Raises Refusal, saying what each column holds.
    """
    kinds = {column: kind_of(feature) for column, feature in table.features.items()}
    asked, kinds_read = options.image_column, ("pictures", "binary", "large_binary")
    readable = [c for kind in kinds_read for c in kinds if kinds[c] == kind]
    if taken := [c for c in ([asked] if asked else ["image", *readable]) if c in readable]:
        return taken[0]
    for column in (c for c in kinds if "string" in kinds[c]):
        kinds[column] += f" such as {table[:1][column]!r:.60}"
    raise Refusal(
        f"{name} has the columns " + ", ".join(f"{c} ({kind})" for c, kind in kinds.items()),
        f"{asked or 'a column'} of pictures, bytes or {{bytes, path}}",
        "--image-column NAME; of a list write one picture a row; put what paths or URLs lead to "
        "(none is fetched) into a folder with metadata.jsonl",
    )


def kind_of(feature: Any) -> str:
    """What a column of a data set holds, in a word."""
    kind = type(feature).__name__
    if kind == "Image" or (kind == "dict" and "bytes" in feature):
        return "pictures"
    return feature.dtype if kind == "Value" else kind


def own_file(name: str, path: str) -> Path:
    """The file that a row of the data set `name` names: in its folder, or where `datasets` keeps
    what it downloaded. A table from anywhere could name any other file of this disk.
    """
    import datasets
    import huggingface_hub

    kept = (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    folders = [Path(name)] if Path(name).is_dir() else [Path(each) for each in kept]
    target = (folders[0] / path).resolve()  # `path` itself where it is absolute
    if "://" in path or not any(target.is_relative_to(folder.resolve()) for folder in folders):
        found = f"a row of {name} names the picture {path!r}, which is outside the data set"
        raise Refusal(found, "pictures inside the data set", "put them into the table or beside it")
    return target


def caption_column(columns: list[str], options: Config, where: str) -> str:
    """The column that holds the captions; "" where there is none and the options give one. Raises
    Refusal.
    """
    names = (options.caption_column,) if options.caption_column else CAPTIONS
    there = [name for name in names if name in columns]
    if there or (names == CAPTIONS and has_caption(options)):
        return there[0] if there else ""
    found, remedy = f"{where} has the columns {', '.join(columns)}", "--caption-column NAME, or "
    raise Refusal(found, " or ".join(names), remedy + WAYS_OUT)
