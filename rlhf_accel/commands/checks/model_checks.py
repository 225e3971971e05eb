"""Checks of the models before any training: vocabulary, adapters, ends, reference, ratio, values, gradient."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn

from rlhf_accel.algorithm.advantages import make_experience
from rlhf_accel.algorithm.batches import Experience, Responses, Rollout
from rlhf_accel.algorithm.kl import kl_estimate
from rlhf_accel.algorithm.masked import masked_row_sum
from rlhf_accel.commands.checks.findings import Findings, Level, Verdict
from rlhf_accel.models import probes
from rlhf_accel.models.calls import model_inputs
from rlhf_accel.models.lora import CRITIC
from rlhf_accel.models.reference import reference_policy
from rlhf_accel.models.trainable import training_mode
from rlhf_accel.training.first_step import ratio_limits, values_in_reach
from rlhf_accel.training.losses import loss_of
from rlhf_accel.training.setup import Setup

_FEW = 8  # samples for a gradient, if ppo.micro_batch_tokens holds so many


def check_vocabulary(findings: Findings, setup: Setup) -> None:
    policy = setup.runtime.plain_module.policy
    rows = policy.get_input_embeddings().weight.shape[0]
    if len(setup.tokens) > rows:
        findings.note(
            "problem",
            "tokenizer",
            f"model.name_or_path={setup.config.model.name_or_path}: the tokenizer has {len(setup.tokens)} ids "
            f"and the model {rows} embeddings; they do not belong together",
        )
    else:
        findings.note("ok", "tokenizer", f"{len(setup.tokens)} ids for {rows} embeddings")
    for name, _, term in setup.reward.classifiers:
        rows = term.model.get_input_embeddings().weight.shape[0]
        level: Level = "problem" if len(term.tokenizer) > rows else "ok"
        message = f"{name}: the tokenizer has {len(term.tokenizer)} ids for {rows} embeddings"
        fix = "; it belongs to another model, save the right one beside this one" if level == "problem" else ""
        findings.note(level, "reward tokenizer", message + fix)
    for check, message in setup.cautions():
        findings.note("warning", check, message)


def check_adapters(setup: Setup) -> Verdict:
    policy = setup.runtime.plain_module.policy
    names = [name for name, p in policy.named_parameters() if p.requires_grad and "lora_" in name]
    names = [name for name in names if CRITIC not in name.split(".")]
    layers = int(getattr(policy.config.get_text_config(), "num_hidden_layers", 0))
    found = {int(number) for name in names for number in re.findall(r"\.(\d+)\.", name)[:1]}
    where = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in names})
    targets = _listed(setup.config.lora.target_modules)
    message = f"lora.target_modules={targets} puts adapters on {', '.join(where) or 'nothing'}"
    if layers and not found:
        return "problem", f"{message}, in none of the {layers} layers; name layers of attention or MLP"
    if layers and len(found) < layers / 2:
        return "warning", f"{message}, in {len(found)} of {layers} layers only"
    return "ok", f"{message}, in {len(found)} of {layers} layers"


def check_ends(setup: Setup, responses: Responses) -> Verdict:
    config, tokens = setup.config, setup.tokens
    rollout = config.rollout
    share = float(responses.finished.float().mean())
    pad = "PAD = EOS" if tokens.pad_id == tokens.eos_id else f"PAD {tokens.pad_id}"
    ends = f"rollout.stop={_listed(rollout.stop)}" if rollout.stop else "no rollout.stop"
    if tokens.eos_id is None and not rollout.stop:
        ends = "a tokenizer without EOS and no rollout.stop"
    message = f"{share:.0%} of {len(responses)} responses end before rollout.max_new_tokens={rollout.max_new_tokens}"
    if share > 0:
        return "ok", f"{message} ({pad}, {ends})"
    if config.reward.missing_eos_penalty > 0:
        return "problem", (
            f"{message} ({pad}, {ends}), so reward.missing_eos_penalty={config.reward.missing_eos_penalty:g} lowers "
            "all scores alike; set rollout.stop, or raise rollout.max_new_tokens"
        )
    why = ", as rollout.min_new_tokens forbids it" if rollout.min_new_tokens >= rollout.max_new_tokens else ""
    return "warning", (
        f"{message}{why} ({pad}, {ends}): all are cut off; if they should end, set rollout.stop, or raise "
        "rollout.max_new_tokens"
    )


def check_reference(findings: Findings, setup: Setup, rollout: Rollout) -> None:
    few = _few(setup, rollout).sequences.trimmed().to(setup.runtime.device)
    module = setup.runtime.plain_module
    with torch.no_grad(), setup.runtime.autocast():
        ours = module(*model_inputs(few)).logprobs
        with reference_policy(module, setup.collector.reference) as reference:
            theirs = reference(few)
    mask = few.response_mask
    if not ours[mask].isfinite().all():
        findings.note(
            "problem",
            "logits",
            f"the policy's log-probabilities are not finite in {_arithmetic(setup)}: they overflow; set "
            "model.dtype to fp32 or bf16",
        )
        return
    difference = float((ours - theirs)[mask].abs().max())
    if difference == 0:
        findings.note("ok", "reference", "the same as the policy, bit for bit")
    elif difference < 1e-3:
        findings.note("warning", "reference", f"the policy differs from it by up to {difference:.2g} nats per token")
    else:
        findings.note(
            "problem",
            "reference",
            f"the policy differs from it by up to {difference:.3g} nats per token before any training: other weights, "
            "dropout or adapter; look at lora.adapter and model.name_or_path",
        )
    mask = rollout.sequences.response_mask
    kl = masked_row_sum(kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k3"), mask)
    limits = ratio_limits(setup, rollout, of_one_pass=setup.collector.recompute)
    finding = probes.reference_is_policy(float(kl.mean()), float(mask.sum(1).float().mean()), limits)
    findings.note("ok" if finding.passed else "problem", "KL", finding.message)


def check_values(findings: Findings, setup: Setup, rollout: Rollout) -> None:
    config = setup.config
    experience = make_experience(rollout, config.ppo, config.reward, config.ppo.kl_coef)
    finding = values_in_reach(experience, config.ppo.cliprange_value)
    if finding is not None:
        findings.note("ok" if finding.passed else "warning", "values", finding.message)


def check_ratio(findings: Findings, setup: Setup, rollout: Rollout) -> None:
    """The ratio of the first update, which dropout moves away from 1."""
    config = setup.config
    module = setup.runtime.plain_module
    left_on = _dropout(module)
    some = _few(setup, rollout)
    sequences = some.sequences.trimmed()
    few, length = sequences.to(setup.runtime.device), sequences.response_mask.shape[1]
    with torch.no_grad(), setup.runtime.autocast(), training_mode(module, config):
        new = module(*model_inputs(few)).logprobs.cpu()
    log_ratios = (new - some.logprobs[:, :length])[sequences.response_mask]
    ratio = float(log_ratios.exp().sub(1).abs().max())
    if config.lora.dropout > 0:
        findings.note(
            "warning",
            "dropout",
            f"lora.dropout={config.lora.dropout:g} stays on in the update: the first ratio is off by {ratio:.2g}, "
            "and the result depends on the number of processes; 0 is safer",
        )
    elif left_on:
        findings.note(
            "warning",
            "dropout",
            f"left on in {len(left_on)} places of the model ({left_on[0]}, …) that the update does not use; set it to "
            "0 in the config of model.name_or_path",
        )
    else:
        findings.note("ok", "dropout", "off everywhere")
    if config.lora.dropout == 0:
        rms, largest = float(log_ratios.square().mean().sqrt()), float(log_ratios.abs().max())
        limits, recomputed = ratio_limits(setup, rollout), setup.collector.recompute
        finding = probes.sampled_is_trained(rms, largest, limits, recomputed=recomputed)
        findings.note("ok" if finding.passed else "problem", "ratio", finding.message)


def check_gradient(setup: Setup, rollout: Rollout) -> Verdict:
    """Whether the loss has a gradient in all trainable tensors.

    The advantages are drawn at random, so that a constant reward does not hide a missing gradient. Weights that start
    at zero and so block the gradient of others (LoRA's second matrices, the value head) get small random numbers.
    """
    module = setup.runtime.plain_module
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        return "problem", "nothing is trainable; set lora.r or lora.target_modules"
    zeros = [p for p in parameters.values() if not p.detach().any()]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in zeros:
                parameter.copy_(1e-2 * torch.randn(parameter.shape, generator=generator))
        experience = _random_experience(setup, _few(setup, rollout), generator)
        with setup.runtime.autocast(), training_mode(module, setup.config):
            loss_of(setup.runtime.module, experience, setup.config.ppo).backward()
        missing = [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]
        missing = [name for name in missing if "expert" not in name]  # a mixture does not use all of them
        infinite = [name for name, p in parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()
        for parameter in parameters.values():
            parameter.grad = None
    return _verdict_on_gradient(setup, len(parameters), missing, infinite)


def _verdict_on_gradient(setup: Setup, count: int, missing: list[str], infinite: list[str]) -> Verdict:
    if infinite:
        return "problem", (
            f"not finite in {len(infinite)} of {count} tensors ({infinite[0]}, …): they overflow in "
            f"{_arithmetic(setup)}; set model.dtype to fp32 or bf16"
        )
    if missing:
        fix = "look at lora.target_modules and lora.modules_to_save"
        if setup.config.lora.r == 0:
            fix = "part of the model of model.name_or_path is not connected to the loss, as behind a router or a ReLU"
        return "problem", f"does not reach {len(missing)} of {count} trainable tensors ({missing[0]}, …); {fix}"
    return "ok", f"reaches all {count} trainable tensors"


def _arithmetic(setup: Setup) -> str:
    """The dtype of the weights and the precision of the passes, also if the config has auto."""
    resolved = setup.arithmetic()
    return f"{resolved['model_dtype']} weights and {resolved['precision']} passes"


def _few(setup: Setup, rollout: Rollout) -> Rollout:
    """As many samples as one pass may hold, at most `_FEW`."""
    longest = int(rollout.sequences.lengths.max())
    return rollout.select(torch.arange(max(min(_FEW, setup.config.ppo.micro_batch_tokens // longest), 1)))


def _random_experience(setup: Setup, rollout: Rollout, generator: torch.Generator) -> Experience:
    """An experience with ratios of 1 and random advantages and returns."""
    module, sequences = setup.runtime.plain_module, rollout.sequences
    with torch.no_grad(), setup.runtime.autocast():
        now = module(*model_inputs(sequences.to(setup.runtime.device)))
    logprobs = now.logprobs.float().cpu()
    values = None if now.values is None else now.values.float().cpu()
    advantages, beyond = (torch.randn(logprobs.shape, generator=generator) for _ in range(2))
    return Experience(
        sequences=sequences,
        old_logprobs=logprobs,
        old_values=values,
        rewards=torch.zeros_like(logprobs),
        advantages=advantages,
        returns=None if values is None else values + beyond,
    )


def _dropout(module: nn.Module) -> list[str]:
    """Places where a pass in training mode would apply dropout."""
    found = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Dropout) and layer.p > 0:
            found.append(name)
        found += [f"{name}.{key}" for key, p in vars(layer).items() if "drop" in key and isinstance(p, float) and p > 0]
    return found


def _listed(values: Sequence[str] | None) -> str:
    return "null" if values is None else f"[{', '.join(map(repr, values))}]"
