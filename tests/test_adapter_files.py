"""Adapter files: what is written is what was trained, equal adapters are equal files, and a file
that is not exactly right is refused by name."""

import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

import lora
from conftest import POCKET, ROOT, make_batch, make_unet
from inputs.files import Refusal, data_section
from lora import FILE_NAME, Adapter

RANK, ALPHA = 4, 6  # alpha != rank: who forgets alpha is off by half
LAYOUTS = ("peft", "kohya")
DTYPES = (torch.float32, torch.float16)
# Neither sorted nor the reverse, so that order can be lost.
ABOUT = {"recipe": "t4", "base": "some/base", "steps": "7", "dataset": "pictures", "a": "z"}


def trained(unet: nn.Module | None = None, rank: int = RANK, alpha: float = ALPHA) -> Adapter:
    """An adapter whose B is random, as if trained."""
    adapter = lora.inject(make_unet() if unet is None else unet, rank=rank, alpha=alpha)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))
    return adapter


def header(path: Path) -> dict:
    """The file's JSON header as it stands, in its order."""
    blob = path.read_bytes()
    return json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])


@torch.no_grad()
def answer(unet: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    condition = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
    return unet(batch["noise"], batch["t"], batch["context"], added_cond_kwargs=condition).sample


def off(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|."""
    return ((got - want).norm() / want.norm()).item()


# ---- what a file holds ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(tmp_path, layout, dtype):
    """fp32: equal to the bit; fp16: equal to the rounded numbers."""
    path = tmp_path / "new" / "folder" / "adapter.safetensors"
    ours = trained()
    kept = ours.flat.detach().clone()
    lora.save(ours, path, layout, dtype, ABOUT)
    assert torch.equal(ours.flat, kept)  # saving changes nothing
    again = lora.inject(make_unet(), rank=RANK, alpha=ALPHA, seed=9)
    assert not torch.equal(again.flat, ours.flat)
    file = lora.load(again, path)
    assert torch.equal(again.flat, ours.flat.to(dtype).float())
    assert torch.equal(again.flat, ours.flat) == (dtype == torch.float32)
    again.check_tied()
    assert (file.path, file.layout, file.rank, file.alpha) == (path, layout, RANK, ALPHA)
    assert file.about.items() >= ABOUT.items()
    assert os.listdir(path.parent) == [path.name]  # no part file stays behind


@pytest.mark.parametrize("alpha", [0.1, 22.6, 16 * 2**0.5, 1000, 100_000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_alpha_that_config_allows_survives_its_file(tmp_path, layout, dtype, alpha):
    adapter = trained(alpha=alpha)
    lora.save(adapter, tmp_path / "a.safetensors", layout, dtype, {})
    file = lora.load(adapter, tmp_path / "a.safetensors")
    assert file.alpha == pytest.approx(alpha, rel=1e-3)


def test_peft_keys_shapes_and_dtype(tmp_path):
    adapter = trained()
    lora.save(adapter, tmp_path / "a.safetensors", "peft", torch.float16, {})
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    want = {}
    for name, layer in adapter.layers.items():
        want[f"unet.{name}.lora_A.weight"] = (RANK, layer.in_features)
        want[f"unet.{name}.lora_B.weight"] = (layer.out_features, RANK)
    assert {key: tuple(t.shape) for key, t in tensors.items()} == want
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight"
    assert key in tensors
    assert {t.dtype for t in tensors.values()} == {torch.float16}


def test_kohya_keys_shapes_and_one_alpha(tmp_path):
    adapter = trained()
    lora.save(adapter, tmp_path / "a.safetensors", "kohya", torch.float16, {})
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    want = {}
    for name, layer in adapter.layers.items():
        key = "lora_unet_" + name.replace(".", "_")
        want[f"{key}.lora_down.weight"] = (RANK, layer.in_features)
        want[f"{key}.lora_up.weight"] = (layer.out_features, RANK)
        want[f"{key}.alpha"] = ()
    assert {key: tuple(t.shape) for key, t in tensors.items()} == want
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.alpha" in want
    assert {t.item() for key, t in tensors.items() if key.endswith(".alpha")} == {ALPHA}
    assert {t.dtype for key, t in tensors.items() if key.endswith(".weight")} == {torch.float16}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_header_holds_rank_alpha_and_about_in_the_given_order(tmp_path, layout):
    lora.save(trained(), tmp_path / "a.safetensors", layout, torch.float16, ABOUT)
    said = header(tmp_path / "a.safetensors")["__metadata__"]
    assert list(said.items())[-7:] == [("rank", "4"), ("alpha", "6.0"), *ABOUT.items()]
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == said
    assert (tmp_path / "a.safetensors").read_bytes()[0] % 8 == 0  # data begins at a multiple of 8


def test_peft_header_says_what_diffusers_needs(tmp_path):
    lora.save(trained(), tmp_path / "a.safetensors", "peft", torch.float32, ABOUT)
    said = header(tmp_path / "a.safetensors")["__metadata__"]
    assert json.loads(said["lora_adapter_metadata"]) == {
        "unet.r": RANK,
        "unet.lora_alpha": ALPHA,
        "unet.target_modules": ["to_k", "to_out.0", "to_q", "to_v"],
    }


def test_kohya_header_says_what_a1111_needs(tmp_path):
    lora.save(trained(), tmp_path / "a.safetensors", "kohya", torch.float16, ABOUT)
    said = header(tmp_path / "a.safetensors")["__metadata__"]
    assert said["ss_base_model_version"].startswith("sdxl_")  # A1111 hides the file otherwise
    assert said["ss_network_module"] == "networks.lora"
    assert int(said["ss_network_dim"]) == RANK and float(said["ss_network_alpha"]) == ALPHA
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert "lora_adapter_metadata" not in said  # diffusers refuses both alphas in one file


@pytest.mark.parametrize("dtype", DTYPES)
def test_sshs_model_hash_is_sha256_of_the_data_section(tmp_path, dtype):
    lora.save(trained(), tmp_path / "a.safetensors", "kohya", dtype, ABOUT)
    blob = (tmp_path / "a.safetensors").read_bytes()
    data = blob[8 + int.from_bytes(blob[:8], "little") :]
    said = header(tmp_path / "a.safetensors")["__metadata__"]
    assert said["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    ends = [e["data_offsets"][1] for k, e in header(tmp_path / "a.safetensors").items() if "." in k]
    assert data == data_section(blob) and len(data) == max(ends)


TWICE = """
import sys
from pathlib import Path
import torch
from torch import nn
import lora
net = nn.ModuleDict({n: nn.ModuleDict({"to_q": nn.Linear(24, 8)}) for n in "cab"})
adapter = lora.inject(net, rank=4, alpha=6, seed=3)
with torch.no_grad():
    for i, layer in enumerate(adapter.layers.values()):
        layer.lora_B.copy_(torch.arange(32.0).view(8, 4) / 7 + i)
about = {"recipe": "t4", "base": "some/base", "steps": "7", "dataset": "pictures", "a": "z"}
for layout in ("peft", "kohya"):
    for dtype in (torch.float32, torch.float16):
        lora.save(adapter, Path(sys.argv[1]) / f"{layout}{dtype}", layout, dtype, about)
"""


def test_equal_adapters_saved_by_two_processes_are_equal_files(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWICE, str(tmp_path / seed)],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first = {p.name: p.read_bytes() for p in (tmp_path / "1").iterdir()}
    second = {p.name: p.read_bytes() for p in (tmp_path / "2").iterdir()}
    assert first == second and len(set(first.values())) == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_is_not_written(tmp_path, layout):
    adapter = trained()
    lora.save(adapter, tmp_path / "clean", layout, torch.float32, {})
    data = adapter.flat.detach().clone()
    with torch.no_grad():
        parts = [matrix.detach().clone() for _, matrix in adapter.parts()]
        adapter.flat.fill_(5)
        for (_, matrix), kept in zip(adapter.parts(), parts, strict=True):
            matrix.copy_(kept)
    assert not torch.equal(adapter.flat, data)
    lora.save(adapter, tmp_path / "dirty", layout, torch.float32, {})
    assert (tmp_path / "clean").read_bytes() == (tmp_path / "dirty").read_bytes()


@pytest.mark.parametrize("trouble", [errno.ENOSPC, errno.EACCES])
def test_a_save_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch, trouble):
    path, adapter = tmp_path / "a.safetensors", trained()
    lora.save(adapter, path, "peft", torch.float16, {"steps": "1"})
    before = path.read_bytes()

    def fails(descriptor):
        raise OSError(trouble, os.strerror(trouble))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(Refusal) as refusal:
        lora.save(adapter, path, "peft", torch.float16, {"steps": "2"})
    said = str(refusal.value)
    assert str(path) in said and os.strerror(trouble) in said and "expected a folder" in said
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


# ---- loaded by diffusers -------------------------------------------------------------------------


def pipeline(unet: nn.Module) -> StableDiffusionXLPipeline:
    """An SDXL pipeline that is nothing but a UNet."""
    parts = "vae text_encoder text_encoder_2 tokenizer tokenizer_2 scheduler".split()
    return StableDiffusionXLPipeline(unet=unet, **dict.fromkeys(parts))


STRENGTHS = (0, 0.5, 1, 1.5)


@pytest.mark.parametrize("alpha", [6, 3])  # above and below the rank
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exported_equals_trained_at_every_strength(tmp_path, unet, batch, layout, dtype, alpha):
    """The file, read by us and by diffusers' load_lora_weights, separate and merged, against the
    adapter as it was trained.
    """
    adapter = trained(unet, alpha=alpha)
    folder = tmp_path / "OUT"
    path = folder / (FILE_NAME if layout == "peft" else "kohya/OUT.safetensors")
    lora.save(adapter, path, layout, dtype, ABOUT)
    again = make_unet()
    loaded = lora.inject(again, rank=RANK, alpha=alpha, seed=9)
    lora.load(loaded, path)
    pipe = pipeline(make_unet())
    bare = answer(pipe.unet, batch)
    pipe.load_lora_weights(folder if layout == "peft" else path, adapter_name="ours")
    bound = 1e-5 if dtype == torch.float32 else 2e-3
    for strength in STRENGTHS:
        for each in (adapter, loaded):
            lora.set_strength(each, strength)
        want = answer(unet, batch)
        assert torch.equal(want, bare) if strength == 0 else off(bare, want) > 5 * bound
        pipe.set_adapters("ours", float(strength))
        assert off(answer(pipe.unet, batch), want) < bound  # diffusers
        if dtype == torch.float32:
            assert torch.equal(answer(again, batch), want)  # ours, to the bit
        assert off(answer(again, batch), want) < bound
        lora.merge(loaded)
        assert off(answer(again, batch), want) < bound
        lora.unmerge(loaded)
    lora.set_strength(adapter, RANK / alpha)  # what a reader that forgets alpha would draw
    forgotten = answer(unet, batch)
    lora.set_strength(adapter, 1)
    assert off(forgotten, answer(unet, batch)) > 10 * bound


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_merged_adapter_is_exported_as_it_was_trained(tmp_path, unet, batch, layout):
    """Merging changes the base's weights, not what is written; diffusers' own fusing agrees."""
    adapter = trained(unet)
    lora.save(adapter, tmp_path / "before", layout, torch.float32, ABOUT)
    lora.merge(adapter)
    merged = answer(unet, batch)
    lora.save(adapter, tmp_path / "merged.safetensors", layout, torch.float32, ABOUT)
    assert (tmp_path / "merged.safetensors").read_bytes() == (tmp_path / "before").read_bytes()
    pipe = pipeline(make_unet())
    bare = answer(pipe.unet, batch)
    pipe.load_lora_weights(tmp_path / "merged.safetensors")
    assert off(answer(pipe.unet, batch), merged) < 1e-5
    pipe.fuse_lora(components=["unet"])
    assert off(answer(pipe.unet, batch), merged) < 1e-5 < off(bare, merged)


def test_nothing_is_loaded_under_a_merged_adapter(tmp_path, unet, batch):
    """Its new numbers would not act: the base holds the product of the old ones."""
    adapter = trained(unet)
    lora.save(adapter, tmp_path / FILE_NAME, "peft", torch.float32, {})
    with torch.no_grad():
        adapter.flat.mul_(0.5)
    lora.merge(adapter)
    before = adapter.flat.detach().clone()
    with pytest.raises(Refusal, match=r"merged into its base.*unmerge\(\) first"):
        lora.load(adapter, tmp_path)
    assert torch.equal(adapter.flat, before)
    lora.unmerge(adapter)
    lora.load(adapter, tmp_path)


def test_load_lora_weights_of_the_output_folder_takes_our_peft_file(tmp_path):
    """On a model that draws, from a folder as a run leaves it; the other files there hold other
    numbers, so that taking one of them shows."""
    pipe = StableDiffusionXLPipeline.from_pretrained(POCKET, dtype=torch.float32)
    size = pipe.unet.config.sample_size
    g = torch.Generator().manual_seed(0)
    batch = make_batch(2) | {
        "noise": torch.randn(2, 4, size, size, generator=g),
        "context": torch.randn(2, 7, pipe.unet.config.cross_attention_dim, generator=g),
        "pooled": torch.randn(2, pipe.text_encoder_2.config.projection_dim, generator=g),
    }
    bare = answer(pipe.unet, batch)
    decoy = trained(pipe.unet)  # with its numbers doubled below
    with torch.no_grad():
        kept = decoy.flat.clone()
        decoy.flat.mul_(2)
        lora.save(decoy, tmp_path / "kohya" / "OUT.safetensors", "kohya", torch.float32, {})
        lora.save(decoy, tmp_path / "a.safetensors", "peft", torch.float32, {})
        decoy.flat.copy_(kept)
    lora.save(decoy, tmp_path / FILE_NAME, "peft", torch.float32, {})
    ours = answer(pipe.unet, batch)
    pipe = StableDiffusionXLPipeline.from_pretrained(POCKET, dtype=torch.float32)
    pipe.load_lora_weights(tmp_path)
    assert off(answer(pipe.unet, batch), ours) < 1e-5
    assert off(bare, ours) > 0.01


def test_our_reader_takes_the_folder_too(tmp_path):
    adapter = trained()
    lora.save(adapter, tmp_path / FILE_NAME, "peft", torch.float32, {})
    again = lora.inject(make_unet(), rank=RANK, alpha=ALPHA, seed=9)
    assert lora.load(again, tmp_path).path == tmp_path / FILE_NAME
    assert torch.equal(again.flat, adapter.flat)


def test_a_file_that_diffusers_wrote_loads_here_with_its_alpha(tmp_path, unet, batch):
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(lora.TARGETS), init_lora_weights=False
    )
    unet.add_adapter(config)
    theirs = answer(unet, batch)
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    ours = make_unet()
    lora.load(lora.inject(ours, rank=RANK, alpha=ALPHA), tmp_path)
    assert off(answer(ours, batch), theirs) < 1e-6


# ---- strict --------------------------------------------------------------------------------------

PEFT_MODULE = "mid_block.attentions.0.transformer_blocks.1.attn2.to_k"
KOHYA_MODULE = "mid_block_attentions_0_transformer_blocks_1_attn2_to_k"
PEFT_A, PEFT_B = (f"unet.{PEFT_MODULE}.lora_{kind}.weight" for kind in "AB")
KOHYA_A, KOHYA_B, KOHYA_ALPHA = (
    f"lora_unet_{KOHYA_MODULE}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")
)


def write_edited(path: Path, layout: str, edit, rank: int = RANK, alpha: float = ALPHA) -> Path:
    """A right file, changed by edit(tensors, metadata), which may return new tensors."""
    lora.save(trained(rank=rank, alpha=alpha), path, layout, torch.float32, ABOUT)
    tensors = safetensors.torch.load_file(path)
    metadata = dict(header(path)["__metadata__"])
    tensors = edit(tensors, metadata) or tensors
    safetensors.torch.save_file(tensors, path, metadata)
    return path


def refused(path: Path) -> str:
    """What load() says to this file; the adapter is the same to the bit afterwards."""
    adapter = lora.inject(make_unet(), rank=RANK, alpha=ALPHA, seed=9)
    before = adapter.flat.detach().clone()
    with pytest.raises(Refusal) as refusal:
        lora.load(adapter, path)
    assert torch.equal(adapter.flat, before)
    adapter.check_tied()
    assert "What to do: " in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_unchanged_file_is_accepted(tmp_path, layout):
    """The tests below refuse files for their one change, not for being written by save_file."""
    path = write_edited(tmp_path / "a.safetensors", layout, lambda t, m: None)
    assert len(lora.load(trained(), path).matrices) == 64


def drop(*keys):
    return lambda t, m: [t.pop(key) for key in keys] and None


def put(**new):
    return lambda t, m: t.update(new)


def rename(change):
    return lambda t, m: {change(key): tensor for key, tensor in t.items()}


def each(ending, tensor):
    """Put `tensor` beside every module of a kohya file."""
    return lambda t, m: t.update(
        {k.replace(".alpha", ending): tensor.clone() for k in list(t) if k.endswith(".alpha")}
    )


def hada(t, m):
    parts = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    stems = [key.removesuffix(".alpha") for key in t if key.endswith(".alpha")]
    return {f"{stem}.{part}": torch.ones(4, 4) for stem in stems for part in parts}


def with_nan(key, value=float("nan")):
    return lambda t, m: t[key].view(-1)[-1:].fill_(value) and None


def peft_header(**changes):
    """Set entries of the PEFT header; dots are written __."""

    def edit(tensors, metadata):
        said = json.loads(metadata["lora_adapter_metadata"])
        said |= {f"unet.{key}": value for key, value in changes.items()}
        metadata["lora_adapter_metadata"] = json.dumps(said)

    return edit


STRAY_A, STRAY_B = torch.ones(4, 48), torch.ones(64, 4)
TE_KEY = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
PLAIN = "expected unet.<module>.lora_A.weight and .lora_B.weight"
PAIR = "expected a"  # pair of matrices
MODULES = "expected exactly this model's 64 adapted modules"
ONE = "expected one rank and one alpha for all modules"

# name: (layout, edit, what the refusal must say: the key or file, and what was expected)
CASES = {
    "missing: an A": ("peft", drop(PEFT_A), [PEFT_MODULE, PAIR]),
    "missing: a B": ("peft", drop(PEFT_B), [PEFT_MODULE, PAIR]),
    "missing: a module": ("peft", drop(PEFT_A, PEFT_B), ["lacks 1 ", PEFT_MODULE, MODULES]),
    "missing: an up": ("kohya", drop(KOHYA_B), [KOHYA_MODULE, PAIR]),
    "missing: a down": ("kohya", drop(KOHYA_A), [KOHYA_MODULE, PAIR]),
    "missing: both, alpha left": ("kohya", drop(KOHYA_A, KOHYA_B), [KOHYA_MODULE, PAIR]),
    "missing: a kohya module": (
        "kohya",
        drop(KOHYA_A, KOHYA_B, KOHYA_ALPHA),
        ["lacks 1 ", KOHYA_MODULE, MODULES],
    ),
    # a module without alpha means alpha = rank to every reader of kohya files
    "missing: one alpha": ("kohya", drop(KOHYA_ALPHA), ["expected"]),
    "missing: every alpha": (
        "kohya",
        lambda t, m: {k: v for k, v in t.items() if not k.endswith(".alpha")},
        ["rank 4 and alpha 4; expected rank 4 and alpha 6", "--lora-alpha 4"],
    ),
    "unused: a module": (
        "peft",
        put(**{"unet.conv_in.lora_A.weight": STRAY_A, "unet.conv_in.lora_B.weight": STRAY_B}),
        ["has, unused, 1 ", "conv_in", MODULES],
    ),
    "unused: a kohya module": (
        "kohya",
        put(
            **{
                "lora_unet_x_to_q.lora_down.weight": STRAY_A,
                "lora_unet_x_to_q.lora_up.weight": STRAY_B,
                "lora_unet_x_to_q.alpha": torch.tensor(6.0),
            }
        ),
        ["has, unused, 1 ", "x_to_q", MODULES],
    ),
    "unused: a tensor": ("peft", put(stray=STRAY_A), ["the key stray;", PLAIN]),
    "unused: a tensor beside A and B": (
        "peft",
        put(**{f"unet.{PEFT_MODULE}.bias": STRAY_A}),
        [f"the key unet.{PEFT_MODULE}.bias;", PLAIN],
    ),
    "unused: a text encoder": ("peft", put(**{TE_KEY: STRAY_A}), [f"the key {TE_KEY};", PLAIN]),
    "unused: a kohya text encoder": (
        "kohya",
        put(**{"lora_te1_text_model.lora_down.weight": STRAY_A}),
        ["the key lora_te1_text_model.lora_down.weight;", PLAIN],
    ),
    "unused: the other layout's keys": (
        "peft",
        put(**{KOHYA_A: STRAY_A, KOHYA_B: STRAY_B}),
        [f"the key {KOHYA_A}", PLAIN],
    ),
    "misshapen: A too narrow": (
        "peft",
        put(**{PEFT_A: torch.ones(4, 47)}),
        [f"{PEFT_MODULE}'s A is (4, 47)", "expected (4, 48)"],
    ),
    "misshapen: B too tall": (
        "peft",
        put(**{PEFT_B: torch.ones(65, 4)}),
        [f"{PEFT_MODULE}'s B is (65, 4)", "expected (64, 4)"],
    ),
    "misshapen: B transposed": (
        "kohya",
        put(**{KOHYA_B: torch.ones(4, 64)}),
        [f"{KOHYA_MODULE}'s B is (4, 64)", "expected (64, 4)"],
    ),
    "misshapen: B of another rank": (
        "peft",
        put(**{PEFT_B: torch.ones(64, 5)}),
        [f"{PEFT_MODULE}'s B is (64, 5)", "expected (64, 4)"],
    ),
    "misshapen: a convolution's": (
        "kohya",
        put(**{KOHYA_A: torch.ones(4, 48, 1, 1)}),
        [KOHYA_MODULE, PAIR],
    ),
    "misshapen: an alpha of two numbers": (
        "kohya",
        put(**{KOHYA_ALPHA: torch.tensor([6.0, 6.0])}),
        ["expected"],
    ),
    "NaN": ("peft", with_nan(PEFT_B), [f"{PEFT_B} holds NaN or Inf", "expected finite numbers"]),
    "Inf": ("kohya", with_nan(KOHYA_A, float("inf")), [KOHYA_A, "expected finite numbers"]),
    "NaN alpha": ("kohya", with_nan(KOHYA_ALPHA), [KOHYA_ALPHA, "expected finite numbers"]),
    "keys without unet.": (
        "peft",
        rename(lambda key: key.removeprefix("unet.")),
        ["the key down_blocks.1.attentions.0", PLAIN],
    ),
    "LoHa": ("kohya", hada, [".hada_w1_a;", PLAIN]),
    "LoKr": ("kohya", each(".lokr_w1", torch.ones(2, 2)), [".lokr_w1;", PLAIN]),
    "kohya DoRA": ("kohya", each(".dora_scale", torch.ones(64, 1)), [".dora_scale;", PLAIN]),
    "PEFT DoRA": (
        "peft",
        put(**{f"unet.{PEFT_MODULE}.lora_magnitude_vector": torch.ones(64)}),
        [f"unet.{PEFT_MODULE}.lora_magnitude_vector;", PLAIN],
    ),
    "mixed ranks": (
        "peft",
        put(**{PEFT_A: torch.ones(8, 48), PEFT_B: torch.ones(64, 8)}),
        ["ranks [4, 8]", ONE],
    ),
    "differing kohya alphas": (
        "kohya",
        put(**{KOHYA_ALPHA: torch.tensor(2.0)}),
        ["alphas [2.0, 6.0]", ONE],
    ),
    # PEFT's own ways to say the same; the number in lora_alpha is then not the whole truth
    "differing PEFT alphas": (
        "peft",
        peft_header(alpha_pattern={PEFT_MODULE: 2}),
        ["expected"],
    ),
    "PEFT alpha over root rank": ("peft", peft_header(use_rslora=True), ["expected"]),
    "PEFT header that is no JSON": (
        "peft",
        lambda t, m: m.update(lora_adapter_metadata='{"unet.r": 4,'),
        ["expected"],
    ),
    "PEFT header without alpha means alpha = rank": (
        "peft",
        lambda t, m: m.pop("lora_adapter_metadata") and None,
        ["rank 4 and alpha 4; expected rank 4 and alpha 6", "--lora-alpha 4"],
    ),
    "no tensors at all": ("peft", lambda t, m: t.clear(), ["ranks []", ONE]),
}


@pytest.mark.parametrize("case", CASES)
def test_load_refuses_by_name(tmp_path, case):
    layout, edit, must_say = CASES[case]
    path = write_edited(tmp_path / "a.safetensors", layout, edit)
    said = refused(path)
    for words in [str(path), *must_say]:
        assert words in said


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank, alpha", [(8, 6), (4, 12), (2, 3)])  # the last with the same scale
def test_load_refuses_another_rank_or_alpha(tmp_path, layout, rank, alpha):
    path = write_edited(tmp_path / "a.safetensors", layout, lambda t, m: None, rank, alpha)
    said = refused(path)
    assert f"{path} has rank {rank} and alpha {alpha}; expected rank 4 and alpha 6" in said
    assert f"--lora-rank {rank} --lora-alpha {alpha}" in said


def test_load_refuses_another_architecture(tmp_path):
    adapter = trained(make_unet(transformer_layers_per_block=(1, 1)))
    lora.save(adapter, tmp_path / "a.safetensors", "peft", torch.float32, {})
    said = refused(tmp_path / "a.safetensors")
    assert "lacks 32 modules, such as down_blocks.1" in said and MODULES in said


def test_what_fp16_cannot_hold_is_refused_when_read_back(tmp_path):
    adapter = trained()
    with torch.no_grad():
        adapter.layers[PEFT_MODULE].lora_B[3, 2] = 7e4  # above 65,504
    lora.save(adapter, tmp_path / "a.safetensors", "peft", torch.float16, {})
    assert f"{PEFT_B} holds NaN or Inf" in refused(tmp_path / "a.safetensors")


def pickled(path: Path, whole: bytes) -> None:
    torch.save({"unet": torch.ones(3)}, path)


BROKEN = {
    "truncated in the data": lambda path, whole: path.write_bytes(whole[:-1]),
    "truncated in the header": lambda path, whole: path.write_bytes(whole[:100]),
    "longer than its header says": lambda path, whole: path.write_bytes(whole + b"x"),
    "empty": lambda path, whole: path.write_bytes(b""),
    "a torch.save file": pickled,
    "a pickle": lambda path, whole: path.write_bytes(pickle.dumps({"unet": [1.0] * 9})),
    "a web page": lambda path, whole: path.write_bytes(b"<html>Not Found</html>" * 9),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_refuses_a_file_that_is_not_whole(tmp_path, layout, how):
    path = tmp_path / "a.safetensors"
    lora.save(trained(), path, layout, torch.float32, ABOUT)
    BROKEN[how](path, path.read_bytes())
    said = refused(path)
    assert f"{path} is not a whole safetensors file ({path.stat().st_size} bytes" in said
    assert "expected a file as its writer left it" in said


@pytest.mark.parametrize("where", ["nowhere.safetensors", "no/folder/here.safetensors", ""])
def test_load_refuses_a_file_that_is_not_there(tmp_path, where):
    path = tmp_path / where if where else tmp_path / FILE_NAME  # the folder itself has no adapter
    said = refused(tmp_path / where)
    assert f"{path} is not a whole safetensors file (no such file" in said
    assert "expected a file as its writer left it" in said
