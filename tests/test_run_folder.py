"""The folder of a run: chosen, claimed, made, and refused where it holds something else."""

from __future__ import annotations

import os

import pytest

from rlhf_accel.config.loading import load
from rlhf_accel.config.schema import Config
from rlhf_accel.runs import run_folder
from rlhf_accel.system import lock
from rlhf_accel.system.errors import ConfigError
from tests.test_checkpoint import run_config


def opened(config):
    folder = run_folder.choose_folder(config)
    folder, held = run_folder.make_folder(folder, config, run_folder.claim_folder(folder, config, [].append))
    held.release()
    return folder


def test_the_default_folder_is_the_first_free_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = opened(run_config(name="mine"))
    assert first.resolve() == tmp_path / "saved_models" / "mine"
    assert [path.name for path in first.iterdir()] == ["config.yaml"]
    assert opened(run_config(name="mine")).name == "mine-2"
    (tmp_path / "saved_models" / "mine-2" / "notes.txt").write_text("")
    assert opened(run_config(name="mine")).name == "mine-3"


def test_of_three_that_start_at_once_each_gets_a_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = run_config(name="mine")
    chosen = [run_folder.choose_folder(config) for _ in range(3)]
    made = [run_folder.make_folder(folder, config, run_folder.Claim(lock=None, state=()))[0] for folder in chosen]
    assert [folder.name for folder in chosen] == ["mine"] * 3
    assert made == [tmp_path / "saved_models" / name for name in ("mine", "mine-2", "mine-3")]


@pytest.mark.parametrize("resume", [None, "auto"])
@pytest.mark.parametrize("name", ["final", "best", "summary.json", "samples.jsonl", "metrics.jsonl", "dumps", ".best"])
def test_a_folder_with_what_a_run_would_overwrite_is_refused(tmp_path, name, resume):
    """The files are of another program: a run would have written config.yaml first."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match=rf"^run\.output_dir={tmp_path} (holds {name}|already holds)") as refused:
        run_folder.choose_folder(run_config(output_dir=str(tmp_path), resume=resume))
    assert refused.value.key == "run.output_dir"
    (tmp_path / "config.yaml").touch()  # killed before its text was written
    with pytest.raises(ConfigError, match=r"^run\.output_dir="):
        run_folder.choose_folder(run_config(output_dir=str(tmp_path), resume=resume))


def test_logs_of_a_scheduler_do_not_matter(tmp_path):
    """Slurm makes the folder of a job's output before the job starts."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "17.out").touch()
    assert run_folder.choose_folder(run_config(output_dir=str(tmp_path), resume="auto")) == tmp_path
    (tmp_path / "logs" / "rank-0.log").touch()
    with pytest.raises(ConfigError, match=r"holds logs/rank-0\.log"):
        run_folder.choose_folder(run_config(output_dir=str(tmp_path), resume="auto"))


def test_a_run_that_is_started_twice_with_auto_continues_once(tmp_path, monkeypatch):
    """The second is refused before it reads a checkpoint, and the folder does not change."""
    from tests.test_lock import elsewhere

    monkeypatch.setattr(lock, "ELSEWHERE", 0.0)
    config = run_config(output_dir=str(tmp_path), resume="auto")
    opened(config)
    elsewhere(tmp_path / ".lock")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"^run\.output_dir=.* is in use by another run \(process \d+ on node7"):
        run_folder.claim_folder(tmp_path, config, [].append)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_with_other_files_is_used(tmp_path):
    (tmp_path / "notes.txt").write_text("keep")
    assert opened(run_config(output_dir=str(tmp_path))) == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "notes.txt"]


@pytest.mark.parametrize("held", ["config.yaml", "metrics.jsonl", "checkpoints/latest"])
def test_a_folder_that_holds_a_run_is_refused_but_for_resuming(tmp_path, held):
    (tmp_path / held).parent.mkdir(exist_ok=True)
    (tmp_path / held).write_text("old")
    with pytest.raises(ConfigError, match=r"^run\.output_dir=.*already holds a run.*--run\.resume latest$"):
        opened(run_config(output_dir=str(tmp_path)))
    assert (tmp_path / held).read_text() == "old"
    assert opened(run_config(output_dir=str(tmp_path), resume="latest")) == tmp_path


def test_a_folder_that_another_run_took_since_is_refused(tmp_path):
    """It is chosen at the start and made much later, when the reward model is loaded and calibrated."""
    one, other = (run_folder.choose_folder(run_config(output_dir=str(tmp_path / "run"))) for _ in range(2))
    named = {"output_dir": str(one)}
    config = run_config(seed=2, resume="auto", **named)
    claim = run_folder.claim_folder(other, config, [].append)
    run_folder.make_folder(one, run_config(seed=1, **named), claim)[1].release()
    with pytest.raises(ConfigError, match=r"^run\.output_dir=.*taken by another run"):
        run_folder.make_folder(other, config, claim)
    with pytest.raises(ConfigError, match=r"^run\.output_dir=.*taken by another run"):
        run_folder.make_folder(other, run_config(seed=2, **named), claim)
    assert not (other / ".lock").exists()
    assert load(Config, tmp_path / "run" / "config.yaml") == run_config(seed=1, **named)
    opened(run_config(seed=3, resume="auto", changes=["run.seed"], output_dir=str(other)))
    assert load(Config, tmp_path / "run" / "config.yaml") == run_config(seed=3, output_dir=str(other))


@pytest.mark.parametrize("below", ["", "run", "a/b"])
def test_a_file_in_the_way_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"^run\.output_dir=.*is a file") as caught:
        run_folder.choose_folder(run_config(output_dir=str(tmp_path / "file" / below)))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    """The tests may run as root, who may write everywhere."""
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    with pytest.raises(ConfigError, match=r"^run\.output_dir=.*no permission in"):
        run_folder.choose_folder(run_config(output_dir=str(tmp_path / "run")))


def test_a_place_where_nothing_can_be_made_is_refused():
    with pytest.raises(ConfigError, match=r"^run\.output_dir=/proc/no_such_run cannot be written"):
        opened(run_config(output_dir="/proc/no_such_run"))


def test_choosing_a_folder_creates_nothing(tmp_path):
    folder = run_folder.choose_folder(run_config(output_dir=str(tmp_path / "a" / "b")))
    assert folder == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []
