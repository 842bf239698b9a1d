"""What the tests share. No network, no GPU: a tiny random UNet for unit tests, the pocket model for
whole runs.
"""

import os

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # before huggingface_hub is imported: a test never reaches for the network
)
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["GOMP_SPINCOUNT"] = "1000"  # as config.py sets it, before torch is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # as make test runs them: each has its part of the cores,
    # and so have the processes it starts, since a run's bytes depend on the number of threads
    cores, workers = os.cpu_count() or 1, int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // workers))

import gc
import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from diffusers import UNet2DConditionModel  # noqa: E402

from inputs import hub, vetting  # noqa: E402

POCKET = ROOT / "pocket" / "model"
INK = ROOT / "pocket" / "ink"
SDXL = ROOT / "tests" / "sdxl"  # SDXL base's own config files, without weights

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


def make_unet(seed: int = 0, **changes) -> UNet2DConditionModel:
    """A UNet of SDXL's shape with random weights: context width 48, pooled width 24."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(**(TINY | changes)).requires_grad_(False)


def make_batch(count: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch that fits make_unet(), with the keys of data.Examples.batch()."""
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
    hub.hub_files.cache_clear()
    hub.fetch_from_hub.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def quick_collections():
    """Or each model.free_memory() goes through all that was imported: a quarter of a whole run."""
    from diffusers import StableDiffusionXLPipeline  # noqa: F401  imported only when asked for

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def the_pocket_is_tried_once():
    """model.build_unet() sends shapes through every UNet that is not SDXL base's. The pocket's need
    that once, not in each of some hundred whole runs, of which it is a sixth.
    """
    entries = lambda config: json.dumps(  # noqa: E731  16.0 is not 16
        {name: value for name, value in config.items() if name[0] != "_"}, sort_keys=True
    )
    wanted = entries(json.loads((POCKET / "unet" / "config.json").read_text()))
    known, seen = vetting.is_sdxl_base, itertools.count()

    def is_sdxl_base(unet) -> bool:
        if entries(unet.config) == wanted:
            return next(seen) > 0
        return known(unet)

    vetting.is_sdxl_base = is_sdxl_base
    yield
    vetting.is_sdxl_base = known


@pytest.fixture
def one_thread():
    """Small convolutions on a busy machine wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """One cache of the pocket's encoded pictures for all whole runs."""
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
