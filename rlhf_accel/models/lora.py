"""LoRA adapters: the layers that get them, made or continued, switched and scaled. Knows peft and models; knows no
rank and no run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import TaskType, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_accel.config.schema import Config
from rlhf_accel.data.loading import adapted, adapter_config
from rlhf_accel.models.loading import LanguageModel, without_dropout
from rlhf_accel.system.errors import ConfigError

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


# Names of adapters: the policy's is the one that peft loads and saves by default.
POLICY, CRITIC, REFERENCE = "default", "critic", "reference"


@contextlib.contextmanager
def adapter(model: LanguageModel, name: str | None) -> Iterator[None]:
    """The adapter `name` at work instead of the active one, or none at all.

    What was active is so again when the context ends, also by an exception. peft freezes the adapters that it
    switches off; here each parameter goes on learning or not as it did before.
    """
    if name is not None and name == model.active_adapter:
        yield
        return
    before, learns = model.active_adapter, [(p, p.requires_grad) for p in model.parameters()]
    with contextlib.ExitStack() as stack:
        stack.callback(_set_learning, learns)
        if name is None:
            stack.enter_context(model.disable_adapter())
        else:
            stack.callback(model.set_adapter, before)
            model.set_adapter(name)
        _set_learning(learns)
        yield


def _set_learning(learns: Sequence[tuple[nn.Parameter, bool]]) -> None:
    for parameter, learn in learns:
        parameter.requires_grad_(learn)


def scaled_adapter(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """An adapter's weights, by name, with what they add to the base `scale` times as large.

    From 1 to 0 this is the straight way from the policy back to its base, on which the KL falls faster than the gain:
    about with the square of the scale (Ramé et al. 2024, "WARP", the interpolation towards the initialization).
    """
    ends = {"lora_B", "lora_embedding_B"}
    return {name: weight * scale if ends & set(name.split(".")) else weight for name, weight in weights.items()}


def continued_adapter(model: LanguageModel, config: Config, path: str) -> LanguageModel:
    """The model with the adapter at `path` twice: once to learn, once as the reference."""
    try:
        settings = adapter_config(path, f"lora.adapter={path}")
        if settings.r != config.lora.r:
            raise ConfigError(
                f"lora.r={config.lora.r}, but the adapter at lora.adapter={path} has rank {settings.r}", key="lora.r"
            )
        if settings.modules_to_save and model.dtype != torch.float32:
            raise ConfigError(
                f"lora.adapter={path} has layers that learn in full ({', '.join(settings.modules_to_save)}), and in "
                f"{model.dtype} they would lose small updates to rounding; use model.dtype=fp32",
                key="lora.adapter",
            )
        model = adapted(model, path, adapter_name=POLICY, is_trainable=True)
        model.load_adapter(path, adapter_name=REFERENCE)
        # The adapter may come from another machine: what is exported names the base that it was trained on here.
        model.peft_config[POLICY].base_model_name_or_path = model.get_base_model().name_or_path
    except ConfigError:
        raise
    except Exception as error:  # a missing, broken or foreign file raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"lora.adapter={path}: no LoRA adapter for this model ({reason})", key="lora.adapter"
        ) from error
    return without_dropout(model) if config.lora.dropout == 0 else model


def with_adapter(model: LanguageModel, config: Config, task: TaskType) -> LanguageModel:
    settings = lora_settings(model, config, task, config.lora.modules_to_save if task == TaskType.CAUSAL_LM else ())
    try:
        with seeded(config.run.seed):
            return get_peft_model(model, settings)  # fp32 over a bf16 base: peft's autocast_adapter_dtype
    except ValueError as error:
        targets = config.lora.target_modules
        raise ConfigError(
            f"lora.target_modules={targets}: {str(error).splitlines()[0]}", key="lora.target_modules"
        ) from error


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The adapters' first matrices are random: they follow the run's seed, and nobody else's numbers do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def lora_settings(
    model: LanguageModel, config: Config, task: TaskType, modules_to_save: Sequence[str]
) -> PeftLoraConfig:
    lora = config.lora
    return PeftLoraConfig(
        task_type=task,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets(model, lora.target_modules),
        modules_to_save=list(modules_to_save) or None,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),  # GPT-2 keeps its matrices so
    )
