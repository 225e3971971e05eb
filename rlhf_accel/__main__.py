"""python -m rlhf_accel COMMAND: one process, or every process of an `accelerate launch`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from rlhf_accel.config.loading import DEFAULT_RECIPE, from_command_line, recipe_names
from rlhf_accel.config.schema import Config
from rlhf_accel.system import console
from rlhf_accel.system.errors import ConfigError, Finished, RunFailed
from rlhf_accel.system.terminal import guard_messages, say

_OTHERS_WAIT = 20.0  # seconds; other processes of the launch may still be importing torch
_SPEAKER_NEEDS = 2.0  # seconds, to say it once it is known who does

USAGE = f"""usage: python -m rlhf_accel COMMAND [options]

  train          PPO: [--config RECIPE_OR_FILE] [--section.key value ...] [--print_config]
  generate       continue prompts with a trained model, beside its base and with scores
  evaluate       a run's models on its held-out prompts: RUN [--which MODEL ...] [--frontier [N]]
  merge          an adapter and its base as one full model: RUN_OR_ADAPTER OUTPUT
  push           a run's model to the hub: RUN USER/NAME
  replay         run again what stopped a run: DUMP
  report         one page with a run's curves, samples and config: RUN... [--output FILE]
  doctor         check a run before it starts, plan its memory: as train, and [--num_processes N] [--gpu_memory 80GiB]
  train-reward   a reward model from human feedback: [--config RECIPE_OR_FILE] [--section.key value ...]

COMMAND --help lists a command's options. Recipes: {", ".join(recipe_names())}.
Without --config, train uses {DEFAULT_RECIPE}."""


def train(arguments: list[str]) -> None:
    config = from_command_line(Config, arguments, DEFAULT_RECIPE)
    console.may_fail()
    from rlhf_accel.training.ppo_trainer import PPOTrainer

    PPOTrainer(config).fit()


def generate(arguments: list[str]) -> None:
    from rlhf_accel.commands.generate import main

    main(arguments)


def evaluate(arguments: list[str]) -> None:
    from rlhf_accel.commands.evaluate import main

    console.may_fail()
    main(arguments)


def merge(arguments: list[str]) -> None:
    from rlhf_accel.commands.merge import main

    console.may_fail()
    main(arguments)


def push(arguments: list[str]) -> None:
    from rlhf_accel.runs.hub import main

    console.may_fail()
    main(arguments)


def replay(arguments: list[str]) -> None:
    from rlhf_accel.commands.replay import main

    main(arguments)


def report(arguments: list[str]) -> None:
    from rlhf_accel.runs.report.page import main

    console.may_fail()
    main(arguments)


def doctor(arguments: list[str]) -> None:
    from rlhf_accel.commands.doctor import main

    main(arguments)


def train_reward(arguments: list[str]) -> None:
    from rlhf_accel.training.reward_trainer import main

    main(arguments)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "generate": generate,
    "evaluate": evaluate,
    "merge": merge,
    "push": push,
    "replay": replay,
    "report": report,
    "doctor": doctor,
    "train-reward": train_reward,
}


def run(command: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Run a command and leave with its status: 0 done, 1 crash, 2 bad config or input, 130 Ctrl-C, 143 stopped."""
    guard_messages()
    with console.guarded():
        try:
            _told(command, arguments)
        except Finished as done:
            _leave(str(done), 0)
        except ConfigError as error:
            _leave(f"error: {error}", 2)
        except RunFailed as error:
            _leave(f"error: {error}", 1)
        except KeyboardInterrupt as stop:
            say(str(stop) or "stopped by Ctrl-C", error=True)
            sys.exit(130)


def _told(command: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Run a command and see to it that the console takes what it printed."""
    try:
        command(arguments)
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _leave(said: str, status: int) -> NoReturn:
    """Say something that others of the launch may have met too, once, and end with this status.

    A process that is not the one to say it leaves some time later: the launcher ends all as soon as one has left, which
    has to be the one that spoke. If that one met no error, there is nobody but this one to say it.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        from rlhf_accel.distributed.liveness import first_of_all

        speaks = first_of_all("error")
        silent = not speaks  # somebody has said it
    else:
        speaks, silent = os.environ.get("LOCAL_RANK", "0") == "0", False
    if not speaks:
        time.sleep(_SPEAKER_NEEDS if silent else _OTHERS_WAIT)
    if not silent:
        say(said, error=True)
    sys.exit(status)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        say(USAGE)
        return
    if arguments[0] not in COMMANDS:
        say(f"error: unknown command {arguments[0]!r}; commands are {', '.join(COMMANDS)}", error=True)
        sys.exit(2)
    run(COMMANDS[arguments[0]], arguments[1:])


if __name__ == "__main__":
    main()
