# One word for each thing one does with this project. What a target needs is set up first (see scripts/setup).
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test fast check lint bench lock clean
BIN := .venv/bin
# More arguments for pytest: make test ARGS='-k "cancel" -x'
ARGS ?=

help: ## say what there is
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 16

setup: ## install all that the demo, the tests and the checks need
	@scripts/setup tests

demo: ## from curl to prediction: train a model as a job, serve it, ask it (KEEP=1 leaves mlbox running)
	@scripts/setup run
	@scripts/demo

test: ## run all tests
	@scripts/setup tests
	@$(BIN)/python -m pytest $(ARGS)

fast: ## run the fast tests, under a minute
	@scripts/setup tests
	@$(BIN)/python -m pytest -n auto -m "not slow" $(ARGS)

check: lint ## lint, types, layers, and all tests with branch coverage
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest $(ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

lint: ## style, types and layers only
	@scripts/setup tests
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright
	@$(BIN)/lint-imports

bench: ## measure, each figure beside its floor (ARGS: policy, month, drain or scheduler, and their arguments)
	@scripts/setup tests
	@$(BIN)/python -m bench.$(or $(ARGS),scheduler)

lock: ## requirements.lock anew from pyproject.toml (ARGS=--upgrade: newest versions)
	@scripts/setup run
	@$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --group dev \
	    --custom-compile-command 'make lock' --no-emit-index-url --no-emit-find-links $(ARGS) \
	    pyproject.toml -o requirements.lock
	@! grep -n '://' requirements.lock # it says what, never from where

clean: ## remove what the targets above made
	@scripts/demo stop
	@rm -rf .venv .demo .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis htmlcov
