"""Data folders as nobody should have to meet them, and the commands that meet them."""

import contextlib
import functools
import json
import os
import shutil
from pathlib import Path

import torch

import data
import model
from inputs import pictures as decoding
from inputs import sources
from inputs.files import Refusal, digest
from inputs.options import Config
from keep import identity, report
from stress import bad_pictures
from stress.case import Case

POCKET = Path(__file__).resolve().parents[2] / "pocket"
MODEL = POCKET / "model"
PICTURES = sorted((POCKET / "ink").glob("*.png"))[:4]
SURROGATE = "\ud800"
TEXTS = (  # captions that are text
    *(
        "a red fox",
        "",
        "   \n\t ",
        "x" * 100_000,
        "a fox " * 17_000,
    ),
    *("ثعلب أحمر", "\u202efox", "🦊" * 500, "e\u0301" * 900),
    *('{"a": 1}', "../../etc/passwd", "<|endoftext|>" * 40, "\n" * 5000, "\u2028a"),
)
BYTES = (  # and captions that are not, or in another encoding
    *(b"\x00", b"a\x00b", b"\x1b[31mred", bytes(range(32))),
    *(b"\xff", b"\xff\xfea\0 \0f\0o\0x\0", b"\xed\xa0\x80", b"caf\xe9", b"\xc0\x80", b"\x80" * 999),
    *("fox".encode("utf-16"), "fox".encode("utf-32"), b"fox\xf0\x9f", b"\xef\xbb\xbf\xff"),
)


def junk(case: Case, deep: int = 0):
    """A JSON value that nobody asked for."""
    rng = case.rng
    values = [
        *(None, True, False, 0, 1, -1, 3, 0.5, -0.0, 1e308, float("nan"), float("inf")),
        *(10**30, -(10**30), 2**31, 10**9, "", "x", "16", "true", "../../x", "/etc/passwd"),
        *("\x00", SURROGATE, "\x1b[2J", "a" * 10_000, "ثعلب", [], {}, [[]], [None], [1, 2, 3]),
        *({"a": {"b": []}}, "C:\\x", "file:///etc/passwd", [10**9] * 3, [0], ["x"]),
    ]
    value = rng.choice(values)
    return [junk(case, deep + 1)] if deep < 3 and rng.random() < 0.05 else value


def places(value, path: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, each in inner:
        found.append((*path, key))
        if isinstance(each, dict | list):
            found += places(each, (*path, key))
    return found


def bad_json(case: Case, content: bytes) -> bytes:
    """A JSON file with one or two values changed, or with its bytes damaged."""
    rng = case.rng
    if rng.random() < 0.3:
        whole = {
            "nothing": b"",
            "null": b"null",
            "a list": b"[]",
            "a number": b"3",
            "a string": b'"x"',
            "100,000 brackets": b"[" * 100_000,
            "100,000 nested": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
            "a BOM before it": b"\xef\xbb\xbf" + content,
            "UTF-16": content.decode().encode("utf-16"),
            "no UTF-8": b"\xff\xfe\xfd" + content,
            "a huge number": b'{"a": ' + b"1" * 10_000 + b"}",
            "zeros": bytes(4096),
        }
        how = rng.choice((*whole, "damage", "damage", "damage"))
        case.what += f", {how}"
        return bad_pictures.damaged(case, content) if how == "damage" else whole[how]
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 2))):
        path = rng.choice(places(value) or [()])
        if not path:
            break
        holder = functools.reduce(lambda at, key: at[key], path[:-1], value)
        if rng.random() < 0.15:
            case.what += f", without {'.'.join(map(str, path))}"
            del holder[path[-1]]
        else:
            holder[path[-1]] = new = junk(case)
            case.what += f", {'.'.join(map(str, path))} = {str(new)[:40]!a}"
    return json.dumps(value).encode()


# ---- data sets -----------------------------------------------------------------------------------


@functools.cache
def text_encoders() -> model.TextEncoders:
    return model.load_text_encoders(str(MODEL), torch.device("cpu"))


def use(case: Case, pictures: list[sources.Picture]) -> None:
    """What a run does with captions and pictures before it trains."""
    identity.of_data(pictures)
    captions = [each for p in pictures for each in p.captions if each.strip()]
    report.cut_captions(captions, Config(pretrained_model_name_or_path=str(MODEL)))
    encoder = data.Encoder(pictures, None, text_encoders, data.Crop((64,), False, False, 0))
    for i in range(len(pictures) + 1):
        context, pooled = encoder.prompt(i)
        assert context.isfinite().all() and pooled.isfinite().all()
    decoding.check_pictures(decoding.decode, pictures)
    for each in pictures:
        assert digest(each.read()) == each.digest


def odd_things(case: Case) -> dict:
    """What else may lie in a data folder: name -> (how it is made, whether it must be refused)."""
    folder, elsewhere = case.folder, case.elsewhere
    outside = elsewhere / "fox.png"
    if not outside.exists():
        shutil.copy(PICTURES[-1], outside)
        outside.with_suffix(".txt").write_text("outside")

    def pair(make):
        def both():
            make(folder / "odd.png")
            (folder / "odd.txt").write_text("odd")

        return both

    def sparse(path, size):
        with open(path, "wb") as file:
            file.truncate(size)

    return {
        "nothing odd": (lambda: None, False),
        "a folder called odd.png": (lambda: (folder / "odd.png").mkdir(), False),
        "a pipe called odd.txt": (lambda: os.mkfifo(folder / "odd.txt"), None),
        "a link to a picture outside": (pair(lambda p: p.symlink_to(outside)), False),
        "a link to nothing": (pair(lambda p: p.symlink_to(folder / "gone")), True),
        "a link to itself": (pair(lambda p: p.symlink_to(p)), True),
        "a link to /dev/zero": (pair(lambda p: p.symlink_to("/dev/zero")), True),
        "a link to the folder": ((folder / "odd").symlink_to, False, folder),
        "a link to a folder outside": ((folder / "odd").symlink_to, False, elsewhere),
        "a text called odd.png": (pair(lambda p: p.write_text("a fox")), True),
        "a picture of a terabyte": (pair(lambda p: sparse(p, 2**40)), True),
        "a caption without a picture": (lambda: (folder / "odd.txt").write_text("odd"), True),
    }


NAMES = ("a", "ä", "狐", "🦊", "a b", "h.idden", "x" * 200, "a\nb", "a\x1b[31m", "a;b'c", "-rf")


def caption(case: Case):
    """A folder of name.txt beside name.png."""
    rng = case.rng
    want = {}
    for i in range(rng.randrange(1, 4)):
        text = rng.random() < 0.7
        content = rng.choice(TEXTS).encode() if text else rng.choice((*BYTES, rng.randbytes(50)))
        if i == 0:  # each of them in turn
            content = [*map(str.encode, TEXTS), *BYTES][case.turn % (len(TEXTS) + len(BYTES))]
        name = f"{rng.choice(NAMES)}{i}".encode() + rng.choice((b"", b"", b"\xff\xe9"))
        stem = case.folder / os.fsdecode(name)
        shutil.copy(PICTURES[i], f"{stem}.png")
        Path(f"{stem}.txt").write_bytes(content)
        with contextlib.suppress(UnicodeDecodeError):
            if not sources.CONTROL.search(told := content.decode("utf-8-sig")):
                want[f"{stem}.png"] = told.strip()
        case.what += f"{content[:20]!r}, "
    things, total = odd_things(case), i + 1
    odd = sorted(things)[case.turn % len(things)] if case.turn % 2 else "nothing odd"
    make, bad, *arguments = things[odd]
    make(*arguments)
    case.what += odd

    def act():
        try:
            pictures = sources.read_dataset(str(case.folder))
            use(case, pictures)
        except Refusal:
            good = bad is False and len(want) == total and any(want.values())
            assert not good, "a good folder was refused"
            raise
        assert bad is not True, "accepted"
        got = {str(case.folder / p.name): p.captions[0] for p in pictures}
        got.pop(str(case.folder / "odd.png"), None)
        assert got == want

    return act


ODD_NAMES = (
    *("../elsewhere/fox.png", "../../elsewhere/fox.png", "sub/../../elsewhere/fox.png"),
    *("..\\elsewhere\\fox.png", "C:\\fox.png", "\\\\x\\y", "out/fox.png", "out/../fox.png"),
    *("link/../fox.png", "a.png\x00", "\x00", SURROGATE, "", ".", "..", "/", "~/fox.png"),
    *("file:///etc/passwd", "sub", "x" * 5000, "/dev/zero", "/proc/self/environ", "sub/", "a.png/"),
    *("pipe", "sub/../a.png", "./a.png", "A.PNG"),
)


def metadata_lines(case: Case) -> dict[str, list]:
    """Lines of metadata.jsonl for the folder a.png, b.png, sub/c.png: name -> lines, as values or
    as bytes. Those whose name begins with "good" must be accepted, the others refused.
    """
    names = (*ODD_NAMES, str(case.elsewhere / "fox.png"))
    good = [{"file_name": n, "text": f"t{n}"} for n in ("a.png", "b.png", "sub/c.png")]
    first = lambda **changes: [good[0] | changes, *good[1:]]  # noqa: E731
    return {
        "good": good,
        "good: no text": first(text=None),
        "good: blank lines": [b"", good[0], b"  ", *good[1:], b""],
        "good: CRLF": [json.dumps(line).encode() + b"\r" for line in good],
        "good: 10,000 columns": [good[0] | {f"c{i}": i for i in range(10_000)}, *good[1:]],
        "good: a huge line": [good[0] | {"more": "x" * 5_000_000}, *good[1:]],
        **{f"good: text {i}": first(text=text) for i, text in enumerate(TEXTS)},
        **{f"the name {n!a:.60}": [*good, {"file_name": n, "text": "x"}] for n in names},
        "no rows": [],
        "CSV": [b"file_name,text", b"a.png,fox"],
        "two on a line": [json.dumps(good[0]).encode() + json.dumps(good[1]).encode(), good[2]],
        "good: one missing": good[:2],
        "one twice": [*good, good[0]],
        "a key twice": [b'{"file_name": "a.png", "file_name": "b.png", "text": "x"}', *good[1:]],
        "another column": [{"file_name": "a.png", "label": "x"}, *good[1:]],
        "raw surrogate": [b'{"file_name": "a.png", "text": "\xed\xa0\x80"}', *good[1:]],
    }


def metadata(case: Case):
    """A folder with metadata.jsonl, a link into the folder outside, and a picture outside. Every
    other turn a line of it is junk.
    """
    odd_things(case)  # makes the picture outside
    (case.folder / "sub").mkdir()
    for picture, name in zip(PICTURES, ("a.png", "b.png", "sub/c.png"), strict=False):
        shutil.copy(picture, case.folder / name)
    table = metadata_lines(case)
    how = "junk" if case.turn % 2 else sorted(table)[case.turn // 2 % len(table)]
    lines = table["good" if how == "junk" else how]
    case.what = how
    if "link/" in how or "'out/" in how:
        (case.folder / ("link" if "link/" in how else "out")).symlink_to(case.elsewhere)
    if "'pipe'" in how:
        os.mkfifo(case.folder / "pipe")
    rows = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    if how == "junk":
        rows[0] = bad_json(case, rows[0])
    (case.folder / "metadata.jsonl").write_bytes(b"\n".join(rows))
    inside = {digest(p.read_bytes()) for p in case.folder.rglob("*.png") if p.is_file()}

    def act():
        try:
            pictures = sources.read_dataset(str(case.folder))
            use(case, pictures)
        except Refusal:
            assert not how.startswith("good"), "a good file was refused"
            raise
        assert len(pictures) == 3 and {p.digest for p in pictures} <= inside
        if how != "junk":
            assert how.startswith("good"), "accepted"
            texts = {x["file_name"]: x["text"] or "" for x in lines if isinstance(x, dict)}
            got = {p.name: p.captions[0] for p in pictures}
            assert all(got[name] == text for name, text in texts.items())

    return act


# ---- commands ------------------------------------------------------------------------------------

SMALL = (  # a run of seconds; more options follow
    *("--pretrained-model-name-or-path", str(MODEL), "--resolution", "64", "--no-tensorboard"),
    *("--train-batch-size", "1", "--lr-warmup-steps", "0", "--validation-prompts"),
)


def small_run(case: Case, **changes: str) -> list[str]:
    """The command of the run that fuzz.prepare() made, in case.out, two steps."""
    options = {
        "dataset-name": str(case.base / "data"),
        "cache-dir": str(case.out / "cache"),
        "output-dir": str(case.out / "run"),
        "max-train-steps": "2",
        "checkpointing-steps": "1",
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    return ["pocket", *(word for k, v in options.items() for word in (f"--{k}", v)), *SMALL]


def draw_small(case: Case, adapter: Path, *more: str) -> list[str]:
    model_, out = str(MODEL), str(case.out / "pictures")
    return [
        *(str(adapter), "--prompts", "a fox", "--resolution", "64", "--num-inference-steps", "1"),
        *("--pretrained-model-name-or-path", model_, "--output-dir", out, *more),
    ]
