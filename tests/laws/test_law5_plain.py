"""Law 5: --plain, the book by itself, and the product end on the same numbers."""

import os
import subprocess
import sys

import pytest
import torch

import data
import loop
import lora
import model
from conftest import trainer
from inputs import options
from inputs.sources import read_datasets
from keep import faster, training
from runs import in_one, matrices, moved
from tree import copied, python

ADAM = {"AdamW": "--no-use-8bit-adam", "AdamW8bit": "--use-8bit-adam"}
LONG = pytest.mark.slow


def numbers(folder) -> dict[str, torch.Tensor]:
    return lora.read(folder).matrices


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def threads():
    """threads(2): how many torch computes with, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# The gradients have norms of 0.2 to 0.8 here: clipping is at work in every step.
@pytest.mark.parametrize(
    ("adam", "rank", "count", "steps"),
    [
        ("AdamW8bit", 5, 1, 3),
        pytest.param("AdamW8bit", 5, 2, 20, marks=LONG),
        pytest.param("AdamW", 16, 1, 20, marks=LONG),
    ],
)
def test_plain_and_the_product_with_the_books_layers_end_on_the_same_bytes(
    train, tmp_path, threads, adam, rank, count, steps
):
    threads(count)
    asked = ("--lora-rank", str(rank), "--max-train-steps", str(steps), ADAM[adam])
    asked += ("--max-grad-norm", "0.03")
    assert train("product", "--no-fused", *asked) == 0
    assert train("by-itself", *asked, "--plain") == 0
    assert equal(numbers(tmp_path / "by-itself"), numbers(tmp_path / "product"))
    assert not (tmp_path / "by-itself" / "checkpoints").exists()
    norms = [row["grad_norm"] for row in train.log("product")]
    assert len(norms) == steps and all(norm > 0.03 for norm in norms)


@LONG
@pytest.mark.parametrize(("adam", "bound"), [("AdamW8bit", 1e-2), ("AdamW", 1e-3)])
def test_fused_layers_end_within_law_1s_bounds_of_the_books(train, tmp_path, adam, bound):
    assert train("fused", "--max-train-steps", "20", ADAM[adam]) == 0
    assert train("book", "--max-train-steps", "20", ADAM[adam], "--no-fused") == 0
    one, other = (in_one(matrices(tmp_path / name)) for name in ("fused", "book"))
    assert 0 < (one - other).norm() <= bound * moved(tmp_path / "book").norm()


def first_gradient(train, precision: str, fast: bool, seed: int = 1) -> torch.Tensor:
    """The whole of it, at a B that is not zero: at zero nothing of A would be seen."""
    config = options.parse(train.argv(f"{precision}-{fast}-{seed}", "--mixed-precision", precision))
    run = training.set_up(config, torch.device("cpu"))[0].run if fast else plain_run(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for matrix in run.trained.values():
            matrix.add_(0.02 * torch.randn(matrix.shape, generator=generator))
    run.scale_on_device.fill_(1.0)
    for batch in run.batches(run, 0):
        run.micro_step(run, batch)
    return in_one({name: each.grad for name, each in run.trained.items()})


def test_the_first_gradient_is_the_books(train):
    book, product = (first_gradient(train, "fp32", fast) for fast in (False, True))
    assert book.norm() > 0 and (product - book).norm() <= 1e-5 * book.norm()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_in_half_precision_it_is_as_near_the_exact_one_as_the_books(train, precision):
    """On random weights it is off by 0.5 % in fp16 and 2 % in bf16, whoever computes it. (The full
    model's against the book's, on a GPU: benchmarks/exactness.py.) One draw of rounding errors may
    be 0.5 to 1.6 times another, which depends on a CPU's kernels, too; so four are taken together,
    where the product's were 1.0 (fp16) and 0.5 times (bf16) the book's.
    """
    book = product = 0.0
    for seed in range(4):
        exact = first_gradient(train, "fp32", False, seed)
        book += (first_gradient(train, precision, False, seed) - exact).square().sum()
        product += (first_gradient(train, precision, True, seed) - exact).square().sum()
    assert 0 < product.sqrt() <= 1.5 * book.sqrt()


def plain_run(config) -> loop.Run:
    """What loop.train_plain() steps."""
    name, device = config.pretrained_model_name_or_path, torch.device("cpu")
    dtype, _ = model.choose_dtype(config.mixed_precision, device)
    schedule, pictures = model.load_noise_schedule(name, device), read_datasets(config)
    examples = data.examples_of(config, pictures, device, dtype, len(schedule.alphas_cumprod))
    unet = model.load_unet(name, device, dtype)
    return loop.assemble(config, unet, examples, schedule, model.latent_scaling(name))


@pytest.mark.slow
def test_in_a_tree_whose_fast_was_deleted_the_command_goes_on_to_the_same_bytes(train, tmp_path):
    """Five steps with it, five without. A folder that is gone but for what Python compiled in it is
    gone, too.
    """
    tree = copied(tmp_path / "tree")

    def start(name: str, steps: int) -> str:
        done = python(
            tree, "loop.py", *train.argv(name, "--no-fused", "--max-train-steps", str(steps))
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    start("whole", 10)
    start("halves", 5)
    for path in (tree / "fast").glob("*.py"):
        path.unlink()
    (tree / "fast" / "__pycache__").mkdir(exist_ok=True)
    assert "by the book's lines: no folder fast/" in start("halves", 10)
    assert equal(numbers(tmp_path / "halves"), numbers(tmp_path / "whole"))


def test_without_fast_what_needs_it_is_refused_in_a_sentence(train, monkeypatch, capsys):
    monkeypatch.setattr(faster, "fast", None)
    for more in (("--base-quantization", "nf4"), ("--plan-for", "T4"), ("--deterministic",)):
        assert train("refused", *more) == 1
        said = capsys.readouterr().err
        assert "no folder fast/; expected that folder beside loop.py. What to do: " in said, more
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train("refused") == 1
    assert "several processes, and there is no folder fast/" in capsys.readouterr().err


@pytest.mark.slow
def test_the_book_trains_in_a_tree_without_fast_and_keep(few, cache, tmp_path):
    """From the pictures to the file, and pictures from the file, by inputs/ and five modules."""
    tree, out = copied(tmp_path / "tree", "inputs"), tmp_path / "out"
    argv = trainer(tmp_path, few, cache).argv("out", "--max-train-steps", "2", "--plain")
    said = []
    for words in (  # processes that have imported nothing before
        ["loop.py", *argv],
        ["generate.py", str(out), "--plain", "--prompts", "cat", "--num-inference-steps", "2"],
    ):
        argv, env = [sys.executable, *words], os.environ | {"PYTHONPATH": ""}
        done = subprocess.run(argv, cwd=tree, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "step 2: loss" in said[0] and lora.read(out).rank == 16
    assert len(list((out / "pictures").glob("*.png"))) == 1
