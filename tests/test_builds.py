"""DeepSpeed's builds: abandoned locks are removed and held ones stay; tools that are missing are named."""

import os
import time
from pathlib import Path

import pytest

from rlhf_accel.distributed import builds
from rlhf_accel.distributed.builds import check_tools, remove_abandoned_locks
from rlhf_accel.system.errors import ConfigError


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "cpu_adam" / "lock"
    path.parent.mkdir()
    path.touch()
    old = time.time() - 400
    os.utime(path, (old, old))
    return path


def test_the_lock_of_a_killed_build_is_removed(lock: Path, capfd: pytest.CaptureFixture[str]) -> None:
    remove_abandoned_locks()
    assert not lock.exists()
    assert str(lock) in capfd.readouterr().err


def test_a_held_lock_stays(lock: Path) -> None:
    with lock.open():
        remove_abandoned_locks()
    assert lock.exists()


def test_a_recent_lock_is_removed_after_the_patience(lock: Path, capfd: pytest.CaptureFixture[str]) -> None:
    now = time.time() - 0.5
    os.utime(lock, (now, now))
    remove_abandoned_locks(patience=1.0)
    assert not lock.exists()
    assert "waiting" in capfd.readouterr().err


def test_the_lock_of_another_extension_stays(lock: Path) -> None:
    other = lock.parent.with_name("flash_attn")
    lock.parent.rename(other)
    remove_abandoned_locks()
    assert (other / "lock").exists()


@pytest.mark.parametrize(
    ("found", "nvcc", "missing"),
    [
        ({"c++", "ninja"}, False, None),
        ({"ninja"}, False, r"needs c\+\+;"),
        ({"c++"}, False, "needs ninja;"),
        ({"c++", "ninja"}, True, "needs nvcc "),
        (set(), True, r"needs c\+\+ and ninja and nvcc "),
    ],
)
def test_offload_names_the_tools_that_are_missing(
    monkeypatch: pytest.MonkeyPatch, found: set[str], nvcc: bool, missing: str | None
) -> None:
    """Also nvcc, for a DeepSpeed that builds a CUDA extension; no tool is needed without offload."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(builds.shutil, "which", lambda name: name if name in found else None)
    monkeypatch.setattr(builds, "_needs_nvcc", lambda: nvcc)
    check_tools({"stage": 3})
    check_tools({"stage": 3, "offload_optimizer": {"device": "none"}})
    offloaded = {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    if missing is None:
        check_tools(offloaded)
    else:
        with pytest.raises(ConfigError, match=missing) as refused:
            check_tools(offloaded)
        assert refused.value.key == "zero_optimization.offload_optimizer"
