"""Load models from folders, with transformers or peft. Knows no tokenizer, no rank and no run."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, logging

from rlhf_accel.config.schema import ModelConfig
from rlhf_accel.data.loading import adapter_config, pretrained
from rlhf_accel.system.errors import ConfigError, as_config_error, key_in

# A model of transformers, or one that peft wrapped; their types do not describe all that is used here.
LanguageModel = Any

_FLASH = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_export(
    folder: str,
    kind: Any = AutoModelForCausalLM,
    *,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    **settings: Any,
) -> tuple[LanguageModel, list[str]]:
    """Load the model in a folder with plain transformers, or an adapter with peft.

    Also returns the names of the tensors that the folder lacks, which transformers initializes. `settings` such as
    dtype are passed to `from_pretrained`, and its errors are passed on.
    """
    if torch.device(device).type != "cpu":
        settings = {"device_map": {"": device}, **settings}
    settings["trust_remote_code"] = trust_remote_code
    with without_loading_report():
        if (Path(folder) / "adapter_config.json").is_file():
            auto = AutoPeftModelForCausalLM if kind is AutoModelForCausalLM else AutoPeftModelForSequenceClassification
            adapter_config(folder)
            return pretrained(auto, folder, **settings).eval(), []
        model, report = pretrained(kind, folder, output_loading_info=True, **settings)
    return model.eval(), sorted(report["missing_keys"])


def load_pretrained(kind: Any, path: str, subject: str, *, trust_remote_code: bool, **settings: Any) -> Any:
    """`kind.from_pretrained(path)` for one of transformers' Auto classes, without its report of unused weights.

    Raises `ConfigError`, whose message starts with `subject`, if nothing can be loaded, or if the folder has no weights
    for the head, which would be random: transformers only warns.
    """
    settings |= {"trust_remote_code": trust_remote_code, "output_loading_info": True}
    with as_config_error(f"{subject}: no such model could be loaded", key=key_in(subject)), without_loading_report():
        model, report = pretrained(kind, path, subject=subject, **settings)
    missing = sorted(report["missing_keys"])
    if missing and kind is not AutoModel:  # a trunk may lack a pooler, which is not used
        raise ConfigError(
            f"{subject}: is not a {type(model).__name__}; {len(missing)} weights are missing ({missing[0]}, …)",
            key=key_in(subject),
        )
    return model


@contextlib.contextmanager
def without_loading_report() -> Iterator[None]:
    """Silence transformers' report of weights that are only in the folder or only in the model."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_model(
    kind: Any, config: ModelConfig, path: str, dtype: torch.dtype, key: str = "model.name_or_path", **settings: Any
) -> Any:
    settings |= {"dtype": dtype, "trust_remote_code": config.trust_remote_code, **attention_settings(config)}
    chosen = "" if config.attention == "auto" else f" with model.attention={config.attention}"
    model = load_pretrained(kind, path, f"{key}={path}{chosen}", **settings)
    return without_dropout(model).eval()


def attention_settings(config: ModelConfig) -> dict[str, str]:
    """Arguments of `from_pretrained` that choose model.attention."""
    return {} if config.attention == "auto" else {"attn_implementation": config.attention}


def check_attention(config: ModelConfig, device: torch.device) -> None:
    """Raises `ConfigError` where model.attention cannot work on the device, or lacks its library."""
    if config.attention in ("auto", "eager", "sdpa"):
        return
    named, available = f"model.attention={config.attention}", _FLASH.get(config.attention)
    if device.type != "cuda":
        raise ConfigError(f"{named} needs a CUDA GPU; set model.attention=sdpa here", key="model.attention")
    # transformers takes the kernels of the hub for a missing library, if it may.
    if available is not None and not available() and importlib.util.find_spec("kernels") is None:
        raise ConfigError(
            f"{named} needs the library flash-attn, which is not installed or not for this GPU; install it, or set "
            "model.attention=sdpa",
            key="model.attention",
        )


def trunk_of(model: Any) -> Any:
    """The transformer of a model of transformers, without its head."""
    # base_model_prefix of Llama 4 does not name the attribute that holds its trunk.
    return model.base_model if model.base_model is not model else model.model


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch dropout off: it would make the first ratio of an update differ from 1. The saved config is unchanged."""
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        for name, value in vars(layer).items():
            if "drop" in name and isinstance(value, float):
                setattr(layer, name, 0.0)
    return model
