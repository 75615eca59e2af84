# Every target makes the environment it needs. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread a process: a job of two processes then uses two cores, and sums keep their order.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export DS_ACCELERATOR ?= cpu
TRIALS ?= 500
# With RERUN=1 tests that failed run once more, alone: tests that wait for processes can fail on a machine that others use too.
AGAIN = { test $$? -eq 1 && echo 'run once more: only what failed' && $(BIN)/pytest -q -rs $(1) -n 0 --last-failed --last-failed-no-failures none; }
PYTEST = $(BIN)/pytest -q $(1)$(if $(RERUN), || $(AGAIN))
FAULT_TESTS := tests/support:tests/distributed:tests/faults

.PHONY: site schema-walk sweep-campaign help venv quickstart test lint types unit contract distributed end-to-end test-faults campaign fault-table test-hosts schema lock clean remove-runs

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*## */\t/' | expand -t 16

venv: $(READY)   ## make .venv with the measured set of packages

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[hpo,convert,serve,dev,docs]"
	touch $(READY)

quickstart: $(READY)  ## train PT, vanilla transfer and BPT on the miniature world, print the table and what it shows
	$(BIN)/python launcher/quickstart.py

test: lint types unit contract distributed end-to-end  ## all tests that need no root and no GPU

lint: $(READY)   ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## static types
	$(BIN)/mypy bpt_dist launcher

unit: $(READY)   ## pure functions, one process
	$(call PYTEST,-n 2 tests/unit)

contract: $(READY)  ## every task and every method behind its interface
	$(call PYTEST,-n 2 tests/contract)

distributed: $(READY)  ## 2-4 gloo processes on this machine
	$(call PYTEST,tests/distributed)

end-to-end: $(READY)  ## commands as a user gives them
	$(call PYTEST,-n 2 tests/end_to_end)

test-faults: $(READY)  ## kills, hangs, full disks, damaged files and other faults that must not harm a run
	$(call PYTEST,-rs -n 2 --dist loadfile tests/faults)

campaign: $(READY)  ## random faults, e.g. `make campaign TRIALS=500 SEED=7`; failures are kept as tests
	PYTHONPATH=$(FAULT_TESTS) $(BIN)/python tests/faults/campaign.py --trials $(TRIALS) --exact 0.4 $(if $(SEED),--seed $(SEED))

fault-table: $(READY)  ## write docs/faults.md from what the fault tests measured
	PYTHONPATH=$(FAULT_TESTS) $(BIN)/python tests/faults/table.py

test-hosts: $(READY)  ## two hosts on this machine: namespaces, sshd, pdsh; needs root, installs nothing
	$(call PYTEST,-rs tests/hosts)

sweep-campaign: $(READY)  ## kill a sweep at 10 random moments and compare with undisturbed runs
	PYTHONPATH=tests/support $(BIN)/python tests/end_to_end/sweep_campaign.py $$(mktemp -d) 10 $$(date +%s)

schema-walk: $(READY)  ## run every value of every key of the configuration to the end once (part of `make test`)
	$(BIN)/pytest -q -n 2 tests/contract/test_schema_values.py
	$(BIN)/pytest -q tests/distributed/test_schema_values.py

site: $(READY)   ## write the documentation as a site into site/, without network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --clean

schema: $(READY)  ## rewrite the schemas for editors from the settings
	$(BIN)/bpt-dist schema configs/schema.json
	$(BIN)/bpt-dist schema configs/sweep/schema.json --of sweep
	$(BIN)/bpt-dist schema configs/tasks.schema.json --of tasks
	$(BIN)/python docs/configuration.py
	$(BIN)/bpt-dist schema configs/export.schema.json --of export

lock: $(READY)   ## rewrite constraints.txt from the environment
	$(BIN)/python -m pip freeze --exclude-editable > constraints.frozen
	(head -1 constraints.txt; sed 's/+cpu//' constraints.frozen) > constraints.new
	mv constraints.new constraints.txt
	rm constraints.frozen

clean:           ## remove caches, keep runs and the environment
	rm -rf .pytest_cache .ruff_cache .mypy_cache

remove-runs:     ## remove runs/ with all results, after asking
	@printf 'Remove %s with all results, checkpoints and tracking? Type yes: ' "$(CURDIR)/runs"; \
	read -r answer && [ "$$answer" = yes ] && rm -rf runs || { echo 'nothing removed'; exit 1; }
