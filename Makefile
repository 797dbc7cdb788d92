# Everything here sets itself up: a virtual environment a purpose, installed again only when an input has changed.
#
#   make demo                           a LLaVA-IGVA model about a photograph, plain beside fused
#   make demo ARGS="--image cat.jpg"    the same about yours; see: igva-kernels demo --help
#   make test                           ruff, mypy and the tests
#   make test-all                       the slow tests too, the oldest transformers that is supported, and patching on 4.x
#   make sanitize                       the CPU kernels under AddressSanitizer and UBSan: their tests, and 10,000 random calls
#   make compatibility                  docs/compatibility.md: which transformers models can be patched, in three versions
#   make bench                          the benchmark suite on this CPU, or on its GPU (8 to 10 minutes); pictures
#   make plots                          pictures, benchmarks/RESULTS.md and the README's table from the CSV files
#   make learn                          small models learn from drawn pictures, plain beside fused (about 10 minutes)
#
# Linux without a GPU: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes of CUDA packages.

PYTHON ?= python3
ARGS ?=
OLDEST_TRANSFORMERS := 5.17.0
TRANSFORMERS_4 := 4.57.6

BUILD := pyproject.toml setup.py CMakeLists.txt igva_kernels/version.py $(shell find csrc -type f)
PYTHON_FILES := $(shell find igva_kernels -name '*.py' -o -name '*.json' -not -name build_info.json)
TEST := .venv-test/bin
# The CUDA module compiles for minutes, which a machine without a GPU need not wait for.
NO_CUDA := $(if $(shell command -v nvidia-smi),,IGVA_KERNELS_SKIP_CUDA=1)

# Two processes: a test waits for compilers and for Python more than it computes.
PARALLEL := -n 2 --dist loadfile

.PHONY: demo test test-all sanitize compatibility lint bench plots learn clean

demo: .venv-demo/installed
	.venv-demo/bin/igva-kernels demo $(ARGS)

test: lint
	TRITON_INTERPRET=1 $(TEST)/pytest $(PARALLEL) tests/triton_interpreter $(ARGS)
	$(TEST)/pytest $(PARALLEL) -m "not slow and not gpu" $(ARGS)

test-all: test sanitize .venv-oldest/installed .venv-transformers4/installed
	$(TEST)/pytest $(PARALLEL) -m "slow and not gpu" $(ARGS)
	.venv-oldest/bin/pytest $(PARALLEL) -m "not gpu" -k "model or patch or demo or training" $(ARGS)
	.venv-transformers4/bin/pytest tests/test_patch_transformers.py $(ARGS)

# Python is not built for the sanitizers, so their runtimes come first; what it and torch never free is not ours. Tests of
# time and memory measure the sanitizers.
SANITIZED := build/sanitize/site
SANITIZE = LD_PRELOAD="$$(ldd $(SANITIZED)/igva_kernels/_native*.so | grep -oE '/\S*lib(asan|ubsan|stdc)\S*' | tr '\n' ' ')" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 IGVA_KERNELS_SANITIZE=1 PYTHONPATH=$(CURDIR)/$(SANITIZED)

sanitize: .venv-test/installed $(SANITIZED)/installed
	$(SANITIZE) $(TEST)/python tests/fuzz_cpu.py --calls 10000 --processes 2
	$(SANITIZE) $(TEST)/pytest $(PARALLEL) -o pythonpath= --capture=sys -m "not plain_memory" tests/test_cpu_backend.py tests/test_strides.py

$(SANITIZED)/installed: $(BUILD) $(PYTHON_FILES) .venv-test/installed
	IGVA_KERNELS_SANITIZE=1 $(TEST)/python -m pip install --quiet --no-deps --upgrade --target $(SANITIZED) .
	touch $@

compatibility: .venv-test/installed .venv-oldest/installed .venv-transformers4/installed
	$(TEST)/python tests/compatibility.py $(TEST)/python .venv-oldest/bin/python .venv-transformers4/bin/python

lint: .venv-test/installed
	$(TEST)/ruff check .
	$(TEST)/ruff format --check .
	$(TEST)/mypy

bench: .venv-test/installed
	$(TEST)/python -m benchmarks --plots $(ARGS)

plots: .venv-test/installed
	$(TEST)/python -m benchmarks --suite none --plots

learn: .venv-test/installed
	$(TEST)/python examples/learn_shapes.py $(ARGS)

clean:
	rm -rf .venv-demo .venv-test .venv-oldest .venv-transformers4

.venv-test/installed: constraints.txt $(BUILD)
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

.venv-demo/installed: constraints.txt $(BUILD) $(PYTHON_FILES)
	$(PYTHON) -m venv .venv-demo
	$(NO_CUDA) .venv-demo/bin/python -m pip install --quiet -c constraints.txt ".[demo]"
	touch $@

.venv-oldest/installed: constraints.txt $(BUILD) $(PYTHON_FILES)
	$(PYTHON) -m venv .venv-oldest
	grep -vE '^(transformers|huggingface_hub)==' constraints.txt > .venv-oldest/constraints.txt
	$(NO_CUDA) .venv-oldest/bin/python -m pip install --quiet -c .venv-oldest/constraints.txt \
		".[test]" transformers==$(OLDEST_TRANSFORMERS)
	touch $@

# The reference model needs transformers 5; patching does not.
.venv-transformers4/installed: constraints.txt $(BUILD) $(PYTHON_FILES)
	$(PYTHON) -m venv .venv-transformers4
	grep -vE '^(transformers|huggingface_hub|tokenizers)==' constraints.txt > .venv-transformers4/constraints.txt
	$(NO_CUDA) .venv-transformers4/bin/python -m pip install --quiet -c .venv-transformers4/constraints.txt \
		. transformers==$(TRANSFORMERS_4) accelerate peft pytest pillow
	touch $@
