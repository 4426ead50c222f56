# raysweep. `make sweep` runs the quickstart, `make test` the tests; `make help` lists everything.
# All of it happens in .venv, which is built on first use from the exact versions in constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check -qq

# Which build of torch: cuda where an NVIDIA driver is present or TORCH=cuda is given, else cpu.
TORCH ?= $(if $(wildcard /proc/driver/nvidia/version),cuda,cpu)
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
# PyTorch's own index of CPU builds, used only where plain pip would fetch the CUDA build.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_REPORT = $(PIP) install --dry-run --no-deps --ignore-installed --report - torch==$(TORCH_VERSION)

STAMP := $(VENV)/.installed-$(TORCH)
CODE := raysweep tests $(wildcard benchmarks analysis)

.DEFAULT_GOAL := environment
.PHONY: environment sweep test test-long test-hosts lint check format docs wheel clean help
MAKEFLAGS += --no-print-directory

environment: $(STAMP)  ## build .venv (default)

sweep: $(STAMP)  ## run the quickstart sweep, or continue it, and print its table
	@$(BIN)/raysweep launch

test: $(STAMP)  ## run the tests, without the long ones, a process a core (4 at most) and a module at a time
	@$(BIN)/python -m pytest -q -m "not long" --numprocesses auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder

test-long: $(STAMP)  ## run the long tests: many processes, killed nodes
	@$(BIN)/python -m pytest -q -m long

test-hosts: $(STAMP)  ## run those with hosts of their own, from `ray up` to `ray down` (root, sshd, rsync; else skipped)
	@$(BIN)/python -m pytest -q -rs -m long tests/cluster/test_hosts.py

lint: $(STAMP)  ## check format, style and types
	@$(BIN)/ruff format --quiet --check --output-format concise $(CODE) || \
		{ echo "'make format' mends this"; exit 1; }
	@$(BIN)/ruff check --quiet --output-format concise $(CODE)
	@$(BIN)/mypy --no-error-summary

check: lint test  ## lint and test: what a change must pass

format: $(STAMP)  ## format the code and mend what the linter can
	@$(BIN)/ruff check --quiet --fix-only $(CODE)
	@$(BIN)/ruff format --quiet $(CODE)

docs: $(STAMP)  ## write the reference in docs/ from the descriptions in the code
	@$(BIN)/python -m raysweep.config.describe docs/search-space.md
	@$(BIN)/python -m raysweep.results.describe docs/results.md
	@$(BIN)/python -m raysweep.cluster.grafana dashboards/raysweep.json

wheel: $(STAMP)  ## build dist/raysweep-*.whl
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

clean:  ## remove the environment, caches and builds; results stay
	@rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "raysweep needs Python 3.11 or newer; name one with: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make environments; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Building $(VENV) with torch $(TORCH_VERSION) ($(TORCH)); a few minutes, once."
	@[ -e $@ ] || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $(VENV)/.installed-*
	@if [ $(TORCH) = cpu ] && $(TORCH_REPORT) | grep -qE '"(nvidia|cuda)-'; then \
		$(PIP) install --no-deps --index-url $(TORCH_CPU_INDEX) torch==$(TORCH_VERSION); fi
	@$(PIP) install --constraint constraints.txt torch hatchling editables
	@$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@
