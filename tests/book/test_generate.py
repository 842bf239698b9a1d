"""The book's drawing: a picture is a function of adapter, prompt and seed, strength 0 is the bare
model, and what the plain lines do not read is refused by a sentence.
"""

import functools
import inspect
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import generate
import lora
import model
from adapter_tools import drawable
from conftest import POCKET, ROOT, TINY_SDXL
from inputs import drawing, vetting
from inputs.files import Refusal
from tree import copied, python

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path):
    return drawable(tmp_path / "out")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def encoded(prompt: str, negative: str = "") -> dict[str, torch.Tensor]:
    return generate.encode(str(TINY_SDXL), [prompt], [negative], CPU, False)[0]


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
    unet = model.load_unet(str(TINY_SDXL), CPU, torch.float32)
    embedding, sampler = encoded("red apple"), vetting.load_sampler(str(TINY_SDXL))

    def drawn() -> torch.Tensor:
        return generate.sample(unet, sampler, embedding, 5, (8, 8), 2, 4.0)

    bare, file = drawn(), lora.read(run)
    adapter = lora.inject(unet, generate.targets_of(file), file.rank, file.alpha)
    lora.load(adapter, file)
    on = drawn()
    lora.set_strength(adapter, 0.0)
    assert torch.equal(drawn(), bare)
    assert ((on - bare).norm() / bare.norm()).item() > 0.01


@pytest.fixture(scope="module")
def parts():
    """The bare tiny model, for our lines and for diffusers' pipeline."""
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(TINY_SDXL, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        # As ours are: torch.matmul takes another kernel where a weight's gradient is wanted, which
        # on some CPUs rounds otherwise, also under no_grad.
        part.requires_grad_(False)
    return (
        model.load_unet(str(TINY_SDXL), CPU, torch.float32),
        model.load_vae(str(TINY_SDXL), CPU),
        pipe,
    )


USUAL = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDIMScheduler")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[pytest.mark.slow] * (k not in USUAL)) for k in vetting.SAMPLERS],
)
def test_a_picture_is_the_pipelines_to_the_bit(parts, kind):
    """With guidance, a negative prompt, another shape, and without guidance."""
    unet, vae, pipe = parts
    sampler = vetting.load_sampler(str(TINY_SDXL), kind)
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config)
    shapes = (("", 64, 64, 5.0), ("red", 96, 64, 3.0), ("", 64, 64, 1.0))
    for negative, height, width, guidance in shapes:
        size, embedding = (height // 8, width // 8), encoded("rocket", negative)
        latent = generate.sample(unet, sampler, embedding, 7, size, 4, guidance)
        (ours,) = generate.decode(vae, [latent], model.latent_scaling(str(TINY_SDXL)))
        told = {"height": height, "width": width, "guidance_scale": guidance}
        told |= {"negative_prompt": negative or None, "num_inference_steps": 4}
        theirs = pipe("rocket", output_type="latent", generator=seeded(7), **told).images
        assert torch.equal(latent, theirs)
        with torch.no_grad():
            pixels = pipe.vae.decode(theirs / pipe.vae.config.scaling_factor, return_dict=False)[0]
        (theirs,) = pipe.image_processor.postprocess(pixels, output_type="pil")
        assert ours.tobytes() == theirs.tobytes() and ours.size == (width, height)


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "DDIMScheduler"])
def test_rescaled_guidance_is_the_pipelines_to_the_bit(parts, kind):
    """As models of zero terminal SNR are drawn; and at 0 it is not there."""
    unet, _, pipe = parts
    told = (kind, 4, "v_prediction", "yes")
    config = pipe.scheduler.config | {"rescale_betas_zero_snr": True, "prediction_type": told[2]}
    config |= {"timestep_spacing": "trailing"}
    pipe.scheduler = getattr(diffusers, kind).from_config(config)
    latents = []
    for rescale in (0.0, 0.7, 1.0):
        sampler = vetting.load_sampler(str(TINY_SDXL), *told)
        how = (encoded("rocket", ""), 7, (8, 8), 4, 5.0, rescale)
        latents.append(generate.sample(unet, sampler, *how))
        words = {"height": 64, "width": 64, "guidance_scale": 5.0, "num_inference_steps": 4}
        words |= {"guidance_rescale": rescale, "generator": seeded(7)}
        theirs = pipe("rocket", output_type="latent", **words).images[0]
        assert torch.equal(latents[-1][0], theirs)
    without = generate.sample(unet, vetting.load_sampler(str(TINY_SDXL), *told), *how[:-1])
    assert torch.equal(without, latents[0]) and not torch.equal(latents[0], latents[1])


def test_every_sampler_that_goes_with_eulers_is_drawn_with_or_refused_by_name():
    """Two need scipy and torchsde, and EDM's is made for another kind of model. TCD's is not drawn
    with, as its default eta is not the pipeline's.
    """
    others = {"LMSDiscreteScheduler", "DPMSolverSDEScheduler", "EDMEulerScheduler"}
    compatible = {*diffusers.EulerDiscreteScheduler._compatibles}
    assert (
        compatible - others <= {*vetting.SAMPLERS} <= compatible | {"LCMScheduler", "TCDScheduler"}
    )
    for kind in (
        *others,
        "TCDScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "eulerdiscretescheduler",
        "utils",
    ):
        with pytest.raises(Refusal, match=f"the sampler {kind}; expected DDIMScheduler, "):
            vetting.load_sampler(str(TINY_SDXL), kind)


@pytest.mark.parametrize("kind", vetting.SAMPLERS)
def test_a_sampler_draws_from_pure_noise_where_the_model_says_so_or_is_refused(tmp_path, kind):
    shutil.copytree(TINY_SDXL, tmp_path / "m")
    path = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}))
    if kind == "LCMScheduler":  # which divides by the last, 0
        with pytest.raises(Refusal, match=r"LCMScheduler .* does not come through"):
            vetting.load_sampler(str(tmp_path / "m"), kind, 4)
    elif "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, kind)).parameters:
        assert vetting.load_sampler(str(tmp_path / "m"), kind, 4).alphas_cumprod[-1] < 1e-7
    else:
        with pytest.raises(Refusal, match=f"{kind} .* rescale_betas_zero_snr.*--scheduler Euler"):
            vetting.load_sampler(str(tmp_path / "m"), kind, 4)


@pytest.mark.parametrize(
    "kind, steps, settings",
    [
        ("PNDMScheduler", 2, {}),  # its first steps are four in one
        ("DDIMScheduler", 1000, {}),  # "leading" with an offset: a timestep 1000 of 0 to 999
        ("DPMSolverMultistepScheduler", 999, {}),  # NaN
        ("EulerDiscreteScheduler", 4, {"timestep_spacing": "foo"}),
        ("EulerDiscreteScheduler", 4, {"sigma_min": "a", "use_karras_sigmas": True}),
    ],
)
def test_a_sampler_that_does_not_come_through_is_refused_before_anything_is_drawn(
    tmp_path, kind, steps, settings
):
    shutil.copytree(TINY_SDXL, tmp_path / "m")
    path = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(Refusal, match=f"{kind} .* does not come through {steps} steps"):
        vetting.load_sampler(str(tmp_path / "m"), kind, steps)


def test_latents_are_not_clipped_to_a_pixels_range_where_the_model_does_not_say_so(tmp_path):
    shutil.copytree(TINY_SDXL, tmp_path / "m")
    path = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    for said, clips in (({}, False), ({"clip_sample": True}, True)):
        settings = json.loads(path.read_text())
        settings.pop("clip_sample", None)
        path.write_text(json.dumps(settings | said))
        assert (
            vetting.load_sampler(str(tmp_path / "m"), "DDIMScheduler").config.clip_sample is clips
        )


def test_prompts_that_are_cut_are_counted(run, tmp_path, capsys):
    draw(
        tmp_path / "drawn", str(run), "--prompts", "a red fox " * 60, "rocket", "--seeds", "1", "2"
    )
    assert (
        "1 prompts lose their end, beyond 30 tokens, such as 'a red fox" in capsys.readouterr().out
    )


def test_prompt_negative_and_unconditional_have_as_many_chunks_as_asked(capsys):
    prompt = "a red fox " * 12  # 36 tokens: more than one chunk of 30
    for negative in ("", "blue"):
        (one,), (two,) = (
            generate.encode(str(TINY_SDXL), [prompt], [negative], CPU, False, tokens)
            for tokens in (75, 150)
        )
        assert one["context"].shape == (2, 32, 40) and two["context"].shape == (2, 64, 40)
        torch.testing.assert_close(two["context"][:, :32], one["context"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(two["pooled"], one["pooled"], atol=1e-4, rtol=1e-4)
    assert capsys.readouterr().out.count("1 prompts lose their end, beyond 30 tokens") == 2


def test_as_many_tokens_are_read_as_the_adapter_was_trained_with_unless_asked(tmp_path):
    def tokens(about, *words):
        base = ("--pretrained-model-name-or-path", str(TINY_SDXL))
        given = drawing.parse(["LICENSE", *base, *words])
        return drawing.complete(given, tmp_path / "a.safetensors", about).max_tokens

    assert tokens({}) == 75 and tokens({"max_tokens": "150"}) == 150
    assert tokens({"max_tokens": "150"}, "--max-tokens", "225") == 225
    assert tokens({"max_tokens": "x"}, "--max-tokens", "75") == 75
    for said in ("x", "76", "0", ""):
        with pytest.raises(Refusal, match=f"says max_tokens '{said}'.*--max_tokens yourself"):
            tokens({"max_tokens": said})


def test_what_cannot_be_written_is_met_before_drawing(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(generate, "draw_at", None)
    with pytest.raises(OSError, match="file"):
        draw(tmp_path / "file", str(run), "--prompts", "rocket")


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(Refusal, match="no UTF-8"):
        drawing.parse(["--prompts", "a \udcff"])


def test_the_command_line_sets_shape_sampler_and_what_to_avoid(run, tmp_path):
    words = (str(run), "--prompts", "red apple", "--width", "96", "--resolution", "64")
    (plain,) = draw(tmp_path / "plain", *words).values()
    assert plain.shape == (64, 96, 3)
    for i, more in enumerate(
        (("--negative-prompt", "red"), ("--scheduler", "EulerAncestralDiscreteScheduler"))
    ):
        (other,) = draw(tmp_path / str(i), *words, *more).values()
        assert other.shape == plain.shape and np.abs(other - plain).mean() > 1


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
    vae = model.load_vae(str(TINY_SDXL), CPU)
    with pytest.raises(Refusal, match="came out as NaN or Inf"):
        generate.decode(vae, [torch.full((1, 4, 8, 8), float("nan"))], (1.0, 0.0))


def test_the_size_is_the_models_own_where_none_is_asked_for(run, tmp_path):
    (picture,) = draw(tmp_path / "drawn", str(run), "--prompts", "red apple").values()
    assert picture.shape == (32, 32, 3)


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


DRAWN = """
import runpy, sys
sys.argv = ["generate.py", *sys.argv[1:]]
runpy.run_path("generate.py", run_name="__main__")
print(*{name.split(".")[0] for name in sys.modules}, file=sys.stderr)
"""


@pytest.mark.slow
def test_the_script_draws_plainly_without_any_wing(run, tmp_path):
    steps = ("--num-inference-steps", "1", "--output-dir", str(tmp_path / "drawn"))
    words = (str(run), "--plain", "--prompts", "red apple", *steps)
    done = python(copied(tmp_path / "tree"), "-c", DRAWN, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "drawn" / "00-red-apple-0-1.png")
    names = {*done.stderr.splitlines()[-1].split()}
    assert {"torch", "lora", "model"} <= names
    assert not names & {"adapters", "fast", "learn", "see", "keep"}


def script(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "generate.py", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["--plain", "--compare"], 1, "error: --plain with --compare"),
        (["runs/nothere"], 1, "error: runs/nothere: no such file or folder; expected an adapter"),
        (["--seeds", "-1"], 1, "error: seeds is -1;"),
        (["--sedes", "1"], 1, "error: the option --sedes (here: --seeds)"),
    ],
)
def test_a_wrong_option_or_adapter_is_answered_before_torch_is_imported(words, code, said):
    done = script(*words)
    assert done.returncode == code and said in done.stdout + done.stderr
    assert not any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())
