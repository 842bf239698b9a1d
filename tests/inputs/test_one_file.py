"""A checkpoint in one file: every name against diffusers' own conversion, the kind of model as the
file itself says it, and the same numbers as from the folder that it was made of.
"""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders import single_file_utils as theirs
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

import model
from conftest import ROOT, TINY_SDXL
from fast import nf4
from hub_server import serving
from inputs import hub, one_file, vetting
from inputs.files import Refusal
from keep import drawing
from made import assert_same_weights
from one_file_names import CLASSES, checkpoint, of_part, old_name

CPU = torch.device("cpu")
COUNTS = {"unet": 2_567_463_684, "vae": 83_653_863}
COUNTS |= {"text_encoder": 123_060_480, "text_encoder_2": 694_659_840}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def refused(path: Path, words: str, **options):
    with pytest.raises(Refusal, match=words):
        one_file.read_kind(path, **options)


def saved(path: Path, *names: str, about: dict | None = None, **tensors) -> Path:
    """A file with empty tensors of these names, and with these tensors."""
    tensors |= {name: torch.zeros(2, 2) for name in names}
    save_file({name.replace("__", "."): t for name, t in tensors.items()}, path, about)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The pocket model in one file, fp32."""
    path = tmp_path_factory.mktemp("whole") / "pocket.safetensors"
    save_file(checkpoint(TINY_SDXL), path)
    return path


@pytest.fixture
def small(monkeypatch):
    """The pocket's configurations stand where SDXL base's do."""
    monkeypatch.setattr(one_file, "SHIPPED", TINY_SDXL)


# ---- SDXL at its full size -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def full() -> dict[str, torch.nn.Module]:
    """SDXL's parts as the shipped configurations have them, without numbers."""
    with torch.device("meta"):
        return {
            part: cls.from_config(cls.load_config(one_file.SHIPPED / part))
            if part in ("unet", "vae")
            else cls(cls.config_class.from_pretrained(one_file.SHIPPED / part))
            for part, cls in CLASSES.items()
        }


def test_the_shipped_configurations_are_sdxls(full):
    assert {part: sum(p.numel() for p in m.parameters()) for part, m in full.items()} == COUNTS
    base = ROOT / "inputs" / "sdxl"
    for part in ("scheduler", "unet", "vae", "text_encoder", "text_encoder_2"):
        json.loads(next((base / part).glob("*config.json")).read_text())
    assert full["unet"].config.in_channels == 4 and full["vae"].config.scaling_factor == 0.13025
    schedule = model.load_noise_schedule(str(base), CPU)
    assert schedule.prediction_type == "epsilon"
    # its last sigma, 14.6146, is known from ComfyUI and k-diffusion
    last = schedule.alphas_cumprod[-1]
    assert float(((1 - last) / last).sqrt()) == pytest.approx(14.6146, abs=1e-4)


def convert(part: str, old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' conversion of one part."""
    config = json.loads((one_file.SHIPPED / part / "config.json").read_text())
    if part == "unet":
        return theirs.convert_ldm_unet_checkpoint(old, config)
    if part == "vae":
        return theirs.convert_ldm_vae_checkpoint(old, config)
    if part == "text_encoder":
        return theirs.convert_ldm_clip_checkpoint(old)
    return theirs.convert_open_clip_checkpoint(None, old, one_file.PREFIXES[part])


@pytest.mark.parametrize("part", one_file.PREFIXES)
def test_every_tensor_is_where_diffusers_own_conversion_has_it(part, full, tmp_path):
    """All of SDXL's names, under each a small tensor of its own."""
    wanted = {of_part(part, name) for name in full[part].state_dict()}
    old = {}
    for i, key in enumerate(sorted({old_name(part, name) for name in wanted})):
        side = (6, 2) if "in_proj" in key else (2, 2)
        side = (4, 2, 1, 1) if re.search(r"attn_1\.[qkvp]", key) else side
        side = side[:1] if key.endswith("bias") else side
        numbers = torch.arange(1000 * i, 1000 * i + torch.Size(side).numel())
        old[key] = numbers.view(side).float()
    path = tmp_path / "x.safetensors"
    save_file(old, path)
    ours, expected = dict(one_file.tensors(path, part, CPU)), convert(part, old)
    assert ours.keys() == expected.keys() == wanted
    assert all(torch.equal(ours[name], expected[name]) for name in wanted)
    if part == "text_encoder":
        assert len(ours) == 196
    one_file.check_names(path, part, one_file.names(old, part), wanted)


@pytest.mark.parametrize(("part", "pad"), [("tokenizer", 49407), ("tokenizer_2", 0)])
def test_the_shipped_vocabulary_gives_open_clips_tokens(part, pad):
    """1,000 captions of many kinds; the tokens are open_clip's own (clip_tokens.py)."""
    tokenizer = CLIPTokenizer.from_pretrained(one_file.SHIPPED / part)
    rows = json.loads(gzip.decompress((Path(__file__).parent / "clip_tokens.json.gz").read_bytes()))
    assert len(rows) == 1000 and tokenizer.model_max_length == 77 and len(tokenizer) == 49408
    tokens = tokenizer([text for text, _ in rows]).input_ids
    # "!" is what the second pads with, and so stands alone in captions, too: in diffusers as here.
    odd = [t for (t, clip), ours in zip(rows, tokens, strict=True) if clip != ours]
    assert odd == [text for text, _ in rows if part == "tokenizer_2" and "!" in text]
    assert tokenizer("a", padding="max_length").input_ids == [49406, 320, 49407] + [pad] * 74


# ---- the same numbers ----------------------------------------------------------------------------


def test_a_file_gives_the_folders_tensors_and_the_encoders_their_answers(whole, small):
    unet = model.build_unet(TINY_SDXL / "unet")
    weights = {name: t.float() for name, t in one_file.tensors(whole, "unet", CPU)}
    model.fill_unet(unet, weights, whole)
    assert_same_weights(unet, model.load_unet(str(TINY_SDXL), CPU, torch.float32))
    folder = model.load_text_encoders(str(TINY_SDXL), CPU)
    parts = ("text_encoder", "text_encoder_2")
    file = [one_file.build_encoder(CLASSES[part], whole, part, CPU).eval() for part in parts]
    for ours, want in zip(file, folder.encoders, strict=True):
        assert_same_weights(ours, want)
    mine = model.TextEncoders(folder.tokenizers, tuple(file), folder.zero_unconditional)
    answers = [model.encode_prompts(["a cat", ""], text) for text in (mine, folder)]
    assert all(torch.equal(ours, want) for ours, want in zip(*answers, strict=True))
    vae, pixels = one_file.build_encoder(AutoencoderKL, whole, "vae", CPU), torch.rand(1, 3, 32, 32)
    assert_same_weights(vae, model.load_vae(str(TINY_SDXL), CPU))
    answers = [model.encode_images(pixels, v) for v in (vae, model.load_vae(str(TINY_SDXL), CPU))]
    assert all(torch.equal(ours, want) for ours, want in zip(*answers, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_smaller_numbers_are_read_as_they_are_and_said(dtype, whole, small, tmp_path):
    path = tmp_path / "small.safetensors"
    save_file({key: t.to(dtype) for key, t in load_file(whole).items()}, path)
    for part in one_file.PREFIXES:
        exact = dict(one_file.tensors(whole, part, CPU))
        for name, tensor in one_file.tensors(path, part, CPU):
            assert tensor.dtype == dtype
            assert torch.equal(tensor.float(), exact[name].to(dtype).float())
    said = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float8_e4m3fn: "f8_e4m3"}[dtype]
    assert f"tensors in {said}" in one_file.read_kind(path)[1]


def test_a_parts_fingerprint_is_that_of_its_own_tensors(whole, small, tmp_path):
    tensors = load_file(whole)
    key = "first_stage_model.encoder.conv_in.weight"
    save_file(tensors | {key: tensors[key] + 1}, tmp_path / "other.safetensors")
    before, after = (
        {part: one_file.fingerprint(path, part) for part in one_file.PREFIXES}
        for path in (whole, tmp_path / "other.safetensors")
    )
    assert {part for part in before if before[part] != after[part]} <= {"vae"}
    save_file({k: t * 1.01 for k, t in tensors.items()}, tmp_path / "all.safetensors")
    for part in one_file.PREFIXES:
        assert one_file.fingerprint(tmp_path / "all.safetensors", part) != before[part]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_run_from_the_file_is_the_run_from_the_folder(
    dtype, train, whole, small, tmp_path, capfd
):
    ends, options = [], ("--max-train-steps", "2", "--mixed-precision", dtype)
    for base in (TINY_SDXL, whole):
        name = base.stem
        assert train(name, *options, "--pretrained-model-name-or-path", str(base)) == 0
        ends.append(load_file(tmp_path / name / "pytorch_lora_weights.safetensors"))
        assert (capfd.readouterr().err.count("is SDXL in one file: epsilon")) == (base == whole)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert hub.unet_fingerprint(str(whole), False) == hub.unet_fingerprint(str(TINY_SDXL), False)


def test_pictures_from_the_file_are_those_from_the_folder(train, whole, small, tmp_path):
    assert train("run", "--max-train-steps", "2") == 0
    adapter, drawn = str(tmp_path / "run" / "pytorch_lora_weights.safetensors"), []
    for base in (TINY_SDXL, whole):
        out, few = str(tmp_path / f"{base.stem}.d"), ("--num-inference-steps", "2")
        argv = ["--pretrained-model-name-or-path", str(base), "--prompts", "a cat", *few]
        assert drawing.main([adapter, *argv, "--output-dir", out]) == 0
        drawn.append([Image.open(path).tobytes() for path in sorted(Path(out).rglob("*.png"))])
    assert drawn[0] == drawn[1] and drawn[0]


def test_nf4_from_the_file_is_nf4_from_the_folder(whole, small, tmp_path):
    both = [
        nf4.load_unet_nf4(str(base), CPU, torch.float32, tmp_path / base.stem)
        for base in (TINY_SDXL, whole)
    ]
    assert_same_weights(*both)


def test_v_prediction_and_zero_snr_of_a_file_are_obeyed(whole, small, tmp_path):
    path = tmp_path / "v.safetensors"
    save_file(load_file(whole) | {mark: torch.zeros(0) for mark in ("v_pred", "ztsnr")}, path)
    schedule = model.load_noise_schedule(str(path), CPU)
    assert schedule.prediction_type == "v_prediction" and float(schedule.alphas_cumprod[-1]) == 0
    sampler = vetting.load_sampler(str(path)).config
    assert sampler.prediction_type == "v_prediction" and sampler.rescale_betas_zero_snr
    assert sampler.timestep_spacing == "trailing"
    assert model.load_noise_schedule(str(whole), CPU).prediction_type == "epsilon"


@pytest.mark.parametrize("name", ["no.safetensors", "org/no.safetensors", "./a/b/no.safetensors"])
def test_a_file_that_is_nowhere_is_refused(name):
    with pytest.raises(Refusal, match=f"there is no file {name}.*USER/REPOSITORY/FILE"):
        hub.fetch(name, "unet")


def test_a_file_on_the_hub_is_downloaded_at_one_commit_and_serves_offline(
    whole, small, monkeypatch, tmp_path, capsys
):
    with serving(monkeypatch, tmp_path / "here") as server:
        commit = server.push("someone/models", {"v1/model.safetensors": whole})
        name = "someone/models/v1/model.safetensors"
        assert_same_weights(
            model.load_unet(name, CPU, torch.float32),
            model.load_unet(str(TINY_SDXL), CPU, torch.float32),
        )
        assert hub.commit_of(name) == commit and hub.commit_of(str(whole)) == ""
        assert f"GB of {name} into" in capsys.readouterr().err
        server.push("someone/models", {"v1/model.safetensors": b"another"})
        server.fail("/", 503)
        hub.file_of.cache_clear()
        hub.use_revision(name, commit)
        assert hub.file_of(name).read_bytes() == whole.read_bytes()
        hub.file_of.cache_clear()
        with pytest.raises(Refusal, match=r"models \(v2\.safetensors\) did not come: .* 503"):
            hub.fetch("someone/models/v2.safetensors", "vae")
    with serving(monkeypatch, tmp_path / "here") as server:
        server.push("someone/models", {"a.txt": b""})
        with pytest.raises(Refusal, match=r"someone/models has no v2\.safetensors"):
            hub.fetch("someone/models/v2.safetensors", "vae")


# ---- the kind of model ---------------------------------------------------------------------------

ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
MODELSPEC = "modelspec.prediction_type"


@pytest.mark.parametrize(
    ("marks", "header", "entries", "words"),
    [
        ("", {}, {"prediction_type": "epsilon"}, "epsilon (nothing says another)"),
        (
            "",
            {MODELSPEC: "epsilon"},
            {"prediction_type": "epsilon"},
            f"epsilon ({MODELSPEC}: epsilon)",
        ),
        ("v_pred", {}, {"prediction_type": "v_prediction"}, "v_prediction (v_pred: v)"),
        (
            "v_pred ztsnr",
            {},
            {"prediction_type": "v_prediction"} | ZERO,
            "(v_pred: v), zero terminal SNR",
        ),
        (
            "",
            {MODELSPEC: "v"},
            {"prediction_type": "v_prediction"},
            f"v_prediction ({MODELSPEC}: v)",
        ),
        ("", {"modelspec.predict_key": "v"}, {"prediction_type": "v_prediction"}, "predict_key"),
        ("", {"ss_v_parameterization": "True"}, {"prediction_type": "v_prediction"}, "ss_v"),
        (
            "v_pred",
            {MODELSPEC: "epsilon"},
            {"prediction_type": "v_prediction"},
            f"v_prediction (v_pred: v, {MODELSPEC}: epsilon)",
        ),
        ("ztsnr", {}, {"prediction_type": "epsilon"} | ZERO, "zero terminal SNR (ztsnr)"),
    ],
)
def test_what_is_predicted_is_read_from_marks_and_header(
    marks, header, entries, words, whole, tmp_path
):
    path = tmp_path / "kind.safetensors"
    save_file(load_file(whole) | {mark: torch.tensor([]) for mark in marks.split()}, path, header)
    found, sentence = one_file.read_kind(path)
    assert found == entries and words in sentence and "not read" not in sentence


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (
            "lora_unet_input_blocks_4_1_proj_in.lora_down.weight",
            "adapter.*name the model that",
        ),
        ("unet.down_blocks.1.attentions.0.proj_in.lora_A.weight", "adapter"),
        ("unet.down_blocks.1.attentions.0.processor.to_q_lora.up.weight", "adapter"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_a", "adapter"),
        ("lycoris_input_blocks_4_1.lokr_w1", "adapter"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "Flux.*Illustrious"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("edm_mean", "EDM"),
        ("edm_vpred.sigma_max", "EDM"),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            "Stable Diffusion 1",
        ),
        ("cond_stage_model.model.positional_embedding", "Stable Diffusion 2"),
        ("conditioner.embedders.0.model.positional_embedding", "refiner"),
        ("control_model.input_blocks.0.0.weight", "ControlNet"),
        ("down_blocks.0.resnets.0.conv1.weight", "in diffusers' layout.*model_index.json"),
        ("input_blocks.0.0.weight", "one part alone.*take the checkpoint"),
        ("decoder.conv_in.weight", "one part alone"),
        ("scaled_fp8", "scaled fp8.*fp16, bf16 or fp32 file"),
        ("model.diffusion_model.input_blocks.4.1.proj_in.scale_weight", "scaled fp8"),
        ("model.diffusion_model.input_blocks.4.1.proj_in.comfy_quant", "quantised"),
    ],
)
def test_other_kinds_are_refused_by_name(key, words, tmp_path):
    refused(saved(tmp_path / "other.safetensors", key), f"other.safetensors is .*{words}")


@pytest.mark.parametrize("mark", ["edm_mean", "edm_vpred.sigma_max", "scaled_fp8", "x.comfy_quant"])
def test_marks_count_in_a_whole_file_too(mark, whole, tmp_path):
    path = tmp_path / "marked.safetensors"
    save_file(load_file(whole) | {mark: torch.zeros(1)}, path)
    refused(path, f"(EDM|quantised).*it has {mark}")


def test_parts_that_are_not_there_are_named_together(whole, tmp_path):
    tensors = load_file(whole)
    path, less = tmp_path / "less.safetensors", {}
    for key, tensor in tensors.items():
        if key.startswith("model.diffusion_model."):
            less[key] = tensor
    save_file(less, path, {"modelspec.architecture": "stable-diffusion-xl-v1-base"})
    refused(
        path,
        "lacks vae, text_encoder, text_encoder_2; its header says stable-diffusion-xl-v1-base",
    )
    less |= {k: t for k, t in tensors.items() if k.startswith("conditioner.")}
    save_file(less, path)
    refused(path, "lacks vae; its header.*--vae NAME")
    one_file.read_kind(path, ("unet", "text_encoder", "text_encoder_2"))  # with a VAE of its own


@pytest.mark.parametrize("channels", [9, 8])
def test_a_unet_of_more_channels_is_refused(channels, whole, tmp_path):
    key, path = "model.diffusion_model.input_blocks.0.0.weight", tmp_path / "more.safetensors"
    save_file(load_file(whole) | {key: torch.zeros(64, channels, 3, 3)}, path)
    refused(path, f"inpainting.*takes {channels} channels")


def test_whole_numbers_and_unknown_words_are_refused(whole, tmp_path):
    tensors, path = load_file(whole), tmp_path / "odd.safetensors"
    save_file({k: t.to(torch.int8) for k, t in tensors.items()}, path)
    refused(path, "tensors in I8; expected F32, F16")
    save_file(tensors, path, {MODELSPEC: "rectified flow"})
    refused(path, f"{MODELSPEC} 'rectified flow'; expected epsilon or v")


def test_what_is_beside_sdxl_is_counted_and_known_spares_are_not_missed(whole, small, tmp_path):
    path = tmp_path / "more.safetensors"
    spare = ["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"]
    spare += ["conditioner.embedders.1.model.logit_scale"]
    spare += ["conditioner.embedders.0.transformer.text_projection.weight"]
    aside = ["denoiser.sigmas", "cond_stage_model.model.logit_scale"]  # which merges carry along
    save_file(load_file(whole) | {key: torch.zeros(2) for key in spare + aside}, path)
    words = one_file.read_kind(path)[1]
    assert "2 tensors of no part are not read, such as cond_stage_model.model.logit_scale" in words
    for part in one_file.PREFIXES:
        ours = [name for name, _ in one_file.tensors(path, part, CPU)]
        assert ours == [name for name, _ in one_file.tensors(whole, part, CPU)]


def test_lacking_and_more_tensors_of_a_part_are_counted_and_the_first_is_named(
    whole, small, tmp_path
):
    path, tensors = tmp_path / "cut.safetensors", load_file(whole)
    cut = [key for key in tensors if ".resblocks.1." in key]
    less = {key: t for key, t in tensors.items() if key not in cut}
    odd = "conditioner.embedders.1.model.odd.weight"
    save_file(less | {odd: torch.zeros(1)}, path)
    with pytest.raises(Refusal) as told:
        one_file.build_encoder(CLIPTextModelWithProjection, path, "text_encoder_2", CPU)
    words = str(told.value)
    assert "lacks 16 tensors, such as text_model.encoder.layers.1.layer_norm1.bias" in words
    assert f"has, unused, 1 tensors, such as {odd}" in words


def test_another_shape_is_refused_by_its_part(whole, small, tmp_path):
    path, tensors = tmp_path / "shape.safetensors", load_file(whole)
    key = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    for wrong in (tensors[key][:-1], torch.tensor(1.0)):
        save_file(tensors | {key: wrong.clone()}, path)
        with pytest.raises(Refusal, match="no text_encoder_2 of SDXL's shape"):
            one_file.build_encoder(CLIPTextModelWithProjection, path, "text_encoder_2", CPU)


def test_a_projection_that_lies_as_transformers_has_it_is_not_turned(whole, small, tmp_path):
    """Both names are met: the one without .weight is OpenCLIP's own, and transposed."""
    path, tensors = tmp_path / "turned.safetensors", load_file(whole)
    key = "conditioner.embedders.1.model.text_projection"
    turned = tensors.pop(key).T.contiguous()
    save_file(tensors | {f"{key}.weight": turned}, path)
    ours = dict(one_file.tensors(path, "text_encoder_2", CPU))
    assert torch.equal(ours["text_projection.weight"], turned)


def test_a_parts_fingerprint_tells_shapes_and_takes_any(whole, small, tmp_path):
    """By it encoded captions are found again: of another shape they are another encoder's."""
    path, tensors, part = tmp_path / "shape.safetensors", load_file(whole), "text_encoder_2"
    key = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    more = torch.cat([tensors[key], tensors[key][:1]])
    found = {one_file.fingerprint(whole, part)}
    for wrong in (more, torch.tensor(1.0)):
        save_file(tensors | {key: wrong.clone()}, path)
        found.add(one_file.fingerprint(path, part))
        with pytest.raises(Refusal, match="no text_encoder_2 of SDXL's shape"):
            one_file.build_encoder(CLIPTextModelWithProjection, path, part, CPU)
    assert len(found) == 3
