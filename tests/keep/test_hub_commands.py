"""The commands on a model and a data set of the Hub, through the real clients: what people meet
with it, and without it.
"""

import json
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import loop
from conftest import INK, POCKET, ink_rows
from hub_server import serving
from inputs import download, hub
from inputs.options import parse
from keep import drawing, training
from made import encoded
from stress.case import sentence_is_whole

NAME = "someone/sdxl"
OTHERS = """
.gitattributes 01.png LICENSE.md README.md comparison.png sd_xl_base_1.0.safetensors
sd_xl_base_1.0_0.9vae.safetensors sd_xl_offset_example-lora_1.0.safetensors
text_encoder/flax_model.msgpack text_encoder/model.onnx text_encoder/openvino_model.bin
text_encoder/openvino_model.xml text_encoder/pytorch_model.bin text_encoder_2/flax_model.msgpack
text_encoder_2/model.onnx text_encoder_2/model.onnx_data text_encoder_2/openvino_model.bin
unet/diffusion_flax_model.msgpack unet/diffusion_pytorch_model.bin unet/model.onnx
unet/model.onnx_data unet/openvino_model.bin unet/openvino_model.xml
vae/diffusion_flax_model.msgpack vae_1_0/config.json vae_1_0/diffusion_pytorch_model.safetensors
vae_decoder/config.json vae_decoder/model.onnx vae_encoder/config.json vae_encoder/model.onnx
""".split()
PARQUET = "data/train-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def model_files(tmp_path_factory) -> dict:
    """The pocket model laid out as SDXL base's repository is."""
    files = {p.relative_to(POCKET).as_posix(): p for p in POCKET.rglob("*") if p.is_file()}
    folder = tmp_path_factory.mktemp("fp16")
    for path in [path for path in files if path.endswith(".safetensors")]:
        half = {key: each.half() for key, each in load_file(files[path]).items()}
        variant = path.replace(".safetensors", ".fp16.safetensors")
        save_file(half, folder / variant.replace("/", "-"), {"format": "pt"})
        files[variant] = folder / variant.replace("/", "-")
    return files | dict.fromkeys(OTHERS, b"nobody needs this")


@pytest.fixture
def server(monkeypatch, tmp_path, model_files):
    monkeypatch.setattr(hub, "REVISIONS", {})
    hub.announce.cache_clear()
    with serving(monkeypatch, tmp_path / "here") as server:
        server.commit = server.push(NAME, model_files)
        yield server


@pytest.fixture
def said(capsys):
    """said(): what was printed since, on stdout and stderr together."""

    def said() -> str:
        return "".join(capsys.readouterr())

    return said


def ask_again() -> None:
    """As a new process does."""
    hub.fetch_from_hub.cache_clear()
    hub.REVISIONS.clear()


FROM_HUB = ("--pretrained-model-name-or-path", NAME)


def files_brought(server) -> set[str]:
    """The files that were asked for whole, by their names."""
    known = {path: f"/resolve/{server.commit}/{path}" for path in server.repos[NAME][server.commit]}
    return {path for path, url in known.items() if any(url in each for each in server.asked)}


def test_a_run_brings_only_what_it_needs_and_goes_on_and_draws_while_the_hub_is_away(
    server, train, tmp_path, said
):
    assert train("a", *FROM_HUB, "--max-train-steps", "2") == 0
    assert "downloading 0.0" in said()
    brought = files_brought(server)
    assert not brought & {*OTHERS} and not any(".fp16" in path for path in brought)
    assert {f"{part}/{main}" for part, main in hub.PARTS.items()} < brought
    assert json.loads((tmp_path / "a" / "config.json").read_text())["base_commit"] == server.commit
    server.stop()
    ask_again()
    assert train("a", *FROM_HUB) == 0  # 4 steps
    assert "continuing after step 2" in said()
    ask_again()
    draw = [str(tmp_path / "a"), "--prompts", "red apple", "--num-inference-steps", "1"]
    assert drawing.main([*draw, "--resolution", "64"]) == 0
    assert len([*(tmp_path / "a" / "pictures").glob("*.png")]) == 1
    assert train("local") == 0
    ends = [(tmp_path / name / "kohya" / f"{name}.safetensors") for name in ("a", "local")]
    a, b = map(load_file, ends)
    assert all(a[key].equal(b[key]) for key in b)
