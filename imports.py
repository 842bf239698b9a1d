"""diffusers and bitsandbytes, imported without what no run here calls: four fifths of the time.

They import at once torch's compiler, peft, torchvision, and transformers' base classes, on an H100's
host 10 of 12 s. A run without --compile never calls the first; LoRA layers are our own; and what
asks for the others are diffusers' other models and its loaders of LoRAs and single files. So they
are out of sight meanwhile: some missing, as on a machine without them, transformers' classes named
but empty. Whoever imports one of them later, as encoding and drawing do, gets it whole.

Only a process that is a run begins like this (start.py): one that imports loop.py or model.py has
whole libraries. Deleting this module leaves every run as it is, only later.
"""

import contextlib
import functools
import gc
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator


def lean(compiled: bool, xformers: bool) -> None:
    """Import both. compiled, xformers: whether the run asks for torch's compiler, for xFormers.

    Where a version cannot do without what is missing, it is left to be imported whole where it is
    needed, and said there.
    """
    if compiled:
        return
    missing = ["torch._dynamo", "peft", "torchvision"] + ["xformers"] * (not xformers)
    missing += ["httpx._main"]  # its command line, which imports a highlighter for all languages
    with resting_collector(), uncompiled():
        with contextlib.suppress(Exception):
            import bitsandbytes  # noqa: F401
        try:
            with out_of_sight(missing):
                from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
        except Exception:
            for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
                del sys.modules[name]


@contextlib.contextmanager
def resting_collector() -> Iterator[None]:
    """Python looks for garbage again and again while objects are made. Those of an import stay:
    nothing is looked for meanwhile, and they are left out of it afterwards.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


@contextlib.contextmanager
def out_of_sight(missing: list[str]) -> Iterator[None]:
    """Inside, the modules of `missing` cannot be imported, and transformers has any class, empty.
    What is imported already stays as it is.
    """

    def empty(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)  # no package, so its modules are missing
        return type(name, (), {})

    named = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("transformers", None))
    named.__getattr__ = empty
    put = {name: None for name in missing} | {"transformers": named}
    put = {name: module for name, module in put.items() if name not in sys.modules}
    sys.modules.update(put)
    try:
        yield
    finally:
        for name in put:
            del sys.modules[name]


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
            setattr(method.__wrapped__, "__dynamo_disable", method.__wrapped__)  # noqa: B010
    compile, disable, mark = torch.compile, torch.compiler.disable, torch._disable_dynamo
    torch.compile, torch.compiler.disable, torch._disable_dynamo = later, unmarked, unmarked
    try:
        yield
    finally:
        torch.compile, torch.compiler.disable, torch._disable_dynamo = compile, disable, mark
