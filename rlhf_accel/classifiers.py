"""The sequence classifier that a reward model is: loaded with a head of the right size, adapted, and written whole.

Knows transformers and peft; knows no data and no rank.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from rlhf_accel import assets
from rlhf_accel.config import ConfigError, RewardTrainingConfig

Classifier = Any


def load_tokenizer(config: RewardTrainingConfig) -> Any:
    """The tokenizer of model.name_or_path, with a PAD; raises `ConfigError` if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(assets.resolve_model(config.model.name_or_path))
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise _no_model(config, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def known_labels(config: RewardTrainingConfig) -> tuple[str, ...]:
    """Names of the labels of model.name_or_path; transformers makes up two where it is no classifier."""
    try:
        found = transformers.AutoConfig.from_pretrained(assets.resolve_model(config.model.name_or_path)).id2label
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise _no_model(config, error) from error
    return tuple(found[i] for i in sorted(found))


def load(config: RewardTrainingConfig, tokenizer: Any, labels: Sequence[str]) -> Classifier:
    """The classifier that learns, in fp32, one output for each label, adapters where lora.r is above 0.

    A new head is drawn from torch's global random numbers. Raises `ConfigError` if there is no such model, or
    its layers have other names than lora.target_modules says.
    """
    model, new_layers = _load(config, tokenizer, labels)
    if config.lora.r == 0:
        return model
    # What lies outside the trunk, and what is new in it, learns in full: frozen, it would stay random.
    heads = (name for name, child in model.named_children() if child is not model.base_model)
    outside = [name for name in heads if any(True for _ in model.get_submodule(name).parameters())]
    targets = config.lora.target_modules
    settings = PeftLoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=targets[0] if targets == ("all-linear",) else (list(targets) if targets else None),
        modules_to_save=[*outside, *(name for name in new_layers if name.partition(".")[0] not in outside)],
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),  # GPT-2 keeps its matrices so
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules={targets}: {str(error).splitlines()[0]}") from error


def output_layer(model: Classifier) -> nn.Linear:
    """The linear layer that gives the scores: the last one outside the trunk, whatever other layers the head has."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    trunk = {id(layer) for layer in model.base_model.modules()}
    *_, last = (layer for layer in model.modules() if isinstance(layer, nn.Linear) and id(layer) not in trunk)
    return last


def finish(
    folder: Path, config: RewardTrainingConfig, tokenizer: Any, labels: Sequence[str], shift: float, scale: float
) -> None:
    """Make what the Trainer saved in `folder` a whole model whose scores are (score - shift) / scale.

    Adapters are added into the weights, shift and scale are folded into the output layer; one without a bias is scaled
    only. For one process.
    """
    if config.lora.r == 0 and (shift, scale) == (0.0, 1.0):
        return
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # ZeRO-3 would cut the model that is loaded here
    if config.lora.r:
        adapted = PeftModel.from_pretrained(_load(config, tokenizer, labels)[0], str(folder))
        model = adapted.merge_and_unload(safe_merge=True)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    head = output_layer(model)
    with torch.no_grad():
        head.weight.div_(scale)
        if head.bias is not None:
            head.bias.sub_(shift).div_(scale)
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load(config: RewardTrainingConfig, tokenizer: Any, labels: Sequence[str]) -> tuple[Classifier, list[str]]:
    """The model without adapters, and the names of its layers that no checkpoint gave."""
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            assets.resolve_model(config.model.name_or_path),
            dtype=torch.float32,
            num_labels=len(labels),
            problem_type="regression" if len(labels) == 1 else "single_label_classification",
            id2label=dict(enumerate(labels)),
            label2id={name: i for i, name in enumerate(labels)},
            # A classifier with more labels gets a new head.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise _no_model(config, error) from error
    model.config.pad_token_id = tokenizer.pad_token_id
    # One epoch over ratings does not overfit, and attention without dropout takes torch's fast path on a CPU.
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    absent = {*report["missing_keys"], *(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])}
    new_layers = sorted({key.rpartition(".")[0] for key in absent})
    head = output_layer(model)
    is_new = next(name for name, layer in model.named_modules() if layer is head) in new_layers
    if config.model.head_init == "ziegler" and len(labels) == 1 and is_new:
        nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1))
        if head.bias is not None:
            nn.init.zeros_(head.bias)
    return model, new_layers


def _no_model(config: RewardTrainingConfig, error: Exception) -> ConfigError:
    reason = str(error).strip().splitlines()[0]
    return ConfigError(
        f"model.name_or_path={config.model.name_or_path}: neither a folder with a model and its tokenizer nor one that "
        f"the hub or its cache gave ({reason})"
    )
