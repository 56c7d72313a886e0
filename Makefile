# `make distill` and `make test` need nothing but python3 with venv; a C++ compiler makes them native.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
NATIVE_SOURCES := $(shell find csrc -type f 2>/dev/null)
FORMATTED_SOURCES = $(NATIVE_SOURCES) $(wildcard tools/*.cu)

.PHONY: help distill distill-bert test lint bench kernel-report simulate simulate-all clean
.PHONY: gpu-day gpu-day-first gpu-day-second gpu-day-prepare
help:
	@echo "make distill   distil a real model on real text (sets everything up; about ten minutes)"
	@echo "make distill-bert  distil a real sentence encoder by features and relations"
	@echo "make test      run the tests (sets everything up)"
	@echo "make simulate  the compiled GPU kernels in an emulator, if that is there; -all: every case"
	@echo "make kernel-report  registers, spills, instructions and bytes of the GPU kernels"
	@echo "make bench     the full benchmark against eager PyTorch, torch.compile and chunks"
	@echo "make gpu-day   on a machine with a GPU: prove and measure everything, in two halves"
	@echo "make lint      ruff, mypy, clang-format, and the limits of one function"
	@echo "make clean     remove the environment and build results; results of runs stay"

# The stamp is newer than everything the installation is made from. Releases are pinned here and in
# CI only; the package itself allows ranges.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(NATIVE_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt --upgrade pip
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[test]"
	touch $@

# A new folder each time: a run never overwrites another one's results.
OUTPUT ?= outputs/smollm2-$(shell date +%Y%m%d-%H%M%S)
distill: $(VENV)/.installed
	$(BIN)/kdkernels fetch smollm2
	$(BIN)/kdkernels distill examples/smollm2.yaml --output_dir $(OUTPUT)

BERT_OUTPUT ?= outputs/minilm-$(shell date +%Y%m%d-%H%M%S)
distill-bert: $(VENV)/.installed
	$(BIN)/kdkernels fetch minilm
	$(BIN)/kdkernels distill examples/minilm.yaml --output_dir $(BERT_OUTPUT)

# The second run: what Triton's kernels compute, in its interpreter; of the matrix a third.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal
test: $(VENV)/.installed
	$(PYTEST) tests --ignore=tests/simulate
	TRITON_INTERPRET=1 $(PYTEST) -k triton $(addprefix tests/loss/test_,triton.py matrix.py one_answer.py)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED_SOURCES)
	$(BIN)/python tools/function_limits.py

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

# What is proven of the compiled GPU kernels without a GPU: their PTX executed in ptxsim (skipped
# where that is neither in KDKERNELS_PTXSIM nor beside the checkout; the CUDA kernels also where
# there is no nvcc), and counts from their machine code. simulate runs a quarter of the long tests'
# cases; simulate-all every one, and the machine code of every architecture.
simulate: $(VENV)/.installed
	$(BIN)/python -m pytest tests/simulate

simulate-all: $(VENV)/.installed
	KDKERNELS_SIMULATE=all $(BIN)/python -m pytest tests/simulate

kernel-report: $(VENV)/.installed
	$(BIN)/python tools/kernel_report.py

# On a machine with a GPU, by its own Python (torch, triton, pytest, pytest-xdist, hypothesis, and
# setuptools, pybind11, ninja and nvcc unless .gpu/ has the native module): no network, no set-up.
# Where there is a network, gpu-day-prepare fills .gpu/, which goes along. LIMIT: seconds of a half.
# DRY=1 rehearses it here, on CPUs with tiny shapes; the CUDA kernels in ptxsim if simulate built it.
OUT ?= outputs/gpu-day-$(shell date +%Y%m%d-%H%M%S)
LIMIT ?= 340
override DRY := $(filter-out 0,$(DRY))
DAY = $(if $(DRY),$(BIN)/python,$(PYTHON)) -m benchmarks gpu-day
DAY_ARGS = --output $(OUT) --limit $(LIMIT) $(if $(DRY),--dry)
gpu-day gpu-day-first gpu-day-second: OUT := $(OUT)
gpu-day-first: $(if $(DRY),$(VENV)/.installed)
	$(DAY) first $(DAY_ARGS)

gpu-day-second: $(if $(DRY),$(VENV)/.installed)
	$(DAY) second $(DAY_ARGS)

# The second half runs even if something of the first fails.
gpu-day: $(if $(DRY),$(VENV)/.installed)
	failed=0; for half in first second; do $(DAY) $$half $(DAY_ARGS) || failed=1; done; exit $$failed

gpu-day-prepare: $(VENV)/.installed
	$(BIN)/python -m benchmarks gpu-day prepare

clean:
	rm -rf $(VENV) build kdkernels/_native*.so *.egg-info
