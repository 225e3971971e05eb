"""Trainable parameters: those that stay frozen, their learning rates, and the mode of layers in training.

Knows modules and the config. Knows no rank and no optimizer state.
"""

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
    """Freeze the parameters that no text reaches, such as a vision tower or an unused head, and return their names.

    They never get a gradient, for which data parallelism would wait. They are found in the autograd graph of one small
    forward pass. Experts that this pass did not choose stay trainable if other experts of the same shape were chosen.
    """
    device = next(module.parameters()).device
    ids = torch.full((1, 2), 1, device=device)
    outputs = module(ids, torch.ones_like(ids, dtype=torch.bool), ids, torch.ones_like(ids, dtype=torch.bool))
    reached = _leaves(outputs.logprobs.sum() + (0.0 if outputs.values is None else outputs.values.sum()))
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not any(name.startswith("policy.") and id(parameter) in reached for name, parameter in trainable.items()):
        return []  # a fault, which the gradient check of the doctor reports
    alike = {re.sub(r"\d+", "*", name) for name, parameter in trainable.items() if id(parameter) in reached}
    unreached = [name for name, parameter in trainable.items() if id(parameter) not in reached]
    frozen = [name for name in unreached if "expert" not in name or re.sub(r"\d+", "*", name) not in alike]
    for name in frozen:
        trainable[name].requires_grad_(False)
    return frozen


def _leaves(result: Tensor) -> set[int]:
    """The ids of all parameters in the graph of `result`."""
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
def training_mode(module: nn.Module, config: Config) -> Iterator[None]:
    """Put the layers that need it into training mode inside the context: checkpointed layers and dropout of adapters.

    All others stay in evaluation mode, in which responses were sampled: in training mode routers add noise, and other
    layers may compute something else.
    """
    layers: list[nn.Module] = []
    if config.model.gradient_checkpointing:
        marked = [layer for layer in module.modules() if getattr(layer, "gradient_checkpointing", False)]
        # Models older than GradientCheckpointingLayer checkpoint their layers themselves.
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
    """Trainable parameters for AdamW: the policy's at optim.lr, those of the value model alone at optim.critic_lr.

    Weight decay applies to matrices only.
    """
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
