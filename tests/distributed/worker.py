"""What each process of a test's launch runs: the runs of a JSON file, one after the other.

    accelerate launch … tests/distributed/worker.py RUNS.json

Each run is `{"config": tree}`, and with `"gradient": path` the main process also leaves its first gradient there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlhf_accel.config import Config, parse
from rlhf_accel.distributed import Runtime
from rlhf_accel.trainer import PPOTrainer

# fp32 that is fp32 also on a CPU with bf16 units, which tune_process() would use: the runs are compared digit by digit.
torch.set_float32_matmul_precision("highest")
torch.set_float32_matmul_precision = lambda _: None
torch.set_num_threads(1)


def check_that_weights_are_cut(trainer: PPOTrainer) -> None:
    """With ZeRO-3 each of two ranks holds half of the policy and the critic, and of the reference if it is a copy."""
    for module in filter(None, [trainer.runtime.plain_module, trainer.sampler.reference]):
        held = sum(p.ds_tensor.numel() for p in module.parameters())
        whole = sum(p.ds_numel for p in module.parameters())
        assert held < 0.6 * whole, f"{held} of {whole}"
        assert all(p.numel() == 0 for p in module.parameters())


def poison(trainer: PPOTrainer) -> None:
    """Makes the first gradient of the last rank NaN."""
    runtime = trainer.runtime
    if runtime.rank == runtime.world_size - 1:
        bias = runtime.plain_module.value_head.bias

        def once(gradient: torch.Tensor) -> torch.Tensor:
            handle.remove()
            return gradient * float("nan")

        handle = bias.register_hook(once)


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
        trainer.step(trainer.prompts.batch(1, trainer.sizes.rollout))
    except _Seen:
        trainer.runtime.barrier()


def main() -> None:
    # The process group has to outlive the first run.
    Runtime.close = lambda self: self.barrier()
    for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        AcceleratorState._reset_state()
        trainer = PPOTrainer(parse(Config, run["config"]))
        if trainer.runtime.zero_stage == 3:
            check_that_weights_are_cut(trainer)
        if run.get("poison"):
            poison(trainer)
        if "gradient" in run:
            note_gradient(trainer, Path(run["gradient"]))
        else:
            trainer.fit()


if __name__ == "__main__":
    main()
