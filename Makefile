# `make demo` and `make test` are all a fresh machine needs: each makes the virtual environment and builds the package.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test gpu-test wheel-test gpu-sim sanitize lint format bench clean

demo: $(VENV)/.installed
	$(BIN)/vgg-fast demo

# Two workers, as most tests keep one core busy; they take whole files, the longest first (tests/conftest.py).
test: $(VENV)/.installed
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

# On a machine with a GPU: the tests, compute-sanitizer over those of its kernels, vgg-fast verify and bench. Reports go
# to build/.
gpu-test: $(VENV)/.installed
	$(BIN)/python -m tests.run_on_gpu

# sdist and wheel with both libraries, installed next to this environment's PyTorch, under the CPU tests; and next to
# another one as well: make wheel-test TORCH=2.14.1 (a CUDA build takes 6 GB for as long as it runs).
wheel-test: $(VENV)/.installed
	$(BIN)/python -m tests.wheel $(addprefix --torch ,$(TORCH))

# A whole VGG16 forward on the virtual GPU (tests/virtual_gpu), every layer checked; the tests run small shapes of it.
gpu-sim: $(VENV)/.installed
	$(BIN)/python -m tests.virtual_gpu.vgg16

# The library once more, in a folder of its own, built to stop at the first wrong access or undefined operation, under
# the tests that call it most directly; then csrc/cpu under ThreadSanitizer (its tests are in test_sanitize.py). The other
# tests add Python around the same calls, and processes that do not inherit the sanitizer. Needs gcc's sanitizers.
SANITIZED := $(addprefix tests/test_,sanitize.py guard_pages.py conv3x3.py winograd.py conv_stack.py conv_stack_backward.py ops.py linear.py weight_grad.py batch_norm_ops.py training.py denormals.py properties.py sizes.py concurrency.py)
# For these two commands only: exported to the target, it would also reach the ordinary installation it depends on.
SANITIZE := VGG_FAST_SANITIZE=address,undefined VGG_FAST_CUDA=0
SANITIZER = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))
sanitize: $(VENV)/.installed
	rm -rf build/sanitize/lib
	$(SANITIZE) $(BIN)/python setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize/lib
	$(SANITIZE) LD_PRELOAD="$(SANITIZER)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		PYTHONPATH=$(CURDIR)/build/sanitize/lib $(BIN)/pytest -o pythonpath= $(SANITIZED)

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
