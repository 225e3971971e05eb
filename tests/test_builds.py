"""DeepSpeed's builds: abandoned locks are removed and held ones stay; tools that are missing are named."""

import os
import time
from pathlib import Path

import pytest
import torch
from deepspeed import git_version_info
from torch.utils import cpp_extension

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
    monkeypatch.setattr(builds, "_has_nvcc", lambda: False)
    check_tools({"stage": 3})
    check_tools({"stage": 3, "offload_optimizer": {"device": "none"}})
    offloaded = {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    if missing is None:
        check_tools(offloaded)
    else:
        with pytest.raises(ConfigError, match=missing) as refused:
            check_tools(offloaded)
        assert refused.value.key == "zero_optimization.offload_optimizer"


def test_a_compiled_deepspeed_needs_no_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a config whose offload is null; an empty CXX means the default compiler, as for torch."""
    monkeypatch.setattr(builds.shutil, "which", lambda name: None)
    monkeypatch.setattr(builds, "_needs_nvcc", lambda: False)
    monkeypatch.setenv("CXX", "")
    offloaded = {"offload_optimizer": {"device": "cpu"}}
    with pytest.raises(ConfigError, match=r"needs c\+\+ and ninja;"):
        check_tools(offloaded)
    check_tools({"offload_optimizer": None})
    monkeypatch.setitem(git_version_info.installed_ops, "cpu_adam", True)
    check_tools(offloaded)


@pytest.mark.parametrize("built", [True, False])
def test_nvcc_is_the_one_of_the_toolkit_and_not_needed_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: bool
) -> None:
    """DeepSpeed's AdamW for the CPU has been plain C++ since 0.19."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not builds._needs_nvcc()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    if built:
        compiler.touch(mode=0o755)
    assert builds._has_nvcc() == built
