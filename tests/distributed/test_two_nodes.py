"""Two nodes, one process on each, by the script that people can run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

from tests import forks
from tests.distributed.conftest import RUNS, tree
from tests.distributed.launch import ROOT, WORKER, run
from tests.distributed.test_world_size import assert_same_run, assert_same_weights


def may_make_namespaces() -> bool:
    """Found out by making one."""
    name = f"rlhf-probe-{os.getpid()}"
    if shutil.which("ip") is None or subprocess.run(["ip", "netns", "add", name], check=False).returncode != 0:
        return False
    subprocess.run(["ip", "netns", "del", name], check=True)
    return True


@pytest.mark.two_nodes
@pytest.mark.parametrize(("config", "name"), [("multi_node_zero2", "lora"), ("multi_node_zero3", "full")])
def test_two_nodes_do_what_one_process_does(
    config: str, name: str, launched_runs, gpt2_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    runs = [{"config": tree(gpt2_folder, prompts_file, RUNS[name], {"run": {"output_dir": str(tmp_path / name)}})}]
    (tmp_path / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    done = run(
        ["bash", str(ROOT / "scripts" / "two_nodes.sh"), config, str(tmp_path / "runs.json")],
        PYTHON=str(forks.python(tmp_path)),
        SCRIPT=str(WORKER),
    )
    assert done.returncode == 0, done.stderr[-6000:]
    if may_make_namespaces():
        assert "two nodes: network namespaces rlhf" in done.stderr
    else:
        warnings.warn("no network namespaces here (root and iproute2): the two nodes met on loopback", stacklevel=1)
    alone = launched_runs(None, 1)
    assert_same_run(alone / name, tmp_path / name)
    assert_same_weights(alone / name / "final", tmp_path / name / "final")
