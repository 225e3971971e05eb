#!/usr/bin/env bash
# The main job on the default recipe, on a fresh machine: environment, assets, reward model, PPO. Arguments go to train.
#   scripts/quickstart.sh [--section.key value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh quickstart
exec "${VENV:-.venv}/bin/python" scripts/train.py "$@"
