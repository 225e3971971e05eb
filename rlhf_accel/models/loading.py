"""Models from folders, by transformers or peft. Knows no tokenizer, no rank and no run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging

from rlhf_accel.config.schema import ModelConfig
from rlhf_accel.data.loading import adapter_config, pretrained
from rlhf_accel.system.errors import ConfigError, key_in

# A model of transformers, or one that peft wrapped: an nn.Module with more methods than types can tell.
LanguageModel = Any


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_export(
    folder: str,
    kind: Any = AutoModelForCausalLM,
    *,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    **settings: Any,
) -> tuple[LanguageModel, list[str]]:
    """The model in a folder as plain transformers, or peft for an adapter, load it, and the names of the tensors that
    the folder lacks, in whose place transformers put new ones. `settings` such as dtype go to `from_pretrained`; what
    it raises is raised.
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


def load_pretrained(kind: Any, path: str, said: str, *, trust_remote_code: bool, **settings: Any) -> Any:
    """`kind.from_pretrained(path)`, for one of transformers' Auto classes, without its report of unused weights.

    Raises `ConfigError`, which begins with `said`, when nothing can be loaded, or when a head would be random because
    the folder holds none, of which transformers only warns.
    """
    settings |= {"trust_remote_code": trust_remote_code, "output_loading_info": True}
    try:
        with without_loading_report():
            model, report = pretrained(kind, path, said=said, **settings)
    except ConfigError:
        raise
    except Exception as error:  # a missing, broken or foreign file raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{said}: no such model could be loaded ({reason})", key=key_in(said)) from error
    missing = sorted(report["missing_keys"])
    if missing and kind is not AutoModel:  # a trunk may lack a pooler, which nobody reads
        raise ConfigError(
            f"{said}: is no {type(model).__name__}; {len(missing)} weights are missing ({missing[0]}, …)",
            key=key_in(said),
        )
    return model


@contextlib.contextmanager
def without_loading_report() -> Iterator[None]:
    """Without transformers' report of weights that a folder holds and a model lacks, or the other way round."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_model(
    kind: Any, config: ModelConfig, path: str, dtype: torch.dtype, key: str = "model.name_or_path", **settings: Any
) -> Any:
    settings |= {"dtype": dtype, "trust_remote_code": config.trust_remote_code}
    model = load_pretrained(kind, path, f"{key}={path}", **settings)
    return without_dropout(model).eval()


def without_dropout(model: nn.Module) -> nn.Module:
    """Dropout would make the first ratio of an update differ from 1. The saved config keeps its own figures."""
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        for name, value in vars(layer).items():
            if "drop" in name and isinstance(value, float):
                setattr(layer, name, 0.0)
    return model
