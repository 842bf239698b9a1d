"""The adapter's mathematics: what LoRA promises."""

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
from lora import TARGETS, Adapter, LoRALinear
from made import assert_same_weights


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
    """One layer with a random A and B."""
    generator = torch.Generator().manual_seed(3)
    layer = LoRALinear(base.requires_grad_(False), rank, alpha, generator)
    layer.lora_A.data.normal_(generator=generator)
    layer.lora_B.data.normal_(generator=generator)
    return layer


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
        assert not torch.equal(layer.base.weight, layer.weight_before_merge)
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
def test_another_strength_or_other_numbers_are_refused_while_merged(unet, batch):
    adapter = stir(lora.inject(unet, rank=4, alpha=6))
    matrices = {name: each.clone() for name, each in adapter.matrices().items()}
    lora.merge(adapter)
    merged = answer(unet, batch)
    for change in (
        lambda: lora.set_strength(adapter, 0),
        lambda: lora.load(adapter, lora.AdapterFile("f", matrices, 4, 6.0, {})),
    ):
        with pytest.raises(Refusal, match="merged into its base"):
            change()
    assert torch.equal(answer(unet, batch), merged)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_merged_model_that_is_unwrapped_is_saved_as_diffusers_reads_it(
    unet, batch, tmp_path, dtype
):
    bare = {name: tuple(weight.shape) for name, weight in unet.state_dict().items()}
    adapter = stir(lora.inject(unet.to(dtype), rank=4, alpha=6))
    adapted = answer(unet, batch)
    lora.merge(adapter)
    lora.unwrap(unet, adapter)
    assert {name: tuple(weight.shape) for name, weight in unet.state_dict().items()} == bare
    unet.save_pretrained(tmp_path)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert_same_weights(theirs, unet)
    assert off(answer(theirs, batch).float(), adapted.float()) < 10 * torch.finfo(dtype).eps


@torch.no_grad()
def test_unwrapped_without_a_merge_the_model_is_bare_again_and_may_be_adapted_anew(unet, batch):
    before = answer(unet, batch)
    adapter = stir(lora.inject(unet, rank=4, alpha=6))
    assert not torch.equal(answer(unet, batch), before)
    lora.unwrap(unet, adapter)
    assert torch.equal(answer(unet, batch), before)
    assert len(lora.inject(unet, rank=2).layers) == len(adapter.layers)


def test_merge_refuses_a_base_in_4_bits_and_touches_nothing():
    net = Net(first__to_q=nn.Linear(64, 32), second__to_q=quantised("nf4")[0])
    adapter = stir(lora.inject(net, rank=4, alpha=6))
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(Refusal, match=r"second\.to_q has a quantised weight.*expected fp32"):
        lora.merge(adapter)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert all(layer.weight_before_merge is None for layer in adapter.layers.values())


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
    ours = adapter.matrices()
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
    for name, matrix in adapter.matrices().items():
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


@pytest.mark.parametrize(
    ("optimizer", "bound"),
    [(torch.optim.AdamW, 1e-4), pytest.param(bnb.optim.AdamW8bit, 1e-3, marks=pytest.mark.slow)],
)
def test_ten_steps_equal_pefts(unet, optimizer, bound):
    """Less than `bound` apart, as a share of the way gone."""
    adapter = stir(lora.inject(unet, rank=4, alpha=20))
    peft_unet, theirs = peft_twin(adapter)
    start = {name: matrix.detach().clone() for name, matrix in adapter.matrices().items()}
    settings = {} if optimizer is torch.optim.AdamW else {"min_8bit_size": 1}
    steppers = [
        optimizer(list(each.values()), lr=1e-3, **settings) for each in (lora.trained(unet), theirs)
    ]
    for step in range(10):
        batch = make_batch(seed=step)
        loss(unet, batch).backward()
        loss(peft_unet, batch).backward()
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
    for name, matrix in adapter.matrices().items():
        moved = theirs[name].detach() - start[name]
        assert moved.abs().max() > 1e-3, name
        assert (matrix.detach() - theirs[name]).norm() < bound * moved.norm(), name


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
    assert lora.trained(unet).keys() == adapter.matrices().keys()
    assert all(each is lora.trained(unet)[name] for name, each in adapter.matrices().items())
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


@pytest.mark.parametrize(
    "targets, found",
    [
        (("nowhere",), "nowhere match nothing"),
        (("q",), "q match nothing"),  # a whole part of the name, not its tail
        (("to_out",), r"to_out match \S+\.attn1\.to_out"),
        (("to_q", "conv_in"), "to_q, conv_in match conv_in"),
    ],
)
def test_targets_that_are_no_linears_are_refused(unet, targets, found):
    with pytest.raises(Refusal, match=f"{found}; expected plain Linear layers"):
        lora.inject(unet, targets=targets)
    assert not any(isinstance(m, LoRALinear) for m in unet.modules())


def test_a_second_adapter_is_refused(unet, batch):
    stir(lora.inject(unet, rank=4, alpha=6))
    before = answer(unet, batch)
    with pytest.raises(
        Refusal, match=r"attn1\.to_q.*; expected plain Linear layers of a bare model"
    ):
        lora.inject(unet, rank=4)
    assert torch.equal(answer(unet, batch), before)


# ---- SDXL ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, count", [(16, 23_224_320), (1, 1_451_520)])
def test_sdxl_has_560_layers_and_1451520_parameters_per_rank(rank, count):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SDXL / "unet"))
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    adapter = lora.inject(unet, rank=rank)
    assert len(adapter.layers) == 560
    assert sum(p.numel() for p in lora.trained(unet).values()) == count == 1_451_520 * rank
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684 + count


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


def test_a_model_may_mix_plain_and_quantised_layers():
    net = Net(a__to_q=nn.Linear(64, 32), b__to_k=quantised("nf4")[0], c__to_v=quantised("int8")[0])
    adapter = stir(lora.inject(net, rank=4, alpha=6))
    x = torch.randn(3, 64)
    total = net.a.to_q(x) + net.b.to_k(x) + net.c.to_v(x)
    total.square().mean().backward()
    assert all(matrix.grad.norm() > 0 for matrix in adapter.matrices().values())


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
    for matrix in adapter.matrices().values():
        assert matrix.dtype == matrix.grad.dtype == torch.float32
    close = 0.01 if dtype == torch.float16 else 0.05
    assert off(out.float(), answer(reference, batch)) < close
    grads = [
        torch.cat([m.grad.flatten() for m in each.matrices().values()]) for each in (adapter, exact)
    ]
    assert off(*grads) < close


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
