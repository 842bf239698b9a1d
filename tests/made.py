"""Pictures, data folders and models that tests make for themselves."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

import data
from conftest import TINY_SDXL
from inputs import hub
from inputs.files import digest
from inputs.sources import Picture


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def cell(content: bytes | None) -> dict:
    """A picture in a column of a data set."""
    return {"bytes": content, "path": None}


def picture(content: Image.Image | bytes, name: str = "a.png", caption: str = "a") -> Picture:
    content = content if isinstance(content, bytes) else encoded(content)
    return Picture(name, (caption,), digest(content), lambda: content)


def one_view(picture: Picture, resolution: int, random_crop: bool, seed: int, flip: bool) -> tuple:
    """Pixels (3, R, R) and time ids (6,)."""
    pixels, time_ids = data.views(picture, (resolution, resolution), random_crop, seed, (flip,))
    return pixels[0], time_ids[0]


def noisy(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture in which no two places are alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_folder(folder: Path, files: dict[str, bytes | str | list]) -> Path:
    """A folder with these files; a list becomes JSON lines."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


RED, BLUE = (encoded(Image.new("RGB", (8, 8), colour)) for colour in ("red", "blue"))

PNG = encoded(noisy(64, 64))


def model_with(folder: Path, *own: str, of: Path = TINY_SDXL, **index) -> Path:
    """The model `of` in `folder`: its parts are links but for `own`, which are copies to change;
    index: changed keys of model_index.json."""
    folder.mkdir(parents=True)
    for part in hub.PARTS:
        if part in own:
            shutil.copytree(of / part, folder / part)
        else:
            (folder / part).symlink_to(of / part)
    top = json.loads((of / "model_index.json").read_text()) | index
    (folder / "model_index.json").write_text(json.dumps(top))
    return folder


def model_with_unet(folder: Path, *saved: tuple[UNet2DConditionModel, dict]) -> Path:
    """The tiny model with another UNet, saved by diffusers once for each (unet, options)."""
    model_with(folder)
    (folder / "unet").unlink()
    for unet, options in saved:
        unet.save_pretrained(folder / "unet", **options)
    return folder


def assert_same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    mine, want = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == want.keys()
    wrong = [key for key in want if not torch.equal(mine[key], want[key])]
    assert not wrong and {w.dtype for w in mine.values()} == {w.dtype for w in want.values()}
