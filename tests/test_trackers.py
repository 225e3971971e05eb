"""Trackers: the real TensorBoard, stand-ins for the other libraries; a failure is reported once and ends nothing."""

import json
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_accel import __main__ as command_line
from rlhf_accel.config.loading import to_yaml
from rlhf_accel.distributed import trackers
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.training.ppo_trainer import PPOTrainer

pytestmark = pytest.mark.usefixtures("exact_fp32")

ROWS = [{"prompt": "The | film", "response": "a\nb<i>", "score": 0.5, "kl": 1.25}]


class Broken:
    """A tracker whose server is gone: every call fails."""

    name = "broken"

    def log(self, values, step=None):
        raise RuntimeError("the server\nis gone")

    def finish(self):
        raise ValueError("never finished")

    tracker = None


def test_a_tracker_that_fails_is_reported_once_and_ends_nothing(tiny, monkeypatch, capsys):
    trainer = PPOTrainer(tiny(run={"total_steps": 3, "eval_samples": 0, "sample_every": 1}))
    monkeypatch.setattr(trainer.runtime.trackers, "_start", lambda *_: None)
    trainer.runtime._accelerator.trackers = [Broken()]
    assert trainer.fit()["steps"] == 3
    message = " ".join(capsys.readouterr().out.split())
    assert message.count("broken failed") == 1
    assert "warning: run.trackers: broken failed (RuntimeError: the server is gone)" in message
    assert len((trainer.folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_tracker_that_fails_only_at_the_end_is_reported(tiny, monkeypatch, capsys):
    trainer = PPOTrainer(tiny(run={"total_steps": 1, "eval_samples": 0}))
    broken = Broken()
    broken.log = lambda values, step=None: None
    monkeypatch.setattr(trainer.runtime.trackers, "_start", lambda *_: None)
    trainer.runtime._accelerator.trackers = [broken]
    assert trainer.fit()["steps"] == 1
    assert "broken failed (ValueError: never finished)" in " ".join(capsys.readouterr().out.split())


def test_a_tracker_that_is_not_installed_is_refused_before_anything_loads(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("rlhf_accel.distributed.trackers.get_available_trackers", lambda: ["tensorboard"])
    (tmp_path / "config.yaml").write_text(to_yaml(tiny(run={"trackers": ["tensorboard", "mlflow", "comet_ml"]})))
    with pytest.raises(SystemExit) as stopped:
        command_line.main(
            ["train", "--config", str(tmp_path / "config.yaml"), "--model.name_or_path", "/no/such/model"]
        )
    assert stopped.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert "mlflow, comet_ml is not installed; pip install mlflow comet-ml" in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("project", ["a/b", "..", "what?"])
def test_a_project_that_is_not_a_name_is_refused(tiny, project):
    with pytest.raises(ConfigError, match=r"run\.project="):
        tiny(run={"project": project})


def test_tensorboard_shows_each_step_once_after_a_resume_with_samples_and_the_config(tiny, tmp_path):
    """A crash after step 3 with a checkpoint of step 2: step 3 is logged twice."""
    run = {"trackers": ["tensorboard"], "total_steps": 4, "save_every": 2, "eval_samples": 0, "sample_every": 1}
    trainer = PPOTrainer(tiny(run=run))
    step = trainer.step

    def crashes(prompts):
        if trainer.progress.step == 3:
            raise OSError("the machine is gone")
        return step(prompts)

    trainer.step = crashes
    with pytest.raises(OSError, match="machine"):
        trainer.fit()
    PPOTrainer(tiny(run={**run, "resume": "latest"})).fit()
    place = tmp_path / "run" / "trackers" / "rlhf_accel"
    events = EventAccumulator(str(place)).Reload()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["objective/score"] for row in rows}
    assert [event.step for event in events.Scalars("objective/score")] == [1, 2, 3, 4]
    assert {event.step: event.value for event in events.Scalars("objective/score")} == pytest.approx(scores)
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/text_summary")}
    assert sorted(texts) == [1, 2, 3, 4]
    assert texts[1].startswith("| prompt | response | score | kl |\n| --- | --- | --- | --- |\n")
    assert len(texts[1].splitlines()) == 2 + 4
    assert len(list(place.glob("*/hparams.yml"))) == 1, "the config is listed again each time the run is resumed"
    assert "optim.lr: 0.001" in next(place.glob("*/hparams.yml")).read_text()


def test_a_resumed_run_is_the_same_run_for_each_tracker(tmp_path):
    """W&B by id, MLflow by run id, trackio by name; TensorBoard drops the steps that are logged again. MLflow keeps
    its config; trackio would have none."""
    started = trackers.settings("mine", tmp_path, None)
    assert started["tensorboard"] == {}
    assert (started["wandb"]["id"], started["mlflow"]["run_id"]) == (None, None)
    assert started["trackio"] == {"name": "mine", "resume": "never"}
    natives = {
        "wandb": types.SimpleNamespace(id="w1"),
        "mlflow": types.SimpleNamespace(info=types.SimpleNamespace(run_id="m1")),
        "trackio": types.SimpleNamespace(name="mine"),
        "aim": object(),
    }
    trackers.remember(natives, tmp_path)
    assert not trackers.has_settings("mlflow", tmp_path, None), "a new run in this folder"
    assert trackers.has_settings("mlflow", tmp_path, 5)
    assert not trackers.has_settings("tensorboard", tmp_path, 5)
    assert not trackers.has_settings("trackio", tmp_path, 5)
    resumed = trackers.settings("renamed", tmp_path, 5)
    assert resumed["tensorboard"] == {"purge_step": 5}
    assert (resumed["wandb"]["id"], resumed["wandb"]["resume"]) == ("w1", "allow")
    assert resumed["mlflow"]["run_id"] == "m1"
    assert resumed["trackio"] == {"name": "mine", "resume": "allow"}


def test_each_library_gets_its_kind_of_table(monkeypatch):
    """By stand-ins for libraries that are not installed."""
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((values, step)), info=types.SimpleNamespace(run_id="m1")
    )
    wandb = types.ModuleType("wandb")
    wandb.Table = lambda columns, data: ("wandb", columns, data)
    trackio = types.ModuleType("trackio")
    trackio.Table = lambda dataframe: ("trackio", dataframe.to_dict("records"))
    mlflow = types.ModuleType("mlflow")
    mlflow.log_table = lambda data, artifact_file, run_id: calls.append((data, artifact_file, run_id))
    for module in (wandb, trackio, mlflow):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("wandb", "trackio", "mlflow", "aim"):
        trackers.push_table(name, run, "samples", ROWS, 7)
    assert calls == [
        ({"samples": ("wandb", ["prompt", "response", "score", "kl"], [["The | film", "a\nb<i>", 0.5, 1.25]])}, 7),
        ({"samples": ("trackio", ROWS)}, 7),
        (
            {"step": [7], "prompt": ["The | film"], "response": ["a\nb<i>"], "score": [0.5], "kl": [1.25]},
            "samples.json",
            "m1",
        ),
    ]


def test_trackers_get_the_names_they_take():
    calls = []
    trackers_of_run = [
        types.SimpleNamespace(name=name, log=lambda values, step, name=name: calls.append((name, values)))
        for name in ("mlflow", "wandb")
    ]
    accelerator = types.SimpleNamespace(is_main_process=True, trackers=trackers_of_run)
    sent = {"objective/score": 1.0, "objective/score/length": 2.0}
    assert trackers.Trackers(accelerator, ["mlflow", "wandb"]).log(sent, 1) == []
    assert calls == [("mlflow", {"objective/score": 1.0, "objective/score.length": 2.0}), ("wandb", sent)]


def test_a_text_stays_in_its_cell():
    assert trackers.markdown_rows(ROWS).splitlines()[2] == r"| The \| film | a⏎b&lt;i> | +0.50 | +1.25 |"
