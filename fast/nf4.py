"""A base in 4 bits, for cards of 6 to 8 GB: the UNet's Linear weights as NF4 numbers.

QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3) keeps the frozen weights
as 4-bit indices into 16 quantiles of a normal distribution, with one scale for each 64 of them, the
scales themselves in 8 bits. A weight is expanded when it is multiplied, forward and again backward,
and dropped at once. The kernels are bitsandbytes', and so is the layout of what is kept.

Neither the GPU nor the host ever holds the unquantised model, and the 4-bit numbers are kept in a
file, so that only the first start quantises.
"""

from collections import defaultdict
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import model
from inputs import hub
from inputs.code import together
from inputs.files import Refusal, digest, open_safetensors, safetensors_bytes, write_whole
from inputs.vetting import load_bitsandbytes

# Weights that share a scale, and scales that share a scale of their own, as bitsandbytes has it.
PER_SCALE, SCALES_PER_SCALE = 64, 256
# Together 0.3 % of SDXL, and everything that says when and how large passes through them.
WHOLE = ("time_embedding.", "add_embedding.")
# What makes another base of the same weights: part of the kept file's name, and of the run.
MAKERS = tuple(f"fast.nf4.{name}" for name in "quantise shapes_to_quantise WHOLE PER_SCALE".split())
NEEDED = ("an NF4 base", "--base-quantization none")


def load_unet_nf4(
    name: str, device: torch.device, dtype: torch.dtype, cache_dir: Path
) -> UNet2DConditionModel:
    """SDXL's UNet on `device`: its Linear weights in NF4, expanded to `dtype`, all else in `dtype`.

    The first call quantises and keeps the numbers under cache_dir; later ones read the same numbers
    from there. Raises Refusal as model.load_unet() does, and where bitsandbytes does not load.
    """
    bnb, half = load_bitsandbytes(*NEEDED), dtype != torch.float32
    folder = hub.fetch(name, "unet", half)
    unet = model.build_unet(folder)
    # Its small files and 64 samples of its weights too: the UNet's own print has ten tensors only.
    fingerprints = (hub.unet_fingerprint(name, half), hub.fingerprint(name, "unet", half))
    what = digest(*fingerprints, str(dtype), bnb.__version__, together(*MAKERS))
    path = cache_dir / f"nf4-{what}.safetensors"

    kept = read_kept(path, device)
    files = hub.unet_files(name, half, unet.state_dict())
    tensors = kept or quantise(files, device, dtype, shapes_to_quantise(unet))
    weights, states = {}, defaultdict(dict)
    for key, tensor in tensors.items():
        layer, is_state, part = key.partition(".weight.")
        (states[layer] if is_state else weights)[part or key] = tensor
    for layer, state in states.items():
        key = f"{layer}.weight"
        made = linear_4bit(unet.get_submodule(layer), weights[key], state, dtype)
        unet.set_submodule(layer, made)
        weights[key] = made.weight
    unet = model.fill_unet(unet, weights, files[0][0])
    if not kept:  # only now are they known to fit
        write_whole(path, safetensors_bytes(tensors, {}))
        model.free_memory()
    return unet


def read_kept(path: Path, device: torch.device) -> dict[str, Tensor] | None:
    """What an earlier start has kept, on `device`; None where there is nothing, or a part of it.

    Like the model's own files it is held to the length that its header states, and to no checksum.
    """
    if not path.is_file():
        return None
    try:
        with open_safetensors(path, str(device)) as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except Refusal:
        print(f"{path} is damaged and is made anew")
        return None


def shapes_to_quantise(unet: nn.Module) -> dict[str, torch.Size]:
    """The shape (out, in) of every weight that becomes NF4, by its key."""
    return {
        f"{name}.weight": module.weight.shape
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(WHOLE)
    }


@torch.no_grad()
def quantise(
    files: list[tuple[Path, dict[str, str]]],
    device: torch.device,
    dtype: torch.dtype,
    shapes: dict[str, torch.Size],
) -> dict[str, Tensor]:
    """The UNet's tensors, of hub.unet_files(), on `device`, one after another: those in `shapes` as
    NF4, others in dtype.

    A quantised weight is key (uint8, two numbers a byte) and, under key.*, what bitsandbytes says
    of it. A weight of a shape that is not its layer's is left as it is, for fill_unet() to refuse.
    """
    quantize_4bit, tensors = load_bitsandbytes(*NEEDED).functional.quantize_4bit, {}
    for path, names in files:
        with open_safetensors(path, str(device)) as file:
            for key, theirs in names.items():
                tensors[key] = file.get_tensor(theirs).to(dtype)
                if shapes.get(key) == tensors[key].shape:
                    tensors[key], state = quantize_4bit(
                        tensors[key],
                        blocksize=PER_SCALE,
                        compress_statistics=True,
                        quant_type="nf4",
                    )
                    about = state.as_dict(packed=True)
                    tensors |= {f"{key}.{part}": each for part, each in about.items()}
    return tensors


def linear_4bit(
    linear: nn.Linear, weight: Tensor, state: dict[str, Tensor], dtype: torch.dtype
) -> nn.Linear:
    """bitsandbytes' Linear4bit in the place of `linear`, with the numbers that quantise() gave.

    Its backward pass keeps no input and expands the weight again, to the dtype it came from.
    """
    bnb, bias = load_bitsandbytes(*NEEDED), linear.bias is not None
    widths, how = (linear.in_features, linear.out_features), {"quant_type": "nf4", "device": "meta"}
    layer = bnb.nn.Linear4bit(*widths, bias, compute_dtype=dtype, **how)
    layer.weight = bnb.nn.Params4bit.from_prequantized(
        weight, state, device=weight.device, module=layer
    )
    # On a CPU with AVX512-BF16 it would repack the weight at the first input without a gradient;
    # the packed kernel has no backward pass, and gradients would end there without a word.
    layer.support_avx512bf16_for_cpu = False
    return layer
