"""Numbers that are not finite: the phase, the quantity and the samples. Knows batches; knows no model and no rank."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_accel.algorithm.batches import Rollout


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A quantity that was not finite, so that a step was skipped; the same on every rank.

    `rows` are places in the step's global batch: of the samples at fault where these are known (scores, rollout), else
    of the minibatch that was skipped.
    """

    step: int
    phase: str  # score, rollout or update
    what: str  # the quantity: scores, logprobs, …, loss, gradient
    rows: tuple[int, ...]
    where: str = ""  # in an update: epoch and minibatch


def rollout_fault(rollout: Rollout, step: int) -> Fault | None:
    """The first quantity of a rollout that is not finite for some samples; None if all are finite."""
    for name in ("scores", "logprobs", "ref_logprobs", "values", "entropy"):
        figures = getattr(rollout, name)
        if figures is None:  # without a critic
            continue
        bad = ~figures.isfinite().reshape(len(rollout), -1).all(1)
        if bad.any():
            phase = "score" if name == "scores" else "rollout"
            return Fault(step=step, phase=phase, what=name, rows=tuple(bad.nonzero()[:, 0].tolist()))
    return None


def explain(fault: Fault, rollout: Rollout | None) -> str:
    """One line with the quantity, the place and the samples, and the text of the first one."""
    shown = ", ".join(map(str, fault.rows[:8])) + (", …" if len(fault.rows) > 8 else "")
    verb = "is" if fault.what in ("loss", "gradient", "entropy") else "are"
    message = f"{fault.what} {verb} not finite in the {fault.phase} of step {fault.step}{fault.where}: samples {shown}"
    if rollout is None or not fault.rows:
        return message
    prompt, response = rollout.prompts[fault.rows[0]], rollout.texts[fault.rows[0]]
    return f"{message}; the first: {prompt!r:.60} -> {response!r:.60}"
