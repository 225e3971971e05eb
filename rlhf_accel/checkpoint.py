"""What a run leaves on disk: its folder, checkpoints to go on from, and models that transformers and peft load."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_accel.config import Config, ConfigError
from rlhf_accel.models import CRITIC, POLICY, PolicyWithValue
from rlhf_accel.tokens import Tokens

VALUE_HEAD = "value_head.safetensors"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """All that a run has to remember besides weights and optimizer: prompts and random numbers follow from the step."""

    step: int = 0
    episodes: int = 0
    skipped: int = 0
    kl_coef: float = 0.0
    reward_mean: float = 0.0
    reward_std: float = 1.0
    best_score: float | None = None
    base: dict[str, float] | None = None  # the evaluation before the first step
    zero_stage: int = 0  # 0 is no DeepSpeed
    world_size: int = 1


def choose_folder(config: Config) -> Path:
    """The run's folder, not yet made: nothing is written before the rest of a run was checked.

    Raises `ConfigError` if it cannot be made or written, or already holds another run.
    """
    run = config.run
    folder = Path(run.output_dir) if run.output_dir is not None else _first_free(Path("saved_models"), run.name)
    if holds_run(folder) and run.resume is None:
        raise ConfigError(
            f"run.output_dir={folder} already holds a run; choose another folder, or go on with --run.resume latest"
        )
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise ConfigError(f"run.output_dir={folder} cannot be made: {existing} is a file; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"run.output_dir={folder} cannot be written: no permission in {existing}; choose another")
    return folder


def make_folder(folder: Path, config: str, *, resumes: bool = False) -> None:
    """Make the run's folder with its config.yaml; raises `ConfigError` if the system refuses, or if another run took
    the folder since it was chosen."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "config.yaml").open("w" if resumes else "x", encoding="utf-8") as file:
            file.write(config)
    except FileExistsError:
        raise ConfigError(f"run.output_dir={folder} was taken by another run meanwhile; name another folder") from None
    except OSError as error:
        raise ConfigError(f"run.output_dir={folder} cannot be written ({error.strerror}); choose another") from error


def holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints"))


def resume_folder(config: Config, folder: Path, *, zero_stage: int = 0, world_size: int = 1) -> Path | None:
    """The checkpoint that run.resume names, None for a new run.

    Raises `ConfigError` if there is none, or none that this config and this launch can go on from.
    """
    if config.run.resume is None:
        return None
    chosen = Path(config.run.resume)
    if config.run.resume == "latest":
        pointer = folder / "checkpoints" / "latest"
        if not pointer.is_file():
            raise ConfigError(f"run.resume=latest: {folder} holds no checkpoint; set run.save_every in a new run")
        chosen = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if not (chosen / "progress.json").is_file():
        raise ConfigError(f"run.resume={config.run.resume}: {chosen} is not a whole checkpoint")
    progress = load_progress(chosen)
    if progress.step >= config.run.total_steps:
        raise ConfigError(
            f"run.total_steps={config.run.total_steps}: {chosen} has done {progress.step} steps already; raise it"
        )
    if progress.zero_stage != zero_stage or (zero_stage and progress.world_size != world_size):
        written, now = (
            f"ZeRO-{stage} on {size} processes" if stage else "no DeepSpeed"
            for stage, size in ((progress.zero_stage, progress.world_size), (zero_stage, world_size))
        )
        raise ConfigError(f"run.resume={config.run.resume}: {chosen} was written with {written}, and this is {now}")
    calibrated = (progress.reward_mean, progress.reward_std) != (0.0, 1.0)
    if calibrated != config.reward.calibrate:
        asked = str(config.reward.calibrate).lower()
        raise ConfigError(f"reward.calibrate={asked} is not what {chosen} was trained with; set it back")
    return chosen


def save_checkpoint(
    folder: Path, progress: Progress, save_state: Callable[[Path], None], *, is_main: bool, barrier: Callable[[], None]
) -> None:
    """Write checkpoints/step-NNNNNN beside its place, rename it there, and let `latest` name it last."""
    place = folder / "checkpoints" / f"step-{progress.step:06d}"
    beside = place.with_name(f".{place.name}")
    if is_main:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    barrier()
    save_state(beside)
    barrier()
    if is_main:
        (beside / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)
        beside.rename(place)
        pointer = place.parent / "latest"
        pointer.with_suffix(".new").write_text(place.name, encoding="utf-8")
        os.replace(pointer.with_suffix(".new"), pointer)
    barrier()


def load_progress(checkpoint: Path) -> Progress:
    return Progress(**json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")))


def export(folder: Path, module: PolicyWithValue, weights: Mapping[str, Tensor], tokens: Tokens, card: str) -> None:
    """Write the policy in Hugging Face form (full model, or peft adapter), the value head beside it, and a model card.

    `weights` are the module's whole weights, as `Runtime.learned_weights` gives them; main process only.
    """
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    policy = {name.removeprefix("policy."): value for name, value in weights.items() if name.startswith("policy.")}
    policy_model: Any = module.policy
    adapters = [name for name in (POLICY, CRITIC) if name in getattr(policy_model, "peft_config", ())]
    policy_model.save_pretrained(beside, state_dict=policy, **({"selected_adapters": adapters} if adapters else {}))
    tokens.save(beside)
    # The value head, and what learnt of the transformer under it where that is a separate one. An adapter of the
    # critic's own lies in critic/, where peft puts it.
    critic = {name: value.contiguous() for name, value in weights.items() if not name.startswith("policy.")}
    save_file(critic, beside / VALUE_HEAD)
    (beside / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def load_value_head(folder: Path) -> dict[str, Tensor]:
    """The critic's weights that `export` wrote: `value_head.weight`, `value_head.bias`, and `critic.…` if separate."""
    return load_file(folder / VALUE_HEAD)


def model_card(config: Config, results: Mapping[str, Any]) -> str:
    """A model card with what the run was and what came out."""
    lines = [f"| {key} | {value:.3f} |" for key, value in results.items() if isinstance(value, (int, float))]
    reward = config.reward.model or ", ".join(config.reward.function) or "a Python function"
    peft = config.lora.r > 0
    front = [
        "---",
        f"library_name: {'peft' if peft else 'transformers'}",
        f"base_model: {config.model.name_or_path}",
        "tags: [rlhf, ppo, rlhf_accel]",
        "---",
    ]
    return "\n".join(
        [
            *front,
            f"# {config.run.name}",
            "",
            f"`{config.model.name_or_path}`, fine-tuned by PPO{' with LoRA' if peft else ''} for "
            f"{config.run.total_steps} steps of {config.rollout.batch_size} responses against the reward `{reward}`.",
            "",
            "| result | |",
            "| --- | --- |",
            *lines,
            "",
        ]
    )


def _first_free(parent: Path, name: str) -> Path:
    candidates = [parent / name, *(parent / f"{name}-{number}" for number in range(2, 10_000))]
    return next(folder for folder in candidates if not folder.exists() or not any(folder.iterdir()))
