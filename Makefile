# The one table of commands. `make` prints it; CI calls the same ones.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
SOAK_SECONDS ?= 120
FUZZ_SECONDS ?= 60
ARCHITECTURES ?= x86_64 aarch64
TARGET := x86_64-unknown-linux-gnu
BIN := .venv/bin
SOURCES := Cargo.toml Cargo.lock pyproject.toml $(shell find rust -name '*.rs' -o -name '*.cu*' -o -name Cargo.toml)

# The tools of .venv-packages, in front of others.
PACKAGES := VIRTUAL_ENV=$(CURDIR)/.venv-packages PATH=$(CURDIR)/.venv-packages/bin:$$PATH
# Messages of a panic name source files. What is published names none of the machine that built it.
REMAPPED := --remap-path-prefix=$(or $(CARGO_HOME),$(HOME)/.cargo)=cargo --remap-path-prefix=$(CURDIR)=waterfill-rs
EMULATOR := $(CURDIR)/target/emulator/qemu-aarch64
# What qemu-user has not: ptrace, limits of address space, /proc's view of a thread, and a fork beside threads that is sure not to hang.
NOT_EMULATED := killed_at_any_system_call limits_of_the_process the_planners_thread_takes_no_signal dropping_it_ends_the_thread \
  a_process_ends_at_once a_forks_child the_child_of_a_fork

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

.venv-packages/ready: requirements/packages.txt
	@echo "== virtual environment in .venv-packages: zig as the linker, twine"
	@$(PYTHON) -m venv .venv-packages
	@.venv-packages/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/packages.txt
	@touch $@

build: .venv/native ## build the package into .venv
run: .venv/native ## 8 live rank processes, one killed; placements compared: no GPU, no sglang
	@$(BIN)/waterfill-rs demo --kill 5@30 --plot out/demo.png --json out/demo.json
test: test-rust .venv/test .venv/native .venv-packages/ready ## all tests but test-emulated and test-versions; test-sglang runs beside others
	@mkdir -p out
	@$(MAKE) --no-print-directory test-sglang >out/test-sglang.txt 2>&1 & sglang=$$!; failed=0; \
	  trap "kill $$sglang 2>/dev/null || true" EXIT; trap "exit 130" INT; \
	  $(MAKE) --no-print-directory test-kernels test-python test-packages || failed=$$?; \
	  echo "== make test-sglang, which runs beside these"; tail -n +1 -f --pid=$$sglang out/test-sglang.txt; \
	  wait $$sglang || failed=$$?; trap - EXIT; exit $$failed
test-rust: test-models ## the core against its oracle, the board with processes killed, its models
	cargo test --release --package waterfill-core --package waterfill-testing --all-features -- --nocapture
	cargo test --release --package waterfill-board --all-features
	$(PYTHON) benches/instructions.py
test-models: ## the board under loom (all interleavings) and shuttle (random schedules)
	RUSTFLAGS="--cfg loom" cargo test --release --package waterfill-board --lib --test loom --target-dir target/loom
	RUSTFLAGS="--cfg shuttle" cargo test --release --package waterfill-board --test shuttle --target-dir target/shuttle
test-kernels: .venv/test ## the kernel's source run on the CPU; every variant compiled by the NVRTC of torch's wheels; no GPU
	NVRTC=$$(ls $(CURDIR)/.venv/lib/python3*/site-packages/nvidia/*/lib/libnvrtc.so.1[0-9] | head -n 1) \
	  cargo test --release --package waterfill-cuda --package cuda-emulator
test-python: .venv/test .venv/native ## the package without sglang
	$(BIN)/python -m pytest -W ignore --ignore tests/packages --ignore tests/sglang
test-sglang: .venv/test .venv/native ## the package in the real sglang 0.5.23
	$(BIN)/python -m pytest -W ignore -p no:cacheprovider tests/sglang
test-packages: .venv-packages/ready ## what would be published: each wheel, the aarch64 one under qemu-user, the sdist, metadata
	@able=; for each in $(ARCHITECTURES); do if tools/rust_target.sh $$each; then able="$$able $$each"; fi; done; \
	  $(MAKE) --no-print-directory wheels ARCHITECTURES="$$able"
	@tools/emulator.sh target/emulator || true
	$(PACKAGES) python -m pytest -W ignore tests/packages
test-emulated: .venv-packages/ready ## the core's and the board's tests on aarch64 under qemu-user
	@tools/rust_target.sh aarch64
	@tools/emulator.sh target/emulator
	$(PACKAGES) CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=$(EMULATOR) WATERFILL_TEST_EMULATOR=$(EMULATOR) \
	  cargo-zigbuild test --profile emulated --package waterfill-core --package waterfill-board --lib --tests --features waterfill-core/oracle,waterfill-board/testing \
	  --target aarch64-unknown-linux-gnu.2.28 --target-dir target/emulated -- $(addprefix --skip ,$(NOT_EMULATED))
test-versions: .venv/test .venv/native ## the wiring on each sglang from 0.5.12.post1 on; renews the table of versions
	@rm -f out/versions.json
	WATERFILL_SGLANGS="$$($(BIN)/python tools/unpack_versions.py requirements/versions.txt .venv-versions)" \
	WATERFILL_VERSIONS_REPORT=$(CURDIR)/out/versions.json \
	$(BIN)/python -m pytest -W ignore tests/sglang/test_versions.py
	$(BIN)/python tools/versions_table.py out/versions.json docs/sglang.md
lint: lint-rust lint-docs lint-python ## lint-rust, lint-docs and lint-python
lint-rust: ## formatting, clippy, the crates' documentation; needs Rust alone
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --all-features -- -D warnings
	for model in loom shuttle; do RUSTFLAGS="--cfg $$model" cargo clippy --package waterfill-board --lib --tests \
	  --target-dir target/$$model -- -D warnings; done
	RUSTDOCFLAGS="-D warnings" cargo doc --quiet --no-deps --workspace
lint-docs: ## links, paths and sentences of the pages; needs Python alone
	$(PYTHON) tools/check_docs.py
lint-python: .venv/test .venv/lint .venv/native ## ruff, mypy, who imports whom, stubtest
	$(BIN)/ruff check python tests benches tools
	$(BIN)/ruff format --check python tests benches tools
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/stubtest waterfill_rs._native
soak: ## the board's tests with their full counts; SOAK_SECONDS=120 for 8 processes with stalls
	WATERFILL_SOAK=1 SOAK_SECONDS=$(SOAK_SECONDS) cargo test --release --package waterfill-board --all-features --lib --tests -- --nocapture --test-threads=1
	WATERFILL_SOAK=1 RUSTFLAGS="--cfg shuttle" cargo test --release --package waterfill-board --test shuttle --target-dir target/shuttle -- --nocapture
tsan: ## the board's threads under ThreadSanitizer
	TSAN_OPTIONS=suppressions=$(CURDIR)/rust/waterfill-board/tests/tsan.txt RUSTC_BOOTSTRAP=1 \
	  RUSTFLAGS="-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer" cargo test --package waterfill-board --all-features \
	  --lib --test exchange --test hammer --target $(TARGET) --target-dir target/tsan -- --skip between_processes
target/tools/bin/cargo-fuzz:
	cargo install cargo-fuzz --version 0.13.2 --locked --root target/tools --target-dir target/tools/build
fuzz: target/tools/bin/cargo-fuzz ## a segment's bytes, a board's words, plans and replicas against the optimum; FUZZ_SECONDS=60 each
	for target in segment board plan replicas; do RUSTC_BOOTSTRAP=1 PATH=$(CURDIR)/target/tools/bin:$$PATH \
	  cargo fuzz run --fuzz-dir rust/fuzz $$target -- -max_total_time=$(FUZZ_SECONDS) -timeout=10 -verbosity=0 -print_final_stats=1; done
safety: tsan fuzz ## ThreadSanitizer, then a minute of each fuzz target: under 10 minutes on 2 cores
target/tools/bin/cargo-deny:
	cargo install cargo-deny --version 0.20.2 --locked --root target/tools --target-dir target/tools/build
deny: target/tools/bin/cargo-deny ## the crates that ours depend on: licences, sources, versions, known flaws (fetched from the network)
	PATH=$(CURDIR)/target/tools/bin:$$PATH cargo deny check licenses bans sources
	PATH=$(CURDIR)/target/tools/bin:$$PATH cargo deny check advisories
gpu: wheel ## the wheel for a GPU machine, and what to run there
	@echo "== on the GPU machine: pip install dist/*.whl pytest, then"
	@echo "python -m pytest tests/gpu && python benches/gpu.py own && python benches/gpu.py move_up && nvidia-cuda-mps-control -d && python benches/gpu.py live"
	@echo "== where sglang 0.5.16 or newer is: python benches/gpu.py sglang; where two GPUs are: python benches/gpu_group.py && python benches/gpu_replicas.py"
server-bench: wheel ## the wheel for a machine with 1 to 8 GPUs and sglang, and what to run there
	@echo "== needed there: sglang 0.5.13 or newer with DeepEP, NVLink between the GPUs, matplotlib for the picture; pip install dist/*.whl, then"
	@echo "python benches/server --recording FOLDER_OF_DUMPS --prefill 1024,4096,8192 --limit 540"
	@echo "python benches/server --recording FOLDER_OF_DUMPS --decode 8,64,128 --limit 540"
	@echo "python benches/server --recording FOLDER_OF_DUMPS --mixed --limit 540"
	@echo "== do engines answer what Waterfill off answers, bit for bit? --outputs, with any of these"
	@echo "== all three with one start: --prefill 8192 --decode 8,128 --mixed --one-start --modes off,sglang,fused,auto"
	@echo "== without a recording: --dial 1.0,1.2,1.5; what it would do, without a GPU: --dry-run --ranks 4"
	@echo "== tables of results: python benches/server table benches/results/server-*.json"
routing: .venv/test .venv/native ## the rows of docs/performance.md on synthetic routing; on a recording: ROUTING=FILE.npz
	$(BIN)/python benches/routing.py $(ROUTING)
bench: .venv/test .venv/native ## cargo bench, and the same work in numpy
	cargo bench
	$(BIN)/python benches/host.py
wheel: .venv/base ## build the wheel for this machine into dist
	$(BIN)/maturin build --release --quiet --out dist
sdist: .venv-packages/ready ## the source distribution into dist/release
	@rm -rf dist/release
	$(PACKAGES) maturin sdist --out dist/release
wheels: sdist ## the same, and built from it: wheels for x86_64 and aarch64, glibc 2.28 and newer
	@rm -rf target/sdist && mkdir -p target/sdist
	@tar --extract --touch --strip-components 1 --directory target/sdist --file dist/release/waterfill_rs-*.tar.gz
	@for each in $(ARCHITECTURES); do echo "== wheel for $$each"; tools/rust_target.sh $$each; \
	  (cd target/sdist && $(PACKAGES) RUSTFLAGS="$(REMAPPED)" maturin build --release --locked --quiet --zig --compatibility manylinux_2_28 \
	  --target $$each-unknown-linux-gnu --target-dir $(CURDIR)/target --out $(CURDIR)/dist/release); done
clean: ## remove what was built
	rm -rf .venv .venv-packages .venv-versions target dist out python/waterfill_rs/_native*.so
.PHONY: help build run test test-rust test-kernels test-models test-python test-sglang test-packages test-emulated test-versions lint lint-rust lint-docs lint-python soak tsan fuzz safety deny gpu server-bench routing bench wheel wheels sdist clean
