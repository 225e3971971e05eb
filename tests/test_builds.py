"""Locks of DeepSpeed's builds: abandoned ones are removed, held ones stay."""

import os
import time
from pathlib import Path

import pytest

from rlhf_accel.distributed.builds import remove_abandoned_locks


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
