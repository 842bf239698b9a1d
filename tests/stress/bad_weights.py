"""Adapters, checkpoints, cached numbers and models as nobody should have to meet them."""

import functools
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch

import data
import generate
import loop
import lora
import model
from adapters import files
from fast import nf4
from inputs import hub, sources
from inputs import options as config
from inputs.files import Refusal
from keep import checkpoint, drawing, identity, report, training
from stress import bad_folders, bad_pictures
from stress.case import Case, command

CPU = torch.device("cpu")
POCKET = bad_folders.MODEL
RANK, ALPHA = 4, 6.0
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I8": "i1", "U8": "u1"}


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


def numbers(content: bytes, dtype: str) -> np.ndarray:
    """The numbers of a tensor's bytes, in fp32."""
    if dtype == "BF16":  # fp32 without its lower half
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(content, NUMPY[dtype]).astype(np.float32)


def parsed(blob: bytes) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, read without the library."""
    size = int.from_bytes(blob[:8], "little")
    entries = json.loads(blob[8 : 8 + size])
    entries.pop("__metadata__", None)
    return {
        key: numbers(blob[8 + size :][slice(*e["data_offsets"])], e["dtype"]).reshape(e["shape"])
        for key, e in entries.items()
    }


class Whole:
    """A whole adapter file, and ways to write it with one thing changed; each gives a function."""

    def __init__(self, case: Case, metadata: dict, entries: dict, content: bytes):
        self.metadata, self.entries, self.content = metadata, entries, content
        self.key = case.rng.choice(
            sorted(k for k in entries if "lora_A." in k or "lora_down." in k)
        )
        self.pair = self.key.replace("lora_A", "lora_B").replace("lora_down", "lora_up")
        self.shape = entries[self.key]["shape"]
        self.begin, self.end = entries[self.key]["data_offsets"]
        self.blob = assembled(metadata, entries, content)

    def edit(self, **changes):
        return self.with_entries(**{self.key: self.entries[self.key] | changes})

    def with_entries(self, **more):
        return lambda: assembled(self.metadata, self.entries | more, self.content)

    def said(self, **changes):
        return lambda: assembled(self.metadata | changes, self.entries, self.content)

    def inside(self, **changes):
        """The PEFT header's own JSON."""
        head = json.loads(self.metadata.get("lora_adapter_metadata", '{"unet.r": 4}'))
        head |= {f"unet.{k}": v for k, v in changes.items()}
        return self.said(lora_adapter_metadata=json.dumps(head))

    def number(self, value: float):
        """A number of the data, as fp32 or fp16."""
        new = np.array([value]).astype(NUMPY[self.entries[self.key]["dtype"]]).tobytes()
        content = self.content[: self.begin] + new + self.content[self.begin + len(new) :]
        return lambda: assembled(self.metadata, self.entries, content)

    def two(self, dtype: str, a: list[int], b: list[int], size: int = 0):
        """Nothing but one A and one B of `size` bytes each."""
        places = {self.key: (a, [0, size]), self.pair: (b, [size, 2 * size])}
        entries = {
            key: {"dtype": dtype, "shape": shape, "data_offsets": at}
            for key, (shape, at) in places.items()
        }
        return lambda: assembled(None, entries, bytes(2 * size))


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def entry_edits(whole: Whole) -> dict:
    """Edits of what the header says of tensors: name -> the file's bytes."""
    edit, shape, begin, end = whole.edit, whole.shape, whole.begin, whole.end
    without = {k: v for k, v in whole.entries.items() if k != whole.key}
    return {
        "good": lambda: whole.blob,
        "end beyond the file": edit(data_offsets=[begin, len(whole.content) + 100]),
        "offsets reversed": edit(data_offsets=[end, begin]),
        "negative offset": edit(data_offsets=[-8, end]),
        "overlapping": edit(data_offsets=[max(0, begin - 64), max(0, end - 64)]),
        "offsets of 2^63": edit(data_offsets=[2**63, 2**63 + end - begin]),
        "three offsets": edit(data_offsets=[begin, end, end]),
        "offsets that are text": edit(data_offsets=["0", "8"]),
        "a huge shape": edit(shape=[10**9, 10**9]),
        "a shape that overflows": edit(shape=[2**62, 4]),
        "a negative shape": edit(shape=[-shape[0], -shape[1]]),
        "transposed": edit(shape=shape[::-1]),
        "flattened": edit(shape=[int(np.prod(shape))]),
        "one dimension more": edit(shape=[*shape, 1]),
        **{f"dtype {d}": edit(dtype=d) for d in ("I32", "U32", "BF16", "F64", "F8_E4M3", "X", 3)},
        **{f"bytes as {d}": edit(dtype=d, shape=[end - begin]) for d in ("U8", "BOOL", "I8")},
        "an unknown field": edit(strides=[1, 1]),
        "a key missing": lambda: assembled(whole.metadata, without, whole.content),
        "hollow matrices": whole.two("F32", [10**9, 0], [0, 10**9]),
        "rank 0": whole.two("F32", [0, 96], [96, 0]),
        "a rank of a million": whole.two("F16", [10**6, 1], [1, 10**6], 2 * 10**6),
        "a key of 100 kB": whole.with_entries(**{"unet." + "x" * 100_000: EMPTY}),
        "a key with escapes": whole.with_entries(**{"unet.\x1b[2J\n\x00": EMPTY}),
        "100,000 empty tensors": lambda: assembled(
            None, {f"unet.{i}": EMPTY for i in range(100_000)}, b""
        ),
        "NaN": whole.number(float("nan")),
        "Inf": whole.number(float("inf")),
        "huge": whole.number(3e38),
    }


def header_edits(whole: Whole) -> dict:
    """Edits of the header itself, and of what its metadata says: name -> the file's bytes."""
    said, inside, blob, content = whole.said, whole.inside, whole.blob, whole.content
    size = len(blob) - len(content) - 8
    raw = blob[8 : 8 + size].decode()
    twice = raw[:-1] + f', "{whole.key}": {json.dumps(whole.entries[whole.key])}' + "}"
    odd = (-6, 0, float("nan"), float("inf"), 1e308, "6", "x", None, [], True, 10**400)
    return {
        "a key twice": lambda: len(twice).to_bytes(8, "little") + twice.encode() + content,
        "metadata that is no text": said(more=3),
        "metadata that is a list": lambda: assembled([1], whole.entries, content),
        "no metadata": lambda: assembled(None, whole.entries, content),
        "a header that is a list": lambda: assembled(None, [], content),
        "a header claim of 100 MB": lambda: (10**8).to_bytes(8, "little") + blob[8:],
        "a header claim of 2^64": lambda: b"\xff" * 8 + blob[8:],
        "a header of nothing": lambda: bytes(8) + blob[8:],
        "a header one short": lambda: (size - 1).to_bytes(8, "little") + blob[8:],
        "a header that is no JSON": lambda: blob[:8] + b"x" * size + content,
        "a header of brackets": lambda: (50_000).to_bytes(8, "little") + b"[" * 50_000,
        "nothing": lambda: b"",
        "seven bytes": lambda: blob[:7],
        **{f"alpha {alpha}": inside(lora_alpha=alpha) for alpha in odd},
        **{f"r {r}": inside(r=r, lora_alpha=ALPHA) for r in (8, -4, "x", None)},
        "rslora": inside(use_rslora=True),
        "metadata no object": said(lora_adapter_metadata="[1]"),
        "metadata deep": said(lora_adapter_metadata="[" * 100_000),
        "metadata huge number": said(lora_adapter_metadata='{"unet.r": ' + "1" * 5000 + "}"),
        "another base": said(base_fingerprint="0" * 16),
        "a base elsewhere": said(base_model="../../etc"),
        "no base": said(base_model="\x00"),
        "a recipe of its own": said(recipe="x" * 1000),
    }


def adapter_file(case: Case) -> bytes:
    layout, dtype = case.rng.choice(("peft", "kohya")), case.rng.choice(("fp32", "fp16"))
    whole = Whole(case, *good_adapter(layout, dtype))
    edits = entry_edits(whole) | header_edits(whole)
    names = list(edits)
    case.what = f"{layout} {dtype}"
    if case.turn % 4 == 3:
        return bad_pictures.damaged(case, edits["good"]())
    name = names[(case.turn // 4 * 3 + case.turn % 4) % len(names)]
    case.what += f", {name}"
    return edits[name]()


def adapter(case: Case):
    """read() and load() of one file into an adapter, and drawing with some of them."""
    path = case.folder / "a.safetensors"
    blob = adapter_file(case)
    path.write_bytes(blob)
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
        want = parsed(blob)
        for name, matrix in mine.matrices().items():
            module, _, kind = name.rpartition(".")
            other = {"lora_A": "lora_down", "lora_B": "lora_up"}[kind]
            keys = (f"unet.{name}.weight", f"lora_unet_{module.replace('.', '_')}.{other}.weight")
            got = want[next(key for key in keys if key in want)]
            assert np.array_equal(matrix.detach().numpy(), got), "another number than was written"
            assert matrix.isfinite().all()
        assert file.rank == RANK and file.alpha == ALPHA

    return act


# ---- checkpoints ---------------------------------------------------------------------------------


def small_config(base: Path) -> config.Config:
    argv = [
        *("pocket", "--dataset-name", str(base / "data"), "--cache-dir", str(base / "cache")),
        *("--output-dir", str(base / "run"), "--max-train-steps", "2", *bad_folders.SMALL),
        *("--checkpointing-steps", "1"),
    ]
    return config.parse(argv)


@functools.cache
def small_run(base: Path) -> training.Kept:
    """The run whose checkpoints are damaged, set up; its folder is copied before each use."""
    return training.set_up(small_config(base), CPU)[0]


def in_place_of(tensor: torch.Tensor) -> dict:
    """What may stand where one tensor should: name -> value."""
    flat = tensor.flatten()
    return {
        **{"of one number": flat[:1].clone(), "too long": torch.cat([tensor, tensor])},
        **{"short": flat[:-1].clone(), "flattened": flat, "fp64": tensor.double(), "text": "x"},
        **{"fp16": tensor.half(), "int": tensor.long(), "a list": flat[:9].tolist(), "None": None},
    }


def matrix_edits(case: Case, state: dict) -> dict:
    """One matrix, or what the optimizer keeps for it, as other layers or another optimizer would
    have it: name -> the state that takes its place.
    """
    trained, moments = state["trained"], state["moments"]
    name = sorted(trained)[case.turn % len(trained)]
    kept = moments[name]
    key = sorted(key for key, value in kept.items() if torch.is_tensor(value))[case.turn % 3]
    others = {
        **{"empty": {}, "a number more": trained | {"x": trained[name]}},
        **{"without one": {k: v for k, v in trained.items() if k != name}, "3 as a name": {3: 3}},
    }
    numbers = {**others, **{n: trained | {name: v} for n, v in in_place_of(trained[name]).items()}}
    keeps = {
        "for nothing": {"x": kept},
        **{"of one empty": moments | {name: {}}},
        f"without {key}": moments | {name: {k: v for k, v in kept.items() if k != key}},
        "without one": {k: v for k, v in moments.items() if k != name},
        "one more": moments | {name: kept | {"x": kept[key]}},
        **{
            f"{key} {n}": moments | {name: kept | {key: v}}
            for n, v in in_place_of(kept[key]).items()
            if not (
                torch.is_tensor(v) and v.dtype == kept[key].dtype and v.shape == kept[key].shape
            )
        },
        **{f"step {v!r:.20}": moments | {name: kept | {"step": v}} for v in ("x", None, 1.5)},
    }
    edits = {f"trained {n}": state | {"trained": each} for n, each in numbers.items()}
    return edits | {f"moments {n}": state | {"moments": each} for n, each in keeps.items()}


def bad_state(case: Case, folder: Path) -> bool:
    """Damage the checkpoint in `folder`, or give it another run's. Returns whether it must not be
    continued.
    """
    content = (folder / "state.pt").read_bytes()
    state = torch.load(io.BytesIO(content), weights_only=True)
    edits = {"good": state, **matrix_edits(case, state)}
    names, other = list(edits), ("damaged", "its sum damaged", "its sum no text", "no file")
    turn, rest = divmod(case.turn, 4)
    how = names[(3 * turn + rest) % len(names)] if rest < 3 else other[turn % len(other)]
    case.what = how
    if how in edits:
        buffer = io.BytesIO()
        torch.save(edits[how], buffer)
        (folder / "state.pt").write_bytes(buffer.getvalue())
        (folder / "state.sha256").write_text(checkpoint.sum_of(buffer.getvalue()))
    elif how == "damaged":
        (folder / "state.pt").write_bytes(bad_pictures.damaged(case, content))
    elif how == "no file":
        (folder / "state.pt").unlink()
    else:
        wrong = {"its sum damaged": b"0" * 64, "its sum no text": b"\xff\xfe"}[how]
        (folder / "state.sha256").write_bytes(wrong)
    return how != "good"


def equal(a, b) -> bool:
    """Whether two dicts hold the same numbers."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def checkpoint_(case: Case):
    """newest_state(), check_same(), check_code() and restore() of a run with one damaged
    checkpoint.
    """
    kept = small_run(case.base)
    run = kept.run
    shutil.copytree(case.base / "run", case.out / "run")
    root = case.out / "run" / "checkpoints"
    newest = max(root.iterdir())
    bad = bad_state(case, newest)
    alone = case.rng.random() < 0.5
    if alone:
        for folder in root.iterdir():
            if folder != newest:
                shutil.rmtree(folder)
    extra = case.rng.choice(("", "", "²", "٣", "9" * 200, "000009"))
    if extra:
        case.what += f", beside a folder called {extra[:9]!a}"
        (root / extra).mkdir()
    case.what += ", alone" if alone else ""
    run.optimizer.state.clear()
    run.loss_scale, run.step = loop.LossScale(enabled=False), 0
    before, good = (
        torch.load(folder / "state.pt", weights_only=True)
        for folder in sorted((case.base / "run" / "checkpoints").iterdir())
    )
    start = {name: matrix.detach().clone() for name, matrix in run.trained.items()}

    def act():
        try:
            state = checkpoint.newest_state(root)
            identity.check_same(run.config, kept.identity, state)
            identity.check_code(run.config, kept.code, state)
            checkpoint.restore(kept, state)
        except Refusal:
            assert equal(start, run.trained) and not run.step, "begun"
            raise
        taken = before if run.step == before["step"] else good
        assert run.step == taken["step"] and not (bad and taken is good), "continued"
        assert equal(taken["trained"], run.trained) and equal(taken["moments"], kept.moments.read())
        group = run.optimizer.param_groups[0]
        assert tuple(group["betas"]) == (0.9, 0.999), group["betas"]

    return act


# ---- cached numbers ------------------------------------------------------------------------------


def rows(cache: data.Cache, count: int) -> list[torch.Tensor]:
    latents = [part for i in range(count) for part in cache.latent(i, False)]
    return latents + [part for i in range(count + 1) for part in cache.prompt(i)]


@functools.cache
def true_rows(base: Path) -> list[torch.Tensor]:
    return rows(fill(base, base / "cache"), 3)


def fill(base: Path, folder: Path) -> data.Cache:
    from stress import hostile

    pictures = sources.read_dataset(str(base / "data"))
    crop = data.Crop(64, False, 42)
    encoder = data.Encoder(pictures, hostile.vae, hostile.text_encoders, crop)
    fingerprints = hub.encoder_fingerprints(str(POCKET), False)
    return data.fill_cache(folder, encoder, False, torch.float32, fingerprints)


def cache(case: Case):
    """A cache with one damaged file: what is read from it is what an encoder gives."""
    if case.turn % 4 == 3:
        return kept_base(case)
    want = true_rows(case.base)
    folder = case.out / "cache"
    shutil.copytree(case.base / "cache", folder)
    data.Cache.open.cache_clear()
    files = sorted(folder.glob("*.safetensors"))
    at = case.rng.randrange(len(files))
    file, other = files[at], files[at - 1]
    hows = ("damaged", "another's content", "shapes", "NaN", "a folder", "nothing", "one bit")
    how = hows[(case.turn // 4 * 3 + case.turn % 4) % len(hows)]
    case.what = f"{file.name.partition('-')[0]} {how}"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if how == "another's content":
        shutil.copy(other, file)
    elif how == "a folder":
        file.unlink()
        file.mkdir()
    elif how == "shapes":
        entries = json.loads(content[8 : 8 + size])
        for key, entry in entries.items():
            if key != "__metadata__":
                entry["shape"] = entry["shape"][::-1]
        file.write_bytes(assembled(None, entries, content[8 + size :]))
    elif how in ("NaN", "one bit"):
        blob = bytearray(content)
        spot = case.rng.randrange(8 + size, len(blob) - 4) // 4 * 4
        if how == "NaN":
            blob[spot : spot + 4] = b"\xff\xff\xff\xff"
        else:
            blob[spot] ^= 1 << case.rng.randrange(8)
        file.write_bytes(blob)
    else:
        file.write_bytes(b"" if how == "nothing" else bad_pictures.damaged(case, content))

    def act():
        got = rows(fill(case.base, folder), 3)
        assert all(map(torch.equal, got, want)), "another number than an encoder gives"

    return act


def kept_base(case: Case):
    """The file of a 4-bit base."""
    path = case.out / "nf4.safetensors"
    generator = torch.Generator().manual_seed(1)
    tensors = {f"a{i}": torch.randn(9, i + 1, generator=generator) for i in range(3)}
    nf4.keep(path, tensors)
    case.what = "a kept 4-bit base"
    path.write_bytes(bad_pictures.damaged(case, path.read_bytes()))

    def act():
        got = nf4.read_kept(path, CPU)
        assert got is None or (
            got.keys() == tensors.keys() and all(torch.equal(got[k], tensors[k]) for k in got)
        ), "another number than was kept"

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
    report.count_cut(["a fox"], name)
    factor, shift = model.latent_scaling(name)
    assert factor > 0 and abs(shift) < 1e6
    vae = model.load_vae(name, CPU)
    mean, std = model.encode_images(torch.zeros(1, 3, 64, 64), vae)
    assert mean.shape == std.shape == (1, 4, 8, 8)
    unet = model.load_unet(name, CPU, torch.float32)
    generate.own_resolution(generate.load_pipeline(name, unet, CPU))


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
