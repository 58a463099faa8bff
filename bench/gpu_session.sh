#!/bin/sh
# Everything that takes an NVIDIA GPU: build, tests, sanitizers, benchmarks; tables in $OUT.
#
#   make gpu                                   in the environment that the Makefile makes
#   PYTHON=python3 bench/gpu_session.sh        in another that has torch, triton and the dev extra
#   bench/gpu_session.sh build sanitize        some steps of: build tests sanitize bench resources
#
# OUT      where the results go (default: bench/results)
# PYTHON   the interpreter (default: .venv/bin/python)
# BUDGET   seconds for the rounds of one measurement (default: 1; a GPU needs no more)
#
# A step that fails does not keep the others from running; the exit status is 1 if any did.
set -u
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-.venv/bin/python}
BUDGET=${BUDGET:-1}
FAILED=
mkdir -p "$OUT"

# attempt NAME COMMAND...: run it, keep what it prints in $OUT/gpu-NAME.log, remember a failure.
attempt() {
    name=$1
    shift
    echo "== $name"
    "$@" >"$OUT/gpu-$name.log" 2>&1 || FAILED="$FAILED $name"
    tail -n 5 "$OUT/gpu-$name.log"
}

build() {
    attempt build env ATTN_KD_BUILD_EXTENSION=require ATTN_KD_BUILD_CUDA=require \
        "$PYTHON" setup.py build_ext --inplace
    attempt info "$PYTHON" -m attn_kd info
}

tests() {
    attempt tests "$PYTHON" -m pytest
}

# memcheck knows allocations, so tensors must not be cut from larger ones, as torch's allocator does.
# Both backends are watched; a kernel that is not compiled in (cuda) is refused, and said to be.
sanitize() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "== sanitize: no compute-sanitizer; it is in the CUDA toolkit"
        FAILED="$FAILED sanitize"
        return
    fi
    for backend in triton cuda; do
        for tool in memcheck racecheck; do
            attempt "$tool-$backend" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                compute-sanitizer --tool "$tool" --error-exitcode 2 \
                "$PYTHON" -m bench.sanitizer_cases --backend "$backend"
        done
    done
}

bench() {
    attempt bench "$PYTHON" -m pytest bench --benchmark-only --device cuda --budget "$BUDGET" \
        --benchmark-json "$OUT/gpu-bench.json"
    name=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())' | tr ' A-Z' '-a-z')
    "$PYTHON" -m bench.summary "$OUT/gpu-bench.json" >"$OUT/$name.md" || FAILED="$FAILED summary"
}

resources() {
    "$PYTHON" -m bench.kernel_resources >"$OUT/kernel-resources.md" || FAILED="$FAILED resources"
}

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_session.sh: $PYTHON finds no GPU" >&2
    exit 1
fi
for step in ${*:-build tests sanitize bench resources}; do
    case $step in
    build | tests | sanitize | bench | resources) "$step" ;;
    *)
        echo "gpu_session.sh: unknown step '$step'" >&2
        exit 2
        ;;
    esac
done
if [ -n "$FAILED" ]; then
    echo "failed:$FAILED" >&2
    exit 1
fi
