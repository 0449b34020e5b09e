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

# On a machine with a GPU, with the packages of $(PYTHON); installs nothing, is given under 9 minutes, goes on after a failure.
gpu: export PYTHONPATH := $(CURDIR)
gpu: SHELL := bash -o pipefail
gpu: MEASURE = $(PYTHON) -m bench
gpu: NAME = --out $(OUT) $(if $(COMMIT),--commit $(COMMIT))
gpu: export PYTHONUNBUFFERED := 1
gpu:
	mkdir -p $(OUT); end=$$(( $$(date +%s) + 525 )); ( status=0; left() { echo $$(( end - $$(date +%s) - $$1 )); }; \
	$(PYTHON) -m qkernels.runtime > $(OUT)/environment.txt || status=1; \
	$(MEASURE) tests --out $(OUT) --seconds 220 || status=1; \
	timeout -k 5 $$(left 165) $(MEASURE) run $(NAME) --budget $$(left 195) || status=1; \
	timeout -k 5 $$(left 105) $(MEASURE) fresh $(NAME) --budget $$(left 115) || status=1; \
	timeout -k 5 $$(left 40) $(MEASURE) share $(NAME) --budget $$(left 50) || status=1; \
	timeout -k 5 $$(left 5) $(PYTHON) -m pytest -c /dev/null --rootdir . -p no:cacheprovider bench -q -k "step or atl" \
	--benchmark-json=$(OUT)/benchmark.json || status=1; \
	rm -f $(OUT)/.*.part; exit $$status ) 2>&1 | tee $(OUT)/log.txt

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed-%: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e ".[$*]"
	touch $@

.PHONY: demo test slow bench gpu lint
