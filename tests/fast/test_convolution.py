"""The convolution blocks in NHWC and their norms against diffusers' modules, as far as a machine
without a GPU can tell; benchmarks/norms.py compares the kernels themselves.
"""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D

import lora
import model
from adapters import kinds
from conftest import make_batch, make_unet
from fast import convolution, groupnorm, kernels, layers
from fast.flat import Flat

CL = {"memory_format": torch.channels_last}


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=rng(seed))


def block(wide: int = 16, out: int = 8, **more) -> ResnetBlock2D:
    """One with random numbers everywhere, which a fresh norm has not."""
    made = ResnetBlock2D(in_channels=wide, out_channels=out, temb_channels=12, groups=8, **more)
    for i, each in enumerate(made.parameters()):
        each.data = draw(*each.shape, seed=i) / each[0].numel() ** 0.5
    return made.requires_grad_(False)


def norm_of(channels: int, dtype: torch.dtype) -> torch.nn.GroupNorm:
    norm = torch.nn.GroupNorm(8, channels, eps=1e-5)
    norm.weight.data, norm.bias.data = draw(channels, seed=7), draw(channels, seed=8)
    return norm.to(dtype).requires_grad_(False)


# ---- the norm ------------------------------------------------------------------------------------


WAYS = [(a, d) for a in ("sm_75", "sm_80", "sm_90") for d in kernels.NUMBERS]
T4 = ("sm_75", torch.float16)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [T4, *(pytest.param(*way, marks=pytest.mark.slow) for way in WAYS if way != T4)],
)
def test_the_norm_compiles_without_a_gpu(architecture, dtype):
    pytest.importorskip("cuda.bindings")
    code = kernels.compiled(groupnorm.SOURCE, dtype, architecture)
    names = (b"look_forward", b"answer_forward", b"look_backward", b"answer_backward")
    assert code.startswith(b"\x7fELF") and all(name in code for name in names)


@pytest.mark.parametrize("dtype", [torch.float64, *kernels.NUMBERS])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("full", [True, False])
def test_the_norm_is_torchs_and_its_gradient(dtype, mean, full):
    """full: with shift, SiLU and residual. Sides are odd; torch's own in double precision."""
    x, grad, residual = (draw(2, 24, 5, 7, seed=i).to(dtype) for i in range(3))
    x = (x.double() + mean).to(dtype)
    norm, shift = norm_of(24, dtype), draw(2, 24, seed=9).to(dtype) if full else None
    exact = x.double().requires_grad_()
    shifted = exact + shift.double()[:, :, None, None] if full else exact
    want = F.group_norm(shifted, 8, norm.weight.double(), norm.bias.double(), 1e-5)
    want = F.silu(want) if full else want
    (want_dx,) = torch.autograd.grad(want, exact, grad.double())
    want_dx = want_dx + residual.double() if full else want_dx
    x, grad, residual = (each.contiguous(**CL) for each in (x, grad, residual))
    y, moments = groupnorm.forward(x, norm, shift, full)
    dx = groupnorm.backward(grad, x, norm, shift, moments, residual if full else None, full)
    assert y.dtype == dx.dtype == dtype and y.is_contiguous(**CL) and dx.is_contiguous(**CL)
    # of x - mean, which is rounded to fp32
    much = max(4 * torch.finfo(dtype).eps, (20 + mean) * 1.2e-7 if dtype != torch.float64 else 1e-9)
    for found, wanted in ((y, want), (dx, want_dx)):
        torch.testing.assert_close(found.double(), wanted.detach(), rtol=much, atol=8 * much)


def test_the_norms_operators_tell_their_shapes_without_numbers():
    x = torch.empty(2, 16, 6, 4, dtype=torch.float16, device="meta").contiguous(**CL)
    norm = torch.nn.GroupNorm(8, 16, device="meta", dtype=torch.float16)
    y, moments = groupnorm.forward(x, norm, None, True)
    dx = groupnorm.backward(y, x, norm, None, moments, y, True)
    for each in (y, dx):
        assert each.is_meta and each.shape == x.shape and each.stride() == x.stride()
        assert each.dtype == x.dtype
    assert moments.shape == (2, 8, 2) and moments.dtype == torch.float32


# ---- the block -----------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [8, 16], ids=["with a shortcut", "without"])
def test_the_block_passes_a_numerical_gradient_check_and_keeps_two_pictures(out, one_thread):
    """Its input, the first convolution's answer, the shift and two numbers a group."""
    plain, kept = block(out=out), []
    x, temb = draw(2, 16, 2, 3, seed=1).contiguous(**CL).requires_grad_(), draw(2, 12)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        answer = convolution.resnet(plain, x, temb)
    moments = [(2, 8, 2)] * 2
    assert [each.shape for each in kept] == [(2, 16, 2, 3), (2, out, 2, 3), (2, out), *moments]
    assert kept[0].data_ptr() == x.data_ptr() and answer.is_contiguous(**CL)
    torch.testing.assert_close(answer, plain(x, temb))
    plain, x, temb = plain.double(), x.detach().double().requires_grad_(), temb.double()
    assert torch.autograd.gradcheck(lambda x: convolution.resnet(plain, x, temb), (x,))


@pytest.mark.parametrize("bare", [True, False])
def test_a_timestep_that_is_trained_gets_its_gradient_from_the_definition(bare):
    plain, temb = block(), draw(2, 12).requires_grad_()
    answer = convolution.resnet(plain, draw(2, 16, 3, 5), temb, bare)
    (grad,) = torch.autograd.grad(answer.square().sum(), temb)
    assert grad.norm() > 0


def change(unet, how) -> bool:
    """Whether the convolutions are still fused after `how` has been done to one block."""
    how(unet.mid_block.resnets[0])
    return bool(convolution.fusible(unet))


CHANGES = {
    "nothing": lambda b: None,
    "scaled": lambda b: setattr(b, "output_scale_factor", 2.0),
    "dropout": lambda b: setattr(b.dropout, "p", 0.1),
    "another activation": lambda b: setattr(b, "nonlinearity", torch.nn.GELU()),
    "a trained norm": lambda b: b.norm1.weight.requires_grad_(),
    "another trained norm": lambda b: b.norm2.weight.requires_grad_(),
    "a trained timestep": lambda b: b.time_emb_proj.weight.requires_grad_(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_only_blocks_that_are_sdxls_are_fused(name):
    assert change(make_unet(), CHANGES[name]) == (name == "nothing")


def frozen_adapter() -> kinds.LoRAConv2d:
    made = kinds.LoRAConv2d(torch.nn.Conv2d(8, 8, 3, padding=1), 2, 4.0, rng(3))
    made.lora_B.data = draw(8, 2, 1, 1)
    return made.requires_grad_(False)


OTHERS = {
    "of another size": lambda: torch.nn.Conv2d(8, 8, 5, padding=2).requires_grad_(False),
    "adapted by what is not trained": frozen_adapter,
    "trained": lambda: torch.nn.Conv2d(8, 8, 3, padding=1),
    "of another class": lambda: type("Own", (torch.nn.Conv2d,), {})(8, 8, 3, padding=1),
}


@pytest.mark.parametrize("place", ["conv2", "conv_shortcut"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_are_called_as_they_are(name, place, one_thread):
    plain = block(wide=8, out=8, use_in_shortcut=True)
    setattr(plain, place, OTHERS[name]())
    fused, found = copy.deepcopy(plain), []
    convolution.fuse(fused)
    for each in (plain, fused):
        x = draw(2, 8, 5, 7, seed=1).requires_grad_()
        y = each(x, draw(2, 12))
        learning = [x, *(p for p in each.parameters() if p.requires_grad)]
        found.append([y, *torch.autograd.grad(y.square().sum(), learning)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["conv1.weight", "conv1.bias", "conv2.bias", "conv_shortcut.bias"])
def test_a_trained_convolution_has_its_gradient_in_the_one_vector(name, monkeypatch, one_thread):
    """As on a GPU: there its block was taken for one of which nothing is trained."""
    found = []
    for device in ("cpu", "meta"):
        unet = make_unet()
        adapter = lora.inject(unet, rank=4, alpha=6)
        unet.get_parameter(f"up_blocks.0.resnets.0.{name}").requires_grad_()
        with monkeypatch.context() as patch:
            patch.setattr(type(unet), "device", torch.device(device))
            assert layers.disagreement(unet) == ""
            assert ("convolution blocks" in layers.wrap(unet)) == (device == "meta")
        vector = Flat(unet, lora.trained(unet))
        for each in adapter.layers.values():
            each.lora_B.data.add_(0.1)

        def step(run, batch):
            model.predict(run.unet, batch["noise"], batch).square().sum().backward()

        vector.micro_step(step)(types.SimpleNamespace(unet=unet), make_batch(2))
        found.append(vector.vector.grad)
        at, size = vector.spans[f"up_blocks.0.resnets.0.{name}"], 8
        assert vector.vector.grad[at:][:size].norm() > 0
    assert (found[1] - found[0]).norm() < 1e-5 * found[0].norm()


@pytest.mark.parametrize(
    "name", ["conv_norm_out", "mid_block.attentions.0.norm", "time_embedding", "add_embedding"]
)
def test_a_norm_or_timestep_that_is_trained_is_left_alone(name):
    unet = make_unet()
    assert convolution.fusible(unet)
    next(unet.get_submodule(name).parameters()).requires_grad_()
    assert not convolution.fusible(unet)


def test_a_block_that_computes_otherwise_is_noticed(monkeypatch):
    unet = make_unet()
    lora.inject(unet, rank=4, alpha=6)
    usual = ResnetBlock2D.forward
    monkeypatch.setattr(ResnetBlock2D, "forward", lambda s, x, temb: 1.001 * usual(s, x, temb))
    assert "resnets.0 would be off by" in layers.disagreement(unet)


def test_doors_that_compute_otherwise_are_noticed(monkeypatch):
    unet = make_unet()
    lora.inject(unet, rank=4, alpha=6)
    doors = type(unet.mid_block.attentions[0])
    usual = doors._get_output_for_continuous_inputs
    changed = lambda s, **how: usual(s, **how) + 0.01  # noqa: E731
    monkeypatch.setattr(doors, convolution.LEAVE, changed)
    assert "attentions.0 would be off by" in layers.disagreement(unet)


def test_nothing_is_copied_from_one_order_to_the_other(one_thread):
    """Between the first convolution and the last the channels of every picture lie side by side,
    forward and backward, where some gradients are a part of those of two joined pictures.
    """
    unet, seen = make_unet(), []
    lora.inject(unet, rank=4, alpha=6)
    layers.wrap(unet)
    kinds = (torch.nn.Conv2d, torch.nn.GroupNorm, ResnetBlock2D)
    for module in unet.modules():
        if isinstance(module, kinds) and module is not unet.conv_in:
            module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
            module.register_full_backward_hook(lambda m, into, out: seen.append(out[0]))
    batch = make_batch(2)
    model.predict(unet, batch["noise"], batch).square().sum().backward()
    pictures = [each for each in seen if each is not None and each.shape[1] > 4]
    assert len(pictures) > 25 and all(each.stride(1) == 1 for each in pictures)


def test_weights_lie_as_before_after_unwrapping():
    unet = make_unet()
    lora.inject(unet, rank=4, alpha=6)
    before = {name: each.stride() for name, each in unet.named_parameters()}
    layers.wrap(unet)
    assert unet.conv_in.weight.is_contiguous(**CL)
    layers.unwrap(unet)
    assert {name: each.stride() for name, each in unet.named_parameters()} == before
