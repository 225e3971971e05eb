"""Checkpoints of a run: written, checked, pruned and read.

A checkpoint is whole or absent. It is written to a temporary folder beside its place, with a manifest of every file's
size and hash, flushed and renamed; then `latest` names it, and last older ones are removed. Knows no step of PPO and no
model.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rlhf_accel.config.loading import to_yaml
from rlhf_accel.config.schema import Config
from rlhf_accel.distributed.runtime import Runtime
from rlhf_accel.runs import records
from rlhf_accel.runs.metrics import NAMES
from rlhf_accel.system import provenance
from rlhf_accel.system.errors import ConfigError, RunFailed, why
from rlhf_accel.system.files import (
    Malformed,
    failure,
    flush_all,
    name_work_folder,
    read_bounded,
    read_json,
    remove_work_folders,
    replace_folder,
    replace_text,
    sha256,
)

MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
LATEST = "latest"
# Metrics that a step may lack: those of evaluations, of a critic, of a KL in the loss, of several samples a prompt, and
# of several rewards.
_OPTIONAL = {name for name in NAMES if name.startswith(("eval/", "value/"))}
_OPTIONAL |= {"loss/value", "loss/kl", "rollout/flat_groups", "objective/score/NAME"}
NAME = re.compile(r"step-(\d+)(\.old)?")


class SaveError(RunFailed):
    """A file of the run could not be written; the message is that of the operating system."""


class Damaged(Exception):
    """A checkpoint was changed or cut short; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The state of a run besides weights and optimizer. Prompts and random numbers follow from the step."""

    step: int = 0
    episodes: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    kl_coef: float = 0.0
    reward_mean: float = 0.0
    reward_std: float = 1.0
    best_score: float | None = None
    best_kl: float | None = None  # of the same evaluation
    best_step: int | None = None
    base: dict[str, float] | None = None  # the evaluation before the first step
    base_scores: list[float] | None = None  # of each of its responses; None in checkpoints of older versions
    base_samples: list[dict[str, Any]] | None = None  # its first responses
    unrecorded: dict[str, float] | None = None  # metrics of `step` whose evaluation is still due
    seconds: float = 0.0  # of training so far


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The files of a checkpoint, and the launch and versions that wrote it."""

    files: dict[str, records.Listed]  # by path
    zero_stage: int  # 0 without DeepSpeed
    world_size: int
    sharded: bool
    versions: dict[str, str]


def check(place: Path) -> Manifest:
    """The checkpoint's manifest, after checking size and hash of every file in it.

    Raises `Damaged` naming the first file that differs.
    """
    try:
        tree = read_json(place / MANIFEST)
        digest = tree.pop("sha256")
        if digest != _digest(tree):
            raise Damaged(f"{MANIFEST} was changed")
        manifest: Manifest = records.check(tree, Manifest)
    except OSError as error:
        raise Damaged(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{MANIFEST} does not have the form of a manifest") from None
    absent = {"progress.json", "config.yaml"} - manifest.files.keys()
    if absent or len(manifest.files) < 3:  # and the weights
        raise Damaged(f"{MANIFEST} does not list {', '.join(sorted(absent)) or 'any weights'}")
    inside = place.resolve()
    for name, expected in manifest.files.items():
        try:
            # A path out of the folder, or to a device, which may be read without end.
            if not (place / name).resolve(strict=True).is_relative_to(inside) or not (place / name).is_file():
                raise Damaged(f"{name[:80]!r} is not a plain file of its folder")
            size = (place / name).stat().st_size
            if size != expected["bytes"]:
                raise Damaged(f"{name} has {size} bytes, expected {expected['bytes']}")
            if sha256(place / name) != expected["sha256"]:
                raise Damaged(f"{name} was changed: its hash differs from the manifest")
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a name with a null character
            raise Damaged(f"{name:.80} cannot be read ({why(error)})") from None
    return manifest


def save_checkpoint(folder: Path, progress: Progress, runtime: Runtime, config: Config) -> None:
    """Write checkpoints/step-NNNNNN and let `latest` name it; called by every rank.

    Raises `SaveError` on every rank if any rank cannot write its part; the checkpoints before then stay as they are.
    """
    place = folder / CHECKPOINTS / f"step-{progress.step:06d}"
    beside = runtime.from_main(lambda: name_work_folder(place))

    def begin() -> None:
        remove_work_folders(place.parent, "step-*")
        beside.mkdir(parents=True)

    def finish() -> None:
        (beside / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
        (beside / "config.yaml").write_text(to_yaml(of_the_run(config)), encoding="utf-8")
        parts = len(list(beside.rglob("*_optim_states.pt")))
        if runtime.writes_shards and parts != runtime.world_size:
            raise OSError(
                f"{parts} of {runtime.world_size} processes' parts are here; all processes need the same folder"
            )
        _write_manifest(beside, runtime)
        flush_all(beside, like=beside / "progress.json")
        replace_folder(beside, place)
        replace_text(place.parent / LATEST, place.name)

    def on_main(work: Callable[[], None]) -> str | None:
        return failure(work) if runtime.is_main else None

    try:
        stages: list[Callable[[], str | None]] = [
            *(lambda: on_main(begin), lambda: runtime.save_state(beside), lambda: on_main(finish))
        ]
        for stage in stages:
            problem = runtime.first_failure(stage())
            if problem is not None:
                raise SaveError(problem)
    except SaveError:
        if runtime.is_main:
            shutil.rmtree(beside, ignore_errors=True)  # the disk may be full
        raise


def prune(folder: Path, step: int, keep: int) -> None:
    """Keep the newest `keep` checkpoints up to a step and remove older ones; 0 keeps all.

    Raises `OSError` if one cannot be removed.
    """
    if keep:
        for old in checkpoints(folder / CHECKPOINTS, below=step)[keep - 1 :]:
            shutil.rmtree(old)


def rewind_to(place: Path) -> None:
    """Let `latest` name this checkpoint: the resumed run repeats the steps of newer ones."""
    replace_text(place.parent / LATEST, place.name)


def load_progress(checkpoint: Path) -> Progress:
    """The progress in a checkpoint. Raises `ConfigError` if another version wrote it."""
    try:
        tree = read_json(checkpoint / "progress.json")
        if not isinstance(tree, dict) or not tree.keys() <= {field.name for field in fields(Progress)}:
            raise Malformed("other keys")
        progress: Progress = records.check(tree, Progress)
        if progress.step < 0 or not progress.reward_std > 0:
            raise Malformed(f"step {progress.step}, reward_std {progress.reward_std}")
        for name, needed in (("base", {"score", "score_std"}), ("unrecorded", NAMES - _OPTIONAL)):
            found = tree.get(name)
            if found is not None and not needed <= found.keys():
                raise Malformed(f"{name} lacks {min(needed - found.keys())}")
            if found is not None and not all(type(value) in (int, float) for value in found.values()):
                raise Malformed(f"{name} holds a value that is not a number")
        # As written: `check` turns whole numbers into fractions.
        return replace(progress, base=tree.get("base"), unrecorded=tree.get("unrecorded"))
    except (OSError, Malformed) as error:
        raise ConfigError(
            f"run.resume: {checkpoint / 'progress.json'} was not written by this version ({why(error)})",
            key="run.resume",
        ) from None


def newest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, else that of the last step; its files are not checked."""
    return next(iter(candidates(folder)), None)


def candidates(folder: Path) -> list[Path]:
    """Checkpoints to resume from, newest first: the one that `latest` names and older ones, or all if it names none."""
    found, named = checkpoints(folder / CHECKPOINTS), None
    with suppress(OSError, ValueError):
        text = read_bounded(folder / CHECKPOINTS / LATEST, 200).decode("utf-8")
        named = folder / CHECKPOINTS / text.strip()
    return found[found.index(named) :] if named in found else found


def checkpoints(parent: Path, below: int | None = None) -> list[Path]:
    """The checkpoints in a folder, newest first; with `below`, only those before that step."""
    found = [(int(match[1]), path) for path in parent.glob("step-*") if (match := NAME.fullmatch(path.name))]
    return [path for step, path in sorted(found, reverse=True) if below is None or step < below]


def of_the_run(config: Config) -> Config:
    """The config without the keys of this start, which a run that starts from its config.yaml must not repeat."""
    return replace(config, run=replace(config.run, resume=None, changes=()))


def _write_manifest(folder: Path, runtime: Runtime) -> None:
    files = {
        path.relative_to(folder).as_posix(): records.Listed(bytes=path.stat().st_size, sha256=sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = Manifest(
        files=files,
        zero_stage=runtime.zero_stage,
        world_size=runtime.world_size,
        sharded=runtime.writes_shards,
        versions=versions(),
    )
    tree = asdict(manifest)
    # Without white space, so that a change of any byte is noticed.
    text = json.dumps({**tree, "sha256": _digest(tree)}, separators=(",", ":"))
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _digest(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, separators=(",", ":"), sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of this package and of the installed packages that results depend on."""
    return provenance.versions(("torch", "transformers", "accelerate", "peft", "deepspeed"))
