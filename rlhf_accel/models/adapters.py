"""Which layers get LoRA adapters: those that the config names, else what peft knows for the architecture, else all
linear ones. Knows models and peft; knows no config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

ALL_LINEAR = ("all-linear",)
# By these names peft knows matrices of experts, also where transformers keeps those of all experts in one tensor.
_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
# Their fused kernels read the weight of this layer past its adapter, so that peft refuses it.
_WITHOUT_OUT_PROJ = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def targets(model: Any, named: Sequence[str] | None) -> list[str] | str:
    """What `LoraConfig` takes as target_modules."""
    if named is None and knows(model.config.model_type):
        known: list[str] | str = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model.config.model_type]
        return known
    if named is None:
        return all_linear(model, experts=False)
    return all_linear(model, experts=True) if tuple(named) == ALL_LINEAR else list(named)


def knows(family: str) -> bool:
    """Whether peft has a default for this `model_type`."""
    return family in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


def all_linear(model: Any, *, experts: bool) -> list[str]:
    """Names of the linear layers of the trunk, but for routers: an adapter there would move the choice of experts.

    With `experts`, also those names by which peft finds the matrices of experts that are one tensor; without, none of
    these, since peft would take the name of a linear layer for theirs.
    """
    fused = any(name.endswith("experts.gate_up_proj") for name, _ in model.named_parameters())
    outside = {id(layer) for layer in _outside(model)}
    names = [
        name.removesuffix(".base_layer")  # of a layer that has an adapter already
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D))
        and id(layer) not in outside
        and ".lora_" not in name
        and not _is_router(name.removesuffix(".base_layer"), layer)
    ]
    if model.config.model_type in _WITHOUT_OUT_PROJ:
        names = [name for name in names if not name.endswith("out_proj")]
    if not fused:
        return names
    if experts:
        return [*names, *_OF_EXPERTS]
    return [name for name in names if not name.endswith(_OF_EXPERTS)]


def on_tensors(model: nn.Module) -> str | None:
    """The first layer with an adapter on a tensor of its own, as peft makes for experts; None if there is none."""
    wrapped = (name for name, layer in model.named_modules() if type(layer).__name__ == "ParamWrapper")
    return next(wrapped, None)


def _outside(model: Any) -> list[nn.Module]:
    """Layers outside of the trunk: the vocabulary's of a policy, the head of a classifier."""
    trunk = {id(layer) for layer in model.base_model.modules()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [layer for layer in model.modules() if id(layer) not in trunk or layer is head]


def _is_router(name: str, layer: nn.Module) -> bool:
    """By its name, or as a linear layer of transformers' that does more than multiply."""
    parts = name.split(".")
    own = type(layer).forward not in (nn.Linear.forward, Conv1D.forward)
    return (
        parts[-1] == "gate"
        or any("router" in part for part in parts)
        or (own and type(layer).__module__.startswith(("transformers.models", "transformers_modules")))
    )
