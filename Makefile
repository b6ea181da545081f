# make demo | test | bench | lint: each creates the environment and builds what is missing, then runs.
PYTHON ?= python3
PINNED := 2.11.0
TORCH ?= $(PINNED)
ifeq ($(TORCH),$(PINNED))
VENV := .venv
CONSTRAINTS := -c constraints.txt
INSTALL := -e .
else
# Another torch (the exact version: 2.13.0 is not 2.13.0+cpu, whose torchvision is another) gets an environment of its
# own, with the package installed into it: an editable build would overwrite the extension of the first.
VENV := .venv-torch$(TORCH)
CONSTRAINTS :=
INSTALL := .
endif
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*/*)
ifneq ($(INSTALL),-e .)
SOURCES += $(wildcard resnet_kernels/*.py resnet_kernels/*/*.py)
endif

.PHONY: demo test bench lint clean
demo: $(VENV)/built
	$(BIN)/resnet-kernels demo --out demo

test: $(VENV)/built
	$(BIN)/pytest tests $(ARGS)

bench: $(VENV)/built
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-json=benchmark.json $(ARGS)

lint: $(VENV)/built
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

clean:
	rm -rf .venv* build *.egg-info resnet_kernels/_C*.so

$(VENV)/packages: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=64" wheel
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) torch===$(TORCH) torchvision pybind11 ninja
	touch $@

$(VENV)/built: $(VENV)/packages $(SOURCES)
ifeq ($(INSTALL),-e .)
	RESNET_KERNELS_BUILD=none $(BIN)/python -m pip install --quiet $(CONSTRAINTS) --no-build-isolation -e '.[test,lint]'
	$(BIN)/python setup.py --quiet build_ext --inplace
else
	$(BIN)/python -m pip install --quiet --no-build-isolation '.[test,lint]'
endif
	touch $@
