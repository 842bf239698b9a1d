"""Another VAE than the model's own: the same numbers from each layout, in training and drawing; it
is part of what a run is; and what is no VAE of SDXL's is refused.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import lora
import model
from adapters import files
from conftest import SDXL, TINY_SDXL
from hub_server import ask_again, serving
from inputs import hub, one_file
from inputs.files import Refusal
from keep import drawing
from made import assert_same_weights
from one_file_names import checkpoint
from runs import adapter

CPU, PREFIX = torch.device("cpu"), one_file.PREFIXES["vae"]
WEIGHTS = "diffusion_pytorch_model.safetensors"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The pocket's configurations stand where SDXL base's do."""
    monkeypatch.setattr(one_file, "SHIPPED", TINY_SDXL)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """One VAE, not quite the pocket's, in every form that is read."""
    top = tmp_path_factory.mktemp("vaes")
    shutil.copytree(TINY_SDXL / "vae", top / "folder")
    weights = {key: 1.02 * each for key, each in load_file(TINY_SDXL / "vae" / WEIGHTS).items()}
    save_file(weights, top / "folder" / WEIGHTS, {"format": "pt"})
    save_file({"x": torch.ones(1)}, top / "folder" / "sdxl.vae.safetensors")
    shutil.copytree(TINY_SDXL, top / "model")
    shutil.copy(top / "folder" / WEIGHTS, top / "model" / "vae" / WEIGHTS)
    save_file(weights, top / "diffusers.safetensors")
    whole = checkpoint(top / "model")
    save_file(whole, top / "checkpoint.safetensors")
    of_vae = {key: each for key, each in whole.items() if key.startswith(PREFIX)}
    save_file(of_vae, top / "prefix.safetensors")
    bare = {key.removeprefix(PREFIX): each for key, each in of_vae.items()}
    save_file(bare | {"loss.logvar": torch.zeros(1)}, top / "bare.safetensors")
    save_file(
        {k: t for k, t in checkpoint(TINY_SDXL).items() if k not in of_vae}, top / "no.safetensors"
    )
    return {path.stem: path for path in top.iterdir()}


FORMS = ("folder", "model", "diffusers", "checkpoint", "prefix", "bare")


@pytest.mark.parametrize("form", FORMS)
def test_a_vae_is_read_from_a_folder_a_model_and_each_kind_of_file(form, places, capsys):
    name = str(TINY_SDXL)
    want = hub.fingerprint(name, "vae")
    hub.use_revision(name, "", str(places["folder"]))
    other = model.load_vae(name, CPU)
    hub.use_revision(name, "", str(places[form]))
    assert_same_weights(model.load_vae(name, CPU), other)
    assert model.latent_scaling(name)[0] == pytest.approx(0.5, abs=1e-4)
    assert hub.encoder_fingerprints(name, False)["vae"] != want
    said = "a VAE, taken to have SDXL's scaling 0.13025, which no file tells"
    assert capsys.readouterr().err.count(said) == places[form].is_file()
    hub.use_revision(name, "")
    assert hub.encoder_fingerprints(name, False)["vae"] == want


def test_a_model_is_a_model_though_a_run_before_took_its_vae(places):
    path = str(places["checkpoint"])
    hub.use_revision(str(TINY_SDXL), "", path)
    assert hub.parts_of(path) == ["vae"]
    hub.use_revision(path, "")
    assert hub.parts_of(path) == ["unet", "vae", "text_encoder", "text_encoder_2"]


def test_the_scaling_that_is_said_is_the_shipped_ones():
    assert json.loads((SDXL / "vae" / "config.json").read_text())["scaling_factor"] == 0.13025


def test_a_run_with_another_vae_is_another_and_its_files_draw_with_it(
    train, places, tmp_path, capsys
):
    few, vae = ("--max-train-steps", "2"), tmp_path / "mine.safetensors"
    shutil.copy(places["bare"], vae)
    asked = (*few, "--vae", str(vae))
    assert train("own", *few) == train("bare", *asked) == 0
    assert f"the VAE is {vae}\n" in capsys.readouterr().out
    assert train("folder", *few, "--vae", str(places["folder"])) == 0
    assert train("plain", *asked, "--plain", "--no-fused") == train("r", *asked, "--no-fused") == 0
    runs = ("own", "bare", "folder", "plain", "r")
    own, bare, folder, plain, ours = (lora.read(tmp_path / run) for run in runs)
    for name in own.matrices:
        assert torch.equal(bare.matrices[name], folder.matrices[name])
        assert torch.equal(plain.matrices[name], ours.matrices[name])
    assert any(not torch.equal(own.matrices[name], bare.matrices[name]) for name in own.matrices)
    assert "vae" not in own.about and plain.about["vae"] == "mine.safetensors"
    before = adapter(tmp_path / "bare")
    assert train("bare", *few) == 1  # without the VAE it began with
    assert "text encoders, tokenizers and VAE " in capsys.readouterr().err
    assert adapter(tmp_path / "bare") == before

    def draw(name: str, *words: str) -> np.ndarray:
        quick = ("--prompts", "red apple", "--num-inference-steps", "2", "--resolution", "32")
        out = tmp_path / name
        assert drawing.main([*words, *quick, "--output-dir", str(out)]) == 0
        with Image.open(next(out.glob("*.png"))) as picture:
            assert ("VAE: mine.safetensors" in picture.info["parameters"]) == (name != "d")
            return np.asarray(picture).astype(int)

    by_run = draw("a", str(tmp_path / "bare"))
    assert files.read(tmp_path / "bare" / "kohya").about["vae"] == "mine.safetensors"
    asked = draw("b", str(tmp_path / "bare"), "--vae", str(vae))
    assert np.array_equal(by_run, asked)
    vae.unlink()
    hub.file_of.cache_clear()  # as another process
    capsys.readouterr()
    assert drawing.main([str(tmp_path / "bare")]) == 1
    told = capsys.readouterr().err
    assert f"and its VAE {vae}: there is no file" in told and f"--vae {TINY_SDXL}\n" in told
    own = draw("d", str(tmp_path / "bare"), "--vae", str(TINY_SDXL))
    assert np.abs(own - by_run).mean() > 0.1
    assert drawing.main([str(tmp_path / "bare"), "--vae", str(vae)]) == 1
    assert f"there is no file {vae}" in capsys.readouterr().err


def test_a_checkpoint_without_vae_asks_for_one(places):
    hub.use_revision(str(places["no"]), "")
    with pytest.raises(Refusal, match="without VAE: --vae NAME"):
        hub.fetch(str(places["no"]), "unet")


def test_a_checkpoint_without_vae_trains_with_one(train, places, tmp_path):
    base = ("--max-train-steps", "2", "--pretrained-model-name-or-path")
    assert train("r", *base, str(places["no"]), "--vae", str(places["bare"])) == 0
    assert train("s", *base, str(places["model"])) == 0
    ours, want = (lora.read(tmp_path / run).matrices for run in "rs")
    assert all(torch.equal(ours[name], want[name]) for name in want)


def changed(places, top: Path, **entries) -> Path:
    shutil.copytree(places["folder"], top / "changed")
    path = top / "changed" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return top / "changed"


def written(top: Path, tensors: dict) -> Path:
    save_file(tensors, top / "x.safetensors")
    return top / "x.safetensors"


def twice(tensor: torch.Tensor) -> torch.Tensor:
    return 2 * torch.cat([tensor, tensor])


def bare(places, **instead) -> dict:
    tensors = load_file(places["bare"])
    return tensors | {key: instead.get(key[:7], lambda t: t)(each) for key, each in tensors.items()}


WRONG = {
    "SD 1's folder": (
        lambda p, top: changed(p, top, scaling_factor=0.18215),
        "scaling_factor of 0.18215",
    ),
    "no scaling": (lambda p, top: changed(p, top, scaling_factor=None), "scaling_factor None"),
    "16 channels": (lambda p, top: changed(p, top, latent_channels=16), "latent_channels 16"),
    "another kind": (
        lambda p, top: changed(p, top, _class_name="AutoencoderTiny"),
        "an AutoencoderTiny with",
    ),
    "SD 1's checkpoint": (
        lambda p, top: written(
            top,
            load_file(p["prefix"])
            | {"cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.ones(1)},
        ),
        "is a Stable Diffusion 1 model",
    ),
    "an adapter": (
        lambda p, top: written(top, {"lora_unet_a.lora_down.weight": torch.ones(1)}),
        "is an adapter",
    ),
    "a UNet": (
        lambda p, top: written(top, load_file(TINY_SDXL / "unet" / WEIGHTS)),
        "is one part in diffusers' layout",
    ),
    "other shapes": (
        lambda p, top: written(top, bare(p, decoder=twice)),
        "holds no vae of SDXL's shape",
    ),
    "half of it": (
        lambda p, top: written(
            top, {k: t for k, t in load_file(p["bare"]).items() if k.startswith("encoder")}
        ),
        "lacks",
    ),
    "an empty folder": (lambda p, top: top, "config.json"),
    "nowhere": (lambda p, top: top / "no" / "where", "there is no folder"),
}


@pytest.mark.parametrize("make, said", WRONG.values(), ids=WRONG)
def test_what_is_no_vae_of_sdxl_is_refused(make, said, train, places, tmp_path, capsys):
    assert train("r", "--vae", str(make(places, tmp_path))) == 1
    told = capsys.readouterr().err
    assert said in told and "What to do: " in told
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_a_vae_of_the_hub_alone_or_in_a_model_is_downloaded_and_serves_offline(
    places, monkeypatch, tmp_path
):
    name = str(TINY_SDXL)
    hub.use_revision(name, "", str(places["folder"]))
    want = model.load_vae(name, CPU)
    alone = {path.name: path for path in places["folder"].iterdir()}
    whole = {p.relative_to(places["model"]).as_posix(): p for p in places["model"].rglob("*.*")}
    with serving(monkeypatch, tmp_path / "here") as server:
        server.push("someone/vae", alone)
        server.push("someone/model", whole)
        server.push("someone/file", {"v/x.safetensors": places["bare"]})
        server.push("someone/none", {"a.txt": b""})
        for vae in ("someone/vae", "someone/model", "someone/file/v/x.safetensors"):
            hub.use_revision(name, "", vae)
            assert_same_weights(model.load_vae(name, CPU), want)
        asked = " ".join(server.asked)
        assert "sdxl.vae.safetensors" not in asked and "unet/" not in asked
        hub.use_revision(name, "", "someone/none")
        with pytest.raises(Refusal, match=r"someone/none has no vae/config.json.*--vae"):
            hub.fetch(name, "vae")
        server.fail("/", 503)
        ask_again()
        hub.use_revision(name, "", "someone/vae")
        assert_same_weights(model.load_vae(name, CPU), want)
        hub.use_revision(name, "", "someone/other")
        with pytest.raises(Refusal, match=r"the Hub answers 5.*--vae FOLDER"):
            hub.fetch(name, "vae")
