"""Runs that resume as if they had never stopped."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from rlhf_accel.config.keys import key_names
from rlhf_accel.config.schema import Config
from rlhf_accel.runs import checkpoint, exports
from rlhf_accel.runs.summary import reward_scale
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.training.ppo_trainer import PPOTrainer
from tests.test_checkpoint import found

pytestmark = pytest.mark.usefixtures("exact_fp32")


def rows_of(folder, name="metrics.jsonl"):
    """Rows without times and memory."""
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))} for row in rows]


def final_weights(folder):
    name = "adapter_model.safetensors" if (folder / "final" / "adapter_config.json").exists() else "model.safetensors"
    return load_file(folder / "final" / name) | exports.load_value_head(folder / "final")


@pytest.mark.parametrize("lora", [{"r": 0}, {"r": 4}])
def test_a_resumed_run_is_the_run_that_never_stopped(tiny, tmp_path, lora):
    """All state between steps matters: Adam's moments, the schedule's position, the KL coefficient, calibration."""
    whole = tiny(
        run={"total_steps": 4, "save_every": 2, "eval_every": 2, "sample_every": 1, "output_dir": str(tmp_path / "a")},
        lora=lora,
        reward={"calibrate": True, "calibrate_samples": 16},
        ppo={"kl_target": 0.1, "kl_horizon": 32},
        optim={"lr": 3e-3, "warmup_steps": 3},
    )
    PPOTrainer(whole).fit()
    expected = rows_of(tmp_path / "a")
    assert [row["step"] for row in expected] == [1, 2, 3, 4]
    assert expected[3]["kl/coef"] != expected[1]["kl/coef"]

    # The folder of a run that was killed in its fourth step.
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000004")
    shutil.rmtree(tmp_path / "b" / "final")
    (tmp_path / "b" / "checkpoints" / "latest").write_text("step-000002")
    metrics = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b" / "metrics.jsonl").write_text("".join(metrics[:3]))

    run = {**vars(whole.run), "output_dir": str(tmp_path / "b"), "resume": "latest"}
    resumed = tiny(run=run, lora=lora, reward=vars(whole.reward), ppo=vars(whole.ppo), optim=vars(whole.optim))
    PPOTrainer(resumed).fit()
    assert rows_of(tmp_path / "b") == expected
    assert rows_of(tmp_path / "b", "samples.jsonl") == rows_of(tmp_path / "a", "samples.jsonl")
    ours, theirs = final_weights(tmp_path / "b"), final_weights(tmp_path / "a")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_can_be_named(tiny, tmp_path):
    run = {"total_steps": 2, "save_every": 1, "eval_samples": 0, "output_dir": str(tmp_path / "a")}
    PPOTrainer(tiny(run=run)).fit()
    place = tmp_path / "a" / "checkpoints" / "step-000001"
    trainer = PPOTrainer(tiny(run={**run, "output_dir": str(tmp_path / "b"), "resume": str(place)}))
    trainer.fit()
    assert rows_of(tmp_path / "b") == rows_of(tmp_path / "a")[1:]


def test_going_back_to_an_older_checkpoint_leaves_no_gap(tiny, tmp_path):
    """Even though newer ones are still there when the run is killed again before it saves."""
    run = {
        "total_steps": 4,
        "save_every": 1,
        "keep_checkpoints": 0,
        "eval_samples": 0,
        "output_dir": str(tmp_path / "a"),
    }
    PPOTrainer(tiny(run=run)).fit()
    expected = rows_of(tmp_path / "a")
    (tmp_path / "a" / "summary.json").unlink()
    back = {**run, "resume": str(tmp_path / "a" / "checkpoints" / "step-000002")}
    killed = PPOTrainer(tiny(run=back))
    killed.prepare()
    killed.run.recorder.open(killed.progress, killed.run.resume_from)
    assert len(rows_of(tmp_path / "a")) == 2
    PPOTrainer(tiny(run={**run, "resume": "latest"})).fit()
    assert rows_of(tmp_path / "a") == expected


def test_resuming_a_run_in_the_folder_of_another_is_refused(tiny, tmp_path):
    run = {"total_steps": 2, "save_every": 1, "eval_samples": 0}
    for name in ("a", "b"):
        PPOTrainer(tiny(run={**run, "output_dir": str(tmp_path / name)})).fit()
    place = tmp_path / "a" / "checkpoints" / "step-000001"
    with pytest.raises(ConfigError, match=r"^run\.output_dir=.*b holds another run than run\.resume=.*a/checkpoints"):
        PPOTrainer(tiny(run={**run, "output_dir": str(tmp_path / "b"), "resume": str(place)}))


def test_rows_that_are_torn_before_the_checkpoint_are_reported(tiny, tmp_path):
    run = {"total_steps": 3, "save_every": 2, "eval_samples": 0, "output_dir": str(tmp_path / "a")}
    PPOTrainer(tiny(run=run)).fit()
    metrics = tmp_path / "a" / "metrics.jsonl"
    first, second, third = metrics.read_text().splitlines(keepends=True)
    resumed = tiny(run={**run, "total_steps": 4, "resume": "latest"})
    metrics.write_text(first + "\0\0\0\n" + second)
    with pytest.raises(ConfigError, match=r"cannot be resumed: line 2 is torn, and rows up to step 2 follow it$"):
        PPOTrainer(resumed).fit()
    metrics.write_text(first + second + third[:9] + "\n" + third + third[:5])
    PPOTrainer(resumed).fit()
    assert [row["step"] for row in rows_of(tmp_path / "a")] == [1, 2, 3, 4]


def test_weights_of_another_shape_are_refused_though_the_change_is_meant(tiny, tmp_path):
    run = {"total_steps": 1, "save_every": 1, "eval_samples": 0, "output_dir": str(tmp_path / "a")}
    PPOTrainer(tiny(run=run, lora={"r": 4})).fit()
    run |= {"total_steps": 2, "resume": "latest", "changes": ["lora.r"]}
    with pytest.raises(ConfigError, match=r"holds weights of another model \(policy.*lora_A"):
        PPOTrainer(tiny(run=run, lora={"r": 2}))


def test_an_old_checkpoint_that_cannot_be_removed_fails_nothing(tiny, tmp_path, monkeypatch, capsys):
    def stuck(path, *rest, **settings):
        if path.name == "step-000001":
            raise OSError(16, "Device or resource busy", str(path))
        rmtree(path, *rest, **settings)

    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", stuck)
    run = {
        "total_steps": 4,
        "save_every": 1,
        "eval_samples": 0,
        "output_dir": str(tmp_path / "a"),
        "max_failed_saves": 1,
    }
    PPOTrainer(tiny(run={**run, "keep_checkpoints": 1})).fit()
    assert "warning: an old checkpoint could not be removed: Device or resource busy" in capsys.readouterr().out
    assert found(tmp_path / "a", total_steps=9, changes=list(key_names(Config))).name == "step-000004"


def test_a_run_that_crashes_can_be_resumed(tiny, tmp_path):
    calls = []

    def fails_once(prompts, responses, **columns):
        calls.append(len(prompts))
        if len(calls) == 4:  # a trial at the start, then once a step
            raise RuntimeError("the power went out")
        return [response.count("o") for response in responses]

    run = {"total_steps": 4, "save_every": 1, "eval_samples": 0, "output_dir": str(tmp_path / "a")}
    config = tiny(run=run, reward={"function": [], "retries": 0})
    with pytest.raises(RunFailed, match="the power went out"):
        PPOTrainer(config, reward=fails_once).fit()
    assert [row["step"] for row in rows_of(tmp_path / "a")] == [1, 2]
    PPOTrainer(tiny(run={**run, "resume": "latest"}, reward={"function": [], "retries": 0}), reward=fails_once).fit()
    assert [row["step"] for row in rows_of(tmp_path / "a")] == [1, 2, 3, 4]
    PPOTrainer(tiny(run={**run, "output_dir": str(tmp_path / "b")}, reward={"function": []}), reward=fails_once).fit()
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")


def test_a_finished_run_is_not_resumed(tiny, tmp_path):
    """It would write its summary again, without the earlier results."""
    run = {"total_steps": 2, "save_every": 2, "output_dir": str(tmp_path / "a")}
    PPOTrainer(tiny(run=run)).fit()
    summary = (tmp_path / "a" / "summary.json").read_text()
    with pytest.raises(ConfigError, match=r"is finished: 2 steps, its model is .*final; raise run\.total_steps"):
        PPOTrainer(tiny(run={**run, "resume": "latest"}))
    assert (tmp_path / "a" / "summary.json").read_text() == summary
    PPOTrainer(tiny(run={**run, "total_steps": 3, "resume": "latest"})).fit()
    assert len(rows_of(tmp_path / "a")) == 3


def test_best_of_another_folder_is_not_ours(tiny, tmp_path):
    """Otherwise a run resumed in a new folder would have no best/ until it beats one in another folder."""
    run = {"total_steps": 1, "save_every": 1, "output_dir": str(tmp_path / "a")}
    PPOTrainer(tiny(run=run)).fit()
    place = tmp_path / "a" / "checkpoints" / "step-000001"
    progress, other = checkpoint.load_progress(place), PPOTrainer(tiny(run={**run, "output_dir": str(tmp_path / "c")}))
    checkpoint.save_checkpoint(tmp_path / "a", replace(progress, best_score=1e9), other.runtime, other.config)
    PPOTrainer(tiny(run={**run, "total_steps": 2, "output_dir": str(tmp_path / "b"), "resume": str(place)})).fit()
    assert (tmp_path / "b" / "best").is_dir()


def test_a_coefficient_that_was_changed_on_purpose_is_the_new_one(tiny, tmp_path):
    run = {"total_steps": 1, "save_every": 1, "eval_samples": 0, "output_dir": str(tmp_path / "a")}
    PPOTrainer(tiny(run=run, ppo={"kl_coef": 0.1})).fit()
    run |= {"total_steps": 2, "resume": "latest", "changes": ["ppo.kl_coef"]}
    PPOTrainer(tiny(run=run, ppo={"kl_coef": 0.3})).fit()
    assert [row["kl/coef"] for row in rows_of(tmp_path / "a")] == [0.1, 0.3]


@pytest.mark.parametrize("text", ['{"steps": 3}', '{"calibration": null}', '{"calibration": {"mean": "x", "std": 1}}'])
def test_a_summary_without_its_scale_is_named(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(ConfigError, match=r"summary\.json does not have the form.*calibration"):
        reward_scale(tmp_path)
