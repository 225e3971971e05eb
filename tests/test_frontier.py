"""The reward-KL frontier against problems whose answer is known."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from rlhf_accel.algorithm import frontier
from rlhf_accel.algorithm.frontier import Frontier, best_of_n_kl, estimate, expected_maxima, share_of_optimum

OUTCOMES = 8


def discrete(prompts: int, samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(P, 8) probabilities and rewards, and (P, N) rewards of outcomes drawn from them."""
    rng = np.random.default_rng(seed)
    chances = rng.dirichlet(np.full(OUTCOMES, 2.0), prompts)
    rewards = rng.normal(size=(prompts, OUTCOMES)) * rng.uniform(0.5, 1.5, (prompts, 1))
    drawn = np.stack([rng.choice(r, samples, p=p) for r, p in zip(rewards, chances, strict=True)])
    return chances, rewards, drawn


def exact(chances: np.ndarray, rewards: np.ndarray, beta: float) -> tuple[float, float]:
    """KL and gain of the tilted distribution, summed over its outcomes: KL from its definition, sum pi log(pi / p)."""
    tilted = chances * np.exp(rewards / beta)
    tilted /= tilted.sum(axis=1, keepdims=True)
    kl = (tilted * np.log(tilted / chances)).sum(axis=1).mean()
    return float(kl), float(((tilted - chances) * rewards).sum(axis=1).mean())


def test_the_optimum_of_a_discrete_problem_is_met_within_two_percent() -> None:
    chances, rewards, scores = discrete(prompts=300, samples=512)
    found = estimate(scores)
    assert found.reliable_kl > 0.8
    for point in found.optimum:
        kl, gain = exact(chances, rewards, point.beta)
        assert point.kl == pytest.approx(kl, rel=0.02)
        assert point.gain == pytest.approx(gain, rel=0.02)
        assert point.low is not None and point.high is not None and point.low < point.gain < point.high


def test_between_the_betas_of_the_grid_the_curve_is_that_of_the_problem() -> None:
    chances, rewards, scores = discrete(prompts=300, samples=512)
    found = estimate(scores)
    for beta in np.linspace(0.5, 5.0, 7):
        kl, gain = exact(chances, rewards, beta)
        assert kl < found.reliable_kl
        assert found.gain_at(kl) == pytest.approx(gain, rel=0.02)


def test_beyond_the_reliable_kl_the_bound_holds_and_is_flagged() -> None:
    # 64 samples do not suffice where 512 do; the truth is known from the outcomes, not from samples.
    chances, rewards, scores = discrete(prompts=300, samples=64)
    found = estimate(scores)
    beyond = 0
    for beta in np.geomspace(2.0, 0.05, 12):
        kl, gain = exact(chances, rewards, beta)
        share = share_of_optimum(found, kl, gain)
        assert share is not None
        assert share.is_lower_bound == (kl > found.reliable_kl)
        if share.is_lower_bound:
            beyond += 1
            assert 0.5 < share.value <= 1.02  # the bound is an estimate too, as good as the curve that it leaves
        else:
            assert share.value == pytest.approx(1.0, rel=0.02)
    assert beyond >= 3
    for point in found.bound:
        assert found.gain_at(point.kl) == pytest.approx(point.gain)
    assert found.bound[0].kl == found.reliable_kl and found.bound[-1].kl == 20


def test_prompts_of_unlike_scores_are_bounded_no_less_closely_than_each_allows() -> None:
    """Rewards as a classifier's: bounded above, with prompts that are good or bad by themselves. 64 samples are
    reliable to 0.7 nats, whose tangent is 1.9 times the truth at 4 nats; groups of prompts know better."""
    rng = np.random.default_rng(5)
    outcomes, level = 4096, rng.normal(scale=1.5, size=(200, 1))
    rewards = np.tanh(level + rng.normal(size=(200, outcomes)))
    found = estimate(np.stack([rng.choice(row, 64) for row in rewards]))
    chances = np.full(rewards.shape, 1 / outcomes)
    tangent = found.optimum[-1]
    for beta in np.geomspace(0.15, 0.015, 8):
        kl, gain = exact(chances, rewards, beta)
        assert kl > found.reliable_kl
        best = found.gain_at(kl)
        assert best is not None and 0.98 * gain < best < 1.04 * gain
    assert tangent.gain + tangent.beta * (kl - tangent.kl) > 1.5 * gain


def test_a_group_is_tilted_as_one_and_groups_weigh_by_their_prompts() -> None:
    scores = np.sort(np.random.default_rng(0).normal(size=(5, 7)), axis=0)  # rising, so that neighbours stay so
    betas = np.array([0.7, 0.2])
    gain, kl, sizes = frontier._Tilted.of(scores, betas).level(2, betas)
    for j, beta in enumerate(betas):
        expected = np.zeros(2)
        for part, size in ((scores[:3].ravel(), sizes[0, j]), (scores[3:].ravel(), sizes[1, j])):
            weights = np.exp(part / beta) / np.exp(part / beta).sum()
            expected += len(part) / 35 * np.array([weights @ part, weights @ np.log(weights * len(part))])
            assert size == pytest.approx(1 / (weights**2).sum())
        assert (gain[j], kl[j]) == pytest.approx((expected[0] - scores.mean(), expected[1]))


@pytest.mark.parametrize("tail", ["normal", "exponential", "uneven"])
def test_the_reliable_part_is_not_far_below_the_truth_for_other_rewards(tail: str) -> None:
    """Where 2048 samples are enough to know better, the reliable part of 128 samples is within 3 % of them."""
    rng = np.random.default_rng(3)
    shape = (100, 2048)
    scores = rng.exponential(size=shape) if tail == "exponential" else rng.normal(size=shape)
    if tail == "uneven":
        scores *= rng.lognormal(sigma=0.7, size=(100, 1))
    truth, found = estimate(scores), estimate(scores[:, :128])
    assert 0.1 < found.reliable_kl < truth.reliable_kl
    for point in found.optimum[::4]:
        assert point.gain == pytest.approx(truth.gain_at(point.kl), rel=0.03)


def test_more_samples_are_reliable_for_longer() -> None:
    scores = np.random.default_rng(0).normal(size=(100, 1024))
    reached = [estimate(scores[:, :count]).reliable_kl for count in (16, 128, 1024)]
    assert reached == sorted(reached) and reached[0] < reached[2]


def test_best_of_n_is_the_mean_over_all_subsets() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 9))
    scores[1, 4] = scores[1, 5]  # a tie
    brute = [[max_mean(row, n) for n in range(1, 10)] for row in scores]
    np.testing.assert_allclose(expected_maxima(scores, list(range(1, 10))), brute, rtol=1e-12)


def max_mean(row: np.ndarray, n: int) -> float:
    return float(np.mean([max(subset) for subset in itertools.combinations(row, n)]))


def test_best_of_n_of_many_samples_neither_overflows_nor_drifts() -> None:
    # The mean of the maximum of n uniform draws is n / (n + 1); over ranks 1..N it is n (N + 1) / (n + 1) exactly.
    ranks = np.random.default_rng(0).permutation(np.arange(1.0, 4097.0))[None]
    for n in (1, 7, 64, 2048, 4096):
        assert expected_maxima(ranks, [n])[0, 0] == pytest.approx(n * 4097 / (n + 1), rel=1e-9)


def test_best_of_n_points_are_gains_over_the_reference() -> None:
    scores = np.random.default_rng(0).normal(2.0, 1.0, size=(50, 6))
    found = estimate(scores)
    assert [point.n for point in found.best_of_n] == [1, 2, 4, 6]
    assert found.best_of_n[0].kl == 0 and found.best_of_n[0].gain == pytest.approx(0, abs=1e-12)
    assert found.best_of_n[-1].gain == pytest.approx((scores.max(axis=1) - scores.mean(axis=1)).mean())
    assert found.best_of_n[1].kl == pytest.approx(np.log(2) - 0.5)
    assert found.score == pytest.approx(scores.mean()) and found.score_std == pytest.approx(scores.std())
    assert found.low is not None and found.high is not None and found.low < found.score < found.high


def test_best_of_n_lies_below_the_optimum() -> None:
    found = estimate(np.random.default_rng(0).normal(size=(300, 256)))
    for point in found.best_of_n[1:]:
        best = found.gain_at(point.kl)
        assert best is not None and 0.8 * best < point.gain < best


def test_the_interval_covers_what_other_prompts_would_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 60 sets of 40 prompts, about 95 % of the intervals hold the truth; 60 of 60 would be too wide."""
    monkeypatch.setattr(frontier, "_REPLICATES", 200)
    monkeypatch.setattr(frontier, "_BETAS", 24)
    hits = {"reference": 0, "best": 0, "optimum": 0}
    big = np.random.default_rng(1).normal(size=(2400, 64)) * np.random.default_rng(2).uniform(0.2, 2.0, (2400, 1))
    big += np.random.default_rng(4).normal(size=(2400, 1))
    truth = estimate(big)
    for part in range(60):
        found = estimate(big[part * 40 : (part + 1) * 40], seed=part)
        best, true_best = found.best_of_n[3], truth.best_of_n[3]
        point = found.optimum[8]
        true_gain = truth.gain_at(point.kl)
        hits["reference"] += within(found.low, truth.score, found.high)
        hits["best"] += within(best.low, true_best.gain, best.high)
        hits["optimum"] += within(point.low, true_gain, point.high)
    assert all(51 <= count <= 59 for count in hits.values()), hits


def within(low: float | None, value: float | None, high: float | None) -> bool:
    assert low is not None and value is not None and high is not None
    return low <= value <= high


def test_shares_are_of_the_gain_at_the_same_kl() -> None:
    found = estimate(np.random.default_rng(0).normal(size=(300, 256)))
    point = found.optimum[30]
    share = share_of_optimum(found, point.kl, 0.6 * point.gain)
    assert share is not None and share.value == pytest.approx(0.6, rel=1e-3) and not share.is_lower_bound
    assert share_of_optimum(found, 0.0, 0.1) is None
    worse = share_of_optimum(found, 1.0, -0.5)
    assert worse is not None and worse.value < 0
    # Halfway between two points of the grid, the lowest line is below neither the points nor far above their chord.
    near, far = found.optimum[30], found.optimum[31]
    between = found.gain_at((near.kl + far.kl) / 2)
    assert between is not None and between == pytest.approx((near.gain + far.gain) / 2, rel=2e-3)
    # Farther out than the samples tell, more KL never gives less.
    assert (found.gain_at(30.0) or 0) > (found.gain_at(20.0) or 0) > found.optimum[-1].gain


def test_the_same_seed_gives_the_same_intervals() -> None:
    _, _, scores = discrete(prompts=20, samples=64)
    assert estimate(scores, seed=1) == estimate(scores, seed=1)
    assert estimate(scores, seed=1) != estimate(scores, seed=2)


def test_one_sample_and_constant_scores_have_no_optimum() -> None:
    for scores in (np.random.default_rng(0).normal(size=(5, 1)), np.full((5, 64), 0.1), np.zeros((1, 1))):
        found = estimate(scores)
        assert found.optimum == () and found.bound == () and found.reliable_kl == 0.0
        assert share_of_optimum(found, 1.0, 1.0) is None
        assert all(point.gain == pytest.approx(0, abs=1e-12) for point in found.best_of_n)
    # Constant for each prompt, but not the same: nothing to gain either, and the spread between prompts is told.
    found = estimate(np.repeat(np.arange(5.0)[:, None], 64, axis=1))
    assert found.optimum == () and found.score_std == pytest.approx(np.sqrt(2))


def test_one_prompt_has_curves_without_intervals() -> None:
    found = estimate(np.random.default_rng(0).normal(size=(1, 4096)))
    assert found.reliable_kl > 1.0
    points = [*found.best_of_n, *found.optimum]
    assert found.low is None and all(point.low is None and point.high is None for point in points)
    # A Gaussian reward: the tilted Gaussian has gain sqrt(2 KL).
    assert found.gain_at(1.0) == pytest.approx(np.sqrt(2), rel=0.05)


def test_large_scores_and_small_ones_give_the_same_shape() -> None:
    _, _, scores = discrete(prompts=20, samples=64)
    plain, scaled = estimate(scores), estimate(1e4 * scores - 1e6)
    assert scaled.reliable_kl == pytest.approx(plain.reliable_kl, rel=1e-6)
    assert scaled.optimum[-1].gain == pytest.approx(1e4 * plain.optimum[-1].gain, rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    scores = np.zeros((2, 3))
    scores[1, 2] = bad
    with pytest.raises(ValueError, match="1 of 6 scores are not finite"):
        estimate(scores)


@pytest.mark.parametrize("shape", [(4,), (0, 3), (3, 0), (1, 2, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        estimate(np.zeros(shape))


def around(draw, spread: float):
    """Scores of 200 prompts that are better or worse by themselves, 64 each."""
    return lambda rng: draw(rng, (200, 64)) + spread * rng.normal(size=(200, 1))


KNOWN = {
    "normal": around(lambda rng, shape: rng.normal(size=shape), 1.0),
    "logistic": around(lambda rng, shape: rng.logistic(size=shape), 0.0),
    "logistic around prompts": around(lambda rng, shape: rng.logistic(size=shape), 1.8),
    "uneven": lambda rng: rng.normal(size=(200, 64)) * rng.lognormal(sigma=0.7, size=(200, 1)),
    "uniform": lambda rng: rng.random((200, 64)),
    "bounded": lambda rng: np.tanh(KNOWN["normal"](rng)),
    "probability": lambda rng: 1 / (1 + np.exp(3 - 2 * KNOWN["normal"](rng))),
    "rarely 1": lambda rng: (rng.random((200, 64)) < 0.05).astype(float),
    "ratings": lambda rng: np.clip(np.round(3 + KNOWN["normal"](rng)), 1, 5),
}
HEAVY = {df: around(lambda rng, shape, df=df: rng.standard_t(df, size=shape), 0.0) for df in (2, 3, 4, 5)}


@pytest.mark.parametrize("name", KNOWN)
def test_a_tail_that_is_known_is_seldom_called_heavy(name: str) -> None:
    rng = np.random.default_rng(1)
    assert sum(frontier.unknown_tail(KNOWN[name](rng)) is not None for _ in range(25)) <= 1


@pytest.mark.parametrize(("df", "least"), [(2, 25), (3, 25), (4, 23), (5, 17)])
def test_heavy_tails_are_found(df: int, least: int) -> None:
    rng = np.random.default_rng(1)
    assert sum(frontier.unknown_tail(HEAVY[df](rng)) is not None for _ in range(25)) >= least


def test_of_heavy_tails_no_share_is_stated_for_it_would_be_above_the_truth() -> None:
    rng = np.random.default_rng(0)
    rewards = rng.standard_t(3, size=(200, 4096))  # all that the reference writes, of which 64 are seen
    found = estimate(np.stack([rng.choice(row, 64) for row in rewards]))
    assert found.no_share is not None and "heavy upper tail" in found.no_share
    kl, gain = exact(np.full(rewards.shape, 1 / 4096), rewards, beta=8.0)
    assert share_of_optimum(found, kl, gain) is None
    claimed = share_of_optimum(dataclasses.replace(found, no_share=None), kl, gain)
    assert claimed is not None and claimed.value > 1.2  # of a policy that is the optimum itself: 1 at most is true


def test_few_scores_do_not_show_their_tail() -> None:
    found = estimate(np.random.default_rng(0).normal(size=(20, 64)))
    assert found.no_share is not None and "1280 scores do not show" in found.no_share
    assert share_of_optimum(found, 1.0, 1.0) is None and found.gain_at(1.0) is not None


def test_json_holds_everything_and_reads_back() -> None:
    _, _, scores = discrete(prompts=20, samples=64)
    found = estimate(scores)
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert set(told) == {
        *("prompts", "samples", "reference", "best_of_n", "optimum", "reliable_kl", "bound", "no_share", "points"),
    }
    assert told["points"] == [] and told["reference"]["score"] == found.score
    assert Frontier.from_json({**told, "points": [{"kl": 1}]}) == found
    assert best_of_n_kl(1) == 0.0


def test_few_effective_samples_are_not_trusted_even_where_halves_agree() -> None:
    """Rewards of 0 and 1: at most 12 of 16 weights vanish, to which the halves are blind."""
    scores = np.tile(np.repeat([1.0, 0.0], [4, 12]), (50, 1))[:, [0, 1, *range(4, 10), 2, 3, *range(10, 16)]]
    found = estimate(scores)
    assert found.optimum and all(point.ess >= frontier.MIN_ESS for point in found.optimum)
    assert found.reliable_kl < 1.2 < np.log(4)  # 4 of 16 samples are good: the plain estimate ends at log 4
