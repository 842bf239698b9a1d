"""--deterministic: kernels that add in whatever order their threads come, exchanged for ones that
have one order, so that a continued run equals an uninterrupted one to the bit on a GPU, too.

What differs from call to call without it, of 19 kernels as a step calls them, on an H100 with torch
2.11 (benchmarks/results/deterministic_kernels.json): the backward pass of self-attention, and
nothing else.
- flash attention's and cuDNN's in each of 19 repeats, memory-efficient attention's in 3: blocks of
  keys add to one gradient by atomic operations. Cross-attention, with 77 keys: in none.
- convolutions, norms, GEGLU, matrix products, the gradient's norm, NF4 and AdamW8bit: in none.
A step's gradient differs by 4e-4 of its norm, whenever it is computed again.

What is done about it, by torch's documentation of use_deterministic_algorithms() and the messages
of its CUDA library, 2.15: flash and memory-efficient attention take one block after the other;
cuDNN's attention is excluded, as torch excludes it for training then; cuDNN's convolutions take
kernels that promise an order; and CUBLAS_WORKSPACE_CONFIG, read when cuBLAS is first called, fixes
the workspace that it may otherwise choose anew while several streams are at work. With it no answer
of the same 17 kernels (cuDNN's attention aside) and of a whole step differs in 19 repeats, and t4
and lowmem in fp16, killed and continued while the loss scale moves, end on the byte of runs left in
peace (benchmarks/results/deterministic_runs.json). A recorded step takes 4 to 17 % longer.

On a CPU all kernels add in one order, as long as the number of threads stays. Where an operation
has no such kernel, torch raises an error.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from inputs.files import Refusal, first_line
from inputs.options import Config

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# What changes the order of additions and may otherwise change between two starts of a run.
ORDER = (
    *("train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
    *("checkpointed_blocks", "attention", "fused", "cuda_graph"),
)


@contextlib.contextmanager
def mode() -> Iterator[None]:
    """While the block runs, only deterministic kernels; afterwards all is as before. To be entered
    before CUDA computes. Raises Refusal for an operation that has no deterministic kernel.
    """
    os.environ.setdefault(WORKSPACE, ":4096:8")
    cudnn, attention = torch.backends.cudnn, torch.backends.cuda
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    cudnn_attention = attention.cudnn_sdp_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
        attention.enable_cudnn_sdp(False)
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        found, expected = f"--deterministic, and {first_line(error)}", "operations of one order"
        remedy = "the same command without --deterministic, or with --attention sdpa"
        raise Refusal(found, expected, remedy) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
        attention.enable_cudnn_sdp(cudnn_attention)


def promise(config: Config, device: torch.device, processes: int = 1) -> dict[str, str]:
    """What a deterministic run's bits depend on besides what it is, as text.

    Part of a checkpoint's identity: with --deterministic only a run that had all of it from its
    first step is continued. Without it any run is: the promise may be given up, on another GPU say.
    """
    where = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    if processes > 1:  # their sums are added in an order of their own
        where += f", {processes} processes"
    order = {name: str(getattr(config, name)) for name in ORDER}
    return {"deterministic": "True", "computed by": f"torch {torch.__version__}, {where}"} | order
