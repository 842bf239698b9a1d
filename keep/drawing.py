"""The command that draws: with a run or a file in any layout that is read, singly or side by side
with the bare model. The drawing itself is generate.py's.
"""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
from PIL import Image
from torch import Tensor

import generate
import lora
import model
from adapters import foreign
from inputs import drawing
from inputs.drawing import Options
from inputs.files import Refusal, first_line
from inputs.vetting import check_device
from keep import faster
from lora import AdapterFile
from see import sheet


def decode(
    vae: diffusers.AutoencoderKL, latents: list[Tensor], scaling: tuple[float, float]
) -> list[Image.Image]:
    """generate.decode(), in overlapping tiles of half the side where a whole picture does not fit
    the GPU: at most a quarter of the memory.
    """
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        return generate.decode(vae, latents, scaling)
    # Out here the error no longer holds what filled the memory.
    print("a whole picture does not fit this GPU's memory: decoding in tiles", flush=True)
    model.free_memory()
    vae.use_tiling, vae.tile_latent_min_size = True, max(latents[0].shape) // 2
    vae.tile_sample_min_size = 8 * vae.tile_latent_min_size
    return generate.decode(vae, latents, scaling)


def rows_of(options: Options, file: AdapterFile) -> tuple[dict, str]:
    """The rows to draw, by their label an adapter's file and its strength, and the name of the
    sheet that they make; "" for single pictures.
    """
    strength, several, after = options.strength, options.strengths, "after"
    if options.checkpoints:
        rows = {f"step {step}": (each, 1.0) for step, each in stages(file).items()}
        return {"before": (file, 0.0)} | rows, "checkpoints.png"
    if several != Options.strengths:
        return {f"at {each:g}": (file, each) for each in several}, "strengths.png"
    if options.compare:
        after = after if strength == 1 else f"at {strength:g}"
        path, rows = file.path.parent / "best" / lora.FILE_NAME, {"before": (file, 0.0)}
        # Of a run with a held-out loss; at a strength, or beside others, it would be another sum.
        alone = not options.more and drawing.with_strength(options.adapter)[1] == 1
        best = foreign.read(path) if path.is_file() and alone else file
        if (step := best.about.get("steps")) != file.about.get("steps"):
            rows[f"step {step}, lowest held-out loss"] = (best, strength)
        rows[after] = (file, strength)
        path = file.path.parent / "ema" / lora.FILE_NAME
        if path.is_file() and alone:
            rows["running mean"] = (foreign.read(path), strength)
        return rows, "before-after.png"
    return {"": (file, strength)}, ""


def stages(file: AdapterFile) -> dict[int, AdapterFile]:
    """What the run of `file` has kept of its adapter, by steps. What another run has left in the
    same folder is left out, said. Raises Refusal where there is only one.
    """
    folders = [*file.path.resolve().parents][:3]  # OUT/, OUT/adapters/, OUT/checkpoints/000200/
    out = next((each for each in folders if (each / "config.json").is_file()), folders[0])
    places = ("adapters/*.safetensors", f"checkpoints/*/{lora.FILE_NAME}", lora.FILE_NAME)
    found = [foreign.read(path) for place in places for path in out.glob(place)]
    own = [each for each in found if each.about.get("run", "") == file.about.get("run")]
    if other := [str(each.path.relative_to(out)) for each in found if each not in own]:
        print(f"left out, of another run than {file.path}: {', '.join(other)}", file=sys.stderr)
    kept = {int(each.about["steps"]): each for each in own}  # a header with a run has them
    if len(kept) < 2:
        remedy = "train with --keep-adapters, which keeps one at every save"
        raise Refusal(f"{out} keeps {len(kept)} adapter of this run", "two or more", remedy)
    return dict(sorted(kept.items()))


def run(options: Options) -> None:
    """Draw what `options` ask for, save it and print where it is."""
    words = (options.adapter, *options.more)
    parts = [(foreign.read(path), k) for path, k in map(drawing.with_strength, words)]
    file = foreign.together(parts)
    if file.left_out:
        print(file.left_out, file=sys.stderr)
    options = drawing.complete(options, file.path, file.about)
    if (k := parts[0][1]) != 1:  # which a picture tells, too
        options = replace(options, adapter=f"{options.adapter}:{k}")
    half = model.choose_dtype(options.mixed_precision, check_device(options.device))[0]
    for each, _ in parts[1:]:  # the first is looked at where it is drawn
        drawing.check_base(options, each.path, each.about, half != torch.float32)
    rows, name = rows_of(options, file)
    folder = Path(options.output_dir or file.path.parent / "pictures")
    folder.mkdir(parents=True, exist_ok=True)  # before drawing, so that no picture is lost by it
    plugged_in = (faster.unet_loader(options), foreign.load, decode, foreign.Drawn)
    try:
        pictures = generate.draw_at(rows, options, *plugged_in)
    except torch.cuda.OutOfMemoryError as error:
        found = f"the GPU's memory is full ({first_line(error)})"
        raise Refusal(found, "room for the model and a picture", "--resolution 512") from error
    if name:
        several = len(set(options.seeds)) > 1
        titles = [f"{p}, seed {seed}" if several else p for p, seed in options.pictures]
        picture = sheet.grid(dict(zip(rows, pictures, strict=True)), titles)
        size, how = pictures[0][0].size, drawing.how_drawn(options)
        # Where each title's pictures without and with the adapter lie: a run's page cuts them out.
        first, *_, last = (b for row, b in picture.info["boxes"].items() if row != "running mean")
        pairs = json.dumps([*zip(titles, first, last, strict=True)], ensure_ascii=False)
        how |= {"Pairs": pairs} if options.compare else {"Rows": ", ".join(rows)}
        about = drawing.parameters(options, options.pictures, size, how)
        generate.save_picture(picture, folder / name, about)
    else:
        generate.save_pictures(options, pictures[0], folder)


def main(argv_or_options: list[str] | Options | None = None) -> int:
    """The command. Returns its exit code: 0 drawn, 1 refused (said on stderr), 130 interrupted."""
    try:
        given = argv_or_options
        run(given if isinstance(given, Options) else drawing.parse(given))
        return 0
    except Refusal as refusal:
        said = str(refusal)
    except OSError as error:
        said = f"{error}. What to do: mend that, then the same command"
    except KeyboardInterrupt:
        print("\ninterrupted: pictures drawn so far are not kept", file=sys.stderr)
        return 130
    print(f"error: {said}", file=sys.stderr)
    return 1
