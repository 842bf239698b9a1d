"""What the tests share. No network, no GPU: a tiny random UNet for unit tests, a tiny random SDXL
for whole runs.

torch and diffusers are imported where they are used: the process that hands the tests out to the
others (make test) imports this file and neither of them, which saves it seven seconds.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # before huggingface_hub is imported: a test never reaches for the network
)
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["GOMP_SPINCOUNT"] = "1000"  # as inputs/options.py sets it, before torch is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # as make test runs them: each has its part of the cores,
    # and so have the processes it starts, since a run's bytes depend on the number of threads
    cores, workers = os.cpu_count() or 1, int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // workers))

import gc
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

POCKET = ROOT / "pocket" / "model"
INK = ROOT / "pocket" / "ink"
# SDXL in small with random weights (stress/tiny.py), made anew for each session: a run of it takes
# half as long as one of the pocket model, which the tests of what a model knows keep.
TINY_SDXL = Path(tempfile.gettempdir()) / f"tiny-sdxl-{os.getpid()}" / "model"
SDXL = ROOT / "inputs" / "sdxl"  # SDXL base's own config files, without weights

TINY = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "norm_num_groups": 8,
    "cross_attention_dim": 48,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Have make test not even import a file whose tests are all slow: what they need takes seconds
    in each process.
    """
    if "not slow" in config.option.markexpr and collection_path.suffix == ".py":
        text = collection_path.read_text(encoding="utf-8")
        if re.search(r"^pytestmark = .*\bpytest\.mark\.slow\b", text, re.MULTILINE):
            return True
    return None  # as it would be


def make_unet(seed: int = 0, **changes) -> UNet2DConditionModel:
    """A UNet of SDXL's shape with random weights: context width 48, pooled width 24."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(**(TINY | changes)).requires_grad_(False)


def make_batch(count: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch that fits make_unet(), with the keys of data.Examples.batch()."""
    import torch

    g = torch.Generator().manual_seed(seed)
    latent = (count, 4, 8, 8)
    return {
        "mean": torch.randn(latent, generator=g),
        "std": torch.rand(latent, generator=g),
        "eps": torch.randn(latent, generator=g),
        "noise": torch.randn(latent, generator=g),
        "t": torch.randint(0, 1000, (count,), generator=g),
        "context": torch.randn(count, 7, 48, generator=g),
        "pooled": torch.randn(count, 24, generator=g),
        "time_ids": torch.tensor([[512.0, 683, 0, 85, 512, 512]] * count),
    }


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return make_unet()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return make_batch()


@pytest.fixture(autouse=True)
def hub_asked_anew():
    """A test that fakes the Hub must not answer for the next one."""
    yield
    from hub_server import ask_again

    ask_again()


@pytest.fixture(autouse=True, scope="session")
def quick_collections():
    """Or each model.free_memory() goes through all that was imported: a quarter of a whole run."""
    from diffusers import StableDiffusionXLPipeline  # noqa: F401  imported only when asked for

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def tiny_sdxl(quick_collections):
    """The model in TINY_SDXL."""
    from stress import tiny

    shutil.rmtree(TINY_SDXL.parent, ignore_errors=True)  # of a session that was killed
    tiny.build(TINY_SDXL, 0)
    yield
    shutil.rmtree(TINY_SDXL.parent)


@pytest.fixture
def one_thread():
    """Small convolutions on a busy machine wait for each other's threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """One cache of encoded pictures for all whole runs."""
    return tmp_path_factory.mktemp("cache")


def ink_rows(count: int) -> list[str]:
    """The lines of the first `count` ink drawings in metadata.jsonl."""
    return (INK / "metadata.jsonl").read_text().splitlines()[:count]


def write_pictures(folder: Path, rows: list[str]) -> Path:
    """The ink drawings that `rows` name, with these lines in this order, in a new `folder`."""
    folder.mkdir(parents=True)
    for row in rows:
        shutil.copy(INK / json.loads(row)["file_name"], folder)
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """Six of the ink drawings."""
    return write_pictures(tmp_path_factory.mktemp("few") / "ink", ink_rows(6))


def trainer(root: Path, pictures: Path, cache: Path) -> Callable[..., int]:
    """train("name", "--option", ...): a run of TINY_SDXL in root/name of four short steps, 64 px,
    four examples a step, with what the options change; returns its exit code. train.argv("name",
    ...) gives its command line, train.log("name") its log; with --plain the book's own function
    runs.
    """
    fixed = {
        "pretrained-model-name-or-path": TINY_SDXL,
        "dataset-name": pictures,
        "cache-dir": cache,
        "resolution": 64,
        "train-batch-size": 2,
        "gradient-accumulation-steps": 2,
        "max-train-steps": 4,
        "checkpointing-steps": 2,
        "learning-rate": 1e-3,
        "lr-scheduler": "constant",
        "lr-warmup-steps": 0,
    }
    argv = ["pocket", *(word for key, value in fixed.items() for word in (f"--{key}", str(value)))]
    argv += ["--no-tensorboard", "--random-flip", "--validation-prompts"]

    def command(name: str, *options: str) -> list[str]:
        return [*argv, "--output-dir", str(root / name), *options]

    def train(name: str, *options: str) -> int:
        import loop
        from inputs.options import parse
        from keep import training  # the book's tests need nothing of keep/

        # of 8 and 16, which would be most of a run (tests/keep/test_noise.py has them)
        training.noise.PICTURES, training.noise.TIMESTEPS = 1, 4
        if "--plain" in options:
            return loop.train_plain(parse(command(name, *options))) or 0
        return training.main(command(name, *options))

    train.argv = command
    train.log = lambda name: [
        json.loads(line) for line in (root / name / "log.jsonl").read_text().splitlines()
    ]
    return train


@pytest.fixture
def train(few, cache, tmp_path) -> Callable[..., int]:
    """train("name", "--option", ...): a short run of six drawings in tmp_path/name."""
    return trainer(tmp_path, few, cache)
