"""The 4-bit base: its numbers are bitsandbytes' own, come back from the cache to the bit, do not
change while the adapter learns, and pass gradients on; a whole run on it."""

import builtins
import json
import shutil
import sys
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import lora
import model
from conftest import TINY_SDXL, ink_rows, make_batch, make_unet, write_pictures
from fast import nf4
from inputs import code, hub
from inputs.files import Refusal
from inputs.options import RECIPES
from keep import drawing, faster, identity, training

CPU = torch.device("cpu")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
DTYPES = [
    torch.float16,
    torch.float32,
    torch.bfloat16,
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """The tiny random UNet as a model folder; the other parts are the pocket's."""
    folder = tmp_path_factory.mktemp("tiny")
    for part in hub.PARTS:
        if part != "unet":
            (folder / part).symlink_to(TINY_SDXL / part)
    shutil.copy(TINY_SDXL / "model_index.json", folder)
    make_unet().save_pretrained(folder / "unet")
    return str(folder)


def load(name: str, cache: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return nf4.load_unet_nf4(name, CPU, dtype, cache)


def quantised(unet: torch.nn.Module) -> dict[str, bnb.nn.Linear4bit]:
    return {n: m for n, m in unet.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def stored(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every number of the UNet, those of the quantisation with them."""
    numbers = dict(unet.named_parameters()) | dict(unet.named_buffers())
    for name, layer in quantised(unet).items():
        state = layer.weight.quant_state
        assert state is layer.quant_state
        for key, value in [*vars(state).items(), *vars(state.state2).items()]:
            if isinstance(value, torch.Tensor):
                numbers[f"{name} {len(numbers)} {key}"] = value
    return {key: value.detach().clone() for key, value in numbers.items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_linear_is_bitsandbytes_own_and_the_rest_is_as_it_was(tiny, tmp_path, dtype):
    unet, plain = load(tiny, tmp_path, dtype), model.load_unet(tiny, CPU, dtype)
    layers = quantised(unet)
    linears = {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linears - layers.keys() == {
        f"{part}.linear_{i}" for part in ("time_embedding", "add_embedding") for i in (1, 2)
    }
    x = torch.randn(3, 5, 256, dtype=dtype)
    for name, layer in layers.items():
        was = plain.get_submodule(name)
        theirs = bnb.nn.Linear4bit(
            was.in_features,
            was.out_features,
            bias=was.bias is not None,
            compute_dtype=dtype,
            quant_type="nf4",
        )
        theirs.load_state_dict(was.state_dict())
        theirs.to(CPU)  # quantises
        theirs.support_avx512bf16_for_cpu = False
        assert torch.equal(layer.weight, theirs.weight), name
        assert (layer.in_features, layer.out_features) == (was.in_features, was.out_features)
        row = x[..., : was.in_features]
        assert torch.equal(layer(row), theirs(row)), name
        off = (layer(row) - was(row)).norm() / was(row).norm()
        assert 0.02 < off < 0.2, name
    others = {
        k: v for k, v in plain.state_dict().items() if k.removesuffix(".weight") not in layers
    }
    mine = dict(unet.named_parameters())
    assert_equal({key: mine[key].detach() for key in others}, others)
    assert unet.dtype == dtype and unet.device == CPU
    assert not any(p.requires_grad or p.is_meta for p in unet.parameters())
    answer = model.predict(unet, torch.randn(2, 4, 8, 8), make_batch())
    assert answer.dtype == torch.float32 and answer.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_second_load_reads_only_the_kept_numbers_and_they_are_equal_to_the_bit(
    tiny, tmp_path, monkeypatch, dtype
):
    first = stored(load(tiny, tmp_path / "c", dtype))

    def never(*_):
        raise AssertionError("quantised again")

    monkeypatch.setattr(nf4, "quantise", never)
    again = load(tiny, tmp_path / "c", dtype)
    assert_equal(stored(again), first)
    batch, x_t = make_batch(), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        want = model.predict(again, x_t, batch)
        assert torch.equal(model.predict(load(tiny, tmp_path / "c", dtype), x_t, batch), want)


def test_the_kept_file_is_a_safetensors_file_that_others_read(tiny, tmp_path):
    from safetensors.torch import load_file

    layer = quantised(load(tiny, tmp_path))["mid_block.attentions.0.proj_in"]
    kept = load_file(only_file(tmp_path))
    assert torch.equal(kept["mid_block.attentions.0.proj_in.weight"], layer.weight)
    assert kept["mid_block.attentions.0.proj_in.weight.absmax"].dtype == torch.uint8


def test_another_dtype_or_base_has_a_file_of_its_own(tiny, tmp_path):
    load(tiny, tmp_path)
    load(tiny, tmp_path, torch.float16)
    load(str(TINY_SDXL), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    "name",
    [
        "quantise",
        "WHOLE",
        "PER_SCALE",
        "shapes_to_quantise",
    ],
)
def test_edited_quantisation_has_a_file_of_its_own_and_is_another_run(
    tiny, tmp_path, monkeypatch, name
):
    load(tiny, tmp_path)
    lowmem, of_one = RECIPES["lowmem"][1], code.of_one
    before = faster.digests(lowmem)
    edited = f"fast.nf4.{name}"
    monkeypatch.setattr(
        code, "of_one", lambda root, each: "edited" if each == edited else of_one(root, each)
    )
    load(tiny, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert code.changed(before, faster.digests(lowmem)) == [edited]


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-1000], lambda c: b"", lambda c: c[:8] + b"{" * 100]
)
def test_a_damaged_file_is_noticed_and_made_anew(tiny, tmp_path, capsys, damage):
    whole = stored(load(tiny, tmp_path))
    path = only_file(tmp_path)
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert_equal(stored(load(tiny, tmp_path)), whole)
    assert f"{path} is damaged and is made anew" in capsys.readouterr().out
    assert only_file(tmp_path).read_bytes() == content


def test_weights_that_do_not_fit_are_refused_and_not_kept(tiny, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder, symlinks=True)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 40}))
    with pytest.raises(Refusal, match="do not fit its config"):
        load(str(folder), tmp_path / "c")
    assert not (tmp_path / "c").exists()


# ---- training on it ------------------------------------------------------------------------------


def test_the_gradient_to_the_input_is_that_of_the_expanded_weight_and_no_input_is_kept(
    tiny, tmp_path
):
    """After a pass without gradients, too: with AVX512-BF16 bitsandbytes would repack the weight
    there for a kernel that has no backward pass.
    """
    unet = load(tiny, tmp_path)
    adapter = lora.inject(unet, rank=4, alpha=8)
    layer = next(iter(adapter.layers.values()))
    with torch.no_grad():
        layer.lora_B.normal_(std=0.1)
        layer(torch.randn(2, 7, layer.in_features))
    whole = bnb.functional.dequantize_4bit(layer.base.weight, layer.base.weight.quant_state)
    assert whole.shape == (layer.out_features, layer.in_features)
    x = torch.randn(2, 7, layer.in_features, requires_grad=True)
    weight = torch.randn(2, 7, layer.out_features)
    correction = layer.scale * layer.lora_B @ layer.lora_A
    want = torch.autograd.grad((F.linear(x, whole + correction) * weight).sum(), x)[0]
    got = torch.autograd.grad((layer(x) * weight).sum(), x)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer.base(x)
    assert not kept  # the packed weight goes along outside autograd


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_moves_the_adapter_and_no_number_of_the_base(tiny, tmp_path, checkpointing):
    unet = load(tiny, tmp_path)
    before = stored(unet)
    content = only_file(tmp_path).read_bytes()
    if checkpointing:
        model.use_gradient_checkpointing(unet)
    adapter = lora.inject(unet, rank=4, alpha=8)
    start = {name: each.detach().clone() for name, each in adapter.matrices().items()}
    optimizer = torch.optim.AdamW(adapter.matrices().values(), lr=1e-3)
    batch = make_batch()
    for _ in range(2):
        answer = model.predict(unet, batch["noise"], batch)
        F.mse_loss(answer, batch["eps"]).backward()
        optimizer.step()
    for name, matrix in adapter.matrices().items():
        assert matrix.grad.any() and not torch.equal(matrix, start[name]), name
    for name, layer in list(adapter.layers.items()):
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, layer.base)
    assert_equal(stored(unet), before)
    assert only_file(tmp_path).read_bytes() == content


def test_merging_into_it_is_refused(tiny, tmp_path):
    adapter = lora.inject(load(tiny, tmp_path))
    with pytest.raises(Refusal, match="quantised weight"):
        lora.merge(adapter)


def test_without_bitsandbytes_it_is_refused_with_the_way_out(tiny, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name.split(".")[0] == "bitsandbytes":
            raise ImportError("No module named 'bitsandbytes'")
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "bitsandbytes")
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(Refusal, match=r"bitsandbytes does not load.*--base-quantization none"):
        load(tiny, tmp_path)


# ---- a whole run ---------------------------------------------------------------------------------


@pytest.fixture
def train(cache, tmp_path):
    """train("name", "--option", ...): a run of the recipe lowmem in tmp_path/name, on the pocket
    model and six of its drawings; returns its exit code.
    """
    few = write_pictures(tmp_path / "few", ink_rows(6))

    def run(name: str, *options: str) -> int:
        fixed = {
            "--pretrained-model-name-or-path": TINY_SDXL,
            "--dataset-name": few,
            "--cache-dir": cache,
            "--output-dir": tmp_path / name,
            "--resolution": 64,
            "--train-batch-size": 2,
            "--gradient-accumulation-steps": 2,
            "--max-train-steps": 4,
            "--checkpointing-steps": 2,
            "--learning-rate": 1e-2,
        }
        argv = [str(part) for pair in fixed.items() for part in pair]
        quiet = ("--no-tensorboard", "--validation-prompts")
        return training.main(["lowmem", *argv, *quiet, *options])

    return run


def test_a_run_continues_exports_and_draws_on_its_4_bit_base(
    train, cache, tmp_path, capsys, monkeypatch
):
    assert train("whole") == 0
    said = capsys.readouterr().out
    assert "its Linear weights in NF4" in said and "done: 4 steps" in said
    monkeypatch.setattr(nf4, "quantise", None)  # from here on the kept numbers serve
    assert train("cut", "--max-train-steps", "2") == train("cut") == 0
    assert "continuing after step 2 of 4" in capsys.readouterr().out
    whole = (tmp_path / "whole" / lora.FILE_NAME).read_bytes()
    assert (tmp_path / "cut" / lora.FILE_NAME).read_bytes() == whole
    file = lora.read(tmp_path / "whole")
    assert file.about["base_quantization"] == "nf4"

    assert train("cut", "--max-train-steps", "6", "--base-quantization", "none") == 1
    assert "base_quantization nf4, and this command has base_quantization none" in (
        capsys.readouterr().err
    )

    options = ("--prompts", "red apple", "--num-inference-steps", "2", "--strength")
    pictures = {}
    for label, strength, base in (("nf4", 1, "auto"), ("off", 0, "auto"), ("none", 1, "none")):
        argv = [*options, str(strength), "--base-quantization", base]
        out = tmp_path / label
        assert drawing.main([str(tmp_path / "whole"), *argv, "--output-dir", str(out)]) == 0
        pictures[label] = np.asarray(Image.open(only_file(out))).astype(int)
    assert np.abs(pictures["nf4"] - pictures["off"]).mean() > 1
    assert np.abs(pictures["nf4"] - pictures["none"]).mean() > 0.1


def test_a_run_from_before_the_option_existed_goes_on_without_it_only():
    config, old = RECIPES["t4"][1], {"identity": {"seed": "42"}}
    mine = {"seed": "42", "base_quantization": "none"}
    identity.check_same(config, mine, old)
    with pytest.raises(Refusal, match=r"base_quantization none, and this command has .* nf4"):
        identity.check_same(config, mine | {"base_quantization": "nf4"}, old)
