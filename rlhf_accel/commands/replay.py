"""Repeat the computation that stopped a run: the reward on the texts on which it failed, or the model on the samples of
a dump."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from rlhf_accel.algorithm.batches import Experience, Sequences
from rlhf_accel.config.places import absolute
from rlhf_accel.config.schema import RewardConfig
from rlhf_accel.config.trust import require_trust
from rlhf_accel.models.calls import model_inputs
from rlhf_accel.models.loading import DTYPES
from rlhf_accel.reward import RewardError, load_reward_here
from rlhf_accel.runs.dumps import Dump, read_dump
from rlhf_accel.runs.progress_line import plain
from rlhf_accel.system.arithmetic import has_gpu
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.system.process import quiet_libraries, tune_process
from rlhf_accel.system.terminal import Terminal
from rlhf_accel.training.losses import loss_of
from rlhf_accel.training.setup import Setup, start

SHOWN = 20


def main(options: argparse.Namespace) -> None:
    """Raises `ConfigError` for a folder that is not a dump, or for a run that cannot be set up here."""
    dump = read_dump(options.dump)
    of_model = bool(dump.experience) and dump.facts["phase"] != "score"
    keys = () if of_model else ("reward.function", "reward.url")
    require_trust(dump.config, options.dump, options.trust_code, (*keys, "model.trust_remote_code"))
    console = Terminal(soft_wrap=True, emoji=False)
    console.print(f"message of the run: {dump.facts['message']}", highlight=False, markup=False)
    if "traceback" in dump.facts:
        console.print(dump.facts["traceback"], highlight=False, markup=False)
    dump, where = with_arithmetic_of_the_run(dump)
    console.print(f"computing each sample by itself, {where}", highlight=False)
    tune_process(dump.config.run.matmul_precision)
    quiet_libraries()
    try:
        found = replay_model(dump, options.dump) if of_model else replay_reward(dump)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, (ConfigError, RewardError, RunFailed)):
            raise
        raise ConfigError(
            f"{options.dump}: its tensors do not fit this run ({type(error).__name__}: {error})"
        ) from error
    _show(console, found)


def with_arithmetic_of_the_run(dump: Dump) -> tuple[Dump, str]:
    """The dump with the precision and dtypes that the run chose for `auto`, and a description of the device and dtypes.

    A run on a CPU is replayed on a CPU, whatever this machine has. Dumps of old versions do not name the device.
    """
    recorded = dump.facts.get("arithmetic", {})
    config = dump.config
    allowed = {"precision": ("fp32", "bf16"), "model_dtype": tuple(DTYPES), "reward_dtype": tuple(DTYPES)}
    found = {key: recorded[key] for key, known in allowed.items() if recorded.get(key) in known}
    config = replace(
        config,
        run=replace(config.run, precision=found.get("precision", config.run.precision)),
        model=replace(config.model, dtype=found.get("model_dtype", config.model.dtype)),
        # Texts are scored without a policy, so by a classifier of its own, in the dtype of the run.
        reward=replace(config.reward, dtype=found.get("reward_dtype", config.reward.dtype), on_policy_base=False),
    )
    if recorded.get("device") == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    here = "cuda" if has_gpu() else "cpu"
    where = (
        f"on {here} in {', '.join(f'{key} {value}' for key, value in found.items()) or 'the precision of the config'}"
    )
    differs = recorded.get("device") not in (None, here)
    return replace(dump, config=config), where + (f" (the run was on {recorded['device']})" if differs else "")


def replay_reward(dump: Dump) -> list[dict[str, Any]]:
    """Score each text by itself: a row for each with the score, or with the error that the reward raised."""
    config, facts, trusted = dump.config.reward, dump.facts, dump.config.model.trust_remote_code
    reward = replace(load_reward_here(config, trust_remote_code=trusted), retries=0)
    rows = []
    for i, (prompt, response) in enumerate(zip(facts["prompts"], facts["responses"], strict=True)):
        columns = {name: [column[i]] for name, column in facts.get("columns", {}).items()}
        try:
            score, message = float(reward([prompt], [response], columns)[0]), ""
        except RewardError as error:
            score, message = math.nan, str(error).partition(" raised ")[2] or str(error)
        rows.append({"sample": i, "prompt": prompt, "response": response, "score": score, "raised": message})
    return rows


def replay_model(dump: Dump, folder: Path) -> list[dict[str, Any]]:
    """The model's output for each sample by itself, in one process: log-probability and values if these were at fault,
    else loss and gradient."""
    model = replace(dump.config.model, critic_init="policy")  # its weights are in the dump
    config = absolute(replace(dump.config, reward=RewardConfig(), model=model))
    runtime = start(config, training=False)
    Setup.of(config, runtime, lambda prompts, responses, **columns: [0.0] * len(prompts))
    module = runtime.plain_module
    module.load_state_dict(dump.weights, strict=False)
    experience = experience_of(dump)
    trainable = [p for p in module.parameters() if p.requires_grad]
    rows = []
    for row in dump.facts["rows"]:
        part = experience.select(torch.tensor([row]))
        if dump.facts["phase"] == "rollout":
            with torch.no_grad(), runtime.autocast():
                output = module(*model_inputs(part.sequences.to(runtime.device)))
            figures = {"log-probability": float(output.logprobs.sum())}
            if output.values is not None:
                figures["values"] = float(output.values.sum())
        else:
            module.zero_grad()
            with runtime.autocast():
                loss = loss_of(runtime.module, part, config.ppo)
            loss.backward()
            norm = torch.stack([p.grad.norm() for p in trainable if p.grad is not None]).norm()
            figures = {"loss": float(loss.detach()), "gradient norm": float(norm)}
        texts = {"prompt": dump.facts["prompts"][row], "response": dump.facts["responses"][row]}
        rows.append({"sample": row, **texts, **figures})
    return rows


def experience_of(dump: Dump) -> Experience:
    tensors = dump.experience
    sequences = Sequences(**{field.name: tensors[field.name] for field in fields(Sequences)})
    rest: dict[str, Any] = {
        field.name: tensors.get(field.name) for field in fields(Experience) if field.name != "sequences"
    }
    return Experience(sequences=sequences, **rest)


def _show(console: Terminal, rows: list[dict[str, Any]]) -> None:
    bad = [row for row in rows if any(isinstance(v, float) and not math.isfinite(v) for v in row.values())]
    table = Table(show_lines=True)
    for key in rows[0] if rows else ():
        table.add_column(key, justify="right" if isinstance(rows[0][key], float) else "left", overflow="fold")
    for row in (bad or rows)[:SHOWN]:
        shown = {**row, "score": ""} if row.get("raised") else row
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else plain(str(v)) for v in shown.values()))
    console.print(table)
    if bad:
        console.print(f"reproduced: {len(bad)} of {len(rows)} samples, each by itself, are not finite or fail")
    else:
        console.print(f"not reproduced: each of the {len(rows)} samples, by itself on this machine, is finite")
