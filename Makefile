# Everything here works from a fresh clone. `make` alone lists the targets.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

# With DATA=DIR the demonstration trains on the image/mask pairs below DIR, otherwise on images it draws itself.
# $$DATA is expanded by the shell (make exports it), so that a path may hold spaces, quotes or dollar signs.
DEMO_ARGS = $(if $(DATA),runs/demo-data --data "$$DATA",runs/demo)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test lint docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

venv: $(VENV)/.installed ## create .venv and install both packages with the development tools

$(VENV)/.installed: pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'Python 3.10 or newer is needed, and "$(PYTHON)" is not. Say which to use: make venv PYTHON=/path/to/python3' >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo '"$(PYTHON)" cannot create virtual environments. On Debian or Ubuntu: apt install python3-venv' >&2; exit 1; }
	@"$(PY)" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv "$(VENV)"
	"$(PY)" -m pip install -e ".[polypseg,dev,docs]"
	@touch "$@"

demo: venv ## train a small model and show its results (DATA=DIR: on your own images)
	"$(VENV)/bin/polypseg-train" --demo $(DEMO_ARGS)

test: lint ## check style and types, then run every test
	"$(PY)" -m pytest

lint: venv ## check style, formatting and types
	"$(PY)" -m ruff check
	"$(PY)" -m ruff format --check
	"$(PY)" -m mypy deqsolvers polypseg

docs: venv ## build the documentation into docs/_build/html and run its examples
	"$(PY)" -m sphinx -W --keep-going -q -b html docs docs/_build/html
	"$(PY)" -m sphinx -W --keep-going -q -b doctest docs docs/_build/doctest

clean: ## remove what was built, but neither .venv nor runs/
	rm -rf build dist *.egg-info docs/_build docs/api/polypseg .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find deqsolvers polypseg tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
