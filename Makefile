# make run: from a bare clone to a served bundle and a report.   make test: lint, types and tests.
# GPU=1 takes the GPU environment (locks/gpu.txt) and the backends that go with it.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: run test test-slow tools gpu-check environment lint types lock docs clean help

VENV    := $(CURDIR)/.venv
PYTHON  ?= python3
LOCK    := locks/$(if $(GPU),gpu,cpu).txt
STAMP   := .venv/.$(if $(GPU),gpu,cpu)-$(shell sha256sum $(LOCK) pyproject.toml | sha256sum | cut -c1-12)
export PATH := $(VENV)/bin:$(PATH)

help:
	@sed -n '1,2s/^# //p' Makefile

run: environment
	dvc repro
	@echo "bundle: artifacts/bundle    report: reports/report.html    three recommendations it makes:"
	@python cli.py recommend --bundle artifacts/bundle --input artifacts/bundle/examples.jsonl --k 5

test: environment lint types
	pytest -m "not slow and not gpu and not tensorrt"

test-slow: environment tools
	pytest -m "slow and not gpu and not tensorrt"

tools: environment  # what some slow tests need beside the environment; without it they are skipped
	.venv/bin/uv pip install --quiet --no-deps -r locks/tools.txt -r locks/cluster.txt

# what CI has time for: every command of README and QUICKSTART, and every byte of a shipped bundle; wants `make run` first
test-ci: environment
	pytest -m "slow and not gpu and not tensorrt" tests/test_docs.py tests/stages/shipping/test_tampering.py

lint: environment
	ruff check .
	ruff format --check .
	lint-imports

types: environment
	mypy

gpu-check: ## on a machine with an NVIDIA GPU: build, run, compare and time every engine; reports/gpu/<gpu>.json
	$(MAKE) environment GPU=1
	python cli.py gpu-check $(GPU_CHECK_FLAGS)

environment: $(STAMP)

$(STAMP): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "error: $(PYTHON) is not Python 3.11; run make PYTHON=/path/to/python3.11" >&2; exit 3; }
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet uv
ifdef GPU
	.venv/bin/uv pip install --quiet --compile-bytecode --no-deps -r $(LOCK)
else
	@.venv/bin/python -m pip install --quiet --no-deps "$$(grep '^torch==' $(LOCK))" || { \
	  echo "error: pip found no CPU build of torch ($$(grep '^torch==' $(LOCK)))" >&2; \
	  echo "  fix:      set PIP_EXTRA_INDEX_URL to the CPU index that pytorch.org's installation page names" >&2; exit 3; }
	grep -v '^torch==' $(LOCK) | .venv/bin/uv pip install --quiet --compile-bytecode --no-deps -r -
endif
	.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

lock: ## recompile locks/*.txt from locks/*.in
	.venv/bin/uv pip compile locks/cpu.in --overrides locks/overrides.txt $(UV_FLAGS) --python-version 3.11 \
	  --no-header --no-annotate --output-file locks/cpu.txt
	grep -v '^torch==' locks/cpu.txt > .venv/constraints.txt
	for one in cluster tools; do .venv/bin/uv pip compile locks/$$one.in -c .venv/constraints.txt $(UV_FLAGS) \
	  --python-version 3.11 --no-header --no-annotate | grep -vxFf locks/cpu.txt > locks/$$one.txt; done

docs: environment ## regenerate docs/CLI.md
	python cli.py reference > docs/CLI.md

clean:
	rm -rf artifacts .venv
