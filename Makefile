VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test check clean

demo: $(INSTALLED)
	$(BIN)/kinegraph demo

# Two workers with one thread each: threads that wait for each other cost more than they bring on two cores.
# No new worker for one that dies: pytest-xdist then waits for ever at the end.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --max-worker-restart 0

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

KERNELS := setup.py $(wildcard src/kinegraph/native/source/*)

# The native kernels need a C compiler and Python's headers; without them Kinegraph installs all the same, and is slower.
# torch first and alone, held by the constraints file: any other choice pulls gigabytes of CUDA packages.
$(INSTALLED): pyproject.toml constraints.txt $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) kinegraph-demo
