#!/usr/bin/env bash
# All that a CPU cannot show, on one GPU, in one call of under ten minutes without a network; see docs/gpu.md.
#   scripts/gpu_check.sh [FOLDER [--tiny] [--parts NAME ...]]    # writes FOLDER/gpu_check.json and gpu_check.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-gpu_check}
shift || true
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python}" -m tests.gpu.check "$folder" "$@"
