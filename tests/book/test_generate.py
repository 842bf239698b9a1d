"""The book's drawing: a picture is a function of adapter, prompt and seed, strength 0 is the bare
model, and what the plain lines do not read is refused by a sentence.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import lora
import model
from adapter_tools import drawable
from conftest import POCKET, ROOT
from inputs import drawing
from inputs.files import Refusal

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path):
    return drawable(tmp_path / "out")


def draw(folder, *words: str) -> dict[str, np.ndarray]:
    """The pictures of a plain drawing, by file name."""
    steps = ("--num-inference-steps", "2", "--output-dir", str(folder))
    generate.draw_plain(drawing.parse(["--plain", *words, *steps]))
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in sorted(folder.iterdir())}


def test_a_picture_is_a_function_of_prompt_and_seed_whatever_is_drawn_beside_it(run, tmp_path):
    two = ("--prompts", "red apple", "rocket", "--seeds", "3", "4")
    many = draw(tmp_path / "many", str(run), *two)
    names = ["00-red-apple-3-1", "01-red-apple-4-1", "02-rocket-3-1", "03-rocket-4-1"]
    assert list(many) == [f"{name}.png" for name in names]
    assert len({each.tobytes() for each in many.values()}) == 4
    one = draw(tmp_path / "one", str(run), "--prompts", "rocket", "--seeds", "4")
    assert np.array_equal(one["00-rocket-4-1.png"], many["03-rocket-4-1.png"])


def test_strength_0_is_the_bare_model_and_1_is_not(run):
    unet = model.load_unet(str(POCKET), CPU, torch.float32)
    pipe = generate.load_pipeline(str(POCKET), unet, CPU)
    embeddings = generate.encode(str(POCKET), ["red apple"], CPU, False)
    how = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 4.0}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    (bare,) = pipe(**embeddings[0], latents=noise, output_type="latent", **how).images[None]
    file = lora.read(run)
    adapter = lora.inject(unet, generate.targets_of(file), file.rank, file.alpha)
    lora.load(adapter, file)
    (off,) = generate.sample(pipe, adapter, embeddings, [5], 0.0, how)
    (on,) = generate.sample(pipe, adapter, embeddings, [5], 1.0, how)
    assert torch.equal(off, bare)
    assert ((on - bare).norm() / bare.norm()).item() > 0.01
    assert {layer.strength for layer in adapter.layers.values()} == {1.0}


def test_a_latent_comes_back_as_its_picture():
    vae = model.load_vae(str(POCKET), CPU)
    with Image.open(sorted((ROOT / "pocket" / "ink").glob("*.png"))[0]) as image:
        want = np.asarray(image.convert("RGB").resize((128, 128)), np.float32)
    pixels = torch.from_numpy(want).permute(2, 0, 1)[None] / 127.5 - 1
    factor, shift = scaling = model.latent_scaling(str(POCKET))
    latent = (model.encode_images(pixels, vae)[0] - shift) * factor
    (picture,) = generate.decode(vae, [latent], scaling)
    assert picture.size == (128, 128) and np.abs(np.asarray(picture) - want).mean() < 15


def test_a_picture_that_is_not_finite_is_refused():
    vae = model.load_vae(str(POCKET), CPU)
    with pytest.raises(Refusal, match="came out as NaN or Inf"):
        generate.decode(vae, [torch.full((1, 4, 8, 8), float("nan"))], (1.0, 0.0))


def test_the_models_own_size():
    def pipe(size):
        unet = SimpleNamespace(config=SimpleNamespace(sample_size=size))
        return SimpleNamespace(unet=unet, vae_scale_factor=8)

    assert generate.own_resolution(pipe(128)) == 1024


def test_the_targets_of_a_file_in_either_layouts_names():
    for modules, want in (
        (["a.attn1.to_q", "a.attn1.to_out.0"], ("to_q", "to_out.0")),
        (["a_attn1_to_k", "a_attn1_to_out_0"], ("to_k", "to_out.0")),
        (["a.conv_in"], ()),
    ):
        matrices = {f"{module}.lora_{kind}": None for module in modules for kind in "AB"}
        assert generate.targets_of(SimpleNamespace(matrices=matrices)) == want


# ---- what the plain lines refuse -----------------------------------------------------------------


def test_plain_refuses_what_only_the_command_does(run, tmp_path):
    for words, said in (
        ([str(run), "--compare"], "--plain with --compare"),
        ([], "--plain without an adapter"),
        ([str(run), "--base-quantization", "nf4"], "--plain with a base in 4 bits"),
        ([str(run / "kohya" / "out.safetensors")], "draw without --plain"),
        ([str(tmp_path / "none")], "no such file"),
    ):
        with pytest.raises(Refusal, match=said):
            draw(tmp_path / "drawn", *words)
    assert not (tmp_path / "drawn").exists()


@pytest.mark.slow
def test_plain_refuses_an_adapter_that_was_trained_on_4_bits_unless_told_so(tmp_path):
    run = drawable(tmp_path / "out", base_quantization="nf4")
    with pytest.raises(Refusal, match="--base-quantization none"):
        draw(tmp_path / "drawn", str(run))
    words = ("--base-quantization", "none", "--prompts", "red apple")
    assert len(draw(tmp_path / "drawn", str(run), *words)) == 1


def script(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "generate.py", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_script_draws_plainly_without_any_wing(run, tmp_path):
    steps = ("--num-inference-steps", "1", "--output-dir", str(tmp_path / "drawn"))
    done = script(str(run), "--plain", "--prompts", "red apple", *steps)
    assert done.returncode == 0
    assert done.stdout.strip() == str(tmp_path / "drawn" / "00-red-apple-0-1.png")
    names = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "torch" in names and not names & {"adapters", "fast", "learn", "see", "keep"}


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["--plain", "--compare"], 1, "error: --plain with --compare"),
        (["--seeds", "-1"], 1, "error: seeds is (-1,)"),
        (["--sedes", "1"], 2, "sedes"),
    ],
)
def test_a_wrong_option_is_answered_before_torch_is_imported(words, code, said):
    done = script(*words)
    assert done.returncode == code and said in done.stdout + done.stderr
    assert not any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())
