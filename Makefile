# `make demo` runs the main job on the bundled model, `make test` the checks. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Short spins before a thread sleeps: with OpenMP's default, threads on a busy machine burn their time
# waiting for one whose core another process holds.
export GOMP_SPINCOUNT ?= 10000

.PHONY: demo test slow web clean

$(VENV)/installed: requirements.txt requirements-dev.txt requirements-export.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -r requirements.txt -r requirements-dev.txt
	touch $@

demo: $(VENV)/installed
	$(BIN)/python demo.py

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --dist loadfile --cov --cov-report=term

slow: $(VENV)/installed
	$(BIN)/pytest -m slow

# The bundled models in the browser; needs npm too.
web: $(VENV)/installed
	$(BIN)/python -m web.build

# What has been trained, in runs/, stays.
clean:
	rm -rf demo web/dist web/node_modules
