#!/usr/bin/env bash
# Lint, types, import order and all tests, on a fresh machine. Arguments go to pytest, such as --cov=rlhf_accel.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh test
bin=${VENV:-.venv}/bin
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/lint-imports"
# Two files at a time, each on a thread of its own: the models are tiny. Their order: tests/conftest.py.
OMP_NUM_THREADS=1 "$bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"

# Beside each other: the types, and a small part of the tests again as each kind of CPU, which is oneDNN without bf16
# units, and `auto` as where the CPU has them.
kind() {
    env "$1" OMP_NUM_THREADS=1 "$bin/python" -m pytest -q -m cpu_kinds tests/test_cpu_kinds.py tests/test_cpu_kernels.py \
        tests/test_policy.py tests/test_reward.py
}
started=()
start() { # NAME COMMAND...
    "${@:2}" >"$logs/$1" 2>&1 &
    started+=("$1:$!")
}
start mypy "$bin/mypy"
for name in ONEDNN_MAX_CPU_ISA=AVX2 RLHF_ACCEL_CPU_BF16=1; do
    start "$name" kind "$name"
done
status=0
for job in "${started[@]}"; do
    wait "${job##*:}" || status=1
    echo "${job%:*}"
    cat "$logs/${job%:*}"
done
exit "$status"
