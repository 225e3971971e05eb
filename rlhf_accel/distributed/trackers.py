"""Trackers such as TensorBoard, W&B and MLflow: their start, figures, tables of samples, and their failures.

Knows Accelerate's trackers and their own libraries, each imported when it is used; knows no step of PPO.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from rlhf_accel.config.schema import RunConfig
from rlhf_accel.distributed.collectives import first_failure
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.files import failure, replace_text

Rows = Sequence[Mapping[str, Any]]

# The pip package of a tracker, where its name differs.
PACKAGES = {"comet_ml": "comet-ml"}
_RUNS = "runs.json"


def check_trackers(names: Sequence[str]) -> None:
    """Raises `ConfigError` for trackers that Accelerate does not know, and for those that are not installed, which it
    would ignore."""
    for name in names:
        if name not in LoggerType.list():
            raise ConfigError(
                f"run.trackers={list(names)}: {name} is not a tracker; known are {', '.join(LoggerType.list())}",
                key="run.trackers",
            )
    available = [str(name) for name in get_available_trackers()]
    absent = [name for name in names if name not in (*available, "all")]
    if absent:
        raise ConfigError(
            f"run.trackers={list(names)}: {', '.join(absent)} is not installed; {pip_command(absent)}",
            key="run.trackers",
        )


def pip_command(names: Sequence[str]) -> str:
    """The command that installs these trackers.

    >>> pip_command(["mlflow", "comet_ml"])
    'pip install mlflow comet-ml'
    """
    return f"pip install {' '.join(PACKAGES.get(name, name) for name in names)}"


class Trackers:
    """The trackers of a run, called by every rank. A tracker may fail at any time, for example when its server is gone.
    This is reported once and does not end the run."""

    def __init__(self, accelerator: Accelerator, names: Sequence[str]) -> None:
        self._accelerator = accelerator
        self._names = names
        self._failed: set[str] = set()

    def start(self, run: RunConfig, config: dict[str, Any], folder: Path, first_step: int | None) -> None:
        """Open the run in every tracker, with the flat config as its settings.

        `folder` is the run's; `first_step` as in `settings`. Raises `ConfigError` on every rank if one cannot start.
        """
        place = folder / "trackers"
        self._accelerator.project_configuration.logging_dir = str(place)
        try:
            problem = failure(lambda: self._start(run, config, place, first_step))
        except Exception as error:  # each tracker has errors of its own, and some ask a server
            problem = f"{type(error).__name__}: {error}"
        problem = first_failure(self._accelerator, problem)
        if problem is not None:
            raise ConfigError(f"run.trackers={list(self._names)} cannot be started: {problem}", key="run.trackers")

    def _start(self, run: RunConfig, config: dict[str, Any], place: Path, first_step: int | None) -> None:
        self._accelerator.init_trackers(run.project, init_kwargs=settings(run.name, place, first_step))
        for tracker in self._accelerator.trackers:
            if not has_settings(tracker.name, place, first_step):
                tracker.store_init_configuration(config)
        if self._accelerator.is_main_process and self._accelerator.trackers:
            remember({tracker.name: self._native(tracker) for tracker in self._accelerator.trackers}, place)

    def log(self, metrics: dict[str, float], step: int) -> list[str]:
        """Send figures to every tracker. Returns a message for each one that fails for the first time."""
        return self._on_each(lambda tracker: tracker.log(names_for(tracker.name, metrics), step=step))

    def log_table(self, title: str, rows: Rows, step: int) -> list[str]:
        """Send rows with the same keys to the trackers that hold tables; returns what `log` does."""
        return self._on_each(lambda tracker: push_table(tracker.name, self._native(tracker), title, rows, step))

    def end(self) -> list[str]:
        """Close the trackers, which write what is buffered; returns what `log` does. The process group stays."""
        problems = self._on_each(lambda tracker: tracker.finish())
        self._accelerator.trackers = []
        return problems

    def _native(self, tracker: Any) -> Any:
        """The tracker's own object, such as a `SummaryWriter`; on the main process."""
        return self._accelerator.get_tracker(tracker.name, unwrap=True)

    def _on_each(self, work: Callable[[Any], None]) -> list[str]:
        problems = []
        for tracker in self._accelerator.trackers if self._accelerator.is_main_process else ():
            try:
                problem = failure(lambda tracker=tracker: work(tracker))  # type: ignore[misc]  # a default binds it
            except Exception as error:  # each tracker has errors of its own
                problem = f"{type(error).__name__}: {error}"
            if problem is not None and tracker.name not in self._failed:
                self._failed.add(tracker.name)
                problems.append(f"{tracker.name} failed ({' '.join(problem.split())})")
        return problems


def names_for(tracker: str, metrics: dict[str, float]) -> dict[str, float]:
    """The figures by the names that a tracker takes. A metric in MLflow's file store is a file, which cannot also be
    the folder of others.

    >>> names_for("mlflow", {"objective/score": 1.0, "objective/score/length": 2.0, "eval/gold/vader": 3.0})
    {'objective/score': 1.0, 'objective/score.length': 2.0, 'eval/gold/vader': 3.0}
    """
    if tracker != "mlflow":
        return metrics
    return {name.replace("/score/", "/score."): value for name, value in metrics.items()}


def settings(run_name: str, folder: Path, first_step: int | None) -> dict[str, dict[str, Any]]:
    """The arguments with which each tracker starts, by the tracker's name.

    `folder` is trackers/ in the run's folder. `first_step` is the first step that a resumed run logs, None for a new
    run: TensorBoard drops its entries from that step on, since these steps are taken again, and W&B and MLflow
    continue the run that `remember` noted.
    """
    known = _remembered(folder) if first_step is not None else {}
    return {
        "tensorboard": {} if first_step is None else {"purge_step": first_step},
        "wandb": {"name": run_name, "dir": str(folder), "id": known.get("wandb"), "resume": "allow"},
        "mlflow": {"run_name": run_name, "run_id": known.get("mlflow")},
        "trackio": {"name": known.get("trackio", run_name), "resume": "never" if first_step is None else "allow"},
    }


def has_settings(name: str, folder: Path, first_step: int | None) -> bool:
    """Whether the tracker keeps the config from the start of the run: MLflow refuses parameters that have changed, and
    TensorBoard would list the config again each time the run is resumed. The others replace it."""
    return first_step is not None and name in ("tensorboard", "mlflow") and name in _remembered(folder)


def remember(natives: Mapping[str, Any], folder: Path) -> None:
    """Note the run's id in each tracker, given the trackers' own objects by name. Raises `OSError`."""
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
    """Add rows with the same keys to a tracker's own object, under a title and a step, if it holds tables.

    Raises the tracker's own errors.
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

    # One file; each call adds rows to it.
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
