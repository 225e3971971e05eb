"""Whole runs at toy size: what they write, one test per switch, what never changes a result, and learning."""

import inspect
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_accel.config.loading import load
from rlhf_accel.config.schema import Config, OptimConfig
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.distributed.runtime import Runtime
from rlhf_accel.models import calls
from rlhf_accel.models import cpu_kernels as kernels
from rlhf_accel.rollout import scoring
from rlhf_accel.rollout.engine import Seeds
from rlhf_accel.runs import metrics as metrics_module
from rlhf_accel.runs.recorder import Recorder
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.training import ppo_trainer as trainer_module
from rlhf_accel.training import run as run_module
from rlhf_accel.training import setup as run_setup
from rlhf_accel.training.first_step import ratio_limits, sampled_is_recomputed
from rlhf_accel.training.ppo_trainer import PPOTrainer, lr_factor
from tests.conftest import share_of_o

pytestmark = pytest.mark.usefixtures("exact_fp32")

# As the contract in the design lists them.
KEYS = {
    *("step", "episodes"),
    *("objective/score", "objective/score_std", "objective/reward", "objective/kl", "objective/kl_k3"),
    *("objective/entropy", "kl/coef", "loss/policy", "loss/value", "loss/total"),
    *("policy/approx_kl", "policy/clip_fraction", "policy/ratio_max", "policy/first_ratio_error"),
    *("value/clip_fraction", "value/explained_variance", "rollout/response_tokens", "rollout/eos_fraction"),
    *("optim/lr", "optim/grad_norm", "optim/skipped_steps"),
    *("time/rollout", "time/score", "time/update", "time/step"),
    *("perf/samples_per_second", "perf/response_tokens_per_second", "perf/peak_memory_mib"),
}
EVALUATED = {
    *("eval/score", "eval/score_ci", "eval/kl", "eval/kl_ci", "eval/length", "eval/eos_fraction"),
    *("eval/distinct_1", "eval/distinct_2", "eval/self_repetition", "eval/reference_perplexity"),
    *("eval/win_rate", "eval/win_rate_ci"),
}
GOLD = {"eval/gold/NAME", "eval/gold_ci/NAME"}
OTHERS = {"loss/kl", "rollout/flat_groups"}  # tests/test_surrogates.py, tests/test_estimators.py
OTHERS |= {"objective/score/NAME", "eval/score/NAME", "eval/score_ci/NAME"}  # of several rewards: below


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def figures(row):
    """A row of metrics without what the clock and the memory say."""
    return {key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))}


def length(prompts, responses, **columns):
    return [float(len(response)) for response in responses]


def always_one(prompts, responses, **columns):
    return [1.0] * len(prompts)


# The toy run that every switch is compared with. The stop texts make responses of all lengths.
BASE = {
    "run": {"total_steps": 2, "eval_samples": 0, "sample_every": 0},
    "rollout": {"stop": ["e", "t"]},
}


@pytest.fixture
def fit(tiny, tmp_path):
    """A function that fits a toy run in a folder of its own; returns the trainer and its rows of metrics."""
    runs = []

    def run(**sections):
        tree = {**BASE, **{name: {**BASE.get(name, {}), **values} for name, values in sections.items()}}
        tree["run"] = {"output_dir": str(tmp_path / f"run-{len(runs)}"), **tree["run"]}
        runs.append(tree)
        trainer = PPOTrainer(tiny(**tree))
        trainer.fit()
        return trainer, read(trainer.folder / "metrics.jsonl")

    return run


@pytest.fixture
def step_twice(tiny):
    """A function that takes both steps of a toy run, without its evaluations and exports; returns as `fit` does."""

    def run(**sections):
        trainer = PPOTrainer(
            tiny(**{name: {**BASE.get(name, {}), **sections.get(name, {})} for name in {*BASE, *sections}})
        )
        batch = trainer.setup.prompts.batch
        return trainer, [trainer.step(batch(number, trainer.setup.sizes.rollout)) for number in (1, 2)]

    return run


def weights(trainer):
    return trainer.runtime.plain_module.state_dict()


def assert_same_run(one, other, tolerance):
    """Two runs said the same of each step and ended with the same weights."""
    for ours, theirs in zip(one[1], other[1], strict=True):
        for key, value in figures(theirs).items():
            assert ours[key] == pytest.approx(value, abs=tolerance, rel=tolerance), key
    for name, value in weights(other[0]).items():
        assert_close(weights(one[0])[name], value, atol=tolerance, rtol=tolerance, msg=name)


# What a run leaves behind


def test_metrics_are_those_of_the_contract(fit):
    _, rows = fit(run={"eval_samples": 4, "eval_every": 1, "total_steps": 3})
    assert KEYS | EVALUATED | GOLD | OTHERS == metrics_module.NAMES
    assert all(set(row) == KEYS | EVALUATED for row in rows)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["episodes"] for row in rows] == [8, 16, 24]
    assert all(type(row[key]) is int for row in rows for key in ("step", "episodes", "optim/skipped_steps"))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    first = rows[0]
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert first["objective/kl_k3"] == pytest.approx(0, abs=1e-5)
    assert first["policy/first_ratio_error"] < 1e-4
    assert rows[1]["objective/kl"] != 0
    assert rows[1]["policy/first_ratio_error"] < 1e-4
    assert [row["optim/lr"] for row in rows] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert 0 < first["rollout/eos_fraction"] < 1
    assert 1 < first["rollout/response_tokens"] < 8


def test_what_fp32_products_are_is_printed_and_kept(fit, capsys, monkeypatch):
    allowed = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", allowed.append)
    trainer, _ = fit(run={"total_steps": 1, "matmul_precision": "highest"})
    assert allowed == ["highest"]
    kept = json.loads((trainer.folder / "environment.json").read_text())["fp32_products"]
    assert (kept["arithmetic"], kept["matmul_precision"]) == ("fp32", "highest") and kept["relative_error"] < 1e-5
    said = "fp32 matrix products on cpu are fp32"
    assert said in capsys.readouterr().out and said in (trainer.folder / "final" / "README.md").read_text()


def thousandfold(prompts, responses, **columns):
    return [1000.0 * score for score in share_of_o(prompts, responses)]


def test_a_kl_of_no_policy_and_values_out_of_reach_are_warned_of_once(fit, capsys):
    reward = {"function": "tests.test_ppo_trainer:thousandfold"}
    trainer, _ = fit(rollout={"top_p": 0.5}, reward=reward, run={"eval_every": 1, "eval_samples": 4})
    said = capsys.readouterr().out
    assert said.count("warning: rollout.top_p=0.5: responses are drawn from a truncated distribution") == 1
    assert said.count("set reward.calibrate=true") == 1 and "ppo.cliprange_value=0.2" in said
    drawn_from = {"temperature": 1.0, "top_k": 0, "top_p": 0.5}
    assert json.loads((trainer.folder / "summary.json").read_text())["sampling"] == drawn_from
    for name in ("final", "best"):
        assert "drawn at temperature 1, top_p 0.5" in (trainer.folder / name / "README.md").read_text()
    fit(reward={**reward, "calibrate": True}, run={"output_dir": str(trainer.folder.parent / "calibrated")})
    assert "warning: " not in capsys.readouterr().out


def test_without_evaluation_its_keys_are_absent(fit):
    _, rows = fit()
    assert all(set(row) == KEYS for row in rows)


def test_evaluation_is_due_every_so_many_steps_and_at_the_end(fit):
    _, rows = fit(run={"eval_samples": 4, "eval_every": 2, "total_steps": 5})
    assert [row["step"] for row in rows if set(row) > EVALUATED] == [2, 4, 5]


def test_metrics_say_what_the_rollout_was(fit):
    trainer, rows = fit(run={"total_steps": 1, "sample_every": 1, "sample_count": 8})
    samples = read(trainer.folder / "samples.jsonl")
    scores = torch.tensor([sample["score"] for sample in samples])
    row = rows[0]
    assert row["objective/score"] == pytest.approx(float(scores.mean()))
    assert row["objective/score_std"] == pytest.approx(float(scores.std(correction=0)))
    # At step 1 there is no KL yet, and the token rewards of a response add up to its score.
    assert row["objective/reward"] == pytest.approx(row["objective/score"])
    assert row["loss/total"] == pytest.approx(row["loss/policy"] + 0.1 * row["loss/value"])


def test_samples(fit):
    trainer, _ = fit(run={"total_steps": 4, "sample_every": 2, "sample_count": 3})
    samples = read(trainer.folder / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [1, 1, 1, 2, 2, 2, 4, 4, 4]
    for sample in samples:
        assert sample.keys() == {"step", "prompt", "response", "score", "kl"}
        assert sample["score"] == pytest.approx(share_of_o([], [sample["response"]])[0])
    assert [sample["kl"] for sample in samples if sample["step"] == 1] == pytest.approx([0, 0, 0], abs=1e-5)
    assert any(sample["kl"] != 0 for sample in samples)


def test_no_samples(fit):
    trainer, _ = fit(run={"sample_every": 0})
    assert not (trainer.folder / "samples.jsonl").exists()


def test_summary(fit):
    trainer, rows = fit(run={"eval_samples": 4, "total_steps": 3}, optim={"lr": 0.01}, reward={"calibrate": True})
    summary = json.loads((trainer.folder / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["seconds"] > 0
    assert summary["calibration"] == {"mean": trainer.reward.mean, "std": trainer.reward.std}
    base, trained = summary["base"], summary["trained"]
    assert base["kl"] == pytest.approx(0, abs=1e-5)
    assert (trained["score"], trained["kl"]) == (rows[-1]["eval/score"], rows[-1]["eval/kl"])
    assert trained["kl"] != 0
    if base["score_std"] > 0:
        assert summary["gain"] == pytest.approx((trained["score"] - base["score"]) / base["score_std"])
    assert 0 < len(summary["samples"]) <= 10
    for sample in summary["samples"]:
        raw = sample["trained score"] * trainer.reward.std + trainer.reward.mean
        assert raw == pytest.approx(share_of_o([], [sample["trained"]])[0], abs=1e-6)
        assert sample["prompt"]
        assert sample.keys() == {"prompt", "base", "base score", "trained", "trained score"}


def test_config_yaml_is_the_run(fit):
    trainer, _ = fit(ppo={"kl_coef": 0.125})
    again = load(Config, trainer.folder / "config.yaml")
    assert again == trainer.config
    assert again.ppo.kl_coef == 0.125


def test_best_is_the_model_with_the_best_evaluation(fit, monkeypatch):
    kept = []
    export = Recorder.export

    def spy(self, name, results, *rest):
        kept.append((name, results["trained"]["score"]))
        export(self, name, results, *rest)

    monkeypatch.setattr(Recorder, "export", spy)
    trainer, rows = fit(run={"eval_samples": 4, "eval_every": 1, "total_steps": 6}, optim={"lr": 0.02})
    best, expected = -math.inf, []
    for row in rows:
        if row["eval/score"] > best:
            best = row["eval/score"]
            expected.append(("best", best))
    assert kept == [*expected, ("final", rows[-1]["eval/score"])]
    assert trainer.progress.best_score == best
    card = (trainer.folder / "best" / "README.md").read_text(encoding="utf-8")
    assert f"for {max(rows, key=lambda row: row['eval/score'])['step']} steps of 8 responses" in card


@pytest.mark.parametrize("lora", [{"r": 0}, {"r": 4}])
def test_final_is_beside_best(fit, lora):
    trainer, _ = fit(run={"eval_samples": 4}, lora=lora)
    weights_file = "adapter_model.safetensors" if lora["r"] else "model.safetensors"
    for name in ("final", "best"):
        files = {path.name for path in (trainer.folder / name).iterdir()}
        assert {weights_file, "value_head.safetensors", "tokenizer.json", "README.md"} <= files


# Switches: each changes the run, and only what it should


PLAIN_ROWS = []


@pytest.fixture
def plain_rows(step_twice):
    """Metrics of the toy run with no switch turned, made once."""
    if not PLAIN_ROWS:
        PLAIN_ROWS.append(step_twice()[1])
    return PLAIN_ROWS[0]


FUNCTIONS = ["tests.conftest:share_of_o", "tests.test_ppo_trainer:length"]
SWITCHES = {
    "lora": {"lora": {"r": 4}},
    "lora on all layers": {"lora": {"r": 4, "target_modules": "all-linear"}},
    "separate critic": {"model": {"critic": "separate"}},
    "critic_lr": {"optim": {"critic_lr": 0.1}},
    "weight_decay": {"optim": {"weight_decay": 10.0}},
    "max_grad_norm": {"optim": {"max_grad_norm": 1e-5}},
    "betas and eps": {"optim": {"betas": [0.5, 0.5], "eps": 1e-3}},
    "constant schedule": {"optim": {"schedule": "constant"}},
    "warmup": {"optim": {"warmup_steps": 1}},
    "kl_coef": {"ppo": {"kl_coef": 5.0}},
    "kl_target": {"ppo": {"kl_target": 1.0, "kl_horizon": 10}},
    "whiten_rewards": {"ppo": {"whiten_rewards": True}},
    "no whitening": {"ppo": {"whiten_advantages": False}},
    "gamma": {"ppo": {"gamma": 0.5}},
    "lam": {"ppo": {"lam": 0.1}},
    "cliprange": {"ppo": {"cliprange": 1e-3}},
    "cliprange_value": {"ppo": {"cliprange_value": 1e-4}},
    "vf_coef": {"ppo": {"vf_coef": 5.0}},
    "entropy_coef": {"ppo": {"entropy_coef": 0.5}},
    "target_kl_stop": {"ppo": {"target_kl_stop": 1e-6}},
    "epochs": {"ppo": {"ppo_epochs": 1}},
    "num_minibatches": {"ppo": {"num_minibatches": 8}},
    "seed": {"run": {"seed": 1}},
    "bf16": {"run": {"precision": "bf16"}},
    "temperature": {"rollout": {"temperature": 0.7}},
    "top_k": {"rollout": {"top_k": 5}},
    "top_p": {"rollout": {"top_p": 0.5}},
    "other stop texts": {"rollout": {"stop": ["a"]}},
    "min_new_tokens": {"rollout": {"min_new_tokens": 8}},
    "max_new_tokens": {"rollout": {"max_new_tokens": 3}},
    "batch of one": {"rollout": {"batch_size": 1}, "ppo": {"num_minibatches": 1}},
    "one token": {
        "rollout": {"batch_size": 1, "max_new_tokens": 1},
        "ppo": {"num_minibatches": 1, "whiten_rewards": True},
    },
    "llama": {"model": {"name_or_path": "llama"}},
    "weights": {"reward": {"function": FUNCTIONS, "weights": [1.0, -2.0]}},
    "classifier": {"reward": {"function": [], "model": "classifier", "label": "POSITIVE"}},
    "calibrate": {"reward": {"calibrate": True, "calibrate_samples": 16}},
    "partial_every": {"reward": {"partial_every": 2}},
    "clip": {"reward": {"clip": 0.01}},
    "missing_eos_penalty": {"reward": {"missing_eos_penalty": 1.0}},
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_changes_the_run(step_twice, plain_rows, llama_folder, classifier_folder, switch):
    sections = {name: dict(values) for name, values in SWITCHES[switch].items()}
    folders = {"llama": str(llama_folder), "classifier": str(classifier_folder)}
    for values in sections.values():
        for key in ("name_or_path", "model"):
            values.update({key: folders[values[key]]} if values.get(key) in folders else {})
    trainer, rows = step_twice(**sections)

    assert [figures(row) for row in rows] != [figures(row) for row in plain_rows]
    of_several = {f"objective/score/{path.partition(':')[2]}" for path in FUNCTIONS} if switch == "weights" else set()
    assert all(set(row) == KEYS | of_several for row in rows)
    constant_values = {"value/explained_variance", "optim/grad_norm"}
    assert all(math.isfinite(row[key]) for row in rows for key in KEYS - constant_values)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert all(row["policy/first_ratio_error"] < (0.1 if switch == "bf16" else 1e-4) for row in rows)
    assert all(row["optim/skipped_steps"] == 0 for row in rows)
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())
    # What only the learning depends on leaves the first rollout as it was.
    if set(sections) <= {"optim", "ppo"} or switch in ("lora", "separate critic", "partial_every"):
        for key in ("objective/score", "objective/entropy", "rollout/response_tokens"):
            assert rows[0][key] == pytest.approx(plain_rows[0][key], rel=1e-5), key


def test_memory_switches_change_nothing_but_memory(fit):
    """Micro-batches of one row or of all of them, checkpointed activations, chunks of the rollout.

    eps is large: Adam divides by the gradient's size, and would blow up the rounding of a gradient that is nearly 0.
    """
    optim = {"eps": 1e-3, "lr": 1e-2}
    whole = fit(ppo={"micro_batch_tokens": 8192}, optim=optim)
    assert whole[1][1]["objective/kl"] != 0
    for sections in (
        {"ppo": {"micro_batch_tokens": 14}},
        {"ppo": {"micro_batch_tokens": 30}},
        {"model": {"gradient_checkpointing": True}},
        {"rollout": {"forward_batch_size": 3}},
        {"rollout": {"static_cache": "always"}},
    ):
        assert_same_run(fit(**{"ppo": {"micro_batch_tokens": 8192}, **sections}, optim=optim), whole, 1e-5)


def test_runs_with_one_seed_are_one_run(fit):
    for sections in ({}, {"lora": {"r": 4}}):
        torch.manual_seed(1)
        one = fit(**sections)
        torch.manual_seed(2)
        other = fit(**sections)
        assert_same_run(one, other, 0)


def test_the_update_stops_early_at_target_kl_stop(tiny):
    taken = []
    for target in (None, 1e-6):
        trainer = PPOTrainer(tiny(ppo={"target_kl_stop": target, "ppo_epochs": 3, "num_minibatches": 2}))
        step = trainer.runtime.optimizer_step
        outcomes = []
        trainer.runtime.optimizer_step = lambda step=step, outcomes=outcomes: outcomes.append(step()) or outcomes[-1]
        metrics = trainer.step(["The film", "A dull"] * 4)
        taken.append(sum(was_taken for _, was_taken in outcomes))
        assert metrics["optim/skipped_steps"] == 0, "stopping is no accident"
        assert all(p.grad is None or not p.grad.any() for p in trainer.runtime.module.parameters())
    # The first minibatch has not moved yet; the second has.
    assert taken == [6, 1]


def test_an_update_that_may_not_take_a_single_step_is_reported(tiny):
    """With dropout the very first minibatch may already lie beyond the target."""
    config = tiny(lora={"r": 4, "dropout": 0.5}, ppo={"target_kl_stop": 1e-12}, optim={"lr": 0.1})
    trainer = PPOTrainer(config)
    prompts = ["The film", "A dull"] * 4
    trainer.step(prompts)  # adapters start at zero, and dropout only matters once they have moved
    before = {name: value.clone() for name, value in weights(trainer).items()}
    metrics = trainer.step(prompts)
    assert metrics["step"] == 2
    assert all(torch.equal(weights(trainer)[name], value) for name, value in before.items())


def test_the_adaptive_coefficient_follows_the_kl(fit):
    _, rows = fit(ppo={"kl_target": 1e-3, "kl_horizon": 100}, run={"total_steps": 3}, optim={"lr": 0.01})
    coefs = [row["kl/coef"] for row in rows]
    assert coefs[0] == 0.05
    # Ziegler et al. 2019: the coefficient grows by 0.1 n / horizon of an error that is clipped to 0.2.
    for row, coef in zip(rows[:-1], coefs[1:], strict=True):
        error = min(max(row["objective/kl"] / 1e-3 - 1, -0.2), 0.2)
        assert coef == pytest.approx(row["kl/coef"] * (1 + error * 8 / 100))


def test_calibrated_scores_have_unit_scale_at_the_start(fit):
    trainer, rows = fit(
        run={"total_steps": 1},
        rollout={"batch_size": 64},
        reward={"calibrate": True, "calibrate_samples": 512},
    )
    assert trainer.reward.std != 1
    assert rows[0]["objective/score"] == pytest.approx(0, abs=0.5)
    assert rows[0]["objective/score_std"] == pytest.approx(1, abs=0.5)


def test_weights_of_a_sum_of_rewards(fit):
    both = {"function": FUNCTIONS}
    _, one = fit(reward={"function": FUNCTIONS[:1]})
    _, other = fit(reward={"function": FUNCTIONS[1:]})
    _, summed = fit(reward={**both, "weights": [1.0, -2.0]})
    expected = one[0]["objective/score"] - 2 * other[0]["objective/score"]
    assert other[0]["objective/score"] > 1
    assert summed[0]["objective/score"] == pytest.approx(expected, abs=1e-5)


def test_several_rewards_are_logged_each_on_its_own_scale(fit, capsys):
    evaluated = {"total_steps": 1, "eval_samples": 4}
    _, (one,) = fit(run=evaluated, reward={"function": FUNCTIONS[:1]})
    _, (other,) = fit(run=evaluated, reward={"function": FUNCTIONS[1:]})
    reward = {"function": FUNCTIONS, "weights": [1.0, -2.0], "calibrate": True, "clip": 0.1}
    trainer, (row,) = fit(run=evaluated, reward=reward)
    assert not [key for key in (*one, *other) if "/score/" in key]
    assert row["objective/score/share_of_o"] == pytest.approx(one["objective/score"], abs=1e-6)
    assert row["objective/score/length"] == pytest.approx(other["objective/score"], abs=1e-5)
    # Before the first step, all three policies are the base.
    base = json.loads((trainer.folder / "summary.json").read_text())["base"]
    assert base["score/length"] > 1 and base["score_ci/length"] > 0
    assert row["eval/score/length"] > 1 and row["eval/score_ci/length"] > 0
    assert row["eval/score/share_of_o"] < 1
    assert f"length: {base['score/length']:+.3f} before, " in capsys.readouterr().out


def test_trackers_get_the_same_figures(fit):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, rows = fit(run={"trackers": ["tensorboard"]})
    places = {path.parent for path in trainer.folder.rglob("events.out.tfevents.*")}
    scalars = {}
    for place in places:
        events = EventAccumulator(str(place)).Reload()
        for tag in events.Tags()["scalars"]:
            scalars[tag] = {event.step: event.value for event in events.Scalars(tag)}
    assert scalars["objective/score"] == pytest.approx({row["step"]: row["objective/score"] for row in rows})


# Learning


@pytest.mark.parametrize("fast", [True, False], ids=["fast paths", "plain paths"])
@pytest.mark.parametrize(
    "lora", [{"r": 0}, {"r": 16, "alpha": 32, "target_modules": "all-linear"}], ids=["full", "lora"]
)
def test_a_tiny_policy_learns_a_trivial_reward(fit, lora, fast, monkeypatch):
    """The letter o in every token: at first a twentieth of the letters, in the end most of them.

    Adapters find tokens with one o among three letters, which the frozen vocabulary layer favours, and then, with some
    seeds, better ones.
    """
    monkeypatch.setattr(kernels, "_WORTH_PACKING", 1)  # else none of a tiny model's layers would be packed
    steps, reached = (20, 0.5) if lora["r"] == 0 else (25, 0.3)
    _, rows = fit(
        run={"total_steps": steps, "fast_kernels": fast},
        lora=lora,
        rollout={"batch_size": 32, "stop": [], "logprobs": "sampled" if fast else "recomputed"},
        ppo={"ppo_epochs": 4, "num_minibatches": 1, "micro_batch_tokens": 8192, "kl_coef": 0.0},
        optim={"lr": 1e-2, "schedule": "constant"},
    )
    scores = [row["objective/score"] for row in rows]
    assert scores[0] < 0.1
    assert sum(scores[-3:]) / 3 > reached
    assert rows[-1]["objective/kl"] > 1
    assert rows[-1]["objective/entropy"] < rows[0]["objective/entropy"]


def test_sampled_logprobs_may_round_otherwise_in_bf16(fit, llama_folder, tmp_path):
    """The reference is computed in one pass, sampling token by token: at step 1 their KL is rounding, and no error."""
    model, tokenizer = (kind.from_pretrained(llama_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    model.model.norm.weight.data *= 4  # sharper, so that rounding shows
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "sharp")
    _, rows = fit(
        run={"total_steps": 1, "precision": "bf16"},
        model={"name_or_path": str(tmp_path / "sharp")},
        rollout={"logprobs": "sampled", "max_new_tokens": 24, "stop": []},
    )
    assert 1e-3 < rows[0]["objective/kl_k3"] < 0.1


def test_the_kl_penalty_holds_the_policy_back(fit):
    def kl_of(coef):
        _, rows = fit(
            run={"total_steps": 8},
            rollout={"batch_size": 32, "stop": []},
            ppo={"ppo_epochs": 4, "num_minibatches": 1, "micro_batch_tokens": 8192, "kl_coef": coef},
            optim={"lr": 1e-2, "schedule": "constant"},
        )
        return rows[-1]["objective/kl_k3"]

    assert kl_of(1.0) < 0.5 * kl_of(0.0)


def test_the_critic_learns_to_foresee(fit):
    _, rows = fit(
        run={"total_steps": 6},
        model={"critic": "separate"},
        reward={"function": "tests.test_ppo_trainer:always_one"},
        rollout={"batch_size": 16},
        ppo={"micro_batch_tokens": 8192, "vf_coef": 1.0, "cliprange_value": None, "ppo_epochs": 4, "kl_coef": 0.0},
        optim={"lr": 1e-6, "critic_lr": 1e-2, "schedule": "constant"},
    )
    assert rows[-1]["loss/value"] < 0.05 * rows[0]["loss/value"]


# The Python API


def test_steps_on_prompts_of_ones_own(tiny, tmp_path):
    seen = []

    def reward(prompts, responses, **columns):
        seen.append(prompts)
        return [float(len(response)) for response in responses]

    config = tiny(reward={"function": []}, run={"output_dir": str(tmp_path / "own")})
    trainer = PPOTrainer(config, reward=reward)
    prompts = ["The film", "A dull and tired story", "It"]
    before = {name: value.clone() for name, value in weights(trainer).items()}
    # A number of prompts that num_minibatches does not divide: the remainder is learnt from too.
    first, second = trainer.step(prompts), trainer.step(prompts)
    assert set(first) == KEYS
    assert (first["step"], second["step"]) == (1, 2)
    assert (first["episodes"], second["episodes"]) == (3, 6)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert second["objective/kl"] != 0
    assert seen[-1] == prompts
    assert not all(torch.equal(weights(trainer)[name], value) for name, value in before.items())
    assert not (tmp_path / "own").exists(), "only fit() writes"


def test_each_step_draws_its_own_minibatches_and_global_random_numbers(tiny, monkeypatch):
    orders, drawn, cut = [], [], trainer_module.cut_micro_batches

    def reward(prompts, responses, **columns):
        drawn.append((random.random(), float(torch.rand(()))))
        return [float(len(response)) for response in responses]

    def noted(queries, responses, rows, *rest):
        orders.append(tuple(rows.tolist()))
        return cut(queries, responses, rows, *rest)

    monkeypatch.setattr(trainer_module, "cut_micro_batches", noted)
    trainer = PPOTrainer(tiny(reward={"function": []}, ppo={"ppo_epochs": 2, "num_minibatches": 2}), reward=reward)
    for _ in range(2):
        trainer.step(["The film"] * 8)
    passes = [orders[i] + orders[i + 1] for i in (0, 2, 4, 6)]  # two epochs of two steps
    assert len(orders) == 8 and len(set(passes)) == 4
    assert all(sorted(rows) == list(range(8)) for rows in passes)
    assert all(one != other for one, other in zip(drawn[-2], drawn[-1], strict=True))


def test_a_reward_beside_the_configs_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"reward\.function"):
        PPOTrainer(tiny(), reward=share_of_o)


def test_no_reward_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"reward\.model, reward\.url or reward\.function"):
        PPOTrainer(tiny(reward={"function": []}))


def test_the_start_says_what_scores(fit, capsys):
    fit(run={"total_steps": 1, "eval_samples": 0}, reward={"function": FUNCTIONS})
    said = capsys.readouterr().out
    assert "scored by reward.function=tests.conftest:share_of_o + reward.function=tests.test_ppo_trainer:length" in said


def test_a_callable_object_is_a_reward(tiny):
    class Judge:
        def __call__(self, prompts, responses, **columns):
            return [1.0] * len(prompts)

    metrics = PPOTrainer(tiny(reward={"function": []}), reward=Judge()).step(["The film"] * 8)
    assert metrics["objective/score"] == 1


def test_prompts_of_ones_own_are_checked_as_those_of_a_data_set(tiny):
    trainer = PPOTrainer(tiny())
    for prompts, said in (
        (
            ["The film"] * 7 + ["A dull, tired and bad story" * 5],
            r"^prompt 8 of 8 .* has 95 tokens, which with rollout\.max",
        ),
        (["The film"] * 7 + [""], "^prompt 8 of 8 has no text"),
        ([], "^there are no prompts"),
        ("The film", "^expected a list of prompts"),
    ):
        with pytest.raises(ConfigError, match=said):
            trainer.step(prompts)


def test_a_policy_that_reads_other_tokens_than_its_tokenizer_makes_is_refused(tiny, monkeypatch):
    encode = Tokens.encode
    monkeypatch.setattr(Tokens, "encode", lambda self, texts: [[*ids, self.eos_id] for ids in encode(self, texts)])
    with pytest.raises(ConfigError, match=r"^prompt tokens: 33 of 33 texts .* and is .*: what the tokenizer") as caught:
        PPOTrainer(tiny())
    assert caught.value.key == "model.name_or_path"


def test_a_stop_text_that_cannot_be_is_refused_before_a_model_loads(tiny, monkeypatch):
    monkeypatch.setattr(run_setup, "load_policy", None)
    with pytest.raises(ConfigError, match=r"^rollout\.stop contains '<\|endoftext\|>\\n'"):
        PPOTrainer(tiny(rollout={"stop": ["<|endoftext|>\n"]}))


# When something is wrong


def poison(trainer, times):
    """A hook that makes the head's gradient NaN in the first `times` backward passes."""
    left = [times]

    def hook(gradient):
        left[0] -= 1
        return gradient * float("nan") if left[0] >= 0 else gradient

    return trainer.runtime.plain_module.value_head.weight.register_hook(hook)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tiny):
    prompts = ["The film", "A dull"] * 4
    trainer = PPOTrainer(tiny(ppo={"micro_batch_tokens": 8192}))
    before = {name: value.clone() for name, value in weights(trainer).items()}
    handle = poison(trainer, times=4)
    metrics = trainer.step(prompts)
    assert metrics["optim/skipped_steps"] == 4
    assert all(torch.equal(weights(trainer)[name], value) for name, value in before.items())
    handle.remove()
    metrics = trainer.step(prompts)
    assert metrics["optim/skipped_steps"] == 4
    assert math.isfinite(metrics["optim/grad_norm"])
    after = weights(trainer)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert not all(torch.equal(after[name], value) for name, value in before.items())


def test_one_bad_gradient_costs_one_update(tiny):
    trainer = PPOTrainer(tiny(ppo={"micro_batch_tokens": 8192}))
    poison(trainer, times=1)
    metrics = trainer.step(["The film", "A dull"] * 4)
    assert metrics["optim/skipped_steps"] == 1
    assert math.isfinite(metrics["optim/grad_norm"])
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())


def test_a_figure_that_is_not_finite_is_null_in_the_file(fit, monkeypatch):
    init = PPOTrainer.__init__

    def poisoned(self, *arguments):
        init(self, *arguments)
        poison(self, times=4)

    monkeypatch.setattr(PPOTrainer, "__init__", poisoned)
    _, rows = fit(ppo={"micro_batch_tokens": 8192})
    assert rows[0]["optim/grad_norm"] is None
    assert rows[1]["optim/grad_norm"] is not None


def test_another_reference_is_noticed_at_step_1(tiny):
    trainer = PPOTrainer(tiny())
    with torch.no_grad():
        trainer.collector.reference.policy.transformer.wpe.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match=r"objective/kl_k3 .* at step 1"):
        trainer.step(["The film", "A dull"] * 4)


def test_other_log_probabilities_in_the_update_are_noticed_at_step_1(tiny):
    trainer = PPOTrainer(tiny(rollout={"logprobs": "sampled"}))
    trainer.runtime.plain_module.temperature = 0.9  # in the update, while sampling has 1
    with pytest.raises(RuntimeError, match=r"policy/first_ratio_error .* at step 1"):
        trainer.step(["The film", "A dull"] * 4)


def rounded(trainer: PPOTrainer, monkeypatch, by: float) -> PPOTrainer:
    """Sampling's log-probabilities are off by `by`, to either side: some CPUs round them as the update does."""
    engine = type(trainer.collector.engine)
    generate = engine.generate

    def generated(self, *arguments):
        found = generate(self, *arguments)
        return replace(found, logprobs=found.logprobs + by * (1 - torch.arange(found.logprobs.shape[1]) % 2 * 2))

    monkeypatch.setattr(engine, "generate", generated)
    return trainer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_in_bf16_a_fault_is_told_from_rounding_and_the_message_names_what_to_try(tiny, monkeypatch, precision):
    """Also with log-probabilities of sampling, which round differently from the update's."""
    sections = {"run": {"precision": precision}, "rollout": {"logprobs": "sampled"}, "ppo": {"ppo_epochs": 1}}
    prompts = ["The film", "A dull"] * 4
    beyond = r"policy/first_ratio_error .* at step 1: .*; try rollout\.logprobs=recomputed"
    with monkeypatch.context() as patch:
        trainer = rounded(PPOTrainer(tiny(**sections)), patch, by=0.01)
        if precision == "fp32":
            with pytest.raises(RunFailed, match=beyond):
                trainer.step(prompts)
        else:
            assert trainer.step(prompts)["policy/first_ratio_error"] > 1e-3
    trainer = PPOTrainer(tiny(**sections))
    trainer.runtime.plain_module.temperature = 0.6  # in the update, while sampling has 1
    with pytest.raises(RunFailed, match=beyond):
        trainer.step(prompts)


def test_where_log_probabilities_are_recomputed_sampling_from_elsewhere_is_warned_of(tiny, monkeypatch, capsys):
    """The ratio is 1 then, whatever sampling does."""
    prompts, positions = ["The film", "A dull"] * 4, calls.position_ids
    for fault in (False, True):
        trainer = PPOTrainer(tiny(run={"precision": "bf16"}, ppo={"ppo_epochs": 1}))
        if fault:
            monkeypatch.setattr(calls, "position_ids", lambda mask, first=0: positions(mask) + 1)
        trainer.step(prompts)
        said = capsys.readouterr().out
        assert ("warning: responses are drawn from another distribution than the one that is trained" in said) == fault


@pytest.mark.parametrize("fault", [False, True])
def test_an_untrained_dora_rounds_in_its_own_way_and_a_wrong_reference_is_found(fault, tiny, llama_folder, monkeypatch):
    """Over a bf16 base, its scaling by a norm that it divides by again is not exact."""
    trainer = PPOTrainer(
        tiny(
            model={"name_or_path": str(llama_folder), "dtype": "bf16"},
            lora={"r": 4, "use_dora": True},
            rollout={"max_new_tokens": 24},
        )
    )
    if fault:
        with torch.no_grad():  # the policy itself: its reference is the base
            for name, parameter in trainer.runtime.plain_module.policy.named_parameters():
                parameter += 0.3 * ("lora_B" in name)
        with pytest.raises(RunFailed, match=r"objective/kl_k3 is .* the reference differs in weights"):
            trainer.step(trainer.setup.prompts.batch(1, 8))
    else:
        assert trainer.step(trainer.setup.prompts.batch(1, 8))["objective/kl_k3"] > 1e-3


def test_a_rank_without_a_share_takes_part_in_the_look_at_sampling(tiny, monkeypatch):
    trainer = PPOTrainer(tiny(run={"precision": "bf16"}))
    prompts = trainer.setup.prompts.batch(1, 8)
    responses = trainer.collector.sample(prompts, Seeds(0, 1))
    trainer.step(prompts)
    limits = ratio_limits(trainer.setup, trainer.rollout)
    look = (trainer.setup, responses.select(torch.arange(0)), trainer.rollout, limits)
    monkeypatch.setattr(Runtime, "share", lambda self, count: torch.arange(0))
    assert sampled_is_recomputed(*look).passed
    monkeypatch.setattr(Runtime, "sum", lambda self, tensor: tensor + 100.0)  # of other ranks
    assert not sampled_is_recomputed(*look).passed


def test_checkpointing_trains_nothing_but_layers(tiny):
    """Training mode brings noise to routers, and dropout that its config did not set to 0."""
    trainer = PPOTrainer(tiny(model={"gradient_checkpointing": True}, lora={"r": 4}))
    trainer.runtime.plain_module.policy.get_base_model().transformer.drop.p = 0.5
    assert trainer.step(["The film", "A dull"] * 4)["policy/first_ratio_error"] < 1e-3


def test_the_module_is_back_in_evaluation_mode_after_an_exception(tiny, monkeypatch):
    trainer = PPOTrainer(tiny(model={"gradient_checkpointing": True}))

    def learning():
        return [layer for layer in trainer.runtime.module.modules() if layer.training]

    def fail():
        assert [type(layer).__name__ for layer in learning()] == ["GPT2Block"] * 2
        raise ZeroDivisionError

    monkeypatch.setattr(trainer.runtime, "optimizer_step", fail)
    with pytest.raises(ZeroDivisionError):
        trainer.step(["The film"] * 8)
    assert not learning()


def test_a_reward_that_fails_in_the_middle_of_a_run_says_which(tiny):
    def reward(prompts, responses, **columns):
        if len(prompts) == 8:
            raise OSError("gone")
        return [0.0] * len(prompts)

    reward.__name__ = "moody"
    with pytest.raises(RunFailed, match=r"reward=moody raised OSError: gone .*replay .*step-000001"):
        PPOTrainer(tiny(reward={"function": [], "retries": 0}), reward=reward).fit()


def test_a_reward_that_cannot_read_parts_is_found_before_training(tiny):
    def reward(prompts, responses, **columns):
        return [1 / len(response) for response in responses]

    reward.__name__ = "brevity"
    rewards = {"function": [], "retry_wait": 1e-3}
    PPOTrainer(tiny(reward=rewards), reward=reward)
    with pytest.raises(ConfigError, match=r"reward=brevity raised ZeroDivisionError.* reward\.partial_every=2 .*empty"):
        PPOTrainer(tiny(reward={**rewards, "partial_every": 2}), reward=reward)


def test_a_reward_that_cannot_read_parts_is_asked_once(tiny):
    asked = []

    def reward(prompts, responses, **columns):
        asked.append(list(responses))
        return [1 / len(response) for response in responses]

    with pytest.raises(ConfigError, match=r"set reward\.partial_every=0 \(and ppo\.lam=0\.95\)"):
        PPOTrainer(tiny(reward={"function": [], "retry_wait": 1e-3, "partial_every": 2}), reward=reward)
    assert len(asked) == 2 and not any(asked[1]), "the second time about empty responses, and no third time"


def test_a_reward_that_fails_on_a_part_later_says_where(tiny):
    def reward(prompts, responses, **columns):
        if len(prompts) == 8 and all(0 < len(response) < 8 for response in responses):
            raise OSError("gone")
        return [float(len(response)) for response in responses]

    with pytest.raises(RunFailed) as raised:
        settings = {"function": [], "retries": 0, "partial_every": 1}
        PPOTrainer(tiny(reward=settings, run={"eval_samples": 0}), reward=reward).fit()
    line = inspect.getsourcelines(reward)[1] + 2
    said = rf"OSError: gone \(test_ppo_trainer\.py:{line}\); .* unfinished responses \(reward\.partial_every=1\)"
    found = re.search(rf"{said}: .*; inspect it .*replay ([^\s;]+)", str(raised.value))
    assert found, raised.value
    facts = json.loads((Path(found[1]) / "dump.json").read_text())
    assert len(facts["prompts"]) == 8 and all(0 < len(response) < 8 for response in facts["responses"])


def test_a_stop_is_heard_between_the_calls_for_parts(tiny, monkeypatch):
    trainer, asked = PPOTrainer(tiny(reward={"partial_every": 1})), []
    trainer.between = lambda: asked.append("stop?")
    score_terms = scoring.score_terms
    for module in (scoring, trainer_module):
        monkeypatch.setattr(module, "score_terms", lambda *given: asked.append("score") or score_terms(*given))
    trainer.step(["The film", "A dull"] * 4)
    length = trainer.config.rollout.max_new_tokens
    assert asked[: 2 * length + 2] == ["stop?", "score", *(["stop?", "score"] * length)]


def test_explained_variance_is_that_of_values_and_partial_scores_together(tiny, monkeypatch):
    trainer, seen = PPOTrainer(tiny(reward={"function": "tests.test_ppo_trainer:length", "partial_every": 1})), []
    update = trainer.update
    monkeypatch.setattr(trainer, "update", lambda experience, step: seen.append(experience) or update(experience, step))
    metrics = trainer.step(["The film", "A dull"] * 4)
    rollout, mask = trainer.rollout, trainer.rollout.sequences.response_mask
    values = (rollout.values + rollout.partial_scores)[mask]
    returns = (seen[0].returns + rollout.partial_scores)[mask]
    assert metrics["value/explained_variance"] == pytest.approx(
        1 - float((returns - values).var(correction=0) / returns.var(correction=0)), abs=1e-4
    )
    alone = 1 - float((seen[0].returns - rollout.values)[mask].var() / seen[0].returns[mask].var())
    assert abs(metrics["value/explained_variance"] - alone) > 0.1


# Learning rates


def test_learning_rates():
    """Warm-up: steps 1 to w take 1/w, 2/w, …, 1. Then the share of the w..total part that is done before the step."""

    def factors(schedule, warmup, total):
        return [
            lr_factor(OptimConfig(schedule=schedule, warmup_steps=warmup), step, total) for step in range(1, total + 1)
        ]

    assert factors("constant", 0, 3) == [1.0, 1.0, 1.0]
    assert factors("linear", 0, 4) == [1.0, 0.75, 0.5, 0.25]
    assert factors("linear", 2, 6) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    half = math.sqrt(0.5)
    # cosine: (1 + cos(pi x)) / 2 at x = 0, 1/4, 1/2, 3/4.
    assert factors("cosine", 0, 4) == pytest.approx([1.0, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert factors("constant", 4, 6) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    # A warm-up as long as the run, or longer.
    assert factors("linear", 5, 3) == pytest.approx([0.2, 0.4, 0.6])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_ends_with_the_last_step(schedule):
    """Beyond it, the line of `linear` would fall below 0: the optimizer would climb the loss."""
    with pytest.raises(ConfigError, match=r"^run\.total_steps=4 is below step 5, .*optim\.schedule=constant") as error:
        lr_factor(OptimConfig(schedule=schedule), 5, 4)
    assert error.value.key == "run.total_steps"
    assert lr_factor(OptimConfig(schedule="constant"), 5, 4) == 1.0


def test_the_critic_keeps_its_own_rate_through_the_schedule(tiny):
    trainer = PPOTrainer(tiny(model={"critic": "separate"}, optim={"lr": 1e-3, "critic_lr": 1e-2, "warmup_steps": 2}))
    trainer.step(["The film"] * 8)
    rates = {group["lr"] for group in trainer.runtime._engine.optimizer.param_groups}
    assert rates == {0.5e-3, 0.5e-2}


def test_the_policy_that_is_trained_is_the_one_exported(fit, gpt2_folder):
    trainer, _ = fit()
    start = AutoModelForCausalLM.from_pretrained(gpt2_folder).state_dict()
    final = AutoModelForCausalLM.from_pretrained(trainer.folder / "final").state_dict()
    assert any(not torch.equal(final[name], start[name]) for name in start)
    for name, value in final.items():
        assert torch.equal(value, weights(trainer)[f"policy.{name}"])


def test_a_run_that_names_no_folder_gets_one_with_tracked_metrics(tiny, tmp_path, monkeypatch):
    """The default recipe's case: no run.output_dir, and TensorBoard on."""
    monkeypatch.chdir(tmp_path)
    PPOTrainer(tiny(run={"output_dir": None, "trackers": ["tensorboard"], "name": "mine"})).fit()
    assert list((tmp_path / "saved_models" / "mine" / "trackers").rglob("events.out.tfevents.*"))
    assert {path.name for path in tmp_path.iterdir()} == {"saved_models"}


def test_a_step_on_fewer_prompts_than_minibatches_is_refused(tiny):
    trainer = PPOTrainer(tiny(ppo={"num_minibatches": 4}))
    before = {name: value.clone() for name, value in weights(trainer).items()}
    with pytest.raises(ConfigError, match=r"^ppo\.num_minibatches=4 is above .* 3 responses"):
        trainer.step(["One", "Two", "Three"])
    assert all(torch.equal(weights(trainer)[name], value) for name, value in before.items())


def test_a_step_without_a_whole_run_calibrates_too(tiny):
    trainer = PPOTrainer(tiny(reward={"calibrate": True, "calibrate_samples": 64}))
    trainer.step(["The film", "A dull"] * 4)
    assert trainer.reward.std != 1


def test_a_sample_longer_than_the_policy_reads_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"^rollout\.max_prompt_tokens=6 and rollout\.max_new_tokens=\d+ make up to"):
        PPOTrainer(tiny(rollout={"max_new_tokens": 100_000}, ppo={"micro_batch_tokens": 200_000}))


def test_no_evaluation_is_said_aloud(tiny, tmp_path, capsys):
    """One text cannot be cut into a part to learn from and a tenth to judge by."""
    (tmp_path / "one.jsonl").write_text('{"text": "The film was good enough"}\n')
    PPOTrainer(tiny(data={"source": str(tmp_path / "one.jsonl")}))
    assert "no evaluation" in capsys.readouterr().out


@pytest.mark.parametrize("has_bf16", [True, False])
def test_emulated_arithmetic_that_was_asked_for_is_said_aloud(fit, monkeypatch, capsys, has_bf16):
    monkeypatch.setattr(run_module, "computes_in_bf16", lambda device: has_bf16)
    monkeypatch.setattr(run_module, "unused_device", lambda: "an idle device")
    fit(run={"total_steps": 1, "precision": "bf16"})
    said = capsys.readouterr().out
    assert ("run.precision=bf16: this device only emulates bf16" in said) != has_bf16
    assert said.count("warning: an idle device") == 1
