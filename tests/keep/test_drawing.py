"""The command that draws: what it draws, with which adapter and base, and what it refuses by one
sentence.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import lora
import model
from adapter_tools import drawable, loud
from adapters import files as adapter_files
from conftest import POCKET, ROOT
from inputs import drawing as options_of_drawing
from inputs import files, hub
from inputs.files import Refusal
from keep import drawing

QUICK = ("--num-inference-steps", "1")


@pytest.fixture
def run(tmp_path):
    """A finished run's folder: both files and its config.json."""
    return drawable(tmp_path / "out")


def draw(capsys, *argv: str) -> tuple[int, str]:
    """The exit code and the last line on stderr."""
    capsys.readouterr()
    code = drawing.main([*argv, "--prompts", "red apple", *QUICK])
    return code, capsys.readouterr().err.strip().splitlines()[-1] if code else ""


def refused(answer: tuple[int, str], *words: str) -> None:
    """Exit code 1 and one sentence that has all the words, what was expected and what to do."""
    code, said = answer
    assert code == 1
    for word in ("error: ", "; expected ", "What to do: ", *words):
        assert word in said


# ---- what is drawn -------------------------------------------------------------------------------


def test_a_comparison_shows_the_bare_model_above_and_the_adapter_below(run, capsys):
    pixels = {}
    for strength in ("0", "1"):
        assert draw(capsys, str(run), "--strength", strength) == (0, "")
        path = run / "pictures" / f"00-red-apple-0-{strength}.png"
        pixels[strength] = np.asarray(Image.open(path))
    assert draw(capsys, str(run), "--compare") == (0, "")
    sheet = np.asarray(Image.open(run / "pictures" / "before-after.png"))
    side = len(pixels["0"])
    below = len(sheet) - 2 * side
    left = next(x for x in range(sheet.shape[1]) if np.array_equal(
        sheet[below : below + side, x : x + side], pixels["0"]
    ))  # fmt: skip
    assert np.array_equal(sheet[below + side :, left : left + side], pixels["1"])
    assert np.abs(pixels["0"].astype(int) - pixels["1"]).mean() > 1


@pytest.mark.slow
def test_both_layouts_and_the_book_draw_the_same(run, tmp_path, capsys):
    kohya = run / "kohya" / f"{run.name}.safetensors"
    for name, adapter in (("peft", run), ("kohya", kohya)):
        assert draw(capsys, str(adapter), "--output-dir", str(tmp_path / name)) == (0, "")
    words = [str(run), "--plain", "--prompts", "red apple", *QUICK]
    words += ["--output-dir", str(tmp_path / "plain")]
    generate.draw_plain(options_of_drawing.parse(words))
    drawn = {p.read_bytes() for p in tmp_path.glob("*/00-red-apple-0-1.png")}
    assert len(list(tmp_path.glob("*/00-red-apple-0-1.png"))) == 3 and len(drawn) == 1


def test_what_is_left_open_is_as_the_run_had_it(run):
    file = adapter_files.read(run)
    options = options_of_drawing.complete(options_of_drawing.parse([]), file.path, file.about)
    assert options.prompts == ("rocket",) and options.cache_dir == "kept"
    assert options.pretrained_model_name_or_path == str(POCKET)
    assert options.guidance_scale == 5 and options.base_quantization == "none"
    given = options_of_drawing.parse(["--prompts", "a", "--cache-dir", "b", "--guidance-scale=0"])
    options = options_of_drawing.complete(given, file.path, file.about)
    assert (options.prompts, options.cache_dir, options.guidance_scale) == (("a",), "b", 0)


@pytest.mark.slow
def test_two_prompts_never_share_a_file(run, tmp_path):
    out = ("--output-dir", str(tmp_path / "drawn"), *QUICK)
    assert drawing.main([str(run), "--prompts", "猫", "犬", *out]) == 0
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2


@pytest.mark.slow
def test_options_that_are_read_already_are_drawn(run, capsys):
    options = options_of_drawing.parse([str(run), *QUICK])
    assert drawing.main(options) == 0
    assert capsys.readouterr().out.splitlines() == [str(run / "pictures" / "00-rocket-0-1.png")]


@pytest.mark.slow
def test_a_picture_that_does_not_fit_the_gpu_is_decoded_in_tiles(monkeypatch, capsys):
    vae = model.load_vae(str(POCKET), torch.device("cpu"))
    with Image.open(sorted((ROOT / "pocket" / "ink").glob("*.png"))[0]) as image:
        pixels = np.asarray(image.convert("RGB").resize((256, 256)), np.float32)
    pixels = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    latents = [model.encode_images(pixels, vae)[0]] * 2
    (whole, _), decoder = drawing.decode(vae, latents, (1.0, 0.0)), vae.decoder.forward
    assert capsys.readouterr().out == ""

    def small(z, *args, **kwargs):
        if z.shape[-1] > latents[0].shape[-1] // 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return decoder(z, *args, **kwargs)

    monkeypatch.setattr(vae.decoder, "forward", small)
    tiled, again = drawing.decode(vae, latents, (1.0, 0.0))
    assert capsys.readouterr().out.count("in tiles") == 1
    assert tiled.tobytes() == again.tobytes() and tiled.size == whole.size == (256, 256)
    off = np.abs(np.asarray(tiled, float) - np.asarray(whole, float))
    assert 0 < off.mean() < 5  # 2.1 of 255: norms see a tile, not the picture


# ---- which adapter, which base -------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused_unless_told_so(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(POCKET, other)
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    for key in weights:  # as a merged adapter would
        if key.endswith("to_q.weight"):
            weights[key] = weights[key] * 1.01
    save_file(weights, file, metadata={"format": "pt"})
    base = ("--pretrained-model-name-or-path", str(other))
    prints = [hub.unet_fingerprint(str(folder), half=False) for folder in (POCKET, other)]
    assert prints[0] != prints[1]
    kohya = run / "kohya" / f"{run.name}.safetensors"
    for adapter in (run, kohya):
        refused(draw(capsys, str(adapter), *base), "was trained on", "--any-base", *prints)
        assert draw(capsys, str(adapter), *base, "--any-base") == (0, "")


def test_an_adapter_that_names_no_base_asks_for_one(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    lora.save(loud(), path, torch.float32, {})
    refused(draw(capsys, str(path)), "does not say which base", "--pretrained-model-name-or-path")
    assert draw(capsys, str(path), "--pretrained-model-name-or-path", str(POCKET)) == (0, "")


def test_a_file_given_away_alone_says_that_the_bases_name_is_its_own(run, tmp_path, capsys):
    """Its header keeps the last part of the folder; nobody has typed an option."""
    path = tmp_path / "alone" / "a.safetensors"
    adapter_files.save(loud(), path, "peft", torch.float32, {"base_model": "my-model"})
    said = f"{path} says that its base is called my-model"
    type_this = "--pretrained-model-name-or-path WHERE/IT/IS/my-model"
    refused(draw(capsys, str(path)), said, type_this)
    assert draw(capsys, str(path), "--pretrained-model-name-or-path", str(POCKET)) == (0, "")
    # A folder with one adapter in it is that file.
    assert draw(capsys, str(path.parent), "--pretrained-model-name-or-path", str(POCKET)) == (0, "")


def test_an_adapter_of_another_architecture_rank_or_format_is_refused(run, tmp_path, capsys):
    file = run / lora.FILE_NAME
    tensors = {
        f"unet.{k}": torch.zeros(s)
        for k, s in (("a.lora_A.weight", (4, 8)), ("a.lora_B.weight", (8, 4)))
    }
    alien = tmp_path / "alien.safetensors"
    alien.write_bytes(files.safetensors_bytes(tensors, {}))
    base = ("--pretrained-model-name-or-path", str(POCKET))
    refused(draw(capsys, str(alien), *base), "alien.safetensors")
    alien.write_bytes(files.safetensors_bytes({"lora_unet_x.hada_w1_a": torch.zeros(2, 2)}, {}))
    refused(draw(capsys, str(alien), *base), "hada_w1_a", "convert")
    alien.write_bytes(file.read_bytes()[:-7])
    refused(draw(capsys, str(alien), *base), "alien.safetensors is not a whole safetensors file")
    refused(draw(capsys, str(tmp_path / "none.safetensors"), *base), "no such file")


def test_no_run_to_draw_from_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(draw(capsys), "no finished run under runs/", "make train")


@pytest.mark.slow
def test_the_newest_run_is_drawn_where_none_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    old, new = drawable(tmp_path / "runs" / "b"), drawable(tmp_path / "runs" / "a")
    shutil.os.utime(old / lora.FILE_NAME, (1, 1))
    assert draw(capsys) == (0, "")
    assert len(list((new / "pictures").iterdir())) == 1 and not (old / "pictures").exists()


@pytest.mark.parametrize("junk", [3, None, {"a": 1}, [1], [["a"]]])
def test_what_a_runs_config_says_is_taken_where_it_is_text(tmp_path, junk):
    (tmp_path / "config.json").write_text(json.dumps({"cache_dir": junk, "prompts": ["a", "b"]}))
    path = tmp_path / lora.FILE_NAME
    assert options_of_drawing.of_run(path, "cache_dir") == ""
    assert options_of_drawing.of_run(path, "cache_dir", []) == []
    assert options_of_drawing.of_run(path, "prompts", []) == ["a", "b"]
    assert options_of_drawing.of_run(path, "prompts") == ""  # a list where one text belongs


# ---- options and exit codes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", [["--num-inference-steps", "0"], ["--seeds"], ["--seeds", "-1"], ["--resolution", "100"]]
)
def test_a_drawing_that_cannot_be_is_refused_by_name(tmp_path, capsys, bad):
    name = bad[0].removeprefix("--").replace("-", "_")
    assert drawing.main([str(tmp_path), *bad]) == 1
    said = capsys.readouterr().err
    assert f"error: {name} is " in said and f"What to do: {bad[0]}" in said


def test_a_drawing_of_any_size_or_guidance_is_refused():
    for option in ("--resolution=800000", "--guidance-scale=nan", "--guidance-scale=1e9"):
        name = option[2:].split("=")[0].replace("-", "_")
        with pytest.raises(Refusal, match=f"{name} is "):
            options_of_drawing.parse([option])


@pytest.mark.parametrize(
    "error, code, said",
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), 1, "--resolution 512"),
        (OSError("the disk is gone"), 1, "error: the disk is gone. What to do: mend that"),
        (KeyboardInterrupt(), 130, "interrupted: pictures drawn so far are not kept"),
    ],
)
def test_every_end_has_its_exit_code_and_sentence(monkeypatch, capsys, error, code, said):
    def fails(options):
        raise error

    monkeypatch.setattr(drawing, "run", fails)
    assert drawing.main(["--prompts", "a fox"]) == code
    assert said in capsys.readouterr().err
