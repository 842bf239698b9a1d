"""What a run imports, and that it computes the same with it: each in a new process."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from fast import imports, start
from inputs import options as configuration

REPORT = """
import json, sys
names = "torch._dynamo transformers peft torchvision diffusers bitsandbytes".split()
json.dump([name for name in names if name in sys.modules], open(sys.argv[1], "w"))
"""
RUN = """
import runpy, sys
said, sys.argv = sys.argv[1], ["loop.py", *sys.argv[2:]]
try:
    runpy.run_path("loop.py", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
sys.argv = ["", said]
"""
WHOLE = "from fast import start; start.begin = lambda config: None\n"
# what vetting.import_clip() advises where torchvision is broken
NO_TORCHVISION = "import sys; sys.modules['torchvision'] = None\n"


def imported(tmp_path, script: str, *words: str) -> set[str]:
    """The libraries that a new process has after `script`."""
    said = tmp_path / "said.json"
    command = [sys.executable, "-c", script + REPORT, str(said), *words]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(json.loads(said.read_text()))


@pytest.mark.slow  # three whole runs in new processes
def test_a_run_needs_no_peft_and_from_a_full_cache_no_transformers_and_computes_the_same(
    few, tmp_path
):
    def run(name: str, *more: str, script: str = RUN) -> set[str]:
        words = ["pocket", "--device", "cpu", "--dataset-name", str(few)]
        words += ["--max-train-steps", "2", "--train-batch-size", "2", "--num-inference-steps", "2"]
        words += ["--output-dir", str(tmp_path / name), "--cache-dir", str(tmp_path / "cache")]
        return imported(tmp_path, script, *words, *more)

    drawn = run("drawn", "--validation-prompts", "a fox")
    assert {"transformers", "diffusers"} <= drawn and "peft" not in drawn
    assert not {"transformers", "peft", "torchvision"} & run("lean", "--validation-prompts")
    whole = WHOLE + NO_TORCHVISION + RUN
    assert "peft" in run("whole", "--validation-prompts", "a fox", script=whole)
    read = lambda run, file: (tmp_path / run / file).read_bytes()  # noqa: E731
    adapters = {read(run, "pytorch_lora_weights.safetensors") for run in ("drawn", "lean", "whole")}
    pictures = {read(run, "pictures/before-after.png") for run in ("drawn", "whole")}
    assert len(adapters) == len(pictures) == 1


@pytest.mark.slow
def test_sdxls_own_unet_and_the_optimizer_do_not_start_the_compiler(tmp_path):
    script = """
import sys
from inputs import options as config
from fast import start
start.begin(config.RECIPES["t4"][1])
import pathlib, torch, loop, model
assert model.build_unet(pathlib.Path("tests/sdxl/unet")).config.cross_attention_dim == 2048
flat = torch.nn.Parameter(torch.ones(4096))
flat.grad = torch.ones(4096)
optimizer = loop.make_optimizer(config.RECIPES["t4"][1], [flat])
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
"""
    assert imported(tmp_path, script) == {"diffusers", "bitsandbytes"}


@pytest.mark.slow
def test_a_version_that_needs_what_is_out_of_sight_is_imported_whole_and_says_why(tmp_path):
    script = """
from fast import imports
imports.MISSING = (*imports.MISSING, "torch.nn.attention.flex_attention")  # asked for by a model
imports.lean()
from diffusers import UNet2DConditionModel
"""
    said = tmp_path / "said"
    script = f"import sys; sys.stderr = open({str(said)!r}, 'w')\n{script}"
    assert "peft" in imported(tmp_path, script)
    assert "imported whole, which takes longer: import of torch.nn.attention" in said.read_text()


@pytest.mark.slow
def test_what_is_imported_already_is_left_alone(tmp_path):
    script = """
import diffusers, sys
from fast import imports
there = set(sys.modules)
imports.lean()
assert set(sys.modules) == there
"""
    assert "diffusers" in imported(tmp_path, script)


@pytest.mark.parametrize("option", ["--compile", "--attention xformers"])
def test_a_run_that_takes_what_is_left_out_imports_all_of_it_as_usual(monkeypatch, option):
    called = []
    monkeypatch.setattr(imports, "lean", lambda: called.append(option))
    start.begin(configuration.parse(["t4", "--device", "cpu"]))
    assert called.pop() == option
    start.begin(configuration.parse(["t4", "--device", "cpu", *option.split()]))
    assert not called


def test_what_is_out_of_sight_comes_back_and_what_is_there_stays():
    import PIL

    with imports.out_of_sight({"xml.sax": None, "PIL": None}):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("xml.sax")
        assert importlib.import_module("PIL") is PIL
    assert importlib.import_module("xml.sax")


def test_compiling_waits_for_the_first_call():
    import torch

    calls, whole = [], torch.compile
    torch_compile = lambda function, **options: calls.append(options) or function  # noqa: E731
    try:
        torch.compile = torch_compile
        with imports.uncompiled():
            double = torch.compile(lambda x: 2 * x)

            @torch.compile(dynamic=False)
            def add(a, b=1):
                """Adds."""
                return a + b

        assert torch.compile is torch_compile and not calls
    finally:
        torch.compile = whole
    assert (double(3), add(2, b=5), add(2)) == (6, 7, 3)
    assert calls == [{}, {"dynamic": False}] and add.__doc__ == "Adds."
