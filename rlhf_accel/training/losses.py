"""The loss of a micro-batch, and the statistics of an update: sums and maxima by name, so that terms can be left out.

Knows batches, the maths and the call of the module. Knows no rank and no optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from rlhf_accel.algorithm import ppo
from rlhf_accel.algorithm.batches import Experience, LossStats, TokenOutputs
from rlhf_accel.algorithm.kl import kl_estimate
from rlhf_accel.algorithm.masked import weighted_sum, where_counted
from rlhf_accel.config.schema import PPOConfig
from rlhf_accel.models.calls import model_inputs

POLICY_SUMS = ("policy", "total", "approx_kl", "clipped")
VALUE_SUMS = ("value", "value_clipped")
LOSSES = ("policy", "value", "kl", "total")  # averaged as ppo.loss_reduction says; the other sums over tokens
MAXIMA = ("ratio", "ratio_error", "log_ratio_error")


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Sums over the tokens of a micro-batch (`total` is the loss itself), and maxima over them; 0-dim fp32."""

    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]

    def detached(self) -> Terms:
        """The same figures without their graph, on the same device: reading them would make the host wait for the
        forward pass before it starts the backward pass."""
        return Terms(
            sums={name: value.detach().float() for name, value in self.sums.items()},
            maxima={name: value.float() for name, value in self.maxima.items()},
        )

    @classmethod
    def added(cls, parts: Sequence[Terms]) -> Terms:
        """The terms of several micro-batches together."""
        sums = torch.stack([torch.stack(list(part.sums.values())) for part in parts]).sum(0)
        maxima = torch.stack([torch.stack(list(part.maxima.values())) for part in parts]).amax(0)
        return cls(
            sums=dict(zip(parts[0].sums, sums, strict=True)), maxima=dict(zip(parts[0].maxima, maxima, strict=True))
        )

    def over(self, reduce: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Terms:
        """The terms of all ranks together, on the CPU. `reduce` adds up sums and takes the largest of maxima."""
        sums, maxima = reduce(torch.stack(list(self.sums.values())), torch.stack(list(self.maxima.values())))
        return Terms(sums=dict(zip(self.sums, sums, strict=True)), maxima=dict(zip(self.maxima, maxima, strict=True)))


def loss_terms(
    outputs: TokenOutputs, experience: Experience, mask: Bool[Tensor, "m R"], config: PPOConfig, kl_coef: float
) -> Terms:
    """The terms of the loss over the tokens of `experience` where `mask` is True.

    Without values or returns there is no value loss. If the experience has the reference's log-probabilities, the KL is
    a term with the weight `kl_coef`. Source: Schulman et al. 2017, equations 7 and 9.
    """
    old_logprobs, advantages = experience.old_logprobs, experience.advantages
    weights = ppo.row_weights(mask, config.loss_reduction)
    clip = ppo.Clip(config.cliprange, config.cliprange_high or config.cliprange, config.dual_clip)
    policy = ppo.policy_loss(outputs.logprobs, old_logprobs, advantages, mask, clip, config.policy_loss, weights)
    value, total = None, policy.loss
    if outputs.values is not None and experience.old_values is not None and experience.returns is not None:
        old_values, returns = experience.old_values, experience.returns
        value = ppo.value_loss(outputs.values, old_values, returns, mask, config.cliprange_value, weights)
        total = policy.loss + config.vf_coef * value.loss
    if outputs.entropy is not None:
        total = total - config.entropy_coef * weighted_sum(outputs.entropy, mask, weights)
    kl = None
    if experience.ref_logprobs is not None:
        ref_logprobs = where_counted(experience.ref_logprobs, mask)
        estimate = kl_estimate(where_counted(outputs.logprobs, mask), ref_logprobs, config.kl_estimator)
        kl = weighted_sum(estimate, mask, weights)
        total = total + kl_coef * kl
    sums = {"policy": policy.loss, "total": total, "approx_kl": policy.approx_kl, "clipped": policy.clipped}
    if value is not None:
        sums |= {"value": value.loss, "value_clipped": value.clipped}
    if kl is not None:
        sums["kl"] = kl
    maxima = {"ratio": policy.ratio_max, "ratio_error": policy.ratio_error, "log_ratio_error": policy.log_ratio_error}
    return Terms(sums=sums, maxima=maxima)


def computed_terms(
    module: nn.Module, experience: Experience, mask: Bool[Tensor, "m R"], config: PPOConfig, kl_coef: float
) -> Terms:
    """The `loss_terms` of a forward pass of the module over the experience, which is on the module's device."""
    outputs = module(*model_inputs(experience.sequences), with_entropy=config.entropy_coef > 0)
    return loss_terms(outputs, experience, mask, config, kl_coef)


def loss_of(module: nn.Module, experience: Experience, config: PPOConfig) -> Tensor:
    """The loss of a few samples as one micro-batch, for commands that inspect it; computed on the module's device."""
    part = experience.trimmed().to(next(module.parameters()).device)
    total = computed_terms(module, part, part.sequences.response_mask, config, config.kl_coef).sums["total"]
    return total / ppo.denominator(experience.sequences.response_mask, config.loss_reduction)


class UpdateTotals:
    """Collects the statistics of a step's minibatches, each a mean over its tokens.

    The minibatch at which ppo.target_kl_stop ended the update counts: its losses are known, though no step was taken.
    """

    def __init__(self, experience: Experience) -> None:
        critic, kl = experience.returns is not None, experience.ref_logprobs is not None
        self._sums = (*POLICY_SUMS, *(VALUE_SUMS if critic else ()), *(("kl",) if kl else ()))
        self._means: list[Tensor] = []
        self._maxima: list[Tensor] = []
        self._norms: list[float] = []
        self._skipped = 0

    def add_losses(self, terms: Terms, tokens: int, denominator: int) -> dict[str, Tensor]:
        """Note a minibatch of `tokens` tokens, whose losses are divided by `denominator`. Returns its means."""
        means = {name: terms.sums[name] / (denominator if name in LOSSES else tokens) for name in self._sums}
        self._means.append(torch.stack(list(means.values())))
        self._maxima.append(torch.stack([terms.maxima[name] for name in MAXIMA]))
        return means

    def add_step(self, norm: float, *, taken: bool) -> None:
        """Note an optimizer step with the gradient's norm before clipping, or a step that was skipped."""
        self._skipped += not taken
        if taken:
            self._norms.append(norm)

    def stats(self) -> LossStats:
        """Means over the minibatches whose losses are finite; NaN if there is none. The others were skipped."""
        taken = [number for number, means in enumerate(self._means) if means.isfinite().all()]
        rows = [self._means[number] for number in taken] or [torch.full((len(self._sums),), torch.nan)]
        largest = torch.stack([self._maxima[number] for number in taken] or [torch.full((len(MAXIMA),), torch.nan)])
        means = dict(zip(self._sums, torch.stack(rows).mean(0).tolist(), strict=True))
        first = dict(zip(self._sums, rows[0].tolist(), strict=True))
        ratio, ratio_error, log_ratio_error = largest.T
        return LossStats(
            policy=means["policy"],
            value=means.get("value"),
            kl=means.get("kl"),
            total=means["total"],
            approx_kl=means["approx_kl"],
            clip_fraction=means["clipped"],
            value_clip_fraction=means.get("value_clipped"),
            ratio_max=float(ratio.max()),
            first_ratio_error=float(ratio_error[0]),
            # k3 is half the square of a small log-ratio
            first_log_ratio_rms=math.sqrt(2 * max(first["approx_kl"], 0.0)),
            first_log_ratio_max=float(log_ratio_error[0]),
            grad_norm=float(np.mean(self._norms)) if self._norms else math.nan,
            skipped=self._skipped,
        )
