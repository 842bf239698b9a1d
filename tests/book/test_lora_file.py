"""The plain adapter file: what is written is what was trained, diffusers reads and writes the same,
and a file that is not exactly right is refused by name."""

import errno
import json
import os

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import lora
from adapter_tools import (
    ABOUT,
    ALPHA,
    BROKEN,
    CASES,
    DTYPES,
    MODULES,
    PEFT_MODULE,
    RANK,
    answer,
    header,
    numbers,
    off,
    refused,
    trained,
    write_edited,
)
from adapters import files
from conftest import TINY_SDXL, make_batch, make_unet
from inputs.files import Refusal
from lora import FILE_NAME

# ---- what a file holds ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(tmp_path, dtype):
    """fp32: equal to the bit; fp16: equal to the rounded numbers."""
    path = tmp_path / "new" / "folder" / "adapter.safetensors"
    ours = trained()
    kept = numbers(ours)
    lora.save(ours, path, dtype, ABOUT)
    assert torch.equal(numbers(ours), kept)  # saving changes nothing
    again = lora.inject(make_unet(), rank=RANK, alpha=ALPHA, seed=9)
    assert not torch.equal(numbers(again), numbers(ours))
    file = lora.read(path)
    lora.load(again, file)
    assert torch.equal(numbers(again), numbers(ours).to(dtype).float())
    assert torch.equal(numbers(again), numbers(ours)) == (dtype == torch.float32)
    assert (file.path, file.rank, file.alpha) == (path, RANK, ALPHA)
    assert file.about.items() >= ABOUT.items()
    assert os.listdir(path.parent) == [path.name]  # no part file stays behind


def test_peft_keys_shapes_and_dtype(tmp_path):
    adapter = trained()
    lora.save(adapter, tmp_path / "a.safetensors", torch.float16, {})
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    want = {}
    for name, layer in adapter.layers.items():
        want[f"unet.{name}.lora_A.weight"] = (RANK, layer.in_features)
        want[f"unet.{name}.lora_B.weight"] = (layer.out_features, RANK)
    assert {key: tuple(t.shape) for key, t in tensors.items()} == want
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight"
    assert key in tensors
    assert {t.dtype for t in tensors.values()} == {torch.float16}


def test_header_holds_rank_alpha_and_about_in_the_given_order(tmp_path):
    lora.save(trained(), tmp_path / "a.safetensors", torch.float16, ABOUT)
    said = header(tmp_path / "a.safetensors")["__metadata__"]
    assert list(said.items())[-7:] == [("rank", "4"), ("alpha", "6.0"), *ABOUT.items()]
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == said
    assert (tmp_path / "a.safetensors").read_bytes()[0] % 8 == 0  # data begins at a multiple of 8


def test_peft_header_says_what_diffusers_needs(tmp_path):
    lora.save(trained(), tmp_path / "a.safetensors", torch.float32, ABOUT)
    said = header(tmp_path / "a.safetensors")["__metadata__"]
    assert json.loads(said["lora_adapter_metadata"]) == {
        "unet.r": RANK,
        "unet.lora_alpha": ALPHA,
        "unet.target_modules": ["to_k", "to_out.0", "to_q", "to_v"],
    }


@pytest.mark.parametrize("trouble", [errno.ENOSPC, errno.EACCES])
def test_a_save_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch, trouble):
    path, adapter = tmp_path / "a.safetensors", trained()
    lora.save(adapter, path, torch.float16, {"steps": "1"})
    before = path.read_bytes()

    def fails(descriptor):
        raise OSError(trouble, os.strerror(trouble))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(Refusal) as refusal:
        lora.save(adapter, path, torch.float16, {"steps": "2"})
    said = str(refusal.value)
    assert str(path) in said and os.strerror(trouble) in said and "expected a folder" in said
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


# ---- loaded by diffusers -------------------------------------------------------------------------


def test_nothing_is_loaded_under_a_merged_adapter(tmp_path, unet, batch):
    """Its new numbers would not act: the base holds the product of the old ones."""
    adapter = trained(unet)
    lora.save(adapter, tmp_path / FILE_NAME, torch.float32, {})
    with torch.no_grad():
        for matrix in adapter.matrices().values():
            matrix.mul_(0.5)
    lora.merge(adapter)
    before = numbers(adapter)
    with pytest.raises(Refusal, match=r"merged into its base.*unmerge\(\) first"):
        lora.load(adapter, lora.read(tmp_path))
    assert torch.equal(numbers(adapter), before)
    lora.unmerge(adapter)
    lora.load(adapter, lora.read(tmp_path))


def test_load_lora_weights_of_the_output_folder_takes_our_peft_file(tmp_path):
    """On a model that draws, from a folder as a run leaves it; the other files there hold other
    numbers, so that taking one of them shows."""
    pipe = StableDiffusionXLPipeline.from_pretrained(TINY_SDXL, dtype=torch.float32)
    size = pipe.unet.config.sample_size
    g = torch.Generator().manual_seed(0)
    batch = make_batch(2) | {
        "noise": torch.randn(2, 4, size, size, generator=g),
        "context": torch.randn(2, 7, pipe.unet.config.cross_attention_dim, generator=g),
        "pooled": torch.randn(2, pipe.text_encoder_2.config.projection_dim, generator=g),
    }
    bare = answer(pipe.unet, batch)
    decoy = trained(pipe.unet)  # with its numbers doubled below
    with torch.no_grad():
        for layer in decoy.layers.values():
            layer.lora_B.mul_(2)
        files.save(decoy, tmp_path / "kohya" / "OUT.safetensors", "kohya", torch.float32, {})
        lora.save(decoy, tmp_path / "a.safetensors", torch.float32, {})
        for layer in decoy.layers.values():
            layer.lora_B.div_(2)
    lora.save(decoy, tmp_path / FILE_NAME, torch.float32, {})
    ours = answer(pipe.unet, batch)
    pipe = StableDiffusionXLPipeline.from_pretrained(TINY_SDXL, dtype=torch.float32)
    pipe.load_lora_weights(tmp_path)
    assert off(answer(pipe.unet, batch), ours) < 1e-5
    assert off(bare, ours) > 0.01


def test_our_reader_takes_the_folder_too(tmp_path):
    adapter = trained()
    lora.save(adapter, tmp_path / FILE_NAME, torch.float32, {})
    again = lora.inject(make_unet(), rank=RANK, alpha=ALPHA, seed=9)
    file = lora.read(tmp_path)
    assert file.path == tmp_path / FILE_NAME
    lora.load(again, file)
    assert torch.equal(numbers(again), numbers(adapter))


def test_a_file_that_diffusers_wrote_loads_here_with_its_alpha(tmp_path, unet, batch):
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(lora.TARGETS), init_lora_weights=False
    )
    unet.add_adapter(config)
    theirs = answer(unet, batch)
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    ours = make_unet()
    lora.load(lora.inject(ours, rank=RANK, alpha=ALPHA), lora.read(tmp_path))
    assert off(answer(ours, batch), theirs) < 1e-6


def test_a_kohya_file_is_refused_with_the_way_out(tmp_path):
    files.save(trained(), tmp_path / "a.safetensors", "kohya", torch.float32, {})
    assert "draw without --plain" in refused(tmp_path / "a.safetensors", lora)


# ---- strict --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case[0] == "peft"])
def test_load_refuses_by_name(tmp_path, case):
    _, edit, must_say = CASES[case]
    path = write_edited(tmp_path / "a.safetensors", "peft", edit)
    said = refused(path, lora)
    for words in [str(path), *must_say]:
        assert words in said


@pytest.mark.parametrize("rank, alpha", [(8, 6), (4, 12), (2, 3)])  # the last with the same scale
def test_load_refuses_another_rank_or_alpha(tmp_path, rank, alpha):
    path = write_edited(tmp_path / "a.safetensors", "peft", lambda t, m: None, rank, alpha)
    said = refused(path, lora)
    assert f"{path} has rank {rank} and alpha {alpha}; expected rank 4 and alpha 6" in said
    assert f"--lora-rank {rank} --lora-alpha {alpha}" in said


def test_load_refuses_another_architecture(tmp_path):
    adapter = trained(make_unet(transformer_layers_per_block=(1, 1)))
    lora.save(adapter, tmp_path / "a.safetensors", torch.float32, {})
    said = refused(tmp_path / "a.safetensors", lora)
    assert "lacks 64 such as down_blocks.1" in said and MODULES in said


def test_what_fp16_cannot_hold_is_refused_when_read_back(tmp_path):
    adapter = trained()
    with torch.no_grad():
        adapter.layers[PEFT_MODULE].lora_B[3, 2] = 7e4  # above 65,504
    lora.save(adapter, tmp_path / "a.safetensors", torch.float16, {})
    assert f"{PEFT_MODULE}.lora_B holds NaN or Inf" in refused(tmp_path / "a.safetensors", lora)


def test_a_file_of_convolutions_is_for_the_command(tmp_path):
    path, name = tmp_path / "a.safetensors", "down_blocks.0.resnets.0.conv1"
    lora.save(trained(), path, torch.float32, ABOUT)
    with safetensors.safe_open(path, "pt") as file:
        about, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    A, B = torch.ones(RANK, 16, 3, 3), torch.ones(16, RANK, 1, 1)
    tensors |= {f"unet.{name}.lora_A.weight": A, f"unet.{name}.lora_B.weight": B}
    safetensors.torch.save_file(tensors, path, about)
    said = refused(path, lora)
    assert f"adapts convolutions, {name} for one" in said and "draw without --plain" in said


@pytest.mark.parametrize("how", BROKEN)
def test_load_refuses_a_file_that_is_not_whole(tmp_path, how):
    path = tmp_path / "a.safetensors"
    lora.save(trained(), path, torch.float32, ABOUT)
    BROKEN[how](path, path.read_bytes())
    said = refused(path, lora)
    assert f"{path} is not a whole safetensors file ({path.stat().st_size} bytes" in said
    assert "expected a file as its writer left it" in said


@pytest.mark.parametrize("where", ["nowhere.safetensors", "no/folder/here.safetensors", ""])
def test_load_refuses_a_file_that_is_not_there(tmp_path, where):
    path = tmp_path / where if where else tmp_path / FILE_NAME  # the folder itself has no adapter
    said = refused(tmp_path / where, lora)
    assert f"{path} is not a whole safetensors file (no such file" in said
    assert "expected a file as its writer left it" in said
