"""Adapter files from strangers, as both readers meet them."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lora
from adapter_tools import read_only
from adapters import files
from sentences import refused

READERS = pytest.mark.parametrize("read", [lora.read, files.read], ids=["book", "adapters"])


def hollow(path: Path, rank: int, width: int) -> Path:
    """A file that claims a rank."""
    names = ("unet.a.to_q.lora_A.weight", "unet.a.to_q.lora_B.weight")
    save_file({names[0]: torch.zeros(rank, width), names[1]: torch.zeros(width, rank)}, path)
    return path


@READERS
@pytest.mark.parametrize("rank, width", [(10**9, 0), (10**6, 1), (641, 641), (0, 8)])
def test_a_rank_that_would_take_all_memory_is_refused(tmp_path, read, rank, width):
    refused(lambda: read(hollow(tmp_path / "a.safetensors", rank, width)), "has rank", f"{rank}")


def written(path: Path, dtype: torch.dtype, metadata: dict | None = None) -> Path:
    """A PEFT-keyed file of rank 4 and alpha 6."""
    matrices = read_only().matrices()
    tensors = {f"unet.{n}.weight": each.detach().to(dtype) for n, each in matrices.items()}
    save_file(tensors, path, metadata)
    return path


@READERS
@pytest.mark.parametrize(
    "said",
    [
        *({"unet.r": 4, "unet.lora_alpha": a} for a in (0, -6, float("nan"), 1e308, "6", True)),
        {"unet.r": 8, "unet.lora_alpha": 6},
        {"unet.r": 4, "unet.lora_alpha": 10**400},
    ],
)
def test_an_alpha_that_is_no_strength_and_a_rank_that_is_not_the_files_are_refused(
    tmp_path, read, said
):
    header = {"lora_adapter_metadata": json.dumps(said)}
    path = written(tmp_path / "a.safetensors", torch.float32, header)
    refused(lambda: read(path))


@READERS
@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn, torch.bool])
def test_numbers_that_are_not_fp32_fp16_or_bf16_are_refused(tmp_path, read, dtype):
    path = written(tmp_path / "a.safetensors", dtype)
    refused(lambda: read(path), str(dtype)[6:])


@READERS
def test_an_adapter_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "a.safetensors")
    refused(lambda: read(tmp_path / "a.safetensors"), "not a file")


@READERS
def test_numbers_that_torch_does_not_know_are_refused(tmp_path, read):
    entry = {"dtype": "F6_E2M3", "shape": [2, 2], "data_offsets": [0, 3]}
    header = json.dumps({"unet.a.to_q.lora_A.weight": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    refused(lambda: read(path), "a.safetensors cannot be read", "F6_E2M3")


def test_an_alpha_that_is_complex_is_refused(tmp_path):
    key, path = "lora_unet_a_to_q", tmp_path / "a.safetensors"
    tensors = {f"{key}.lora_down.weight": torch.ones(2, 4), f"{key}.alpha": torch.tensor(4 + 0j)}
    save_file(tensors | {f"{key}.lora_up.weight": torch.ones(4, 2)}, path)
    refused(lambda: files.read(path), "has alpha (4+0j)")
