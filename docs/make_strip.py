"""One picture of a run's previews, a row for each prompt and a column for each step:
python docs/make_strip.py runs/pocket-quick previews.png
"""

import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from see import sheet


def strip(out: Path) -> Image.Image:
    """The strip of the run in `out`; white where a preview is missing."""
    rows: dict[str, dict[int, Image.Image]] = {}
    for path in sorted((out / "pictures").glob(f"{'[0-9]' * 6}-*.png")):
        rows.setdefault(path.stem[7:], {})[int(path.stem[:6])] = Image.open(path)
    steps = sorted({step for row in rows.values() for step in row})
    told = {name: next(iter(row.values())).info["parameters"] for name, row in rows.items()}
    prompts = {name: about.partition("\n")[0] for name, about in told.items()}
    labels = prompts if len({*prompts.values()}) == len(rows) else {name: name for name in rows}
    white = Image.new("RGB", next(iter(next(iter(rows.values())).values())).size, "white")
    pictures = {
        labels[name]: [row.get(step, white) for step in steps] for name, row in rows.items()
    }
    return sheet.grid(pictures, [f"step {step}" for step in steps])


if __name__ == "__main__":
    strip(Path(sys.argv[1])).quantize(128).save(sys.argv[2], optimize=True)
