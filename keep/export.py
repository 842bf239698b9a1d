"""The end of a run: the adapter in both layouts, and the proof that the files are what was trained.

OUT/pytorch_lora_weights.safetensors and OUT/kohya/NAME.safetensors are the result, and
OUT/finished.json, written after both were read back and compared, says so.
"""

import contextlib
import json
from pathlib import Path

import torch

import lora
import model
from adapters import files, kinds, start
from inputs import code
from inputs.files import Refusal, place, sweep_parts, write_whole
from inputs.options import Config
from inputs.sources import read_datasets
from keep import faster
from keep.checkpoint import folder_of, remove_old, sum_of
from keep.identity import about, check_same, fixed_options, of_base, of_data, on_schedule, start_of
from learn.held_out import chosen


@torch.no_grad()
def export(kept, kind: str = "") -> list[Path]:
    """Write the adapter in both layouts, each where files_of() says, read each file back, and
    refuse if it is not what was trained. The UNet must be the book's: no fused layers.

    fp32: every number equal and the UNet's answer to one batch equal to the bit; fp16: equal to the
    rounded numbers, the answer within 2e-3 of its own length.
    """
    run, config = kept.run, kept.run.config
    if not kinds.moved(run.adapter):
        found = "the adapter did not move: every B is zero, as at its start"
        remedy = "a higher --learning-rate or more --max-train-steps"
        remedy += f" ({run.loss_scale.skipped} steps were skipped)"
        raise Refusal(found, "a trained adapter", remedy)
    batch, dtype = run.examples.batch(range(1), run.unet.device), model.DTYPES[config.save_dtype]
    run.unet.eval()  # what an edited layer does in training only, such as dropout, is in no file
    matrices = run.adapter.matrices()  # all that a file holds: what else has learned stays in place
    trained = {name: matrix.clone() for name, matrix in matrices.items()}
    answer = model.predict(run.unet, batch["noise"], batch)
    for layout, path in files_of(config, kind).items():
        told = {"ema_decay": str(config.ema_decay)} if kind == "ema" else {}
        files.save(run.adapter, path, layout, dtype, about(kept) | told)
        for matrix in matrices.values():
            matrix.zero_()  # or a file that holds nothing would seem to hold everything
        files.put_back(run.adapter, path)
        again = model.predict(run.unet, batch["noise"], batch)
        off = ((again - answer).norm() / answer.norm()).item()
        same = all(matrices[n].equal(each.to(dtype).float()) for n, each in trained.items())
        for name, matrix in matrices.items():
            matrix.copy_(trained[name])
        if not same or not off <= (0.0 if dtype == torch.float32 else 2e-3):
            found = f"{path}, read back, gives another UNet (outputs differ by {off:.2e})"
            remedy = "check the disk, and the start's lines; what was trained is in checkpoints/"
            raise Refusal(found, "the trained one", remedy)
    return list(files_of(config, kind).values())


@torch.no_grad()
def export_ema(kept) -> list[Path]:
    """export() of the running mean into OUT/ema/, if the run has one. The last step's numbers,
    which are exported already, are gone from the run then.
    """
    if not kept.run.config.ema_decay:
        return []
    for name, state in kept.moments.read().items():
        kept.run.trained[name].copy_(state["ema"])
    return export(kept, "ema")


def export_best(kept) -> list[Path]:
    """export() of the step with the lowest held-out loss, from its checkpoint into OUT/best/; of
    none where there is none, or where somebody has removed it. The last step's numbers, which are
    exported already, are gone from the run then.
    """
    run, last = kept.run, kept.run.step
    run.step = kept.judge.best or last  # which the files' headers tell
    found, paths = folder_of(run) / lora.FILE_NAME, []
    if kept.judge.best and found.is_file():
        files.put_back(run.adapter, found)
        paths = export(kept, "best")
    run.step = last
    return paths


def export_as_lora(kept) -> list[Path]:
    """With --as-lora, the adapter for programs that read no other kind, into OUT/as-lora/."""
    config, paths = kept.run.config, []
    if config.as_lora:
        refactored, lost = start.as_lora(kept.run.adapter, config.as_lora)
        far = f"{lost:.2%} of its length is lost" if lost > 1e-4 else "nothing of it is lost"
        print(f"as LoRA of rank {config.as_lora}: {far}")
        told = about(kept) | {"made": f"as LoRA of {config.adapter}, {far}"}
        for layout, path in files_of(config, "as-lora").items():
            files.save(refactored, path, layout, model.DTYPES[config.save_dtype], told)
            paths.append(path)
    return paths


def files_of(config: Config, kind: str = "") -> dict[str, Path]:
    """Where the adapter is, or will be, in each layout; of `kind` best that of the step with the
    lowest held-out loss, of ema the running mean, of as-lora what --as-lora makes of it.
    """
    out, name = config.out / kind, f"{config.out.resolve().name}{kind and f'-{kind}'}.safetensors"
    return {"peft": out / lora.FILE_NAME, "kohya": out / "kohya" / name}


def exported_sums(config: Config) -> dict[str, str]:
    """The exported files, by their names in config.out, and their SHA-256."""
    paths = files_of(config).values()
    return {path.relative_to(config.out).as_posix(): sum_of(path.read_bytes()) for path in paths}


def remove_renamed(config: Config) -> None:
    """Remove what this run exported when its folder had another name: what its last finished.json
    names, if it is still what that says.
    """
    with contextlib.suppress(OSError, ValueError, KeyError):
        for name, was in json.loads((config.out / "finished.json").read_text())["files"].items():
            path = config.out / name
            if path not in files_of(config).values() and sum_of(path.read_bytes()) == was:
                path.unlink()
                print(f"removed: {path}, which this run wrote under its folder's old name")


def mark_finished(kept) -> None:
    """Note that the exported files are whole and compared, and what they are of."""
    run, config = kept.run, kept.run.config
    # Again, since the run may have been killed between its last checkpoint and this.
    remove_old(
        config.out / "checkpoints", run.step, config.checkpoints_total_limit, kept.judge.best
    )
    note = {"steps": run.step, "epochs": config.max_train_epochs}
    note["stopped_when_worse"] = run.step < config.max_train_steps
    note |= {"files": exported_sums(config), "save_dtype": config.save_dtype}
    note |= {"as_lora": config.as_lora} if config.as_lora else {}
    note |= {"identity": kept.identity, "code": kept.code, "commit": code.commit()}
    remove_renamed(config)
    (config.out / "pictures" / "before-after.png").unlink(missing_ok=True)  # of an earlier adapter
    write_whole(config.out / "finished.json", json.dumps(note, indent=1).encode())


def finished(config: Config) -> str:
    """What to say of a finished run whose exported files are still what they were; "" where there
    is none. It stays finished whatever became of the code: what changed is named.

    Raises Refusal where the run in config.out was of other options, or a local folder that it came
    from, base model or pictures, holds something else by now.
    """
    sweep_parts(config.out)
    epochs, steps = config.max_train_epochs, config.max_train_steps
    try:
        note = json.loads((config.out / "finished.json").read_text())
        whole = note["files"] == exported_sums(config) and note["save_dtype"] == config.save_dtype
        extra = files_of(config, "as-lora").values() if config.as_lora else ()
        whole = whole and config.as_lora in (0, note.get("as_lora"))
        whole = whole and all(path.is_file() for path in extra)
        half, done = note["identity"]["dtype"] != "torch.float32", note["steps"]
        # Of the same pictures, as check_same() finds, as many epochs are as many steps.
        enough = note["epochs"] >= epochs if epochs else done >= steps
        enough |= config.stop_when_worse and note["stopped_when_worse"]
    except (OSError, ValueError, KeyError, TypeError):  # not ended yet, or damaged
        return ""
    config, name = on_schedule(config, note), config.pretrained_model_name_or_path
    mine = fixed_options(config) | {"start_from": start_of(config, half, note)[1]}
    if place(name).exists():
        mine |= of_base(name, half)
    if all(place(data).is_dir() for data in config.dataset_name):
        mine["data"] = of_data(read_datasets(config))
    if place(config.validation_data).is_dir() and config.validation_data:
        mine["validation_data"] = of_data(chosen(config)[2])
    check_same(config, mine, note)
    if not whole or not enough:
        return ""
    more = f"a larger --max-train-{'epochs' if epochs else 'steps'}"
    if note["stopped_when_worse"]:
        more = "--no-stop-when-worse"
    fallen = " at the rate where its schedule ended" * (config.lr_scheduler != "constant")
    names = code.changed(faster.digests(config), note["code"])
    other = f", by other code ({', '.join(names)})" if names else ""
    return (
        f"{config.out} is finished{other}: {done} steps on {' '.join(config.dataset_name)}. To go "
        f"on{fallen}: {more}; to start anew: another --output-dir; to draw: make generate"
    )
