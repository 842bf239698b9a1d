"""Files that other programs wrote: drawn as their own reader draws them, or refused as what they
are.
"""

import json

import peft
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from safetensors.torch import save_file

import lora
from adapter_tools import ALPHA, RANK, answer, off, pipeline, read_only, trained
from adapters import files
from conftest import make_unet
from inputs.drawing import find_adapter
from sentences import refused

pytestmark = pytest.mark.slow


def theirs(**more):
    """A UNet with peft's own adapter, its B random."""
    unet = make_unet()
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **more)
    unet.add_adapter(config)
    fill(unet)
    return unet


@torch.no_grad()
def fill(unet):
    generator = torch.Generator().manual_seed(1)
    for name, each in unet.named_parameters():
        if "lora_B" in name:
            each.copy_(0.1 * torch.randn(each.shape, generator=generator))


def ours(path, batch):
    """The UNet's answer with the file, read and loaded by us."""
    unet, file = make_unet(), files.read(path)
    files.load(lora.inject(unet, rank=file.rank, alpha=file.alpha), file)
    return answer(unet, batch)


def same(got, want, batch):
    assert off(got, want) < 1e-5 < 0.01 < off(answer(make_unet(), batch), want)


@pytest.mark.parametrize("with_alpha", [True, False])
def test_diffusers_training_scripts(tmp_path, batch, with_alpha):
    """unet.<module>.lora.down.weight, with their header or, as older ones, none."""
    unet = theirs(init_lora_weights="gaussian")
    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(unet))
    assert all(".lora.down." in key or ".lora.up." in key for key in layers)
    more = {"unet_lora_adapter_metadata": unet.peft_config["default"].to_dict()}
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, layers, **(more if with_alpha else {}))
    pipe = pipeline(make_unet())
    pipe.load_lora_weights(tmp_path)
    want = answer(pipe.unet, batch)
    same(ours(tmp_path, batch), want, batch)
    assert files.read(tmp_path).alpha == (ALPHA if with_alpha else RANK)


def test_a_unet_that_saved_its_adapter(tmp_path, batch):
    unet = theirs()
    unet.save_lora_adapter(tmp_path)
    again = make_unet()
    again.load_lora_adapter(tmp_path, prefix=None, weight_name=find_adapter(tmp_path).name)
    same(ours(tmp_path, batch), answer(again, batch), batch)
    same(ours(tmp_path, batch), answer(unet, batch), batch)


def test_pefts_own_folder(tmp_path, batch):
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model = peft.get_peft_model(
        make_unet(), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    )
    fill(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make_unet(), tmp_path)
    same(ours(tmp_path, batch), answer(again.get_base_model(), batch), batch)
    (tmp_path / "adapter_config.json").unlink()
    refused(lambda: files.read(tmp_path), "adapter_config.json")


@pytest.mark.parametrize("layout", ["SGM", "diffusers' names", "ComfyUI"])
def test_kohyas_and_comfyuis_keys(tmp_path, batch, layout):
    """Kohya's in both spellings of the blocks, held to diffusers; ComfyUI's with dots."""
    adapter = trained(unet := make_unet())
    want, sgm, tensors = answer(unet, batch), files.sgm_names(adapter.layers), {}
    for name, layer in adapter.layers.items():
        name = name if layout.startswith("diff") else sgm[name]
        name = (
            f"diffusion_model.{name}"
            if layout == "ComfyUI"
            else "lora_unet_" + name.replace(".", "_")
        )
        tensors[f"{name}.lora_down.weight"] = layer.lora_A.detach()
        tensors[f"{name}.lora_up.weight"] = layer.lora_B.detach()
        tensors[f"{name}.alpha"] = torch.tensor(float(ALPHA))
    save_file(tensors, tmp_path / "a.safetensors")
    same(ours(tmp_path, batch), want, batch)
    if layout != "ComfyUI":
        pipe = pipeline(make_unet())
        pipe.load_lora_weights(tmp_path / "a.safetensors")
        same(ours(tmp_path, batch), answer(pipe.unet, batch), batch)


@pytest.mark.parametrize("per_level", [1, 2])
def test_sgm_names_are_one_to_one(per_level):
    names = list(trained(make_unet(layers_per_block=per_level)).layers)
    sgm = files.sgm_names(names)
    assert len(set(sgm.values())) == len(names) and files.sgm_names([*names, "conv_in"]) == {}


def config(**changes):
    said = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q"]).to_dict() | changes
    return json.dumps(said | {"peft_type": "LORA", "target_modules": ["to_q"]})


def with_header(folder, said):
    matrices = read_only().matrices().items()
    tensors = {f"unet.{name}.weight": each.detach() for name, each in matrices}
    save_file(tensors, folder / "a.safetensors", {"lora_adapter_metadata": said})
    return folder / "a.safetensors"


STRANGE = [("init_lora_weights", each) for each in ("pissa", "pissa_niter_4", "olora", "loftq")]
STRANGE += [("use_dora", True), ("use_rslora", True), ("rank_pattern", {"to_q": 8})]
STRANGE += [("alpha_pattern", {"to_q": 8}), ("bias", "lora_only"), ("fan_in_fan_out", True)]
STRANGE += [("layers_to_transform", [1]), ("modules_to_save", ["conv_in"]), ("lora_bias", True)]
STRANGE += [("layer_replication", [[0, 1]]), ("a_field_of_tomorrow", 3)]


# What the tensors say, or alpha of each, is understood.
UNDERSTOOD = {"use_dora": 6, "use_rslora": 6 * RANK**0.5, "rank_pattern": 6, "alpha_pattern": None}


@pytest.mark.parametrize("read", [lora.read, files.read], ids=["book", "adapters"])
@pytest.mark.parametrize("name, value", STRANGE)
def test_a_field_that_is_not_understood_is_refused_by_name(tmp_path, read, name, value):
    path = with_header(tmp_path, config(**{name: value}))
    if read is lora.read or name not in UNDERSTOOD:
        refused(lambda: read(path), name)
    elif alpha := UNDERSTOOD[name]:
        assert read(path).alpha == alpha
    else:
        refused(lambda: read(path), "one rank and one alpha for all modules")


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_every_field_at_rest_passes(tmp_path, init):
    assert files.read(with_header(tmp_path, config(init_lora_weights=init))).alpha == ALPHA


@pytest.mark.parametrize(
    "family, stem, width",
    [
        ("Flux", "lora_unet_double_blocks_0_img_attn_proj", 3072),
        ("Flux", "transformer.single_transformer_blocks.0.attn.to_q", 3072),
        ("Stable Diffusion 3 or Qwen-Image", "transformer.transformer_blocks.0.attn.to_q", 1536),
        ("Stable Diffusion 1 or 2", "lora_unet_up_blocks_3_attentions_0_x_attn2_to_k", 768),
        ("Stable Diffusion 1 or 2", "unet.up_blocks.3.attentions.0.x.attn2.to_k", 1024),
    ],
)
def test_another_family_is_told(tmp_path, family, stem, width):
    ends = ("lora_down", "lora_up") if stem.startswith("lora") else ("lora_A", "lora_B")
    shapes = zip(ends, ((4, width), (8, 4)), strict=True)
    save_file({f"{stem}.{e}.weight": torch.ones(s) for e, s in shapes}, tmp_path / "a.safetensors")
    refused(lambda: files.read(tmp_path), f"holds a LoRA of {family}, since", "SDXL's UNet alone")


@pytest.mark.parametrize(
    "kind, key",
    [
        ("a text encoder's LoRA", "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"),
        ("a text encoder's LoRA", "text_encoder.layers.0.self_attn.q_proj.lora_A.weight"),
        ("DoRA", "lora_unet_down_blocks_0_attn1_to_q.dora_scale"),
        ("DoRA", "unet.down_blocks.0.attn1.to_q.lora_magnitude_vector"),
        ("LoHa", "lora_unet_down_blocks_0_attn1_to_q.hada_w1_a"),
        ("LoKr", "lora_unet_down_blocks_0_attn1_to_q.lokr_w1"),
        ("an embedding", "clip_g"),
        ("a whole model", "model.diffusion_model.input_blocks.0.0.weight"),
        (
            "a whole model, not an adapter",
            "conditioner.embedders.0.transformer.text_model.a.weight",
        ),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_what_is_more_than_the_unets_lora_is_told_by_its_name(tmp_path, kind, key, beside):
    tensors = {
        f"unet.{name}.weight": each.detach() for name, each in read_only().matrices().items()
    }
    save_file((tensors if beside else {}) | {key: torch.ones(4, 4)}, tmp_path / "a.safetensors")
    refused(lambda: files.read(tmp_path), f"holds {kind}", f"has 1 keys such as {key}")


def test_a_file_of_nothing_and_one_of_another_kind_are_told(tmp_path):
    save_file({}, tmp_path / "a.safetensors")
    refused(lambda: files.read(tmp_path / "a.safetensors"), "holds no tensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "a.bin")
    refused(lambda: files.read(tmp_path / "a.bin"), "is not a whole safetensors", "convert it")


def test_more_than_attention_is_told_with_its_count(tmp_path):
    targets = (*lora.TARGETS, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
    wide = lora.inject(make_unet(), targets, RANK, ALPHA)
    files.save(wide, tmp_path / "a.safetensors", "kohya", torch.float32, {})
    adapter = trained()
    more = len(wide.layers) - len(adapter.layers)
    said = f"adapts {more} modules besides attention's {len(adapter.layers)}, such as "
    refused(lambda: files.load(adapter, files.read(tmp_path)), said, "attention alone")


def test_a_folder_of_several_is_refused(tmp_path):
    adapter = trained()
    for name in "ab":
        files.save(adapter, tmp_path / f"{name}.safetensors", "kohya", torch.float32, {})
    refused(
        lambda: files.read(tmp_path), "a.safetensors, ", "b.safetensors; expected an adapter file"
    )
