# One command each; every target makes .venv first and says what it does. PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
# three for two cores: tests that start processes wait for them
WORKERS ?= $(shell echo $$(( ($$(nproc) * 3 + 1) / 2 )))

.PHONY: docs docs-serve train test test-slow test-long test-container lint lock audit tensorboard clean help

help:
	@echo "make train        install, train configs/quickstart.yaml (continues if it was interrupted), print a sample"
	@echo "make test         install with the test extra, run the tests; AREA=data: those of lm/data alone"
	@echo "make test-slow    run the tests that take minutes"
	@echo "make test-long    what takes an hour: a sample of all calls to the disk fails, long comparisons"
	@echo "make test-container  build the image and run it, without an engine: needs root, buildah and debootstrap"
	@echo "make lint         linters, formatter, type checker, import contracts"
	@echo "make lock         write requirements*.lock anew from constraints.txt"
	@echo "make audit        ask whether a locked package has a known vulnerability"
	@echo "make docs         build docs/ into site/"
	@echo "make docs-serve   show the documents at http://127.0.0.1:8000, with search"
	@echo "make tensorboard  show logs/ at http://127.0.0.1:6006"
	@echo "make clean        remove .venv"

train: .venv/installed
	@echo "== training configs/quickstart.yaml; a second call continues, or does nothing where it is finished"
	$(BIN)/lm fit --config configs/quickstart.yaml --ckpt_path auto
	@echo "== a sample of its best checkpoint"
	$(BIN)/lm sample --ckpt_path checkpoints/quickstart/best.ckpt --max_new_tokens 400 --temperature 0.8

test: .venv/installed-test
	@echo "== running the tests (make test AREA=data runs those of lm/data; make test-slow the slow ones)"
	$(BIN)/pytest -n $(WORKERS) --dist worksteal --durations 20 -m "not slow and not long and not container" $(AREA:%=tests/%)

test-long: .venv/installed-test
	$(BIN)/pytest -n $(WORKERS) --dist worksteal --durations 20 -m long

test-slow: .venv/installed-test
	$(BIN)/pytest -n $(WORKERS) --dist worksteal --durations 20 -m slow

test-container: .venv/installed-test
	$(BIN)/pytest -m container

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

# torch's CPU wheels are in an index of their own: UV_INDEX or UV_FIND_LINKS says where, for the first lock alone
LOCK = $(BIN)/uv pip compile --quiet --extra serve --generate-hashes --constraint constraints.txt --python-version 3.11 \
	--python-platform x86_64-manylinux_2_28 --index-strategy unsafe-best-match \
	--no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock"

lock: .venv/installed-dev
	sed -n 's/^torch==.*/&+cpu/p' constraints.txt | $(LOCK) pyproject.toml - --output-file requirements.lock
	env -u UV_INDEX -u UV_FIND_LINKS $(LOCK) pyproject.toml --output-file requirements-cuda.lock

audit: .venv/installed-dev
	$(BIN)/pip-audit --disable-pip --require-hashes --requirement requirements.lock

docs: .venv/installed-docs
	$(BIN)/zensical build --strict --clean
	@echo "== built site/; make docs-serve shows it, with search"

docs-serve: .venv/installed-docs
	$(BIN)/zensical serve --dev-addr 127.0.0.1:8000

tensorboard: .venv/installed
	$(BIN)/tensorboard --logdir logs --host 127.0.0.1

.venv/installed: pyproject.toml constraints.txt
	@echo "== installing lm into .venv"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/installed-test: .venv/installed
	@echo "== installing the test extra into .venv"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

.venv/installed-docs: .venv/installed
	@echo "== installing the docs extra into .venv"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

.venv/installed-dev: .venv/installed-test
	@echo "== installing the dev extra into .venv"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv
