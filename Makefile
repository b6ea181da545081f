# make demo | test | bench | lint | docs | kernels: each creates the environment, builds the missing parts, then runs.
# make gpu: on a machine with an NVIDIA GPU, builds, checks, tunes and measures everything in nine minutes.
# V=1 prints every command, the compilers' too.
PYTHON ?= python3
PINNED := 2.11.0
TORCH ?= $(PINNED)
CUTLASS := 4.2.0.0
ifeq ($(TORCH),$(PINNED))
VENV := .venv
CONSTRAINTS := -c constraints.txt
INSTALL := -e .
else
# Another torch (an exact version: 2.13.0 and 2.13.0+cpu differ, and so do their torchvisions) gets an environment of its
# own, with the package installed into it: an editable build would overwrite the extension built for the pinned torch.
VENV := .venv-torch$(TORCH)
CONSTRAINTS :=
INSTALL := .
endif
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*/* csrc/*/*/*)
ifneq ($(INSTALL),-e .)
SOURCES += $(wildcard resnet_kernels/*.py resnet_kernels/*.jinja resnet_kernels/*/*.py resnet_kernels/*/*/*.py)
endif

# Commands run silently, after one line that names the step.
Q := $(if $(filter 1,$(V)),,@)
export V
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(BIN)/python -m pip install $(if $(filter 1,$(V)),,-qq)

.PHONY: demo test bench gpu lint kernels readme docs clean
demo: $(VENV)/built
	$(Q)$(BIN)/resnet-kernels demo --out demo

# Two processes side by side, each with all threads, as users run it. A thread that waits for work yields its core.
test: $(VENV)/built
	$(Q)OMP_WAIT_POLICY=passive $(BIN)/pytest tests -n 2 --dist worksteal $(ARGS)

bench: $(VENV)/built
	$(Q)$(BIN)/pytest benchmarks --benchmark-only --benchmark-json=benchmark.json $(ARGS)

# Uses $(PYTHON) if it has torch already: such machines may have no network. Without a GPU it ends before anything is
# installed.
gpu:
	@command -v nvidia-smi >/dev/null && nvidia-smi -L | grep -q . || \
	{ echo "make gpu: there is no NVIDIA GPU here (nvidia-smi lists none); on a CPU: make bench" >&2; exit 2; }
	@if $(PYTHON) -c "import torch, torchvision, rich" 2>/dev/null; then $(PYTHON) -m benchmarks.gpu_suite $(ARGS); \
	else $(MAKE) $(VENV)/built && $(BIN)/python -m benchmarks.gpu_suite $(ARGS); fi

# The generated tables of the documents: the committed results, and the models whose blocks are replaced.
readme: $(VENV)/built
	$(BIN)/resnet-kernels report --readme docs/performance.md
	$(BIN)/resnet-kernels report --readme docs/accuracy.md
	$(BIN)/resnet-kernels coverage --readme docs/coverage.md --results benchmarks/results
	$(BIN)/python -m benchmarks.headline

# The documents and an API reference as a site: build/site/index.html.
docs: $(VENV)/built
	$(Q)$(BIN)/python -c "import mkdocs, mkdocstrings" 2>/dev/null || \
	{ echo "installing mkdocs"; $(PIP) "mkdocs-material>=9.5" "mkdocstrings-python>=1.10"; }
	$(Q)NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "built build/site/index.html"

lint: $(VENV)/built
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# The Triton kernels' launches, compiled for GPUs that need not be present: model, batch, architecture.
TABLES := resnet50,256,90 resnet50,32,90 resnet50,1,90 resnet18,256,90 resnext50_32x4d,256,90 \
	resnet50,256,80 resnet50,256,100 resnet50,256,120
comma := ,
kernels: $(VENV)/built
	sed '/^### /,$$d' docs/kernels.md > build/kernels.md
	$(foreach t,$(TABLES), \
	$(BIN)/resnet-kernels kernels --model $(word 1,$(subst $(comma), ,$(t))) --batch $(word 2,$(subst $(comma), ,$(t))) \
	--arch $(word 3,$(subst $(comma), ,$(t))) >> build/kernels.md && echo >> build/kernels.md &&) true
	sed '$$d' build/kernels.md > docs/kernels.md

clean:
	rm -rf .venv* build *.egg-info resnet_kernels/_C*.so

$(VENV)/packages: pyproject.toml constraints.txt
	$(Q)test -x $(BIN)/python || { echo "creating environment $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch $(TORCH), torchvision and build tools"
	$(Q)$(PIP) --upgrade pip "setuptools>=77,<82" wheel
	$(Q)$(PIP) $(CONSTRAINTS) torch===$(TORCH) torchvision pybind11 ninja
# CUTLASS's headers, for Hopper's kernels. With its dependencies, which it needs only in Python: pip reports missing ones.
ifneq ($(shell command -v nvcc)$(CUDA_HOME),)
	@echo "installing CUTLASS $(CUTLASS)"
	$(Q)$(PIP) $(CONSTRAINTS) nvidia-cutlass==$(CUTLASS)
endif
	$(Q)touch $@

$(VENV)/built: $(VENV)/packages $(SOURCES)
ifeq ($(INSTALL),-e .)
	@echo "installing resnet_kernels with its test and lint dependencies"
	$(Q)RESNET_KERNELS_BUILD=none $(PIP) $(CONSTRAINTS) --no-build-isolation -e '.[test,lint]'
	$(Q)$(BIN)/python setup.py --quiet build_ext --inplace
else
	@echo "building and installing resnet_kernels with its test and lint dependencies"
	$(Q)$(PIP) --no-build-isolation '.[test,lint]'
endif
	$(Q)touch $@
