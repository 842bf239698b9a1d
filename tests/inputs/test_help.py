"""--help: every option once, in its group, with the recipe's own values, at once."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields

import pytest

from conftest import ROOT
from inputs import drawing, help, options


def told(capsys, parse, *words: str) -> str:
    with pytest.raises(SystemExit) as left:
        parse([*words, "--help"])
    assert not left.value.code
    return capsys.readouterr().out


def listed(page: str) -> list[str]:
    """The options that a page of --help explains, in order."""
    return re.findall(r"^  (--[\w-]+|ADAPTER|MORE) ·", page, flags=re.MULTILINE)


def names(cls: type) -> set[str]:
    return {f"--{field.name.replace('_', '-')}" for field in fields(cls)}


def test_every_option_of_a_run_is_in_one_group_with_a_reason():
    """One without a comment, or above the first group, would be in no page."""
    found = help.groups(options.Config)
    assert list(found) == [
        *(
            "What most people change",
            "Model",
            "Pictures and captions",
            "Adapter",
            "Steps",
            "Learning",
            "Learning otherwise, all off",
        ),
        *("Knowing when it is enough", "Memory and speed", "Saving", "Drawing"),
    ]
    told = [field.name for group in found.values() for field in group]
    assert sorted(["recipe", *told]) == sorted(field.name for field in fields(options.Config))
    assert all(reason for group in found.values() for reason in group.values())
    assert len(found["What most people change"]) == 10


@dataclass(frozen=True)
class Astray:
    """Options of which two are lost."""

    # Above the groups.
    first: int = 0

    # ---- Model

    # In a group.
    second: int = 0
    third: int = 0


def test_an_option_in_no_group_is_found_as_such():
    found = {group: [f.name for f in each] for group, each in help.groups(Astray).items()}
    assert found == {"": ["first"], "Model": ["second"]}


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("recipe", [*options.RECIPES, "drawing"])
def test_help_lists_every_option_with_its_value_and_fits(capsys, monkeypatch, columns, recipe):
    monkeypatch.setenv("COLUMNS", str(columns))
    if recipe == "drawing":
        page, cls = told(capsys, drawing.parse), drawing.Options
        expected = names(cls) - {"--adapter", "--more"} | {"ADAPTER", "MORE"}
    else:
        page, cls = told(capsys, options.parse, recipe), options.Config
        expected = names(cls) - {"--recipe"}
        rate = options.RECIPES[recipe][1].learning_rate
        assert f"  --learning-rate · default {rate}\n" in page
        assert options.RECIPES[recipe][0].split(":")[0] in page
    assert sorted(listed(page)) == sorted(expected)
    assert max(map(len, page.splitlines())) <= min(columns, 100)
    assert "`" not in page and "\x1b" not in page


def test_help_shows_the_values_of_quick_and_of_a_file(capsys, tmp_path):
    assert "--max-train-steps · default 80\n" in told(capsys, options.parse, "pocket", "--quick")
    (tmp_path / "a.toml").write_text('recipe = "native"')
    page = told(capsys, options.parse, "--config", str(tmp_path / "a.toml"))
    assert options.RECIPES["native"][0] in page and "default 1024\n" in page


def test_help_without_a_recipe_lists_the_recipes_and_what_most_people_change(capsys):
    page = told(capsys, options.parse)
    first, *_ = help.groups(options.Config).values()
    assert re.findall(r"^  --([\w-]+)$", page, flags=re.MULTILINE) == [
        field.name.replace("_", "-") for field in first
    ]
    for name, (sentence, _) in options.RECIPES.items():
        assert f"  {name:9} {sentence}\n" in page
    assert "default" not in page and "python loop.py RECIPE --help" in page


@pytest.mark.parametrize("module", ["options", "drawing"])
def test_help_comes_before_anything_heavy_is_imported(module):
    words = ["t4", "--help"] if module == "options" else ["--help"]
    code = (
        f"import sys\nfrom inputs import {module}\ntry:\n    {module}.parse(sys.argv[1:])\n"
        "finally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONUTF8": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: ")
