# Tasks of a checkout. `make demo` and `make test` prepare what they need (scripts/setup.sh).

PYTHON := .venv/bin/python
SOURCES := loader erofs_builder cachefiles confine fanotify mounts tests bench fuzz

.PHONY: help install uninstall setup demo test unit-test vm-test lint bench fuzz clean

help:
	@echo "make setup      packages, .venv, erofs-utils 1.9"
	@echo "make install    commands, unit, man pages, completion below PREFIX (/usr/local); make uninstall takes them away"
	@echo "make demo       a Debian image, a registry, a slow link: mounted and started lazily, against a full pull"
	@echo "make test       the whole test suite (root; the kernels of the vm tests are built once and kept)"
	@echo "make unit-test  what needs neither root nor a virtual machine: seconds"
	@echo "make vm-test    the whole kernel matrix, in virtual machines; built kernels are kept"
	@echo "make lint       ruff, mypy, codespell"
	@echo "make bench      side by side with the peers (RUNS=5, ROWS=R1,R5); samples go to bench.json (RESULTS)"
	@echo "make fuzz       every fuzzer for ten minutes or more (SECONDS=600), then how many inputs there were"
	@echo "make clean      remove what was built here (the cache outside stays)"

setup:
	@scripts/setup.sh

PREFIX ?= /usr/local
install:
	@scripts/install.sh $(PREFIX)

uninstall:
	@scripts/install.sh --remove $(PREFIX)

demo: setup
	@$(PYTHON) -m bench.demo

test: setup
	$(PYTHON) -m pytest -n 3 --dist loadfile

unit-test:
	$(PYTHON) -m pytest -m "not root and not vm and not slow"

vm-test: setup
	$(PYTHON) vm-tests/run --json build/kernels.json

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m mypy tests bench fuzz vm-tests/rig
	$(PYTHON) -m mypy --scripts-are-modules vm-tests/run vm-tests/kernels
	$(PYTHON) -m codespell_lib $(SOURCES) vm-tests docs README.md

RUNS ?= 5
ROWS ?=
RESULTS ?= bench.json
bench: setup
	$(PYTHON) -m bench.run --runs $(RUNS) --rows "$(ROWS)" --json $(RESULTS)

SECONDS ?= 600
fuzz: setup
	$(PYTHON) -m pip install -q -e '.[fuzz]'
	$(PYTHON) -m fuzz.run --seconds $(SECONDS)

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
	find $(SOURCES) -name '*.so' -delete
