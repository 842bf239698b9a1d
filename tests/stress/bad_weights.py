"""Adapters and models as nobody should have to meet them."""

import functools
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch

import lora
import model
from adapters import files
from inputs import hub, vetting
from inputs.files import Refusal
from inputs.options import Config
from keep import drawing, report, training
from stress import bad_folders, bad_pictures
from stress.case import Case, command

CPU = torch.device("cpu")
POCKET = bad_folders.MODEL
RANK, ALPHA = 4, 6.0
NUMPY = {"F32": "<f4", "F16": "<f2"}


@functools.cache
def pocket_adapter() -> lora.Adapter:
    """What hostile files are loaded into."""
    unet = model.load_unet(str(POCKET), CPU, torch.float32)
    return lora.inject(unet, rank=RANK, alpha=ALPHA, seed=1)


def copied(adapter: lora.Adapter) -> dict[str, torch.Tensor]:
    return {name: matrix.detach().clone() for name, matrix in adapter.matrices().items()}


@torch.no_grad()
def put(adapter: lora.Adapter, numbers: dict[str, torch.Tensor]) -> None:
    for name, matrix in adapter.matrices().items():
        matrix.copy_(numbers[name])


def good_adapter(layout: str, dtype: str) -> tuple[dict, dict, bytes]:
    """The header's metadata, its entries and the data of a whole adapter file."""
    adapter = pocket_adapter()
    before, generator = copied(adapter), torch.Generator().manual_seed(3)
    put(adapter, {k: torch.randn(m.shape, generator=generator) * 0.01 for k, m in before.items()})
    write = {"peft": lora.peft_bytes, "kohya": files.kohya_bytes}[layout]
    blob = write(adapter, model.DTYPES[dtype], {"base_model": str(POCKET)})
    put(adapter, before)
    size = int.from_bytes(blob[:8], "little")
    entries = json.loads(blob[8 : 8 + size])
    return entries.pop("__metadata__"), entries, blob[8 + size :]


def assembled(metadata, entries: dict, content: bytes) -> bytes:
    head = entries if metadata is None else {"__metadata__": metadata, **entries}
    header = json.dumps(head).encode()
    return len(header).to_bytes(8, "little") + header + content


def hollow(a: list[int], b: list[int], size: int = 0) -> bytes:
    """A file of nothing but one A and one B of `size` bytes each, which claim these shapes."""
    module = "unet.down_blocks.1.attentions.0.proj_in"
    entries = {
        f"{module}.lora_A.weight": {"dtype": "F16", "shape": a, "data_offsets": [0, size]},
        f"{module}.lora_B.weight": {"dtype": "F16", "shape": b, "data_offsets": [size, 2 * size]},
    }
    return assembled(None, entries, bytes(2 * size))


def by_hand(metadata: dict, entries: dict, content: bytes) -> dict[str, bytes]:
    """What chance would hardly meet: name -> the file's bytes."""
    key = next(k for k in sorted(entries) if "lora_A." in k or "lora_down." in k)
    begin, end = entries[key]["data_offsets"]
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    twice = json.dumps(entries)[:-1] + f', "{key}": {json.dumps(entries[key])}' + "}"

    def number(value: float) -> bytes:
        new = np.array([value]).astype(NUMPY[entries[key]["dtype"]]).tobytes()
        return assembled(metadata, entries, content[:begin] + new + content[begin + len(new) :])

    def edited(**changes) -> bytes:
        return assembled(metadata, entries | {key: entries[key] | changes}, content)

    return {
        "good": assembled(metadata, entries, content),
        "NaN": number(float("nan")),
        "Inf": number(float("inf")),
        "overlapping": edited(data_offsets=[begin + 64, end + 64]),
        "a shape that overflows": edited(shape=[2**62, 4]),
        "hollow matrices": hollow([10**9, 0], [0, 10**9]),
        "rank 0": hollow([0, 96], [96, 0]),
        "a rank of a million": hollow([10**6, 1], [1, 10**6], 2 * 10**6),
        "100,000 empty tensors": assembled(None, {f"unet.{i}": empty for i in range(10**5)}, b""),
        "a key twice": len(twice).to_bytes(8, "little") + twice.encode() + content,
        "a header claim of 100 MB": (10**8).to_bytes(8, "little") + content,
        "a header claim of 2^64": b"\xff" * 8 + content,
        "another base": assembled(metadata | {"base_fingerprint": "0" * 16}, entries, content),
        "a base elsewhere": assembled(metadata | {"base_model": "../../etc"}, entries, content),
    }


def adapter_file(case: Case) -> bytes:
    """A file by hand, one with junk in its header, one with junk in its metadata, a damaged one."""
    layout, dtype = case.rng.choice(("peft", "kohya")), case.rng.choice(("fp32", "fp16"))
    metadata, entries, content = good_adapter(layout, dtype)
    case.what, (turn, way) = f"{layout} {dtype}", divmod(case.turn, 4)
    if way == 0:
        made = by_hand(metadata, entries, content)
        name = list(made)[turn % len(made)]
        case.what += f", {name}"
        return made[name]
    if way == 1:
        head = json.dumps({"__metadata__": metadata, **entries}).encode()
        head = bad_folders.bad_json(case, head)
        return len(head).to_bytes(8, "little") + head + content
    if way == 2:
        said = bad_folders.bad_json(case, metadata.get("lora_adapter_metadata", "{}").encode())
        more = {"lora_adapter_metadata": said.decode("utf-8", "replace")}
        return assembled(metadata | more, entries, content)
    return bad_pictures.damaged(case, assembled(metadata, entries, content))


def adapter(case: Case):
    """read() and load() of one file into an adapter, and drawing with some of them."""
    path = case.folder / "a.safetensors"
    path.write_bytes(adapter_file(case))
    if case.turn % 17 == 5:
        case.what += ", a link to a pipe"
        path.unlink()
        os.mkfifo(path)
    if case.turn % 5 == 4:
        case.what += ", drawn"
        return lambda: command(drawing.main, bad_folders.draw_small(case, path))
    mine = pocket_adapter()

    def act():
        before = copied(mine)
        try:
            file = files.read(path)
            files.load(mine, file)
        except Refusal:
            same = all(torch.equal(m, before[name]) for name, m in mine.matrices().items())
            assert same, "a refused file changed the adapter"
            raise
        assert all(matrix.isfinite().all() for matrix in mine.matrices().values())
        assert file.rank == RANK and math.isfinite(file.alpha) and file.alpha > 0
        assert file.alpha == ALPHA or not case.what.endswith("good")

    return act


# ---- models --------------------------------------------------------------------------------------


def bad_model(case: Case) -> Path:
    """The pocket model with one file damaged; the others are links."""
    root = case.folder / "model"
    files = sorted(p.relative_to(POCKET) for p in POCKET.rglob("*") if p.is_file())
    configs = [f for f in files if f.name.endswith("config.json") or f.name == "model_index.json"]
    weights = [f for f in files if f.suffix == ".safetensors"]
    rest = [f for f in files if f not in configs and f not in weights]
    group = case.rng.choice((configs, configs, configs, weights, rest))
    chosen = group[case.turn % len(group)]
    case.what = str(chosen)
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        if file != chosen:
            (root / file).symlink_to(POCKET / file)
            continue
        content = (POCKET / file).read_bytes()
        if file.suffix == ".json":
            content = bad_json_number(case, content, file) or bad_folders.bad_json(case, content)
        else:
            content = bad_pictures.damaged(case, content)
        (root / file).write_bytes(content)
    return root


def bad_json_number(case: Case, content: bytes, file: Path) -> bytes | None:
    """A configuration with one of its numbers out of all bounds: these make models of any size."""
    if file.name.startswith(("tokenizer", "vocab")) or case.rng.random() < 0.5:
        return None
    value = json.loads(content)
    numbers = [k for k, v in value.items() if isinstance(v, int | list) and not isinstance(v, bool)]
    if not numbers:
        return None
    key = case.rng.choice(numbers)
    new = case.rng.choice((10**9, 10**6, 0, -1, 3, 10**30, 2.5))
    value[key] = [new] * len(value[key]) if isinstance(value[key], list) else new
    case.what += f", {key} = {value[key]}"
    return json.dumps(value).encode()


def walk_model(name: str) -> None:
    """Everything that a run and a drawing read of a model."""
    hub.encoder_fingerprints(name, False)
    schedule = model.load_noise_schedule(name, CPU)
    abar = schedule.alphas_cumprod
    assert abar.isfinite().all() and (abar >= 0).all() and (abar <= 1).all() and len(abar) > 0
    hub.unet_fingerprint(name, False)
    text = model.load_text_encoders(name, CPU)
    context, _ = model.encode_prompts(["a fox"], text)
    empty, _ = model.encode_unconditional(text)
    assert context.shape == empty.shape
    report.cut_captions(["a fox"], Config(pretrained_model_name_or_path=name))
    factor, shift = model.latent_scaling(name)
    assert factor > 0 and abs(shift) < 1e6
    vae = model.load_vae(name, CPU)
    mean, std = model.encode_images(torch.zeros(1, 3, 64, 64), vae)
    assert mean.shape == std.shape == (1, 4, 8, 8)
    model.load_unet(name, CPU, torch.float32)
    vetting.load_sampler(name)


def model_(case: Case):
    """A damaged model, read part by part, or met by a training or drawing command."""
    root = bad_model(case)
    if case.turn % 4 == 0:
        case.what += ", trained on"
        shutil.copytree(case.base / "cache", case.out / "cache")
        argv = bad_folders.small_run(case)
        argv[argv.index(str(POCKET))] = str(root)
        return lambda: command(training.main, argv)
    if case.turn % 4 == 2:
        case.what += ", drawn with"
        run = case.base / "run" / lora.FILE_NAME
        argv = bad_folders.draw_small(case, run, "--any-base")
        argv[argv.index(str(POCKET))] = str(root)
        return lambda: command(drawing.main, argv)
    return lambda: walk_model(str(root))
