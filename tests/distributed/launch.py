"""Launches of several processes on this machine, as a user starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "distributed" / "worker.py"
TIMEOUT = 240


def environment(**more: str) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launched(config: str, processes: int, script: Path, *arguments: str) -> list[str]:
    """The command that runs `script` on `processes` processes under accelerate_configs/CONFIG.yaml."""
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")),
        *("--num_processes", str(processes), "--main_process_port", str(free_port())),
        *(str(script), *arguments),
    ]


def run(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def run_all(runs: list[dict[str, Any]], folder: Path, config: str | None, processes: int = 1) -> None:
    """The runs one after the other in one launch; in one plain process if `config` is None."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    arguments = str(folder / "runs.json")
    command = (
        [sys.executable, str(WORKER), arguments] if config is None else launched(config, processes, WORKER, arguments)
    )
    done = run(command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
