"""The pages for people, held to the code: docs/*.md and README.md."""

import ast
import json
import re
import runpy
from dataclasses import fields

import pytest

from adapters.__main__ import Options as Tools
from conftest import ROOT
from inputs import drawing, options

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Options that pages name and that are not ours, by the command that has them.
OTHERS = {
    "torchrun": {"--nproc-per-node", "--max-restarts", "--nnodes", "--rdzv-backend"}
    | {"--rdzv-endpoint", "--local-addr"},
    "pip": {"--index-url"},
    "sd-scripts": {"--network_weights"},
    "sd-scripts' files of prompts": {"--n", "--d", "--w", "--h", "--s", "--l"},
    # benchmarks, pocket.build
    "python -m": {"--help", "--steps", "--cap-gib", "--smoke", "--variants", "--stages", "--at"},
}
CODE = re.compile(r"```.*?```|`[^`]+`", re.DOTALL)


def words(page) -> str:
    """All that a page has in code marks: what may be typed."""
    return "\n".join(CODE.findall(page.read_text()))


def parser_knows() -> set[str]:
    known = set()
    for cls in (options.Config, drawing.Options, Tools):
        for field in fields(cls):
            name = field.name.replace("_", "-")
            known |= {f"--{name}", f"--no-{name}"} if field.type is bool else {f"--{name}"}
    return known


def test_the_page_of_options_is_what_the_options_say():
    page = runpy.run_path(str(ROOT / "docs" / "make_options.py"))
    told = page["PAGE"].read_text()
    assert told == page["page"](), "python docs/make_options.py writes it anew"
    for field in (*fields(options.Config)[1:], *fields(drawing.Options), *fields(Tools)):
        name = field.name.replace("_", "-")
        assert f"**`--{name}`**" in told or f"**`{name.upper()}`**" in told, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_local_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    lost = {each for each in links if "://" not in each and not (page.parent / each).exists()}
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", words(page)))
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_exists(page):
    named = set(re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9_-]*", page.read_text()))
    assert named <= parser_knows() | set.union(*OTHERS.values())


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_lines_fit_a_window_but_in_tables(page):
    lines = page.read_text().splitlines()
    assert not [line for line in lines if len(line) > 110 and not line.startswith("|")]


def sentences() -> str:
    """All that the commands can say: the texts in their code, without what they fill in."""
    rooms = ("*.py", "inputs/*.py", "adapters/*.py", "fast/*.py", "keep/*.py", ".ci/*.py")
    nodes = (ast.walk(ast.parse(p.read_text())) for room in rooms for p in ROOT.glob(room))
    texts = (n.value for each in nodes for n in each if isinstance(n, ast.Constant))
    return "\n".join(text for text in texts if isinstance(text, str))


def test_every_sentence_quoted_is_one_that_the_commands_say():
    """Lines that begin with >, with … for what changes."""
    said, quoted = sentences(), []
    for page in PAGES[1:]:
        quoted += re.findall(r"^> (.+)$", page.read_text(), flags=re.MULTILINE)
    assert len(quoted) > 20
    pieces = [piece.strip() for each in quoted for piece in each.split("…")]
    assert not [piece for piece in pieces if piece not in said]


@pytest.mark.parametrize(
    ("page", "row", "measures"),
    [
        (
            ROOT / "docs" / "pocket.md",
            r"^\| ([\d,]+) \| (?:50/150/450/1,350|the same) \| (.+) \| (.+) \| (.+) \|$",
            ("heldout palette_distance", "heldout pixel_l1", "trained pixel_l1"),
        ),
        (
            ROOT / "README.md",
            r"^\| ([\d,]+) \| [\d,]+ \| (.+) · (.+) \|$",
            ("heldout palette_distance", "heldout pixel_l1"),
        ),
    ],
    ids=["pocket.md", "README.md"],
)
def test_the_advice_by_number_of_pictures_is_what_was_measured(page, row, measures):
    """Means of three seeds after 50, 150, 450 and 1,350 steps at the recipe's rate and rank."""
    file = json.loads((ROOT / "benchmarks" / "results" / "advice.json").read_text())
    usual = {"learning_rate": 4e-3, "lora_rank": 16}.items()
    means = [m for m in file["mean, lowest and highest over the seeds"] if m.items() >= usual]
    means = {(m["pictures"], m["max_train_steps"]): m for m in means}
    expected = []
    for count in (20, 100, 1000):
        four = [means[count, steps] for steps in (50, 150, 450, 1350)]
        cells = [[f"{m[k][0]:.{2 if 'palette' in k else 0}f}" for m in four] for k in measures]
        expected.append((f"{count:,}", *map("/".join, cells)))
    text = page.read_text().replace(" / ", "/")
    assert re.findall(row, text, flags=re.MULTILINE) == expected
