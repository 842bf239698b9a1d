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
import shlex
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from inputs.captions import variants
from inputs.download import asked
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
# In a picture's path kohya's folders: how often what lies in 10_style is repeated (dates are no
# repeats), and its pictures for prior preservation.
NUMBERED = re.compile(r"(?:^|/)\d+_[^/]*/")
REPEATS = re.compile(r"(?:^|/)0*([1-9]\d{0,2})_(?=[^/]*/)")
REGULARISATION = re.compile(r"(?i)(?:^|/)(\d+_)?reg([_ -][^/]*|ulari[sz]ation[^/]*)?/")
# What others' masks end with, or lie in: a_mask.png, mask/a.png.
LIKE_MASK = re.compile(r"(?i)[._-]mask$|(?<![^/])masks?/")
# What may hold captions by its name: metadata.json1, Meta_cap.json, train.csv, a.tags.
ALIKE = re.compile(r"(?i)(meta|caption).*\.|.*\.(jsonl?|csv|tsv|tags|parquet)$")
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
LARGEST = {"picture": 10**9, "parquet": 10**9, "metadata": 10**9, "caption": 10**6}


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
    tables = tables_of(folder, options) if folder else None
    if folder and tables is not None:
        pictures = from_folder(folder, tables, options)
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


def tables_of(folder: Path, options: Config) -> list[Path] | None:
    """The files in which a folder's captions are: tables at its top or in the split's folder, a
    parquet file there with file names under any name; none where captions lie beside the pictures;
    None where they are in parquet files with the pictures. Raises Refusal for both, and for a split
    or a config that a folder of pictures does not have.
    """
    paths, split = files_in(folder)[0], folder / options.dataset_split
    tables = [p for p in paths if TABLE.fullmatch(p.name) and p.is_file()]
    found = [p for p in tables if p.parent in (folder, split)]
    parquet = [p for p in paths if p.suffix == ".parquet" and p.is_file() and p not in found]
    if parquet and any(map(is_picture, paths)):
        hold = {path: held_in(path) for path in parquet}
        found += [p for p in parquet if hold[p] == "captions" and p.parent in (folder, split)]
        parquet = [p for p in parquet if hold[p] == "pictures"]
    if found and (parquet := parquet[:1]):
        told = " and ".join(p.relative_to(folder).as_posix() for p in found + parquet)
        raise Refusal(f"{folder} holds {told}", "one table", "rename or remove the others")
    there = sorted({p.parent.name for p in tables if p.parent.parent == folder})
    if not parquet and (options.dataset_config or split.name not in ("train", *there)):
        told = f"{folder} has no configs, and the splits {', '.join(there) or '(none)'}"
        remedy = "correct or leave out --dataset-split and --dataset-config, or name a sub-folder"
        raise Refusal(told, "SPLIT/metadata.jsonl, or parquet files", remedy)
    return None if parquet else found


def held_in(path: Path) -> str:
    """What a parquet file holds, by its columns: "pictures", "captions" of files, or ""."""
    import pyarrow.parquet  # here, since it takes a while

    with refusing(f"{path} is no table", "a whole parquet file", "replace or remove it"):
        schema = pyarrow.parquet.read_schema(path)
    if any(re.search("binary|bytes:", str(kind)) for kind in schema.types):
        return "pictures"
    return "captions" if "file_name" in schema.names else ""


def from_folder(folder: Path, tables: list[Path], options: Config) -> Pictures:
    """The pictures of a folder whose captions are in each of `tables`, or in one file each."""
    paths, left_out = files_in(folder)
    top = min((table.parent for table in tables), default=folder)  # of two one is in the other

    def named_in(path: Path) -> str:
        return path.relative_to(folder).as_posix()

    def key(path: Path) -> str:
        """By what a picture and its caption find each other; Macs write accents as two letters."""
        return normal(named_in(path if tables else path.with_suffix("")))

    def caption(path: Path) -> tuple[str, str, tuple]:
        text = content_of(folder, named_in(path), "caption").strip()
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        texts = tuple(lines) if options.caption_lines and lines else (text,)
        return key(stems.get(path.with_suffix(""), path)), named_in(path), texts

    pictures = [p for p in paths if is_picture(p) and (p.is_file() or p.is_symlink())]
    pictures, masks, like_masks = masks_apart(folder, pictures)
    left_out[f"lie outside {top.name}/"] = [p for p in pictures if top not in p.parents]
    pictures = [p for p in pictures if top in p.parents]
    obeyed = options.folder_repeats
    spare = {p for p in pictures if obeyed and REGULARISATION.search(named_in(p))}
    left_out["lie in kohya's reg folders (--no-folder-repeats: trained on)"] = sorted(spare)
    pictures = [p for p in pictures if p not in spare]
    stems = {p.with_suffix(""): p for p in pictures}
    beside = [p for p in paths if p.suffix.lower() in BESIDE]
    read = [p for p in beside if not tables or p.with_suffix("") in stems]
    told = {named_in(table): rows_of(folder, table, pictures, options) for table in tables}
    rows = for_all(caption, read)
    told |= {f"*{end}": [row for row in rows if row[1].lower().endswith(end)] for end in BESIDE}
    captions, notes = agreed(folder, told)
    unused = {key(path) for each in left_out.values() for path in each} - set(map(key, pictures))
    captions = [each for each in captions if each[0] not in unused]
    alike = [p for p in paths if ALIKE.match(p.name) and p.is_file() and top in p.parents]
    known = {*tables, *beside, *filter(is_picture, alike)}
    left_out["are not named as captions are"] = [p for p in alike if p not in known]
    texts = paired(folder, [(key(p), named_in(p)) for p in pictures], captions)

    def picture(path: Path) -> Picture:
        name = named_in(path)
        repeats = REPEATS.findall(name) if obeyed else []
        found = picture_file(folder, name, texts.get(key(path), ("",)))
        mask = masks.get(stem(name))
        mask = picture_file(folder, mask) if mask else None
        return replace(found, mask=mask, weight=int(repeats[-1]) if repeats else 1)

    found = Pictures(for_all(picture, progress(sorted(pictures), "reading", delay=2)))
    said = {f"left out, since they {why}": [*map(named_in, left)] for why, left in left_out.items()}
    often = "so many times, up to 999 (--no-folder-repeats: once)" if obeyed else "once each"
    kohya = f"in folders like 10_style, shown {often}"
    said[kohya] = [p.name for p in found if NUMBERED.search(p.name)]
    said[f"are called as masks of others are, and trained on: a mask is NAME{MASK}"] = like_masks
    found.notes = [f"{named(names)} {what}" for what, names in said.items() if names]
    found.notes += notes + [f"{named_in(t)} has no rows" for t in tables[:1] if not captions]
    own = REPEATS.findall(f"{folder.resolve().name}/") if obeyed else []
    found.notes += [f"its own name's {n} is not counted (--dataset-weights {n} is)" for n in own]
    return found


def masks_apart(folder: Path, files: list[Path]) -> tuple[list[Path], dict[str, str], list[str]]:
    """Of the picture files of `folder` those that are no masks, by the beginning of their picture's
    name the names of those that are, and the names of pictures that are called as other programs
    call the masks of pictures that are there. Raises Refusal for masks without a picture.
    """
    names = [path.relative_to(folder).as_posix() for path in files]
    masks = {stem(name[: -len(MASK)] + "."): name for name in names if name.lower().endswith(MASK)}
    pictures = [path for path in files if not path.name.lower().endswith(MASK)]
    there = {stem(name): name for name in (p.relative_to(folder).as_posix() for p in pictures)}
    like = [n for key, n in there.items() if (of := LIKE_MASK.sub("", key)) != key and of in there]
    odd = [name for key, name in masks.items() if key not in there]
    found = f"{len(odd)} masks without a picture of their own in {folder}, such as {ten(odd)}"
    refuse([(found, f"a.jpg beside a{MASK}", "add, rename or remove what is odd")] if odd else [])
    return pictures, masks, like


def stem(name: str) -> str:
    return normal(name.rpartition(".")[0])


def picture_file(folder: Path, name: str, captions: tuple[str, ...] = ("",)) -> Picture:
    read = functools.partial(content_of, folder, name, "picture")
    return Picture(name, captions, digest(read()), read)


def normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def named(names: list[str]) -> str:
    """How many, and the first of them."""
    return f"{len(names)} (the first: {sayable(names[0])})"


def rows_of(
    folder: Path, table: Path, pictures: list[Path], options: Config
) -> list[tuple[str, str, tuple]]:
    """The rows of a table: the picture's key, its name there, and its captions."""
    top, kohya = table.parent.relative_to(folder), collections.defaultdict(set)
    for path in pictures if table.suffix == ".json" else ():
        for name in (path.name, path.stem):  # their keys have no ending, or another machine's path
            kohya[normal(name)].add(normal(path.relative_to(folder).as_posix()))

    def row(line: tuple[str, str | dict]) -> tuple[str, str, tuple]:
        where, cells = line
        expected = '{"file_name": "a.png", "text": "a caption"}'
        with refusing(f"{where} is not a row", expected, f"correct that in {folder}"):
            cells = json.loads(cells) if isinstance(cells, str) else cells
            if not isinstance(cells, dict) or "file_name" not in cells:  # or called otherwise
                raise OSError(f"no file_name in {json.dumps(cells, default=str):.100}")
            name = (top / cells["file_name"]).as_posix()
        texts = captions_of(cells.get(caption_column(list(cells), options, where)), where)
        own = kohya[normal(Path(name).name)]
        return next(iter(own)) if len(own) == 1 else normal(name), name, texts

    return for_all(row, lines_of(folder, table))


def lines_of(folder: Path, table: Path) -> list[tuple[str, str | dict]]:
    """Where each row of a table stands, and the row; of .jsonl its line, to be read."""
    name = table.relative_to(folder).as_posix()
    text = content_of(folder, name, "parquet" if table.suffix == ".parquet" else "metadata")
    if table.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        numbered: Iterable = [(number, line) for number, line in lines if line.strip()]
    elif table.suffix == ".parquet":
        import pyarrow.parquet  # here, since it takes a while

        with refusing(f"{name} is no table", "a whole parquet file", f"replace it in {folder}"):
            numbered = enumerate(pyarrow.parquet.read_table(io.BytesIO(text)).to_pylist(), 1)
    elif table.suffix == ".json":
        expected = '{"a.png": {"caption": "a caption", "tags": "one, two"}}'
        with refusing(f"{name} is no table", expected, f"correct or rename it in {folder}"):
            numbered = [(key, kohyas(key, row)) for key, row in dict(json.loads(text)).items()]
    else:
        remedy = f'in {folder}, quotes around a caption with commas: a.png,"red, round"'
        with refusing(f"{name} is no table", "file_name,text and one row a picture", remedy):
            reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", strict=True)
            numbered = [(reader.line_num, row) for row in reader]
            for line, row in numbered:
                if "" in row:
                    raise ValueError(f"line {line} has more cells than there are columns")
    return [(f"{name} line {number}", row) for number, row in numbered]


def kohyas(key: str, row: dict) -> dict:
    """An entry of kohya's JSON as a row; its caption is the caption and the tags, as there:
    https://github.com/kohya-ss/sd-scripts/blob/6edbe005/library/train_util.py (FineTuningDataset).
    """
    told = row.get("caption") or None
    told = told if isinstance(told, list) else [told]
    text = [", ".join(filter(None, (each, row.get("tags")))) for each in told]
    return {"file_name": key.replace("\\", "/"), **row, "text": text}


def agreed(folder: Path, told: dict[str, list[tuple]]) -> tuple[list[tuple], list[str]]:
    """Of all rows of the files `told` for each picture those of the first that has words for it,
    and a note where several are taken together. Raises Refusal for two that say different things.
    """
    words = lambda row: " | ".join(filter(None, map(str.strip, row[2])))  # noqa: E731
    every = [(file, row) for file, rows in told.items() for row in rows]
    first: dict[str, str] = {}
    said: dict[str, dict[str, str]] = collections.defaultdict(dict)  # of a key by each file
    for file, row in sorted(every, key=lambda each: not words(each[1])):  # the silent ones last
        first.setdefault(row[0], file)
        if words(row):
            said[row[0]].setdefault(file, words(row))
    if odd := [key for key, each in said.items() if len(set(each.values())) > 1]:
        each = [[f"{sayable(t, 40)!r} in {f}" for f, t in said[key].items()] for key in odd[:3]]
        found = "; ".join(f"{key} is {' and '.join(t)}" for key, t in zip(odd, each, strict=False))
        found += f"; {len(odd) - 3} more" * (len(odd) > 3)
        remedy = f"correct them, or leave one kind out: find {shlex.quote(str(folder))} "
        remedy += f"-name '{Path([*said[odd[0]]][1]).name}' -exec mv {{}} {{}}.unused \\;"
        raise Refusal(f"captions in {folder} disagree: {found}", "the same captions", remedy)
    rows = [(file, row) for file, row in every if first[row[0]] == file]
    taken = list(dict.fromkeys(file for file, row in rows if words(row)))
    note = f"captions of {' and '.join(taken)} taken together"
    return [row for _, row in rows], [note] * (len(taken) > 1)


def paired(folder: Path, pictures: list[tuple], captions: list[tuple]) -> dict[str, tuple]:
    """The texts by the keys of their pictures. pictures: (key, name); captions: (key, name, texts).
    Raises Refusal where a key stands twice and where captions lack their picture.
    """
    here = collections.Counter(key for key, _ in pictures)
    told = collections.Counter(key for key, *_ in captions)
    none = captions and not here.keys() & told.keys()
    odd = {
        "pictures without a caption": [
            name
            for key, name in pictures
            if (here[key] > 1 and told[key]) or (none and not told[key])
        ],
        "captions without a picture": [
            name for key, name, _ in captions if told[key] > here[key] or told[key] > 1
        ],
    }
    expected = "captions for each picture: metadata.jsonl, .csv or .parquet, meta_cap.json, "
    expected += "a.txt or a.caption (not a.jpg.txt)"
    remedy = "add, rename or remove what is odd"
    refuse(
        (f"{len(names)} {wrong} of their own in {folder}, such as {ten(names)}", expected, remedy)
        for wrong, names in odd.items()
        if names
    )
    return {key: texts for key, _, texts in captions}


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
    left_out[closed := "are folders that this user may not read"] = []
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
    """The bytes of the picture or parquet file `name` in `folder`, or the text of a caption or
    metadata file, without its byte order mark. Raises Refusal for what cannot be read, is no file
    (opening a pipe would wait for ever), is too large to be one of its kind, is text in another
    encoding than UTF-8 or has control characters.
    """
    binary = kind in ("picture", "parquet")
    what = "a file" if binary else "text in UTF-8"
    expected = f"{what} of at most {LARGEST[kind] / 1e6:.0f} MB"
    path, found = folder / name, f"{name} ({kind}) cannot be read"
    with refusing(found, expected, f"replace or remove it in {folder}"):
        size = path.stat().st_size
        if not path.is_file():
            raise OSError("no file")
        if size > LARGEST[kind]:
            raise OSError(f"{size / 1e6:.1f} MB")
        content = path.read_bytes()
    if binary:
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


def captions_of(value: Any, where: str) -> tuple[str, ...]:
    """The captions in a cell of a table: a text, or a list of texts. Raises Refusal."""
    texts = value if value and isinstance(value, list) else [value]
    return tuple(caption_of(text, where) for text in texts)


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

    if not on_terminal():  # or bars of its own, by their hundreds
        datasets.disable_progress_bars()
    if not Path(name).is_dir() and not quiet[0]:  # a mistyped folder is looked for half a minute
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
        texts = captions_of(captions[i], row)
        return Picture(row, texts, digest(read(i)), functools.partial(read, i))

    bar = progress(range(len(table)), "reading")
    pictures = Pictures(for_all(picture, bar))
    if taken not in ("image", options.image_column):
        pictures.notes = [f"pictures taken from the column {taken}"]
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
    given = options.caption is not None or options.caption_from_name
    if there or (names == CAPTIONS and given):
        return there[0] if there else ""
    found, remedy = f"{where} has the columns {', '.join(columns)}", "--caption-column NAME, or "
    raise Refusal(found, " or ".join(names), remedy + WAYS_OUT)
