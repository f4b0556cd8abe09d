# The targets that users run. Each makes .venv first, once, and again when a pin changes.
#   make pipeline CONFIG=configs/mine.yaml HARDWARE=cpu-x2

PYTHON   ?= python3
CONFIG   ?= configs/regulator.yaml
HARDWARE ?=
VENV     := .venv
RUN      := $(VENV)/bin/python
STAMP    := $(VENV)/.installed
PIPELINE := $(RUN) -m flows.pipeline --config $(CONFIG) $(if $(HARDWARE),--hardware $(HARDWARE))

.DEFAULT_GOAL := help
.PHONY: help setup pipeline plan prepare cpt sft evaluate report test test-slow check benchmark figures base clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

pipeline: $(STAMP) ## prepare, CPT, SFT, evaluate, report; what stands is reused
	@$(PIPELINE)

plan: $(STAMP) ## print what `make pipeline` would run, and why
	@$(PIPELINE) --plan

prepare cpt sft evaluate report: $(STAMP) ## run one stage, from what stands before it
	@$(PIPELINE) --only $@

test: $(STAMP) ## every test but the slow ones
	@$(RUN) -m pytest -m "not slow and not gpu"

test-slow: $(STAMP) ## the slow ones
	@$(RUN) -m pytest -m "slow and not gpu"

check: $(STAMP) ## lint, format, types, spelling
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy && $(RUN) -m codespell_lib

benchmark: $(STAMP) ## speed and memory of the preparation against the bare tokenizer
	@$(RUN) -m tests.benchmarks.preparation

figures: $(STAMP) ## the README's figures of the embedded example: 3 seeds, replay shares, SFT only
	@$(RUN) -m data.regulator.figures

base: $(STAMP) ## train the embedded base model again (hours on a CPU; minutes on a GPU)
	@$(RUN) -m data.regulator.base $(if $(HARDWARE),--hardware $(HARDWARE))

setup: $(STAMP) ## make .venv and install the pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "steep needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(RUN) -c 'import flows' && PREFECT_HOME=$(CURDIR)/.prefect $(RUN) -m prefect server database upgrade -y >/dev/null
	@touch $@

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .prefect .pytest_cache .ruff_cache .mypy_cache *.egg-info
