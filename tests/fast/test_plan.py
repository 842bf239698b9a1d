"""The memory plan: what cards offer, how long a step takes there, and what is chosen by it."""

import functools
import json
import re
import types
from dataclasses import replace

import pytest
import torch

from conftest import ROOT, SDXL, TINY
from fast import memory, plan
from fast.memory import GIB
from inputs.files import Refusal
from inputs.options import RECIPES

T4 = RECIPES["t4"][1]
SMALL = replace(T4, resolution=64, lora_rank=4)  # as the tiny UNet has it


@pytest.fixture(scope="module")
def tiny():
    """The prediction for the tiny UNet in fp32, each asked for once."""
    return plan.predictor(SMALL, torch.float32, TINY, None)


@pytest.fixture(scope="module")
def sdxl():
    return plan.predictor(T4, torch.float16, plan.SDXL_UNET, None)


# ---- SDXL itself ---------------------------------------------------------------------------------


def test_the_shipped_unet_is_sdxl_base():
    theirs = plan.UNet2DConditionModel.load_config(SDXL / "unet")
    with memory.without_numbers():
        built = [plan.UNet2DConditionModel.from_config(c) for c in (plan.SDXL_UNET, theirs)]
    one, other = ({n: p.shape for n, p in unet.named_parameters()} for unet in built)
    assert one == other and sum(shape.numel() for shape in one.values()) == 2_567_463_684
    for name, value in plan.SDXL_UNET.items():
        assert list(value) == theirs[name] if isinstance(value, tuple) else value == theirs[name]


def test_the_recipe_t4_needs_less_than_14_gib(sdxl):
    """4 x 1 without recomputation is what is chosen on a T4; 10.64 GiB were measured before layers
    were fused."""
    found = sdxl(plan.shaped(T4, 4, None))
    assert found.parts["weights"] == pytest.approx(2 * 2_567_463_684, rel=1e-3)
    assert found.parts["adapter"] == pytest.approx(4 * 23_224_320, rel=1e-3)
    assert 8 * GIB < found.peak < 14.0 * GIB
    # counted once on the meta device, without adapter: 3.23 TFLOP an image
    assert found.work["flop"] == pytest.approx(4 * 3.23e12, rel=0.03)


@pytest.mark.slow
def test_the_recipe_native_needs_less_than_14_and_a_half_gib(sdxl):
    native = RECIPES["native"][1]
    assert 8 * GIB < sdxl(plan.shaped(native, 1, None)).peak < 14.5 * GIB


@pytest.mark.parametrize(("row", "size"), [("1024 px, fp16, graph", 1), ("512 px, fp16, 4x1", 4)])
def test_the_estimate_gives_the_seconds_that_an_h100_took(sdxl, row, size):
    """Both kinds of step: bound by products, and by launches."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "bench_ladder.json").read_text())["rows"]
    way = plan.shaped(RECIPES["t4" if row.startswith("512") else "native"][1], size, None)
    found = sdxl(way)
    about = (found.work, found.parts["weights"], plan.CARDS["H100"], True)
    fast, slow = (plan.seconds_per_step(way, *about, share) for share in plan.SHARES)
    assert fast == pytest.approx(rows[row]["s_per_step"], rel=0.1) and slow > fast


# ---- what is chosen ------------------------------------------------------------------------------

CARD = plan.CARDS["T4"]


def choose(predict, free):
    return plan.choose_plan(SMALL, predict, CARD, False, free)


@pytest.mark.slow
def test_the_chosen_plan_fits_and_the_next_faster_one_does_not(tiny):
    ends = [tiny(plan.shaped(SMALL, *way)).peak for way in ((4, None), (1, ()))]
    assert choose(tiny, 2 * ends[0]).config.train_batch_size == 4
    assert choose(tiny, 2 * ends[0]).faster is None
    free = int((ends[0] + ends[1]) / 2 / plan.FILL)
    chosen = choose(tiny, free)
    assert chosen.prediction.peak <= plan.FILL * free < chosen.faster[1] * 1.05
    assert chosen.config.examples_per_step == SMALL.examples_per_step
    way, _ = chosen.faster
    assert tiny(way).peak > plan.FILL * free
    both = [
        plan.seconds_per_step(c, tiny(c).work, tiny(c).parts["weights"], CARD, False, 0.45)
        for c in (way, chosen.config)
    ]
    assert both[0] <= both[1]


@pytest.mark.slow
def test_blocks_are_recomputed_in_the_order_of_bytes_saved_per_second_on_that_card(sdxl):
    plain, first = sdxl(plan.shaped(T4, 1, None)), {}
    for name in ("T4", "H100"):
        card = plan.CARDS[name]
        ways = [way for *_, way in plan.candidates(T4, sdxl, card, True, 1)]
        order = max((way.checkpointed_blocks for way in ways), key=len)
        lost = [plan.seconds_again(T4, plain.again[block], card, True) for block in order]
        saved = [plain.kept[block] / s for block, s in zip(order, lost, strict=True)]
        assert saved == sorted(saved, reverse=True) and min(lost) > 0
        first[name] = order[0]
    # an H100 computes faster than it launches, so there a large resnet block goes first
    assert first == {"T4": "down_blocks.1.attentions.1", "H100": "up_blocks.2"}


@pytest.mark.slow
def test_compiling_is_set_against_the_length_of_the_run():
    rows = json.loads((ROOT / "benchmarks" / "results" / "bench_ladder.json").read_text())["rows"]
    plain, compiled = (rows[f"512 px, fp16, {row}"] for row in ("4x1", "compile"))
    assert compiled["s_first_step"] - plain["s_first_step"] == pytest.approx(plan.COMPILE, rel=0.01)
    assert 1 - compiled["s_per_step"] / plain["s_per_step"] == pytest.approx(
        plan.COMPILED, abs=0.005
    )
    said = plan.compiling(replace(T4, max_train_steps=500), [1.0, 2.0])
    assert "962 to 1,925 steps earn it back; the run has 500" in said
    cpu = torch.device("cpu")
    _, said = plan.choose(replace(T4, compile=True), cpu, torch.float16)
    assert said.startswith("--compile takes 77 s") and "earn" not in said  # no step is estimated
    original = plan.table(replace(RECIPES["original"][1], plan_for="T4"))
    assert "--compile" not in original  # fp32 and recomputing: not measured


def test_the_stored_plan_of_a_t4_is_what_make_plan_says(sdxl, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "predictor", lambda *_: sdxl)
    config = replace(T4, plan_for="T4", cache_dir=str(tmp_path))
    lines = (ROOT / "benchmarks" / "results" / "plan_t4.txt").read_text().splitlines()
    words = lambda line: re.sub(r"[\d.,]+", "#", line)  # noqa: E731  another torch counts another byte
    said = plan.table(config).splitlines()
    assert lines[0] == "$ make plan RECIPE=t4 CARD=T4"
    assert [words(line) for line in lines[1:]] == [words(line) for line in said]
    stored, new = (
        [float(n.replace(",", "")) for n in re.findall(r"\d[\d.,]*\d|\d", "\n".join(of))]
        for of in (lines[1:], said)
    )
    assert new == pytest.approx(stored, rel=0.03, abs=0.011)


def test_a_process_that_has_a_share_of_the_step_plans_for_no_more(tiny):
    n, free = SMALL.examples_per_step, 2 * tiny(plan.shaped(SMALL, 4, None)).peak
    for most, size in ((4, 4), (3, 2), (2, 2), (1, 1)):  # of 4, in 1, 2 (unevenly), 2, 4 processes
        found = plan.choose_plan(SMALL, tiny, CARD, False, free, most)
        assert found.config.train_batch_size == size
        assert found.config.examples_per_step == n  # what makes it the same run


def test_a_card_too_small_is_refused_with_the_recipe_lowmem(tiny):
    least = tiny(plan.shaped(SMALL, 1, ())).peak
    with pytest.raises(Refusal, match=r"at least .* GiB free.*lowmem.*--no-memory-plan"):
        choose(tiny, int(0.9 * least))


@pytest.mark.slow
def test_lowmem_plans_for_a_card_of_6_gb_and_is_small_without_a_plan():
    lowmem, card = RECIPES["lowmem"][1], plan.named_card("RTX 2060")
    predict = plan.predictor(lowmem, torch.float16, plan.SDXL_UNET, None)
    free = int(0.95 * card.gib * GIB)
    found = plan.choose_plan(lowmem, predict, card, True, free)
    least = plan.shaped(lowmem, 1, ())
    assert predict(least).peak < 2.4 * GIB < found.prediction.peak < 0.84 * free
    ways = ((found.config, found.prediction), (least, predict(least)))
    fast, slow = (
        plan.seconds_per_step(way, p.work, p.parts["weights"], card, True, 0.45) for way, p in ways
    )
    assert fast < 0.7 * slow


def test_what_is_asked_for_is_obeyed_and_a_cpu_is_not_planned(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    chosen = functools.partial(plan.choose, dtype=torch.float16)
    assert chosen(T4, cpu) == (T4, "")
    assert chosen(replace(T4, memory_plan=False), gpu)[0].train_batch_size == 1
    assert "--no-cache" in chosen(replace(T4, cache=False), gpu)[1]
    asked = replace(T4, train_batch_size=2, gradient_accumulation_steps=2)
    config, line = chosen(asked, gpu)
    assert config == asked and "train_batch_size was asked for" in line


def test_a_gpu_gets_its_plan_and_keeps_it_on_disk(monkeypatch, tmp_path):
    config = replace(SMALL, pretrained_model_name_or_path="pocket/model", cache_dir=str(tmp_path))
    monkeypatch.setattr(plan.hub, "fetch", lambda *a: TINY)
    monkeypatch.setattr(plan.UNet2DConditionModel, "load_config", lambda folder: folder)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    # CUDA's own calls refuse a device without a number
    monkeypatch.setattr(plan, "free_bytes", lambda device: 10 * GIB * device.index)
    monkeypatch.setattr(plan, "this_card", lambda device: CARD)
    gpu, dtype = torch.device("cuda"), torch.float32
    planned, line = plan.choose(config, gpu, dtype)
    assert (planned.train_batch_size, planned.gradient_accumulation_steps) == (4, 1)
    assert "4 x 1, nothing recomputed" in line and "10.0 GiB free" in line
    files = list((tmp_path / "memory").iterdir())
    assert len(files) == 3 and "--compile" not in line
    _, compiled = plan.choose(replace(config, compile=True), gpu, dtype)
    assert compiled.startswith(line) and "as measured once" in compiled

    def never(*_):
        raise AssertionError("a prediction on disk is used")

    monkeypatch.setattr(plan, "Rehearsal", never)
    assert plan.choose(config, gpu, dtype) == (planned, line)
    files[0].write_text("damaged")
    other, line = plan.choose(config, gpu, dtype)
    assert other == config and "failed" in line  # here the rehearsal itself: training goes on


def test_the_cards_are_told_by_the_names_that_torch_gives(monkeypatch):
    for name, gib, half in (
        ("Tesla T4", 14.6, 65),
        ("NVIDIA A100-SXM4-80GB", 79.2, 312),
        ("NVIDIA L40S", 44.4, plan.CARDS["A10G"].half),  # not an L4: unknown, so a middling one
    ):
        about = types.SimpleNamespace(name=name, total_memory=int(gib * GIB), major=7, minor=5)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, about=about: about)
        card = plan.this_card(torch.device("cuda"))
        assert (card.name, card.half) == (name, half) and card.gib == pytest.approx(gib)
    assert plan.named_card("rtx3060") is plan.CARDS["RTX 3060"]
    with pytest.raises(Refusal, match="card 3DFX"):
        plan.named_card("3DFX")


@pytest.mark.slow
def test_the_table_says_what_a_recipe_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SDXL_UNET", TINY)
    config = replace(SMALL, plan_for="T4", cache_dir=str(tmp_path), cuda_graph=False)
    text = plan.table(config)
    for part in ("weights", "adapter", "gradients", "optimizer", "activations", "workspace"):
        assert part in text
    assert "UNet in float16" in text and ": fits" in text and "an estimate" in text
    original = replace(config, memory_plan=False, mixed_precision="fp32", train_batch_size=2)
    monkeypatch.setitem(plan.CARDS, "T4", replace(CARD, gib=0.01))
    assert "does NOT fit" in plan.table(original)


@pytest.mark.parametrize(("share", "left"), [(1.0, 10), (0.5, 7)])
def test_a_process_that_may_take_a_share_of_the_gpu_plans_for_that(monkeypatch, share, left):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB)
    asked = "get_per_process_memory_fraction"
    monkeypatch.setattr(torch.cuda, asked, lambda device: share, raising=False)
    assert plan.free_bytes(gpu) == left * GIB


def test_the_estimate_shows_its_arithmetic(tiny):
    way = plan.shaped(SMALL, 2, None)
    found = tiny(way)
    parts = plan.seconds_per_pass(way, found.work, found.parts["weights"], CARD, True, 0.25)
    assert parts["bytes"] == found.work["moved"] / 300e9
    assert parts["launches"] == plan.LAUNCH * found.work["launches"]
    many = replace(found, work=found.work | {"flop": 65e12})
    lines = plan.estimate(replace(way, max_train_steps=600), many, CARD, True)
    assert "1,200 passes" in lines[0] and "44.4 or 80.0 min" in lines[1]
    eager = replace(way, cuda_graph=False)
    about = (found.work, found.parts["weights"], CARD, True, 0.25)
    assert sum(plan.seconds_per_pass(eager, *about).values()) == pytest.approx(plan.EAGER)


@pytest.mark.slow
def test_the_4_bit_numbers_that_are_kept_count_as_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SDXL_UNET", TINY)
    lowmem = replace(RECIPES["lowmem"][1], plan_for="T4", cache_dir=str(tmp_path), resolution=64)
    assert "GB of 4-bit numbers" in plan.table(lowmem)
    whole = replace(lowmem, base_quantization="none")
    assert "4-bit numbers" not in plan.table(whole)
