# Three commands. Each makes .venv on its first run and only uses it from then on.
#   make demo   train the embedded model on this machine, within a minute
#   make test   run every test
#   make lab    open the notebooks in JupyterLab
# While you work on the package:
#   make check  lint, types and the quick tests, within a minute

PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

# What `make check` runs, all but the tests marked slow: the rooms below tasks, without whole runs and child processes.
QUICK := grpo_lab tests/test_house.py tests/algorithm tests/hardware tests/models tests/rollout tests/rewards \
	tests/training/test_batches.py tests/training/test_checkpoints.py tests/training/test_config.py \
	tests/training/test_metrics.py --ignore=tests/rollout/test_vllm.py

.PHONY: demo test check lab lint types check-installs mutants bench notebooks badges

demo: .venv/demo
	$(BIN)/grpo-lab train --output-dir demo_output --overwrite-output-dir

test: .venv/test lint types
	$(BIN)/pytest -n 2 --dist loadscope
	$(BIN)/pytest -n 2 --dist loadscope --nbval --nbval-current-env --nbval-cell-timeout=300 -W default notebooks/solutions/*.ipynb
	$(BIN)/pytest -n 2 --dist loadscope --nbval-lax --nbval-current-env --nbval-cell-timeout=300 -W default notebooks/*.ipynb

# the inner loop: 1,600 tests, some 80 s of processor time in two processes; mypy keeps a cache
check: .venv/test lint types
	$(BIN)/pytest -q -n 2 --dist loadscope -m "not slow" $(QUICK)

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test
	$(BIN)/mypy

# the package as users install it, in fresh environments: Linux, some minutes
check-installs: .venv/test
	$(BIN)/python .ci/check_installs.py $(PIP_FLAGS)

# some twenty minutes, Linux only: every mutant that two tools make of the mathematics and the rewards
mutants: .venv/test .venv/mutants
	PYTHONPATH=$(CURDIR)/.venv/mutants OMP_NUM_THREADS=1 $(BIN)/python tests/mutants/tool.py

# our steps beside TRL's, and planned memory beside measured, three quarters of an hour: benchmarks/results/
bench: .venv/test
	$(BIN)/python benchmarks/speed.py pocket --rounds 7
	$(BIN)/python benchmarks/speed.py pocket --switches --rounds 5
	$(BIN)/python benchmarks/speed.py 25M 135M --rounds 3
	$(BIN)/python benchmarks/speed.py growth --rounds 1
	$(BIN)/python benchmarks/memory.py

# the learner's notebooks from notebooks/solutions/, all run anew
notebooks: .venv/test
	$(BIN)/python notebooks/solutions/make.py

# make badges REPO=owner/name: badges and install lines for this repository on GitHub; REPO= removes them
badges: .venv/test
	$(BIN)/python notebooks/solutions/make.py --badges "$(REPO)"

lab: .venv/lab
	$(BIN)/jupyter lab --notebook-dir=notebooks

.venv/demo: .venv/made
	@echo "Installing PyTorch, Transformers and the rest into .venv (once, some minutes) …"
	$(INSTALL) -e .
	@touch $@

.venv/test: .venv/made
	@echo "Installing everything that the tests need into .venv (once, some minutes) …"
	$(INSTALL) -e '.[test]'
	@touch $@

.venv/lab: .venv/made
	@echo "Installing JupyterLab into .venv (once, some minutes) …"
	$(INSTALL) -e '.[lab]'
	@touch $@

.venv/mutants: .venv/made
	$(INSTALL) --no-deps --target $@ cosmic-ray==8.7.0 libcst==1.9.0 mutmut==3.8.1 stevedore==5.10.0

# made anew when the versions change
.venv/made: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("GRPO Lab needs Python 3.11 or newer. Have one? make PYTHON=python3.12 …")'
	$(PYTHON) -m venv --clear .venv
	@touch $@
