#!/bin/sh
# What is to be measured on one GPU, in the order of what matters: three quarters of an hour on an
# H100. Each line stores its file and is worth its time alone.
# sh benchmarks/gpu_session.sh SCRATCH [the folder of an earlier version, to be timed beside this]
set -u
out=${1:?a folder with 40 GB free}
before=${2:-}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
$python -m benchmarks.ladder ladder --resolution 512 1024 --out "$out/bench_ladder.json"
if [ -n "$before" ]; then
  $python -m benchmarks.old_and_new "$before" --resolution 512 1024 --out "$out/old_and_new.json"
fi
$python -m benchmarks.exactness --rows eager fused graph 4x1 checkpointing \
  --out "$out/exactness.json"
$python benchmarks/full_size.py make "$out/model" "$out/photos"
$python benchmarks/deterministic.py kernels "$out/kernels.json"
$python benchmarks/deterministic.py kernels "$out/kernels.json" --deterministic
$python benchmarks/deterministic.py runs "$out/model" "$out/photos" "$out/deterministic"
$python benchmarks/full_size.py run "$out/model" "$out/photos" "$out/full_size"
$python benchmarks/memory_check.py predict "$out/predicted.json"
$python benchmarks/memory_check.py measure "$out/predicted.json" "$out/memory_check.json"
$python -m benchmarks.ladder recipe --steps 20 --out "$out/bench_recipe.json"
$python -m benchmarks.step_profile profile --resolution 512 1024 --rows graph 4x1 \
  --out "$out/step_profile.json"
# Where there are two GPUs:
$python benchmarks/two_gpus.py run --out "$out/two_gpus.json"
