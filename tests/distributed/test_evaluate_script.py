"""scripts/evaluate.py under a launch file: two processes, with cut weights, say what one says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_accel.commands import evaluate, parsers
from rlhf_accel.config.loading import parse
from rlhf_accel.config.schema import Config
from rlhf_accel.training.ppo_trainer import PPOTrainer
from tests.distributed.conftest import tree
from tests.distributed.launch import ROOT, launched, run, truly_cut

pytestmark = pytest.mark.usefixtures("exact_fp32")


def test_two_processes_under_zero3_say_what_one_says(gpt2_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    """Of three prompts one process has two and the other one."""
    folder = tmp_path / "run"
    settings = {
        "run": {"output_dir": str(folder), "total_steps": 2, "eval_every": 0, "eval_samples": 3, "precision": "fp32"},
        "reward": {"gold": "tests.test_ppo_trainer:length", "calibrate": True},
        "optim": {"lr": 0.02},
    }
    PPOTrainer(parse(Config, tree(gpt2_folder, prompts_file, settings))).fit()
    names = ("evaluation.json", "frontier.json")
    arguments = ["--which", "final", "--frontier", "5", "--trust_code"]
    evaluate.main(parsers.evaluate([str(folder), *arguments]))
    alone = [json.loads((folder / name).read_text(encoding="utf-8")) for name in names]
    for name in names:
        (folder / name).unlink()
    options = truly_cut(tmp_path, "zero3")
    script = ROOT / "scripts" / "evaluate.py"
    # Without bf16 units, which the script would use, since it is compared digit by digit.
    done = run(launched("zero3", 2, script, str(folder), *arguments, options=options), ONEDNN_MAX_CPU_ISA="AVX2")
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("evaluating final on 3 held-out prompts") == 1, "one process speaks"
    together = [json.loads((folder / name).read_text(encoding="utf-8")) for name in names]
    assert leaves(together) == pytest.approx(leaves(alone), abs=1e-4)
    final = alone[0]["models"]["final"]
    assert final["kl"] > 0.01, "a model that has not moved would not tell if its weights were not read"


def leaves(value: object) -> list[float]:
    """All numbers of a tree, in order."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in leaves(value[key])]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [float(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []
