"""Checkpoints: whole or absent, checked, pruned, and found again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_accel.config.loading import parse
from rlhf_accel.config.schema import Config
from rlhf_accel.runs import checkpoint
from rlhf_accel.runs.resume import resume_folder
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.training.ppo_trainer import PPOTrainer

pytestmark = pytest.mark.usefixtures("exact_fp32")


def run_config(**run):
    return parse(Config, {"run": run})


class OnDisk:
    """A runtime for `save_checkpoint`, of one process that writes this text as its weights."""

    is_main, zero_stage, world_size, writes_shards = True, 0, 1, False

    def __init__(self, text):
        self.text = text

    def save_state(self, folder):
        (folder / "learned.safetensors").write_text(self.text)
        return "No space left on device" if self.text == "half" else None

    def from_main(self, make):
        return make()

    def first_failure(self, messages):
        return messages


def save(folder, step, text="whole", **run):
    progress = checkpoint.Progress(step=step, kl_coef=0.25 * step)
    config = run_config(output_dir=str(folder), **run)
    checkpoint.save_checkpoint(folder, progress, OnDisk(text), config)
    checkpoint.prune(folder, step, config.run.keep_checkpoints)


def found(folder, resume="latest", messages=None, **run):
    messages = [] if messages is None else messages
    return resume_folder(run_config(output_dir=str(folder), resume=resume, **run), folder, messages.append)


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    for resume in ("latest", str(tmp_path / "checkpoints" / "step-000002")):
        with pytest.raises(ConfigError, match=rf"^run\.resume={resume}"):
            found(tmp_path, resume)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"ended before its first checkpoint.*--run\.resume auto starts it again$"):
        found(tmp_path)


def test_auto_starts_where_there_is_nothing_to_resume_from(tmp_path):
    messages = []
    assert found(tmp_path, "auto", messages) is None
    assert messages == [f"run.resume=auto: {tmp_path} holds no checkpoint, so the run starts"]
    save(tmp_path, 3)
    assert found(tmp_path, "auto").name == "step-000003"


def test_a_checkpoint_that_breaks_off_leaves_the_last_one_in_place(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(checkpoint.SaveError, match="No space left"):
        save(tmp_path, 2, "half")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000001"]
    assert found(tmp_path).name == "step-000001"
    assert checkpoint.load_progress(found(tmp_path)) == checkpoint.Progress(step=1, kl_coef=0.25)
    save(tmp_path, 2)
    names = ["config.yaml", "learned.safetensors", "manifest.json", "progress.json"]
    assert (found(tmp_path).name, sorted(path.name for path in found(tmp_path).iterdir())) == ("step-000002", names)


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4]), (1, [4]), (2, [3, 4])])
def test_older_checkpoints_go_when_the_new_one_is_whole(tmp_path, keep, left):
    for step in (1, 2, 3):
        save(tmp_path, step, keep_checkpoints=0)
    with pytest.raises(checkpoint.SaveError):
        save(tmp_path, 4, "half", keep_checkpoints=keep)
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 3
    save(tmp_path, 4, keep_checkpoints=keep)
    names = [f"step-{step:06d}" for step in left]
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*")) == ["latest", *names]


def test_a_step_that_is_saved_again_is_never_absent(tmp_path, monkeypatch):
    """Between any two calls there is a whole checkpoint of this step, under one of two names."""
    save(tmp_path, 1)
    seen, rename, rmtree = [], Path.rename, shutil.rmtree

    def looked(call):
        def wrapped(path, *rest, **settings):
            seen.append(found(tmp_path, messages=[]).name)
            call(path, *rest, **settings)
            seen.append(found(tmp_path, messages=[]).name)

        return wrapped

    monkeypatch.setattr(Path, "rename", looked(rename))
    monkeypatch.setattr(shutil, "rmtree", looked(rmtree))
    save(tmp_path, 1, keep_checkpoints=1)
    assert set(seen) == {"step-000001", "step-000001.old"}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000001"]

    def fail(path, target):
        if path.name.startswith("."):
            raise OSError(5, "Input/output error")
        rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(checkpoint.SaveError, match="Input/output error"):
        save(tmp_path, 1, keep_checkpoints=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000001"]
    assert found(tmp_path).name == "step-000001"


def test_a_checkpoint_newer_than_the_one_named_latest_is_not_ours_to_remove_or_take(tmp_path):
    """The run was resumed from an older one, by its name or by writing `latest`."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "latest").write_text("step-000002")
    assert found(tmp_path).name == "step-000002"
    (tmp_path / "checkpoints" / "latest").write_text("nonsense")
    assert found(tmp_path).name == "step-000003"


def damages(path):
    """Ways to damage a file, each a function that does it."""
    content = path.read_bytes()
    for place in (0, len(content) // 2, len(content) - 1):
        yield f"bit {place}", lambda p=place: path.write_bytes(content[:p] + bytes([content[p] ^ 1]) + content[p + 1 :])
    for size in (0, len(content) // 2, len(content) - 1):
        yield f"{size} bytes", lambda size=size: path.write_bytes(content[:size])
    yield "longer", lambda: path.write_bytes(content + b"\0")
    yield "missing", path.unlink


def test_every_damage_to_every_file_is_found_named_and_skipped(tiny, tmp_path):
    """Flipped bits, and files that are cut short, longer or missing, in a checkpoint as a run writes it."""
    run = {"total_steps": 2, "save_every": 1, "eval_samples": 0, "output_dir": str(tmp_path / "run")}
    config = tiny(run=run, lora={"r": 2})
    PPOTrainer(config).fit()
    folder, newest = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-000002"
    shutil.rmtree(folder / "final")
    resumed = replace(config, run=replace(config.run, resume="latest"))
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert [path.name for path in files] == [
        *("config.yaml", "learned.safetensors", "manifest.json", "optimizer.safetensors", "progress.json")
    ]
    count = 0
    for path in files:
        content = path.read_bytes()
        for what, damage in damages(path):
            damage()
            messages = []
            place = resume_folder(resumed, folder, messages.append)
            assert place.name == "step-000001", (path.name, what)
            assert len(messages) == 1 and f"passing over {newest}, which is damaged: {path.name}" in messages[0], (
                what,
                messages,
            )
            with pytest.raises(ConfigError, match=rf"is not a whole checkpoint: {path.name}"):
                named = replace(config, run=replace(config.run, resume=str(newest)))
                resume_folder(named, folder, messages.append)
            path.write_bytes(content)
            count += 1
    assert count == 5 * 8
    assert resume_folder(resumed, folder, pytest.fail).name == "step-000002"


def leads_to_zeros(place, tree):
    (place / "learned.safetensors").unlink()
    (place / "learned.safetensors").symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda place, tree: tree.update(files={}), "does not list config.yaml, progress.json"),
        (lambda place, tree: tree["files"].pop("learned.safetensors"), "does not list any weights"),
        (lambda place, tree: tree.update(files=[1]), "does not have the form of a manifest"),
        (lambda place, tree: tree.update(world_size="two"), "does not have the form of a manifest"),
        (lambda place, tree: tree["files"].update({"../../config.yaml": {}}), "does not have the form of a manifest"),
        (
            lambda place, tree: tree["files"].update({"../latest": {"bytes": 11, "sha256": ""}}),
            "'../latest' is not a plain file of its folder",
        ),
        (leads_to_zeros, "'learned.safetensors' is not a plain file of its folder"),
    ],
)
def test_a_forged_manifest_is_not_believed(tmp_path, change, reason):
    """Its own hash is right: a checkpoint from elsewhere is data."""
    for step in (1, 2):
        save(tmp_path, step)
    place = tmp_path / "checkpoints" / "step-000002"
    tree = json.loads((place / checkpoint.MANIFEST).read_text())
    del tree["sha256"]
    change(place, tree)
    tree["sha256"] = checkpoint._digest(tree)
    (place / checkpoint.MANIFEST).write_text(json.dumps(tree))
    messages = []
    assert found(tmp_path, messages=messages).name == "step-000001"
    assert len(messages) == 1 and reason in messages[0]


def test_when_all_are_damaged_there_is_none(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-000001" / "learned.safetensors").write_text("other")
    for resume in ("latest", "auto"):  # which would start again and overwrite the rows of the run
        with pytest.raises(ConfigError, match=rf"^run\.resume={resume}: no checkpoint in .* is whole or can be read"):
            found(tmp_path, resume)


def test_a_changed_config_is_refused_with_the_keys_that_differ(tmp_path):
    save(tmp_path, 1)
    changed = {"optim": {"lr": 1.0}, "ppo": {"gamma": 0.5, "micro_batch_tokens": 4096}, "run": {"total_steps": 200}}

    def resume(**run):
        tree = {**changed, "run": {**changed["run"], "output_dir": str(tmp_path), "resume": "latest", **run}}
        return resume_folder(parse(Config, tree), tmp_path, pytest.fail)

    with pytest.raises(ConfigError) as caught:
        resume()
    assert "ppo.gamma (was 1.0, is 0.5), optim.lr (was 1e-05, is 1.0);" in str(caught.value)
    assert str(caught.value).endswith("pass --run.changes '[ppo.gamma, optim.lr]' if this is meant")
    assert resume(changes=["ppo.gamma", "optim.lr"]).name == "step-000001"


def test_another_version_is_reported(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr("rlhf_accel.runs.resume.versions", lambda: {"torch": "1.0"})
    messages = []
    found(tmp_path, messages=messages)
    assert len(messages) == 1 and f"torch {torch.__version__}" in messages[0]
