"""Which way of computing a run fits a card and is fastest there, and what a recipe needs on it.

memory.py says what a step takes; here is what cards offer, how long a step takes by arithmetic, the
choice, and `make plan`'s table. Deleting this module leaves every run as it is.

A step's n examples are cut into passes of one size, a divisor of n. An uneven cut (3 + 1, which is
the same run) is never the fastest that fits: what a pass costs besides its examples is its
launches, so only fewer passes are faster, and for the recipes' n = 4 three at once need two passes,
as two at once do, for more memory. Only an n without a divisor near would gain: 3 + 3 + 1 on a T4
takes 8 % less than seven passes of one (7 x 159 ms), where n = 8 in two passes takes 9 % less per
image by itself.

Letters: `n` examples per optimizer step.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import diffusers
import torch
from diffusers import UNet2DConditionModel

import loop
import lora
import model
from fast import flat, layers, memory
from fast.memory import GIB, Prediction, Rehearsal, Work, plus, quantised
from inputs import hub
from inputs.files import Refusal, digest, first_line, write_whole
from inputs.options import RECIPES, Config
from inputs.vetting import SDXL_UNET

# ---- cards, and how long a step takes there ------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """name: as torch says it, or a part of it; gib: about what torch reports as its memory; half
    and single: peak TFLOP/s of fp16 (or bf16) products summed in fp32, which GeForce cards do at
    half the rate of sums in fp16, and of fp32 products, dense; capability: sm_XY.
    """

    name: str
    gib: float
    half: float
    single: float
    gb_per_s: int
    capability: tuple[int, int]


CARDS = {  # as sold; what of it a run reaches is SHARES' assumption
    card.name: card
    for card in (
        Card("T4", 14.56, 65, 8.1, 300, (7, 5)),
        Card("P100", 15.89, 18.7, 9.3, 732, (6, 0)),
        Card("V100", 15.77, 112, 14.0, 900, (7, 0)),
        Card("RTX 2060", 5.79, 26, 6.5, 336, (7, 5)),
        Card("RTX 2070", 7.78, 30, 7.5, 448, (7, 5)),
        Card("RTX 3060", 11.75, 25.5, 12.7, 360, (8, 6)),
        Card("RTX 3090", 23.68, 71, 35.6, 936, (8, 6)),
        Card("RTX 4090", 23.64, 165, 82.6, 1008, (8, 9)),
        Card("L4", 22.03, 121, 30.3, 300, (8, 9)),
        Card("A10G", 22.06, 70, 31.2, 600, (8, 6)),
        Card("A100 40GB", 39.4, 312, 19.5, 1555, (8, 0)),
        Card("A100 80GB", 79.15, 312, 19.5, 2039, (8, 0)),
        Card("H100", 79.1, 989, 67, 3350, (9, 0)),
        Card("H200", 139.8, 989, 67, 4800, (9, 0)),
    )
}
# The share of the free memory that a plan may fill. What torch reserves is more than what is
# allocated at the peak, since blocks of other sizes lie between: 1 to 12 % more in 15 of the 19
# cases of benchmarks/results/memory_check.json that load a base as it is, 14 to 23 % in four (none
# was short of memory, where torch gives blocks back). The prediction is 1 % under to 2 % over.
FILL = 0.84
SHARES = (0.45, 0.25)  # of the peak, reached by products, convolutions and attention: assumed
# s that a recorded kernel takes besides its arithmetic and bytes. With 45 % it gives the H100's
# 0.138, 0.058, 0.261 and 0.174 s of benchmarks/results/bench_ladder.json within a tenth.
LAUNCH = 3.5e-6
EAGER = 0.4  # s of host work that a pass takes at least if it is not recorded
# s that --compile takes before the first step (an H100's host), and the share of a recorded step
# that it saves there: the rows 4x1 and compile of benchmarks/results/bench_ladder.json.
COMPILE, COMPILED = 77, 0.04


def seconds_per_pass(
    config: Config, work: Work, weights: int, card: Card, half: bool, share: float
) -> dict[str, float]:
    """One forward and backward pass over config.train_batch_size examples, estimated, by what takes
    the time. work: of that pass, which reads the `weights`, in bytes, at least twice.
    """
    peak, speed = 1e12 * (card.half if half else card.single), 1e9 * card.gb_per_s
    parts = {
        "products": max(work["flop"] / (share * peak), 2 * weights / speed),
        "bytes": work["moved"] / speed,
        "launches": LAUNCH * work["launches"],
    }
    if not config.cuda_graph:
        parts["launches"] = max(0.0, EAGER - parts["products"] - parts["bytes"])
    return parts


def seconds_per_step(config: Config, *about) -> float:
    """seconds_per_pass() of as many passes as config's optimizer step has."""
    passes = config.examples_per_step / config.train_batch_size
    return passes * sum(seconds_per_pass(config, *about).values())


def seconds_again(config: Config, work: Work, card: Card, half: bool) -> float:
    """What a pass takes longer for `work` that is done again."""
    parts = seconds_per_pass(config, work, 0, card, half, SHARES[0])
    return sum(parts.values()) if config.cuda_graph else parts["products"] + parts["bytes"]


def compiling(config: Config, seconds: list[float]) -> str:
    """--compile against the run's length. seconds: estimates of a recorded step's, if known."""
    said = f"{COMPILE} s more at the start for {COMPILED:.0%} less a step, as measured once (H100, "
    said += "512 px, fp16, recorded, nothing recomputed)"
    if seconds:
        steps = (f"{COMPILE / COMPILED / s:,.0f}" for s in sorted(seconds, reverse=True))
        said += f": {' to '.join(steps)} steps earn it back"
    return f"{said}; the run has {config.max_train_steps:,}"


def named_card(name: str) -> Card:
    """The card of CARDS that `name` means. Raises Refusal for none."""
    for key, card in CARDS.items():
        if name.replace(" ", "").lower() == key.replace(" ", "").lower():
            return card
    raise Refusal(
        f"card {name}", f"one of {', '.join(CARDS)}", "make plan CARD=T4, or --plan-for T4"
    )


def this_card(device: torch.device) -> Card:
    """The card that torch sees, its peak from CARDS, or a middling one's where it is not there."""
    about = torch.cuda.get_device_properties(device)
    gib = about.total_memory / GIB
    alike = [
        c for c in CARDS.values() if re.search(rf"\b{re.sub(' [48]0GB', '', c.name)}\b", about.name)
    ]
    found = min(alike, key=lambda c: abs(c.gib - gib), default=CARDS["A10G"])
    return replace(found, name=about.name, gib=gib, capability=(about.major, about.minor))


# ---- the plan ------------------------------------------------------------------------------------

Predict = Callable[[Config], Prediction]


@dataclass
class Plan:
    """The fastest way that fits, and the next faster one, which does not, with its bytes (none
    where the fastest of all fits).
    """

    config: Config
    prediction: Prediction
    faster: tuple[Config, int] | None = None


def predictor(config: Config, dtype: torch.dtype, about: dict, folder: Path | None) -> Predict:
    """A function from a Config that differs in batch size and recomputed blocks to a Prediction.

    It looks in `folder` first and writes there what it had to find out. What is written is named by
    all that it depends on: the choices, the UNet, the libraries and the modules' own text.
    """
    sources = (memory, flat, layers, lora, model, loop)
    texts = [Path(source.__file__).read_bytes() for source in sources]
    versions = f"{torch.__version__} {diffusers.__version__} {dtype} {json.dumps(dict(about))}"
    reads = ("resolution", "train_batch_size", "lora_rank", "fused", "attention", "use_8bit_adam")
    reads += ("gradient_checkpointing", "checkpointed_blocks", "snr_gamma")
    known, rehearsals = {}, []

    def predict(asked: Config) -> Prediction:
        choices = {name: getattr(asked, name) for name in reads} | {"nf4": quantised(asked)}
        key = digest(versions, json.dumps(choices), *texts)
        path = folder / "memory" / f"{key}.json" if folder else None
        if key not in known and path and path.is_file():
            with contextlib.suppress(ValueError, TypeError):  # damaged: it is found out anew
                known[key] = Prediction(**json.loads(path.read_text()))
        if key not in known:
            if not rehearsals:
                print("counting what a step takes: some ten seconds, once", file=sys.stderr)
                rehearsals.append(Rehearsal(config, dtype, about))
            known[key] = rehearsals[0].predict(asked)
            if path:
                write_whole(path, json.dumps(asdict(known[key])).encode())
        return known[key]

    return predict


def shaped(config: Config, size: int, blocks: tuple[str, ...] | None) -> Config:
    """config in passes of `size` examples that recompute `blocks`; None recomputes nothing."""
    return replace(
        config,
        train_batch_size=size,
        gradient_accumulation_steps=config.examples_per_step // size,
        gradient_checkpointing=blocks is not None,
        checkpointed_blocks=blocks or (),
    )


def enlarged(work: Work, size: int) -> Work:
    """The work of one example's pass for `size` examples at once: as many launches."""
    return {kind: amount * (1 if kind == "launches" else size) for kind, amount in work.items()}


def candidates(
    config: Config, predict: Predict, card: Card, half: bool, most: int
) -> list[tuple[float, int, Config]]:
    """Every way to cut the step into passes of at most `most` and to recompute blocks, fastest
    first: its seconds, its bytes and its Config.

    Blocks are added in the order of bytes saved per second lost. Bytes and work are scaled up from
    one example without and one with everything recomputed, which is somewhat too much;
    choose_plan() looks at the real number before it believes one.
    """
    plain, all_again = (predict(shaped(config, 1, blocks)) for blocks in (None, ()))
    useful = [name for name, size in plain.kept.items() if size]
    fixed = plain.peak - plain.parts["activations"]
    found, n = [], config.examples_per_step
    for size in (size for size in range(1, most + 1) if n % size == 0):
        lowest = fixed + size * all_again.parts["activations"]
        bytes_, work = fixed + size * plain.parts["activations"], enlarged(plain.work, size)
        ways, again = [(bytes_, work, None)], {n: enlarged(plain.again[n], size) for n in useful}
        lost = {n: seconds_again(config, again[n], card, half) for n in useful}
        order = sorted(useful, key=lambda name: -plain.kept[name] / lost[name])
        for count, name in enumerate(order, 1):
            bytes_ -= size * plain.kept[name]
            work = plus(work, again[name])
            ways.append((max(bytes_, lowest), work, tuple(order[:count])))
        for bytes_, work, blocks in ways:
            way = shaped(config, size, blocks)
            about = (work, plain.parts["weights"], card, half, SHARES[0])
            found.append((seconds_per_step(way, *about), work["flop"], bytes_, way))
    # Where the host or the weights' reading sets the time, less arithmetic goes first.
    return [(c[0], *c[2:]) for c in sorted(found, key=lambda c: c[:2])]


def choose_plan(
    config: Config, predict: Predict, card: Card, half: bool, free: int, most: int = 0
) -> Plan:
    """The fastest way that fits into FILL of `free` bytes, in passes of at most `most` examples (0:
    of all). Raises Refusal where none does.
    """
    most = most or config.examples_per_step
    faster, off = None, {}  # off: by size of pass, how far its last estimate was from what came out
    for _, estimate, way in candidates(config, predict, card, half, most):
        size = way.train_batch_size
        needed = estimate + off.get(size, 0)
        if needed <= FILL * free * (1 if size in off else 1.05):  # at first estimates are too high
            found = predict(way)
            if found.peak <= FILL * free:
                return Plan(way, found, faster)
            needed, off[size] = found.peak, found.peak - estimate
        faster = (way, needed)
    least = predict(shaped(config, 1, ())).peak
    smaller = "" if quantised(config) else "the recipe lowmem (a 4-bit base), or "
    raise Refusal(
        f"one example with everything recomputed needs {least / GIB:.1f} GiB on the GPU, and "
        f"of {free / GIB:.1f} GiB free {FILL:.0%} may be filled",
        f"at least {least / FILL / GIB:.1f} GiB free",
        f"close what else uses this GPU; or take {smaller}a smaller --resolution; "
        "--no-memory-plan tries it all the same",
    )


def step_seconds(plan: Plan, card: Card, half: bool) -> list[float]:
    """Estimates of a step's seconds, by SHARES."""
    about = (plan.prediction.work, plan.prediction.parts["weights"], card, half)
    return [seconds_per_step(plan.config, *about, share) for share in SHARES]


def in_words(config: Config) -> str:
    count = len(config.checkpointed_blocks)
    again = f"{count} block{'s' * (count > 1)}" if count else "everything"
    again = again if config.gradient_checkpointing else "nothing"
    return f"{config.train_batch_size} x {config.gradient_accumulation_steps}, {again} recomputed"


def why_not_more(plan: Plan) -> str:
    if not plan.faster:
        return "no way that was tried is faster"
    way, needed = plan.faster
    return f"the next faster way ({in_words(way)}) needs {needed / GIB:.1f} GiB"


def free_bytes(device: torch.device) -> int:
    """What torch may still allocate on the GPU: what is free, or less where the process is held to
    a share (torch.cuda.set_per_process_memory_fraction).
    """
    free, total = torch.cuda.mem_get_info(device)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    return min(free, int(share * total) - torch.cuda.memory_reserved(device))


def choose(
    config: Config, device: torch.device, dtype: torch.dtype, most: int = 0
) -> tuple[Config, str]:
    """`config` cut and recomputed as this GPU allows, and a line that says so. most: the examples
    of a step that this process has; 0 means all.

    The run is the same whatever is chosen.
    """
    chosen, line, seconds = chosen_way(config, device, dtype, most)
    if config.compile:
        line = f"{line}\n--compile takes {compiling(chosen, seconds)}".lstrip()
    return chosen, line


def chosen_way(
    config: Config, device: torch.device, dtype: torch.dtype, most: int
) -> tuple[Config, str, list[float]]:
    """choose()'s, and estimates of a step's seconds where a plan was made.

    Only where the recipe asks for it and batch size and checkpointing are still the recipe's own:
    what was asked for is obeyed.
    """
    usual = RECIPES[config.recipe][1]
    names = ("train_batch_size", "gradient_checkpointing", "checkpointed_blocks")
    asked = [name for name in names if getattr(config, name) != getattr(usual, name)]
    if not config.memory_plan or device.type != "cuda":
        return config, "", []
    if config.deterministic:
        return config, "memory plan: none, since what is free is no function of the options", []
    if not config.cache:
        return config, "memory plan: none, since --no-cache keeps the encoders in memory, too", []
    if asked:
        return config, f"memory plan: none, since {', '.join(asked)} was asked for", []
    try:
        if device.index is None:  # CUDA's own calls want a number
            device = torch.device("cuda", torch.cuda.current_device())
        folder = hub.fetch(config.pretrained_model_name_or_path, "unet", dtype != torch.float32)
        about = UNet2DConditionModel.load_config(folder)
        predict = predictor(config, dtype, about, Path(config.cache_dir))
        free = free_bytes(device)
        card, half = this_card(device), dtype != torch.float32
        plan = choose_plan(config, predict, card, half, free, most)
    except Refusal:
        raise
    except Exception as error:  # another torch's meta kernels may lack something: train anyway
        return config, f"memory plan: none, since it failed ({first_line(error)})", []
    line = (
        f"memory plan: {in_words(plan.config)}: {plan.prediction.peak / GIB:.1f} GiB predicted, "
        f"{free / GIB:.1f} GiB free, of which {FILL:.0%} may be filled; {why_not_more(plan)}"
    )
    known = config.cuda_graph and half and not plan.config.gradient_checkpointing
    return plan.config, line, step_seconds(plan, card, half) if known else []


# ---- make plan -----------------------------------------------------------------------------------

# SDXL base's files in GB, fp16 variant and fp32: UNet, second and first text encoder; VAE in fp32.
DOWNLOAD_GB = {True: 5.14 + 1.39 + 0.25 + 0.33, False: 10.27 + 2.78 + 0.49 + 0.33}
# GiB of its own that a run's process took at most, and of mapped file pages, which the kernel can
# drop: benchmarks/results/full_size.json; fp32's, with fp32 files, full_size_eager.json beside it.
HOST_GIB = {True: (2.1, 5.5), False: (2.8, 10.2)}


def table(config: Config) -> str:
    """What a recipe needs on the card that config.plan_for names, without that card."""
    card = named_card(config.plan_for)
    dtype = model.DTYPES.get(config.mixed_precision)
    if dtype is None:
        dtype = torch.bfloat16 if card.capability >= (8, 0) else torch.float16
    half, about, free = dtype != torch.float32, SDXL_UNET, int(card.gib * GIB)
    if Path(config.pretrained_model_name_or_path).is_dir():
        folder = hub.fetch(config.pretrained_model_name_or_path, "unet", half)
        about = UNet2DConditionModel.load_config(folder)
    predict = predictor(config, dtype, about, Path(config.cache_dir))
    try:
        plan = Plan(config, predict(config))
    except (RuntimeError, AttributeError, TypeError) as error:  # of meta kernels that are missing
        raise Refusal(
            f"torch {torch.__version__} cannot run the step without numbers ({first_line(error)})",
            "a torch whose meta device knows every operation of the step, such as 2.11 or 2.15",
            "make plan with a newer torch; training itself goes on without a plan",
        ) from error
    if config.memory_plan:
        try:
            plan = choose_plan(config, predict, card, half, free)
        except Refusal:  # nothing fits: the smallest is shown
            plan.config = shaped(config, 1, ())
            plan.prediction = predict(plan.config)
    return "\n".join(rows_of(config, plan, card, dtype, free))


def rows_of(config: Config, plan: Plan, card: Card, dtype: torch.dtype, free: int) -> list[str]:
    """The table's lines."""
    found, way, half = plan.prediction, plan.config, dtype != torch.float32
    fits = found.peak <= FILL * free
    own, mapped = HOST_GIB[half]
    saved = 2 * (found.parts["optimizer"] + 2 * found.parts["gradients"]) / 1e9
    kept = found.parts["weights"] / 1e9 if quantised(config) else 0.0
    numbers = f"{kept:.1f} GB of 4-bit numbers, " if kept else ""
    if Path(config.pretrained_model_name_or_path).is_dir():  # another model may have any size
        files = [
            f"{'download':>16}    0.0 GB: {config.pretrained_model_name_or_path} is on this disk",
            f"{'disk':>16} {saved + kept:6.1f} GB: {numbers}{saved:.1f} GB of checkpoints, and "
            "the pictures",
        ]
    else:
        files = [
            f"{'host memory':>16} {own:6.1f} GiB of its own, {mapped:.1f} GiB mapped file pages",
            f"{'download':>16} {DOWNLOAD_GB[half]:6.1f} GB for SDXL base, once, and the pictures",
            f"{'disk':>16} {DOWNLOAD_GB[half] + saved + kept:6.1f} GB: that, {numbers}{saved:.1f} "
            "GB of checkpoints, about 1 MB a picture",
        ]
    rows = [
        f"recipe {config.recipe} on {card.name}, {config.resolution} px, UNet in {str(dtype)[6:]}",
        f"{in_words(way)}, of {config.examples_per_step} images per optimizer step",
        *(f"{part:>16} {size / GIB:6.2f} GiB" for part, size in found.parts.items()),
        f"{'peak':>16} {found.peak / GIB:6.2f} GiB of {card.gib:.2f}, of which {FILL:.0%} may be "
        f"filled: {'fits' if fits else 'does NOT fit'}",
        *files,
        *estimate(way, found, card, half),
    ]
    if way.cuda_graph and half and not way.gradient_checkpointing:
        rows.append(f"{'--compile':>24} {compiling(way, step_seconds(plan, card, half))}")
    if config.memory_plan and fits:
        rows.append(f"why not faster: {why_not_more(plan)}")
    elif not fits:
        largest = max(found.parts, key=found.parts.get)
        less = f'RECIPE=lowmem CARD="{card.name}" ARGS="--resolution {config.resolution}"'
        if quantised(config):
            less = f'RECIPE={config.recipe} CARD="{card.name}" ARGS="--resolution 512"'
        rows.append(
            f"why not: {largest} alone take {found.parts[largest] / GIB:.1f} GiB. What may fit: "
            f"make plan {less}"
        )
    return rows


def estimate(way: Config, found: Prediction, card: Card, half: bool) -> list[str]:
    """The minutes of a run, as a range, with the arithmetic."""
    fast, slow = (
        seconds_per_pass(way, found.work, found.parts["weights"], card, half, share)
        for share in SHARES
    )
    passes = way.max_train_steps * way.examples_per_step / way.train_batch_size
    low, high = (passes * sum(parts.values()) / 60 for parts in (fast, slow))
    minutes = {name: passes * seconds / 60 for name, seconds in fast.items()}
    peak = card.half if half else card.single
    usual = RECIPES[way.recipe][1].resolution
    size = f" --resolution {way.resolution}" if way.resolution != usual else ""
    launches = f"{found.work['launches']:,} operators a pass, {LAUNCH * 1e6:.1f} us each"
    return [
        f"{'time':>16} {low:6.1f} to {high:.1f} minutes for {way.max_train_steps:,} steps: an "
        f"estimate, not measured, of {passes:,.0f} passes:",
        f"{'products':>24} {found.work['flop'] / 1e12:.2f} TFLOP a pass at {SHARES[0]:.0%} or "
        f"{SHARES[1]:.0%} of {peak:g} TFLOP/s: {minutes['products']:.1f} or "
        f"{passes * slow['products'] / 60:.1f} min",
        f"{'other kernels':>24} {found.work['moved'] / 1e9:.1f} GB a pass at {card.gb_per_s:,} "
        f"GB/s: {minutes['bytes']:.1f} min",
        f"{'launches':>24} {launches if way.cuda_graph else 'by the host'}: "
        f"{minutes['launches']:.1f} min",
        f"{'to check, there':>24} python -m benchmarks.ladder recipe {way.recipe} --steps 20{size}",
    ]
