"""SDXL's convolution blocks in NHWC, the order that tensor cores read: by torch's usual order cuDNN
copies each picture before and after every convolution.

ResnetBlock2D becomes one function, which keeps for its backward pass its input, the answer of its
first convolution and the groups' moments; all else is computed again. Where one of its convolutions
is adapted or trained, all are called as they are, and only its norms are ours. A transformer's
doors become views. The rest of the UNet follows the order of what it is given.
"""

import functools
import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast import groupnorm
from fast.groupnorm import nhwc

LEAVE = "_get_output_for_continuous_inputs"  # the part of Transformer2DModel after its blocks


def lines(x: Tensor) -> Tensor:
    """(B, C, H, W) in NHWC as (B H W, C), without a copy."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def before(conv: nn.Conv2d, grad: Tensor, x: Tensor) -> Tensor:
    """The gradient that reaches the input of `conv`, which is like x."""
    how = (conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups)
    wanted = (True, False, False)
    dx, *_ = torch.ops.aten.convolution_backward(grad, x, conv.weight, None, *how, wanted)
    return nhwc(dx)


class Resnet(torch.autograd.Function):
    """x (B, C, H, W), shift (B, out) -> x + conv2(silu(norm2(conv1(silu(norm1(x))) + shift))), or
    with conv_shortcut(x) in the place of x. The gradient reaches x alone. The bias of conv1 is in
    the shift.
    """

    @staticmethod
    def forward(ctx, x, shift, block):
        x, short = nhwc(x), block.conv_shortcut
        y, first = groupnorm.forward(x, block.norm1, None, True)
        middle = nhwc(F.conv2d(y, block.conv1.weight, None, padding=1))
        y, second = groupnorm.forward(middle, block.norm2, shift, True)
        y = nhwc(F.conv2d(y, block.conv2.weight, None if short else block.conv2.bias, padding=1))
        if short:
            bias = short.bias + block.conv2.bias
            lines(y).add_(torch.addmm(bias, lines(x), short.weight.flatten(1).t()))
        else:
            y.add_(x)
        ctx.save_for_backward(x, middle, shift, first, second)
        ctx.block = block
        return y

    @staticmethod
    def backward(ctx, grad):
        x, middle, shift, first, second = ctx.saved_tensors
        block, grad = ctx.block, nhwc(grad)
        d = before(block.conv2, grad, middle)
        d = groupnorm.backward(d, middle, block.norm2, shift, second, None, True)
        d = before(block.conv1, d, x)
        if block.conv_shortcut:
            residual = lines(grad) @ block.conv_shortcut.weight.flatten(1)
            B, _, H, W = x.shape
            grad = residual.view(B, H, W, -1).permute(0, 3, 1, 2)
        return groupnorm.backward(d, x, block.norm1, None, first, grad, True), None, None


class Norm(torch.autograd.Function):
    """x (B, C, H, W), shift (B, C) or None -> norm(x + shift), norm a frozen GroupNorm, then SiLU
    if asked for. The gradient reaches x alone.
    """

    @staticmethod
    def forward(ctx, x, norm, shift=None, silu=False):
        x = nhwc(x)
        y, moments = groupnorm.forward(x, norm, shift, silu)
        ctx.save_for_backward(x, shift, moments)
        ctx.norm, ctx.silu = norm, silu
        return y

    @staticmethod
    def backward(ctx, grad):
        x, shift, moments = ctx.saved_tensors
        dx = groupnorm.backward(nhwc(grad), x, ctx.norm, shift, moments, None, ctx.silu)
        return dx, None, None, None


def resnet(block: nn.Module, x: Tensor, temb: Tensor, bare: bool = True) -> Tensor:
    """What diffusers' ResnetBlock2D answers to x (B, C, H, W) and temb (B, D). bare: is_bare()."""
    shift = block.time_emb_proj(block.nonlinearity(temb))
    if shift.requires_grad:  # what leads to temb is trained
        return type(block).forward(block, x, temb)
    if bare:
        return Resnet.apply(x, shift + block.conv1.bias, block)
    y = block.conv1(Norm.apply(x, block.norm1, None, True))
    y = block.conv2(Norm.apply(y, block.norm2, shift, True))
    return y + (block.conv_shortcut(x) if block.conv_shortcut else x)


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """What a GroupNorm answers to x (B, C, H, W)."""
    return Norm.apply(x, norm)


def leave(
    doors: nn.Module, hidden_states: Tensor, residual: Tensor, batch_size, height, width, inner_dim
) -> Tensor:
    """What diffusers' Transformer2DModel makes of its blocks' answer (B, H W, C): (B, C, H, W)."""
    y = doors.proj_out(hidden_states).unflatten(1, (height, width))
    return y.permute(0, 3, 1, 2) + residual


# ---- which, and how they are put in --------------------------------------------------------------


def is_block(module: nn.Module) -> bool:
    return type(module).__name__ == "ResnetBlock2D"


def has_doors(module: nn.Module) -> bool:
    return type(module).__name__ == "Transformer2DModel"


def is_trained(module: nn.Module) -> bool:
    return any(each.requires_grad for each in module.parameters())


def is_frozen(norm: nn.Module) -> bool:
    """Whether it is a GroupNorm that nobody trains."""
    return type(norm) is nn.GroupNorm and not is_trained(norm)


def is_bare(block: nn.Module) -> bool:
    """Whether the convolutions of a ResnetBlock2D are those that Resnet computes, with nothing that
    is trained in them or beside them.
    """
    convs = [each for each in (block.conv1, block.conv2, block.conv_shortcut) if each is not None]
    sizes = [(3, 3), (3, 3), (1, 1)][: len(convs)]
    return (
        all(type(each) is nn.Conv2d and each.stride == (1, 1) for each in convs)
        and [each.kernel_size for each in convs] == sizes
        and not any(map(is_trained, convs))
    )


def is_known(block: nn.Module) -> bool:
    """Whether a ResnetBlock2D computes what resnet() does, whatever its convolutions are."""
    settings = (block.time_embedding_norm, block.skip_time_act, block.output_scale_factor)
    return (
        is_frozen(block.norm1)
        and is_frozen(block.norm2)
        and type(block.nonlinearity) is nn.SiLU
        and block.upsample is block.downsample is None
        and (*settings, block.dropout.p) == ("default", False, 1, 0)
    )


def fusible(unet: nn.Module) -> dict[str, nn.Module]:
    """The convolution blocks of `unet`, its transformers, for their doors, and its last norm, by
    name. Empty if one block is not SDXL's or computes by its definition: NHWC helps only if all use
    it. Empty on a CPU if a resnet's convolution is adapted: there it is slower.
    """
    modules = dict(unet.named_modules())
    blocks = {name: each for name, each in modules.items() if is_block(each)}
    to_blocks = [unet.time_embedding, unet.add_embedding]
    to_blocks += [each.time_emb_proj for each in blocks.values()]
    helps = unet.device.type != "cpu" or all(map(is_bare, blocks.values()))
    if not helps or any(map(is_trained, to_blocks)) or not all(map(is_known, blocks.values())):
        return {}
    doors = {name: each for name, each in modules.items() if has_doors(each)}
    norms = [unet.conv_norm_out, *(each.norm for each in doors.values())]
    if not all(map(is_frozen, norms)) or not all(d.use_linear_projection for d in doors.values()):
        return {}
    return blocks | doors | {"conv_norm_out": unet.conv_norm_out}


def fuse(module: nn.Module) -> None:
    """Have one of fusible() compute in its other form, in place."""
    if is_block(module):
        # Asked here: later a trained weight is a part of the one vector, and no parameter. So what
        # is put beside a convolution later needs unwrap() and wrap() of fast/layers.py.
        module.forward = functools.partial(resnet, module, bare=is_bare(module))
    elif has_doors(module):
        fuse(module.norm)
        setattr(module, LEAVE, types.MethodType(leave, module))
    else:
        module.forward = types.MethodType(normed, module)


def lay_out(unet: nn.Module, order: torch.memory_format) -> None:
    """Keep the weights of convolutions in that order, which is the order of what they answer."""
    for each in unet.modules():
        if type(each) is nn.Conv2d and each.kernel_size != (1, 1):
            each.weight.data = each.weight.data.contiguous(memory_format=order)
