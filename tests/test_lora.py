"""The adapter's mathematics: what LoRA promises, and that the flat vector changes nothing of it."""

import contextlib
import copy
import math

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

import lora
from conftest import SDXL, make_batch, make_unet
from inputs.files import Refusal
from lora import BLOCK, TARGETS, Adapter, LoRALinear

# Wide enough that every A and B has at least 4,096 numbers at rank 33 (bitsandbytes keeps 8-bit
# state from there on) and yet none is a multiple of 256, so that the flat vector has padding.
WIDE = {"block_out_channels": (32, 128), "cross_attention_dim": 136}
WIDE_RANK = 33


def answer(unet: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The UNet's answer (B, 4, 8, 8) to the batch's noise, in the UNet's dtype."""
    dtype = unet.dtype
    condition = {"text_embeds": batch["pooled"].to(dtype), "time_ids": batch["time_ids"]}
    context = batch["context"].to(dtype)
    return unet(batch["noise"].to(dtype), batch["t"], context, added_cond_kwargs=condition).sample


def loss(unet: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(answer(unet, batch).float(), batch["eps"])


def stir(adapter: Adapter, seed: int = 1, size: float = 0.1) -> Adapter:
    """Give B random numbers, as if trained: a zero B would hide everything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B.copy_(size * torch.randn(layer.lora_B.shape, generator=generator))
    return adapter


def off(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|."""
    return ((got - want).norm() / want.norm()).item()


def lone(base: nn.Module, rank: int = 4, alpha: float = 6) -> LoRALinear:
    """One layer with a random A and B, without a flat vector."""
    generator = torch.Generator().manual_seed(3)
    A = nn.Parameter(torch.randn(rank, base.in_features, generator=generator))
    B = nn.Parameter(torch.randn(base.out_features, rank, generator=generator))
    return LoRALinear(base.requires_grad_(False), A, B, alpha)


class Net(nn.Module):
    """Modules under dotted names, in the order given."""

    def __init__(self, **modules: nn.Module):
        super().__init__()
        for name, module in modules.items():
            parent, _, child = name.rpartition("__")
            if parent and not hasattr(self, parent):
                self.add_module(parent, nn.Module())
            (getattr(self, parent) if parent else self).add_module(child, module)


# ---- what the branch does ------------------------------------------------------------------------


@torch.no_grad()
def test_zero_effect_at_start(unet, batch):
    bare = answer(unet, batch)
    adapter = lora.inject(unet, rank=4, alpha=6)
    assert torch.equal(answer(unet, batch), bare)
    assert not torch.equal(answer(unet, batch), answer(unet, make_batch(seed=1)))
    stir(adapter)
    assert off(answer(unet, batch), bare) > 0.01  # and only because B is zero


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_strength_zero_is_the_bare_model_to_the_bit(unet, batch, dtype):
    unet.to(dtype)
    bare = answer(unet, batch)
    adapter = stir(lora.inject(unet, rank=4, alpha=6))
    full = answer(unet, batch)
    lora.set_strength(adapter, 0)
    assert torch.equal(answer(unet, batch), bare)
    lora.set_strength(adapter, 1)
    assert torch.equal(answer(unet, batch), full)
    assert off(full.float(), bare.float()) > 0.01


@torch.no_grad()
def test_strength_zero_is_bare_even_where_the_branch_overflows():
    base = nn.Linear(24, 16).half()
    layer, x = lone(base), torch.randn(5, 24).half()
    layer.lora_B.fill_(1e6)  # beyond fp16: zero times infinity would be NaN
    assert not layer(x).isfinite().any()
    layer.strength = 0
    assert torch.equal(layer(x), base(x))


@torch.no_grad()
def test_branch_is_strength_times_alpha_over_rank_times_B_A_x():
    base = nn.Linear(24, 16)
    layer, x = lone(base, rank=4, alpha=6), torch.randn(2, 5, 24)
    for strength in (1.0, 0.5, 2.0, -1.0):
        layer.strength = strength
        want = base(x) + strength * 6 / 4 * (x @ layer.lora_A.T) @ layer.lora_B.T
        torch.testing.assert_close(layer(x), want)


@torch.no_grad()
def test_strength_half_halves_the_branch():
    base = nn.Linear(24, 16)
    base.weight.zero_(), base.bias.zero_()  # what remains is the branch
    adapter = stir(lora.inject(Net(to_q=base), rank=4, alpha=6))
    layer, x = adapter.layers["to_q"], torch.randn(5, 24)
    whole = layer(x)
    lora.set_strength(adapter, 0.5)
    assert torch.equal(layer(x), whole / 2)
    assert whole.norm() > 0


@pytest.mark.parametrize("strength", [math.nan, math.inf])
def test_strength_is_a_finite_number(unet, strength):
    adapter = lora.inject(unet, rank=2)
    with pytest.raises(Refusal, match="strength"):
        lora.set_strength(adapter, strength)
    assert {layer.strength for layer in adapter.layers.values()} == {1.0}


# ---- merging -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_merged_equals_unmerged(unet, batch, strength):
    bare = answer(unet, batch)
    adapter = stir(lora.inject(unet, rank=4, alpha=6))
    lora.set_strength(adapter, strength)
    beside = answer(unet, batch)
    lora.merge(adapter)
    assert off(answer(unet, batch), beside) < 1e-5
    assert off(beside, bare) > 0.01
    for layer in adapter.layers.values():
        assert not torch.equal(layer.base.weight, layer.unmerged)
    inside = answer(unet, batch)
    lora.merge(adapter)  # a second time adds nothing
    assert torch.equal(answer(unet, batch), inside)
    lora.unmerge(adapter)
    assert torch.equal(answer(unet, batch), beside)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merge_rounds_once_and_unmerge_gives_back_the_bits(unet, dtype):
    adapter = stir(lora.inject(unet.to(dtype), rank=4, alpha=6))
    before = {name: layer.base.weight.clone() for name, layer in adapter.layers.items()}
    lora.merge(adapter)
    for name, layer in adapter.layers.items():
        exact = before[name].double() + 6 / 4 * layer.lora_B.double() @ layer.lora_A.double()
        assert layer.base.weight.dtype == dtype
        assert off(layer.base.weight.double(), exact) < torch.finfo(dtype).eps
        if dtype != torch.float32:  # the sum is rounded, not first the product
            assert (layer.base.weight != exact.to(dtype)).float().mean() < 0.01
        assert not torch.equal(layer.base.weight, before[name])
    lora.unmerge(adapter)
    for name, layer in adapter.layers.items():
        assert layer.base.weight.dtype == dtype
        assert torch.equal(layer.base.weight, before[name])


@torch.no_grad()
def test_strength_holds_while_merged(unet, batch):
    """set_strength's promise, "0 is the bare model, bit for bit", is kept or refused aloud."""
    bare = answer(unet, batch)
    adapter = stir(lora.inject(unet, rank=4, alpha=6))
    lora.merge(adapter)
    with contextlib.suppress(Refusal):
        lora.set_strength(adapter, 0)
        assert torch.equal(answer(unet, batch), bare)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merge_refuses_quantised_layers_and_touches_none(kind):
    net = Net(first__to_q=nn.Linear(64, 32), second__to_q=quantised(kind)[0])
    adapter = stir(lora.inject(net, rank=4, alpha=6))
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(Refusal, match=r"second\.to_q has a quantised weight.*expected fp32"):
        lora.merge(adapter)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert all(layer.unmerged is None for layer in adapter.layers.values())


# ---- equal to PEFT -------------------------------------------------------------------------------


def peft_twin(adapter: Adapter, **changes) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The same UNet under PEFT with the adapter's numbers copied in, its A and B by our names."""
    unet = make_unet(**changes)
    unet.add_adapter(
        LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(TARGETS))
    )
    theirs = {
        name.replace(".default.weight", ""): p
        for name, p in unet.named_parameters()
        if p.requires_grad
    }
    ours = dict(adapter.parts())
    assert theirs.keys() == ours.keys()
    with torch.no_grad():
        for name, p in theirs.items():
            p.copy_(ours[name])
    return unet, theirs


def test_forward_and_gradients_equal_pefts(unet, batch):
    adapter = stir(lora.inject(unet, rank=4, alpha=6))
    peft_unet, theirs = peft_twin(adapter)
    assert off(answer(unet, batch), answer(peft_unet, batch)) < 1e-6
    loss(unet, batch).backward()
    loss(peft_unet, batch).backward()
    for name, matrix in adapter.parts():
        assert theirs[name].grad.norm() > 0
        assert off(matrix.grad, theirs[name].grad) < 1e-5, name


def test_gradients_at_the_start_equal_pefts(unet, batch):
    """B is zero: A gets no gradient at all, B gets one."""
    adapter = lora.inject(unet, rank=4, alpha=6)
    peft_unet, theirs = peft_twin(adapter)
    loss(unet, batch).backward()
    loss(peft_unet, batch).backward()
    for layer_name, layer in adapter.layers.items():
        assert not layer.lora_A.grad.any()
        assert off(layer.lora_B.grad, theirs[f"{layer_name}.lora_B"].grad) < 1e-5


def ten_steps(optimizer: type, bound: float, rank: int, changes: dict, context: int):
    """Ten steps of the flat vector, and of PEFT's separate tensors: less than `bound` apart, as a
    share of the way gone."""
    unet = make_unet(**changes)
    adapter = stir(lora.inject(unet, rank=rank, alpha=20))
    peft_unet, theirs = peft_twin(adapter, **changes)
    start = {name: matrix.detach().clone() for name, matrix in adapter.parts()}
    one = optimizer([adapter.flat], lr=1e-3)
    many = optimizer(list(theirs.values()), lr=1e-3)
    for step in range(10):
        batch = make_batch(seed=step)
        batch["context"] = torch.randn(2, 7, context, generator=torch.Generator().manual_seed(step))
        loss(unet, batch).backward()
        loss(peft_unet, batch).backward()
        one.step()
        many.step()
        adapter.flat.grad.zero_()
        many.zero_grad()
    adapter.check_tied()
    for name, matrix in adapter.parts():
        moved = theirs[name].detach() - start[name]
        assert moved.abs().max() > 1e-3, name
        assert (matrix.detach() - theirs[name]).norm() < bound * moved.norm(), name
    return adapter, theirs, one, many


def test_ten_adamw_steps_equal_pefts():
    ten_steps(torch.optim.AdamW, 1e-4, rank=4, changes={}, context=48)


def test_ten_8_bit_adamw_steps_equal_pefts():
    adapter, theirs, one, many = ten_steps(bnb.optim.AdamW8bit, 1e-3, WIDE_RANK, WIDE, context=136)
    assert all(p.numel() >= 4096 for p in theirs.values())
    assert adapter.flat.numel() > adapter.trainable  # there is padding between the matrices
    states = [one.state[adapter.flat]] + [many.state[p] for p in theirs.values()]
    assert {state["state1"].dtype for state in states} == {torch.uint8}
    assert {state["state2"].dtype for state in states} == {torch.uint8}


# ---- inject() ------------------------------------------------------------------------------------


def test_inject_replaces_every_target_and_freezes_the_rest(unet):
    names = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear) and ".attn" in n]
    before = {name: p.clone() for name, p in unet.named_parameters()}
    unet.requires_grad_(True)
    adapter = lora.inject(unet, rank=4, alpha=6)
    assert sorted(adapter.layers) == sorted(names) and len(names) == 8 * (
        2 + 2 + 4
    )  # down, middle, up
    for name, layer in adapter.layers.items():
        assert unet.get_submodule(name) is layer
        assert type(layer.base) is nn.Linear
    learning = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in adapter.parts()}
    for name, p in before.items():  # nothing of the bare model is lost or changed
        module, _, leaf = name.rpartition(".")
        held = unet.get_submodule(module)
        held = held.base if isinstance(held, LoRALinear) else held
        assert torch.equal(getattr(held, leaf), p)


def test_shapes_and_scale(unet):
    adapter = lora.inject(unet, rank=4, alpha=6)
    for layer in adapter.layers.values():
        assert layer.lora_A.shape == (4, layer.base.in_features)
        assert layer.lora_B.shape == (layer.base.out_features, 4)
        assert layer.scale == 1.5
        assert not layer.lora_B.any()
    assert (adapter.rank, adapter.alpha, adapter.targets) == (4, 6, TARGETS)
    assert adapter.trainable == sum(matrix.numel() for _, matrix in adapter.parts())


def test_A_depends_on_seed_and_name_only():
    def linears():
        return {"one__to_q": nn.Linear(24, 8), "two__to_q": nn.Linear(24, 8)}

    def start(modules, seed=5, **options):
        adapter = lora.inject(Net(**modules), rank=4, seed=seed, **options)
        return {name: layer.lora_A.detach() for name, layer in adapter.layers.items()}

    first = start(linears())
    torch.manual_seed(99)
    state = torch.get_rng_state()
    more = start({"zero__to_k": nn.Linear(24, 8)} | dict(reversed(linears().items())))
    torch.set_rng_state(state)
    alone = start({"two__to_q": nn.Linear(24, 8)}, targets=("to_q",))
    assert list(more) == ["zero.to_k", "two.to_q", "one.to_q"]
    for name, A in first.items():
        assert torch.equal(A, more[name])
    assert torch.equal(first["two.to_q"], alone["two.to_q"])
    assert not torch.equal(first["one.to_q"], first["two.to_q"])
    for seed in (0, 4, 6, 2**31):
        other = start(linears(), seed=seed)
        assert not any(torch.equal(other[name], first[name]) for name in first)


def test_inject_leaves_the_global_random_state_alone(unet):
    before = torch.get_rng_state()
    lora.inject(unet, rank=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_two_layers_start_alike(unet):
    adapter = lora.inject(unet, rank=4)
    firsts = {tuple(layer.lora_A[0, :8].tolist()) for layer in adapter.layers.values()}
    assert len(firsts) == len(adapter.layers)


def test_A_is_uniform_within_one_over_root_in_as_pefts(unet):
    adapter = lora.inject(unet, rank=16)
    peft_unet = make_unet()
    peft_unet.add_adapter(LoraConfig(r=16, target_modules=list(TARGETS)))
    theirs = dict(peft_unet.named_parameters())
    for name, layer in adapter.layers.items():
        bound = 1 / math.sqrt(layer.in_features)
        for A in (layer.lora_A, theirs[f"{name}.lora_A.default.weight"]):  # 768 to 1,024 numbers
            assert 0.97 * bound < A.abs().max() <= bound
            assert abs(A.mean()) < 0.1 * bound
            assert abs(A.std() - bound / math.sqrt(3)) < 0.05 * bound


@pytest.mark.parametrize("rank", [0, -4])
def test_rank_below_one_is_refused_and_the_model_left_alone(unet, rank):
    unet.requires_grad_(True)
    with pytest.raises(Refusal, match=f"lora_rank {rank}; expected at least 1"):
        lora.inject(unet, rank=rank)
    assert all(p.requires_grad for p in unet.parameters())
    assert not any(isinstance(m, LoRALinear) for m in unet.modules())


@pytest.mark.parametrize(
    "targets, found",
    [
        (("nowhere",), "nowhere match no layer"),
        (("q",), "q match no layer"),  # a whole part of the name, not its tail
        (("to_out",), r"to_out match \S+\.attn1\.to_out, which is no Linear"),
        (("to_q", "conv_in"), "conv_in, which is no Linear"),
    ],
)
def test_targets_that_are_no_linears_are_refused(unet, targets, found):
    with pytest.raises(Refusal, match=f"{found}; expected names that Linear layers end in"):
        lora.inject(unet, targets=targets)
    assert not any(isinstance(m, LoRALinear) for m in unet.modules())


def test_a_second_adapter_is_refused(unet, batch):
    adapter = stir(lora.inject(unet, rank=4, alpha=6))
    before = answer(unet, batch)
    with pytest.raises(Refusal, match="has an adapter already; expected a bare model"):
        lora.inject(unet, rank=4)
    assert torch.equal(answer(unet, batch), before)
    adapter.check_tied()


# ---- one vector ----------------------------------------------------------------------------------


def offset(part: Tensor, whole: Tensor) -> int:
    """How many numbers into `whole` `part` begins."""
    return (part.data_ptr() - whole.data_ptr()) // 4


def padding(adapter: Adapter) -> Tensor:
    """True where the flat vector holds no matrix."""
    free = torch.ones(adapter.flat.numel(), dtype=torch.bool)
    for _, matrix in adapter.parts():
        at = offset(matrix, adapter.flat)
        free[at : at + matrix.numel()] = False
    return free


def test_flat_vector_is_all_A_then_all_B_each_at_a_multiple_of_256(unet):
    adapter = lora.inject(unet, rank=4, alpha=6)
    in_order = [layer.lora_A for layer in adapter.layers.values()]
    in_order += [layer.lora_B for layer in adapter.layers.values()]
    assert [id(p) for _, p in adapter.parts()] == [id(p) for p in in_order]
    end = 0
    for matrix in in_order:
        for part, whole in ((matrix, adapter.flat), (matrix.grad, adapter.flat.grad)):
            assert offset(part, whole) == math.ceil(end / BLOCK) * BLOCK
            assert part.is_contiguous() and part.dtype == whole.dtype == torch.float32
        end = offset(matrix, adapter.flat) + matrix.numel()
    assert BLOCK == 256
    assert adapter.flat.shape == adapter.flat.grad.shape == (math.ceil(end / BLOCK) * BLOCK,)
    assert adapter.flat.is_leaf and adapter.flat.requires_grad
    assert int((~padding(adapter)).sum()) == adapter.trainable


def test_writing_the_flat_vector_writes_the_model(unet, batch):
    adapter = stir(lora.inject(unet, rank=4, alpha=6))
    with torch.no_grad():
        before = answer(unet, batch)
        kept = adapter.flat.clone()
        adapter.flat.mul_(2)
        for name, matrix in adapter.parts():
            at = offset(matrix, adapter.flat)
            assert torch.equal(matrix.flatten(), 2 * kept[at : at + matrix.numel()]), name
        assert off(answer(unet, batch), before) > 0.01
        adapter.flat.copy_(kept)
        assert torch.equal(answer(unet, batch), before)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, bnb.optim.AdamW8bit])
def test_padding_is_zero_and_stays_zero(unet, optimizer):
    adapter = stir(lora.inject(unet, rank=4, alpha=6))
    free = padding(adapter)
    assert free.sum() > 1000 and not adapter.flat[free].any()
    stepper = optimizer([adapter.flat], lr=1e-2)
    start = adapter.flat.detach().clone()
    for step in range(5):
        loss(unet, make_batch(seed=step)).backward()
        assert not adapter.flat.grad[free].any()
        stepper.step()
        adapter.flat.grad.zero_()
    moved = (adapter.flat.detach() - start).abs()
    assert moved[~free].mean() > 1e-3
    # bitsandbytes' 8-bit zero is not quite zero: the padding may drift, by less than a step
    assert moved[free].max() <= (0 if optimizer is torch.optim.AdamW else 1e-2)


@torch.no_grad()
def test_padding_never_reaches_the_model(unet, batch):
    adapter = stir(lora.inject(unet, rank=4, alpha=6))
    before = answer(unet, batch)
    adapter.flat[padding(adapter)] = 1e3
    assert torch.equal(answer(unet, batch), before)


def test_backward_accumulates_in_place_into_the_flat_gradient(unet):
    adapter = stir(lora.inject(unet, rank=4, alpha=6))
    grad, home = adapter.flat.grad, adapter.flat.grad.data_ptr()

    def alone(seed):
        grad.zero_()
        loss(unet, make_batch(seed=seed)).backward()
        return grad.clone()

    first, second = alone(0), alone(1)
    grad.zero_()
    loss(unet, make_batch(seed=0)).backward()
    loss(unet, make_batch(seed=1)).backward()
    assert adapter.flat.grad is grad and grad.data_ptr() == home
    assert torch.equal(grad, first + second)
    assert off(first, second) > 0.1
    adapter.check_tied()
    assert grad.norm() == torch.cat([m.grad.flatten() for _, m in adapter.parts()]).norm()


def test_check_tied_passes_on_a_fresh_and_on_a_trained_adapter(unet, batch):
    adapter = lora.inject(unet, rank=4, alpha=6)
    adapter.check_tied()
    loss(unet, batch).backward()
    torch.optim.AdamW([adapter.flat], lr=1e-2).step()
    adapter.flat.grad.zero_()
    adapter.check_tied()


TRAPS = {
    "model.to(float16)": (lambda unet, _: unet.to(torch.float16), ".lora_A no longer"),
    "model.half()": (lambda unet, _: unet.half(), ".lora_A no longer"),
    "model.to(float64)": (lambda unet, _: unet.to(torch.float64), ".lora_A no longer"),
    "model.zero_grad()": (lambda unet, _: unet.zero_grad(), ".lora_A.grad no longer"),
    "one A replaced": (
        lambda _, a: setattr(next(iter(a.layers.values())), "lora_B", nn.Parameter(torch.ones(2))),
        ".lora_B no longer",
    ),
    "the flat optimizer's zero_grad()": (
        lambda _, a: torch.optim.AdamW([a.flat]).zero_grad(),
        ".grad no longer",
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_check_tied_refuses(unet, trap):
    adapter = lora.inject(unet, rank=4, alpha=6)
    spring, message = TRAPS[trap]
    spring(unet, adapter)
    with pytest.raises(Refusal, match=f"{message}.*expected views of one fp32 vector.*inject"):
        adapter.check_tied()


def test_check_tied_refuses_a_deep_copy_and_accepts_the_original(unet):
    adapter = lora.inject(unet, rank=4, alpha=6)
    twin_unet, twin = copy.deepcopy((unet, adapter))
    name = next(iter(twin.layers))
    assert twin_unet.get_submodule(name) is twin.layers[name]
    with pytest.raises(Refusal, match=r"lora_A no longer.*expected views"):
        twin.check_tied()
    adapter.check_tied()


# ---- SDXL ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, count", [(16, 23_224_320), (1, 1_451_520), (40, 58_060_800)])
def test_sdxl_has_560_layers_and_1451520_parameters_per_rank(rank, count):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SDXL / "unet"))
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    adapter = lora.inject(unet, rank=rank)
    assert len(adapter.layers) == 560
    assert adapter.trainable == count == 1_451_520 * rank
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == count
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684 + count
    assert count <= adapter.flat.numel() < count + 2 * 560 * BLOCK
    assert adapter.flat.device.type == "meta"


# ---- quantised bases -----------------------------------------------------------------------------


def quantised(kind: str) -> tuple[nn.Module, nn.Linear]:
    """A bitsandbytes Linear (64 -> 32), and the plain one that it was made of."""
    plain = nn.Linear(64, 32)
    layer = {
        "nf4": lambda: bnb.nn.Linear4bit(64, 32, quant_type="nf4"),
        "int8": lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
    }[kind]()
    layer.load_state_dict(plain.state_dict(), strict=False)
    return layer.to("cpu"), plain  # the move is what quantises


@pytest.mark.parametrize("kind, packed", [("nf4", (1024, 1)), ("int8", (32, 64))])
def test_quantised_base_plus_branch(kind, packed):
    base, plain = quantised(kind)
    assert tuple(base.weight.shape) == packed and not base.weight.is_floating_point()
    net = Net(to_q=base)
    adapter = stir(lora.inject(net, rank=4, alpha=6))
    layer = adapter.layers["to_q"]
    assert layer.lora_A.shape == (4, 64) and layer.lora_B.shape == (32, 4)
    x = torch.randn(5, 64, requires_grad=True)
    branch = 6 / 4 * (x @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(net.to_q(x), base(x) + branch)
    assert off(base(x), plain(x)) < 0.2  # quantised, not garbage

    target = torch.randn(5, 32)
    F.mse_loss(net.to_q(x), target).backward()
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    out = net.to_q(x).detach()
    upstream = 2 * (out - target) / out.numel()  # dL/dout
    torch.testing.assert_close(layer.lora_B.grad, 1.5 * upstream.T @ (x.detach() @ A.T))
    torch.testing.assert_close(layer.lora_A.grad, 1.5 * (upstream @ B).T @ x.detach())
    assert off(x.grad, upstream @ plain.weight + 1.5 * upstream @ B @ A) < 0.2
    assert base.weight.grad is None
    adapter.check_tied()


def test_a_model_may_mix_plain_and_quantised_layers():
    net = Net(a__to_q=nn.Linear(64, 32), b__to_k=quantised("nf4")[0], c__to_v=quantised("int8")[0])
    adapter = stir(lora.inject(net, rank=4, alpha=6))
    x = torch.randn(3, 64)
    total = net.a.to_q(x) + net.b.to_k(x) + net.c.to_v(x)
    total.square().mean().backward()
    assert all(matrix.grad.norm() > 0 for _, matrix in adapter.parts())
    adapter.check_tied()


# ---- half precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_unet_with_fp32_parameters_and_gradients(unet, batch, dtype):
    reference = make_unet()
    exact = stir(lora.inject(reference, rank=4, alpha=6))
    adapter = stir(lora.inject(unet.to(dtype), rank=4, alpha=6))
    assert unet.dtype == dtype  # the adapter's fp32 does not pass for the model's
    out = answer(unet, batch)
    assert out.dtype == dtype
    F.mse_loss(out.float(), batch["eps"]).backward()
    loss(reference, batch).backward()
    for _, matrix in adapter.parts():
        assert matrix.dtype == matrix.grad.dtype == torch.float32
    adapter.check_tied()
    close = 0.01 if dtype == torch.float16 else 0.05
    assert off(out.float(), answer(reference, batch)) < close
    assert off(adapter.flat.grad, exact.flat.grad) < close


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output_dtype_is_the_inputs(dtype):
    layer = lone(nn.Linear(24, 16).to(dtype))
    x = torch.randn(5, 24).to(dtype)
    assert layer(x).dtype == layer.down(x).dtype == layer.up(layer.down(x)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_fp32_copy_of_an_activation_is_kept_for_backward(dtype):
    rows, rank = 3 * 40, 4  # more rows than features: every activation outweighs every matrix
    layer = lone(nn.Linear(24, 16).to(dtype), rank=rank)
    x = torch.randn(3, 40, 24).to(dtype).requires_grad_()

    def kept(function) -> list[tuple[torch.dtype, int]]:
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append((t.dtype, t.numel())) or t, lambda t: t
        )
        with hooks:
            function(x)
        return saved

    def wide(saved):
        return [n for kind, n in saved if kind == torch.float32 and n >= rows * rank]

    saved = kept(layer)
    assert (dtype, x.numel()) in saved and (dtype, rows * rank) in saved  # x and A x, in half
    assert not wide(saved)
    assert wide(kept(lambda x: F.linear(x.float(), layer.lora_A)))  # the measure sees such a copy
