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

WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # that cuBLAS documents
# What changes the order of additions and may otherwise change between two starts of a run.
ORDER = (
    *("train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
    *("checkpointed_blocks", "attention", "fused", "compile", "cuda_graph"),
)


@contextlib.contextmanager
def mode(on: bool) -> Iterator[None]:
    """While the block runs, only deterministic kernels; afterwards all is as before.

    Raises Refusal where CUDA has computed already with another workspace, and for an operation that
    has no deterministic kernel.
    """
    if not on:
        yield
        return
    if os.environ.get(WORKSPACE) not in WORKSPACES:
        if computed():
            raise Refusal(
                f"CUDA has computed with {WORKSPACE}={os.environ.get(WORKSPACE, '')}",
                f"{' or '.join(WORKSPACES)} before it does",
                f"export {WORKSPACE}={WORKSPACES[0]}, then start Python anew",
            )
        os.environ[WORKSPACE] = WORKSPACES[0]
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
        raise Refusal(
            f"--deterministic, and {first_line(error)}",
            "operations that add in one order",
            "the same command without --deterministic, or with --attention sdpa --no-compile",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
        attention.enable_cudnn_sdp(cudnn_attention)


def computed() -> bool:
    """Whether this process has used a GPU's memory: cuBLAS has not read its workspace before.

    That CUDA has started says nothing, since bitsandbytes asks it for the GPU's name.
    """
    if not torch.cuda.is_initialized():
        return False
    counts = map(torch.cuda.memory_stats, range(torch.cuda.device_count()))
    return any(count.get("allocation.all.allocated", 0) for count in counts)


def promise(config: Config, device: torch.device, processes: int = 1) -> dict[str, str]:
    """What a deterministic run's bits depend on besides what it is, as text; nothing for others.

    Part of a checkpoint's identity: with --deterministic only a run that had all of it from its
    first step is continued. Without it any run is: the promise may be given up, on another GPU say.
    """
    if not config.deterministic:
        return {}
    where = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    if processes > 1:  # their sums are added in an order of their own
        where += f", {processes} processes"
    order = {name: str(getattr(config, name)) for name in ORDER}
    return {"deterministic": "True", "computed by": f"torch {torch.__version__}, {where}"} | order
