"""Models from strangers: what their files say is looked at before anything is built from it."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import model
from inputs import hub, vetting
from inputs.files import Refusal
from keep import identity
from made import model_with
from sentences import refused


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
        ("scheduler/scheduler_config.json", "num_train_timesteps", -1),
        ("scheduler/scheduler_config.json", "_class_name", "EDMEulerScheduler"),
        ("scheduler/scheduler_config.json", "_class_name", "FlowMatchEulerDiscreteScheduler"),
        ("scheduler/scheduler_config.json", "use_flow_sigmas", True),
        ("scheduler/scheduler_config.json", "timestep_type", "continuous"),
        ("model_index.json", "scheduler", ["diffusers", "EDMEulerScheduler"]),
        ("model_index.json", "scheduler", {"a": "FlowMatchHeunDiscreteScheduler"}),
        ("vae/config.json", "latents_mean", [0.1, 0.2, 0.3, 0.4]),
        ("vae/config.json", "latents_std", [1.0, 1.0, 1.0, 2.0]),
        ("scheduler/scheduler_config.json", "beta_start", float("nan")),
        ("scheduler/scheduler_config.json", "beta_end", "0.012"),
        ("unet/config.json", "layers_per_block", 10**9),
        ("unet/config.json", "addition_time_embed_dim", 3000),
        ("unet/config.json", "class_embed_type", "identity"),
        ("unet/config.json", "block_out_channels", [10**9] * 3),
        *(("unet/config.json", "sample_size", size) for size in (None, [64, 64], 0, 10**6, 64.0)),
        ("vae/config.json", "latent_channels", 16),
        ("text_encoder/config.json", "num_hidden_layers", 10**9),
        ("text_encoder_2/config.json", "num_hidden_layers", 0),
        ("text_encoder_2/config.json", "num_attention_heads", -1),
        ("tokenizer/tokenizer_config.json", "model_max_length", 10**30),
        ("vae/config.json", "scaling_factor", None),
        ("vae/config.json", "scaling_factor", 0),
        ("model_index.json", "force_zeros_for_empty_prompt", "no"),
        ("model_index.json", "_class_name", 3),
        ("model_index.json", "scheduler", ["diffusers", "DiffusionPipeline"]),
        ("model_index.json", "scheduler", ["diffusers", "logging"]),
    ],
)
def test_a_model_whose_files_say_what_cannot_be_is_refused_before_it_is_built(
    tmp_path, part, key, value
):
    model_with(tmp_path / "m", part.split("/")[0])
    name, path, cpu = str(tmp_path / "m"), tmp_path / "m" / part, torch.device("cpu")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    acts = {
        "scheduler": lambda: model.load_noise_schedule(name, cpu),
        "unet": lambda: model.load_unet(name, cpu, torch.float32),
        "vae": lambda: (model.latent_scaling(name), model.load_vae(name, cpu)),
        "model_index.json": lambda: (
            model.load_text_encoders(name, cpu),
            vetting.load_sampler(name),
        ),
    }
    refused(acts.get(part.split("/")[0], lambda: model.load_text_encoders(name, cpu)))


def test_all_that_cannot_be_in_a_file_is_named_at_once(tmp_path):
    changes = {"prediction_type": "flow", "beta_end": 2, "trained_betas": [0.1]}
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps({"beta_start": 0.1} | changes))
    allowed = ("epsilon or v_prediction", "between 0 and 1", "null")
    said = [f"{k} {v!r}; expected {a}" for (k, v), a in zip(changes.items(), allowed, strict=True)]
    refused(lambda: hub.read_config(path), *said)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 10**5, b'{"a": ' + b"9" * 9999])
def test_a_configuration_that_is_no_json_object_is_refused(tmp_path, content):
    (tmp_path / "model_index.json").write_bytes(content)
    refused(lambda: hub.fetch(str(tmp_path), ""), "model_index.json is no configuration")


def copied(tmp_path, part: str) -> tuple[Path, Path]:
    """The pocket model with that part its own, and the part's weights."""
    name = model_with(tmp_path / "m", part)
    return name, next((name / part).glob("*.safetensors"))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_no_numbers_with_a_point_are_refused(tmp_path, part):
    name, path = copied(tmp_path, part)
    save_file({k: v.to(torch.int8) for k, v in load_file(path).items()}, path)
    with pytest.raises(Refusal, match=r"has \d+ weights such as .* in I8; expected F32"):
        identity.of_base(str(name), False)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pipe_in_the_place_of_weights_is_not_waited_for(tmp_path, part):
    name, path = copied(tmp_path, part)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(Refusal, match=r"has no \.safetensors file"):
        identity.of_base(str(name), False)


def test_two_tokenizers_of_two_lengths_are_refused(tmp_path):
    name = model_with(tmp_path / "m", "tokenizer")
    path = name / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 5}))
    with pytest.raises(Refusal, match=r"a model_max_length of 5 and .* 32 places"):
        model.load_text_encoders(str(name), torch.device("cpu"))


@pytest.mark.parametrize("sampler", [[], None, "EulerDiscreteScheduler"])
def test_a_sampler_that_is_named_oddly_is_refused_at_the_start(tmp_path, sampler):
    name = model_with(tmp_path / "m", scheduler=sampler)
    with pytest.raises(Refusal, match=r"model_index\.json has scheduler"):
        hub.fetch(str(name), "unet")
