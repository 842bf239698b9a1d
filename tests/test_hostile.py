"""Bad and hostile input: each is what a fuzzer (stress/fuzz.py) or a reader found, and the short
form of the fuzzer itself.
"""

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import generate
import loop
import lora
import model
from conftest import INK, POCKET, make_unet
from inputs import blocks, hub, pictures, sources, vetting
from inputs import options as config
from inputs.files import Refusal, digest, safetensors_bytes, sayable
from keep import checkpoint, report, states
from stress import bad_pictures, fuzz
from stress.case import sentence_is_whole


def refused(act, *words: str) -> None:
    """A Refusal that is a whole, printable sentence and has all the words."""
    with pytest.raises(Refusal) as refusal:
        act()
    sentence_is_whole(str(refusal.value))
    for word in words:
        assert word in str(refusal.value)


def picture(blob: bytes) -> sources.Picture:
    return sources.Picture("a.png", "", digest(blob), lambda: blob)


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_a_thousand_inputs_hold_every_kind_of_picture_that_they_should():
    pairs, turns = bad_pictures.in_turn(), [fuzz.kind_and_turn(i) for i in range(1000)]
    whole = [turn // 4 for kind, turn in turns if kind == "picture" and turn % 4 == 0]
    met = {pairs[at % len(pairs)] for at in whole}
    assert {mode for _, mode in met} >= {"CMYK", "I;16", "LA", "P", "F", "RGBA"}
    assert (
        ("JPEG", "CMYK") in met and ("PNG", "I;16") in met and len({name for name, _ in met}) > 10
    )


def test_sixty_inputs_of_the_fuzzer_are_answered_rightly_or_with_a_sentence(tmp_path):
    said = []
    answer = fuzz.run(0, 60, tmp_path, said.append)
    assert answer["failures"] == [], said
    assert answer["inputs"] == 60 and answer["kinds"].keys() == fuzz.SHARES.keys()
    assert answer["refused"] > 20 and answer["accepted"] > 15
    assert not list(tmp_path.iterdir())


# ---- the fuzzer notices --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act, said",
    [
        (lambda case: (case.elsewhere / "x").touch(), "changed outside the output folder"),
        (lambda case: (case.sandbox.parent / "x").touch(), "reached outside"),
        (lambda case: os.system("true"), "reached outside"),
        (lambda case: {}["x"], "KeyError"),
        (lambda case: os._exit(3), "exit code 3"),
        (lambda case: refuse("a\nb"), ""),
    ],
    ids=["a file", "a file elsewhere", "a program", "another error", "a crash", "a refusal"],
)
def test_the_fuzzer_notices(tmp_path, monkeypatch, act, said):
    monkeypatch.setattr(fuzz.hostile, "prepare", lambda base: None)
    for kind in fuzz.SHARES:
        monkeypatch.setitem(fuzz.hostile.KINDS, kind, lambda case: lambda: act(case))
    answer = fuzz.run(0, 1, tmp_path, lambda line: None)
    assert [said in each["said"] for each in answer["failures"]] == ([True] if said else [])
    assert answer["refused"] == (not said)


def refuse(found: str):
    raise Refusal(found, "x", "y")


def test_an_input_is_made_again_by_its_number():
    kinds = [fuzz.kind_and_turn(number) for number in range(1000)]
    assert len(set(kinds)) == 1000 and {kind for kind, _ in kinds[:60]} == fuzz.SHARES.keys()
    again = [random.Random("0 417").random() for _ in range(2)]
    assert fuzz.Case(0, 417, "picture", 1, Path("x")).rng.random() == again[0]


# ---- sentences -----------------------------------------------------------------------------------


def test_a_sentence_shows_no_escape_sequence_and_no_megabyte():
    said = str(Refusal("\x1b[2J\n\ud800 " + "x" * 10**6, "a", "b"))
    assert said.isprintable() and len(said) < 2000 and said.startswith(r"\x1b[2J\n\ud800 xx")
    assert sayable("füchse 🦊") == "füchse 🦊"


# ---- pictures ------------------------------------------------------------------------------------


def test_postscript_is_not_given_to_ghostscript(monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: started.append(a))
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: started.append(a))
    postscript = bad_pictures.no_pictures()["PostScript that writes a file"]
    refused(lambda: pictures.decode(picture(postscript)))
    refused(lambda: pictures.decode(picture(encoded(Image.new("RGB", (16, 16)), "EPS"))), "a.png")
    assert not started


def test_floats_are_refused_and_whole_numbers_beyond_16_bits_too():
    floats = encoded(Image.new("F", (16, 16), 0.5), "TIFF")
    refused(lambda: pictures.decode(picture(floats)), "white")
    wide = Image.fromarray(np.full((16, 16), 70000, np.int32))
    refused(lambda: pictures.decode(picture(encoded(wide, "TIFF"))), "beyond 16 bits")
    grey = Image.fromarray(np.full((16, 16), 300 * 100, np.uint16))
    got = np.asarray(pictures.decode(picture(encoded(grey, "TIFF"))))
    assert (got == 30000 // 257).all()


# ---- data folders --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """a.png and a.txt in tmp_path/data, a picture outside in tmp_path/outside."""
    made = tmp_path / "data"
    for each in (made, tmp_path / "outside"):
        each.mkdir()
    first, second = sorted(INK.glob("*.png"))[:2]
    shutil.copy(first, made / "a.png")
    (made / "a.txt").write_text("a fox")
    shutil.copy(second, tmp_path / "outside" / "b.png")
    return made


def read(folder) -> list[sources.Picture]:
    return sources.read_dataset(str(folder))


def test_a_name_in_metadata_cannot_lead_outside_and_a_linked_file_may(folder, tmp_path):
    outside = tmp_path / "outside" / "b.png"
    lines = folder / "metadata.jsonl"
    names = ("../outside/b.png", str(outside), "x/../../outside/b.png", "..\\outside\\b.png")
    for name in (*names, "a.png/../../outside/b.png", "b\0.png", "\ud800", "x" * 5000, ""):
        rows = [{"file_name": "a.png", "text": "x"}, {"file_name": name, "text": "y"}]
        lines.write_text("\n".join(map(json.dumps, rows)))
        refused(lambda: read(folder), "line 2")
    (folder / "b.png").symlink_to(outside)  # the user's own act
    lines.write_text("\n".join(json.dumps({"file_name": n, "text": n}) for n in ("a.png", "b.png")))
    assert [p.read() for p in read(folder)][1] == outside.read_bytes()


@pytest.mark.parametrize("kind", ["metadata", "captions"])
def test_a_linked_folder_is_refused_and_not_followed(folder, tmp_path, kind):
    """Through one, the name d/../b.png is inside by its letters and outside on the disk."""
    (folder / "d").symlink_to(tmp_path / "outside" / "deeper", target_is_directory=True)
    (tmp_path / "outside" / "deeper").mkdir()
    if kind == "metadata":
        rows = [{"file_name": n, "text": "x"} for n in ("a.png", "d/../b.png")]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused(lambda: read(folder), "is a link to a folder")


def test_a_table_cannot_name_a_file_outside_the_data_set(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    assert sources.own_file(str(own), "b.png") == own / "b.png"
    for path in ("/etc/passwd", "../b.png", str(tmp_path / "b.png")):
        refused(lambda path=path: sources.own_file(str(own), path), "outside the data set")
        refused(lambda path=path: sources.own_file("someone/set", path), "outside the data set")


@pytest.mark.parametrize("text", [0, False, [], {}, "\ud800", float("nan")])
def test_a_caption_that_is_no_text_is_refused_also_where_it_is_falsy(folder, text):
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": text}))
    refused(lambda: read(folder), "line 1 has the caption")


def test_a_key_twice_and_endless_nesting_are_refused(folder):
    for line in ('{"file_name": "a.png", "text": "x", "text": "y"}', "[" * 100_000):
        (folder / "metadata.jsonl").write_text(line)
        refused(lambda: read(folder), "line 1 is not a row")


def test_pipes_folders_links_to_nothing_and_terabytes_are_refused_by_name(folder):
    os.mkfifo(folder / "b.txt")
    shutil.copy(folder / "a.png", folder / "b.png")
    refused(lambda: read(folder), "b.txt cannot be read as a caption (no file)")
    (folder / "b.txt").unlink()
    (folder / "b.txt").write_text("b")
    with open(folder / "b.png", "wb") as file:
        file.truncate(2**40)
    refused(lambda: read(folder), "b.png cannot be read as a picture (1099511.6 MB)")
    (folder / "b.png").unlink()
    (folder / "b.png").symlink_to(folder / "gone.png")
    refused(lambda: read(folder), "b.png cannot be read", "No such file")


# ---- options, notes and logs ---------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a\0b", "\udcff"])
def test_an_option_that_no_file_name_can_hold_is_refused(text, capsys):
    assert loop.main(["pocket", "--output-dir", text]) == 1
    assert generate.main(["--prompts", text]) == 1
    assert capsys.readouterr().err.count("text in UTF-8 without NUL") == 2


def test_a_drawing_of_any_size_or_guidance_is_refused():
    for option in ("--resolution=800000", "--guidance-scale=nan", "--guidance-scale=1e9"):
        name = option[2:].split("=")[0].replace("-", "_")
        refused(lambda option=option: generate.parse([option]), f"{name} is ")


def test_a_damaged_log_loses_its_damaged_lines_only(tmp_path):
    lines = [
        '{"step": 1}',
        "[" * 10**5,
        '{"step": "x"}',
        "{}",
        "null",
        '{"step": 2}',
        '{"step": 9}',
    ]
    (tmp_path / "log.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe{}\n")
    options = config.check(config.RECIPES["pocket"][1])
    with report.Log(tmp_path, 2, config.replace(options, tensorboard=False)):
        pass
    assert (tmp_path / "log.jsonl").read_text().splitlines() == ['{"step": 1}', '{"step": 2}']


@pytest.mark.parametrize("junk", [3, None, {"a": 1}, [1], [["a"]]])
def test_what_a_runs_config_says_is_taken_where_it_is_text(tmp_path, junk):
    (tmp_path / "config.json").write_text(json.dumps({"cache_dir": junk, "prompts": ["a", "b"]}))
    assert generate.of_run(tmp_path / lora.FILE_NAME, "cache_dir") == ""
    assert generate.of_run(tmp_path / lora.FILE_NAME, "prompts") == ["a", "b"]


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
        ("scheduler/scheduler_config.json", "num_train_timesteps", -1),
        ("scheduler/scheduler_config.json", "beta_start", float("nan")),
        ("scheduler/scheduler_config.json", "beta_end", "0.012"),
        ("unet/config.json", "layers_per_block", 10**9),
        ("unet/config.json", "addition_time_embed_dim", 3000),
        ("unet/config.json", "class_embed_type", "identity"),
        ("unet/config.json", "block_out_channels", [10**9] * 3),
        ("text_encoder/config.json", "num_hidden_layers", 10**9),
        ("text_encoder_2/config.json", "num_attention_heads", -1),
        ("tokenizer/tokenizer_config.json", "model_max_length", 10**30),
        ("vae/config.json", "scaling_factor", None),
        ("vae/config.json", "scaling_factor", 0),
        ("model_index.json", "force_zeros_for_empty_prompt", "no"),
        ("model_index.json", "_class_name", 3),
        ("model_index.json", "scheduler", ["diffusers", "DiffusionPipeline"]),
        ("model_index.json", "scheduler", ["diffusers", "logging"]),
    ],
)
def test_a_model_whose_files_say_what_cannot_be_is_refused_before_it_is_built(
    tmp_path, part, key, value
):
    shutil.copytree(POCKET, tmp_path / "m")
    name, path, cpu = str(tmp_path / "m"), tmp_path / "m" / part, torch.device("cpu")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    acts = {
        "scheduler": lambda: model.load_noise_schedule(name, cpu),
        "unet": lambda: model.load_unet(name, cpu, torch.float32),
        "vae": lambda: model.latent_scaling(name),
        "model_index.json": lambda: generate.load_pipeline(
            name, model.load_text_encoders(name, cpu), cpu
        ),
    }
    refused(acts.get(part.split("/")[0], lambda: model.load_text_encoders(name, cpu)))


def test_a_unet_made_for_other_embeddings_is_refused():
    unet = make_unet()
    vetting.check_widths(unet, torch.zeros(1, 7, 48), torch.zeros(1, 24))
    for context, pooled in ((47, 24), (48, 25)):
        widths = f"width {context} and {pooled}"
        refused(
            lambda c=context, p=pooled: vetting.check_widths(
                unet, torch.zeros(1, 7, c), torch.zeros(1, p)
            ),
            widths,
            "48 and 24",
        )


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 10**5, b'{"a": ' + b"9" * 9999])
def test_a_configuration_that_is_no_json_object_is_refused(tmp_path, content):
    (tmp_path / "model_index.json").write_bytes(content)
    refused(lambda: hub.fetch(str(tmp_path), ""), "model_index.json is no configuration")


# ---- adapters ------------------------------------------------------------------------------------


def hollow(path: Path, rank: int, width: int) -> Path:
    """A file that claims a rank."""
    names = ("unet.a.to_q.lora_A.weight", "unet.a.to_q.lora_B.weight")
    save_file({names[0]: torch.zeros(rank, width), names[1]: torch.zeros(width, rank)}, path)
    return path


@pytest.mark.parametrize("rank, width", [(10**9, 0), (10**6, 1), (641, 641), (0, 8)])
def test_a_rank_that_would_take_all_memory_is_refused(tmp_path, rank, width):
    refused(lambda: lora.read(hollow(tmp_path / "a.safetensors", rank, width)), f"has rank {rank} ")


@pytest.mark.parametrize(
    "said",
    [
        *({"unet.r": 4, "unet.lora_alpha": a} for a in (0, -6, float("nan"), 1e308, "6", True)),
        {"unet.r": 8, "unet.lora_alpha": 6},
        {"unet.r": 4, "unet.lora_alpha": 10**400},
    ],
)
def test_an_alpha_that_is_no_strength_and_a_rank_that_is_not_the_files_are_refused(tmp_path, said):
    path = tmp_path / "a.safetensors"
    adapter = lora.inject(make_unet(), rank=4, alpha=6)
    tensors = {f"unet.{name}.weight": part.detach().clone() for name, part in adapter.parts()}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(said)})
    refused(lambda: lora.read(path))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn, torch.bool])
def test_numbers_that_are_not_fp32_fp16_or_bf16_are_refused(tmp_path, dtype):
    path = tmp_path / "a.safetensors"
    adapter = lora.inject(make_unet(), rank=4, alpha=4)
    tensors = {f"unet.{name}.weight": part.detach().to(dtype) for name, part in adapter.parts()}
    save_file(tensors, path)
    refused(lambda: lora.read(path), str(dtype)[6:])


def test_an_adapter_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    refused(lambda: lora.read(tmp_path / "a.safetensors"), "not a file")


# ---- checkpoints ---------------------------------------------------------------------------------


def kept(root: Path, content: bytes, step: int = 2) -> Path:
    """A checkpoint whose sum is right, whatever it holds."""
    folder = root / f"{step:06d}"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(content)
    (folder / "state.sha256").write_text(checkpoint.sum_of(content))
    return folder


class Malice:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def packed(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_a_malicious_pickle_with_a_right_sum_does_nothing(tmp_path):
    mark = tmp_path / "done"
    for i, content in enumerate((packed({"step": Malice(mark)}), pickle.dumps(Malice(mark)))):
        kept(tmp_path / str(i), content)
        refused(lambda i=i: checkpoint.newest_state(tmp_path / str(i)), "no state", "rm -r ")
        assert not mark.exists()
    with pytest.raises(FileExistsError):  # and it is malicious: read carelessly, it acts, twice
        for _ in range(2):
            torch.load(io.BytesIO(packed(Malice(mark))), weights_only=False)


def test_a_state_that_unpacks_to_more_than_its_size_is_not_unpacked(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    kept(tmp_path, file.getvalue())
    refused(lambda: checkpoint.newest_state(tmp_path), "is compressed")


GOOD = {"step": 2, "flat": torch.zeros(1), "modules": [], "optimizer": {}, "scale": {}}


@pytest.mark.parametrize(
    "change", [{"step": True}, {"step": 3}, {"flat": [1]}, {"identity": None}, {"modules": "x"}]
)
def test_a_state_of_other_types_or_of_another_step_is_refused(tmp_path, change):
    good = GOOD | {"identity": {}}
    kept(tmp_path / "good", packed(good))
    assert checkpoint.newest_state(tmp_path / "good")["step"] == 2
    kept(tmp_path / "bad", packed(good | change))
    refused(lambda: checkpoint.newest_state(tmp_path / "bad"), "no state that this project saved")
    kept(tmp_path / "less", packed(GOOD))
    refused(lambda: checkpoint.newest_state(tmp_path / "less"), "KeyError")


def test_the_newest_checkpoint_is_that_of_most_steps_whatever_its_name_sorts_as(tmp_path):
    good = GOOD | {"identity": {}}
    for step in (999_999, 1_000_000):
        kept(tmp_path, packed(good | {"step": step}), step)
    (tmp_path / "²").mkdir()
    (tmp_path / "999999999").touch()
    assert checkpoint.newest_state(tmp_path)["step"] == 1_000_000


class OneRun:
    """What states.wrong_numbers() looks at: an adapter of 5,120 numbers, stepped twice."""

    def __init__(self, eight_bit: bool):
        flat = torch.nn.Parameter(torch.randn(5120))
        flat.grad = torch.ones(5120)
        self.config = config.replace(config.RECIPES["pocket"][1], use_8bit_adam=eight_bit)
        self.optimizer = loop.make_optimizer(self.config, flat)
        self.scale, self.adapter = loop.LossScale(False), lora.Adapter({}, flat, 1, 1, (), 1)
        for _ in range(2):
            self.optimizer.step()

    def state(self) -> dict:
        scale = vars(self.scale).copy()
        saved = {"optimizer": self.optimizer.state_dict(), "scale": scale, "step": 2}
        return torch.load(io.BytesIO(packed(saved | {"flat": self.adapter.flat.detach()})))


@pytest.mark.parametrize("eight_bit", [True, False])
def test_moments_of_another_shape_never_reach_the_optimizer(eight_bit):
    """A copy would stretch one number over all; bitsandbytes would read beyond a short one."""
    run = OneRun(eight_bit)
    assert states.wrong_numbers(run, run.state()) == ""
    moments = run.state()["optimizer"]["state"][0]
    at = (
        (lambda s: s["optimizer"]["state"][0]["__bnb_optimizer_quant_state__"])
        if eight_bit
        else (lambda s: s["optimizer"]["state"][0])
    )
    keys = [k for k in at(run.state()) if k != "step"]
    assert len(keys) == (6 if eight_bit else 2) and moments["step"] == 2
    for key in keys:
        for bad in (torch.zeros(1), at(run.state())[key][:-1], None, "x"):
            state = run.state()
            at(state)[key] = bad
            assert key in states.wrong_numbers(run, state)
        state = run.state()
        del at(state)[key]
        assert "it holds" in states.wrong_numbers(run, state)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"flat": torch.zeros(1)}, "flat is float32 [1], not torch.float32 [5120]"),
        ({"flat": torch.full((5120,), float("nan"))}, "flat holds NaN or Inf"),
        ({"scale": {}}, "the loss scale is"),
        ({"optimizer": {}}, "not one parameter"),
        ({"step": 1}, "its optimizer is at step 2"),
    ],
)
def test_a_state_that_this_run_cannot_have_saved_is_named(change, said):
    run = OneRun(True)
    assert said in states.wrong_numbers(run, run.state() | change)


def test_a_run_whose_every_step_was_skipped_has_no_moments_and_goes_on():
    run = OneRun(True)
    state = run.state()
    state["optimizer"]["state"] = {}
    assert "not one parameter" in states.wrong_numbers(run, state)
    state["scale"]["skipped"] = 2
    assert states.wrong_numbers(run, state) == ""


# ---- the cache -----------------------------------------------------------------------------------


def test_a_damaged_or_swapped_cache_file_is_made_anew(tmp_path, capsys):
    def encode(blocks):
        for block in blocks:
            for i in block:
                yield {"mean": torch.full((3,), float(i))}

    keys = [str(i) for i in range(40)]
    files = blocks.fill(tmp_path, "latent", keys, encode)
    good = [file.read_bytes() for file in files]
    header = struct.unpack("<Q", good[0][:8])[0] + 8
    flipped = bytearray(good[0])
    flipped[header + 5] ^= 1
    for bad in (bytes(flipped), good[1], good[0][:-1], b"", good[0].replace(b"F32", b"I32")):
        assert bad != good[0]
        files[0].write_bytes(bad)
        assert blocks.fill(tmp_path, "latent", keys, encode) == files
        assert [file.read_bytes() for file in files] == good
        assert capsys.readouterr().out == f"{files[0]} is damaged and is made anew\n"
    files[0].write_bytes(safetensors_bytes({"mean": torch.ones(3)}, {"kind": "latent"}))
    blocks.fill(tmp_path, "latent", keys, encode)
    assert capsys.readouterr().out == f"{files[0]} is of an earlier version and is made anew\n"
    blocks.fill(tmp_path, "latent", keys, None)  # nothing is left to be encoded
    assert capsys.readouterr().out == ""
