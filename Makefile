# Everything a contributor runs. Each target makes .venv when it is missing.
# A CUDA or CPU build of torch of your choice:  make setup PIP_FLAGS="--extra-index-url …"

PYTHON ?= python3
PIP_FLAGS ?=
BIN = .venv/bin
READY = .venv/.ready

.PHONY: setup demo test test-long check bench bench-quick gpu soak docs clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[dev,bench,hub,cluster]"
	touch $(READY)

demo: $(READY)
	$(BIN)/lookfar study recipes/demo.toml --folder runs/demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not long and not gpu"

test-long: $(READY)
	$(BIN)/python -m pytest -n 2 -m "long and not gpu"

check: $(READY)
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python -m benchmarks --folder results/cpu

bench-quick: $(READY)
	$(BIN)/python -m benchmarks.quick

gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu --folder results/gpu; code=$$?; $(BIN)/python -m pytest -m gpu && exit $$code

soak: $(READY)
	$(BIN)/python tests/soak.py --kills 200

docs: $(READY)
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv build dist runs
