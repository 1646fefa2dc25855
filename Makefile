# Everything below does its own set-up. PYTHON may name any Python from 3.11 on, INPUTS how many inputs fuzz tries.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
INPUTS ?= 100000
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup quickstart real-model test test-long test-slow test-gpu peers mutants fuzz reliability lint bench bench-gpu clean

help:
	@echo "make quickstart   set up, compress the bundled model, show the result"
	@echo "make real-model   set up, make a checkpoint of SmolLM2-135M-Instruct (downloads 93 MB)"
	@echo "make test         set up, run the tests"
	@echo "make test-long    set up, run the tests that take ten seconds or more each"
	@echo "make test-slow    set up, run the tests that take minutes"
	@echo "make test-gpu     set up, run the tests that need a GPU"
	@echo "make peers        set up, install other quantisers for benchmarks/compare.py"
	@echo "make mutants      set up, break the package in many places, show that the tests notice (minutes)"
	@echo "make fuzz         set up, give 100,000 mutated inputs to every reader (minutes)"
	@echo "make reliability  set up, disturb runs and see what becomes of them (an hour and a half)"
	@echo "make lint         set up, check style, types and import rules"
	@echo "make bench        set up, measure everything in benchmarks/ (needs the real models)"
	@echo "make bench-gpu    set up, measure what needs a GPU (needs no models)"

# PyTorch goes first and alone: any later step then finds it installed and fetches no other build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $(STAMP)

setup: $(STAMP)

quickstart: setup
	$(BIN)/rankwise quickstart

real-model: setup
	$(BIN)/python examples/make_real_model.py

# A process a core, each with one thread: most tests are too small for more.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4

test-long: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4 -m long

test-slow: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,tasks]' -c constraints.txt
	$(BIN)/python -m pytest -m slow

test-gpu: setup
	$(BIN)/python -m pytest -m gpu tests/gpu

# Apart from the project's own packages, which theirs would change.
peers: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .peers -r benchmarks/peers/requirements.txt

mutants: setup
	$(BIN)/python tests/mutants.py

fuzz: setup
	PYTHONPATH=tests $(BIN)/python -m fuzzing --inputs $(INPUTS)

reliability: setup
	cd benchmarks && ../$(BIN)/python reliability.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: real-model peers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,plots]' -c constraints.txt
	cd benchmarks && for each in calibration memory decomposition head "methods stories260k" "methods wiki-llama-8m" defaults \
		"allocation stories260k" "allocation wiki-llama-8m" ablations search "repair stories260k" "repair wiki-llama-8m" \
		speed codebooks "caldera steps" "caldera tuned" \
		"caldera study" "caldera write" text "mixed wiki-llama-8m" "mixed smollm2-135m" "mixed write" "pruning stories260k" "pruning wiki-llama-8m" "pruning write" search_memory real_model defaults_codes turns \
		"compare low-rank" "compare repaired" "compare peers" "compare control --learned 256" compare_results results_page; do \
		set -- $$each; name=$$1; shift; ../$(BIN)/python $$name.py "$$@" || exit 1; done
	cd benchmarks && for each in methods allocation repair; do ../$(BIN)/python plot_$$each.py wiki-llama-8m || exit 1; done
	cd benchmarks && ../$(BIN)/python plot_caldera.py

bench-gpu: setup
	cd benchmarks && ../$(BIN)/python gpu.py

clean:
	rm -rf $(VENV) quickstart-output .quickstart-output.run
