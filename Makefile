# `make demo` and `make test` are all a fresh machine needs: each makes the virtual environment and builds the package.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test lint format bench clean

demo: $(VENV)/.installed
	$(BIN)/vgg-fast demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(VENV)/.installed
	mkdir -p build
	$(BIN)/python -m pytest benchmarks/bench_conv3x3.py benchmarks/bench_vgg16.py --benchmark-sort=min \
		--benchmark-columns=min,median,iqr,rounds --benchmark-json=build/benchmarks.json --csv=build/benchmarks.csv

# Two stamps, so that an edit of the C++ does not install the whole environment again.
$(VENV)/.environment: requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "vgg-fast needs Python 3.10 or newer, $(PYTHON) is %d.%d: run make PYTHON=python3.x" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

$(VENV)/.installed: $(VENV)/.environment setup.py pyproject.toml $(CXX_SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info vgg_fast/*.so vgg_fast/_build_info.json
