"""The loss is the one of diffusers' training script, on the same random numbers."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

import loop
import lora
import model
from conftest import POCKET, make_batch, make_unet

SDXL_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCALING = (0.13025, 0.0)
KINDS = ["epsilon", "v_prediction"]


pytestmark = pytest.mark.usefixtures("one_thread")


def ddpm_and_ours(prediction_type: str, **more) -> tuple[DDPMScheduler, model.NoiseSchedule]:
    ddpm = DDPMScheduler(prediction_type=prediction_type, **SDXL_BETAS, **more)
    return ddpm, model.NoiseSchedule(ddpm.alphas_cumprod.clone(), prediction_type)


def reference_loss(unet, batch, ddpm, scaling, snr_gamma) -> torch.Tensor:
    """diffusers' examples/text_to_image/train_text_to_image_lora_sdxl.py, for each example."""
    factor, shift = scaling
    latents = (batch["mean"] + batch["std"] * batch["eps"] - shift) * factor
    noise, timesteps = batch["noise"], batch["t"]
    noisy = ddpm.add_noise(latents, noise, timesteps)
    condition = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
    pred = unet(noisy, timesteps, batch["context"], added_cond_kwargs=condition).sample
    if ddpm.config.prediction_type == "epsilon":
        target = noise
    else:
        target = ddpm.get_velocity(latents, noise, timesteps)
    loss = F.mse_loss(pred.float(), target.float(), reduction="none").mean(dim=[1, 2, 3])
    if not snr_gamma:
        return loss
    snr = compute_snr(ddpm, timesteps)
    weights = torch.stack([snr, snr_gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    divisor = snr if ddpm.config.prediction_type == "epsilon" else snr + 1
    return loss * weights / divisor


def early_and_late(count: int = 6) -> dict[str, torch.Tensor]:
    """A batch with the first, the last, and timesteps on both sides of SNR 5."""
    batch = make_batch(count)
    batch["t"] = torch.tensor([0, 1, 150, 400, 800, 999])[:count]
    return batch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("snr_gamma", [0.0, 5.0, 1.0])
@pytest.mark.parametrize("scaling", [SCALING, (0.36, 0.12)], ids=["sdxl", "shifted"])
def test_loss_equals_diffusers_own(unet, kind, snr_gamma, scaling):
    ddpm, schedule = ddpm_and_ours(kind)
    batch = early_and_late()
    ours = loop.diffusion_loss(unet, batch, schedule, scaling, snr_gamma)
    theirs = reference_loss(unet, batch, ddpm, scaling, snr_gamma)
    assert ours.shape == (6,) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=0, rtol=2e-6)
    assert bool((ours > 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_to_the_answer_equals_diffusers_own(kind):
    ddpm, schedule = ddpm_and_ours(kind)
    gradients = []
    for loss, noising in ((loop.diffusion_loss, schedule), (reference_loss, ddpm)):
        unet = make_unet()
        unet.conv_out.weight.requires_grad_(True)
        loss(unet, early_and_late(), noising, SCALING, 5.0).mean().backward()
        gradients.append(unet.conv_out.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-5)
    assert gradients[0].norm() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_snr_weight_is_min_snr_gamma_over_snr(kind):
    ddpm, schedule = ddpm_and_ours(kind)
    t = torch.arange(1000)
    snr = compute_snr(ddpm, t).double()
    want = snr.clamp(max=5) / (snr if kind == "epsilon" else snr + 1)
    weight = model.snr_weight(t, schedule, 5.0)
    torch.testing.assert_close(weight.double(), want, atol=0, rtol=1e-5)
    assert weight.max() <= 1
    if kind == "epsilon":  # above gamma the weight is gamma / SNR, below it one
        assert torch.all(weight[snr < 4.999] == 1) and torch.all(weight[snr > 5.001] < 1)


def test_gamma_zero_weighs_nothing(unet):
    _, schedule = ddpm_and_ours("epsilon")
    plain = loop.diffusion_loss(unet, early_and_late(), schedule, SCALING)
    huge = loop.diffusion_loss(unet, early_and_late(), schedule, SCALING, 1e9)
    assert model.snr_weight(torch.arange(1000), schedule, 0.0) == 1.0
    torch.testing.assert_close(plain, huge)  # no SNR is above such a gamma


@pytest.mark.parametrize("snr_gamma", [0.0, 5.0])
def test_v_prediction_with_zero_terminal_snr_has_a_finite_loss_at_pure_noise(unet, snr_gamma):
    ddpm, schedule = ddpm_and_ours("v_prediction", rescale_betas_zero_snr=True)
    batch = early_and_late()
    ours = loop.diffusion_loss(unet, batch, schedule, SCALING, snr_gamma)
    assert schedule.alphas_cumprod[-1] == 0 and ours.isfinite().all()
    torch.testing.assert_close(ours, reference_loss(unet, batch, ddpm, SCALING, snr_gamma))


class Oracle(torch.nn.Module):
    """A UNet that knows what to answer."""

    def __init__(self, answer: torch.Tensor):
        super().__init__()
        self.answer, self.conv_in = answer, torch.nn.Conv2d(4, 4, 3)

    def forward(self, *_, **__):
        return (self.answer,)


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_answer_costs_nothing_and_one_off_costs_one(kind):
    ddpm, schedule = ddpm_and_ours(kind)
    batch = early_and_late()
    x0 = (batch["mean"] + batch["std"] * batch["eps"]) * SCALING[0]
    right = (
        batch["noise"] if kind == "epsilon" else ddpm.get_velocity(x0, batch["noise"], batch["t"])
    )
    loss = loop.diffusion_loss(Oracle(right), batch, schedule, SCALING)
    assert torch.equal(loss, torch.zeros(6))
    loss = loop.diffusion_loss(Oracle(right + 1), batch, schedule, SCALING)
    torch.testing.assert_close(loss, torch.ones(6), atol=1e-5, rtol=0)


def test_an_examples_loss_does_not_depend_on_its_neighbours(unet):
    _, schedule = ddpm_and_ours("epsilon")
    batch = early_and_late()
    together = loop.diffusion_loss(unet, batch, schedule, SCALING, 5.0)
    for i in range(6):
        alone = {key: value[i : i + 1] for key, value in batch.items()}
        loss = loop.diffusion_loss(unet, alone, schedule, SCALING, 5.0)
        torch.testing.assert_close(loss, together[i : i + 1], atol=0, rtol=1e-5)


def test_the_loss_is_fp32_though_the_unet_is_bf16():
    _, schedule = ddpm_and_ours("epsilon")
    loss = loop.diffusion_loss(make_unet().bfloat16(), early_and_late(), schedule, SCALING)
    full = loop.diffusion_loss(make_unet(), early_and_late(), schedule, SCALING)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, full, atol=0, rtol=0.02)
    assert not torch.equal(loss, loss.bfloat16().float())


@pytest.mark.slow
def test_the_small_model_overfits_one_batch():
    """The pocket model's adapter learns the noise of two random latents by heart."""
    cpu = torch.device("cpu")
    unet = model.load_unet(str(POCKET), cpu, torch.float32)
    lora.inject(unet, rank=16, alpha=32)
    prompts = ["red apple", "rocket"]
    context, pooled = model.encode_prompts(prompts, model.load_text_encoders(str(POCKET), cpu))
    generator = torch.Generator().manual_seed(0)
    mean, eps, noise = torch.randn(3, 2, 4, 8, 8, generator=generator)
    rows = {"mean": mean, "std": torch.zeros_like(mean), "eps": eps, "noise": noise}
    rows |= {"t": torch.tensor([300, 700]), "context": context, "pooled": pooled}
    rows["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    schedule = model.load_noise_schedule(str(POCKET), cpu)
    optimizer = torch.optim.AdamW(lora.trained(unet).values(), lr=4e-3)
    losses = []
    for _ in range(40):
        loss = loop.diffusion_loss(unet, rows, schedule, model.latent_scaling(str(POCKET))).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
