#!/usr/bin/env bash
# Lint, types, import order and all tests, on a fresh machine. Arguments go to pytest, such as --cov=rlhf_accel.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh test
bin=${VENV:-.venv}/bin

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/lint-imports"
types=$(mktemp)
trap 'rm -f "$types"' EXIT
"$bin/mypy" >"$types" 2>&1 & # beside the tests
mypy=$!
# Two files at a time, each on a thread of its own: the models are tiny. Their order, and why processes are forks:
# tests/conftest.py and tests/forks.py.
status=0
OMP_NUM_THREADS=1 "$bin/python" -m tests.forks run -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" || status=1
wait "$mypy" || status=1
cat "$types"
exit "$status"
