"""The terms of a loss by name, with a critic and without one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlhf_accel.algorithm.batches import Experience, Sequences, TokenOutputs
from rlhf_accel.config.schema import PPOConfig
from rlhf_accel.training.losses import Terms, UpdateTotals, loss_terms

MASK = torch.tensor([[True, True, False], [True, False, False]])
ONES = torch.ones(2, 3)


def experience(*, critic: bool) -> Experience:
    sequences = Sequences(
        queries=torch.ones(2, 1, dtype=torch.int64),
        query_mask=torch.ones(2, 1, dtype=torch.bool),
        responses=torch.ones(2, 3, dtype=torch.int64),
        response_mask=MASK,
    )
    values, returns = (0.0 * ONES, ONES) if critic else (None, None)
    return Experience(
        sequences=sequences, old_logprobs=-ONES, old_values=values, rewards=ONES, advantages=2.0 * ONES, returns=returns
    )


def outputs(*, critic: bool) -> TokenOutputs:
    return TokenOutputs(logprobs=-ONES, values=0.5 * ONES if critic else None, entropy=3.0 * ONES)


def test_the_total_is_made_of_its_terms() -> None:
    # Three tokens. Ratio 1: a policy loss of -2 each. Values 0.5 below their returns, and old ones 1 below: clipped at
    # 0.2 they are 0.8 off, and the larger square counts: 0.5 x 0.64 each.
    config = PPOConfig(vf_coef=0.1, entropy_coef=0.01, cliprange_value=0.2)
    sums = loss_terms(outputs(critic=True), experience(critic=True), MASK, config, 0.0).sums
    assert float(sums["policy"]) == pytest.approx(-6.0)
    assert float(sums["value"]) == pytest.approx(3 * 0.5 * 0.64)
    assert float(sums["total"]) == pytest.approx(-6.0 + 0.1 * float(sums["value"]) - 0.01 * 9.0)
    assert float(sums["value_clipped"]) == 3.0


def test_without_a_critic_there_is_no_value_loss() -> None:
    config = PPOConfig(vf_coef=0.1, entropy_coef=0.01)
    terms = loss_terms(outputs(critic=False), experience(critic=False), MASK, config, 0.0)
    assert not any("value" in name for name in terms.sums)
    assert float(terms.sums["total"]) == pytest.approx(-6.0 - 0.01 * 9.0)
    totals = UpdateTotals(experience(critic=False))
    totals.add_losses(terms.detached(), tokens=3, denominator=3)
    stats = totals.stats()
    assert (stats.value, stats.value_clip_fraction) == (None, None) and stats.policy == pytest.approx(-2.0)


def test_terms_add_up_over_micro_batches_and_ranks() -> None:
    config = PPOConfig()
    whole = loss_terms(outputs(critic=True), experience(critic=True), MASK, config, 0.0).detached()
    parts = []
    for row in range(2):
        part = experience(critic=True).select(torch.tensor([row]))
        of_row = TokenOutputs(logprobs=-ONES[:1], values=0.5 * ONES[:1], entropy=None)
        parts.append(loss_terms(of_row, part, MASK[row : row + 1], replace(config, entropy_coef=0.0), 0.0).detached())
    added = Terms.added(parts).over(lambda sums, maxima: (2 * sums, maxima))
    for name, value in whole.sums.items():
        assert float(added.sums[name]) == pytest.approx(2 * float(value)), name
    assert {name: float(value) for name, value in added.maxima.items()} == {
        name: float(value) for name, value in whole.maxima.items()
    }
