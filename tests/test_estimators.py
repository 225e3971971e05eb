"""Advantages without a critic: by hand, and against slow implementations of their own on random ragged batches."""

import statistics
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from rlhf_accel.algorithm.advantages import ESTIMATORS, make_experience
from rlhf_accel.algorithm.batches import Rollout, Sequences
from rlhf_accel.config.schema import PPOConfig, RewardConfig
from rlhf_accel.training.ppo_trainer import PPOTrainer
from tests.distributed.launch import rows as read_rows

SAMPLES = 4
GROUPED = ("rloo", "grpo", "dr_grpo")


def rollout(prompts: int, longest: int, seed: int = 0, samples: int = SAMPLES) -> Rollout:
    """Random responses of 1 to `longest` tokens, with NaN under the mask."""
    generator = torch.Generator().manual_seed(seed)
    count = prompts * samples
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    mask = torch.arange(longest) < lengths[:, None]
    logprobs, ref_logprobs = (
        torch.where(mask, -torch.rand(count, longest, generator=generator), torch.nan) for _ in range(2)
    )
    return Rollout(
        sequences=Sequences(
            queries=torch.ones(count, 2, dtype=torch.int64),
            query_mask=torch.ones(count, 2, dtype=torch.bool),
            responses=torch.ones(count, longest, dtype=torch.int64),
            response_mask=mask,
        ),
        groups=torch.arange(prompts).repeat_interleave(samples),
        finished=torch.ones(count, dtype=torch.bool),
        scores=torch.randn(count, generator=generator),
        partial_scores=torch.zeros(count, longest),
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=None,
        entropy=torch.zeros(count, longest),
        prompts=("",) * count,
        texts=("",) * count,
    )


def settings(advantage: str, **changes) -> PPOConfig:
    return PPOConfig(advantage=advantage, **{"whiten_advantages": False, **changes})


def advantages(made: Rollout, advantage: str, kl_coef: float = 0.3, **changes) -> torch.Tensor:
    experience = make_experience(made, settings(advantage, **changes), RewardConfig(), kl_coef)
    assert experience.returns is None and experience.old_values is None
    return experience.advantages


def slowly(made: Rollout, advantage: str, kl_coef: float, gamma: float = 1.0) -> torch.Tensor:
    """One response after the other, in Python's floats."""
    rows, mask = [], made.sequences.response_mask
    for i in range(len(made)):
        length = int(mask[i].sum())
        kl = [float(made.logprobs[i, t] - made.ref_logprobs[i, t]) for t in range(length)]
        rewards = [-kl_coef * nats for nats in kl]
        rewards[-1] += float(made.scores[i])
        rows.append(rewards)
    found = torch.zeros(mask.shape)
    for i, rewards in enumerate(rows):
        group = [sum(rows[j]) for j in range(len(rows)) if made.groups[j] == made.groups[i]]
        others = [sum(rows[j]) for j in range(len(rows)) if made.groups[j] == made.groups[i] and j != i]
        for t in range(len(rewards)):
            if advantage == "rloo":
                value = sum(rewards) - statistics.mean(others)
            elif advantage == "dr_grpo":
                value = sum(rewards) - statistics.mean(group)
            elif advantage == "grpo":
                value = (sum(rewards) - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
            else:
                value = sum(gamma**k * reward for k, reward in enumerate(rewards[t:]))
            found[i, t] = value
    return found


@pytest.mark.parametrize("advantage", [name for name in ESTIMATORS if name != "gae"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 3), (16, 12)])
def test_each_equals_a_slow_one(advantage, shape):
    made = rollout(*shape)
    assert_close(advantages(made, advantage), slowly(made, advantage, 0.3), atol=2e-5, rtol=1e-5)


def test_rewards_are_discounted_from_each_token_on():
    made = rollout(3, 6)
    expected = slowly(made, "reinforce++", 0.3, gamma=0.5)
    assert_close(advantages(made, "reinforce++", gamma=0.5), expected, atol=1e-6, rtol=1e-5)


def test_by_hand():
    """Scores 1, 2, 6 of one prompt without a KL: the mean is 3, the deviation sqrt((4 + 1 + 9) / 2) = sqrt(7)."""
    made = replace(rollout(1, 1, samples=3), scores=torch.tensor([1.0, 2.0, 6.0]))
    assert_close(advantages(made, "dr_grpo", 0.0)[:, 0], torch.tensor([-2.0, -1.0, 3.0]))
    assert_close(advantages(made, "rloo", 0.0)[:, 0], torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5]))
    assert_close(advantages(made, "grpo", 0.0)[:, 0], torch.tensor([-2.0, -1.0, 3.0]) / (7**0.5 + 1e-4))


def test_an_empty_response_counts_in_its_group():
    """Returns 2 and 0 of a group: the mean is 1 and the deviation sqrt(1 + 1), although the 0 lies on no token."""
    made = rollout(1, 1, samples=2)
    sequences = replace(made.sequences, response_mask=torch.tensor([[True], [False]]))
    made = replace(made, sequences=sequences, scores=torch.tensor([2.0, 5.0]))
    assert_close(advantages(made, "grpo", 0.0)[:, 0], torch.tensor([1.0, 0.0]) / (2**0.5 + 1e-4))


@pytest.mark.parametrize("advantage", GROUPED)
def test_a_group_that_scores_alike_teaches_nothing(advantage):
    made = replace(rollout(2, 5), scores=torch.full((8,), 3.0))
    assert (advantages(made, advantage, 0.0) == 0).all()


@pytest.mark.parametrize("advantage", GROUPED)
def test_what_a_prompt_is_worth_does_not_matter_and_whitening_leaves_groups_alone(advantage):
    made = rollout(4, 5)
    easier = replace(made, scores=made.scores + 10.0 * made.groups)
    found = advantages(made, advantage)
    assert_close(advantages(easier, advantage), found, atol=2e-4, rtol=1e-3)
    assert torch.equal(advantages(made, advantage, whiten_advantages=True), found)


def test_a_kl_in_the_loss_is_not_in_the_reward():
    made, mask = rollout(2, 5), rollout(2, 5).sequences.response_mask
    for kl_in in ("reward", "loss"):
        config = settings("rloo", kl_in=kl_in, kl_estimator="k1" if kl_in == "reward" else "k2")
        experience = make_experience(made, config, RewardConfig(), 0.3)
        alone = torch.allclose(torch.where(mask, experience.rewards, 0.0).sum(1), made.scores)
        assert alone == (kl_in == "loss") == (experience.ref_logprobs is not None)


def test_whitening_is_over_the_batch_without_groups():
    made = rollout(4, 5)
    found = advantages(made, "reinforce++", whiten_advantages=True)[made.sequences.response_mask]
    assert_close(found.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert_close(found.std(correction=0), torch.tensor(1.0))


@pytest.mark.parametrize("advantage", GROUPED)
def test_the_order_of_the_batch_does_not_matter(advantage):
    made, order = rollout(4, 5), torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert_close(advantages(made.select(order), advantage), advantages(made, advantage)[order], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("advantage", [name for name in ESTIMATORS if name != "gae"])
def test_a_run_without_a_critic(tiny, tmp_path, advantage):
    """Nothing of a critic is built, measured or written, and a resumed run is the run that never stopped."""
    sections = {"ppo": {"advantage": advantage}, "rollout": {"batch_size": 4, "samples_per_prompt": 3, "stop": ["e"]}}
    run = {"total_steps": 3, "save_every": 2, "sample_every": 1, "sample_count": 12}
    trainer = PPOTrainer(tiny(run=run, **sections))
    trainer.fit()
    rows = read_rows(trainer.folder / "metrics.jsonl")
    assert [row["episodes"] for row in rows] == [12, 24, 36]
    assert rows[-1]["objective/kl_k3"] > 1e-5, "it is trained"
    assert not [name for name in rows[0] if name.startswith("value/") or name == "loss/value"]
    assert not (trainer.folder / "final" / "value_head.safetensors").exists()
    assert "critic" not in (trainer.folder / "final" / "README.md").read_text()
    samples = read_rows(trainer.folder / "samples.jsonl")[:12]
    alike = [len({row["score"] for row in samples[i : i + 3]}) == 1 for i in range(0, 12, 3)]
    assert rows[0]["rollout/flat_groups"] == sum(alike) / 4
    assert [row["prompt"] for row in samples[::3]] == [row["prompt"] for row in samples[1::3]]
    assert len({row["response"] for row in samples[:3]}) > 1, "samples of a prompt have random numbers of their own"
    resume = {"output_dir": str(tmp_path / "on"), "resume": str(trainer.folder / "checkpoints" / "step-000002")}
    PPOTrainer(tiny(run={**run, **resume}, **sections)).fit()
    (resumed,) = read_rows(tmp_path / "on" / "metrics.jsonl")
    timed = ("time/", "perf/")
    assert {k: v for k, v in resumed.items() if not k.startswith(timed)} == {
        k: v for k, v in rows[2].items() if not k.startswith(timed)
    }


@pytest.mark.parametrize("kl", [{}, {"kl_in": "loss", "kl_estimator": "k2"}], ids=["reward", "loss"])
def test_a_step_whose_evaluation_waited_is_resumed(tiny, tmp_path, signalled, kl):
    """Its metrics are in the checkpoint: without those of a critic, and with those of a KL in the loss."""
    sections = {"ppo": {"advantage": "rloo", **kl}, "rollout": {"batch_size": 4, "samples_per_prompt": 2}}
    run = {"total_steps": 2, "eval_every": 1, "output_dir": str(tmp_path / "run")}
    signalled("update of step 1")
    with pytest.raises(SystemExit):
        PPOTrainer(tiny(run=run, **sections)).fit()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    PPOTrainer(tiny(run={**run, "resume": "latest"}, **sections)).fit()
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and ("loss/kl" in rows[0]) == bool(kl)


def test_keys_of_a_critic_are_reported_as_without_effect(tiny, tmp_path, capsys):
    message = "ppo.lam, optim.critic_lr: without effect, as ppo.advantage=rloo has no critic"
    for advantage in ("gae", "rloo"):
        config = tiny(
            run={"total_steps": 1, "output_dir": str(tmp_path / advantage)},
            ppo={"advantage": advantage, "lam": 0.5},
            rollout={"batch_size": 4, "samples_per_prompt": 2},
            optim={"critic_lr": 1e-3},
        )
        PPOTrainer(config).fit()
        assert (message in capsys.readouterr().out) == (advantage == "rloo")


def test_prompts_of_ones_own_get_as_many_samples(tiny):
    trainer = PPOTrainer(tiny(ppo={"advantage": "rloo"}, rollout={"batch_size": 4, "samples_per_prompt": 2}))
    trainer.step(["The film", "A dull"])
    assert trainer.rollout is not None and trainer.rollout.groups.tolist() == [0, 0, 1, 1]
