"""The policy of a run: loaded in its dtype, with its adapters. Knows transformers; knows no tokenizer and no rank."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

import torch
from peft import TaskType
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from rlhf_accel.config.schema import Config, ModelConfig
from rlhf_accel.data.loading import pretrained
from rlhf_accel.models import cpu_kernels as kernels
from rlhf_accel.models.loading import DTYPES, LanguageModel, attention_settings, check_attention, load_model
from rlhf_accel.models.lora import CRITIC, POLICY, adapter, continued_adapter, lora_settings, seeded, with_adapter
from rlhf_accel.models.vocabulary import with_fp32_logits
from rlhf_accel.system.arithmetic import computes_in_bf16
from rlhf_accel.system.errors import ConfigError


def load_policy(config: Config, path: str, device: torch.device) -> LanguageModel:
    """The causal language model at `path`, without dropout, with LoRA adapters if lora.r is above 0.

    Raises `ConfigError` if there is no such model, or if lora.target_modules or model.attention do not fit it.
    """
    check_attention(config.model, device)
    model = load_model(AutoModelForCausalLM, config.model, path, **_base_settings(config, device))
    for architecture in model.config.architectures or ():
        if (
            "Classification" in architecture
        ):  # with tied embeddings no weight is missing: it would load, and generate noise
            raise ConfigError(
                f"model.name_or_path={path}: holds a classifier ({architecture}), not a language model",
                key="model.name_or_path",
            )
    return fitted(model, config)


def fitted(model: LanguageModel, config: Config) -> LanguageModel:
    """Prepare a causal language model for a run: gradient checkpointing, fp32 logits, kernels and adapters."""
    model = with_checkpointing(model, config)
    with_fp32_logits(model)
    if config.run.fast_kernels:
        kernels.quicken(model.get_output_embeddings())
    if config.lora.r == 0:
        return model
    if config.lora.adapter is None:
        model = with_adapter(model, config, TaskType.CAUSAL_LM)
    else:
        model = continued_adapter(model, config, config.lora.adapter)
    if config.model.critic == "adapter":
        settings = lora_settings(model.get_base_model(), config, TaskType.CAUSAL_LM, modules_to_save=())
        with seeded(config.run.seed):
            model.add_adapter(CRITIC, settings)
        model.base_model.set_requires_grad([POLICY, CRITIC], True)
        # The backward pass recomputes activations, when another adapter may be active.
        with_checkpointing(
            model, config, context_fn=lambda: (contextlib.nullcontext(), adapter(model, model.active_adapter))
        )
    return model


def left_out(model: LanguageModel, config: ModelConfig, path: str) -> str | None:
    """A message about the parts of the checkpoint at `path` that were not loaded; None if it was loaded whole.

    Of a multimodal model, such as Llama 4 or Qwen 3.5, transformers loads the text part and does not report the rest.
    """
    whole = pretrained(AutoConfig, path, trust_remote_code=config.trust_remote_code)
    if whole.model_type == model.config.model_type:
        return None
    names = [name for name in whole.sub_configs if getattr(whole, name, None) is not None]
    other = sorted(name.removesuffix("_config") for name in names if name not in ("text_config", "decoder"))
    return (
        f"of the {whole.model_type} checkpoint only the text part ({model.config.model_type}) is loaded, trained and "
        f"exported; final/ and best/ are without: {', '.join(other) or 'the rest'}"
    )


def loading_settings(config: Config, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that load an export of this run as the policy was loaded."""
    attention = attention_settings(config.model)
    return {**_base_settings(config, device), **attention, "trust_remote_code": config.model.trust_remote_code}


def _base_settings(config: Config, device: torch.device) -> dict[str, Any]:
    dtype = resolve_dtype(config, device)
    return {"dtype": dtype, **(_four_bits(device, dtype) if config.model.load_in_4bit else {})}


def resolve_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of model.dtype; `auto` is bf16 for a frozen LoRA base on a device with bf16 units, else fp32."""
    if config.model.dtype != "auto":
        return DTYPES[config.model.dtype]
    frozen = config.lora.r > 0 and not config.lora.modules_to_save
    return torch.bfloat16 if frozen and computes_in_bf16(device) else torch.float32


def end_of_text_ids(model: LanguageModel) -> list[int]:
    """Ids of the tokens that end a text, from the model's generation config; chat models often have several."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]


def with_checkpointing(model: LanguageModel, config: Config, **settings: Any) -> LanguageModel:
    """The model, with gradient checkpointing if model.gradient_checkpointing asks for it; raises `ConfigError` if its
    family has none."""
    if config.model.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(
                f"model.gradient_checkpointing=true: transformers has no checkpointing for {model.config.model_type}; "
                "set it to false, and lower ppo.micro_batch_tokens if memory is short",
                key="model.gradient_checkpointing",
            )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **settings})
        if config.lora.r:
            model.enable_input_require_grads()
    return model


def _four_bits(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a base in 4 bits on `device` that computes in `dtype`."""
    if device.type != "cuda":
        raise ConfigError("model.load_in_4bit=true needs a CUDA GPU; remove it here", key="model.load_in_4bit")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.load_in_4bit=true needs bitsandbytes; pip install 'rlhf_accel[qlora]'", key="model.load_in_4bit"
        )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": quantization, "device_map": {"": device}}
