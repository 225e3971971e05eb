"""The classifier behind a reward model: load it with a head of the right size, adapt it, write it as a whole model.

Knows transformers and peft. Knows no data and no rank.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, TaskType
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_accel.config.reward_schema import RewardTrainingConfig
from rlhf_accel.data import wheels
from rlhf_accel.data.loading import adapted, pretrained
from rlhf_accel.data.reward_texts import Unmerged
from rlhf_accel.models import lora
from rlhf_accel.models.unmerged import fingerprints
from rlhf_accel.system.errors import ConfigError, as_config_error, key_in
from rlhf_accel.system.files import replace_folder, work_folder

Classifier = Any
_POSITION_TABLES = ("position_embeddings", "embed_positions", "positions_embed", "wpe")  # as families name them


def load_tokenizer(path: str, subject: str, *, trust_remote_code: bool) -> Any:
    """The tokenizer of the classifier at `path`, with a PAD; code that comes with it runs only if `trust_remote_code`.

    Raises `ConfigError`, whose message starts with `subject`, if there is none."""
    here = "" if os.path.exists(path) else "there is no such folder here, and "
    message = f"{subject}: {here}no tokenizer could be loaded; save one beside the model"
    with as_config_error(message, key=key_in(subject)):
        tokenizer = pretrained(AutoTokenizer, path, trust_remote_code=trust_remote_code, subject=subject)
        # For a folder with a model and no tokenizer, transformers may return a tokenizer of special tokens only.
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise ValueError("its vocabulary is empty")
    if tokenizer.pad_token_id is None:
        # Decoder classifiers find a text's last token by the model's own pad id.
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"{subject}: its tokenizer has neither a PAD nor an EOS token; give it a PAD and save it again",
                key=key_in(subject),
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def known_labels(config: RewardTrainingConfig) -> tuple[str, ...]:
    """Names of the labels of model.name_or_path; transformers invents two if it is not a classifier.

    Raises `ConfigError` if there is no such model.
    """
    path = wheels.resolve_model(config.model.name_or_path)
    with _loading(config):
        trusted, subject = config.model.trust_remote_code, f"model.name_or_path={config.model.name_or_path}"
        found = pretrained(transformers.AutoConfig, path, trust_remote_code=trusted, subject=subject).id2label
    return tuple(found[i] for i in sorted(found))


def settle_padding(model: Classifier, tokenizer: Any) -> None:
    """Make model and tokenizer use the same padding token and the padding side that does not change a text's score.

    This overrides their files. Absolute positions count from the left, so padding goes to the right.
    """
    for part in _configs(model.config):
        part.pad_token_id = tokenizer.pad_token_id
    # XLNet's head reads the last position, even if it is padding; its positions are relative.
    tokenizer.padding_side = "left" if getattr(model.config, "summary_type", None) == "last" else "right"


def most_tokens(model: Classifier, tokenizer: Any) -> int:
    """The longest text that the model can read, in tokens, special tokens included."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))
    if not isinstance(positions, int) or positions <= 0:  # relative positions have no limit; XLNet has -1
        return int(tokenizer.model_max_length)
    return int(min(tokenizer.model_max_length, positions - _first_position(model)))


def has_position_table(model: Classifier) -> bool:
    """Whether positions come from a table of fixed size; rotary and relative positions are computed."""
    return any(name.rpartition(".")[2] in _POSITION_TABLES for name, _ in model.named_modules())


def _first_position(model: Classifier) -> int:
    """The position of a text's first token.

    RoBERTa and models derived from it (XLM-R, CamemBERT, MPNet, Longformer, ESM, …) count from the padding id; their
    position table has a padding row.
    """
    tables = (layer for name, layer in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((layer.padding_idx for layer in tables if hasattr(layer, "padding_idx")), None)
    return 0 if padding is None else padding + 1


def stored_dtype(path: str) -> torch.dtype | None:
    """The dtype of the weights stored at `path` according to config.json; None if it names none."""
    try:
        tree = transformers.PreTrainedConfig.get_config_dict(path)[0]
    except Exception:  # the error is reported when the model is loaded
        return None
    if not isinstance(tree, dict):
        return None
    inner = tree.get("text_config")
    for part in (tree, inner if isinstance(inner, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            found = getattr(torch, str(part.get(key)), None)
            if isinstance(found, torch.dtype):
                return found
    return None


def _configs(config: Any) -> list[Any]:
    """The config and its sub-configs that have a padding id: Gemma 3 reads it from its text_config."""
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, config.get_text_config(), *(part for part in inner if hasattr(part, "pad_token_id"))]


def load(config: RewardTrainingConfig, tokenizer: Any, labels: Sequence[str]) -> Classifier:
    """The classifier to train, in fp32, with one output per label, and with LoRA adapters if lora.r is above 0.

    A new head is initialized from torch's global random state. Raises `ConfigError` if there is no such model, or if
    lora.target_modules names layers that it does not have.
    """
    model, new_layers = _load(config, tokenizer, labels)
    if config.lora.r == 0:
        return model
    # Layers outside the trunk and new layers are trained in full: frozen, they would stay random.
    heads = (name for name, child in model.named_children() if child is not model.base_model)
    outside = [name for name in heads if any(True for _ in model.get_submodule(name).parameters())]
    targets = config.lora.target_modules
    settings = PeftLoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=lora.targets(model, targets),
        modules_to_save=[*outside, *(name for name in new_layers if name.partition(".")[0] not in outside)],
        fan_in_fan_out=lora.stores_transposed(model),
    )
    return lora.wrapped(model, settings, targets)


def output_layer(model: Classifier) -> nn.Linear:
    """The linear layer that outputs the scores: the last one outside the trunk."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    trunk = {id(layer) for layer in model.base_model.modules()}
    *_, last = (layer for layer in model.modules() if isinstance(layer, nn.Linear) and id(layer) not in trunk)
    return last


def finish(
    folder: Path, config: RewardTrainingConfig, tokenizer: Any, labels: Sequence[str], shift: float, scale: float
) -> Unmerged | None:
    """Turn what the Trainer saved in `folder` into a model whose scores are (score - shift) / scale.

    Adapters are merged into the weights, unless lora.merge=false: then the result is an adapter with its head, and what
    the record has to hold of its base is returned. Shift and scale are folded into the output layer; a layer without a
    bias is only scaled. Called by one process.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # else ZeRO-3 would partition the model that is loaded here
    if config.lora.r == 0 and (shift, scale) == (0.0, 1.0):
        return None
    if config.lora.r:
        model = adapted(_load(config, tokenizer, labels)[0], str(folder))
        model = model.merge_and_unload(safe_merge=True) if config.lora.merge else model
    else:
        trusted = config.model.trust_remote_code
        model = pretrained(AutoModelForSequenceClassification, folder, trust_remote_code=trusted, dtype=torch.float32)
    head = output_layer(model)
    with torch.no_grad():
        head.weight.div_(scale)
        if head.bias is not None:
            head.bias.sub_(shift).div_(scale)
    with work_folder(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        replace_folder(beside, folder)
    if config.lora.merge:
        return None
    return Unmerged(base=_base_name(config), weights=fingerprints(model.get_base_model()), labels=list(labels))


def _base_name(config: RewardTrainingConfig) -> str:
    """model.name_or_path, absolute if it is a folder: the files of an adapter name it."""
    name = config.model.name_or_path
    return os.path.abspath(name) if os.path.isdir(name) else name


def _load(config: RewardTrainingConfig, tokenizer: Any, labels: Sequence[str]) -> tuple[Classifier, list[str]]:
    """The model without adapters, and the names of its layers that the checkpoint lacks."""
    path = wheels.resolve_model(_base_name(config))
    with _loading(config):
        model, report = pretrained(
            AutoModelForSequenceClassification,
            path,
            trust_remote_code=config.model.trust_remote_code,
            dtype=torch.float32,
            num_labels=len(labels),
            problem_type="regression" if len(labels) == 1 else "single_label_classification",
            id2label=dict(enumerate(labels)),
            label2id={name: i for i, name in enumerate(labels)},
            # A classifier with another number of labels gets a new head.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    settle_padding(model, tokenizer)
    # One epoch over ratings does not overfit, and attention without dropout uses torch's fast path on a CPU.
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


def _loading(config: RewardTrainingConfig) -> AbstractContextManager[None]:
    neither = "neither a folder with a model and its tokenizer nor a model that the hub or its cache has"
    return as_config_error(f"model.name_or_path={config.model.name_or_path}: {neither}", key="model.name_or_path")
