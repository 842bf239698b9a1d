"""The ladder and its neighbours on a CPU: every command runs, what it counts is right, and a
failing row costs no other.
"""

import json
import statistics
import sys

import pytest
import torch

from benchmarks import (
    each_kernel,
    exactness,
    old_and_new,
    step_profile,
    synthetic,
    two_gpus,
)
from benchmarks import ladder as bench
from conftest import ROOT, SDXL

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ["--tiny", "--device", "cpu", "--resolution", "64", "--warm-up", "1"]


@pytest.fixture
def run(tmp_path):
    """run(command, ..., script=bench) -> (exit code, rows of the file)."""

    def call(*argv: str, script=bench) -> tuple[int, dict]:
        out, once = tmp_path / "bench.json", ["--steps", "1"] if script is bench else []
        code = script.main([*argv, *TINY, *once, "--out", str(out)])
        return code, json.loads(out.read_text())["rows"]

    return call


@pytest.mark.slow
def test_the_ladder_times_the_same_work_in_every_row(run):
    code, rows = run("ladder", "--rows", "eager", "4x1", "nf4")
    assert code == 0 and [name.split(", ")[-1] for name in rows] == ["eager", "4x1", "nf4"]
    eager, together, nf4 = rows.values()
    assert eager["s_per_step"] > 0 and eager["mfu"] > 0 and eager["images_per_s"] > 0
    assert eager["loss"] == pytest.approx(together["loss"], abs=2e-4)
    assert 0 < abs(nf4["loss"] - eager["loss"]) < 0.1 * eager["loss"]  # quantised, and working
    assert eager["said"] == "SDPA" and "gates fused" in together["said"]


@pytest.mark.slow
def test_several_calls_make_one_file(run, tmp_path):
    run("ladder", "--rows", "graph")
    code, rows = run("ladder", "--rows", "checkpointing")
    assert code == 0 and len(rows) == 2
    assert all(
        "torch" in row["on"] and row["command"].startswith("python -m benchmarks.ladder ladder")
        for row in rows.values()
    )
    assert not any(str(tmp_path) in row["command"] for row in rows.values())


@pytest.mark.slow
def test_a_row_that_fails_is_a_result_and_the_others_are_measured(run, monkeypatch):
    whole, calls = bench.loop.optimizer_step, []

    def full_once(run):
        calls.append(run)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("Tried to allocate 20.00 GiB")
        return whole(run)

    monkeypatch.setattr(bench.loop, "optimizer_step", full_once)
    code, rows = run("recipe", "original", "nonesuch", "t4", "--cap-gib", "14.5")
    original, nonesuch, t4 = rows.values()
    assert code == 1
    assert original["error"].startswith("out of memory in step 2: Tried to allocate")
    assert "expected original, t4" in nonesuch["error"]
    assert t4["s_per_step"] > 0 and t4["way"] == "1 x 4, nothing recomputed"


@pytest.mark.slow
def test_loss_and_gradient_are_compared_with_fp32(run):
    asked = ("fp32", "--rows", "4x1", "checkpointing", "--mixed-precision", "bf16")
    _, rows = run(*asked, script=exactness)
    assert len(rows) == 2
    for row in rows.values():
        assert row["gradient_norm"] > 0
        assert 1e-3 < row["gradient_off"] < 0.1 and 0 < row["loss_off"] < 0.01
    _, rows = run("fp32", "--rows", "4x1", "--mixed-precision", "fp32", script=exactness)
    assert rows["64 px, fp32, 4x1"]["gradient_off"] < 1e-4


@pytest.mark.slow
def test_the_product_is_compared_with_the_books_own_lines(run):
    asked = ("plain", "--mixed-precision", "fp32", "--steps", "2")
    code, rows = run(*asked, script=exactness)
    (row,) = rows.values()
    assert code == 0 and row["adamw_skipped"] == row["adamw8bit_skipped"] == [0, 0]
    # law 5: within its bounds, but not the very same, since fused layers are at work
    assert 0 < row["gradient_off"] < 1e-5
    assert 0 < row["adamw_off"] < 1e-3 and 0 < row["adamw8bit_off"] < 1e-2


LADDER = """import json, sys
name, seconds, words = {about!r}
assert sys.argv[1:-1] == words.split(), sys.argv
rows = {{"64 px, graph": {{"s_per_step": seconds, "loss": 1.0, "on": "a card"}}}}
open(sys.argv[-1], "w").write(json.dumps({{"rows": rows}}))
"""


def test_two_versions_ladders_take_turns(tmp_path, monkeypatch, capsys):
    words = "ladder --rows graph --resolution 64 --steps 1 --out"
    before, now, out = tmp_path / "before", tmp_path / "now", tmp_path / "out.json"
    (now / "benchmarks").mkdir(parents=True)
    before.mkdir()
    (before / "bench.py").write_text(LADDER.format(about=("old", 2.0, words)))
    (now / "benchmarks" / "ladder.py").write_text(LADDER.format(about=("new", 2.1, words)))
    monkeypatch.setattr(old_and_new, "ROOT", now)
    argv = [str(before), "--rows", "graph", "--resolution", "64", "--more=--steps 1"]
    old_and_new.main([*argv, "--turns", "2", "--out", str(out)])
    result = json.loads(out.read_text())
    row = result["rows"]["64 px, graph"]
    assert row["new / old"] == 1.05 and row["s_old"] == [2.0, 2.0] and row["s_new"] == [2.1, 2.1]
    assert result["on"] == ["a card"] and str(tmp_path) not in result["command"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:2]] == [
        "before",
        "now",
    ]
    (before / "bench.py").write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match="before ended with 3"):
        old_and_new.main([*argv, "--out", str(out)])


@pytest.mark.slow
def test_each_part_is_timed_alone_and_the_product_has_all_of_them(tmp_path):
    out = tmp_path / "rows.json"
    argv = "--tiny --device cpu --resolution 64 --steps 1 --warm-up 1 --mixed-precision fp32 --out"
    assert each_kernel.main([*argv.split(), str(out)]) == 0
    rows = {name.split(", ")[-1]: row for name, row in json.loads(out.read_text())["rows"].items()}
    assert [*rows] == ["none", *each_kernel.PARTS, "all"] and rows["none"]["new / none"] == 1
    for name, row in rows.items():  # what a part changes is there, and the step is the same
        assert ("convolution blocks" in row["said"]) == (name in ("convolution blocks", "all"))
        assert row["loss"] == pytest.approx(rows["none"]["loss"], rel=1e-3)


@pytest.mark.slow
def test_profile_sorts_all_of_a_step_by_kind(run):
    code, rows = run("profile", "--rows", "fused", script=step_profile)
    (row,) = rows.values()
    kinds = [*step_profile.KINDS, "other"]
    assert code == 0 and row["kernels"] == sum(row[f"n_{kind}"] for kind in kinds)
    assert row["ms_kernels"] == pytest.approx(sum(row[f"ms_{kind}"] for kind in kinds), abs=0.2)
    assert row["ms_products"] > 0 and row["ms_convolutions"] > 0 and row["longest"]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN", "products"),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize96x128x32", "products"),
        ("void cutlass::Kernel2<cutlass_75_tensorop_h1688gemm_128x128_nn_align8>", "products"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc", "convolutions"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("fmha_cutlassF_f16_aligned_64x64_rf_sm75(PyTorchMemEffAttention...)", "attention"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::Half>", "norms"),
        ("void at::native::(anonymous)::vectorized_layer_norm_kernel<c10::Half, float>", "norms"),
        ("void at::native::(anonymous)::CatArrayBatchedCopy<...>", "copies"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", "elementwise"),
        ("void kOptimizerStatic8bit2StateBlockwise<float, 1, 256, 1>", "optimizer"),
        ("void kDequantizeBlockwise<__half, 512, 64, 8, 2>", "dequantising"),
    ],
)
def test_kernels_are_called_by_their_kind(kernel, kind):
    assert step_profile.kind_of(kernel) == kind


@pytest.mark.slow
def test_flop_are_counted_and_the_floor_follows_from_them(run):
    code, rows = run("floor", "--mixed-precision", "fp32", script=step_profile)
    row = rows["fp32"]
    counted = synthetic.useful_flop(bench.ROOT / "pocket/model", 64)
    assert code == 0 and row["tflop_per_image_64"] == pytest.approx(counted / 1e12, abs=1e-4)
    assert row["s_floor_64_4_images"] > 0
    full = synthetic.useful_flop(SDXL, 512) / 1e12
    assert full == pytest.approx(synthetic.USEFUL_TFLOP[512], abs=1e-3)


def test_a_recipe_is_measured_as_the_plan_has_it(monkeypatch):
    """No GPU here: the plan is one that a GPU could have given."""
    asked = []

    def choose(config, device, dtype):
        asked.append(config)
        return bench.plan.shaped(config, 2, ("mid_block.attentions.0",)), "memory plan: so"

    timed = []
    monkeypatch.setattr(bench.plan, "choose", choose)
    monkeypatch.setattr(
        bench, "time_row", lambda o, config, *a: timed.append(config) or {"said": ""}
    )
    options = bench.Options(command="recipe", device="cpu", tiny=True)
    row = bench.recipe_row(options, "t4", 64)
    assert row["said"].startswith("memory plan: so")
    assert bench.plan.in_words(timed[0]) == "2 x 2, 1 block recomputed"
    assert timed[0].train_batch_size == 2 and asked[0].train_batch_size == 1
    assert (bench.plan.hub.fetch(asked[0].pretrained_model_name_or_path, "unet")).is_dir()


# ---- a card's own file ---------------------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch):
    """planned(gib): a GPU's plan on this CPU. Only what a GPU would say of itself is put in: which
    card it is and how much of its memory is free; the plan itself is the real one.
    """

    def free(gib: float) -> None:
        real, gpu = bench.plan.choose, torch.device("cuda")
        monkeypatch.setattr(bench.plan, "choose", lambda c, _, dtype: real(c, gpu, dtype))
        monkeypatch.setattr(bench.plan, "this_card", lambda: bench.plan.named_card("T4"))
        monkeypatch.setattr(bench.plan, "free_bytes", lambda: int(gib * 2**30))

    return free


@pytest.mark.slow
def test_a_card_gets_one_file_with_what_was_planned_and_what_it_took(run, planned, tmp_path):
    planned(14)
    (tmp_path / "bench.json").write_text('{"rows": {"of another machine": {}}}')
    code, rows = run("card")
    about = json.loads((tmp_path / "bench.json").read_text())
    assert code == 0 and list(rows) == ["t4 at 64 px", "native at 64 px", "eager"]
    assert about["torch"] == torch.__version__ and about["cpu"] and about["cores"] >= 1
    assert about["command"].startswith("python -m benchmarks.ladder card")
    assert str(tmp_path) not in json.dumps(about)
    t4, _, eager = rows.values()
    assert t4["way"] == "4 x 1, nothing recomputed" and eager["way"].startswith("1 x 4")
    assert 0 < t4["gib_predicted"] < 14 and "gib_predicted" not in eager
    for row in rows.values():
        assert 0 < row["s_lowest"] <= row["s_per_step"] <= row["s_highest"] < row["s_start"]
        assert "losses" not in row and "on" not in row  # once, in the head
    assert t4["loss"] == pytest.approx(eager["loss"], abs=2e-4)


@pytest.mark.slow
def test_what_does_not_fit_a_small_card_is_said_and_the_rest_is_measured(run, planned, capsys):
    planned(0.1)
    code, rows = run("card", "t4")
    t4, eager = rows.values()
    assert code == 0 and "GiB; 0.1 are free" in t4["error"] and eager["s_per_step"] > 0
    assert "GiB; 0.1 are free" in capsys.readouterr().out


@pytest.mark.slow
def test_a_card_on_which_nothing_fits_is_told_what_may(run, monkeypatch, capsys):
    def full(run):
        raise torch.cuda.OutOfMemoryError("Tried to allocate 20.00 GiB")

    monkeypatch.setattr(bench.loop, "optimizer_step", full)
    code, rows = run("card")
    assert code == 1 and len(rows) == 3
    assert all(row["error"].startswith("out of memory in step 1: Tried") for row in rows.values())
    assert "make bench ARGS='card lowmem'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, file",
    [("Tesla T4", "card_tesla_t4"), ("NVIDIA A100-SXM4-40GB", "card_nvidia_a100_sxm4_40gb")],
)
def test_a_cards_file_has_its_name_and_lies_with_the_results(monkeypatch, name, file):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    whole = bench.default_file(bench.Options(command="card"))
    assert whole == ROOT / "benchmarks" / "results" / f"{file}.json"
    for part in ({"cap_gib": 14.5}, {"tiny": True}, {"command": "recipe"}):
        other = bench.default_file(bench.Options(**{"command": "card"} | part))
        assert other.parent == ROOT / "runs" / "bench"


@pytest.mark.slow
def test_the_random_unet_is_sdxls_in_shape_and_one_model_in_every_dtype():
    full = synthetic.random_unet(SDXL, torch.device("meta"), torch.float16)
    assert sum(p.numel() for p in full.parameters()) == 2_567_463_684
    pocket, cpu = bench.ROOT / "pocket/model", torch.device("cpu")
    half = synthetic.random_unet(pocket, cpu, torch.bfloat16).state_dict()
    reference = synthetic.random_unet(pocket, cpu, torch.float32, torch.bfloat16).state_dict()
    assert all(torch.equal(half[name].float(), numbers) for name, numbers in reference.items())
    assert not all(p.std() == 0 for p in half.values())


# ---- other trainers ------------------------------------------------------------------------------


def test_the_file_of_other_trainers_gives_the_factors_that_are_claimed():
    """Each peer at its best setting, one pass of 4 without recomputation, over ours."""
    file = json.loads((ROOT / "benchmarks" / "results" / "peers.json").read_text())
    for row in file["peers"].values():
        assert len(row["times"]) == row["timed"] < row["steps"]
        assert row["med_s"] == pytest.approx(statistics.median(row["times"]), abs=1e-4)
        assert (row["min_s"], row["max_s"]) == (min(row["times"]), max(row["times"]))
    for side, low, high in (("512", 9, 14), ("1024", 4, 5)):
        ours = file["ours"][f"ours_4x1_{side}"]["s_per_step"]
        best = [file["peers"][f"{peer}_4x1_{side}"]["med_s"] / ours for peer in "dko"]
        assert (round(min(best)), round(max(best))) == (low, high)


# ---- several GPUs --------------------------------------------------------------------------------


def test_efficiency_is_the_largest_share_and_a_ring_over_the_link():
    def each(m):
        return 0.1 * m

    free = float("inf")
    assert two_gpus.efficiency(4, 1, each, 1e9) == 1
    assert two_gpus.efficiency(4, 2, each, free) == two_gpus.efficiency(4, 4, each, free) == 1
    assert two_gpus.efficiency(4, 3, each, free) == pytest.approx(4 / (3 * 2))  # 1, 1 and 2
    # 1e9 bytes in a ring of 4: 3/4 of them sent twice, 1.5 s at 1e9 B/s beside 0.1 s of work
    assert two_gpus.efficiency(4, 4, each, 1e9, size=10**9) == pytest.approx(0.4 / (4 * 1.6))
    # by the exchange alone: p = 1 + B c(n) / (18 S)
    for link, most in ((1e9, 1), (8e9, 8), (2e10, 16)):
        limit = 1 + link * each(16) / (18 * two_gpus.GRADIENT)
        for gpus in (2, 4, 8, 16):
            assert (two_gpus.efficiency(16, gpus, each, link) >= 0.9) == (gpus <= limit)
        assert two_gpus.most_gpus(16, each, link) == most


def test_the_gradient_that_is_exchanged_is_the_readmes():
    with torch.device("meta"):
        config = bench.diffusers.UNet2DConditionModel.load_config(SDXL / "unet")
        unet = bench.diffusers.UNet2DConditionModel.from_config(config)
    lora = bench.loop.lora
    sides = lora.find_targets(unet, lora.TARGETS).values()
    assert 4 * 16 * sum(m.in_features + m.out_features for m in sides) == two_gpus.GRADIENT


def test_the_table_on_paper_names_the_gpus_that_reach_90_percent():
    _, _, *rows = two_gpus.paper()
    assert len(rows) == 5
    for row in rows:
        _, examples, *shares, most = (cell.strip() for cell in row.split("|")[1:-1])
        for gpus, share in zip((2, 4, 8), shares, strict=True):
            assert bool(share) == (gpus <= int(examples))
            if share:
                assert (int(share.split()[0]) >= 90) == (gpus <= int(most.split()[0]))


def test_without_a_gpu_the_full_size_is_not_begun_unasked(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    out = ["--out", str(tmp_path / "a.json")]
    mains = [(bench.main, ["ladder"]), (bench.main, ["card"]), (exactness.main, [])]
    mains += [(step_profile.main, ["floor"]), (each_kernel.main, [])]
    for main, words in mains:
        with pytest.raises(SystemExit, match="1"):
            main([*words, *out])
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("error: no GPU is seen") and "--device cpu" in said
        assert "Colab" in said and not list(tmp_path.iterdir())
    monkeypatch.setattr(bench, "measure", lambda rows, *_: {})  # the small model's is
    assert bench.main(["ladder", "--tiny", "--out", str(tmp_path / "a.json")]) == 0


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        (bench, ["ladder", "--steps", "-3", "--warm-up", "-1"], ("warm_up is -1", "steps is -3")),
        (bench, ["ladder", "--cap-gib", "nan"], ("cap_gib is nan",)),
        (bench, ["ladder", "--resolution", "60"], ("resolution is (60,)", "steps of 8")),
        (exactness, ["plain", "--steps", "0"], ("steps is 0", "correct --steps")),
        (step_profile, ["floor", "--warm-up", "-1"], ("warm_up is -1",)),
        (old_and_new, [".", "--turns", "0"], ("turns is 0",)),
    ],
)
def test_numbers_that_cannot_be_are_refused_all_at_once(monkeypatch, capsys, script, words, said):
    monkeypatch.setattr(sys, "argv", ["script", *words])
    with pytest.raises(SystemExit) as left:
        script.main()
    assert left.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and all(each in error for each in said)


@pytest.mark.parametrize("words", [["--steps", "0"], ["--warm-up", "-1"], ["--sides", "512", "0"]])
def test_two_gpus_refuses_numbers_that_cannot_be(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["two_gpus.py", "run", *words])
    with pytest.raises(SystemExit, match="2"):
        two_gpus.main()
    assert "1 or more" in capsys.readouterr().err
