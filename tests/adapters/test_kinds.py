"""LoRA on more layers, and its relatives: equal to PEFT's and LyCORIS' own, in forward, gradients
and ten steps, and never taken for plain LoRA."""

import functools
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn

import lora
import model
from adapter_tools import answer, numbers, off, pipeline
from adapters import files, foreign, kinds
from conftest import SDXL, TINY, make_batch, make_unet
from fast import convolution, plan
from fast import layers as fused
from fast.flat import Flat, alike
from inputs.files import Refusal
from inputs.options import RECIPES, parse
from keep import checkpoint, drawing, export
from one_file_names import old_unet_name
from tiny_run import assembled, keep, step

LONG = pytest.mark.slow
RANK, ALPHA, PATTERN = 4, 6, {"mid_block": 3, "attn2.to_k": 5}


def adapted(kind="lora", targets=("transformer",), seed=3, stirred=True, pattern=PATTERN):
    """A tiny UNet and its adapter, as if trained."""
    unet = make_unet()
    adapter = kinds.inject(unet, targets, RANK, ALPHA, seed, kind, pattern)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for matrix in adapter.matrices().values() if stirred else ():
            matrix.add_(0.1 * torch.randn(matrix.shape, generator=generator))
    return unet, adapter


def trained_alike(ours: dict, theirs: dict, loss_ours, loss_theirs, bound=1e-4):
    """Both sets of matrices after ten steps of AdamW, less than `bound` of the way apart."""
    start = {name: each.detach().clone() for name, each in ours.items()}
    optimizers = [torch.optim.AdamW(list(each.values()), lr=1e-3) for each in (ours, theirs)]
    for i in range(10):
        for optimizer, loss in zip(optimizers, (loss_ours, loss_theirs), strict=True):
            loss(i).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, each in ours.items():
        moved = theirs[name].detach() - start[name]
        assert moved.abs().max() > 1e-3, name
        assert off(each.detach() - start[name], moved) < bound, name


# ---- which layers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, targets",
    [
        ("lora", ("mid_block.*(attn2|ff|proj)", "samplers.*conv", "up.*conv1")),
        ("dora", ("mid_block.*(attn2|ff|proj)",)),
        *(pytest.param("lora", (name,), marks=pytest.mark.slow) for name in ("transformer", "all")),
        pytest.param("dora", ("transformer",), marks=pytest.mark.slow),
    ],
)
def test_more_layers_and_dora_equal_pefts(kind, targets, batch, one_thread):
    """Attention, feed-forward, projections, convolutions, and layers of other ranks."""
    unet, adapter = adapted(kind, targets)
    twin = make_unet()
    how = {"rank_pattern": adapter.ranks, "use_dora": kind == "dora"}
    names = list(adapter.layers)
    twin.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, **how))
    theirs = {
        name.replace(".default.weight", ""): each
        for name, each in twin.named_parameters()
        if each.requires_grad
    }
    mine = adapter.matrices()
    assert theirs.keys() == mine.keys() == lora.trained(unet).keys()
    with torch.no_grad():
        for name, each in theirs.items():
            each.copy_(mine[name])

    def loss(model, i):
        batch = make_batch(seed=i)
        return F.mse_loss(answer.__wrapped__(model, batch), batch["eps"])

    assert off(answer(unet, batch), answer(twin, batch)) < 1e-6
    for each in (unet, twin):
        loss(each, 0).backward()
    for name, each in mine.items():
        assert off(each.grad, theirs[name].grad) < 1e-4, name
        each.grad = theirs[name].grad = None
    bound = 1e-4 if kind == "lora" else 1e-3  # DoRA's gain is summed in another order
    losses = (functools.partial(loss, unet), functools.partial(loss, twin))
    trained_alike(mine, theirs, *losses, bound)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_zero_effect_at_the_start_and_at_strength_0(kind, batch):
    bare = answer(make_unet(), batch)
    unet, adapter = adapted(kind, stirred=False)
    assert torch.equal(answer(unet, batch), bare) and not kinds.moved(adapter)
    unet, adapter = adapted(kind)
    assert off(answer(unet, batch), bare) > 0.05 and kinds.moved(adapter)
    lora.set_strength(adapter, 0)
    assert torch.equal(answer(unet, batch), bare)


def test_groups_are_sdxls_and_their_parameters_are_told():
    unet, adapter = adapted(targets=("all",), pattern={})
    count = dict.fromkeys(kinds.GROUPS, 0)
    for part in kinds.describe(adapter).removeprefix("lora: ").split("; "):
        group, _, number = part.rpartition(" layers with ")
        count[group.rpartition(" ")[0]] = int(number.split()[0].replace(",", ""))
    assert sum(count.values()) == sum(each.numel() for each in lora.trained(unet).values())
    assert all(count.values())
    assert kinds.describe(lora.inject(make_unet())) == ""  # the book's is told elsewhere
    conv = next(each for name, each in adapter.layers.items() if name.endswith("conv1"))
    assert conv.lora_A.shape[2:] == (3, 3) and conv.lora_B.shape[2:] == (1, 1)


def full_size():
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SDXL / "unet"))


@pytest.mark.slow
def test_sdxls_layers_and_their_parameters():
    """kohya's 722 layers; at rank 16 as many numbers as its formula says."""
    unet = full_size()
    counts = {name: len(kinds.find(unet, [name])) for name in kinds.SETS}
    assert counts == {"attention": 560, "transformer": 722, "all": 760}
    found = {"lora": 42_557_440, "dora": 43_993_600, "loha": 85_114_880, "lokr": 1_929_888}
    for kind, count in found.items():
        with torch.device("meta"):
            adapter = kinds.inject(full_size(), ("transformer",), 16, 16, kind=kind)
        assert sum(each.numel() for each in adapter.matrices().values()) == count


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_the_plan_counts_them(kind):
    usual = replace(RECIPES["t4"][1], resolution=(64,), lora_rank=4, preview_steps=0)
    found = []
    for config in (usual, replace(usual, adapter=kind, targets=("transformer",))):
        predict = plan.predictor(config, torch.float32, TINY, kinds.injector(config))
        found.append(predict(replace(config, train_batch_size=1)).parts)
    with torch.device("meta"):
        adapter = kinds.injector(config)(make_unet(), lora.TARGETS, 4)
    padded = sum(-(-each.numel() // 256) * 256 for each in adapter.matrices().values())
    assert found[1]["adapter"] == 4 * padded != found[0]["adapter"]
    assert found[1]["weights"] == found[0]["weights"]


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: adapted(targets=("attention", "attn9")), "targets attn9 match nothing"),
        (lambda: adapted(pattern={"nowhere": 3}), "targets nowhere match nothing"),
        (
            lambda: adapted("loha", ("all",)),
            "loha on 18 convolutions such as down_blocks.0.resnets",
        ),
        (lambda: kinds.find(adapted()[0], ["attention"]), "match "),
        (lambda: parse(["pocket", "--targets", "("]), "--targets (; expected a regular"),
        (lambda: parse(["pocket", "--rank-pattern", "mid=0"]), "--rank-pattern mid=0"),
        (lambda: parse(["pocket", "--plain", "--adapter", "dora"]), "--plain with --adapter"),
        (lambda: parse(["pocket", "--start-from", "a", "--adapter", "dora"]), "with --adapter"),
    ],
)
def test_what_cannot_be_is_refused(call, said):
    with pytest.raises(Refusal) as refusal:
        call()
    assert said in str(refusal.value)


# ---- equal to LyCORIS' ---------------------------------------------------------------------------


def lycoris(kind: str, base: nn.Linear, rank: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lycoris.modules.loha import LohaModule
        from lycoris.modules.lokr import LokrModule
    cls = {"loha": LohaModule, "lokr": LokrModule}[kind]
    return cls("lora_unet_x", base, 1.0, rank, ALPHA)


@pytest.mark.parametrize("shape", [(1280, 640), (48, 64), (37, 12)])  # in, out
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_layers_equal_lycoris(kind, shape, one_thread):
    """Names and shapes, forward, gradients, and ten steps; LoKr also where w2 is whole."""
    torch.manual_seed(0)
    base = nn.Linear(*shape).requires_grad_(False)
    layer = kinds.KINDS[kind](base, RANK, ALPHA, torch.Generator().manual_seed(3))
    other = lycoris(kind, base, RANK)
    ours = {key: getattr(layer, key) for key in layer.keys}
    theirs = dict(other.named_parameters())
    assert {key: each.shape for key, each in ours.items()} == {
        key: each.shape for key, each in theirs.items()
    }
    assert other.scale == layer.scale
    with torch.no_grad():
        for key, each in ours.items():
            each.add_(0.1 * torch.randn(each.shape))
            theirs[key].copy_(each)
    x, y = torch.randn(3, 5, shape[0]), torch.randn(3, 5, shape[1])
    assert off(layer(x), other(x)) < 1e-5 and off(layer(x), base(x)) > 0.05
    for each in (layer, other):
        F.mse_loss(each(x), y).backward()
    for key, each in ours.items():
        assert off(each.grad, theirs[key].grad) < 1e-4
        each.grad = theirs[key].grad = None
    losses = (lambda i, m=m: F.mse_loss(m(x * (i + 1)), y) for m in (layer, other))
    trained_alike(ours, theirs, *losses)


@pytest.mark.parametrize("width", [1, 37, 48, 640, 1280, 2048, 2816, 5120, 10240])
def test_factors_are_lycoris(width):
    from lycoris.functional.general import factorization

    assert kinds.factors(width) == factorization(width)


# ---- in a run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_update_is_what_the_layer_adds(kind):
    _, adapter = adapted(kind)
    for layer in list(adapter.layers.values())[::9]:
        if kind != "lora":
            x = torch.randn(4, layer.frozen.in_features)
            want = layer.frozen(x) + x @ layer.update().T
            assert off(layer(x), want) < 1e-5 < off(layer(x), layer.frozen(x))


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_a_base_in_4_bits(kind):
    """The correction is that of the expanded weight."""
    torch.manual_seed(0)
    plain = nn.Linear(64, 32)
    base = Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    base.load_state_dict(plain.state_dict())
    net = nn.ModuleDict({"to_q": base.to("cpu")})
    layer = kinds.inject(net, ("to_q",), RANK, ALPHA, kind=kind).layers["to_q"]
    x = torch.randn(5, 64)
    assert torch.equal(layer(x), base(x))
    for key in layer.keys:
        getattr(layer, key).data.add_(0.1 * torch.randn(getattr(layer, key).shape))
    want = base(x) + x @ layer.update().T
    assert off(layer(x), want) < 1e-5 and off(layer(x), base(x)) > 0.05
    layer(x).square().sum().backward()
    assert all(getattr(layer, key).grad.any() for key in layer.keys)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_what_computes_lora_faster_leaves_the_others_alone(kind, batch):
    """No attention layer is fused, and the answer stays the kind's own."""
    unet, adapter = adapted(kind, ("attention",))
    want = answer(unet, batch)
    assert fused.disagreement(unet) == ""
    assert fused.wrap(unet) == "8 convolution blocks and 8 feed-forward gates fused"
    Flat(unet, lora.trained(unet))
    assert off(answer(unet, batch), want) < 1e-5
    assert all(type(each) is kinds.KINDS[kind] for each in adapter.layers.values())


def test_only_attention_of_one_rank_is_fused(batch):
    unet, _ = adapted(targets=("all",), pattern={"attn2.to_k": 5})
    want = answer(unet, batch)
    assert fused.disagreement(unet) == ""
    said = fused.wrap(unet)
    assert said == "8 attention layers, 48 other adapted layers and 8 feed-forward gates fused"
    assert off(answer(unet, batch), want) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", [("all",), ("mid_block.resnets.0.conv1", "conv_shortcut")])
def test_convolutions_that_are_adapted_are_called_between_fused_norms(
    batch, targets, checkpointing, monkeypatch, one_thread
):
    """All gradients; as on a GPU, since a CPU keeps torch's order of channels where they are."""
    found = []
    for device in ("cpu", "meta"):
        unet, adapter = adapted(targets=targets, pattern={})
        unet.train()
        if checkpointing:
            model.use_gradient_checkpointing(unet)
        with monkeypatch.context() as patch:
            patch.setattr(type(unet), "device", torch.device(device))
            assert fused.disagreement(unet) == ""
            said = fused.wrap(unet)
        assert ("8 convolution blocks" in said) == (device == "meta")
        y = model.predict(unet, batch["noise"], batch)
        y.square().sum().backward()
        grads = {k: p.grad for k, p in unet.named_parameters() if p.grad is not None}
        found.append({"answer": y.detach()} | grads)
    usual, nhwc = found
    assert usual.keys() == nhwc.keys() and len(usual) == 1 + 2 * len(adapter.layers)
    assert all(off(nhwc[name], usual[name]) < 2e-5 for name in usual)
    assert usual["mid_block.resnets.0.conv1.lora_A"].norm() > 0


@pytest.mark.parametrize("what", ["SiLU", "the timestep", "the gradient"])
def test_what_is_left_out_around_an_adapted_convolution_is_noticed(what, monkeypatch):
    unet, _ = adapted(targets=("all",))
    usual = convolution.Norm.apply

    def without(x, norm, shift=None, silu=False):
        shift = None if what == "the timestep" else shift
        y = usual(x, norm, shift, silu and what != "SiLU")
        return y.detach() if what == "the gradient" else y

    monkeypatch.setattr(type(unet), "device", torch.device("meta"))
    monkeypatch.setattr(convolution.Norm, "apply", without)
    assert "resnets.0 would be off by" in fused.disagreement(unet)


def test_a_rank_pattern_of_layers_that_are_not_adapted_and_conv_in_are_refused():
    with pytest.raises(
        Refusal, match=r"--rank-pattern ff.net is found in no layer of --targets att"
    ):
        kinds.inject(make_unet(), ("attention",), 4, rank_pattern={"ff.net": 8})
    with pytest.raises(Refusal, match="targets conv_in match nothing"):
        kinds.inject(make_unet(), ("conv_in",), 4)


def test_dora_lengths_stay_fp32_in_a_half_precision_step():
    """A step of 1e-5 on a length of 1 would be rounded away in fp16."""
    unet, adapter = adapted("dora", ("attention",))
    parts, seen = alike(lora.trained(unet.half())), {}
    flats = [Flat(unet, part) for part in parts]

    def inner(run, batch):
        layer = next(iter(adapter.layers.values()))
        seen.update({key: getattr(layer, key) for key in layer.keys})
        answer.__wrapped__(unet, {k: v.half() if k != "t" else v for k, v in batch.items()})
        sum(each.float().sum() for each in seen.values()).backward()

    step = flats[1].micro_step(flats[0].micro_step(inner))
    step(type("Run", (), {"unet": unet}), make_batch())
    dtypes = {key: each.dtype for key, each in seen.items()}
    assert dtypes.pop("lora_magnitude_vector") == torch.float32
    assert set(dtypes.values()) == {torch.float16}
    name = next(iter(adapter.layers))
    assert flats[1].views[f"{name}.lora_magnitude_vector"].grad.eq(1).all()
    assert flats[0].views[f"{name}.lora_A"].grad.eq(1).all()


@pytest.mark.slow
# plain LoRA's in half precision are in test_files.py
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=LONG)])
@pytest.mark.parametrize("layout", ["peft", "kohya"])
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_file_holds_all_of_it_and_programs_read_it(kind, layout, dtype, tmp_path, batch):
    """Our reader, and diffusers where it can: LoRA in both layouts, DoRA in PEFT's."""
    unet, adapter = adapted(kind, ("all",) if kind == "lora" else ("transformer",))
    want, kept, path = answer(unet, batch), numbers(adapter), tmp_path / "a.safetensors"
    files.save(adapter, path, layout, dtype, {})
    drawn = foreign.Drawn(make_unet())
    foreign.load(drawn, foreign.read(path))
    bound = 1e-6 if dtype == torch.float32 else 3e-3
    assert off(answer(drawn.model, batch), want) < bound
    for matrix in adapter.matrices().values():
        matrix.data.zero_()
    files.put_back(adapter, path)
    assert torch.equal(numbers(adapter), kept.to(dtype).float())
    if kind == "lora" or (kind, layout) == ("dora", "peft"):
        pipe = pipeline(make_unet())
        pipe.load_lora_weights(path)
        assert off(answer(pipe.unet, batch), want) < bound


def three_levels(layers_per_block: int):
    """A tiny UNet with SDXL's levels: attention in the second and third."""
    changes = {"block_out_channels": (32, 32, 64), "attention_head_dim": (2, 2, 4)}
    changes |= {"down_block_types": ("DownBlock2D", *2 * ("CrossAttnDownBlock2D",))}
    changes |= {"up_block_types": (*2 * ("CrossAttnUpBlock2D",), "UpBlock2D")}
    changes |= {"layers_per_block": layers_per_block, "transformer_layers_per_block": (1, 1, 1)}
    return make_unet(**changes)


@pytest.mark.parametrize("layers", [1, 2])
def test_kohya_names_are_stabilitys_own(layers):
    """Those of a whole model in one file, worked out elsewhere."""
    unet = three_levels(layers)
    names = [name for name in kinds.able(unet) if "_block" in name]
    found = files.sgm_names(names)
    assert len({*found.values()}) == len(names) > 100
    for name, sgm in found.items():
        assert old_unet_name(f"{name}.weight", layers, (True, True, False)) == f"{sgm}.weight"


def test_a_layer_has_the_same_kohya_name_whatever_else_is_adapted():
    """A block's number depends on how many blocks a level of the model has."""
    few = ("up_blocks.1.attentions.0.*attn2.to_k",)
    for unet in (three_levels(1), three_levels(2)):
        every = files.sgm_names(kinds.find(unet, ["all"]))
        one = kinds.inject(unet, few)
        assert files.sgm_names(one.layers) != files.sgm_names(one.layers, one.among)
        for name, sgm in files.sgm_names(one.layers, one.among).items():
            assert every[name] == sgm


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[LONG] * (k in ("lora", "loha"))) for k in kinds.KINDS]
)
def test_interrupted_equals_uninterrupted(kind, tmp_path):
    """In one vector, through a checkpoint; and exported equals trained."""
    options = {"adapter": kind, "rank_pattern": ("mid_block=3",), "targets": ("attn2", "proj_in")}
    whole = step(keep(assembled(tmp_path / "whole", **options), vector=True), 4)
    cut = step(keep(assembled(tmp_path / "cut", **options), vector=True), 2)
    checkpoint.save_state(cut)
    again = keep(assembled(tmp_path / "cut", **options), vector=True)
    checkpoint.restore(again, checkpoint.newest_state(tmp_path / "cut" / "checkpoints"))
    step(again, 2)
    for name, each in whole.run.trained.items():
        assert torch.equal(each, again.run.trained[name])
    assert len(export.export(again)) == 2


@pytest.mark.parametrize(
    "kind, rank, most", [("loha", 9, 1e-5), ("loha", 4, 0.9), ("dora", 9, 0.9)]
)
def test_as_lora_is_the_nearest_of_its_rank(kind, rank, most, tmp_path, capsys, batch):
    """Exact where the kind's own rank, 3 x 3 of LoHa, is no more; the same at every start; and
    diffusers draws with it what is left.
    """
    options = {"adapter": kind, "as_lora": rank, "lora_rank": 3, "targets": ("mid_block.*attn2",)}
    kept = keep(assembled(tmp_path / "run", **options))
    for matrix in kept.run.trained.values():
        matrix.data.add_(
            0.1 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1))
        )
    paths = export.export_as_lora(kept)
    said, again = capsys.readouterr().out, [path.read_bytes() for path in paths]
    assert ("nothing of it is lost" in said) == (most < 1e-3)
    gone = whole = 0.0
    file = files.read(paths[0])
    for name, layer in kept.run.adapter.layers.items():
        D, A = layer.update().detach(), file.matrices[f"{name}.lora_A"]
        best = torch.linalg.svdvals(D)[rank:].square().sum()
        off_ = (D - file.matrices[f"{name}.lora_B"] @ A).square().sum()
        assert off_ <= 1.01 * best + 1e-9 * D.square().sum()
        gone, whole = gone + off_, whole + D.square().sum()
    assert (gone / whole) ** 0.5 < most and len(paths) == 2
    torch.manual_seed(5)
    assert [path.read_bytes() for path in export.export_as_lora(kept)] == again
    want = answer(kept.run.unet, batch)
    pipe = pipeline(make_unet())
    pipe.load_lora_weights(paths[0])
    assert off(answer(pipe.unet, batch), want) < max(10 * most, 1e-5) and file.rank == rank


def test_a_name_that_no_layer_has_is_told_before_pictures_are_encoded(train, tmp_path, capsys):
    assert train("r", "--targets", "attn9", "--cache-dir", str(tmp_path / "cold")) == 1
    assert "targets attn9 match nothing" in capsys.readouterr().err
    assert not (tmp_path / "cold").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_run_interrupted_equals_one_uninterrupted_and_is_drawn(kind, train, tmp_path, capsys):
    """Its files are read back and held to what was trained; another kind is another run."""
    targets = "all" if kind == "lora" else "transformer"
    more = ("--adapter", kind, "--targets", targets, "--rank-pattern", "mid_block=3")
    more += ("--preview-steps", "0")
    assert train("whole", *more) == 0
    assert f"{kind}: " in (said := capsys.readouterr().out)
    assert "feed-forward" in said and "do not compute" not in said
    assert train("cut", *more, "--max-train-steps", "2") == 0
    assert train("cut", *more) == 0
    for name in (lora.FILE_NAME, "kohya/whole.safetensors"):
        other = tmp_path / "cut" / name.replace("whole", "cut")
        assert (tmp_path / "whole" / name).read_bytes() == other.read_bytes()
    assert train("cut", *more[4:], "--max-train-steps", "6") == 1
    assert "holds a run with" in capsys.readouterr().err
    if kind != "lora":  # asked for when the run is finished
        assert train("cut", *more, "--as-lora", "4") == 0
        assert "of its length is lost" in capsys.readouterr().out
        assert train("cut", *more, "--as-lora", "4") == 0
        assert "is finished" in capsys.readouterr().out
    words = ("--prompts", "fox", "--num-inference-steps", "1", "--compare")
    assert drawing.main([str(tmp_path / "cut"), *words]) == 0


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_recomputed_and_in_half_precision(kind, batch, one_thread):
    """Gradient checkpointing changes no gradient; a bf16 UNet answers nearly the same."""
    unet, adapter = adapted(kind, ("mid_block.*attn",))
    unet.train()
    found = []
    for again in (False, True):
        if again:
            model.use_gradient_checkpointing(unet)
        answer.__wrapped__(unet, batch).square().mean().backward()
        found.append(torch.cat([each.grad.flatten() for each in adapter.matrices().values()]))
        unet.zero_grad()
    assert found[0].norm() > 0 and off(found[1], found[0]) < 1e-5
    want = answer(unet, batch)
    half = {key: each if key == "t" else each.bfloat16() for key, each in batch.items()}
    for layer in adapter.layers.values():  # what is learned stays fp32
        layer.base.bfloat16()
    for module in unet.modules():
        if not isinstance(module, (kinds.Beside, lora.LoRALinear)):
            for each in module.parameters(recurse=False):
                each.data = each.data.bfloat16()
    got = answer(unet, half)
    assert got.dtype == torch.bfloat16 and off(got.float(), want) < 0.05
    assert all(each.dtype == torch.float32 for each in adapter.matrices().values())
