"""Rewards from a config: its classifier, its server, its functions and the gold rewards.

Knows the keys of the section `reward`; knows no call and no score.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rlhf_accel.config.rules import gold_name
from rlhf_accel.config.schema import RewardConfig
from rlhf_accel.data import wheels
from rlhf_accel.reward.calls import RewardFunction
from rlhf_accel.reward.classifier import Classifier, SharedBase
from rlhf_accel.reward.functions import import_function
from rlhf_accel.reward.server import RemoteReward
from rlhf_accel.reward.weighted import Reward
from rlhf_accel.system.arithmetic import has_gpu
from rlhf_accel.system.errors import ConfigError


def load_reward(
    config: RewardConfig,
    path: str | None,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
    sample_tokens: tuple[int, int] | None = None,
    shared: SharedBase | None = None,
    conversations: bool = False,
) -> Reward:
    """The reward that the config describes; `path` is the folder or hub id of reward.model.

    Code that comes with the model runs only if `trust_remote_code`, the value of model.trust_remote_code.
    `sample_tokens`, `shared` and `conversations` are for `Classifier`. Raises `ConfigError` if a part cannot be loaded,
    or no reward is configured.
    """
    names: list[str] = []
    functions: list[RewardFunction] = []
    if config.model is not None and path is not None:
        names.append(f"reward.model={config.model}")
        trusted = trust_remote_code
        functions.append(
            Classifier(
                config,
                path,
                device,
                trust_remote_code=trusted,
                sample_tokens=sample_tokens,
                shared=shared,
                conversations=conversations,
            )
        )
    if config.url is not None:
        names.append(f"reward.url={config.url}")
        functions.append(RemoteReward(config.url, config.timeout))
    for target in config.function:
        names.append(f"reward.function={target}")
        functions.append(import_function(target, folder=config.import_from))
    if not functions:
        raise ConfigError(
            "no reward is given; set reward.model, reward.url or reward.function, or pass PPOTrainer(reward=…)",
            key="reward.model",
        )
    weights = config.weights or (1.0,) * len(functions)
    return reward_of(config, tuple(zip(names, weights, functions, strict=True)))


def load_reward_here(config: RewardConfig, *, trust_remote_code: bool = False, conversations: bool = False) -> Reward:
    """The config's reward in a command of one process, on a GPU if there is one. Raises as `load_reward`."""
    path = None if config.model is None else wheels.resolve_model(config.model, "reward.model")
    device = torch.device("cuda" if has_gpu() else "cpu")
    return load_reward(config, path, device, trust_remote_code=trust_remote_code, conversations=conversations)


def reward_of(config: RewardConfig, terms: tuple[tuple[str, float, RewardFunction], ...]) -> Reward:
    """The sum of these terms, with the config's clip, retries and timeout."""
    return Reward(
        terms=terms, clip=config.clip, retries=config.retries, retry_wait=config.retry_wait, timeout=config.timeout
    )


def load_golds(config: RewardConfig) -> dict[str, Reward]:
    """The rewards of reward.gold by the names of their metrics, with retries but without clip.

    Raises `ConfigError` if one cannot be imported.
    """
    golds = {}
    for target in config.gold:
        terms = ((f"reward.gold={target}", 1.0, import_function(target, "reward.gold", config.import_from)),)
        golds[gold_name(target)] = replace(reward_of(config, terms), clip=None)
    return golds
