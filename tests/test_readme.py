"""What the README shows is the code's, and what it counts is counted."""

import json
import re

from conftest import ROOT
from test_house import BOOK, WINGS, code_lines, files

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"
SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in BOOK}


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 150 and len(README.split()) <= 1300
    assert [line for line in lines if len(line) >= 110] == []


def test_it_tells_the_true_size_of_every_module_of_the_book_and_of_every_wing():
    rows = re.findall(r"^(\w+(?:\.py|/)) +([\d,]+)  ", README, flags=re.MULTILINE)
    book = {f"{name}.py": code_lines(ROOT / f"{name}.py") for name in BOOK}
    wings = {f"{wing}/": sum(map(code_lines, files(wing))) for wing in WINGS}
    assert {name: number(count) for name, count in rows} == book | wings
    told = re.search(r"five\s+files, ([\d,]+) lines", README), re.search(r"nother ([\d,]+)", README)
    assert [number(each[1]) for each in told] == [sum(book.values()), sum(wings.values())]


def test_the_step_is_shown_as_it_stands():
    (shown,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    code = re.search(r"^def optimizer_step.*?\n(?=\n\n)", SOURCES["loop"], re.MULTILINE | re.DOTALL)
    assert shown == re.sub(r'    """.*?"""\n', "", code[0], count=1, flags=re.DOTALL)


def test_every_line_of_mathematics_stands_in_the_book():
    table = README.partition("| mathematics | code |")[2].partition("\n\n")[0]
    shown = re.findall(r"\| `(.*)` \|", table)
    assert len(shown) == 10
    lines = {line.strip() for source in SOURCES.values() for line in source.splitlines()}
    assert [line for line in shown if not any(line in each for each in lines)] == []


def test_the_peers_rows_are_those_of_the_file():
    rows = json.loads((RESULTS / "peers.json").read_text())["peers"]
    for name, tag in (("diffusers", "d"), ("kohya", "k"), ("OneTrainer", "o")):
        (told,) = re.findall(rf"^\| {name}[^|]*\|([^|]*)\|([^|]*)\|$", README, flags=re.MULTILINE)
        for side, text in zip((512, 1024), told, strict=True):
            row = rows[f"{tag}_4x1_{side}"]
            assert text.strip() == f"{row['med_s']:.3f} · {row['steady_alloc']:.1f}"
    ours = json.loads((RESULTS / "peers.json").read_text())["ours"]
    (told,) = re.findall(r"^\| ours \|([^|]*)\|([^|]*)\|$", README, flags=re.MULTILINE)
    for side, text in zip((512, 1024), told, strict=True):
        row = ours[f"ours_4x1_{side}"]
        said = f"{row['s_per_step']:.3f} · {row['gib_allocated']:.1f}"
        assert text.strip().replace("*", "") == said
