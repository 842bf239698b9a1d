"""Of a model only what is needed is downloaded, and what is no model is refused by its part."""

import fnmatch
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

import model
from conftest import POCKET, make_unet
from inputs import hub
from inputs.files import Refusal
from made import assert_same_weights, pocket_with, pocket_with_unet

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("files", "half", "picked"),
    [
        (["m.safetensors", "m.fp16.safetensors"], True, ["m.fp16.safetensors"]),
        (["m.safetensors", "m.fp16.safetensors"], False, ["m.safetensors"]),
        (["m.fp16.safetensors"], False, ["m.fp16.safetensors"]),
        (["m.safetensors"], True, ["m.safetensors"]),
        (["m.non_ema.safetensors", "m.safetensors"], False, ["m.safetensors"]),
        (
            [
                "m.fp16-00001-of-00002.safetensors",
                "m.fp16-00002-of-00002.safetensors",
                "m.safetensors",
            ],
            True,
            ["m.fp16-00001-of-00002.safetensors", "m.fp16-00002-of-00002.safetensors"],
        ),
        ([], True, []),
    ],
)
def test_one_variant_of_the_weights_is_picked(files, half, picked):
    assert hub.pick_weights(files, half) == picked


def test_the_base_is_told_by_its_weights_not_by_its_file_format(tmp_path):
    unet, other = make_unet(1), make_unet(2)
    layouts = {
        "fp32": (unet, {}),
        "fp16": (make_unet(1).half(), {"variant": "fp16"}),
        "sharded": (unet, {"max_shard_size": "200KB"}),
    }
    folders = [str(pocket_with_unet(tmp_path / name, saved)) for name, saved in layouts.items()]
    prints = {hub.unet_fingerprint(folder, half) for folder in folders for half in (False, True)}
    assert len(prints) == 1
    changed = make_unet(1)
    changed.conv_out.weight.data[0, 0, 0, 0] += 0.01
    for name, saved in (("other", other), ("changed", changed)):
        folder = pocket_with_unet(tmp_path / name, (saved, {}))
        assert hub.unet_fingerprint(str(folder), False) not in prints


def test_an_encoders_fingerprint_changes_with_its_weights_and_with_its_config(tmp_path):
    before = hub.fingerprint(str(POCKET), "vae")
    same = pocket_with(tmp_path / "same", "vae")
    assert hub.fingerprint(str(same), "vae") == before  # not by place or date
    weights = pocket_with(tmp_path / "weights", "vae")
    file = weights / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({k: w * 1.01 for k, w in load_file(file).items()}, file)
    config = pocket_with(tmp_path / "config", "vae")
    with open(config / "vae" / "config.json", "a") as f:
        f.write("\n")
    prints = {before, *(hub.fingerprint(str(m), "vae") for m in (weights, config))}
    assert len(prints) == 3
    assert hub.fingerprint(str(POCKET), "text_encoder") != hub.fingerprint(
        str(POCKET), "text_encoder_2"
    )


# ---- from the Hub --------------------------------------------------------------------------------

SDXL_BASE_FILES = """
.gitattributes 01.png LICENSE.md README.md comparison.png model_index.json pipeline.png
scheduler/scheduler_config.json
sd_xl_base_1.0.safetensors sd_xl_base_1.0_0.9vae.safetensors
sd_xl_offset_example-lora_1.0.safetensors
text_encoder/config.json text_encoder/flax_model.msgpack text_encoder/model.fp16.safetensors
text_encoder/model.onnx text_encoder/model.safetensors text_encoder/openvino_model.bin
text_encoder/openvino_model.xml text_encoder/pytorch_model.bin text_encoder/pytorch_model.fp16.bin
text_encoder_2/config.json text_encoder_2/flax_model.msgpack text_encoder_2/model.fp16.safetensors
text_encoder_2/model.onnx text_encoder_2/model.onnx_data text_encoder_2/model.safetensors
text_encoder_2/openvino_model.bin text_encoder_2/openvino_model.xml
tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json
tokenizer/vocab.json
tokenizer_2/merges.txt tokenizer_2/special_tokens_map.json tokenizer_2/tokenizer_config.json
tokenizer_2/vocab.json
unet/config.json unet/diffusion_flax_model.msgpack
unet/diffusion_pytorch_model.fp16.safetensors unet/diffusion_pytorch_model.safetensors
unet/diffusion_pytorch_model.bin unet/model.onnx unet/model.onnx_data unet/openvino_model.bin
unet/openvino_model.xml
vae/config.json vae/diffusion_flax_model.msgpack vae/diffusion_pytorch_model.fp16.safetensors
vae/diffusion_pytorch_model.safetensors
vae_1_0/config.json vae_1_0/diffusion_pytorch_model.fp16.safetensors
vae_1_0/diffusion_pytorch_model.safetensors
vae_decoder/config.json vae_decoder/model.onnx vae_decoder/openvino_model.bin
vae_encoder/config.json vae_encoder/model.onnx vae_encoder/openvino_model.bin
""".split()
SHARDED_FILES = """
README.md model_index.json model.safetensors unet/config.json
unet/diffusion_pytorch_model-00001-of-00002.safetensors
unet/diffusion_pytorch_model-00002-of-00002.safetensors
unet/diffusion_pytorch_model.safetensors.index.json
unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors
unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors
unet/diffusion_pytorch_model.safetensors.index.fp16.json
""".split()
HUB_NAME = "someone/sdxl"


@pytest.fixture
def no_memory_of_the_hub():
    hub.fetch_from_hub.cache_clear()
    yield
    hub.fetch_from_hub.cache_clear()


def downloads(monkeypatch, files: list[str], part: str, half: bool) -> set[str]:
    """What fetch() would bring from a Hub repository that holds `files`."""
    asked = []

    def snapshot_download(name, allow_patterns=None, **_):
        assert name == HUB_NAME
        asked.append(allow_patterns)
        return str(POCKET)

    monkeypatch.setattr(HfApi, "list_repo_files", lambda *_, **__: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    hub.fetch_from_hub.cache_clear()
    assert hub.fetch(HUB_NAME, part, half) == POCKET / part
    assert len(asked) == 1 and asked[0] is not None  # None would bring everything
    return {f for f in files if any(fnmatch.fnmatch(f, pattern) for pattern in asked[0])}


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("part", ["", *hub.PARTS])
def test_only_a_parts_small_files_and_one_variant_are_asked_for(
    monkeypatch, no_memory_of_the_hub, part, half
):
    v = ".fp16" if half else ""
    tokenizer = {"merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"}
    want = {
        "": set(),
        "unet": {"config.json", f"diffusion_pytorch_model{v}.safetensors"},
        "vae": {"config.json", f"diffusion_pytorch_model{v}.safetensors"},
        "text_encoder": {"config.json", f"model{v}.safetensors"},
        "text_encoder_2": {"config.json", f"model{v}.safetensors"},
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "scheduler": {"scheduler_config.json"},
    }[part]
    got = downloads(monkeypatch, SDXL_BASE_FILES, part, half)
    assert got == {"model_index.json", *(f"{part}/{f}" for f in want)}


@pytest.mark.parametrize("half", [True, False])
def test_all_shards_of_one_variant_are_asked_for(monkeypatch, no_memory_of_the_hub, half):
    got = downloads(monkeypatch, SHARDED_FILES, "unet", half)
    weights = {f for f in got if f.endswith(".safetensors")}
    assert len(weights) == 2 and all((".fp16" in f) == half for f in weights)
    assert {"model_index.json", "unet/config.json"} <= got and "model.safetensors" not in got


def hub_cache(folder: Path, parts: tuple[str, ...] = hub.PARTS) -> None:
    """A Hub cache with the pocket model in it under HUB_NAME, as a download would leave it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = folder / ("models--" + HUB_NAME.replace("/", "--"))
    snapshot = repo / "snapshots" / commit
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for part in parts:
        shutil.copytree(POCKET / part, snapshot / part)
    shutil.copy(POCKET / "model_index.json", snapshot / "model_index.json")


@pytest.fixture
def empty_hub_cache(monkeypatch, tmp_path, no_memory_of_the_hub) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_what_was_downloaded_serves_without_a_network(empty_hub_cache):
    hub_cache(empty_hub_cache)
    assert hub.fetch(HUB_NAME, "unet").is_relative_to(empty_hub_cache)
    unet = model.load_unet(HUB_NAME, CPU, torch.float32)
    assert_same_weights(unet, model.load_unet(str(POCKET), CPU, torch.float32))
    here, there = (
        model.encode_prompts(["red apple", ""], model.load_text_encoders(name, CPU))[0]
        for name in (HUB_NAME, str(POCKET))
    )
    assert torch.equal(here, there)
    assert model.latent_scaling(HUB_NAME) == model.latent_scaling(str(POCKET))
    assert hub.unet_fingerprint(HUB_NAME, False) == hub.unet_fingerprint(str(POCKET), False)
    model.load_vae(HUB_NAME, CPU)
    model.load_noise_schedule(HUB_NAME, CPU)


@pytest.mark.parametrize(
    "answer", [None, ConnectionError("no route to host"), TimeoutError(), ValueError("<html>")]
)
def test_an_unreachable_hub_is_one_refusal_with_the_name_and_the_way_out(
    monkeypatch, empty_hub_cache, answer
):
    def list_repo_files(*_, **__):
        raise answer

    if answer is not None:  # None: huggingface_hub's own refusal, offline
        monkeypatch.setattr(HfApi, "list_repo_files", list_repo_files)
    with pytest.raises(Refusal) as refusal:
        model.load_unet(HUB_NAME, CPU, torch.float16)
    said = str(refusal.value)
    assert HUB_NAME in said and "unet" in said and "--pretrained-model-name-or-path FOLDER" in said
    assert "\n" not in said


def test_a_part_that_was_never_downloaded_is_refused_by_name(empty_hub_cache):
    hub_cache(empty_hub_cache, ("unet", "scheduler"))
    model.load_unet(HUB_NAME, CPU, torch.float32)
    with pytest.raises(Refusal, match=r"someone/sdxl \(.*vae\)"):
        model.load_vae(HUB_NAME, CPU)


# ---- what is no model ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nowhere", "./org/name", "/no/such/folder", "a/b/c", "~/nowhere"])
def test_a_name_that_is_neither_folder_nor_hub_name_is_refused(name):
    with pytest.raises(Refusal, match=f"there is no folder {name}"):
        hub.fetch(name, "unet")


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(Refusal, match=r"has no model_index\.json") as refusal:
        hub.fetch(str(tmp_path), "unet")
    assert str(tmp_path) in str(refusal.value) and "a .safetensors file that holds all" in str(
        refusal.value
    )


def test_a_model_of_another_kind_is_refused(tmp_path):
    folder = pocket_with(tmp_path / "m", _class_name="StableDiffusionPipeline")
    with pytest.raises(Refusal, match="StableDiffusionPipeline"):
        hub.fetch(str(folder), "unet")


@pytest.mark.parametrize("content", ["", "{", "[]", '"StableDiffusionXLPipeline"'])
def test_a_damaged_model_index_is_refused(tmp_path, content):
    folder = pocket_with(tmp_path / "m")
    (folder / "model_index.json").write_text(content)
    with pytest.raises(Refusal, match=r"model_index\.json"):
        hub.fetch(str(folder), "unet")


LOADERS = {
    "unet": lambda name: model.load_unet(name, CPU, torch.float32),
    "vae": lambda name: model.load_vae(name, CPU),
    "text_encoder": lambda name: model.load_text_encoders(name, CPU),
    "text_encoder_2": lambda name: model.load_text_encoders(name, CPU),
    "tokenizer": lambda name: model.load_tokenizers(name),
    "tokenizer_2": lambda name: model.load_tokenizers(name),
    "scheduler": lambda name: model.load_noise_schedule(name, CPU),
}
WEIGHTY = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.mark.parametrize("part", hub.PARTS)
def test_a_missing_part_is_refused_by_name(tmp_path, part):
    folder = pocket_with(tmp_path / "m")
    (folder / part).unlink()
    with pytest.raises(Refusal, match=f"has no .*{part}/"):
        LOADERS[part](str(folder))


@pytest.mark.parametrize("part", hub.PARTS)
def test_an_empty_part_is_refused_by_name(tmp_path, part):
    folder = pocket_with(tmp_path / "m")
    (folder / part).unlink()
    (folder / part).mkdir()
    with pytest.raises(Refusal, match=part):
        LOADERS[part](str(folder))


def weight_file(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


@pytest.mark.parametrize("part", WEIGHTY)
def test_a_part_without_weights_is_refused_by_name(tmp_path, part):
    folder = pocket_with(tmp_path / "m", part)
    weight_file(folder, part).unlink()
    with pytest.raises(Refusal, match=rf"{part} has no \.safetensors"):
        LOADERS[part](str(folder))


@pytest.mark.parametrize("part", WEIGHTY)
def test_a_part_without_config_is_refused_by_name(tmp_path, part):
    folder = pocket_with(tmp_path / "m", part)
    (folder / part / "config.json").unlink()
    with pytest.raises(Refusal, match=part):
        LOADERS[part](str(folder))


@pytest.mark.parametrize("part", WEIGHTY)
def test_weights_cut_short_are_refused_with_their_folder(tmp_path, part):
    folder = pocket_with(tmp_path / "m", part)
    file = weight_file(folder, part)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(Refusal, match=str(folder / part)):
        LOADERS[part](str(folder))


@pytest.mark.parametrize("part", WEIGHTY)
def test_weights_that_lack_a_tensor_are_refused_with_its_name(tmp_path, part):
    folder = pocket_with(tmp_path / "m", part)
    file = weight_file(folder, part)
    weights = load_file(file)
    lost = sorted(key for key in weights if key.endswith("weight"))[-1]
    del weights[lost]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(Refusal) as refusal:
        LOADERS[part](str(folder))
    said = str(refusal.value)
    assert str(folder / part) in said and lost.removeprefix("text_model.") in said


@pytest.mark.parametrize("part", WEIGHTY)
def test_weights_of_another_shape_than_the_config_says_are_refused(tmp_path, part):
    folder = pocket_with(tmp_path / "m", part)
    file = weight_file(folder, part)
    weights = load_file(file)
    key = max(weights, key=lambda k: weights[k].numel())
    weights[key] = weights[key][:-1].clone()
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(Refusal, match=str(folder / part)):
        LOADERS[part](str(folder))
