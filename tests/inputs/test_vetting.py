"""What this machine lacks is said before anything is built."""

import sys

import pytest
import torch
import transformers

import model
from conftest import POCKET
from inputs import vetting
from inputs.files import Refusal

CPU = torch.device("cpu")


def test_a_transformers_that_does_not_load_is_refused_without_a_remedy_that_changes_torch(
    monkeypatch,
):
    class Broken:
        utils = transformers.utils

        def __getattr__(self, name):
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setitem(sys.modules, "transformers", Broken())
    with pytest.raises(Refusal, match=r"nms does not.*pip uninstall -y torchvision") as refusal:
        model.load_text_encoders(str(POCKET), CPU)
    assert "upgrade" not in str(refusal.value)


def test_devices():
    assert vetting.check_device("auto") == vetting.check_device("cpu") == CPU
    with pytest.raises(Refusal, match=r"cuda.*--device cpu"):
        vetting.check_device("cuda")


def test_a_device_that_torch_does_not_know_is_refused():
    with pytest.raises(Refusal, match="gpu"):
        vetting.check_device("gpu")
