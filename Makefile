PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= bench/results/gpu

demo: $(VENV)/.installed-demo
	$(BIN)/qat demo

test: $(VENV)/.installed-dev lint
	$(BIN)/pytest -n 2 -m "not slow"
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 -m "not slow" tests/interpreter

slow: $(VENV)/.installed-dev
	$(BIN)/pytest -n 2 -m slow
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 -m slow tests/interpreter

# On this machine, all that makes sense; the tables are printed, and written with the charts to runs/bench.
bench: $(VENV)/.installed-dev
	$(BIN)/python -m bench run
	$(BIN)/python -m bench fresh
	$(BIN)/python -m bench share
	$(BIN)/python -m bench report runs/bench

# On a machine with a GPU, with the packages of $(PYTHON): installs nothing, is given under 9 minutes.
gpu:
	$(PYTHON) -m bench session --seconds 525 --out $(OUT) $(if $(COMMIT),--commit $(COMMIT))

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed-%: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e ".[$*]"
	touch $@

.PHONY: demo test slow bench gpu lint
