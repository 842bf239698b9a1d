"""LayerNorm with its addition against PyTorch's and diffusers' modules, as far as a machine without
a GPU can tell; benchmarks/norms.py compares the kernels themselves.
"""

import pytest
import torch
import torch.nn.functional as F

import lora
from conftest import make_unet
from fast import kernels, layernorm, layers

WAYS = [(a, d) for a in ("sm_75", "sm_80", "sm_90") for d in kernels.NUMBERS]
T4 = ("sm_75", torch.float16)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [T4, *(pytest.param(*way, marks=pytest.mark.slow) for way in WAYS if way != T4)],
)
def test_the_norm_compiles_without_a_gpu(architecture, dtype):
    pytest.importorskip("cuda.bindings")
    code = kernels.compiled(layernorm.SOURCE, dtype, architecture)
    assert code.startswith(b"\x7fELF") and b"forward" in code and b"backward" in code


@pytest.mark.parametrize("dtype", [torch.float64, *kernels.NUMBERS])
@pytest.mark.parametrize("added", [True, False])
def test_sum_and_norm_are_torchs_and_their_gradient(dtype, added):
    """In double precision from the sum on, which is rounded."""
    x, more, beside, grad = (draw(3, 5, 16, seed=i).to(dtype) for i in range(4))
    affine = [draw(16, seed=i).to(dtype) for i in (7, 8)]
    total, y = layernorm.forward(x, more if added else None, affine, 1e-5)
    assert torch.equal(total, x + more) if added else total.numel() == 0
    total = total if added else x
    exact = total.double().requires_grad_()
    want = F.layer_norm(exact, (16,), *(each.double() for each in affine), 1e-5)
    (want_dx,) = torch.autograd.grad(want, exact, grad.double())
    dx = layernorm.backward(grad, total, beside, affine, 1e-5)
    much = 8 * torch.finfo(dtype).eps
    for found, wanted in ((y, want.detach()), (dx, want_dx + beside.double())):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=much, atol=8 * much)


def test_the_operators_tell_their_shapes_without_numbers():
    x = torch.empty(2, 5, 16, dtype=torch.float16, device="meta")
    w = x.new_empty(16)
    made = [*layernorm.forward(x, x, [w, w], 1e-5), layernorm.backward(x, x, x, [w, w], 1e-5)]
    assert all(each.is_meta and each.shape == x.shape and each.dtype == x.dtype for each in made)
    assert layernorm.forward(x, None, [w, w], 1e-5)[0].numel() == 0


def test_the_function_passes_a_numerical_gradient_check_and_keeps_the_sum():
    norm, kept = torch.nn.LayerNorm(6).requires_grad_(False), []
    norm.weight.data, norm.bias.data = draw(6, seed=1), draw(6, seed=2)
    x, more = (draw(2, 3, 6, seed=i).requires_grad_() for i in (3, 4))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        total, y = layernorm.AddNorm.apply(x, more, norm)
    assert len(kept) == 1 and torch.equal(kept[0], total)
    torch.testing.assert_close(y, norm(x + more))
    norm, x, more = norm.double(), *(each.detach().double().requires_grad_() for each in (x, more))
    apply = layernorm.AddNorm.apply
    assert torch.autograd.gradcheck(lambda x, more: apply(x, more, norm), (x, more))
    assert torch.autograd.gradcheck(lambda x: apply(x, None, norm), (x,))


def test_only_blocks_that_are_sdxls_are_fused():
    unet = make_unet()
    first, second, third, fourth = [m for m in unet.modules() if layers.is_transformer(m)][:4]
    second.norm2.weight.requires_grad_()
    third.set_chunk_feed_forward(2, 1)
    fourth.norm1 = torch.nn.Identity()
    found = list(layers.fusible(unet).values())
    assert first in found and not any(each in found for each in (second, third, fourth))


def test_a_block_with_a_mask_computes_by_its_definition():
    unet = make_unet()
    lora.inject(unet, rank=4, alpha=6)
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    x, context = draw(1, 5, 64), draw(1, 7, 48)
    mask = torch.zeros(1, 1, 7)
    mask[:, :, 3:] = -10000.0
    whole, part = (block(x, None, context, each) for each in (None, mask))
    layers.wrap(unet)
    torch.testing.assert_close(block(x, encoder_hidden_states=context), whole)
    torch.testing.assert_close(block(x, None, context, mask), part)
    assert not torch.allclose(whole, part, atol=1e-3)


def test_a_block_that_computes_otherwise_is_noticed(monkeypatch):
    unet = make_unet()
    lora.inject(unet, rank=4, alpha=6)
    block = type(unet.mid_block.attentions[0].transformer_blocks[0])
    usual = block.forward
    monkeypatch.setattr(block, "forward", lambda s, x, *a, **k: 1.001 * usual(s, x, *a, **k))
    assert "transformer_blocks.0 would be off by" in layers.disagreement(unet)
