# make demo   install into .venv, make a data set of shapes, train a detector on it, show what it detects
# make test   run all tests
# make lint   check style, types, and that the pinned versions fit together on each Python

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
	for version in 3.10 3.11 3.12 3.13; do $(BIN)/uv pip compile --quiet --no-header --output-file /dev/null \
		--extra dev --constraints constraints.txt --python-version $$version --python-platform linux pyproject.toml \
		|| exit 1; done

$(SHAPES): | $(INSTALLED)
	$(BIN)/python -m raydet.data.synthetic data/shapes

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "raydet needs Python 3.10 or later: make PYTHON=/path/to/python3.x")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[dev]' -c constraints.txt
	@touch $@
