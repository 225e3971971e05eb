"""Building the run as training would, with each part that cannot work left out and reported."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlhf_accel.commands.checks.findings import Findings
from rlhf_accel.config.loading import parse
from rlhf_accel.config.places import absolute
from rlhf_accel.config.rules import check_trainable
from rlhf_accel.config.schema import Config
from rlhf_accel.reward import TOKEN_VARIABLE, RewardFunction
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.training.run import check_folder
from rlhf_accel.training.setup import Setup, start

_MOST_ATTEMPTS = 20


def build(findings: Findings, config: Config) -> Setup | None:
    """The run, without what cannot work, each such part a problem; None if too much is wrong."""
    with_stand_in = False
    for _ in range(_MOST_ATTEMPTS):
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _set_up(config, stand_in if with_stand_in else None)
        except ConfigError as error:
            found = error
        except Exception as error:  # training would meet the same error of a library
            found = ConfigError(f"building the run raised {type(error).__name__}: {error}")
        reduced, check = _without(config, found)
        message = str(found)
        if found.facts.get("raised") == "IndexError" and config.reward.model:
            message += "; the tokenizer beside it may be another model's, with more ids than the model has embeddings"
        findings.note("problem", check, message)
        with_stand_in = with_stand_in or check == "reward"
        if reduced is None:
            return None
        config = reduced
    return None


def _set_up(config: Config, reward: RewardFunction | None) -> Setup:
    """The run as training would set it up, after the same checks. Raises `ConfigError`."""
    check_trainable(config)
    config = absolute(config)
    runtime = start(config)
    check_folder(config, runtime)
    return Setup.of(config, runtime, reward)


def stand_in(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
    """Replaces a reward that cannot be used, so that the other checks can run."""
    return [float(len(response)) for response in responses]


def in_a_free_folder(config: Config) -> Config:
    """The config of a new run, in a folder that does not exist and is not created."""
    free = str(Path(tempfile.gettempdir()) / f"doctor-{time.time_ns()}")
    return replace(config, run=replace(config.run, output_dir=free, resume=None))


def _without(config: Config, found: ConfigError) -> tuple[Config | None, str]:
    """The config without the cause of the error, None if the error concerns the model, and the name of the check."""
    reward, key = config.reward, found.key or ""
    if "positions" in found.facts:
        return _within(config, found.facts["positions"]), "context window"
    if key == "reward.partial_every" and reward.partial_every:
        return replace(config, reward=replace(reward, partial_every=0)), "partial scores"
    if key.startswith("reward.") or key == TOKEN_VARIABLE:
        # An overflow of a classifier shows when it is loaded, or when it is tried on prompts.
        if found.facts.get("dtype") == "float16" or (reward.dtype == "fp16" and "score" in found.facts):
            return replace(config, reward=replace(reward, dtype="fp32")), "reward in fp16"
        tree = asdict(config)
        tree["reward"] = {"clip": reward.clip, "missing_eos_penalty": reward.missing_eos_penalty}
        tree["model"]["critic_init"] = "policy"
        return parse(Config, tree), "reward"
    if key == "run.output_dir":
        return in_a_free_folder(config), "run folder"
    if key == "run.push_to_hub":
        return replace(config, run=replace(config.run, push_to_hub=None)), "hub"
    if key == "run.trackers" and config.run.trackers:
        return replace(config, run=replace(config.run, trackers=())), "trackers"
    if key == "lora.target_modules" and config.lora.target_modules:
        return replace(config, lora=replace(config.lora, target_modules=None)), "lora"
    return None, "model"


def _within(config: Config, positions: int) -> Config:
    """The config with prompts and responses that fit a model of so many positions."""
    new = max(positions // 4, 1)
    prompt = min(config.rollout.max_prompt_tokens, positions - new - 1)
    tree = asdict(config)
    tree["rollout"] |= {"max_new_tokens": new, "max_prompt_tokens": prompt, "min_new_tokens": 0}
    low, high = tree["data"]["prompt_tokens"] or (1, prompt)
    tree["data"]["prompt_tokens"] = (min(low, prompt), min(high, prompt))
    return parse(Config, tree)
