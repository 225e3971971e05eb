"""rlhf-accel COMMAND, or python -m rlhf_accel COMMAND: one process, or each process of a launch."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from rlhf_accel.commands import parsers
from rlhf_accel.config.recipes import DEFAULT_RECIPE, recipe_names
from rlhf_accel.distributed.deepspeed_launch import take_launch_options
from rlhf_accel.system import console
from rlhf_accel.system.errors import ConfigError, Finished, RunFailed
from rlhf_accel.system.terminal import drop_remarks, guard_messages, say

_WAIT_FOR_OTHERS = 20.0  # seconds; other processes of the launch may still be importing torch
_WAIT_FOR_MESSAGE = 2.0  # seconds for the chosen process to print

USAGE = f"""usage: rlhf-accel COMMAND [options]

  train          PPO: [--config RECIPE_OR_FILE] [--section.key value ...] [--print_config]
  train-reward   train a reward model on human feedback: [--config RECIPE_OR_FILE] [--section.key value ...]
  doctor         check a run before it starts and plan its memory: as train, and [--num_processes N]
  generate       continue prompts with a trained model, optionally beside its base and with scores
  evaluate       evaluate a run's models on its held-out prompts: RUN [--which MODEL ...] [--frontier [N]]
  report         write a page with a run's curves, samples and config: RUN... [--output FILE]
  replay         repeat the computation that stopped a run: DUMP
  merge          merge an adapter into its base: RUN_OR_ADAPTER OUTPUT
  push           upload a run's model to the hub: RUN USER/NAME
  reward-server  serve a reward over HTTP: --function MODULE:NAME or --model NAME
  launch-config  print the path of a launch file for `accelerate launch --config_file`: NAME

COMMAND --help lists the options of a command. Recipes: {", ".join(recipe_names())}.
Without --config, train uses {DEFAULT_RECIPE}."""

# Options are parsed before the module of the command is imported, which takes seconds.
COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "train": parsers.train,
    "train-reward": parsers.train_reward,
    "doctor": parsers.doctor,
    "generate": parsers.generate,
    "evaluate": parsers.evaluate,
    "report": parsers.report,
    "replay": parsers.replay,
    "merge": parsers.merge,
    "push": parsers.push,
    "reward-server": parsers.reward_server,
    "launch-config": parsers.launch_config,
}


LAUNCHED = ("train", "train-reward", "evaluate")  # by several processes together


def start(name: str, arguments: list[str]) -> None:
    """Parse the options of a command, then import its module and run it."""
    if name in LAUNCHED:
        arguments = take_launch_options(arguments)
    options = COMMANDS[name](arguments)
    importlib.import_module(f"rlhf_accel.commands.{name.replace('-', '_')}").main(options)


def run(command: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Run a command and exit with its status: 0 done, 1 crash, 2 bad config or input, 130 Ctrl-C, 143 stopped."""
    guard_messages()
    drop_remarks()
    with console.guarded():
        try:
            _flushed(command, arguments)
        except Finished as done:
            _exit(str(done), 0)
        except ConfigError as error:
            _exit(f"error: {error}", 2)
        except RunFailed as error:
            _exit(f"error: {error}", 1)
        except KeyboardInterrupt as stop:
            say(str(stop) or "stopped by Ctrl-C", error=True)
            sys.exit(130)


def _flushed(command: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Run a command and flush its output, so that a console that cannot be written is an error."""
    try:
        command(arguments)
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _exit(message: str, status: int) -> NoReturn:
    """Print a message once, even if several processes of the launch have met the same error, and exit with the status.

    The other processes exit some time later: the launcher ends all of them as soon as one has left, and this has to be
    the one that printed. If that one has met no error, another prints the message after its wait.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        from rlhf_accel.distributed.liveness import first_of_all

        prints = first_of_all("error")
        printed_elsewhere = not prints
    else:
        prints, printed_elsewhere = os.environ.get("LOCAL_RANK", "0") == "0", False
    if not prints:
        time.sleep(_WAIT_FOR_MESSAGE if printed_elsewhere else _WAIT_FOR_OTHERS)
    if not printed_elsewhere:
        say(message, error=True)
    sys.exit(status)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        say(USAGE)
        return
    if arguments[0].startswith("--local_rank="):  # `deepspeed --module rlhf_accel train` puts it before the command
        arguments = [*arguments[1:2], arguments[0], *arguments[2:]]
    if arguments[0] not in COMMANDS:
        say(f"error: unknown command {arguments[0]!r}; commands are {', '.join(COMMANDS)}", error=True)
        sys.exit(2)
    run(partial(start, arguments[0]), arguments[1:])


if __name__ == "__main__":
    main()
