"""The reward-KL frontier of a reference, which bounds every policy: estimated from scored samples of the reference.

Knows best-of-n and the optimum of the KL-regularised objective, and imports numpy only: scores in, curves out. Knows no
model, no prompt, no config and no file.

The optimum for one `beta` is the reference tilted by the reward, `pi*(y|x) ~ pi_ref(y|x) exp(r(x, y) / beta)`: no
policy with the same KL has a higher mean reward (Korbak et al. 2022, "RL with KL penalties is better viewed as Bayesian
inference"). One `beta` serves all prompts, for the KL and the reward of a run are means over prompts.

Shapes: `P` prompts, `N` samples of the reference for each, `J` betas, `K` best-of-n points, `M` places on the KL axis,
`B` bootstrap replicates. Scores in the reward's unit, KL in nats per response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

# An estimate with few effective samples is too low: the weights cannot reach rewards that were not sampled. On
# Gaussian, bounded and bimodal scores (64 to 1024 samples) the curve is at most 2 % below the truth while nine tenths
# of the prompts have 5 effective samples. Rewards with a long tail go wrong earlier, which half of the samples betray:
# the bias falls about as 1/N, so the gap between all samples and half of them is about the bias that is left.
MIN_ESS = 5.0
MAX_GAP = 0.02

# Of the upper tail, see `unknown_tail`. Fewer scores than these do not show it.
MIN_TAIL = 2048
_TOP = 12  # scores beyond the outermost quantile
_LOGISTIC_TAIL, _GROWTH, _RAW_GROWTH = 1.1, 1.0, 0.9

_BETAS = 96
_WIDEST, _NARROWEST = 30.0, 1 / 30  # betas in standard deviations of a prompt's scores; KL 0.0006 to beyond log N
_REPLICATES = 1000
_TAILS = (2.5, 97.5)  # percentiles
_BOUND_TO, _BOUND_STEP = 20.0, 0.25  # nats; where the bound is written

_Curve = TypeVar("_Curve", "Optimum", "BestOfN", "Bound")
# Of groups of prompts: gain (J), KL (J), effective sample sizes (G, J).
_Level = tuple[Float[np.ndarray, " J"], Float[np.ndarray, " J"], Float[np.ndarray, "G J"]]


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """The best of n samples: its KL, gain over the reference and the gain's 95 % interval."""

    n: int
    kl: float
    gain: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The reference tilted with `beta`; `ess` is the effective sample size, mean over prompts."""

    beta: float
    kl: float
    gain: float
    low: float | None
    high: float | None
    ess: float


@dataclass(frozen=True, kw_only=True)
class Bound:
    """No policy with this KL has a larger gain, as far as the samples tell; `beta` is the slope of the bound."""

    beta: float
    kl: float
    gain: float


@dataclass(frozen=True, kw_only=True)
class Share:
    """A gain divided by the largest at the same KL; where that is only bounded, the true share is at least this."""

    value: float
    is_lower_bound: bool


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Curves of gain over the mean score of the reference; intervals are None where there is one prompt only.

    `optimum` runs from small KL to `reliable_kl`, the largest KL at which the samples still suffice (0 if none), and
    `bound` continues from there.
    """

    prompts: int
    samples: int
    score: float
    score_std: float
    """Over all samples of all prompts."""
    low: float | None
    high: float | None
    best_of_n: tuple[BestOfN, ...]
    optimum: tuple[Optimum, ...]
    reliable_kl: float
    bound: tuple[Bound, ...] = field(default=())
    no_share: str | None = None
    """Why no gain may be stated as a share of the optimum's, None where it may."""

    def to_json(self) -> dict[str, Any]:
        """As a file holds it: the scores under `reference`, and an empty `points` for a run's evaluations."""
        return {
            "prompts": self.prompts,
            "samples": self.samples,
            "reference": {"score": self.score, "score_std": self.score_std, "low": self.low, "high": self.high},
            "best_of_n": [asdict(point) for point in self.best_of_n],
            "optimum": [asdict(point) for point in self.optimum],
            "reliable_kl": self.reliable_kl,
            "bound": [asdict(point) for point in self.bound],
            "no_share": self.no_share,
            "points": [],
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Frontier:
        """The inverse of `to_json`; other keys are ignored. Raises `KeyError`, `TypeError` or `ValueError`."""
        return cls(
            prompts=tree["prompts"],
            samples=tree["samples"],
            **{key: tree["reference"][key] for key in ("score", "score_std", "low", "high")},
            best_of_n=_points(BestOfN, tree["best_of_n"]),
            optimum=_points(Optimum, tree["optimum"]),
            reliable_kl=float(tree["reliable_kl"]),
            bound=_points(Bound, tree["bound"]),
            no_share=tree.get("no_share"),
        )

    def gain_at(self, kl: float) -> float | None:
        """The largest gain that a policy may have at this KL; None where no samples suffice, or at KL 0.

        By Donsker and Varadhan, `E_pi[r] <= beta KL + beta log E_ref[exp(r / beta)]` for every policy and every beta,
        with equality for the optimum. The least of these lines is the curve itself up to `reliable_kl`, and beyond it
        a valid bound: the tangent at the last beta whose samples suffice, or the line of groups of prompts where lower.
        """
        if not self.optimum or kl <= 0:
            return None
        points: tuple[Optimum | Bound, ...] = (*self.optimum, *self.bound)
        return min(point.gain + point.beta * (kl - point.kl) for point in points)


def _points(kind: type[_Curve], rows: list[dict[str, Any]]) -> tuple[_Curve, ...]:
    return tuple(kind(**row) for row in rows)


def share_of_optimum(frontier: Frontier, kl: float, gain: float) -> Share | None:
    """`gain` (scores, over the reference's mean) as a share of the optimum's gain at equal `kl` (nats per response).

    Beyond `reliable_kl` the optimum is only bounded, and so is the share, from below. None at KL 0, where nothing can
    be gained, where too few samples were drawn for any optimum, and where `frontier.no_share` says why.
    """
    if frontier.no_share is not None:
        return None
    best = frontier.gain_at(kl)
    if best is None or best <= 0:
        return None
    return Share(value=gain / best, is_lower_bound=kl > frontier.reliable_kl)


def estimate(scores: Float[np.ndarray, "P N"], *, seed: int = 0) -> Frontier:
    """The frontier from `scores[p, i]`, the reward of the i-th independent sample of the reference for prompt p.

    Intervals are 95 %, by bootstrap over prompts, which includes the noise of sampling. `seed` is the bootstrap's.
    Raises `ValueError` for scores that are not finite, or not a (P, N) array with at least one of each.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"scores has shape {scores.shape}, expected (prompts, samples) with at least one of each")
    if not np.isfinite(scores).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(scores))} of {scores.size} scores are not finite")
    prompts, samples = scores.shape
    means = scores.mean(axis=1)
    draws = _bootstrap_weights(prompts, seed)
    low, high = _interval(draws @ means) if draws is not None else (None, None)

    sizes = _sizes(samples)
    gains = expected_maxima(scores, sizes) - means[:, None]
    lows, highs = _intervals(None if draws is None else draws @ gains, len(sizes))
    best = [
        BestOfN(n=int(n), kl=best_of_n_kl(int(n)), gain=float(gain), low=a, high=b)
        for n, gain, a, b in zip(sizes, gains.mean(axis=0), lows, highs, strict=True)
    ]
    optimum, bound = _optimum(scores, draws)
    return Frontier(
        prompts=prompts,
        samples=samples,
        score=float(means.mean()),
        score_std=float(scores.std()),
        low=low,
        high=high,
        best_of_n=tuple(best),
        optimum=tuple(optimum),
        reliable_kl=optimum[-1].kl if optimum else 0.0,
        bound=tuple(bound),
        no_share=unknown_tail(scores),
    )


def unknown_tail(scores: Float[np.ndarray, "P N"]) -> str | None:
    """Why the scores' upper tail is not known well enough for a bound of the optimum; None where it is.

    A tail like Student's t has no exponential moment: the optimum has no bound at any KL, and one from samples is too
    low. The tail counts as heavy where three things hold together. Of scores less their prompt's median, in units of
    its mean deviation: the 12th largest lies farther out than 1.1 times that of a logistic distribution, in units of
    the upper decile; and quantiles grow from the decile on, at equal ratios of what is beyond them, as those of no
    exponential tail do.
    And of the scores as they are: quantiles grow nearly so, or it is a bounded score that most prompts are far below.
    Of 200 x 64 scores this calls heavy 1 % of normal, logistic and bounded ones at most, every t with 2 to 4 degrees of
    freedom, and nine tenths of those with 5; an exponential or Laplace tail, which is the border, in a fifth.
    """
    if scores.size < MIN_TAIL:
        return f"{scores.size} scores do not show their upper tail; at least {MIN_TAIL} are needed, draw more"
    centred = scores - np.median(scores, axis=1, keepdims=True)
    deviation = np.abs(centred).mean(axis=1, keepdims=True)
    varying = deviation[:, 0] > 0
    standard = (centred[varying] / deviation[varying]).ravel()
    if len(standard) < MIN_TAIL:
        return None if not len(standard) else "too few prompts have scores that vary, which does not show their tail"
    reach, growth = _tail(standard)
    if reach <= _LOGISTIC_TAIL or growth <= _GROWTH or _tail(scores.ravel())[1] <= _RAW_GROWTH:
        return None
    return "the scores have a heavy upper tail, for which samples do not bound the optimum; clip them (reward.clip)"


def _tail(values: Float[np.ndarray, " N"]) -> tuple[float, float]:
    """How far the outermost quantile lies beyond the median, in upper deciles and as a share of a logistic
    distribution's; and how much farther it is from the quantile halfway, by the logarithm of what is beyond, than that
    from the decile. 1 and 1 of a logistic tail far out, 0.7 and 0.7 of a normal one."""
    beyond = _TOP / len(values)
    middle, decile, halfway, top = np.quantile(values, [0.5, 0.9, 1 - np.sqrt(0.1 * beyond), 1 - beyond])
    logistic = np.log((1 - beyond) / beyond) / np.log(9)
    smallest = 1e-12 * max(top - middle, 1e-300)  # where quantiles coincide, as of a reward of 0 and 1
    reach = (top - middle) / max(decile - middle, smallest) / logistic
    return float(reach), float((top - halfway) / max(halfway - decile, smallest))


# ---------------------------------------------------------------------------------------------------------------------
# Best of n
# ---------------------------------------------------------------------------------------------------------------------


def best_of_n_kl(n: int) -> float:
    """KL of the best of n samples to the reference, nats: exact without ties among scores, else an upper bound.

    Source: Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy", theorem 1.

    >>> [round(best_of_n_kl(n), 3) for n in (1, 2, 64)]
    [0.0, 0.193, 3.175]
    """
    return float(np.log(n) - (n - 1) / n)


def expected_maxima(scores: Float[np.ndarray, "P N"], sizes: list[int]) -> Float[np.ndarray, "P K"]:
    """For each prompt and each n of `sizes`, the mean over all subsets of n of the N scores of the largest in it.

    The k-th smallest score is the largest of `C(k-1, n-1)` of the `C(N, n)` subsets. That share is n/N for the largest,
    and falls by (k-n+1)/k from k+1 to k, so that no binomial is ever formed.

    >>> expected_maxima(np.array([[3.0, 1.0, 2.0]]), [1, 2, 3]).round(3).tolist()
    [[2.0, 2.667, 3.0]]
    """
    ordered = np.sort(scores, axis=1)
    count = scores.shape[1]
    ranks = np.arange(count - 1, 0, -1)  # k of the second largest, then down
    columns = []
    for n in sizes:
        falling = np.cumprod(np.concatenate([[n / count], np.clip((ranks - n + 1) / ranks, 0.0, None)]))
        columns.append(ordered @ falling[::-1])
    return np.stack(columns, axis=1)


def _sizes(samples: int) -> list[int]:
    """1, 2, 4, … and all samples."""
    powers = [2**k for k in range(samples.bit_length()) if 2**k < samples]
    return [*powers, samples]


# ---------------------------------------------------------------------------------------------------------------------
# The tilted reference
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Tilted:
    """The prompts tilted by each beta, in rising order of their mean score."""

    means: Float[np.ndarray, " P"]
    tilted: Float[np.ndarray, "P J"]  # mean score under the tilt
    log_mean: Float[np.ndarray, "P J"]  # log of the mean of exp(score / beta)
    log_squares: Float[np.ndarray, "P J"]  # log of the mean of its square
    samples: int

    @classmethod
    def of(cls, scores: Float[np.ndarray, "P N"], betas: Float[np.ndarray, " J"]) -> _Tilted:
        scores = scores[np.argsort(scores.mean(axis=1), kind="stable")]
        top = scores.max(axis=1, keepdims=True)
        tilted, log_mean, log_squares = (np.empty((len(scores), len(betas))) for _ in range(3))
        for j, beta in enumerate(betas):
            tilts = np.exp((scores - top) / beta)  # at most 1, and 1 for one of them: neither overflow nor a sum of 0
            tilted[:, j] = (tilts * scores).sum(axis=1) / tilts.sum(axis=1)
            log_mean[:, j] = top[:, 0] / beta + np.log(tilts.mean(axis=1))
            log_squares[:, j] = 2 * top[:, 0] / beta + np.log((tilts**2).mean(axis=1))
        return cls(
            means=scores.mean(axis=1),
            tilted=tilted,
            log_mean=log_mean,
            log_squares=log_squares,
            samples=scores.shape[1],
        )

    def level(self, size: int, betas: Float[np.ndarray, " J"]) -> _Level:
        """Gain and KL where each group of `size` neighbours, or a few more, is tilted as one, and the groups' effective
        sample sizes, by self-normalised importance weights."""
        groups = np.array_split(np.arange(len(self.means)), max(len(self.means) // size, 1))
        starts, members = [group[0] for group in groups], np.array([len(group) for group in groups])[:, None]
        total = np.logaddexp.reduceat(self.log_mean, starts, axis=0)
        parts = np.exp(self.log_mean - np.repeat(total, members[:, 0], axis=0))
        tilted = np.add.reduceat(parts * self.tilted, starts, axis=0)
        kls = np.maximum(tilted / betas - (total - np.log(members)), 0.0)
        sizes = self.samples * np.exp(2 * total - np.logaddexp.reduceat(self.log_squares, starts, axis=0))
        share = members[:, 0] / len(self.means)
        return share @ tilted - self.means.mean(), share @ kls, sizes


def _optimum(scores: np.ndarray, draws: np.ndarray | None) -> tuple[list[Optimum], list[Bound]]:
    """The curve as far as its samples suffice, and the bound beyond.

    A group of prompts that is tilted as one may also move from prompt to prompt, as no policy can: its gain at a KL is
    at least what a policy has, its mean over groups a bound as well (by Jensen, `mean log Z <= log mean Z`), and its
    samples are the more, so that it holds at a KL where each prompt's own do not suffice. Prompts of like scores give
    it little to move for. Each size of group has its lines, and the least of all of them is the bound.
    """
    spread = float(np.sqrt(scores.var(axis=1).mean()))
    if not spread > 1e-9 * np.abs(scores).max():  # constant scores: nothing to gain
        return [], []
    scores = scores - scores.mean()
    betas = np.geomspace(_WIDEST * spread, _NARROWEST * spread, _BETAS)
    whole, halves = _Tilted.of(scores, betas), [_Tilted.of(scores[:, start::2], betas) for start in (0, 1)]
    levels = {size: _sufficient(whole, halves, size, betas) for size in _sizes(len(scores))}
    gain, kl, sizes = levels[1]
    count = len(gain)
    if not count:
        return [], []
    each = betas[:count] * whole.log_mean[:, :count] - whole.means[:, None]  # a prompt's own lines
    lows, highs = _intervals(None if draws is None else _least(betas[:count], draws @ each, kl), count)
    curve = [
        Optimum(beta=float(b), kl=float(k), gain=float(g), low=lows[j], high=highs[j], ess=float(sizes[:, j].mean()))
        for j, (b, k, g) in enumerate(zip(betas, kl, gain, strict=False))
    ]
    slopes = np.concatenate([betas[: len(gains)] for gains, _, _ in levels.values()])
    lines = np.concatenate([gains - betas[: len(gains)] * kls for gains, kls, _ in levels.values()])
    grid = np.arange(_BOUND_STEP, _BOUND_TO + _BOUND_STEP, _BOUND_STEP)
    bound = []
    for nats in (kl[-1], *grid[grid > kl[-1]]):
        heights = lines + slopes * nats
        lowest = int(np.argmin(heights))
        bound.append(Bound(beta=float(slopes[lowest]), kl=float(nats), gain=float(heights[lowest])))
    return curve, bound


def _sufficient(whole: _Tilted, halves: Sequence[_Tilted], size: int, betas: Float[np.ndarray, " J"]) -> _Level:
    """The level for the betas, from the widest on, for which the samples suffice: `MIN_ESS`, and half of them."""
    gain, kl, sizes = whole.level(size, betas)
    enough = np.quantile(sizes, 0.1, axis=0) >= MIN_ESS
    # The mean over the odd and the even samples, at equal KL: both halves together have seen the same scores.
    lines = np.mean([gains - betas * kls for gains, kls, _ in (half.level(size, betas) for half in halves)], axis=0)
    enough &= gain - _least(betas, lines[None], kl)[0] <= MAX_GAP * gain
    count = len(betas) if enough.all() else int(np.argmin(enough))
    return gain[:count], kl[:count], sizes[:, :count]


def _least(
    betas: Float[np.ndarray, " J"], lines: Float[np.ndarray, "B J"], kl: Float[np.ndarray, " M"]
) -> Float[np.ndarray, "B M"]:
    """The lowest line at each KL: the gain of the optimum, see `Frontier.gain_at`."""
    return np.stack([(lines + betas * nats).min(axis=1) for nats in kl], axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Bootstrap
# ---------------------------------------------------------------------------------------------------------------------


def _bootstrap_weights(prompts: int, seed: int) -> np.ndarray | None:
    """(replicates, P) weights that sum to 1 in each replicate; None for a single prompt, which has no spread."""
    if prompts < 2:
        return None
    return np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), _REPLICATES) / prompts


def _interval(replicates: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(replicates, _TAILS)
    return float(low), float(high)


def _intervals(replicates: np.ndarray | None, count: int) -> tuple[list[float | None], list[float | None]]:
    """Lows and highs of each column."""
    if replicates is None:
        return [None] * count, [None] * count
    low, high = np.percentile(replicates, _TAILS, axis=0)
    return low.tolist(), high.tolist()
