#!/usr/bin/env bash
# Lint, types, import order and all tests, on a fresh machine. Arguments go to pytest, such as --cov=rlhf_accel.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh test
bin=${VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/lint-imports"
# Two files at a time, each on a thread of its own: the models are tiny. Their order: tests/conftest.py.
OMP_NUM_THREADS=1 "$bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
# A small part again as each kind of CPU: oneDNN without bf16 units, and `auto` as where the CPU has them.
for kind in ONEDNN_MAX_CPU_ISA=AVX2 RLHF_ACCEL_CPU_BF16=1; do
    echo "$kind"
    env "$kind" OMP_NUM_THREADS=1 "$bin/python" -m pytest -q -m cpu_kinds tests/test_cpu_kinds.py tests/test_cpu_kernels.py \
        tests/test_policy.py tests/test_reward.py
done
