#!/usr/bin/env bash
# Makes the virtual environment that the other scripts use, once: pinned packages and this package in editable form.
#   scripts/setup.sh EXTRA     EXTRA is `quickstart` or `test`
# $VENV says where it goes (default .venv in the checkout), $PYTHON which Python makes it (default python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:?usage: scripts/setup.sh quickstart|test}
venv=${VENV:-.venv}

# Without pip it is what a first try left behind where python3-venv was missing.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "error: Python 3.10 or later is needed; name one with PYTHON=…" >&2; exit 1; }
  "${PYTHON:-python3}" -m venv --clear "$venv" ||
    { echo "error: no virtual environment could be made (on Debian: apt-get install python3-venv)" >&2; exit 1; }
fi
# Made again when the pins or the package's needs change, otherwise a matter of milliseconds.
wanted=$(cat constraints.txt setup.cfg pyproject.toml | sha256sum | cut -c1-16)
stamp=$venv/.installed-$extra
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing into $venv …"
  # torch together with its pin, or hundreds of megabytes of CUDA packages come for nothing on a CPU.
  "$venv/bin/python" -m pip install --quiet --constraint constraints.txt torch --editable ".[$extra]"
  echo "$wanted" >"$stamp"
fi
