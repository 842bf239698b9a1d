"""Small adapters and their files, right ones and wrong ones, for the tests of both readers."""

import functools
import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

import lora
import model
from adapters import files
from conftest import TINY_SDXL, make_unet
from inputs import hub
from inputs.files import Refusal
from lora import Adapter

RANK, ALPHA = 4, 6  # alpha != rank: who forgets alpha is off by half
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


@functools.cache
def read_only(rank: int = RANK, alpha: float = ALPHA) -> Adapter:
    """trained(), made once, for tests that change nothing of it."""
    return trained(rank=rank, alpha=alpha)


@functools.cache
def untrained() -> Adapter:
    """What files that are refused are loaded into: it stays as it is."""
    return lora.inject(make_unet(), rank=RANK, alpha=ALPHA, seed=9)


def refused(path: Path, reader) -> str:
    """What load() of `reader`, lora or adapters.files, says to this file; the adapter is the same
    to the bit afterwards.
    """
    before = numbers(untrained())
    with pytest.raises(Refusal) as refusal:
        reader.load(untrained(), reader.read(path))
    assert torch.equal(numbers(untrained()), before)
    assert "What to do: " in str(refusal.value)
    return str(refusal.value)


def numbers(adapter: Adapter) -> Tensor:
    """A copy of all that the adapter holds, in one vector."""
    return torch.cat([matrix.detach().flatten() for matrix in adapter.matrices().values()])


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


def pipeline(unet: nn.Module) -> StableDiffusionXLPipeline:
    """An SDXL pipeline that is nothing but a UNet."""
    parts = "vae text_encoder text_encoder_2 tokenizer tokenizer_2 scheduler".split()
    return StableDiffusionXLPipeline(unet=unet, **dict.fromkeys(parts))


PEFT_MODULE = "mid_block.attentions.0.transformer_blocks.1.attn2.to_k"
KOHYA_MODULE = "middle_block_1_transformer_blocks_1_attn2_to_k"
PEFT_A, PEFT_B = (f"unet.{PEFT_MODULE}.lora_{kind}.weight" for kind in "AB")
KOHYA_A, KOHYA_B, KOHYA_ALPHA = (
    f"lora_unet_{KOHYA_MODULE}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")
)


def write_edited(path: Path, layout: str, edit, rank: int = RANK, alpha: float = ALPHA) -> Path:
    """A right file, changed by edit(tensors, metadata), which may return new tensors."""
    files.save(read_only(rank, alpha), path, layout, torch.float32, ABOUT)
    tensors = safetensors.torch.load_file(path)
    metadata = dict(header(path)["__metadata__"])
    tensors = edit(tensors, metadata) or tensors
    safetensors.torch.save_file(tensors, path, metadata)
    return path


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
TE = "holds a text encoder's LoRA, "
PAIR = "expected a"  # pair of matrices
MODULES = "expected exactly this model's 128 matrices"
ONE_RANK = "expected one rank for all modules"
ONE_ALPHA = "expected one rank and one alpha for all modules"

# name: (layout, edit, what the refusal must say: the key, module or file, and what was expected)
CASES = {
    "missing: an A": ("peft", drop(PEFT_A), [PEFT_MODULE, PAIR]),
    "missing: a B": ("peft", drop(PEFT_B), [PEFT_MODULE, PAIR]),
    "missing: a module": ("peft", drop(PEFT_A, PEFT_B), ["lacks 2 such as ", PEFT_MODULE, MODULES]),
    "missing: an up": ("kohya", drop(KOHYA_B), [KOHYA_MODULE, PAIR]),
    "missing: a down": ("kohya", drop(KOHYA_A), [KOHYA_MODULE, PAIR]),
    "missing: both, alpha left": ("kohya", drop(KOHYA_A, KOHYA_B), [KOHYA_MODULE, PAIR]),
    "missing: a kohya module": (
        "kohya",
        drop(KOHYA_A, KOHYA_B, KOHYA_ALPHA),
        ["lacks 2 such as ", PEFT_MODULE, MODULES],
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
        ["adapts 1 modules besides attention's ", "conv_in", MODULES],
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
        ["adapts 1 modules besides attention's ", "x_to_q", MODULES],
    ),
    "unused: a tensor": ("peft", put(stray=STRAY_A), ["the key stray;", PLAIN]),
    "unused: a tensor beside A and B": (
        "peft",
        put(**{f"unet.{PEFT_MODULE}.bias": STRAY_A}),
        [f"the key unet.{PEFT_MODULE}.bias;", PLAIN],
    ),
    "unused: a text encoder": ("peft", put(**{TE_KEY: STRAY_A}), [f"as {TE_KEY};", TE]),
    "unused: a kohya text encoder": (
        "kohya",
        put(**{"lora_te1_text_model.lora_down.weight": STRAY_A}),
        ["such as lora_te1_text_model.lora_down.weight;", TE],
    ),
    "unused: the other layout's keys": (
        "peft",
        put(**{KOHYA_A: STRAY_A, KOHYA_B: STRAY_B}),
        [f"the key {KOHYA_A}", PLAIN],
    ),
    "misshapen: A too narrow": (
        "peft",
        put(**{PEFT_A: torch.ones(4, 47)}),
        [f"{PEFT_MODULE}.lora_A is (4, 47)", "expected (4, 48)"],
    ),
    "misshapen: B too tall": (
        "peft",
        put(**{PEFT_B: torch.ones(65, 4)}),
        [f"{PEFT_MODULE}.lora_B is (65, 4)", "expected (64, 4)"],
    ),
    "misshapen: B transposed": (
        "kohya",
        put(**{KOHYA_B: torch.ones(4, 64)}),
        ["ranks [4, 64]", ONE_RANK],
    ),
    "misshapen: B of another rank": (
        "peft",
        put(**{PEFT_B: torch.ones(64, 5)}),
        ["ranks [4, 5]", ONE_RANK],
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
    "NaN": (
        "peft",
        with_nan(PEFT_B),
        [f"{PEFT_MODULE}.lora_B holds NaN or Inf", "finite numbers"],
    ),
    "Inf": (
        "kohya",
        with_nan(KOHYA_A, float("inf")),
        [f"{KOHYA_MODULE}.lora_A holds NaN or Inf", "finite numbers"],
    ),
    "NaN alpha": ("kohya", with_nan(KOHYA_ALPHA), ["has alpha nan"]),
    "keys without unet.": (
        "peft",
        rename(lambda key: key.removeprefix("unet.")),
        ["the key down_blocks.1.attentions.0", PLAIN],
    ),
    "LoHa": ("kohya", hada, [".hada_w1_a;", "holds LoHa, "]),
    "LoKr": ("kohya", each(".lokr_w1", torch.ones(2, 2)), [".lokr_w1;", "holds LoKr, "]),
    "kohya DoRA": (
        "kohya",
        each(".dora_scale", torch.ones(64, 1)),
        ["_scale;", "holds DoRA, "],
    ),
    "PEFT DoRA": (
        "peft",
        put(**{f"unet.{PEFT_MODULE}.lora_magnitude_vector": torch.ones(64)}),
        [f"unet.{PEFT_MODULE}.lora_magnitude_vector;", "holds DoRA, "],
    ),
    "mixed ranks": (
        "peft",
        put(**{PEFT_A: torch.ones(8, 48), PEFT_B: torch.ones(64, 8)}),
        ["ranks [4, 8]", ONE_RANK],
    ),
    "differing kohya alphas": (
        "kohya",
        put(**{KOHYA_ALPHA: torch.tensor(2.0)}),
        ["alphas [2.0, 6.0]", ONE_ALPHA],
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
    "no tensors at all": (
        "peft",
        lambda t, m: t.clear(),
        ["holds no tensors; "],
    ),
}


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


# ---- on a whole model, which draws ---------------------------------------------------------------


def loud() -> Adapter:
    """An adapter of TINY_SDXL that changes its pictures visibly."""
    unet = model.load_unet(str(TINY_SDXL), torch.device("cpu"), torch.float32)
    return trained(unet, rank=16, alpha=16)


def drawable(folder: Path, **about: str) -> Path:
    """`folder` as a finished run of TINY_SDXL leaves it, as far as drawing needs it."""
    name = str(TINY_SDXL)
    base = {"base_model": name, "base_fingerprint": hub.unet_fingerprint(name, False)}
    about, adapter = {"recipe": "t4"} | base | about, loud()
    files.save(adapter, folder / lora.FILE_NAME, "peft", torch.float32, about)
    files.save(
        adapter, folder / "kohya" / f"{folder.name}.safetensors", "kohya", torch.float32, about
    )
    config = {"validation_prompts": ["rocket"], "cache_dir": "kept"}
    config["pretrained_model_name_or_path"] = name
    (folder / "config.json").write_text(json.dumps(config))
    return folder
