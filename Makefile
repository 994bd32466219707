# Requires make, git and Python >= 3.10 with pip and venv; everything else is installed into .venv.

# The first of these that is recent enough, else `python3`; `make setup PYTHON=/path/to/python` overrides it.
PYTHON ?= $(or $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done),python3)
VENV := .venv
BIN := $(VENV)/bin
KERNELS := $(wildcard $(addprefix sparse_lightning/kernels/,*.cu *.cuh */*.cu */*.cuh))
ARGS ?=
# One per core, up to four: each imports everything, which takes half a minute.
WORKERS := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))

# The newest major CUDA version that the driver supports, from nvidia-smi's header; empty without a driver.
CUDA = $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA [A-Z ]*Version: *\([0-9][0-9]*\).*/\1/p')
CUDA_EXTRA = $(addprefix $(comma)cuda,$(filter 12 13,$(CUDA)))
# The checks compile every kernel, even without a GPU.
DEV_CUDA_EXTRA = $(or $(CUDA_EXTRA),$(comma)cuda13)
comma := ,

# Written after a complete installation, so that an interrupted one is repeated. Training needs fewer packages.
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev
install = $(BIN)/python -m pip install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:  # so that the stages of `test` print in order

.PHONY: help
help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# -- setup --------------------------------------------------------------------------------------------------

.PHONY: setup
setup: $(DEV)  ## Create .venv with all packages for users, examples and checks

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	echo "error: '$(PYTHON)' must be Python 3.10 or newer. Choose one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	echo "error: '$(PYTHON)' cannot create virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	$(install) --editable '.[examples$(CUDA_EXTRA)]'
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(install) --editable '.[dev$(DEV_CUDA_EXTRA)]'
	@touch $(RUNTIME) $@

# -- using --------------------------------------------------------------------------------------------------

.PHONY: train
train: $(RUNTIME)  ## Run the example training, e.g. make train ARGS="trainer.max_steps=100"
	$(BIN)/python examples/train.py $(ARGS)

# -- checking -----------------------------------------------------------------------------------------------

heading = @printf '\n== %s\n' "$(1)"

# Types are checked while the tests run, and reported after them.
.PHONY: test
test: format-check lint  ## Run every check: formatting, lint, types, tests, the documentation's examples
	@found=$$(mktemp); $(MAKE) --no-print-directory types >$$found 2>&1 & checker=$$!; \
	$(MAKE) --no-print-directory unit; tests=$$?; \
	wait $$checker; types=$$?; cat $$found; rm $$found; exit $$((tests || types))

.PHONY: format-check
format-check: $(DEV)
	$(call heading,Formatting)
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(KERNELS)

.PHONY: lint
lint: $(DEV)  ## Lint
	$(call heading,Lint)
	$(BIN)/ruff check

.PHONY: types
types: $(DEV)  ## Check the types
	$(call heading,Types)
	$(BIN)/mypy

.PHONY: unit
unit: $(DEV)  ## Run the tests and doctests, e.g. make unit ARGS="-k topology"
	$(call heading,Tests and the documentation's examples)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: extras
extras: $(DEV)  ## Install the wheel in clean environments, with each extra, and use it; ARGS="report" for one
	$(call heading,Clean installations)
	$(BIN)/python tests/extras.py $(ARGS)

.PHONY: gpu-test
gpu-test: $(DEV)  ## Run only the tests that need a CUDA GPU
	$(call heading,GPU tests)
	$(BIN)/pytest -m gpu $(ARGS)

.PHONY: gpu-sanitize
gpu-sanitize: $(DEV)  ## Check the kernels for memory errors and races; needs compute-sanitizer
	$(call heading,Memory errors)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
		$(BIN)/python -m pytest -m gpu tests/kernels \
		-k "(test_parity and empty_row) or many_tokens or few_tokens or (fused_activations and silu)"
# racecheck breaks cuBLAS: one product of PyTorch in bf16 fails under it. And it does not see `__syncwarp` where the
# compiler knows that a warp has converged, so it reports every place of hopper/linear_narrow.cu's buffer of blocks that is
# used twice. So neither the kind "dense" nor these kernels with many blocks are checked.
	$(call heading,Races)
	compute-sanitizer --tool racecheck --error-exitcode 9 --kernel-name kernel_substring=block \
		$(BIN)/python -m pytest -m gpu tests/kernels -k "not dense and (test_parity and empty_row \
			or bfloat16 and (portable and with_few_tokens or shared_tiles or fused_activations and silu))"

.PHONY: fmt
fmt: $(DEV)  ## Format, and fix what lint can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(KERNELS)

# -- documentation ------------------------------------------------------------------------------------------

MKDOCS = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

.PHONY: mkdocs
mkdocs: $(DEV)
	@test -x $(BIN)/mkdocs || { echo "error: the documentation is built with Python 3.11 or newer. Choose one:" \
	"rm -r $(VENV); make docs PYTHON=python3.12" >&2; exit 1; }

.PHONY: docs
docs: mkdocs  ## Build the documentation into site/; open site/index.html
	$(MKDOCS) build --strict

.PHONY: docs-serve
docs-serve: mkdocs  ## Serve the documentation with live reload
	$(MKDOCS) serve

# -- packaging ----------------------------------------------------------------------------------------------

.PHONY: wheel
wheel: $(DEV)  ## Build the source archive and, from it, the wheel into dist/
	$(BIN)/python -m build

.PHONY: clean
clean:  ## Remove caches and build products, but not .venv and the outputs of runs
	rm -rf build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
