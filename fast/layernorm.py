"""LayerNorm with the addition before it, x + more -> (x + more, norm(x + more)), and backward with
the gradient that reaches the sum beside the norm: each way one pass over memory.

Ba et al. 2016, https://arxiv.org/abs/1607.06450, equation 4. On a GPU a warp has a row, which it
holds in its registers: so the variance is that of the distances to the mean, and the backward pass
computes both again. Where no kernel can, they are PyTorch's lines.

Letters: `M` rows, `D` numbers in each.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast import kernels

WIDEST = 1280  # numbers of a row: SDXL's

SOURCE = """
struct Call {
  const Pack *x, *more, *grad;
  Pack *sum, *answer;
  const Pack *weight, *bias;
  long long rows, columns;
  double eps;
};
const int MOST = 1280 / SIZE / 32;  // packs of a thread
#define EACH _Pragma("unroll") for (int k = 0; k < MOST; k++) \\
  if (int p = threadIdx.x % 32 + 32 * k; p < c.columns)
#define NUMBER for (int i = 0; i < SIZE; i++)
#define ROW (blockIdx.x * (blockDim.x / 32LL) + threadIdx.x / 32)
#define HERE (ROW * c.columns + p)

__device__ float all(float x) {
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
struct Held {  // a row
  Pack x[MOST];
  __device__ Held(const Call& c, const Pack* from) {
    EACH {
      uint4 bits = __ldg((const uint4*)(from + HERE));
      x[k] = *(Pack*)&bits;
    }
  }
};
struct Moments {
  float mean, inverse;
  __device__ Moments(const Call& c, const Held& row) {
    float sum = 0, rest = 0, count = c.columns * SIZE;
    EACH NUMBER sum += read(row.x[k].x[i]);
    mean = all(sum) / count;
    EACH NUMBER {
      float off = read(row.x[k].x[i]) - mean;
      rest += off * off;
    }
    inverse = 1.0f / sqrtf(all(rest) / count + (float)c.eps);
  }
};

extern "C" __global__ void forward(Call c) {
  if (ROW >= c.rows) return;
  Held row(c, c.x);
  if (c.more) {
    Held more(c, c.more);
    EACH {
      NUMBER row.x[k].x[i] = write(read(row.x[k].x[i]) + read(more.x[k].x[i]));
      c.sum[HERE] = row.x[k];
    }
  }
  Moments of(c, row);
  EACH {
    Pack weight = c.weight[p], bias = c.bias[p], y;
    NUMBER {
      float normal = (read(row.x[k].x[i]) - of.mean) * of.inverse;
      y.x[i] = write(normal * read(weight.x[i]) + read(bias.x[i]));
    }
    c.answer[HERE] = y;
  }
}

extern "C" __global__ void backward(Call c) {
  if (ROW >= c.rows) return;
  Held row(c, c.x), grad(c, c.grad), more(c, c.more), weight(c, c.weight - ROW * c.columns);
  Moments of(c, row);
  float sum = 0, tilt = 0;
  EACH NUMBER {
    float d = read(grad.x[k].x[i]) * read(weight.x[k].x[i]);
    sum += d, tilt += d * (read(row.x[k].x[i]) - of.mean) * of.inverse;
  }
  float share = 1.0f / (c.columns * SIZE);
  sum = all(sum) * share, tilt = all(tilt) * share;
  EACH {
    Pack dx;
    NUMBER {
      float normal = (read(row.x[k].x[i]) - of.mean) * of.inverse;
      float d = read(grad.x[k].x[i]) * read(weight.x[k].x[i]);
      dx.x[i] = write((d - sum - normal * tilt) * of.inverse + read(more.x[k].x[i]));
    }
    c.answer[HERE] = dx;
  }
}
"""


def unavailable(dtype: torch.dtype, device: torch.device) -> str:
    """Why PyTorch's lines compute on this device, or "" where a kernel can."""
    return kernels.unavailable(SOURCE, "forward", dtype, device)


def has_kernel(weight: Tensor, x: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel can take x and all `others` of its shape, and a weight (D,)."""
    if not x.is_cuda or weight.dtype != x.dtype or unavailable(x.dtype, x.device):
        return False
    whole = len(weight) * x.element_size() % kernels.BYTES == 0 and len(weight) <= WIDEST
    return whole and kernels.in_packs((weight, x, *(each for each in others if each is not None)))


def launch(name: str, tensors: tuple, weight: Tensor, eps: float) -> None:
    """Have a kernel run. tensors: as Call has them."""
    columns = weight.nbytes // kernels.BYTES
    rows = tensors[0].numel() // len(weight)
    kernels.launch(SOURCE, name, (*tensors, rows, columns, eps), (-(-rows // 4), 1, 128))


@torch.library.custom_op("sdxl_lora::layer_norm", mutates_args=())
def forward(
    x: Tensor, more: Tensor | None, affine: Sequence[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """x + more and its norm, (..., D) like both; without `more` in the place of the sum nothing."""
    if not has_kernel(affine[0], x, more):
        total = x if more is None else x + more
        y = F.layer_norm(total, affine[0].shape, *affine, eps)
        return x.new_empty(0) if more is None else total, y
    total, y = room(x, more)
    launch("forward", (x, more, None, total, y, *affine), affine[0], eps)
    return total, y


@torch.library.custom_op("sdxl_lora::layer_norm_back", mutates_args=())
def backward(grad: Tensor, x: Tensor, more: Tensor, affine: Sequence[Tensor], eps: float) -> Tensor:
    """The gradient that reaches x, a sum, through its norm, plus `more`, that beside it."""
    if has_kernel(affine[0], x, grad, more):
        answer = torch.empty_like(x)
        launch("backward", (x, more, grad, None, answer, *affine), affine[0], eps)
        return answer
    _, *moments = torch.native_layer_norm(x, affine[0].shape, *affine, eps)
    how = (grad, x, affine[0].shape, *moments, *affine, (True, False, False))
    return torch.ops.aten.native_layer_norm_backward(*how)[0].add_(more)


def room(x: Tensor, more: Tensor | None, *_) -> tuple[Tensor, Tensor]:
    return x.new_empty(0) if more is None else torch.empty_like(x), torch.empty_like(x)


# What they give of tensors without numbers.
forward.register_fake(room)
backward.register_fake(lambda grad, x, *_: torch.empty_like(x))


class AddNorm(torch.autograd.Function):
    """x, more (or None), a frozen LayerNorm -> x + more, norm(x + more). It keeps the sum."""

    @staticmethod
    def forward(ctx, x, more, norm):
        total, y = forward(x, more, [norm.weight, norm.bias], norm.eps)
        total = x.view_as(x) if more is None else total
        ctx.save_for_backward(total)
        ctx.norm, ctx.added = norm, more is not None
        return total, y

    @staticmethod
    def backward(ctx, residual, grad):
        affine, eps = [ctx.norm.weight, ctx.norm.bias], ctx.norm.eps
        (total,) = ctx.saved_tensors
        dx = backward(grad.contiguous(), total, residual.contiguous(), affine, eps)
        return dx, dx if ctx.added else None, None


def is_known(block: nn.Module) -> bool:
    """Whether a BasicTransformerBlock is SDXL's, with frozen norms."""
    norms = (block.norm1, block.norm2, block.norm3)
    kind = (block.norm_type, block.pos_embed, block.only_cross_attention, block._chunk_size)
    return kind == ("layer_norm", None, False, None) and all(
        type(each) is nn.LayerNorm
        and each.bias is not None
        and not (each.weight.requires_grad or each.bias.requires_grad)
        for each in norms
    )


def answer(block, hidden_states, attention_mask=None, encoder_hidden_states=None, *rest, **more):
    """What diffusers' BasicTransformerBlock answers to hidden_states (B, T, D) under a context."""
    if any(each is not None for each in (attention_mask, *rest, *more.values())):
        how = (hidden_states, attention_mask, encoder_hidden_states, *rest)
        return type(block).forward(block, *how, **more)
    x, y = AddNorm.apply(hidden_states, None, block.norm1)
    x, y = AddNorm.apply(x, block.attn1(y), block.norm2)
    y = block.attn2(y, encoder_hidden_states=encoder_hidden_states)
    x, y = AddNorm.apply(x, y, block.norm3)
    return x + block.ff(y)
