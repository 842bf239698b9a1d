"""Our files of SDXL's 560 layers, held to what other programs read: the tables of loaders.py."""

import json
import re
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils import convert_unet_state_dict_to_peft
from loaders import LOADERS, Loader

import lora
from adapters import files
from inputs.vetting import SDXL_UNET

pytestmark = pytest.mark.slow

RANK, ALPHA = 2, 3  # alpha != rank: who forgets alpha is off by half
READERS = [pytest.param(loader, id=loader.name) for loader in LOADERS]


@pytest.fixture(scope="module")
def sdxl() -> SimpleNamespace:
    """SDXL's adapter, no two matrices alike, and its modules' names in either spelling: SGM's from
    diffusers' reader of Stability's checkpoints, given all possible keys, not from our tables.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SDXL_UNET)
    layers, generator = {}, torch.Generator().manual_seed(1)
    for name, base in lora.find_targets(unet, lora.TARGETS).items():
        A = torch.randn(RANK, base.in_features, generator=generator)
        B = torch.randn(base.out_features, RANK, generator=generator)
        layers[name] = SimpleNamespace(lora_A=A, lora_B=B)
    blocks = [f"{side}_blocks.{i}" for side in ("input", "output") for i in range(9)]
    keys = [f"{block}.0.x" for block in [*blocks, "middle_block", "middle_block.2"]]
    ends = [f"{i}.attn{k}.{end}" for i in range(10) for k in (1, 2) for end in lora.TARGETS]
    keys += [f"{b}.1.transformer_blocks.{end}" for b in [*blocks, "middle_block"] for end in ends]
    config = {"layers_per_block": SDXL_UNET["layers_per_block"]}
    sgm = convert_ldm_unet_checkpoint({f"model.diffusion_model.{key}": key for key in keys}, config)
    names = {"sgm": {n: sgm[n] for n in layers}, "diffusers": {n: n for n in layers}}
    adapter = lora.Adapter(layers, RANK, ALPHA, lora.TARGETS)
    kohya, said = opened(files.kohya_bytes(adapter, torch.float32, {}))
    return SimpleNamespace(adapter=adapter, names=names, kohya=kohya, said=said)


def opened(blob: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    return safetensors.torch.load(blob), header["__metadata__"]


def read(loader: Loader, tensors: dict, names: dict) -> tuple[dict, list[str]]:
    """The down, up and alpha of each module of the program's UNet, and the keys left over."""
    own, found, left = {}, {}, []
    for name in names[loader.unet].values():
        own[name] = own[name.replace(".", "_")] = name
    for key, tensor in tensors.items():
        end = next((end for end in loader.ends if key.endswith(f".{end}")), None)
        module = own.get(loader.rule(key.removesuffix(f".{end}")))
        if end and module:
            found.setdefault(module, {})[loader.ends[end]] = tensor
        else:
            left.append(key)
    return found, left


def check(loader: Loader, tensors: dict, sdxl: SimpleNamespace, scale: float | None) -> None:
    """Every module's own matrices stand where the program has that module; no key is left over."""
    own, layers = sdxl.names[loader.unet], sdxl.adapter.layers
    found, left = read(loader, tensors, sdxl.names)
    assert not left and len(layers) == 560 and found.keys() == {own[name] for name in layers}
    assert sum(map(len, found.values())) == len(tensors)  # no two keys mean the same
    for name, layer in layers.items():
        got = found[own[name]]
        assert {"down", "up"} <= got.keys()
        assert torch.equal(got["down"], layer.lora_A) and torch.equal(got["up"], layer.lora_B)
        alpha = got["alpha"].item() / len(got["down"]) if "alpha" in got else loader.without_alpha
        assert alpha == scale


@pytest.mark.parametrize("loader", READERS)
def test_every_module_of_the_kohya_file_is_read(sdxl, loader):
    """With its scale; without alphas that would be 1, or the program would fail."""
    check(loader, sdxl.kohya, sdxl, ALPHA / RANK)
    bare = {key: tensor for key, tensor in sdxl.kohya.items() if not key.endswith(".alpha")}
    check(loader, bare, sdxl, None if loader.name.startswith("LyCORIS") else 1)
    assert loader.kohya == 560
    for key, beginning in loader.header.items():
        assert sdxl.said[key].startswith(beginning) if beginning else key not in sdxl.said
    context = [key for key in sdxl.kohya if re.search(r"_attn2_to_[kv]\.lora_down", key)]
    assert {sdxl.kohya[key].shape[1] for key in context} == {2048}  # how InvokeAI knows SDXL


@pytest.mark.parametrize("loader", READERS)
def test_who_reads_the_peft_file(sdxl, loader):
    tensors, said = opened(lora.peft_bytes(sdxl.adapter, torch.float32, {}))
    if loader.peft:
        check(loader, tensors, sdxl, 1)
        config = json.loads(said["lora_adapter_metadata"])  # this is where diffusers looks
        assert config["unet.lora_alpha"] / config["unet.r"] == ALPHA / RANK
    else:
        assert read(loader, tensors, sdxl.names) == ({}, [*tensors])


@pytest.mark.parametrize("loader", READERS)
def test_who_reads_the_same_numbers_under_diffusers_names(sdxl, loader):
    """Three parts of them do not: this is why the file has SGM's."""
    sgm = {sdxl.names["sgm"][name].replace(".", "_"): name for name in sdxl.names["sgm"]}
    old = {}
    for key, tensor in sdxl.kohya.items():
        stem, _, end = key.removeprefix("lora_unet_").partition(".")
        old[f"lora_unet_{sgm[stem].replace('.', '_')}.{end}"] = tensor
    if loader.old:
        check(loader, old, sdxl, ALPHA / RANK)
    else:
        assert read(loader, old, sdxl.names) == ({}, [*old])


def test_diffusers_itself_puts_the_kohya_files_560_modules_where_they_belong(sdxl):
    """Its own conversion, with SDXL's configuration; by_words() says the same of the key rules."""
    config = SimpleNamespace(**SDXL_UNET)
    tensors = dict(sdxl.kohya)
    got, alphas = StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=config)
    got = convert_unet_state_dict_to_peft(got)
    assert len(got) == 1120 and set(alphas.values()) == {ALPHA}
    for name, layer in sdxl.adapter.layers.items():
        assert torch.equal(got[f"unet.{name}.lora_A.weight"], layer.lora_A)
        assert torch.equal(got[f"unet.{name}.lora_B.weight"], layer.lora_B)


KEY = "lora_unet_output_blocks_3_1_transformer_blocks_1_attn1_to_k.lora_down.weight"
WRONG = ["to_k to_kk", "_3_1 _9_1", "_3_1 _4_1", "_3_1 _3_0", "attn1 attn2", "lora_unet lora_net"]
WRONG += ["_down _dwn", ".lora_ _lora.", "_blocks_1_attn _blocks_2_attn"]


@pytest.mark.parametrize("loader", READERS)
def test_one_wrong_key_is_seen(sdxl, loader):
    other, right = KEY.replace("to_k", "to_q"), sdxl.kohya  # two matrices of one shape
    wrong = [right | {KEY: right[other], other: right[KEY]}]
    for change in WRONG:
        wrong.append({KEY.replace(*change.split()) if k == KEY else k: right[k] for k in right})
    for tensors in wrong:
        with pytest.raises(AssertionError):
            check(loader, tensors, sdxl, ALPHA / RANK)
