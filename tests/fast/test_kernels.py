"""Our own kernels as far as a machine without a GPU can tell: they compile, PyTorch's lines in
their place compute the book's gate, and where there is none a sentence says so. benchmarks/gate.py
compares the kernels themselves.
"""

import sys

import pytest
import torch
import torch.nn.functional as F

import lora
from conftest import make_unet
from fast import geglu, kernels, layers

ARCHITECTURES = ("sm_75", "sm_80", "sm_90")


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def anew():
    """Each test asks whether there are kernels; none leaves its answer."""
    kernels.unavailable.cache_clear()
    yield
    kernels.unavailable.cache_clear()


# ---- the compiler --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", kernels.NUMBERS)
def test_the_gate_compiles_without_a_gpu(architecture, dtype):
    pytest.importorskip("cuda.bindings")
    code = kernels.compiled(geglu.SOURCE, dtype, architecture)
    assert code.startswith(b"\x7fELF") and b"forward" in code and b"backward" in code


def test_what_does_not_compile_is_said_in_the_compilers_words():
    pytest.importorskip("cuda.bindings")
    with pytest.raises(RuntimeError, match=r"kernels\.cu\(\d+\): error"):
        kernels.compiled("nonsense", torch.float32, "sm_75")
    with pytest.raises(RuntimeError, match="gpu-architecture"):
        kernels.compiled(geglu.SOURCE, torch.float32, "sm_1")


def test_only_tensors_in_whole_packs_are_a_kernels():
    x = torch.zeros(4, 64, dtype=torch.float16)
    assert kernels.in_packs((x, x[1:]))
    assert not kernels.in_packs((x, x[:, :32]))  # not contiguous
    assert not kernels.in_packs((x.flatten()[1:9],))  # begins between two packs
    assert not kernels.in_packs((x.flatten()[:9],))  # ends inside one


# ---- PyTorch's lines in their place --------------------------------------------------------------


def test_without_cuda_bindings_one_sentence_says_so(monkeypatch, anew):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    unet = make_unet()
    lora.inject(unet, rank=4, alpha=6)
    monkeypatch.setattr(type(unet), "device", torch.device("cuda:0"))
    said = layers.wrap(unet)
    assert said.startswith("16 attention layers and 8 feed-forward gates fused, all else by Py")
    assert "PyTorch's kernels, which take longer (import of cuda.bindings halted" in said
    assert len(said.splitlines()) == 1


def test_a_compiler_that_does_not_know_the_gpu_leaves_the_gate_to_pytorch(monkeypatch, anew):
    pytest.importorskip("cuda.bindings")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (99, 0))
    assert "gpu-architecture" in geglu.unavailable(torch.float16, torch.device("cuda:0"))


@pytest.mark.parametrize("dtype", [torch.float64, *kernels.NUMBERS])
def test_both_operators_are_the_books_gate_and_its_gradient(dtype):
    """diffusers' GEGLU multiplies by F.gelu(gate), the exact one; autograd differentiates it."""
    value, gate, grad = (torch.randn(3, 5, 16, generator=rng(s)).mul(2).to(dtype) for s in range(3))
    exact = [each.double().requires_grad_() for each in (value, gate)]
    answer = exact[0] * F.gelu(exact[1])
    wanted = [answer.detach(), *torch.autograd.grad(answer, exact, grad.double())]
    found = [geglu.forward(value, gate), *geglu.backward(value, gate, grad)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.double(), theirs, rtol=4 * torch.finfo(dtype).eps, atol=40 * torch.finfo(dtype).eps
        )


def test_the_kernels_formulas_are_those_of_the_book():
    """The source's lines as PyTorch computes them in fp32, with its constants as they stand."""
    assert "erff(g * 0.70710678f)" in geglu.SOURCE and "0.39894228f * expf(-0.5f" in geglu.SOURCE
    value, g, d = (torch.randn(4096, generator=rng(s)).mul(3) for s in range(3))
    normal = 0.5 * (1.0 + torch.erf(g * 0.70710678))
    slope = g * 0.39894228 * torch.exp(-0.5 * g * g)
    leaves = [value.clone().requires_grad_(), g.clone().requires_grad_()]
    answer = leaves[0] * F.gelu(leaves[1])
    wanted = [answer.detach(), *torch.autograd.grad(answer, leaves, d)]
    for ours, theirs in zip(
        (value * g * normal, d * g * normal, d * value * (normal + slope)), wanted, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_operators_tell_their_shapes_without_numbers():
    value = torch.empty(2, 8, dtype=torch.float16, device="meta")
    made = [geglu.kernel_forward(value, value), *geglu.kernel_backward(value, value, value)]
    assert all(each.is_meta and each.shape == (2, 8) and each.dtype == value.dtype for each in made)
