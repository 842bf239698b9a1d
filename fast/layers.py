"""The same layers with fewer and leaner kernels: what a GPU would otherwise spend on many small
matrix products and element-wise passes. lora.py and diffusers hold the definitions; tests hold this
to them, and so does disagreement() at the start of every run.

Every formula is the chain rule of y = W x + s B A x (Hu et al. 2021, section 4.1), written out for
layers that read one x, so that their W and their A act as one matrix each, their B as one batch,
and no gradient is added up in a pass of its own.

Letters: `M` rows (batch x tokens), `r` rank, `k` layers that read the same x, `F` width of a
feed-forward layer.
"""

import copy
import functools
import itertools
import types
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from fast import convolution, geglu, groupnorm, layernorm
from fast.aside import ASIDE
from inputs.files import first_line
from lora import LoRALinear

# ---- projections that read the same input --------------------------------------------------------


def dense(base: nn.Module) -> Tensor:
    """The frozen weight (out, in) of a Linear; of an NF4 one, dequantised for the moment."""
    if base.weight.is_floating_point():
        return base.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, base.weight.quant_state)


def follow(matrices: tuple[Tensor, ...]) -> bool:
    """Whether each matrix begins in memory where the one before it ends. A storage is one Python
    object as long as it lives, which its address, zero on the meta device, would not tell.
    """
    return all(
        a.untyped_storage() is b.untyped_storage()
        and a.storage_offset() + a.numel() == b.storage_offset()
        for a, b in itertools.pairwise(matrices)
    )


def stacked(matrices: tuple[Tensor, ...]) -> Tensor:
    """k matrices (n, m) as one (k n, m), without a copy where they follow one another."""
    if not follow(matrices):
        return torch.cat(matrices)
    rows, columns = sum(len(m) for m in matrices), matrices[0].shape[1]
    return matrices[0].as_strided((rows, columns), (columns, 1))


def side_by_side(x: Tensor, k: int) -> Tensor:
    """(M, k n) as the batch (k, M, n), without a copy."""
    return x.unflatten(1, (k, -1)).transpose(0, 1)


def frozen(
    bases: tuple[nn.Module, ...], y: Tensor
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """The frozen products in as few parts as can be: (weight, bias or None, its part of y), with y
    (M, k out) the answers side by side. NF4 weights are dequantised one after another.
    """
    weights = tuple(base.weight for base in bases)
    biased = any(base.bias is not None for base in bases)
    if weights[0].is_floating_point() and follow(weights) and not biased:
        yield stacked(weights), None, y
    else:
        for base, part in zip(bases, y.chunk(len(bases), dim=1), strict=True):
            yield dense(base), base.bias, part


class Project(torch.autograd.Function):
    """k adapted Linears on one x (M, in): W_i x + b_i + s B_i A_i x, side by side, (M, k out).

    Arguments: x, s, the k frozen Linears, then k matrices A (r, in) and k matrices B (out, r). The
    gradient reaches x, A and B; W and b are frozen.
    """

    @staticmethod
    def forward(ctx, x, scale, bases, *matrices):
        k = len(bases)
        A = stacked(matrices[:k])  # (k r, in)
        B = stacked(matrices[k:]).unflatten(0, (k, -1))  # (k, out, r)
        with ASIDE.branch():
            # beta=0: the first argument is not read; alpha is applied inside the product
            h = torch.addmm(x.new_empty(()), x, A.t(), beta=0, alpha=scale)  # (M, k r)
        y = x.new_empty(len(x), sum(base.out_features for base in bases))
        for weight, bias, part in frozen(bases, y):
            if bias is None:
                torch.mm(x, weight.t(), out=part)
            else:
                torch.addmm(bias, x, weight.t(), out=part)
        ASIDE.meet()
        side_by_side(y, k).baddbmm_(side_by_side(h, k), B.mT)  # added inside the product
        ctx.save_for_backward(x, h, A, B)
        ctx.scale, ctx.bases = scale, bases
        return y

    @staticmethod
    def backward(ctx, g):
        x, h, A, B = ctx.saved_tensors
        k, dx = len(B), None
        g = g.contiguous()
        gs, hs = side_by_side(g, k), side_by_side(h, k)
        with ASIDE.branch(g, B):
            dh = torch.empty_like(h)
            torch.baddbmm(g.new_empty(()), gs, B, beta=0, alpha=ctx.scale, out=side_by_side(dh, k))
        if ctx.needs_input_grad[0]:
            for weight, _, part in frozen(ctx.bases, g):
                dx = part @ weight if dx is None else dx.addmm_(part, weight)
            ASIDE.meet()
            dx.addmm_(dh, A)
        with ASIDE.branch(x, g, go_on=True):
            dB = gs.mT @ hs  # (k, out, r); s is in h already
            dA = dh.t() @ x  # (k r, in)
        ASIDE.gave(ctx.bases[0])
        return dx, None, None, *dA.chunk(k), *dB.unbind()


def acts_beside(layer: nn.Module) -> bool:
    """Whether a LoRALinear's branch acts: its strength is not 0, and it is not merged."""
    return layer.strength != 0 and layer.weight_before_merge is None


def alone(layer: nn.Module, x: Tensor) -> Tensor:
    """The forward of a LoRALinear that shares its x with no other: (..., in) -> (..., out)."""
    return project(x, [layer])[0]


def project(x: Tensor, layers: list[nn.Module]) -> tuple[Tensor, ...]:
    """What the LoRALinear `layers`, of one size, answer to one x (..., in): (..., out) each."""
    acts = {(layer.strength, layer.scale, layer.weight_before_merge is None) for layer in layers}
    if len(acts) > 1 or not acts_beside(layers[0]):
        # By the book, where a layer is its base, to the bit. Not layer(x): that may be alone().
        return tuple(type(layer).forward(layer, x) for layer in layers)
    matrices = [layer.lora_A for layer in layers] + [layer.lora_B for layer in layers]
    scale = layers[0].strength * layers[0].scale
    bases = tuple(layer.base for layer in layers)
    y = Project.apply(x.flatten(0, -2), scale, bases, *(m.to(x.dtype) for m in matrices))
    y = y.unflatten(0, x.shape[:-1])
    return y.chunk(len(layers), dim=-1) if layers[1:] else (y,)  # chunk's gradient is a copy


def join(layers: list[nn.Module]) -> None:
    """Lay the frozen weights of `layers` one after another in memory, so that they are one matrix.

    NF4 weights stay where they are: they are dequantised one by one.
    """
    weights = [layer.base.weight for layer in layers]
    if all(weight.is_floating_point() for weight in weights):
        together = torch.cat([weight.detach() for weight in weights])
        for layer, part in zip(layers, together.chunk(len(layers)), strict=True):
            layer.base.weight = nn.Parameter(part, requires_grad=False)


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
            # By answer_under(); of a layer that is called by itself there is none.
            made = getattr(encoder_hidden_states, "made", {})
            k, v = made.get(attn) or project(encoder_hidden_states, [attn.to_k, attn.to_v])
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
        mask = None if attention_mask is None else attention_mask.unsqueeze(1)  # (B, 1, 1, T')
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, T, D/h)
        (y,) = project(y.transpose(1, 2).flatten(2), [attn.to_out[0]])
        return y  # (B, T, D)


def of_one_size(layers: list[nn.Module]) -> list[list[nn.Module]]:
    """Attention layers in groups whose keys and values project() can compute at once."""
    groups: dict[tuple, list[nn.Module]] = {}
    for attn in layers:
        layer = attn.to_k
        about = (layer.in_features, layer.out_features, len(layer.lora_A), layer.scale)
        groups.setdefault(about, []).append(attn)
    return list(groups.values())


def answer_under(unet, groups, sample, timestep, encoder_hidden_states, *rest, **more):
    """What `unet` answers under a context (B, T', D'), whose keys and values in all cross-attention
    layers are computed first, in one product for each of `groups`. They go along as an attribute of
    the context, so that they live as long as it does. Where all those layers are recomputed, as
    little memory as can be is what counts: then each computes its own.
    """
    if all(each.gradient_checkpointing for each in filter(convolution.has_doors, unet.modules())):
        return type(unet).forward(unet, sample, timestep, encoder_hidden_states, *rest, **more)
    context = encoder_hidden_states.view_as(encoder_hidden_states)
    context.made = {}
    for group in groups:
        found = project(context, [layer for attn in group for layer in (attn.to_k, attn.to_v)])
        context.made |= zip(group, zip(found[::2], found[1::2], strict=True), strict=True)
    return type(unet).forward(unet, sample, timestep, context, *rest, **more)


# ---- the gated feed-forward layer ----------------------------------------------------------------


class GatedLinear(torch.autograd.Function):
    """GEGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202): x (M, in) -> (W x + b) gelu(V x + c),
    (M, F), where a frozen Linear holds W over V. With s, A (r, in) and B (2 F, r) of a LoRALinear,
    W over V is replaced by (W over V) + s B A.

    Two products, so that both halves lie contiguous and every pass reads whole cache lines. Only
    they are kept, with A and B also x and A x: gelu(V x + c), a third of what autograd would keep,
    is computed again.
    """

    @staticmethod
    def forward(ctx, x, linear, scale=1.0, *branch):
        halves = zip(dense(linear).chunk(2), linear.bias.chunk(2), strict=True)
        value, gate = (torch.addmm(bias, x, weight.t()) for weight, bias in halves)
        if branch:
            A, B = branch
            h = torch.addmm(x.new_empty(()), x, A.t(), beta=0, alpha=scale)  # (M, r)
            for half, rows in zip((value, gate), B.chunk(2), strict=True):
                half.addmm_(h, rows.t())
            branch = (x, h, A, B)
        ctx.save_for_backward(value, gate, *branch)
        ctx.linear, ctx.scale = linear, scale
        return geglu.forward(value, gate)

    @staticmethod
    def backward(ctx, grad):
        value, gate, *branch = ctx.saved_tensors
        dvalue, dgate = geglu.backward(value, gate, grad.contiguous())
        W, V = dense(ctx.linear).chunk(2)
        dx = (dvalue @ W).addmm_(dgate, V)
        if not branch:
            return dx, None
        (x, h, A, B), s = branch, ctx.scale
        of_value, of_gate = B.chunk(2)
        dh = (dvalue @ of_value).addmm_(dgate, of_gate, beta=s, alpha=s)  # (M, r)
        dB = torch.cat([dvalue.t() @ h, dgate.t() @ h])  # s is in h already
        return dx.addmm_(dh, A), None, None, dh.t() @ x, dB


def gated(module: nn.Module, x: Tensor) -> Tensor:
    """What diffusers' GEGLU `module` answers to x (..., in): (..., F)."""
    linear, branch = module.proj, ()
    if type(linear) is LoRALinear:
        if not acts_beside(linear):
            return type(module).forward(module, x)
        scale, matrices = linear.strength * linear.scale, (linear.lora_A, linear.lora_B)
        linear, branch = linear.base, (scale, *(m.to(x.dtype) for m in matrices))
    return GatedLinear.apply(x.flatten(0, -2), linear, *branch).unflatten(0, x.shape[:-1])


# ---- which layers, and whether they mean the same ------------------------------------------------


def is_gate(module: nn.Module) -> bool:
    return type(module).__name__ == "GEGLU"


def is_attention(module: nn.Module) -> bool:
    return type(module).__name__ == "Attention"


def is_transformer(module: nn.Module) -> bool:
    return type(module).__name__ == "BasicTransformerBlock"


FROZEN = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)


class StandIn(nn.ModuleList):
    """For what is compared by itself, in a copy: for a list of modules, none; for one, tanh."""

    def forward(self, x: Tensor, **_) -> Tensor:
        return x.tanh()


INNER = ("transformer_blocks", "attn1", "attn2", "ff")  # what StandIn stands in for


def is_plain(linear: nn.Module) -> bool:
    """Whether it is a Linear without anything beside it, whole or in NF4."""
    return type(linear) is nn.Linear or hasattr(getattr(linear, "weight", None), "quant_state")


def is_adapted(linear: nn.Module) -> bool:
    """Whether it is the book's LoRALinear beside a plain Linear."""
    return type(linear) is LoRALinear and is_plain(linear.base)


def fusible(unet: nn.Module) -> dict[str, nn.Module]:
    """The attention layers whose four projections are the book's LoRALinear of one rank, the gates
    whose projection is one or has nothing beside it, every other LoRALinear, transformer blocks for
    their norms and the convolutions' part, by name: what else there is computes by its definition.
    """
    found, part_of_another = convolution.fusible(unet), set()
    for name, module in unet.named_modules():  # a layer comes before its parts
        needed = []
        if is_attention(module):
            needed = [module.to_q, module.to_k, module.to_v, module.to_out[0]]
            known = all(map(is_adapted, needed))
            known = known and len({(len(each.lora_A), each.scale) for each in needed}) == 1
        elif is_gate(module):
            needed = [module.proj]
            known = is_plain(module.proj) or is_adapted(module.proj)
        elif is_transformer(module):
            known = layernorm.is_known(module)
        else:
            known = is_adapted(module) and module not in part_of_another
        if known:
            found[name] = module
            part_of_another |= {*needed}
    return found


def fuse(module: nn.Module) -> None:
    """Have one of fusible() compute in its other form, in place."""
    if is_gate(module):
        module.forward = types.MethodType(gated, module)
    elif is_adapted(module):
        module.forward = types.MethodType(alone, module)
    elif is_attention(module):
        module.set_processor(Attention())
    elif is_transformer(module):
        module.forward = types.MethodType(layernorm.answer, module)
    else:
        convolution.fuse(module)


def wrap(unet: nn.Module) -> str:
    """Fuse what is fusible in `unet`, in place, after inject(). Returns how much that is."""
    found, why = list(fusible(unet).values()), ""
    if unet.device.type == "cuda":
        whys = (each.unavailable(unet.dtype, unet.device) for each in (geglu, groupnorm, layernorm))
        why = next(filter(None, whys), "")
    if why:  # for all else diffusers' own lines are the faster ones then
        found = [each for each in found if is_attention(each) or is_gate(each) or is_adapted(each)]
    for module in found:
        fuse(module)
    kinds = (is_attention, is_gate, is_adapted, convolution.is_block)
    attention, gates, others, blocks = (list(filter(kind, found)) for kind in kinds)
    groups = of_one_size([each for each in attention if each.is_cross_attention])
    for each in attention:
        if not each.is_cross_attention:
            join([each.to_q, each.to_k, each.to_v])
    for group in groups:
        join([layer for each in group for layer in (each.to_k, each.to_v)])
    if groups:
        unet.forward = functools.partial(answer_under, unet, groups)
    if blocks:
        convolution.lay_out(unet, torch.channels_last)
    names = "attention layers", "other adapted layers", "convolution blocks", "feed-forward gates"
    each = zip(names, (attention, others, blocks, gates), strict=True)
    *first, last = [f"{len(these)} {name}" for name, these in each if these] or ["nothing"]
    said = " and ".join([", ".join(first)] * bool(first) + [last]) + " fused"
    if why:
        said += f", all else by PyTorch's kernels, which take longer ({why})"
    return said


def unwrap(unet: nn.Module) -> None:
    """Have what wrap() fused compute by its definition again, the forward of its class."""
    convolution.lay_out(unet, torch.contiguous_format)
    for module in unet.modules():
        module.__dict__.pop("forward", None)
        module.__dict__.pop(convolution.LEAVE, None)
        if isinstance(getattr(module, "processor", None), Attention):
            module.set_processor(AttnProcessor2_0())


def disagreement(unet: nn.Module) -> str:
    """Where a layer's fused form would not give what its definition gives, or "".

    Whoever edits LoRALinear.forward must not train one function and draw with another, so each
    layer is tried in both forms before the first step: on a copy in fp32, since half precision
    would hide small differences, on random input, and with all that it trains drawn at random,
    since at B = 0 every branch is zero. Answers and gradients may differ by 1e-5.
    """
    for name, module in fusible(unet).items():
        try:
            off = largest_difference(module)
        except Exception as error:  # an edit of the book that this form does not know may raise any
            return f"{name} cannot be computed fused ({first_line(error)})"
        if not off <= 1e-5:  # True for nan, too
            return f"{name} would be off by {off:.0e} if fused"
    return ""


def largest_difference(module: nn.Module) -> float:
    """How far answer and gradients of a fusible module's two forms lie apart, relative."""
    device = next(module.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        plain = random_copy(module)
        inputs = random_inputs(module)
        # One set of numbers for both: a block's may take a fifth of a GiB.
        fused = copy.deepcopy(plain, {id(each): each for each in plain.parameters()})
        fuse(fused)
        with torch.backends.cudnn.flags(enabled=False):  # some of its fp32 convolutions round more
            forms = [answer_and_gradients(form, inputs) for form in (plain, fused)]
    return max(
        ((a - b).norm() / a.norm().clamp(min=1e-30)).item() for a, b in zip(*forms, strict=True)
    )


def random_copy(module: nn.Module) -> nn.Module:
    """A copy of `module` in fp32 with random numbers, of such sizes that frozen and trained
    branches give answers of about one length. Of a transformer only the doors, of its blocks the
    norms.
    """
    # deepcopy takes what is in its memo for a copy: so each frozen layer becomes a fresh one
    inner = [each for name, each in module.named_children() if name in INNER]
    left_out = {each for part in inner for each in part.modules()}
    frozen = (each for each in module.modules() if is_plain(each) or type(each) in FROZEN)
    memo = {id(each): fresh(each) for each in frozen if each not in left_out}
    memo |= {id(each): StandIn() for each in inner}
    copied = copy.deepcopy(module, memo)
    for layer in copied.modules():
        for each in layer.parameters(recurse=False):
            if each.requires_grad:
                length = (each[0].numel() * getattr(layer, "scale", 1.0)) ** 0.5
                each.data = torch.randn(each.shape) / length
    return copied


def fresh(layer: nn.Module) -> nn.Module:
    """An fp32 layer of the same kind and sizes with random numbers; of NF4 a Linear."""
    if type(layer) in FROZEN:
        made = copy.deepcopy(layer).float()
    else:
        made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    for each, real in zip(made.parameters(), layer.parameters(), strict=True):
        each.data.normal_().div_(each[0].numel() ** 0.5)  # in place: some are large
        each.requires_grad_(real.requires_grad)  # what an edit trains is compared, too
    return made


def random_inputs(module: nn.Module) -> list[Tensor]:
    """Of the shapes that a fusible module takes; what is trained there reaches all but the
    timestep's embedding.
    """
    if is_gate(module) or is_adapted(module):
        shapes = [(2, 7, getattr(module, "proj", module).in_features)]
    elif is_attention(module):
        context = [(2, 8, module.to_k.in_features)] if module.is_cross_attention else []
        shapes = [(2, 7, module.to_q.in_features), *context]
    elif is_transformer(module):
        shapes = [(2, 7, *module.norm1.normalized_shape)]
    elif convolution.is_block(module):
        shapes = [(2, module.in_channels, 5, 7)]
        return [
            torch.randn(shapes[0], requires_grad=True),
            torch.randn(2, module.time_emb_proj.in_features),
        ]
    else:
        shapes = [(2, getattr(module, "norm", module).num_channels, 5, 7)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def answer_and_gradients(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """What `module` answers, and the gradients that its squares send to all its inputs and
    parameters that take one.
    """
    learning = [each for each in (*inputs, *module.parameters()) if each.requires_grad]
    as_tuple = {"return_dict": False} if convolution.has_doors(module) else {}
    answer, how = module(*inputs, **as_tuple), {"allow_unused": True, "materialize_grads": True}
    answer = answer if isinstance(answer, Tensor) else answer[0]
    return [answer, *torch.autograd.grad(answer.square().sum(), learning, **how)]
