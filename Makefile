# make demo   sets up .venv, compiles the extension, and runs a federation of one server and three silos
# make test   the same set-up, then the checks of the code and the tests
#
#   PYTHON=python3.12        another Python, 3.11 or newer
#   TORCH=torch==2.11.0      another torch than the one that constraints.txt holds
#   DEMO_ARGS=--quick        options of `fedpft demo`
#   PYTEST_ARGS='-k report'  options of pytest; -m slow runs the slow tests instead

PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(shell grep '^torch==' constraints.txt)
DEMO_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
HELD := $(VENV)/constraints.txt
TORCH_STAMP := $(VENV)/.installed-$(subst =,-,$(TORCH))
STAMP := $(VENV)/.installed
NATIVE := $(shell find csrc -type f)
FORMATTED := $(filter %.h %.hpp %.cpp %.cu %.cuh,$(NATIVE))

.DEFAULT_GOAL := help
.PHONY: help install demo lint test clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/fedpft demo $(DEMO_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

test: lint
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) demo-out build dist *.egg-info fedpft/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find fedpft tests -name __pycache__ -prune -exec rm -rf {} +

# torch and the build tools come first: the extension is built against this torch, without build isolation.
$(TORCH_STAMP): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fedpft needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1): try make PYTHON=python3.12" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { \
	  echo "fedpft needs a C++ compiler: install one, such as Debian's package g++" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
	  echo "fedpft needs the headers of $(PYTHON): install them, such as Debian's package python3-dev" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.installed*
	@{ grep -v '^torch==' constraints.txt; echo '$(TORCH)'; } > $(HELD)
	@echo "installing $(TORCH): minutes, the first time"
	$(PIP) install '$(TORCH)' setuptools ninja cmake pybind11 -c $(HELD)
	@touch '$@'

$(STAMP): $(TORCH_STAMP) pyproject.toml setup.py CMakeLists.txt requirements-demo.txt $(NATIVE)
	$(PIP) install --no-build-isolation -e '.[test]' -c $(HELD)
	$(PIP) install --no-deps -r requirements-demo.txt
	@touch '$@'
