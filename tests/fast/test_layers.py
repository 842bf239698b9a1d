"""The fused layers against the definitions: same answers, same gradients."""

import copy
import types

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from diffusers.models.activations import GEGLU

import loop
import lora
import model
from conftest import make_batch, make_unet
from fast import flat
from fast import layers as fused

SCHEDULE = model.NoiseSchedule(torch.linspace(0.999, 0.005, 1000), "epsilon")


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


MORE = ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")  # what may be adapted besides


def adapted(fuse: bool, rank: int = 4, dtype=torch.float32, targets=lora.TARGETS):
    """A UNet with a trained-looking adapter in one vector, fused or as diffusers and lora.py
    define it.
    """
    unet = make_unet().to(dtype)
    adapter = lora.inject(unet, targets, rank=rank, alpha=6, seed=3)
    said = fused.wrap(unet) if fuse else ""
    vector = flat.Flat(unet, lora.trained(unet))
    with torch.no_grad():
        vector.vector.add_(0.05 * torch.randn(vector.vector.shape, generator=rng(1)))
    return unet, adapter, vector, said


def rng(seed):
    return torch.Generator().manual_seed(seed)


def gradient(unet, vector, batch):
    losses = []

    def step(run, batch):
        losses.append(loop.diffusion_loss(run.unet, batch, SCHEDULE, (0.13, 0.0)))
        losses[0].sum().backward()

    vector.vector.grad.zero_()
    vector.micro_step(step)(types.SimpleNamespace(unet=unet), batch)
    return losses[0].detach(), vector.vector.grad.clone()


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("checkpointing", ["none", "some", "all"])
def test_loss_and_gradient_equal_the_definitions(rank, checkpointing, one_thread):
    """Rank 1 leaves padding between the matrices, so that they do not follow one another."""
    batch, found = make_batch(3), []
    for fuse in (False, True):
        unet, _, vector, said = adapted(fuse, rank)
        unet.train()
        if checkpointing != "none":
            some = ("mid_block.attentions.0", "up_blocks.0.attentions.0")
            model.use_gradient_checkpointing(unet, some if checkpointing == "some" else ())
        found.append(gradient(unet, vector, batch))
    assert said == "16 attention layers, 8 convolution blocks and 8 feed-forward gates fused"
    (loss, grad), (fused_loss, fused_grad) = found
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=0)
    assert grad.norm() > 0 and off(fused_grad, grad) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", [(*lora.TARGETS, *MORE), MORE, ("to_q", *MORE[1:3])])
def test_so_they_do_where_more_or_other_layers_are_adapted(targets, checkpointing, one_thread):
    batch, found = make_batch(3), []
    for fuse in (False, True):
        unet, adapter, vector, said = adapted(fuse, targets=targets)
        unet.train()
        if checkpointing:
            model.use_gradient_checkpointing(unet)
        found.append(gradient(unet, vector, batch))
    inside = (".attn1.", ".attn2.", "ff.net.0.proj") if lora.TARGETS[1] in targets else ("net.0.",)
    others = [name for name in adapter.layers if not any(part in name for part in inside)]
    assert f" {len(others)} other adapted layers, 8 convolution blocks and 8 feed" in " " + said
    (loss, grad), (fused_loss, fused_grad) = found
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=0)
    assert grad.norm() > 0 and off(fused_grad, grad) < 1e-5


def test_a_half_precision_gradient_is_near_the_exact_one(one_thread):
    batch = make_batch(2)
    unet, _, vector, _ = adapted(False)
    _, exact = gradient(unet, vector, batch)
    unet, _, vector, _ = adapted(True, dtype=torch.bfloat16)
    _, grad = gradient(unet, vector, batch)
    assert unet.dtype == torch.bfloat16 and 0 < off(grad, exact) < 0.05


def test_layers_share_one_matrix_a_without_a_copy_where_they_follow_one_another():
    vector = torch.arange(64.0)
    first, second, third = (
        vector[:16].view(2, 8),
        vector[16:32].view(2, 8),
        vector[40:56].view(2, 8),
    )
    together = fused.stacked((first, second))
    assert torch.equal(together, vector[:32].view(4, 8))
    assert together.data_ptr() == vector.data_ptr()
    apart = fused.stacked((first, third))
    assert torch.equal(apart, torch.cat([first, third]))
    assert torch.equal(fused.stacked((second, first)), torch.cat([second, first]))


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_projections_pass_a_numerical_gradient_check(k, bias, joined):
    """In double precision, against finite differences (torch.autograd.gradcheck)."""
    torch.manual_seed(0)
    bases = [torch.nn.Linear(5, 3, bias).double().requires_grad_(False) for _ in range(k)]
    if joined:
        fused.join([torch.nn.ModuleDict({"base": base}) for base in bases])
        assert fused.follow(tuple(base.weight for base in bases))
    shapes = [(6, 5)] + [(2, 5)] * k + [(3, 2)] * k
    x, *matrices = (torch.randn(s, dtype=torch.double, requires_grad=True) for s in shapes)

    def together(x, *matrices):
        return fused.Project.apply(x, 1.5, tuple(bases), *matrices)

    assert torch.autograd.gradcheck(together, (x, *matrices))
    pairs = zip(bases, matrices[:k], matrices[k:], strict=True)
    apart = torch.cat([base(x) + 1.5 * (x @ A.T) @ B.T for base, A, B in pairs], dim=1)
    torch.testing.assert_close(together(x, *matrices), apart)


def test_the_gate_passes_a_numerical_gradient_check_and_keeps_only_its_halves():
    torch.manual_seed(0)
    gate = GEGLU(8, 16).requires_grad_(False)
    x, kept = torch.randn(3, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        answer = fused.gated(gate, x)
    assert kept == [(3, 16), (3, 16)]
    torch.testing.assert_close(answer, gate(x))
    gate, x = gate.double(), x.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fused.GatedLinear.apply(x, gate.proj), (x,))


def test_an_adapted_gate_passes_a_numerical_gradient_check():
    torch.manual_seed(0)
    gate = GEGLU(8, 16).double()
    layer = next(iter(lora.inject(gate, ("proj",), rank=3, alpha=6).layers.values()))
    sizes = ((5, 8), (3, 8), (32, 3))
    x, A, B = (torch.randn(s, dtype=torch.double, requires_grad=True) for s in sizes)

    def together(x, A, B):
        return fused.GatedLinear.apply(x, layer.base, layer.scale, A, B)

    assert torch.autograd.gradcheck(together, (x, A, B))
    layer.lora_A.data, layer.lora_B.data = A.detach(), B.detach()
    torch.testing.assert_close(together(x, A, B), gate(x))
    layer.strength = 0.0
    layer.lora_B.data.fill_(float("inf"))  # times 0 it would be NaN
    assert torch.equal(fused.gated(gate, x), gate(x)) and gate(x).isfinite().all()


def test_an_nf4_layer_is_fused_as_its_own_forward_computes_it():
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 32)
    quantised = Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    quantised.load_state_dict(plain.state_dict())
    holder = torch.nn.ModuleDict({"to_q": quantised.to("cpu")})
    adapter = lora.inject(holder, ("to_q",), rank=4, alpha=8)
    adapter.layers["to_q"].lora_B.data.normal_()
    x = torch.randn(2, 6, 64)
    (answer,) = fused.project(x, [adapter.layers["to_q"]])
    torch.testing.assert_close(answer, adapter.layers["to_q"](x), rtol=1e-4, atol=1e-5)
    assert off(answer, copy.deepcopy(plain)(x)) > 0.01  # 4 bits are not fp32


def bare(targets=lora.TARGETS):
    unet = make_unet()
    lora.inject(unet, targets, rank=4, alpha=6)
    return unet


def test_a_layer_with_more_than_sdxls_is_noticed():
    unet = bare()
    attention = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    attention.residual_connection = True
    assert "mid_block.attentions.0.transformer_blocks.0.attn1 would be" in fused.disagreement(unet)


def test_only_layers_that_are_known_are_fused():
    """A LoRALinear of another kind computes by its own lines, the others of its attention alone."""
    unet = bare()
    attention = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    attention.to_k.__class__ = type("Other", (lora.LoRALinear,), {})
    assert fused.wrap(unet).startswith("15 attention layers, 3 other adapted layers, ")


def test_fused_layers_go_back_to_their_definitions(one_thread):
    unet, _, _, _ = adapted(False)
    batch = make_batch(2)
    with torch.no_grad():
        before = model.predict(unet, batch["noise"], batch)
        fused.wrap(unet)
        assert off(model.predict(unet, batch["noise"], batch), before) < 1e-5
        fused.unwrap(unet)
        assert torch.equal(model.predict(unet, batch["noise"], batch), before)
    left = ("forward", fused.convolution.LEAVE)
    assert not any(name in vars(each) for each in unet.modules() for name in left)


FORWARDS = {  # of the branch, scaled; the book's own is the first
    "as it is": (lambda s, x: s.scale * s.up(s.down(x)), ""),
    "times 5": (lambda s, x: 5 * s.scale * s.up(s.down(x)), "would be off by"),
    "a thousandth more": (lambda s, x: 1.001 * s.scale * s.up(s.down(x)), "would be off by"),
    "tanh": (lambda s, x: torch.tanh(s.scale * s.up(s.down(x))), "would be off by"),
    "relu after A": (lambda s, x: s.scale * s.up(torch.relu(s.down(x))), "would be off by"),
    "an error": (lambda s, x: s.nothing, "cannot be computed fused"),
}


@pytest.mark.parametrize("edit", FORWARDS)
def test_an_edited_forward_is_noticed_and_nothing_is_touched(monkeypatch, edit):
    branch, said = FORWARDS[edit]
    monkeypatch.setattr(lora.LoRALinear, "forward", lambda s, x: s.base(x) + branch(s, x))
    unet = bare()
    before = {name: each.clone() for name, each in unet.state_dict().items()}
    found = fused.disagreement(unet)
    assert said in found and bool(found) == bool(said)
    assert all(torch.equal(each, before[name]) for name, each in unet.state_dict().items())


def test_a_parameter_that_the_fused_form_does_not_know_is_noticed(monkeypatch):
    usual = lora.LoRALinear.__init__

    def with_gain(layer, *about):
        usual(layer, *about)
        layer.gain = torch.nn.Parameter(torch.ones(1))

    monkeypatch.setattr(lora.LoRALinear, "__init__", with_gain)
    monkeypatch.setattr(
        lora.LoRALinear, "forward", lambda s, x: s.base(x) + s.gain * s.scale * s.up(s.down(x))
    )
    assert "would be off by" in fused.disagreement(bare())


@pytest.mark.parametrize("targets", [lora.TARGETS, (*lora.TARGETS, *MORE)])
def test_merged_and_at_strength_0_fused_layers_are_the_base_to_the_bit(targets, one_thread):
    batch = make_batch(2)
    unet, adapter, _, _ = adapted(True, targets=targets)
    plain, same, _, _ = adapted(False, targets=targets)

    def answers(change):
        with torch.no_grad():
            for each in (adapter, same):
                change(each)
            return [model.predict(u, batch["noise"], batch) for u in (unet, plain)]

    trained, _ = answers(lambda a: None)
    lora.set_strength(adapter, 0.0)
    lora.set_strength(same, 0.0)
    off_, plain_off = answers(lambda a: None)
    assert off(off_, plain_off) < 1e-5 and off(off_, trained) > 1e-3
    layer = adapter.layers["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    x = torch.randn(2, 5, layer.in_features)
    assert torch.equal(fused.project(x, [layer])[0], layer.base(x))
    lora.set_strength(adapter, 1.0)
    lora.set_strength(same, 1.0)
    merged, plain_merged = answers(lora.merge)
    assert off(merged, plain_merged) < 1e-5 and off(merged, trained) < 1e-4
    again, _ = answers(lora.unmerge)
    assert off(again, trained) < 1e-5


@pytest.mark.parametrize("blocks", [None, ("mid_block.attentions.0",), ()])
def test_keys_and_values_come_from_one_product_a_size_unless_all_are_recomputed(
    monkeypatch, blocks, one_thread
):
    """Of 8 cross-attention layers, which have one width here; SDXL has two."""
    unet, _, _, _ = adapted(True)
    unet.train()
    if blocks is not None:
        model.use_gradient_checkpointing(unet, blocks)
    usual, sizes = fused.project, []
    monkeypatch.setattr(
        fused, "project", lambda x, layers: sizes.append(len(layers)) or usual(x, layers)
    )
    with torch.no_grad():
        model.predict(unet, (batch := make_batch(2))["noise"], batch)
    pairs = sorted(size for size in sizes if size % 2 == 0)
    assert pairs == ([2] * 8 if blocks == () else [16])


@pytest.mark.parametrize("trained", ["attn1.to_q.base", "ff.net.0.proj"])
def test_a_frozen_layer_that_an_edit_trains_is_noticed(trained):
    unet = bare()
    layer = next(each for name, each in unet.named_modules() if name.endswith(trained))
    layer.requires_grad_(True)
    assert "would be off by" in fused.disagreement(unet)


@pytest.mark.parametrize("trained", ["conv_norm_out", "mid_block.attentions.0.norm"])
def test_norms_that_an_edit_trains_stay_diffusers(trained):
    unet = bare()
    unet.get_submodule(trained).requires_grad_(True)
    assert fused.disagreement(unet) == "" and "convolution" not in fused.wrap(unet)


def test_layers_that_act_at_strengths_of_their_own_keep_them(one_thread):
    unet, adapter, _, _ = adapted(False)
    for i, layer in enumerate(adapter.layers.values()):
        layer.strength = 0.5 + i / 16
    batch = make_batch(2)
    with torch.no_grad():
        plain = model.predict(unet, batch["noise"], batch)
        fused.wrap(unet)
        assert off(model.predict(unet, batch["noise"], batch), plain) < 1e-5


def test_a_mask_of_the_context_holds_for_every_head_of_its_example(one_thread):
    unet, _, _, _ = adapted(False)
    name, plain = next((n, m) for n, m in fused.fusible(unet).items() if n.endswith("attn2"))
    count = plain.heads  # as many examples as heads: each would pass for the other
    x, context = (torch.randn(count, 5, w, generator=rng(2)) for w in fused_widths(plain))
    mask = torch.zeros(count, 1, 5)
    mask[torch.arange(count), 0, torch.arange(count) % 5] = -1e4
    with torch.no_grad():
        expected = plain(x, context, attention_mask=mask)
        plain.set_processor(fused.Attention())
        assert off(plain(x, context, attention_mask=mask), expected) < 1e-5, name


def fused_widths(attn) -> tuple[int, int]:
    return attn.to_q.in_features, attn.to_k.in_features
