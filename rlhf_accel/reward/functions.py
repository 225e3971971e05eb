"""Python functions as rewards: imported by their path, and the one that comes with this package.

Knows import paths; knows no call and no score.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_accel.config.trust import is_ours
from rlhf_accel.reward.borrowed import restored_globals
from rlhf_accel.reward.calls import RewardFunction, describe
from rlhf_accel.system.errors import ConfigError


def import_function(target: str, key: str = "reward.function", folder: str | None = None) -> RewardFunction:
    """The callable at `package.module:callable`; `folder`, or else the working folder, is on the path, as for
    `python -m`.

    Raises `ConfigError` naming `key`, the config key of the target, if it cannot be imported or called.
    """
    place = folder or str(Path.cwd())
    module_name, colon, name = target.partition(":")
    if not colon or not module_name or not name:
        raise ConfigError(f"{key}={target}: expected package.module:callable", key=key)
    if not is_ours(target) and place not in sys.path:
        sys.path.insert(0, place)
    try:
        with restored_globals(f"{key}={target}: importing {module_name}"):
            module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may do anything when it is imported, such as end the process
        reason = " ".join(describe(error).split())
        raise ConfigError(
            f"{key}={target}: {module_name} cannot be imported ({reason}) from {place} or PYTHONPATH", key=key
        ) from error
    if not hasattr(module, name):
        raise ConfigError(f"{key}={target}: the module {module_name} has no {name}", key=key)
    function: RewardFunction = getattr(module, name)
    if not callable(function):
        raise ConfigError(f"{key}={target}: {name} is not callable", key=key)
    return function


def vader(prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """The sentiment of prompt + response in [-1, 1] by a lexicon: the compound score of VADER (Hutto and Gilbert 2014).

    Raises `ModuleNotFoundError` if the package vaderSentiment is not installed.
    """
    analyzer = _vader_analyzer()
    return [analyzer.polarity_scores(p + r)["compound"] for p, r in zip(prompts, responses, strict=True)]


@functools.cache
def _vader_analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; pip install vaderSentiment, or leave it out with --reward.gold '[]'"
        ) from error
    return SentimentIntensityAnalyzer()
