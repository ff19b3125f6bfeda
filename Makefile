# Every target runs with python3 as it is where that has what the target needs, else with .venv,
# which is made on first use (tools/python_for.sh). PYTHON=... names another. ARGS=... goes to the
# command: make demo ARGS=--no-bench, make gpu-bench ARGS="--suite core".
.DEFAULT_GOAL := help
.PHONY: help demo build test gpu-test gpu-sanitize gpu-bench lint format clean
SHELL := /bin/bash
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export PYTHON
ARGS ?=

# $(call python_with,MODULES): sets $$py to a Python that has them, and shows the commands after it.
python_with = py=$$(tools/python_for.sh $(1)) && set -x
CHECKERS := torch ruff== mypy== clang-format==
CSRC = $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu)
BUILDERS := setuptools pybind11 cmake ninja
IN_PARALLEL := -n auto --maxprocesses 8 -p no:benchmark
# The CUDA kernels into crate_kernels/, where there is nvcc; setup.py says so where there is not.
BUILD_DIR = build/$$($$py -c 'import sys; print(sys.implementation.cache_tag)')
BUILD = $$py setup.py build_ext --inplace --build-temp $(BUILD_DIR)

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: ## build, swap, check, train on real images, compare speeds (CPU or GPU)
	@$(call python_with,torch numpy sklearn matplotlib tqdm) && \
	$$py -m crate_kernels demo $(ARGS)

build: ## compile the CUDA kernels for this checkout (needs nvcc)
	@$(call python_with,$(BUILDERS)) && $(BUILD)

test: ## every test that needs no GPU
	@$(call python_with,torch triton numpy einops sklearn matplotlib tqdm pytest xdist $(BUILDERS)) && \
	export OMP_NUM_THREADS=1 && \
	TRITON_INTERPRET=1 $$py -m pytest $(IN_PARALLEL) tests/interpreter -q $(ARGS) && \
	$$py -m pytest $(IN_PARALLEL) tests -m "not gpu" --ignore=tests/interpreter $(ARGS)

gpu-test: ## the tests that need a CUDA device
	@$(call python_with,torch triton numpy pytest $(BUILDERS)) && \
	$$py -c 'import torch; torch.cuda.is_available() or exit("gpu-test: no CUDA device here")' && \
	$(BUILD) && \
	$$py -m pytest tests/gpu -q $(ARGS)

gpu-sanitize: ## the C++ test of the CUDA kernels under compute-sanitizer
	@$(call python_with,$(BUILDERS)) && $(BUILD) && \
	for tool in memcheck racecheck; do \
		compute-sanitizer --tool $$tool --error-exitcode 1 $(BUILD_DIR)/smoke_test || exit; \
	done

gpu-bench: ## all benchmarks, into docs/results
	@$(call python_with,torch triton matplotlib $(BUILDERS)) && \
	$$py -c 'import torch; torch.cuda.is_available() or exit("gpu-bench: no CUDA device here")' && \
	$(BUILD) && \
	$$py -m crate_kernels bench --suite all --out docs/results $(ARGS)

lint: ## style, types, formatting
	@$(call python_with,$(CHECKERS)) && \
	$$py -m ruff check && \
	$$py -m ruff format --check && \
	$$py -m mypy $(if $(CSRC),&& $$(dirname $$py)/clang-format --dry-run -Werror $(CSRC))

format: ## put the code into the shape that lint wants
	@$(call python_with,$(CHECKERS)) && \
	$$py -m ruff check --fix && \
	$$py -m ruff format $(if $(CSRC),&& $$(dirname $$py)/clang-format -i $(CSRC))

clean: ## remove what the other targets made, .venv included
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .benchmarks build dist demo_output train_output *.egg-info
	rm -f crate_kernels/_cuda*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
