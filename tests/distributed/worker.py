"""What each process of a test's launch runs: the runs of a JSON file, one after the other.

    accelerate launch … tests/distributed/worker.py RUNS.json

Each run is `{"config": tree}`. With `"gradient": path` the main process leaves its first gradient there and goes no
further; with `"poison"`, `"stop": phase` and `"no_room"` something happens to the last rank; with `"refused": text` the
run has to be refused with this text.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlhf_accel.config.loading import parse
from rlhf_accel.config.schema import Config
from rlhf_accel.distributed.runtime import Runtime
from rlhf_accel.models import calls
from rlhf_accel.models import cpu_kernels as kernels
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.training.ppo_trainer import PPOTrainer

# fp32 that is fp32 also on a CPU with bf16 units, which tune_process() would use: the runs are compared digit by digit.
torch.set_float32_matmul_precision("highest")
torch.set_float32_matmul_precision = lambda _: None
torch.set_num_threads(1)
kernels._WORTH_PACKING = 1  # else none of a tiny model's layers would be packed

response_logits = calls.response_logits


def check_that_weights_are_cut(trainer: PPOTrainer) -> None:
    """With ZeRO-3 each of two ranks holds half of the policy and the critic, and of the reference if it is a copy."""
    for module in filter(None, [trainer.runtime.plain_module, trainer.collector.reference]):
        held = sum(p.ds_tensor.numel() for p in module.parameters())
        whole = sum(p.ds_numel for p in module.parameters())
        assert held < 0.6 * whole, f"{held} of {whole}"
        assert all(p.numel() == 0 for p in module.parameters())


def once_nan(function: Callable[..., Any], when: Callable[[], bool] = lambda: True) -> Callable[..., Any]:
    """The function, with the first tensor that it returns while `when` holds turned to NaN."""
    done = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        made = function(*args, **kwargs)
        if done or not when():
            return made
        done.append(True)
        return (made[0] * float("nan"), *made[1:]) if isinstance(made, tuple) else made * float("nan")

    return wrapped


def poison(trainer: PPOTrainer) -> None:
    """Makes something NaN on the last rank: a score in step 1, in step 2 the logits that the rollout is learnt from, in
    step 3 a gradient."""

    def in_step(number: int) -> Callable[[], bool]:
        return lambda: trainer.run.recorder.heartbeat.now.endswith(f"of step {number}")

    ((name, weight, function),) = trainer.reward.terms
    bad = once_nan(lambda *args, **columns: torch.tensor(function(*args, **columns)), in_step(1))
    trainer.reward = replace(trainer.reward, terms=((name, weight, bad),))
    calls.response_logits = once_nan(calls.response_logits, in_step(2))
    bias = trainer.runtime.plain_module.value_head.bias
    bias.register_hook(once_nan(lambda gradient: gradient, in_step(3)))


def fill_the_disk(trainer: PPOTrainer) -> None:
    """While the last rank writes its part of the first checkpoint it may write 1,000 bytes to a file."""
    save, (soft, hard) = trainer.runtime.save_state, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_without_room(folder: Path) -> str | None:
        trainer.runtime.save_state = save
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            return save(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    trainer.runtime.save_state = save_without_room


def stop(trainer: PPOTrainer, phase: str) -> None:
    """Sends this process SIGTERM once, at the beginning of a phase of its second step."""

    def on_entering(said: str) -> None:
        if (
            said.startswith((f"{phase} of step 2", f"{phase} after step 2"))
            and trainer.run.recorder.heartbeat._post is on_entering
        ):
            trainer.run.recorder.heartbeat._post = lambda _: None
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.run.recorder.heartbeat._post = on_entering


def check_time_limits(seconds: float) -> None:
    """Those of the process groups that DeepSpeed makes, too."""
    for group in torch.distributed.distributed_c10d._world.pg_map:
        assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == seconds, group


class _Seen(Exception):
    pass


def note_gradient(trainer: PPOTrainer, path: Path) -> None:
    """Writes the gradient of the first minibatch, summed over ranks, and goes no further."""

    def instead_of_a_step() -> None:
        module = trainer.runtime.plain_module
        if trainer.runtime.zero_stage:
            from deepspeed.utils import safe_get_full_grad

            gradient = {name: safe_get_full_grad(p) for name, p in module.named_parameters() if p.requires_grad}
        else:
            gradient = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
        if trainer.runtime.is_main:
            torch.save({name: value.clone() for name, value in gradient.items()}, path)
        raise _Seen

    trainer.runtime.optimizer_step = instead_of_a_step
    try:
        trainer.step(trainer.setup.prompts.batch(1, trainer.setup.sizes.rollout))
    except _Seen:
        trainer.runtime.anywhere(False)


def main() -> None:
    # The process group has to outlive the first run.
    Runtime.close = lambda self: self.anywhere(False)
    for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        AcceleratorState._reset_state()
        if "refused" in run:
            with pytest.raises(ConfigError, match=run["refused"]):
                PPOTrainer(parse(Config, run["config"]))
            continue
        trainer = PPOTrainer(parse(Config, run["config"]))
        if trainer.runtime.world_size > 1:
            check_time_limits(trainer.config.run.collective_timeout)
        if trainer.runtime.zero_stage == 3:
            check_that_weights_are_cut(trainer)
        if trainer.runtime.rank == trainer.runtime.world_size - 1:
            if "poison" in run:
                poison(trainer)
            if "no_room" in run:
                fill_the_disk(trainer)
            if "stop" in run:
                stop(trainer, run["stop"])
        if "gradient" in run:
            note_gradient(trainer, Path(run["gradient"]))
        elif "stop" in run:
            try:
                trainer.fit()
            except SystemExit as left:
                assert left.code == 143, left.code
            else:
                raise AssertionError("the run did not stop")
        else:
            trainer.fit()
        calls.response_logits = response_logits


if __name__ == "__main__":
    main()
