"""Run by test_nonfinite.py on a failing disk, under faulty_disk.c: `python disk_worker.py every|full CONFIG`."""

from __future__ import annotations

import ctypes
import errno
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlhf_accel.config.loading import load
from rlhf_accel.config.schema import Config
from rlhf_accel.runs import recorder
from rlhf_accel.runs.resume import resume_folder
from rlhf_accel.training.ppo_trainer import PPOTrainer

# Exact fp32 also on a CPU with bf16 units, as in the comparing test: tune_process() would allow bf16 products.
torch.set_float32_matmul_precision("highest")
torch.set_float32_matmul_precision = lambda _: None
torch.set_num_threads(1)
disk = ctypes.CDLL(None)
disk.disk_calls.restype = ctypes.c_long
disk.disk_arm.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int]


def tensors(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "learned.safetensors") | load_file(place / "optimizer.safetensors")


def every_call(config: Config) -> dict[str, int]:
    """Let every call of a save fail in turn; after each, the newest checkpoint has to be a whole one and to load."""
    config = replace(config, optim=replace(config.optim, schedule="constant"))  # it takes a step more than total_steps
    trainer = PPOTrainer(config)
    trainer.fit()
    resumed = replace(config, run=replace(config.run, resume="latest", total_steps=99))
    old = trainer.folder / "checkpoints" / "step-000002"
    expected, counts = {old.name: tensors(old)}, {}
    trainer.step(trainer.setup.prompts.batch(3, trainer.setup.sizes.rollout))
    # First beside step 2; then over what there is of step 3.
    for newest, error in (("step-000002", errno.ENOSPC), ("step-000003", errno.EIO)):
        nth = 0
        while True:
            nth += 1
            disk.disk_arm(nth, error, 0)
            saved = trainer.run.recorder.save(trainer.progress)
            reached = disk.disk_calls()
            disk.disk_arm(0, 0, 0)
            place = resume_folder(resumed, trainer.folder, lambda message: None)
            assert place is not None
            if saved:
                assert reached < nth, f"call {nth} failed unnoticed"
                assert place.name == "step-000003"
                break
            found = tensors(place)
            # A failure after the rename leaves the new one, whole.
            expected.setdefault(place.name, found)
            assert newest <= place.name <= "step-000003", place.name
            assert found.keys() == expected[place.name].keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected[place.name].items()), nth
        counts[errno.errorcode[error]] = nth - 1
        trainer.run.recorder._saved = None
    return counts


def full_disk(config: Config) -> dict[str, int]:
    """From within step 2 to the end of step 4 nothing can be written."""
    trainer = PPOTrainer(config)
    step = trainer.step

    def fill_and_free(prompts: object) -> dict[str, float]:
        metrics = step(prompts)
        if metrics["step"] == 2:
            disk.disk_arm(1, errno.ENOSPC, 1)
        if metrics["step"] == 5:
            failed["calls"] = disk.disk_calls()
            disk.disk_arm(0, 0, 0)
        return metrics

    failed: dict[str, int] = {}
    trainer.step = fill_and_free
    recorder._RETRY = 0.0
    trainer.fit()
    return failed


if __name__ == "__main__":
    what, path = sys.argv[1:]
    print(json.dumps({"every": every_call, "full": full_disk}[what](load(Config, path))))
