"""A module inside a DeepSpeed engine: sharding, gathering, gradients, state. The counterpart of `data_parallel.py`.

Knows DeepSpeed, also behind its public API; the config of the engine comes from `deepspeed_config.py`.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from torch import Tensor, nn

from rlhf_accel.distributed import collectives
from rlhf_accel.distributed.liveness import share_time_limit
from rlhf_accel.distributed.weights import whole_weights
from rlhf_accel.system.errors import ConfigError, first_line
from rlhf_accel.system.files import failure
from rlhf_accel.system.memory import free_memory

_ENGINE = "engine"  # DeepSpeed's folder in a checkpoint
_GATHER_BYTES = 2**28  # of parameters that ZeRO-3 gathers in one collective


class Zero:
    """Module and optimizer under ZeRO. `gather_parameters` is `rollout.gather_parameters` of the config."""

    def __init__(self, accelerator: Accelerator, plugin: DeepSpeedPlugin, gather_parameters: str) -> None:
        self.stage: int = plugin.zero_stage
        self._accelerator = accelerator
        self._plugin = plugin
        self._gather_parameters = gather_parameters
        self.module: Any = None
        self.optimizer: Any = None
        self._skeleton: Any = None  # with stage 3

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        # DeepSpeed allocates a buffer for this many gradients, by default 500 million.
        trainable = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        zero = self._plugin.deepspeed_config["zero_optimization"]
        zero.setdefault("reduce_bucket_size", min(trainable, 500_000_000))
        if self.stage == 3:
            self._skeleton = skeleton(module)
            self._shard(module)
        self.module, self.optimizer = self._accelerator.prepare(module, optimizer)
        share_time_limit()
        self.module.checkpoint_engine = _shard_files()
        # Rank 0 would copy a script beside the shards and ignore failures; portable checkpoints make it superfluous.
        self.module._copy_recovery_script = lambda folder: None

    def prepare_frozen(self, module: nn.Module) -> nn.Module:
        """With ZeRO-3 sharded, and offloaded where parameters are."""
        if self.stage != 3:
            return module.to(self._accelerator.device)
        import deepspeed

        self._shard(module)
        engine: nn.Module = deepspeed.initialize(model=module, config=self._config_without_optimizer())[0]
        return engine

    def _shard(self, module: nn.Module) -> None:
        """Shard the parameters over the ranks one by one: the engine would first move the whole module to the device.

        From here on `torch.nn.functional.linear` is DeepSpeed's, in the whole process: torch's would keep the whole
        weights alive until the backward pass. It agrees with torch's up to rounding.
        """
        import deepspeed

        deepspeed.zero.Init(module=module, config_dict_or_path=self._config_without_optimizer())
        for buffer in module.buffers():  # moved neither by Init nor by the engine
            buffer.data = buffer.data.to(self._accelerator.device)

    def _config_without_optimizer(self) -> dict[str, Any]:
        config: dict[str, Any] = copy.deepcopy(self._plugin.deepspeed_config)
        config["zero_optimization"].pop("offload_optimizer", None)
        return config

    # Gradients

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch: the last one ends the accumulation."""
        self.module.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor, drop: Callable[[], bool]) -> bool:
        """Add to the gradients; if `drop()` is True, drop them all. Returns the result of `drop()`.

        It is called before the backward pass, which depends on it.
        """
        dropped = drop()
        # The engine's own: Accelerate's backward would also step, before the norm is known.
        with self._poisoned() if dropped else contextlib.nullcontext():
            self.module.backward(loss)
        if dropped:
            _, taken = self.step()
            assert not taken, "a gradient of NaN was applied"
        return dropped

    @contextlib.contextmanager
    def _poisoned(self) -> Iterator[None]:
        """Make gradients NaN: ZeRO cannot drop gradients that are reduced and sharded, but skips a step with NaN."""
        trainable = [p for p in self.module.parameters() if p.requires_grad]
        handles = [p.register_hook(lambda gradient: torch.full_like(gradient, torch.nan)) for p in trainable]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def step(self) -> tuple[float, bool]:
        """Clip and step. Returns the gradient norm before clipping, and whether the step was taken."""
        self.module.step()
        return float(self.module.get_global_grad_norm()), self.module.was_step_applied()

    # Gathering

    def parts(self, parameters: Sequence[Any], *, write: bool = False) -> Iterator[Sequence[Any]]:
        """The parameters part by part, each gathered while it is looked at (`weights.Parts`)."""
        if self.stage != 3:
            yield parameters
            return
        import deepspeed

        while parameters:
            sizes = np.cumsum([parameter.ds_numel * parameter.element_size() for parameter in parameters])
            count = max(int(np.searchsorted(sizes, _GATHER_BYTES, side="right")), 1)
            part, parameters = parameters[:count], parameters[count:]
            with deepspeed.zero.GatheredParameters(part, modifier_rank=0 if write else None):
                yield part

    def gathers(self) -> bool:
        """Whether a rollout gathers the weights. `auto` does if they take at most half of the free memory of each rank,
        which leaves the rest to the KV cache."""
        if self.stage != 3:
            return False
        if self._gather_parameters == "auto":
            size = sum(p.numel() * p.element_size() for p in self._skeleton.parameters())
            fits = collectives.on_all(self._accelerator, 2 * size <= _free_memory(self._accelerator.device))
            self._gather_parameters = "always" if fits else "never"
        return self._gather_parameters == "always"

    def gather(self) -> nn.Module:
        """The module with its whole weights, on this rank's device."""
        module = self._accelerator.unwrap_model(self.module)
        return filled(self._skeleton, whole_weights(module, self.parts, Tensor.clone)).to(self._accelerator.device)

    # State

    def whole_moments(self) -> dict[str, Tensor]:
        """AdamW's state of each trainable parameter as `NAME.exp_avg` and so on, on the CPU of the main process."""
        from deepspeed.utils import safe_get_full_optimizer_state

        inner, flats = self._flat_optimizer()
        if not all(inner.state.get(flat) for flat in flats):  # before the first step
            return {}
        self._link_moments()
        step = torch.tensor(float(inner.state[flats[0]]["step"]))
        moments: dict[str, Tensor] = {}
        for name, parameter in self._accelerator.unwrap_model(self.module).named_parameters():
            if parameter.requires_grad:
                for key in ("exp_avg", "exp_avg_sq"):
                    value = safe_get_full_optimizer_state(parameter, key)
                    if self._accelerator.is_main_process:
                        moments[f"{name}.{key}"] = value.to("cpu", copy=True)
                moments[f"{name}.step"] = step.clone()
        return moments

    def set_moments(self, parameters: Mapping[str, nn.Parameter], read: Callable[[str], Tensor]) -> None:
        """Set the state of these parameters to what `whole_moments` returned, as `read` gives it by name."""
        inner, flats = self._flat_optimizer()
        step = read(f"{next(iter(parameters))}.step")
        for flat in flats:
            is_torch = isinstance(inner, torch.optim.AdamW)  # DeepSpeed's own AdamW counts in integers
            inner.state[flat] = {
                "step": step.to(flat.device, copy=True) if is_torch else int(step),
                **{key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")},
            }
        self._link_moments()
        for name, parameter in parameters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                self._set_moment(parameter, read(f"{name}.{key}"), key)

    def _flat_optimizer(self) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        """The optimizer inside ZeRO's, and this rank's flat parts of the parameters: the keys of its state."""
        zero = self.module.optimizer
        flats = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        return zero.optimizer, list(flats)

    def _link_moments(self) -> None:
        """Let ZeRO-1 and -2 find the state of each parameter in all groups: DeepSpeed links them only once, after the
        step of the first group, and misses the other groups."""
        if self.stage < 3:
            self.module.optimizer._hp_optimizer_states_linked = False
            self.module.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_moment(self, parameter: Any, value: Tensor, key: str) -> None:
        """Set this rank's part of a whole moment."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        device, rank = self._accelerator.device, self._accelerator.process_index
        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, value.to(device), key)
            return
        size = parameter.ds_tensor.ds_numel  # the parts are equal, the last one padded
        padded = torch.zeros(size * self._accelerator.num_processes)
        padded[: value.numel()] = value.flatten()
        safe_set_local_optimizer_state(parameter, padded[rank * size :][:size].to(device), key)

    def save_shards(self, folder: Path) -> str | None:
        """Write this rank's part of the state. Returns why it could not be written, None if it was."""
        files = self.module.checkpoint_engine
        files.failure = None
        self.module.save_checkpoint(str(folder), tag=_ENGINE, save_latest=False, exclude_frozen_parameters=True)
        problem: str | None = files.failure
        return problem

    def load_shards(self, folder: Path) -> None:
        read, _ = self.module.load_checkpoint(str(folder), tag=_ENGINE, load_module_strict=False)
        if read is None:
            rank = self._accelerator.process_index
            raise ConfigError(f"run.resume={folder}: has no DeepSpeed checkpoint for rank {rank}", key="run.resume")


def skeleton(module: nn.Module) -> nn.Module:
    """A copy with its parameters on the meta device, which take no memory, and buffers of its own."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, empty)


def filled(skeleton: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a skeleton that has these tensors as its parameters and buffers."""
    module = copy.deepcopy(skeleton)
    module.load_state_dict(weights, strict=False, assign=True)
    return module.eval()


def _free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on the device; the processes of a machine share its memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _shard_files() -> Any:
    """DeepSpeed's reader and writer of checkpoint files, with two changes: a failed write is reported after the save,
    since the ranks wait for each other during it, and reading unpickles only the classes that DeepSpeed writes."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    class ShardFiles(TorchCheckpointEngine):  # type: ignore[misc]  # DeepSpeed has no types
        failure: str | None = None

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            self.failure = self.failure or failure(lambda: os.makedirs(path, exist_ok=exist_ok))

        def save(self, state_dict: Any, path: str) -> None:
            def write() -> None:
                try:
                    super(ShardFiles, self).save(state_dict, path)
                except RuntimeError as error:  # torch's report of a failed write
                    raise OSError(first_line(error)) from error

            self.failure = self.failure or failure(write)

        def load(self, path: str, map_location: Any = None) -> Any:
            try:
                with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
                    return torch.load(path, map_location=map_location, weights_only=True)
            except pickle.UnpicklingError as error:
                raise ConfigError(
                    f"run.resume: {path} holds objects that no checkpoint has and was not read ({first_line(error)})",
                    key="run.resume",
                ) from error

    return ShardFiles()
