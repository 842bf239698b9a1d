"""Kernels of our own: CUDA C++ as text, compiled for the GPU at hand when first called.

The compiler is NVRTC (https://docs.nvidia.com/cuda/nvrtc/), which needs no GPU, no headers and no
C++ compiler beside it. torch's CUDA wheels bring it, and cuda-bindings, through which it is called.
A kernel is launched on torch's current stream, so that a CUDA graph records it.
"""

import ctypes
import functools
import struct

import torch
from torch import Tensor

from inputs.files import first_line

BYTES = 16  # of a pack: the most that a thread reads or writes at once

# What every source begins with. T is how a number is kept in memory; kernels compute in fp32.
# CUDA's own types for half precision are in headers that not every machine has.
PACK = """
struct alignas(16) Pack { T x[16 / sizeof(T)]; };
const int SIZE = 16 / sizeof(T);
__device__ long long own() { return blockIdx.x * (long long)blockDim.x + threadIdx.x; }
"""
NUMBERS = {
    torch.float32: """
typedef float T;
__device__ float read(T x) { return x; }
__device__ T write(float x) { return x; }
""",
    torch.float16: """
typedef unsigned short T;
__device__ float read(T x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
__device__ T write(float x) { T y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
""",
    torch.bfloat16: """
typedef unsigned short T;  // the upper half of an fp32 number, rounded to nearest, ties to even
__device__ float read(T x) { return __uint_as_float((unsigned)x << 16); }
__device__ T write(float x) {
  unsigned bits = __float_as_uint(x);
  return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
}
""",
}


def checked(answer: tuple):
    """What a call of cuda-bindings gives beside its error code. Raises RuntimeError for one."""
    error, *values = answer
    if error:
        raise RuntimeError(error.name)
    return values[0] if values else None


@functools.cache
def compiled(source: str, dtype: torch.dtype, architecture: str) -> bytes:
    """The machine code of `source`, with T for `dtype`, for an architecture such as sm_75. Raises
    ImportError without cuda-bindings, and RuntimeError with what the compiler says.
    """
    from cuda.bindings import nvrtc

    text = (NUMBERS[dtype] + PACK + source).encode()
    program = checked(nvrtc.nvrtcCreateProgram(text, b"kernels.cu", 0, [], []))
    (error,) = nvrtc.nvrtcCompileProgram(program, 1, [f"-arch={architecture}".encode()])
    if error:
        said = bytes(checked(nvrtc.nvrtcGetProgramLogSize(program)))
        checked(nvrtc.nvrtcGetProgramLog(program, said))
        raise RuntimeError(said.decode().strip("\0\n ") or error.name)
    code = bytes(checked(nvrtc.nvrtcGetCUBINSize(program)))
    checked(nvrtc.nvrtcGetCUBIN(program, code))
    return code


@functools.cache
def loaded(source: str, name: str, dtype: torch.dtype, device: torch.device):
    """The kernel `name` of `source` on a GPU. Raises what compiled() raises."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    code = compiled(source, dtype, f"sm_{major}{minor}")
    with torch.cuda.device(device):
        torch.empty(1, device=device)  # now this device has a context
        module = checked(driver.cuModuleLoadData(code))
        return checked(driver.cuModuleGetFunction(module, name.encode()))


@functools.cache
def unavailable(source: str, name: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why there is no kernel `name` of `source` on this device, or "" where there is."""
    try:
        loaded(source, name, dtype, device)
    except Exception as error:  # no GPU, no cuda-bindings, a compiler that does not know the GPU
        return first_line(error)
    return ""


def in_packs(tensors: tuple[Tensor, ...]) -> bool:
    """Whether each is contiguous, begins at a multiple of a pack, and is whole packs long."""
    return all(
        x.is_contiguous() and x.data_ptr() % BYTES == 0 and x.nbytes % BYTES == 0 for x in tensors
    )


def launch(source: str, name: str, arguments: tuple, shape: tuple, shared: int = 0) -> None:
    """Have the kernel `name` of `source` run on the device of the first argument, a tensor, with T
    for its dtype. Arguments are pointers (tensors; None is null), long long and double, eight bytes
    each: a kernel takes them one after another, or as one struct. shape: blocks along x and along
    y, and threads of a block; shared: bytes of a block's shared memory.
    """
    from cuda.bindings import driver

    x, count = arguments[0], len(arguments)
    bits = (each.data_ptr() if isinstance(each, Tensor) else each or 0 for each in arguments)
    bits = (struct.pack("d" if isinstance(each, float) else "q", each) for each in bits)
    values = ctypes.create_string_buffer(b"".join(bits))
    addresses = [ctypes.addressof(values) + 8 * i for i in range(count)]
    kernel = loaded(source, name, x.dtype, x.device)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        blocks, pointers = (*shape[:2], 1), (ctypes.c_void_p * count)(*addresses)
        how = (shared, stream, ctypes.addressof(pointers), 0)
        checked(driver.cuLaunchKernel(kernel, *blocks, shape[2], 1, 1, *how))
