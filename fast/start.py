"""What a run can begin before torch is imported: the GPU's context and the reading of its weights.

Importing torch and diffusers keeps one core busy for seconds. Meanwhile the driver can make its
context and the disk can be read: both let go of the interpreter while they wait. Whatever fails
here is met again where it is needed, and said there. Deleting the folder leaves every run as it
is.
"""

import contextlib
import ctypes
import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from fast import imports
from inputs import hub
from inputs.options import Config

PIECE = 2**24  # bytes read at once


def begin(config: Config) -> None:
    """Start both in threads, and import the slowest libraries (imports.py).

    Nothing waits for the threads: the driver makes one context, whoever asks first, and a file is
    read once. A plan needs neither.
    """
    name, half = config.pretrained_model_name_or_path, config.mixed_precision != "fp32"
    cache_dir = config.cache_dir if config.base_quantization == "nf4" else ""
    jobs = [functools.partial(read_weights, name, half, cache_dir)]
    if config.device != "cpu":
        jobs.append(functools.partial(make_context, config.device))
    for job in jobs if not config.plan_for else ():
        # The driver must not be left in the middle; the reading may be, else a refusal would wait.
        daemon = job.func is read_weights
        threading.Thread(target=quietly, args=(job,), daemon=daemon).start()
    if not config.compile and config.attention != "xformers":  # which take what is left out
        quietly(imports.lean)


def leave_when_interrupted() -> None:
    """Until a run handles signals itself, Ctrl-C ends the process with a sentence: during seconds
    of imports a traceback would say nothing.
    """

    def leave(*_) -> None:
        print("\ninterrupted: nothing had begun", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)

    signal.signal(signal.SIGINT, leave)


def quietly(job: Callable[[], None]) -> None:
    with contextlib.suppress(Exception):
        job()


# ---- the GPU's context ---------------------------------------------------------------------------


def make_context(device: str, load: Callable = ctypes.CDLL) -> None:
    """Have CUDA's driver make the context that torch will use (the device's primary one).

    Nothing where there is no driver or no GPU. The GPU is the one that `device` names, or the
    process's own where torchrun started several. Calls through ctypes run beside the interpreter,
    torch's own do not (https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__PRIMARY__CTX.html).
    """
    number = re.search(r"\d+$", device)
    ordinal = int(number[0]) if number else int(os.environ.get("LOCAL_RANK", 0))
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch does, before the driver reads
    driver, gpu, context = load("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(gpu), ordinal) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), gpu)


# ---- the weights ---------------------------------------------------------------------------------


def read_weights(name: str, half: bool, cache_dir: str = "") -> None:
    """Read the UNet's files, or 4-bit numbers that lie in cache_dir, so that the kernel has them.

    half: the fp16 files, where there are some.
    """
    kept = Path(cache_dir).glob("nf4-*.safetensors") if cache_dir else ()
    newest = max(kept, key=lambda path: path.stat().st_mtime, default=None)
    folder = hub.on_this_disk(name)
    for path in [newest] if newest else hub.weight_files(folder / "unet", half):
        read_ahead(path)


def read_ahead(path: Path) -> int:
    """Bring `path` into the page cache. Returns the bytes that were not there before.

    By reading: posix_fadvise(WILLNEED) stops after about a megabyte.
    """
    buffer, fetched, size = memoryview(bytearray(PIECE)), 0, path.stat().st_size
    with open(path, "rb", buffering=0) as file:
        for at in range(0, size, PIECE):
            # its last byte: the kernel reads a little further than it is asked to
            if not cached(file.fileno(), min(at + PIECE, size) - 1):
                fetched += os.preadv(file.fileno(), [buffer], at)
    return fetched


def cached(descriptor: int, at: int) -> bool:
    """Whether the byte at offset `at` can be read without waiting for the disk."""
    try:
        return os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT) == 1
    except OSError:  # it would wait, or this file system cannot tell
        return False
