# The whole workflow. `make` alone lists the targets.
#
# run, test, test-fast, bench, sanitize, lint and wheel share one virtual environment, .venv, with the versions of
# constraints.txt. The gpu targets use the PyTorch that PYTHON already has, and no network.
#
#   PYTHON   the interpreter that .venv is made of, or that the gpu targets use
#   TORCH    what pip installs as PyTorch. Without an NVIDIA GPU this is a far smaller download:
#            make run TORCH="torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu"
#   WORKERS  processes that share the tests

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= auto

# For a PyTorch that brings none, as its CPU builds do; the kernels are then interpreted and compiled ahead of time.
TRITON := triton==3.9.0; platform_system == 'Linux' and platform_machine == 'x86_64'

# What Hessians are compared with: the second, and what its import needs of all that it asks for.
HESSIANS := pyhessian curvlinops-for-pytorch einconv einops linear_operator opt_einsum

BIN := $(CURDIR)/.venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
RESULTS := $(CURDIR)/benchmarks/results

# A process per core, each with one thread. (Not in PYTEST_ADDOPTS: some tests start pytest themselves.)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

# ---- set-up ----------------------------------------------------------------------------------------------------------

SOURCES := $(shell find csrc -type f -name '*.cpp' -o -type f -name '*.h')

.venv/.installed: pyproject.toml setup.py constraints.txt $(SOURCES)
	@command -v $(PYTHON) >/dev/null || \
		{ echo "there is no $(PYTHON); install Python >= 3.10, or name it: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "vitfast needs Python >= 3.10, not $$($(PYTHON) -V); name another: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) makes no virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@test -e "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || \
		{ echo "$(PYTHON) lacks its C headers; on Debian and Ubuntu: apt install python3-dev"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
		{ echo "there is no C++ compiler; on Debian and Ubuntu: apt install g++"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "installing $(firstword $(TORCH)), then what is needed beside it, into .venv"
	$(PIP_INSTALL) $(TORCH)
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP_INSTALL) --quiet "$(TRITON)"
	$(PIP_INSTALL) --quiet setuptools ninja pybind11
	$(PIP_INSTALL) --quiet --no-deps timm torchvision kornia kornia_rs
	$(PIP_INSTALL) --quiet --no-deps $(HESSIANS)
	@echo "building vitfast"
	$(PIP_INSTALL) --quiet --no-build-isolation -e ".[dev]"
	@touch $@

# ---- the work --------------------------------------------------------------------------------------------------------

.PHONY: run
run: .venv/.installed ## install, build, train on real images; the result is report/index.html
	$(BIN)/vitfast study --preset quick --out report
	@echo "Open $(CURDIR)/report/index.html in a browser."

.PHONY: test
test: .venv/.installed ## all tests
	$(PYTEST) tests

.PHONY: test-fast
test-fast: .venv/.installed ## the tests without the slow ones
	$(PYTEST) -m "not slow" tests

.PHONY: bench
bench: .venv/.installed ## every operator against PyTorch on this CPU; raw figures in benchmarks/results
	@mkdir -p $(RESULTS)
	$(BIN)/vitfast bench --json $(RESULTS)/cpu.json

.PHONY: bench-models
bench-models: .venv/.installed ## models of timm, torchvision and transformers before and after vitfast.accelerate
	@mkdir -p $(RESULTS)
	$(BIN)/vitfast bench models --json $(RESULTS)/cpu_models.json

.PHONY: lint
lint: .venv/.installed ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: wheel
wheel: .venv/.installed ## a wheel in dist
	rm -rf build/lib.* build/bdist.*
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

# Builds vitfast into build/$(1)/lib, beside the sources rather than among them: tests that are started in that folder
# import what stands there. vitfast.kernels is only found in such a build, its sources are in kernels/.
build_apart = setup.py --quiet build --build-base build/$(1) --build-lib build/$(1)/lib

# Python itself is not instrumented: the runtime libraries are preloaded, and its leaks are not counted. libstdc++ is
# preloaded because AddressSanitizer intercepts exceptions only if it finds them at the start. The tests of
# torch.compile are left out: they call the same kernels, and compile for most of their time.
.PHONY: sanitize
sanitize: .venv/.installed ## the operator tests under AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
	VITFAST_SANITIZE=1 $(BIN)/python $(call build_apart,sanitize)
	cd build/sanitize/lib && \
		LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(PYTEST) -p no:cacheprovider -m "not slow" $(CURDIR)/tests/test_functional.py $(CURDIR)/tests/ops \
		--ignore $(CURDIR)/tests/ops/test_window_attention_compile.py \
		--ignore $(CURDIR)/tests/ops/test_attention_compile.py

# ---- on an NVIDIA GPU ------------------------------------------------------------------------------------------------

GPU_PYTHON = $(abspath $(shell command -v $(PYTHON) 2>/dev/null))
GPU_SECONDS := 540
# The build comes before, and the last case after this.
GPU_BENCH_SECONDS := 420

GPU_PROCESSES = import os, torch; \
	print(max(1, min(len(os.sched_getaffinity(0)), torch.cuda.mem_get_info()[0] // (6 * 2**30))))

.PHONY: gpu
gpu: gpu-test gpu-bench ## gpu-test, then gpu-bench; both use the PyTorch that PYTHON has

.PHONY: gpu-test gpu-bench
gpu-test: ## the tests that need an NVIDIA GPU
gpu-bench: ## the benchmarks there, in bfloat16 and float32; raw figures in benchmarks/results
gpu-test gpu-bench:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		timeout $(GPU_SECONDS) $(MAKE) --no-print-directory on-$@; \
	else \
		echo "$@: $(PYTHON) has no PyTorch that sees a GPU here; nothing was done"; \
	fi

.PHONY: on-gpu-test on-gpu-bench build-for-gpu
# Most of the time goes into compiling Triton kernels, on the CPU: the tests are shared by as many processes as there are
# processors and, with 6 GiB for each, memory of the GPU. What a process has to say comes when it ends.
on-gpu-test: build-for-gpu
	cd build/gpu/lib && count=$$($(GPU_PYTHON) -c "$(GPU_PROCESSES)") && seq 0 $$((count - 1)) | \
		OMP_NUM_THREADS=1 xargs -P $$count -I{} sh -c 'log=tests_{}.log; VITFAST_SHARD={}/$$1 \
		$(GPU_PYTHON) -m pytest -q -p no:cacheprovider -m gpu $(CURDIR)/tests/kernels >$$log 2>&1; \
		status=$$?; cat $$log; exit $$status' shard $$count

on-gpu-bench: build-for-gpu
	@mkdir -p $(RESULTS)
	cd build/gpu/lib && \
		$(GPU_PYTHON) -m vitfast bench --device cuda --dtype bfloat16,float32 --seconds $(GPU_BENCH_SECONDS) \
		--json $(RESULTS)/cuda.json

build-for-gpu:
	VITFAST_CUDA=1 $(PYTHON) $(call build_apart,gpu)

# ---- cleaning up -----------------------------------------------------------------------------------------------------

.PHONY: clean
clean: ## remove what was built and installed, .venv included
	rm -rf .venv build dist report vitfast.egg-info vitfast/_C.*.so vitfast/_cuda.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find vitfast kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
