"""Every kind of adapter file that is met, and what becomes of it: drawn as its own program reads
it, with what is no part of the UNet left out and counted, or refused by its name.

What is drawn is held to weights W + D, with D computed here from the file's numbers.
"""

import copy
import functools
import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import model
from adapter_tools import answer, off
from adapters import describe, files, foreign, kinds, names
from conftest import make_batch, make_unet
from inputs.adapter_file import KINDS
from sentences import refused

ATTENTION, FF, PROJ = r"\.(to_q|to_k|to_v|to_out\.0)$", r"\.ff\.net", r"\.proj_(in|out)$"
CONV, OUTSIDE = r"(conv[12]|samplers\.0\.conv)$", r"^(conv_in|conv_out|time_emb|add_emb)"
UNET = make_unet()
LAYERS = kinds.able(UNET)
NUMBERS = torch.Generator().manual_seed(0)
SGM = files.sgm_names(name for name in LAYERS if re.fullmatch(names.BLOCK, name))


def normal(*shape, size=0.2):
    return size * torch.randn(shape, generator=NUMBERS)


@pytest.fixture(autouse=True)
def numbers_anew():
    NUMBERS.manual_seed(0)


def chosen(*marks):
    """Names of some layers: one block's, and of every other one the convolutions around it."""
    few = (
        r"mid_block.*(attn1|ff|proj)|mid_block.*blocks\.1\.attn2|resnets\.0|samplers|^[^.]+$|embed"
    )
    found = [name for name in LAYERS if any(re.search(mark, name) for mark in marks)]
    return [name for name in found if marks == (".",) or re.search(few, name)]


def kohya(name: str) -> str:
    return "lora_unet_" + SGM.get(name, name).replace(".", "_")


class File:
    """tensors, header and D by layer of a file that is made up."""

    def __init__(self, marks=(ATTENTION,), **about):
        self.names, self.about, self.tensors, self.D = chosen(*marks), about, {}, {}

    def add(self, key, kind, name, alpha=6.0, rank=4, **how):
        """One layer's tensors; D as its kind's formula has it."""
        layer = LAYERS[name]
        shape = kinds.shape_of(layer)
        made, D = getattr(self, kind)(shape, rank, **how)
        if how.get("m"):
            made["dora_scale"], D = lengths(how["m"], layer.weight, alpha / rank * D)
        elif not ({"lokr_w1", "lokr_w2"} <= made.keys()):
            D = (1.0 if alpha is None else alpha / rank) * D
        self.D[name] = D
        self.tensors |= {f"{key}.{end}": each for end, each in made.items()}
        if alpha is not None and key.startswith("lora_unet"):
            self.tensors[f"{key}.alpha"] = torch.tensor(float(alpha))

    def lora(self, shape, rank, ends=("lora_down.weight", "lora_up.weight"), m=None, flat=True):
        more = (1, 1) if len(shape) > 2 or not flat else ()
        A, B = (
            normal(rank, *shape[1:], *(() if len(shape) > 2 else more)),
            normal(shape[0], rank, *more),
        )
        return dict(zip(ends, (A, B), strict=True)), (B.flatten(1) @ A.flatten(1)).view(shape)

    def loha(self, shape, rank, m=None):
        wide = shape[1:].numel() if isinstance(shape, torch.Size) else shape[1]
        parts = {
            f"hada_w{i}_{x}": normal(shape[0], rank) if x == "a" else normal(rank, wide)
            for i in (1, 2)
            for x in "ab"
        }
        one, two = (parts[f"hada_w{i}_a"] @ parts[f"hada_w{i}_b"] for i in (1, 2))
        return parts, (one * two).view(shape)

    def lokr(self, shape, rank, split=(), m=None):
        (a, b), (c, d) = kinds.factors(shape[0]), kinds.factors(shape[1])
        tail, parts, both = tuple(shape[2:]), {}, []
        for name, sizes in (("lokr_w1", (a, c)), ("lokr_w2", (b, d, *tail))):
            if name in split:
                size = torch.Size(sizes[1:]).numel()
                parts |= {f"{name}_a": normal(sizes[0], rank), f"{name}_b": normal(rank, size)}
                both.append((parts[f"{name}_a"] @ parts[f"{name}_b"]).view(sizes))
            else:
                parts[name] = normal(*sizes)
                both.append(parts[name])
        w1, w2 = both
        D = torch.einsum("ac,bd...->abcd...", w1, w2)
        return parts, D.reshape(shape)


def lengths(side, W, D):
    """DoRA's lengths of rows or of columns, each a little off ||W + D||, and what they add."""
    V, keep = W + D, {"rows": 0, "columns": 1}[side]
    across = [i for i in range(V.ndim) if i != keep]
    norm = torch.linalg.vector_norm(V, dim=across, keepdim=True)
    m = norm * (1 + normal(*norm.shape))
    return m, m * V / norm - W


def made(*marks, spelt=kohya, kind="lora", ranks=(4,), alphas=(6.0,), **how) -> File:
    file = File(marks or (ATTENTION,))
    for i, name in enumerate(file.names):
        rank, alpha = ranks[i % len(ranks)], alphas[i % len(alphas)]
        file.add(spelt(name), kind, name, alpha, rank, **how)
    return file


def with_header(file: File, **said) -> File:
    file.about["lora_adapter_metadata"] = json.dumps({f"unet.{k}": v for k, v in said.items()})
    return file


def peft_keys(*marks, alpha=4.0, ranks=(4,), prefix="unet.", **how) -> File:
    ends = ("lora_A.weight", "lora_B.weight")
    return made(*marks, spelt=lambda n: prefix + n, alphas=(alpha,), ranks=ranks, ends=ends, **how)


def in_dtype(dtype) -> File:
    """Numbers that the dtype holds exactly, so that D is as computed."""
    file = made(alphas=(4.0,))
    file.tensors = {k: v if k.endswith("alpha") else v.to(dtype) for k, v in file.tensors.items()}
    for name in file.names:
        A, B = (file.tensors[f"{kohya(name)}.lora_{w}.weight"].float() for w in ("down", "up"))
        file.D[name] = B @ A
    return file


def with_patterns() -> File:
    file = peft_keys(ranks=(4, 3))
    for name in file.names:
        file.D[name] *= (2.0 if name.endswith("to_q") else 6.0) / 4.0
    for i, name in enumerate(file.names):  # peft_keys() took alpha 4 over the rank
        rank = (4, 3)[i % 2]
        assert file.tensors[f"unet.{name}.lora_A.weight"].shape[0] == rank
    ranks = dict.fromkeys(file.names[1::2], 3)
    return with_header(file, r=4, lora_alpha=6, rank_pattern=ranks, alpha_pattern={"to_q": 2})


def root_of_rank() -> File:
    return with_header(peft_keys(alpha=6.0 * 4**0.5), r=4, lora_alpha=6, use_rslora=True)


def pefts_dora() -> File:
    file = made(spelt=lambda n: f"unet.{n}", ends=("lora_A.weight", "lora_B.weight"), m="rows")
    for key in [key for key in file.tensors if key.endswith("dora_scale")]:
        length = file.tensors.pop(key).flatten()
        file.tensors[key.replace("dora_scale", "lora_magnitude_vector")] = length
    return with_header(file, r=4, lora_alpha=6, use_dora=True)


def and_more(*keys) -> File:
    file = made()
    file.tensors |= {key: torch.ones(4, 4) for key in keys}
    return file


TE = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
DRAWN = {
    "kohya, SGM's block names": made,
    "kohya, diffusers' block names": lambda: made(
        spelt=lambda n: f"lora_unet_{n.replace('.', '_')}"
    ),
    "kohya's 722: feed-forward and projections": lambda: made(ATTENTION, FF, PROJ),
    "LoCon: 3x3 convolutions": lambda: made(ATTENTION, CONV),
    "LoCon: all of the UNet": lambda: made(
        ".",
        spelt=lambda n: (
            kohya(n) if n in SGM else "lora_unet_" + names.OUTSIDE.get(n, n).replace(".", "_")
        ),
    ),
    "factors of Linear layers as 1x1 convolutions": lambda: made(PROJ, flat=False),
    "some of attention alone": lambda: made(r"attn2\.to_[kv]$"),
    "mixed ranks": lambda: made(ranks=(4, 2, 9)),
    "differing alphas": lambda: made(alphas=(6.0, 1.0, 2.5)),
    "no alpha: the rank": lambda: made(alphas=(None,)),
    "PEFT, alpha in the header": lambda: with_header(peft_keys(alpha=6.0), r=4, lora_alpha=6),
    "PEFT without a header": peft_keys,
    "PEFT without unet.": lambda: peft_keys(prefix=""),
    "PEFT, rank_pattern and alpha_pattern": with_patterns,
    "PEFT, alpha over the root of the rank": root_of_rank,
    "diffusers' training scripts": lambda: made(
        spelt=lambda n: f"unet.{n}", alphas=(4.0,), ends=("lora.down.weight", "lora.up.weight")
    ),
    "ComfyUI's own keys": lambda: made(spelt=lambda n: f"diffusion_model.{SGM[n]}", alphas=(4.0,)),
    "DoRA, a length a row": lambda: made(m="rows"),
    "DoRA, a length a column (older LyCORIS)": lambda: made(m="columns"),
    "DoRA in PEFT's keys": pefts_dora,
    "DoRA on convolutions": lambda: made(CONV, m="rows"),
    "LoHa": lambda: made(ATTENTION, FF, kind="loha"),
    "LoHa, LyCORIS' keys without kohya": lambda: made(
        kind="loha", alphas=(4.0,), spelt=lambda n: f"lycoris_{n.replace('.', '_')}"
    ),
    "LoHa on convolutions": lambda: made(CONV, kind="loha"),
    "LoHa with DoRA's lengths": lambda: made(kind="loha", m="rows"),
    "LoKr, both whole": lambda: made(ATTENTION, FF, kind="lokr"),
    "LoKr, the second factored": lambda: made(kind="lokr", split=("lokr_w2",)),
    "LoKr, both factored": lambda: made(kind="lokr", split=("lokr_w1", "lokr_w2")),
    "LoKr on convolutions": lambda: made(CONV, kind="lokr", split=("lokr_w2",)),
    "fp16": lambda: in_dtype(torch.float16),
    "bf16": lambda: in_dtype(torch.bfloat16),
    "fp8": lambda: in_dtype(torch.float8_e4m3fn),
    "with kohya's text encoder": lambda: and_more(f"{TE}.lora_down.weight", f"{TE}.alpha"),
    "with PEFT's text encoder": lambda: and_more("text_encoder.layers.0.q_proj.lora_A.weight"),
    "with an embedding": lambda: and_more("bundle_emb.fox.string_to_param.*", "clip_g"),
}
SAID = {
    "with kohya's text encoder": "left out 2 tensors of text encoders",
    "with PEFT's text encoder": "left out 1 tensors of text encoders",
    "with an embedding": "left out 2 tensors of embeddings",
}
pair = ("lora_down.weight", "lora_up.weight")


def alone(stem, width=768, ends=pair) -> File:
    file = File()
    shapes = ((4, width), (8, 4), (8, 1))
    file.tensors = {f"{stem}.{e}": torch.ones(s) for e, s in zip(ends, shapes, strict=False)}
    return file


QK = kohya(chosen(ATTENTION)[0])
REFUSED = {
    "Flux, kohya": (lambda: alone("lora_unet_double_blocks_0_img_attn_proj"), "a LoRA of Flux"),
    "Flux, diffusers": (
        lambda: alone("transformer.single_transformer_blocks.0.attn.to_q"),
        "a LoRA of Flux",
    ),
    "Stable Diffusion 3": (
        lambda: alone("transformer.transformer_blocks.0.attn.to_q"),
        "a LoRA of Stable Diffusion 3",
    ),
    "Wan, ComfyUI": (
        lambda: alone("diffusion_model.blocks.0.cross_attn.k"),
        "a LoRA of a transformer, such as Wan",
    ),
    "Wan, kohya": (lambda: alone("lora_unet_blocks_0_cross_attn_k"), "such as Wan"),
    "Stable Diffusion 1": (
        lambda: alone("lora_unet_up_blocks_3_attentions_0_x_attn2_to_k"),
        "of Stable Diffusion 1 or 2",
    ),
    "Stable Diffusion 2": (
        lambda: alone("unet.up_blocks.3.attentions.0.x.attn2.to_k", 1024),
        "of Stable Diffusion 1 or 2",
    ),
    "Stable Diffusion 1, LoHa": (
        lambda: alone("lora_unet_up_blocks_3_attentions_0_x_attn2_to_k", 768, ("hada_w1_b",)),
        "of Stable Diffusion 1 or 2",
    ),
    "a whole model": (lambda: alone("model.diffusion_model.input_blocks.0.0"), "a whole model"),
    "a text encoder alone": (lambda: alone(TE), "2 tensors of text encoders and nothing of a UNet"),
    "an embedding alone": (lambda: alone("x", 8, ()) or None, "embeddings and nothing of a UNet"),
    "Tucker's core": (lambda: alone(QK, 48, (*pair, "lora_mid.weight")), "lora_mid.weight"),
    "OFT": (lambda: alone(QK, 48, ("oft_blocks",)), "oft_blocks"),
    "IA3": (lambda: alone(QK, 48, ("on_input",)), "on_input"),
    "a full difference": (lambda: alone(QK, 48, ("diff",)), "diff"),
    "scaled fp8": (lambda: alone(QK, 48, (*pair, "scale_weight")), "scale_weight"),
    "a factor alone": (lambda: alone(QK, 48, pair[:1]), "has lora_A; expected all factors"),
    "two kinds in one layer": (
        lambda: alone(QK, 48, (*pair, "hada_w1_a")),
        "all factors of one kind",
    ),
    "one layer in two layouts": (
        lambda: alone(QK, 48, (*pair, "lora.down.weight")),
        "says the same twice",
    ),
    "another width": (lambda: alone(QK, 49), "has factors lora_A (4, 49), lora_B (8, 4)"),
    "lengths of another number": (lambda: alone(QK, 48, (*pair, "dora_scale")), "has factors"),
    "a layer that is not there": (
        lambda: alone("lora_unet_x_to_q"),
        "1 layers that this model lacks",
    ),
}


def draw(path, batch):
    drawn = foreign.Drawn(copy.deepcopy(UNET))
    foreign.load(drawn, file := foreign.read(path))
    return answer(drawn.model, batch), file


@functools.cache
def bare():
    return answer(UNET, make_batch())


@torch.no_grad()
def merged(D, batch, strength=1.0):
    unet = copy.deepcopy(UNET)
    for name, each in D.items():
        unet.get_submodule(name).weight += strength * each
    return answer(unet, batch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DRAWN)
def test_drawn_as_its_own_program_reads_it(kind, tmp_path, batch):
    file, path = DRAWN[kind](), tmp_path / "a.safetensors"
    save_file(file.tensors, path, file.about)
    got, read = draw(path, batch)
    want = merged(file.D, batch)
    assert off(got, want) < 1e-5 < 0.005 < off(bare(), want)
    assert SAID.get(kind, "") in read.left_out and bool(read.left_out) == (kind in SAID)


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_its_name(kind, tmp_path, batch):
    make, said = REFUSED[kind]
    file = make()
    if kind == "an embedding alone":
        file.tensors = {"clip_g": torch.ones(2, 8), "clip_l": torch.ones(2, 8)}
    save_file(file.tensors, tmp_path / "a.safetensors", file.about)
    refused(lambda: draw(tmp_path / "a.safetensors", batch), "a.safetensors", said)


def test_every_family_is_in_the_table():
    told = " ".join(said for _, said in REFUSED.values())
    for family in (kind for kind in KINDS if kind.startswith("a LoRA of")):
        assert family.removeprefix("a LoRA of ").split(" or ")[0] in told


def test_pefts_own_folder_with_dora(tmp_path, batch):
    """Keys base_model.model., a convolution's lengths, and the config beside them."""
    targets = [name for name in chosen(ATTENTION, CONV) if "mid" in name]
    how = {"r": 4, "lora_alpha": 6, "target_modules": targets, "use_dora": True}
    model = get_peft_model(make_unet(), LoraConfig(**how))
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora" in name:
                each.add_(normal(*each.shape))
    model.save_pretrained(tmp_path)
    assert (
        get_peft_model_state_dict(model).keys()
        == load_file(tmp_path / "adapter_model.safetensors").keys()
    )
    want = answer(model.get_base_model(), batch)
    got, _ = draw(tmp_path, batch)
    assert off(got, want) < 1e-5 < off(bare(), want)


def test_several_adapters_each_at_its_strength(tmp_path, batch):
    """A sum of what each would add to the bare weights, DoRA's too, in any order."""
    first, second, third = made(m="rows"), made(kind="loha"), made(ATTENTION, CONV)
    D, parts = {}, []
    for name, (file, k) in zip("abc", ((first, 0.8), (second, -0.5), (third, 2.0)), strict=True):
        save_file(file.tensors, tmp_path / f"{name}.safetensors", file.about)
        parts.append((foreign.read(tmp_path / f"{name}.safetensors"), k))
        for layer, each in file.D.items():
            D[layer] = D.get(layer, 0) + k * each
    drawn = foreign.Drawn(copy.deepcopy(UNET))
    for order in (parts, parts[::-1], parts[1:] + parts[:1]):
        foreign.load(drawn, foreign.together(order))
        assert off(answer(drawn.model, batch), merged(D, batch)) < 1e-4
    foreign.lora.set_strength(drawn, 0.5)
    assert off(answer(drawn.model, batch), merged(D, batch, 0.5)) < 1e-4
    foreign.lora.set_strength(drawn, 0)
    assert torch.equal(answer(drawn.model, batch), bare())


def test_a_file_is_put_in_the_place_of_the_one_before(tmp_path, batch):
    files_ = [made(kind="loha"), made(CONV)]
    drawn = foreign.Drawn(copy.deepcopy(UNET))
    for file in (*files_, files_[0]):
        save_file(file.tensors, tmp_path / "a.safetensors", file.about)
        foreign.load(drawn, foreign.read(tmp_path / "a.safetensors"))
        assert off(answer(drawn.model, batch), merged(file.D, batch)) < 1e-5


MODULE = "lora_unet_" + "mid_block.attentions.0.transformer_blocks.0.attn1.to_q".replace(".", "_")
MALFORMED = {  # factors, of which each has as many numbers as it should
    "A and B exchanged": {"lora_down.weight": (64, 4), "lora_up.weight": (4, 64)},
    "one number": {"lora_down.weight": (), "lora_up.weight": (64, 1)},
    "LoHa exchanged": {"hada_w1_a": (4, 64), "hada_w1_b": (64, 4)}
    | {"hada_w2_a": (4, 64), "hada_w2_b": (64, 4)},
    "LoHa of a row": {"hada_w1_a": (1, 4), "hada_w1_b": (4, 64)}
    | {"hada_w2_a": (1, 4), "hada_w2_b": (4, 64)},
    "LoKr of a vector": {"lokr_w1": (8, 8), "lokr_w2": (64,)},
    "LoKr of three": {"lokr_w1": (8, 8), "lokr_w2": (8, 4, 2)},
    "whole numbers": {"lora_down.weight": (4, 64), "lora_up.weight": (64, 4)},
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_factors_are_refused_before_anything_is_drawn(kind, tmp_path, batch):
    dtype = torch.int64 if kind == "whole numbers" else torch.float32
    numbers = {key: torch.ones(shape, dtype=dtype) for key, shape in MALFORMED[kind].items()}
    save_file(
        {f"{MODULE}.{key}": each for key, each in numbers.items()}, tmp_path / "a.safetensors"
    )
    refused(lambda: draw(tmp_path / "a.safetensors", batch), "a.safetensors")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("kohya, SGM's block names", None),
        ("some of attention alone", None),
        ("LoKr on convolutions", "layers of LoKr"),
        ("LoHa", "layers of LoHa"),
        ("DoRA in PEFT's keys", "layers of DoRA"),
        ("LoCon: 3x3 convolutions", "layers of LoRA on a convolution"),
        ("mixed ranks", "of rank 9 alpha"),
        ("with an embedding", "left out 2 tensors of embeddings"),
    ],
)
def test_inspect_tells_what_is_more_than_lora_of_one_rank_on_attention(tmp_path, kind, said):
    file = DRAWN[kind]()
    save_file(file.tensors, tmp_path / "a.safetensors", file.about)
    told = describe.other(tmp_path / "a.safetensors")
    assert told == "" if said is None else said in told and "a.safetensors" in told
    of_kinds = re.search(r"layers, of (\d+) kinds", told)
    assert ("kinds more" in told) == bool(of_kinds and int(of_kinds[1]) > 20)


def test_alpha_may_be_a_whole_number_and_conv_in_is_drawn_in_half_precision(tmp_path):
    tensors = {"lora_down.weight": torch.ones(4, 64), "lora_up.weight": torch.ones(64, 4)}
    tensors = {f"{MODULE}.{key}": each for key, each in tensors.items()}
    save_file(tensors | {f"{MODULE}.alpha": torch.tensor(6)}, tmp_path / "a.safetensors")
    assert foreign.read(tmp_path / "a.safetensors").alpha == 6
    shape = UNET.conv_in.weight.shape
    up = torch.ones(shape[0], 4, 1, 1)
    conv = {"lora_down.weight": torch.ones(4, *shape[1:]), "lora_up.weight": up}
    save_file({f"lora_unet_conv_in.{k}": v for k, v in conv.items()}, tmp_path / "b.safetensors")
    drawn = foreign.Drawn(copy.deepcopy(UNET).bfloat16())
    foreign.load(drawn, foreign.read(tmp_path / "b.safetensors"))
    assert drawn.model.dtype == torch.bfloat16
    batch = make_batch(1)
    assert model.predict(drawn.model, batch["noise"], batch).isfinite().all()
