"""A checkpoint of ZeRO-3, by the unchanged scripts/train.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.distributed.conftest import tree
from tests.distributed.launch import ROOT, launched, rows, run


def test_a_run_goes_on_under_zero3(gpt2_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    """The third step after a checkpoint is the third step of the run that wrote it and went on."""
    settings = {"run": {"eval_samples": 0, "total_steps": 3, "save_every": 2}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree(gpt2_folder, prompts_file, settings)), encoding="utf-8")
    for options in (["whole"], ["resumed", "--run.resume", str(tmp_path / "whole" / "checkpoints" / "step-000002")]):
        arguments = ["--config", str(tmp_path / "run.yaml"), "--run.output_dir", str(tmp_path / options[0])]
        done = run(launched("zero3", 2, ROOT / "scripts" / "train.py", *arguments, *options[1:]))
        assert done.returncode == 0, done.stderr[-5000:]
    whole, resumed = rows(tmp_path / "whole" / "metrics.jsonl"), rows(tmp_path / "resumed" / "metrics.jsonl")
    assert [row["step"] for row in resumed] == [3]
    for key in ("objective/score", "objective/kl", "loss/value", "optim/grad_norm"):
        assert resumed[0][key] == pytest.approx(whole[2][key], rel=1e-5, abs=1e-7), key
