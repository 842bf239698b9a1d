"""SDXL's parts are diffusers' own to the bit: prompts, latents, weights, schedule; and each refusal
of model.py says what was found."""

import contextlib
import fnmatch
import json
import mmap
import os
import shutil
import sys
import time
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file

import lora
import model
from conftest import POCKET, SDXL, make_batch, make_unet
from inputs import hub
from inputs.files import Refusal

CPU = torch.device("cpu")
PROMPTS = ["red apple", "", "a rocket, a house with garden and two cats " * 9, "Ünïcödé 喜 🍎", "A"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text() -> model.TextEncoders:
    return model.load_text_encoders(str(POCKET), CPU)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return model.load_vae(str(POCKET), CPU)


def load_pipe(folder: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)


def pocket_with(folder: Path, *own: str, **index) -> Path:
    """The pocket model in `folder`: its parts are links but for `own`, which are copies to change;
    index: changed keys of model_index.json."""
    folder.mkdir(parents=True)
    for part in hub.PARTS:
        if part in own:
            shutil.copytree(POCKET / part, folder / part)
        else:
            (folder / part).symlink_to(POCKET / part)
    top = json.loads((POCKET / "model_index.json").read_text()) | index
    (folder / "model_index.json").write_text(json.dumps(top))
    return folder


def pocket_with_unet(folder: Path, *saved: tuple[UNet2DConditionModel, dict]) -> Path:
    """The pocket model with another UNet, saved by diffusers once for each (unet, options)."""
    pocket_with(folder)
    (folder / "unet").unlink()
    for unet, options in saved:
        unet.save_pretrained(folder / "unet", **options)
    return folder


# ---- prompts -------------------------------------------------------------------------------------


def test_prompt_embeddings_equal_the_pipelines(text):
    context, pooled = model.encode_prompts(PROMPTS, text)
    want, _, want_pooled, _ = load_pipe(POCKET).encode_prompt(PROMPTS, device=CPU)
    assert context.shape == (5, 32, 224) and pooled.shape == (5, 128)
    assert context.dtype == pooled.dtype == torch.float32
    assert torch.equal(context, want) and torch.equal(pooled, want_pooled)
    assert not torch.equal(context[0], context[1])


@pytest.mark.parametrize("zeros", [True, False])
def test_the_unconditional_embedding_is_what_the_pipeline_guides_away_from(tmp_path, zeros):
    folder = pocket_with(tmp_path / "m", force_zeros_for_empty_prompt=zeros)
    context, pooled = model.encode_unconditional(model.load_text_encoders(str(folder), CPU))
    _, want, _, want_pooled = load_pipe(folder).encode_prompt(
        "red apple", device=CPU, do_classifier_free_guidance=True
    )
    assert torch.equal(context, want) and torch.equal(pooled, want_pooled)
    assert bool((context == 0).all()) == zeros


def test_a_transformers_that_does_not_load_is_refused_without_a_remedy_that_changes_torch(
    monkeypatch,
):
    class Broken:
        utils = transformers.utils

        def __getattr__(self, name):
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setitem(sys.modules, "transformers", Broken())
    with pytest.raises(Refusal, match=r"nms does not.*pip uninstall -y torchvision") as refusal:
        model.load_text_encoders(str(POCKET), CPU)
    assert "upgrade" not in str(refusal.value)


def test_fp16_text_encoder_files_are_computed_in_fp32(tmp_path, text):
    folder = pocket_with(tmp_path / "m", "text_encoder", "text_encoder_2")
    for part in ("text_encoder", "text_encoder_2"):
        weights = load_file(folder / part / "model.safetensors")
        halves = {key: w.half() for key, w in weights.items()}
        save_file(halves, folder / part / "model.fp16.safetensors", {"format": "pt"})
        (folder / part / "model.safetensors").unlink()
    ours = model.load_text_encoders(str(folder), CPU, half=True)
    assert {p.dtype for e in ours.encoders for p in e.parameters()} == {torch.float32}
    context, _ = model.encode_prompts(PROMPTS, ours)
    want, _ = model.encode_prompts(PROMPTS, text)
    assert context.dtype == torch.float32
    torch.testing.assert_close(context, want, atol=0.02, rtol=0.02)


def test_a_prompt_is_counted_as_cut_when_its_tokens_exceed_the_tokenizers_length():
    tokenizer, _ = model.load_tokenizers(str(POCKET))
    length = tokenizer.model_max_length  # with begin and end
    word = "a"
    assert len(tokenizer(word).input_ids) == 3
    fits, too_long = " ".join([word] * (length - 2)), " ".join([word] * (length - 1))
    assert model.count_cut([fits], str(POCKET)) == 0
    assert model.count_cut([too_long], str(POCKET)) == 1
    assert model.count_cut(["", fits, too_long, too_long], str(POCKET)) == 2
    assert model.count_cut([], str(POCKET)) == 0


# ---- pictures ------------------------------------------------------------------------------------


def test_latents_are_the_vaes_posterior_mean_and_std(vae):
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = model.encode_images(pixels, vae)
    reference = AutoencoderKL.from_pretrained(POCKET / "vae", torch_dtype=torch.float32).eval()
    with torch.no_grad():
        posterior = reference.encode(pixels).latent_dist
    assert mean.shape == std.shape == (2, 4, 8, 12)
    assert torch.equal(mean, posterior.mean) and torch.equal(std, posterior.std)


def test_mean_and_std_give_back_the_vaes_own_sample(vae):
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = model.encode_images(pixels, vae)
    with torch.no_grad():
        sample = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(7))
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(7))
    assert torch.equal(mean + std * eps, sample)


def test_half_precision_pictures_are_still_encoded_in_fp32(vae):
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).half()
    mean, std = model.encode_images(pixels, vae)
    assert mean.dtype == std.dtype == torch.float32
    assert next(vae.parameters()).dtype == torch.float32


def test_latent_scaling_is_the_vae_configs(tmp_path):
    config = json.loads((POCKET / "vae" / "config.json").read_text())
    assert model.latent_scaling(str(POCKET)) == (config["scaling_factor"], 0.0)
    folder = pocket_with(tmp_path / "m", "vae")
    (folder / "vae" / "config.json").write_text(
        json.dumps(config | {"scaling_factor": 0.36, "shift_factor": 0.12})
    )
    assert model.latent_scaling(str(folder)) == (0.36, 0.12)


def test_time_ids_are_the_pipelines_and_fp32():
    ours = model.add_time_ids((1365, 683), (3, 85), (512, 768))
    assert ours.tolist() == [1365.0, 683.0, 3.0, 85.0, 512.0, 768.0]
    pipe = load_pipe(POCKET)
    theirs = pipe._get_add_time_ids(
        (1365, 683), (3, 85), (512, 768), torch.float32, pipe.text_encoder_2.config.projection_dim
    )
    assert torch.equal(ours, theirs[0]) and ours.dtype == torch.float32


def test_time_ids_reach_their_embedding_unrounded_in_a_bf16_unet():
    unet, batch = make_unet().bfloat16(), make_batch()
    batch["time_ids"] = torch.tensor([[1365.0, 683, 0, 171, 512, 512]] * 2)
    seen = []
    unet.add_time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    answer = model.predict(unet, torch.randn(2, 4, 8, 8), batch)
    assert torch.equal(seen[0].double().flatten(), batch["time_ids"].double().flatten())
    assert answer.dtype == torch.float32


# ---- noise ---------------------------------------------------------------------------------------

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS = {
    "SDXL base": json.loads((SDXL / "scheduler" / "scheduler_config.json").read_text()),
    "pocket": json.loads((POCKET / "scheduler" / "scheduler_config.json").read_text()),
    "scaled_linear": SCALED,
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "defaults": {},
    "500 steps": {"num_train_timesteps": 500} | SCALED,
    "zero SNR": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"} | SCALED,
}


def schedule_of(folder: Path, config: dict) -> model.NoiseSchedule:
    pocket_with(folder, "scheduler")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return model.load_noise_schedule(str(folder), CPU)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_alphas_cumprod_equal_ddpm_schedulers_to_the_bit(tmp_path, name):
    ours = schedule_of(tmp_path / "m", SCHEDULERS[name])
    theirs = DDPMScheduler.from_config(SCHEDULERS[name])
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert ours.prediction_type == theirs.config.prediction_type


def test_zero_terminal_snr_ends_in_pure_noise(tmp_path):
    schedule = schedule_of(tmp_path / "m", SCHEDULERS["zero SNR"])
    plain = schedule_of(tmp_path / "plain", SCALED)
    assert schedule.alphas_cumprod[-1] == 0 < plain.alphas_cumprod[-1]
    torch.testing.assert_close(schedule.alphas_cumprod[0], plain.alphas_cumprod[0])
    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.add_noise(x0, noise, torch.tensor([999]), schedule), noise)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["SDXL base", "linear", "zero SNR"])
def test_noising_and_target_equal_ddpm_schedulers_to_the_bit(tmp_path, name, prediction_type):
    config = SCHEDULERS[name] | {"prediction_type": prediction_type}
    schedule, ddpm = schedule_of(tmp_path / "m", config), DDPMScheduler.from_config(config)
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 64, 4, 8, 8, generator=g)
    t = torch.cat([torch.tensor([0, 999]), torch.randint(0, 1000, (62,), generator=g)])
    assert torch.equal(model.add_noise(x0, noise, t, schedule), ddpm.add_noise(x0, noise, t))
    target = noise if prediction_type == "epsilon" else ddpm.get_velocity(x0, noise, t)
    assert torch.equal(model.training_target(x0, noise, t, schedule), target)


@pytest.mark.parametrize(
    "change",
    [
        {"prediction_type": "sample"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.0001, 0.01, 0.02]},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_schedule_that_would_be_misread_is_refused(tmp_path, change):
    with pytest.raises(Refusal, match=next(iter(change))):
        schedule_of(tmp_path / "m", SCALED | change)


# ---- the UNet ------------------------------------------------------------------------------------

LAYOUTS = {
    "plain": {},
    "fp16 variant": {"variant": "fp16"},
    "sharded": {"max_shard_size": "200KB"},
    "sharded fp16 variant": {"variant": "fp16", "max_shard_size": "200KB"},
}


def assert_same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    mine, want = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == want.keys()
    wrong = [key for key in want if not torch.equal(mine[key], want[key])]
    assert not wrong and {w.dtype for w in mine.values()} == {w.dtype for w in want.values()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_unet_equals_from_pretrained_in_every_tensor(tmp_path, layout):
    options = LAYOUTS[layout]
    saved = make_unet(3).half() if "variant" in options else make_unet(3)
    folder = pocket_with_unet(tmp_path / "m", (saved, options))
    shards = len(list((folder / "unet").glob("*.safetensors")))
    assert shards > 2 if "max_shard_size" in options else shards == 1
    for dtype in (torch.float32, torch.float16):
        theirs = UNet2DConditionModel.from_pretrained(
            folder / "unet", variant=options.get("variant"), torch_dtype=dtype
        )
        ours = model.load_unet(str(folder), CPU, dtype)
        assert_same_weights(ours, theirs)
        assert not any(p.is_meta or p.requires_grad for p in ours.parameters())
        assert not any(b.is_meta for b in ours.buffers())


def test_load_unet_equals_from_pretrained_on_the_pocket_and_answers_the_same():
    ours = model.load_unet(str(POCKET), CPU, torch.float32)
    theirs = UNet2DConditionModel.from_pretrained(POCKET / "unet", torch_dtype=torch.float32)
    assert_same_weights(ours, theirs)
    batch = make_batch() | {"context": torch.randn(2, 32, 224), "pooled": torch.randn(2, 128)}
    x_t = torch.randn(2, 4, 16, 16)
    condition = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
    with torch.no_grad():
        answer = model.predict(ours, x_t, batch)
        want = theirs(x_t, batch["t"], batch["context"], added_cond_kwargs=condition).sample
    assert torch.equal(answer, want)


@pytest.mark.parametrize("shard", [{}, {"max_shard_size": "200KB"}], ids=["whole", "sharded"])
def test_the_fp16_variant_is_read_for_half_precision_and_the_full_file_for_fp32(tmp_path, shard):
    full, variant = make_unet(1), make_unet(2).half()
    folder = pocket_with_unet(tmp_path / "m", (full, shard), (variant, {"variant": "fp16"} | shard))
    read = model.load_unet(str(folder), CPU, torch.float32).conv_in.weight
    assert torch.equal(read, full.conv_in.weight)
    for dtype in (torch.float16, torch.bfloat16):
        read = model.load_unet(str(folder), CPU, dtype).conv_in.weight
        assert torch.equal(read, variant.conv_in.weight.to(dtype))


def test_the_vae_is_read_from_its_full_file_where_there_is_a_variant_too(tmp_path, vae):
    folder = pocket_with(tmp_path / "m", "vae")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    zeros = {key: torch.zeros_like(w).half() for key, w in load_file(file).items()}
    save_file(zeros, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert_same_weights(model.load_vae(str(folder), CPU), vae)
    file.unlink()  # and the variant, in fp32, where it is all there is
    halves = model.load_vae(str(folder), CPU)
    assert halves.dtype == torch.float32 and not halves.encoder.conv_in.weight.any()


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
    hub.hub_files.cache_clear()
    yield
    hub.hub_files.cache_clear()


def downloads(monkeypatch, files: list[str], part: str, half: bool) -> set[str]:
    """What fetch() would bring from a Hub repository that holds `files`."""
    asked = []

    def snapshot_download(name, allow_patterns=None, **_):
        assert name == HUB_NAME
        asked.append(allow_patterns)
        return str(POCKET)

    monkeypatch.setattr(HfApi, "list_repo_files", lambda *_, **__: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    hub.hub_files.cache_clear()
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


def test_what_was_downloaded_serves_without_a_network(empty_hub_cache, text):
    hub_cache(empty_hub_cache)
    assert hub.fetch(HUB_NAME, "unet").is_relative_to(empty_hub_cache)
    unet = model.load_unet(HUB_NAME, CPU, torch.float32)
    assert_same_weights(unet, model.load_unet(str(POCKET), CPU, torch.float32))
    context, _ = model.encode_prompts(PROMPTS, model.load_text_encoders(HUB_NAME, CPU))
    assert torch.equal(context, model.encode_prompts(PROMPTS, text)[0])
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
    assert str(tmp_path) in str(refusal.value) and "from_single_file" in str(refusal.value)


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


# ---- device and precision ------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """Makes torch say that the GPU is of this capability."""

    def pretend(*capability: int) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)  # as on a T4
        return torch.device("cuda")

    return pretend


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((8, 9), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_the_compute_capability_chooses_the_dtype(gpu, capability, dtype):
    chosen, reason = model.choose_dtype("auto", gpu(*capability))
    assert chosen == dtype and f"sm_{capability[0]}{capability[1]}" in reason


def test_a_cpu_computes_in_fp32():
    assert model.choose_dtype("auto", CPU)[0] == torch.float32


@pytest.mark.parametrize("wanted", ["fp32", "fp16", "bf16"])
def test_a_dtype_that_was_asked_for_is_taken(gpu, wanted):
    assert model.choose_dtype(wanted, gpu(9, 0))[0] == model.DTYPES[wanted]


def test_bf16_is_refused_where_it_would_be_emulated(gpu):
    with pytest.raises(Refusal, match=r"bf16 on sm_75.*--mixed-precision fp16"):
        model.choose_dtype("bf16", gpu(7, 5))


def test_devices():
    assert model.check_device("auto") == model.check_device("cpu") == CPU
    with pytest.raises(Refusal, match=r"cuda.*--device cpu"):
        model.check_device("cuda")


def test_a_device_that_torch_does_not_know_is_refused():
    with pytest.raises(Refusal, match="gpu"):
        model.check_device("gpu")


def test_host_memory_sees_what_the_block_took_and_gave_back():
    size = 200 * 2**20
    with model.HostMemory() as before:
        time.sleep(0.05)
    with model.HostMemory() as host:
        with contextlib.closing(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)) as block:
            for page in range(0, size, mmap.PAGESIZE):
                block[page] = 1
            time.sleep(0.1)
        time.sleep(0.05)
    assert 190 < (host.own - before.own) * 1024 < 260


def test_host_memory_reports_mapped_files_apart(tmp_path):
    size = 200 * 2**20
    with open(tmp_path / "weights", "wb") as file:
        file.truncate(size)
    with model.HostMemory() as before:
        time.sleep(0.05)
    with model.HostMemory() as host, open(tmp_path / "weights", "rb") as file:
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as block:
            assert sum(block[page] for page in range(0, size, mmap.PAGESIZE)) == 0
            time.sleep(0.1)
    assert (host.mapped - before.mapped) * 1024 > 190
    assert (host.own - before.own) * 1024 < 50


# ---- attention and checkpointing -----------------------------------------------------------------


def test_sdpa_is_what_diffusers_does_by_itself(unet):
    before = dict(unet.attn_processors)
    assert model.use_attention(unet, "sdpa", CPU, torch.float32) == "SDPA"
    assert unet.attn_processors == before
    assert {type(p).__name__ for p in before.values()} == {"AttnProcessor2_0"}


def test_xformers_that_cannot_run_here_falls_back_with_its_reason(unet):
    before = dict(unet.attn_processors)
    said = model.use_attention(unet, "xformers", CPU, torch.float32)
    assert said.startswith("SDPA (xFormers is not usable here: ") and len(said) > 45
    assert unet.attn_processors == before


def test_xformers_that_is_installed_but_has_no_kernel_falls_back_too(unet, monkeypatch):
    def no_kernel(*_):
        raise NotImplementedError("No operator found for this input\n  query: shape=(1, 64, 2, 64)")

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = no_kernel
    package = types.ModuleType("xformers")
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    before = dict(unet.attn_processors)
    said = model.use_attention(unet, "xformers", CPU, torch.float32)
    assert said == "SDPA (xFormers is not usable here: No operator found for this input)"
    assert unet.attn_processors == before


def loss_and_gradient(checkpointed: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    unet, batch = make_unet().train(), make_batch()
    if checkpointed:
        model.use_gradient_checkpointing(unet)
    adapter = lora.inject(unet, lora.TARGETS, 4, 8.0, seed=1)
    g = torch.Generator().manual_seed(2)
    adapter.flat.data.copy_(torch.randn(adapter.flat.shape, generator=g) * 0.05)
    passes = []
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.norm1.register_forward_pre_hook(lambda *_: passes.append(1))
    loss = model.predict(unet, batch["noise"], batch).square().mean()
    loss.backward()
    return loss.detach(), adapter.flat.grad.clone(), len(passes)


def test_gradient_checkpointing_changes_neither_loss_nor_gradient():
    loss, gradient, passes = loss_and_gradient(False)
    again, checkpointed, twice = loss_and_gradient(True)
    assert torch.equal(loss, again)
    torch.testing.assert_close(checkpointed, gradient, atol=1e-7, rtol=1e-5)
    assert gradient.norm() > 0
    assert (passes, twice) == (1, 2)  # it did compute the block a second time


def test_the_loaded_unet_checkpoints_as_it_is():
    """Older diffusers checkpoint in train mode alone."""
    unet = model.load_unet(str(POCKET), CPU, torch.float32)
    model.use_gradient_checkpointing(unet)
    lora.inject(unet, lora.TARGETS, 4, 4.0, seed=0)
    passes = []
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.norm1.register_forward_pre_hook(lambda *_: passes.append(1))
    batch = make_batch(1) | {"context": torch.randn(1, 32, 224), "pooled": torch.randn(1, 128)}
    model.predict(unet, torch.randn(1, 4, 8, 8), batch).sum().backward()
    assert len(passes) == 2


# ---- all of it together --------------------------------------------------------------------------


def test_a_picture_survives_the_way_into_the_latents_and_back(vae):
    """Scaling, range and channel order are right: the VAE draws again what it was given."""
    image = (
        Image.open(POCKET.parent / "ink" / "american-football.png")
        .convert("RGB")
        .resize((128, 128))
    )
    pixels = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(128, 128, 3) / 127.5 - 1
    mean, _ = model.encode_images(pixels.permute(2, 0, 1)[None], vae)
    with torch.no_grad():
        drawn = vae.decode(mean).sample[0].permute(1, 2, 0)
    assert (drawn - pixels).abs().mean() < 0.1
