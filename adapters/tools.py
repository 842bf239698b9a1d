"""What is done with adapter files, without their model: converted, added up, cut to a rank.

All three are one sum. A file adds scale B A to a weight, scale = alpha / rank. Several files add
their sum, whose factors are theirs side by side: of rank r1 + r2, exactly. The nearest of a smaller
rank is in its singular values. What was written is read back and held to what was asked.
"""

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import lora
import model
from adapters import files, kinds
from adapters.start import nearest
from inputs import hub
from inputs.adapter_file import MAX_RANK
from inputs.files import Refusal, refusing
from inputs.one_file import SHIPPED
from inputs.progress import progress

# Entries of a header that tell of the numbers, layout or run of that one file.
OWN = r"lora_adapter_metadata|rank|alpha|format|run|made|ss_base_model_version|ss_network_.*"
OWN += r"|sshs_.*|modelspec\.hash_sha256"
# Files, and how strongly each acts.
Parts = list[tuple[lora.AdapterFile, float]]


def layers_of(base: str) -> dict[str, tuple[Path, str] | None]:
    """The layers in the attention blocks of the UNet of `base`, by diffusers' names, with the file
    and the key of each weight; of "" SDXL's, whose weights are nowhere.
    """
    if not base:
        names = kinds.able(model.build_unet(SHIPPED / "unet"))
        return dict.fromkeys(name for name in names if ".attentions." in name)
    names, weight = {}, r"(down|mid|up)_blocks?\..*attentions\..+\.weight"
    for path, keys in hub.unet_files(base, half=True):
        found = {name: key for name, key in keys.items() if re.fullmatch(weight, name)}
        names |= {name.removesuffix(".weight"): (path, key) for name, key in found.items()}
    return names


def read(name: str | Path, layers: dict) -> lora.AdapterFile:
    """The adapter file called `name`, its modules by their names in `layers`, the model's. Raises
    Refusal as files.read(), and for modules that are not among these.
    """
    file = files.read(name)
    adapter = lora.Adapter(dict.fromkeys(layers), file.rank, file.alpha, ())
    file = replace(file, matrices=files.by_our_names(adapter, file))
    if unknown := modules_of(file) - layers.keys():
        found = f"{file.path} adapts {len(unknown)} modules such as {min(unknown)}"
        expected = "layers in the attention blocks of SDXL, or of the model that is named"
        raise Refusal(found, expected, f"name the model that it belongs to: {hub.OPTION} FOLDER")
    return file


def modules_of(file: lora.AdapterFile) -> set[str]:
    """The modules that a file adapts."""
    return {name.rpartition(".")[0] for name in file.matrices}


def joined(parts: Parts, module: str) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), fp64, whose product B A is what all `parts` add to the weight of
    `module`; r is the sum of the ranks of those that adapt it.
    """
    there = [(file, k) for file, k in parts if f"{module}.lora_A" in file.matrices]
    A = [file.matrices[f"{module}.lora_A"].double() for file, _ in there]
    B = [k * f.alpha / f.rank * f.matrices[f"{module}.lora_B"].double() for f, k in there]
    return torch.cat(A), torch.cat(B, dim=1)


def squared_length(A: Tensor, B: Tensor) -> float:
    """The sum of the squares of B A, without building it: the trace of (B'B)(AA')."""
    return ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).item()


def combine(parts: Parts, rank: int = 0, keep: float = 0.0) -> lora.Adapter:
    """What all `parts` add up to, in fp32: exactly; or the nearest of `rank`, or of the smallest
    rank that keeps the share `keep` of the sum's squared length. Its layers are their two matrices.
    Raises Refusal for parts of different widths and for an exact sum of too large a rank.
    """
    (first, strength), whole = parts[0], sum(file.rank for file, _ in parts)
    exact = not (rank or keep)
    if rank > whole:
        found = f"--rank {rank}, of files whose ranks add up to {whole}"
        raise Refusal(found, "a smaller rank", f"--rank {whole}, or leave it out")
    if exact and whole > MAX_RANK:
        found, expected = f"a sum of rank {whole}", f"a rank of at most {MAX_RANK}"
        raise Refusal(found, expected, "--rank R cuts it")
    # The first file's B, too, stays as it is, to the bit.
    scale = abs(strength) * first.alpha / first.rank if exact else 1.0
    factors, squares, layers = {}, torch.zeros(whole, dtype=torch.double), {}
    modules = sorted(set().union(*(modules_of(file) for file, _ in parts)))
    with refusing("the files do not fit each other", "one architecture", "merge SDXL's own"):
        for module in progress(modules, "adding up", delay=2):
            A, B = joined(parts, module)
            if not exact:
                A, B, energy = nearest(A, B, len(A))
                squares[: len(energy)] += energy
            factors[module] = A.float(), (B / scale).float()
    if keep:
        kept = squares.cumsum(0) / squares.sum()
        rank = int((kept[:-1] < keep).sum()) + 1
    rank = rank or whole
    for module, (A, B) in factors.items():  # what a file lacks is zero: one rank for all modules
        A, B = F.pad(A, (0, 0, 0, rank)), F.pad(B, (0, rank))
        layers[module] = SimpleNamespace(lora_A=A[:rank], lora_B=B[:, :rank])
    return lora.Adapter(layers, rank, scale * rank, tuple(layers))


def residual(parts: Parts, got: lora.AdapterFile) -> float:
    """How far `got` is from what `parts` add up to, as a share of the latter's length."""
    modules, left = sorted(modules_of(got)), [*parts, (got, -1.0)]
    gone = sum(squared_length(*joined(left, module)) for module in modules)
    whole = sum(squared_length(*joined(parts, module)) for module in modules)
    return (gone / max(whole, 1e-300)) ** 0.5


def best_dtype(wanted: lora.Adapter, parts: Parts) -> torch.dtype:
    """The dtype of all parts, if they have one that holds every number of `wanted`; else fp32."""
    own = {matrix.dtype for file, _ in parts for matrix in file.matrices.values()}
    dtype = own.pop() if len(own) == 1 else torch.float32
    exact = all(each.to(dtype).float().equal(each) for each in wanted.matrices().values())
    return dtype if exact else torch.float32


def write(parts: Parts, path: Path, layers: dict, how) -> str:
    """Write what `parts` add up to. Returns in words what was written, and what of it was lost.

    layers: as read() takes them; how: the command's Options. Raises Refusal where something is at
    `path`, an input above all, and for numbers beyond the dtype.
    """
    if path.exists():
        raise Refusal(f"{path} is there already", "a new file", "another --output, or remove it")
    wanted = combine(parts, how.rank, how.keep)
    dtype = model.DTYPES.get(how.save_dtype) or best_dtype(wanted, parts)
    if not all(matrix.to(dtype).isfinite().all() for matrix in wanted.matrices().values()):
        raise Refusal(f"numbers beyond {how.save_dtype}", "a dtype with room", "--save-dtype fp32")
    agreed = set.intersection(*(set(file.about.items()) for file, _ in parts))
    about = {key: value for key, value in sorted(agreed) if not re.fullmatch(OWN, key)}
    made = [
        f"{file.path.name}:{k:g} sha256 {hashlib.sha256(file.path.read_bytes()).hexdigest()}"
        for file, k in parts
    ]
    files.save(wanted, path, how.to, dtype, about | {"made": f"{how.command} {', '.join(made)}"})
    got, size = read(path, layers), path.stat().st_size / 1e6
    off = residual(parts, got)
    told = f"{how.to}, {len(wanted.layers)} modules, rank {got.rank}, alpha {got.alpha:g}"
    lost = f"residual {f'{off:.2g}' if off > 1e-7 else 'below 1e-7'} of the update's length"
    return f"{path}: {told}, {str(dtype)[6:]}, {size:.1f} MB\n{lost}"
