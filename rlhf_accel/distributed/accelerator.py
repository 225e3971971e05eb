"""Making the Accelerator of a run from the settings of the launch and of the run.

Knows Accelerate and the environment that `accelerate launch` leaves; knows no module and no optimizer.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rlhf_accel.config.schema import RunConfig
from rlhf_accel.distributed.liveness import BEFORE_ABORT
from rlhf_accel.system.arithmetic import computes_in_bf16, has_gpu
from rlhf_accel.system.errors import ConfigError, first_line


def chosen_precision(precision: str) -> str:
    """`fp32` or `bf16`: `auto` is bf16 on a GPU that has bf16 arithmetic, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if has_gpu() and computes_in_bf16(torch.device("cuda")) else "fp32"


def make_accelerator(run: RunConfig, deepspeed: DeepSpeedPlugin | None) -> Accelerator:
    """Join the process group of the launch. Raises `ConfigError` for settings of the launch that cannot work."""
    no_gpu = not has_gpu()
    # The backend is named for a launch only: Accelerate takes a named backend as a sign of other processes. With
    # DeepSpeed on a CPU it finds the other processes only if gloo is named.
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 or deepspeed is not None
    timeout = timedelta(seconds=run.collective_timeout + (0 if no_gpu else BEFORE_ABORT))
    group = InitProcessGroupKwargs(backend="gloo" if no_gpu and launched else None, timeout=timeout)
    try:
        accelerator = Accelerator(
            mixed_precision="no",  # see Runtime.autocast()
            # Without this, Accelerate takes processes without a GPU for single ones, except those of DeepSpeed.
            cpu=no_gpu and deepspeed is None,
            deepspeed_plugin=deepspeed,
            # The runtime sets the boundaries of accumulation: Accelerate would also end one with the prompt loader.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            kwargs_handlers=[group] if launched else [],
            log_with=list(run.trackers) or None,
            project_dir=".",  # required here; the folder is set when the trackers start
        )
    except (ValueError, ImportError) as error:
        settings = "the launch's DeepSpeed settings" if deepspeed else "the launch's settings"
        raise ConfigError(f"{settings}: {first_line(error)}") from error
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"distributed_type={accelerator.distributed_type.value} of the launch is not supported; use one of "
            "accelerate_configs/: ddp or zero1 to zero3",
            key="distributed_type",
        )
    if deepspeed is not None:
        # Accelerate has told transformers about ZeRO-3, which would then shard every model that it loads.
        unset_hf_deepspeed_config()
    return accelerator


def release_accelerate() -> None:
    """Reset the precision that Accelerate keeps for the whole process, so that the next run of this process can set its
    own. The process group stays."""
    AcceleratorState._reset_state()


def check_precision_of_process() -> None:
    """Raises `ConfigError` if another `Accelerator` has set the precision of this process."""
    if not AcceleratorState._shared_state:
        return
    precision = AcceleratorState().mixed_precision
    if precision != "no":
        raise ConfigError(
            f"this process already has an Accelerator(mixed_precision={precision!r}), which would round within the "
            "run; make it after the run, with mixed_precision='no', or in another process",
            mixed_precision=precision,
        )
