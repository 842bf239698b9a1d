"""Pictures that are never trained on, and how their loss is taken.

Their timesteps and noise are fixed, so that the same weights have the same held-out loss, and two
steps differ by what was learned between them alone. All is told as a difference, picture by
picture: how hard a picture is, which spreads far wider than what training changes, drops out.

Letters: `M` held-out pictures that are measured, `K` timesteps of each.
"""

from dataclasses import replace
from math import ceil

import numpy as np
import torch

import data
import loop
from inputs.blocks import cut
from inputs.files import Refusal, digest
from inputs.options import Config
from inputs.sources import Pictures, read_datasets, ten

HELD_OUT = 4  # what a random stream is for, beside data.EXAMPLE, EPOCH and CROP
FEWEST = 4  # of fewer pictures a standard error says little
BUDGET = 0.03  # of the run's time, for all validations together
BANDS = 5  # equal parts of the timesteps, the first with the least noise


def split(pictures: Pictures, share: float, seed: int) -> Pictures:
    """The pictures of a `share` of all contents: by content, so that neither names nor order
    matter, and a picture that is there twice is on one side.
    """
    contents = sorted({p.digest for p in pictures}, key=lambda each: digest(f"{seed} {each}"))
    out = {*contents[: round(share * len(contents))]}
    return Pictures(picture for picture in pictures if picture.digest in out)


def chosen(config: Config) -> tuple[Pictures, Pictures, Pictures]:
    """The pictures of the data sets, those of them that are trained on, and the held-out ones, none
    if none are asked for. What --validation-data holds, too, is not trained on. Raises Refusal for
    too few, and as read_datasets() does.
    """
    share, folder, pictures = config.validation_share, config.validation_data, read_datasets(config)
    held = split(pictures, share, config.seed)
    if folder:  # read and captioned as those of training are
        held = read_datasets(replace(config, dataset_name=(folder,), dataset_weights=()))
    if (share or folder) and len(held) < FEWEST:
        found = f"{len(held)} held-out pictures, of {folder or len(pictures)}"
        enough = ceil(100 * FEWEST / max(1, len(pictures))) / 100
        remedy = f"--validation-share {enough:g}" if enough <= 0.5 else "more pictures"
        remedy = "more in --validation-data" if folder else remedy
        raise Refusal(found, f"{FEWEST} or more, whose error can be told", remedy)
    out = {picture.digest for picture in held}
    trained = Pictures(picture for picture in pictures if picture.digest not in out)
    names = f"{len(held)} held out, not trained on: {ten([picture.name for picture in held])}"
    trained.notes = [*pictures.notes, *[names] * bool(held)]
    if gone := [picture.name for picture in pictures if folder and picture.digest in out]:
        trained.notes.append(f"not trained on, since they are held out, too: {ten(gone)}")
    if not trained:
        found, remedy = "every picture is held out", "another --validation-data, a smaller share"
        raise Refusal(found, "some to train on", remedy)
    return pictures, trained, held


def plan(config: Config, pictures: int) -> dict[str, float]:
    """The steps from one validation to the next ("every"), how many "pictures" are measured and at
    how many "timesteps" each (K), as a run begins with and keeps, since others would be another
    loss; and how much of the run that is.

    Ten validations make a curve; where they cost more than the budget, as few as five, then with
    fewer of the pictures. Each band has two at least, and K is at most 50: the error is between
    pictures.
    """
    # An example of a step is as much work as two here: backward takes as long as forward, since the
    # base's weights have no gradient.
    steps, work = config.max_train_steps, 2 * config.max_train_steps * config.examples_per_step
    least, most = ceil(2 * BANDS / pictures), BUDGET * work / pictures
    every = config.validation_steps or ceil(steps / min(10, max(5, int(most / least) - 1)))
    times = ceil(steps / every) + 1  # the bare model is measured, too
    k = min(50, max(least, int(most / times)))
    measured = min(pictures, max(2 * BANDS, int(BUDGET * work / times)))
    share = k * measured * times / work
    return {"every": every, "pictures": measured, "timesteps": k, "share": share}


class HeldOut(data.Examples):
    """A run's held-out examples: number p K + j is the p-th of the M pictures that the seed picks,
    at the j-th of its K timesteps, not mirrored, with its first caption. The M K timesteps lie at
    equal distances, and each picture has one in each of K equal parts.

    of: what data.examples_of() gives for all held-out pictures, encoded once, also where the others
    are encoded in each step. passes: the numbers that go through the UNet at once, of one size, 8
    at 512 px, 2 at 1024 px; not by the run's batch, which may change, and on which a loss's last
    digits depend.
    """

    def __init__(self, of: data.Examples, m: int, k: int):
        super().__init__(of.source, of.names, of.sizes, 1, of.seed, of.chances, 0)
        stream = np.random.default_rng([of.seed, HELD_OUT])
        self.picked = np.sort(stream.permutation(len(of.names))[:m])  # (M,)
        turns = stream.permutation(m)
        share = (np.arange(k) + (turns[:, None] + 0.5) / m) / k  # (M, K) in [0, 1)
        self.t = (share * of.num_train_timesteps).astype(int)
        self.bands = (share * BANDS).astype(int)
        self.passes = []
        sizes = [of.sizes[i] for i in self.picked]
        for group in data.alike(sizes):
            height, width = sizes[group[0]]
            numbers = [p * k + j for p in group for j in range(k)]
            self.passes += cut(numbers, max(1, 8 * 512**2 // (height * width)))

    def example(self, i: int) -> data.Example:
        picture, t = int(self.picked[i // self.t.shape[1]]), int(self.t.flat[i])
        stream = np.random.default_rng([self.seed, i, HELD_OUT])
        shape = (2, 4, *(side // 8 for side in self.sizes[picture]))
        eps, noise = torch.from_numpy(stream.standard_normal(shape, dtype=np.float32))
        return data.Example(i, picture, False, False, t, eps, noise, 0.0)

    @torch.no_grad()
    def losses(self, run, team) -> list[float]:
        """The held-out loss of each number: the squared error, whatever loss is trained, with the
        run's masks and min-SNR weight, which runs that are compared must share; the same in all
        processes, each of which computes its share of the passes. Raises Refusal where an edited
        loss is not one of each example.
        """
        device, found = run.unet.device, torch.zeros(self.t.size, device=run.unet.device)
        how = (run.schedule, run.latent_scaling, run.config.snr_gamma)
        for at in team.share(range(len(self.passes))):
            numbers = self.passes[at]
            each = loop.diffusion_loss(run.unet, self.batch(numbers, device), *how)
            if each.shape != (len(numbers),):
                said = f"diffusion_loss() gives {tuple(each.shape)} for {len(numbers)} examples"
                remedy = "leave the mean or sum to micro_step(), or hold no pictures out"
                raise Refusal(said, "a held-out loss of each", remedy)
            found[numbers] = each
        team.all_reduce(found)
        return found.tolist()
