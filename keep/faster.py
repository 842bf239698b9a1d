"""What fast/ has for a run: the one place that imports it. Without that folder a run says so and
goes on by the book's lines; what needs it is refused.
"""

import contextlib
import functools
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import data
import loop
import model
from adapters import kinds
from inputs import code
from inputs.files import Refusal
from inputs.options import Config
from keep.checkpoint import PlainMoments
from learn import tricks

# Its modules are imported below, each where it is used. Without an origin, what is left of the
# folder are files that Python compiled.
spec = importlib.util.find_spec("fast")
fast = bool(spec and spec.origin)


# Digests of the code that things in fast/ stand in for or count on. Where somebody has edited it,
# they are left out, said in a sentence, and the book's own lines run: that edit is what is trained.
# A test holds them to the tree: who changes such a function looks at fast/, then at this table.
WRITTEN_FOR = {
    "lora.LoRALinear": "8586e80369a874abc08532a20d20ba96",
    "lora.inject": "898849339061150bad25ccf442ad1c83",
    "loop.micro_step": "e97f395daf2a1024a509fb4e8dcc6249",
    "loop.gradient_norm": "f881e932c6a363a702a834e5bbd73b93",
    "loop.unscale_and_clip": "514fbaf61f81d1cd5a6ffc75b7393b59",
    "loop.optimizer_step": "cb1b77caeff3635cdec4d407bb0f7119",
    "loop.make_optimizer": "8e8e9fe0be138d8d4a31e813ab09e186",
    "loop.step_batches": "b1089584eaf89bb1ab272b0afcb4be7b",
    "loop.diffusion_loss": "c8525f68c58c5d82db4469a907636100",
    "model.predict": "d1694223d7e044953a78323b74dfe49a",
}
# What may mean each matrix by itself, and would mean the one vector instead.
OF_ALL_AT_ONCE = ("loop.step_batches", "loop.diffusion_loss", "model.predict")
MATRIX_BY_MATRIX = tuple(name for name in WRITTEN_FOR if name not in OF_ALL_AT_ONCE)


class Alone(contextlib.nullcontext):
    """A run of one process: it has everything, waits for nobody, and says what there is to say.

    asked: whether this process was asked to stop. fast.parallel.Team has the same methods for one
    of several processes.
    """

    size, first = 1, True
    asked: Callable[[], bool] = staticmethod(lambda: False)
    claim = staticmethod(data.every_block)

    def __enter__(self):
        return self

    def start(self, device):
        """The device that this process computes on."""
        return device

    def leave(self) -> None:
        """This process needs the others no more."""

    @property
    def stop(self) -> bool:
        """Whether any process was asked to stop, as of the last step."""
        return self.asked()

    def share(self, numbers: range) -> range:
        """This process's part of a step's examples."""
        return numbers

    def exchange(self, run) -> None:
        """Of one process the gradient and the loss are whole already."""

    def all_reduce(self, sums) -> None:
        """Of one process a sum is whole already."""

    def wait(self) -> None:
        """Until all processes are here."""

    def told(self, value) -> list:
        """Every process's `value`, the first's first."""
        return [value]

    def from_first(self, work: Callable):
        """What `work()` gives in the first process, for all."""
        return work()

    def check_equal(self, what: str, tensors: dict, texts: dict | None = None) -> None:
        """Raise Refusal where `tensors` or `texts` are not the same everywhere."""

    def say(self, sentence: str) -> None:
        """An error, said by one process for all."""
        print(sentence, file=sys.stderr, flush=True)


def part(name: str, asked: str):
    """The module `name` of fast/. Raises Refusal where what is `asked` for needs it and fast/ is
    not here.
    """
    if not fast:
        found, remedy = f"{asked}, and there is no folder fast/", "the same command without it"
        raise Refusal(found, "that folder beside loop.py", remedy)
    return importlib.import_module(f"fast.{name}")


def join(timeout: float):
    """The processes that torchrun started, this one among them; Alone without torchrun."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Alone()
    return part("parallel", "several processes").Team(timeout)


def deterministic(on: bool):
    """A context with only kernels that add in one order, if asked for."""
    return part("deterministic", "--deterministic").mode() if on else contextlib.nullcontext()


def promise(config: Config, device, processes: int) -> dict[str, str]:
    """What a deterministic run's bits depend on besides what it is; nothing for others."""
    if not config.deterministic:
        return {}
    return part("deterministic", "--deterministic").promise(config, device, processes)


def plan(config: Config, device, dtype, processes: int) -> tuple[Config, str]:
    """`config` cut and recomputed as this GPU allows, and a line that says so."""
    if not fast:
        return config, "no memory plan: there is no folder fast/" if config.memory_plan else ""
    from fast import plan

    fuses = config.fused and not edited("lora.LoRALinear")  # else more is kept in memory
    most = math.ceil(config.examples_per_step / processes)  # the largest share of a step
    how = (device, dtype, most, kinds.injector(config))
    chosen, line = plan.choose(replace(config, fused=fuses), *how)
    return replace(chosen, fused=config.fused), line


def nf4():
    """What makes and loads a base in 4 bits."""
    return part("nf4", "--base-quantization nf4")


def unet_loader(asked) -> Callable:
    """What loads the UNet that the options `asked` for, of a run or of a drawing."""
    if asked.base_quantization != "nf4":
        return model.load_unet
    return functools.partial(nf4().load_unet_nf4, cache_dir=Path(asked.cache_dir))


def digests(config: Config) -> dict[str, str]:
    """Those of all code that makes this run's numbers, of an option that makes it another, too."""
    further = ["adapters.start.start", "adapters.start.nearest"] * bool(config.start_from)
    further += ["learn.held_out.split"] * bool(config.validation_share)
    further += tricks.makers(config)
    further += kinds.makers(config)
    if config.base_quantization == "nf4":
        further += [*nf4().MAKERS, "fast.nf4.linear_4bit"]
    return code.digests(further)


def faster(run, team, say: Callable[[str], None], unfused: str = "") -> tuple:
    """Plug into `run`, fresh from loop.assemble(), what its options ask of learn/, and what makes
    it the same run sooner.

    say: is told of the recording of a step; unfused: why an earlier start of this run computed its
    layers by the book's lines, or "". Returns what reads and writes the optimizer's state by
    matrix, what was done in words, and `unfused` for the next start.
    """
    tricks.plug_in(run)
    parts = tricks.parts(run.config, run.trained)
    run.optimizer = tricks.make_optimizer(run, [[*part.values()] for part in parts])
    moments, sums = PlainMoments(run.optimizer, run.trained), [m.grad for m in run.trained.values()]
    why = edited(*MATRIX_BY_MATRIX) if fast else "there is no folder fast/"
    if why and run.config.optimizer == "prodigy":  # matrix by matrix it waits for the GPU at each
        found, remedy = f"--optimizer prodigy, and {why}", "--optimizer adamw, or put that back"
        raise Refusal(found, "all matrices in one vector, which it needs", remedy)
    if not fast:
        return moments, "by the book's lines: no folder fast/", unfused
    from fast import flat, layers, prefetch

    said = []
    if may_fuse(run):
        unfused = team.from_first(
            lambda: unfused or edited("lora.LoRALinear") or layers.disagreement(run.unet)
        )
        said.append(f"by the book's lines, since {unfused}" if unfused else layers.wrap(run.unet))
    if why:
        said.append(f"matrix by matrix, since {why}")
    else:  # all that learns in one vector, or one for each rate
        of_part = [[flat.Flat(run.unet, each) for each in flat.alike(part)] for part in parts]
        vectors = [each for part in of_part for each in part]
        views = {name: view for each in vectors for name, view in each.views.items()}
        run.trained = {name: views[name] for name in run.trained}
        run.optimizer = tricks.make_optimizer(run, [[v.vector for v in part] for part in of_part])
        # A loss of another form may read the matrices themselves, and add to their gradients.
        known = getattr(run.loss, "func", run.loss) is loop.diffusion_loss  # of a partial, too
        aside = known and not edited("loop.diffusion_loss", "model.predict")
        for each in vectors:
            run.micro_step = each.micro_step(run.micro_step, aside)
        moments = flat.FlatMoments(vectors, run.optimizer)
        sums = [each.vector.grad for each in vectors]
    model.free_memory()  # of what was laid together: a recording takes memory of its own
    record(run, [*sums, run.loss_sum], say, said)
    if not (why := edited("loop.step_batches")):
        run.batches = prefetch.Prefetch(functools.partial(run.batches, share=team.share))
    elif team.size > 1:
        raise Refusal(f"several processes, and {why}", "step_batches as it was", "GPUS=1")
    run.exchange = team.exchange
    return moments, "; ".join(said), unfused


def edited(*names: str) -> str:
    """Which of `names` is not the code that fast/ was written for, in words; "" where all are."""
    changed = [name for name in names if code.together(name) != WRITTEN_FOR[name]]
    return f"{' and '.join(changed)} {'are' if changed[1:] else 'is'} edited" if changed else ""


def record(run, sums: list, say: Callable[[str], None], said: list[str]) -> None:
    """Have the micro-step recorded on a GPU. What it decides in Python is decided once then."""
    if not run.config.cuda_graph or run.unet.device.type != "cuda":
        return
    if why := edited("loop.micro_step"):
        said.append(f"not recorded, since {why}")
        return
    if why := edited("lora.LoRALinear", "loop.diffusion_loss", "model.predict"):
        said.append(f"recorded, so that what it decides in Python is decided once ({why})")
    from fast import graph

    run.micro_step = graph.Recorded(run.micro_step, sums, say)


def between_steps(run):
    """A context for what is drawn between two steps: in the memory of recordings, where there are.

    Beside it there may be no room.
    """
    memory = getattr(run.micro_step, "memory", None)
    return memory() if memory else contextlib.nullcontext()


def may_fuse(run) -> bool:
    """Whether fused layers are asked for, which call PyTorch's attention and not xFormers'."""
    processors = {type(each).__name__ for each in run.unet.attn_processors.values()}
    return run.config.fused and not any("XFormers" in name for name in processors)


def by_definition(run) -> None:
    """Have the run's UNet compute by the book's lines again, and forget what recordings hold: the
    memory of a whole step.
    """
    if fast:
        from fast import layers

        run.micro_step, run.batches = loop.micro_step, loop.step_batches
        layers.unwrap(run.unet)
