"""Before the first step: does each layer compute what an adapter file means?"""

import functools

import pytest
import torch
import torch.nn.functional as F

import lora
from adapters.kinds import LoRAConv2d
from conftest import make_unet
from keep.meaning import meaning
from tiny_run import assembled

PLAIN, AS_FILES_MEAN = lora.LoRALinear.forward, LoRAConv2d.change


def with_forward(forward, tmp_path, monkeypatch, init=None, **options):
    """What is said of a run whose layers compute `forward`."""
    made = lora.LoRALinear.__init__

    def initialised(self, *rest):
        made(self, *rest)
        if init:
            init(self)

    monkeypatch.setattr(lora.LoRALinear, "__init__", initialised)
    monkeypatch.setattr(lora.LoRALinear, "forward", forward)
    run = assembled(tmp_path, **options)
    before = {name: each.clone() for name, each in run.unet.state_dict().items()}
    random = torch.get_rng_state()
    lines = meaning(run)
    assert torch.equal(random, torch.get_rng_state())
    after = run.unet.state_dict()
    assert all(torch.equal(each, after[name]) for name, each in before.items())
    assert all(not each.grad.any() for each in run.trained.values())
    return lines


def same_in_another_form(self, x):
    return F.linear(x, self.base.weight + self.scale * self.lora_B @ self.lora_A, self.base.bias)


@pytest.mark.parametrize("forward", [PLAIN, same_in_another_form])
def test_nothing_is_said_of_layers_that_compute_what_a_file_means(tmp_path, monkeypatch, forward):
    assert with_forward(forward, tmp_path, monkeypatch) == []


def test_nor_of_a_half_precision_base(tmp_path, monkeypatch):
    monkeypatch.setattr("tiny_run.make_unet", functools.partial(make_unet, seed=1))
    run = assembled(tmp_path)
    for layer in run.adapter.layers.values():
        layer.base.half()
    assert meaning(run) == []


def five(self, x):
    return self.base(x) + 5 * self.scale * self.up(self.down(x))


def tanh(self, x):
    return self.base(x) + self.scale * torch.tanh(self.up(self.down(x)))


def relu(self, x):
    return self.base(x) + self.scale * self.up(self.down(x).relu())


def broken(self, x):
    raise RuntimeError("needs what is not there")


@pytest.mark.parametrize("forward", [five, tanh, relu, broken])
def test_layers_that_mean_something_else_are_said_in_one_sentence(tmp_path, monkeypatch, forward):
    (line,) = with_forward(forward, tmp_path, monkeypatch)
    assert "64 of 64 layers" in line and ".to_q (" in line and "act otherwise" in line
    assert ("needs what is not there" in line) == (forward is broken)


def exactly(self, x, y):
    assert not torch.backends.cudnn.enabled  # whose fp32 convolutions round more, on newer cards
    return AS_FILES_MEAN(self, x, y)


def twice(self, x, y):
    return 2 * AS_FILES_MEAN(self, x, y)


def without_strides(self, x, y):
    return F.conv2d(F.conv2d(x, self.lora_A, padding=1), self.scale * self.lora_B)


@pytest.mark.parametrize("change, wrong", [(exactly, 0), (twice, 18), (without_strides, 1)])
def test_convolutions_are_tried_like_the_others(tmp_path, monkeypatch, change, wrong):
    """Of 18 one has a stride of 2."""
    monkeypatch.setattr(LoRAConv2d, "change", change)
    said = with_forward(PLAIN, tmp_path, monkeypatch, targets=("all",))
    assert [line.split(" layers")[0] for line in said] == [f"{wrong} of 106"] * bool(wrong)


def test_so_is_another_scale(tmp_path, monkeypatch):
    def rank_stabilised(self):
        self.scale *= 5**0.5

    (line,) = with_forward(PLAIN, tmp_path, monkeypatch, rank_stabilised)
    assert "off by" in line


def test_a_parameter_that_no_file_can_hold_is_named_though_it_begins_as_nothing(
    tmp_path, monkeypatch
):
    def gate(self):
        self.gate = torch.nn.Parameter(torch.zeros(self.out_features))

    def gated(self, x):
        return self.base(x) + (1 + self.gate) * self.scale * self.up(self.down(x))

    act, named = with_forward(gated, tmp_path, monkeypatch, gate)
    assert "act otherwise" in act and "64 trained parameters, such as " in named
    assert ".gate, have no place in an adapter file" in named
