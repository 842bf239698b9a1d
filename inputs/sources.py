"""Captioned pictures from a folder or the Hub. What does not fit is refused by name, or left out,
counted and said.
"""

import collections
import contextlib
import csv
import functools
import importlib
import io
import itertools
import json
import math
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

from inputs.captions import variants
from inputs.download import asked, check_room, count, listing
from inputs.files import Refusal, digest, folder_of, place, refuse, refusing, sayable
from inputs.options import Config
from inputs.progress import on_terminal, progress, quiet

# Media that Pillow's own list of endings does not know without a plug-in, or at all.
MEDIA = set(
    ".heic .heif .hif .jxl .svg .xcf .psb .cr2 .cr3 .nef .arw .dng .raw "
    ".orf .raf .rw2 .mp4 .m4v .mov .webm .mkv .avi .wmv .flv .3gp .mts .m2ts".split()
)
# Of Pillow's formats: for PostScript it would start Ghostscript, a program that the picture writes;
# of the others it knows the name alone.
NO_PICTURES = {"EPS", "MPEG", "HDF5", "GRIB", "BUFR", "WMF"}
# And what begins with a dot: Macs', NAS boxes' and Windows' previews and waste-paper baskets.
NOT_MADE_BY_PEOPLE = {"__MACOSX", "@eaDir", "@Recycle", "@Recently-Snapshot", "@__thumb"}
NOT_MADE_BY_PEOPLE |= {"#recycle", "$RECYCLE.BIN", "lost+found", "Thumbs.db"}
# metadata.jsonl and its like, and meta_cap.json, meta_lat.json, ... of kohya's tools.
TABLE = re.compile(r"metadata\.(jsonl|csv|parquet)|meta_[\w-]+\.json")
BESIDE = (".txt", ".caption")  # how a caption's own file ends
MASK = ".mask.png"  # how the mask of a picture ends, beside it
# In a picture's path kohya's folders: how often what lies in 10_style is repeated, and its pictures
# for prior preservation.
NUMBERED = re.compile(r"(?:^|/)(\d+)_(?=[^/]*/)")
REGULARISATION = re.compile(r"(?i)(?:^|/)(\d+_)?reg([_ -][^/]*|ulari[sz]ation[^/]*)?/")
# What may hold captions by its name: metadata.json1, Meta_cap.json, train.csv, a.tags.
ALIKE = re.compile(r"(?i)(meta|caption).*\.|.*\.(jsonl?|csv|tsv|tags|parquet)$")
CAPTIONS = ("text", "caption", "prompt")  # how data sets call their column
CONTROL = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]")  # all of ASCII's but tab and line ends
DELETE = r"tr -d '\000-\010\013\014\016-\037\177' <"
# A number that is all of a name, or ends it after a blank, a hyphen or in brackets.
NUMBERING = re.compile(r"^\d+$|[\s-]+\d+$|\s*\(\d+\)$")
WAYS_OUT = '--caption "a photo of sks dog", --caption "" (the empty prompt) or, in a folder of '
WAYS_OUT += "picture files, --caption-from-name"
Row = tuple[str, str, str, tuple]  # of a table: its name, the picture's key and name, the captions
USUAL = Config()  # no column, split, config or caption is asked for
MEND = "in {}, for each file named, FILE: {} FILE > FILE.new && mv FILE.new FILE"
# Bytes. Files are read whole; decode() takes no picture over 89 megapixels, 0.7 GB in 16 bits.
LARGEST = 10**9


@dataclass(frozen=True)
class Picture:
    """One picture of the data set, with the texts it is trained under: ("",) where it has none.
    read() gives the encoded file; digest tells its content; weight: how often it is shown where
    another is shown once; mask: a picture of the same size, white where it is to be learned; of
    digest ALPHA it is this picture's transparency.
    """

    name: str
    captions: tuple[str, ...]
    digest: str
    read: Callable[[], bytes]
    weight: int = 1
    mask: "Picture | None" = None

    @property
    def bare(self) -> bool:
        """Whether it has no caption."""
        return not any(caption.strip() for caption in self.captions)


ALPHA, WHITE = "alpha", Picture("white", ("",), "white", bytes)  # masks without a file


class Pictures(list[Picture]):
    """The pictures of a data set, and in notes what of it is not trained on as one may think."""

    notes: Sequence[str] = ()

    @property
    def cards(self) -> int:
        """What one epoch shows: each picture as often as its weight says."""
        return sum(picture.weight for picture in self)

    def __str__(self) -> str:
        return "; ".join([f"{len(self)} pictures", *self.notes])


def read_datasets(options: Config) -> Pictures:
    """The captioned pictures of all data sets that the options name, each with its weight and, in a
    run with masks, a mask. Raises Refusal as read_dataset() does, for all of them at once, and
    where no picture has the transparency that was asked for.
    """
    names, found = options.dataset_name, Pictures()
    places = ((name, place(name).resolve()) for name in names)
    refuse(
        (f"--dataset-name {a} and {b}, which holds the same", "each once", "leave one out")
        for (a, one), (b, other) in itertools.combinations(places, 2)
        if one in (other, *other.parents) or other in one.parents
    )
    sets, several = for_all(lambda name: read_dataset(name, options), names), len(names) > 1
    found.notes = []
    weights = [int(weight) for weight in options.dataset_weights] or [1] * len(names)
    for name, weight, each in zip(names, weights, sets, strict=True):
        of = f"{name.rstrip('/')}/" if several else ""
        found += [replace(p, name=of + p.name, weight=weight * p.weight) for p in each]
        told = [f"{len(each)} pictures x {weight}"] if several or weight > 1 else []
        found.notes += [f"{name}: {note}" if several else note for note in (*told, *each.notes)]
    return with_masks(found, options)


def with_masks(pictures: Pictures, options: Config) -> Pictures:
    """`pictures`; where any has a mask, by a file or by its transparency if that is asked for, all
    others have a white one. Raises Refusal where transparency is asked for and none has it.
    """
    if options.mask_from_alpha:
        pictures[:] = [replace(p, mask=p.mask or transparency(p)) for p in pictures]
        if not any(picture.mask for picture in pictures):
            found = f"--mask-from-alpha, and none of {len(pictures)} pictures has transparency"
            raise Refusal(found, "pictures with it", f"leave it out, or draw NAME{MASK}")
    bare = [picture.name for picture in pictures if not picture.mask]
    if len(bare) < len(pictures):
        pictures[:] = [replace(p, mask=p.mask or WHITE) for p in pictures]
        pictures.notes = [*pictures.notes, f"{len(pictures) - len(bare)} with a mask"]
        pictures.notes += [f"{named(bare)} without a mask, learned whole"] if bare else []
    return pictures


def transparency(picture: Picture) -> Picture | None:
    """The mask that a picture's own transparency is; None where it has none."""
    with contextlib.suppress(Exception):  # a damaged one is refused by name when it is encoded
        image = Image.open(io.BytesIO(picture.read()), formats=picture_formats())
        if image.has_transparency_data and image.mode[0] != "I":  # with 16 bits none is read
            return replace(picture, name=f"{picture.name}'s transparency", digest=ALPHA)
    return None


def in_steps(config: Config, pictures: Pictures) -> Config:
    """`config` with the steps that its epochs are of these pictures, where it has epochs."""
    if not (epochs := config.max_train_epochs):
        return config
    steps = math.ceil(epochs * pictures.cards / config.examples_per_step)
    pictures.notes = [*pictures.notes, f"{epochs} epochs of {pictures.cards} are {steps} steps"]
    return replace(config, max_train_steps=steps)


def read_dataset(name: str, options: Config = USUAL) -> Pictures:
    """The captioned pictures of a local folder or a Hub data set; options: which of its columns,
    splits and configs, and the caption of pictures without one.

    A folder holds metadata.jsonl, .csv or .parquet (file_name and a caption column) or kohya's
    meta_cap.json, also in the split's own folder, or name.txt or .caption beside name.jpg, or files
    that the `datasets` library reads (parquet). A folder's pictures come sorted by name, so that
    the order on disk is nothing. A link to a file, laid into the folder, is followed; a name that
    leads outside and a link to a folder are not. Raises Refusal for what is said, for a caption
    without a picture, a column, split or config that is not there, captions that disagree, no
    caption at all, and an empty set.
    """
    expected = "metadata.jsonl and its pictures, name.txt beside name.jpg, or a Hub data set"
    folder = folder_of(name, "--dataset-name", expected)
    found = files_in(folder) if folder else ([], {})
    tables = tables_of(folder, found[0], options) if folder else None
    if folder and tables is not None:
        pictures = from_folder(folder, found, tables, options)
    elif options.caption_from_name:
        told = f"--caption-from-name with {name}, whose pictures are rows of a table"
        raise Refusal(told, "files with names", '--caption-column NAME or --caption "TEXT"')
    else:
        pictures = from_hub(str(folder or name), options)
    if not pictures:
        there = [path.name for path in folder.iterdir()] if folder and not pictures.notes else []
        there = ", ".join(sorted(there)[:3])
        there = there and f", but {there}" + "; unpack it" * there.endswith((".zip", ".tar", ".7z"))
        told = "; ".join([f"{name} holds no pictures{there}", *pictures.notes])
        raise Refusal(told, expected, "--dataset-name FOLDER")
    return with_captions(pictures, name, options)


def with_captions(pictures: Pictures, name: str, options: Config) -> Pictures:
    """`pictures`, those without a caption of their own with what the options say instead, each with
    the variants of its captions. Raises Refusal where none has one, unless it is said that this is
    meant.
    """

    def called(picture: Picture) -> Picture:
        words = options.caption
        if options.caption_from_name:  # x/red_apple (2).png is red apple
            words = NUMBERING.sub("", normal(Path(picture.name).stem).replace("_", " ").strip())
        return replace(picture, captions=(words,)) if picture.bare and words else picture

    def varied(picture: Picture) -> Picture:
        texts = variants(picture.captions, options)
        return replace(picture, captions=tuple(caption_of(text, picture.name) for text in texts))

    told = [called(picture) for picture in pictures]
    bare = [picture.name for picture in told if picture.bare]
    if options.caption is None and len(bare) == len(told):
        said = f"none of the {len(bare)} pictures of {name} has a caption, such as {ten(bare)}"
        expected = "captions: metadata.jsonl (of other JSON make one line a picture) or .csv at "
        expected += "the top or in train/, a.txt beside a.jpg (not a.jpg.txt), a data set's column"
        raise Refusal("; ".join([said, *pictures.notes]), expected, f"write some, or {WAYS_OUT}")
    found = Pictures(for_all(varied, told))
    found.notes = list(pictures.notes)
    if new := [now for now, was in zip(found, pictures, strict=True) if was.bare and not now.bare]:
        note = f"{named([p.name for p in new])} without a caption of their own, called "
        note += repr(new[0].captions[0]) + " and so on, by their names" * options.caption_from_name
        found.notes.append(note)
    return found


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


def tables_of(folder: Path, paths: list[Path], options: Config) -> list[Path] | None:
    """Of a folder's files those in which its captions are: tables at its top or in the split's
    folder; none where captions lie beside the pictures; None where it is a data set of parquet
    files. Raises Refusal for both, and for a split or a config that a folder of pictures does not
    have.
    """
    split = Path(options.dataset_split)
    tables = [path for path in paths if TABLE.fullmatch(path.name)]
    found = [path for path in tables if path.parent in (Path(), split)]
    parquet = [path for path in paths if path.suffix == ".parquet" and path not in found]
    if parquet and (others := [*found, *filter(is_picture, paths)]):
        told = f"{folder} holds {others[0]} and {parquet[0]}"
        remedy = "call a table of captions metadata.parquet, or move one kind elsewhere"
        raise Refusal(told, "pictures and their captions, or parquet files with both", remedy)
    there = sorted({table.parent.name for table in tables if len(table.parts) == 2})
    if not parquet and (options.dataset_config or str(split) not in ("train", *there)):
        told = f"{folder} has no configs, and the splits {', '.join(there) or '(none)'}"
        remedy = "correct or leave out --dataset-split and --dataset-config, or name a sub-folder"
        raise Refusal(told, "SPLIT/metadata.jsonl, or parquet files", remedy)
    return None if parquet else found


def from_folder(
    folder: Path, found: tuple[list[Path], dict], tables: list[Path], options: Config
) -> Pictures:
    """The pictures of a folder whose captions are in each of `tables`, or in one file each."""
    (paths, left_out), own = found, folder.resolve().name
    top = min((table.parent for table in tables), default=Path())  # of two one is in the other

    def key(path: Path) -> str:
        """By what a picture and its caption find each other; Macs write accents as two letters."""
        return normal(str(path if tables else path.with_suffix("")))

    def numbers(name: str) -> list[int]:
        """Of kohya's folders in which a picture lies."""
        return [n for n in map(int, NUMBERED.findall(name)) if 0 < n < 1000]  # dates are none

    def caption(path: Path) -> Row:
        text = content_of(folder, str(path), "caption").strip()
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        texts = tuple(lines) if options.caption_lines and lines else (text,)
        picture = stems.get(path.with_suffix(""), path)
        return f"*{path.suffix.lower()}", key(picture), str(path), texts

    pictures, masks = masks_apart(folder, list(filter(is_picture, paths)))
    left_out[f"lie outside {top}/"] = [p for p in pictures if top not in p.parents]
    inside, obeyed = [p for p in pictures if top in p.parents], options.folder_repeats
    left_out["lie in kohya's reg folders (--no-folder-repeats: trained on)"] = [
        p for p in inside if obeyed and REGULARISATION.search(str(p))
    ]
    aside = {*chain(*left_out.values())}
    pictures = [p for p in inside if p not in aside]
    keys = set(map(key, pictures))
    stems = {p.with_suffix(""): p for p in pictures}
    beside = [p for p in paths if p.suffix.lower() in BESIDE]
    read = [p for p in beside if not tables or p.with_suffix("") in stems]
    rows = [row for table in tables for row in rows_of(folder, table, pictures, options)]
    rows += for_all(caption, read)
    unused = set(map(key, aside)) - keys
    texts = paired(folder, keys, [row for row in rows if row[1] not in unused])
    alike = [p for p in paths if ALIKE.match(p.name) and top in p.parents and not is_picture(p)]
    known = {*tables, *beside}
    left_out["are not named as captions are"] = [p for p in alike if p not in known]

    def picture(path: Path) -> Picture:
        found = picture_file(folder, str(path), texts.get(key(path), ("",)))
        mask = masks.get(stem(path))
        weight = (numbers(str(path)) or [1])[-1] if obeyed else 1
        return replace(found, mask=picture_file(folder, mask) if mask else None, weight=weight)

    found = Pictures(for_all(picture, progress(sorted(pictures), "reading", delay=2)))
    said = {f"left out, since they {why}": [*map(str, left)] for why, left in left_out.items()}
    often = "so many times, up to 999 (--no-folder-repeats: once)" if obeyed else "once each"
    said[f"in folders like 10_style, shown {often}"] = [p.name for p in found if numbers(p.name)]
    alone = {*map(str, stems.values())}
    shared = [p.name for p in found if p.name not in alone and not tables and not p.bare]
    said["are called as another picture and share its caption's file"] = shared
    found.notes = [f"{named(names)} {what}" for what, names in said.items() if names]
    found.notes += [f"{table} has no rows" for table in tables[:1] if not rows]
    shown = numbers(f"{own}/") if obeyed else []
    found.notes += [f"its own name's {n} is not counted (--dataset-weights {n} is)" for n in shown]
    return found


def masks_apart(folder: Path, files: list[Path]) -> tuple[list[Path], dict[str, str]]:
    """Of the picture files of `folder` those that are no masks, and the names of those that are by
    the beginning of their picture's name. Raises Refusal for masks without a picture.
    """
    own = {path for path in files if path.name.lower().endswith(MASK)}
    pictures = [path for path in files if path not in own]
    masks = {normal(str(path)[: -len(MASK)]): str(path) for path in own}
    if odd := [masks[key] for key in masks.keys() - set(map(stem, pictures))]:
        found = f"{len(odd)} masks without a picture of their own in {folder}, such as {ten(odd)}"
        raise Refusal(found, f"a.jpg beside a{MASK}", "add, rename or remove what is odd")
    return pictures, masks


def stem(path: Path) -> str:
    return normal(str(path.with_suffix("")))


def picture_file(folder: Path, name: str, captions: tuple[str, ...] = ("",)) -> Picture:
    read = functools.partial(content_of, folder, name, "picture")
    return Picture(name, captions, digest(read()), read)


def normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def named(names: list[str]) -> str:
    """How many, and the first of them."""
    return f"{len(names)} (the first: {sayable(names[0])})"


def rows_of(folder: Path, table: Path, pictures: list[Path], options: Config) -> list[Row]:
    """The rows of a table."""
    kohya = collections.defaultdict(set)
    for path in pictures if table.suffix == ".json" else ():
        for name in (path.name, path.stem):  # their keys have no ending, or another machine's path
            kohya[normal(name)].add(normal(str(path)))

    def row(line: tuple[int | str, str | dict]) -> Row:
        where, cells = f"{table} line {line[0]}", line[1]
        expected = '{"file_name": "a.png", "text": "a caption"}'
        with refusing(f"{where} is not a row", expected, f"correct that in {folder}"):
            cells = json.loads(cells) if isinstance(cells, str) else cells
            if not isinstance(cells, dict) or "file_name" not in cells:  # or called otherwise
                raise OSError(f"no file_name in {json.dumps(cells, default=str):.100}")
            name = (table.parent / cells["file_name"]).as_posix()
        texts = captions_of(cells.get(caption_column(list(cells), options, where)), where)
        own = kohya[normal(Path(name).name)]
        return str(table), next(iter(own)) if len(own) == 1 else normal(name), name, texts

    return for_all(row, lines_of(folder, table))


def lines_of(folder: Path, table: Path) -> Iterable[tuple[int | str, str | dict]]:
    """The number or key of each row of a table, and the row; of .jsonl its line, to be read."""
    kind = "parquet" if table.suffix == ".parquet" else "metadata"
    content = content_of(folder, str(table), kind)
    if table.suffix == ".jsonl":
        return [(i, line) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
    expected = {
        ".parquet": "a whole parquet file",
        ".json": '{"a.png": {"caption": "a caption", "tags": "one, two"}}',
        ".csv": 'file_name,text, then quotes around a caption with commas: a.png,"red, round"',
    }[table.suffix]
    with refusing(f"{table} is no table", expected, f"correct or replace it in {folder}"):
        if table.suffix == ".parquet":
            import pyarrow.parquet  # here, since it takes a while

            return enumerate(pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist(), 1)
        if table.suffix == ".json":
            return [(key, kohyas(key, row)) for key, row in dict(json.loads(content)).items()]
        reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
        rows = [(reader.line_num, row) for row in reader]
        if longer := [line for line, row in rows if None in row]:
            raise ValueError(f"line {longer[0]} has more cells than there are columns")
        return rows


def kohyas(key: str, row: dict) -> dict:
    """An entry of kohya's JSON as a row; its caption is the caption and the tags, as there:
    https://github.com/kohya-ss/sd-scripts/blob/6edbe005/library/train_util.py (FineTuningDataset).
    """
    told = row.get("caption") or None
    told = told if isinstance(told, list) else [told]
    text = [", ".join(filter(None, (each, row.get("tags")))) for each in told]
    return {"file_name": key.replace("\\", "/"), **row, "text": text}


def paired(folder: Path, keys: set[str], rows: list[Row]) -> dict[str, tuple]:
    """The texts of the pictures of these keys that have any. Raises Refusal where a file has a key
    twice, where captions lack their picture, and where files disagree.
    """
    lines = collections.Counter((file, key) for file, key, *_ in rows)
    odd = [name for file, key, name, _ in rows if key not in keys or lines[file, key] > 1]
    expected = "a picture for each caption: metadata.jsonl, .csv or .parquet, meta_cap.json, "
    expected += "a.txt or a.caption (not a.jpg.txt)"
    found = f"{len(odd)} captions without a picture of their own in {folder}, such as {ten(odd)}"
    troubles = [(found, expected, "add, rename or remove what is odd")] if odd else []
    said: dict[str, dict[str, tuple]] = collections.defaultdict(dict)  # of a key by each file
    for file, key, _, texts in rows:
        if any(map(str.strip, texts)):
            said[key][file] = texts
    remedy = f"correct them in {folder}, or rename what is not meant: mv FILE FILE.unused"
    for key, each in said.items():
        words = {file: " | ".join(filter(None, map(str.strip, t))) for file, t in each.items()}
        if len(set(words.values())) > 1:
            both = " and ".join(f"{sayable(text, 40)!r} in {file}" for file, text in words.items())
            troubles.append(
                (f"captions of {key} disagree: {both}", "the same in all files", remedy)
            )
    refuse(troubles)
    silent = {key: texts for _, key, _, texts in rows}
    return silent | {key: next(iter(each.values())) for key, each in said.items()}


def ten(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, sorted(names)[:10])) + more


def files_in(folder: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """The files below `folder`, as paths in it, sorted, and of the pictures and films there those
    that are left out, by the reason. A link to a folder is not followed: it may lead anywhere, also
    in a circle.
    """
    hidden, linked, shown = "are hidden or another program's own", "are links to folders", []
    unread = "are no pictures that Pillow opens here (HEIC: pip install pillow-heif, JPEG XL: "
    unread += "pip install pillow-jxl-plugin, others: convert them to PNG)"
    left_out: dict[str, list[Path]] = {hidden: [], unread: [], linked: []}
    left_out[closed := "are folders that this user may not read"] = []

    def shut(error: OSError) -> None:
        left_out[closed].append(Path(error.filename).relative_to(folder))

    # Not rglob(): it passes over a folder that it may not read.
    walk = os.walk(folder, onerror=shut)
    for path in sorted(Path(top, name) for top, *names in walk for name in chain(*names)):
        own, ending = path.relative_to(folder), path.suffix.lower()
        medium = ending in MEDIA or ending in Image.registered_extensions()
        if any(part[0] == "." or part in NOT_MADE_BY_PEOPLE for part in own.parts):
            left_out[hidden] += [own] * medium
        elif path.is_dir():
            left_out[linked] += [own] * path.is_symlink()
        else:
            left_out[unread] += [own] * (medium and not is_picture(own))
            shown.append(own)
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
    """The bytes of the picture or parquet file `name` in `folder`, or the text of a caption or
    metadata file, without its byte order mark. Raises Refusal for what cannot be read, is no file
    (opening a pipe would wait for ever), is too large to be one of its kind, is text in another
    encoding than UTF-8 or has control characters.
    """
    binary = kind in ("picture", "parquet")
    what = "a file" if binary else "text in UTF-8"
    expected = f"{what} of at most {LARGEST / 1e6:.0f} MB"
    path, found = folder / name, f"{name} ({kind}) cannot be read"
    with refusing(found, expected, f"replace or remove it in {folder}"):
        size = path.stat().st_size
        if not path.is_file():
            raise OSError("no file")
        if size > LARGEST:
            raise OSError(f"{size / 1e6:.1f} MB")
        content = path.read_bytes()
    if binary:
        return content
    try:
        text = content.decode("utf-8-sig")
        control = CONTROL.search(text)
        why, command = f"control character {control[0]!r}" if control else "", DELETE
    except UnicodeDecodeError as error:
        wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")  # Windows' "Unicode"
        encoding = "UTF-16" if wide else "WINDOWS-1252"
        why = f"no UTF-8 at byte {error.start + 1}, maybe {encoding}"
        command = f"iconv -f {encoding} -t UTF-8"
    if why:
        expected += " without control characters"
        raise Refusal(f"{found} ({why})", expected, MEND.format(folder, command))
    return text


def captions_of(value: Any, where: str) -> tuple[str, ...]:
    """The captions in a cell of a table: a text, or a list of texts. Raises Refusal."""
    texts = value if value and isinstance(value, list) else [value]
    return tuple(caption_of(text, where) for text in texts)


def caption_of(value: Any, where: str) -> str:
    """A caption, empty where there is none. Raises Refusal for what is no text, or none that UTF-8
    holds (JSON lets half a surrogate pair through), or has control characters.
    """
    value = "" if value is None else value
    text = isinstance(value, str) and value.encode(errors="ignore").decode() == value
    if not text or CONTROL.search(value):
        found = f"{where} has the caption {value!r:.200}"
        remedy = "correct it, or name another --caption-column"
        raise Refusal(found, "text without control characters", remedy)
    return value


# ---- the Hub -------------------------------------------------------------------------------------


def from_hub(name: str, options: Config) -> Pictures:
    """A Hub data set, or a folder of parquet files, through `datasets`; pictures stay encoded."""
    import datasets

    if not on_terminal():  # or bars of its own, by their hundreds
        datasets.disable_progress_bars()
    split, config = options.dataset_split, options.dataset_config or None
    found = f"the data set {name} could not be loaded"
    expected = f"a folder of pictures with captions, or a Hub data set with the split {split}"
    remedy = "check the name and the network, pass --dataset-name FOLDER, or where splits or "
    remedy += "configs are listed --dataset-split NAME --dataset-config NAME"
    with refusing(found, expected, remedy):
        if Path(name).is_dir():
            table = datasets.load_dataset(name, config, split=split)
        else:
            table = download(name, config).as_dataset(split)
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
        texts = captions_of(captions[i], row)
        return Picture(row, texts, digest(read(i)), functools.partial(read, i))

    bar = progress(range(len(table)), "reading")
    pictures = Pictures(for_all(picture, bar))
    if taken not in ("image", options.image_column):
        pictures.notes = [f"pictures taken from the column {taken}"]
    return pictures


def download(name: str, config: str | None) -> Any:
    """The `datasets` builder of a Hub data set that is here then. Before anything of it is fetched
    it is said how much of which commit that is. Raises Refusal where it does not come, or has no
    room.
    """
    import datasets
    from huggingface_hub import try_to_load_from_cache

    if not quiet[0]:  # a mistyped folder is looked for half a minute
        print(f"{name} is no folder here: asking the Hub for a data set", file=sys.stderr)
    count(datasets.utils.tqdm)
    what, way_out = f"the data set {name} (no folder here)", "pass --dataset-name FOLDER"
    ask = functools.partial(asked, "dataset", name, what, way_out)
    builder = ask(functools.partial(datasets.load_dataset_builder, name, config))
    if Path(builder.cache_dir).exists():
        return builder  # it came before
    addresses = chain(*(builder.config.data_files or {}).values())
    found = {m.groups() for m in map(re.compile(r"@([0-9a-f]{40})/(.+)").search, addresses) if m}
    coming = [
        (commit, path)
        for commit, path in found
        if not isinstance(try_to_load_from_cache(name, path, None, commit, "dataset"), str)
    ]
    size = 0
    if coming:
        commit = coming[0][0]
        sizes = listing("dataset", name, commit, what, way_out)[1]
        size = sum(sizes.get(path, 0) for _, path in coming)
        check_room(size, f"the data set {name} at commit {commit}, {len(coming)} files,", way_out)
    ask(builder.download_and_prepare, size)
    return builder


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
    """The file that a row of the data set `name` names, where `datasets` keeps what it downloaded.
    A table from anywhere could name any other file of this disk.
    """
    import datasets
    import huggingface_hub

    kept = (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    target = Path(path).resolve()
    if not any(target.is_relative_to(Path(folder).resolve()) for folder in kept):
        found = f"a row of {name} names the picture {path!r}, which is outside the data set"
        raise Refusal(found, "pictures inside the data set", "put them into the table")
    return target


def caption_column(columns: list[str], options: Config, where: str) -> str:
    """The column that holds the captions; "" where there is none and the options give one. Raises
    Refusal.
    """
    names = (options.caption_column,) if options.caption_column else CAPTIONS
    there = [name for name in names if name in columns]
    given = options.caption is not None or options.caption_from_name
    if there or (names == CAPTIONS and given):
        return there[0] if there else ""
    found, remedy = f"{where} has the columns {', '.join(columns)}", "--caption-column NAME, or "
    raise Refusal(found, " or ".join(names), remedy + WAYS_OUT)
