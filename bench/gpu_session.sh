#!/bin/sh
# Everything that takes an NVIDIA GPU: build, tests, sanitizers, benchmarks, tuning; tables in $OUT.
#
#   make gpu                                   in the environment that the Makefile makes
#   PYTHON=python3 bench/gpu_session.sh        in another that has torch, triton and the dev extra,
#                                              and attn_kd from here (pip install --editable)
#   bench/gpu_session.sh build sanitize        some steps of: build gpu sanitize bench tune tests
#                                              resources; without any, all but tune
#   LIMIT=330 bench/gpu_session.sh build gpu sanitize bench tune     in half an hour at the most
#
# OUT      where the results go (default: bench/results)
# PYTHON   the interpreter (default: .venv/bin/python)
# BUDGET   seconds for the rounds of one measurement (default: 1; a GPU needs no more)
# LIMIT    seconds after which a step is interrupted and counts as failed; what benchmarks have
#          measured by then is kept (default: 0, no limit)
#
# The steps stand in the order of their worth: `gpu` is the tests that need a GPU and nothing else,
# `tests` all of them, for which Triton compiles some thousand kernels. `tune` tries other tilings
# (bench/tune_triton.py); it compiles some 200 kernels on all cores, then times them. No GPU has run
# it yet: minutes, by estimate. A step that fails does not keep the others from running; the exit
# status is 1 if any did.
set -u
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-.venv/bin/python}
BUDGET=${BUDGET:-1}
LIMIT=${LIMIT:-0}
FAILED=
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
mkdir -p "$OUT" || exit 1

# attempt NAME COMMAND...: run it, keep what it prints in $OUT/gpu-NAME.log, remember a failure.
attempt() {
    name=$1
    shift
    echo "== $name"
    timeout --signal INT --kill-after 20 "$LIMIT" "$@" >"$OUT/gpu-$name.log" 2>&1 ||
        FAILED="$FAILED $name"
    tail -n 5 "$OUT/gpu-$name.log"
}

# attn_kd.kernels is the folder kernels/ by an installation alone: an extension in place is not enough.
build() {
    "$PYTHON" -c 'import os, attn_kd.kernels as k; assert os.path.samefile(*k.__path__, "kernels")' \
        2>/dev/null ||
        attempt install env ATTN_KD_BUILD_EXTENSION=never \
            "$PYTHON" -m pip install --no-build-isolation --no-deps --editable .
    attempt build env ATTN_KD_BUILD_EXTENSION=require ATTN_KD_BUILD_CUDA=require \
        "$PYTHON" setup.py build_ext --inplace
    attempt info "$PYTHON" -m attn_kd info
}

gpu() {
    attempt gpu "$PYTHON" -m pytest -m gpu
}

# memcheck knows allocations, so tensors must not be cut from larger ones, as torch's allocator does.
# Both backends are watched; a kernel that is not compiled in (cuda) is refused, and said to be. The
# first run of the cases is watched by nobody: by it all cores compile what Triton keeps for the
# others, which take a case after the other.
sanitize() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "== sanitize: no compute-sanitizer; it is in the CUDA toolkit"
        FAILED="$FAILED sanitize"
        return
    fi
    whole=$LIMIT
    LIMIT=$((whole / 6))
    for backend in triton cuda; do
        attempt "cases-$backend" "$PYTHON" -m bench.sanitizer_cases --backend "$backend" \
            --jobs 0
        for tool in memcheck racecheck; do
            attempt "$tool-$backend" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                compute-sanitizer --tool "$tool" --error-exitcode 2 \
                "$PYTHON" -m bench.sanitizer_cases --backend "$backend"
        done
    done
    LIMIT=$whole
}

bench() {
    attempt bench "$PYTHON" -m pytest bench --benchmark-only --device cuda --budget "$BUDGET" \
        --benchmark-json "$OUT/gpu-bench.json"
    name=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())' | tr ' A-Z' '-a-z')
    "$PYTHON" -m bench.summary "$OUT/gpu-bench.json" >"$OUT/$name.md" || FAILED="$FAILED summary"
}

tune() {
    attempt tune "$PYTHON" -m bench.tune_triton
}

tests() {
    attempt tests "$PYTHON" -m pytest
}

resources() {
    "$PYTHON" -m bench.kernel_resources >"$OUT/kernel-resources.md" || FAILED="$FAILED resources"
}

STEPS=${*:-build gpu sanitize bench tests resources}
for step in $STEPS; do
    case $step in
    build | gpu | sanitize | bench | tune | tests | resources) ;;
    *)
        echo "gpu_session.sh: unknown step '$step'" >&2
        exit 2
        ;;
    esac
done
# shellcheck disable=SC2086  # a word for each step
"$PYTHON" -m bench.gpu_machine $STEPS || exit 1
for step in $STEPS; do
    "$step"
done
if [ -n "$FAILED" ]; then
    echo "failed:$FAILED" >&2
    exit 1
fi
