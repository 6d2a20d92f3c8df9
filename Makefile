# make quickstart: the whole loop on this machine. make test: every test. Both make .venv first.
PYTHON := .venv/bin/python
RUN := $(PYTHON) recipes/run_pipeline.py
UV := .tools/bin/uv
# One thread per process: with more, processes that share the cores spin against each other.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart paper paper-smoke test lint setup constraints clean gpu-check slurm-test

setup: .venv/.installed

.venv/.installed: constraints.txt pyproject.toml
	test -x $(UV) || (python3 -m venv .tools && .tools/bin/pip install --quiet uv)
	test -x $(PYTHON) || $(UV) venv --quiet --python 3.12 .venv
	$(UV) pip sync --quiet --compile-bytecode --python $(PYTHON) constraints.txt
	$(UV) pip install --quiet --python $(PYTHON) --no-deps --editable .
	touch $@

quickstart: setup
	$(RUN) experiment=quickstart

# The paper's comparison with error bars, and the same at the smallest sizes. Killed, they go on: docs/paper.md.
paper: setup
	$(PYTHON) tools/paper.py

paper-smoke: setup
	$(PYTHON) tools/paper.py --smoke

test: setup
	$(PYTHON) -m pytest -n 2 --dist loadgroup

lint: setup
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

# The scripts of slurm/ on a real Slurm, started for the tests; skipped where slurm-wlm and munge are not installed.
slurm-test: setup
	$(PYTHON) -m pytest tests/slurm -v

# On a GPU machine, in its own environment: make gpu-check PYTHON=python. Writes docs/gpu_results.md.
gpu-check:
	$(PYTHON) tools/gpu/check.py

# Resolve the environment anew after a change in pyproject.toml.
constraints:
	$(UV) pip compile --quiet pyproject.toml --extra cpu --extra dev --python-version 3.12 --no-header --no-annotate -o constraints.txt

clean:
	rm -rf runs
