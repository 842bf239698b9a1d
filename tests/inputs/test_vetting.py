"""What this machine lacks is said before anything is built."""

import pytest
import torch

from inputs import vetting
from inputs.files import Refusal

CPU = torch.device("cpu")


def test_devices():
    assert vetting.check_device("auto") == vetting.check_device("cpu") == CPU
    with pytest.raises(Refusal, match=r"cuda.*--device cpu"):
        vetting.check_device("cuda")


def test_a_device_that_torch_does_not_know_is_refused():
    with pytest.raises(Refusal, match="gpu"):
        vetting.check_device("gpu")
