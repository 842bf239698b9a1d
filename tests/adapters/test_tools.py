"""The tools for adapter files, held to the mathematics: what each file adds to every weight, scale
B A built whole, before and after; and to the programs that read what the tools wrote.
"""

import functools
import hashlib
import json
import re
from types import SimpleNamespace

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import lora
from adapter_tools import answer, header, off, pipeline
from adapters import describe, files, tools
from adapters.__main__ import Options, parse, run
from conftest import ROOT, TINY_SDXL, make_batch
from inputs.files import Refusal
from inputs.vetting import SDXL_UNET
from sentences import refused
from stress import tiny

pytestmark = pytest.mark.slow

BASE = ("--pretrained-model-name-or-path", str(TINY_SDXL))
PK = ("peft", "kohya")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ABOUT = {"base_model": "some/base", "base_fingerprint": "0123", "run": "abc", "steps": "7"}


def base() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(TINY_SDXL / "unet").requires_grad_(False)


@functools.cache
def layers() -> dict:
    return tools.layers_of(str(TINY_SDXL))


UNET = UNet2DConditionModel(**tiny.UNET)  # of its shape, with other numbers
SHAPES = {name: each.weight.shape for name, each in lora.find_targets(UNET, lora.TARGETS).items()}
# Kohya's keys in diffusers' block names, by those in SGM's.
SGM = files.sgm_names(SHAPES)
OLD = {
    f"lora_unet_{SGM[name]}".replace(".", "_") + end: f"lora_unet_{name}".replace(".", "_") + end
    for name in SHAPES
    for end in (".lora_down.weight", ".lora_up.weight", ".alpha")
}
BATCH = make_batch()
BATCH |= {"context": torch.randn(2, 7, 40, generator=torch.Generator().manual_seed(3))}
BATCH |= {"pooled": torch.randn(2, 24, generator=torch.Generator().manual_seed(4))}


def written(path, rank=4, alpha=6.0, layout="peft", dtype=torch.float32, seed=1, **changes):
    """A file of random numbers for the tiny model's 32 modules, or for those of `modules`, whose
    singular values fall as those of what has been trained do.
    """
    generator, layers = torch.Generator().manual_seed(seed), {}
    for name in changes.get("modules", SHAPES):
        out, wide = SHAPES[name]
        A = torch.randn(rank, wide, generator=generator) / 10
        B = torch.randn(out, rank, generator=generator) * torch.linspace(0, -3, rank).exp()
        layers[name] = SimpleNamespace(lora_A=A, lora_B=B)
    adapter = lora.Adapter(layers, rank, alpha, lora.TARGETS)
    files.save(adapter, path, layout, dtype, ABOUT | changes.get("about", {}))
    return path


def updates(path, strength=1.0) -> dict[str, torch.Tensor]:
    """What a file adds to each weight, in fp64."""
    file, found = tools.read(path, layers()), {}
    for module in tools.modules_of(file):
        A, B = (file.matrices[f"{module}.lora_{kind}"].double() for kind in "AB")
        found[module] = strength * file.alpha / file.rank * B @ A
    return found


def added(*each: dict) -> dict[str, torch.Tensor]:
    return {name: sum(one[name] for one in each if name in one) for name in set().union(*each)}


def apart(got: dict, want: dict) -> float:
    assert got.keys() == want.keys()
    gone = sum((got[name] - want[name]).square().sum() for name in want)
    return (gone / sum(each.square().sum() for each in want.values())).sqrt().item()


def told(said: str) -> float:
    """The residual that a command printed."""
    return float(re.search(r"residual (?:below )?(\S+) of the update's length", said)[1])


def command(capsys, *words) -> str:
    run([*map(str, words), *BASE])
    return capsys.readouterr().out


def test_the_layers_of_sdxl_are_those_of_its_unet():
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SDXL_UNET)
    names = {n for n, each in unet.named_modules() if isinstance(each, torch.nn.Linear)}
    assert tools.layers_of("").keys() == {name for name in names if ".attentions." in name}
    attention = lora.find_targets(unet, lora.TARGETS).keys()
    assert len(attention) == 560 and attention <= tools.layers_of("").keys()
    small = [n for n, each in UNET.named_modules() if isinstance(each, torch.nn.Linear)]
    assert layers().keys() >= {name for name in small if ".attentions." in name}


@pytest.mark.parametrize("dtype, way", [("fp32", PK), ("fp16", PK[::-1]), ("bf16", PK)])
def test_there_and_back_gives_the_same_tensors(tmp_path, capsys, dtype, way):
    first = written(tmp_path / "a.safetensors", 3, 1.7, way[0], DTYPES[dtype])
    there, back = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    assert told(command(capsys, "convert", first, "--to", way[1], "--output", there)) == 1e-7
    assert load_file(first).keys() & load_file(there).keys() == set()
    command(capsys, "convert", there, "--to", way[0], "--output", back)
    before, after = load_file(first), load_file(back)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and tensor.equal(after[key]), key
    assert files.read(back).alpha == pytest.approx(1.7) == files.read(there).alpha


@pytest.mark.parametrize("dtype, about", [("fp16", 2e-4), ("bf16", 2e-3)])
def test_rounding_is_what_is_lost_and_what_is_said(tmp_path, capsys, dtype, about):
    first, second = written(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    said = command(capsys, "convert", first, "--save-dtype", dtype, "--output", second)
    gone = apart(updates(second), updates(first))
    assert gone == pytest.approx(told(said), rel=0.05)
    assert about / 2 <= gone <= about * 2
    rounded = {
        key: each.to(DTYPES[dtype]) for key, each in tools.read(first, layers()).matrices.items()
    }
    assert all(
        each.equal(rounded[key]) for key, each in tools.read(second, layers()).matrices.items()
    )


def test_a_merge_is_the_sum_exactly_whatever_ranks_alphas_and_modules(tmp_path, capsys):
    """Ranks add up, where a file lacks a module, too."""
    a = written(tmp_path / "a.safetensors", 4, 6, "kohya", torch.float16)
    b = written(tmp_path / "b.safetensors", 3, 1, seed=2)
    c = written(tmp_path / "c.safetensors", 2, 8, seed=3, modules=[*SHAPES][:30])
    out = tmp_path / "out.safetensors"
    said = command(capsys, "merge", a, f"{b}:-0.37", f"{c}:.5", "--output", out)
    want = added(updates(a), updates(b, -0.37), updates(c, 0.5))
    assert apart(updates(out), want) < 1e-7 and told(said) == 1e-7
    assert files.read(out).rank == 9 and "rank 9, alpha 13.5, float32" in said
    # Whatever is missing there, the sum is not that of the first alone.
    assert apart(updates(a), want) > 0.1


def test_equal_scales_merge_in_half_precision_without_any_loss(tmp_path, capsys):
    a = written(tmp_path / "a.safetensors", 4, 8, dtype=torch.float16)
    b = written(tmp_path / "b.safetensors", 2, 4, dtype=torch.float16, seed=2)
    out = tmp_path / "out.safetensors"
    said = command(capsys, "merge", a, f"{b}:-1", "--output", out)
    assert "float16" in said and apart(updates(out), added(updates(a), updates(b, -1))) < 1e-12


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_a_cut_merge_is_the_nearest_there_is(tmp_path, capsys, rank):
    a = written(tmp_path / "a.safetensors", 4, 6)
    b = written(tmp_path / "b.safetensors", 8, 2, seed=2)
    out = tmp_path / "out.safetensors"
    said = command(capsys, "merge", a, f"{b}:2", "--rank", rank, "--output", out)
    want = added(updates(a), updates(b, 2))
    values = [torch.linalg.svdvals(each) for each in want.values()]
    lost = sum(each[rank:].square().sum() for each in values)
    lost = (lost / sum(each.square().sum() for each in values)).sqrt().item()
    assert files.read(out).rank == rank
    assert apart(updates(out), want) == pytest.approx(lost, rel=1e-3, abs=1e-6)
    assert told(said) == pytest.approx(lost, rel=0.05, abs=2e-7)


def test_what_is_no_cut_is_refused(tmp_path, capsys):
    a, out = written(tmp_path / "a.safetensors", 4, 6), tmp_path / "out.safetensors"
    with pytest.raises(Refusal, match="--rank 5, of files whose ranks add up to 4"):
        command(capsys, "resize", a, "--rank", 5, "--output", out)
    assert not out.exists()


@pytest.mark.parametrize("keep", [0.5, 0.95, 1.0])
def test_keep_takes_the_smallest_rank_that_keeps_so_much(tmp_path, capsys, keep):
    a, out = written(tmp_path / "a.safetensors", 8, 16), tmp_path / "out.safetensors"
    said = command(capsys, "resize", a, "--keep", keep, "--output", out)
    values = [torch.linalg.svdvals(each)[:8].square() for each in updates(a).values()]
    share = (sum(values).cumsum(0) / sum(values).sum()).tolist()
    rank = files.read(out).rank
    assert share[rank - 1] >= keep - 1e-9 and (rank == 1 or share[rank - 2] < keep)
    assert 1 - apart(updates(out), updates(a)) ** 2 == pytest.approx(share[rank - 1], abs=1e-6)
    assert told(said) == pytest.approx((1 - share[rank - 1]) ** 0.5, rel=0.05, abs=1e-3)


def test_a_resize_in_half_precision_says_what_both_lose(tmp_path, capsys):
    a, out = written(tmp_path / "a.safetensors", 8, 16), tmp_path / "out.safetensors"
    words = ("--rank", 8, "--save-dtype", "fp16", "--output", out)
    said = command(capsys, "resize", a, *words)
    assert 1e-5 < told(said) < 1e-3
    assert apart(updates(out), updates(a)) == pytest.approx(told(said), rel=0.05)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A merge in both layouts, and what the small model answers with it in its weights."""
    folder = tmp_path_factory.mktemp("merged")
    a, b = written(folder / "a.safetensors"), written(folder / "b.safetensors", 2, 8, seed=2)
    for layout in PK:
        out = folder / f"{layout}.safetensors"
        run(["merge", f"{a}:0.2", f"{b}:-0.1", "--to", layout, "--output", str(out), *BASE])
    unet = base()
    for name, each in added(updates(a, 0.2), updates(b, -0.1)).items():
        unet.get_submodule(name).weight.data += each.float()
    return folder, answer(unet, BATCH)


@pytest.mark.parametrize(
    "layout, reader",
    [(layout, reader) for layout in PK for reader in ("ours", "diffusers")] + [("peft", "peft")],
)
def test_what_is_written_acts_as_the_merged_weights_do(merged, layout, reader):
    (folder, want), unet = merged, base()
    path = folder / f"{layout}.safetensors"
    file = files.read(path)
    if reader == "ours":
        files.load(lora.inject(unet, rank=file.rank, alpha=file.alpha), file)
    elif reader == "diffusers":
        pipeline(unet).load_lora_weights(path)
    else:
        said = json.loads(file.about["lora_adapter_metadata"])
        said = {key.removeprefix("unet."): each for key, each in said.items()}
        peft.inject_adapter_in_model(peft.LoraConfig(**said), unet)
        numbers = {key.removeprefix("unet."): each for key, each in load_file(path).items()}
        assert not peft.set_peft_model_state_dict(unet, numbers).unexpected_keys
    assert off(answer(unet, BATCH), want) < 1e-5 < 0.01 < off(answer(base(), BATCH), want)


def test_diffusers_reads_a_file_of_some_modules_alone(tmp_path, capsys):
    a = written(tmp_path / "a.safetensors", modules=[*SHAPES][5:20])
    out, unet, whole = tmp_path / "out.safetensors", base(), base()
    command(capsys, "convert", a, "--to", "peft", "--output", out)
    for name, each in updates(a).items():
        whole.get_submodule(name).weight.data += each.float()
    pipeline(unet).load_lora_weights(out)
    assert off(answer(unet, BATCH), answer(whole, BATCH)) < 1e-5


def test_the_header_says_what_was_made_of_what_and_nothing_of_old_numbers(tmp_path, capsys):
    a = written(tmp_path / "a.safetensors", layout="kohya", about={"only": "here", "same": "1"})
    b = written(tmp_path / "b.safetensors", 2, 8, about={"same": "1", "steps": "9"})
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    command(capsys, "merge", a, f"{b}:0.5", "--output", out)
    said = header(out)["__metadata__"]
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (a, b)]
    made = f"merge a.safetensors:1 sha256 {sums[0]}, b.safetensors:0.5 sha256 {sums[1]}"
    assert said["made"] == made
    assert (said["rank"], said["ss_network_dim"], said["ss_network_alpha"]) == ("6", "6", "9.0")
    assert said["same"] == "1" and said["base_fingerprint"] == "0123"
    assert not {"run", "only", "steps"} & said.keys()
    command(capsys, "merge", a, f"{b}:0.5", "--output", again)
    assert out.read_bytes() == again.read_bytes()


def test_nothing_that_is_there_is_written_over(tmp_path, capsys):
    a = written(tmp_path / "a.safetensors")
    before = a.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(a)
    for name in ("a", "link"):
        words = ["convert", str(a), "--output", str(tmp_path / f"{name}.safetensors"), *BASE]
        refused(lambda words=words: run(words), "is there already", "another --output")
    assert a.read_bytes() == before and len([*tmp_path.iterdir()]) == 2


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path):
    a, out = written(tmp_path / "a.safetensors"), tmp_path / "out.safetensors"

    def no(*words, base=BASE, command="merge"):
        argv = [command, *map(str, words), "--output", str(out), *base]
        refused(lambda: run(argv), *says)
        assert not out.exists()

    says = ["SDXL", "--pretrained-model-name-or-path"]
    says += ["adapts 8 modules such as"]  # at SDXL's first level, which has no attention
    first = {k.replace("down_blocks.1", "down_blocks.0"): v for k, v in load_file(a).items()}
    save_file(first, tmp_path / "first.safetensors")
    no(tmp_path / "first.safetensors", base=())
    large = written(tmp_path / "large.safetensors", 4, 6e5)
    says = ["numbers beyond fp16", "--save-dtype fp32"]
    no(large, "--rank", 2, "--save-dtype", "fp16", command="resize")
    high = written(tmp_path / "high.safetensors", 400)
    says = ["a sum of rank 800", "--rank R"]
    no(high, high)
    wide = {
        key: torch.ones(4, 9) if "lora_A" in key else each for key, each in load_file(a).items()
    }
    save_file(wide, tmp_path / "wide.safetensors")
    says = ["do not fit each other", "one architecture"]
    no(a, tmp_path / "wide.safetensors")
    key = "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    save_file(load_file(a) | {key: torch.ones(4, 4)}, tmp_path / "text.safetensors")
    says = ["holds a text encoder's LoRA", key]
    no(tmp_path / "text.safetensors")


def test_the_commands_options_are_checked_together(tmp_path):
    out = ("--output", "o.safetensors")
    for words in (
        ("resize", "a", *out),
        ("resize", "a", "--rank", "3", "--keep", "0.5", *out),
        ("merge", "a", "b", "--rank", "3", "--keep", "0.5", *out),
        ("convert", "a", "--rank", "3", *out),
        ("convert", "a", "b", *out),
        ("merge", "a", "b"),
        ("merge", "a", "b", "--output", "o.ckpt"),
        ("merge", "a", "b:0", *out),
        ("merge", "a", "b:11", *out),
        ("inspect", "a", *out),
        ("inspect", "a:0.5"),
        ("inspect", "a", "--ranks", "3"),
        ("merge", "a", "--keep", "1.5", *out),
        ("shrink", "a"),
    ):
        refused(lambda words=words: parse([*words]))
    assert parse(["inspect"]) == Options()
    with pytest.raises(Refusal, match="no such file"):
        run(["inspect", str(tmp_path / "nothing.safetensors")])


def lines_of(said: str, word: str) -> list[str]:
    return [line for line in said.splitlines() if word in line]


def test_inspect_measures_each_block_against_its_weights(tmp_path, capsys):
    a = written(tmp_path / "a.safetensors", 4, 6, "kohya")
    run(["inspect", str(a), *BASE])
    said = capsys.readouterr().out
    assert "32 modules, all of rank 4 and scale alpha / rank = 6 / 4 = 1.5" in said
    assert "base: base_model some/base, ss_base_model_version sdxl_base_v1-0" in said
    assert "targets: 8 to_k, 8 to_out.0, 8 to_q, 8 to_v" in said and "  steps: 7" in said
    assert "traps: none known" in said
    ours, unet = updates(a), base()
    for block in ("down_blocks.1.attentions.0", "mid_block.attentions.0"):
        names = [name for name in ours if name.startswith(block)]
        weights = [unet.get_submodule(name).weight for name in names]
        want = torch.cat([ours[name].flatten() for name in names]).norm()
        share = want / torch.cat([each.flatten() for each in weights]).norm()
        got = re.search(rf"{re.escape(block)} +(\S+) █", said)[1]
        assert float(got) == pytest.approx(share.item(), rel=0.06)
    assert max(line.count("█") for line in lines_of(said, "█")) == 30
    file = tools.read(a, layers())
    lengths = describe.lengths_by_block(file, {})
    assert lengths["mid_block.attentions.0"] == pytest.approx(want.item())
    assert "itself, since no base was named" in describe.describe(file, {})


def rename(change, header=None):
    def edited(path):
        tensors, about = load_file(path), json.loads(json.dumps(header or {}))
        save_file({change(key): each for key, each in tensors.items()}, path, about or None)

    return edited


def with_alphas(path):
    tensors, about = load_file(path), header(path)["__metadata__"]
    alpha = float(about["alpha"])
    modules = {key.partition(".lora_")[0] for key in tensors}
    save_file(tensors | {f"{m}.alpha": torch.tensor(alpha) for m in modules}, path)


@pytest.mark.parametrize(
    "layout, edit, trap",
    [
        ("peft", lambda path: None, "ComfyUI skips the attention layers"),
        (
            "peft",
            rename(lambda key: key.removeprefix("unet.")),
            "diffusers' load_lora_weights loads it and changes nothing",
        ),
        ("peft", rename(lambda key: key), "nothing tells alpha"),
        ("peft", with_alphas, "diffusers' load_lora_weights refuses .alpha beside PEFT's keys"),
        ("kohya", rename(lambda key: key, {"steps": "7"}), "A1111 hides it"),
        (
            "kohya",
            rename(lambda key: OLD[key]),
            "sd-scripts merges and trains on SGM's block names",
        ),
    ],
    ids=["peft", "bare", "no alpha", "alphas", "no version", "old names"],
)
def test_each_trap_is_told_and_convert_gets_out_of_it(tmp_path, capsys, layout, edit, trap):
    edit(a := written(tmp_path / "a.safetensors", layout=layout))
    run(["inspect", str(a), *BASE])
    assert lines_of(capsys.readouterr().out, f"trap: {trap}")
    command(capsys, "convert", a, "--output", tmp_path / "b.safetensors")
    run(["inspect", str(tmp_path / "b.safetensors"), *BASE])
    assert "traps: none known" in capsys.readouterr().out


def test_a_file_that_changes_nothing_is_told(tmp_path, capsys):
    a = written(tmp_path / "a.safetensors", layout="kohya")
    tensors = {key: each * ("lora_up" not in key) for key, each in load_file(a).items()}
    save_file(tensors, a, header(a)["__metadata__"])
    run(["inspect", str(a), *BASE])
    assert "trap: every correction is zero: it changes nothing" in capsys.readouterr().out
    command(capsys, "resize", a, "--keep", 0.9, "--output", tmp_path / "b.safetensors")
    assert files.read(tmp_path / "b.safetensors").rank == 1


def test_the_newest_runs_base_is_found_beside_its_file(tmp_path, capsys):
    a = written(tmp_path / "a.safetensors", layout="kohya")
    (tmp_path / "config.json").write_text(
        json.dumps({"pretrained_model_name_or_path": str(TINY_SDXL)})
    )
    run(["inspect", str(tmp_path)])
    assert "32 modules" in capsys.readouterr().out
    assert a.is_file()


def test_the_pages_lines_bake_an_adapter_into_a_checkpoint(tmp_path):
    """Of docs/adapters.md, with the small model in fp32."""
    path, page = written(tmp_path / "a.safetensors"), (ROOT / "docs" / "adapters.md").read_text()
    (lines,) = re.findall(r"```python\n(.+?)```", page, re.DOTALL)
    for theirs, ours in {
        "stabilityai/stable-diffusion-xl-base-1.0": str(TINY_SDXL),
        'torch.float16, variant="fp16"': "torch.float32",
        "runs/t4/pytorch_lora_weights.safetensors": str(path),
        '"baked"': repr(str(tmp_path / "baked")),
    }.items():
        assert theirs in lines
        lines = lines.replace(theirs, ours)
    exec(lines, {})
    baked = UNet2DConditionModel.from_pretrained(tmp_path / "baked" / "unet").state_dict()
    bare, more = base().state_dict(), updates(path, 0.8)
    assert baked.keys() == bare.keys()
    for key, weight in bare.items():
        want = more.get(key.removesuffix(".weight"), torch.zeros(1)).double()
        assert (baked[key] - weight - want).norm() <= 1e-6 * want.norm(), key
