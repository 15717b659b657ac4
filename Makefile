# make demo   install into .venv and run the default study (about a minute on two CPU cores)
# make test   install with the development tools and run the tests (about ten minutes on two CPU cores)
# make slow   run the tests that make test leaves out because each takes tens of seconds
# make lint   formatting, lint and types
# make board  TensorBoard over the runs, means over seeds first; prints the address to open
# make notebook  run the walk through a study in Python; results go to build/walkthrough/
# make docs   build the API reference in build/reference/
# make clean  remove .venv and what the tools leave behind; runs and store stay

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test slow lint board notebook docs clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' $(MAKEFILE_LIST)

demo: $(VENV)/installed
	@echo "The default study: ResNet-20 on handwritten digits, L1-norm pruning. Results go to runs/ and store/."
	$(BIN)/python -m rethink_prune

test: $(VENV)/installed-dev
	@echo "Running the tests; they need no data and no GPU."
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

board: $(VENV)/installed
	$(BIN)/python -m rethink_prune.board runs

# The copy is run where it lies: its runs and its store lie beside it.
notebook: $(VENV)/installed-dev
	mkdir -p build/walkthrough
	cp experiments/walkthrough/walkthrough.ipynb build/walkthrough/
	$(BIN)/jupyter-execute --inplace build/walkthrough/walkthrough.ipynb
	@echo "Open build/walkthrough/walkthrough.ipynb in Jupyter or an editor."

docs: $(VENV)/installed-dev
	$(BIN)/python scripts/reference.py --out build/reference

# The environment is installed again only when the dependencies change: the package itself is installed in place, so a
# change of its code needs nothing. Python stands after the bar, because a newer interpreter alone is no reason either.
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing rethink-prune into $(VENV) (PyTorch is large: this takes a few minutes the first time)."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "Installing the development tools."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,launchers,ray,onnx,wandb,trackio,mlflow,hub,neighbours]"
	@touch $@

# Checked first: an older Python would fail much later, with an error that does not name the reason.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make demo PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
