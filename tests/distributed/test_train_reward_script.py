"""scripts/train_reward.py under a launch file: what two processes with cut weights write is a whole model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_accel.config.schema import RewardConfig
from rlhf_accel.reward import Classifier
from tests.distributed.launch import ROOT, launched, run, truly_cut


@pytest.mark.parametrize("rank", [0, 2])
def test_zero3_writes_the_model_that_its_figures_are_of(classifier_folder: Path, tmp_path: Path, rank: int) -> None:
    """The best checkpoint of two, of a full model and of one with adapters; the last rows are no whole batch."""
    words = {"awful": -2.0, "dull": -1.0, "good": 1.0, "superb": 2.0}
    rows = [{"text": f"a {word} film {i}", "rating": words[word]} for i in range(9) for word in words]
    parts = {"learned": rows[:25], "tuned": rows[25:30], "held": rows[29:]}
    for name, part in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    folder = tmp_path / "reward"
    settings = {
        "run.output_dir": folder,
        "run.precision": "fp32",
        "run.eval_every": 0.5,
        "model.name_or_path": classifier_folder,
        "lora.r": rank,
        "data.source": tmp_path / "learned.jsonl",
        "data.tuning_split": tmp_path / "tuned.jsonl",
        "data.eval_split": tmp_path / "held.jsonl",
        "optim.lr": 0.003,
        "optim.batch_size": 4,
    }
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    script = ROOT / "scripts" / "train_reward.py"
    # Without bf16 units, which the script would use: its figures are compared with what this process computes.
    command = launched("zero3", 2, script, *options, options=truly_cut(tmp_path, "zero3"))
    done = run(command, ONEDNN_MAX_CPU_ISA="AVX2")
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count(f"wrote {folder}") == 1, "one process speaks"
    assert not any(path.is_dir() for path in folder.iterdir()), "no part of a checkpoint is left in it"
    score = Classifier(RewardConfig(model=str(folder), dtype="fp32"), str(folder), torch.device("cpu"))
    held = parts["held"]
    scores = np.array(score([""] * len(held), [row["text"] for row in held]))
    metrics = json.loads((folder / "reward_metrics.json").read_text(encoding="utf-8"))
    assert metrics["reward/eval_rows"] == len(held) == 7
    error = np.mean((scores - [row["rating"] for row in held]) ** 2)
    assert error == pytest.approx(metrics["reward/mse"], rel=1e-4)
