# The one table of commands. `make` prints it; CI calls the same ones.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
SOURCES := Cargo.toml Cargo.lock pyproject.toml $(shell find rust -name '*.rs' -o -name Cargo.toml)

help: ## print this table
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/base: requirements/run.txt
	@echo "== virtual environment in .venv"
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), f"Python {sys.version}: 3.10 or newer is needed; make PYTHON=..."'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/run.txt
	@touch $@

.venv/native: .venv/base $(SOURCES)
	@echo "== building the Rust core and its binding"
	@VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/maturin develop --release --uv --quiet
	@touch $@

.venv/test: .venv/base requirements/test.txt
	@echo "== installing the real sglang and its dependencies (about 10 GB)"
	@$(BIN)/python -c 'import sys; assert sys.version_info >= (3, 11), f"Python {sys.version}: sglang 0.5.23 needs 3.11 or newer; make PYTHON=..."'
	@VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --quiet --require-hashes -r requirements/test.txt
	@touch $@

.venv/lint: .venv/base requirements/lint.txt
	@VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --quiet --require-hashes -r requirements/lint.txt
	@touch $@

build: .venv/native ## build the package into .venv
run: .venv/native ## 8 live rank processes, one killed; placements compared: no GPU, no sglang
	@$(BIN)/waterfill-rs demo --kill 5@30 --plot out/demo.png --json out/demo.json
test: test-rust test-python ## all tests, with the real sglang 0.5.23
test-rust: ## the core against its oracle, the board with processes killed, loom
	cargo test --release --package waterfill-core --all-features -- --nocapture
	cargo test --release --package waterfill-board
	RUSTFLAGS="--cfg loom" cargo test --release --package waterfill-board --test loom --target-dir target/loom
	$(PYTHON) benches/instructions.py
test-python: .venv/test .venv/native ## the package, its wheel alone, and sglang
	$(BIN)/python -m pytest -W ignore
test-versions: .venv/test .venv/native ## the wiring on each sglang from 0.5.12.post1 on; renews the tables of versions
	@rm -f out/versions.json
	WATERFILL_SGLANGS="$$($(BIN)/python tests/sglang/unpack_versions.py requirements/versions.txt .venv-versions)" \
	WATERFILL_VERSIONS_REPORT=$(CURDIR)/out/versions.json \
	$(BIN)/python -m pytest -W ignore tests/sglang/test_versions.py
	$(BIN)/python tests/sglang/versions_table.py out/versions.json README.md docs/sglang.md
lint: .venv/test .venv/lint .venv/native ## formatting, clippy, ruff, mypy, stubtest
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --all-features -- -D warnings
	$(BIN)/ruff check python tests benches
	$(BIN)/ruff format --check python tests benches
	$(BIN)/mypy
	$(BIN)/stubtest waterfill_rs._native
soak: ## 1,000 rank processes killed, 10,000 stopped and continued
	WATERFILL_SOAK=1 cargo test --release --package waterfill-board --test processes -- --nocapture
bench: .venv/test .venv/native ## cargo bench, and the same work in numpy
	cargo bench
	$(BIN)/python benches/host.py
wheel: .venv/base ## build the wheel into dist
	$(BIN)/maturin build --release --quiet --out dist
clean: ## remove what was built
	rm -rf .venv .venv-versions target dist out python/waterfill_rs/_native*.so
.PHONY: help build run test test-rust test-python test-versions lint soak bench wheel clean
