"""The maths, against hand-derived numbers, independent implementations and properties.

Public functions are called through `maths`, in which jaxtyping and beartype check every shape and dtype of every call;
`unchecked` has the plain functions, for the errors it raises itself.
"""

import doctest
import inspect
import itertools
import math
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_accel.algorithm import advantages, kl, logprobs, masked, ppo
from rlhf_accel.algorithm.kl import AdaptiveKLController, FixedKLController

MODULES = (advantages, kl, logprobs, masked, ppo)
PUBLIC = {
    name: function
    for module in MODULES
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and not name.startswith("_")
}
unchecked = SimpleNamespace(**PUBLIC)
maths = SimpleNamespace(**{name: jaxtyping.jaxtyped(f, typechecker=beartype) for name, f in PUBLIC.items()})

CLIP = ppo.Clip(0.2, 0.2)
NAN, INF = float("nan"), float("inf")
seeds = st.integers(0, 2**31)
few_examples = settings(max_examples=25, deadline=None)


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float32)


def first(*lengths, width):
    """A mask that counts the first `lengths[b]` tokens of row b."""
    return torch.arange(width) < torch.tensor(lengths).unsqueeze(1)


def random_batch(seed, rows=4, width=6):
    """Everything the losses take: ratios on both sides of the clip range, and lengths from 0 to `width`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale):
        return scale * torch.randn(rows, width, generator=generator)

    old_logprobs, old_values = normal(1.0) - 3, normal(1.0)
    lengths = torch.randint(0, width + 1, (rows,), generator=generator)
    lengths[0] = width  # some row counts, so that no mean is empty
    return SimpleNamespace(
        old_logprobs=old_logprobs,
        logprobs=old_logprobs + normal(0.3),
        advantages=normal(1.0),
        old_values=old_values,
        values=old_values + normal(0.3),
        returns=normal(1.0),
        mask=torch.arange(width) < lengths.unsqueeze(1),
    )


def losses_and_gradients(batch):
    """Both losses and the gradients of their sums: every number that one update sees."""
    logprobs = batch.logprobs.clone().requires_grad_()
    values = batch.values.clone().requires_grad_()
    policy = maths.policy_loss(logprobs, batch.old_logprobs, batch.advantages, batch.mask, CLIP)
    value = maths.value_loss(values, batch.old_values, batch.returns, batch.mask, 0.2)
    (policy.loss + value.loss).backward()
    return policy, value, logprobs.grad, values.grad


def map_batch(batch, function):
    return SimpleNamespace(**{name: function(tensor) for name, tensor in vars(batch).items()})


# Running the checks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_shapes_are_checked_in_these_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        maths.masked_row_sum(torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(jaxtyping.TypeCheckError):
        maths.masked_sum(torch.zeros(3), torch.ones(3))


# Token logprobs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_logprobs_and_entropy_match_log_softmax_in_float64(dtype, temperature):
    torch.manual_seed(0)
    logits = (4 * torch.randn(3, 5, 11) - 30).to(dtype)  # -30: the neighbourhood in which GPT-2's logits live
    tokens = torch.randint(11, (3, 5))
    reference = torch.log_softmax(logits.double() / temperature, dim=-1)
    expected = reference.gather(-1, tokens[..., None]).squeeze(-1).float()
    expected_entropy = -(reference.exp() * reference).sum(-1).float()

    logprobs, entropy = maths.token_logprobs(logits, tokens, temperature), maths.token_entropy(logits, temperature)
    assert_close(logprobs, expected, atol=2e-5, rtol=0)
    assert_close(entropy, expected_entropy, atol=2e-5, rtol=0)


def test_logprob_and_entropy_gradients_match_autograd_in_float64():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    weights = torch.randn(2, 2, 3)
    mine, alone, exact = (logits.clone().to(d).requires_grad_() for d in (torch.float32, torch.float32, torch.float64))

    logprobs, entropy = maths.token_logprobs(mine, tokens, 0.7), maths.token_entropy(mine, 0.7)
    (weights[0] * logprobs + weights[1] * entropy).sum().backward()
    reference = torch.log_softmax(exact / 0.7, dim=-1)
    picked = reference.gather(-1, tokens[..., None]).squeeze(-1)
    (weights[0] * picked - weights[1] * (reference.exp() * reference).sum(-1)).sum().backward()
    assert_close(mine.grad, exact.grad.float(), atol=1e-5, rtol=1e-5)

    (weights[0] * maths.token_logprobs(alone, tokens, 0.7)).sum().backward()
    exact.grad = None
    reference = torch.log_softmax(exact / 0.7, dim=-1)
    (weights[0] * reference.gather(-1, tokens[..., None]).squeeze(-1)).sum().backward()
    assert_close(alone.grad, exact.grad.float(), atol=1e-5, rtol=1e-5)


def test_entropy_of_the_uniform_distribution_is_log_v():
    logits = torch.full((1, 2, 50), -7.0)
    assert_close(maths.token_entropy(logits), torch.full((1, 2), math.log(50)))
    assert_close(maths.token_logprobs(logits, torch.tensor([[0, 49]])), torch.full((1, 2), -math.log(50)))


def test_forbidden_tokens_add_nothing_to_entropy_and_no_nan_to_the_gradient():
    # Two tokens of probability 1/2 and a forbidden one: entropy log 2. By symmetry the entropy's gradient is 0, and
    # that of the logprob of token 0 is 1 - 1/2 on itself and -1/2 on the other.
    logits = torch.tensor([[[3.0, 3.0, -INF]]], requires_grad=True)
    logprobs, entropy = maths.token_logprobs(logits, torch.tensor([[0]])), maths.token_entropy(logits)
    assert_close(entropy, row(math.log(2)))
    (logprobs + entropy).sum().backward()
    assert_close(logits.grad, torch.tensor([[[0.5, -0.5, 0.0]]]))
    assert maths.token_logprobs(logits, torch.tensor([[2]])).item() == -INF


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature="):
        maths.token_logprobs(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64), temperature)
    with pytest.raises(ValueError, match="temperature="):
        maths.token_entropy(torch.zeros(1, 1, 2), temperature)


# Masked sums ------------------------------------------------------------------------------------------------------


def test_masked_sums_by_hand_with_nan_and_infinity_under_the_mask():
    x = torch.tensor([[1.0, 2.0, NAN], [4.0, INF, -INF], [NAN, NAN, NAN]], requires_grad=True)
    mask = first(2, 1, 0, width=3)
    assert maths.masked_sum(x, mask).item() == 7.0
    assert_close(maths.masked_mean(x, mask).item(), 7 / 3)
    assert maths.masked_row_sum(x, mask).tolist() == [3.0, 4.0, 0.0]

    (maths.masked_sum(x, mask) + 3 * maths.masked_mean(x, mask) + maths.masked_row_sum(x, mask).sum()).backward()
    assert_close(x.grad, 3.0 * mask)  # each entry counts 1 + 3 * 1/3 + 1 times


def test_sums_are_fp32_for_half_precision_inputs():
    ones = torch.ones(1, 70_000, dtype=torch.float16)  # fp16 ends at 65 504
    mask = torch.ones(1, 70_000, dtype=torch.bool)
    assert maths.masked_sum(ones, mask).item() == 70_000
    assert maths.masked_row_sum(ones, mask).item() == 70_000


def test_an_empty_mask_gives_a_sum_of_zero_with_a_backward_but_no_mean():
    x = torch.full((2, 3), NAN, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    total = maths.masked_sum(x, nothing)
    total.backward()
    assert total.item() == 0
    assert_close(x.grad, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="no True entry"):
        maths.masked_mean(x, nothing)


@pytest.mark.parametrize("function", ["masked_sum", "masked_mean", "masked_row_sum", "standardize", "rescale"])
def test_nothing_broadcasts_against_a_mask(function):
    with pytest.raises(ValueError, match=r"\(2, 1\).*\(2, 3\)"):
        getattr(unchecked, function)(torch.ones(2, 1), torch.ones(2, 3, dtype=torch.bool))


# KL ---------------------------------------------------------------------------------------------------------------


def test_kl_estimators_by_hand():
    # Policy 0.8, reference 0.4: logr = log 2 = 0.693147. k1 = 0.693147; k2 = 0.480453 / 2 = 0.240227;
    # k3 = 1/2 - 1 + 0.693147 = 0.193147. Exchanged, logr = -log 2: k1 = -0.693147, k2 the same, k3 = 2 - 1 - 0.693147.
    p, q = row(0.8, 0.4).log(), row(0.4, 0.8).log()
    assert_close(maths.kl_estimate(p, q, "k1"), row(0.693147, -0.693147), atol=1e-6, rtol=0)
    assert_close(maths.kl_estimate(p, q, "k2"), row(0.240227, 0.240227), atol=1e-6, rtol=0)
    assert_close(maths.kl_estimate(p, q, "k3"), row(0.193147, 0.306853), atol=1e-6, rtol=0)


def exact_kl(logits, reference_logits):
    p, q = (x.double().log_softmax(-1) for x in (logits, reference_logits))
    return (p.exp() * (p - q)).sum().item()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    policy, reference, samples = torch.tensor([1.0, 0.0, -1.0, 0.5]), torch.tensor([0.0, 0.5, -1.0, 2.0]), 200_000
    generator = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(policy.softmax(-1), samples, replacement=True, generator=generator).unsqueeze(0)
    logprobs, ref_logprobs = (maths.token_logprobs(x.expand(1, samples, 4), tokens) for x in (policy, reference))
    estimates = maths.kl_estimate(logprobs, ref_logprobs, estimator)

    exact, reverse = exact_kl(policy, reference), exact_kl(reference, policy)
    error = estimates.std().item() / math.sqrt(samples)
    assert abs(estimates.mean().item() - exact) < 4 * error
    assert abs(reverse - exact) > 10 * error  # so that the other direction would be noticed


def test_k2_is_biased_but_close_for_close_distributions():
    policy, direction = torch.tensor([1.0, 0.0, -1.0, 0.5]), torch.tensor([1.0, -0.5, -1.0, 0.5])

    def expected_k2_over_kl(distance):
        p, q = policy.log_softmax(-1)[None], (policy - distance * direction).log_softmax(-1)[None]
        return (p.exp() * maths.kl_estimate(p, q, "k2")).sum().item() / exact_kl(p, q)

    assert abs(expected_k2_over_kl(0.02) - 1) < 0.02
    assert abs(expected_k2_over_kl(2.0) - 1) > 0.1


def drift(logits, reference, estimator):
    """The step that PPO takes down the estimator as a reward: -E[c grad log pi], exactly, over all tokens."""
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    cost = maths.kl_estimate(logprobs.detach()[None], reference.log_softmax(-1)[None], estimator)[0]
    (logprobs.detach().exp() * cost * logprobs).sum().backward()
    return -logits.grad


def test_as_a_reward_k1_leads_to_the_reference_and_k2_and_k3_away_from_it():
    # Two tokens, reference (1/2, 1/2), policy (1/2 + e, 1/2 - e). To third order in e the costs of the two tokens are
    # k1: 2e, -2e; k2: 2e^2 -+ 4e^3; k3: 2e^2 -+ 16/3 e^3. What PPO lowers is the dearer token: by k1 the first, which
    # the policy has too much of; by k2 and k3 the second, which it has too little of already.
    epsilon, reference = 0.1, torch.zeros(2, dtype=torch.float64)
    policy = torch.tensor([0.5 + epsilon, 0.5 - epsilon], dtype=torch.float64).log()
    slope = 2 * 0.25 * (1 - 4 * epsilon**2)  # of the difference of two logits in p: p (1 - p), for each of them
    for estimator, expected in (("k1", -4 * epsilon), ("k2", 8 * epsilon**3), ("k3", 32 / 3 * epsilon**3)):
        step = drift(policy, reference, estimator)
        assert (step[0] - step[1]).item() == pytest.approx(slope * expected, rel=0.15), estimator


def test_the_gradient_of_k1_as_a_reward_is_that_of_the_kl_and_of_k3_the_difference_of_two():
    logits, reference = (torch.randn(6, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1))
    given = logits.clone().requires_grad_()
    p, q = given.log_softmax(-1), reference.log_softmax(-1)
    (forward,) = torch.autograd.grad((p.exp() * (p - q)).sum(), given, retain_graph=True)
    (reverse,) = torch.autograd.grad((q.exp() * (q - p)).sum(), given)
    assert_close(drift(logits, reference, "k1").double(), -forward, atol=1e-6, rtol=0)
    assert_close(drift(logits, reference, "k3").double(), reverse - forward, atol=1e-6, rtol=0)


def test_k3_is_never_negative_and_exact_where_the_difference_is_tiny():
    logr = torch.cat((torch.logspace(-12, 1, 50_000), -torch.logspace(-12, 1, 50_000))).unsqueeze(0)
    k3 = maths.kl_estimate(logr, torch.zeros_like(logr), "k3")
    assert (k3 >= 0).all()
    # k3 = logr^2 / 2 + O(logr^3): at 1e-3, 5e-7. Through exp(-logr) - 1 in fp32 it would be off by up to 6e-8.
    assert_close(maths.kl_estimate(row(1e-3), row(0.0), "k3"), row(5e-7 - 1e-9 / 6), atol=1e-10, rtol=0)


def test_kl_is_taken_in_fp32():
    # Both operands are exact in bf16, but their difference, 3 + 3/128, is not: between 2 and 4 its step is 2/128.
    p, q = torch.tensor([[2.0 + 1 / 64]]).bfloat16(), torch.tensor([[-1.0 - 1 / 128]]).bfloat16()
    assert maths.kl_estimate(p, q, "k1").item() == p.double().item() - q.double().item()


def test_unknown_estimator_and_shape_mismatch_are_refused():
    with pytest.raises(ValueError, match="'k4' is unknown; choose one of 'k1', 'k2', 'k3'"):
        unchecked.kl_estimate(row(0.0), row(0.0), "k4")
    with pytest.raises(ValueError, match="expected the same"):
        unchecked.kl_estimate(row(0.0, 1.0), row(0.0), "k1")


# Whitening --------------------------------------------------------------------------------------------------------


def test_standardize_is_global_and_uses_the_biased_variance():
    # 1, 3 in one row and 5, 7 in the other: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5. Whitening by row would give +-1,
    # the unbiased variance 20 / 3.
    x = torch.tensor([[1.0, 3.0, NAN], [5.0, 7.0, INF]])
    expected = torch.tensor([[-3.0, -1.0, 0.0], [1.0, 3.0, 0.0]]) / math.sqrt(5)
    assert_close(maths.standardize(x, first(2, 2, width=3)), expected)


def test_rescale_divides_and_does_not_shift():
    # The same numbers: standard deviation sqrt(5), and a zero stays a zero. 0, 2, 4: variance (4 + 0 + 4) / 3.
    x = torch.tensor([[1.0, 3.0, NAN], [5.0, 7.0, INF]])
    expected = torch.tensor([[1.0, 3.0, 0.0], [5.0, 7.0, 0.0]]) / math.sqrt(5)
    assert_close(maths.rescale(x, first(2, 2, width=3)), expected)
    assert_close(maths.rescale(row(0, 2, 4), first(3, width=3)), row(0, 2, 4) / math.sqrt(8 / 3))


@pytest.mark.parametrize("length", [0, 1, 3])
def test_whitening_without_spread_stays_finite(length):
    x, mask = row(0.1, 0.1, 0.1, NAN), first(length, width=4)
    assert_close(maths.standardize(x, mask), row(0, 0, 0, 0), atol=0, rtol=0)
    assert_close(maths.rescale(x, mask), torch.where(mask, x, 0.0), atol=0, rtol=0)


@given(seeds)
@few_examples
def test_standardized_entries_have_mean_0_and_variance_1_on_any_scale(seed):
    batch = random_batch(seed)
    for x in (batch.returns, 1000 * batch.returns - 300):
        counted = maths.standardize(x, batch.mask)[batch.mask].double()
        assert abs(counted.mean()) < 1e-5
        assert abs(counted.var(correction=0) - 1) < 1e-5
        rescaled = maths.rescale(x, batch.mask)[batch.mask].double()
        assert abs(rescaled.var(correction=0) - 1) < 1e-5
        assert (rescaled.sign() == x[batch.mask].sign()).all()


# Rewards ----------------------------------------------------------------------------------------------------------


def test_missing_eos_is_penalized():
    scores = torch.tensor([1.0, 2.0, -3.0])
    penalized = maths.penalize_missing_eos(scores, torch.tensor([True, False, False]), 0.5)
    assert penalized.tolist() == [1.0, 1.5, -3.5]
    for penalty in (-1.0, NAN):
        with pytest.raises(ValueError, match="penalty="):
            maths.penalize_missing_eos(scores, torch.ones(3, dtype=torch.bool), penalty)


def test_token_rewards_by_hand():
    # coef 0.1: each token pays 0.1 * kl, and the score joins the penalty of the last token that counts: row 0 has two,
    # row 1 all three, row 2 none (its score is dropped, NaN or not), row 3 one. A negative kl is a bonus.
    scores = torch.tensor([10.0, 20.0, NAN, 30.0])
    kl = torch.tensor([[1.0, 2.0, NAN], [-1.0, 0.0, 3.0], [NAN, INF, 1.0], [4.0, 5.0, -INF]])
    rewards = maths.token_rewards(scores, kl, first(2, 3, 0, 1, width=3), 0.1)
    expected = [[-0.1, 9.8, 0.0], [0.1, 0.0, 19.7], [0.0, 0.0, 0.0], [29.6, 0.0, 0.0]]
    assert_close(rewards, torch.tensor(expected))


def test_the_score_lands_on_the_last_true_of_a_mask_with_holes():
    mask = torch.tensor([[False, True, False, True, False]])
    rewards = maths.token_rewards(torch.tensor([1.0]), torch.ones(1, 5), mask, 0.25)
    assert rewards.tolist() == [[0.0, -0.25, 0.0, 0.75, 0.0]]


@given(seeds)
@few_examples
def test_token_rewards_sum_to_score_minus_kl(seed):
    batch = random_batch(seed)
    scores, kl = batch.returns[:, 0], batch.advantages
    totals = maths.token_rewards(scores, kl, batch.mask, 0.3).sum(1)
    expected = [
        sum(-0.3 * k for k in row_kl[:length]) + (score if length else 0.0)
        for score, row_kl, length in zip(scores.tolist(), kl.tolist(), batch.mask.sum(1).tolist(), strict=True)
    ]
    assert_close(totals, torch.tensor(expected))


def test_one_score_per_row():
    with pytest.raises(ValueError, match="expected a score per row"):
        unchecked.token_rewards(torch.ones(1), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), 0.1)


# Advantages -------------------------------------------------------------------------------------------------------


def advantages_by_definition(rewards, values, gamma, lam):
    """Eq. 16 of the GAE paper as a double sum over one response without padding, in Python floats."""
    length = len(rewards)
    following = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(length)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t)) for t in range(length)]


@given(seeds, st.floats(0, 1), st.floats(0, 1))
@few_examples
def test_gae_matches_its_definition_row_by_row(seed, gamma, lam):
    batch = random_batch(seed)
    rewards, values = (torch.where(batch.mask, x, NAN) for x in (batch.returns, batch.values))
    advantages, returns = maths.gae(rewards, values, batch.mask, gamma, lam)
    for b, length in enumerate(batch.mask.sum(1).tolist()):
        expected = advantages_by_definition(rewards[b, :length].tolist(), values[b, :length].tolist(), gamma, lam)
        assert_close(advantages[b, :length], torch.tensor(expected), atol=1e-5, rtol=1e-5)
        assert_close(returns[b, :length], advantages[b, :length] + values[b, :length])
        assert (advantages[b, length:] == 0).all()
        assert (returns[b, length:] == 0).all()


def test_gae_by_hand():
    # gamma = lam = 0.5: delta2 = 4 - 2 = 2; delta1 = 1 + 0.5 * 2 - 1 = 1; delta0 = 0 + 0.5 * 1 - 2 = -1.5. Then
    # A2 = 2; A1 = 1 + 0.25 * 2 = 1.5; A0 = -1.5 + 0.25 * 1.5 = -1.125. The 100s in the padding play no part.
    advantages, returns = maths.gae(row(0, 1, 4, 100), row(2, 1, 2, 100), first(3, width=4), 0.5, 0.5)
    assert advantages.tolist() == [[-1.125, 1.5, 2.0, 0.0]]
    assert returns.tolist() == [[0.875, 2.5, 4.0, 0.0]]


def test_gae_in_closed_form_at_both_ends_of_lambda():
    batch = random_batch(3)
    rewards, values = (torch.where(batch.mask, x, 0.0) for x in (batch.returns, batch.values))
    # lam = 1, gamma = 1: the rewards from here on, minus the value.
    to_go = torch.where(batch.mask, rewards.flip(1).cumsum(1).flip(1), 0.0)
    advantages, returns = maths.gae(batch.returns, batch.values, batch.mask, 1.0, 1.0)
    assert_close(advantages, to_go - values, atol=1e-5, rtol=1e-5)
    assert_close(returns, to_go, atol=1e-5, rtol=1e-5)
    # lam = 0: one temporal difference, whatever follows.
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    advantages, _ = maths.gae(batch.returns, batch.values, batch.mask, 0.9, 0.0)
    assert_close(advantages, rewards + 0.9 * following - values)


def test_gae_carries_no_gradient():
    values = torch.ones(1, 2, requires_grad=True)
    advantages, returns = maths.gae(torch.ones(1, 2, requires_grad=True), values, first(2, width=2), 1.0, 0.95)
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_gae_refuses_left_padding_holes_and_odd_discounts():
    for mask in ([[False, True, True]], [[True, False, True]]):
        with pytest.raises(ValueError, match="right-padded"):
            maths.gae(torch.ones(1, 3), torch.ones(1, 3), torch.tensor(mask), 1.0, 0.95)
    for gamma, lam in ((1.1, 0.9), (-0.1, 0.9), (1.0, 1.5), (1.0, -0.5), (NAN, 0.9)):
        with pytest.raises(ValueError, match="gamma="):
            maths.gae(torch.ones(1, 3), torch.ones(1, 3), first(3, width=3), gamma, lam)


# Losses -----------------------------------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    # cliprange 0.2, so ratios are clipped to [0.8, 1.2]; the loss is the greater of -A * ratio and -A * clip(ratio).
    #   ratio 1.5, A  1: max(-1.5, -1.2) = -1.2  clipped, no gradient
    #   ratio 0.4, A  1: max(-0.4, -0.8) = -0.4  d loss / d logprob = -A * ratio = -0.4
    #   ratio 1.5, A -2: max( 3.0,  2.4) =  3.0  gradient 3.0
    #   ratio 0.5, A -2: max( 1.0,  1.6) =  1.6  clipped, no gradient
    #   ratio 1.1, A  1: max(-1.1, -1.1) = -1.1  gradient -1.1
    #   a padding of ratio 100
    # Sum 1.9. k3 = ratio - 1 - log ratio: 2 * 0.0945349 + 0.3162907 + 0.1931472 + 0.0046898 = 0.7031975.
    ratio, advantages = row(1.5, 0.4, 1.5, 0.5, 1.1, 100), row(1, 1, -2, -2, 1, 1)
    old_logprobs = row(-1, -2, -3, -4, -5, -6)
    logprobs = (old_logprobs + ratio.log()).requires_grad_()
    result = maths.policy_loss(logprobs, old_logprobs, advantages, first(5, width=6), CLIP)
    assert_close(result.loss.item(), 1.9, atol=1e-5, rtol=0)
    assert result.clipped.item() == 2
    assert_close(result.approx_kl.item(), 0.7031975, atol=1e-5, rtol=0)
    assert_close(result.ratio_max.item(), 1.5, atol=1e-5, rtol=0)
    assert_close(result.ratio_error.item(), 0.6, atol=1e-5, rtol=0)
    result.loss.backward()
    assert_close(logprobs.grad, row(0, -0.4, 3.0, 0, -1.1, 0), atol=1e-5, rtol=0)


def test_the_largest_ratio_is_that_of_a_token_that_counts():
    # Ratios 0.5 and 0.25; a padding, whose ratio must not be taken for 1 or for 100.
    old_logprobs, ratio = row(-1, -1, -1), row(0.5, 0.25, 100)
    result = maths.policy_loss(old_logprobs + ratio.log(), old_logprobs, row(1, 1, 1), first(2, width=3), CLIP)
    assert_close(result.ratio_max.item(), 0.5)
    assert_close(result.ratio_error.item(), 0.75)


def test_value_loss_by_hand():
    # cliprange_value 0.2 around old = 1: values are clipped to [0.8, 1.2].
    #   v 1.5, ret 2: max(0.25, (1.2 - 2)^2 = 0.64) = 0.64  clipped, no gradient
    #   v 1.5, ret 1: max(0.25, (1.2 - 1)^2 = 0.04) = 0.25  gradient v - ret = 0.5
    #   v 1.1, ret 0: max(1.21, 1.21)               = 1.21  gradient 1.1
    #   v 0.5, ret 0: max(0.25, 0.8^2 = 0.64)       = 0.64  clipped, no gradient
    # Half of 2.74 is 1.37. Without clipping: 0.25 + 0.25 + 1.21 + 0.25 = 1.96, half 0.98, gradients v - ret.
    returns, old_values, mask = row(2, 1, 0, 0, 9), row(1, 1, 1, 1, 1), first(4, width=5)
    values = row(1.5, 1.5, 1.1, 0.5, 100).requires_grad_()
    result = maths.value_loss(values, old_values, returns, mask, 0.2)
    assert_close(result.loss.item(), 1.37)
    assert result.clipped.item() == 2
    result.loss.backward()
    assert_close(values.grad, row(0, 0.5, 1.1, 0, 0))

    values.grad = None
    result = maths.value_loss(values, old_values, returns, mask, None)
    assert_close(result.loss.item(), 0.98)
    assert result.clipped.item() == 0
    result.loss.backward()
    assert_close(values.grad, row(-0.5, 0.5, 1.1, 0.5, 0))


def test_only_the_loss_carries_a_gradient_and_all_fields_are_fp32_scalars():
    everything = map_batch(random_batch(0), lambda x: x.clone().requires_grad_() if x.is_floating_point() else x)
    policy = maths.policy_loss(
        everything.logprobs, everything.old_logprobs, everything.advantages, everything.mask, CLIP
    )
    value_arguments = everything.values, everything.old_values, everything.returns, everything.mask
    for result in (policy, maths.value_loss(*value_arguments, 0.2), maths.value_loss(*value_arguments, None)):
        for name, field in vars(result).items():
            assert field.shape == () and field.dtype == torch.float32, name
            assert field.requires_grad == (name == "loss"), name
        result.loss.backward()
    assert everything.logprobs.grad is not None and everything.values.grad is not None
    for name in ("old_logprobs", "advantages", "old_values", "returns"):
        assert getattr(everything, name).grad is None, name


@given(seeds)
@few_examples
def test_ratio_1_clips_nothing_and_gives_the_plain_policy_gradient(seed):
    batch = random_batch(seed)
    batch.logprobs, batch.values = batch.old_logprobs, batch.old_values
    policy, value, policy_gradient, _ = losses_and_gradients(batch)
    assert (policy.clipped, policy.approx_kl, policy.ratio_max, policy.ratio_error, value.clipped) == (0, 0, 1, 0, 0)
    assert_close(policy_gradient, torch.where(batch.mask, -batch.advantages, 0.0))


@given(seeds)
@few_examples
def test_values_inside_the_range_are_never_counted_as_clipped(seed):
    # old + clamp(v - old) is not v in floating point where v is much the smaller: 1 + (0.1 - 1) = 0.10000002 in fp32,
    # further from a return of 0 than 0.1 is.
    b = random_batch(seed)
    values, returns = 0.1 * b.returns, torch.zeros_like(b.returns)
    result = maths.value_loss(values, b.old_values, returns, b.mask, 10.0)
    assert result.clipped == 0
    assert_close(result.loss, maths.value_loss(values, b.old_values, returns, b.mask, None).loss)


@given(seeds, st.sampled_from([NAN, INF, -INF, 1e30, -1e30, 0.0]), st.integers(1, 4))
@few_examples
def test_padding_never_changes_a_loss_a_gradient_or_a_statistic(seed, garbage, columns):
    batch = random_batch(seed)
    # Garbage in the padding the batch has already, and in further columns.
    padded = map_batch(
        batch,
        lambda x: (
            torch.cat((torch.where(batch.mask, x, garbage), x.new_full((len(x), columns), garbage)), dim=1)
            if x.is_floating_point()
            else torch.nn.functional.pad(x, (0, columns))
        ),
    )
    width = batch.mask.shape[1]

    policy, value, policy_gradient, value_gradient = losses_and_gradients(batch)
    policy_padded, value_padded, policy_gradient_padded, value_gradient_padded = losses_and_gradients(padded)
    assert_close(vars(policy_padded), vars(policy))
    assert_close(vars(value_padded), vars(value))
    for gradient, expected in ((policy_gradient_padded, policy_gradient), (value_gradient_padded, value_gradient)):
        assert_close(gradient[:, :width], expected)
        assert (gradient[~padded.mask] == 0).all()

    unclipped = maths.value_loss(batch.values, batch.old_values, batch.returns, batch.mask, None)
    unclipped_padded = maths.value_loss(padded.values, padded.old_values, padded.returns, padded.mask, None)
    assert_close(unclipped_padded.loss, unclipped.loss)
    for name in ("masked_sum", "masked_mean", "masked_row_sum"):
        assert_close(getattr(maths, name)(padded.values, padded.mask), getattr(maths, name)(batch.values, batch.mask))
    assert_close(
        maths.explained_variance(padded.values, padded.returns, padded.mask),
        maths.explained_variance(batch.values, batch.returns, batch.mask),
    )
    per_token = [
        [function(b) for b in (batch, padded)]
        for function in (
            lambda b: maths.standardize(b.returns, b.mask),
            lambda b: maths.rescale(b.returns, b.mask),
            lambda b: maths.token_rewards(b.values[:, 0].nan_to_num(0), b.advantages, b.mask, 0.1),
            lambda b: maths.gae(b.returns, b.values, b.mask, 0.9, 0.8)[0],
            lambda b: maths.gae(b.returns, b.values, b.mask, 0.9, 0.8)[1],
        )
    ]
    for expected, got in per_token:
        assert_close(got[:, :width][batch.mask], expected[batch.mask])
        assert (got[~padded.mask] == 0).all()


@pytest.mark.parametrize("function", ["standardize", "rescale"])
def test_a_masked_nan_never_leaks_into_a_gradient_of_whitening(function):
    x = row(1, 2, 4, NAN).requires_grad_()
    clean = row(1, 2, 4).requires_grad_()
    weights = row(1, -2, 3)
    (getattr(maths, function)(x, first(3, width=4))[:, :3] * weights).sum().backward()
    (getattr(maths, function)(clean, first(3, width=3)) * weights).sum().backward()
    assert_close(x.grad[:, :3], clean.grad)
    assert clean.grad.abs().min() > 0
    assert x.grad[0, 3] == 0


@given(seeds, st.permutations(range(4)))
@few_examples
def test_the_order_of_the_batch_does_not_matter(seed, order):
    batch = random_batch(seed)
    policy, value, policy_gradient, value_gradient = losses_and_gradients(batch)
    policy_2, value_2, policy_gradient_2, value_gradient_2 = losses_and_gradients(map_batch(batch, lambda x: x[order]))
    assert_close((vars(policy_2), vars(value_2)), (vars(policy), vars(value)), atol=1e-5, rtol=1e-5)
    assert_close((policy_gradient_2, value_gradient_2), (policy_gradient[order], value_gradient[order]))


@given(seeds, st.sets(st.integers(1, 5)))
@few_examples
def test_micro_batches_add_up_to_the_whole_batch(seed, cuts):
    # Uneven micro-batches, among them rows of which no token counts.
    batch = random_batch(seed, rows=6)
    policy, value, policy_gradient, value_gradient = losses_and_gradients(batch)
    edges = [0, *sorted(cuts), 6]
    parts = [
        losses_and_gradients(map_batch(batch, lambda x, part=slice(start, end): x[part]))
        for start, end in itertools.pairwise(edges)
    ]
    for name, combine in (
        ("loss", sum),
        ("clipped", sum),
        ("approx_kl", sum),
        ("ratio_max", max),
        ("ratio_error", max),
    ):
        assert_close(
            combine(getattr(p[0], name).detach() for p in parts) + torch.zeros(()),
            getattr(policy, name).detach(),
            atol=1e-5,
            rtol=1e-5,
        )
    assert_close(sum(p[1].loss for p in parts), value.loss, atol=1e-5, rtol=1e-5)
    assert sum(p[1].clipped for p in parts) == value.clipped
    assert_close(torch.cat([p[2] for p in parts]), policy_gradient)
    assert_close(torch.cat([p[3] for p in parts]), value_gradient)


@pytest.mark.parametrize("rows", [0, 2])
def test_an_empty_micro_batch_gives_zeros_and_still_has_a_backward(rows):
    x = torch.full((rows, 3), NAN, requires_grad=True)
    nothing = torch.zeros(rows, 3, dtype=torch.bool)
    policy = maths.policy_loss(x, x, x, nothing, CLIP)
    value = maths.value_loss(x, x, x, nothing, 0.2)
    assert all(field == 0 for field in (*vars(policy).values(), *vars(value).values()))
    (policy.loss + value.loss).backward()
    assert_close(x.grad, torch.zeros(rows, 3))


@pytest.mark.parametrize("cliprange", [0.0, -0.2, NAN, INF])
def test_a_clip_range_must_be_positive(cliprange):
    b = random_batch(0)
    with pytest.raises(ValueError, match="cliprange="):
        maths.policy_loss(b.logprobs, b.old_logprobs, b.advantages, b.mask, ppo.Clip(cliprange, 0.2))
    with pytest.raises(ValueError, match="cliprange_value="):
        maths.value_loss(b.values, b.old_values, b.returns, b.mask, cliprange)


def test_explained_variance_by_hand():
    # Returns 1, 3: variance 1. Residuals of the values 1, 2 are 0, 1: variance 1/4; of 3, 1 they are -2, 2: variance 4.
    returns, mask = row(1, 3, NAN), first(2, width=3)
    for values, expected in ((row(1, 3, 9), 1), (row(11, 13, 9), 1), (row(7, 7, 9), 0), (row(1, 2, 9), 0.75)):
        assert_close(maths.explained_variance(values, returns, mask).item(), float(expected))
    assert_close(maths.explained_variance(row(3, 1, 9), returns, mask).item(), -3.0)


@pytest.mark.parametrize("length", [0, 1, 3, 7, 41])
def test_explained_variance_of_constant_returns_is_0(length):
    # 0.1 has no finite binary expansion: a rounded mean would leave a variance of 1e-17 to divide by.
    returns, values = torch.full((1, 41), 0.1), torch.randn(1, 41, generator=torch.Generator().manual_seed(0))
    assert maths.explained_variance(values, returns, first(length, width=41)) == 0


def test_inputs_are_never_mutated():
    generator = torch.Generator().manual_seed(0)
    b = random_batch(1)
    logits, tokens = torch.randn(4, 6, 5, generator=generator), torch.randint(5, (4, 6), generator=generator)
    scores, finished = b.returns[:, 0].clone(), torch.tensor([True, False, True, False])
    calls = {
        "token_logprobs": [(logits, tokens, 1.0), (logits, tokens, 0.7)],
        "log_normalizer": [(logits, logits.softmax(-1))],
        "entropy_of": [(logits, logits.softmax(-1), logits.logsumexp(-1))],
        "token_entropy": [(logits, 1.0), (logits, 0.7)],
        "tempered": [(logits, 1.0), (logits, 0.7)],
        "masked_sum": [(b.values, b.mask)],
        "masked_mean": [(b.values, b.mask)],
        "masked_row_sum": [(b.values, b.mask)],
        "kl_estimate": [(b.logprobs, b.old_logprobs, k) for k in ("k1", "k2", "k3")],
        "standardize": [(b.values, b.mask)],
        "rescale": [(b.values, b.mask)],
        "penalize_missing_eos": [(scores, finished, 1.0)],
        "token_rewards": [(scores, b.advantages, b.mask, 0.1)],
        "gae": [(b.returns, b.values, b.mask, 1.0, 0.95)],
        "policy_loss": [(b.logprobs, b.old_logprobs, b.advantages, b.mask, CLIP, form) for form in ppo.SURROGATES],
        "clipped_surrogate": [(b.logprobs - b.old_logprobs, b.logprobs, b.advantages, b.mask, CLIP)],
        "cispo_surrogate": [(b.logprobs - b.old_logprobs, b.logprobs, b.advantages, b.mask, CLIP)],
        "sequence_surrogate": [(b.logprobs - b.old_logprobs, b.logprobs, b.advantages, b.mask, CLIP)],
        "weighted_sum": [(b.values, b.mask, weights) for weights in (None, b.values[:, 0])],
        "row_weights": [(b.mask, "sequence")],
        "denominator": [(b.mask, "token")],
        "value_loss": [(b.values, b.old_values, b.returns, b.mask, c) for c in (0.2, None)],
        "explained_variance": [(b.values, b.returns, b.mask)],
        "where_counted": [(b.values, b.mask)],
        "mean_and_variance": [(b.values, b.mask)],
        "largest": [(b.values.abs(), b.mask)],
        "k3": [(b.values,)],
        "group_sums": [(b.values[:, 0], torch.tensor([3, 1, 3, 3]))],
        "flat_groups": [(b.values[:, 0], torch.tensor([3, 1, 3, 3]))],
        "on_each_token": [(b.values[:, 0], b.mask)],
    }
    # Those that take rollouts are in test_advantages.py and test_estimators.py.
    of_rollouts = {"make_experience", "critic_gae", "rloo", "grpo", "dr_grpo", "reinforce_plus_plus"}
    without_tensors = {"require_positive", *of_rollouts}
    assert calls.keys() == PUBLIC.keys() - without_tensors
    for name, argument_lists in calls.items():
        for arguments in argument_lists:
            tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
            before = [tensor.clone() for tensor in tensors]
            getattr(maths, name)(*arguments)
            assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True)), name


def test_half_precision_inputs_are_cast_before_any_arithmetic():
    # The results must be those of the same numbers in fp32, bit for bit, so no step may run in bf16.
    b = map_batch(random_batch(5), lambda x: x.bfloat16() if x.is_floating_point() else x)
    wide = map_batch(b, lambda x: x.float() if x.is_floating_point() else x)
    functions = {
        "masked_mean": lambda b: maths.masked_mean(b.values, b.mask),
        "kl_estimate": lambda b: maths.kl_estimate(b.logprobs, b.old_logprobs, "k3"),
        "standardize": lambda b: maths.standardize(b.values, b.mask),
        "rescale": lambda b: maths.rescale(b.values, b.mask),
        "penalize_missing_eos": lambda b: maths.penalize_missing_eos(b.values[:, 0], b.mask[:, -1], 0.3),
        "token_rewards": lambda b: maths.token_rewards(b.values[:, 0], b.advantages, b.mask, 0.1),
        "gae": lambda b: maths.gae(b.returns, b.values, b.mask, 0.99, 0.95),
        "policy_loss": lambda b: vars(maths.policy_loss(b.logprobs, b.old_logprobs, b.advantages, b.mask, CLIP)),
        "value_loss": lambda b: vars(maths.value_loss(b.values, b.old_values, b.returns, b.mask, 0.2)),
        "explained_variance": lambda b: maths.explained_variance(b.values, b.returns, b.mask),
    }
    for name, function in functions.items():
        assert_close(function(b), function(wide), atol=0, rtol=0, msg=name)


# KL controllers ---------------------------------------------------------------------------------------------------


def test_the_fixed_controller_stays():
    assert FixedKLController(0.05).updated(kl=100.0, num_samples=64).coef == 0.05


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        # coef 0.1, target 6, 512 samples, horizon 5120: a tenth of the error, which is clipped to +-0.2.
        (6.0, 0.1),  # on target
        (6.6, 0.101),  # error 0.1: 0.1 * 1.01
        (5.4, 0.099),  # error -0.1
        (60.0, 0.102),  # error 9, clipped to 0.2
        (0.0, 0.098),  # error -1, clipped to -0.2
    ],
)
def test_the_adaptive_controller_by_hand(kl, expected):
    controller = AdaptiveKLController(coef=0.1, target=6.0, horizon=5120)
    new = controller.updated(kl=kl, num_samples=512)
    assert new.coef == pytest.approx(expected, rel=1e-12)
    assert (new.target, new.horizon) == (6.0, 5120)
    assert controller.coef == 0.1


def test_controllers_refuse_what_makes_no_sense():
    fixed, adaptive = FixedKLController(0.1), AdaptiveKLController(0.1, 6.0, 10_000)
    for controller in (fixed, adaptive):
        for measured in (NAN, INF, -INF):
            with pytest.raises(ValueError, match="not finite"):
                controller.updated(measured, 64)
        with pytest.raises(ValueError, match="num_samples"):
            controller.updated(1.0, -1)
        with pytest.raises(AttributeError):  # frozen
            controller.coef = 1.0
    for coef in (-0.1, NAN, INF):
        with pytest.raises(ValueError, match="coef="):
            FixedKLController(coef)
    assert FixedKLController(0.0).coef == 0
    for name in ("coef", "target", "horizon"):
        for value in (0.0, -1.0, NAN, INF):
            with pytest.raises(ValueError, match=f"{name}="):
                AdaptiveKLController(**{"coef": 0.1, "target": 6.0, "horizon": 100.0, name: value})
    # 1 - 0.2 * 500 / 100 = 0: from here on the coefficient would reward a KL.
    with pytest.raises(ValueError, match="choose a horizon above 100"):
        AdaptiveKLController(0.1, 6.0, horizon=100).updated(6.0, num_samples=500)


def test_logprobs_and_entropy_are_fp32_under_autocast() -> None:
    logits, tokens = torch.randn(2, 3, 50), torch.randint(0, 50, (2, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, entropy = maths.token_logprobs(logits, tokens), maths.token_entropy(logits)
    assert torch.equal(logprobs, maths.token_logprobs(logits, tokens))
    assert torch.equal(entropy, maths.token_entropy(logits))
