"""The checkpoint that a run resumes from: found, checked, and refused if config or launch do not fit it.

Knows configs and folders. Knows no model and no step of PPO.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlhf_accel.config.loading import load_run
from rlhf_accel.config.rules import changed_keys
from rlhf_accel.config.schema import Config
from rlhf_accel.runs.checkpoint import (
    CHECKPOINTS,
    Damaged,
    Manifest,
    candidates,
    check,
    checkpoints,
    load_progress,
    versions,
)
from rlhf_accel.runs.run_folder import holds_run
from rlhf_accel.runs.summary import is_finished
from rlhf_accel.system.errors import ConfigError, Finished


def resume_folder(
    config: Config, folder: Path, say: Callable[[str], None], *, zero_stage: int = 0, world_size: int = 1
) -> Path | None:
    """The checkpoint that run.resume names, None for a run that starts.

    `latest` and `auto` take the newest whole checkpoint and report the damaged ones that they skip to `say`. Raises
    `ConfigError` if there is none, or none that this config and this launch can resume from.
    """
    resume = config.run.resume
    if resume is None:
        return None
    found = _newest(config, folder, say) if resume in ("latest", "auto") else _named(resume, folder)
    if found is None:
        return None
    place, manifest = found
    progress = load_progress(place)
    if manifest.sharded and (manifest.zero_stage, manifest.world_size) != (zero_stage, world_size):
        now = f"ZeRO-{zero_stage} on {world_size} processes" if zero_stage else "no DeepSpeed"
        raise ConfigError(
            f"run.resume={resume}: {place} was written with ZeRO-{manifest.zero_stage} on {manifest.world_size} "
            f"processes, and this is {now}; only run.checkpoint=portable serves another launch",
            key="run.resume",
        )
    _check_unchanged(config, place)
    _check_unfinished(config, folder)
    total = config.run.total_steps
    if progress.step > total:
        raise ConfigError(
            f"run.total_steps={total}: {place} has done {progress.step} steps already; raise it", key="run.total_steps"
        )
    other = [f"{name} {old}" for name, old in manifest.versions.items() if old != versions().get(name)]
    if other:
        say(f"{place} was written with {', '.join(other)}: results may differ from here on by rounding")
    return place


def _newest(config: Config, folder: Path, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The newest whole checkpoint of the run in the folder; None if run.resume=auto and there is no checkpoint."""
    _check_unfinished(config, folder)  # first: a finished short run has no checkpoint
    found = _newest_whole(folder, say)
    if found is None and (config.run.resume == "latest" or checkpoints(folder / CHECKPOINTS)):
        raise ConfigError(f"run.resume={config.run.resume}: {_why_none(folder)}", key="run.resume")
    if found is None:
        _check_unchanged(config, folder)
        say(f"run.resume=auto: {folder} holds no checkpoint, so the run starts")
    return found


def _named(resume: str, folder: Path) -> tuple[Path, Manifest]:
    """The checkpoint whose folder run.resume names."""
    place = Path(resume).absolute()
    if not place.is_dir():
        raise ConfigError(f"run.resume={resume}: neither latest, auto nor the folder of a checkpoint", key="run.resume")
    if place.parent != folder / CHECKPOINTS and holds_run(folder):
        raise ConfigError(
            f"run.output_dir={folder} holds another run than run.resume={resume}; name that run's folder or a new one",
            key="run.output_dir",
        )
    try:
        return place, check(place)
    except Damaged as error:
        raise ConfigError(f"run.resume={resume} is not a whole checkpoint: {error}", key="run.resume") from None


def _newest_whole(folder: Path, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    for place in candidates(folder):
        try:
            return place, check(place)
        except Damaged as error:
            say(f"passing over {place}, which is damaged: {error}")
    return None


def _why_none(folder: Path) -> str:
    if checkpoints(folder / CHECKPOINTS):
        return f"no checkpoint in {folder / CHECKPOINTS} is whole or can be read; repair the disk, or name a new folder"
    if holds_run(folder):
        return (
            f"the run in {folder} ended before its first checkpoint and left no checkpoint; --run.resume auto starts "
            "it again"
        )
    return f"{folder} holds no checkpoint; name the folder of a run in run.output_dir"


def _check_unfinished(config: Config, folder: Path) -> None:
    """Raises `Finished` if the run in `folder` is finished and run.resume=auto, else `ConfigError`."""
    total = config.run.total_steps
    if is_finished(folder, total):
        _check_unchanged(config, folder)
        done = f"the run in {folder} is finished: {total} steps, its model is {folder / 'final'}"
        raise (Finished if config.run.resume == "auto" else ConfigError)(f"{done}; raise run.total_steps to continue")


def _check_unchanged(config: Config, folder: Path) -> None:
    """Raises `ConfigError` naming the keys that differ from the config in `folder` and must not."""
    try:
        before = load_run(folder / "config.yaml")
    except ConfigError as error:
        path = folder / "config.yaml"
        if not path.exists() or (path.is_file() and path.stat().st_size < 100 and not path.read_bytes().strip()):
            return  # no run started here, or it was killed before it wrote its config
        raise ConfigError(
            f"run.resume={config.run.resume}: {folder / 'config.yaml'} is not a config ({error})", key="run.resume"
        ) from None
    changed = changed_keys(before, config)
    if changed:
        names = [change.partition(" ")[0] for change in changed]
        raise ConfigError(
            f"run.resume={config.run.resume}: {folder} was written with another config: {', '.join(changed)}; set it "
            f"back, or pass --run.changes '[{', '.join(names)}]' if this is meant",
            key="run.resume",
        )
