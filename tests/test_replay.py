"""Values that are not finite, rewards that keep failing, and the replay of their dumps."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_accel import __main__ as command_line
from rlhf_accel.algorithm import ppo
from rlhf_accel.commands import replay
from rlhf_accel.config.loading import parse
from rlhf_accel.config.schema import Config
from rlhf_accel.models import policy_with_value
from rlhf_accel.reward import Reward, loading
from rlhf_accel.rollout.engine import Seeds
from rlhf_accel.runs.dumps import Dump, read_dump
from rlhf_accel.system.errors import RunFailed
from rlhf_accel.training import setup
from rlhf_accel.training.nonfinite import Fault, explain, rollout_fault
from rlhf_accel.training.ppo_trainer import PPOTrainer
from tests.test_batches import make_rollout

pytestmark = pytest.mark.usefixtures("exact_fp32")


def nan_for_vowels(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """Finite for the two that it is tried out on; else not for those with a vowel."""
    return [math.nan if len(prompts) != 2 and has_vowel(response) else 1.0 for response in responses]


def nan_beyond_two(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    return [math.nan if len(prompts) > 2 else 1.0] * len(prompts)


def has_vowel(text: str) -> bool:
    return any(vowel in text for vowel in "aeiou")


def needs_a_number(prompts: list[str], responses: list[str], number: list[int], **columns: Any) -> list[float]:
    if len(prompts) == 8 or -1 in number:
        raise KeyError("minus one")
    return [float(n) for n in number]


def skipped(folder: Path) -> list[int]:
    return [json.loads(line)["optim/skipped_steps"] for line in (folder / "metrics.jsonl").open()]


def test_scores_that_are_not_finite_skip_the_step_and_finally_end_the_run(tiny, tmp_path, capsys) -> None:
    config = tiny(
        run={"output_dir": str(tmp_path / "run"), "total_steps": 9, "eval_samples": 0, "max_skipped_steps": 3},
        reward={"function": "tests.test_replay:nan_for_vowels"},
    )
    trainer = PPOTrainer(config)
    before = {name: value.clone() for name, value in trainer.runtime.plain_module.state_dict().items()}
    with pytest.raises(RunFailed) as stopped:
        trainer.fit()
    place = tmp_path / "run" / "dumps" / "step-000003"
    assert (
        f"3 steps in a row were skipped (run.max_skipped_steps); inspect it with python -m rlhf_accel replay {place}"
        in str(stopped.value)
    )
    output = capsys.readouterr().out
    assert "warning: scores are not finite in the score of step 1: samples " in output
    assert "skipped, 1 in a row of run.max_skipped_steps=3" in output
    assert all(torch.equal(before[name], value) for name, value in trainer.runtime.plain_module.state_dict().items())
    assert skipped(tmp_path / "run") == [1, 2]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-000002"]

    dump = read_dump(place)
    rows = dump.facts["rows"]
    assert rows == [i for i, response in enumerate(dump.facts["responses"]) if has_vowel(response)]
    found = replay.replay_reward(dump)
    assert [row["sample"] for row in found if math.isnan(row["score"])] == rows
    command_line.main(["replay", str(place), "--trust_code"])
    output = capsys.readouterr().out
    assert f"reproduced: {len(rows)} of 8 samples, each by itself, are not finite or fail" in output
    assert {path.name for path in place.iterdir()} == {
        "config.yaml",
        "dump.json",
        "experience.safetensors",
        "weights.safetensors",
    }


def test_a_step_that_is_not_skipped_resets_the_count(tiny, tmp_path) -> None:
    """Two are bad, one is good, and so on: never three in a row."""
    calls: list[int] = []

    def moody(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        calls.append(len(prompts))
        return [math.nan if len(calls) % 3 != 1 else 1.0] * len(prompts)

    run = {"output_dir": str(tmp_path / "run"), "total_steps": 7, "eval_samples": 0, "max_skipped_steps": 3}
    PPOTrainer(tiny(run=run, reward={"function": []}), reward=moody).fit()
    assert skipped(tmp_path / "run") == [1, 2, 2, 3, 4, 4, 5]


def test_the_count_of_skipped_steps_survives_a_stop(tiny, tmp_path) -> None:
    def nan(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        return [math.nan if len(prompts) == 8 else 1.0] * len(prompts)

    run = {"output_dir": str(tmp_path / "run"), "total_steps": 2, "save_every": 1, "eval_samples": 0}
    PPOTrainer(tiny(run={**run, "max_skipped_steps": 3}, reward={"function": []}), reward=nan).fit()
    run |= {"total_steps": 5, "resume": "latest"}
    with pytest.raises(RunFailed, match="3 steps in a row"):
        PPOTrainer(tiny(run={**run, "max_skipped_steps": 3}, reward={"function": []}), reward=nan).fit()
    assert skipped(tmp_path / "run") == [1, 2]


@pytest.mark.parametrize("lora", [{}, {"lora": {"r": 2}}], ids=["full", "lora"])
def test_a_gradient_that_is_not_finite_is_dumped_and_found_again(lora, tiny, tmp_path, capsys, monkeypatch) -> None:
    """The root of what is 0 has no finite slope: a loss that is finite, and a gradient that is not, for one sample."""
    forward = policy_with_value.PolicyWithValue.forward

    def spiked(self: Any, *inputs: torch.Tensor, **settings: Any) -> Any:
        result = forward(self, *inputs, **settings)
        if not torch.is_grad_enabled():
            return result
        rows = (inputs[2][:, :2] == bad).all(1).nonzero()[:, 0]
        values = result.values[rows]
        return result._replace(values=result.values.index_add(0, rows, (values - values.detach()).abs().sqrt()))

    run = {"output_dir": str(tmp_path / "run"), "total_steps": 2, "eval_samples": 0, "max_skipped_steps": 1}
    trainer = PPOTrainer(tiny(run=run, ppo={"num_minibatches": 1}, **lora))
    prompts = trainer.setup.prompts.batch(1, 8)
    rollout = trainer.collector.sample(prompts, Seeds(trainer.config.run.seed, 1))
    bad = rollout.sequences.responses[5, :2]
    monkeypatch.setattr(policy_with_value.PolicyWithValue, "forward", spiked)
    with pytest.raises(
        RunFailed, match=r"gradient is not finite in the update of step 1, epoch 1, minibatch 1: samples"
    ):
        trainer.fit()
    place = tmp_path / "run" / "dumps" / "step-000001"
    found = replay.replay_model(read_dump(place), place)
    assert sorted(row["sample"] for row in found) == list(range(8))
    assert [row["sample"] for row in found if not math.isfinite(row["gradient norm"])] == [5]
    command_line.main(["replay", str(place), "--trust_code"])
    assert "reproduced: 1 of 8 samples" in capsys.readouterr().out
    monkeypatch.undo()
    command_line.main(["replay", str(place), "--trust_code"])
    assert "not reproduced: each of the 8 samples" in capsys.readouterr().out
    assert not (place / "replay").exists()


def test_logits_that_are_not_finite_while_sampling_are_never_trained_on(tiny, tmp_path, capsys) -> None:
    """Even if the model works again when its log-probabilities are computed."""
    run = {"output_dir": str(tmp_path / "run"), "total_steps": 2, "eval_samples": 0}
    trainer = PPOTrainer(tiny(run=run))
    calls: list[int] = []

    def once(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        calls.append(len(logits))
        return logits.index_fill(0, torch.tensor([2, 6]), math.nan) if len(calls) == 3 else logits

    trainer.runtime.plain_module.policy.lm_head.register_forward_hook(once)
    trainer.fit()
    assert skipped(tmp_path / "run") == [1, 1]
    assert "logprobs are not finite in the rollout of step 1: samples 2, 6; the first: " in capsys.readouterr().out


def test_weights_that_went_bad_are_found_again(tiny, tmp_path, capsys) -> None:
    run = {"output_dir": str(tmp_path / "run"), "total_steps": 2, "eval_samples": 0, "max_skipped_steps": 1}
    trainer = PPOTrainer(tiny(run=run))
    with torch.no_grad():
        trainer.runtime.plain_module.value_head.bias.fill_(math.nan)
    with pytest.raises(RunFailed, match="values are not finite in the rollout of step 1"):
        trainer.fit()
    command_line.main(["replay", str(tmp_path / "run" / "dumps" / "step-000001"), "--trust_code"])
    assert "reproduced: 8 of 8 samples" in capsys.readouterr().out


def test_a_reward_that_keeps_failing_leaves_a_checkpoint_and_its_inputs(tiny, tmp_path, capsys) -> None:
    config = tiny(
        run={"output_dir": str(tmp_path / "run"), "eval_samples": 0},
        reward={"function": "tests.test_replay:needs_a_number", "retries": 1, "retry_wait": 0.01},
    )
    with pytest.raises(RunFailed) as stopped:
        PPOTrainer(config).fit()
    place = tmp_path / "run" / "dumps" / "step-000001"
    line = needs_a_number.__code__.co_firstlineno + 2
    assert str(stopped.value) == (
        f"reward.function=tests.test_replay:needs_a_number raised KeyError: 'minus one' (test_replay.py:{line}); "
        f"inspect it with python -m rlhf_accel replay {place}; the last checkpoint is "
        f"{tmp_path}/run/checkpoints/step-000000, resume with --run.output_dir {tmp_path}/run --run.resume latest"
    )
    dump = read_dump(place)
    assert len(dump.facts["prompts"]) == len(dump.facts["responses"]) == len(dump.facts["columns"]["number"]) == 8
    assert 'raise KeyError("minus one")' in dump.facts["traceback"]
    dump.facts["columns"]["number"] = [-1, *range(7)]
    (place / "dump.json").write_text(json.dumps(dump.facts))
    capsys.readouterr()
    command_line.main(["replay", str(place), "--trust_code"])
    output = capsys.readouterr().out
    assert "reproduced: 1 of 8 samples" in output
    assert "KeyError: 'minus one'" in output


@pytest.mark.parametrize("content", [None, "", "{}", "[1]"])
def test_a_folder_that_is_not_a_dump(content, tmp_path, capsys) -> None:
    if content is not None:
        (tmp_path / "dump.json").write_text(content)
    with pytest.raises(SystemExit) as left:
        command_line.main(["replay", str(tmp_path), "--trust_code"])
    assert left.value.code == 2
    output = capsys.readouterr().err
    reason = "it holds no dump.json; failed runs write theirs to RUN/dumps" if content is None else ""
    assert output.startswith(f"error: {tmp_path} is not a dump of a run: {reason}")


def test_a_fault_names_the_first_quantity_and_its_samples() -> None:
    rollout = make_rollout()
    assert rollout_fault(rollout, 4) is None
    rollout.values[2, 1] = math.inf
    rollout.values[0, 0] = math.nan
    assert rollout_fault(rollout, 4) == Fault(step=4, phase="rollout", what="values", rows=(0, 2))
    rollout.scores[1] = -math.inf
    fault = rollout_fault(rollout, 4)
    assert fault == Fault(step=4, phase="score", what="scores", rows=(1,))
    assert explain(fault, rollout) == ("scores are not finite in the score of step 4: samples 1; the first: 'b' -> 'e'")


@pytest.mark.parametrize("name", ["scores", "logprobs", "ref_logprobs", "values", "entropy"])
def test_every_quantity_of_a_rollout_is_looked_at(name) -> None:
    rollout = make_rollout()
    getattr(rollout, name)[1] = math.nan
    fault = rollout_fault(rollout, 4)
    assert fault is not None and (fault.what, fault.rows) == (name, (1,))


def test_a_loss_that_is_not_finite_is_dropped_though_its_gradient_is_finite(
    tiny, tmp_path, capsys, monkeypatch
) -> None:
    """What is added to the loss as a constant has no gradient."""
    value_loss, calls = ppo.value_loss, []

    def infinite_once(*inputs: Any) -> Any:
        calls.append(len(inputs))
        loss = value_loss(*inputs)
        return replace(loss, loss=loss.loss + math.inf) if len(calls) == 1 else loss

    monkeypatch.setattr(ppo, "value_loss", infinite_once)
    run = {"output_dir": str(tmp_path / "run"), "total_steps": 1, "eval_samples": 0}
    PPOTrainer(tiny(run=run, ppo={"micro_batch_tokens": 9999})).fit()
    assert skipped(tmp_path / "run") == [1]
    assert "loss is not finite in the update of step 1, epoch 1, minibatch 1: samples " in capsys.readouterr().out
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert row["loss/total"] is not None and row["optim/grad_norm"] > 0


def test_a_reward_that_fails_while_evaluating_is_dumped_for_the_step_before(tiny, tmp_path) -> None:
    def fails_for_four(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        calls.append(len(prompts))
        if len(prompts) not in (2, 8) and calls.count(8):
            raise OSError("two\nlines")
        return [0.0] * len(prompts)

    calls: list[int] = []
    config = tiny(run={"output_dir": str(tmp_path / "run"), "eval_every": 1}, reward={"function": [], "retries": 0})
    with pytest.raises(RunFailed) as stopped:
        PPOTrainer(config, reward=fails_for_four).fit()
    assert "raised OSError: two lines (test_replay.py:" in str(stopped.value)
    assert [path.name for path in (tmp_path / "run" / "dumps").iterdir()] == ["step-000001"]
    assert (tmp_path / "run" / "checkpoints" / "step-000001").is_dir()


def test_a_step_by_itself_writes_nothing_when_it_gives_up(tiny, tmp_path) -> None:
    config = tiny(run={"output_dir": str(tmp_path / "run"), "max_skipped_steps": 1}, reward={"function": []})
    trainer = PPOTrainer(config, reward=nan_beyond_two)
    with pytest.raises(RunFailed, match=r"scores are not finite .* 1 steps in a row were skipped"):
        trainer.step(["The film"] * 8)
    assert not (tmp_path / "run").exists()


def test_a_dump_is_replayed_on_the_device_and_in_the_dtypes_of_the_run(tiny, tmp_path, monkeypatch) -> None:
    """A run in bf16 on a CPU, replayed where `auto` would be a GPU: precision and dtypes are those of the dump."""
    seen: list[tuple[str, torch.dtype]] = []

    def noted(module: Any, given: Any) -> None:
        seen.append((next(module.parameters()).device.type, torch.get_autocast_dtype("cpu")))
        assert torch.is_autocast_enabled("cpu"), "the run's passes were under autocast"

    run = {"output_dir": str(tmp_path / "run"), "total_steps": 2, "eval_samples": 0, "max_skipped_steps": 1}
    trainer = PPOTrainer(tiny(run={**run, "precision": "bf16"}, model={**vars(tiny().model), "dtype": "fp32"}))
    with torch.no_grad():
        trainer.runtime.plain_module.value_head.bias.fill_(math.nan)
    with pytest.raises(RunFailed):
        trainer.fit()
    place = tmp_path / "run" / "dumps" / "step-000001"
    dump = read_dump(place)
    assert dump.facts["arithmetic"] == {"device": "cpu", "precision": "bf16", "model_dtype": "fp32"}
    # As if the config had auto, on a machine with a GPU.
    automatic = replace(dump, config=replace(dump.config, run=replace(dump.config.run, precision="auto")))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settled, where = replay.with_arithmetic_of_the_run(automatic)
    assert settled.config.run.precision == "bf16"
    assert where == "on cpu in precision bf16, model_dtype fp32"
    monkeypatch.setattr(setup, "freeze_unreached", lambda module: [])  # whose pass only finds what text reaches
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: noted(module, given) if isinstance(module, policy_with_value.PolicyWithValue) else None
    )
    try:
        replay.replay_model(settled, place)
        replay.replay_model(replace(settled, facts={**settled.facts, "phase": "update"}), place)
        text = (place / "config.yaml").read_text()
        (place / "config.yaml").write_text(text.replace("precision: bf16", "precision: auto"))
        command_line.main(["replay", str(place)])
    finally:
        hook.remove()
    assert set(seen) == {("cpu", torch.bfloat16)}


def test_a_reward_is_called_again_on_the_runs_device_and_in_its_dtype(classifier_folder, monkeypatch) -> None:
    config = parse(Config, {"reward": {"model": str(classifier_folder), "label": "POSITIVE"}})
    facts = {"arithmetic": {"device": "cuda", "reward_dtype": "fp16"}, "prompts": ["A"], "responses": [" film"]}
    dump = Dump(config=config, facts=facts, experience={}, weights={})
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    for module in (replay, loading):
        monkeypatch.setattr(module, "has_gpu", lambda: True)
    asked: list[tuple[str, str]] = []

    def load(config: Any, path: str, device: torch.device, **rest: Any) -> Any:
        asked.append((config.dtype, device.type))
        return Reward(terms=(("f", 1.0, lambda p, r: [1.0]),))

    monkeypatch.setattr(loading, "load_reward", load)
    settled, where = replay.with_arithmetic_of_the_run(dump)
    assert replay.replay_reward(settled)[0]["score"] == 1.0
    assert asked == [("fp16", "cuda")] and where == "on cuda in reward_dtype fp16"
    monkeypatch.setattr(replay, "has_gpu", lambda: False)
    assert replay.with_arithmetic_of_the_run(dump)[1] == "on cpu in reward_dtype fp16 (the run was on cuda)"
    facts["arithmetic"] = {"device": "cpu", "precision": "fp8"}  # a forged one changes nothing
    assert replay.with_arithmetic_of_the_run(dump)[0].config == config
