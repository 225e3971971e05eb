"""Runs that end before their last step: the checkpoint, the dump and the message for the user.

Every function is called by all ranks. Those that return an exception leave raising it to the caller.
"""

from __future__ import annotations

import traceback
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rlhf_accel.algorithm.batches import Experience
from rlhf_accel.rollout.scoring import FailedScoring
from rlhf_accel.system.errors import RunFailed
from rlhf_accel.system.signals import STOPPED
from rlhf_accel.training.nonfinite import Fault, explain

if TYPE_CHECKING:
    from rlhf_accel.training.run import Run


def stopped(run: Run, received: str | None) -> SystemExit:
    """The exit after a stop signal, which is answered with a checkpoint."""
    progress = run.trainer.progress
    saved = run.recorder.save(progress)
    run.line.say(
        f"stopped by {received or 'a signal to another process'} after step {progress.step} of "
        f"{run.config.run.total_steps}; {run.recorder.how_to_resume()}"
    )
    return SystemExit(STOPPED if saved else 1)


def interrupted(run: Run) -> BaseException:
    """The exit after Ctrl-C, without waiting for other processes: the main process reports how to resume."""
    if not run.runtime.is_main:
        return SystemExit(130)
    where = f"{run.recorder.heartbeat.now} (of {run.config.run.total_steps})"
    return KeyboardInterrupt(f"stopped by Ctrl-C in {where}; {run.recorder.how_to_resume()}")


def scoring_failed(run: Run, error: FailedScoring) -> RunFailed:
    """The error after a reward has failed for good. Writes a checkpoint, and a dump of the inputs that it failed on."""
    if not run.recorder.is_open:  # during the calibration, when nothing has been trained or written
        return RunFailed(str(error))
    progress = run.trainer.progress
    evaluating = progress.unrecorded is not None
    facts = {
        "phase": "score",
        "step": progress.step + (not evaluating),
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error.__cause__ or error)),
        "rows": [],
        "arithmetic": run.trainer.setup.arithmetic(),
        **error.inputs,
    }
    place = run.recorder.dump(facts, None)
    return saved_and_failed(run, f"{error}; inspect it with python -m rlhf_accel replay {place}")


def saved_and_failed(run: Run, message: str) -> RunFailed:
    """The error that ends a run between two steps. Writes a checkpoint, and adds to the message how to resume."""
    try:
        run.recorder.save(run.trainer.progress)
    except RunFailed as unsaved:
        return RunFailed(f"{message}; {unsaved}")
    return RunFailed(f"{message}; {run.recorder.how_to_resume()}")


def skip(run: Run, fault: Fault, experience: Experience) -> None:
    """Count a step that is not taken and print why. Raises `RunFailed` if too many in a row were skipped."""
    trainer, most = run.trainer, run.config.run.max_skipped_steps
    count = trainer.progress.skipped_in_a_row + 1
    trainer.progress = replace(trainer.progress, skipped_in_a_row=count)
    message = explain(fault, trainer.rollout)
    run.warn(f"{message}; skipped, {count} in a row of run.max_skipped_steps={most}")
    if count < most:
        return
    message += f"; {count} steps in a row were skipped (run.max_skipped_steps)"
    if not run.recorder.is_open:  # step() was called by itself, which writes nothing
        raise RunFailed(message)
    facts: dict[str, Any] = {**asdict(fault), "message": message, "arithmetic": trainer.setup.arithmetic()}
    if trainer.rollout is not None:
        facts |= {"prompts": trainer.rollout.prompts, "responses": trainer.rollout.texts}
        facts |= {"scores": trainer.rollout.scores.tolist(), "columns": trainer.columns}
    place = run.recorder.dump(facts, experience)
    message += f"; inspect it with python -m rlhf_accel replay {place}"
    if fault.phase == "update":  # the step may be half taken, which no checkpoint records
        raise RunFailed(f"{message}; {run.recorder.how_to_resume()}")
    raise saved_and_failed(run, message)
