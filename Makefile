PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= bench/results/gpu
CONSTRAINTS ?= constraints.txt
# Neighbouring tests share what is costly to make, so each process takes them in a row.
PYTEST := $(BIN)/pytest -n 2 --dist worksteal

# The tests of `make check`: what takes less than 15 s of one core a file.
QUICK := $(addprefix tests/, test_repository.py algebra compile_only/test_signatures.py \
    $(addprefix nn/test_, like_pytorch.py qkernels_nn.py) \
    $(addprefix bench/test_, $(addsuffix .py, cases compare grid session summary tables targets warm)) \
    $(addprefix ops/test_, $(addsuffix .py, aggregation environment fallback folded_rowwise gram_cosine gram_settings \
        hamilton_linear launch_settings)) \
    $(addprefix qat/, config data models results test_anti_transfer.py test_docs.py test_doctor.py test_files.py \
        test_processes.py test_readme.py) \
    $(addprefix qat/training/test_, $(addsuffix .py, checkpoint epoch_losses stopping_and_metrics)))

demo: $(VENV)/.installed-demo
	$(BIN)/qat demo

# While one works: 90 s of two cores.
check: $(VENV)/.installed-dev lint
	$(PYTEST) -m "not slow" $(QUICK)

# What CI runs.
test: $(VENV)/.installed-dev lint
	$(PYTEST) -m "not slow"
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow" tests/interpreter

slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow
	TRITON_INTERPRET=1 $(PYTEST) -m slow tests/interpreter

# With other versions than those of constraints.txt, each in an environment of its own: the pair of the GPU image (a CUDA
# build, 5 GB), and the newest that pip finds.
compat: compat-image compat-newest
compat-image: PINS = -c constraints-oldest.txt
compat-image compat-newest: compat-%:
	$(PYTHON) -m venv .venv-compat-$*
	.venv-compat-$*/bin/pip install --upgrade --upgrade-strategy eager $(PINS) -e ".[dev]"
	.venv-compat-$*/bin/pytest -n 2 -m "not slow" tests/ops tests/nn tests/qat/training/test_steps.py tests/bench tests/compile_only
	TRITON_INTERPRET=1 .venv-compat-$*/bin/pytest -n 2 -m "not slow" tests/interpreter

# On this machine, all that makes sense; the tables are printed, and written with the charts to runs/bench.
bench: $(VENV)/.installed-dev
	$(BIN)/python -m bench run
	$(BIN)/python -m bench fresh
	$(BIN)/python -m bench share
	$(BIN)/python -m bench report runs/bench

# On a machine with a GPU, with the packages of $(PYTHON): installs nothing, is given under 9 minutes.
gpu:
	$(PYTHON) -m bench session --seconds 525 --out $(OUT) $(if $(COMMIT),--commit $(COMMIT))

# The versions that $(VENV) holds, with the hashes of their files on PyPI.
lock: $(VENV)/.installed-dev .venv-lock
	$(BIN)/pip freeze --exclude-editable | sed 's/+.*//' > .venv-lock/tested.txt
	.venv-lock/bin/uv pip compile pyproject.toml --extra dev -c .venv-lock/tested.txt --generate-hashes --universal \
	    --python-version 3.11 --no-annotate --custom-compile-command "make lock" --quiet -o requirements.lock

# Known weaknesses of those versions; PyPI is asked.
audit: .venv-lock
	.venv-lock/bin/pip-audit --strict --disable-pip --require-hashes -r requirements.lock

.venv-lock:
	$(PYTHON) -m venv $@
	$@/bin/pip install uv pip-audit

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# pip would compile to bytecode on one core, tests of the packages included. Some files are for newer Pythons and fail.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --no-compile -c $(CONSTRAINTS) -e ".[$*]"
	$(BIN)/python -m compileall -qq -j 0 -x /tests/ $(VENV)/lib qat qkernels || true
	touch $@

.PHONY: demo check test slow compat compat-image compat-newest bench gpu lock audit lint
