"""Several processes, one run: forked from the test process, over Gloo. torchrun itself, which takes
ten seconds a process to import torch, is in test_torchrun.py.
"""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import time
import types
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from PIL import Image

import data
import loop
import lora
import model
from conftest import ROOT, TINY_SDXL, ink_rows, make_batch, make_unet, write_pictures
from fast import parallel
from inputs import blocks
from inputs import options as configuration
from inputs.files import Refusal, refuse
from inputs.options import RECIPES
from keep import checkpoint, faster
from runs import in_one, moved

pytestmark = pytest.mark.slow

pytest_plugins = "forked"
CPU = torch.device("cpu")


# ---- who has which part --------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "size"), [(1, 1), (1, 2), (4, 3), (5, 2), (16, 7)])
def test_shares_cover_each_example_once_and_differ_by_one_at_most(n, size):
    numbers, parts = range(3 * n, 4 * n), []
    for rank in range(size):
        team = object.__new__(parallel.Team)  # without a store
        team.rank, team.size = rank, size
        parts.append(team.share(numbers))
        cut = data.cut(parts[-1], 2)
        assert [i for part in cut for i in part] == list(parts[-1])
        assert all(1 <= len(part) <= 2 for part in cut)
    assert [i for part in parts for i in part] == list(numbers)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1 and max(sizes) == math.ceil(n / team.size)


# ---- the step ------------------------------------------------------------------------------------


def tiny_run(team, n=4, precision="fp32", **changes) -> loop.Run:
    """A run on the tiny UNet; example i's numbers follow from i."""
    config = dataclasses.replace(
        RECIPES["pocket"][1],
        train_batch_size=n,
        gradient_accumulation_steps=1,
        lora_rank=4,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        learning_rate=1e-3,
        use_8bit_adam=False,
        mixed_precision=precision,
        **changes,
    )
    unet = make_unet().to(model.choose_dtype(precision, CPU)[0])

    def batch(numbers, device, timesteps):
        rows = [make_batch(1, seed=i) for i in numbers]
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}

    examples = types.SimpleNamespace(
        batch=batch,
        example=lambda i: types.SimpleNamespace(picture=i),
        at_once=lambda step, batch: batch,
        names=[f"{i}.png" for i in range(100)],
        source=types.SimpleNamespace(prompt=lambda i: (torch.empty(7, 48), torch.empty(24))),
    )
    schedule = model.load_noise_schedule(str(TINY_SDXL), CPU)
    run = loop.assemble(config, unet, examples, schedule, (0.13, 0.0))
    faster.faster(run, team, print)
    return run


def vector(run) -> torch.Tensor:
    """A copy of everything that learns, laid together."""
    return torch.cat([each.detach().flatten() for each in run.trained.values()])


def steps(run, count=4) -> tuple[list[tuple[float, float]], torch.Tensor]:
    before = vector(run)
    said = [loop.optimizer_step(run) for _ in range(count)]
    return said, (vector(run) - before).numpy()


@pytest.fixture(scope="module")
def alone():
    torch.set_num_threads(1)
    return {n: steps(tiny_run(faster.Alone(), n)) for n in (1, 4)}


@pytest.mark.parametrize(
    ("n", "size"),
    [(4, 2), (1, 2), (4, 3)],
)
def test_several_processes_take_the_steps_of_one(together, alone, n, size):
    """4 examples in 2 + 2 and 1 + 1 + 2, and 1 example in two processes, of which one has none."""
    done = together(size, lambda team: steps(tiny_run(team, n)))
    assert done.codes == [0] * size, done.said
    said, moved = alone[n]
    for rank in range(size):
        theirs, change = done.results[rank]
        assert change.tobytes() == done.results[0][1].tobytes()  # the ranks agree to the bit
        assert theirs == done.results[0][0]
        off = torch.from_numpy(change - moved).norm() / torch.from_numpy(moved).norm()
        assert off <= (0 if n == 1 else 1e-3)
        assert theirs[0] == pytest.approx(said[0], rel=1e-4)  # loss and norm of the first gradient


def test_an_overflow_in_one_process_is_skipped_by_all(together):
    def work(team):
        run = tiny_run(team, precision="fp16", fused=False)
        step = run.micro_step

        def overflowing(run, batch):
            step(run, batch)
            if run.step == 1 and team.rank == 1:
                next(iter(run.trained.values())).grad[0, 5] = float("inf")

        run.micro_step = overflowing
        before = run.loss_scale.value
        steps(run, 3)
        return run.loss_scale.skipped, run.loss_scale.value / before, vector(run).numpy()

    done = together(2, work)
    assert done.codes == [0, 0], done.said
    first, second = done.results[0], done.results[1]
    assert first[:2] == second[:2] == (1, 0.5)
    assert first[2].tobytes() == second[2].tobytes()


def test_a_loss_that_is_not_finite_in_one_process_is_met_by_all_in_the_same_step(together):
    def work(team):
        run = tiny_run(team, fused=False)
        if team.rank == 1:
            run.micro_step = lambda run, batch: run.loss_sum.fill_(float("nan"))
        before = vector(run)
        with pytest.raises(FloatingPointError, match="step 1: loss nan") as error:
            steps(run)
        return str(error.value), torch.equal(vector(run), before)

    done = together(2, work)
    assert done.codes == [0, 0], done.said
    assert done.results[0] == done.results[1] and done.results[0][1]


def test_a_signal_to_one_process_stops_all_after_the_same_step(together):
    def work(team):
        run = tiny_run(team, fused=False)
        team.asked = lambda: team.rank == 1 and run.step == 2
        while not team.stop:
            loop.optimizer_step(run)
        return run.step

    done = together(3, work)
    assert done.results == {0: 3, 1: 3, 2: 3}


def test_ranks_that_drift_apart_are_named(together):
    def work(team):
        a, b = torch.zeros(3, 4).t(), torch.zeros(10)
        team.check_equal("the start", {"a": a, "b": b}, {"data": "same"})
        with pytest.raises(Refusal, match=r"the run is not the same .*: data of rank 2; expected"):
            team.check_equal("the run", {}, {"base": "0", "data": f"{team.rank == 2}"})
        b[3] += team.rank == 1
        team.check_equal("the adapter", {"a": a, "b": b})

    done = together(3, work)
    assert done.codes == [1, 1, 1]
    said = "".join(done.said)
    assert said.count("error: ") == 1 and "the adapter is not the same" in said
    assert "numbers of rank 1" in said


def test_what_the_first_finds_or_refuses_all_find_or_refuse(together):
    """Others of it may be on hosts that do not see its disk."""

    def work(team):
        def twice():
            refuse([("a of it", "X", "do x"), ("b of it", "Y", f"do {'y' * 2000}")])

        found = team.from_first(lambda: {"rank": team.rank, "numbers": torch.ones(3)})
        assert found["rank"] == 0 and found["numbers"].equal(torch.ones(3))
        with pytest.raises(Refusal) as refusal:
            team.from_first(twice if team.first else None)
        return str(refusal.value), refusal.value.parts

    said = together(3, work).results
    assert said[0] == said[1] == said[2] and "What to do: do x | b of it" in said[0][0]


def test_a_later_checkpoint_on_another_host_than_the_first_is_not_passed_over(together, tmp_path):
    """Which host is the first may have changed since."""

    def work(team):
        own, shared = tmp_path / str(team.rank), tmp_path / "shared" / "000009"  # cut short
        for folder in (own / f"{4 * team.rank + 3:06d}", shared):
            folder.mkdir(parents=True, exist_ok=True)
        with pytest.raises(Refusal, match=r"no checkpoint under .*shared is whole"):
            checkpoint.state_of_first(team, shared.parent)
        assert checkpoint.state_of_first(team, tmp_path / "none") is None
        checkpoint.state_of_first(team, own)

    done = together(2, work, here=1)
    assert done.codes == [1, 1]
    for said in done.said:  # on each host's terminal
        assert said.count("error: ") == 1
        assert "holds step 7 on the host of rank 1, and step 3 on that of rank 0" in said


# ---- the cache -----------------------------------------------------------------------------------

KEYS = [f"key {i}" for i in range(100)]  # 7 blocks


def slowly(encoded, at=lambda i: None):
    """encode() for blocks.fill(): notes what it encodes."""

    def encode(blocks):
        for block in blocks:
            for i in block:
                at(i)
                encoded.append(i)
                time.sleep(0.005)
                yield {"mean": torch.full((2,), float(i))}

    return encode


def test_caching_is_shared_nobody_encodes_twice_and_all_leave_with_all_of_it(together, tmp_path):
    whole = blocks.fill(tmp_path / "alone", "latent", KEYS, slowly([]))

    def work(team):
        places = blocks.fill(tmp_path / "shared", "latent", KEYS, slowly(mine := []), team.claim)
        team.wait()
        assert all(file.is_file() for file, _ in places)
        return mine

    done = together(3, work)
    assert done.codes == [0, 0, 0], done.said
    assert sorted(i for mine in done.results.values() for i in mine) == list(range(100))
    assert sum(bool(mine) for mine in done.results.values()) >= 2
    for file, _ in whole:
        assert (tmp_path / "shared" / file.name).read_bytes() == file.read_bytes()


def test_one_that_dies_while_caching_loses_the_block_in_hand_and_ends_the_other(together, tmp_path):
    def work(team):
        def at(i):
            if i == 40:
                os.kill(os.getpid(), signal.SIGKILL)

        blocks.fill(tmp_path, "latent", KEYS, slowly([], at), team.claim)
        team.wait()

    done = together(2, work)
    assert sorted(done.codes) == [-signal.SIGKILL, 1]
    assert "error: the other processes do not answer (" in "".join(done.said)
    assert len(list(tmp_path.glob("latent-*"))) == 6
    blocks.fill(tmp_path, "latent", KEYS, slowly(again := []))
    assert again == list(range(32, 48))


# ---- death and silence ---------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch):
    """They speak without having waited for torchrun's report, which is not written here."""
    quick = types.SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 10))
    monkeypatch.setattr(parallel, "time", quick)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_dies_or_hangs_ends_the_others_which_say_it_once(
    together, monkeypatch, at_once, number
):
    """Who died is in torchrun's report; who hangs, torch finds out."""
    monkeypatch.setattr(parallel, "GRACE", timedelta(seconds=1))

    def work(team):
        for step in range(10**6):
            if team.rank == 1 and step == 2:
                os.kill(os.getpid(), number)
            team.all_reduce(torch.ones(10))

    began = time.monotonic()
    done = together(3, work, timeout=2.0)
    assert done.codes == [1, -signal.SIGKILL, 1]
    words = "".join(done.said)
    assert words.count("error: the other processes do not answer (") == words.count("error: ") == 1
    assert "Rank 1 failed to pass monitoredBarrier" in words or number == signal.SIGKILL
    assert "an answer from all 3 within 2 s" in words and "the same command" in words
    assert time.monotonic() - began < 40


def test_each_block_is_claimed_once_on_each_host(together):
    def work(team):
        mine = [i for i in range(8) if team.claim(f"block {i}")]
        team.wait()
        return mine

    done = together(3, work, here=2)
    assert done.codes == [0, 0, 0], done.said
    assert sorted(done.results[0] + done.results[1]) == done.results[2] == list(range(8))


def test_a_refusal_in_one_process_ends_all_and_is_said_once(together, at_once):
    def work(team):
        if team.rank == 1:
            raise Refusal("picture a.png cannot be read", "a picture", "remove it")
        team.all_reduce(torch.zeros(1))

    done = together(3, work)
    assert done.codes == [1, 1, 1]
    assert "".join(done.said).count("error: ") == 1 and "picture a.png" in done.said[1]


# ---- what torchrun says --------------------------------------------------------------------------


@pytest.fixture
def second(monkeypatch):
    """The second of two processes on the second of two hosts, which has not met the others."""
    from forked import as_torchrun  # pytest is to import it first, as a plug-in

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in as_torchrun(3, 4, store.port, here=2).items():
        monkeypatch.setenv(name, value)
    yield faster.join(1.0)
    del store


def test_without_torchrun_or_with_one_process_a_run_is_alone(monkeypatch):
    assert isinstance(faster.join(1.0), faster.Alone)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert isinstance(faster.join(1.0), faster.Alone)


def test_alone_and_a_team_can_be_asked_the_same(second):
    names = lambda kind: {name for name in dir(kind) if not name.startswith("_")}  # noqa: E731
    assert names(faster.Alone) <= names(second)
    assert (second.rank, second.size, second.first) == (3, 4, False)
    assert not second.asked() and not second.stop


@pytest.mark.parametrize(("device", "found"), [("cuda", 1), ("cuda:0", 4)])
def test_more_processes_than_gpus_are_refused(second, monkeypatch, device, found):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    with pytest.raises(Refusal, match=f"2 processes on device {device}, and {found} GPUs.*GPUS="):
        second.start(torch.device(device))


def test_each_process_takes_the_gpu_of_its_number_on_its_host(second, monkeypatch):
    calls = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.update(current=device))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.update(connected=device))
    monkeypatch.setattr(dist, "new_group", lambda **how: calls.update(how))
    monkeypatch.setattr(torch, "zeros", lambda _, device: calls.update(summed=device))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"name of {device}")
    monkeypatch.setattr(second, "all_reduce", lambda numbers: None)
    monkeypatch.setattr(second, "check_equal", lambda _, __, texts: calls.update(texts))
    device = second.start(torch.device("cuda"))
    assert device == calls["current"] == calls["summed"] == torch.device("cuda", 1)
    assert calls["connected"] == device and calls["name"] == "name of cuda:1"
    assert calls["backend"] == "nccl" and calls["timeout"] == timedelta(seconds=1)


def test_a_wrong_option_is_said_by_the_first_process_alone(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(configuration, "SPEAKS", False)
    monkeypatch.setattr(configuration.time, "sleep", slept.append)
    for argv in (["t5"], ["t4", "--resolution", "500"]):
        with pytest.raises(SystemExit) as left:
            configuration.parse_or_leave(argv)
        assert left.value.code == 1
    assert slept == [10] * 2  # torchrun ends all when one leaves: the first speaks before
    assert capsys.readouterr() == ("", "")
    configuration.parse_or_leave(["t4"])


@pytest.mark.parametrize(
    ("cards", "more", "start", "recipe"),
    [
        (0, {}, "", "pocket"),
        (1, {}, "", "t4 --device cuda"),
        (2, {}, "-m torch.distributed.run --standalone --nproc-per-node 2 ", "t4 --device cuda"),
        (4, {"GPUS": "1"}, "", "t4 --device cuda"),
        (4, {"GPUS": "3"}, "-m torch.distributed.run --standalone --nproc-per-node 3 ", "t4 --dev"),
        (4, {"CUDA_VISIBLE_DEVICES": "2"}, "", "t4 --device cuda"),
        (4, {"CUDA_VISIBLE_DEVICES": ""}, "", "pocket"),
        (4, {"CUDA_VISIBLE_DEVICES": "-1"}, "", "pocket"),
        (0, {"CUDA_VISIBLE_DEVICES": "0"}, "", "pocket"),  # left over from another machine
        (2, {"RECIPE": "native"}, "-m torch.distributed.run --standalone --nproc-per-", "native"),
    ],
)
def test_make_train_takes_the_gpus_that_it_finds(tmp_path, cards, more, start, recipe):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\n" + "echo 'GPU 0: Tesla T4 (UUID: GPU-1)'\n" * cards)
    smi.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "MAKEFLAGS")}
    env |= {"PATH": f"{tmp_path}:{env['PATH']}"} | more
    make = ["make", "-s", "train", "PYTHON=echo ran", "ARGS=--seed 7"]
    said = subprocess.run(make, cwd=ROOT, env=env, capture_output=True, text=True)
    last = said.stdout.splitlines()[-1]
    assert last.startswith(f"ran {start}") and f"loop.py {recipe}" in last, said
    assert last.endswith("--seed 7") and ("torch.distributed" in last) == bool(start)


# ---- the command ---------------------------------------------------------------------------------


def test_a_run_saved_by_two_is_continued_by_one_and_the_reverse(train_by, tmp_path):
    assert train_by(1, "whole").codes == [0]
    for name, first, second in (("two-one", 2, 1), ("one-two", 1, 2)):
        done = train_by(first, name, "--max-train-steps", "2")
        assert done.codes == [0] * first, done.said
        assert not (tmp_path / name / lora.FILE_NAME).stat().st_size == 0
        done = train_by(second, name)
        assert done.codes == [0] * second, done.said
        assert [("training" in said) for said in done.said] == [True, False][:second]  # one speaks
        want, got = moved(tmp_path / "whole"), moved(tmp_path / name)
        assert 0 <= (got - want).norm() / want.norm() <= 1e-2
        log = (tmp_path / name / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4]  # one process logs
        assert [p.name for p in (tmp_path / name / "checkpoints").iterdir() if p.is_dir()]


def test_a_damaged_picture_ends_all_processes_with_one_sentence(train_by, few, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(few, bad)
    first = json.loads((bad / "metadata.jsonl").read_text().splitlines()[0])["file_name"]
    (bad / first).write_bytes(b"no picture")
    own = ("--cache-dir", str(tmp_path / "own"), "--dataset-name", str(bad))
    done = train_by(2, "r", *own)
    assert done.codes == [1, 1]
    said = "".join(done.said)
    assert said.count("error: ") == 1 and f"picture {first} cannot be read" in said


def test_a_loss_that_is_not_finite_in_one_process_ends_all_with_one_sentence(train_by, monkeypatch):
    target = model.training_target

    def spoiled(*given):
        return target(*given) * (float("nan") if os.environ["RANK"] == "1" else 1)

    monkeypatch.setattr(model, "training_target", spoiled)
    done = train_by(2, "r")
    assert done.codes == [1, 1]
    said = "".join(done.said)
    assert said.count("error: ") == 1 and "loss of step 1 is nan" in said and ".png" in said


def test_a_deterministic_run_is_not_continued_by_another_number_of_processes(train_by):
    assert train_by(1, "r", "--deterministic", "--max-train-steps", "2").codes == [0]
    done = train_by(2, "r", "--deterministic")
    assert done.codes == [1, 1]
    said = "".join(done.said)
    assert said.count("error: ") == 1
    assert "1 CPU threads, and this command has computed by" in said and "2 processes;" in said


def test_1_and_3_processes_and_2_hosts_of_2_give_the_same_adapter(train_by, tmp_path):
    """The two hosts share a folder in which nothing is encoded yet. (Of 8-bit AdamW, 1 and 2
    processes above.)
    """
    cold = ("--cache-dir", str(tmp_path / "cold"))
    for size, here, more in ((1, 1, ()), (3, 3, ()), (4, 2, cold)):
        options = ("--max-train-steps", "20", "--no-use-8bit-adam", *more)
        done = train_by(size, f"p{size}", *options, patience=300, here=here)
        assert done.codes == [0] * size, done.said
    assert len(os.listdir(tmp_path / "cold")) == 2 and not list(tmp_path.rglob("*.part"))
    want = moved(tmp_path / "p1")
    for size in (3, 4):
        off = (moved(tmp_path / f"p{size}") - want).norm() / want.norm()
        assert off <= 1e-3


def test_two_processes_share_buckets_masks_and_tags(train_by, few, tmp_path, capfd):
    """The run of one process, where pictures have two shapes, one a mask, and captions vary."""
    folder = shutil.copytree(few, tmp_path / "shapes")
    names = sorted(folder.glob("*.png"))
    for path in names[::2]:
        Image.open(path).convert("RGB").resize((256, 64)).save(path)
    Image.new("L", (128, 128), 90).save(names[1].with_suffix(".mask.png"))
    more = ("--dataset-name", str(folder), "--resolution", "128", "--buckets", "--shuffle-tags")
    more += ("--tag-dropout", "0.3", "--max-train-steps", "10", "--no-use-8bit-adam")
    for size in (1, 2):
        done = train_by(size, f"of-{size}", *more, patience=300)
        assert done.codes == [0] * size, done.said
        said = capfd.readouterr().out
        assert "128 px in 2 buckets" in said and "1 with a mask" in said
    want = moved(tmp_path / "of-1")
    assert (moved(tmp_path / "of-2") - want).norm() <= 1e-3 * want.norm()


def test_held_out_pictures_are_shared_and_all_end_at_the_same_step(train_by, tmp_path):
    """Three validations of passes that two processes share, and the loss of each example."""
    folder = write_pictures(tmp_path / "held", ink_rows(10)[6:])
    more = ("--validation-data", str(folder), "--validation-steps", "1", "--preview-steps", "0")
    for size in (1, 2):
        done = train_by(size, f"of-{size}", *more, "--no-use-8bit-adam")
        assert done.codes == [0] * size, done.said
    one, two = (
        json.loads((tmp_path / f"of-{size}" / "metrics.json").read_text()) for size in (1, 2)
    )
    assert one["held_out"] == two["held_out"] and [*one["rows"]] == [*two["rows"]]
    for step, row in one["rows"].items():
        assert two["rows"][step][0] == pytest.approx(row[0], rel=1e-2)
    assert two["fits"] == pytest.approx(one["fits"], rel=1e-3) and len(one["fits"]) > 1


def test_a_run_that_learns_otherwise_is_one_run_however_many_compute_it(train_by, tmp_path):
    """Strata over the whole step, Huber's loss, two vectors with a rate each, and their mean."""
    more = ("--stratified-timesteps", "--loss-type", "huber", "--ema-decay", "0.9")
    more += ("--loraplus-lr-ratio", "4", "--no-use-8bit-adam", "--preview-steps", "0")
    for name, size, cut in (("one", 1, 0), ("two", 2, 0), ("cut", 1, 1)):
        words = ("--train-batch-size", "1", "--gradient-accumulation-steps", "4") * cut
        done = train_by(size, name, *more, *words)
        assert done.codes == [0] * size, done.said
    want, means = moved(tmp_path / "one"), {}
    for name in ("one", "two", "cut"):
        assert (moved(tmp_path / name) - want).norm() <= 1e-3 * want.norm()
        means[name] = in_one(lora.read(tmp_path / name / "ema").matrices)
        assert (means[name] - means["one"]).norm() <= 1e-3 * want.norm()
