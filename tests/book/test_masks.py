"""Masks: cut as their pictures are, averaged to the latent, and what they do to the loss."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import data
import loop
from conftest import make_batch, make_unet
from inputs.files import Refusal, digest
from inputs.options import Config
from inputs.pictures import check_pictures, mask_of
from inputs.sources import ALPHA, WHITE, Picture, read_datasets
from keep import identity
from made import encoded, noisy, picture, write_folder
from tiny_run import SCHEDULE


def read(folder, **more):
    return read_datasets(Config(dataset_name=(str(folder),), **more))


def grey(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.astype(np.uint8))


def masked(image: Image.Image, mask: Image.Image, name: str = "a.png") -> Picture:
    content = encoded(mask)
    own = Picture(name.replace(".png", ".mask.png"), "", digest(content), lambda: content)
    return dataclasses.replace(picture(image, name), mask=own)


def half(width: int, height: int) -> Image.Image:
    """White on the left."""
    pixels = np.zeros((height, width))
    pixels[:, : width // 2] = 255
    return grey(pixels)


# ---- found ---------------------------------------------------------------------------------------


def test_a_mask_lies_beside_its_picture_and_is_no_picture(tmp_path):
    mask = encoded(half(8, 8))
    files = {"sub/a.jpg": encoded(noisy(8, 8), "JPEG"), "sub/a.txt": "a", "sub/a.Mask.png": mask}
    files |= {"b.png": encoded(noisy(8, 8)), "caption_c.png": encoded(noisy(8, 8))}
    files |= {"caption_c.mask.png": mask}
    pictures = read(write_folder(tmp_path, files))
    assert [p.name for p in pictures] == ["b.png", "caption_c.png", "sub/a.jpg"]
    assert [p.mask.name for p in pictures] == ["white", "caption_c.mask.png", "sub/a.Mask.png"]
    assert pictures[2].mask.read() == mask and pictures[0].mask is WHITE
    assert pictures.notes == [
        "2 with a mask",
        "1 (the first: b.png) without a mask, learned whole",
    ]
    rows = [{"file_name": name, "text": "a"} for name in ("b.png", "caption_c.png")]
    (tmp_path / "sub/a.jpg").unlink()
    (tmp_path / "sub/a.txt").unlink()
    (tmp_path / "sub/a.Mask.png").unlink()
    again = read(write_folder(tmp_path, {"metadata.jsonl": rows}))
    assert [p.mask.name for p in again] == ["white", "caption_c.mask.png"]


def test_a_set_without_masks_has_none(tmp_path):
    pictures = read(write_folder(tmp_path, {"a.png": encoded(noisy(8, 8)), "a.txt": "a"}))
    assert pictures[0].mask is None and not pictures.notes


def test_masks_without_a_picture_are_refused(tmp_path):
    files = {"a.png": encoded(noisy(8, 8)), "a.txt": "a"}
    files |= dict.fromkeys(("b.mask.png", "a.png.mask.png"), encoded(half(8, 8)))
    with pytest.raises(Refusal, match=r"2 masks without a picture.*'a.png.mask.png', 'b.mask.png'"):
        read(write_folder(tmp_path, files))


def transparent(width: int, height: int, kind: str = "PNG") -> bytes:
    image = noisy(width, height)
    image.putalpha(half(width, height))
    return encoded(image, kind)


def test_transparency_is_a_mask_where_that_is_asked_for(tmp_path):
    files = {"a.png": transparent(16, 8), "b.png": encoded(noisy(8, 8)), "c.png": transparent(8, 8)}
    files |= {"c.mask.png": encoded(grey(np.full((8, 8), 255)))}
    folder = write_folder(tmp_path, files | dict.fromkeys(("a.txt", "b.txt", "c.txt"), "a"))
    pictures = read(folder, mask_from_alpha=True)
    kinds = [p.mask.digest for p in pictures]
    assert kinds[:2] == [ALPHA, "white"] and pictures[2].mask.name == "c.mask.png"
    assert np.array_equal(np.asarray(mask_of(pictures[0], (16, 8))), np.asarray(half(16, 8)))
    assert np.asarray(mask_of(pictures[1], (8, 8))).min() == 255
    (tmp_path / "c.mask.png").unlink()
    assert not any(p.mask for p in read(folder))


def test_transparency_that_no_picture_has_is_refused(tmp_path):
    folder = write_folder(tmp_path, {"a.png": encoded(noisy(8, 8)), "a.txt": "a"})
    with pytest.raises(Refusal, match="--mask-from-alpha, and none of 1 pictures has transparency"):
        read(folder, mask_from_alpha=True)


def test_transparency_turns_with_its_picture(tmp_path):
    image = noisy(16, 8)
    image.putalpha(half(16, 8))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    files = {"a.png": encoded(image, exif=exif), "a.txt": "a"}
    (given,) = read(write_folder(tmp_path, files), mask_from_alpha=True)
    mask = np.asarray(mask_of(given, (8, 16)))
    assert mask[:8].min() == 255 and mask[8:].max() == 0  # left has become up


def test_masks_of_another_size_or_empty_are_refused_all_at_once():
    black = grey(np.zeros((10, 20)))
    given = [
        masked(noisy(20, 10), half(10, 20), "a.png"),
        masked(noisy(20, 10), black, "b.png"),
        masked(noisy(20, 10), half(20, 10), "c.png"),
        masked(noisy(20, 10), half(19, 10), "d.png"),
        picture(b"no picture", "e.png"),
    ]
    with pytest.raises(Refusal) as refusal:
        check_pictures(lambda p: data.views(p, (8, 8), False, 0, (False,)), given)
    said = str(refusal.value)
    for part in (
        "the mask a.mask.png of 10 x 20 pixels; expected 20 x 10, the size of a.png",
        "the mask b.mask.png is all black; expected white where the picture is learned",
        "the mask d.mask.png of 19 x 10 pixels; expected 20 x 10",
        "picture e.png cannot be read",
    ):
        assert part in said
    assert "c.mask" not in said


def test_a_mask_painted_on_a_transparent_layer_hides_the_rest():
    layer = Image.new("RGBA", (16, 8))
    layer.paste("white", (0, 0, 4, 8))
    mask = np.asarray(mask_of(masked(noisy(16, 8), layer), (16, 8)))
    assert (mask[:, :4] == 255).all() and not mask[:, 4:].any()


def test_all_masks_whose_white_is_cut_away_are_named_by_a_run(tmp_path):
    edge = np.zeros((64, 256))
    edge[:, :8] = 255
    given = [masked(noisy(256, 64, seed=i), grey(edge), f"{i}.png") for i in range(2)]
    with pytest.raises(Refusal, match=r"mask of 0.png is black .* and the mask of 1.png is black"):
        encoder = Plain(given)
        encoder.embed = lambda captions: (torch.zeros(len(captions), 1, 1),) * 2
        encoder.text = type("Text", (), {"encoders": [encoder.vae]})
        data.fill_cache(tmp_path, encoder, True, torch.float32, {"text": "", "vae": ""})


def test_a_mask_that_is_added_changes_that_picture_alone(tmp_path):
    """By which a begun run says what has changed."""
    files = {f"{x}.png": encoded(noisy(8, 8, seed=ord(x))) for x in "abc"}
    folder = write_folder(tmp_path, files)
    before = identity.listed(read(folder, caption="x"))
    write_folder(tmp_path, {"b.mask.png": encoded(half(8, 8))})
    pictures = read(folder, caption="x")
    after = identity.listed(pictures)
    assert {name for name in after if after[name] != before[name]} == {"b.png"}
    assert [p.mask.digest == "white" for p in pictures] == [True, False, True]


def test_a_mask_whose_white_is_all_cut_away_is_refused():
    edge = np.zeros((64, 256))
    edge[:, :8] = 255
    given = masked(noisy(256, 64), grey(edge))
    with pytest.raises(Refusal, match=r"the mask of a.png is black in all that is cut out of it"):
        data.views(given, (64, 64), False, 0, (False,))
    data.views(given, (64, 256), False, 0, (False,))


# ---- cut and averaged ----------------------------------------------------------------------------


@pytest.mark.parametrize("random_crop", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (64, 128)])
def test_a_mask_is_resized_cut_and_mirrored_as_its_picture(random_crop, shape):
    """One that is a channel of the picture ends as that channel, pixel by pixel."""
    image = noisy(300, 140)
    given = masked(image, image.getchannel("G"))
    pixels, ids = data.views(given, shape, random_crop, 5, (False, True))
    assert pixels.shape == (2, 4, *shape) and torch.equal(pixels[:, 3], pixels[:, 1])
    plain, same = data.views(picture(image), shape, random_crop, 5, (False, True))
    assert torch.equal(plain, pixels[:, :3]) and torch.equal(same, ids)


class Plain(data.Encoder):
    """Its VAE only says that it is on the CPU."""

    def __init__(self, pictures):
        load = lambda: type("Vae", (), {"device": torch.device("cpu")})()  # noqa: E731
        super().__init__(pictures, load, None, data.Crop((64,), False, False, 0))


def test_the_latents_mask_holds_the_means_of_8_by_8_pixels(monkeypatch):
    layouts = []

    def encode(pixels, vae):
        layouts.append((pixels.shape, pixels.is_contiguous()))
        return (torch.zeros(len(pixels), 4, 8, 8),) * 2

    monkeypatch.setattr(data.model, "encode_images", encode)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64))
    _, _, _, mask = Plain([masked(noisy(64, 64), grey(pixels))]).latent(0, False)
    want = pixels.reshape(8, 8, 8, 8).mean(axis=(1, 3)) / 255
    assert mask.shape == (1, 8, 8) and np.allclose(mask[0], want, atol=1e-6)
    assert layouts == [((1, 3, 64, 64), True)]
    white = dataclasses.replace(picture(noisy(64, 64)), mask=WHITE)
    assert torch.equal(Plain([white]).latent(0, True)[3], torch.ones(1, 8, 8))
    assert len(Plain([picture(noisy(64, 64))]).latent(0, False)) == 3


# ---- the loss ------------------------------------------------------------------------------------


def loss(batch, gamma=0.0):
    unet = make_unet().requires_grad_(True)
    each = loop.diffusion_loss(unet, batch, SCHEDULE, (0.13, 0.0), gamma)
    each.sum().backward()
    return each.detach(), unet.conv_in.weight.grad


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 1, 56, 72), (1, 1, 7, 9)])
def test_a_white_mask_weighs_one_to_the_bit(floor, shape):
    assert torch.equal(data.loss_weights(torch.ones(shape), floor), torch.ones(shape))


@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_with_a_white_mask_loss_and_gradient_are_those_without_one_to_the_bit(gamma, one_thread):
    batch = make_batch(2)
    weights = data.loss_weights(torch.ones(2, 1, 8, 8), 0.3)
    for one, other in zip(loss(batch, gamma), loss(batch | {"mask": weights}, gamma), strict=True):
        assert torch.equal(one, other)


def test_the_loss_of_an_example_is_the_mean_weighted_by_its_mask(one_thread):
    batch, mask = make_batch(2), torch.rand(2, 1, 8, 8)
    m = 0.2 + 0.8 * mask
    answer = loop.model.predict(make_unet(), loop.model.add_noise(
        (batch["mean"] + batch["std"] * batch["eps"]) * 0.13, batch["noise"], batch["t"], SCHEDULE
    ), batch)  # fmt: skip
    e = (answer - batch["noise"]) ** 2
    want = (m * e).mean(dim=(1, 2, 3)) / m.mean(dim=(1, 2, 3))
    found, _ = loss(batch | {"mask": data.loss_weights(mask, 0.2)})
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)


def test_what_a_black_mask_hides_counts_as_the_floor_says(one_thread):
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    weights = data.loss_weights(mask, 0.0)
    assert weights[..., :4].unique().tolist() == [2.0] and not weights[..., 4:].any()
    share = data.loss_weights(mask, 0.25)
    assert torch.allclose(share[..., 4:] / share[..., :1], torch.tensor(0.25))
    assert torch.equal(data.loss_weights(mask, 1.0), torch.ones(1, 1, 8, 8))
