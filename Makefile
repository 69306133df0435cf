# make demo   venv, install, and the main job on the embedded model (ARGS=--once ends by itself)
# make test   venv, everything the tests need, then the tests (ARGS="-k guard" to choose)
# make image-test   builds the image with buildah and runs it; as root
# make docs-pictures   the pictures in docs/pictures, from a real run
# make lint   ruff, bandit        make types   mypy          make check   lint, types and tests

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --constraint constraints.txt
ARGS   ?=

.PHONY: demo test image-test docs-pictures lint types format check install clean

demo: $(VENV)/.demo
	$(BIN)/guardserve demo $(ARGS)

# one thread each: torch's and numpy's pools would wait for each other on a small machine
test: $(VENV)/.test
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

image-test: $(VENV)/.test
	$(BIN)/python -m pytest -m image tests/test_image.py $(ARGS)

docs-pictures: $(VENV)/.test
	$(PIP) --group docs
	$(BIN)/python docs/pictures/make.py
	$(BIN)/python docs/pictures/detection.py

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit --quiet --recursive guardserve

types: $(VENV)/.lint $(VENV)/.test
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint types test

install: $(VENV)/.demo

# pip 25.1 is the first that reads dependency groups
$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	$(PIP) 'pip>=25.1'
	touch $@

$(VENV)/.demo: $(VENV)/.venv pyproject.toml setup.py $(wildcard native/*) constraints.txt
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --group test
	$(PIP) --no-deps --group materials
	touch $@

$(VENV)/.lint: $(VENV)/.venv pyproject.toml constraints.txt
	$(PIP) --group lint
	touch $@

clean:
	rm -rf $(VENV) build dist guardserve/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
