"""The small JSON files of a run: summary.json and environment.json. Knows no step and no loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_accel.runs import records
from rlhf_accel.runs.checkpoint import load_progress, newest
from rlhf_accel.runs.json_lines import finite_or_none
from rlhf_accel.system.errors import ConfigError, why
from rlhf_accel.system.files import Malformed, replace_text


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json, the last file of a run: with it, the run is finished. Raises `OSError`."""
    write_json(folder / "summary.json", summary)


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all, with null for numbers that are not finite. Raises `OSError`."""
    replace_text(path, json.dumps(finite_or_none(tree), indent=2, ensure_ascii=False))


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The run's summary.json, None if the run has not ended. Raises `ConfigError` if its form is wrong."""
    try:
        return dict(records.read(folder / "summary.json", records.Summary))
    except FileNotFoundError:
        return None
    except (OSError, Malformed) as error:
        raise ConfigError(
            f"{folder / 'summary.json'} does not have the form that a run writes ({why(error)})",
            key="run.output_dir",
        ) from None


def reward_scale(folder: Path) -> dict[str, Any] | None:
    """`mean` and `std` with which the run calibrates raw scores, from its summary or its newest checkpoint.

    None if it has neither. Raises `ConfigError` if the form of the summary is wrong.
    """
    summary = read_summary(folder)
    if summary is not None:
        try:
            return {name: float(summary["calibration"][name]) for name in ("mean", "std")}
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{folder / 'summary.json'} does not have the form that a run writes: no calibration ({error!r})"
            ) from None
    place = newest(folder)
    if place is None:
        return None
    progress = load_progress(place)
    return {"mean": progress.reward_mean, "std": progress.reward_std}


def write_environment(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write environment.json, the facts about the machine of the last start. Raises `OSError`."""
    write_json(folder / "environment.json", facts)


def is_finished(folder: Path, steps: int) -> bool:
    """Whether a run of so many steps finished here, and its model is there."""
    with suppress(ConfigError):
        return (read_summary(folder) or {}).get("steps") == steps and (folder / "final").is_dir()
    return False
