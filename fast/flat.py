"""Everything that learns as one vector: one optimizer tensor, one exchange, one cast in a step; or
as two, where A and B have rates of their own, or scales are learned besides.

The book's LoRA layers hold 1,120 small matrices. Stepping, casting and summing them one by one is
thousands of kernels a step; as slices of one flat fp32 vector they are one each. The layers read
views of it, and the book's lines run unchanged.

Letters: `N` numbers in the vector, padding included.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fast.aside import ASIDE

# bitsandbytes quantises the optimizer's state in blocks of 256 numbers. Starting every matrix at a
# multiple of that keeps a block from straddling two of them, so the vector steps to the same bytes
# as separate matrices do. (Its 8-bit zero is not quite zero, so padding drifts; nothing reads it.)
QUANT_BLOCK = 256


# Of an optimizer's state what is no number of any matrix, besides what is no tensor: the count of
# steps, and what the 256 codes of 8-bit AdamW stand for. Its absmax1 and absmax2 hold a number for
# each QUANT_BLOCK.
SHARED = ("step", "qmap1", "qmap2")


def shared(key: str, value) -> bool:
    """Whether an entry of the optimizer's state is of all matrices at once."""
    return key in SHARED or not torch.is_tensor(value)


def padded(count: int) -> int:
    """`count` rounded up to a multiple of QUANT_BLOCK."""
    return -(-count // QUANT_BLOCK) * QUANT_BLOCK


def alike(trained: dict[str, nn.Parameter]) -> list[dict[str, nn.Parameter]]:
    """`trained` in parts that have one vector each: matrices, and scales (DoRA's lengths)."""
    scales = {name: each for name, each in trained.items() if each.ndim < 2}
    matrices = {name: each for name, each in trained.items() if each.ndim > 1}
    return [part for part in (matrices, scales) if part]


class Flat:
    """`trained`, the parameters of `model` by name, laid into one vector, in place.

    vector: (N,) fp32 Parameter with its gradient; views: each former parameter's slice by name, in
    the order given, with its slice of the gradient as .grad. Whatever the parameters are called,
    the module that had one now has its view as a plain attribute.
    """

    def __init__(self, model: nn.Module, trained: dict[str, nn.Parameter]):
        self.spans, at = {}, 0  # name: where its matrix begins, in the vector's order
        # All A, then all B: those that share an input follow one another and can act as one matrix.
        for name in sorted(trained, key=lambda name: name.rpartition(".")[2]):
            self.spans[name], at = at, at + padded(trained[name].numel())
        device = next(iter(trained.values())).device
        self.vector = nn.Parameter(torch.zeros(at, dtype=torch.float32, device=device))
        self.vector.grad = torch.zeros_like(self.vector)
        self.shapes = {name: each.shape for name, each in trained.items()}
        self.views, grads = self.split(self.vector.detach()), self.split(self.vector.grad)
        self.homes = {}  # name: the module and the attribute that the layer's forward reads
        for name, view in self.views.items():
            view.copy_(trained[name].detach())
            view.grad = grads[name]
            owner, _, leaf = name.rpartition(".")
            self.homes[name] = (model.get_submodule(owner), leaf)
            delattr(*self.homes[name])
        self._read(self.views)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A view of each matrix's numbers in `vector` (N,), by name, in the order of `trained`."""
        return {
            name: vector[self.spans[name] :][: shape.numel()].view(shape)
            for name, shape in self.shapes.items()
        }

    def _read(self, tensors: dict[str, Tensor]) -> None:
        for name, (module, leaf) in self.homes.items():
            setattr(module, leaf, tensors[name])

    def micro_step(self, inner: Callable, aside: bool = True) -> Callable:
        """`inner`, a micro_step(run, batch), while which every layer reads its matrices from one
        cast of the vector to the UNet's dtype. The cast is a leaf that gathers the gradient of all
        of them, which reaches the vector's in one addition.

        aside: whether a second stream may compute these gradients, which nothing else may read.
        """
        parts = []  # of the vector, in order: a matrix's name, or "" for padding, and its size
        for name in self.spans:
            count = self.shapes[name].numel()
            parts += [(name, count)] + [("", padded(count) - count)] * (count % QUANT_BLOCK > 0)
        names, sizes = zip(*parts, strict=True)

        def micro_step(run, batch) -> None:
            scales = all(len(shape) == 1 for shape in self.shapes.values())  # they stay fp32
            dtype = torch.float32 if scales else next(run.unet.parameters()).dtype
            cast = self.vector.detach().to(dtype).requires_grad_()
            # split() and not slices: each slice's gradient would be a vector of the whole size.
            parts = cast.split(sizes)
            found = zip(names, parts, strict=True)
            self._read({name: part.view(self.shapes[name]) for name, part in found if name})
            try:
                with ASIDE.while_recorded(parts[0]) if aside else contextlib.nullcontext():
                    inner(run, batch)
            finally:
                self._read(self.views)
            self.vector.grad.add_(cast.grad)

        return micro_step

    def check_tied(self) -> None:
        """Assert that every view and its gradient still live in the vector. copy.deepcopy(model)
        and zero_grad() with set_to_none untie them without a word: the optimizer would then step
        numbers that no layer reads.
        """
        for name, (module, leaf) in self.homes.items():
            matrix, at = getattr(module, leaf), 4 * self.spans[name]
            tied = self.vector.grad is not None and matrix.grad is not None
            assert tied and matrix.data_ptr() == self.vector.data_ptr() + at, name
            assert matrix.grad.data_ptr() == self.vector.grad.data_ptr() + at, name


class FlatMoments:
    """The optimizer's state over the vectors of several Flats, read and written matrix by matrix,
    so that a checkpoint knows of no vector. A matrix's 8-bit blocks end with it, so the slices are
    exact.
    """

    def __init__(self, flats: list[Flat], optimizer: torch.optim.Optimizer):
        self.flats, self.state = flats, optimizer.state

    def read(self) -> dict[str, dict]:
        """{name: what the optimizer keeps for that matrix}; empty before the first step."""
        found = {}
        for flat in self.flats:
            flat.check_tied()  # whoever saves what is no longer trained would not notice
            kept = self.state.get(flat.vector, {})
            parts = {key: self._of_each(flat, key, value) for key, value in kept.items()}
            for name in flat.shapes:
                found[name] = {key: part[name] for key, part in parts.items()}
        return found

    def write(self, moments: dict[str, dict]) -> None:
        """Put back what read() gave, here or of separate matrices."""
        for flat in self.flats:
            vector, kept = flat.vector, dict(moments[next(iter(flat.shapes))])
            for key, first in kept.items():
                if key.startswith("qmap"):
                    kept[key] = first.to(vector.device)
                elif not shared(key, first):
                    count = vector.numel() // (QUANT_BLOCK if key.startswith("absmax") else 1)
                    kept[key] = vector.detach().new_zeros(count, dtype=first.dtype)
                    if first.dtype == torch.uint8:  # padding is zero, and code 0 is not
                        kept[key].fill_(int(kept[f"qmap{key[-1]}"].abs().argmin()))
                    for name, part in self._of_each(flat, key, kept[key]).items():
                        part.copy_(moments[name][key])
            if kept:
                self.state[vector] = kept

    def _of_each(self, flat: Flat, key: str, value) -> dict:
        """For each matrix its part of `value`: all of it, its numbers, or one a block."""
        if shared(key, value):
            return dict.fromkeys(flat.shapes, value)
        if not key.startswith("absmax"):
            return flat.split(value)
        return {
            name: value[flat.spans[name] // QUANT_BLOCK :][: padded(shape.numel()) // QUANT_BLOCK]
            for name, shape in flat.shapes.items()
        }
