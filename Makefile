# Every target sets up all that it needs in a virtual environment: Python >= 3.10, make and a C++ compiler suffice.
#   make demo        a pretrained BERT and a training run, stock against ours  (DEMO_ARGS=--quick: in short)
#   make examples    trains, tests and times the four applications of examples/ (EXAMPLES_ARGS=--quick: in short)
#   make test        the test suite, on several processes    (TEST_ARGS="-k dropout -x"; -n0: on one, as --pdb needs)
#   make dev         everything a developer needs; clangd finds build/compile_commands.json
#   make lint        formatters and linters, changing nothing;  make format: let them change files
#   make bench       the benchmarks                                              (BENCH_ARGS=...)
#   make sweep       every model type of transformers, small: stock against ours  (SWEEP_ARGS="bloom gpt2": these)
#   make sanitize    the quicker tests under the address and undefined-behaviour sanitizers
#   make cuda        compiles the CUDA kernels too, without a GPU, and tests that build; needs a CUDA toolkit
#   make aarch64     compiles for aarch64 on another machine and runs the tests in an emulator; half an hour and more
#   make gpu-check   on a machine with a GPU, with the Python that has torch: build, tests, sanitizer, benchmark
#   make clean       removes what was built; the virtual environment stays
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.11,<2.14

BIN = $(VENV)/bin
PIP = $(BIN)/pip install --quiet --disable-pip-version-check
# A Python that has a torch lends it to the virtual environment, so that nothing large is downloaded.
LEND = $(shell $(PYTHON) -c 'import sys, torch; print("--system-site-packages" * (sys.prefix == sys.base_prefix))' 2>/dev/null)

# Tests share the cores; threads that wait must not hold one, since another process may have work for it.
PYTEST = OMP_WAIT_POLICY=passive $(abspath $(BIN))/python -m pytest -n auto --maxprocesses 4 --dist worksteal

demo: $(VENV)/demo.stamp build
	$(BIN)/python -m tformer_ext demo $(DEMO_ARGS)

examples: $(VENV)/examples.stamp build
	for name in simple_transformer translation summarization question_answering; do \
	  $(BIN)/python examples/$$name.py $(EXAMPLES_ARGS) || exit 1; done

test: $(VENV)/test.stamp build
	$(PYTEST) $(TEST_ARGS)

bench: $(VENV)/demo.stamp build
	$(BIN)/python -m tformer_ext bench $(BENCH_ARGS)

sweep: $(VENV)/test.stamp build
	$(BIN)/python tests/transformers_sweep.py $(SWEEP_ARGS)

dev: $(VENV)/test.stamp $(VENV)/demo.stamp $(VENV)/dev.stamp build

LINTED_CPP = $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(LINTED_CPP)

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(LINTED_CPP)

# build/NAME: Python files and tests beside a module of their own, so that the one in use is not touched.
COPY = rm -rf build/$(1) && mkdir -p build/$(1) && cp -a pyproject.toml tformer_ext tests build/$(1) && \
  rm -f build/$(1)/tformer_ext/*.so

sanitize: $(VENV)/test.stamp
	$(call COPY,sanitize)
	TFORMER_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build_ext --build-lib build/sanitize
	cd build/sanitize && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  $(PYTEST) -m "not slow" $(addprefix --ignore tests/,test_build.py test_style.py test_readme.py test_bench.py test_bench_weather.py test_demo.py test_examples.py) --ignore-glob "tests/test_distributed*" $(TEST_ARGS)

# The tests are those that could tell a difference without a GPU. What compilers say of the kernels for sm_90a is for
# test_hopper_code.py, so these are compiled each time.
CUDA_HOME ?= /usr/local/cuda
cuda: $(VENV)/test.stamp $(VENV)/cuda.stamp
	@if [ -x $(CUDA_HOME)/bin/nvcc ]; then $(MAKE) --no-print-directory cuda-build; \
	else echo "no CUDA toolkit at CUDA_HOME=$(CUDA_HOME): the CUDA kernels are not compiled"; fi

cuda-build:
	$(call COPY,cuda)
	rm -rf build/*/cuda/sm_90a
	@echo "compiling for minutes, compilers write to build/cuda/nvcc.txt"
	@if ! CUDA_HOME=$(CUDA_HOME) TFORMER_CUDA=1 NVCC_APPEND_FLAGS=-Xptxas=-v $(BIN)/python setup.py --quiet \
	  build_ext --build-lib build/cuda > build/cuda/nvcc.txt 2>&1; then tail -n 100 build/cuda/nvcc.txt; exit 1; fi
	cd build/cuda && $(PYTEST) -q $(addprefix tests/,test_build.py test_info.py test_errors.py test_hopper_code.py) $(TEST_ARGS)

aarch64: $(VENV)/test.stamp
	$(BIN)/python tests/aarch64.py $(TEST_ARGS)

gpu-check:
	$(PYTHON) tests/gpu_check.py $(GPU_CHECK_ARGS)

clean:
	rm -rf build dist *.egg-info tformer_ext/*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Compiles what changed, into the source tree, where the editable installation finds it.
build: $(VENV)/torch.stamp
	$(BIN)/python setup.py --quiet build_ext --inplace

# torch comes first and alone: what depends on it would otherwise bring the newest, with gigabytes of CUDA.
$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(LEND) $(VENV)
	$(PIP) "pip>=23"
	$(PIP) "$(TORCH)"
	$(PIP) "setuptools>=77" pybind11 ninja
	touch $@

# One stamp per extra of pyproject.toml; the first one made also installs the package itself, editable.
$(VENV)/%.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) --no-build-isolation --editable ".[$*]"
	touch $@

.PHONY: demo examples test bench sweep dev lint format sanitize cuda cuda-build aarch64 gpu-check clean build
.NOTPARALLEL:
