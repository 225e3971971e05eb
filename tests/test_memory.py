"""The peak memory of this process, and what its control groups leave free."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_accel.system import memory
from rlhf_accel.system.memory import free_memory, peak_resident_mib


def test_the_peak_includes_memory_that_is_freed_again() -> None:
    before = peak_resident_mib()
    assert before == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, rel=0.5)
    taken = torch.ones(2**20, int(before) // 4 + 64)  # the peak again, and 256 MiB
    del taken
    assert peak_resident_mib() > before + 100


def test_free_memory_is_limited_by_the_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def group(place: str, **files: object) -> None:
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (tmp_path / place / name.replace("__", ".")).write_text(f"{content}\n")

    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "self")
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    assert free_memory() == 5000
    (tmp_path / "self").write_text("0::/job/step\n")
    group("job/step", memory__max="max", memory__current=10, memory__stat="inactive_file 5")
    assert free_memory() == 5000
    group("job", memory__max=1000, memory__current=900, memory__stat="anon 4\ninactive_file 300")
    assert free_memory() == 400
    (tmp_path / "self").write_text("5:cpu,cpuacct:/\n4:memory:/docker/1\n0::/\n")  # as a container sees it
    v1 = {"memory__limit_in_bytes": 700, "memory__usage_in_bytes": 650, "memory__stat": "total_inactive_file 20"}
    group("memory", **v1)
    assert free_memory() == 70
