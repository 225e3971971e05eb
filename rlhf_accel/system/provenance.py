"""The environment of a run: versions, machine, processes, commit. Knows no run and none of its files."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from rlhf_accel.system.version import __version__

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "datasets", "tokenizers", "numpy")
_TIMEOUT = 5.0  # seconds for git, which may wait for a network file system


def environment(processes: int, device: torch.device) -> dict[str, Any]:
    """Versions of the installed packages, the machine of this process, and the number and device of the processes."""
    machine: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["gpus_here"] = torch.cuda.device_count()
        machine["cuda"] = torch.version.cuda
    commit = _commit(Path(__file__).resolve().parents[2])
    return {
        "processes": processes,
        "device": device.type,
        "machine": machine,
        "versions": versions(_PACKAGES),
        **({} if commit is None else {"commit": commit}),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of this package, of Python, and of those of the packages that are installed."""
    found = {name: _version(name) for name in packages}
    installed = {name: number for name, number in found.items() if number is not None}
    return {"rlhf_accel": __version__, "python": platform.python_version(), **installed}


@cache
def _version(package: str) -> str | None:
    # Kept, since reading it takes milliseconds and every checkpoint notes it.
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The model name of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit(checkout: Path) -> str | None:
    """The commit of a checkout, marked if tracked files have changed since; None if the folder is not a checkout."""
    if not (checkout / ".git").exists():  # else git would report the repository around an installed package
        return None
    commands = (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(checkout), *command], capture_output=True, text=True, timeout=_TIMEOUT, check=True
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}, changed" if changes else commit
