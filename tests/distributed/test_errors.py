"""What a launch of several processes says when something is wrong, and that it ends."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
import yaml

from tests.distributed.conftest import tree
from tests.distributed.launch import ROOT, launched, run

TRAIN = ROOT / "scripts" / "train.py"


def only_rank_one_fails(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    """A reward that works when it is tried out before training, and later fails on one rank only."""
    if os.environ["RANK"] == "1" and len(responses) > 2:
        raise OSError("the scorer of rank one is gone")
    return [float(len(response)) for response in responses]


@pytest.fixture
def config_file(gpt2_folder: Path, prompts_file: Path, tmp_path: Path) -> Path:
    config = tree(gpt2_folder, prompts_file, {"run": {"output_dir": str(tmp_path / "run"), "total_steps": 1}})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return tmp_path / "config.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--ppo.ppo_epoch", "2"], "unknown key ppo.ppo_epoch"),
        (["--data.text_field", "review"], "data.text_field=review"),
    ],
    ids=["config", "data"],
)
def test_a_bad_config_is_reported_once(override: list[str], message: str, config_file: Path) -> None:
    done = run(launched("ddp", 2, TRAIN, "--config", str(config_file), *override), fresh="--ppo.ppo_epoch" in override)
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count(f"error: {message}") == 1
    assert not (config_file.parent / "run").exists()


def test_one_rank_that_fails_ends_all_with_its_error(config_file: Path) -> None:
    reward = "tests.distributed.test_errors:only_rank_one_fails"
    done = run(launched("ddp", 2, TRAIN, "--config", str(config_file), "--reward.function", reward))
    assert done.returncode != 0
    assert "the scorer of rank one is gone" in done.stderr


def rank_one_hangs(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    if os.environ["RANK"] == "1" and len(responses) > 2:
        time.sleep(5)
    return [float(len(response)) for response in responses]


def test_a_rank_that_hangs_is_named_with_its_phase(config_file: Path) -> None:
    options = ["--reward.function", "tests.distributed.test_errors:rank_one_hangs", "--run.collective_timeout", "2"]
    done = run(launched("ddp", 2, TRAIN, "--config", str(config_file), "--run.eval_samples", "0", *options))
    assert done.returncode != 0
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.match(
        r"error: rank 0 lost contact after \d s in score of step 1; missing: rank 1 \(in score of step 1 since 20", said
    )
    for rank in (0, 1):
        log = (config_file.parent / "run" / "logs" / f"rank-{rank}.log").read_text()
        assert [line.split(" ", 1)[1] for line in log.splitlines()] == ["rollout of step 1", "score of step 1"]


def test_a_deepspeed_config_that_disagrees_names_both_keys(config_file: Path, tmp_path: Path) -> None:
    text = (ROOT / "ds_configs" / "zero2.json").read_text(encoding="utf-8")
    (tmp_path / "ds.json").write_text(text.replace('"gradient_clipping": "auto"', '"gradient_clipping": 0.5'))
    options = ["--deepspeed_config_file", str(tmp_path / "ds.json")]
    done = run(launched("zero2", 2, TRAIN, "--config", str(config_file), options=options))
    assert done.returncode != 0
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "gradient_clipping=0.5" in said[0] and "optim.max_grad_norm=1.0" in said[0]
