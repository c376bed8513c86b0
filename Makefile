# Every target does its own set-up on a fresh machine; scripts/setup says what it does.
BIN := .venv/bin
# Several test processes share the machine: one thread each is faster than all threads in each.
TEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n auto
# glibc otherwise gives every large tensor back to the system and faults it in again: a quarter of the training time.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592

KERNELS := $(wildcard src/cabochon/model/kernels/*.[ch])

.PHONY: help chat test test-slow test-integration lint types tiny docs clean

help:
	@echo 'make chat       talk to the model that ships inside'
	@echo 'make test       run the tests (make test-slow: the long ones)'
	@echo 'make test-integration   run those that need other clients, Ray and validators'
	@echo 'make lint       check style; make types: check types'
	@echo 'make tiny       rebuild the model that ships inside from nothing'
	@echo 'make docs       refresh what the docs generate and quote'
	@echo 'make clean      remove .venv and all caches'

chat: .venv/.installed
	@$(BIN)/python -m cabochon chat

test: .venv/.installed-dev
	@$(TEST)

test-slow: .venv/.installed-dev
	@$(TEST) -m slow $(SLOW)

# One after the other: some measure out the machine themselves.
test-integration: .venv/.installed-integration
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -m "" tests/integration

lint: .venv/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: .venv/.installed-dev
	@$(BIN)/mypy

tiny: .venv/.installed
	@$(KEEP_MEMORY) $(BIN)/python -m cabochon.recipe.tiny src/cabochon/models/tiny

docs: .venv/.installed
	@$(BIN)/python scripts/docs.py

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints.txt $(KERNELS)
	@PYTHON="$(PYTHON)" scripts/setup

.venv/.installed-dev: .venv/.installed
	@scripts/setup dev

.venv/.installed-integration: .venv/.installed-dev
	@scripts/setup integration
