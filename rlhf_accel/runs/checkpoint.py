"""What a run leaves on disk: its folder, checkpoints to go on from, and models that transformers and peft load.

A checkpoint is whole or absent: it is written beside its place, listed in a manifest with every file's size and hash,
flushed and renamed; `latest` names it after that, and older ones go last. Knows no step and no loss.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_accel.config.loading import load_run, to_yaml
from rlhf_accel.config.rules import changed_keys
from rlhf_accel.config.schema import Config
from rlhf_accel.data.cache import sha256
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.distributed.runtime import Runtime
from rlhf_accel.models.lora import CRITIC, POLICY
from rlhf_accel.models.policy_with_value import PolicyWithValue
from rlhf_accel.runs import records
from rlhf_accel.runs.metrics import NAMES, finite_or_none
from rlhf_accel.system.errors import ConfigError, Finished, RunFailed
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
    work_folder,
)
from rlhf_accel.system.lock import Lock, hold
from rlhf_accel.system.version import __version__

VALUE_HEAD = "value_head.safetensors"
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
_LATEST = "latest"
# Figures that a step need not have: those of evaluations.
_OPTIONAL = {name for name in NAMES if name.startswith("eval/")}
_LOCK = ".lock"
# What a run writes beside config.yaml, or removes.
_WRITTEN = (
    *("final", ".final", "best", ".best", CHECKPOINTS, "dumps", "trackers", "summary.json", "metrics.jsonl"),
    *("samples.jsonl", "environment.json", "report.html", "report", "logs/rank-0.log"),  # Slurm's own may be in logs/
)
_NAME = re.compile(r"step-(\d+)(\.old)?")


class SaveError(RunFailed):
    """A file of the run could not be written; the message says why, as the system put it."""


class _Damaged(Exception):
    """A checkpoint is not what was written; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """All that a run has to remember besides weights and optimizer: prompts and random numbers follow from the step."""

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
    """What a checkpoint holds, and what wrote it."""

    files: dict[str, records.Listed]  # by path
    zero_stage: int  # 0 is no DeepSpeed
    world_size: int
    sharded: bool
    versions: dict[str, str]


def choose_folder(config: Config) -> Path:
    """The run's folder, absolute and not yet made: nothing is written before the rest of a run was checked.

    Raises `ConfigError` if it cannot be made or written, already holds another run, or holds files that are not a run's
    and that this one would overwrite.
    """
    run = config.run
    folder = Path(run.output_dir).absolute() if run.output_dir is not None else _first_free(run.name)
    if holds_run(folder) and run.resume is None:
        raise ConfigError(
            f"run.output_dir={folder} already holds a run; choose another folder, or go on with --run.resume latest",
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
    """A run writes config.yaml before all else, so what lies in a folder without one is somebody else's."""
    config = folder / "config.yaml"
    begun = (config.is_file() and config.stat().st_size > 0) or _checkpoints(folder / CHECKPOINTS)
    foreign = [name for name in _WRITTEN if (folder / name).exists() or (folder / name).is_symlink()]
    if foreign and not begun and resume != "latest":  # which finds no checkpoint here, and says so
        raise ConfigError(
            f"run.output_dir={folder} holds {', '.join(foreign)} but no run with a config.yaml, and a run here would "
            "overwrite that; choose another folder, or move them away",
            key="run.output_dir",
            found=foreign,
        )


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A folder as it was when a run looked at it; `lock` is held already where it was another's before."""

    lock: Lock | None
    state: tuple[Any, ...]


def claim_folder(folder: Path, config: Config, say: Callable[[str], None]) -> Claim:
    """Before anything in a folder is read, wait for whoever holds it; where nobody does, nothing is written yet.

    Raises `ConfigError` if another process holds it, or if it cannot be written.
    """
    lock = None
    if config.run.resume is not None and (folder / _LOCK).exists():
        lock = _hold(folder, say)
    return Claim(lock=lock, state=_state(folder))


def make_folder(
    folder: Path, config: Config, claim: Claim, say: Callable[[str], None] = lambda _: None
) -> tuple[Path, Lock]:
    """Make the run's folder with its config.yaml, and hold it.

    Of the default folders the next free one is made if another run took this one since it was chosen. Raises
    `ConfigError` if it took a folder that the config names, or if the system refuses.
    """
    text = to_yaml(_of_the_run(config))
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
                    f"run.output_dir={folder} was taken by another run meanwhile; start again to resume that, or name "
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
    """What any run in the folder would change soon."""
    sizes = []
    for path in (folder / "config.yaml", folder / "metrics.jsonl", folder / CHECKPOINTS / _LATEST):
        about = path.stat() if path.is_file() else None
        sizes.append(about and (about.st_size, about.st_mtime_ns))
    return (*sizes, *_checkpoints(folder / CHECKPOINTS))


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"run.output_dir={folder} cannot be written ({error.strerror}); choose another", key="run.output_dir"
    )


def holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl", CHECKPOINTS))


def resume_folder(
    config: Config, folder: Path, say: Callable[[str], None], *, zero_stage: int = 0, world_size: int = 1
) -> Path | None:
    """The checkpoint that run.resume names, None for a run that starts.

    `latest` and `auto` take the newest whole one; those that are passed over are named to `say`. Raises `ConfigError`
    if there is none, or none that this config and this launch can go on from.
    """
    resume = config.run.resume
    if resume is None:
        return None
    if resume in ("latest", "auto"):
        _check_unfinished(config, folder)  # before checkpoints are looked for: a short run leaves none
        found = _newest_whole(folder, say)
        if found is None and (resume == "latest" or _checkpoints(folder / CHECKPOINTS)):
            raise ConfigError(f"run.resume={resume}: {_why_none(folder)}", key="run.resume")
        if found is None:
            _check_unchanged(config, folder)
            say(f"run.resume=auto: {folder} holds no checkpoint, so the run starts")
            return None
        place, manifest = found
    else:
        place = Path(resume).absolute()
        if not place.is_dir():
            raise ConfigError(
                f"run.resume={resume}: neither latest, auto nor the folder of a checkpoint", key="run.resume"
            )
        if place.parent != folder / CHECKPOINTS and holds_run(folder):
            raise ConfigError(
                f"run.output_dir={folder} holds another run than run.resume={resume}; name that run's folder or a new "
                "one",
                key="run.output_dir",
            )
        try:
            manifest = check(place)
        except _Damaged as error:
            raise ConfigError(f"run.resume={resume} is not a whole checkpoint: {error}", key="run.resume") from None
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
        say(f"{place} was written with {', '.join(other)}: figures may differ from here on by rounding")
    return place


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """The last that a run writes: after it the run is finished. Raises `OSError`."""
    write_json(folder / "summary.json", summary)


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a file whole or not at all, figures that are not finite as null. Raises `OSError`."""
    replace_text(path, json.dumps(finite_or_none(tree), indent=2, ensure_ascii=False))


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The run's summary.json, None of a run that has not ended. Raises `ConfigError` if it is not what was written."""
    try:
        return dict(records.read(folder / "summary.json", records.Summary))
    except FileNotFoundError:
        return None
    except (OSError, Malformed) as error:
        raise ConfigError(
            f"{folder / 'summary.json'} is not what a run writes ({records.why(error)})", key="run.output_dir"
        ) from None


def reward_scale(folder: Path) -> dict[str, Any] | None:
    """`mean` and `std` by which the run shifts and scales raw scores, of its summary or its newest checkpoint.

    None while it has neither. Raises `ConfigError` if the summary is not what was written.
    """
    summary = read_summary(folder)
    if summary is not None:
        try:
            return {name: float(summary["calibration"][name]) for name in ("mean", "std")}
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{folder / 'summary.json'} is not what a run writes: no calibration ({error!r})"
            ) from None
    place = newest(folder)
    if place is None:
        return None
    progress = load_progress(place)
    return {"mean": progress.reward_mean, "std": progress.reward_std}


def model_folder(folder: Path, which: str) -> Path:
    """Where a run's folder holds the model `final`, `best` or, as a whole checkpoint, `step-NNNNNN`.

    Raises `ConfigError` if it holds none.
    """
    if _NAME.fullmatch(which):
        place = folder / CHECKPOINTS / which
        if not place.is_dir():
            kept = ", ".join(path.name for path in _checkpoints(place.parent)) or "none"
            raise ConfigError(f"{folder} holds no checkpoint {which}; those kept: {kept}")
        try:
            check(place)
        except _Damaged as error:
            raise ConfigError(f"{place} is not a whole checkpoint: {error}") from None
        return place
    place = folder / which
    if place.is_dir():
        return place
    raise ConfigError(f"{folder} holds no {which}/; the run has not finished")


def write_environment(folder: Path, facts: Mapping[str, Any]) -> None:
    """What the run runs on, by where it started last. Raises `OSError`."""
    replace_text(folder / "environment.json", json.dumps(facts, indent=2, ensure_ascii=False))


def is_finished(folder: Path, steps: int) -> bool:
    """Whether a run of so many steps ended here and left its model."""
    with suppress(ConfigError):
        return (read_summary(folder) or {}).get("steps") == steps and (folder / "final").is_dir()
    return False


def check(place: Path) -> Manifest:
    """The checkpoint's manifest, if every file that it lists has its size and hash; raises `_Damaged` naming the first
    that has not."""
    try:
        tree = read_json(place / MANIFEST)
        digest = tree.pop("sha256")
        if digest != _digest(tree):
            raise _Damaged(f"{MANIFEST} was changed")
        manifest: Manifest = records.check(tree, Manifest)
    except OSError as error:
        raise _Damaged(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _Damaged(f"{MANIFEST} is not what was written") from None
    absent = {"progress.json", "config.yaml"} - manifest.files.keys()
    if absent or len(manifest.files) < 3:  # and what was learnt
        raise _Damaged(f"{MANIFEST} does not list {', '.join(sorted(absent)) or 'any weights'}")
    inside = place.resolve()
    for name, expected in manifest.files.items():
        try:
            # A path that leads out of the folder, or to a device, which has no end.
            if not (place / name).resolve(strict=True).is_relative_to(inside) or not (place / name).is_file():
                raise _Damaged(f"{name[:80]!r} is not a file of its own")
            size = (place / name).stat().st_size
            if size != expected["bytes"]:
                raise _Damaged(f"{name} has {size} bytes, expected {expected['bytes']}")
            if sha256(place / name) != expected["sha256"]:
                raise _Damaged(f"{name} was changed: its hash is not the one that was written")
        except (
            OSError,
            RuntimeError,
            ValueError,
        ) as error:  # links that lead in a circle; a name with a null character
            raise _Damaged(f"{name:.80} cannot be read ({records.why(error)})") from None
    return manifest


def save_checkpoint(folder: Path, progress: Progress, runtime: Runtime, config: Config) -> None:
    """Write checkpoints/step-NNNNNN beside its place, rename it there and let `latest` name it; called by every rank.

    Raises `SaveError`, on every rank, if any rank could not write its part; what was there before stays as it was.
    """
    place = folder / CHECKPOINTS / f"step-{progress.step:06d}"
    beside = runtime.from_main(lambda: name_work_folder(place))

    def begin() -> None:
        remove_work_folders(place.parent, "step-*")
        beside.mkdir(parents=True)

    def finish() -> None:
        (beside / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
        (beside / "config.yaml").write_text(to_yaml(_of_the_run(config)), encoding="utf-8")
        parts = len(list(beside.rglob("*_optim_states.pt")))
        if runtime.writes_shards and parts != runtime.world_size:
            raise OSError(f"{parts} of {runtime.world_size} processes' parts are here; they need one folder")
        _write_manifest(beside, runtime)
        flush_all(beside, like=beside / "progress.json")
        replace_folder(beside, place)
        replace_text(place.parent / _LATEST, place.name)

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
            shutil.rmtree(beside, ignore_errors=True)  # its room may be what the disk lacks
        raise


def prune(folder: Path, step: int, keep: int) -> None:
    """Remove the checkpoints before a step's but for the newest, `keep` of them with that step's own; 0 keeps all.

    Raises `OSError` if one cannot be removed.
    """
    if keep:
        for old in _checkpoints(folder / CHECKPOINTS, below=step)[keep - 1 :]:
            shutil.rmtree(old)


def go_back_to(place: Path) -> None:
    """Let `latest` name this checkpoint: newer ones are of steps that the run, which goes on here, takes again."""
    replace_text(place.parent / _LATEST, place.name)


def load_progress(checkpoint: Path) -> Progress:
    """Raises `ConfigError` if another version wrote it."""
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
                raise Malformed(f"{name} holds what is no figure")
        # As they were written: checked, whole numbers are fractions.
        return replace(progress, base=tree.get("base"), unrecorded=tree.get("unrecorded"))
    except (OSError, Malformed) as error:
        raise ConfigError(
            f"run.resume: {checkpoint / 'progress.json'} is not what this version writes ({records.why(error)})",
            key="run.resume",
        ) from None


def newest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, or else the one of the last step; not checked."""
    return next(iter(_candidates(folder)), None)


def _candidates(folder: Path) -> list[Path]:
    """Checkpoints to go on from: what `latest` names and those before it, or all if it names none; newest first."""
    found, named = _checkpoints(folder / CHECKPOINTS), None
    with suppress(OSError, ValueError):
        text = read_bounded(folder / CHECKPOINTS / _LATEST, 200).decode("utf-8")
        named = folder / CHECKPOINTS / text.strip()
    return found[found.index(named) :] if named in found else found


def _newest_whole(folder: Path, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    for place in _candidates(folder):
        try:
            return place, check(place)
        except _Damaged as error:
            say(f"passing over {place}, which is damaged: {error}")
    return None


def _why_none(folder: Path) -> str:
    if _checkpoints(folder / CHECKPOINTS):
        return f"no checkpoint in {folder / CHECKPOINTS} is whole or can be read; mend the disk, or name a new folder"
    if holds_run(folder):
        return (
            f"the run in {folder} ended before its first checkpoint and left no checkpoint; --run.resume auto starts "
            "it anew"
        )
    return f"{folder} holds no checkpoint; name the folder of a run in run.output_dir"


def _checkpoints(parent: Path, below: int | None = None) -> list[Path]:
    """The checkpoints in a folder, newest first; of those before a step if `below` is given."""
    found = [(int(match[1]), path) for path in parent.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for step, path in sorted(found, reverse=True) if below is None or step < below]


def _check_unfinished(config: Config, folder: Path) -> None:
    """Raises `Finished`, or `ConfigError` unless run.resume=auto, if all of the run in `folder` is done."""
    total = config.run.total_steps
    if is_finished(folder, total):
        _check_unchanged(config, folder)
        done = f"the run in {folder} is finished: {total} steps, its model is {folder / 'final'}"
        raise (Finished if config.run.resume == "auto" else ConfigError)(f"{done}; raise run.total_steps to go on")


def _check_unchanged(config: Config, folder: Path) -> None:
    """Raises `ConfigError` with the keys in which the config differs from the one in `folder` and must not."""
    try:
        before = load_run(folder / "config.yaml")
    except ConfigError as error:
        path = folder / "config.yaml"
        if not path.exists() or (path.is_file() and path.stat().st_size < 100 and not path.read_bytes().strip()):
            return  # nothing was begun here, or a kill came first
        raise ConfigError(
            f"run.resume={config.run.resume}: {folder / 'config.yaml'} is no config ({error})", key="run.resume"
        ) from None
    changed = changed_keys(before, config)
    if changed:
        names = [change.partition(" ")[0] for change in changed]
        raise ConfigError(
            f"run.resume={config.run.resume}: {folder} was written with another config: {', '.join(changed)}; set it "
            f"back, or pass --run.changes '[{', '.join(names)}]' if this is meant",
            key="run.resume",
        )


def _of_the_run(config: Config) -> Config:
    """Without how this process came to it, which a run that starts from config.yaml must not repeat."""
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
    # Without white space, so that no byte of it can change unnoticed.
    text = json.dumps({**tree, "sha256": _digest(tree)}, separators=(",", ":"))
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _digest(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, separators=(",", ":"), sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Of this package and of those that figures depend on, where they are installed."""
    found = {"rlhf_accel": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "peft", "deepspeed"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def export(
    folder: Path,
    module: PolicyWithValue,
    weights: Mapping[str, Tensor],
    tokens: Tokens,
    card: str,
    fault: Callable[[Path], str | None] = lambda _: None,
    base: str | None = None,
) -> str | None:
    """Write the policy in Hugging Face form (full model, or peft adapter), the value head beside it, and a model card.

    `weights` are the module's whole weights, as `Runtime.trainable_weights` gives them; main process only. `fault` is
    asked what is wrong with the folder that is to take the place: if anything, that is returned and `folder` stays as
    it was, as it does until the new one is whole. `base` is what an adapter's config then calls its base, where that is
    not the path that was loaded. Raises `OSError` or safetensors' own error if the disk refuses.
    """
    policy = {name.removeprefix("policy."): value for name, value in weights.items() if name.startswith("policy.")}
    policy_model: Any = module.policy
    adapters = [name for name in (POLICY, CRITIC) if name in getattr(policy_model, "peft_config", ())]
    remove_work_folders(folder.parent, folder.name)
    with work_folder(folder) as beside:
        policy_model.save_pretrained(beside, state_dict=policy, **({"selected_adapters": adapters} if adapters else {}))
        tokens.save(beside)
        # The value head, and what was trained of the transformer under it where that is a separate one. An adapter of
        # the critic's own lies in critic/, where peft puts it.
        critic = {name: value.contiguous() for name, value in weights.items() if not name.startswith("policy.")}
        if critic:
            save_file(critic, beside / VALUE_HEAD)
        (beside / "README.md").write_text(card, encoding="utf-8")
        found = fault(beside)
        if found is None:
            for settings in beside.rglob("adapter_config.json") if base is not None else ():
                tree = json.loads(settings.read_bytes())
                settings.write_text(json.dumps({**tree, "base_model_name_or_path": base}, indent=2), encoding="utf-8")
            flush_all(beside, like=beside / "README.md")
            replace_folder(beside, folder)
    return found


def load_value_head(folder: Path) -> dict[str, Tensor]:
    """The critic's weights that `export` wrote: `value_head.weight`, `value_head.bias`, and `critic.…` if separate."""
    return load_file(folder / VALUE_HEAD)


@dataclass(frozen=True, kw_only=True)
class Dump:
    """What stopped a run, with all that it takes to run it again.

    `facts` say what happened and name prompts, responses and columns; `experience` and `weights` (of what learns) are
    there where a model's numbers were at fault, by field and by name.
    """

    config: Config
    facts: dict[str, Any]
    experience: dict[str, Tensor]
    weights: dict[str, Tensor]


def write_dump(folder: Path, dump: Dump) -> None:
    """Raises `OSError` or safetensors' own error if it cannot be written."""
    with work_folder(folder) as beside:
        (beside / "config.yaml").write_text(to_yaml(dump.config), encoding="utf-8")
        (beside / "dump.json").write_text(
            json.dumps(dump.facts, indent=2, ensure_ascii=False, default=str), encoding="utf-8"
        )
        for name, tensors in (("experience", dump.experience), ("weights", dump.weights)):
            if tensors:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, beside / f"{name}.safetensors")
        replace_folder(beside, folder)


def read_dump(folder: Path) -> Dump:
    """Raises `ConfigError` if there is none."""
    try:
        facts: dict[str, Any] = dict(records.read(folder / "dump.json", records.Dumped))
        count = len(facts["prompts"])
        lengths = {len(column) for column in (facts["responses"], *facts.get("columns", {}).values())}
        if lengths != {count} or max(facts["rows"], default=-1) >= count:
            raise Malformed("prompts, responses, columns and rows of dump.json do not agree")
        tensors = [
            load_file(path) if (path := folder / f"{name}.safetensors").is_file() else {}
            for name in ("experience", "weights")
        ]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        dumps = sorted(
            str(path.parent) for path in (*folder.glob("step-*/dump.json"), *folder.glob("dumps/*/dump.json"))
        )
        missing = "it holds no dump.json; failed runs leave theirs in RUN/dumps"
        reason = missing if isinstance(error, FileNotFoundError) else str(error)
        reason = f"name one of {', '.join(dumps)}" if dumps else reason
        raise ConfigError(f"{folder} is no dump of a run: {reason}") from None
    return Dump(config=load_run(folder / "config.yaml"), facts=facts, experience=tensors[0], weights=tensors[1])


def _first_free(name: str) -> Path:
    parent = Path("saved_models").absolute()
    candidates = [parent / name, *(parent / f"{name}-{number}" for number in range(2, 10_000))]
    return next(folder for folder in candidates if not folder.exists() or not any(folder.iterdir()))
