"""The drawings that the small SDXL is made from: fetched as packages, rendered, packed.

Four families of one set of subjects, all under MIT or Apache-2.0 (see NOTICE). The fifth, Fluent's
high-contrast drawings, is the style to learn ("ink"): it lies in a file of its own, which no stage
that trains the base model opens.
"""

import hashlib
import io
import json
import re
import subprocess
import tarfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from inputs.files import Refusal

SIDE = 128  # pixels of a rendered drawing

# name: (version, sha256 of the package as the registry serves it)
PACKAGES = {
    "@iconify-json/fluent-emoji-flat": (
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "@iconify-json/fluent-emoji": (
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    ),
    "@iconify-json/noto": (
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "@iconify-json/noto-v1": (
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    "@iconify-json/fluent-emoji-high-contrast": (
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    ),
    "emojibase-data": (
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
}
FAMILIES = {  # what a drawing is called here: its package
    "flat": "@iconify-json/fluent-emoji-flat",
    "glossy": "@iconify-json/fluent-emoji",
    "soft": "@iconify-json/noto",
    "blob": "@iconify-json/noto-v1",
}
INK = "@iconify-json/fluent-emoji-high-contrast"
LINES = {"thin": 0.8, "bold": 1.5}  # pen widths in the drawings' units, 32 to a side

# Subjects that a picture shows without words: whole groups of Unicode's list, and parts of two.
GROUPS = {
    "smileys-emotion",
    "animals-nature",
    "food-drink",
    "travel-places",
    "activities",
    "objects",
    "flags",
}
SUBGROUPS = {
    "body-parts",
    "hands",
    "hand-fingers-open",
    "hand-fingers-closed",
    "hand-prop",
    "geometric",
    "religion",
}
WORDLESS = re.compile(r"oclock|thirty|button")


@dataclass
class Subject:
    """One thing that can be drawn. `name` is its caption, `icon` its name in the packages."""

    icon: str
    name: str
    group: str
    tags: list[str] = field(default_factory=list)
    families: list[str] = field(default_factory=list)  # those that draw it


def fetch(folder: Path) -> None:
    """Download the packages that are not in `folder` yet, with npm. Needs a network.

    Raises:
        Refusal: npm is missing or fails, or a package is not the one this was written for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, (version, digest) in PACKAGES.items():
        path = tarball(folder, name)
        if not path.exists():
            command = ["npm", "pack", f"{name}@{version}", "--pack-destination", str(folder)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
                raise Refusal(
                    f"{' '.join(command[:3])} failed: {said[-1] if said else error}",
                    "npm and its registry; only the stage render needs them",
                    f"npm pack {name}@{version}, and put the file into {folder}",
                ) from error
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != digest:
            raise Refusal(
                f"{path.name} has sha256 {found[:16]}", f"{digest[:16]}", f"rm {path}, then again"
            )


def tarball(folder: Path, name: str) -> Path:
    """Where npm puts the package `name`."""
    return folder / f"{name.lstrip('@').replace('/', '-')}-{PACKAGES[name][0]}.tgz"


def read_json(folder: Path, name: str, file: str) -> dict:
    """One JSON file out of a package, unpacked nowhere."""
    with tarfile.open(tarball(folder, name)) as package:
        return json.load(package.extractfile(f"package/{file}"))


def subjects(folder: Path) -> list[Subject]:
    """What can be drawn, in Unicode's order: in the chosen groups, and drawn in flat and ink."""
    flat = FAMILIES["flat"]
    known = set(read_json(folder, flat, "icons.json")["icons"])
    known &= set(read_json(folder, INK, "icons.json")["icons"])
    icon_of = read_json(folder, flat, "chars.json")
    words = read_json(folder, "emojibase-data", "en/messages.json")
    groups = {g["order"]: g["key"] for g in words["groups"]}
    subgroups = {g["order"]: g["key"] for g in words["subgroups"]}
    found: dict[str, Subject] = {}
    for entry in read_json(folder, "emojibase-data", "en/data.json"):
        code = entry["hexcode"].lower()
        icon = icon_of.get(code) or icon_of.get(code.replace("-fe0f", ""))
        group, part = groups.get(entry.get("group")), subgroups.get(entry.get("subgroup"))
        if icon not in known or not (group in GROUPS or part in SUBGROUPS):
            continue
        if not WORDLESS.search(icon) and icon not in found:
            name = icon.replace("-", " ")
            tags = [t for t in entry.get("tags", []) if t.isascii() and t not in name]
            found[icon] = Subject(icon, name, group, tags)
    return list(found.values())


def svg(icons: dict, icon: str) -> str | None:
    """The drawing `icon` of a package as an SVG document, through its aliases; None if missing."""
    alias = icons.get("aliases", {}).get(icon)
    flip = False
    if icon not in icons["icons"] and alias:
        flip, icon = bool(alias.get("hFlip")), alias["parent"]
    if icon not in icons["icons"]:
        return None
    drawing = icons["icons"][icon]
    width = drawing.get("width", icons.get("width", 16))
    height = drawing.get("height", icons.get("height", 16))
    body = drawing["body"]
    if flip:
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" color="#1c1c1c">{body}</svg>'
    )


SHAPES = {"path", "circle", "ellipse", "rect", "polygon", "polyline", "line"}


def as_lines(document: str, pen: float) -> str:
    """The drawing as a pen would trace it: every shape white with a black edge, dark shapes black.

    The later shapes cover the earlier ones' edges, as they cover their colours.

    Args:
        document: an SVG of the family flat.
        pen: width of the line in the drawing's units.
    """
    ET.register_namespace("", "http://www.w3.org/2000/svg")
    root = ET.fromstring(document)

    def walk(node: ET.Element, fill: str, stroke: str, width: str) -> None:
        tag = node.tag.rpartition("}")[2]
        if tag in ("defs", "clipPath", "mask"):
            return
        fill, stroke = node.get("fill", fill), node.get("stroke", stroke)
        width = node.get("stroke-width", width)
        if tag in SHAPES:
            edge = pen if stroke == "none" else max(pen, float(width))
            dark = "#000" if is_dark(fill) else "#fff"
            node.set("fill", "none" if fill == "none" else dark)
            node.set("stroke", "none" if fill == stroke == "none" else "#000")
            node.set("stroke-width", str(edge))
            node.set("stroke-linejoin", "round")
        for child in node:
            walk(child, fill, stroke, width)

    walk(root, "#000", "none", "1")
    return ET.tostring(root, encoding="unicode")


def is_dark(colour: str) -> bool:
    """Whether #rgb or #rrggbb is nearly black; False for a gradient's name."""
    digits = colour.lstrip("#")
    if not re.fullmatch(r"[0-9a-fA-F]{3}|[0-9a-fA-F]{6}", digits):
        return False
    step = len(digits) // 3
    parts = [int(digits[i : i + step] * (2 // step), 16) for i in range(0, len(digits), step)]
    return sum(parts) < 3 * 64


def rasterise(document: str) -> np.ndarray:
    """(128, 128, 4) uint8, RGBA with a transparent ground."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=document, width=SIDE, height=SIDE))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    ground = Image.new("RGBA", (SIDE, SIDE))
    ground.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    return np.asarray(ground)


def render(folder: Path, out: Path) -> list[Subject]:
    """Every drawing of every family into `out`/drawings.npz, the ink ones into `out`/ink.npz.

    drawings.npz holds per family (N, 128, 128, 4) uint8 RGBA, all zero where a family lacks the
    subject, and per pen (N, 128, 128) uint8, 255 where the pen was; ink.npz one (N, 128, 128)
    likewise. subjects.json beside them says what the N are.
    """
    chosen = subjects(folder)
    icons = {name: read_json(folder, package, "icons.json") for name, package in FAMILIES.items()}
    icons["ink"] = read_json(folder, INK, "icons.json")
    empty = np.zeros((SIDE, SIDE, 4), np.uint8)
    families: dict[str, list] = {name: [] for name in FAMILIES}
    pens: dict[str, list] = {name: [] for name in LINES}
    ink = []
    for subject in tqdm(chosen, desc="render", unit="subject"):
        for name, rows in families.items():
            document = svg(icons[name], subject.icon)
            rows.append(empty if document is None else rasterise(document))
            if document is not None:
                subject.families.append(name)
        outline = svg(icons["flat"], subject.icon)
        for name, width in LINES.items():
            pens[name].append(darkness(rasterise(as_lines(outline, width))))
        ink.append(rasterise(svg(icons["ink"], subject.icon))[..., 3])
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        out / "drawings.npz", **{k: np.stack(v) for k, v in (families | pens).items()}
    )
    np.savez_compressed(out / "ink.npz", ink=np.stack(ink))
    rows = [vars(subject) for subject in chosen]
    (out / "subjects.json").write_text(json.dumps(rows, indent=1) + "\n")
    return chosen


def read_subjects(folder: Path) -> list[Subject]:
    """What `render` rendered into `folder`, in the order of its arrays."""
    return [Subject(**row) for row in json.loads((folder / "subjects.json").read_text())]


def darkness(picture: np.ndarray) -> np.ndarray:
    """RGBA (128, 128, 4) -> (128, 128) uint8: how much black lies on each pixel."""
    alpha = picture[..., 3].astype(np.float32) / 255
    return (alpha * (255 - picture[..., :3].mean(-1))).round().astype(np.uint8)


STYLES = {  # style set: (ground, pen), RGB
    "ink": ((255, 255, 255), (28, 28, 28)),
    "blueprint": ((30, 79, 163), (255, 255, 255)),
}


def style_set(name: str, out: Path, drawings: Path, captions: list[str]) -> None:
    """The style `name` as a data set that loop.py takes: PNGs and metadata.jsonl under `out`."""
    ground, pen = (np.array(colour, np.float32) for colour in STYLES[name])
    place = {subject.name: i for i, subject in enumerate(read_subjects(drawings))}
    if missing := sorted(set(captions) - set(place)):
        raise Refusal(
            f"no drawing of {', '.join(missing[:3])} ({len(missing)} missing)",
            "every subject of the style set",
            f"rm {drawings}/render.json, and build again",
        )
    ink = np.load(drawings / "ink.npz")["ink"]
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.png"):
        old.unlink()
    with (out / "metadata.jsonl").open("w") as lines:
        for caption in sorted(captions):
            share = ink[place[caption]][..., None] / 255.0
            picture = (ground * (1 - share) + pen * share).round().astype(np.uint8)
            file = caption.replace(" ", "-") + ".png"
            Image.fromarray(picture).save(out / file, optimize=True)
            lines.write(json.dumps({"file_name": file, "text": caption}) + "\n")
