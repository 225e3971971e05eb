#!/usr/bin/env bash
# Lint, types, import order and all tests with coverage, on a fresh machine. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh test
bin=${VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/lint-imports"
"$bin/python" -m pytest --cov=rlhf_accel --cov-report=term "$@"
