# One command for each purpose. On a machine with only python3 (with venv), make and g++ 11 or newer
# each target first builds what it needs: the virtual environment, the packages, the extension.
#
#   make demo    the main job, small: teacher, baseline and distilled student; report in demo/
#   make test    all tests
#   make bench   the benchmarks (some 20 minutes), then tables and, in bench/figures/, figures
#   make gpu     on a machine with an NVIDIA GPU: tests, sanitizers and benchmarks there
#   make lint    formatting, lint and types
#   make format  formats Python and C++
#   make clean   removes what the above made, the virtual environment included
#
# PYTHON picks the interpreter; pip's own settings apply (a CPU-only torch, for example, comes from
# the index that PIP_EXTRA_INDEX_URL names). Without a compiler, use the reference backend:
# make demo ATTN_KD_BUILD_EXTENSION=never

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# In development a kernel that does not compile is an error, not a slower package.
export ATTN_KD_BUILD_EXTENSION ?= require
# ninja and clang-format are installed into the environment.
export PATH := $(abspath $(BIN)):$(PATH)

ENVIRONMENT := $(VENV)/.made
PACKAGES := $(VENV)/.packages
EXTENSION := $(VENV)/.extension
C_FILES := -name '*.cpp' -o -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'
NATIVE := $(shell find csrc kernels $(C_FILES))
FORMATTED := $(NATIVE) $(shell find tests $(C_FILES))

.PHONY: demo test bench gpu lint format clean

demo: $(EXTENSION)
	$(BIN)/attn-kd demo --out demo --overwrite

test: $(EXTENSION)
	$(BIN)/python -m pytest

bench: $(EXTENSION)
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json bench/results.json
	$(BIN)/python -m bench.summary bench/results.json --figures bench/figures

gpu: $(EXTENSION)
	PYTHON=$(BIN)/python bench/gpu_session.sh

lint: $(PACKAGES)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: $(PACKAGES)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(FORMATTED)

clean:
	rm -rf $(VENV) build dist demo *.egg-info attn_kd/_build.json attn_kd/_C.*.so
	rm -rf bench/figures .pytest_cache .hypothesis .ruff_cache .mypy_cache .benchmarks
	find attn_kd kernels bench tests -name __pycache__ -prune -exec rm -rf {} +

$(ENVIRONMENT):
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel ninja
	touch $@

# torch goes first: the build of attn_kd needs it. The extension is left to the next step, which
# recompiles only what has changed.
$(PACKAGES): $(ENVIRONMENT) pyproject.toml setup.py constraints.txt
	$(PIP) torch numpy
	ATTN_KD_BUILD_EXTENSION=never $(PIP) --no-build-isolation --editable '.[gpu,detr,report,video,dev]'
	touch $@

$(EXTENSION): $(PACKAGES) $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
