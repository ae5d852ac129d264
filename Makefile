# Two commands on a fresh machine with Python 3.10+ and a C++ compiler: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),python3,$(PYTHON))
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast fuzz sanitize release-check lint docs bench gpu floors clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

venv: $(VENV)/.test ## the virtual environment, with lbfast and what the tests need

demo: venv ## files of five modalities and captions -> embeddings, similarity tables, time against the reference
	$(BIN)/python -m bench.demo

# A process for each core, whose threads sleep while they wait: they share the cores. Bytecode is kept, whatever the
# environment says: many tests start processes.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal

test: venv ## every test; ARGS="-k embed" and the like go to pytest
	$(PYTEST) $(ARGS)

test-fast: venv ## a minute of tests: all but the slow ones, for a first look at a change
	$(PYTEST) -m "not slow" $(ARGS)

SECONDS ?= 60
FUZZ := $(BIN)/python -m tests.fuzz --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

fuzz: venv ## random inputs for SECONDS=60: a right answer or one clear line; SEED=... does it again
	$(FUZZ) $(ARGS)

# The kernels of csrc compiled for it, once; the interpreter itself is not instrumented, so the runtimes come first.
CXX_FILE = $(shell $(CXX) -print-file-name=$(1))
SANITIZED := LBFAST_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined \
	-fno-omit-frame-pointer -g1 -O1" \
	ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1

sanitize: venv ## the ops' random inputs with csrc under AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
	$(SANITIZED) $(BIN)/python -c "from lbfast import native; path = native.cache_folder() / native.library_name(); \
		path.exists() or native.compile_library(path)"
	$(SANITIZED) LD_PRELOAD="$(call CXX_FILE,libasan.so) $(call CXX_FILE,libubsan.so) $(call CXX_FILE,libstdc++.so.6)" \
		$(FUZZ) --only ops

release-check: venv ## sdist and wheel, each in a bare environment without a compiler; ARGS="--python python3.10" and more
	$(BIN)/python -m tests.release $(ARGS)

docs: $(VENV)/.docs ## the documentation as a site, strictly: build/docs/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: venv $(VENV)/.bench ## tests, then benchmarks of the CPU in ten minutes; ARGS="--only languagebind" and the like
	$(BIN)/python -m bench.run $(ARGS)

gpu: ## everything worth knowing from ten minutes of an NVIDIA GPU (bench/GPU.md); installs nothing; PYTHON=...
	PYTHONPATH=. $(GPU_PYTHON) -m bench.gpu $(ARGS)

floors: venv ## a few ratios of speed, measured now, against those in bench/floors.json
	$(BIN)/python -m bench.compare --floors

clean: ## removes what the commands above made, the virtual environment too
	rm -rf $(VENV) demo-out gpu-out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is an extra of pyproject.toml; installing again happens only when the files that say what to install change.
$(VENV)/.%: pyproject.toml setup.py constraints.txt
	@echo "installing lbfast[$*] into $(VENV), once: this takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[$*]'
	@touch $@
