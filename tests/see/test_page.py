"""The run's page: what it holds, what it survives, and how it behaves in a browser."""

import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from generate import png_bytes
from inputs import drawing, options
from made import noisy
from see import page, sheet
from sentences import refused

CONFIG = replace(options.RECIPES["pocket"][1], max_train_steps=80, checkpointing_steps=20)
HOSTILE = """</td></script><script>window.hurt = 1</script><img src=x onerror="window.hurt = 1">"""
HOSTILE += """"'><svg onload=window.hurt=1> {{ 7 * 7 }} {% raw %} </style> \u202e \x00 &amp;"""


def a_picture(step: int, number: int, side: int = 64) -> Image.Image:
    """Of a colour that says step and number, and not all of one colour."""
    image = Image.new("RGB", (side, side), (min(255, 2 * step), 60 * number % 256, 128))
    image.paste("white", (0, 0, side // 2, side // 2))
    return image


def made(
    out: Path, prompts=("a fox", "a house"), steps=(0, 20, 40, 60, 80), side=64, **more
) -> Path:
    """The folder of a finished run with all that one can leave. more: its options."""
    config = replace(CONFIG, output_dir=str(out), **more)
    told = asdict(config) | {"commit": "c0ffee", "base_commit": "", "code_changes": ""}
    told |= {"versions": {"torch": "2.15.0"}}
    (out / "pictures").mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(told))
    row = {"lr": 1e-3, "grad_norm": 0.2, "loss_scale": 65536.0, "skipped": 1}
    row |= {"seconds": 0.5, "gib": 9.8}
    log = [{"step": s, "loss": 1 / s} | row for s in range(1, 81)]
    log[3]["grad_norm"] = None  # as where it overflowed
    (out / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    events = [{"step": 0, "said": "captions: 0 missing or empty, 2 cut at the tokenizer's length"}]
    events += [{"step": 0, "phase": "encoding", "seconds": 75.0}]
    events += [{"step": 40, "phase": "previews", "seconds": 3.0}, {"step": 40, "said": HOSTILE}]
    events += [{"step": 0, "card": "Tesla T4", "gib": 14.6}]
    (out / "events.jsonl").write_text("\n".join(map(json.dumps, events)))
    rows = {s: [[-0.05 - s / 1e4, 0.01], *[[-0.01 * i, 0.1] for i in range(5)]] for s in (40, 80)}
    sizes = {"0": {"mid_block": 0.0}, "80": {"mid_block": 0.12, "up_blocks.0": 0.24}}
    metrics = {"rows": rows, "best": 40, "losses": {"0": 0.1}, "sizes": sizes}
    metrics |= {"fits": {HOSTILE: 2.5, "odd.png": 1.5}}
    (out / "metrics.json").write_text(json.dumps(metrics))
    (out / "finished.json").write_text(json.dumps({"steps": 80, "stopped_when_worse": False}))
    for i, prompt in enumerate(prompts):
        for step in steps:
            path = out / "pictures" / f"{step:06d}-{drawing.stem(i, prompt, 42)}.png"
            path.write_bytes(png_bytes(a_picture(step, i, side), f"{prompt}\nSteps: 2, Seed: 42"))
    return out


class Parts(HTMLParser):
    """What a browser makes of a page: its tags, their attributes, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def parts(out: Path) -> Parts:
    return Parts(page.write(out).read_text())


# ---- what it holds -------------------------------------------------------------------------------


def test_it_holds_all_that_a_run_has_left(tmp_path):
    text = " ".join(parts(made(tmp_path / "a run")).text.split())
    for told in (
        "Finished · recipe pocket",
        "80 of 80",
        "-0.0540± 0.0100, against the bare model's 0.1000",
        "lowest at step 40",
        "9.8 GiBat its peak, of 14.6 on Tesla T4",
        "encoding1:15",
        "previews3.0 s",
        "2 cut at the tokenizer's length",
        "steps skipped, since a gradient overflowed in fp16: 1",
        "up_blocks.024.0%",
        "odd.png1.50",
        "--checkpointing-steps 20200",
        "torch2.15.0",
        "commitc0ffee",
    ):
        assert told in text, told
    titles = "Training loss|Held-out loss less the bare model's|The same by timestep|Gradient norm|"
    titles += "Learning rate|Loss scale|Seconds a step"
    assert all(title in text for title in titles.split("|"))


def test_a_run_that_goes_on_says_how_far_it_is(tmp_path):
    out = made(tmp_path / "r", max_train_steps=160)
    text = parts(out).text
    assert (
        "Not finished · recipe pocket" in text and "80 of 160" in text and "about 0:43 left" in text
    )
    for name in ("log.jsonl", "events.jsonl", "metrics.json", "finished.json"):
        (out / name).unlink()
    text = parts(out).text  # before its first step
    assert "0 of 160" in text and "Curves" not in text


@pytest.mark.parametrize(
    "words",
    [
        ["pocket", "--lora-rank", "4", "--validation-prompts", "it's <b>", "--no-tensorboard"],
        ["pocket", "--quick", "--random-flip", "--validation-prompts", "--caption", ""],
        ["t4", "--max-train-epochs", "3", "--dataset-name", "a b", "c", "--vae=-v"],
        ["t4", "--resolution", "512", "768", "--config", ""],
        ["lowmem", "--max-grad-norm", "inf", "--trigger=-x", "--snr-gamma", "5"],
        ["native"],
    ],
)
def test_the_command_makes_the_same_run_in_another_folder(tmp_path, words):
    config = options.parse([*words, "--output-dir", str(tmp_path / "r")])
    told = json.loads(json.dumps(asdict(config))) | {"base_commit": "", "max_train_steps": 7}
    if not config.max_train_epochs:
        told["max_train_steps"] = config.max_train_steps
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.json").write_text(json.dumps(told))
    again = options.parse(shlex.split(page.contents(tmp_path / "r")["command"])[2:])
    assert again == replace(config, output_dir=f"{tmp_path / 'r'}-again")


def test_a_base_of_the_hub_is_repeated_at_its_commit(tmp_path):
    out = made(tmp_path / "r")
    told = json.loads((out / "config.json").read_text()) | {"base_commit": "abc123"}
    (out / "config.json").write_text(json.dumps(told))
    assert "--revision abc123" in page.contents(out)["command"]


def test_before_and_after_are_cut_out_of_the_sheet_at_the_end(tmp_path):
    """Until there is one, they are the first previews and the newest."""
    out, troubles = made(tmp_path / "r"), {}
    previews = page.previews_of(out, 80, troubles)
    assert [pair[:2] + pair[3:4] for pair in page.pairs_of(out, previews, troubles)] == [
        ("a fox", "step 0", "step 80"),
        ("a house", "step 0", "step 80"),
    ]
    titles = ['"quoted", Seed: 1', "b" * 90, HOSTILE]
    rows = {
        name: [a_picture(10 * i, i) for i in at]
        for name, at in (("x", (0, 1, 2)), ("y", (3, 4, 5)))
    }
    drawn = sheet.grid(rows, titles)
    boxes = [*drawn.info["boxes"].values()]
    told = json.dumps([*zip(titles, *boxes, strict=True)], ensure_ascii=False)
    about = "\n".join([*titles, f"Steps: 2, Pairs: {json.dumps(told)}, Size: 64x64"])
    (out / "pictures" / "before-after.png").write_bytes(png_bytes(drawn, about))
    pairs = page.pairs_of(out, previews, troubles)
    assert [pair[0] for pair in pairs] == titles and not troubles
    for i, (_, _, before, _, after) in enumerate(pairs):
        for (path, _, box), row in ((before, "x"), (after, "y")):
            assert np.array_equal(np.asarray(Image.open(path).crop(box)), np.asarray(rows[row][i]))


def test_of_many_steps_some_are_shown_and_both_ends_among_them(tmp_path):
    out = made(tmp_path / "r", prompts=("a fox",), steps=(*range(0, 81, 2), 90))
    shown = [*page.previews_of(out, 80, {})]
    assert len(shown) == page.SHOWN and (shown[0], shown[-1]) == (0, 80)  # 90 is an earlier run's
    assert np.diff(shown).max() <= 8


@pytest.mark.parametrize("count", [1, 2, 1000, 100_000])
def test_a_curve_stays_in_its_box_and_small(count):
    values = np.random.default_rng(0).lognormal(0, 3, count)
    drawn = page.chart("a", "", {"now": (np.arange(1, count + 1), values)}, level=2.0)
    x, y = np.array(re.findall(r"([\d.]+) ([\d.]+)", drawn["paths"].popitem()[1]), float).T
    assert (
        len(x) <= page.POINTS and 50 <= x.min() <= x.max() <= 350 and 8 <= y.min() <= y.max() <= 170
    )
    assert 50 <= drawn["across"][0][0] and drawn["across"][-1][0] <= 350
    assert all(8 <= at <= 170 for at, _ in drawn["up"]) and 1 <= len(drawn["up"]) <= 6


@pytest.mark.parametrize("value", [0.0, -1.0, 65536.0, 1e-9])
def test_a_constant_is_a_line_with_a_number_beside_it(value):
    drawn = page.chart("a", "", {"now": (np.array([1, 2]), np.array([value, value]))})
    (name, path), *_ = drawn["paths"].items()
    assert name == f"now {page.figure(value)}" and len(drawn["up"]) >= 2
    assert {float(y) for y in re.findall(r" ([\d.]+)", path)} == {89.0}  # half-way up


def test_a_gradient_that_overflowed_leaves_no_gap_and_no_curve_of_nothing(tmp_path):
    out = made(tmp_path / "r")
    lines = (out / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"grad_norm": None} for line in lines]
    titles = [each["title"] for each in page.contents(out)["charts"]]
    (out / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    titles.remove("Gradient norm")
    assert titles == [each["title"] for each in page.contents(out)["charts"]]


# ---- what it survives ----------------------------------------------------------------------------


def test_no_prompt_caption_or_name_makes_a_tag(tmp_path):
    whole = parts(made(tmp_path / "r", trigger="word")).tags
    (tmp_path / "h").mkdir()
    out = made(tmp_path / "h" / "<b>&'r", prompts=(HOSTILE, HOSTILE[::-1]), trigger=HOSTILE)
    found = parts(out)
    assert found.tags == whole  # as many, in the same order, as with words
    assert found.tags.count("script") == 1
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    links = [value for name, value in found.attributes if name in ("src", "href")]
    assert links and all(re.fullmatch(r"data:image/webp;base64,[\w+/=]+", link) for link in links)
    assert found.text.count("{{ 7 * 7 }}") >= 4 and "\u202e" not in found.text + str(
        found.attributes
    )
    said = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-"
    assert any(value.startswith(said) for _, value in found.attributes if value)


def test_what_cannot_be_read_is_told_and_the_rest_is_there(tmp_path):
    out = made(tmp_path / "r")
    with open(out / "log.jsonl", "a") as log:
        log.write('\n{"step": 81, "lo')
    (out / "events.jsonl").write_text("[]\n5\n\xff\n")
    (out / "metrics.json").write_text("{")
    cut, empty = sorted((out / "pictures").glob("000020*"))
    cut.write_bytes(cut.read_bytes()[:-40])
    empty.write_bytes(b"")
    found = parts(out)
    text = " ".join(found.text.split())
    for name in ("log.jsonl", "events.jsonl", "metrics.json", cut.name, empty.name):
        assert f"{name} cannot be read" in text, name
    assert "80 of 80" in text and "Training loss" in text
    assert found.tags.count("img") == 2 * 5 - 2 + 4 + 2  # previews, pairs, the large one


def test_a_folder_without_a_run_is_refused(tmp_path, capsys, monkeypatch):
    said = "has no config.json of a run; expected the folder of a run"
    refused(lambda: page.main([str(tmp_path)]), said)
    (tmp_path / "config.json").write_text('{"recipe":')
    refused(lambda: page.main([str(tmp_path)]), "config.json cannot be read")
    (tmp_path / "config.json").write_text('{"recipe": "t4", "max_train_steps": 0}')
    refused(lambda: page.main([str(tmp_path)]), "no page can be made (ZeroDivisionError")
    monkeypatch.chdir(tmp_path)
    refused(lambda: page.main([]), "runs has no config.json of a run")
    assert page.NAME not in os.listdir()
    for i, name in enumerate(("new", "old")):
        os.utime(made(tmp_path / "runs" / name) / "config.json", (1e9 - i, 1e9 - i))
    page.main([])
    assert capsys.readouterr().out == "runs/new/report.html\n"


def test_the_template_is_short():
    text = (ROOT / "see" / "page.html").read_text()
    script = text.partition("{% set script %}")[2].partition("{% endset %}")[0]
    assert len(text.splitlines()) <= 150 and len(script.splitlines()) <= 60
    assert "http" not in text.replace("http-equiv", "")  # nothing comes from elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_ten_prompts_at_ten_steps_of_512_px_are_under_5_mb(tmp_path, monkeypatch, kind):
    """Noise is the worst there is; smooth is as a photograph is."""

    def pixels(step: int, number: int, side: int) -> Image.Image:
        return noisy(side, side, 100 * step + number) if kind == "noise" else blurred(side, step)

    def blurred(side: int, seed: int) -> Image.Image:
        return noisy(48, 48, seed).resize((side, side), Image.BICUBIC)

    monkeypatch.setattr(sys.modules[__name__], "a_picture", pixels)
    out = made(tmp_path / "r", tuple(f"prompt {i}" for i in range(10)), range(0, 80, 8), 512)
    path = page.write(out)
    assert 1e6 < path.stat().st_size < 5e6
    assert path.read_text().count("data:image/webp") == 10 * 10 + 2 * 10


# ---- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium that is here: $CHROME, or one on the PATH."""
    playwright = pytest.importorskip("playwright.sync_api")
    names = (os.environ.get("CHROME") or "chromium chromium-browser google-chrome").split()
    found = [path for path in map(shutil.which, names) if path]
    if not found:
        pytest.skip(f"no Chromium: $CHROME, or the PATH, has no {' or '.join(names)}")
    as_root = ["--no-sandbox"] * (os.geteuid() == 0)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found[0], args=as_root)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """A page with all that there can be, and with hostile prompts, captions and names."""
    out = made(tmp_path_factory.mktemp("run") / "r", ("a fox", HOSTILE, "a house"), trigger=HOSTILE)
    next((out / "pictures").glob("000040-00-*")).unlink()  # a preview that was not drawn
    cut = next((out / "pictures").glob("000060-02-*"))
    cut.write_bytes(cut.read_bytes()[:-40])
    return page.write(out).as_uri()


@pytest.fixture
def opened(chromium, address):
    """opened(width, **how): the page in a window; what its console and network say is asserted to
    be nothing when the test ends.
    """
    told, windows = [], []

    def opened(width: int = 1440, **how):
        window = chromium.new_page(viewport={"width": width, "height": 900}, **how)
        window.on("console", lambda message: told.append(message.text))
        window.on("pageerror", lambda error: told.append(str(error)))
        window.on("request", lambda asked: told.append(asked.url) if asked.url[:4] == "http" else 0)
        window.goto(address)
        windows.append(window)
        return window

    yield opened
    for window in windows:
        assert window.evaluate("window.hurt") is None
        window.close()
    assert told == []


CONTRAST = """(scheme) => {
  const light = (text) => { const [r, g, b] = text.match(/[\\d.]+/g).map((v) => (v / 255) ** 2.2);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05; };
  const under = (e) => { const c = getComputedStyle(e).backgroundColor;
    return c.endsWith(", 0)") ? under(e.parentElement) : c; };
  return [...document.querySelectorAll("h1, h2, h3, small, b, td, th, figcaption, li, code, p")]
    .filter((e) => e.innerText).map((e) => {
      const [a, b] = [light(getComputedStyle(e).color), light(under(e))];
      return Math.max(a, b) / Math.min(a, b); });
}"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1440])
def test_it_fits_its_window_and_can_be_read(opened, width, scheme):
    """By WCAG's contrast of 4.5, in both schemes."""
    window = opened(width, color_scheme=scheme)
    wide = (
        "[...document.querySelectorAll('body *')].filter((e) => !e.closest('.previews > div') && "
    )
    wide += "e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 99))"
    assert window.evaluate(wide) == []
    assert window.evaluate("document.documentElement.scrollWidth") == width
    contrasts = window.evaluate(CONTRAST)
    assert len(contrasts) > 50 and min(contrasts) > 4.5
    dark = window.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 18, 17)"
    assert dark == (scheme == "dark")
    lost = "[...document.images].filter((e) => !e.complete || !e.naturalWidth || !e.alt).length"
    assert window.evaluate(lost) == 0


CUT = "getComputedStyle(document.querySelector('.pair .after')).clipPath"


@pytest.mark.browser
def test_the_slider_moves_by_keys_and_by_the_pointer(opened):
    window = opened()
    slider = window.locator(".pair input").first
    assert window.evaluate(CUT) == "inset(0px 0px 0px 50%)"
    slider.focus()
    window.keyboard.press("ArrowRight")
    assert window.evaluate(CUT) == "inset(0px 0px 0px 51%)"
    window.keyboard.press("End")
    assert window.evaluate(CUT) == "inset(0px 0px 0px 100%)"
    box = slider.bounding_box()
    window.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    assert abs(float(re.findall(r"([\d.]+)%", window.evaluate(CUT))[0]) - 25) < 5


@pytest.mark.browser
def test_arrow_keys_go_through_steps_and_prompts_and_stop_at_the_edge(opened):
    window = opened()

    def at() -> str:
        large = "document.querySelectorAll('.large img')[1]"
        same = f"document.activeElement.firstElementChild.src === {large}.src"
        assert window.evaluate(same)  # shown large
        assert window.locator("[aria-pressed=true]").count() == 1
        assert window.locator(".grid [tabindex='0']").count() == 1
        return window.evaluate("document.activeElement.firstElementChild.alt")

    window.locator(".grid [tabindex='0']").focus()
    assert at() == "step 80: a fox"
    window.keyboard.press("ArrowUp")
    assert at() == "step 60: a fox"
    window.keyboard.press("ArrowUp")
    assert at() == "step 20: a fox"  # that of 40 was not drawn
    for _ in range(3):
        window.keyboard.press("ArrowUp")
    assert at() == "step 0: a fox"
    for _ in range(4):
        window.keyboard.press("ArrowRight")
    assert at() == "step 0: a house"
    window.keyboard.press("ArrowDown")
    assert at() == "step 20: a house"
    window.keyboard.press("ArrowLeft")
    assert at().startswith("step 20: </td></script>")
    window.locator(".grid button").last.click()
    assert at() == "step 80: a house"


@pytest.mark.browser
def test_the_keyboard_alone_reaches_everything_and_is_seen(opened):
    window, reached = opened(), []
    seen = """(e) => { const at = e.closest(".both") ?? e, style = getComputedStyle(at);
      return style.outlineStyle === "solid" && parseFloat(style.outlineWidth) >= 2; }"""
    for _ in range(40):
        window.keyboard.press("Tab")
        tag = window.evaluate("document.activeElement.tagName")
        if tag == "BODY":
            break
        focused = window.evaluate_handle("document.activeElement")
        assert window.evaluate(seen, focused), tag
        reached.append(tag)
    # Each pair's slider, one preview, from which arrow keys go on, and the large one's slider.
    assert reached == [*["INPUT"] * 3, "BUTTON", "INPUT"]
    unnamed = "[...document.querySelectorAll('input, svg')].filter((e) => !e.ariaLabel).length"
    assert window.evaluate(unnamed) == 0


BESIDE = """() => [...document.querySelectorAll(".pair:not(.large)")].every((pair) => {
  const [a, b] = [...pair.querySelectorAll("img")].map((e) => e.getBoundingClientRect());
  const style = (name) => getComputedStyle(pair.querySelector(name));
  const whole = style(".after").clipPath === "none" && style("input").display === "none";
  return whole && a.width > 20 && a.right <= b.left; })"""


@pytest.mark.browser
def test_printed_both_pictures_are_whole_and_beside_each_other(opened):
    window = opened(794)
    assert not window.evaluate(BESIDE)
    window.emulate_media(media="print", color_scheme="dark")
    assert window.evaluate(BESIDE)
    assert window.evaluate("getComputedStyle(document.body).color") == "rgb(28, 27, 25)"
    pdf = window.pdf(format="A4")
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 2


@pytest.mark.browser
def test_without_javascript_all_is_there(chromium, address):
    context = chromium.new_context(
        java_script_enabled=False, viewport={"width": 375, "height": 900}
    )
    window = context.new_page()
    window.goto(address)
    boxes = [each.bounding_box() for each in window.locator(".pair:not(.large) img").all()]
    assert len(boxes) == 6
    for a, b in zip(boxes[::2], boxes[1::2], strict=True):
        assert a["x"] + a["width"] <= b["x"] and a["width"] > 50
    assert window.locator(".grid img:visible").count() == 15 - 2
    assert window.locator("input:visible, .large:visible").count() == 0
    context.close()
