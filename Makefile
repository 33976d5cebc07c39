# Every command a person or CI needs. `demo` and `test` set up their own environment.

PYTHON ?= python3
# Without a GPU, `make demo TORCH=cpu` takes PyTorch's CPU wheels and saves gigabytes.
TORCH ?= default
PIP_ARGS ?=
ifeq ($(TORCH),cpu)
PIP_ARGS += --extra-index-url https://download.pytorch.org/whl/cpu
endif
DEMO_OUTPUT ?= outputs/demo
ARGS ?=
# Of pyproject.toml; `flash` where there is an NVIDIA GPU.
EXTRAS ?= dev $(if $(shell command -v nvidia-smi),flash)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test chaos test-unit test-gpu test-multi-gpu bench check format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 18

setup: $(STAMP) ## make .venv with everything pinned in constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed, got " + sys.version.split()[0] + "; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *(r for extra in sys.argv[1:] for r in p["optional-dependencies"][extra]), sep="\n")' $(EXTRAS) > $(VENV)/requirements.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -r $(VENV)/requirements.txt
	@touch $(STAMP)

demo: setup ## render the sample manifest with the nano model on this machine, on a local Ray
	$(BIN)/python -m jobs.render output=$(DEMO_OUTPUT) cluster=local $(ARGS)

# Without GPUs and long waits. No test chosen by ARGS (exit 5) is no failure.
HERE = not multi_gpu and not long
OR_NONE = $(ARGS) || [ $$? -eq 5 ]

# Fast tests first; what starts processes of its own, two at a time; what starts a Ray, or kills and times, alone.
test: setup ## run the whole CPU test suite, fast tests first
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/test_architecture.py tests/test_fixtures.py tests/unit tests/storage tests/simulation tests/kernels tests/model tests/engine -m "$(HERE)" $(OR_NONE)
	$(BIN)/python -m pytest -n auto tests/end_to_end -m "$(HERE) and not ray" $(OR_NONE)
	$(BIN)/python -m pytest tests/distributed tests/scale tests/cluster tests/chaos tests/submit -m "$(HERE)" $(OR_NONE)
	$(BIN)/python -m pytest tests/end_to_end -m "$(HERE) and ray" $(OR_NONE)

chaos: setup ## kills, hangs, poison, storage faults in full (an hour); adds to tests/bench/results/chaos.jsonl; CHAOS_SEED picks the moments
	CHAOS_KEEP=1 $(BIN)/python -m pytest -m long tests/chaos tests/end_to_end/test_ray_kills.py tests/simulation tests/scale $(ARGS)

test-unit: setup ## run the unit tests only
	$(BIN)/python -m pytest tests/test_architecture.py tests/unit $(ARGS)

test-gpu: setup ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu tests $(ARGS)

test-multi-gpu: setup ## run the tests that need one GPU or several of one host
	$(BIN)/python -m pytest -m "gpu or multi_gpu" tests $(ARGS)

# One session on a host with GPUs: first what needs no files, then one clip in each tier, batches, x264. A measurement that
# fails does not keep the others from theirs. ARGS are settings of jobs.render for the clips and batches.
BENCH_MODEL ?= ltx2_19b_distilled
BENCH_FOLDER ?= outputs/bench/$(BENCH_MODEL)
BENCH_LAYOUTS ?= single auto
BENCH_GANGS ?= ulysses2,ring2,tensor2
BENCH := $(BIN)/python -m jobs.bench
OF_FILES = model=$(BENCH_MODEL) folder=$(BENCH_FOLDER)

bench: setup ## measure on the GPUs of this host, into tests/bench/results; BENCH_MODEL, BENCH_FOLDER, BENCH_LAYOUTS, BENCH_GANGS
	-$(BENCH) step model=$(BENCH_MODEL)
	-[ $$(nvidia-smi -L | wc -l) -lt 2 ] || $(BENCH) gang model=$(BENCH_MODEL) 'layouts=[$(BENCH_GANGS)]' 'shapes=[960x544x121,1920x1088x121]'
	-$(BENCH) profile model=$(BENCH_MODEL)
	-$(BENCH) decode model=$(BENCH_MODEL)
	-$(BENCH) kernel model=$(BENCH_MODEL) 'shapes=[960x544x121,1920x1088x121]'
	-$(BENCH) kernel model=ltxv_2b_distilled 'shapes=[1920x1088x257]'
	-$(BENCH) latency model=$(BENCH_MODEL)
	$(BENCH) write $(OF_FILES)
	-for tier in exact fp8 fast; do $(BENCH) clip $(OF_FILES) precision=$$tier $(ARGS); done
	-for layout in $(BENCH_LAYOUTS); do $(BENCH) batch $(OF_FILES) precision=fp8 parallel=$$layout $(ARGS); done
	-$(BENCH) encode
	$(BENCH) table

check: setup ## lint, types, architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: setup ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, outputs and built model files
	rm -rf $(VENV) outputs .models .pytest_cache .ruff_cache
