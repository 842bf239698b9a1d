"""What the design promises about the code itself: who may import whom, and how long it may be."""

import ast
import io
import json
import re
import tokenize
from pathlib import Path

import pytest

from conftest import ROOT

BOOK = ("lora", "model", "data", "loop", "generate")
WINGS = ("inputs", "adapters", "fast", "learn", "see", "keep")
# Arrows: inputs <- book <- {adapters, fast, learn, see} <- keep. Nothing runs back.
BELOW = {
    "inputs": set(),
    "book": {"inputs"},
    "adapters": {"inputs", "book"},
    "fast": {"inputs", "book"},
    "learn": {"inputs", "book"},
    "see": {"inputs", "book"},
    "keep": {"inputs", "book", "adapters", "fast", "learn", "see"},
}
AMONG_THE_BOOK = {  # in reading order; each may import those before it that it names
    "lora": set(),
    "model": set(),
    "data": {"model"},
    "loop": {"lora", "model", "data"},
    "generate": {"lora", "model"},
}
LINES = {"lora": 129, "model": 198, "data": 305, "loop": 177, "generate": 156}  # of code
BOOK_LINES, WING_LINES = 965, 7702


def files(room: str) -> list[Path]:
    return (
        [ROOT / f"{name}.py" for name in BOOK]
        if room == "book"
        else list((ROOT / room).rglob("*.py"))
    )


def room_of(module: str) -> str | None:
    top = module.split(".")[0]
    return "book" if top in BOOK else top if top in WINGS else None


def imports(path: Path, but_main: bool = False) -> set[str]:
    """Every module that a file imports, wherever in it: under TYPE_CHECKING and in functions, too.

    but_main: leave out what it does when it is the command.
    """
    tree, found = ast.parse(path.read_text()), set()
    body = [each for each in tree.body if not (but_main and is_main(each))]
    for node in (node for each in body for node in ast.walk(each)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def is_main(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)


def code_lines(path: Path) -> int:
    """Lines without blanks, comments and docstrings."""
    source, docs = path.read_text(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(
            node
        ):
            docs |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip | {tokenize.ENDMARKER}:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docs)


def test_the_root_holds_the_book_and_no_other_module():
    assert {path.stem for path in ROOT.glob("*.py")} == set(BOOK)


@pytest.mark.parametrize("room", BELOW)
def test_arrows_run_one_way(room):
    for path in files(room):
        found = {room_of(module) for module in imports(path, but_main=room == "book")} - {
            None,
            room,
        }
        assert found <= BELOW[room], f"{path.relative_to(ROOT)} imports {found - BELOW[room]}"


@pytest.mark.parametrize("name", BOOK)
def test_the_book_is_read_in_one_order(name):
    found = {module.split(".")[0] for module in imports(ROOT / f"{name}.py")} & set(BOOK)
    assert found <= AMONG_THE_BOOK[name]


def test_the_command_of_a_book_module_imports_inputs_and_keeps_command_alone():
    for name in BOOK:
        path = ROOT / f"{name}.py"
        more = imports(path) - imports(path, but_main=True)
        rooms = {module for module in more if room_of(module) not in (None, "inputs")}
        assert rooms <= {"keep.command", "keep.command.train", "keep.command.draw"}


def test_fast_is_imported_in_one_place():
    takers = [p for p in files("keep") if any(room_of(m) == "fast" for m in imports(p))]
    assert [path.name for path in takers] == ["faster.py"]


def test_the_book_does_nothing_when_it_is_imported():
    """Only definitions, constants and, as the command, what stands under __main__."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for name in BOOK:
        for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            assert docstring or typing or is_main(node) or isinstance(node, allowed), (
                name,
                node.lineno,
            )


def test_the_book_and_the_wings_keep_to_their_sizes():
    book = {name: code_lines(ROOT / f"{name}.py") for name in BOOK}
    assert all(count <= LINES[name] for name, count in book.items()), book
    assert sum(book.values()) <= BOOK_LINES, book
    assert sum(code_lines(path) for wing in WINGS for path in files(wing)) <= WING_LINES


@pytest.mark.parametrize("room", [*BELOW, "pocket", "notebooks", "tests/stress"])
def test_functions_fit_a_screen(room):
    lengths = []
    for path in files(room):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lengths.append(node.end_lineno - node.lineno + 1)
                assert lengths[-1] <= 60, (path.name, node.name)
    assert sum(length <= 40 for length in lengths) >= 0.8 * len(lengths)


def test_nothing_at_run_time_needs_accelerate_peft_or_a_trainer():
    for path in (path for room in BELOW for path in files(room)):
        tops = {module.split(".")[0] for module in imports(path)}
        assert not tops & {"accelerate", "peft", "pytorch_lightning", "lightning"}, path
        assert "Trainer" not in path.read_text()


def test_every_option_has_its_reason():
    """The line above each field of Config and Options is the comment that --help shows."""
    for path in (ROOT / "inputs" / "options.py", ROOT / "inputs" / "drawing.py"):
        lines = path.read_text().splitlines()
        fields = [i for i, line in enumerate(lines) if re.match(r"    \w+: .* = ", line)]
        assert len(fields) > 10
        for i in fields:
            if not lines[i].strip().startswith("recipe:"):
                assert lines[i - 1].strip().startswith("# "), lines[i]


def test_the_last_stress_run_was_whole_and_nothing_failed():
    told = json.loads((ROOT / "benchmarks" / "results" / "stress.json").read_text())
    assert told["kills"]["runs"] >= 200 and told["fuzz"]["inputs"] >= 1000 and told["failed"] == 0
