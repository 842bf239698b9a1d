"""The commands on a model and a data set of the Hub, through the real clients: what people meet
with it, and without it.
"""

import json
import shutil
import time

import datasets
import pytest
from safetensors.torch import load_file, save_file

from conftest import POCKET
from hub_server import ask_again, serving
from inputs import hub, options
from inputs.sources import read_dataset
from keep import drawing, identity
from stress.case import sentence_is_whole

pytestmark = pytest.mark.slow

NAME = "someone/sdxl"
OTHERS = """
.gitattributes 01.png LICENSE.md README.md comparison.png sd_xl_base_1.0.safetensors
sd_xl_base_1.0_0.9vae.safetensors sd_xl_offset_example-lora_1.0.safetensors
text_encoder/flax_model.msgpack text_encoder/model.onnx text_encoder/openvino_model.bin
text_encoder/openvino_model.xml text_encoder/pytorch_model.bin text_encoder_2/flax_model.msgpack
text_encoder_2/model.onnx text_encoder_2/model.onnx_data text_encoder_2/openvino_model.bin
unet/diffusion_flax_model.msgpack unet/diffusion_pytorch_model.bin unet/model.onnx
unet/model.onnx_data unet/openvino_model.bin unet/openvino_model.xml
vae/diffusion_flax_model.msgpack vae_1_0/config.json vae_1_0/diffusion_pytorch_model.safetensors
vae_decoder/config.json vae_decoder/model.onnx vae_encoder/config.json vae_encoder/model.onnx
""".split()
REPOSITORY = "datasets/someone/ink"
PARQUET = "data/train-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def model_files(tmp_path_factory) -> dict:
    """The pocket model laid out as SDXL base's repository is."""
    files = {p.relative_to(POCKET).as_posix(): p for p in POCKET.rglob("*") if p.is_file()}
    folder = tmp_path_factory.mktemp("fp16")
    for path in [path for path in files if path.endswith(".safetensors")]:
        half = {key: each.half() for key, each in load_file(files[path]).items()}
        variant = path.replace(".safetensors", ".fp16.safetensors")
        save_file(half, folder / variant.replace("/", "-"), {"format": "pt"})
        files[variant] = folder / variant.replace("/", "-")
    return files | dict.fromkeys(OTHERS, b"nobody needs this")


@pytest.fixture
def server(monkeypatch, tmp_path, model_files):
    with serving(monkeypatch, tmp_path / "here") as server:
        server.commit = server.push(NAME, model_files)
        yield server


@pytest.fixture
def said(capsys):
    """said(): what was printed since, on stdout and stderr together."""

    def said() -> str:
        return "".join(capsys.readouterr())

    return said


FROM_HUB = ("--pretrained-model-name-or-path", NAME)


def files_brought(server) -> set[str]:
    """The files that were asked for whole, by their names."""
    known = {path: f"/resolve/{server.commit}/{path}" for path in server.repos[NAME][server.commit]}
    return {path for path, url in known.items() if any(url in each for each in server.asked)}


def test_a_run_brings_only_what_it_needs_and_goes_on_and_draws_while_the_hub_is_away(
    server, train, tmp_path, said
):
    assert train("a", *FROM_HUB, "--max-train-steps", "2") == 0
    assert said().count(f"downloading 0.02 GB of {NAME} (unet 0.01)") == 1
    brought = files_brought(server)
    assert not brought & {*OTHERS} and not any(".fp16" in path for path in brought)
    assert {f"{part}/{main}" for part, main in hub.PARTS.items()} < brought
    assert json.loads((tmp_path / "a" / "config.json").read_text())["base_commit"] == server.commit
    server.stop()
    ask_again()
    assert train("a", *FROM_HUB) == 0  # 4 steps
    assert "continuing after step 2" in said()
    ask_again()
    draw = [str(tmp_path / "a"), "--prompts", "red apple", "--num-inference-steps", "1"]
    assert drawing.main([*draw, "--resolution", "64"]) == 0
    assert len([*(tmp_path / "a" / "pictures").glob("*.png")]) == 1
    assert train("local", FROM_HUB[0], str(POCKET)) == 0
    ends = [(tmp_path / name / "kohya" / f"{name}.safetensors") for name in ("a", "local")]
    a, b = map(load_file, ends)
    assert all(a[key].equal(b[key]) for key in b)


@pytest.fixture
def data_set(server, few, tmp_path) -> str:
    """Six drawings as a data set of the Hub: one parquet file with pictures and texts."""
    rows = [json.loads(line) for line in (few / "metadata.jsonl").read_text().splitlines()]
    cells = [{"bytes": (few / row["file_name"]).read_bytes(), "path": None} for row in rows]
    columns = {"image": cells, "text": [row["text"] for row in rows]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict(columns, features)
    table.to_parquet(tmp_path / "made.parquet")
    readme = f"---\nconfigs:\n- config_name: default\n  data_files: {PARQUET}\n---\n".encode()
    content = {"README.md": readme, PARQUET: (tmp_path / "made.parquet").read_bytes()}
    server.push(REPOSITORY, content)
    return "someone/ink"


def test_a_data_set_of_the_hub_is_trained_on_and_serves_while_the_hub_is_away(
    server, data_set, few, train, said
):
    assert train("a", "--dataset-name", data_set, "--max-train-steps", "1") == 0
    commit = next(iter(server.repos[REPOSITORY]))
    assert f"GB of the data set {data_set} at commit {commit}, 1 files, into" in said()
    server.stop()
    here, there = (read_dataset(name) for name in (str(few), data_set))
    assert [(p.digest, p.captions) for p in here] == [(p.digest, p.captions) for p in there]
    said()
    assert train("a", "--dataset-name", data_set, "--max-train-steps", "2") == 0
    assert "continuing after step 1" in said()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (("/api/models", 401), "check the name; for a private or gated one ask for access on"),
        (("unet/", 403), "someone/sdxl, then hf auth login"),
        (("/cdn/", 503), "the Hub answers 503 Service unavailable"),
        (("/api/models", "portal"), "a web page answers in the Hub's place"),
    ],
)
def test_a_run_whose_model_does_not_come_ends_with_the_first_error(
    server, train, said, fault, words
):
    server.fail(*fault)
    assert train("a", *FROM_HUB) == 1
    last = said().splitlines()[-1]
    assert last.startswith(f"error: {NAME} (") and words in last
    sentence_is_whole(last)


def test_without_a_network_a_mistyped_name_is_answered_within_seconds(server, train, said):
    server.stop()
    mistyped = ("--dataset-name", "my/pictuers"), ("--pretrained-model-name-or-path", "my/modle")
    for option in mistyped:
        began = time.monotonic()
        assert train("a", *option) == 1
        assert time.monotonic() - began < 8
        last = said().splitlines()[-1]
        assert f"{option[1]} (" in last and "ConnectError" in last and f"{option[0]} FOLDER" in last


def test_a_run_and_its_drawing_keep_the_commit_that_it_began_with(
    server, train, tmp_path, said, model_files
):
    def commit_of_run() -> str:
        return json.loads((tmp_path / "a" / "config.json").read_text())["base_commit"]

    assert train("a", *FROM_HUB, "--max-train-steps", "2") == 0
    assert f"{NAME} at commit {server.commit}" in said()
    changed = load_file(model_files["unet/diffusion_pytorch_model.safetensors"])
    changed["conv_in.weight"] += 0.1
    save_file(changed, tmp_path / "unet.safetensors", {"format": "pt"})
    moved = {"unet/diffusion_pytorch_model.safetensors": tmp_path / "unet.safetensors"}
    newer = server.push(NAME, model_files | moved)
    ask_again()
    assert train("a", *FROM_HUB, "--max-train-steps", "3") == 0
    assert commit_of_run() == server.commit
    draw = [str(tmp_path / "a"), "--prompts", "red apple", "--num-inference-steps", "1"]
    for commit in ((), ("--revision", server.commit)):  # of config.json, then as asked for
        ask_again()
        assert drawing.main([*draw, "--resolution", "64", *commit]) == 0
    ask_again()
    alone = shutil.copy(tmp_path / "a" / "pytorch_lora_weights.safetensors", tmp_path)
    draw[0] = str(alone)
    assert drawing.main([*draw, "--resolution", "64"]) == 0  # of the file's header
    said()
    ask_again()
    assert drawing.main([*draw, "--resolution", "64", "--revision", "main"]) == 1
    assert "was trained on someone/sdxl" in said()
    ask_again()
    shutil.rmtree(tmp_path / "here" / "hub")
    server.fail("/", 503)
    assert drawing.main([*draw, "--resolution", "64"]) == 1
    last = said().splitlines()[-1]
    assert (
        f"its base is {NAME}: {NAME} (model_index.json) did not come: the Hub answers 503" in last
    )
    assert server.commit in last  # which was asked for
    sentence_is_whole(last)
    server.faults.clear()
    ask_again()
    assert train("a", *FROM_HUB, "--revision", "main") == 1
    assert "holds a run with base " in said()
    ask_again()
    assert train("b", *FROM_HUB, "--revision", newer, "--plain") == 0
    assert hub.commit_of(NAME) == newer
    assert train("c", "--revision", "main") == 1
    assert "leave --revision out" in said()


@pytest.mark.parametrize(
    ("begun", "asked_for", "taken"),
    [
        (None, "", "main"),
        (None, "v1", "v1"),
        ({"revision": ""}, "", "abc"),
        ({"revision": "v1"}, "v1", "abc"),
        ({"revision": "v1"}, "", "abc"),
        ({"revision": ""}, "main", "main"),
        ({"revision": "v1"}, "v2", "v2"),
        ({"revision": "", "pretrained_model_name_or_path": "other/model"}, "", "main"),
    ],
)
def test_a_begun_run_goes_on_with_its_commit_unless_another_revision_is_asked_for(
    tmp_path, begun, asked_for, taken
):
    if begun:
        told = {"pretrained_model_name_or_path": NAME, "base_commit": "abc"} | begun
        (tmp_path / "config.json").write_text(json.dumps(told))
    words = ["t4", *FROM_HUB, "--output-dir", str(tmp_path), "--revision", asked_for]
    assert (identity.revision(options.parse(words)) or "main") == taken
