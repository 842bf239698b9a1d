"""A run that begins with another adapter's numbers, whatever rank and alpha that has."""

from types import SimpleNamespace

import torch
from torch import Tensor

import lora
from adapters.files import by_our_names
from inputs.adapter_file import check_fits
from inputs.progress import progress


@torch.no_grad()
def start(adapter: lora.Adapter, file: lora.AdapterFile) -> str:
    """Put a file's numbers into a fresh `adapter`, so that it acts as the file does at its own rank
    and alpha. Returns in words what became of them.

    Of a smaller rank the missing rows of A stay as they were drawn, and their columns of B zero; of
    a larger one each module gets the nearest B A of this rank. Modules that the file lacks stay as
    they are. Raises Refusal, naming them, for modules that `adapter` lacks and for other shapes;
    `adapter` is unchanged then.
    """
    theirs, energy, lost = by_our_names(adapter, file), 0.0, 0.0
    layers = {n: each for n, each in adapter.layers.items() if f"{n}.lora_A" in theirs}
    shapes = {f"{n}.lora_A": (file.rank, each.in_features) for n, each in layers.items()}
    shapes |= {f"{n}.lora_B": (each.out_features, file.rank) for n, each in layers.items()}
    check_fits(file.path, theirs, {n: torch.empty(s, device="meta") for n, s in shapes.items()})
    bar = progress(layers.items(), "starting from an adapter", delay=2)
    for name, layer in bar:
        A, B = theirs[f"{name}.lora_A"].float(), theirs[f"{name}.lora_B"].float()
        if file.rank > adapter.rank:
            A, B, squares = nearest(A, B, adapter.rank)
            energy, lost = energy + squares.sum().item(), lost + squares[len(A) :].sum().item()
        layer.lora_A[: len(A)] = A
        layer.lora_B[:, : len(A)] = B * (file.alpha / file.rank / layer.scale)
    said = f"starts from {file.path}, of rank {file.rank} and alpha {file.alpha:g}"
    if file.rank > adapter.rank:
        part = (lost / max(energy, 1e-300)) ** 0.5
        said += f", cut to rank {adapter.rank}: {part:.2%} of its length is lost"
    elif file.rank < adapter.rank:
        said += f", filled up to rank {adapter.rank}"
    if lacking := len(adapter.layers) - len(layers):
        said += f"; {lacking} of {len(adapter.layers)} modules are not in it and start at zero"
    return said


def nearest(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A (rank, in) and B (out, rank) whose product is nearest to B A (Eckart & Young 1936,
    https://doi.org/10.1007/BF02288367), and the squares of all its singular values; in fp64.

    Through the small square between both factors' bases, never the whole (out, in). The singular
    values go into B alone: A's rows are as long as freshly drawn ones, so that none is dead.
    """
    across, right = torch.linalg.qr(A.double().T)  # (in, k), (k, r)
    down, left = torch.linalg.qr(B.double())  # (out, k), (k, r)
    U, S, V = torch.linalg.svd(left @ right.T, full_matrices=False)
    length = 3**-0.5  # of a row of `in` numbers, even between -1 / sqrt(in) and 1 / sqrt(in)
    rows = (across @ V.T)[:, :rank].T * length
    return rows, down @ U[:, :rank] * (S[:rank] / length), S.square()


@torch.no_grad()
def as_lora(adapter: lora.Adapter, rank: int) -> tuple[lora.Adapter, float]:
    """LoRA of one rank that is nearest to what an adapter of another kind adds to each weight, and
    how far all of it is from that, as a share of its length; 0 where the kind's own rank is less.

    The largest singular values, by random projections (Halko et al. 2011,
    https://arxiv.org/abs/0909.4061, algorithm 4.4), of which every start draws the same.
    """
    layers, whole, lost = {}, 0.0, 0.0
    for name, layer in progress(adapter.layers.items(), "refactoring as LoRA", delay=2):
        D = layer.update()  # (out, in)
        with torch.random.fork_rng([D.device] if D.is_cuda else []):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(D, min(rank + 16, *D.shape), niter=6)
        A, B = (each.float() for each in nearest(V.T, U * S, rank)[:2])
        layers[name] = SimpleNamespace(lora_A=A, lora_B=B)
        whole, lost = whole + D.square().sum().item(), lost + (D - B @ A).square().sum().item()
    return lora.Adapter(layers, rank, rank, tuple(layers)), (lost / max(whole, 1e-300)) ** 0.5
