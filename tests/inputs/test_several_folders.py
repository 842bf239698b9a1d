"""Several data sets with weights, kohya's folders, and epochs in the place of steps."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import data
import lora
from conftest import ink_rows, trainer, write_pictures
from inputs import options
from inputs.files import Refusal, read_tensors
from inputs.options import Config
from inputs.pictures import mask_of
from inputs.sources import in_steps, read_datasets
from keep import identity, training
from made import BLUE, RED, encoded, write_folder
from runs import adapter

GREEN = encoded(Image.new("RGB", (8, 8), "green"))


def read(*names, **more):
    return read_datasets(Config(dataset_name=tuple(map(str, names)), **more))


def weights(pictures) -> dict[str, int]:
    return {picture.name: picture.weight for picture in pictures}


@pytest.fixture
def two(tmp_path):
    """Folders a with two pictures and b with one."""
    write_folder(tmp_path / "a", {"x.png": RED, "x.txt": "red", "y.png": BLUE, "y.txt": "blue"})
    write_folder(tmp_path / "b", {"x.png": GREEN, "metadata.jsonl": [
        {"file_name": "x.png", "text": "green"}]})  # fmt: skip
    return tmp_path / "a", tmp_path / "b"


def test_several_folders_are_one_set_each_with_its_weight(two):
    a, b = two
    pictures = read(a, f"{b}/", dataset_weights=(3, 1))
    assert weights(pictures) == {f"{a}/x.png": 3, f"{a}/y.png": 3, f"{b}/x.png": 1}
    assert [p.captions[0] for p in pictures] == ["red", "blue", "green"] and pictures.cards == 7
    assert pictures.notes[0] == f"{a}: 2 pictures x 3" and f"{b}/: 1 pictures x 1" in str(pictures)
    assert set(weights(read(a, b)).values()) == {1}


def test_one_folder_is_as_it_was(two):
    pictures = read(two[0])
    assert weights(pictures) == {"x.png": 1, "y.png": 1} and list(pictures.notes) == []
    assert weights(read(two[0], dataset_weights=(4,))) == {"x.png": 4, "y.png": 4}
    old = identity.digest(*(part for p in pictures for part in (p.digest, *p.captions)))
    assert identity.of_data(pictures) == old
    assert identity.of_data(read(two[0], dataset_weights=(4,))) != old


def test_a_folder_and_a_table_of_rows_are_one_set(two, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    rows = {"image": [{"bytes": encoded(clear)}, {"bytes": RED}], "text": ["clear", "red"]}
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "rows" / "a.parquet"))
    pictures = read(tmp_path / "rows", two[1], mask_from_alpha=True, dataset_weights=(1, 2))
    names = [f"{tmp_path}/rows/row 0", f"{tmp_path}/rows/row 1", f"{two[1]}/x.png"]
    assert weights(pictures) == dict(zip(names, (1, 1, 2), strict=True))
    assert [p.mask.digest for p in pictures] == ["alpha", "white", "white"]
    assert set(np.asarray(mask_of(pictures[0], (8, 8))).flatten()) == {128}


def test_what_is_wrong_in_several_folders_is_said_at_once(tmp_path):
    write_folder(tmp_path / "a", {"x.png": RED})
    write_folder(tmp_path / "b", {"x.txt": "red"})
    with pytest.raises(Refusal) as refusal:
        read(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    said = str(refusal.value)
    for part in ("none of the 1 pictures", "captions without a picture", f"no folder {tmp_path}/c"):
        assert part in said


@pytest.mark.parametrize("given", ["3", "3 1 1", "3 0", "3 -1", "1000 1", "1.5 1", "nan 1"])
def test_weights_that_do_not_fit_are_refused(given):
    words = ["pocket", "--dataset-name", "a", "b", "--dataset-weights", *given.split()]
    with pytest.raises(Refusal, match=f"--dataset-weights {given} with 2 data sets; expec"):
        options.parse(words)


def test_what_is_typed_goes_before_a_files_epochs(tmp_path):
    (tmp_path / "o.json").write_text('{"recipe": "t4", "max_train_epochs": 3}')
    asked = options.parse(["--config", str(tmp_path / "o.json"), "--max-train-steps", "7"])
    assert (asked.max_train_steps, asked.max_train_epochs) == (7, 0)


def test_no_name_is_refused():
    with pytest.raises(Refusal, match="--dataset-name without a name"):
        options.parse(["pocket", "--dataset-name"])


# ---- kohya's folders -----------------------------------------------------------------------------

KOHYA = {
    f"{folder}/{name}": content
    for folder in ("10_style", "02_cats", "1_Reg cats", "reg", "2024_summer", "plain")
    for name, content in (("x.png", RED), ("x.txt", "a"))
}


def test_kohyas_folders_are_obeyed_and_said(tmp_path):
    folder = write_folder(tmp_path / "k", KOHYA | {"10_style/sub/y.png": BLUE})
    pictures = read(folder)
    told = {"10_style/x.png": 10, "10_style/sub/y.png": 10, "02_cats/x.png": 2}
    assert weights(pictures) == told | {"2024_summer/x.png": 1, "plain/x.png": 1}
    reg = "2 (the first: 1_Reg cats/x.png) left out, since they lie in kohya's reg fol"
    assert any(note.startswith(reg) for note in pictures.notes)
    said = "3 (the first: 02_cats/x.png) in folders like 10_style, shown so many times, up to 999"
    assert any(note.startswith(said) for note in pictures.notes)
    other = write_folder(tmp_path / "o", {"a.png": GREEN, "a.txt": "a"})
    both = weights(read(folder, other, dataset_weights=(2, 5)))
    assert both[f"{folder}/10_style/x.png"] == 20 and both[f"{other}/a.png"] == 5


def test_the_numbers_of_folders_can_be_left_alone(tmp_path):
    pictures = read(write_folder(tmp_path, KOHYA), folder_repeats=False)
    assert len(pictures) == 6 and set(weights(pictures).values()) == {1}
    assert any("once each" in note for note in pictures.notes)


@pytest.mark.parametrize("name", ["regal", "regular", "10_regina woman", "5_region", "2_a reg"])
def test_a_name_that_only_begins_as_reg_does_is_trained_on(tmp_path, name):
    folder = write_folder(tmp_path, {f"{name}/x.png": RED, f"{name}/x.txt": "a"})
    assert [p.name for p in read(folder)] == [f"{name}/x.png"]


@pytest.mark.parametrize("name", ["reg", "Reg_x", "1_reg-x", "3_reg x", "regularization_images"])
def test_regularisation_is_left_out_and_said_without_numbered_folders_too(tmp_path, name):
    files = {f"{name}/x.png": RED, f"{name}/x.txt": "a", "plain/x.png": BLUE, "plain/x.txt": "a"}
    folder = write_folder(tmp_path, files)
    found = read(folder)
    assert [p.name for p in found] == ["plain/x.png"]
    assert found.notes[0].startswith(f"1 (the first: {name}/x.png) left out, since they lie in koh")
    assert "(--no-folder-repeats: trained on)" in found.notes[0]
    assert len(read(folder, folder_repeats=False)) == 2


def test_a_numbered_folder_that_is_named_itself_is_said(tmp_path):
    folder = write_folder(tmp_path / "10_style", {"x.png": RED, "x.txt": "a"})
    found = read(folder)
    assert weights(found) == {"x.png": 1}
    assert found.notes == ["its own name's 10 is not counted (--dataset-weights 10 is)"]
    assert not read(folder, folder_repeats=False).notes


def test_a_folder_twice_or_within_another_is_refused(two):
    a, b = two
    for names in ((a, b, f"{a}/"), (a.parent, b), (b, a.parent)):
        with pytest.raises(Refusal, match="which holds the same; expected each once"):
            read(*names)


# ---- the deck ------------------------------------------------------------------------------------


def test_in_each_round_a_picture_is_shown_as_often_as_its_weight_says():
    given = data.Decks([(64, 64)] * 3 + [(64, 128)] * 2, 4, 1, [3, 1, 2, 5, 1])
    counts = np.bincount([given.picture(i) for i in range(12 * 4 * 500)])
    assert np.abs(counts - 2000 * np.array([3, 1, 2, 5, 1])).max() <= 12
    one = data.Decks([(64, 64)] * 3, 2, 1, [3, 1, 2])
    for at in range(0, 60, 6):
        assert np.bincount([one.picture(at + i) for i in range(6)]).tolist() == [3, 1, 2]


@pytest.mark.parametrize("seed", range(12))
def test_after_any_step_a_card_was_shown_as_often_as_any_other(seed):
    """No picture's count, over its weight, is further from the mean than n / (its deck's cards) + 1
    turn of that deck."""
    stream = np.random.default_rng(seed)
    kinds = stream.integers(0, stream.integers(1, 6), 40)
    cards, n = stream.integers(1, 30, 40), int(stream.integers(1, 9))
    given = data.Decks([(64, 64 * (1 + kind)) for kind in kinds], n, seed, cards.tolist())
    in_deck = np.array([cards[kinds == kind].sum() for kind in kinds])
    room, counts = n / in_deck + 1, np.zeros(40)
    for step in range(1500):
        for i in range(step * n, step * n + n):
            counts[given.picture(i)] += 1
        mean = (step + 1) * n / cards.sum()
        assert (np.abs(counts / cards - mean) <= room + 1e-9).all()


def test_weights_of_one_are_no_weights():
    sizes = [(64, 64)] * 5 + [(64, 128)] * 2
    plain, ones = data.Decks(sizes, 4, 7), data.Decks(sizes, 4, 7, [1] * 7)
    assert [plain.picture(i) for i in range(300)] == [ones.picture(i) for i in range(300)]


# ---- epochs --------------------------------------------------------------------------------------


def test_epochs_are_steps_of_all_cards(two):
    pictures = read(*two, dataset_weights=(3, 1))  # 7 cards
    config = options.parse(["t4", "--max-train-epochs", "3"])
    assert in_steps(config, pictures).max_train_steps == 6  # 21 examples, 4 a step
    assert pictures.notes[-1] == "3 epochs of 7 are 6 steps"
    assert in_steps(options.parse(["t4"]), pictures).max_train_steps == 1000


def test_epochs_and_steps_are_not_both(two):
    with pytest.raises(Refusal, match="--max-train-steps with --max-train-epochs; expected one"):
        options.parse(["t4", "--max_train_steps=1000", "--max-train-epochs", "2"])
    with pytest.raises(Refusal, match="a plan sees no pictures"):
        options.parse(["t4", "--plan-for", "T4", "--max-train-epochs", "2"])


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture
def train(tmp_path, cache):
    """Two folders of three ink drawings each; steps are left to the test."""
    rows = ink_rows(6)
    a, b = (write_pictures(tmp_path / name, rows[i : i + 3]) for name, i in (("a", 0), ("b", 3)))
    run = trainer(tmp_path, a, cache)
    told = run.argv

    def argv(name, *more):
        words = told(name)
        at = words.index("--max-train-steps")
        return [*words[:at], *words[at + 2 :], "--dataset-name", str(a), str(b), *more]

    run.argv = argv
    run.main = lambda name, *more: training.main(argv(name, *more))
    return run


WEIGHTED = ("--dataset-weights", "3", "1", "--max-train-epochs", "1")  # 12 cards, 3 steps


@pytest.mark.slow
def test_a_run_over_two_folders_for_an_epoch(train, tmp_path, capsys):
    assert train.main("r", *WEIGHTED) == 0
    said = capsys.readouterr().out
    assert "3 optimizer steps x 4 images (2 x 2) = 1.0 epochs of 12, by their weights" in said
    assert "1 epochs of 12 are 3 steps" in said and f"{tmp_path}/a: 3 pictures x 3" in said
    assert len(train.log("r")) == 3
    assert read_tensors(tmp_path / "r" / lora.FILE_NAME)[1]["dataset"] == "a b"
    assert train.main("r", *WEIGHTED) == 0
    said = capsys.readouterr().out
    assert (
        f"is finished: 3 steps on {tmp_path}/a {tmp_path}/b. To go on: a larger --max-train-ep"
        in said
    )
    assert train.main("r", *WEIGHTED[:-1], "2") == 0 and len(train.log("r")) == 6
    assert train.main("whole", *WEIGHTED[:-1], "2") == 0
    assert adapter(tmp_path / "r") == adapter(tmp_path / "whole")
    turned = ("--dataset-name", f"{tmp_path}/b", f"{tmp_path}/a", "--dataset-weights", "1", "3")
    assert train.main("r", *turned, "--max-train-epochs", "9") == 1
    assert "this command has the same pictures in another order; exp" in capsys.readouterr().err
    other = ("--dataset-weights", "1", "1", "--max-train-epochs", "9")
    assert train.main("r", *other) == 1
    said = f"3 changed in picture, mask, weight or caption ('{tmp_path}/a/"
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_books_own_lines_count_epochs_and_weights_alike(train, tmp_path, capsys):
    import loop

    config = options.parse(train.argv("plain", *WEIGHTED, "--plain"))
    loop.train_plain(config)
    said = capsys.readouterr().out
    assert "1 epochs of 12 are 3 steps" in said and "step 3: loss" in said and "step 4" not in said
    assert train.main("product", *WEIGHTED, "--no-fused") == 0
    one, other = (lora.read(tmp_path / name).matrices for name in ("product", "plain"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_another_number_before_a_folders_name_is_another_run(tmp_path, cache, capsys):
    rows = [json.loads(row) for row in ink_rows(2)]
    made = write_pictures(tmp_path / "ink", ink_rows(2))
    folder = tmp_path / "k"
    for number, row in zip(("3_a", "1_b"), rows, strict=True):
        (folder / number).mkdir(parents=True)
        (folder / number / "x.png").write_bytes((made / row["file_name"]).read_bytes())
        (folder / number / "x.txt").write_text(row["text"])
    run = trainer(tmp_path, folder, cache)
    assert run("r", "--max-train-steps", "2") == 0
    (folder / "3_a").rename(folder / "4_a")
    assert run("r", "--max-train-steps", "3") == 1
    assert "1 gone ('3_a/x.png'), 1 added ('4_a/x.png')" in capsys.readouterr().err
