"""What is alive during a step, what is done in it, and what that predicts."""

import types
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

import loop
import lora
import model
from conftest import TINY, make_batch
from fast import layers, plan
from fast.flat import Flat
from inputs.files import Refusal
from inputs.options import RECIPES

T4 = RECIPES["t4"][1]
# as the tiny UNet has it, and without the previews that SDXL's own VAE decodes
SMALL = replace(T4, resolution=(64,), lora_rank=4, preview_steps=0)


@pytest.fixture(scope="module")
def tiny():
    """The prediction for the tiny UNet in fp32, each asked for once."""
    return plan.predictor(SMALL, torch.float32, TINY)


# ---- what is alive -------------------------------------------------------------------------------


def test_live_bytes_are_those_of_the_storages():
    with torch.device("meta"), plan.Live() as live:
        a = torch.empty(1000)
        view = a[10:20].view(2, 5)  # no storage of its own
        assert live.bytes == 4000
        b = torch.empty(100, dtype=torch.float16)
        c = view + 1
        assert live.bytes == 4000 + 200 + 40
        del a  # its view still holds it
        assert live.bytes == 4000 + 240
        del view, c
        assert (live.bytes, live.peak) == (200, 4000 + 240)
        live.start()
        assert live.peak == 200
        del b
        assert live.bytes == 0


def test_an_operator_that_nobody_named_counts_by_what_it_makes():
    @torch.library.custom_op("test_memory::pair", mutates_args=())
    def pair(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.clone(), x.clone()

    pair.register_fake(lambda x: (torch.empty_like(x), torch.empty_like(x)))
    with torch.device("meta"), plan.Live() as live:
        x = torch.empty(50)
        made = pair(x)
        assert live.bytes == live.peak == sum(t.nbytes for t in (x, *made)) == 3 * 200
        assert live.work == plan.Work(moved=3 * 200, launches=1)


def test_arithmetic_is_counted_for_products_in_place_and_attention():
    with torch.device("meta"), plan.Live() as live:
        q = torch.empty(2, 4, 64, 16, requires_grad=True)
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        assert live.work["flop"] == (2 + 5) * 2 * (2 * 4 * 64 * 64 * 16)
        live.start()
        torch.empty(8, 6).addmm_(torch.empty(8, 5), torch.empty(5, 6))
        assert live.work == plan.Work(flop=2 * 8 * 5 * 6, moved=0, launches=1)
        live.start()
        a = torch.empty(100)
        (a.view(10, 10).t() + torch.empty(10)).split(2)  # one kernel: reads 110, writes 100
        assert live.work == plan.Work(flop=0, moved=4 * 210, launches=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_keeps_no_matrix_of_all_pairs(dtype):
    with torch.device("meta"), plan.Live() as live:
        q = torch.empty(1, 10, 4096, 64, dtype=dtype, requires_grad=True)
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert live.peak < 10 * 4096 * 4096 * q.element_size() / 10


def as_run(config, unet):
    """What loop.micro_step() reads of a Run."""
    return types.SimpleNamespace(
        config=config,
        unet=unet,
        loss=loop.diffusion_loss,
        schedule=model.NoiseSchedule(torch.linspace(0.99, 0.01, 1000), "epsilon"),
        latent_scaling=(0.13025, 0.0),
        scale_on_device=torch.ones(()),
        loss_sum=torch.zeros(()),
    )


@pytest.mark.parametrize(
    "blocks",
    [None, *(pytest.param(b, marks=pytest.mark.slow) for b in ((), ("mid_block.attentions.0",)))],
)
def test_tensors_without_numbers_are_as_many_as_those_with_numbers(tiny, blocks):
    """The same step with real tensors, counted by the same mode."""
    config = plan.shaped(SMALL, 2, blocks)
    found = tiny(config)
    with plan.Live() as live:
        unet = UNet2DConditionModel.from_config(TINY).requires_grad_(False).eval()
        if config.gradient_checkpointing:
            model.use_gradient_checkpointing(unet, config.checkpointed_blocks)
        lora.inject(unet, rank=config.lora_rank)
        flat = Flat(unet, lora.trained(unet))
        layers.wrap(unet)
        run = as_run(config, unet)
        batch = make_batch(2)
        batch["context"] = torch.randn(2, 77, 48)
        live.start()
        flat.micro_step(loop.micro_step)(run, batch)
    assert flat.vector.grad.norm() > 0
    counted = found.peak - found.parts["optimizer"] - plan.RESERVE
    # A GPU's attention keeps, for its backward pass, sums padded to 32 and two numbers a layer that
    # a CPU's does not.
    assert live.peak <= counted <= 1.002 * live.peak
    vector = flat.vector.nbytes
    assert found.parts["adapter"] == found.parts["gradients"] == vector  # inject()'s own are freed


# ---- what it predicts ----------------------------------------------------------------------------


def flop(found):
    return found.work["flop"]


@pytest.mark.slow
def test_more_at_once_needs_more_and_recomputing_needs_less(tiny):
    one, two = (tiny(plan.shaped(SMALL, size, None)) for size in (1, 2))
    again, some = (tiny(plan.shaped(SMALL, 2, b)) for b in ((), ("mid_block.attentions.0",)))
    assert one.peak < two.peak
    assert again.peak < some.peak < two.peak
    assert flop(one) < flop(two) < flop(some) < flop(again)
    assert flop(two) == pytest.approx(2 * flop(one), rel=0.01)
    assert two.work["launches"] == pytest.approx(one.work["launches"], rel=0.02)
    assert two.work["moved"] == pytest.approx(2 * one.work["moved"], rel=0.2)
    assert two.parts["weights"] == one.parts["weights"]
    # What a block says it would save and cost is about what it does: torch stops recomputing at the
    # last tensor that is needed, before the block's own last product.
    name = "mid_block.attentions.0"
    assert two.peak - some.peak == pytest.approx(two.again[name]["kept"], rel=0.2)
    cost = two.again[name]["flop"]
    assert 0.7 * cost < flop(some) - flop(two) <= cost
    assert 0 < two.again[name]["launches"] < two.work["launches"] / 4


def test_recomputing_some_blocks_gives_the_same_gradient(unet, batch):
    """Law 1: what a plan may choose does not change the run."""
    lora.inject(unet, rank=4)
    run, flat = as_run(SMALL, unet), Flat(unet, lora.trained(unet))
    step = flat.micro_step(loop.micro_step)
    step(run, batch)
    plain = flat.vector.grad.clone()
    flat.vector.grad.zero_()
    model.use_gradient_checkpointing(unet, ("mid_block.attentions.0", "up_blocks.0"))
    step(run, batch)
    assert plain.norm() > 0 and torch.equal(plain, flat.vector.grad)
    flags = {n: m.gradient_checkpointing for n, m in model.checkpointable(unet).items()}
    assert [n for n, on in flags.items() if on] == ["up_blocks.0", "mid_block.attentions.0"]
    with pytest.raises(Refusal, match=r"checkpointed_blocks names down_blocks\.9"):
        model.use_gradient_checkpointing(unet, ("down_blocks.9",))


@pytest.mark.slow
def test_a_base_in_4_bits_needs_a_quarter(tiny):
    config = plan.shaped(replace(SMALL, base_quantization="nf4"), 1, None)
    quarter = plan.Rehearsal(config, torch.float32, TINY)
    found, whole = quarter.predict(config), tiny(plan.shaped(SMALL, 1, None))
    linear = sum(
        m.in_features * m.out_features
        for m in quarter.run.unet.modules()
        if type(m).__name__ == "Linear4bit"
    )
    bits = 4 + 8 / 64 + 32 / 64 / 256
    saved = whole.parts["weights"] - found.parts["weights"]
    assert saved == pytest.approx(linear * (32 - bits) / 8, rel=0.1)
