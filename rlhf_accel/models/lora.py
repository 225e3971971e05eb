"""LoRA adapters: choose the layers, add or continue adapters, switch and scale them.

Knows peft and models. Knows no rank and no run.
"""

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
from rlhf_accel.system.errors import ConfigError, as_config_error, first_line

ALL_LINEAR = ("all-linear",)
# peft finds expert matrices by these names, also if transformers keeps those of all experts in one tensor.
_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
# Their fused kernels read the weight of out_proj directly and skip its adapter, so peft refuses it.
_WITHOUT_OUT_PROJ = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def targets(model: Any, named: Sequence[str] | None) -> list[str] | str:
    """The target_modules of `LoraConfig`: those that the config names, else peft's default, else all linear layers."""
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
    """Names of the linear layers of the trunk without routers, where an adapter would change the choice of experts.

    With `experts`, the names by which peft finds expert matrices in one tensor are added. Without, they are left out,
    because peft would match them by the name of a linear layer.
    """
    fused = any(name.endswith("experts.gate_up_proj") for name, _ in model.named_parameters())
    outside = {id(layer) for layer in _outside(model)}
    names = [
        name.removesuffix(".base_layer")  # of a layer that already has an adapter
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
    """The first layer with an adapter on a bare tensor, as peft adds for experts; None if there is none."""
    wrapped = (name for name, layer in model.named_modules() if type(layer).__name__ == "ParamWrapper")
    return next(wrapped, None)


def _outside(model: Any) -> list[nn.Module]:
    """Layers outside of the trunk: the vocabulary layer of a policy, the head of a classifier."""
    trunk = {id(layer) for layer in model.base_model.modules()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [layer for layer in model.modules() if id(layer) not in trunk or layer is head]


def _is_router(name: str, layer: nn.Module) -> bool:
    """Recognized by name, or as a linear layer of transformers that does more than multiply."""
    parts = name.split(".")
    own = type(layer).forward not in (nn.Linear.forward, Conv1D.forward)
    return (
        parts[-1] == "gate"
        or any("router" in part for part in parts)
        or (own and type(layer).__module__.startswith(("transformers.models", "transformers_modules")))
    )


# Names of adapters: the policy's is the one that peft loads and saves by default.
POLICY, CRITIC, REFERENCE, REWARD = "default", "critic", "reference", "reward"


@contextlib.contextmanager
def adapter(model: LanguageModel, name: str | None) -> Iterator[None]:
    """Activate the adapter `name`, or none, inside the context.

    The adapter that was active before is active again afterwards, also after an exception. peft freezes the adapters
    that it deactivates; here each parameter stays trainable or frozen as it was.
    """
    if name is not None and name == model.active_adapter:
        yield
        return
    before, trainable = model.active_adapter, [(p, p.requires_grad) for p in model.parameters()]
    with contextlib.ExitStack() as stack:
        stack.callback(_set_trainable, trainable)
        if name is None:
            stack.enter_context(model.disable_adapter())
        else:
            stack.callback(model.set_adapter, before)
            model.set_adapter(name)
        _set_trainable(trainable)
        yield


def _set_trainable(parameters: Sequence[tuple[nn.Parameter, bool]]) -> None:
    for parameter, is_trainable in parameters:
        parameter.requires_grad_(is_trainable)


def scaled_adapter(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """An adapter's weights, by name, scaled so that their contribution to the base is `scale` times as large.

    From 1 to 0 this interpolates between the policy and its base. The KL falls faster than the gain on the way: about
    with the square of the scale (Ramé et al. 2024, "WARP", the interpolation towards the initialization).
    """
    ends = {"lora_B", "lora_embedding_B"}
    return {name: weight * scale if ends & set(name.split(".")) else weight for name, weight in weights.items()}


def continued_adapter(model: LanguageModel, config: Config, path: str) -> LanguageModel:
    """The model with the adapter at `path` twice: once trainable, once as the reference."""
    with as_config_error(f"lora.adapter={path}: is not a LoRA adapter for this model", key="lora.adapter"):
        settings = adapter_config(path, f"lora.adapter={path}")
        if settings.r != config.lora.r:
            raise ConfigError(
                f"lora.r={config.lora.r}, but the adapter at lora.adapter={path} has rank {settings.r}", key="lora.r"
            )
        if settings.modules_to_save and model.dtype != torch.float32:
            raise ConfigError(
                f"lora.adapter={path} has layers that are trained in full ({', '.join(settings.modules_to_save)}), and "
                f"in {model.dtype} they would lose small updates to rounding; use model.dtype=fp32",
                key="lora.adapter",
            )
        model = adapted(model, path, adapter_name=POLICY, is_trainable=True)
        model.load_adapter(path, adapter_name=REFERENCE)
        # The adapter may come from another machine; exports name the base that it is trained on here.
        model.peft_config[POLICY].base_model_name_or_path = model.get_base_model().name_or_path
    return without_dropout(model) if config.lora.dropout == 0 else model


def with_adapter(model: LanguageModel, config: Config, task: TaskType) -> LanguageModel:
    settings = lora_settings(model, config, task, config.lora.modules_to_save if task == TaskType.CAUSAL_LM else ())
    with seeded(config.run.seed):
        return wrapped(model, settings, config.lora.target_modules)


def wrapped(model: LanguageModel, settings: PeftLoraConfig, named: Sequence[str] | None) -> LanguageModel:
    """The model with new adapters, in fp32 also on a bf16 base (peft's autocast_adapter_dtype).

    Raises `ConfigError` if it lacks layers that lora.target_modules has `named`.
    """
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules={named}: {first_line(error)}", key="lora.target_modules") from error


def stores_transposed(model: nn.Module) -> bool:
    """Whether its matrices are stored transposed, as GPT-2's are: `fan_in_fan_out` of `LoraConfig`."""
    return any(isinstance(layer, Conv1D) for layer in model.modules())


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch inside the context only: the first matrices of adapters are random and follow the run's seed."""
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
        fan_in_fan_out=stores_transposed(model),
    )
