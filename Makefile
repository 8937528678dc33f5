# One command each; every target makes .venv first and says what it does. PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-slow lint tensorboard clean help

help:
	@echo "make train        install, train configs/quickstart.yaml (continues if it was interrupted), print a sample"
	@echo "make test         install with the test extra, run the tests"
	@echo "make test-slow    run the tests that take minutes"
	@echo "make lint         linter, formatter, type checker, import contracts"
	@echo "make tensorboard  show logs/ at http://127.0.0.1:6006"
	@echo "make clean        remove .venv"

train: .venv/installed
	@echo "== training configs/quickstart.yaml; a second call continues, or does nothing where it is finished"
	$(BIN)/lm fit --config configs/quickstart.yaml --ckpt_path auto
	@echo "== a sample of its best checkpoint"
	$(BIN)/lm sample --ckpt_path checkpoints/quickstart/best.ckpt --max_new_tokens 400 --temperature 0.8

test: .venv/installed-test
	@echo "== running the tests (make test-slow runs the slow ones)"
	$(BIN)/pytest -m "not slow"

test-slow: .venv/installed-test
	$(BIN)/pytest -m slow

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

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

.venv/installed-dev: .venv/installed-test
	@echo "== installing the dev extra into .venv"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv
