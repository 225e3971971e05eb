"""One call of a reward function: the process's settings are restored, the time is limited, the result is checked.

Knows no config and nothing about what a function computes.
"""

from __future__ import annotations

import math
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_accel.reward.borrowed import restored_globals
from rlhf_accel.reward.classifier import Classifier
from rlhf_accel.reward.server import RemoteReward
from rlhf_accel.system.arithmetic import has_gpu
from rlhf_accel.system.errors import key_in

RewardFunction = Callable[..., Sequence[float]]
T = TypeVar("T")


class RewardError(RuntimeError):
    """A reward raised an exception, took too long, or did not return one number for each response.

    `key` and `facts` are as in a `ConfigError`: `raised` is the name of the exception, `score` the one that is not
    finite.
    """

    def __init__(self, message: str, *, key: str | None = None, **facts: Any) -> None:
        super().__init__(message)
        self.key = key
        self.facts = facts


def call(
    name: str,
    function: RewardFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    timeout: float | None,
) -> Float[Tensor, " B"]:
    """The function's scores (B,) in fp64 on the CPU, which may be infinite or nan; `timeout` is in seconds.

    Raises `RewardError`, which begins with `name`.
    """
    waited_for = isinstance(function, Classifier) and function.shared is not None
    if not prompts and not waited_for:  # a rank without a share: no function has to handle empty lists
        return torch.zeros(0, dtype=torch.float64)
    if isinstance(function, RemoteReward):
        timeout = timeout or function.timeout
    if isinstance(function, Classifier):
        timeout = None
    try:
        with restored_globals(name):
            values = _within(
                timeout,
                lambda: function(list(prompts), list(responses), **{key: list(each) for key, each in columns.items()}),
            )
    except KeyboardInterrupt:  # Ctrl-C
        raise
    except BaseException as error:  # SystemExit and GeneratorExit too: a reward must not end the process
        message = f"{name} raised {describe(error)}{_place(error)}"
        raise RewardError(message, key=key_in(name), raised=type(error).__name__) from error
    try:
        scores = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    except Exception as error:  # the returned object may raise anything when it is read
        raise RewardError(
            f"{name} returned {_shown(values)}; return one number for each response", key=key_in(name)
        ) from error
    if scores.shape != (len(prompts),):
        found = f"{len(scores)} scores" if scores.ndim == 1 else f"an array of shape {tuple(scores.shape)}"
        raise RewardError(
            f"{name} returned {found} for {len(prompts)} responses; return one number for each", key=key_in(name)
        )
    return scores


def check_finite(name: str, scores: Float[Tensor, " B"], responses: Sequence[str]) -> None:
    """Raises `RewardError`, which begins with `name`, for the first score that is not finite."""
    for score, response in zip(scores.tolist(), responses, strict=True):
        if not math.isfinite(score):
            raise RewardError(
                f"{name} returned {score} for the response {response!r:.80}; return finite numbers",
                key=key_in(name),
                score=score,
            )


def describe(error: BaseException) -> str:
    """The exception's type and text; the type alone if its text cannot be made."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _place(error: BaseException) -> str:
    """The file and line that raised it, unless they are this package's: a server that failed, or a time limit."""
    frames = traceback.extract_tb(error.__traceback__)
    path = Path(frames[-1].filename) if frames else Path(__file__)
    return "" if path.parent == Path(__file__).parent else f" ({path.name}:{frames[-1].lineno})"


def _within(seconds: float | None, work: Callable[[], T]) -> T:
    """The result of `work`, or its exception; `TimeoutError` if it takes longer, and then its thread is abandoned."""
    if seconds is None:
        return work()
    outcome: list[Callable[[], T]] = []
    device = torch.cuda.current_device() if has_gpu() else None

    def run() -> None:
        try:
            if device is not None:  # each thread begins with the first GPU, whichever the rank's is
                torch.cuda.set_device(device)
            value = work()
        except BaseException as error:
            raised = error
            outcome.append(lambda: _raise(raised))
        else:
            outcome.append(lambda: value)

    # A daemon thread: a function that never returns must not keep the process alive.
    thread = threading.Thread(target=run, daemon=True, name="reward")
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within reward.timeout={seconds:g} s")
    return outcome[0]()


def _raise(error: BaseException) -> Any:
    raise error


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except Exception:
        return f"an object of type {type(value).__name__}"
