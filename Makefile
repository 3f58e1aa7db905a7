# make study: install into .venv and run the default study.   make test: install and run all tests.
PYTHON ?= python3
BIN := .venv/bin
# What is not compiled to bytecode here is at its first import, and most never is. Where the setting
# below forbids to keep it (many container images do), every process would compile all of torch anew.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check \
  --constraint constraints.txt

.PHONY: study test check lint types clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo "make study   install into .venv and run the default study (one to four minutes on 2 cores)"
	@echo "make test    install what the tests need and run them all, lint and types included"
	@echo "make check   lint and types only"
	@echo "make sanitize  drive the C++ kernels under sanitizers (four minutes; CASES=$(CASES) SEED=$(SEED))"
	@echo "make graphs  fold random networks and compare (GRAPHS=$(GRAPHS); minutes)"
	@echo "make huge    drive the C++ kernels on tensors of more than 2^31 values (Linux)"
	@echo "make gpu     all that only an NVIDIA GPU can tell: tests, times (MINUTES=$(MINUTES))"
	@echo "make arm     drive the C++ kernels for Arm, under emulation (minutes)"
	@echo "make clean   remove .venv, build and caches; runs/ is kept"

study: .venv/installed
	$(BIN)/evenkeel study

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

check: lint types

lint: .venv/installed-for-tests
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests

types: .venv/installed-for-tests
	$(BIN)/mypy

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "evenkeel needs Python 3.11 or newer; say make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)

.venv/installed: $(SOURCES) | .venv/bin/python
	@echo "Installing evenkeel into .venv (the first time takes a few minutes)"
	@$(PIP) --editable .
	@touch $@

.venv/installed-for-tests: $(SOURCES) | .venv/bin/python
	@echo "Installing evenkeel and its tests' needs into .venv (the first time takes a few minutes)"
	@$(PIP) --editable ".[test]"
	@touch $@ .venv/installed

# Random small networks, folded: the tests do 200 of them, this as many as asked for.
GRAPHS ?= 2000

.PHONY: graphs
graphs: .venv/installed-for-tests
	EVENKEEL_GRAPHS=$(GRAPHS) $(BIN)/python -m pytest tests/surgery/test_fold_random.py --timeout 3600

# The C++ kernels without Python: native/README.md says what is checked.
CASES ?= 400
SEED ?= 1
ifeq ($(origin CXX),default)
CXX := c++
endif
CHECKED := build/check-$(notdir $(CXX))

$(CHECKED)-%: FORCE
	cmake -S native/check -B $@ -DCMAKE_CXX_COMPILER=$(CXX) -DSANITIZE=$(SANITIZE) >/dev/null
	cmake --build $@ --parallel 2

$(CHECKED)-address: SANITIZE := address
$(CHECKED)-thread: SANITIZE := thread

.PHONY: FORCE sanitize huge
FORCE:

sanitize: $(CHECKED)-address $(CHECKED)-thread
	@echo "$(CASES) cases under AddressSanitizer and UndefinedBehaviorSanitizer"
	$(CHECKED)-address/evenkeel_check --cases $(CASES) --seed $(SEED)
	@echo "$(CASES) cases under ThreadSanitizer"
	$(CHECKED)-thread/evenkeel_check --cases $(CASES) --seed $(SEED)

# Debian has both as g++-aarch64-linux-gnu and qemu-user-static.
.PHONY: arm
arm:
	cmake -S native/check -B build/check-arm -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 >/dev/null
	cmake --build build/check-arm --parallel 2
	qemu-aarch64-static -L /usr/aarch64-linux-gnu build/check-arm/evenkeel_check --cases 40 --seed $(SEED)

huge: $(CHECKED)-plain
	$(CHECKED)-plain/evenkeel_check --huge

# Into runs/gpu; benchmarks/gpu.py says what is run.
MINUTES ?= 8

.PHONY: gpu
gpu: .venv/installed-for-tests
	$(BIN)/python benchmarks/gpu.py --minutes $(MINUTES)

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis
