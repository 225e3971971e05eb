"""The options of each command, and their help.

Nothing here imports torch, so `--help` and a misspelt option are answered at once; pydantic is imported only by the
commands whose options are the keys of a config (train, train-reward, doctor).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_accel.config.options import take_option
from rlhf_accel.config.recipes import DEFAULT_RECIPE, REWARD_RECIPE
from rlhf_accel.config.trust import add_flag
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.terminal import say

if TYPE_CHECKING:
    from rlhf_accel.config.reward_schema import RewardTrainingConfig
    from rlhf_accel.config.schema import Config

FRONTIER_SAMPLES = 64
# Keys by which `evaluate` may differ from the run; the files that it writes record them.
DRAWN_FROM = ("rollout.temperature", "rollout.top_k", "rollout.top_p")
MODELS = ("final", "best")
DTYPES = ("fp32", "bf16", "fp16")
LOOPBACK = ("127.0.0.1", "localhost")
_DOCTOR_USAGE = """usage: rlhf-accel doctor [--config RECIPE_OR_FILE] [--section.key value ...]
       [--num_processes N] [--zero_stage 0|1|2|3] [--offload true] [--gpu_memory 80GiB]

Check a run before it starts and plan its memory; nothing is written. The exit status is 0 if there is no problem, else
2. --gpu_memory plans for GPUs of this size, even on a machine without one."""


def train(arguments: Sequence[str]) -> Config:
    from rlhf_accel.config.loading import from_command_line
    from rlhf_accel.config.schema import Config

    return from_command_line(Config, arguments, DEFAULT_RECIPE)


def train_reward(arguments: Sequence[str]) -> RewardTrainingConfig:
    from rlhf_accel.config.loading import from_command_line
    from rlhf_accel.config.reward_schema import RewardTrainingConfig

    return from_command_line(RewardTrainingConfig, arguments, REWARD_RECIPE)


def doctor(arguments: Sequence[str]) -> argparse.Namespace:
    """`source` and `overrides` of the config, and the launch to plan for. Raises `ConfigError`."""
    from rlhf_accel.config.loading import describe
    from rlhf_accel.config.schema import Config

    if "-h" in arguments or "--help" in arguments:
        say(f"{_DOCTOR_USAGE}\n\n{describe(Config)}")
        sys.exit(0)
    rest = list(arguments)
    source = take_option(rest, "config", "RECIPE_OR_FILE") or DEFAULT_RECIPE
    processes = _whole(take_option(rest, "num_processes", "N"), "--num_processes", 1)
    stage = _whole(take_option(rest, "zero_stage", "0|1|2|3"), "--zero_stage", 0)
    offload = take_option(rest, "offload", "true|false") or "false"
    if offload not in ("true", "false"):
        raise ConfigError(f"--offload {offload}: expected true or false", key="--offload")
    return argparse.Namespace(
        source=source,
        processes=processes,
        zero_stage=stage,
        offload=offload == "true",
        gpu_memory=take_option(rest, "gpu_memory", "80GiB"),
        overrides=rest,
    )


def generate(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser(
        "generate", "Continue prompts with a trained model, optionally beside its base model and with scores."
    )
    parser.add_argument("model", help="a run's folder, or a model or adapter (a folder or a hub id)")
    parser.add_argument(
        "prompts", nargs="*", help="prompts; if none are given, they are read from --file, from stdin or interactively"
    )
    parser.add_argument("--file", type=Path, help="a text file with one prompt per line")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="prompts are turns of the user, formatted by the chat template; typed ones continue one conversation "
        "(default: data.chat of the run, else no)",
    )
    parser.add_argument("--system", help="system turn of all conversations (default: data.system of the run)")
    parser.add_argument("--which", choices=MODELS, default="final", help="model of the run's folder (default: final)")
    parser.add_argument("--compare", action="store_true", help="show the continuation of the base model as well")
    parser.add_argument(
        "--score", action="store_true", help="score each response with the run's reward; needs a run's folder"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling (default: 0)")
    for key, kind in (("max_new_tokens", int), ("temperature", float), ("top_k", int), ("top_p", float)):
        parser.add_argument(f"--{key}", type=kind, help=f"overrides the run's rollout.{key}")
    add_flag(parser)
    return parser.parse_args(arguments)


def evaluate(arguments: Sequence[str]) -> argparse.Namespace:
    """Options that the parser does not know are kept as `overrides` of the run's config."""
    parser = _parser(
        "evaluate",
        "Evaluate the models of a run on its held-out prompts, and estimate how much any policy could gain at a given "
        "KL. Writes evaluation.json and frontier.json into the run's folder.",
        epilog="These keys of the run's config may be overridden with --section.key value: keys that change no result, "
        f"reward.gold, and the sampling distribution ({', '.join(DRAWN_FROM)}).",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument(
        "--which",
        nargs="+",
        metavar="MODEL",
        help="base, best, final, or step-NNNNNN for a portable checkpoint (default: best and final). The base is "
        "always evaluated, since the others are compared with it. final@0.7 is final with its adapter scaled by 0.7, "
        "which trades a little gain for much less KL",
    )
    parser.add_argument("--samples", type=_count, default=1, help="responses per prompt (default: 1)")
    parser.add_argument("--prompts", type=_count, help="number of held-out prompts (default: run.eval_samples)")
    parser.add_argument(
        "--batch",
        type=_count,
        help="responses sampled at once on each process (default: rollout.forward_batch_size)",
    )
    parser.add_argument(
        "--frontier",
        nargs="?",
        type=_count,
        const=FRONTIER_SAMPLES,
        metavar="N",
        help=f"draw N responses of the reference for each prompt (default: {FRONTIER_SAMPLES}) and estimate the best "
        "possible gain at each KL; without --which, no model is evaluated",
    )
    add_flag(parser)
    options, overrides = parser.parse_known_args(arguments)
    options.overrides = overrides
    return options


def merge(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser("merge", "Merge a trained adapter into its base, as one full model that plain transformers loads.")
    parser.add_argument("model", type=Path, help="a run's folder, or the folder of an adapter")
    parser.add_argument("output", type=Path, help="folder for the merged model; must not exist yet")
    parser.add_argument("--which", choices=MODELS, default="final", help="adapter of the run's folder (default: final)")
    parser.add_argument("--base", help="base model to use instead of the one that the run or the adapter names")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the merged weights (default: fp32)")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="scale of the adapter, at most 1: less gain for much less KL (default: 1)",
    )
    add_flag(parser)
    return parser.parse_args(arguments)


def push(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser(
        "push",
        "Upload a trained model to the Hugging Face hub. The token is the one of `hf auth login` or of the environment "
        "variable HF_TOKEN.",
    )
    parser.add_argument("model", type=Path, help="a run's folder, or the folder of an exported model")
    parser.add_argument("repo_id", help="USER/NAME on the hub; created if it does not exist")
    parser.add_argument("--which", choices=MODELS, default="final", help="model of the run's folder (default: final)")
    parser.add_argument("--private", action="store_true", help="if the repository is created, make it private")
    parser.add_argument("--base", help="hub id of the adapter's base, if the run loaded it from a local folder")
    return parser.parse_args(arguments)


def replay(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser(
        "replay",
        "Repeat the computation that stopped a run: the reward on the texts on which it failed, or the model on the "
        "samples of a dump.",
    )
    parser.add_argument("dump", type=Path, help="a folder dumps/step-NNNNNN of a run")
    add_flag(parser)
    return parser.parse_args(arguments)


def report(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser(
        "report",
        "Write one self-contained page with the curves, samples and config of one or several runs, and each chart as "
        "an image. A run that is still in progress can be reported too.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder; several runs are overlaid")
    parser.add_argument("--output", type=Path, help="the page (default: report.html in the first run's folder)")
    return parser.parse_args(arguments)


def reward_server(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser("reward-server", "Serve a reward over HTTP, for reward.url.")
    for key in ("function", "model", "label", "output", "text", "format", "chat_field", "chat_template"):
        parser.add_argument(f"--{key}", help=f"as reward.{key} in a run's config")
    parser.add_argument("--host", default=LOOPBACK[0], help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 chooses a free one and prints it")
    parser.add_argument("--max_bytes", type=int, default=16 << 20, help="size of the largest request that is accepted")
    parser.add_argument("--deadline", type=float, default=30.0, help="seconds for a whole request to arrive")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code that comes with --model; only for sources you trust"
    )
    options = parser.parse_args(arguments)
    if not options.function and not options.model:
        parser.error("name the reward with --function or --model")
    return options


def launch_config(arguments: Sequence[str]) -> argparse.Namespace:
    from rlhf_accel.distributed.launch_files import launch_names

    parser = _parser(
        "launch-config",
        "Print the path of a launch file for `accelerate launch --config_file`.",
        epilog="Example: accelerate launch --config_file $(rlhf-accel launch-config zero2) -m rlhf_accel train",
    )
    parser.add_argument("name", choices=launch_names(), help="name of the launch file")
    return parser.parse_args(arguments)


def _parser(
    command: str, description: str, *, epilog: str | None = None, allow_abbrev: bool = True
) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"rlhf-accel {command}", description=description, epilog=epilog, allow_abbrev=allow_abbrev
    )


def _whole(text: str | None, key: str, default: int) -> int:
    if text is None:
        return default
    if not text.isdecimal():
        raise ConfigError(f"{key} {text}: expected a whole number", key=key)
    return int(text)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return number
