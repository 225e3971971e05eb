"""What is marked `cpu_kinds`, again as each kind of CPU that can be forced: without bf16 units, and `auto` as where the
CPU has them."""

from __future__ import annotations

import os
import sys

import pytest

from tests import forks

MARKED = [f"tests/test_{name}.py" for name in ("cpu_kinds", "cpu_kernels", "policy", "reward")]


@pytest.mark.parametrize("kind", ["ONEDNN_MAX_CPU_ISA=AVX2", "RLHF_ACCEL_CPU_BF16=1"])
def test_what_holds_on_every_cpu_holds_on_this_kind(kind: str) -> None:
    name, _, value = kind.partition("=")
    env = {key: text for key, text in os.environ.items() if not key.startswith("PYTEST_")} | {name: value}
    done = forks.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cpu_kinds", *MARKED],
        cwd=forks.ROOT,
        env=env,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
