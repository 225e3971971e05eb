"""A run's folder, models that load without this package, and runs that go on as if they had never stopped."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rlhf_accel.config.keys import key_names
from rlhf_accel.config.loading import load, parse
from rlhf_accel.config.schema import Config
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.runs import checkpoint, exports, run_folder
from rlhf_accel.runs.resume import resume_folder
from rlhf_accel.runs.summary import reward_scale
from rlhf_accel.system import lock
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.training.ppo_trainer import PPOTrainer

pytestmark = pytest.mark.usefixtures("exact_fp32")


def run_config(**run):
    return parse(Config, {"run": run})


# The folder


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
    """Of another program, say: a run would have written config.yaml first."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match=rf"^run\.output_dir={tmp_path} (holds {name}|already holds)") as refused:
        run_folder.choose_folder(run_config(output_dir=str(tmp_path), resume=resume))
    assert refused.value.key == "run.output_dir"
    (tmp_path / "config.yaml").touch()  # a kill came before its text
    with pytest.raises(ConfigError, match=r"^run\.output_dir="):
        run_folder.choose_folder(run_config(output_dir=str(tmp_path), resume=resume))


def test_logs_of_a_scheduler_are_in_nobodys_way(tmp_path):
    """Slurm makes the folder of a job's output before the job starts."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "17.out").touch()
    assert run_folder.choose_folder(run_config(output_dir=str(tmp_path), resume="auto")) == tmp_path
    (tmp_path / "logs" / "rank-0.log").touch()
    with pytest.raises(ConfigError, match=r"holds logs/rank-0\.log"):
        run_folder.choose_folder(run_config(output_dir=str(tmp_path), resume="auto"))


def test_a_run_that_is_started_twice_with_auto_continues_once(tmp_path, monkeypatch):
    """The second learns it before it reads a checkpoint, and of the folder nothing changes."""
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


def test_a_folder_that_another_run_took_meanwhile_is_refused(tmp_path):
    """It is chosen at the start and made much later, when the reward model is there and calibrated."""
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


class OnDisk:
    """What `save_checkpoint` asks of a runtime, of one process that writes this text as its weights."""

    is_main, zero_stage, world_size, writes_shards = True, 0, 1, False

    def __init__(self, text):
        self.text = text

    def save_state(self, folder):
        (folder / "learned.safetensors").write_text(self.text)
        return "No space left on device" if self.text == "half" else None

    def from_main(self, make):
        return make()

    def first_failure(self, said):
        return said


def save(folder, step, text="whole", **run):
    progress = checkpoint.Progress(step=step, kl_coef=0.25 * step)
    config = run_config(output_dir=str(folder), **run)
    checkpoint.save_checkpoint(folder, progress, OnDisk(text), config)
    checkpoint.prune(folder, step, config.run.keep_checkpoints)


def found(folder, resume="latest", said=None, **run):
    said = [] if said is None else said
    return resume_folder(run_config(output_dir=str(folder), resume=resume, **run), folder, said.append)


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    for resume in ("latest", str(tmp_path / "checkpoints" / "step-000002")):
        with pytest.raises(ConfigError, match=rf"^run\.resume={resume}"):
            found(tmp_path, resume)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"ended before its first checkpoint.*--run\.resume auto starts it again$"):
        found(tmp_path)


def test_auto_starts_where_there_is_nothing_to_go_on_from(tmp_path):
    said = []
    assert found(tmp_path, "auto", said) is None
    assert said == [f"run.resume=auto: {tmp_path} holds no checkpoint, so the run starts"]
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
    """Killed between any two calls there is a whole one of this step, under one name or the other."""
    save(tmp_path, 1)
    seen, rename, rmtree = [], Path.rename, shutil.rmtree

    def looked(call):
        def wrapped(path, *rest, **settings):
            seen.append(found(tmp_path, said=[]).name)
            call(path, *rest, **settings)
            seen.append(found(tmp_path, said=[]).name)

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
    """Somebody went back to an older one, by its name or by writing `latest`."""
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


def test_every_damage_to_every_file_is_recognised_named_and_passed_over(tiny, tmp_path):
    """Of a checkpoint as a run writes it: bits flipped, files cut short, longer or gone."""
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
            said = []
            place = resume_folder(resumed, folder, said.append)
            assert place.name == "step-000001", (path.name, what)
            assert len(said) == 1 and f"passing over {newest}, which is damaged: {path.name}" in said[0], (what, said)
            with pytest.raises(ConfigError, match=rf"is not a whole checkpoint: {path.name}"):
                named = replace(config, run=replace(config.run, resume=str(newest)))
                resume_folder(named, folder, said.append)
            path.write_bytes(content)
            count += 1
    assert count == 5 * 8
    assert resume_folder(resumed, folder, pytest.fail).name == "step-000002"


def test_when_all_are_damaged_there_is_none(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-000001" / "learned.safetensors").write_text("other")
    for resume in ("latest", "auto"):  # which would start anew, over the rows of the run
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


def test_another_version_is_said(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr("rlhf_accel.runs.resume.versions", lambda: {"torch": "1.0"})
    said = []
    found(tmp_path, said=said)
    assert len(said) == 1 and f"torch {torch.__version__}" in said[0]


# Export

LOAD_WITHOUT_US = """
import json, sys
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

written = {}
for kind, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    auto = AutoPeftModelForCausalLM if kind == "adapter" else AutoModelForCausalLM
    model, tokenizer = auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The film", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    written[folder] = ids[0].tolist()
assert not any(name.split(".")[0] == "rlhf_accel" for name in sys.modules)
print(json.dumps(written))
"""


@pytest.fixture
def trained(tiny):
    """A function that trains a tiny run for a step and returns its trainer."""

    def train(**sections):
        run = {"total_steps": 1, "eval_samples": 0, **sections.pop("run", {})}
        trainer = PPOTrainer(tiny(run=run, **sections))
        trainer.fit()
        return trainer

    return train


def test_final_loads_and_writes_without_this_package(trained, llama_folder, tmp_path):
    kinds = {
        "full": trained(run={"output_dir": str(tmp_path / "full")}),
        "tied": trained(run={"output_dir": str(tmp_path / "tied")}, model={"name_or_path": str(llama_folder)}),
        "adapter": trained(run={"output_dir": str(tmp_path / "adapter")}, lora={"r": 4}, optim={"lr": 0.05}),
    }
    arguments = [text for kind, trainer in kinds.items() for text in (kind, str(trainer.folder / "final"))]
    # In another folder, so that the package could not even be found by chance.
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_US, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout.splitlines()[-1])
    for trainer in kinds.values():
        ids = torch.tensor(written[str(trainer.folder / "final")])[None]
        prompt = torch.tensor(trainer.setup.tokens.encode(["The film"]))
        assert torch.equal(ids[:, : prompt.shape[1]], prompt)
        policy = trainer.runtime.plain_module.policy
        expected = policy.generate(input_ids=prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert torch.equal(ids, expected)


def test_exported_weights_are_those_of_the_run(trained, gpt2_folder):
    trainer = trained()
    final = AutoModelForCausalLM.from_pretrained(trainer.folder / "final").state_dict()
    start = AutoModelForCausalLM.from_pretrained(gpt2_folder).state_dict()
    policy = trainer.runtime.plain_module.policy.state_dict()
    assert final.keys() == policy.keys()
    assert all(torch.equal(final[name], policy[name]) for name in policy)
    assert not all(torch.equal(final[name], start[name]) for name in policy)
    head = exports.load_value_head(trainer.folder / "final")
    assert head.keys() == {"value_head.weight", "value_head.bias"}
    assert torch.equal(head["value_head.weight"], trainer.runtime.plain_module.value_head.weight)
    assert head["value_head.weight"].abs().max() > 0


def test_an_exported_adapter_is_that_of_the_run(trained, gpt2_folder):
    trainer = trained(lora={"r": 4}, optim={"lr": 0.05})
    loaded = AutoPeftModelForCausalLM.from_pretrained(trainer.folder / "final").eval()
    ids = torch.tensor(trainer.setup.tokens.encode(["The film is good"]))
    with torch.no_grad():
        policy = trainer.runtime.plain_module.policy
        assert_close(loaded(ids).logits, policy(ids).logits, atol=1e-5, rtol=1e-5)
        base = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()(ids).logits
    assert (loaded(ids).logits - base).abs().max() > 1e-3
    names = {path.name for path in (trainer.folder / "final").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names


def test_a_separate_critic_is_exported_whole(trained):
    trainer = trained(model={"critic": "separate"})
    critic = exports.load_value_head(trainer.folder / "final")
    module = trainer.runtime.plain_module
    expected = {name: value for name, value in module.state_dict().items() if not name.startswith("policy.")}
    assert critic.keys() == expected.keys()
    assert "critic.h.0.mlp.c_fc.weight" in critic
    assert all(torch.equal(critic[name], expected[name]) for name in expected)
    # What transformers loads is the policy alone.
    names = load_file(trainer.folder / "final" / "model.safetensors")
    assert not any("critic" in name or "value_head" in name for name in names)


def test_tied_weights_stay_tied(trained, llama_folder):
    trainer = trained(model={"name_or_path": str(llama_folder)})
    assert "lm_head.weight" not in load_file(trainer.folder / "final" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(trainer.folder / "final").eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = torch.tensor(trainer.setup.tokens.encode(["The film"]))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.runtime.plain_module.policy(ids).logits)


def test_an_export_replaces_the_one_before(trained, tmp_path):
    trainer = trained()
    module, folder = trainer.runtime.plain_module, tmp_path / "out"
    tokens = Tokens.load(trainer.config.model.name_or_path)
    exports.export(folder, module, module.state_dict(), tokens, "first")
    (folder / "stale.txt").write_text("from before")
    with torch.no_grad():
        module.value_head.bias.fill_(3.0)
    exports.export(folder, module, module.state_dict(), tokens, "second")
    assert (folder / "README.md").read_text() == "second"
    assert not (folder / "stale.txt").exists()
    assert exports.load_value_head(folder)["value_head.bias"].item() == 3.0
    assert [path.name for path in tmp_path.glob(".*")] == []


# Going on


def rows_of(folder, name="metrics.jsonl"):
    """Rows without what the clock and the memory say."""
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))} for row in rows]


def final_weights(folder):
    name = "adapter_model.safetensors" if (folder / "final" / "adapter_config.json").exists() else "model.safetensors"
    return load_file(folder / "final" / name) | exports.load_value_head(folder / "final")


@pytest.mark.parametrize("lora", [{"r": 0}, {"r": 4}])
def test_a_resumed_run_is_the_run_that_never_stopped(tiny, tmp_path, lora):
    """All that outlives a step matters here: Adam's moments, the learning rate's place, KL coefficient, calibration."""
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

    # As a run that was killed in its fourth step left it.
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
    """Though newer ones are still there when the run is killed again before it saves."""
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


def test_going_on_from_one_run_in_the_folder_of_another_is_refused(tiny, tmp_path):
    run = {"total_steps": 2, "save_every": 1, "eval_samples": 0}
    for name in ("a", "b"):
        PPOTrainer(tiny(run={**run, "output_dir": str(tmp_path / name)})).fit()
    place = tmp_path / "a" / "checkpoints" / "step-000001"
    with pytest.raises(ConfigError, match=r"^run\.output_dir=.*b holds another run than run\.resume=.*a/checkpoints"):
        PPOTrainer(tiny(run={**run, "output_dir": str(tmp_path / "b"), "resume": str(place)}))


def test_rows_that_are_torn_before_the_checkpoint_are_said(tiny, tmp_path):
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


def test_a_run_that_crashes_can_go_on(tiny, tmp_path):
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


def test_a_finished_run_is_not_gone_on_with(tiny, tmp_path):
    """It would write its summary anew, without what came before."""
    run = {"total_steps": 2, "save_every": 2, "output_dir": str(tmp_path / "a")}
    PPOTrainer(tiny(run=run)).fit()
    summary = (tmp_path / "a" / "summary.json").read_text()
    with pytest.raises(ConfigError, match=r"is finished: 2 steps, its model is .*final; raise run\.total_steps"):
        PPOTrainer(tiny(run={**run, "resume": "latest"}))
    assert (tmp_path / "a" / "summary.json").read_text() == summary
    PPOTrainer(tiny(run={**run, "total_steps": 3, "resume": "latest"})).fit()
    assert len(rows_of(tmp_path / "a")) == 3


def test_best_of_another_folder_is_not_ours(tiny, tmp_path):
    """A run that goes on in a new folder would otherwise have no best/ until it beats one that it does not hold."""
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
