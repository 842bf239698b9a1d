"""What a run finds out about itself while it trains, and OUT/metrics.json, where it is told: its
held-out loss, which pictures fit worst, and how large its adapter is. No bit of the run changes by
it.
"""

import json
from collections.abc import Callable, Iterator
from math import inf, isfinite

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import lora
from inputs.files import sayable, write_whole
from learn.held_out import BANDS, HeldOut, plan

RISEN, ERRORS = 3, 2  # risen: so many validations in a row, so many standard errors above the best


@torch.no_grad()
def sizes(adapter: lora.Adapter, dtype: torch.dtype) -> dict[str, float]:
    """||alpha / r B A|| / ||W|| of each block, {"down_blocks.1.attentions.0": ratio, ...}. dtype:
    the UNet's.

    B A is not built: its squares' sum is the trace of (B'B)(AA'), r x r each. W is read off the
    layer's answers to unit vectors, since its numbers may be packed in 4 bits.
    """
    blocks: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        if hasattr(layer, "update"):  # of another kind than LoRA
            branch, weight = layer.update().square().sum(), layer.weight().square().sum()
        else:
            A, B = layer.lora_A, layer.lora_B
            branch = layer.scale**2 * ((B.mT @ B) * (A @ A.mT)).sum().clamp(min=0)
            unit = torch.eye(layer.in_features, dtype=dtype, device=A.device)
            weight = (layer.base(unit) - layer.base(torch.zeros_like(unit[:1]))).float()
            weight = weight.square().sum()
        block = name.split(".transformer_blocks")[0]
        blocks[block] = blocks.get(block, 0) + torch.stack([branch, weight])
    return {block: (each[0] / each[1]).sqrt().item() for block, each in blocks.items()}


class Judge:
    """Two of the run's sockets are wrapped: each batch gets the places of its examples in the step,
    so that the loss can leave its numbers there, also where the step is recorded in a CUDA graph.

    team: shares work among processes; held: data.examples_of() the held-out pictures, or None;
    room: a context of the run in which it is looked at between two steps.

    known: all that is known, as a checkpoint keeps it: plan(), but with the --validation-steps of
    now; "rows", losses() of each validation by its step, and at step 0 the bare model's; "fits",
    (2, pictures, BANDS) fp64 on the device, the sums of training losses and their counts; "sizes",
    sizes() by steps.
    """

    def __init__(self, run, team, known: dict, held: data.Examples | None, room: Callable):
        self.run, self.team, self.room, self.held_out = run, team, room, None
        n, device, count = run.config.examples_per_step, run.unet.device, len(run.examples.names)
        self.known = {"rows": {}, "fits": torch.zeros(2, count, BANDS).double(), "sizes": {}}
        self.known |= (plan(run.config, len(held.names)) if held else {}) | known
        self.known["fits"] = self.known["fits"].to(device)
        if run.config.validation_steps:
            self.known["every"] = run.config.validation_steps
        self.places = torch.arange(n, device=device)
        self.of_step = torch.zeros(3, n, device=device)  # each example's loss, timestep, and a 1
        self.inner_loss, self.inner_batches = run.loss, run.batches
        run.loss, run.batches = self.loss, self.batches
        if held:
            self.held_out = HeldOut(held, self.known["pictures"], self.known["timesteps"])

    # ---- each step

    def batches(self, run, step: int) -> Iterator[dict[str, Tensor]]:
        """The run's own, each with the places of its examples."""
        at = self.team.share(range(len(self.places))).start
        for batch in self.inner_batches(run, step):
            yield batch | {"places": self.places[at : at + len(batch["t"])]}
            at += len(batch["t"])

    def loss(self, unet: torch.nn.Module, batch: dict[str, Tensor], *how) -> Tensor:
        """The run's own, which leaves what it found in of_step, at the examples' places."""
        each = self.inner_loss(unet, batch, *how)
        # Of a step, not of another look at an example; an edited loss may be one number.
        if "places" in batch and each.shape == batch["t"].shape:
            told = torch.stack([each.detach(), batch["t"].float(), torch.ones_like(each)])
            # By comparing: where kernels are deterministic, some versions of torch wait for the
            # GPU inside index_copy_(), which no recording can hold.
            here = batch["places"][:, None] == self.places  # (B, n)
            told = torch.where(here, told[:, :, None], 0.0).sum(1)  # (3, n)
            self.of_step.copy_(torch.where(here.any(0), told, self.of_step))
        return each

    def after_step(self) -> None:
        """Add up the losses of the step that has just ended. Nothing here waits for a GPU, unless
        kernels are deterministic.
        """
        self.team.all_reduce(self.of_step)
        losses, t, seen = self.of_step
        n, examples = len(losses), self.run.examples
        numbers = range((self.run.step - 1) * n, self.run.step * n)
        pictures = [examples.decks.picture(i) for i in numbers]
        pictures = data.send(torch.tensor(pictures), t.device)
        at = pictures * BANDS + (t * BANDS / examples.num_train_timesteps).long()
        each = torch.stack([losses, seen]).double()
        self.known["fits"].flatten(1).index_add_(1, at, each)
        self.of_step.zero_()  # each process writes its own places

    def fit_worst(self) -> dict[str, float]:
        """Of the ten pictures that fit worst the sum of their losses over what the means of the
        bands let expect at their timesteps: 1 is usual, and only more than that is told.
        """
        losses, counts = self.known["fits"].cpu().numpy()
        expected = counts * losses.sum(0) / np.maximum(counts.sum(0), 1)  # (pictures, BANDS)
        ratios = losses.sum(1) / np.maximum(expected.sum(1), 1e-12)  # 0 of one not shown
        first = [i for i in np.argsort(-ratios, kind="stable")[:10] if 1.005 <= ratios[i] < inf]
        return {self.run.examples.names[i]: float(ratios[i]) for i in first}

    # ---- now and then

    def validate(self, log) -> bool:
        """Take the held-out loss where it is due, and say it: the bare model's at first, then every
        so many steps and at the end, each once. Returns whether it is the lowest so far.
        """
        run, rows, step = self.run, self.known["rows"], self.run.step
        due = step == run.config.max_train_steps or step % self.known.get("every", 1) == 0
        if not self.held_out or not due or step in rows:
            return False
        with self.room(run):
            lora.set_strength(run.adapter, float(step > 0))
            rows[step] = self.held_out.losses(run, self.team)
            lora.set_strength(run.adapter, 1.0)
        log.measured("held-out loss", float(np.mean(rows[step])), step)
        for name, (change, _) in zip(("", *range(1, BANDS + 1)), self.against(step), strict=True):
            log.measured(f"held-out loss less the bare model's {name}".strip(), change, step)
        if self.risen or not run.config.quiet:
            tqdm.write(self.line(step))
        return self.best == step

    @property
    def best(self) -> int | None:
        """The step with the lowest held-out loss."""
        sums = {step: sum(row) for step, row in self.known["rows"].items() if step}
        return min((s for s in sums if isfinite(sums[s])), key=sums.get, default=None)

    def against(self, step: int, other: int = 0) -> list[tuple[float, float]]:
        """The held-out loss of a step less that of another, of which 0 is the bare model: the mean
        over pictures and its standard error, of all timesteps, then of each band.
        """
        rows, bands, told = self.known["rows"], self.held_out.bands, []
        change = np.subtract(rows[step], rows[other]).reshape(bands.shape)  # (M, K)
        for inside in (bands >= 0, *(bands == band for band in range(BANDS))):
            each = np.ma.array(change, mask=~inside).mean(1).compressed()  # a number a picture
            told.append((float(each.mean()), float(each.std(ddof=1) / len(each) ** 0.5)))
        return told

    @property
    def risen(self) -> bool:
        """Whether the newest RISEN validations all lie beyond their error above the best."""
        best = self.best or inf
        newest = [self.against(s, best)[0] for s in self.known["rows"] if s > best][-RISEN:]
        return len(newest) == RISEN and all(above > ERRORS * off for above, off in newest)

    def note(self) -> None:
        """Take the adapter's size, at a save, and write down all that is known."""
        run, known, held = self.run, self.known, self.held_out
        with self.room(run):
            known["sizes"][run.step] = sizes(run.adapter, run.unet.dtype)
        told = known | {"best": self.best, "held_out": held.names if held else []}
        rows = {step: self.against(step) for step in known["rows"] if step}
        told["rows"] = {step: row for step, row in rows.items() if np.isfinite(row).all()}
        told["fits"] = self.fit_worst()
        losses = {step: float(np.mean(row)) for step, row in known["rows"].items()}
        told["losses"] = {step: loss for step, loss in losses.items() if isfinite(loss)}
        if self.team.first:
            write_whole(run.config.out / "metrics.json", json.dumps(told, indent=1).encode())

    # ---- in words

    def line(self, step: int) -> str:
        """What a validation says, at first how often and at how many timesteps it will be."""
        known, (change, error), loss = self.known, self.against(step)[0], self.known["rows"][step]
        if not step:
            said = "held-out loss every {every} steps, of {pictures} pictures at {timesteps} "
            said += "timesteps each: "
            said += "{share:.1%} of the run, more where a GPU waits for its host; the bare model's "
            return said.format(**known) + f"is {np.mean(loss):.4f}"
        said = (
            f"step {step}: held-out loss {np.mean(loss):.4f}, {change:+.4f} ± {error:.4f} to the "
        )
        said += "bare model's" + ", the lowest so far" * (step == self.best)
        rise = f"; risen beyond its error {RISEN} times, though the style may still sharpen: "
        ends = "the run ends here" * self.run.config.stop_when_worse
        return said + (rise + (ends or "--stop-when-worse ends a run so")) * self.risen

    def worst(self) -> str:
        """The pictures that fit worst; "" where none is worse than usual."""
        if not self.known["fits"][1].any():
            said = "which pictures fit worst is not known: no loss had a number for each example "
            return said + "(one number for a pass counts as the sum of its examples' losses)"
        told = [f"{sayable(name)} {ratio:.2f}" for name, ratio in self.fit_worst().items()]
        said = f"fit worst (loss over the usual; look at picture and caption): {', '.join(told)}"
        rough = bool(self.known["fits"][1].sum() < 10 * len(self.run.examples.names))
        said += " (fewer than ten losses of each are known: much of it is chance)" * rough
        return said * bool(told)

    def verdict(self) -> str:
        """Which step was best, and how sure that is, a line; "" where nothing is held out."""
        if not (best := self.best):
            return ""
        (change, error), last = self.against(best)[0], max(self.known["rows"])
        above, off = self.against(last, best)[0]
        said = f"lowest held-out loss: step {best}, {change:+.4f} ± {error:.4f} to the bare model's"
        rest = (
            f" (OUT/best); the last is {above:.4f} higher, {above / max(off, 1e-12):.1f} standard "
        )
        rest += "errors. The style may still have sharpened after it: compare the pictures "
        return said + (rest + "(docs/validation.md)") * (best != last) + "\n"
