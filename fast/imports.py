"""diffusers and bitsandbytes, imported without what no run here calls: most of the time they take.

They import at once torch's compiler, peft, torchvision, transformers' base classes and scipy's
statistics: on an H100's host 10 of 12 s. A step without --compile never calls the first; LoRA
layers are our own; and what asks for the others are diffusers' other models, its loaders of LoRAs
and of single files, and samplers at their first use. So they are out of sight meanwhile: some
missing, as on a machine without them, others named but empty. Whoever imports one of them later
gets it whole: encoding and drawing do, and a count of a step without numbers (a memory plan that is
not known yet, a UNet that is not SDXL base's) takes the compiler.

Only a process that is a run begins like this (start.py), without --compile and xFormers: one that
imports loop.py or model.py has whole libraries. Deleting this module leaves every run as it is,
only later.
"""

import contextlib
import functools
import gc
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Iterator
from types import ModuleType

from inputs.files import first_line

# diffusers asks for these at once; the last two are of other models and kernels.
MISSING = ("torch._dynamo", "peft", "torchvision", "torchao", "xformers")


def lean() -> None:
    """Import both, unless one of them or transformers is there already.

    A version that cannot do without what is missing is imported whole, and the reason said.
    """
    if {"diffusers", "bitsandbytes", "transformers"} & sys.modules.keys():
        return
    # httpx's command line, which huggingface_hub 1.x imports, with a highlighter for all languages
    with resting_collector(), out_of_sight({"httpx._main": None}), uncompiled():
        with contextlib.suppress(Exception):  # met and said where it is needed
            import bitsandbytes  # noqa: F401
        try:
            named = {name: empty_classes(name) for name in ("transformers", "scipy.stats")}
            with quiet(), out_of_sight(dict.fromkeys(MISSING) | named), nothing_listed():
                from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
        except Exception as error:
            for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
                del sys.modules[name]
            why = first_line(error.__cause__ or error)
            print(f"diffusers is imported whole, which takes longer: {why}", file=sys.stderr)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, no warning is logged: diffusers warns of what it does without."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def resting_collector() -> Iterator[None]:
    """Python looks for garbage again and again while objects are made. Those of an import stay."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def out_of_sight(instead: dict[str, ModuleType | None]) -> Iterator[None]:
    """Inside, whoever imports a module named in `instead` gets that; None: it is missing.

    What is imported already stays as it is.
    """
    put = {name: module for name, module in instead.items() if name not in sys.modules}
    sys.modules.update(put)
    try:
        yield
    finally:
        for name in put:
            sys.modules.pop(name, None)


def empty_classes(name: str) -> ModuleType:
    """A module of that name that has any class, empty, and no modules in it."""

    def empty(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None))
    module.__getattr__ = empty
    return module


@contextlib.contextmanager
def nothing_listed() -> Iterator[None]:
    """diffusers reads the file lists of all that is installed, for four packages that it may know
    by another name; no run uses one. Inside, the list is empty.
    """
    whole = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = dict
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = whole


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """What is given to torch.compile() inside is compiled when it is first called; what is marked
    as never to be compiled, and torch's optimizers, which are so marked, go without the mark.

    The mark alone would import the compiler: a third of the time that all imports take.
    """
    import torch

    def later(function=None, **options):
        if function is None:
            return functools.partial(later, **options)
        compiled = functools.cache(lambda: compile(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    def unmarked(function=None, *_, **__):
        return function or (lambda function: function)

    for method in vars(torch.optim.Optimizer).values():
        if hasattr(method, "__wrapped__"):  # torch keeps the marked function here when it is called
            setattr(method.__wrapped__, "__dynamo_disable", method.__wrapped__)
    compile, disable, mark = torch.compile, torch.compiler.disable, torch._disable_dynamo
    torch.compile, torch.compiler.disable, torch._disable_dynamo = later, unmarked, unmarked
    try:
        yield
    finally:
        torch.compile, torch.compiler.disable, torch._disable_dynamo = compile, disable, mark
