"""SDXL's parts are diffusers' own to the bit: prompts, latents, weights, schedule; and each refusal
of model.py says what was found."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

import lora
import model
from conftest import POCKET, SDXL, make_batch, make_unet
from inputs import vetting
from inputs.files import Refusal
from made import assert_same_weights, model_with, model_with_unet

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


# ---- prompts -------------------------------------------------------------------------------------


def test_prompt_embeddings_equal_the_pipelines(text):
    context, pooled = model.encode_prompts(PROMPTS, text)
    want, _, want_pooled, _ = load_pipe(POCKET).encode_prompt(PROMPTS, device=CPU)
    assert context.shape == (5, 32, 224) and pooled.shape == (5, 128)
    assert context.dtype == pooled.dtype == torch.float32
    assert torch.equal(context, want) and torch.equal(pooled, want_pooled)
    assert not torch.equal(context[0], context[1])


def by_hand(prompt: str, text: model.TextEncoders, chunks: int) -> tuple:
    """Written from the definition, one chunk at a time: (T, D) and (P,)."""
    contexts, pooled = [], []
    for chunk in range(chunks):
        states = []
        for tokenizer, encoder in zip(text.tokenizers, text.encoders, strict=True):
            length = tokenizer.model_max_length
            words = tokenizer.tokenize(prompt)[chunk * (length - 2) : (chunk + 1) * (length - 2)]
            row = [tokenizer.bos_token, *words, tokenizer.eos_token]
            row += [tokenizer.pad_token] * (length - len(row))
            with torch.no_grad():
                ids = torch.tensor([tokenizer.convert_tokens_to_ids(row)])
                answer = encoder(ids, output_hidden_states=True)
            states.append(answer.hidden_states[-2][0])
        contexts.append(torch.cat(states, dim=-1))
        pooled.append(answer.text_embeds[0])
    return torch.cat(contexts), pooled[0]


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_long_prompts_are_encoded_in_chunks_and_pooled_is_the_firsts(text, chunks):
    longer = dataclasses.replace(text, chunks=chunks)
    prompts = [*PROMPTS, "a rocket " * 14, "a cat, " * 26 + "a red house"]
    context, pooled = model.encode_prompts(prompts, longer)
    assert context.shape == (7, 32 * chunks, 224) and pooled.shape == (7, 128)
    for i, prompt in enumerate(prompts):
        want, first = by_hand(prompt, text, chunks)
        torch.testing.assert_close(context[i], want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pooled[i], first, atol=1e-4, rtol=1e-4)
        alone, _ = model.encode_prompts([prompt], longer)
        torch.testing.assert_close(context[i], alone[0], atol=1e-4, rtol=1e-4)
    away = model.encode_unconditional(longer)
    assert [each.shape for each in away] == [(1, 32 * chunks, 224), (1, 128)]
    assert not any(each.any() for each in away)  # as the pocket model says


@pytest.mark.parametrize("zeros", [True, False])
def test_the_unconditional_embedding_is_what_the_pipeline_guides_away_from(tmp_path, zeros):
    folder = model_with(tmp_path / "m", of=POCKET, force_zeros_for_empty_prompt=zeros)
    context, pooled = model.encode_unconditional(model.load_text_encoders(str(folder), CPU))
    _, want, _, want_pooled = load_pipe(folder).encode_prompt(
        "red apple", device=CPU, do_classifier_free_guidance=True
    )
    assert torch.equal(context, want) and torch.equal(pooled, want_pooled)
    assert bool((context == 0).all()) == zeros


def test_fp16_text_encoder_files_are_computed_in_fp32(tmp_path, text):
    folder = model_with(tmp_path / "m", "text_encoder", "text_encoder_2", of=POCKET)
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
    folder = model_with(tmp_path / "m", "vae")
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
    "the fewest entries": {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.01},
    "500 steps": {"num_train_timesteps": 500} | SCALED,
    "zero SNR": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"} | SCALED,
}


def schedule_of(folder: Path, config: dict) -> model.NoiseSchedule:
    model_with(folder, "scheduler")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return model.load_noise_schedule(str(folder), CPU)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_alphas_cumprod_equal_ddpm_schedulers_to_the_bit(tmp_path, name):
    ours = schedule_of(tmp_path / "m", SCHEDULERS[name])
    theirs = DDPMScheduler.from_config(SCHEDULERS[name])
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert ours.prediction_type == theirs.config.prediction_type


def test_betas_that_are_not_in_the_file_are_refused_all_at_once(tmp_path):
    """diffusers' classes have each their own defaults, and flow matching and EDM have none."""
    with pytest.raises(Refusal, match=r"beta_schedule None; .* beta_start None and .* beta_end"):
        schedule_of(tmp_path / "m", {"_class_name": "EulerDiscreteScheduler"})


def test_what_the_unet_predicts_is_as_asked_for_else_as_the_file_says(tmp_path):
    for i, (said, asked, want) in enumerate(
        (
            ({}, "auto", "epsilon"),
            ({"prediction_type": "v_prediction"}, "auto", "v_prediction"),
            ({}, "v_prediction", "v_prediction"),
            ({"prediction_type": "v_prediction"}, "epsilon", "epsilon"),
        )
    ):
        schedule_of(tmp_path / str(i), SCALED | said)
        schedule = model.load_noise_schedule(str(tmp_path / str(i)), CPU, asked)
        assert schedule.prediction_type == want
        assert (
            vetting.load_sampler(str(tmp_path / str(i)), "", 3, asked).config.prediction_type
            == want
        )


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
        {"rescale_betas_zero_snr": "no"},
        *({entry: None} for entry in SCALED),
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_unet_equals_from_pretrained_in_every_tensor(tmp_path, layout):
    options = LAYOUTS[layout]
    saved = make_unet(3).half() if "variant" in options else make_unet(3)
    folder = model_with_unet(tmp_path / "m", (saved, options))
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
    folder = model_with_unet(tmp_path / "m", (full, shard), (variant, {"variant": "fp16"} | shard))
    read = model.load_unet(str(folder), CPU, torch.float32).conv_in.weight
    assert torch.equal(read, full.conv_in.weight)
    for dtype in (torch.float16, torch.bfloat16):
        read = model.load_unet(str(folder), CPU, dtype).conv_in.weight
        assert torch.equal(read, variant.conv_in.weight.to(dtype))


def test_the_vae_is_read_from_its_full_file_where_there_is_a_variant_too(tmp_path, vae):
    folder = model_with(tmp_path / "m", "vae", of=POCKET)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    zeros = {key: torch.zeros_like(w).half() for key, w in load_file(file).items()}
    save_file(zeros, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert_same_weights(model.load_vae(str(folder), CPU), vae)
    file.unlink()  # and the variant, in fp32, where it is all there is
    halves = model.load_vae(str(folder), CPU)
    assert halves.dtype == torch.float32 and not halves.encoder.conv_in.weight.any()


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
    matrices = list(adapter.matrices().values())
    for matrix in matrices:
        matrix.data.copy_(torch.randn(matrix.shape, generator=g) * 0.05)
    passes = []
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.norm1.register_forward_pre_hook(lambda *_: passes.append(1))
    loss = model.predict(unet, batch["noise"], batch).square().mean()
    loss.backward()
    return loss.detach(), torch.cat([m.grad.flatten() for m in matrices]), len(passes)


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
