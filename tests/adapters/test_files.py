"""Adapter files in either layout: what is written is what was trained, equal adapters are equal
files, and a file that is not exactly right is refused by name."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch

import lora
from adapter_tools import (
    ABOUT,
    ALPHA,
    BROKEN,
    CASES,
    DTYPES,
    RANK,
    answer,
    header,
    numbers,
    off,
    pipeline,
    read_only,
    refused,
    trained,
    write_edited,
)
from adapters import files
from conftest import ROOT, make_unet
from inputs.files import data_section
from lora import FILE_NAME

LAYOUTS = ("peft", "kohya")
# The tiny UNet's blocks with attention: it has one layer a level, where SDXL has two.
SGM = {"down_blocks_1_attentions_0": "input_blocks_3_1", "mid_block_attentions_0": "middle_block_1"}
SGM |= {f"up_blocks_0_attentions_{i}": f"output_blocks_{i}_1" for i in range(2)}


# ---- what a file holds ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(tmp_path, layout, dtype):
    """fp32: equal to the bit; fp16: equal to the rounded numbers."""
    path = tmp_path / "new" / "folder" / "adapter.safetensors"
    ours = trained()
    kept = numbers(ours)
    files.save(ours, path, layout, dtype, ABOUT)
    assert torch.equal(numbers(ours), kept)  # saving changes nothing
    again = lora.inject(make_unet(), rank=RANK, alpha=ALPHA, seed=9)
    assert not torch.equal(numbers(again), numbers(ours))
    file = files.read(path)
    files.load(again, file)
    assert torch.equal(numbers(again), numbers(ours).to(dtype).float())
    assert torch.equal(numbers(again), numbers(ours)) == (dtype == torch.float32)
    assert (file.path, file.rank, file.alpha) == (path, RANK, ALPHA)
    assert file.about.items() >= ABOUT.items()
    assert os.listdir(path.parent) == [path.name]  # no part file stays behind


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_alpha_that_config_allows_survives_its_file(tmp_path, layout, dtype):
    for alpha in (0.1, 22.6, 16 * 2**0.5, 1000, 100_000):
        adapter = replace(trained(), alpha=alpha)
        files.save(adapter, tmp_path / "a.safetensors", layout, dtype, {})
        file = files.read(tmp_path / "a.safetensors")
        files.load(adapter, file)
        assert file.alpha == pytest.approx(alpha, rel=1e-3)


def test_kohya_keys_shapes_and_one_alpha(tmp_path):
    adapter = trained()
    files.save(adapter, tmp_path / "a.safetensors", "kohya", torch.float16, {})
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    want = {}
    for name, layer in adapter.layers.items():
        key = "lora_unet_" + name.replace(".", "_")
        for block, sgm in SGM.items():
            key = key.replace(block, sgm)
        want[f"{key}.lora_down.weight"] = (RANK, layer.in_features)
        want[f"{key}.lora_up.weight"] = (layer.out_features, RANK)
        want[f"{key}.alpha"] = ()
    assert {key: tuple(t.shape) for key, t in tensors.items()} == want
    assert "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_out_0.alpha" in want
    assert {t.item() for key, t in tensors.items() if key.endswith(".alpha")} == {ALPHA}
    assert {t.dtype for key, t in tensors.items() if key.endswith(".weight")} == {torch.float16}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_header_holds_rank_alpha_and_about_in_the_given_order(tmp_path, layout):
    files.save(read_only(), tmp_path / "a.safetensors", layout, torch.float16, ABOUT)
    said = header(tmp_path / "a.safetensors")["__metadata__"]
    assert list(said.items())[-7:] == [("rank", "4"), ("alpha", "6.0"), *ABOUT.items()]
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == said
    assert (tmp_path / "a.safetensors").read_bytes()[0] % 8 == 0  # data begins at a multiple of 8


def test_kohya_header_says_what_a1111_needs(tmp_path):
    files.save(read_only(), tmp_path / "a.safetensors", "kohya", torch.float16, ABOUT)
    said = header(tmp_path / "a.safetensors")["__metadata__"]
    assert said["ss_base_model_version"].startswith("sdxl_")  # A1111 hides the file otherwise
    assert said["ss_network_module"] == "networks.lora"
    assert int(said["ss_network_dim"]) == RANK and float(said["ss_network_alpha"]) == ALPHA
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert "lora_adapter_metadata" not in said  # diffusers refuses both alphas in one file


@pytest.mark.parametrize("dtype", DTYPES)
def test_sshs_model_hash_is_sha256_of_the_data_section(tmp_path, dtype):
    files.save(read_only(), tmp_path / "a.safetensors", "kohya", dtype, ABOUT)
    blob = (tmp_path / "a.safetensors").read_bytes()
    data = blob[8 + int.from_bytes(blob[:8], "little") :]
    said = header(tmp_path / "a.safetensors")["__metadata__"]
    assert said["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    ends = [e["data_offsets"][1] for k, e in header(tmp_path / "a.safetensors").items() if "." in k]
    assert data == data_section(blob) and len(data) == max(ends)


TWICE = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from torch import nn
import lora
from adapters import files
net = nn.ModuleDict({n: nn.ModuleDict({"to_q": nn.Linear(24, 8)}) for n in "cab"})
adapter = lora.inject(net, rank=4, alpha=6, seed=3)
with torch.no_grad():
    for i, layer in enumerate(adapter.layers.values()):
        layer.lora_B.copy_(torch.arange(32.0).view(8, 4) / 7 + i)
about = {"recipe": "t4", "base": "some/base", "steps": "7", "dataset": "pictures", "a": "z"}
for layout in ("peft", "kohya"):
    for dtype in (torch.float32, torch.float16):
        files.save(adapter, Path(sys.argv[1]) / f"{layout}{dtype}", layout, dtype, about)
"""


@pytest.mark.slow
def test_equal_adapters_saved_by_two_processes_are_equal_files(tmp_path, monkeypatch):
    """This one and another, which hashes texts otherwise."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    there = [sys.executable, "-c", TWICE, str(tmp_path / "there")]
    subprocess.run(there, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, check=True)
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / "here")])
    exec(TWICE, {})
    first = {p.name: p.read_bytes() for p in (tmp_path / "there").iterdir()}
    second = {p.name: p.read_bytes() for p in (tmp_path / "here").iterdir()}
    assert first == second and len(set(first.values())) == 4


# ---- loaded by diffusers -------------------------------------------------------------------------


STRENGTHS = (0, 0.5, 1)


@pytest.mark.parametrize(
    "alpha", [6, pytest.param(3, marks=pytest.mark.slow)]
)  # and below the rank
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exported_equals_trained_at_every_strength(tmp_path, unet, batch, layout, dtype, alpha):
    """The file, read by us and by diffusers' load_lora_weights, separate and merged, against the
    adapter as it was trained.
    """
    adapter = trained(unet, alpha=alpha)
    folder = tmp_path / "OUT"
    path = folder / (FILE_NAME if layout == "peft" else "kohya/OUT.safetensors")
    files.save(adapter, path, layout, dtype, ABOUT)
    again = make_unet()
    loaded = lora.inject(again, rank=RANK, alpha=alpha, seed=9)
    files.load(loaded, files.read(path))
    pipe = pipeline(make_unet())
    bare = answer(pipe.unet, batch)
    pipe.load_lora_weights(folder if layout == "peft" else path, adapter_name="ours")
    bound = 1e-5 if dtype == torch.float32 else 2e-3
    for strength in STRENGTHS:
        for each in (adapter, loaded):
            lora.set_strength(each, strength)
        want = answer(unet, batch)
        assert torch.equal(want, bare) if strength == 0 else off(bare, want) > 5 * bound
        pipe.set_adapters("ours", float(strength))
        assert off(answer(pipe.unet, batch), want) < bound  # diffusers
        if dtype == torch.float32:
            assert torch.equal(answer(again, batch), want)  # ours, to the bit
        assert off(answer(again, batch), want) < bound
        lora.merge(loaded)
        assert off(answer(again, batch), want) < bound
        lora.unmerge(loaded)
    lora.set_strength(adapter, RANK / alpha)  # what a reader that forgets alpha would draw
    forgotten = answer(unet, batch)
    lora.set_strength(adapter, 1)
    assert off(forgotten, answer(unet, batch)) > 10 * bound


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_merged_adapter_is_exported_as_it_was_trained(tmp_path, unet, batch, layout):
    """Merging changes the base's weights, not what is written; diffusers' own fusing agrees."""
    adapter = trained(unet)
    files.save(adapter, tmp_path / "before", layout, torch.float32, ABOUT)
    lora.merge(adapter)
    merged = answer(unet, batch)
    files.save(adapter, tmp_path / "merged.safetensors", layout, torch.float32, ABOUT)
    assert (tmp_path / "merged.safetensors").read_bytes() == (tmp_path / "before").read_bytes()
    pipe = pipeline(make_unet())
    bare = answer(pipe.unet, batch)
    pipe.load_lora_weights(tmp_path / "merged.safetensors")
    assert off(answer(pipe.unet, batch), merged) < 1e-5
    pipe.fuse_lora(components=["unet"])
    assert off(answer(pipe.unet, batch), merged) < 1e-5 < off(bare, merged)


# ---- strict --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_unchanged_file_is_accepted(tmp_path, layout):
    """The tests below refuse files for their one change, not for being written by save_file."""
    path = write_edited(tmp_path / "a.safetensors", layout, lambda t, m: None)
    file = files.read(path)
    files.load(trained(), file)
    assert len(file.matrices) == 128


# Keys without unet. are refused by the book alone, and others beside PEFT's otherwise, below.
BOOKS = ("keys without unet.", "unused: the other layout's keys")


@pytest.mark.parametrize("case", [case for case in CASES if case not in BOOKS])
def test_load_refuses_by_name(tmp_path, case):
    layout, edit, must_say = CASES[case]
    path = write_edited(tmp_path / "a.safetensors", layout, edit)
    said = refused(path, files)
    for words in [str(path), *must_say]:
        assert words in said


def test_a_module_in_two_layouts_is_refused(tmp_path):
    layout, edit, _ = CASES["unused: the other layout's keys"]
    said = refused(write_edited(tmp_path / "a.safetensors", layout, edit), files)
    assert "has some modules twice, under SGM's names and under diffusers'" in said


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank, alpha", [(8, 6), (4, 12), (2, 3)])  # the last with the same scale
def test_load_refuses_another_rank_or_alpha(tmp_path, layout, rank, alpha):
    path = write_edited(tmp_path / "a.safetensors", layout, lambda t, m: None, rank, alpha)
    said = refused(path, files)
    assert f"{path} has rank {rank} and alpha {alpha}; expected rank 4 and alpha 6" in said
    assert f"--lora-rank {rank} --lora-alpha {alpha}" in said


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_refuses_a_file_that_is_not_whole(tmp_path, layout, how):
    path = tmp_path / "a.safetensors"
    files.save(read_only(), path, layout, torch.float32, ABOUT)
    BROKEN[how](path, path.read_bytes())
    said = refused(path, files)
    assert f"{path} is not a whole safetensors file ({path.stat().st_size} bytes" in said
    assert "expected a file as its writer left it" in said


@pytest.mark.parametrize("where", ["nowhere.safetensors", "no/folder/here.safetensors", ""])
def test_load_refuses_a_file_that_is_not_there(tmp_path, where):
    said = refused(tmp_path / where, files)
    wrong = ": no such file or folder" if where else " has no adapter file"
    assert f"{tmp_path / where}{wrong}; expected an adapter file" in said
