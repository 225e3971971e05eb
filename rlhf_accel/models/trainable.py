"""Which parameters are trained, at which rates, and the mode that layers are trained in."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_accel.config.schema import Config, OptimConfig
from rlhf_accel.models.lora import CRITIC
from rlhf_accel.models.policy_with_value import PolicyWithValue


def freeze_unreached(module: PolicyWithValue) -> list[str]:
    """Freeze what a text has no way to, such as a vision tower or a head that is not asked, and return the names: a
    gradient never comes, for which data parallelism would wait.

    Found by one small pass and the graph that autograd made of it. Experts that were not chosen are no such case, as
    long as others are like them.
    """
    device = next(module.parameters()).device
    ids = torch.full((1, 2), 1, device=device)
    said = module(ids, torch.ones_like(ids, dtype=torch.bool), ids, torch.ones_like(ids, dtype=torch.bool))
    reached = _leaves(said.logprobs.sum() + (0.0 if said.values is None else said.values.sum()))
    learned = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not any(name.startswith("policy.") and id(parameter) in reached for name, parameter in learned.items()):
        return []  # not a part of the model, but a fault, which the doctor's look at the gradient finds
    alike = {re.sub(r"\d+", "*", name) for name, parameter in learned.items() if id(parameter) in reached}
    unreached = [name for name, parameter in learned.items() if id(parameter) not in reached]
    frozen = [name for name in unreached if "expert" not in name or re.sub(r"\d+", "*", name) not in alike]
    for name in frozen:
        learned[name].requires_grad_(False)
    return frozen


def _leaves(result: Tensor) -> set[int]:
    """The ids of all parameters that this was computed from."""
    nodes, seen, found = [result.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [function for function, _ in node.next_functions]
    return found


@contextlib.contextmanager
def learning(module: nn.Module, config: Config) -> Iterator[None]:
    """Training mode for those layers that need it, while the context lasts: checkpointed ones look at it, and dropout
    of adapters. All others stay in evaluation mode, in which they sampled: routers add noise in training, and other
    layers take other branches."""
    layers: list[nn.Module] = []
    if config.model.gradient_checkpointing:
        marked = [layer for layer in module.modules() if getattr(layer, "gradient_checkpointing", False)]
        # Models of before GradientCheckpointingLayer checkpoint layers themselves.
        layers += [layer for layer in marked if isinstance(layer, GradientCheckpointingLayer)] or marked
    if config.lora.dropout > 0:
        for layer in module.modules():
            if isinstance(layer, BaseTunerLayer):
                layers += [layer, *getattr(layer, "lora_dropout", nn.ModuleDict()).modules()]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def parameter_groups(module: PolicyWithValue, optim: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters for AdamW: the policy's at optim.lr, the critic's own at optim.critic_lr; weight decay on
    matrices only."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            of_policy = name.startswith("policy.") and CRITIC not in name.split(".")
            groups.setdefault((of_policy, parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": optim.lr if of_policy or optim.critic_lr is None else optim.critic_lr,
            "weight_decay": optim.weight_decay if is_matrix else 0.0,
        }
        for (of_policy, is_matrix), parameters in groups.items()
    ]
