# Everything here sets itself up: one virtual environment per purpose, installed again only when an input has changed.
#
#   make demo                           ask a LLaVA-IGVA model about a photograph, plain beside fused
#   make demo ARGS="--image cat.jpg"    the same about your photograph; see: igva-kernels demo --help
#   make test                           ruff, mypy and the tests
#   make test-all                       the slow tests too, every instruction set of this CPU, the sanitizers, the CUDA
#                                       module for every architecture, the oldest supported transformers, patching on 4.x,
#                                       and what people run on a Llava: peft, bitsandbytes, torchao, trl, lmms-eval, ...
#   make sanitize                       the CPU kernels under AddressSanitizer and UBSan: their tests and 10,000 random calls
#   make compatibility                  docs/compatibility.md: clients on three models, and which models of transformers
#                                       can be patched, in three versions
#   make machine-code                   docs/machine_code.md: registers, instructions and loads of the GPU kernels; needs
#                                       nvcc, no GPU (5 minutes; ARGS=--gemm: the overlapped GEMM alone, in seconds)
#   make bench                          the benchmark suite on the GPU, or on the CPU if there is none (8 to 10 minutes)
#   make plots                          pictures, benchmarks/RESULTS.md and the README's tables from the CSV files
#   make learn                          train small models on drawn pictures, plain beside fused (about 10 minutes)
#
# Linux without a GPU: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes of CUDA packages.

PYTHON ?= python3
ARGS ?=
OLDEST_TRANSFORMERS := 5.17.0
TRANSFORMERS_4 := 4.57.6

# What tests/clients run on a model, and what lmms-eval imports. All that lmms-eval asks for is 1 GB more, and a
# torchvision, which without its torch, the one for CUDA, breaks every import of transformers.
CLIENTS := bitsandbytes torchao trl datasets onnx onnxscript onnxruntime fastapi uvicorn openai sentencepiece protobuf \
	tiktoken evaluate jsonlines loguru numexpr pytablewriter python-dotenv sacrebleu tenacity

BUILD := pyproject.toml setup.py CMakeLists.txt igva_kernels/version.py $(shell find csrc -type f)
PYTHON_FILES := $(shell find igva_kernels -name '*.py' -o -name '*.json' -not -name build_info.json)
TEST := .venv-test/bin
# The CUDA module compiles for minutes, which a machine without a GPU need not wait for: its sources are compiled by
# their tests, for one architecture in `make test` and for all of them in `make test-all`.
NO_CUDA := $(if $(shell command -v nvidia-smi),,IGVA_KERNELS_SKIP_CUDA=1)

# Two processes, because a test waits for compilers and for Python more than it computes. The one that is done first
# takes tests from the other, so that neither is left with a long file.
PARALLEL := -n 2 --dist worksteal

# Where the kernels are tested, and what a version of transformers can break.
KERNEL_TESTS := tests/ops tests/runtime
CLIENT_TESTS := tests/clients
EVERY_VERSION := $(CLIENT_TESTS)/test_transformers.py
MODEL_TESTS := tests/models tests/integrations tests/training tests/package/test_demo.py $(EVERY_VERSION)
CPU_KERNEL_TESTS := tests/ops/weighted_mix/test_cpu.py tests/ops/inject_tokens/test_cpu.py \
	tests/ops/deform_attn/test_cpu.py tests/runtime/test_cpu_dense.py tests/runtime/test_products.py tests/runtime/test_native.py

# Every step says what runs and how long it took; the summary finds its steps by the time at which this make started.
export MAKE_STARTED := $(shell date +%s)
export MAKE_GOAL := $(MAKECMDGOALS)
STEPS := @$(PYTHON) tools/steps.py
RUN := $(STEPS) run

.PHONY: demo test test-all isas sanitize compatibility machine-code lint bench plots learn clean

demo: .venv-demo/installed
	$(RUN) "demo" -- .venv-demo/bin/igva-kernels demo $(ARGS)
	$(STEPS) summary

test: lint
	$(RUN) "Triton kernels, interpreted" -- env TRITON_INTERPRET=1 $(TEST)/pytest $(PARALLEL) -m "not slow" \
		$(KERNEL_TESTS) $(ARGS)
	$(RUN) "tests" -- $(TEST)/pytest $(PARALLEL) -m "not slow and not gpu" --ignore $(CLIENT_TESTS) $(ARGS)
	$(STEPS) summary

test-all: test isas sanitize .venv-oldest/installed .venv-transformers4/installed .venv-clients/installed
	$(RUN) "Triton kernels, interpreted, slow" -- env TRITON_INTERPRET=1 $(TEST)/pytest $(PARALLEL) -m slow \
		$(KERNEL_TESTS) $(ARGS)
	$(RUN) "slow tests" -- $(TEST)/pytest $(PARALLEL) -m "slow and not gpu" --ignore $(CLIENT_TESTS) $(ARGS)
	$(RUN) "clients" -- .venv-clients/bin/python -m pytest $(PARALLEL) -m "not gpu" $(CLIENT_TESTS) $(ARGS)
	$(RUN) "transformers $(OLDEST_TRANSFORMERS)" -- .venv-oldest/bin/python -m pytest $(PARALLEL) -m "not slow and not gpu" \
		$(MODEL_TESTS) $(ARGS)
	$(RUN) "transformers $(TRANSFORMERS_4)" -- .venv-transformers4/bin/python -m pytest $(PARALLEL) \
		tests/integrations/test_patch_transformers.py tests/integrations/test_patch_deepstack.py \
		tests/integrations/test_patch_deformable.py $(EVERY_VERSION) $(ARGS)
	$(STEPS) summary

# Every instruction set of this CPU below the best one, which `make test` uses; tests/conftest.py restricts torch's
# libraries to the same.
CPU_TESTS := tests/ops/test_every_operator.py tests/ops/weighted_mix/test_api.py tests/ops/weighted_mix/test_strides.py \
	tests/nn $(CPU_KERNEL_TESTS)
isas: .venv-test/installed
	@for isa in $$($(TEST)/python -c "from igva_kernels.runtime import native; print(*native.load()[0].isas()[:-1])"); do \
		$(PYTHON) tools/steps.py run "CPU tests on $$isa" -- env IGVA_KERNELS_CPU_ISA=$$isa \
			$(TEST)/pytest $(PARALLEL) -m "not slow and not gpu" $(CPU_TESTS) $(ARGS) || exit; \
	done

# Python is not built with the sanitizers, so their runtimes are loaded before it. Leaks are not looked for, because
# Python and torch leave some memory unfreed. Tests of time and memory are left out: they would measure the sanitizers.
SANITIZED := build/sanitize/site
SANITIZE = LD_PRELOAD="$$(ldd $(SANITIZED)/igva_kernels/_native*.so | grep -oE '/\S*lib(asan|ubsan|stdc)\S*' | tr '\n' ' ')" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 IGVA_KERNELS_SANITIZE=1 PYTHONPATH=$(CURDIR)/$(SANITIZED)

sanitize: .venv-test/installed $(SANITIZED)/installed
	$(RUN) "random calls, sanitized" -- env $(SANITIZE) $(TEST)/python tests/helpers/fuzz_cpu.py --calls 10000 --processes 2
	$(RUN) "CPU tests, sanitized" -- env $(SANITIZE) $(TEST)/pytest $(PARALLEL) -o pythonpath=tests/helpers --capture=sys \
		-m "not plain_memory and not slow" $(CPU_KERNEL_TESTS) tests/ops/weighted_mix/test_strides.py

$(SANITIZED)/installed: $(BUILD) $(PYTHON_FILES) .venv-test/installed
	$(RUN) "compiling with sanitizers" -- env IGVA_KERNELS_SANITIZE=1 \
		$(TEST)/python -m pip install --quiet --no-deps --upgrade --target $(SANITIZED) .
	touch $@

compatibility: .venv-test/installed .venv-oldest/installed .venv-transformers4/installed .venv-clients/installed
	$(TEST)/python tests/helpers/compatibility.py $(TEST)/python .venv-oldest/bin/python .venv-transformers4/bin/python \
		--clients .venv-clients/bin/python

machine-code: .venv-test/installed
	$(TEST)/python tests/helpers/machine_code.py $(ARGS)

lint: .venv-test/installed
	$(RUN) "ruff" -- $(TEST)/ruff check .
	$(RUN) "ruff format" -- $(TEST)/ruff format --check .
	$(RUN) "mypy" -- $(TEST)/mypy

bench: .venv-test/installed
	$(TEST)/python -m benchmarks --plots $(ARGS)

plots: .venv-test/installed
	$(TEST)/python -m benchmarks --suite none --plots

learn: .venv-test/installed
	$(TEST)/python examples/learn_shapes.py $(ARGS)

clean:
	rm -rf .venv-demo .venv-test .venv-oldest .venv-transformers4 .venv-clients

# --megabytes: to download and on disk, with torch for CPUs.
.venv-test/installed: constraints.txt $(BUILD)
	@$(NO_CUDA) $(PYTHON) tools/steps.py install .venv-test test --editable --megabytes 670 2400
	@touch $@

.venv-demo/installed: constraints.txt $(BUILD) $(PYTHON_FILES)
	@$(NO_CUDA) $(PYTHON) tools/steps.py install .venv-demo demo --megabytes 630 2200
	@touch $@

# The next three environments find all of .venv-test below them, the kernels too.
.venv-oldest/installed: .venv-test/installed
	$(STEPS) layer .venv-oldest .venv-test transformers==$(OLDEST_TRANSFORMERS) --free transformers huggingface_hub
	@touch $@

# Patching needs neither transformers 5, as the reference model does, nor sentence-transformers, which pip misses here.
.venv-transformers4/installed: .venv-test/installed
	$(STEPS) layer .venv-transformers4 .venv-test transformers==$(TRANSFORMERS_4) \
		--free transformers huggingface_hub tokenizers
	@touch $@

.venv-clients/installed: .venv-test/installed
	$(STEPS) layer .venv-clients .venv-test $(CLIENTS) --bare lmms-eval --megabytes 700
	@touch $@
