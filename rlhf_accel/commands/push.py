"""Upload a model of a run to the hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlhf_accel.config.loading import load_run
from rlhf_accel.runs import hub, records
from rlhf_accel.runs.cards import base_model, is_hub_id
from rlhf_accel.system import console
from rlhf_accel.system.errors import ConfigError, why
from rlhf_accel.system.files import Malformed
from rlhf_accel.system.terminal import say


def main(options: argparse.Namespace) -> None:
    """Raises `ConfigError` for a folder that holds no model, or a hub that cannot be written to."""
    console.may_fail()
    folder, base = options.model, options.base
    if (folder / "config.yaml").is_file():
        base = base or base_model(load_run(folder / "config.yaml"))
        folder = folder / options.which
    has_adapter = (folder / hub.ADAPTER).is_file()
    if not (folder / "config.json").is_file() and not has_adapter:
        raise ConfigError(f"{folder} holds no model; name a run's folder, or the folder of a model")
    if base is None and has_adapter:
        check_base(folder)
    hub.check_access(f"push {options.repo_id}", None, options.repo_id)
    say(hub.push(folder, options.repo_id, private=options.private, base=base))


def check_base(folder: Path) -> None:
    """Raises `ConfigError` unless the adapter names a base that others can load."""
    try:
        named = records.read(folder / hub.ADAPTER, records.Adapter)["base_model_name_or_path"]
    except (OSError, Malformed) as error:
        raise ConfigError(f"{folder / hub.ADAPTER} does not have the form that peft writes ({why(error)})") from None
    if named is None or not is_hub_id(named):
        raise ConfigError(f"{folder}: the adapter's base, {named}, is not a hub id; name it with --base", key="--base")
