"""The code is part of what a run is: its digests, and what is said when they change."""

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT
from inputs import code
from inputs.files import Refusal
from inputs.options import Config
from keep import faster, identity

LOSS = "    each = F.mse_loss(answer, target, reduction="
EDITS = {  # in loop.py, and which functions count as changed
    "comment": (LOSS, f"    # said otherwise\n{LOSS}", []),
    "layout": (
        "(answer, target, reduction=",
        "(\n        answer,\n        target,\n        reduction=",
        [],
    ),
    "docstring": ('"""The loss of each example', '"""What is lost in each example', []),
    "another loss": ("F.mse_loss", "F.l1_loss", ["loop.diffusion_loss"]),
    "another string": ('reduction="none"', 'reduction="mean"', ["loop.diffusion_loss"]),
    "a name gone": ("def micro_step(", "def pass_of(", ["loop.micro_step", "loop.pass_of"]),
    "two": ("run", "one_run", ["loop.micro_step", "loop.optimizer_step", "loop.step_batches"]),
    "around it": ('print(f"saved {path}")', 'print(f"kept {path}")', []),
    "a constant": ("2.0**16", "2.0**15", ["loop.assemble"]),
}


def edit(tree: Path, file: str, old: str, new: str) -> None:
    """Copy what is looked at into `tree`, with that change."""
    for module in code.MODULES:
        path = tree / f"{module.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path.relative_to(tree), path)
    text = (tree / file).read_text()
    assert old in text
    (tree / file).write_text(text.replace(old, new))


@pytest.mark.parametrize("name", EDITS)
def test_only_what_the_code_does_counts(tmp_path, name):
    old, new, want = EDITS[name]
    edit(tmp_path, "loop.py", old, new)
    changed = code.changed(code.digests(), code.digests(root=tmp_path))
    assert set(want) <= set(changed) and (want or not changed)
    assert name == "two" or changed == want


@pytest.mark.parametrize(
    ("old", "new", "want"),
    [
        ("image.size, behind)", 'image.size, "black")', ["inputs.pictures.decode"]),
        ("// 257", "// 256", ["inputs.pictures.from_16_bits"]),
        ('createProfile("sRGB")', 'createProfile("XYZ")', ["inputs.pictures.transform_to_srgb"]),
        ("scale > 1.5", "scale > 2", []),  # what is said, not what is trained
        ("LONGEST_SIDE = 20", "LONGEST_SIDE = 30", []),
    ],
)
def test_how_pictures_are_decoded_counts(tmp_path, old, new, want):
    edit(tmp_path, "inputs/pictures.py", old, new)
    assert code.changed(code.digests(), code.digests(root=tmp_path)) == want


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("EXAMPLE, EPOCH, CROP = 1, 2, 3", "EXAMPLE, EPOCH, CROP = 1, 2, 4", "data.CROP"),
        ("round(room / 2)", "room // 2", "data.views"),
    ],
)
def test_one_of_several_names_given_at_once_is_found(tmp_path, old, new, name):
    edit(tmp_path, "data.py", old, new)
    assert name in code.changed(code.digests(), code.digests(root=tmp_path))


AFTER = 'TARGETS = ("to_q", "to_k", "to_v", "to_out.0")\n'


@pytest.mark.parametrize(
    ("one", "other", "name"),
    [
        ("GAIN: float = 1.0", "GAIN: float = 7.0", "lora.GAIN"),
        ("TARGETS += ()", 'TARGETS += ("ff.net.2",)', "lora.TARGETS"),
        ("if True:\n    GAIN = 1.0", "if True:\n    GAIN = 7.0", "lora.GAIN"),
        ("", "LoRALinear.forward = LoRALinear.up", "lora.LoRALinear"),
        ("", "TIMES[0] = 7", "lora.TIMES"),
        ("", "torch.backends.cudnn.allow_tf32 = False", "lora.torch"),
        ("", 'torch.set_float32_matmul_precision("high")', "lora.torch"),
    ],
)
def test_statements_of_any_kind_count(tmp_path, one, other, name):
    for folder, line in (("one", one), ("other", other)):
        (tmp_path / folder).mkdir()
        edit(tmp_path / folder, "lora.py", AFTER, f"{AFTER}{line}\n")
    digests = (code.digests(root=tmp_path / folder) for folder in ("one", "other"))
    assert code.changed(*digests) == [name]


@pytest.mark.slow
def test_an_edit_of_the_decoding_is_refused_by_name_and_when_accepted_encodes_anew(
    train, cache, tmp_path, monkeypatch, capsys
):
    assert train("r", "--max-train-steps", "1") == 0
    tree, of_one, before = tmp_path / "tree", code.of_one, set(cache.iterdir())
    tree.mkdir()
    edit(tree, "inputs/pictures.py", "image.size, behind)", 'image.size, "black")')
    monkeypatch.setattr(code, "of_one", lambda _, name: of_one(tree, name))
    assert train("r", "--max-train-steps", "2") == 1
    assert "its code has changed: inputs.pictures.decode;" in capsys.readouterr().err
    assert train("r", "--max-train-steps", "2", "--accept-code-change") == 0
    new = {path.name.partition("-")[0] for path in set(cache.iterdir()) - before}
    assert new == {"latent"}  # and no caption


def test_everything_named_is_there_and_an_option_adds_its_own():
    digests = code.digests(["fast.nf4.quantise"])
    assert all(digests.values()) and "fast.nf4.quantise" in digests
    assert {"lora.TARGETS", "data.Encoder", "loop.fit", "model.predict"} <= digests.keys()
    assert not {"loop.train_plain", "lora.merge", "model.load_unet"} & digests.keys()


def test_what_fast_was_written_for_is_the_tree_as_it_is():
    """Who edits one of these looks whether fast/ still does the same, then writes it down anew."""
    assert {name: code.together(name) for name in faster.WRITTEN_FOR} == faster.WRITTEN_FOR
    assert set(faster.MATRIX_BY_MATRIX) <= faster.WRITTEN_FOR.keys()


def test_changed_code_is_refused_by_name_or_accepted_and_noted():
    config, mine = Config(output_dir="out"), {"a.f": "1", "a.g": "2"}
    state = {"code": mine, "step": 40, "commit": "abc+", "code_changes": ""}
    assert identity.check_code(config, mine, None) == ""
    assert identity.check_code(config, mine, state) == ""
    other = {"a.f": "9", "a.h": "3"}
    with pytest.raises(Refusal) as refusal:
        identity.check_code(config, other, state)
    for word in ("a.f, a.g, a.h", "git checkout abc,", "--accept-code-change", "--output-dir"):
        assert word in str(refusal.value)
    accepts = dataclasses.replace(config, accept_code_change=True)
    first = identity.check_code(accepts, other, state)
    assert first == "code changed after step 40: a.f, a.g, a.h"
    later = {"code": other, "step": 60, "commit": "", "code_changes": first}
    assert identity.check_code(config, other, later) == first  # it stays noted
    assert identity.check_code(accepts, mine, later).startswith(f"{first}; code changed after step")


def test_the_commit_is_the_tree_s_own_with_a_plus_where_its_python_differs(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        found = subprocess.run(
            ["git", "-C", tmp_path, *who, *words], capture_output=True, text=True
        )
        return found.stdout.strip()

    commit = code.commit.__wrapped__
    inner = tmp_path / "inner"
    inner.mkdir()
    for name in ("a.py", "b.md"):
        (tmp_path / name).write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(code, "ROOT", tmp_path)
    assert len(commit()) == 40 and commit() == git("rev-parse", "HEAD")
    (tmp_path / "b.md").write_text("2\n")
    assert "+" not in commit()
    (tmp_path / "a.py").write_text("2\n")
    assert commit() == git("rev-parse", "HEAD") + "+"
    monkeypatch.setattr(code, "ROOT", inner)  # a copy within somebody's repository
    assert commit() == ""
    monkeypatch.setattr(code, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(inner))
    assert commit() == ""


def test_digests_come_in_one_order_in_every_process():
    """Several processes compare them as text, and a set's order is each process's own."""
    assert list(code.digests()) == [
        f"{module}.{name}"
        for module in code.MODULES
        for name in sorted(
            key.removeprefix(f"{module}.") for key in code.digests() if key.startswith(module)
        )
    ]
