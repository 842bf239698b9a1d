"""The command that draws: what it draws, with which adapter and base, and what it refuses by one
sentence.
"""

import hashlib
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import generate
import lora
import model
from adapter_tools import drawable, header, loud
from adapters import files as adapter_files
from conftest import POCKET, ROOT, TINY_SDXL
from inputs import drawing as options_of_drawing
from inputs import files, hub
from inputs.files import Refusal
from inputs.options import POCKET_PROMPTS, RECIPES
from keep import drawing, training
from made import model_with

QUICK = ("--num-inference-steps", "1", "--resolution", "64")


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    return drawable(tmp_path_factory.mktemp("first") / "out")


@pytest.fixture
def run(first_run, tmp_path):
    """A finished run's folder: both files and its config.json."""
    return shutil.copytree(first_run, tmp_path / "out")


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


@pytest.mark.slow
def test_several_adapters_are_drawn_each_at_its_strength(run, tmp_path, capsys):
    """As one file with their sum; a colon in a name is no strength; the picture says who acted."""
    odd = tmp_path / "a:2"  # a folder that is called so
    shutil.copytree(run, odd)
    out = ("--output-dir", str(tmp_path / "pictures"))
    pictures = []
    for words in ([f"{run}:0.25", f"{odd}:0.5"], [f"{odd}:.75"], [str(odd), "--strength", "0.75"]):
        assert draw(capsys, *words, *out) == (0, "")
        newest = max((tmp_path / "pictures").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        pictures.append(Image.open(newest))
    first, *others = (np.asarray(each).astype(int) for each in pictures)
    assert all(np.abs(first - each).max() <= 1 for each in others)
    told = [each.info["parameters"].splitlines()[-1] for each in pictures]
    assert 'Lora: "out, a:2", Lora strength: "0.25, 0.5", Lora hashes: ' in told[0]
    assert "Lora strength: 0.75" in told[1] and "Lora strength: 0.75" in told[2]


@pytest.mark.parametrize("more", [["--plain"], ["--checkpoints"]])
def test_several_adapters_are_drawn_by_the_command_alone(more):
    for words in (["a:0.5"], ["a", "b"]):
        with pytest.raises(Refusal, match="with several adapters, or a strength behind a colon"):
            options_of_drawing.parse([*words, *more])


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
    assert draw(capsys, str(run), "--strength", "0.2") == (0, "")
    weak = np.asarray(Image.open(run / "pictures" / "00-red-apple-0-0.2.png"))
    assert draw(capsys, str(run), "--compare", "--strength", "0.2") == (0, "")
    sheet = np.asarray(Image.open(run / "pictures" / "before-after_2.png"))
    left = next(x for x in range(sheet.shape[1]) if np.array_equal(
        sheet[below : below + side, x : x + side], pixels["0"]
    ))  # fmt: skip
    assert np.array_equal(sheet[below + side :, left : left + side], weak)


def other_layout(run, folder, layout: str):
    """The run's adapter as another program writes it."""
    ours, said = load_file(run / lora.FILE_NAME), header(run / lora.FILE_NAME)["__metadata__"]
    config = json.loads(said["lora_adapter_metadata"])
    config = {key.removeprefix("unet."): value for key, value in config.items()}
    bare = {key.removeprefix("unet."): each for key, each in ours.items()}
    folder.mkdir()
    path = folder / ("adapter_model.safetensors" if layout == "peft" else "a.safetensors")
    if layout == "peft":
        save_file({f"base_model.model.{key}": each for key, each in bare.items()}, path)
        (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
        return folder
    if layout == "scripts":
        ends = {"lora_A": "lora.down", "lora_B": "lora.up"}
        tensors = {re.sub(r"lora_[AB]", lambda m: ends[m[0]], k): v for k, v in ours.items()}
        save_file(tensors, path, {"unet_lora_adapter_metadata": json.dumps(config)})
    elif layout == "UNet":
        save_file(bare, path, {"lora_adapter_metadata": json.dumps(config)})
    else:  # kohya's keys with diffusers' names of the blocks
        tensors, ends = {}, {"lora_A": "lora_down", "lora_B": "lora_up"}
        for key, each in bare.items():
            module, _, end = key.partition(".lora_")
            module = f"lora_unet_{module.replace('.', '_')}"
            tensors[f"{module}.{ends['lora_' + end[0]]}.weight"] = each
            tensors[f"{module}.alpha"] = torch.tensor(float(config["lora_alpha"]))
        save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    "layout",
    [
        "peft",
        "scripts",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("UNet", "diffusers' names")),
    ],
)
def test_other_programs_files_draw_the_same_picture(run, tmp_path, capsys, layout):
    assert draw(capsys, str(run)) == (0, "")
    (ours,) = (run / "pictures").glob("00-red-apple*.png")
    theirs = other_layout(run, tmp_path / "theirs", layout)
    out, base = ("--output-dir", str(tmp_path / "drawn")), "--pretrained-model-name-or-path"
    assert draw(capsys, str(theirs), base, str(TINY_SDXL), *out) == (0, "")
    (drawn,) = (tmp_path / "drawn").glob("*.png")
    assert np.array_equal(np.asarray(Image.open(drawn)), np.asarray(Image.open(ours)))


def kept_at(run, names: dict[str, float], of: str = "one") -> None:
    """Adapters of other steps in a run's folder, by their place, each of another strength."""
    for name, strength in names.items():
        about = {"run": of, "steps": str(int(re.search("0{5}(.)", name)[1]))}
        adapter = loud()
        with torch.no_grad():
            for layer in adapter.layers.values():
                layer.lora_B.mul_(strength)
        adapter_files.save(adapter, run / name, "peft", torch.float32, about)


def cells(path, rows: int, columns: int, side: int = 64) -> np.ndarray:
    """The pictures of a sheet in one block, (rows, columns, side, side, 3)."""
    sheet = np.asarray(Image.open(path), int)
    below = sheet[len(sheet) - rows * side :].reshape(rows, side, -1, 3)
    left = sheet.shape[1] - columns * side - int(11 * 1.5) // 2
    return below[:, :, left : left + columns * side].reshape(rows, side, columns, side, 3).swapaxes(
        1, 2
    )  # fmt: skip


def counting(monkeypatch) -> list:
    """A list that gets longer with every UNet that is loaded."""
    loads, load = [], model.load_unet
    monkeypatch.setattr(model, "load_unet", lambda *a: loads.append(1) or load(*a))
    return loads


@pytest.mark.slow
def test_checkpoints_are_rows_of_one_sheet_drawn_with_one_load(tmp_path, monkeypatch, capsys):
    run = drawable(tmp_path / "out", steps="6", run="one")
    alone = draw(capsys, str(run), "--checkpoints")
    refused(alone, "keeps 1 adapter of this run", "--keep-adapters")
    kept_at(run, {"adapters/000002.safetensors": 0.5, f"checkpoints/000004/{lora.FILE_NAME}": 0.0})
    kept_at(run, {"adapters/000003.safetensors": 1}, of="another run")
    loads = counting(monkeypatch)
    assert (
        drawing.main([str(run), "--checkpoints", "--prompts", "red apple", *QUICK]) == 0
        and len(loads) == 1
    )
    before, two, four, end = cells(run / "pictures/checkpoints.png", 4, 1)[:, 0]
    assert np.array_equal(before, four)  # whose B is zero
    assert np.abs(before - end).mean() > np.abs(before - two).mean() > 1
    about = Image.open(run / "pictures/checkpoints.png").info["parameters"]
    assert 'Rows: "before, step 2, step 4, step 6"' in about
    assert draw(capsys, str(run), "--strength", "1") == (0, "")
    one = np.asarray(Image.open(run / "pictures/00-red-apple-0-1.png"))
    assert np.array_equal(one, end)
    (run / lora.FILE_NAME).unlink()  # of a run that has not ended, or was stopped
    assert draw(capsys, str(run), "--checkpoints", "--output-dir", str(tmp_path))[0] == 0
    again = cells(tmp_path / "checkpoints.png", 3, 1)[:, 0]
    assert np.array_equal(again, [before, two, four])


def test_strengths_are_rows_of_one_sheet_drawn_with_one_load(run, monkeypatch, capsys):
    loads = counting(monkeypatch)
    assert draw(capsys, str(run), "--strengths", "0", "0.5", "1") == (0, "")
    assert len(loads) == 1
    rows = cells(run / "pictures/strengths.png", 3, 1)[:, 0]
    assert np.abs(rows[0] - rows[2]).mean() > np.abs(rows[0] - rows[1]).mean() > 1
    assert draw(capsys, str(run), "--strength", "0.5") == (0, "")
    assert np.array_equal(np.asarray(Image.open(run / "pictures/00-red-apple-0-0.5.png")), rows[1])


@pytest.mark.parametrize(
    "words",
    [
        "--checkpoints --strengths 0 1",
        "--checkpoints --compare",
        "--checkpoints --strength 0.5",
        "--strengths 0 --strength 0.5",
        "--strengths 0 1 --compare",
        "x --plain --checkpoints",
    ],
)
def test_what_the_rows_are_is_asked_for_once(words):
    given = [word for word in words.split() if word[:2] == "--"]
    with pytest.raises(Refusal, match="expected one of them") as refusal:
        options_of_drawing.parse(words.split())
    assert all(word in str(refusal.value) for word in given)
    with pytest.raises(Refusal, match=r"strengths is 11\.0; expected -10 to 10"):
        options_of_drawing.parse(["--strengths", "11"])


@pytest.mark.slow
def test_both_layouts_and_the_book_draw_the_same(run, tmp_path, capsys):
    kohya = run / "kohya" / f"{run.name}.safetensors"
    for name, adapter in (("peft", run), ("kohya", kohya)):
        assert draw(capsys, str(adapter), "--output-dir", str(tmp_path / name)) == (0, "")
    words = [str(run), "--plain", "--prompts", "red apple", *QUICK]
    words += ["--output-dir", str(tmp_path / "plain")]
    generate.draw_plain(options_of_drawing.parse(words))
    drawn = {Image.open(p).tobytes() for p in tmp_path.glob("*/00-red-apple-0-1.png")}
    assert len(list(tmp_path.glob("*/00-red-apple-0-1.png"))) == 3 and len(drawn) == 1


def test_what_is_left_open_is_as_the_run_had_it(run):
    file = adapter_files.read(run)
    options = options_of_drawing.complete(options_of_drawing.parse([]), file.path, file.about)
    assert options.prompts == ("rocket",) and options.cache_dir == "kept"
    assert options.pretrained_model_name_or_path == str(TINY_SDXL)
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


# ---- what the pictures say, and are called -------------------------------------------------------


def told(path) -> str:
    with Image.open(path) as image:
        return image.info["parameters"]


def test_a_picture_says_how_it_was_drawn_as_a1111_writes_it(run, capsys):
    more = ("--negative-prompt", "grün, 青", "--strength", "0.5", "--seeds", "7")
    assert draw(capsys, str(run), *more, "--guidance-scale", "3.5") == (0, "")
    (path,) = (run / "pictures").iterdir()
    first, second, third = told(path).split("\n")
    assert (first, second) == ("red apple", "Negative prompt: grün, 青")
    blob = (run / lora.FILE_NAME).read_bytes()
    hashed = hashlib.sha256(files.data_section(blob)).hexdigest()[:12]
    want = "Steps: 1, Sampler: EulerDiscreteScheduler, CFG scale: 3.5, Model: model, Lora: out, "
    want += f'Lora strength: 0.5, Lora hashes: "out: {hashed}", Seed: 7, Size: 64x64'
    assert third == want
    # The kohya file's hash is the one that A1111 and its data bases look for.
    kohya = adapter_files.read(run / "kohya" / "out.safetensors")
    words = [str(kohya.path), "--compare", "--seeds", "1", "2"]
    assert draw(capsys, *words) == (0, "")
    said = told(run / "kohya" / "pictures" / "before-after.png")
    assert f'Lora hashes: "out: {kohya.about["sshs_model_hash"][:12]}"' in said
    assert said.startswith("red apple\nSteps: 1") and 'Seed: "1, 2"' in said


@pytest.mark.slow
def test_a_picture_of_other_settings_is_never_overwritten(run, capsys):
    def names(*words: str) -> list[str]:
        assert draw(capsys, str(run), *words) == (0, "")
        return sorted(path.name for path in (run / "pictures").iterdir())

    one, two, three = (f"00-red-apple-0-1{end}.png" for end in ("", "_2", "_3"))
    assert names() == [one]
    assert names("--guidance-scale", "2") == [one, two]
    kept = (run / "pictures" / two).read_bytes()
    (run / "pictures" / three).write_bytes(b"somebody's own")
    assert names("--guidance-scale", "3")[:3] == [one, two, three]
    assert len(names("--guidance-scale", "2")) == len(names()) == 4  # each finds its own again
    assert (run / "pictures" / two).read_bytes() == kept
    assert (run / "pictures" / three).read_bytes() == b"somebody's own"
    assert names("--compare", "--seeds", "1", "1")[-1] == "before-after.png"
    assert names("--compare")[-2:] == ["before-after.png", "before-after_2.png"]


@pytest.mark.parametrize(
    "prompt", ["猫", "犬 の 絵", "кот", "🚀", "", "../..", "CON", "a\x00b\n" * 99]
)
def test_a_name_is_short_and_every_file_system_and_terminal_takes_it(prompt):
    name = options_of_drawing.file_name(0, prompt, 2**63 - 1, 1.0)
    assert re.fullmatch(r"00-[a-z0-9][a-z0-9-]*-9223372036854775807-1\.png", name)
    assert len(name) < 100
    others = {options_of_drawing.file_name(0, p, 0, 1.0) for p in ("猫", "犬", "кот", "🚀", "")}
    assert len(others) == 5
    assert options_of_drawing.file_name(3, "Café Zürich!", 0, 0.5) == "03-cafe-zurich-0-0.5.png"


def test_a_terminal_without_the_letters_gets_their_numbers(run, tmp_path, monkeypatch, capfdbinary):
    """As PYTHONIOENCODING=cp1252 has it."""
    terminal = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.__stdout__", terminal)
    out = ("--output-dir", str(tmp_path / "日本語"))
    words = [str(run), "--prompts", "red apple", *QUICK, *out]
    assert drawing.main(options_of_drawing.parse_or_leave(words)) == 0
    said = capfdbinary.readouterr().out
    assert said.endswith(rb"\u65e5\u672c\u8a9e/00-red-apple-0-1.png" + b"\n")


# ---- prompts that nobody gave --------------------------------------------------------------------


@pytest.mark.slow
def test_own_pictures_end_with_a_few_of_their_own_captions(train, few, tmp_path, capsys):
    """The recipe's prompts are of the recipe's pictures."""
    recipe = ("--validation-prompts", *POCKET_PROMPTS, "--num-inference-steps", "1")
    assert train("r", *recipe, "--max-train-steps", "1") == 0
    said = capsys.readouterr().out
    assert said.count("shows captions that were trained on") == 1
    prompts = json.loads((tmp_path / "r" / "config.json").read_text())["validation_prompts"]
    captions = [json.loads(row)["text"] for row in (few / "metadata.jsonl").open()]
    assert len(set(prompts)) == 3 and set(prompts) <= set(captions)
    picture = tmp_path / "r" / "pictures" / "before-after.png"
    assert told(picture).startswith("\n".join([*prompts, "Steps: 1, "]))
    file = adapter_files.read(tmp_path / "r")  # and so do later drawings
    later = options_of_drawing.complete(options_of_drawing.parse([]), file.path, file.about)
    assert later.prompts == tuple(prompts)


def test_captions_are_distinct_not_empty_and_chosen_by_the_seed():
    config = replace(RECIPES["t4"][1], dataset_name=("mine",))

    def chosen(*captions: str, **options) -> list[str]:
        pictures = [SimpleNamespace(captions=(caption,)) for caption in captions]
        return training.prompts_of(replace(config, **options), pictures)

    many = [f"caption {i}" for i in range(100)]
    assert chosen(*many, seed=1) == chosen(*many, seed=1) != chosen(*many, seed=2)
    assert chosen(*many) == sorted(chosen(*many), key=many.index)
    assert chosen("a", " a ", "", "b", "a") == ["a", "b"]
    assert chosen("a", "a") == ["a"] and chosen("", " ") == [""]
    usual = list(config.validation_prompts)
    assert chosen("a", dataset_name=RECIPES["t4"][1].dataset_name) == usual
    assert chosen("a", validation_prompts=("mine",)) == ["mine"]
    assert chosen("a", validation_prompts=()) == []


@pytest.mark.parametrize(
    "words, compares",
    [
        ("", True),
        ("--num-inference-steps 50", True),
        ("--strength 0.2 --seeds 1 2", True),
        ("runs/t4", False),
        ("runs/t4 --prompts 'a fox'", False),
        ("--seeds 1 2 --prompts 'a fox'", False),
        ("--prompts=fox", False),
    ],
)
def test_make_generate_compares_unless_an_adapter_or_prompts_are_named(words, compares):
    argv = ["make", "--no-print-directory", "-n", "generate", "PYTHON=python3", f"ARGS={words}"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split("generate.py")[1].split() == words.split() + ["--compare"] * compares


# ---- a base that was distilled to few steps ------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    """base(sampler, name, setting=...): a copy of the tiny model with another sampler."""

    def copy(sampler: str, name: str = "other", **settings) -> str:
        folder = model_with(tmp_path / name, "scheduler", scheduler=["diffusers", sampler])
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return str(folder)

    return copy


TRAILING = {"timestep_spacing": "trailing"}
USUAL = (30, 5.0)


@pytest.mark.parametrize(
    "sampler, name, settings, want",
    [
        ("EulerAncestralDiscreteScheduler", "a", TRAILING, (4, 0.0, "Turbo")),
        ("EulerDiscreteScheduler", "My-Lightning", TRAILING, (4, 0.0, "Lightning")),
        ("LCMScheduler", "a", {}, (8, 1.0, "LCM")),
        # and what others are drawn with as well
        ("EulerDiscreteScheduler", "a", TRAILING, USUAL),
        ("EulerDiscreteScheduler", "My-Lightning", {}, USUAL),
        ("EulerAncestralDiscreteScheduler", "a", {"timestep_spacing": "leading"}, USUAL),
        (
            "EulerAncestralDiscreteScheduler",
            "a",
            TRAILING | {"rescale_betas_zero_snr": True},
            USUAL,
        ),
        (
            "EulerAncestralDiscreteScheduler",
            "a",
            TRAILING | {"prediction_type": "v_prediction"},
            USUAL,
        ),
    ],
)
def test_a_base_that_was_distilled_is_drawn_as_its_makers_say(
    run, base, capsys, sampler, name, settings, want
):
    words = ["--pretrained-model-name-or-path", base(sampler, name, **settings)]
    file = adapter_files.read(run)

    def completed(*more: str) -> tuple[int, float, str]:
        options = options_of_drawing.parse([*words, *more])
        options = options_of_drawing.complete(options, file.path, file.about)
        return options.num_inference_steps, options.guidance_scale, capsys.readouterr().err

    steps, guidance, said = completed()
    assert (steps, guidance) == want[:2] and ("is a" in said) == (want != USUAL)
    assert all(word in said for word in want[2:])
    assert completed("--num-inference-steps", "9")[:2] == (9, want[1])
    asked = completed("--num-inference-steps", "9", "--guidance-scale", "7")
    assert asked == (9, 7.0, "")


def test_a_runs_own_picture_leaves_steps_and_guidance_to_the_base_unless_asked(
    tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(drawing, "run", drawn.append)
    config = replace(RECIPES["pocket"][1], output_dir=str(tmp_path))
    asked = {"num_inference_steps": 9, "guidance_scale": 7.5}
    for given, want in (({}, (0, -1.0)), (asked, (9, 7.5)), ({"guidance_scale": 0.0}, (0, 0.0))):
        training.draw(replace(config, **given))
        assert (drawn[-1].num_inference_steps, drawn[-1].guidance_scale) == want
        assert drawn[-1].compare


@pytest.mark.slow
def test_a_run_whose_picture_cannot_be_drawn_says_that_the_adapter_is_saved(
    train, base, tmp_path, capsys
):
    model = base("TCDScheduler", "Hyper")
    options = ("--pretrained-model-name-or-path", model, "--validation-prompts", "a cat")
    said = f"python generate.py {tmp_path / 'a'} --compare, with what helps: --scheduler Euler"
    refused((train("a", *options), capsys.readouterr().err), "the adapter is saved, but", said)
    assert (tmp_path / "a" / files.FILE_NAME).is_file()


# ---- which adapter, which base -------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused_unless_told_so(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(TINY_SDXL, other)
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    for key in weights:  # as a merged adapter would
        if key.endswith("to_q.weight"):
            weights[key] = weights[key] * 1.01
    save_file(weights, file, metadata={"format": "pt"})
    base = ("--pretrained-model-name-or-path", str(other))
    prints = [hub.unet_fingerprint(str(folder), half=False) for folder in (TINY_SDXL, other)]
    assert prints[0] != prints[1]
    kohya = run / "kohya" / f"{run.name}.safetensors"
    for adapter in (run, kohya):
        refused(draw(capsys, str(adapter), *base), "was trained on", "--any-base", *prints)
        assert draw(capsys, str(adapter), *base, "--any-base") == (0, "")


def test_an_adapter_that_names_no_base_asks_for_one(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    lora.save(loud(), path, torch.float32, {})
    refused(draw(capsys, str(path)), "does not say which base", "--pretrained-model-name-or-path")
    assert draw(capsys, str(path), "--pretrained-model-name-or-path", str(TINY_SDXL)) == (0, "")


@pytest.mark.slow
def test_a_file_given_away_alone_says_that_the_bases_name_is_its_own(run, tmp_path, capsys):
    """Its header keeps the last part of the folder; nobody has typed an option."""
    path = tmp_path / "alone" / "a.safetensors"
    adapter_files.save(loud(), path, "peft", torch.float32, {"base_model": "my-model"})
    said = f"{path} says, in its header or its run's config.json, that its base is my-model: "
    type_this = "where it lies elsewhere, --pretrained-model-name-or-path WHERE/IT/IS/my-model"
    refused(draw(capsys, str(path)), said, type_this)
    assert draw(capsys, str(path), "--pretrained-model-name-or-path", str(TINY_SDXL)) == (0, "")
    # A folder with one adapter in it is that file.
    assert draw(capsys, str(path.parent), "--pretrained-model-name-or-path", str(TINY_SDXL)) == (
        0,
        "",
    )


def test_an_adapter_of_another_architecture_rank_or_format_is_refused(run, tmp_path, capsys):
    file = run / lora.FILE_NAME
    tensors = {
        f"unet.{k}": torch.zeros(s)
        for k, s in (("a.lora_A.weight", (4, 8)), ("a.lora_B.weight", (8, 4)))
    }
    alien = tmp_path / "alien.safetensors"
    alien.write_bytes(files.safetensors_bytes(tensors, {}))
    base = ("--pretrained-model-name-or-path", str(TINY_SDXL))
    refused(draw(capsys, str(alien), *base), "alien.safetensors")
    alien.write_bytes(files.safetensors_bytes({"lora_unet_x.hada_w1_a": torch.zeros(2, 2)}, {}))
    refused(draw(capsys, str(alien), *base), "x has hada_w1_a", "all factors of one kind")
    alien.write_bytes(file.read_bytes()[:-7])
    refused(draw(capsys, str(alien), *base), "alien.safetensors is not a whole safetensors file")
    refused(draw(capsys, str(tmp_path / "none.safetensors"), *base), "no such file")


def test_a_run_that_was_moved_says_that_the_bases_place_is_its_config_jsons(run, capsys):
    """The folder that the run was trained on is not here; nobody has typed its path."""
    path = run / "config.json"
    told = json.loads(path.read_text()) | {"pretrained_model_name_or_path": "/elsewhere/my-model"}
    path.write_text(json.dumps(told))
    said = "its run's config.json, that its base is /elsewhere/my-model: there is no folder"
    refused(draw(capsys, str(run)), said, "--pretrained-model-name-or-path WHERE/IT/IS/my-model")
    there = ("--pretrained-model-name-or-path", str(run / "none"))
    code, said = draw(capsys, str(run), *there)
    assert code == 1 and "config.json" not in said  # typed, so it is not the file's word
    assert draw(capsys, str(run), there[0], str(TINY_SDXL)) == (0, "")


@pytest.mark.slow
def test_what_leads_to_no_adapter_is_told_by_what_is_there(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "runs/a")
    refused(draw(capsys, "runs/nothere"), "runs/nothere: no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(draw(capsys, "empty"), "empty has no adapter file")
    for name in ("b.safetensors", ".c.safetensors", "D.SAFETENSORS", "e.txt"):
        shutil.copy(run / lora.FILE_NAME, tmp_path / "empty" / name)
    refused(draw(capsys, "empty"), "empty has empty/D.SAFETENSORS, empty/b.safetensors; expected")
    (tmp_path / "empty" / "b.safetensors").unlink()
    assert draw(capsys, "empty", "--pretrained-model-name-or-path", str(TINY_SDXL)) == (0, "")
    saved = tmp_path / "begun" / "checkpoints" / "000200"
    shutil.copytree(run, saved)
    for name in ("begun", "begun/checkpoints/000200"):  # the newest of a run that has not ended
        assert draw(capsys, name) == (0, "")


def test_no_run_to_draw_from_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(draw(capsys), "runs: no such file or folder", "name one")


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
    "bad",
    [["--num-inference-steps", "-1"], ["--seeds"], ["--seeds", "-1"], ["--resolution", "100"]],
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
