"""A base in 4 bits, for cards of 6 to 8 GB: the UNet's Linear weights as NF4 numbers.

QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3) keeps the frozen weights
as 4-bit indices into 16 quantiles of a normal distribution, with one scale for each 64 of them, the
scales themselves in 8 bits. A weight is expanded when it is multiplied, forward and again backward,
and dropped at once. The kernels are bitsandbytes'.

Neither the GPU nor the host ever holds the unquantised model, and the 4-bit numbers are kept in a
file, so that only the first start quantises.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn

import model
from inputs import hub
from inputs.files import Refusal, digest, open_safetensors, sweep_parts, write_chunks
from inputs.vetting import load_bitsandbytes

# Weights that share a scale, and scales that share a scale of their own.
PER_SCALE, SCALES_PER_SCALE = 64, 256
# Together 0.3 % of SDXL, and everything that says when and how large passes through them.
WHOLE = ("time_embedding.", "add_embedding.")
CODES = ("quant_map", "nested_quant_map")  # what 4 and 8 bits stand for, the same in every layer
SUMS = "checksums"  # the kept file's last tensor: checksums of the others, in the order of names
LAYOUT = "1"  # of the kept file; another number when it changes
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
    what = digest(*fingerprints, str(dtype), str(PER_SCALE), bnb.__version__, LAYOUT)
    path = cache_dir / f"nf4-{what}.safetensors"

    kept = read_kept(path, device)
    tensors = kept or quantise(folder, half, device, dtype, shapes_to_quantise(unet))
    weights = {key: value for key, value in tensors.items() if ".weight." not in key}
    codes = [weights.pop(code, None) for code in CODES]
    for key in [key.removesuffix(".absmax") for key in tensors if key.endswith(".weight.absmax")]:
        parent, _, child = key.removesuffix(".weight").rpartition(".")
        linear = getattr(unet.get_submodule(parent), child)
        layer = linear_4bit(bnb, linear, key, tensors, codes, dtype)
        setattr(unet.get_submodule(parent), child, layer)
        weights[key] = layer.weight
    unet = model.fill_unet(unet, weights, folder)
    if not kept:  # only now are they known to fit
        sweep_parts(cache_dir)
        keep(path, tensors)
        model.free_memory()
    return unet


def shapes_to_quantise(unet: nn.Module) -> dict[str, torch.Size]:
    """The shape (out, in) of every weight that becomes NF4, by its key."""
    return {
        f"{name}.weight": module.weight.shape
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(WHOLE)
    }


@torch.no_grad()
def quantise(
    folder: Path,
    half: bool,
    device: torch.device,
    dtype: torch.dtype,
    shapes: dict[str, torch.Size],
) -> dict[str, Tensor]:
    """The UNet's tensors on `device`, one after another: those in `shapes` as NF4, others in dtype.

    A quantised weight is key (uint8, two numbers a byte) and key.absmax (its scales in 8 bits) with
    key.nested_absmax and key.nested_offset (fp32). A weight of a shape that is not its layer's is
    left as it is, for fill_unet() to refuse.
    """
    F, tensors = load_bitsandbytes(*NEEDED).functional, {}
    for path in hub.weight_files(folder, half):
        with open_safetensors(path, str(device)) as file:
            for key in file.keys():
                weight = file.get_tensor(key).to(dtype)
                if shapes.get(key) != weight.shape:
                    tensors[key] = weight
                    continue
                tensors[key], state = F.quantize_4bit(
                    weight, blocksize=PER_SCALE, compress_statistics=True, quant_type="nf4"
                )
                del weight  # before the next is read: one whole weight at a time
                tensors[f"{key}.absmax"] = state.absmax
                tensors[f"{key}.nested_absmax"] = state.state2.absmax
                tensors[f"{key}.nested_offset"] = state.offset
                codes = zip(CODES, (state.code, state.state2.code), strict=True)
                tensors |= {code: value for code, value in codes if code not in tensors}
    return tensors


def linear_4bit(
    bnb,
    linear: nn.Linear,
    key: str,
    tensors: dict[str, Tensor],
    codes: list[Tensor],
    dtype: torch.dtype,
) -> nn.Linear:
    """bitsandbytes' Linear4bit in the place of `linear`, with the stored numbers of `key`.

    Its backward pass keeps no input and expands the weight again.
    """
    part = {p: tensors[f"{key}.{p}"] for p in ("absmax", "nested_absmax", "nested_offset")}
    state = bnb.functional.QuantState(
        absmax=part["absmax"],
        shape=linear.weight.shape,
        code=codes[0],
        blocksize=PER_SCALE,
        quant_type="nf4",
        dtype=dtype,  # what backward expands to: another than the input's would be a second copy
        offset=part["nested_offset"],
        state2=bnb.functional.QuantState(
            absmax=part["nested_absmax"],
            code=codes[1],
            blocksize=SCALES_PER_SCALE,
            dtype=torch.float32,
        ),
    )
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(
        tensors[key], quant_state=state, blocksize=PER_SCALE, quant_type="nf4", bnb_quantized=True
    )
    layer.quant_state = state
    # On a CPU with AVX512-BF16 it would repack the weight at the first input without a gradient;
    # the packed kernel has no backward pass, and gradients would end there without a word.
    layer.support_avx512bf16_for_cpu = False
    return layer


# ---- the kept numbers ----------------------------------------------------------------------------

DTYPES = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def as_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def checksum(key: str, tensor: Tensor, content: memoryview) -> int:
    """CRC-32 of a tensor's key, dtype, shape and bytes: it finds damage, not malice."""
    label = f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode()
    return zlib.crc32(content, zlib.crc32(label))


def keep(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` as one safetensors file, whole or not at all."""
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # keeps alignment
    entries, at = {}, 0
    for key in order:
        dtype, shape, size = DTYPES[tensors[key].dtype], [*tensors[key].shape], tensors[key].nbytes
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    size = 4 * len(order)
    entries[SUMS] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # the data begins at a multiple of 8 bytes
    write_chunks(path, kept_chunks(header, tensors, order), 8 + len(header) + at + size)


def kept_chunks(header: bytes, tensors: dict[str, Tensor], order: list[str]) -> Iterator[bytes]:
    """The file's bytes, one tensor on the host at a time: safetensors' own writer may hold all."""
    yield len(header).to_bytes(8, "little") + header
    sums = {}
    for key in order:
        content = as_bytes(tensors[key])
        sums[key] = checksum(key, tensors[key], content)
        yield content
    yield struct.pack(f"<{len(sums)}I", *(sums[key] for key in sorted(sums)))


def read_kept(path: Path, device: torch.device) -> dict[str, Tensor] | None:
    """What keep() wrote, on `device`; None where there is nothing, or where it is damaged."""
    if not path.is_file():
        return None
    tensors = {}
    try:
        with open_safetensors(path) as file:
            keys = sorted(key for key in file.keys() if key != SUMS)
            sums = struct.unpack(f"<{len(keys)}I", as_bytes(file.get_tensor(SUMS)))
            for key, want in zip(keys, sums, strict=True):
                tensor = file.get_tensor(key)
                if checksum(key, tensor, as_bytes(tensor)) != want:
                    raise ValueError(key)
                tensors[key] = tensor.to(device)
    except (Refusal, SafetensorError, ValueError, struct.error):
        print(f"{path} is damaged and is made anew")
        return None
    return tensors
