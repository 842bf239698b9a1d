"""GroupNorm, with SiLU or without, of pictures whose channels lie side by side in memory (NHWC).

Wu & He 2018, https://arxiv.org/abs/1803.08494, section 3: each group of channels of a picture gets
mean 0 and variance 1, then each channel its weight and bias. What a convolution block adds before
(a shift a channel, from the timestep) and what reaches its input beside it (the residual's
gradient) are added inside. On a GPU each way is two kernels, registered as operators of PyTorch:
the first sums over slices of every picture, so that one picture fills a GPU; the second adds the
slices up and computes the answer. Where no kernel can, they are PyTorch's lines.

Activations may have means far above their deviations, so sums are those of the distances to one
number of the group, from the middle of the picture, and their squares (Chan, Golub & LeVeque 1983,
https://doi.org/10.1080/00031305.1983.10483115, equation 3.1): a mean costs no digits of the
variance, and the number may be tens of deviations off. Every sum has one order.

Letters: `N` pictures, `C` channels, `H W` their sides, `G` groups.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast import kernels

THREADS = 512  # of a block

SOURCE = """
struct Call {
  const Pack *x, *grad, *residual;
  Pack* answer;
  const T *weight, *bias, *shift;
  float2 *partial, *moments;  // of each slice and group two sums; of each group mean, 1 / deviation
  long long rows, channels, groups, silu;
  double eps;
};
extern __shared__ float2 seen[];  // of each lane and channel; then of each group

struct Place {  // of a thread: packs from `column` on in every lanes-th row of a slice of a picture
  int rows, groups, columns, width, lanes, lane, column, begin, end;
  long long image;
  float share;
  __device__ Place(const Call& c) : rows(c.rows), groups(c.groups), image(blockIdx.y) {
    columns = (int)c.channels / SIZE, width = (int)c.channels / groups;
    lanes = max(1, (int)blockDim.x / columns), lane = threadIdx.x / columns;
    column = lane < lanes ? threadIdx.x % columns : columns;  // the last threads may have none
    int slice = (rows + gridDim.x - 1) / gridDim.x;
    begin = blockIdx.x * slice + lane, end = min(rows, ((int)blockIdx.x + 1) * slice);
    share = 1.0f / ((float)rows * width);
  }
};
#define COLUMNS for (int p = at.column; p < at.columns; p += blockDim.x)
#define ROWS for (int r = at.begin; r < at.end; r += at.lanes)
#define HERE ((at.image * at.rows + r) * at.columns + p)
#define TEAM 16  // threads that add up for a group
#define GROUPS for (int g = threadIdx.x / TEAM; g < at.groups; g += blockDim.x / TEAM)
#define EACH for (int i = 0; i < SIZE; i++)

__device__ float2 summed(float2 sum) {
  for (int step = TEAM / 2; step; step /= 2) {
    sum.x += __shfl_xor_sync(~0u, sum.x, step);
    sum.y += __shfl_xor_sync(~0u, sum.y, step);
  }
  return sum;
}
__device__ float pushed(const Call& c, const Place& at, int channel) {
  return c.shift ? read(c.shift[at.image * c.channels + channel]) : 0.0f;
}
__device__ float near(const Call& c, const Place& at, int g) {  // a number of the group
  int channel = g * at.width;
  const T* row = (const T*)(c.x + (at.image * at.rows + at.rows / 2) * at.columns);
  return read(row[channel]) + pushed(c, at, channel);
}
__device__ Pack fetch(const Pack* from) {  // what no thread writes
  uint4 bits = __ldg((const uint4*)from);
  return *(Pack*)&bits;
}

struct Affine {  // of a pack's channels: off = x - centre, u = off * scale + offset
  float centre[SIZE], scale[SIZE], offset[SIZE];
  int first, steps;  // group of the first channel; a bit for each channel that begins another
  template <class Moments> __device__ Affine(const Call& c, const Place& at, int p, Moments of) {
    int g = first = p * SIZE / at.width, left = (g + 1) * at.width - p * SIZE;
    steps = 0;
    EACH {
      if (left-- == 0) g++, steps |= 1 << i, left = at.width - 1;
      int channel = p * SIZE + i;
      float2 own = of(g);
      centre[i] = own.x - pushed(c, at, channel);
      scale[i] = own.y * read(c.weight[channel]);
      offset[i] = read(c.bias[channel]);
    }
  }
};
__device__ float sigmoid(float u) { return 1.0f / (1.0f + __expf(-u)); }
__device__ float before_silu(float d, float u) {  // the gradient
  float s = sigmoid(u);
  return d * s * (1.0f + u * (1.0f - s));
}

template <bool BACK> __device__ void look(const Call& c) {
  Place at(c);
  const float2* moments = c.moments + at.image * at.groups;
  COLUMNS {
    Affine of(c, at, p, [&](int g) { return BACK ? moments[g] : make_float2(near(c, at, g), 1); });
    float sum[SIZE] = {}, more[SIZE] = {};
    #pragma unroll (BACK ? 1 : 4)
    ROWS {
      Pack x = fetch(c.x + HERE), grad = {};
      if (BACK) grad = fetch(c.grad + HERE);
      EACH {
        float off = read(x.x[i]) - of.centre[i], d = BACK ? read(grad.x[i]) : off;
        if (BACK && c.silu) d = before_silu(d, off * of.scale[i] + of.offset[i]);
        sum[i] += d, more[i] += d * off;
      }
    }
    EACH {  // neighbours write side by side
      float weight = BACK ? read(c.weight[p * SIZE + i]) : 1, scale = BACK ? of.scale[i] : 1;
      seen[(at.lane * SIZE + i) * at.columns + p] = {sum[i] * weight, more[i] * scale};
    }
  }
  __syncthreads();
  GROUPS {
    float2 sum = {0, 0};
    for (int e = threadIdx.x % TEAM; e < at.width; e += TEAM)
      for (int l = 0, channel = g * at.width + e; l < at.lanes; l++) {
        float2 own = seen[(l * SIZE + channel % SIZE) * at.columns + channel / SIZE];
        sum.x += own.x, sum.y += own.y;
      }
    sum = summed(sum);
    if (threadIdx.x % TEAM == 0)
      c.partial[(at.image * at.groups + g) * gridDim.x + blockIdx.x] = sum;
  }
}

template <bool BACK> __device__ void answer(const Call& c) {
  Place at(c);
  float2* moments = c.moments + at.image * at.groups;
  GROUPS {
    float2 sum = {0, 0};
    for (int e = threadIdx.x % TEAM; e < gridDim.x; e += TEAM) {
      float2 own = c.partial[(at.image * at.groups + g) * gridDim.x + e];
      sum.x += own.x, sum.y += own.y;
    }
    sum = summed(sum);
    float mean = sum.x * at.share, second = sum.y * at.share;
    if (BACK) {
      float inverse = moments[g].y;
      seen[g] = {mean * inverse, second * inverse * inverse};
    } else {
      float variance = fmaxf(second - mean * mean, 0) + (float)c.eps;
      seen[g] = {near(c, at, g) + mean, 1.0f / sqrtf(variance)};
      if (blockIdx.x == 0) moments[g] = seen[g];
    }
  }
  __syncthreads();
  COLUMNS {
    Affine of(c, at, p, [&](int g) { return BACK ? moments[g] : seen[g]; });
    #pragma unroll (BACK ? 1 : 2)
    ROWS {
      Pack x = fetch(c.x + HERE), grad = {}, more = {}, made;
      if (BACK) grad = fetch(c.grad + HERE);
      if (BACK && c.residual) more = fetch(c.residual + HERE);
      int g = of.first;
      EACH {
        float off = read(x.x[i]) - of.centre[i], u = off * of.scale[i] + of.offset[i];
        if (BACK) {
          g += of.steps >> i & 1;
          float d = c.silu ? before_silu(read(grad.x[i]), u) : read(grad.x[i]);
          u = d * of.scale[i] - seen[g].x - off * seen[g].y + read(more.x[i]);
        } else if (c.silu) {
          u *= sigmoid(u);
        }
        made.x[i] = write(u);
      }
      c.answer[HERE] = made;
    }
  }
}
#define KERNEL extern "C" __global__ void __launch_bounds__(512, 2)
KERNEL look_forward(Call c) { look<false>(c); }
KERNEL answer_forward(Call c) { answer<false>(c); }
KERNEL look_backward(Call c) { look<true>(c); }
KERNEL answer_backward(Call c) { answer<true>(c); }
"""


# ---- PyTorch's lines -----------------------------------------------------------------------------


def shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """x + shift in fp32, unless x is in double precision, in torch's order: on a CPU its kernel for
    NHWC sums squares.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x if shift is None else x + shift[:, :, None, None]).contiguous()


def define(x, affine, shift, groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor]:
    """What forward() gives."""
    wide = shifted(x, shift)
    weight, bias = (each.to(wide.dtype) for each in affine)
    sizes = (*x.shape[:2], x.shape[2:].numel(), groups)
    y, *moments = torch.native_group_norm(wide, weight, bias, *sizes, eps)
    return nhwc((F.silu(y) if silu else y).to(x.dtype)), torch.stack(moments, 2)


def define_back(grad, x, affine, shift, moments, residual, silu: bool) -> Tensor:
    """What backward() gives."""
    wide, groups = shifted(x, shift), moments.shape[1]
    weight, bias = (each.to(wide.dtype) for each in affine)
    mean, inverse = (each.to(wide.dtype).contiguous() for each in moments.unbind(2))
    d = grad.to(wide.dtype).contiguous()
    if silu:
        scale = inverse.repeat_interleave(len(weight) // groups, 1) * weight
        shift = bias - mean.repeat_interleave(len(weight) // groups, 1) * scale
        d = torch.ops.aten.silu_backward(
            d, wide * scale[:, :, None, None] + shift[:, :, None, None]
        )
    sizes = (*x.shape[:2], x.shape[2:].numel(), groups)
    how = (mean, inverse, weight, *sizes, (True, False, False))
    dx, *_ = torch.ops.aten.native_group_norm_backward(d, wide, *how)
    return nhwc((dx if residual is None else dx + residual).to(x.dtype))


# ---- the operators -------------------------------------------------------------------------------


def nhwc(x: Tensor) -> Tensor:
    """x (N, C, H, W), with its channels side by side in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def forward(
    x: Tensor, norm: nn.GroupNorm, shift: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """norm(x + shift), through SiLU if asked for, of x (N, C, H, W) in NHWC and shift (N, C); and
    (N, G, 2): the groups' means and 1 / deviation.
    """
    affine = [norm.weight, norm.bias]
    return whole(x, affine, shift, norm.num_groups, norm.eps, silu)


def backward(
    grad: Tensor, x: Tensor, norm: nn.GroupNorm, shift, moments, residual, silu: bool
) -> Tensor:
    """The gradient that reaches forward()'s x, plus `residual`, all (N, C, H, W) in NHWC."""
    return whole_back(grad, x, [norm.weight, norm.bias], shift, moments, residual, silu)


def unavailable(dtype: torch.dtype, device: torch.device) -> str:
    """Why PyTorch's lines compute on this device, or "" where kernels can."""
    return kernels.unavailable(SOURCE, "look_forward", dtype, device)


def has_kernel(x: Tensor, weight: Tensor, groups: int, *others: Tensor | None) -> bool:
    """Whether kernels can take x and all `others` of its shape."""
    if not x.is_cuda or weight.dtype != x.dtype or unavailable(x.dtype, x.device):
        return False
    lying = tuple(each.permute(0, 2, 3, 1) for each in (x, *others) if each is not None)
    whole = x.shape[1] * x.element_size() % kernels.BYTES == 0 and groups % 2 == 0
    return whole and x.shape[1] <= 8 * THREADS and kernels.in_packs(lying)


def launch(way: str, tensors: tuple, moments: Tensor, silu: bool, eps: float = 0.0) -> None:
    """Have the two kernels of a way run. tensors: as Call has them, up to the shift."""
    (N, C, H, W), groups = tensors[0].shape, moments.shape[1]
    lanes = max(1, THREADS // (C * tensors[0].element_size() // kernels.BYTES))
    slices = min(-(-H * W // lanes), max(64, 128 // N))
    partial = moments.new_empty(N, groups, slices, 2)
    arguments = (*tensors, partial, moments, H * W, C, groups, silu, eps)
    for name in (f"look_{way}", f"answer_{way}"):
        kernels.launch(SOURCE, name, arguments, (slices, N, THREADS), shared=8 * lanes * C)


def empty(x: Tensor, affine, shift, groups: int, *_) -> tuple[Tensor, Tensor]:
    """Room for what forward() gives."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), x.new_empty(len(x), groups, 2, dtype=wide)


@torch.library.custom_op("sdxl_lora::group_norm", mutates_args=())
def whole(
    x: Tensor, affine: Sequence[Tensor], shift: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    if not has_kernel(x, affine[0], groups):
        return define(x, affine, shift, groups, eps, silu)
    answer, moments = empty(x, affine, shift, groups)
    launch("forward", (x, None, None, answer, *affine, shift), moments, silu, eps)
    return answer, moments


@torch.library.custom_op("sdxl_lora::group_norm_back", mutates_args=())
def whole_back(
    grad: Tensor,
    x: Tensor,
    affine: Sequence[Tensor],
    shift: Tensor | None,
    moments: Tensor,
    residual: Tensor | None,
    silu: bool,
) -> Tensor:
    if not has_kernel(x, affine[0], moments.shape[1], grad, residual):
        return define_back(grad, x, affine, shift, moments, residual, silu)
    answer = torch.empty_like(x)
    launch("backward", (x, grad, residual, answer, *affine, shift), moments, silu)
    return answer


# What they give of tensors without numbers.
whole.register_fake(empty)
whole_back.register_fake(lambda grad, x, *_: torch.empty_like(x))
