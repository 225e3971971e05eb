"""Reward models that are an adapter and a head: merged into a base of their own, or put on the policy's base.

Knows peft, transformers and the record that reward training leaves beside them. Knows no text and no rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import TaskType, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhf_accel.data import reward_texts, wheels
from rlhf_accel.data.loading import adapted, adapter_config, from_config, pretrained
from rlhf_accel.data.reward_texts import Rounded, Unmerged
from rlhf_accel.models.loading import DTYPES, LanguageModel, load_pretrained, trunk_of, without_loading_report
from rlhf_accel.models.lora import REWARD, adapter, seeded
from rlhf_accel.system.errors import ConfigError, as_config_error, first_line, key_in

_SAMPLED = 256  # values of each tensor that a fingerprint reads
_PREFIX = "base_model.model."  # of all names in a file of peft


def fingerprints(model: LanguageModel) -> dict[Rounded, str]:
    """A hash of the trunk's weights without adapters, rounded to bf16 and to fp16, by the name of the dtype.

    It covers the name and the shape of each tensor, and 256 values of it, evenly spaced. A base that is loaded in fp32
    or in one of the two dtypes has the same hash of that dtype.
    """
    digests: dict[Rounded, Any] = {"bf16": hashlib.sha256(), "fp16": hashlib.sha256()}
    for name, weight in trunk_of(model).named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(len(flat) // _SAMPLED, 1)][:_SAMPLED].cpu()
        for dtype, digest in digests.items():
            digest.update(f"{plain} {tuple(weight.shape)}".encode())
            digest.update(sample.to(DTYPES[dtype]).view(torch.int16).numpy().tobytes())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def load_classifier(path: str, setting: str, *, trust_remote_code: bool, dtype: torch.dtype) -> Any:
    """The sequence classifier at `path`, a model of its own; an adapter and a head are merged into their base, in fp32.

    Raises `ConfigError`, which begins with `setting`, if it cannot be loaded.
    """
    record = reward_texts.read(path, setting)
    if record is None or record.unmerged is None:
        kind = AutoModelForSequenceClassification
        return load_pretrained(kind, path, setting, trust_remote_code=trust_remote_code, dtype=dtype)
    with (
        _loading_base(setting, record.unmerged),
        without_loading_report(),
        seeded(0),
    ):  # the new head is random, then filled
        base = pretrained(
            AutoModelForSequenceClassification,
            _base_path(record.unmerged, setting),
            trust_remote_code=trust_remote_code,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            **_outputs(record.unmerged),
        )
        return adapted(base, path).merge_and_unload(safe_merge=True).to(dtype)


def classifier_config(path: str, setting: str, *, trust_remote_code: bool) -> Any:
    """The config of transformers of the classifier at `path`; raises as `load_classifier`."""
    record = reward_texts.read(path, setting)
    if record is None or record.unmerged is None:
        return pretrained(AutoConfig, path, trust_remote_code=trust_remote_code, subject=setting)
    with _loading_base(setting, record.unmerged):
        base = _base_path(record.unmerged, setting)
        return pretrained(AutoConfig, base, trust_remote_code=trust_remote_code, **_outputs(record.unmerged))


def require_unmerged(path: str, setting: str) -> Unmerged:
    """The record of the adapter and head at `path`; raises `ConfigError` if it holds something else."""
    if not os.path.isdir(path):
        raise ConfigError(
            f"{setting}: no such folder; with reward.on_policy_base=true it is a folder that train-reward wrote",
            key="reward.model",
        )
    record = reward_texts.read(path, setting)
    if record is None or record.unmerged is None:
        raise ConfigError(
            f"reward.on_policy_base=true: {setting} is not an adapter that train-reward wrote; train it over the "
            "policy's base with lora.merge=false, or remove reward.on_policy_base",
            key="reward.on_policy_base",
        )
    return record.unmerged


def put_on_base(
    policy: LanguageModel, path: str, setting: str, device: torch.device, *, trust_remote_code: bool
) -> Any:
    """Add the adapter at `path` to the policy, frozen and inactive, and return its classifier.

    The classifier has the head, on the device in the base's dtype. Its trunk has shapes but no memory; `on_base` puts
    the policy's in its place. Raises `ConfigError` if the adapter was trained over other weights than the policy's.
    """
    record = require_unmerged(path, setting)
    whole = policy.get_base_model()
    settings = classifier_config(path, setting, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        classifier = from_config(
            AutoModelForSequenceClassification, settings, trust_remote_code=trust_remote_code, dtype=whole.dtype
        )
    named: Rounded = "fp16" if whole.dtype == torch.float16 else "bf16"
    same_kind = type(trunk_of(classifier)) is type(trunk_of(whole))
    if not same_kind or record.weights.get(named) != fingerprints(whole)[named]:
        raise ConfigError(
            f"reward.on_policy_base=true: {setting} was trained over {record.base}, whose weights are not those of the "
            f"policy's base, {whole.name_or_path}; train it over the policy's base, or remove reward.on_policy_base",
            key="reward.on_policy_base",
        )
    try:
        weights = load_peft_weights(path, device="cpu")
        head = {name: weights.pop(name) for name in list(weights) if ".lora_" not in name}
        _add(policy, adapter_config(path, setting), weights)
        tensors = {name.removeprefix(_PREFIX): tensor.to(device, whole.dtype) for name, tensor in head.items()}
        trunk = _trunk_name(classifier)
        expected = {name for name in classifier.state_dict() if name.partition(".")[0] != trunk}
        if tensors.keys() != expected:
            raise ValueError(f"its head has {sorted(tensors)}, expected {sorted(expected)}")
        classifier.load_state_dict(tensors, strict=False, assign=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(
            f"{setting}: its adapter cannot be put on the policy's base ({first_line(error)}); restore the files of "
            "the training, or remove reward.on_policy_base",
            key="reward.model",
        ) from error
    return classifier.eval().requires_grad_(False)


@contextlib.contextmanager
def on_base(classifier: Any, policy: LanguageModel) -> Iterator[Any]:
    """The classifier on the policy's base with the adapter `REWARD`, inside the context only, also after an exception.

    Afterwards it keeps no part of the policy, which may be a copy that is freed.
    """
    name = _trunk_name(classifier)
    shapes = getattr(classifier, name)
    with adapter(policy, REWARD):
        setattr(classifier, name, trunk_of(policy.get_base_model()))
        try:
            yield classifier
        finally:
            setattr(classifier, name, shapes)


def shared_bytes(path: str) -> int:
    """Memory of the adapter and the head at `path` on the policy's base: fp32, as peft keeps adapters."""
    return sum(4 * tensor.numel() for tensor in load_peft_weights(path, device="cpu").values())


def _add(policy: LanguageModel, settings: PeftLoraConfig, weights: dict[str, Tensor]) -> None:
    """Add the adapter as `REWARD`, frozen; all other parameters stay trainable or frozen as they were."""
    trainable = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    plain = replace(settings, task_type=TaskType.CAUSAL_LM, modules_to_save=None, lora_dropout=0.0, inference_mode=True)
    with seeded(0):  # its random matrices are filled
        policy.add_adapter(REWARD, plain)
    unexpected = set_peft_model_state_dict(policy, weights, adapter_name=REWARD).unexpected_keys
    added = sum(REWARD in name.split(".") for name, _ in policy.named_parameters())
    if unexpected or added != len(weights):
        raise ValueError(f"it has {len(weights)} tensors, of which {added} have a place")
    for name, parameter in policy.named_parameters():
        if REWARD in name.split("."):
            parameter.requires_grad_(False)
    for parameter, was_trainable in trainable:
        parameter.requires_grad_(was_trainable)


def _base_path(unmerged: Unmerged, setting: str) -> str:
    try:
        return wheels.resolve_model(unmerged.base, key_in(setting))
    except ConfigError as error:
        raise ConfigError(
            f"{setting} is an adapter over {unmerged.base}, which is not there ({first_line(error)}); put it back, or "
            f"name its new place in {reward_texts.FILE} and adapter_config.json",
            key=key_in(setting),
        ) from error


def _outputs(unmerged: Unmerged) -> dict[str, Any]:
    names = unmerged.labels
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def _trunk_name(classifier: nn.Module) -> str:
    trunk = trunk_of(classifier)
    return next(name for name, child in classifier.named_children() if child is trunk)


def _loading_base(setting: str, unmerged: Unmerged) -> contextlib.AbstractContextManager[None]:
    message = f"{setting}: is an adapter, and its base {unmerged.base} could not be loaded"
    return as_config_error(message, key=key_in(setting))
