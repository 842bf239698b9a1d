"""Pictures in their own shapes: which one each takes, where it is cut, and whose turn it is."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from inputs.files import Refusal
from inputs.options import parse
from inputs.pictures import refuse_small, upright_size
from keep import report
from made import encoded, noisy, picture


def crop(*resolutions, buckets=True, random_crop=False, seed=0) -> data.Crop:
    return data.Crop(resolutions, buckets, random_crop, seed)


@pytest.mark.parametrize("resolution", [64, 128, 512, 576, 768, 1024])
def test_the_shapes_of_a_resolution(resolution):
    shapes = crop().shapes(resolution)
    widths = [width for _, width in shapes]
    assert (resolution, resolution) in shapes and len(set(widths)) == len(widths)
    for height, width in shapes:
        assert height % 64 == 0 == width % 64 and resolution / 2 <= width <= 2 * resolution
        assert height * width <= resolution**2 < (height + 64) * width
    assert crop(buckets=False).shapes(resolution) == [(resolution, resolution)]


# By hand: (width, height), then (height, width) and the time ids of the view and of its mirror.
CASES = [
    ((1152, 1000), (448, 576), [1000, 1152, 26, 0, 448, 576], [1000, 1152, 26, 0, 448, 576]),
    ((700, 1000), (576, 448), [1000, 700, 32, 0, 576, 448], [1000, 700, 32, 0, 576, 448]),
    ((1000, 1000), (512, 512), [1000, 1000, 0, 0, 512, 512], [1000, 1000, 0, 0, 512, 512]),
    # 1024 x 256 for a strip; 4000 / 256 scales to 1024 x 256 and nothing is cut away
    ((4000, 1000), (256, 1024), [1000, 4000, 0, 0, 256, 1024], [1000, 4000, 0, 0, 256, 1024]),
]


@pytest.mark.parametrize(("size", "shape", "ids", "mirrored"), CASES)
def test_a_pictures_shape_and_time_ids_by_hand(size, shape, ids, mirrored):
    given = picture(noisy(*size))
    assert upright_size(given) == size[::-1] and crop(512).size(size[::-1]) == shape
    pixels, time_ids = data.views(given, shape, False, 0, (False, True))
    assert pixels.shape == (2, 3, *shape) and time_ids.tolist() == [ids, mirrored]


def test_a_picture_turned_by_its_file_is_counted_as_it_stands():
    exif = noisy(10, 10).getexif()
    exif[0x0112] = 6
    given = picture(encoded(noisy(300, 100), "JPEG", exif=exif))
    assert upright_size(given) == (300, 100) and crop(128).size((300, 100)) == (256, 64)
    assert upright_size(picture(b"no picture")) == (1, 1)  # refused by name when it is encoded


def test_a_random_crops_offset_is_mirrored_with_it():
    given, shape = picture(noisy(300, 200)), (64, 64)
    for seed in range(8):
        pixels, ids = data.views(given, shape, True, seed, (False, True))
        left, mirrored, spare = int(ids[0][3]), int(ids[1][3]), 96 - 64
        assert mirrored == spare - left and torch.equal(pixels[1], pixels[0].flip(-1))
    assert {tuple(data.views(given, shape, True, s, (False,))[1][0].tolist()) for s in range(8)}


def test_of_several_sizes_a_picture_has_the_largest_that_it_fills():
    several = crop(512, 1024, 768)
    assert several.size((1024, 1024)) == (1024, 1024)
    assert several.size((1023, 1023)) == (768, 768)
    assert several.size((600, 600)) == (512, 512)
    assert several.size((100, 100)) == (512, 512)  # enlarged
    assert several.size((448, 576)) == (448, 576)
    squares = crop(512, 1024, buckets=False)
    assert squares.size((1023, 4000)) == (512, 512) and squares.size((1024, 1024)) == (1024, 1024)


def test_the_shape_taken_cuts_the_least():
    stream = random.Random(0)
    for _ in range(300):
        size = (stream.randint(100, 3000), stream.randint(100, 3000))
        shape = crop(512).size(size)

        def kept(shape, size=size):
            scale = max(shape[0] / size[0], shape[1] / size[1])
            return shape[0] * shape[1] / (scale**2 * size[0] * size[1])

        assert kept(shape) == pytest.approx(max(map(kept, crop().shapes(512))))
        assert data.share_kept(size, shape) == pytest.approx(kept(shape))


def test_pictures_that_would_be_enlarged_are_refused_by_name_where_that_is_asked_for():
    given = [picture(noisy(100, 64), "a.png"), picture(noisy(64, 63), "b.png")]
    refuse_small(given, [(64, 64), (32, 64)])
    with pytest.raises(Refusal, match=r"b\.png of 64 x 63 pixels; expected at least 64 x 64"):
        refuse_small(given, [(64, 64), (64, 64)])


def test_buckets_of_an_odd_resolution_are_refused():
    with pytest.raises(
        Refusal,
        match=r"resolution 360 512 456; expected multiples of 64 .* --resolution 384 448 512$",
    ):
        parse(["t4", "--resolution", "360", "512", "456"])
    with pytest.raises(Refusal, match=r"^resolution is 100; exp[^|]*$"):
        parse(["t4", "--resolution", "100"])
    with pytest.raises(Refusal, match=r"resolution 512 512; .* each once. .* --resolution 512$"):
        parse(["t4", "--resolution", "512", "512"])
    assert parse(["t4", "--resolution", "360", "--no-buckets"]).resolution == (360,)


# ---- whose turn it is ----------------------------------------------------------------------------


def sets(count: int) -> list[tuple[list[int], int]]:
    """Sizes of decks, odd ones among them, and examples per step."""
    stream = random.Random(1)
    few = [([1], 4), ([7], 3), ([1000, 1], 4), ([5, 5, 5], 16), ([3, 2, 1], 1)]
    for _ in range(count):
        usual = (1, 2, 3, 5, 17, 40, 200, 1000, stream.randint(1, 50))
        few.append((stream.choices(usual, k=stream.randint(2, 18)), stream.randint(1, 16)))
    return few


def decks(sizes: list[int], n: int, seed: int = 0) -> data.Decks:
    return data.Decks(
        [(64, 64 * k) for k, count in enumerate(sizes) for _ in range(count)], n, seed
    )


@pytest.mark.parametrize(("sizes", "n"), sets(30))
def test_after_any_step_every_picture_was_shown_as_often_as_any_other(sizes, n):
    """No count is further from the mean than n / (its deck's size) + 1."""
    given, total, steps = decks(sizes, n), sum(sizes), 1500
    lengths = np.array(sorted(sizes, reverse=True))
    taken = np.zeros(len(sizes))
    for step in range(steps):
        deck, turn = given.turn(step)
        assert turn == taken[deck]
        taken[deck] += 1
        mean, cards = (step + 1) * n / total, taken * n
        most, least = np.ceil(cards / lengths), np.floor(cards / lengths)
        room = n / lengths + 1
        assert (most - mean <= room + 1e-9).all() and (mean - least <= room + 1e-9).all()


def test_a_steps_examples_are_of_one_size_and_each_round_shows_every_picture_once():
    sizes, n = [7, 4, 1], 3
    given = decks(sizes, n)
    seen = [given.picture(i) for i in range(n * 400)]
    shape = [0] * 7 + [1] * 4 + [2]
    for step in range(400):
        assert len({shape[i] for i in seen[step * n : step * n + n]}) == 1
    for kind in range(3):
        cards = [i for i in seen if shape[i] == kind]
        for at in range(0, len(cards) - sizes[kind], sizes[kind]):
            assert len(set(cards[at : at + sizes[kind]])) == sizes[kind]


def test_which_picture_an_example_shows_follows_from_its_number_alone():
    sizes, n = [9, 5, 2], 4
    want = [decks(sizes, n).picture(i) for i in range(200)]
    later = decks(sizes, n)
    assert [later.picture(i) for i in reversed(range(200))] == want[::-1]
    assert [decks(sizes, n, seed=1).picture(i) for i in range(200)] != want


def test_one_deck_is_what_it_was_before_there_were_several():
    given = decks([5], 4, seed=3)
    for epoch in range(4):
        want = np.random.default_rng([3, epoch, data.EPOCH]).permutation(5).tolist()
        assert [given.picture(i) for i in range(5 * epoch, 5 * epoch + 5)] == want


def test_a_pass_holds_as_many_small_pictures_as_fill_the_memory_of_the_large_ones():
    sizes = [(1024, 1024), (768, 768), (512, 512), (448, 576)]
    examples = data.Examples(None, list("abcd"), sizes, 4, 0, data.Chances(), 1000)
    passes = {}
    for step in range(8):
        size = sizes[examples.decks.picture(4 * step)]
        passes[size] = [examples.at_once(step, batch) for batch in (1, 2, 3, 4)]
    assert passes == {
        (1024, 1024): [1, 2, 3, 4],
        (768, 768): [1, 2, 4, 4],  # 1.8 fit, 3.6, 5.3: a divisor of 4, so that passes are alike
        (512, 512): [4, 4, 4, 4],
        (448, 576): [4, 4, 4, 4],
    }
    for (height, width), each in passes.items():
        for batch, size in enumerate(each, 1):
            assert size * height * width <= batch * 1024**2


def test_pictures_that_no_step_shows_are_named_where_the_run_is_an_epoch_long():
    def unseen(steps: int, *decks: int) -> list[str]:
        sizes = [(64, 64 * k) for k, count in enumerate(decks, 1) for _ in range(count)]
        names = [f"{size[1]}-{i}" for i, size in enumerate(sizes)]
        config = SimpleNamespace(max_train_steps=steps, examples_per_step=4)
        examples = data.Examples(None, names, sizes, 4, 0, data.Chances(), 1000)
        seen = {examples.example(i).picture for i in range(4 * steps)}
        found = report.never_shown(SimpleNamespace(config=config, examples=examples))
        assert steps * 4 < len(names) or {*found} == {
            n for i, n in enumerate(names) if i not in seen
        }
        return found

    assert unseen(30, 40, 1) == ["128-40"] and unseen(41, 40, 1) == []
    assert unseen(5, 40, 1) == []  # less than an epoch
    assert len(unseen(12, 30, 10, 2, 2)) > 0
