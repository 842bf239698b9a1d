"""clip_tokens.json.gz: 1,000 captions and the tokens that open_clip's own tokenizer gives them.

Made by `pip install ftfy regex && pip install --no-deps open_clip_torch==3.3.0 && python
tests/inputs/clip_tokens.py`. None is a caption that ftfy would mend: transformers' tokenizer, which
this project and diffusers use, mends nothing.
"""

import gzip
import html
import importlib.util
import json
import random
from pathlib import Path

PLACE = Path(__file__).parent / "clip_tokens.json.gz"
ROOT = Path(__file__).parents[2]
MORE = """1girl, solo, long_hair, looking_at_viewer | (masterpiece:1.2), best quality | :d | ^_^
f/1.4, 85mm, ISO 100 | a dog's toy | they'll come | we've won | I'm here | he'd go | it isn't | wow!
l'été à la mer | Ärger über Öl | 東京の夜 | кот смотрит | 한국어 | 🐱 on a mat | café-crème; 50% off
C++ & C# | #hashtag @name | e.g. "quoted" | [red|blue] {x} | ~/path_to/file.png | 100km/h | 3.14159
2026-11-28 | a...b | --ar 16:9 | <lora:x:0.8> | $5.00 | x² + y² | Ⅷ | ½ cup | naïve façade | ÇA VA
İstanbul | ΑΒΓ"""


def captions() -> list[str]:
    """The small model's captions as they are, then words of CLIP's vocabulary and pieces of the
    kinds that captions are made of.
    """
    rows = [(ROOT / f"pocket/{part}/metadata.jsonl").read_text() for part in ("ink", "blueprint")]
    found = [json.loads(row)["text"] for row in "".join(rows).splitlines()]
    pieces, dice = MORE.replace("\n", " | ").split(" | "), random.Random(0)
    vocabulary = json.loads((ROOT / "inputs/sdxl/tokenizer/vocab.json").read_text())
    words = [word.removesuffix("</w>") for word in vocabulary if word.isascii()]
    while len(found) < 1000:
        few = dice.choices(words, k=dice.randint(0, 14))
        few += dice.choices(pieces, k=dice.randint(1, 5))
        dice.shuffle(few)
        caption = dice.choice([", ", " ", ",", "  ", "\n", ". "]).join(few)
        found.append(caption.upper() if dice.random() < 0.1 else caption)
    return found


def main() -> None:
    import ftfy

    folder = importlib.util.find_spec("open_clip").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("tokenizer", f"{folder}/tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # alone: the package itself wants torchvision and timm
    clip, rows = module.SimpleTokenizer(), []
    for text in captions():
        assert text == ftfy.fix_text(html.unescape(text)), text
        rows.append((text, [clip.sot_token_id, *clip.encode(text), clip.eot_token_id]))
    PLACE.write_bytes(gzip.compress(json.dumps(rows, ensure_ascii=False).encode(), mtime=0))


if __name__ == "__main__":
    main()
