"""GEGLU's gate, value gelu(gate), in one pass over memory forward and in one backward.

GELU is the exact one (Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415, section 2):
g Phi(g) with Phi the normal distribution; its derivative is Phi(g) + g phi(g). On a GPU both are
kernels, registered as operators of PyTorch. Elsewhere, also where a memory plan counts, and where
no kernel can, they are PyTorch's lines, which pass over memory several times.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fast import kernels

SOURCE = """
__device__ float normal(float g) { return 0.5f * (1.0f + erff(g * 0.70710678f)); }

extern "C" __global__ void forward(
    const Pack* values, const Pack* gates, Pack* answers, long long packs) {
  if (own() >= packs) return;
  Pack value = values[own()], gate = gates[own()], answer;
  for (int i = 0; i < SIZE; i++) {
    float g = read(gate.x[i]);
    answer.x[i] = write(read(value.x[i]) * g * normal(g));
  }
  answers[own()] = answer;
}

extern "C" __global__ void backward(const Pack* values, const Pack* gates, const Pack* grads,
    Pack* dvalues, Pack* dgates, long long packs) {
  if (own() >= packs) return;
  Pack value = values[own()], gate = gates[own()], grad = grads[own()], dvalue, dgate;
  for (int i = 0; i < SIZE; i++) {
    float g = read(gate.x[i]), d = read(grad.x[i]), slope = g * 0.39894228f * expf(-0.5f * g * g);
    dvalue.x[i] = write(d * g * normal(g));
    dgate.x[i] = write(d * read(value.x[i]) * (normal(g) + slope));
  }
  dvalues[own()] = dvalue;
  dgates[own()] = dgate;
}
"""


def unavailable(dtype: torch.dtype, device: torch.device) -> str:
    """Why PyTorch's lines compute gates on this device, or "" where a kernel can."""
    return kernels.unavailable(SOURCE, "forward", dtype, device)


def launch(name: str, *tensors: Tensor) -> None:
    """Have a kernel run over `tensors`, each of whose threads has one pack of each."""
    packs = tensors[0].nbytes // kernels.BYTES
    kernels.launch(SOURCE, name, (*tensors, packs), (-(-packs // 256), 1, 256))


def has_kernel(*tensors: Tensor) -> bool:
    """Whether a kernel can take these, all of one shape and dtype."""
    x = tensors[0]
    return x.is_cuda and not unavailable(x.dtype, x.device) and kernels.in_packs(tensors)


def forward(value: Tensor, gate: Tensor) -> Tensor:
    """value gelu(gate), all (M, F)."""
    if has_kernel(value, gate):
        return kernel_forward(value, gate)
    return F.gelu(gate).mul_(value)


def backward(value: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients that reach value and gate, all (M, F)."""
    if has_kernel(value, gate, grad):
        return kernel_backward(value, gate, grad)
    return F.gelu(gate).mul_(grad), torch.ops.aten.gelu_backward(grad * value, gate)


@torch.library.custom_op("sdxl_lora::gate_forward", mutates_args=(), device_types="cuda")
def kernel_forward(value: Tensor, gate: Tensor) -> Tensor:
    answer = torch.empty_like(value)
    launch("forward", value, gate, answer)
    return answer


@torch.library.custom_op("sdxl_lora::gate_backward", mutates_args=(), device_types="cuda")
def kernel_backward(value: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    dvalue, dgate = torch.empty_like(value), torch.empty_like(gate)
    launch("backward", value, gate, grad, dvalue, dgate)
    return dvalue, dgate


# What they give of tensors without numbers.
kernel_forward.register_fake(lambda value, gate: torch.empty_like(value))
kernel_backward.register_fake(
    lambda value, gate, grad: (torch.empty_like(value), torch.empty_like(gate))
)
