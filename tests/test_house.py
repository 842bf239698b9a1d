"""What the README and the design promise about the code itself."""

import ast
import io
import json
import re
import tokenize

import pytest

from conftest import ROOT

STRESS = json.loads((ROOT / "benchmarks" / "results" / "stress.json").read_text())
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
BUDGET = {  # lines of code: without blanks, comments and docstrings
    "ahead": 50,
    "config": 240,
    "files": 150,
    "hub": 140,
    "sources": 220,
    "model": 295,
    "blocks": 40,
    "data": 320,
    "start": 70,
    "imports": 90,
    "lora": 350,
    "fused": 180,
    "graph": 60,
    "parallel": 285,
    "checkpoint": 250,
    "diagnose": 150,
    "deterministic": 65,
    "nf4": 170,
    "states": 90,
    "vetting": 115,
    "report": 130,
    "generate": 335,
    "loop": 415,
    "bench": 290,
    "memory": 260,
    "plan": 340,
}
MAY_IMPORT = {
    "files": set(),
    "ahead": set(),
    "blocks": {"files"},
    "states": {"files", "lora"},
    "vetting": {"files", "hub"},
    "config": {"files"},
    "lora": {"files"},
    "fused": set(),
    "graph": {"files"},
    "parallel": {"files"},
    "deterministic": {"files"},
    "hub": {"files"},
    "sources": {"files"},
    "model": {"files", "hub", "vetting"},
    "data": {"ahead", "blocks", "files", "model", "parallel", "sources"},
    "diagnose": {"data", "files", "lora"},
    "generate": {"config", "files", "hub", "lora", "model", "nf4", "vetting"},
    "checkpoint": {"config", "diagnose", "files", "hub", "lora", "model", "sources", "states"},
    "start": {"config", "hub", "imports"},
    "imports": {"files"},
    "nf4": {"files", "hub", "model"},
    "report": {"config", "files", "model"},
    "memory": {"config", "fused", "lora", "model", "nf4"},
    "plan": {"config", "files", "hub", "memory", "model", "vetting"},
    "loop": {
        "checkpoint",
        "config",
        "data",
        "diagnose",
        "deterministic",
        "files",
        "fused",
        "generate",
        "graph",
        "hub",
        "lora",
        "model",
        "nf4",
        "parallel",
        "report",
        "sources",
        "vetting",
        "plan",
        "start",
    },
    "bench": {"config", "files", "loop", "model", "plan"},
}


def code_lines(name: str) -> int:
    source = (ROOT / f"{name}.py").read_text()
    docs = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(
            node
        ):
            docs |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    skip = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docs)


def imports(name: str, top_level_only: bool = False) -> set[str]:
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", MODULES)
def test_a_module_keeps_to_its_budget_and_imports_what_the_house_allows(name):
    assert code_lines(name) <= BUDGET[name]
    assert imports(name, top_level_only=True) & set(MODULES) <= MAY_IMPORT[name]


@pytest.mark.parametrize(
    "path",
    [
        *ROOT.glob("*.py"),
        *(ROOT / "pocket").glob("*.py"),
        *(ROOT / "notebooks").glob("*.py"),
        *(ROOT / "stress").glob("*.py"),
    ],
    ids=lambda path: path.stem,
)
def test_functions_fit_a_screen(path):
    lengths = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            lengths.append(node.end_lineno - node.lineno + 1)
            assert lengths[-1] <= 60, node.name
    assert sum(length <= 40 for length in lengths) > 0.8 * len(lengths)


def test_nothing_at_run_time_needs_accelerate_peft_or_a_trainer():
    for name in MODULES:
        assert not imports(name) & {"accelerate", "peft", "pytorch_lightning", "lightning"}
        assert "Trainer" not in (ROOT / f"{name}.py").read_text()


def test_the_readme_table_tells_the_true_size_of_every_module():
    readme = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)\.py` \|.*\| (\d+) \|$", readme, flags=re.MULTILINE))
    assert {name: int(count) for name, count in rows.items()} == {
        name: code_lines(name) for name in MODULES
    }


def test_every_make_target_and_local_link_in_the_readme_exists():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"make ([a-z][a-z-]+)", readme))
    assert named and named <= targets
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", readme) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links)


def test_the_readme_says_what_the_last_stress_run_gave_in_25_lines():
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("## What you can rely on\n")[2].partition("\n## ")[0]
    assert len(section.splitlines()) <= 25
    kills, disk, fuzz = (STRESS[part] for part in ("kills", "disk", "fuzz"))
    assert kills["runs"] >= 200 and fuzz["inputs"] >= 1000 and STRESS["failed"] == 0
    phases = ", ".join(f"{count} {phase}" for phase, count in kills["deaths_by_phase"].items())
    assert f"{kills['runs']} runs were killed {kills['deaths']} times ({phases}; " in section
    assert f"So did {disk['runs']} runs" in section
    assert f"{fuzz['refused']} were refused\n   and {fuzz['accepted']} answered" in section


def test_every_option_has_its_reason():
    """The line above each field of Config and Options is the comment that --help shows."""
    for name, first in (("config", "recipe"), ("generate", "")):
        lines = (ROOT / f"{name}.py").read_text().splitlines()
        fields = [i for i, line in enumerate(lines) if re.match(r"    \w+: .* = ", line)]
        assert len(fields) > 10
        for i in fields:
            if not lines[i].strip().startswith(f"{first}:") or not first:
                assert lines[i - 1].strip().startswith("# "), lines[i]
