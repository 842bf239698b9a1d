"""The memory plan: what is alive during a step, what that predicts, and what is chosen by it."""

import functools
import types
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import loop
import memory
import model
from config import RECIPES
from conftest import SDXL, TINY, make_batch
from files import Refusal
from memory import GIB

T4 = RECIPES["t4"][1]
SMALL = replace(T4, resolution=64, lora_rank=4)  # as the tiny UNet has it


@pytest.fixture(scope="module")
def tiny():
    """memory.py's prediction for the tiny UNet in fp32, each asked for once."""
    return memory.predictor(SMALL, torch.float32, loop.micro_step, TINY, None)


@pytest.fixture(scope="module")
def sdxl():
    return memory.predictor(T4, torch.float16, loop.micro_step, memory.SDXL_UNET, None)


# ---- what is alive -------------------------------------------------------------------------------


def test_live_bytes_are_those_of_the_storages_in_blocks_of_512():
    with FakeTensorMode(), memory.Live() as live:
        a = torch.empty(1000)  # 4,000 bytes: 8 blocks
        view = a[10:20].view(2, 5)  # no storage of its own
        assert live.total() == 4096
        b = torch.empty(100, dtype=torch.float16)  # one block
        c = view + 1
        assert live.total() == 4096 + 512 + 512
        del a  # its view still holds it
        assert live.total() == 4096 + 1024
        del view, c
        assert (live.total(), live.peak) == (512, 4096 + 1024)
        live.start()
        assert live.peak == 512
        del b
        assert live.total() == 0


def test_arithmetic_is_counted_for_products_in_place_and_attention():
    with FakeTensorMode(), memory.Live() as live:
        q = torch.empty(2, 4, 64, 16, requires_grad=True)
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        assert live.flop == (2 + 5) * 2 * (2 * 4 * 64 * 64 * 16)
        live.start()
        torch.empty(8, 6).addmm_(torch.empty(8, 5), torch.empty(5, 6))
        assert live.flop == 2 * 8 * 5 * 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_keeps_no_matrix_of_all_pairs(dtype):
    with FakeTensorMode(), memory.Live() as live:
        q = torch.empty(1, 10, 4096, 64, dtype=dtype, requires_grad=True)
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert live.peak < 10 * 4096 * 4096 * q.element_size() / 10


def as_run(config, unet, adapter):
    """What loop.micro_step() reads of a Run."""
    return types.SimpleNamespace(
        config=config,
        unet=unet,
        adapter=adapter,
        schedule=model.NoiseSchedule(torch.linspace(0.99, 0.01, 1000), "epsilon"),
        scaling=(0.13025, 0.0),
        factor=torch.ones(()),
        loss_sum=torch.zeros(()),
    )


@pytest.mark.parametrize("blocks", [None, (), ("mid_block.attentions.0",)])
def test_tensors_without_numbers_are_as_many_as_those_with_numbers(tiny, blocks):
    """The same step with real tensors, counted by the same mode."""
    config = memory.shaped(SMALL, 2, blocks)
    found = tiny(config)
    with memory.Live() as live:
        unet = memory.UNet2DConditionModel.from_config(TINY).requires_grad_(False).eval()
        if config.gradient_checkpointing:
            model.use_gradient_checkpointing(unet, config.checkpointed_blocks)
        adapter = memory.lora.inject(unet, rank=config.lora_rank)
        memory.fused.use(unet)
        run = as_run(config, unet, adapter)
        batch = make_batch(2)
        batch["context"] = torch.randn(2, 77, 48)
        live.start()
        loop.micro_step(run, batch)
    assert adapter.flat.grad.norm() > 0
    counted = found.peak - found.parts["optimizer"] - memory.RESERVE
    assert counted == live.peak


# ---- what it predicts ----------------------------------------------------------------------------


def test_more_at_once_needs_more_and_recomputing_needs_less(tiny):
    one, two = (tiny(memory.shaped(SMALL, size, None)) for size in (1, 2))
    again, some = (tiny(memory.shaped(SMALL, 2, b)) for b in ((), ("mid_block.attentions.0",)))
    assert one.peak < two.peak
    assert again.peak < some.peak < two.peak
    assert one.flop < two.flop < some.flop < again.flop
    assert two.flop == pytest.approx(2 * one.flop, rel=0.01)
    assert two.parts["weights"] == one.parts["weights"]
    # What a block says it would save and cost is about what it does: torch stops recomputing at the
    # last tensor that is needed, before the block's own last product.
    name = "mid_block.attentions.0"
    assert two.peak - some.peak == pytest.approx(two.kept[name], rel=0.2)
    assert 0.7 * two.again[name] < some.flop - two.flop <= two.again[name]


def test_recomputing_some_blocks_gives_the_same_gradient(unet, batch):
    """Law 1: what a plan may choose does not change the run."""
    adapter = memory.lora.inject(unet, rank=4)
    run = as_run(SMALL, unet, adapter)
    loop.micro_step(run, batch)
    plain = adapter.flat.grad.clone()
    adapter.flat.grad.zero_()
    model.use_gradient_checkpointing(unet, ("mid_block.attentions.0", "up_blocks.0"))
    loop.micro_step(run, batch)
    assert plain.norm() > 0 and torch.equal(plain, adapter.flat.grad)
    flags = {n: m.gradient_checkpointing for n, m in model.checkpointable(unet).items()}
    assert [n for n, on in flags.items() if on] == ["up_blocks.0", "mid_block.attentions.0"]
    with pytest.raises(Refusal, match=r"checkpointed_blocks names down_blocks\.9"):
        model.use_gradient_checkpointing(unet, ("down_blocks.9",))


def test_the_shipped_unet_is_sdxl_base():
    theirs = memory.UNet2DConditionModel.load_config(SDXL / "unet")
    with FakeTensorMode():
        built = [memory.UNet2DConditionModel.from_config(c) for c in (memory.SDXL_UNET, theirs)]
    one, other = ({n: p.shape for n, p in unet.named_parameters()} for unet in built)
    assert one == other and sum(shape.numel() for shape in one.values()) == 2_567_463_684
    for name, value in memory.SDXL_UNET.items():
        assert list(value) == theirs[name] if isinstance(value, tuple) else value == theirs[name]


def test_the_recipe_t4_needs_less_than_14_gib(sdxl):
    """4 x 1 without recomputation is what is chosen on a T4; 10.64 GiB were measured before layers
    were fused."""
    found = sdxl(memory.shaped(T4, 4, None))
    assert found.parts["weights"] == pytest.approx(2 * 2_567_463_684, rel=1e-3)
    assert found.parts["adapter"] == pytest.approx(4 * 23_224_320, rel=1e-3)
    assert 8 * GIB < found.peak < 14.0 * GIB
    # counted once on the meta device, without adapter: 3.23 TFLOP an image
    assert found.flop == pytest.approx(4 * 3.23e12, rel=0.03)


def test_the_recipe_native_needs_less_than_14_and_a_half_gib(sdxl):
    native = RECIPES["native"][1]
    assert 8 * GIB < sdxl(memory.shaped(native, 1, None)).peak < 14.5 * GIB


def test_a_base_in_4_bits_needs_a_quarter(tiny):
    config = types.SimpleNamespace(**(vars(SMALL) | {"base_quantization": "nf4"}))
    quarter = memory.Rehearsal(config, torch.float32, loop.micro_step, TINY)
    config = types.SimpleNamespace(**(vars(config) | {"examples_per_step": 4}))
    found, whole = quarter.predict(config), tiny(memory.shaped(SMALL, 1, None))
    linear = sum(
        m.in_features * m.out_features
        for m in quarter.unet.modules()
        if isinstance(m, memory.FakeLinear4bit)
    )
    bits = 4 + 8 / 64 + 32 / 64 / 256
    saved = whole.parts["weights"] - found.parts["weights"]
    assert saved == pytest.approx(linear * (32 - bits) / 8, rel=0.1)


# ---- what is chosen ------------------------------------------------------------------------------

CARD = memory.CARDS["T4"]


def choose(predict, free):
    return memory.choose_plan(SMALL, predict, CARD, False, free)


def test_the_chosen_plan_fits_and_the_next_faster_one_does_not(tiny):
    ends = [tiny(memory.shaped(SMALL, *way)).peak for way in ((4, None), (1, ()))]
    assert choose(tiny, 2 * ends[0]).config.train_batch_size == 4
    assert choose(tiny, 2 * ends[0]).faster is None
    free = int((ends[0] + ends[1]) / 2 / memory.FILL)
    plan = choose(tiny, free)
    assert plan.prediction.peak <= memory.FILL * free < plan.faster[1] * 1.05
    assert plan.config.examples_per_step == SMALL.examples_per_step
    way, _ = plan.faster
    assert tiny(way).peak > memory.FILL * free
    both = [
        memory.seconds_per_step(c, tiny(c).flop, tiny(c).parts["weights"], CARD, False, 1.0)
        for c in (way, plan.config)
    ]
    assert both[0] <= both[1]


def test_a_process_that_has_a_share_of_the_step_plans_for_no_more(tiny):
    n, ends = SMALL.examples_per_step, [tiny(memory.shaped(SMALL, 4, None)).peak]
    for most, size in ((4, 4), (3, 2), (2, 2), (1, 1)):  # of 4, in 1, 2 (unevenly), 2, 4 processes
        plan = memory.choose_plan(SMALL, tiny, CARD, False, 2 * ends[0], most)
        assert plan.config.train_batch_size == size
        assert plan.config.examples_per_step == n  # what makes it the same run


def test_a_card_too_small_is_refused_with_the_recipe_lowmem(tiny):
    least = tiny(memory.shaped(SMALL, 1, ())).peak
    with pytest.raises(Refusal, match=r"at least .* GiB free.*lowmem.*--no-memory-plan"):
        choose(tiny, int(0.9 * least))


def test_what_is_asked_for_is_obeyed_and_a_cpu_is_not_planned(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    chosen = functools.partial(memory.choose, dtype=torch.float16, step=loop.micro_step)
    assert chosen(T4, cpu) == (T4, "")
    assert chosen(replace(T4, memory_plan=False), gpu)[0].train_batch_size == 1
    assert "--no-cache" in chosen(replace(T4, cache=False), gpu)[1]
    asked = replace(T4, train_batch_size=2, gradient_accumulation_steps=2)
    config, line = chosen(asked, gpu)
    assert config == asked and "train_batch_size was asked for" in line


def test_a_gpu_gets_its_plan_and_keeps_it_on_disk(monkeypatch, tmp_path):
    config = replace(SMALL, pretrained_model_name_or_path="pocket/model", cache_dir=str(tmp_path))
    monkeypatch.setattr(memory.hub, "fetch", lambda *a: TINY)
    monkeypatch.setattr(memory.UNet2DConditionModel, "load_config", lambda folder: folder)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    # CUDA's own calls refuse a device without a number
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10 * GIB * device.index)
    monkeypatch.setattr(memory, "this_card", lambda device: CARD)
    gpu, dtype = torch.device("cuda"), torch.float32
    planned, line = memory.choose(config, gpu, dtype, loop.micro_step)
    assert (planned.train_batch_size, planned.gradient_accumulation_steps) == (4, 1)
    assert "4 x 1, nothing recomputed" in line and "10.0 GiB free" in line
    files = list((tmp_path / "memory").iterdir())
    assert len(files) == 3

    def never(*_):
        raise AssertionError("a prediction on disk is used")

    monkeypatch.setattr(memory, "Rehearsal", never)
    assert memory.choose(config, gpu, dtype, loop.micro_step) == (planned, line)
    files[0].write_text("damaged")
    other, line = memory.choose(config, gpu, dtype, loop.micro_step)
    assert other == config and "failed" in line  # here the rehearsal itself: training goes on


def test_the_cards_are_told_by_the_names_that_torch_gives(monkeypatch):
    for name, gib, half in (
        ("Tesla T4", 14.6, 65),
        ("NVIDIA A100-SXM4-80GB", 79.2, 312),
        ("NVIDIA L40S", 44.4, memory.CARDS["A10G"].half),  # not an L4: unknown, so a middling one
    ):
        about = types.SimpleNamespace(name=name, total_memory=int(gib * GIB), major=7, minor=5)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, about=about: about)
        card = memory.this_card(torch.device("cuda"))
        assert (card.name, card.half) == (name, half) and card.gib == pytest.approx(gib)
    assert memory.named_card("rtx3060") is memory.CARDS["RTX 3060"]
    with pytest.raises(Refusal, match="card 3DFX"):
        memory.named_card("3DFX")


def test_the_table_says_what_a_recipe_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "SDXL_UNET", TINY)
    config = replace(SMALL, plan_for="T4", cache_dir=str(tmp_path), cuda_graph=False)
    text = memory.table(config, loop.micro_step)
    for part in ("weights", "adapter", "gradients", "optimizer", "activations", "workspace"):
        assert part in text
    assert "UNet in float16" in text and ": fits" in text and "an estimate" in text
    original = replace(config, memory_plan=False, mixed_precision="fp32", train_batch_size=2)
    monkeypatch.setitem(memory.CARDS, "T4", replace(CARD, gib=0.01))
    assert "does NOT fit" in memory.table(original, loop.micro_step)


@pytest.mark.parametrize(("share", "left"), [(1.0, 10), (0.5, 7)])
def test_a_process_that_may_take_a_share_of_the_gpu_plans_for_that(monkeypatch, share, left):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB)
    asked = "get_per_process_memory_fraction"
    monkeypatch.setattr(torch.cuda, asked, lambda device: share, raising=False)
    assert memory.free_bytes(gpu) == left * GIB
