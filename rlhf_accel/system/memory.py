"""The memory that this process has used, and that it can still take; knows the control groups of Linux."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Files of control groups, version 2 and 1: limit, usage, and the file pages in memory.stat that the kernel frees first.
# The usage includes these pages, so a job that has read or written large files seems to have no memory left.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def peak_resident_mib() -> float:
    """The peak resident memory of this process so far, in MiB.

    On Linux from /proc, since getrusage starts at the peak of the parent process.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def free_memory() -> int:
    """Bytes that this process can still take: those of the machine, or fewer in a container or job with a limit."""
    return max(min([psutil.virtual_memory().available, *_free_in_cgroups()]), 0)


def _free_in_cgroups() -> Iterator[int]:
    """The bytes left under the limit of each control group of this process, and of the groups above it."""
    with suppress(OSError):
        for line in _CGROUP.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            base, names = (_CGROUPS / "memory", _V1) if controllers else (_CGROUPS, _V2)
            place = base / path.lstrip("/")
            for group in (place, *place.parents):
                if group.is_relative_to(base):
                    with suppress(OSError, ValueError):  # no such file, or "max"
                        yield _free_in(group, *names)


def _free_in(group: Path, limit: str, usage: str, cached: str) -> int:
    most, used = (int((group / name).read_text(encoding="ascii")) for name in (limit, usage))
    stat = [line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines()]
    return most - used + sum(int(size) for name, size in stat if name == cached)
