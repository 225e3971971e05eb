"""scripts/train.py as it is, under a launch file as it is."""

from __future__ import annotations

from pathlib import Path

import yaml
from transformers import AutoModelForCausalLM

from tests.distributed.conftest import tree
from tests.distributed.launch import ROOT, launched, rows, run


def test_the_script_trains_under_zero3(gpt2_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    settings = {"run": {"output_dir": str(tmp_path / "run"), "eval_samples": 0, "total_steps": 1}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree(gpt2_folder, prompts_file, settings)), encoding="utf-8")
    done = run(launched("zero3", 2, ROOT / "scripts" / "train.py", "--config", str(tmp_path / "run.yaml")))
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("run folder") == 1, "one process speaks"
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [1]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
