"""scripts/train.py as it is, under a launch file as it is, and by DeepSpeed's own launcher."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests import forks
from tests.distributed.conftest import RUNS, tree
from tests.distributed.launch import ROOT, free_port, launched, rows, run

SCRIPT = ROOT / "scripts" / "train.py"
# The ranks' interpreter is a word of its own, so that they are forks.
BY_DEEPSPEED = "import sys; sys.executable = sys.argv.pop(1); from deepspeed.launcher.launch import main; main()"


def test_the_script_trains_under_zero3(gpt2_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    settings = {"run": {"output_dir": str(tmp_path / "run"), "eval_samples": 0, "total_steps": 1}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree(gpt2_folder, prompts_file, settings)), encoding="utf-8")
    done = run(launched("zero3", 2, SCRIPT, "--config", str(tmp_path / "run.yaml")))
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("run folder") == 1, "one process speaks"
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [1]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")


def test_deepspeed_launches_the_script_as_accelerate_does(
    launched_runs: Callable[[str | None, int], Path], gpt2_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    own = {"output_dir": str(tmp_path / "run"), "matmul_precision": "highest"}
    settings = {"run": {**RUNS["full"]["run"], **own}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree(gpt2_folder, prompts_file, settings)), encoding="utf-8")
    hosts = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    command = [
        *(sys.executable, "-c", BY_DEEPSPEED, str(forks.python(tmp_path))),
        *(f"--world_info={hosts}", f"--master_port={free_port()}", str(SCRIPT)),
        *("--deepspeed", "ds_configs/zero2.json", "--config", str(tmp_path / "run.yaml")),
    ]
    done = run(command)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "; 2 processes under ZeRO-2 on " in done.stdout
    ours, theirs = rows(tmp_path / "run" / "metrics.jsonl"), rows(launched_runs("zero2", 2) / "full" / "metrics.jsonl")
    assert len(ours) == len(theirs) == RUNS["full"]["run"]["total_steps"]
    for one, other in zip(ours, theirs, strict=True):
        for key in ("objective/score", "objective/kl", "loss/policy", "loss/value", "optim/grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=2e-6), key
