"""The report of a step: its metrics, by their names in metrics.jsonl, and samples."""

from __future__ import annotations

import math
from typing import Any

from rlhf_accel.algorithm.advantages import flat_groups
from rlhf_accel.algorithm.batches import Experience, LossStats, Rollout
from rlhf_accel.algorithm.kl import kl_estimate
from rlhf_accel.algorithm.masked import masked_mean, masked_row_sum
from rlhf_accel.algorithm.ppo import explained_variance
from rlhf_accel.runs.metrics import METRICS
from rlhf_accel.system.stopwatch import Stopwatch


def step_metrics(
    rollout: Rollout, experience: Experience, losses: LossStats, watch: Stopwatch, run: dict[str, float]
) -> dict[str, float]:
    """The metrics of one step, in the order of `METRICS`, and then the scores by each of several rewards; `run` holds
    those that depend on earlier steps."""
    mask, partial = rollout.sequences.response_mask, rollout.partial_scores
    k1, k3 = (
        masked_row_sum(kl_estimate(rollout.logprobs, rollout.ref_logprobs, kind), mask).mean() for kind in ("k1", "k3")
    )
    optional: dict[str, float] = {}
    if rollout.values is not None and experience.returns is not None:
        fit = explained_variance(rollout.values + partial, experience.returns + partial, mask)
        optional = {
            "loss/value": math.nan if losses.value is None else losses.value,
            "value/clip_fraction": math.nan if losses.value_clip_fraction is None else losses.value_clip_fraction,
            "value/explained_variance": float(fit),
        }
    if len(rollout.groups.unique()) < len(rollout):
        optional["rollout/flat_groups"] = float(flat_groups(rollout.scores, rollout.groups))
    if experience.ref_logprobs is not None:
        optional["loss/kl"] = math.nan if losses.kl is None else losses.kl
    found = {
        "objective/score": float(rollout.scores.mean()),
        "objective/score_std": float(rollout.scores.std(correction=0)),
        "objective/reward": float(masked_row_sum(experience.rewards, mask).mean()),
        "objective/kl": float(k1),
        "objective/kl_k3": float(k3),
        "objective/entropy": float(masked_mean(rollout.entropy, mask)),
        "loss/policy": losses.policy,
        "loss/total": losses.total,
        "policy/approx_kl": losses.approx_kl,
        "policy/clip_fraction": losses.clip_fraction,
        "policy/ratio_max": losses.ratio_max,
        "policy/first_ratio_error": losses.first_ratio_error,
        "rollout/response_tokens": float(mask.sum(1).float().mean()),
        "rollout/eos_fraction": float(rollout.finished.float().mean()),
        "optim/grad_norm": losses.grad_norm,
        "time/rollout": watch.seconds["rollout"],
        "time/score": watch.seconds["score"],
        "time/update": watch.seconds["update"],
        "time/step": watch.total(),
        "perf/samples_per_second": len(rollout) / watch.total(),
        "perf/response_tokens_per_second": int(mask.sum()) / watch.total(),
        **optional,
        **run,
    }
    parts = {f"objective/score/{name}": float(scores.mean()) for name, scores in rollout.term_scores.items()}
    return {metric.name: found[metric.name] for metric in METRICS if metric.name in found} | parts


def logged_samples(rollout: Rollout, count: int) -> list[dict[str, Any]]:
    """The first `count` responses with their scores and their KL in nats, as samples.jsonl holds them."""
    kl = masked_row_sum(rollout.logprobs - rollout.ref_logprobs, rollout.sequences.response_mask)
    rows = zip(rollout.prompts, rollout.texts, rollout.scores.tolist(), kl.tolist(), strict=True)
    names = ("prompt", "response", "score", "kl")
    return [dict(zip(names, row, strict=True)) for row in rows][:count]
