"""Launches of several processes on this machine, as a user starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests import forks

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "distributed" / "worker.py"
TIMEOUT = 600


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


def launched(config: str, processes: int, script: Path, *arguments: str, options: Sequence[str] = ()) -> list[str]:
    """The command that runs `script` on `processes` processes under accelerate_configs/CONFIG.yaml."""
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")),
        *("--num_processes", str(processes), "--main_process_port", str(free_port())),
        *options,
        *(str(script), *arguments),
    ]


def run(command: list[str], *, fresh: bool = False, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs a command; a launch and its ranks are forks (tests/forks.py), or, if `fresh`, new interpreters."""
    if command[0] == sys.executable and not fresh:
        return forks.run(command, timeout=TIMEOUT, cwd=ROOT, env=environment(**more))
    return subprocess.run(
        command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def truly_cut(folder: Path, config: str) -> list[str]:
    """Options of `accelerate launch` by which ZeRO-3 lets go of every weight after its use: by default it keeps small
    ones, which are all that a tiny model has."""
    named = yaml.safe_load((ROOT / "accelerate_configs" / f"{config}.yaml").read_text(encoding="utf-8"))
    tree = json.loads((ROOT / named["deepspeed_config"]["deepspeed_config_file"]).read_text(encoding="utf-8"))
    for key in ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters", "prefetch_bucket_size"):
        tree["zero_optimization"][f"stage3_{key}"] = 0
    (folder / "deepspeed.json").write_text(json.dumps(tree), encoding="utf-8")
    return ["--deepspeed_config_file", str(folder / "deepspeed.json")]


def run_all(runs: list[dict[str, Any]], folder: Path, config: str | None, processes: int = 1) -> None:
    """The runs one after the other in one launch; in one plain process if `config` is None."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    arguments = str(folder / "runs.json")
    if config is None:
        command = [sys.executable, str(WORKER), arguments]
    else:
        options = truly_cut(folder, config) if config.startswith("zero3") else []
        command = launched(config, processes, WORKER, arguments, options=options)
    done = run(command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
