"""OUT/report.html: a run on one page, which needs no network, no server and, to be read, no script.

A function of the run's folder alone: python -m see.page runs/t4 makes it anew, as every save does.
Curves are SVG that the template draws, not matplotlib's: they have the page's colours, by day and
by night, and take a millisecond and a few kB each, where a picture of it takes half a second.
"""

import contextlib
import functools
import io
import json
import math
import re
import shlex
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image
from tqdm.std import EMA

from inputs import options
from inputs.files import Refusal, first_line, place, refusing, sayable, write_whole
from inputs.progress import clock

NAME, LOG, EVENTS = "report.html", "log.jsonl", "events.jsonl"
BUDGET = 3.5e6  # bytes of all pictures; in base64, as a page holds them, 4/3 of that
SIDES = (512, 384, 256, 160, 96)  # the largest at which they keep to it
SHOWN, POINTS = 12, 1000  # steps whose previews are shown, of many; points of a curve
BANDS = ("least noise", "little", "medium", "much", "most noise")  # learn.held_out.BANDS of them

# ---- what a run has left so far ------------------------------------------------------------------


@contextlib.contextmanager
def telling(path: Path, troubles: dict[str, str]) -> Iterator[None]:
    """What cannot be read of `path` is among the troubles, and the page is made without it."""
    try:
        yield
    except Exception as error:  # of a picture, Pillow raises nearly every class
        troubles[path.name] = f"{path.name} cannot be read, or not all: {first_line(error)}"


def read(path: Path, troubles: dict[str, str]) -> dict:
    """A JSON file; {} where there is none."""
    with telling(path, troubles):
        return dict(json.loads(path.read_text())) if path.exists() else {}
    return {}


def read_lines(path: Path, troubles: dict[str, str]) -> list[dict]:
    """A file of JSON lines, each with its step; the last may be half-written."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with telling(path, troubles):
            row = json.loads(line)
            found.append(row | {"step": int(row["step"])})
    return found


def parameters(path: Path, troubles: dict[str, str]) -> str:
    """What a picture says of itself; "" where there is none."""
    if path.exists():
        with telling(path, troubles), Image.open(path) as image:
            return image.info["parameters"]
    return ""


def previews_of(out: Path, last: int, troubles: dict[str, str]) -> dict[int, dict[tuple, tuple]]:
    """{step: {(name, prompt): picture}} up to the step `last`; of many steps some, both ends among
    them. A picture is (path, when it was written, None or its box in there).
    """
    found: dict[int, dict[tuple, tuple]] = {}
    for path in sorted((out / "pictures").glob(f"{'[0-9]' * 6}*-*.png")):
        step, _, name = path.stem.partition("-")
        if step.isdecimal() and int(step) <= last and (said := parameters(path, troubles)):
            row = found.setdefault(int(step), {})
            row[name, said.partition("\n")[0]] = (path, path.stat().st_mtime_ns, None)
    steps = np.array(sorted(found))
    few = np.unique(np.linspace(0, max(0, len(steps) - 1), SHOWN).round().astype(int))
    return {int(step): found[step] for step in steps[few[: len(steps)]]}


def pairs_of(out: Path, previews: dict, troubles: dict[str, str]) -> list[tuple]:
    """(title, label, picture, label, picture) before and after: of the sheet at the end, or until
    there is one of the first previews and the newest.
    """
    path = out / "pictures" / "before-after.png"
    about = parameters(path, troubles).rpartition("\n")[2]
    if told := re.search(r'Pairs: ("(?:[^"\\]|\\.)*")', about):
        when, told = path.stat().st_mtime_ns, json.loads(json.loads(told[1]))
        both = [(title, (path, when, tuple(a)), (path, when, tuple(b))) for title, a, b in told]
        return [(title, "before", before, "after", after) for title, before, after in both]
    if len(previews) < 2:
        return []
    (first, before), *_, (last, after) = previews.items()
    labels = f"step {first}", f"step {last}"
    return [(k[1], labels[0], before[k], labels[1], after[k]) for k in before if k in after]


@functools.lru_cache(1)  # of a large sheet each part would decode all of it
def opened(path: Path, changed: int) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


@functools.lru_cache(1024)  # a run draws a picture once, and makes its page at every save
def webp(path: Path, changed: int, box: tuple | None, side: int) -> bytes:
    """A picture, or its part in `box`, at most `side` pixels wide and high."""
    image = opened(path, changed)
    image = image.crop(box) if box else image.copy()
    image.thumbnail((side, side))
    image.save(file := io.BytesIO(), "WEBP", quality=80)
    return file.getvalue()


def inlined(wanted: list[tuple], troubles: dict[str, str]) -> dict[tuple, str]:
    """Each picture's data: address, all at the largest of SIDES at which they keep to BUDGET."""
    for side in SIDES:
        made: dict[tuple, bytes] = {}
        for key in dict.fromkeys(wanted):
            with telling(key[0], troubles):
                made[key] = webp(*key, side)
        if sum(len(made.get(key, "")) for key in wanted) <= BUDGET:
            break
    head = "data:image/webp;base64,"
    return {key: head + b64encode(each).decode() for key, each in made.items()}


# ---- curves: in a box of 360 x 190, their numbers left of 50 and below 170 -----------------------


def ticks(low: float, high: float) -> np.ndarray:
    """Two to five round numbers in a range."""
    unit = 10.0 ** math.floor(math.log10((high - low) / 5))
    apart = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m * 5 >= high - low)
    return np.arange(math.ceil(low / apart), math.floor(high / apart) + 1) * apart


def figure(value: float, digits: int = 3) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def chart(title: str, note: str, curves: dict, seen=(), band=(), level=None, mark=None) -> dict:
    """What the template draws. curves: (steps, values) by their names; seen: the values that the
    chart is as high as, where these are not all of them; band: (low, high) around the only curve;
    level: a value to hold it against; mark: (step, value).
    """
    steps = next(iter(curves.values()))[0]
    every = [each for _, each in curves.values()] if not len(seen) else [seen]
    every = np.concatenate([*every, *band, [level] * (level is not None)])
    low, high, end = every.min(), every.max(), max(1, steps[-1])
    spare = (high - low) / 20 or abs(high) or 1
    low, high = low - spare, high + spare

    def at(steps, values) -> Iterator[tuple[float, float]]:
        y = 8 + (high - np.clip(values, low, high)) / (high - low) * 162
        return zip(50 + np.asarray(steps) / end * 300, y, strict=True)

    def path(steps, values) -> str:
        few = np.unique(np.linspace(0, len(steps) - 1, POINTS).astype(int))
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at(np.array(steps)[few], values[few]))

    area = [*at(steps, band[0]), *at(steps[::-1], band[1][::-1])] if band else []
    across, up = ticks(0, end), ticks(low, high)
    return {
        "title": title,
        "note": note,
        "paths": {f"{name} {figure(each[1][-1])}": path(*each) for name, each in curves.items()},
        "band": " ".join(f"{x:.1f},{y:.1f}" for x, y in area),
        "level": level if level is None else next(at([0], [level]))[1],
        "mark": mark and next(at(*np.transpose([mark]))),
        "across": [(x, figure(n, 5)) for n, (x, _) in zip(across, at(across, across), strict=True)],
        "up": [(y, figure(n, 5)) for n, (_, y) in zip(up, at(up, up), strict=True)],
    }


def charts(log: dict[str, np.ndarray], metrics: dict, config: dict) -> list[dict]:
    """The curves of a run's log and of its held-out loss."""

    found, steps = [], log["step"]
    if len(steps):
        curves = {"each step": (steps, log["loss"]), "smoothed": (steps, log["smooth"])}
        seen = np.concatenate([np.percentile(log["loss"], (1, 99)), log["smooth"]])
        found.append(chart("Training loss", "", curves, seen))
    if told := metrics.get("rows"):
        at, bands = [*map(int, told)], np.array([*told.values()], float)  # (N, 1 + 5, 2)
        if not config["start_from"]:  # else step 0 is not the bare model
            at, bands = [0, *at], np.concatenate([0 * bands[:1], bands])
        mean, error, best = *bands[:, 0].T, metrics["best"]
        how = {"level": 0, "mark": (best, mean[at.index(best)])}
        how |= {"band": (mean - error, mean + error)}
        note, title = f"lowest at step {best}", "Held-out loss less the bare model's"
        found.append(chart(title, note, {"now": (at, mean)}, **how))
        each = {name: (at, bands[:, 1 + i, 0]) for i, name in enumerate(BANDS)}
        found.append(chart("The same by timestep", "", each, level=0))
    for title, name, note, highest in (
        ("Gradient norm", "grad_norm", f"cut where above {config['max_grad_norm']:g}", 99),
        ("Learning rate", "lr", "", 100),
        ("Loss scale", "loss_scale", "", 100),
        ("Seconds a step", "seconds", "", 99),  # the slowest hundredth is cut
    ):
        there = ~np.isnan(log[name])  # the norm is not where it overflowed
        values = log[name][there]
        if len(values) and not (name == "loss_scale" and (values == 1).all()):  # 1: it has none
            seen = np.percentile(values, (0, highest))
            found.append(chart(title, note, {"now": (steps[there], values)}, seen))
    return found


# ---- the page ------------------------------------------------------------------------------------


def differing(config: dict, usual: dict) -> tuple[list[tuple], str]:
    """(option with its value, the recipe's value) where these differ, and the command that repeats
    the run, in a folder beside its own.
    """
    recipe, epochs = config["recipe"], config["max_train_epochs"]
    # Epochs come to steps anew; the base is to be at the commit that it was at then.
    left = {"recipe", "config", "output_dir", "max_train_steps" * bool(epochs)}
    config = config | {"revision": config["revision"] or config["base_commit"]}
    rows, words = [], ["python", "loop.py", recipe]
    for name in (each for each in usual if each in config and each not in left):
        values = usual[name], config[name]
        was, now = ([*each] if isinstance(each, list | tuple) else [each] for each in values)
        if was != now:
            told = [*map(str, now)] if now not in ([True], [False]) else []
            option = [f"--{'no-' * (now == [False])}{name.replace('_', '-')}", *told]
            option = ["=".join(option)] if told and told[0][:1] == "-" else option
            words += option
            rows.append((shlex.join(option), shlex.join(map(str, was))))
    folder = (config["output_dir"] or f"runs/{recipe}").rstrip("/")
    return rows, shlex.join([*words, "--output-dir", f"{folder}-again"])


def facts(log: dict, metrics: dict, took: dict, card: dict, config: dict, done: bool) -> list:
    """(name, value, note) of what one wants to know first. done: whether the run has ended."""
    last, steps = int(max(log["step"], default=0)), config["max_train_steps"]
    each = sum(v for k, v in took.items() if k not in ("start", "encoding")) / max(1, last)
    left = f"about {clock((steps - last) * each)} left" if 0 < last < steps else ""
    left = "ended, since it got worse" * (last < steps) if done else left
    found = [("Steps", f"{last:,} of {steps:,}", left)]
    if last:
        found.append(("Training loss", f"{log['smooth'][-1]:.4f}", "smoothed over some 50 steps"))
    if best := metrics.get("best"):
        (change, error), bare = metrics["rows"][str(best)][0], metrics.get("losses", {}).get("0")
        note = f"± {error:.4f}, against the bare model" + (f"'s {bare:.4f}" if bare else "")
        found.append((f"Lowest held-out loss, step {best}", f"{change:+.4f}", note))
    if last:
        usual = f"{np.median(log['seconds']):.2f} s a step"
        found.append(("Time up to the last save", clock(sum(took.values())), usual))
    if peak := max(log["gib"], default=0):
        note = "at its peak" + (f", of {card['gib']:.1f} on {card['card']}" if card else "")
        found.append(("Memory", f"{peak:.1f} GiB", note))
    return found


def shares(numbers: dict[str, float], said) -> list[tuple]:
    """(name, share of the largest, its words)"""
    most = max(numbers.values(), default=1) or 1
    return [(name, number / most, said(number)) for name, number in numbers.items() if number]


def contents(out: Path) -> dict:
    """All that the template shows. Raises Refusal where there is no run."""
    troubles: dict[str, str] = {}
    names = ("config.json", "metrics.json", "finished.json")
    config, metrics, ended = (read(out / name, troubles) for name in names)
    if config.get("recipe") not in options.RECIPES:
        found, remedy = f"{out} has no config.json of a run", "make report RUN=runs/t4, say"
        raise Refusal("; ".join([found, *troubles.values()]), "the folder of a run", remedy)
    usual = asdict(options.usual(config["recipe"], config.get("quick", False), better=False))
    config = dict.fromkeys(("commit", "base_commit", "code_changes"), "") | usual | config
    rows, events = (read_lines(out / name, troubles) for name in (LOG, EVENTS))
    kinds = ("step", "loss", "lr", "grad_norm", "loss_scale", "seconds", "gib")
    log = {kind: np.array([row.get(kind) for row in rows], float) for kind in kinds}  # None: NaN
    log["smooth"] = np.array([*map(EMA(0.02), log["loss"])])  # as the run's bar has it
    last = max((each["step"] for each in (*rows, *events)), default=0)
    previews = previews_of(out, last, troubles)
    pairs = pairs_of(out, previews, troubles)
    wanted = [key for row in previews.values() for key in row.values()]
    pictures = inlined([*wanted, *(p[i] for p in pairs for i in (2, 4))], troubles)
    took = dict.fromkeys(("start", "encoding", "steps", "held-out loss", "previews", "saving"), 0)
    took["steps"], card, said = log["seconds"].sum(), {}, []
    for each in events:
        card = each if "card" in each else card
        said += [each["said"]] if "said" in each else []
        if "phase" in each:
            took[each["phase"]] = took.get(each["phase"], 0) + each["seconds"]
    skipped = rows[-1]["skipped"] if rows else 0
    said += [f"steps skipped, since a gradient overflowed in fp16: {skipped}"] * bool(skipped)
    sizes, fits = [{}, *metrics.get("sizes", {}).values()][-1], metrics.get("fits", {})
    bars = {
        "Time": shares(took, lambda s: clock(s) if s > 60 else f"{s:.1f} s"),
        "Adapter beside the weights it corrects": shares(sizes, "{:.1%}".format),
        "Fit worst: loss over what is usual": shares(fits, "{:.2f}".format),
    }
    differs, command = differing(config, usual)
    about = {"commit": config["commit"], "the base's commit": config["base_commit"]}
    about |= {"code changed in between": config["code_changes"]} | config.get("versions", {})
    steps = config["max_train_steps"]
    whole = last >= steps or ended.get("stopped_when_worse")
    done = bool(whole and ended.get("steps") == last)
    return {
        "name": out.resolve().name,
        "recipe": config["recipe"],
        "done": done,
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "share": last / steps,
        "facts": facts(log, metrics, took, card, config, done),
        "pairs": pairs,
        "previews": previews,
        "prompts": [*dict.fromkeys(key for row in previews.values() for key in row)],
        "pictures": pictures,
        "charts": charts(log, metrics, config),
        "bars": {title: rows for title, rows in bars.items() if rows},
        "said": [*dict.fromkeys([*troubles.values(), *said])],
        "differs": differs,
        "command": command,
        "about": {name: value for name, value in about.items() if value},
    }


@functools.cache
def template():
    how = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    # Captions, names and paths come from anywhere; what is our own is marked safe there.
    how |= {"finalize": lambda each: sayable(each) if type(each) is str else each}
    page = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), **how)
    page.filters["sha256"] = lambda text: b64encode(sha256(text.encode()).digest()).decode()
    return page.get_template("page.html")


def write(out: Path) -> Path:
    """Make the page of the run in `out`. Raises Refusal where that cannot be."""
    write_whole(out / NAME, template().render(contents(out)).encode(errors="replace"))
    return out / NAME


def main(argv: list[str]) -> None:
    """The command: of the run in the folder that is named, else of the newest. Raises Refusal."""
    runs = sorted(Path("runs").glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    out = place(argv[0]) if argv else [Path("runs"), *(path.parent for path in runs)][-1]
    expected, remedy = "a run's files as it left them", "put back what was edited there"
    with refusing(f"of {out} no page can be made", expected, remedy):
        print(write(out))


if __name__ == "__main__":
    options.or_leave(main, sys.argv[1:])
