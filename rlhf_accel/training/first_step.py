"""Probes of the first step, where policy, reference and sampling are the same model.

What rounding does not explain is a fault of the model, of its kernels or of ours: it stops the run or is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from rlhf_accel.algorithm.batches import Experience, LossStats, Responses, Rollout
from rlhf_accel.algorithm.masked import masked_mean
from rlhf_accel.models import probes
from rlhf_accel.models.policy_with_value import logit_sizes
from rlhf_accel.models.vocabulary import has_fp32_logits
from rlhf_accel.system.errors import RunFailed
from rlhf_accel.training.setup import Setup

_SAMPLES = 4  # responses whose logits set the limits


@dataclass(frozen=True, kw_only=True)
class FirstStep:
    """What rounding explains of log-ratios at step 1: to the rollout's probabilities, and to the reference's."""

    setup: Setup
    ratios: probes.RatioLimits
    references: probes.RatioLimits

    @classmethod
    def before_update(
        cls, setup: Setup, responses: Responses, rollout: Rollout, experience: Experience, warn: Callable[[str], None]
    ) -> FirstStep:
        """The limits, from the logits before the update changes them. Called by all ranks."""
        recompute = setup.collector.recompute
        limits = ratio_limits(setup, rollout)
        if recompute:
            finding = sampled_is_recomputed(setup, responses, rollout, limits)
            if not finding.passed:
                warn(f"responses are drawn from another distribution than the one that is trained; {finding.message}")
        values = values_in_reach(experience, setup.config.ppo.cliprange_value)
        if values is not None and not values.passed:
            warn(values.message)
        # DoRA scales what its base computes, also untrained, and so rounds in another way than the base alone.
        same_path = recompute and not (setup.config.lora.use_dora and setup.config.lora.adapter is None)
        return cls(setup=setup, ratios=limits, references=ratio_limits(setup, rollout, of_one_pass=same_path))

    def check(self, metrics: Mapping[str, float], losses: LossStats) -> None:
        """Raises `RunFailed` where the first log-ratios are beyond their limits."""
        found = {}
        rms, largest = losses.first_log_ratio_rms, losses.first_log_ratio_max
        if self.setup.config.lora.dropout == 0 and math.isfinite(rms):  # else no minibatch had a finite loss
            recomputed = self.setup.collector.recompute
            finding = probes.sampled_is_trained(rms, largest, self.ratios, recomputed=recomputed)
            found["policy/first_ratio_error"] = finding
        kl, tokens = metrics["objective/kl_k3"], metrics["rollout/response_tokens"]
        found["objective/kl_k3"] = probes.reference_is_policy(kl, tokens, self.references)
        for metric, finding in found.items():
            if not finding.passed:
                raise RunFailed(f"{metric} is {metrics[metric]:.4g} at step 1: {finding.message}")


def ratio_limits(setup: Setup, rollout: Rollout, *, of_one_pass: bool = False) -> probes.RatioLimits:
    """What rounding explains of the first log-ratios, from the logits of a few responses; `of_one_pass` where both
    sides come from passes of the same shape, which round alike. Called by all ranks."""
    if setup.dtype == torch.float32 or of_one_pass:
        return probes.ratio_limits(None, setup.dtype)
    runtime, config = setup.runtime, setup.config
    most = max(config.ppo.micro_batch_tokens // int(rollout.sequences.lengths.max()), 1)
    few = rollout.sequences.select(torch.arange(min(_SAMPLES, most, len(rollout)))).trimmed()
    with runtime.gathered(), runtime.autocast():
        sizes = logit_sizes(runtime.plain_module, few.to(runtime.device))
    rounded_to = torch.float32 if has_fp32_logits(runtime.plain_module.policy) else setup.dtype
    spacing = probes.logit_spacing(sizes, rounded_to) / config.rollout.temperature
    return probes.ratio_limits(spacing, setup.dtype)


def sampled_is_recomputed(
    setup: Setup, responses: Responses, rollout: Rollout, limits: probes.RatioLimits
) -> probes.Finding:
    """Whether the log-probabilities that sampling left of this rank's responses are those of the pass over them.

    If they are recomputed, the ratio is 1 whatever sampling does. Called by all ranks.
    """
    runtime, mask = setup.runtime, responses.sequences.response_mask
    recomputed = rollout.logprobs[runtime.share(len(rollout))]
    off = (recomputed - responses.logprobs)[mask].double()
    total, count = runtime.sum(torch.stack([off.square().sum(), torch.tensor(float(off.numel()))])).tolist()
    largest = float(runtime.max(torch.cat([off.new_zeros(1), off.abs()]).amax()[None])[0])
    return probes.sampled_is_trained(math.sqrt(total / max(count, 1.0)), largest, limits, recomputed=True)


def values_in_reach(experience: Experience, cliprange_value: float | None) -> probes.Finding | None:
    """The probe of this name, of an experience before the update; None without a critic."""
    if experience.returns is None or experience.old_values is None:
        return None
    mask = experience.sequences.response_mask
    distance = masked_mean((experience.returns - experience.old_values).square(), mask).sqrt()
    return probes.values_in_reach(float(distance), cliprange_value)
