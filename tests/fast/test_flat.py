"""All that learns in one vector: the same numbers, gradients and steps as matrix by matrix."""

import copy
import functools
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from diffusers import UNet2DConditionModel

import loop
import lora
import model
from conftest import SDXL, make_batch, make_unet
from fast.flat import QUANT_BLOCK, Flat, FlatMoments, padded
from keep.checkpoint import PlainMoments

pytestmark = pytest.mark.usefixtures("one_thread")
SCHEDULE = model.NoiseSchedule(torch.linspace(0.999, 0.005, 1000), "epsilon")
OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "AdamW8bit": functools.partial(bnb.optim.AdamW8bit, min_8bit_size=1),
}


def made(rank: int = 5, laid: bool = True):
    """A UNet with its adapter's parameters by name, and, if laid, the Flat that took them."""
    unet = make_unet()
    lora.inject(unet, rank=rank, alpha=6)
    trained = lora.trained(unet)
    for matrix in trained.values():
        matrix.grad = torch.zeros_like(matrix)
    return unet, trained, Flat(unet, trained) if laid else None


def run_of(unet):
    """What loop.micro_step() reads of a Run."""
    return SimpleNamespace(
        config=SimpleNamespace(examples_per_step=2, snr_gamma=0.0),
        unet=unet,
        schedule=SCHEDULE,
        latent_scaling=(0.13, 0.0),
        scale_on_device=torch.ones(()),
        loss_sum=torch.zeros(()),
        loss=loop.diffusion_loss,
    )


def test_the_vector_is_all_a_then_all_b_each_at_a_multiple_of_256():
    unet, trained, flat = made()
    order = [n for n in trained if n.endswith("A")] + [n for n in trained if n.endswith("B")]
    assert list(flat.spans) == order and list(flat.views) == list(trained)
    at = 0
    for name in order:
        assert flat.spans[name] == at and at % QUANT_BLOCK == 0 and QUANT_BLOCK == 256
        assert torch.equal(flat.vector[at : at + trained[name].numel()], trained[name].flatten())
        at += padded(trained[name].numel())
    assert flat.vector.shape == flat.vector.grad.shape == (at,)
    assert not lora.trained(unet)  # the layers read views of it
    flat.check_tied()


def test_parameters_of_any_name_are_taken():
    net = torch.nn.Sequential(torch.nn.Linear(3, 2))
    net[0].gain = torch.nn.Parameter(torch.ones(1))
    flat = Flat(net, dict(net.named_parameters()))
    assert list(flat.views) == ["0.weight", "0.bias", "0.gain"]
    with torch.no_grad():
        flat.vector.fill_(2.0)
    assert torch.equal(net(torch.ones(1, 3)), torch.full((1, 2), 8.0)) and net[0].gain.item() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gradient_through_one_cast_is_that_of_every_matrix_to_the_bit(dtype):
    found = []
    for laid in (False, True):
        unet, trained, flat = made(laid=laid)
        unet.to(dtype) if not laid else None
        if laid:
            for module in unet.modules():  # the views stay fp32
                for each in module.parameters(recurse=False):
                    each.data = each.data.to(dtype)
        else:
            for matrix in trained.values():
                matrix.data, matrix.grad = matrix.data.float(), torch.zeros(matrix.shape)
        run = run_of(unet)
        step = flat.micro_step(loop.micro_step) if laid else loop.micro_step
        for seed in range(2):
            step(run, make_batch(seed=seed))
        matrices = flat.views if laid else trained
        found.append((run.loss_sum, {name: each.grad for name, each in matrices.items()}))
    (loss, grads), (flat_loss, flat_grads) = found
    assert torch.equal(loss, flat_loss) and grads.keys() == flat_grads.keys()
    assert all(torch.equal(grad, flat_grads[name]) for name, grad in grads.items())
    assert sum(grad.norm() for grad in grads.values()) > 0


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("rank", [5, pytest.param(16, marks=pytest.mark.slow)])
def test_steps_and_state_are_those_of_separate_matrices_and_pass_from_one_to_the_other(kind, rank):
    """Three steps each way, the state handed over matrix by matrix, three more: the same bytes."""
    draw = torch.Generator().manual_seed(7)
    _, like, _ = made(rank, laid=False)
    steps = [{n: torch.randn(m.shape, generator=draw) for n, m in like.items()} for _ in range(6)]

    def stepped(matrices, parameters, first, last, moments=None):
        optimizer = OPTIMIZERS[kind](parameters, lr=1e-2)
        keeper = moments(optimizer)
        if handed := kept.get("moments"):
            keeper.write(handed)
        for grads in steps[first:last]:
            for name, matrix in matrices.items():
                matrix.grad.copy_(grads[name])
            optimizer.step()
        kept["moments"] = copy.deepcopy(keeper.read())
        kept["numbers"] = {name: each.detach().clone() for name, each in matrices.items()}

    def of(laid: bool):
        _, trained, flat = made(rank, laid)
        matrices = flat.views if laid else trained
        with torch.no_grad():
            for name, each in kept.get("numbers", {}).items():
                matrices[name].copy_(each)
        parameters = [flat.vector] if laid else list(trained.values())
        build = (lambda o: FlatMoments([flat], o)) if laid else (lambda o: PlainMoments(o, trained))
        return matrices, parameters, build

    ends = []
    for ways in ((False, False), (True, True), (True, False), (False, True)):
        kept = {}
        for laid, (first, last) in zip(ways, ((0, 3), (3, 6)), strict=True):
            matrices, parameters, build = of(laid)
            stepped(matrices, parameters, first, last, build)
        ends.append(kept)
    for other in ends[1:]:
        for name, each in ends[0]["numbers"].items():
            assert torch.equal(each, other["numbers"][name]), name
        for name, state in ends[0]["moments"].items():
            for key, value in state.items():
                assert torch.equal(
                    torch.as_tensor(value), torch.as_tensor(other["moments"][name][key])
                )


def test_a_dropped_gradient_is_noticed():
    _, _, flat = made()
    flat.check_tied()
    flat.vector.grad = torch.zeros_like(flat.vector)
    with pytest.raises(AssertionError):
        flat.check_tied()


def test_at_full_size_the_vector_holds_sdxls_numbers():
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SDXL / "unet"))
        lora.inject(unet, rank=16)
        flat = Flat(unet, lora.trained(unet))
    assert 23_224_320 <= flat.vector.numel() < 23_224_320 + 2 * 560 * QUANT_BLOCK
