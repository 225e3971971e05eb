"""Rollout -> Experience, against numbers worked out by hand.

Two responses, of two and of three tokens; gamma = 1 and lam = 0.5 unless said, kl_coef = 0.5.

    logprobs - ref_logprobs = [[0.2, -0.4, -], [0.0, 0.6, 0.2]]        (where - is padding)
    kl (k1)                 = the same
    rewards                 = -0.5 kl, and the score on the last token
                            = [[-0.1, 0.2 + 1, -], [0, -0.3, -0.1 + 2]] = [[-0.1, 1.2, -], [0.0, -0.3, 1.9]]
    values                  = [[0.5, 0.2, -], [0.0, 1.0, 0.4]]
    deltas                  = r + next value - value
                            = [[-0.1 + 0.2 - 0.5, 1.2 - 0.2, -], [0 + 1.0 - 0, -0.3 + 0.4 - 1.0, 1.9 - 0.4]]
                            = [[-0.4, 1.0, -], [1.0, -0.9, 1.5]]
    advantages              = delta + 0.5 * next advantage
                            = [[-0.4 + 0.5, 1.0, -], [1.0 + 0.5 * -0.15, -0.9 + 0.75, 1.5]]
                            = [[0.1, 1.0, -], [0.925, -0.15, 1.5]]
    returns                 = advantages + values = [[0.6, 1.2, -], [0.925, 0.85, 1.9]]
"""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from rlhf_accel.algorithm import ppo
from rlhf_accel.algorithm.advantages import gae, make_experience
from rlhf_accel.algorithm.batches import Rollout, Sequences
from rlhf_accel.config.schema import PPOConfig, RewardConfig

MASK = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
GARBAGE = 77.0
DIFFERENCE = torch.tensor([[0.2, -0.4, GARBAGE], [0.0, 0.6, 0.2]])
PLAIN = PPOConfig(lam=0.5, whiten_advantages=False)


def rollout():
    ref_logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.5, -2.5, -0.5]])
    return Rollout(
        sequences=Sequences(
            queries=torch.tensor([[1, 2], [3, 4]]),
            query_mask=torch.ones(2, 2, dtype=torch.bool),
            responses=torch.tensor([[5, 6, 0], [7, 8, 9]]),
            response_mask=MASK,
        ),
        groups=torch.arange(2),
        finished=torch.tensor([True, False]),
        scores=torch.tensor([1.0, 2.0]),
        partial_scores=torch.zeros(2, 3),
        logprobs=ref_logprobs + DIFFERENCE,
        ref_logprobs=ref_logprobs,
        values=torch.tensor([[0.5, 0.2, GARBAGE], [0.0, 1.0, 0.4]]),
        entropy=torch.zeros(2, 3),
        prompts=("a", "b"),
        texts=("c", "d"),
    )


def make(config=PLAIN, reward=None, kl_coef=0.5):
    return make_experience(rollout(), config, reward or RewardConfig(), kl_coef)


def assert_tokens(tensor, first, second):
    """The tokens that count, and nothing in the padding."""
    assert_close(tensor, torch.tensor([[*first, 0.0], second]), atol=1e-6, rtol=1e-5)


def test_rewards_advantages_and_returns():
    experience = make()
    assert_tokens(experience.rewards, [-0.1, 1.2], [0.0, -0.3, 1.9])
    assert_tokens(experience.advantages, [0.1, 1.0], [0.925, -0.15, 1.5])
    assert_tokens(experience.returns, [0.6, 1.2], [0.925, 0.85, 1.9])


def test_what_the_rollout_said_is_kept():
    experience, was = make(), rollout()
    assert torch.equal(experience.old_logprobs, was.logprobs)
    assert torch.equal(experience.old_values, was.values)
    assert torch.equal(experience.sequences.responses, was.sequences.responses)


def test_the_coefficient_is_the_one_of_the_controller():
    assert_tokens(make(kl_coef=0.0).rewards, [0.0, 1.0], [0.0, 0.0, 2.0])
    assert_tokens(make(replace(PLAIN, kl_coef=9.0), kl_coef=1.0).rewards, [-0.2, 1.4], [0.0, -0.6, 1.8])


def test_gamma_and_lambda():
    # gamma = 0.5, lam = 1: deltas are r + 0.5 next value - value = [[-0.5, 1.0, -], [0.5, -1.1, 1.5]], and
    # advantages = [[-0.5 + 0.5, 1.0, -], [0.5 + 0.5 * -0.35, -1.1 + 0.75, 1.5]].
    experience = make(PPOConfig(gamma=0.5, lam=1.0, whiten_advantages=False))
    assert_tokens(experience.advantages, [0.0, 1.0], [0.325, -0.35, 1.5])


@pytest.mark.parametrize(
    ("estimator", "kl"),
    [
        ("k1", lambda d: d),
        ("k2", lambda d: d * d / 2),
        ("k3", lambda d: math.exp(-d) - 1 + d),
    ],
)
def test_kl_estimators(estimator, kl):
    rewards = make(replace(PLAIN, kl_estimator=estimator)).rewards
    assert_tokens(
        rewards,
        [-0.5 * kl(0.2), -0.5 * kl(-0.4) + 1],
        [-0.5 * kl(0.0), -0.5 * kl(0.6), -0.5 * kl(0.2) + 2],
    )


def test_the_missing_end_costs_the_response_that_was_cut_off():
    # The second response did not finish: its score is 2 - 1.5.
    rewards = make(reward=RewardConfig(missing_eos_penalty=1.5)).rewards
    assert_tokens(rewards, [-0.1, 1.2], [0.0, -0.3, 0.4])


def test_whitened_advantages():
    # Of [0.1, 1.0, 0.925, -0.15, 1.5] the mean is 3.375 / 5 = 0.675, the squares of what is left are
    # [0.330625, 0.105625, 0.0625, 0.680625, 0.680625], their mean is 0.372, and the deviation its root.
    experience = make(replace(PLAIN, whiten_advantages=True))
    expected = [(a - 0.675) / math.sqrt(0.372) for a in (0.1, 1.0, 0.925, -0.15, 1.5)]
    assert_tokens(experience.advantages, expected[:2], expected[2:])
    # Whitening is for the policy's gradient only: the critic still learns the returns as they are.
    assert_tokens(experience.returns, [0.6, 1.2], [0.925, 0.85, 1.9])


def test_whitened_rewards_are_scaled_and_not_shifted():
    # Of [-0.1, 1.2, 0.0, -0.3, 1.9] the mean is 2.7 / 5 = 0.54 and the mean square (0.01 + 1.44 + 0.09 + 3.61) / 5 =
    # 1.03, so the variance is 1.03 - 0.2916 = 0.7384.
    experience = make(replace(PLAIN, whiten_rewards=True))
    expected = [r / math.sqrt(0.7384) for r in (-0.1, 1.2, 0.0, -0.3, 1.9)]
    # They are what advantages are made of; what is reported are the rewards as they were.
    assert_tokens(experience.rewards, [-0.1, 1.2], [0.0, -0.3, 1.9])
    assert_close(experience.advantages[0, 1], torch.tensor(expected[1] - 0.2))


PARTIAL = torch.tensor([[0.1, -0.4, GARBAGE], [0.2, 0.5, 3.0]])


def test_partial_scores_are_a_part_of_the_values_that_the_critic_need_not_learn():
    # The same values in all, so the same advantages; the critic's own part and its targets are less by the other.
    was = rollout()
    experience = make_experience(
        replace(was, values=was.values - PARTIAL, partial_scores=PARTIAL), PLAIN, RewardConfig(), 0.5
    )
    assert_tokens(experience.rewards, [-0.1, 1.2], [0.0, -0.3, 1.9])
    assert_tokens(experience.advantages, [0.1, 1.0], [0.925, -0.15, 1.5])
    assert_tokens(experience.returns, [0.6 - 0.1, 1.2 + 0.4], [0.925 - 0.2, 0.85 - 0.5, 1.9 - 3.0])
    assert_tokens(experience.old_values.masked_fill(~MASK, 0.0), [0.4, 0.6], [-0.2, 0.5, -2.6])


def test_partial_scores_do_what_shaping_the_rewards_by_a_potential_does():
    # Ng et al. 1999: r + gamma * next potential - potential, with no potential after the last token.
    config = PPOConfig(gamma=0.9, lam=0.5, whiten_advantages=False)
    experience = make_experience(replace(rollout(), partial_scores=PARTIAL), config, RewardConfig(), 0.5)
    shaped = torch.tensor(
        [
            [-0.1 + 0.9 * -0.4 - 0.1, 1.2 + 0.4, 0.0],
            [0.0 + 0.9 * 0.5 - 0.2, -0.3 + 0.9 * 3.0 - 0.5, 1.9 - 3.0],
        ]
    )
    advantages, returns = gae(shaped, rollout().values, MASK, 0.9, 0.5)
    assert_close(experience.advantages, advantages)
    assert_close(experience.returns, returns)


def test_padding_says_nothing():
    clean = rollout()
    clean = replace(
        clean,
        partial_scores=PARTIAL.masked_fill(~MASK, 0.0),
        **{name: getattr(clean, name).masked_fill(~MASK, 0.0) for name in ("logprobs", "ref_logprobs", "values")},
    )
    dirty = replace(rollout(), partial_scores=PARTIAL)
    config = PPOConfig(whiten_rewards=True)
    for name in ("rewards", "advantages", "returns"):
        with_garbage = getattr(make_experience(dirty, config, RewardConfig(), 0.5), name)
        assert torch.equal(with_garbage, getattr(make_experience(clean, config, RewardConfig(), 0.5), name))


def test_the_order_of_responses_does_not_matter():
    swapped = make_experience(rollout().select(torch.tensor([1, 0])), PPOConfig(), RewardConfig(), 0.5)
    assert_close(swapped.advantages.flip(0), make(PPOConfig()).advantages)


@pytest.mark.parametrize("whitened", [False, True])
def test_one_token_and_a_response_without_any_give_finite_numbers(whitened):
    """Of one token there is no spread; of a response that is all padding nothing counts, not even its score."""
    config = PPOConfig(whiten_rewards=whitened, whiten_advantages=whitened)
    was = rollout()
    for mask in (torch.tensor([[True, False, False]]), torch.zeros(1, 3, dtype=torch.bool)):
        one = was.select(torch.tensor([0]))
        one = replace(one, sequences=replace(one.sequences, response_mask=mask))
        experience = make_experience(one, config, RewardConfig(), 0.5)
        for part in (experience.rewards, experience.advantages, experience.returns):
            assert part.isfinite().all() and not part[~mask].any()
        if whitened:
            assert not experience.advantages.any()
        assert float(ppo.explained_variance(one.values, experience.returns, mask)) == 0
    assert_close(
        make_experience(was.select(torch.tensor([0])), PLAIN, RewardConfig(), 0.5).rewards[0, :2],
        torch.tensor([-0.1, 1.2]),
    )
