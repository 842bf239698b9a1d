"""Law 4, exported equals trained: the files act in diffusers as what was trained acts here."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import lora
import model
from adapter_tools import answer, off, pipeline
from adapters import files
from conftest import TINY_SDXL, make_batch
from inputs.options import RECIPES
from keep import drawing
from runs import matrices


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_diffusers_draws_our_picture_from_our_files(train, tmp_path, dtype):
    """Both files, loaded by load_lora_weights (peft), draw what generate.py draws; strength 0 is
    the bare model.
    """
    assert train("r", "--save-dtype", dtype, "--learning-rate", "1e-2") == 0
    options = ("--prompts", "red apple", "--seeds", "3", "--num-inference-steps", "4")
    options += ("--resolution", "64")
    ours = {}
    for strength in ("1", "0", "0.5"):
        assert drawing.main([str(tmp_path / "r"), *options, "--strength", strength]) == 0
        file = tmp_path / "r" / "pictures" / f"00-red-apple-3-{strength}.png"
        ours[strength] = np.asarray(Image.open(file)).astype(int)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(TINY_SDXL, torch_dtype=torch.float32)
    bare = reference(pipe)
    assert np.array_equal(ours["0"], bare)
    assert np.abs(ours["1"] - bare).mean() > 2
    half = np.abs(ours["0.5"] - bare).mean()
    assert 0 < half < np.abs(ours["1"] - bare).mean()
    for path in (tmp_path / "r", tmp_path / "r" / "kohya" / "r.safetensors"):
        assert np.abs(ours["1"] - reference(pipe, path)).max() <= 1  # of 255
    assert np.abs(ours["0.5"] - reference(pipe, tmp_path / "r", 0.5)).max() <= 1


def reference(pipe, path=None, strength: float = 1.0) -> np.ndarray:
    """The same prompt and seed through diffusers alone."""
    pipe.unload_lora_weights()
    if path:
        pipe.load_lora_weights(path, adapter_name="ours")
        pipe.set_adapters("ours", strength)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    guidance = RECIPES["pocket"][1].guidance_scale
    size = {"height": 64, "width": 64, "num_inference_steps": 4}
    drawn = pipe("red apple", latents=noise, guidance_scale=guidance, **size)
    return np.asarray(drawn.images[0]).astype(int)


@pytest.mark.slow
def test_what_a_resumed_run_exports_is_what_it_trained(train, tmp_path):
    """Ended after step 2 and gone on with otherwise cut steps: each file in each dtype, read by us
    and by diffusers, against the matrices that the last checkpoint holds.
    """
    device = torch.device("cpu")
    rate = ("--learning-rate", "1e-2")
    assert train("r", *rate, "--max-train-steps", "2") == 0
    shape = ("--train-batch-size", "4", "--gradient-accumulation-steps", "1")
    assert train("r", *rate, *shape) == 0
    batch = make_batch() | {
        "context": torch.randn(2, 32, 40, generator=torch.Generator().manual_seed(1)),
        "pooled": torch.randn(2, 24, generator=torch.Generator().manual_seed(2)),
    }
    unet = model.load_unet(str(TINY_SDXL), device, torch.float32)
    bare = answer(unet, batch)
    adapter = lora.inject(unet, lora.TARGETS, 16, 16, seed=5)
    mine, numbers = adapter.matrices(), matrices(tmp_path / "r")
    assert mine.keys() == numbers.keys()
    for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        assert train("r", *rate, *shape, "--save-dtype", f"fp{8 * dtype.itemsize}") == 0
        for file in (tmp_path / "r" / lora.FILE_NAME, tmp_path / "r" / "kohya" / "r.safetensors"):
            with torch.no_grad():
                for name, matrix in mine.items():
                    matrix.copy_(numbers[name])
            want = answer(unet, batch)
            pipe = pipeline(model.load_unet(str(TINY_SDXL), device, torch.float32))
            pipe.load_lora_weights(file)
            assert off(answer(pipe.unet, batch), want) < bound < 0.1 * off(bare, want)
            files.load(adapter, files.read(file))
            for name, matrix in mine.items():
                assert torch.equal(matrix, numbers[name].to(dtype).float()), name


@pytest.mark.slow  # tests/keep/test_export.py does it without a whole run
def test_a_file_that_is_not_what_was_trained_ends_the_run_without_done(train, monkeypatch, capsys):
    save = files.save

    def wrong(adapter, path, layout, *rest):
        """One number of kohya's file is another."""
        first = next(iter(adapter.matrices().values()))
        with torch.no_grad():
            before = first[0, 0].clone()
            first[0, 0] += 1e-3 if layout == "kohya" else 0
            save(adapter, path, layout, *rest)
            first[0, 0] = before

    monkeypatch.setattr(files, "save", wrong)
    assert train("r") == 1
    assert "read back, gives another UNet" in (said := capsys.readouterr()).err
    assert "done" not in said.out
    monkeypatch.setattr(files, "save", save)
    assert train("r") == 0
