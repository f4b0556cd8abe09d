# The targets that users run. Each makes .venv first, once, and again when a pin changes.
#   make pipeline CONFIG=configs/mine.yaml HARDWARE=cpu-x2

PYTHON   ?= python3
CONFIG   ?= configs/regulator.yaml
HARDWARE ?=
VENV     := .venv
RUN      := $(VENV)/bin/python
STAMP    := $(VENV)/.installed
OPERATIONS := $(VENV)/.operations
PIPELINE := $(RUN) -m flows.pipeline --config "$(CONFIG)" $(if $(HARDWARE),--hardware $(HARDWARE))

.DEFAULT_GOAL := help
.PHONY: help setup pipeline plan prepare cpt sft evaluate report serve deploy audit test test-slow
.PHONY: test-operations test-faults check benchmark benchmark-orchestrator benchmark-gpu figures base clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

pipeline: $(STAMP) ## prepare, CPT, SFT, evaluate, report; what stands is reused
	@$(PIPELINE)

plan: $(STAMP) ## print what `make pipeline` would run, why, and what it takes
	@$(PIPELINE) --plan

prepare cpt sft evaluate report: $(STAMP) ## run one stage, from what stands before it
	@$(PIPELINE) --only $@

# What make itself was told, `make serve HOST=...`: shells and conda export a HOST that must not open the server to others.
said = $(if $(filter command line,$(origin $(1))),--$(2) "$($(1))")

serve: $(STAMP) ## scheduled runs on this machine: server, deployments, workers (PORT=4200 HOST=127.0.0.1)
	@exec $(RUN) -m flows.serve $(call said,HOST,host) $(call said,PORT,port) $(call said,DATABASE,database)

deploy: $(STAMP) ## register the deployments with the server at PREFECT_API_URL
	@$(RUN) -m flows.deploy

audit: $(OPERATIONS) ## known weaknesses of the pinned dependencies, where pip-audit can ask for them
	@$(RUN) -m tests.audit constraints.txt

test: $(STAMP) ## every test but the slow ones
	@$(RUN) -m pytest -m "not slow and not gpu and not operations and not faults"

test-slow: $(STAMP) ## the slow ones
	@$(RUN) -m pytest -m "slow and not gpu and not operations and not faults"

test-operations: $(OPERATIONS) ## a real server, worker, schedule and browser; screenshots in .screenshots/
	@tests/operations/install.sh
	@$(RUN) -m pytest -m "operations" -rs tests/operations && $(RUN) -m pytest -rs tests/training/test_trackers.py

test-faults: $(STAMP) ## signals, full disks and damage at random moments (STEEP_FAULT_SEED=... replays); prints the table
	@rm -f tests/faults/faults.json
	@STEEP_FAULT_TABLE="$(CURDIR)/tests/faults/faults.json" $(RUN) -m pytest -m faults tests/faults; \
	  code=$$?; $(RUN) -m tests.faults.table tests/faults/faults.json; exit $$code

check: $(STAMP) ## lint, format, types, spelling
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy && $(RUN) -m codespell_lib --toml pyproject.toml

benchmark: $(STAMP) ## speed and memory of the preparation against the bare tokenizer
	@$(RUN) -m tests.benchmarks.preparation

benchmark-orchestrator: $(STAMP) ## what Prefect costs a pipeline and a stage, against workers run by hand
	@$(RUN) -m tests.benchmarks.orchestrator

benchmark-gpu: $(STAMP) ## speed, memory, equal curves and exact updates on this machine's GPUs (needs the extra unsloth)
	@$(RUN) -m tests.benchmarks.gpu speed sweep small && $(RUN) -m tests.benchmarks.gpu curves exact --slots 4 --out runs/benchmark-gpu-exact

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
	@$(RUN) -c 'import flows' && env -u PREFECT_API_DATABASE_CONNECTION_URL PREFECT_HOME="$(CURDIR)/.prefect" \
	  $(RUN) -m prefect server database upgrade -y >/dev/null
	@touch $@

$(OPERATIONS): $(STAMP)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,operations]'
	@touch $@

clean: ## remove .venv and caches; runs/ stays, and .prefect/ with the server's database
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache *.egg-info
