"""Checks that need the config alone: whether it can be read, batch sizes, learning rate, sampling distribution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_accel.commands.checks.findings import Findings, Verdict
from rlhf_accel.config.distribution import truncated
from rlhf_accel.config.loading import parse, read_tree
from rlhf_accel.config.schema import BatchSizes, Config
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.terminal import counted

_MOST_ERRORS = 20  # in one config; the doctor gives up after so many
# Peak learning rates of AdamW that published runs stay within: full fine-tuning 1e-6 to 1.4e-5 (Huang et al. 2024;
# Ziegler et al. 2019), LoRA 1e-5 to 1e-3 (Hu et al. 2021), with some room on both sides.
_PLAUSIBLE = {False: (1e-7, 1e-4), True: (1e-6, 3e-3)}


def read(findings: Findings, source: str | Path, overrides: Sequence[str] = ()) -> Config | None:
    """The config; keys that are wrong are reset to their defaults, and each of them is a problem.

    None if the config cannot be used at all.
    """
    try:
        tree = read_tree(Config, source, overrides)
    except ConfigError as error:
        findings.note("problem", "config", str(error))
        return None
    for _ in range(_MOST_ERRORS):
        try:
            config = parse(Config, tree)
        except ConfigError as error:
            key = _drop(tree, error)
            findings.note("problem", "config", str(error) + (f" (continuing with the default of {key})" if key else ""))
            if key is None:
                return None
        else:
            if findings.healthy:
                findings.note("ok", "config", f"{source} is valid, and its keys agree")
            return config
    return None


def _drop(tree: dict[str, Any], error: ConfigError) -> str | None:
    """Remove the first key of the error that is set in the tree; the name of this key."""
    keys: list[str | None] = [error.key, *error.facts.get("others", ())]
    for key in filter(None, keys):
        *sections, name = key.split(".")
        place: Any = tree
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if isinstance(place, dict) and name in place:
            del place[name]
            return key
    return None


def check_config(findings: Findings, config: Config, processes: int) -> None:
    findings.check("batch sizes", _check_sizes, config, processes)
    findings.check("learning rate", _check_rate, config)
    message = truncated(config.rollout)
    if message is not None:
        findings.note(
            "warning",
            "sampling",
            f"{message}; this concerns the penalty, ppo.kl_target and evaluations, so do not truncate",
        )


def _check_sizes(config: Config, processes: int) -> Verdict:
    sizes, parts = BatchSizes.of(config), config.ppo.num_minibatches
    size, minibatch = sizes.rollout, sizes.minibatch
    each = f" x rollout.samples_per_prompt={size // sizes.prompts}" if size > sizes.prompts else ""
    made_of = f"rollout.batch_size={sizes.prompts}{each} / ppo.num_minibatches={parts}"
    if minibatch < processes:
        return "warning", (
            f"{made_of} gives {counted(minibatch, 'sample')} for {processes} processes, so "
            f"{processes - minibatch} of them have nothing to train on; raise rollout.batch_size"
        )
    if minibatch % processes:
        return "warning", (
            f"a minibatch of {minibatch} ({made_of}) is uneven over "
            f"{processes} processes: nothing is lost, but some wait; a multiple of {processes} is faster"
        )
    minibatches, samples = counted(parts, "minibatch", "minibatches"), counted(minibatch // processes, "sample")
    return "ok", f"{counted(size, 'response')} per step in {minibatches}, {samples} per process"


def _check_rate(config: Config) -> Verdict:
    low, high = _PLAUSIBLE[config.lora.r > 0]
    kind = "LoRA" if config.lora.r else "full fine-tuning"
    rate = config.optim.lr
    if low <= rate <= high:
        return "ok", f"optim.lr={rate:g} is usual for {kind}"
    where = "above" if rate > high else "below"
    return "warning", f"optim.lr={rate:g} is {where} the usual range for {kind} ({low:g} to {high:g}); change it"
