"""Of a model only what is needed is downloaded, and what is no model is refused by its part."""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import model
from conftest import POCKET, ROOT, TINY_SDXL, make_unet
from hub_server import ask_again, serving
from inputs import download, hub
from inputs.files import Refusal
from inputs.sources import read_dataset
from made import RED, cell, model_with, model_with_unet
from sentences import refused

CPU = torch.device("cpu")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize(
    ("files", "half", "picked"),
    [
        (["m.safetensors", "m.fp16.safetensors"], True, ["m.fp16.safetensors"]),
        (["m.safetensors", "m.fp16.safetensors"], False, ["m.safetensors"]),
        (["m.fp16.safetensors"], False, ["m.fp16.safetensors"]),
        (["m.safetensors"], True, ["m.safetensors"]),
        (["m.non_ema.safetensors", "m.safetensors"], False, ["m.safetensors"]),
        (
            [
                "m.fp16-00001-of-00002.safetensors",
                "m.fp16-00002-of-00002.safetensors",
                "m.safetensors",
            ],
            True,
            ["m.fp16-00001-of-00002.safetensors", "m.fp16-00002-of-00002.safetensors"],
        ),
        ([], True, []),
    ],
)
def test_one_variant_of_the_weights_is_picked(files, half, picked):
    assert hub.pick_weights(files, half) == picked


def test_the_base_is_told_by_its_weights_not_by_its_file_format(tmp_path):
    unet, other = make_unet(1), make_unet(2)
    layouts = {
        "fp32": (unet, {}),
        "fp16": (make_unet(1).half(), {"variant": "fp16"}),
        "sharded": (unet, {"max_shard_size": "200KB"}),
    }
    folders = [str(model_with_unet(tmp_path / name, saved)) for name, saved in layouts.items()]
    prints = {hub.unet_fingerprint(folder, half) for folder in folders for half in (False, True)}
    assert len(prints) == 1
    changed = make_unet(1)
    changed.conv_out.weight.data[0, 0, 0, 0] += 0.01
    for name, saved in (("other", other), ("changed", changed)):
        folder = model_with_unet(tmp_path / name, (saved, {}))
        assert hub.unet_fingerprint(str(folder), False) not in prints


def test_an_encoders_fingerprint_changes_with_its_weights_and_with_its_config(tmp_path):
    before = hub.fingerprint(str(TINY_SDXL), "vae")
    same = model_with(tmp_path / "same", "vae")
    assert hub.fingerprint(str(same), "vae") == before  # not by place or date
    weights = model_with(tmp_path / "weights", "vae")
    file = weights / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({k: w * 1.01 for k, w in load_file(file).items()}, file)
    config = model_with(tmp_path / "config", "vae")
    with open(config / "vae" / "config.json", "a") as f:
        f.write("\n")
    prints = {before, *(hub.fingerprint(str(m), "vae") for m in (weights, config))}
    assert len(prints) == 3
    parts = ("text_encoder", "text_encoder_2")
    assert len({hub.fingerprint(str(TINY_SDXL), part) for part in parts}) == 2


# ---- from the Hub --------------------------------------------------------------------------------

SDXL_BASE_FILES = """
.gitattributes 01.png LICENSE.md README.md comparison.png model_index.json pipeline.png
scheduler/scheduler_config.json
sd_xl_base_1.0.safetensors sd_xl_base_1.0_0.9vae.safetensors
sd_xl_offset_example-lora_1.0.safetensors
text_encoder/config.json text_encoder/flax_model.msgpack text_encoder/model.fp16.safetensors
text_encoder/model.onnx text_encoder/model.safetensors text_encoder/openvino_model.bin
text_encoder/openvino_model.xml text_encoder/pytorch_model.bin text_encoder/pytorch_model.fp16.bin
text_encoder_2/config.json text_encoder_2/flax_model.msgpack text_encoder_2/model.fp16.safetensors
text_encoder_2/model.onnx text_encoder_2/model.onnx_data text_encoder_2/model.safetensors
text_encoder_2/openvino_model.bin text_encoder_2/openvino_model.xml
tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json
tokenizer/vocab.json
tokenizer_2/merges.txt tokenizer_2/special_tokens_map.json tokenizer_2/tokenizer_config.json
tokenizer_2/vocab.json
unet/config.json unet/diffusion_flax_model.msgpack
unet/diffusion_pytorch_model.fp16.safetensors unet/diffusion_pytorch_model.safetensors
unet/diffusion_pytorch_model.bin unet/model.onnx unet/model.onnx_data unet/openvino_model.bin
unet/openvino_model.xml
vae/config.json vae/diffusion_flax_model.msgpack vae/diffusion_pytorch_model.fp16.safetensors
vae/diffusion_pytorch_model.safetensors
vae_1_0/config.json vae_1_0/diffusion_pytorch_model.fp16.safetensors
vae_1_0/diffusion_pytorch_model.safetensors
vae_decoder/config.json vae_decoder/model.onnx vae_decoder/openvino_model.bin
vae_encoder/config.json vae_encoder/model.onnx vae_encoder/openvino_model.bin
""".split()
SHARDED_FILES = """
README.md model_index.json model.safetensors unet/config.json
unet/diffusion_pytorch_model-00001-of-00002.safetensors
unet/diffusion_pytorch_model-00002-of-00002.safetensors
unet/diffusion_pytorch_model.safetensors.index.json
unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors
unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors
unet/diffusion_pytorch_model.safetensors.index.fp16.json
""".split()
HUB_NAME = "someone/sdxl"
INDEX = (POCKET / "model_index.json").read_bytes()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub for the real clients; push() and fail() say what it holds and how it answers."""
    with serving(monkeypatch, tmp_path / "here") as server:
        yield server


def dummies(names: list[str]) -> dict[str, bytes]:
    """Files of these names, no two alike: equal ones would be downloaded once."""
    return {name: name.encode() for name in names} | {"model_index.json": INDEX}


def as_pushed(files: dict[str, bytes], root: Path) -> set[str]:
    """Which of the files lie below `root`; each as it was pushed."""
    here = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
    assert all(path.read_bytes() == files[name] for name, path in here.items())
    return {*here}


@pytest.mark.parametrize("half", [True, False])
def test_only_a_parts_small_files_and_one_variant_are_downloaded(server, half):
    v = ".fp16" if half else ""
    tokenizer = {"merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"}
    want = {
        "": set(),
        "unet": {"config.json", f"diffusion_pytorch_model{v}.safetensors"},
        "vae": {"config.json", f"diffusion_pytorch_model{v}.safetensors"},
        "text_encoder": {"config.json", f"model{v}.safetensors"},
        "text_encoder_2": {"config.json", f"model{v}.safetensors"},
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "scheduler": {"scheduler_config.json"},
    }
    files, there = dummies(SDXL_BASE_FILES), {"model_index.json"}
    commit = server.push(HUB_NAME, files)
    for part in ("", *hub.PARTS):
        folder = hub.fetch(HUB_NAME, part, half)
        root = folder.parent if part else folder
        assert root.name == commit == hub.commit_of(HUB_NAME)
        there |= {f"{part}/{file}" for file in want[part]}
        assert as_pushed(files, root) == there


@pytest.mark.parametrize("half", [True, False])
def test_all_shards_of_one_variant_are_downloaded(server, half):
    files = dummies(SHARDED_FILES)
    server.push(HUB_NAME, files)
    got = as_pushed(files, hub.fetch(HUB_NAME, "unet", half).parent)
    weights = {f for f in got if f.endswith(".safetensors")}
    assert len(weights) == 2 and all((".fp16" in f) == half for f in weights)
    assert {"model_index.json", "unet/config.json"} <= got and "model.safetensors" not in got


@pytest.mark.parametrize(
    ("way", "files"),
    [
        ("away", SHARDED_FILES),
        *((way, SDXL_BASE_FILES) for way in ("away", "offline", 503, 401, "portal")),
    ],
)
def test_what_was_downloaded_serves_without_the_hub_and_that_is_said(
    server, monkeypatch, capsys, files, way
):
    commit = server.push(HUB_NAME, dummies(files))
    first = hub.fetch(HUB_NAME, "unet", half=True)
    ask_again()
    if way == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    elif way == "away":
        server.stop()
    else:
        server.fail("/", way)
    assert hub.fetch(HUB_NAME, "unet", half=True) == first
    said = capsys.readouterr().err
    assert f"{HUB_NAME} is taken as downloaded before, commit {commit}" in said
    part = "text_encoder" if files is SDXL_BASE_FILES else "unet"
    with pytest.raises(Refusal, match=rf"someone/sdxl \({part}\) did not come"):
        hub.fetch(HUB_NAME, part, half=False)  # was never downloaded


@pytest.mark.parametrize("lost", [0, 1])
def test_fp32_files_serve_for_half_without_the_hub_but_no_part_of_them(server, capsys, lost):
    server.push(HUB_NAME, dummies(SHARDED_FILES))
    folder = hub.fetch(HUB_NAME, "unet", half=False)
    for shard in sorted(folder.glob("*.safetensors"))[:lost]:
        shard.unlink()
    ask_again()
    server.stop()
    if lost:
        refused(lambda: hub.fetch(HUB_NAME, "unet", half=True), "ConnectError")
    else:
        assert hub.fetch(HUB_NAME, "unet", half=True) == folder
        assert "ConnectError" in (said := capsys.readouterr().err) and "is taken" in said


def test_the_commit_is_resolved_once_and_every_part_is_of_it(server):
    old, new = (dummies([*SDXL_BASE_FILES]) for _ in range(2))
    new["unet/config.json"] = new["vae/config.json"] = b"{}"
    first = server.push(HUB_NAME, old)
    pushed = []
    server.after = lambda path: pushed or pushed.append(server.push(HUB_NAME, new))
    (root,) = {hub.fetch(HUB_NAME, part).parent for part in hub.PARTS}
    taken = {first: old, pushed[0]: new}[root.name]
    assert {"unet/config.json", "vae/config.json"} < as_pushed(taken, root)
    ask_again()
    assert hub.commit_of(HUB_NAME) == pushed[0]  # main, as it is by now
    ask_again()
    hub.use_revision(HUB_NAME, first)
    assert hub.commit_of(HUB_NAME) == first
    ask_again()
    hub.use_revision(HUB_NAME, "v9")
    with pytest.raises(Refusal, match=r"404 Invalid rev id: v9.*correct the name, or --revision"):
        hub.fetch(HUB_NAME, "unet")


@pytest.mark.parametrize(
    ("name", "words"),
    [(HUB_NAME, "has no model_index.json"), ("some one/sdxl", "HFValidationError")],
)
def test_a_repository_that_is_no_model_and_a_name_of_none_are_refused(server, name, words):
    server.push(HUB_NAME, {"sdxl.safetensors": b"x"})
    refused(lambda: hub.fetch(name, "unet"), name, words, "correct --pretrained-model-name-or-path")


def test_of_a_model_of_another_family_nothing_more_is_downloaded(server):
    other = {"model_index.json": b'{"_class_name": "StableDiffusionPipeline"}'}
    server.push(HUB_NAME, dummies(SDXL_BASE_FILES) | other)
    refused(lambda: hub.fetch(HUB_NAME, "vae"), "a model_index.json of StableDiffusionPipeline")
    brought = [each for each in server.asked if "/resolve/" in each]
    assert brought and all(each.endswith("/model_index.json") for each in brought)


def test_a_revision_of_a_folder_is_refused():
    with pytest.raises(Refusal, match=r"--revision main with .*on this disk.*leave --revision"):
        hub.use_revision(str(POCKET), "main")


REASONS = {
    "wrong name": (401, "401 Invalid username or password", "check the name", "hf auth login"),
    "gated": (403, "403 Access to this repository is restricted", "/someone/sdxl, then hf auth"),
    "old token": ("invalid token", "Invalid credentials", "HF_TOKEN", "hf auth login"),
    "too many": (429, "429 We had to rate limit you", "wait some minutes", "hf auth login"),
    "down": (503, "503 Service unavailable", "try again in some minutes"),
    "hotel": ("portal", "a web page answers in the Hub's place", "in a browser"),
    "no answer": ("hang", "the Hub gives no answer: ReadTimeout", "check the network"),
    "no network": ("away", "ConnectError: [Errno 111]", "check the network"),
    "dead proxy": ("proxy", "ConnectError", "check the network, and HTTPS_PROXY where it is set"),
    "switched off": ("offline", "OfflineMode", "unset HF_HUB_OFFLINE"),
}


def hinder(server, monkeypatch, kind: str | int) -> None:
    """The Hub as REASONS has it."""
    monkeypatch.setattr(download, "READ", 0.3)
    if kind == "away":
        server.stop()
    elif kind == "proxy":
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        huggingface_hub.close_session()
    elif kind == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    else:
        server.fail("/", kind)


@pytest.mark.parametrize(
    ("later", "reason"),
    [
        *((False, reason) for reason in REASONS),
        (True, "gated"),
        (True, "no answer"),
        (True, "down"),
    ],
)
def test_the_first_error_is_told_with_what_to_do_about_it(server, monkeypatch, reason, later):
    kind, *words = REASONS[reason]
    server.push(HUB_NAME, dummies(SDXL_BASE_FILES))
    if later:  # once the repository is known, while its weights come
        hub.fetch(HUB_NAME, "")
    hinder(server, monkeypatch, kind)
    began = time.monotonic()
    way_out = "copy the model here and pass --pretrained-model-name-or-path FOLDER"
    part = "unet" if later else "model_index.json"
    refused(lambda: hub.fetch(HUB_NAME, "unet"), f"{HUB_NAME} ({part})", way_out, *words)
    assert time.monotonic() - began < 5
    assert not [*(Path(huggingface_hub.constants.HF_HUB_CACHE)).rglob("*.incomplete")]


@pytest.mark.parametrize("reason", REASONS)
def test_a_data_set_that_does_not_come_is_told_with_the_first_error(server, monkeypatch, reason):
    kind, *words = REASONS[reason]
    hinder(server, monkeypatch, kind)
    began = time.monotonic()
    words = [word.replace("/someone/", "/datasets/someone/") for word in words]
    name = "someone/sdxl"
    refused(lambda: read_dataset(name), f"the data set {name}", "--dataset-name FOLDER", *words)
    assert time.monotonic() - began < 8


def test_a_404_is_an_answer_of_the_hub_only_where_it_says_that_a_file_is_not_there():
    head, request = {"X-Error-Code": "EntryNotFound"}, SimpleNamespace(url="http://a/b")
    answer = SimpleNamespace(status_code=404, reason_phrase="Not Found", headers=head)
    assert download.of_answer(request, answer) is None
    head.clear()
    told = "the Hub answers 404 Not Found for http://a/b"
    assert download.of_answer(request, answer) == (told, download.STATUS[404])


def test_what_the_client_asks_about_itself_is_no_reason(server):
    server.fail("/api/agent-harnesses", 401)
    server.fail("/api/telemetry", 503)

    def ask():
        for path in ("agent-harnesses", "telemetry/x"):
            assert huggingface_hub.get_session().get(f"{server.url}/api/{path}").is_error
        return huggingface_hub.HfApi().model_info("someone/else")

    act = functools.partial(download.asked, "model", "someone/else", "it", "a way", ask)
    refused(act, "the Hub answers 401 Invalid", "/api/models/someone/else")
    assert len(download.failures) == 1


def test_a_request_waits_so_long_and_no_longer_and_is_tried_twice(server):
    request, good = SimpleNamespace(url=f"{server.url}/x", extensions={}), SimpleNamespace()
    good.headers, good.status_code = {}, 200
    assert download.watched(lambda request: good)(request) is good
    waits = request.extensions["timeout"]
    assert (waits["connect"], waits["read"]) == (10, 30)
    server.fail("/resolve/", 503)
    server.push(HUB_NAME, dummies(["model_index.json"]))
    refused(lambda: hub.fetch(HUB_NAME, ""), "the Hub answers 503")
    assert len([each for each in server.asked if "/resolve/" in each]) == 2


LARGE = bytes(range(256)) * 1000  # as LFS keeps it
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def test_a_download_that_is_cut_off_goes_on_where_it_was(server):
    files = dummies(["unet/config.json"]) | {WEIGHTS: LARGE}
    server.push(HUB_NAME, files)
    server.fail("/cdn/", "cut", 2)
    folder = hub.fetch(HUB_NAME, "unet")
    assert as_pushed(files, folder.parent) == {*files}
    assert sum(each.startswith("GET /cdn/") for each in server.asked) == 3


def test_what_is_downloaded_is_said_once_and_of_the_files_that_are_taken(server, capsys):
    sizes = {"unet": 100, "text_encoder": 2, "vae": 90}  # times LARGE; of fp16 half, but the VAE
    files = dummies([f"{part}/config.json" for part in sizes])
    for part, size in sizes.items():
        stem = f"{part}/{'model' if 'text' in part else 'diffusion_pytorch_model'}"
        files[f"{stem}.safetensors"] = size * LARGE
        files[f"{stem}.fp16.safetensors"] = size // 2 * LARGE
    server.push(HUB_NAME, files)
    before = download.received[0]
    for part, half in (("text_encoder", True), ("unet", True), ("vae", False)):
        hub.fetch(HUB_NAME, part, half)
    each_once = (1 + 50 + 90) * len(LARGE)
    assert download.received[0] - before == pytest.approx(each_once, rel=1e-3)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"0.04 GB of {HUB_NAME} (unet 0.01, vae 0.02) into" in said[0]


def test_a_slow_download_says_where_it_stands_and_is_waited_for(server, monkeypatch, capsys):
    monkeypatch.setattr(download, "SAY", 0.2)
    monkeypatch.setattr(download, "GIVE_UP", 2.0)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 2**13)
    files = dummies(["unet/config.json"]) | {WEIGHTS: 10 * LARGE}
    server.push(HUB_NAME, files)
    server.fail("/cdn/", "drip")
    server.pieces = (100_000, 0.1)
    hub.fetch(HUB_NAME, "unet")
    said = capsys.readouterr().err
    assert f"downloading 0.00 GB of {HUB_NAME}" in said and "GB are free" in said
    assert f"{HUB_NAME}: 0.00 of 0.00 GB are here" in said and "no byte" not in said


def test_a_download_that_stands_still_is_said_and_then_refused(server, monkeypatch, capsys):
    monkeypatch.setattr(download, "QUIET", 0.5)
    monkeypatch.setattr(download, "GIVE_UP", 2.0)
    files = dummies(["unet/config.json"]) | {WEIGHTS: LARGE}
    server.push(HUB_NAME, files)
    server.fail("/cdn/", "drip")
    server.pieces = (100_000, 60)
    words = ("no byte in 2.0 s", "HF_HUB_DISABLE_XET=1", "FOLDER")
    refused(lambda: hub.fetch(HUB_NAME, "unet"), f"{HUB_NAME} (unet)", *words)
    assert "no byte came for 0.5 s; if it stays so: HF_HUB_DISABLE_XET=1" in capsys.readouterr().err


HANGING = """
import os, signal, sys, threading
from concurrent.futures import ThreadPoolExecutor
from inputs import download
from inputs.files import Refusal

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it

def call():
    if sys.argv[1] == "Ctrl-C":
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(threading.Event().wait)  # as a library's thread that nothing wakes

download.GIVE_UP = 1 if sys.argv[1] == "give up" else 300
try:
    download.asked("model", "a/b", "a/b", "another", call)
except (Refusal, KeyboardInterrupt) as error:
    print(type(error).__name__)
    sys.exit(1)
"""


@pytest.mark.parametrize(
    ("way", "code", "said"), [("give up", 1, "Refusal"), ("Ctrl-C", 130, "KeyboardInterrupt")]
)
def test_a_download_that_hangs_does_not_keep_the_process(way, code, said):
    command = [sys.executable, "-c", HANGING, way]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout.strip()) == (code, said)


@pytest.fixture
def data_set(server, tmp_path) -> str:
    """A data set of two parquet files, of which its README takes one. Returns its commit."""
    table = datasets.Dataset.from_dict({"image": [cell(RED)], "text": ["a"]})
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "made.parquet")
    made = (tmp_path / "made.parquet").read_bytes()
    readme = b"---\nconfigs:\n- config_name: default\n  data_files: data/a.parquet\n---\n"
    files = {"README.md": readme, "data/a.parquet": made, "more/b.parquet": made + b"x"}
    return server.push("datasets/someone/ink", files)


def test_a_data_sets_commit_and_size_are_said_before_it_comes_and_not_again(
    server, data_set, capsys
):
    assert len(read_dataset("someone/ink")) == 1
    told = f"downloading 0.00 GB of the data set someone/ink at commit {data_set}, 1 files, into "
    said = capsys.readouterr().err
    assert said.count(told) == 1 and "GB are free" in said
    assert not any("more/b.parquet" in each for each in server.asked)
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)  # the tables made of it are left
    for away in (False, True):
        if away:
            server.stop()
        assert len(read_dataset("someone/ink")) == 1
        assert "downloading" not in capsys.readouterr().err


def test_a_data_set_that_the_disk_has_no_room_for_is_refused_before_it_comes(
    server, data_set, monkeypatch
):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    words = (
        f"this needs 0.00 GB of the data set someone/ink at commit {data_set}",
        "HF_HUB_CACHE=",
    )
    refused(lambda: read_dataset("someone/ink"), *words, "pass --dataset-name FOLDER")
    assert not any(each.endswith("/data/a.parquet") for each in server.asked)


def test_a_model_that_the_disk_has_no_room_for_is_refused_before_it_is_begun(server, monkeypatch):
    files = dummies(["unet/config.json", "vae/config.json"])
    files |= {WEIGHTS: 8 * LARGE, WEIGHTS.replace("unet", "vae"): 40 * LARGE}
    server.push(HUB_NAME, files)
    usage = shutil.disk_usage("/")._replace(free=5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    words = (f"0.01 GB of {HUB_NAME} (vae 0.01)", "where 0.01 GB are free", "HF_HUB_CACHE=")
    refused(lambda: hub.fetch(HUB_NAME, "unet"), *words)
    assert not any("/cdn/" in each for each in server.asked)


def hub_cache(folder: Path, parts: tuple[str, ...] = hub.PARTS) -> None:
    """A Hub cache with the pocket model in it under HUB_NAME, as an early client left it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = folder / ("models--" + HUB_NAME.replace("/", "--"))
    snapshot = repo / "snapshots" / commit
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for part in parts:
        shutil.copytree(POCKET / part, snapshot / part)
    shutil.copy(POCKET / "model_index.json", snapshot / "model_index.json")


@pytest.fixture
def empty_hub_cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_what_an_early_client_downloaded_serves_without_a_network(empty_hub_cache):
    hub_cache(empty_hub_cache)
    assert hub.fetch(HUB_NAME, "unet").is_relative_to(empty_hub_cache)
    assert hub.unet_fingerprint(HUB_NAME, False) == hub.unet_fingerprint(str(POCKET), False)
    here, there = (hub.encoder_fingerprints(name, False) for name in (HUB_NAME, str(POCKET)))
    assert here == there
    model.load_noise_schedule(HUB_NAME, CPU)


def test_a_part_that_was_never_downloaded_is_refused_by_name(empty_hub_cache):
    hub_cache(empty_hub_cache, ("unet", "scheduler"))
    assert hub.fetch(HUB_NAME, "unet").is_dir()
    with pytest.raises(Refusal, match=r"someone/sdxl \(.*vae\)"):
        model.load_vae(HUB_NAME, CPU)


# ---- what is no model ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nowhere", "./org/name", "/no/such/folder", "a/b/c", "~/nowhere"])
def test_a_name_that_is_neither_folder_nor_hub_name_is_refused(name):
    with pytest.raises(Refusal, match=f"there is no folder {name}"):
        hub.fetch(name, "unet")


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(Refusal, match=r"has no model_index\.json") as refusal:
        hub.fetch(str(tmp_path), "unet")
    assert str(tmp_path) in str(refusal.value) and "a .safetensors file that holds all" in str(
        refusal.value
    )


def test_a_model_of_another_kind_is_refused(tmp_path):
    folder = model_with(tmp_path / "m", _class_name="StableDiffusionPipeline")
    with pytest.raises(Refusal, match="StableDiffusionPipeline"):
        hub.fetch(str(folder), "unet")


@pytest.mark.parametrize(
    ("entries", "kind"),
    [
        ({"_class_name": "StableDiffusionXLInpaintPipeline"}, "an inpainting model"),
        ({"text_encoder": [None, None]}, "the refiner"),
    ],
)
def test_inpainting_models_and_the_refiner_are_told_before_anything_more_comes(
    tmp_path, server, entries, kind
):
    folder = model_with(tmp_path / "m", **entries)
    refused(lambda: hub.fetch(str(folder), ""), kind, "correct --pretrained-model-name-or-path")
    index = (folder / "model_index.json").read_bytes()
    server.push(HUB_NAME, dummies(SDXL_BASE_FILES) | {"model_index.json": index})
    refused(lambda: hub.fetch(HUB_NAME, "unet"), kind)
    brought = [each for each in server.asked if "/resolve/" in each]
    assert brought and all(each.endswith("/model_index.json") for each in brought)


def test_a_unet_of_more_channels_is_told_before_it_is_built(tmp_path):
    folder = shutil.copytree(POCKET, tmp_path / "m")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 9}))
    refused(lambda: LOADERS["unet"](str(folder)), "has in_channels 9", "9 is an inpainting model")


@pytest.mark.parametrize("content", ["", "{", "[]", '"StableDiffusionXLPipeline"'])
def test_a_damaged_model_index_is_refused(tmp_path, content):
    folder = model_with(tmp_path / "m")
    (folder / "model_index.json").write_text(content)
    with pytest.raises(Refusal, match=r"model_index\.json"):
        hub.fetch(str(folder), "unet")


LOADERS = {
    "unet": lambda name: model.load_unet(name, CPU, torch.float32),
    "vae": lambda name: model.load_vae(name, CPU),
    "text_encoder": lambda name: model.load_text_encoders(name, CPU),
    "text_encoder_2": lambda name: model.load_text_encoders(name, CPU),
    "tokenizer": lambda name: model.load_tokenizers(name),
    "tokenizer_2": lambda name: model.load_tokenizers(name),
    "scheduler": lambda name: model.load_noise_schedule(name, CPU),
}
WEIGHTY = ("unet", "vae", "text_encoder")  # text_encoder_2 is read by the same lines


@pytest.mark.parametrize("part", hub.PARTS)
def test_a_missing_and_an_empty_part_are_refused_by_name(tmp_path, part):
    folder = model_with(tmp_path / "m")
    (folder / part).unlink()
    with pytest.raises(Refusal, match=f"has no .*{part}/"):
        LOADERS[part](str(folder))
    (folder / part).mkdir()
    with pytest.raises(Refusal, match=part):
        LOADERS[part](str(folder))


def weight_file(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


@pytest.mark.parametrize("part", WEIGHTY)
def test_a_part_without_weights_is_refused_by_name(tmp_path, part):
    folder = model_with(tmp_path / "m", part)
    weight_file(folder, part).unlink()
    with pytest.raises(Refusal, match=rf"{part} has no \.safetensors"):
        LOADERS[part](str(folder))


@pytest.mark.parametrize("part", WEIGHTY)
def test_a_part_without_config_is_refused_by_name(tmp_path, part):
    folder = model_with(tmp_path / "m", part)
    (folder / part / "config.json").unlink()
    with pytest.raises(Refusal, match=part):
        LOADERS[part](str(folder))


@pytest.mark.parametrize("part", WEIGHTY)
def test_weights_cut_short_are_refused_with_their_folder(tmp_path, part):
    folder = model_with(tmp_path / "m", part)
    file = weight_file(folder, part)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(Refusal, match=str(folder / part)):
        LOADERS[part](str(folder))


@pytest.mark.parametrize("part", WEIGHTY)
def test_weights_that_lack_a_tensor_are_refused_with_its_name(tmp_path, part):
    folder = model_with(tmp_path / "m", part)
    file = weight_file(folder, part)
    weights = load_file(file)
    lost = sorted(key for key in weights if key.endswith("weight"))[-1]
    del weights[lost]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(Refusal) as refusal:
        LOADERS[part](str(folder))
    said = str(refusal.value)
    assert str(folder / part) in said and lost.removeprefix("text_model.") in said


@pytest.mark.parametrize("part", WEIGHTY)
def test_weights_of_another_shape_than_the_config_says_are_refused(tmp_path, part):
    folder = model_with(tmp_path / "m", part)
    file = weight_file(folder, part)
    weights = load_file(file)
    key = max(weights, key=lambda k: weights[k].numel())
    weights[key] = weights[key][:-1].clone()
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(Refusal, match=str(folder / part)):
        LOADERS[part](str(folder))
