# make demo | make test | make bench: each works alone on a fresh clone and is quick from then on.
#
# They install the versions of constraints.txt into .venv and compile csrc/ in place. On a machine
# with its own torch (a CUDA build, say), name its interpreter to use it as it is, with nothing
# installed: make test PYTHON=python3
# AUTOFOCUS_BUILD (see setup.py) says which libraries are compiled.
# make compat, the step before a release, does the same for the oldest and the newest torch: gigabytes and an hour.

AUTOFOCUS_BUILD ?= auto
export AUTOFOCUS_BUILD

ifdef PYTHON
export PYTHONPATH := $(CURDIR):$(PYTHONPATH)
else
PYTHON := .venv/bin/python
INSTALLED := .venv/.installed
endif
# One stamp at a time: another interpreter or another AUTOFOCUS_BUILD builds anew. Where a name such as python3 leads
# says which interpreter it is.
BUILT := build/.built-$(shell { command -v $(PYTHON) || echo $(PYTHON); } | tr '/ ' '--')-$(AUTOFOCUS_BUILD)

.PHONY: demo test bench compat clean

demo: $(BUILT)
	$(PYTHON) -m examples.demo

# Two files of tests at a time, where pytest-xdist is installed, in the order of tests/conftest.py.
test: $(BUILT)
	$(PYTHON) -m pytest tests $$($(PYTHON) -c "import xdist; print('-n 2 --dist loadfile --no-loadscope-reorder')" 2>/dev/null)

bench: $(BUILT)
	$(PYTHON) -m benchmarks.run

compat:
	python3 .ci/compat.py

$(BUILT): setup.py $(shell find csrc -type f -not -path '*/__pycache__/*') $(INSTALLED)
	$(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m autofocus_kernels
	mkdir -p build && rm -f build/.built-*
	touch $@

# The package is installed in editable mode without its libraries: the rule above compiles them in
# place, and only the files that changed. A CUDA build of torch brings its own Triton.
.venv/.installed: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/pip install -c constraints.txt torch numpy setuptools ninja
	.venv/bin/python -c "import triton" 2>/dev/null \
	    || .venv/bin/pip install "triton==3.6.0; platform_system == 'Linux'"
	AUTOFOCUS_BUILD=none .venv/bin/pip install -c constraints.txt --no-build-isolation -e '.[dev]'
# MONAI and nnU-Net's networks, for the tests: of what they require, torchvision among it, the tests use nothing but torch.
	.venv/bin/pip install -c constraints.txt --no-deps dynamic_network_architectures monai
	touch $@

# In build/ also lie measurements and trained runs, which took up to hours: only what is built goes.
clean:
	rm -rf build/lib* build/temp* build/bdist* build/cross build/probes build/compat build/newest build/mypy build/.built-*
	rm -rf dist demo *.egg-info autofocus_kernels/_build.json autofocus_kernels/*.so
