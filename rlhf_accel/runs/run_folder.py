"""The folder of a run: chosen, claimed, made and locked. Knows files; knows no step and no model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_accel.config.loading import to_yaml
from rlhf_accel.config.schema import Config
from rlhf_accel.runs.checkpoint import CHECKPOINTS, LATEST, NAME, Damaged, check, checkpoints, of_the_run
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.files import replace_text
from rlhf_accel.system.lock import Lock, hold

_LOCK = ".lock"
# Files that a run writes or removes, besides config.yaml.
_WRITTEN = (
    *("final", ".final", "best", ".best", CHECKPOINTS, "dumps", "trackers", "summary.json", "metrics.jsonl"),
    *("samples.jsonl", "environment.json", "report.html", "report", "logs/rank-0.log"),  # Slurm may write to logs/ too
)


def choose_folder(config: Config) -> Path:
    """The run's folder as an absolute path. It is not made yet: nothing is written before all of a run was checked.

    Raises `ConfigError` if it cannot be made or written, if it holds another run, or if it holds other files that this
    run would overwrite.
    """
    run = config.run
    folder = Path(run.output_dir).absolute() if run.output_dir is not None else _first_free(run.name)
    if holds_run(folder) and run.resume is None:
        raise ConfigError(
            f"run.output_dir={folder} already holds a run; choose another folder, or resume with --run.resume latest",
            key="run.output_dir",
        )
    _refuse_foreign(folder, run.resume)
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir():
        raise ConfigError(
            f"run.output_dir={folder} cannot be made: {existing} is a file; choose another folder", key="run.output_dir"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"run.output_dir={folder} cannot be written: no permission in {existing}; choose another",
            key="run.output_dir",
        )
    return folder


def _refuse_foreign(folder: Path, resume: str | None) -> None:
    """Raises `ConfigError` for files in a folder without config.yaml, which a run writes before all others."""
    config = folder / "config.yaml"
    begun = (config.is_file() and config.stat().st_size > 0) or checkpoints(folder / CHECKPOINTS)
    foreign = [name for name in _WRITTEN if (folder / name).exists() or (folder / name).is_symlink()]
    if foreign and not begun and resume != "latest":  # which reports that it finds no checkpoint
        raise ConfigError(
            f"run.output_dir={folder} holds {', '.join(foreign)} but no run with a config.yaml, and a run here would "
            "overwrite that; choose another folder, or move them away",
            key="run.output_dir",
            found=foreign,
        )


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The state of a folder when a run claimed it; `lock` is held already if an earlier run had left one."""

    lock: Lock | None
    state: tuple[Any, ...]


def claim_folder(folder: Path, config: Config, say: Callable[[str], None]) -> Claim:
    """Wait for the lock of a folder before anything in it is read. A new folder is not locked: nothing is written yet.

    Raises `ConfigError` if another process holds it, or if it cannot be written.
    """
    lock = None
    if config.run.resume is not None and (folder / _LOCK).exists():
        lock = _hold(folder, say)
    return Claim(lock=lock, state=_state(folder))


def make_folder(
    folder: Path, config: Config, claim: Claim, say: Callable[[str], None] = lambda _: None
) -> tuple[Path, Lock]:
    """Make the run's folder with its config.yaml, and lock it.

    If another run took a default folder since it was chosen, the next free one is made. Raises `ConfigError` if another
    run took a folder that the config names, or if the folder cannot be written.
    """
    text = to_yaml(of_the_run(config))
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if config.run.resume is None:
                with (folder / "config.yaml").open("x", encoding="utf-8") as file:
                    file.write(text)
                return folder, _hold(folder, say)
            lock = claim.lock or _hold(folder, say)
            if _state(folder) != claim.state:
                lock.release()
                raise FileExistsError
            replace_text(folder / "config.yaml", text)
            return folder, lock
        except FileExistsError:
            if config.run.output_dir is not None:
                raise ConfigError(
                    f"run.output_dir={folder} was taken by another run since; start again to resume that run, or name "
                    "another folder",
                    key="run.output_dir",
                ) from None
            folder = _first_free(config.run.name)
            claim = Claim(lock=None, state=_state(folder))
        except OSError as error:
            raise _unwritable(folder, error) from error


def _hold(folder: Path, say: Callable[[str], None]) -> Lock:
    try:
        return hold(folder / _LOCK, f"run.output_dir={folder}", "run.output_dir", say)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _state(folder: Path) -> tuple[Any, ...]:
    """Sizes and times of files that any run in the folder would change soon."""
    sizes = []
    for path in (folder / "config.yaml", folder / "metrics.jsonl", folder / CHECKPOINTS / LATEST):
        about = path.stat() if path.is_file() else None
        sizes.append(about and (about.st_size, about.st_mtime_ns))
    return (*sizes, *checkpoints(folder / CHECKPOINTS))


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"run.output_dir={folder} cannot be written ({error.strerror}); choose another", key="run.output_dir"
    )


def holds_run(folder: Path) -> bool:
    """Whether the folder has files of a run."""
    return any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl", CHECKPOINTS))


def model_folder(folder: Path, which: str) -> Path:
    """The folder of a run's model: `final`, `best` or the checkpoint `step-NNNNNN`.

    Raises `ConfigError` if there is none, or if the checkpoint is damaged.
    """
    if NAME.fullmatch(which):
        place = folder / CHECKPOINTS / which
        if not place.is_dir():
            kept = ", ".join(path.name for path in checkpoints(place.parent)) or "none"
            raise ConfigError(f"{folder} holds no checkpoint {which}; those kept: {kept}")
        try:
            check(place)
        except Damaged as error:
            raise ConfigError(f"{place} is not a whole checkpoint: {error}") from None
        return place
    place = folder / which
    if place.is_dir():
        return place
    raise ConfigError(f"{folder} holds no {which}/; the run has not finished")


def _first_free(name: str) -> Path:
    parent = Path("saved_models").absolute()
    candidates = [parent / name, *(parent / f"{name}-{number}" for number in range(2, 10_000))]
    return next(folder for folder in candidates if not folder.exists() or not any(folder.iterdir()))
