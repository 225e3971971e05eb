"""The output folder of reward training: checked, locked, built beside its destination and renamed at the end.

Knows folders and processes; knows no model.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from rlhf_accel.config.reward_schema import RewardTrainingConfig
from rlhf_accel.system.errors import ConfigError, RunFailed, first_line
from rlhf_accel.system.files import replace_folder
from rlhf_accel.system.lock import hold
from rlhf_accel.system.terminal import say


@contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside the output, the same for all processes.

    Raises `RunFailed` if the disk refuses to store the files that the block writes.
    """
    made = [tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.work-") if is_main() else ""]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(made)
    try:
        yield Path(made[0])
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"{output} could not be written ({error}); make room, or name another run.output_dir"
        ) from error
    finally:
        if is_main():
            shutil.rmtree(made[0], ignore_errors=True)


@contextmanager
def kept_if_refused(trained: Path, output: Path) -> Iterator[None]:
    """If the block raises `RunFailed`, move the folder `trained` to NAME.refused beside the output, which the error
    then names: a long training is not lost to a fault of the writing."""
    try:
        yield
    except RunFailed as error:
        kept = output.with_name(f"{output.name}.refused")
        replace_folder(trained, kept)
        raise RunFailed(f"{error}; {output} is not written, and the trained weights are kept in {kept}") from error


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the lock of the output folder. It lies beside the folder, which does not exist before the end.

    Raises `ConfigError` if another process is training for the same folder.
    """
    if os.environ.get("RANK", "0") != "0":  # the main process locks for all; they do not communicate yet
        yield
        return
    try:
        held = hold(output.parent / f".{output.name}.lock", f"run.output_dir={output}", "run.output_dir", say)
    except OSError as error:
        raise ConfigError(
            f"run.output_dir={output}: {output.parent} cannot be written ({error.strerror}); name another folder",
            key="run.output_dir",
        ) from error
    try:
        yield
    finally:
        held.release()


def on_main(work: Callable[[], None]) -> None:
    """Run `work` in the main process while the others wait. If it raises, they raise `RunFailed` with its message."""
    failed: BaseException | None = None
    if is_main():
        try:
            work()
        except Exception as error:
            failed = error
    message = [None if failed is None else first_line(failed)]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(message)
    if failed is not None:
        raise failed
    if message[0] is not None:
        raise RunFailed(f"the main process could not write the model: {message[0]}")


def is_main() -> bool:
    """Whether this is the main process of the launch, or the only process."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def free_folder(config: RewardTrainingConfig) -> Path:
    """The absolute path of the output folder; raises `ConfigError` if it is in use or cannot be written."""
    output = Path(config.run.output_dir or Path("saved_models") / config.run.name).absolute()
    if output.exists() and not output.is_dir():
        raise ConfigError(f"run.output_dir={output} is a file; name a folder", key="run.output_dir")
    if output.is_dir() and any(output.iterdir()):
        problem = "already holds a model" if (output / "config.json").exists() else "is not empty"
        raise ConfigError(f"run.output_dir={output} {problem}; name another folder, or remove it", key="run.output_dir")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run.output_dir={output} cannot be made ({error.strerror}); name another folder", key="run.output_dir"
        ) from None
    if not os.access(output.parent, os.W_OK):
        raise ConfigError(
            f"run.output_dir={output}: {output.parent} is not writable; name another folder", key="run.output_dir"
        )
    return output
