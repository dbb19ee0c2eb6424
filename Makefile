# Everything from a fresh clone, with nothing but Python 3.10+, pip and make: `make test`, `make demo`, `make sandbox`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The tests start our own programs many hundred times: compiled once, each starts in two thirds of the time. An empty
# variable is as good as none, and bytecode stays away where it is set for pip, docker and the like.
unexport PYTHONDONTWRITEBYTECODE
# A .venv of a Python that is too old, or gone, is made anew.
UNUSABLE := $(if $(wildcard $(VENV)),$(shell $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
  2>/dev/null || echo anew))
GATEWAY ?= standin
PROJECTS := pyproject.toml sandbox/pyproject.toml

FUZZ_SECONDS ?= 600
SOAK_SECONDS ?= 1800
TORTURE_KILLS ?= 200
TORTURE ?=
DEMO ?=
BENCH ?=
LATENCY ?=

# Leaves no process and no temporary file behind, whatever ends it, and fails if a test has left a process.
CONTAINED := $(BIN)/python -m kong_metering_sandbox.contained
PYTEST := $(CONTAINED) $(BIN)/pytest
# Three at a time, one more than CI has cores, for much of the time a test waits; each module on one of them: its tests
# share servers. In the order of tests/conftest.py, in which the longest begin first: by the number of tests, a module with
# one long test would come last, and one core wait for it.
IN_THREES := -n 3 --dist loadfile --no-loadscope-reorder
# What runs while you work: without the tests marked as slow, and with few examples where Hypothesis makes them.
QUICK := tests/unit tests/fuzz $(wildcard tests/wire/test_*transcripts.py) \
  tests/e2e/test_metering.py::test_each_request_with_a_subject_gives_one_event \
  tests/e2e/test_metering.py::test_malformed_requests_are_metered_and_harm_nothing \
  tests/e2e/test_lifecycle.py::test_what_a_stop_does_not_deliver_the_next_start_does

.PHONY: help quick test lint types check docs demo sandbox bench bench-host bench-spool bench-inbox bench-latency bench-servers fuzz soak torture format clean

help:
	@echo "make quick       lint, types and the fast tests: what to run while you work"
	@echo "make test        lint, types and all tests: what CI runs"
	@echo "make demo        see it run: gateway, plugin server, collector, and whether it all adds up"
	@echo "                 (make demo GATEWAY=kong: on the real Kong that is on the PATH;"
	@echo "                 DEMO='--requests 300' for less of it)"
	@echo "make sandbox     the same, kept running, with a curl for each row of README's failure table"
	@echo "make docs        the documentation as a site, in build/site"
	@echo "make fuzz        feed records, headers, queries and frames for FUZZ_SECONDS (600)"
	@echo "make soak        faults of every kind for SOAK_SECONDS (1800), and whether an event is missing afterwards"
	@echo "make torture     TORTURE_KILLS (200) SIGKILLs of two processes over one spool, and whether an event is missing"
	@echo "                 (TORTURE='--inbox none': without shared memory)"
	@echo "make bench GATEWAY=kong"
	@echo "                 what metering costs on the real Kong that is on the PATH, next to Go, Lua and kong-pdk;"
	@echo "                 BENCH='--all --markdown FILE' for all of it, see bench/gateway.py"
	@echo "make bench-host  what the plugin server costs, next to kong-pdk's own"
	@echo "make bench-inbox what it costs that events and captured headers outlive the process"
	@echo "make bench-latency"
	@echo "                 what gets through to an endpoint that is far away, with the defaults;"
	@echo "                 LATENCY='--seconds 2 --rates 100' for less of it, see bench/latency.py"
	@echo "make bench-servers"
	@echo "                 what a second server is worth, with two of Kong's workers"
	@echo "make bench-spool events/s through queue, spool and delivery, bursts, starts (10 GB of disk)"

quick: lint types
	$(PYTEST) $(IN_THREES) -m "not slow" --hypothesis-profile quick $(QUICK)

test: lint types check

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	MYPY_NUM_WORKERS=2 $(BIN)/mypy

# All tests; and those that go through a gateway once more, over the other of Kong's two protocols. Soak and torture run
# alone: they tell how long before a SIGKILL an event was taken.
check: $(VENV)/.dev
	$(PYTEST) $(IN_THREES) --ignore tests/soak --ignore tests/torture
	$(PYTEST) tests/soak tests/torture
	$(PYTEST) $(IN_THREES) tests/e2e --protocol msgpack

# NO_MKDOCS_2_WARNING: the theme's word on what comes after it.
docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "$(CURDIR)/build/site/index.html"

demo: $(VENV)/.sandbox
	@$(BIN)/python -m kong_metering_sandbox.demo --gateway $(GATEWAY) $(DEMO)

sandbox: $(VENV)/.sandbox
	@$(BIN)/python -m kong_metering_sandbox.demo --gateway $(GATEWAY) --keep $(DEMO)

bench: $(VENV)/.dev
	$(BIN)/python bench/gateway.py --gateway $(GATEWAY) $(BENCH)

bench-host: $(VENV)/.dev
	$(BIN)/python bench/host.py

bench-inbox: $(VENV)/.dev
	$(BIN)/python bench/inbox.py

bench-latency: $(VENV)/.dev
	$(BIN)/python bench/latency.py $(LATENCY)

bench-servers: $(VENV)/.dev
	$(BIN)/python bench/servers.py

bench-spool: $(VENV)/.dev
	$(BIN)/python bench/spool.py

fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

soak: $(VENV)/.dev
	$(BIN)/python -m kong_metering_soak --seconds $(SOAK_SECONDS)

torture: $(VENV)/.dev
	$(BIN)/python -m kong_metering_torture --kills $(TORTURE_KILLS) $(TORTURE)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist

.PHONY: anew
$(VENV)/bin/python: $(UNUSABLE)
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("Python 3.10 or later is needed, and $(PYTHON) \
	is %d.%d: type, for example, make $(firstword $(MAKECMDGOALS)) PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv --clear $(VENV)

$(VENV)/.sandbox: $(VENV)/bin/python $(PROJECTS)
	@echo "installing into $(VENV)/ ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e . -e ./sandbox
	@touch $@

$(VENV)/.docs: $(VENV)/bin/python $(PROJECTS)
	@echo "installing into $(VENV)/ ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python $(PROJECTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -e ./sandbox
	@touch $@ $(VENV)/.sandbox $(VENV)/.docs
