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

# On a machine with a GPU, with the packages of $(PYTHON); installs nothing, is given under 9 minutes, goes on after a failed test.
gpu: export PYTHONPATH := $(CURDIR)
gpu:
	status=0; \
	$(PYTHON) -m bench.gate --out $(OUT) --seconds 240 || status=1; \
	timeout 180 $(PYTHON) -m bench.gpu --out $(OUT) --budget 140 $(if $(COMMIT),--commit $(COMMIT)) || status=1; \
	timeout 110 $(PYTHON) -m bench.atl --out $(OUT) --budget 80 $(if $(COMMIT),--commit $(COMMIT)) || status=1; \
	exit $$status

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed-%: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e ".[$*]"
	touch $@

.PHONY: demo test slow gpu lint
