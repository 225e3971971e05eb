"""What each tracker is told beside figures: how its run is named, which run it goes on with, and tables of samples.

Knows the trackers' own libraries, each imported where it is asked for; knows no Accelerate, no rank and no step of PPO.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_accel.system.files import replace_text

Rows = Sequence[Mapping[str, Any]]

# What pip installs for a tracker, where that is not its name.
PACKAGES = {"comet_ml": "comet-ml"}
_RUNS = "runs.json"


def pip_command(names: Sequence[str]) -> str:
    """What installs these trackers.

    >>> pip_command(["mlflow", "comet_ml"])
    'pip install mlflow comet-ml'
    """
    return f"pip install {' '.join(PACKAGES.get(name, name) for name in names)}"


def settings(run_name: str, folder: Path, first_step: int | None) -> dict[str, dict[str, Any]]:
    """What each tracker's start is given, by the tracker's name.

    `folder` is the run's trackers/. `first_step` is the first step that a run which goes on logs, None for a run that
    starts: what TensorBoard holds from there on is of steps that are taken again, and W&B and MLflow go on with the
    run that `remember` noted.
    """
    known = _remembered(folder) if first_step is not None else {}
    return {
        "tensorboard": {} if first_step is None else {"purge_step": first_step},
        "wandb": {"name": run_name, "dir": str(folder), "id": known.get("wandb"), "resume": "allow"},
        "mlflow": {"run_name": run_name, "run_id": known.get("mlflow")},
        "trackio": {"name": known.get("trackio", run_name), "resume": "never" if first_step is None else "allow"},
    }


def has_settings(name: str, folder: Path, first_step: int | None) -> bool:
    """Whether the tracker keeps the config that it got when the run started: MLflow refuses a parameter that has
    changed since, and TensorBoard would list the config once more each time the run goes on. The others replace it."""
    return first_step is not None and name in ("tensorboard", "mlflow") and name in _remembered(folder)


def remember(natives: Mapping[str, Any], folder: Path) -> None:
    """Note which run of each tracker this is, given the trackers' own objects by name. Raises `OSError`."""
    runs = _remembered(folder) | {name: str(_ID[name](native)) for name, native in natives.items() if name in _ID}
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / _RUNS, json.dumps(runs))


def _remembered(folder: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):
        runs = json.loads((folder / _RUNS).read_bytes())
        return runs if isinstance(runs, dict) else {}
    return {}


_ID: dict[str, Callable[[Any], Any]] = {
    "tensorboard": lambda writer: writer.log_dir,
    "wandb": lambda run: run.id,
    "mlflow": lambda run: run.info.run_id,
    "trackio": lambda run: run.name,
}


def push_table(name: str, native: Any, title: str, rows: Rows, step: int) -> None:
    """Rows with the same keys into a tracker's own object, under `title` and a step; nothing where it holds no tables.

    Raises whatever the tracker does.
    """
    push = _TABLES.get(name)
    if push is not None and rows:
        push(native, title, rows, step)


def _tensorboard_table(writer: Any, title: str, rows: Rows, step: int) -> None:
    writer.add_text(title, markdown_rows(rows), global_step=step)
    writer.flush()


def _wandb_table(run: Any, title: str, rows: Rows, step: int) -> None:
    import wandb

    table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
    run.log({title: table}, step=step)


def _mlflow_table(run: Any, title: str, rows: Rows, step: int) -> None:
    import mlflow

    # One file, to which each call adds rows.
    columns = {"step": [step] * len(rows), **{key: [row[key] for row in rows] for key in rows[0]}}
    mlflow.log_table(columns, f"{title}.json", run_id=run.info.run_id)


def _trackio_table(run: Any, title: str, rows: Rows, step: int) -> None:
    import pandas as pd
    import trackio

    run.log({title: trackio.Table(dataframe=pd.DataFrame([dict(row) for row in rows]))}, step=step)


_TABLES = {
    "tensorboard": _tensorboard_table,
    "wandb": _wandb_table,
    "mlflow": _mlflow_table,
    "trackio": _trackio_table,
}


def markdown_rows(rows: Rows) -> str:
    r"""Rows with the same keys as a table in Markdown; a text cannot leave its cell.

    >>> print(markdown_rows([{"prompt": "a|b\n", "score": 0.5}]))
    | prompt | score |
    | --- | --- |
    | a\|b⏎ | +0.50 |
    """
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:+.2f}"
    text = str(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", "⏎")
    return "".join(c if c.isprintable() else " " for c in text)
