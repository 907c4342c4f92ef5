# make demo   a quick sine study from a fresh clone, in runs/sine-quick
# make check  lint, types and the fast tests, in minutes
# make test   everything that has to pass: lint, tests, tests of compiled code
#             (LONG=no: without those that take long, which make test-long runs alone)
# make lint   ruff and mypy alone
# make docs   the site, in site/: strict, so that a link that leads nowhere is an error
# make bench  timings beside other libraries, on an idle machine; writes docs/benchmarks.md
#             (DEVICE=cuda: of a GPU, docs/benchmarks-cuda.md)
# make clean  removes the environment, the caches and the build

PYTHON ?= python3
VENV ?= .venv
DEVICE ?= cpu
BIN := $(abspath $(VENV))/bin

# One process per core, one thread per process.
export OMP_NUM_THREADS := 1
# Of the modules that are installed, most are never imported: pip would compile them all, a third of
# the time that an environment takes.
PIP := $(BIN)/python -m pip install --no-compile
# Where it is set, as in many containers, every process of the tests compiles every module anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo check test test-long lint docs bench clean

demo: $(VENV)/.study
	$(BIN)/gradagree ablate sine --quick --out runs/sine-quick

# What a file shares is made once.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
# Tests with a mark, by the files that have it: to collect all files takes half a minute.
marked = -m $(1) $$(grep -rl --include='test_*.py' 'mark\.$(1)' tests)

check: lint
	$(PYTEST) -m "not slow and not compiled and not fused"

test: lint
	$(PYTEST) $(if $(filter no,$(LONG)),-m "not compiled and not fused and not long")
	$(BIN)/pytest -n 2 $(call marked,compiled)
	DEVICE=$(DEVICE) $(BIN)/pytest -n 2 $(call marked,fused)

test-long: $(VENV)/.dev
	$(PYTEST) $(call marked,long)

bench: $(VENV)/.bench
	cd tests && env -u OMP_NUM_THREADS $(BIN)/python -m benchmarks --out ../docs \
		--device $(DEVICE)

# adapters/ is installed as gradagree_opt.adapters by a hook that mypy does not run, so mypy is shown
# a tree of links in which it already lies there.
lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	rm -rf build/mypy
	mkdir -p build/mypy/gradagree_opt
	ln -s $(CURDIR)/gradagree_opt/* $(CURDIR)/adapters build/mypy/gradagree_opt/
	cd build/mypy && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache -p gradagree_opt

# A stamp is written only when everything before it has succeeded, so an interrupted installation is
# taken up again; each environment adds to the one before.
$(VENV)/.pip:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'  # first with --group
	touch $@

$(VENV)/.study: $(VENV)/.pip pyproject.toml
	$(PIP) --group torch --editable '.[ablation]'
	touch $@

# learn2learn's shipped C does not compile on current Pythons: build_ext makes it anew. Without the
# cache, because a wheel in it would hide a build that fails.
$(VENV)/.dev: $(VENV)/.study pyproject.toml
	$(PIP) --group dev --editable '.[all]'
	$(PIP) --no-cache-dir --no-deps -C--build-option=build_ext learn2learn==0.2.0
	touch $@

$(VENV)/.bench: $(VENV)/.dev pyproject.toml
	$(PIP) --group bench
	touch $@

docs: $(VENV)/.dev
	$(BIN)/python docs/troubleshooting.py
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
