"""A run that starts from a file acts at first as the file does at its own rank and alpha."""

import re

import pytest
import torch

import lora
from adapter_tools import answer, drop, numbers, off, rename, trained, write_edited
from adapters import files
from adapters.start import start
from conftest import make_batch, make_unet
from inputs.files import Refusal

BATCH = make_batch()


def acting(rank: int, alpha: float) -> torch.Tensor:
    """The answer of the UNet under trained(rank, alpha), which the files below hold."""
    unet = make_unet()
    trained(unet, rank, alpha)
    return answer(unet, BATCH)


def fresh(rank: int, alpha: float) -> tuple:
    """A bare UNet with an adapter at its start, and that adapter."""
    unet = make_unet()
    return unet, lora.inject(unet, rank=rank, alpha=alpha, seed=9)


def written(path, layout="peft", edit=lambda t, m: None, rank=4, alpha=6) -> lora.AdapterFile:
    return files.read(write_edited(path / "a.safetensors", layout, edit, rank, alpha))


def scripts(key):
    """As diffusers' own training scripts call it."""
    return key.replace("lora_A", "lora.down").replace("lora_B", "lora.up")


@pytest.mark.parametrize("layout, edit", [("peft", None), ("kohya", None), ("peft", scripts)])
def test_a_file_of_the_same_rank_and_alpha_is_taken_to_the_bit(tmp_path, layout, edit):
    unet, adapter = fresh(4, 6)
    # Where alpha is in the header, it stays there.
    said = start(adapter, written(tmp_path, layout, rename(edit or (lambda key: key))))
    assert torch.equal(numbers(adapter), numbers(trained()))
    assert torch.equal(answer(unet, BATCH), acting(4, 6))
    assert re.fullmatch(r"starts from .*a.safetensors, of rank 4 and alpha 6", said)


@pytest.mark.parametrize("rank, alpha", [(4, 8), (7, 6), (16, 32), (40, 1)])
def test_a_smaller_rank_is_filled_up_and_acts_the_same(tmp_path, rank, alpha):
    unet, adapter = fresh(rank, alpha)
    drawn = {name: layer.lora_A.clone() for name, layer in adapter.layers.items()}
    said = start(adapter, written(tmp_path))
    assert off(answer(unet, BATCH), acting(4, 6)) < 1e-5
    assert off(answer(make_unet(), BATCH), acting(4, 6)) > 1e-2  # or anything would seem the same
    for name, layer in adapter.layers.items():
        assert torch.equal(layer.lora_A[4:], drawn[name][4:])  # can learn, and
        assert not layer.lora_B[:, 4:].any()  # acts not yet
    assert said.endswith(f", filled up to rank {rank}") == (rank > 4)


@pytest.mark.parametrize("rank", [8, 40])  # 40 is more than the narrowest layer is wide
def test_a_larger_rank_is_cut_and_loses_nothing_that_it_did_not_use(tmp_path, rank):
    def of_rank_four(t, m):
        for key in t:
            (t[key][4:] if "lora_A" in key else t[key][:, 4:]).zero_()

    file = written(tmp_path, "peft", of_rank_four, rank, 6)
    want, theirs = fresh(rank, 6)
    files.load(theirs, file)
    unet, adapter = fresh(4, 10)
    said = start(adapter, file)
    assert off(answer(unet, BATCH), answer(want, BATCH)) < 1e-5
    assert said.endswith(", cut to rank 4: 0.00% of its length is lost")


def test_a_larger_rank_is_cut_to_the_nearest_product_and_the_rest_is_said(tmp_path):
    """Against the singular values of the whole products."""
    _, adapter = fresh(3, 5)
    said = start(adapter, written(tmp_path, rank=12, alpha=6))
    lost = energy = 0.0
    for layer, theirs in zip(
        adapter.layers.values(), trained(rank=12).layers.values(), strict=True
    ):
        product = (6 / 12 * theirs.lora_B @ theirs.lora_A).detach().double()
        values = torch.linalg.svdvals(product)
        gone = (product - layer.scale * layer.lora_B @ layer.lora_A).norm()
        assert gone.item() == pytest.approx(values[3:].norm().item(), rel=1e-5)
        lost, energy = lost + values[3:].square().sum(), energy + values.square().sum()
    told = float(re.search(r"cut to rank 3: ([\d.]+)% of its length is lost", said)[1])
    assert told == pytest.approx(100 * (lost / energy).sqrt().item(), abs=0.006) and told > 30
    drawn = [layer.lora_A.norm() for layer in fresh(3, 5)[1].layers.values()]
    for layer, length in zip(adapter.layers.values(), drawn, strict=True):
        assert layer.lora_A.norm().item() == pytest.approx(length.item(), rel=0.2)


def test_a_module_that_did_not_learn_is_not_dead_when_it_is_cut(tmp_path):
    def untrained(t, m):
        for key in t:
            if "lora_B" in key:
                t[key].zero_()

    _, adapter = fresh(2, 2)
    assert "0.00% of its length" in start(adapter, written(tmp_path, "peft", untrained))
    for layer in adapter.layers.values():
        assert not layer.lora_B.any() and (layer.lora_A.norm(dim=1) > 0.1).all()


def test_modules_that_the_file_lacks_start_at_zero_and_are_counted(tmp_path):
    _, adapter = fresh(4, 6)
    first = next(iter(adapter.layers))
    drawn = adapter.layers[first].lora_A.clone()
    keys = [f"unet.{first}.lora_{kind}.weight" for kind in "AB"]
    said = start(adapter, written(tmp_path, "peft", drop(*keys)))
    count = len(adapter.layers)
    assert said.endswith(f"; 1 of {count} modules are not in it and start at zero")
    assert torch.equal(adapter.layers[first].lora_A, drawn)
    moved = [name for name, layer in adapter.layers.items() if layer.lora_B.any()]
    assert len(moved) == count - 1 and first not in moved


def feed_forward(t, m):
    module = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    t |= {f"{module}.lora_A.weight": torch.ones(4, 8), f"{module}.lora_B.weight": torch.ones(8, 4)}
    return t


def wider(t, m):
    key = next(key for key in t if "lora_A" in key)
    return t | {key: torch.ones(4, 99)}


@pytest.mark.parametrize(
    "edit, says", [(feed_forward, "adapts 1 modules besides attention's"), (wider, "is (4, 99)")]
)
@pytest.mark.parametrize("rank", [2, 4, 8])
def test_what_the_run_has_no_place_for_is_refused_and_nothing_is_changed(
    tmp_path, edit, says, rank
):
    _, adapter = fresh(rank, 6)
    before = numbers(adapter)
    with pytest.raises(Refusal) as refusal:
        start(adapter, written(tmp_path, "peft", edit))
    assert says in str(refusal.value)
    assert torch.equal(numbers(adapter), before)
