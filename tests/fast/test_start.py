"""What begins before the imports: it reads and calls what it should, and no run depends on it."""

import ctypes
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from conftest import POCKET, ROOT
from fast import start
from inputs.options import RECIPES

T4 = RECIPES["t4"][1]


@pytest.fixture(autouse=True)
def whole_libraries(monkeypatch):
    """For the tests that come after these in one process."""
    monkeypatch.setattr(start.imports, "lean", lambda: None)


class Driver:
    """In libcuda's place: notes what is called, and has `count` GPUs."""

    def __init__(self, count: int):
        self.count, self.calls = count, []

    def __call__(self, name):
        self.calls.append(name)
        return self

    def cuInit(self, flags):
        self.calls.append("cuInit")
        return 0 if self.count else 100

    def cuDeviceGet(self, gpu, ordinal):
        self.calls.append(ordinal)
        ctypes.cast(gpu, ctypes.POINTER(ctypes.c_int))[0] = 7
        return 0 if ordinal < self.count else 101

    def cuDevicePrimaryCtxRetain(self, context, gpu):
        self.calls.append(("context", gpu.value))
        return 0


@pytest.mark.parametrize(
    ("device", "rank", "count", "last"),
    [
        ("auto", "", 1, ("context", 7)),
        ("cuda:1", "", 2, ("context", 7)),
        ("cuda", "3", 2, 3),  # torchrun's process 3 of a host with 2 GPUs: nothing is made
        ("auto", "", 0, "cuInit"),
    ],
)
def test_the_driver_makes_the_context_of_the_device_that_is_meant(
    monkeypatch, device, rank, count, last
):
    monkeypatch.setenv("LOCAL_RANK", rank or "0")
    driver = Driver(count)
    start.make_context(device, driver)
    assert driver.calls[:2] == ["libcuda.so.1", "cuInit"] and driver.calls[-1] == last
    if device == "cuda:1":
        assert 1 in driver.calls


def test_the_unets_files_are_read_ahead_or_its_4_bit_numbers(monkeypatch, tmp_path):
    read = []
    monkeypatch.setattr(start, "read_ahead", read.append)
    start.read_weights(str(POCKET), True)
    assert [path.parent for path in read] == [POCKET / "unet"]
    start.read_weights(str(POCKET), True, str(tmp_path))  # nothing is kept there yet
    assert len(read) == 2 and read[0] == read[1]
    (tmp_path / "nf4-1.safetensors").touch()
    os.utime(tmp_path / "nf4-1.safetensors", (1, 1))
    (tmp_path / "nf4-2.safetensors").touch()
    start.read_weights(str(POCKET), True, str(tmp_path))
    assert read[-1] == tmp_path / "nf4-2.safetensors"


def test_a_file_that_the_kernel_has_is_not_read_again(monkeypatch, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(2 * start.PIECE + 5))
    monkeypatch.setattr(start, "cached", lambda _, at: at < 2 * start.PIECE)
    assert start.read_ahead(path) == 5
    monkeypatch.setattr(start, "cached", lambda *_: False)
    assert start.read_ahead(path) == 2 * start.PIECE + 5


def test_a_refusal_does_not_wait_for_the_reading(monkeypatch):
    read, before = threading.Event(), set(threading.enumerate())
    monkeypatch.setattr(start, "read_weights", lambda *_: read.wait(60))
    start.begin(replace(T4, device="cpu"))
    (reading,) = set(threading.enumerate()) - before
    assert reading.daemon  # the interpreter's end waits for all others
    read.set()
    reading.join()


def test_what_goes_wrong_is_left_for_the_run_to_say(capfd):
    before = threading.enumerate()
    start.begin(replace(T4, device="cuda:9", pretrained_model_name_or_path="no/such/folder"))
    for thread in set(threading.enumerate()) - set(before):
        thread.join()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("config", "begun"),
    [
        (T4, [("context", "auto"), ("weights", T4.pretrained_model_name_or_path, True, "")]),
        (replace(T4, plan_for="T4"), []),
        (RECIPES["pocket"][1], [("context", "auto"), ("weights", "pocket/model", True, "")]),
        (
            replace(RECIPES["lowmem"][1], device="cpu", mixed_precision="fp32"),
            [("weights", T4.pretrained_model_name_or_path, False, "cache")],
        ),
    ],
)
def test_what_a_run_will_need_is_begun(monkeypatch, config, begun):
    found = []
    monkeypatch.setattr(start, "make_context", lambda *a: found.append(("context", *a)))
    monkeypatch.setattr(start, "read_weights", lambda *a: found.append(("weights", *a)))
    before = threading.enumerate()
    start.begin(config)
    for thread in set(threading.enumerate()) - set(before):
        thread.join()
    assert sorted(found) == begun


def test_what_begins_before_torch_needs_no_torch():
    code = "import sys; from inputs import options; from fast import start; "
    code += "sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_an_interrupted_import_ends_with_a_sentence():
    code = (
        "import os, signal, time; from fast import start; start.leave_when_interrupted(); "
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "\ninterrupted: nothing had begun\n"
