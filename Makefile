# make demo   install into .venv, make a data set of shapes, train a detector on it, show what it detects
# make test   run all tests
# make lint   check style and types

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
SHAPES := data/shapes/annotations/instances_val.json

.PHONY: demo test lint

demo: $(INSTALLED) $(SHAPES)
	$(BIN)/raydet train demo

# Two files at a time, each with one thread; those of Ray have all of the machine.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile tests/gpu tests/parity tests/unit
	$(BIN)/pytest tests/ray

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(SHAPES): | $(INSTALLED)
	$(BIN)/python -m raydet.data.synthetic data/shapes

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "raydet needs Python 3.10 or later: make PYTHON=/path/to/python3.x")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[dev]' -c constraints.txt
	@touch $@
