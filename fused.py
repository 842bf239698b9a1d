"""The same layers with fewer and leaner kernels: what a GPU would otherwise spend on many small
matrix products and element-wise passes. lora.py and diffusers hold the definitions; a test holds
this to them.

Every formula is the chain rule of y = W x + s B A x (Hu et al. 2021, section 4.1), written out for
layers that read one x, so that their A act as one matrix and no gradient is added up in a pass of
its own.

Letters: `M` rows (batch x tokens), `r` rank, `k` layers that read the same x.
"""

import itertools
import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What an attention layer of diffusers may have beyond SDXL's; where one has it, it is left alone.
EXTRAS = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "residual_connection")


def dense(base: nn.Module) -> Tensor:
    """The frozen weight (out, in) of a Linear; of an NF4 one, dequantised for the moment."""
    if base.weight.is_floating_point():
        return base.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, base.weight.quant_state)


def stacked(matrices: tuple[Tensor, ...]) -> Tensor:
    """k matrices (r, in) as one (k r, in): without a copy where they follow one another in the flat
    vector, as those of one attention layer do.
    """
    first, rows = matrices[0], sum(len(m) for m in matrices)
    follow = all(
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.storage_offset() + a.numel() == b.storage_offset()
        for a, b in itertools.pairwise(matrices)
    )
    if not follow:
        return torch.cat(matrices)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


class Project(torch.autograd.Function):
    """k adapted Linears on one x (M, in): y_i = W_i x (+ b_i) + s B_i A_i x, (M, out_i) each.

    Arguments: x, s, the k frozen Linears, then k matrices A (r, in) and k matrices B (out_i, r).
    The gradient reaches x, A and B; W and b are frozen.
    """

    @staticmethod
    def forward(ctx, x, scale, bases, *matrices):
        k = len(bases)
        A, Bs = stacked(matrices[:k]), matrices[k:]
        # beta=0: the first argument is not read; alpha is applied inside the product
        h = torch.addmm(x.new_empty(()), x, A.t(), beta=0, alpha=scale)  # (M, k r)
        answers = []
        for base, B, part in zip(bases, Bs, h.chunk(k, dim=1), strict=True):
            W = dense(base)
            y = x @ W.t() if base.bias is None else torch.addmm(base.bias, x, W.t())
            answers.append(y.addmm_(part, B.t()))  # (M, out), added inside the product
        ctx.save_for_backward(x, h, A, *Bs)
        ctx.scale, ctx.bases = scale, bases
        return tuple(answers)

    @staticmethod
    def backward(ctx, *grads):
        x, h, A, *Bs = ctx.saved_tensors
        k, dx, dBs = len(Bs), None, []
        dh = torch.empty_like(h)
        for g, B, part, dpart in zip(grads, Bs, h.chunk(k, 1), dh.chunk(k, 1), strict=True):
            torch.addmm(g.new_empty(()), g, B, beta=0, alpha=ctx.scale, out=dpart)  # (M, r)
            dBs.append(g.t() @ part)  # (out, r); s is in h already
        dAs = (dh.t() @ x).chunk(k)  # (r, in) each
        if ctx.needs_input_grad[0]:
            dx = dh @ A  # (M, in)
            for g, base in zip(grads, ctx.bases, strict=True):
                dx.addmm_(g, dense(base))
        return dx, None, None, *dAs, *dBs


def project(x: Tensor, layers: list[nn.Module]) -> list[Tensor]:
    """What the LoRALinear `layers` answer to one x (..., in): (..., out) each."""
    As, Bs = zip(*(layer.used for layer in layers), strict=True)
    matrices = [m.to(x.dtype) for m in (*As, *Bs)]
    scale = layers[0].strength * layers[0].scale
    bases = tuple(layer.base for layer in layers)
    answers = Project.apply(x.flatten(0, -2), scale, bases, *matrices)
    return [y.unflatten(0, x.shape[:-1]) for y in answers]


class Attention:
    """diffusers' attention processor for SDXL's layers, whose projections share their products.

    Called with x (B, T, D) and, in cross attention, context (B, T', D'). Vaswani et al. 2017,
    https://arxiv.org/abs/1706.03762, section 3.2.
    """

    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, temb=None):
        if encoder_hidden_states is None:
            q, k, v = project(x, [attn.to_q, attn.to_k, attn.to_v])
        else:
            (q,) = project(x, [attn.to_q])
            k, v = project(encoder_hidden_states, [attn.to_k, attn.to_v])
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)  # (B, heads, T, D/h)
        (y,) = project(y.transpose(1, 2).flatten(2), [attn.to_out[0]])
        return y  # (B, T, D)


class GatedGelu(torch.autograd.Function):
    """GEGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202): y (..., 2 F) -> y_1 gelu(y_2),
    (..., F).

    Only y is kept: gelu(y_2), a third of what autograd would keep, is computed again.
    """

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        value, gate = y.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        value, gate = y.chunk(2, dim=-1)
        dy = torch.empty_like(y)
        dvalue, dgate = dy.chunk(2, dim=-1)
        torch.mul(F.gelu(gate), grad, out=dvalue)
        torch.ops.aten.gelu_backward.grad_input(grad * value, gate, grad_input=dgate)
        return dy


def use(unet: nn.Module) -> str:
    """Fuse what can be fused in `unet`, in place, after inject(). Returns how much that is."""
    layers = products = 0
    for module in unet.modules():
        kind = type(module).__name__
        if kind == "Attention" and not any(getattr(module, name, None) for name in EXTRAS):
            needed = (module.to_q, module.to_k, module.to_v, module.to_out[0])
            if all(hasattr(layer, "used") for layer in needed):
                module.set_processor(Attention())
                layers += 1
        elif kind == "GEGLU":
            module.forward = types.MethodType(lambda self, x: GatedGelu.apply(self.proj(x)), module)
            products += 1
    return f"{layers} attention layers and {products} feed-forward gates fused"
