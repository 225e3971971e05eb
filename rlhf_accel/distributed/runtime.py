"""The only room that knows Accelerate and DeepSpeed: processes, preparation, backward, reduction, gathering, trackers.

Everyone else sees an `nn.Module` and a `Runtime`. All that communicates is called by every rank alike.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    GradientAccumulationPlugin,
    LoggerType,
    broadcast_object_list,
    gather_object,
    is_deepspeed_available,
)
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rlhf_accel.config.schema import RunConfig
from rlhf_accel.distributed import trackers
from rlhf_accel.distributed.builds import remove_abandoned_locks
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.system.process import (
    computes_in_bf16,
    free_memory,
    has_gpu,
    peak_resident_mib,
    quiet_libraries,
    tune_process,
)

B = TypeVar("B")

_ENGINE = "engine"  # DeepSpeed's folder in a checkpoint
_WEIGHTS, _MOMENTS = "learned.safetensors", "optimizer.safetensors"
_GATHER_BYTES = 2**28  # parameters that a collective of ZeRO-3 brings together at once


class Runtime:
    """This process's place among the others, and the module and optimizer that Accelerate prepared for it.

    `minibatch` is the number of samples of an optimizer step over all ranks; `gather_parameters` is the config's key.
    """

    def __init__(
        self,
        run: RunConfig,
        *,
        max_grad_norm: float | None = None,
        minibatch: int = 1,
        gather_parameters: str = "auto",
    ) -> None:
        _check_trackers(run.trackers)
        _check_precision_of_process()
        tune_process(run.matmul_precision)
        quiet_libraries()
        no_gpu = not has_gpu()
        precision = run.precision
        if precision == "auto":
            precision = "fp32" if no_gpu or not computes_in_bf16(torch.device("cuda")) else "bf16"
        deepspeed = _deepspeed_plugin(precision, max_grad_norm, minibatch)
        if deepspeed is not None:
            remove_abandoned_locks()
        # Named for a launch only: Accelerate takes a named backend to mean that there are other processes. With
        # DeepSpeed it finds none on a CPU unless gloo is named.
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 or deepspeed is not None
        wait = timedelta(seconds=run.collective_timeout)
        group = InitProcessGroupKwargs(backend="gloo" if no_gpu and launched else None, timeout=wait)
        try:
            self._accelerator = Accelerator(
                mixed_precision="no",  # see autocast()
                # Without this, Accelerate takes processes without a GPU for single ones, but not those of DeepSpeed.
                cpu=no_gpu and deepspeed is None,
                deepspeed_plugin=deepspeed,
                # Boundaries of accumulation are ours: Accelerate's would also end one with the prompt loader.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
                kwargs_handlers=[group] if launched else [],
                log_with=list(run.trackers) or None,
                project_dir=".",  # asked for already here; the run's folder is known when start_trackers() says it
            )
        except (ValueError, ImportError) as error:
            whose = "the launch's DeepSpeed settings" if deepspeed else "the launch's settings"
            raise ConfigError(f"{whose}: {str(error).splitlines()[0]}") from error
        if self._accelerator.distributed_type in (DistributedType.FSDP, DistributedType.MEGATRON_LM):
            raise ConfigError(
                f"distributed_type={self._accelerator.distributed_type.value} of the launch is not known here; use one "
                "of accelerate_configs/: ddp or zero1 to zero3",
                key="distributed_type",
            )
        if deepspeed is not None:
            # Accelerate told transformers of ZeRO-3, which would cut every model that it loads, the reward model too.
            unset_hf_deepspeed_config()
        self.precision = precision
        self.zero_stage: int = 0 if deepspeed is None else deepspeed.zero_stage
        self._deepspeed = deepspeed
        self._max_grad_norm = max_grad_norm
        self._gather_parameters = gather_parameters
        self._trackers = run.trackers
        self._failed_trackers: set[str] = set()
        self.writes_shards = deepspeed is not None and run.checkpoint == "sharded"
        self._module: Any = None
        self._optimizer: Any = None
        self._base_lrs: list[float] = []
        self._skeleton: Any = None  # of the module, on the meta device; with ZeRO-3
        self._whole: Any = None  # a skeleton filled with the whole weights, while a rollout lasts

    @property
    def rank(self) -> int:
        return int(self._accelerator.process_index)

    @property
    def world_size(self) -> int:
        return int(self._accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        return bool(self._accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        return torch.device(self._accelerator.device)

    @property
    def module(self) -> nn.Module:
        """The prepared module: call it for anything that needs gradients."""
        module: nn.Module | None = self._module
        assert module is not None, "prepare() first"
        return module

    @property
    def plain_module(self) -> Any:
        """The same module without the wrapper: for forwards that keep no gradient, and for its own methods."""
        return self._whole if self._whole is not None else self._accelerator.unwrap_model(self.module)

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer, resume: Path | None = None) -> None:
        """Put the module on the device and under data parallelism or ZeRO; it may still lie in the CPU's memory.

        With `resume`, a folder that `save_state` wrote, module and optimizer go on from there. Raises `ConfigError` if
        it holds other weights than this module learns.
        """
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        module.eval()
        portable = resume is not None and (resume / _WEIGHTS).is_file()
        if resume is not None and portable:
            _load_weights(module, resume)
        if self._deepspeed is not None:
            # DeepSpeed takes memory for so many gradients at once, 500 million unless told otherwise.
            learned = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
            zero = self._deepspeed.deepspeed_config["zero_optimization"]
            zero.setdefault("reduce_bucket_size", min(learned, 500_000_000))
        if self.zero_stage == 3:
            self._skeleton = _skeleton(module)
            self._shard(module)
        self._module, self._optimizer = self._accelerator.prepare(module, optimizer)
        if self._deepspeed is not None:
            self._module.checkpoint_engine = _shard_files()
            # A script that rank 0 would copy beside the shards, unheeded if that fails; portable checkpoints serve.
            self._module._copy_recovery_script = lambda folder: None
        if resume is not None and portable:
            self._load_moments(resume)
        elif resume is not None:
            read, _ = self._module.load_checkpoint(str(resume), tag=_ENGINE, load_module_strict=False)
            if read is None:
                raise ConfigError(
                    f"run.resume={resume}: DeepSpeed finds no checkpoint there for rank {self.rank}", key="run.resume"
                )

    def prepare_frozen(self, module: nn.Module) -> nn.Module:
        """A module that does not learn: sharded with ZeRO-3 (and offloaded where parameters are), else whole."""
        if self.zero_stage != 3:
            return module.to(self.device)
        import deepspeed

        self._shard(module)
        engine: nn.Module = deepspeed.initialize(model=module, config=self._frozen_config())[0]
        return engine

    def set_lr_factor(self, factor: float) -> None:
        """Scale every learning rate from its configured value."""
        for group, lr in zip(self._optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * factor

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 arithmetic over the weights as they are, if `run.precision` asks for it. torch's own, since the bf16 of
        DeepSpeed would round heads and adapters too, and Accelerate's reaches only the wrapped module."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def backward(self, losses: Sequence[Callable[[], Tensor]], unless: Callable[[], bool] | None = None) -> bool:
        """Add up the gradients of these micro-batch losses, over all ranks.

        Each is a sum over its tokens, already divided by the token count of all micro-batches on all ranks, so the
        gradients have to be summed; data parallelism takes their mean over ranks, which the factor undoes. All ranks
        bring equally many losses: each forward and backward pass is a collective.

        `unless` is asked once, by all ranks, when the last loss is known. If it says yes the gradients are dropped,
        and False is returned.
        """
        dropped = False
        for number, loss in enumerate(losses, start=1):
            last = number == len(losses)
            with self._accumulating(last):
                with self.autocast():
                    value = loss() * self.world_size
                dropped = last and unless is not None and unless()
                if self._deepspeed is None:
                    self._accelerator.backward(value)
                else:
                    with self._poisoned() if dropped else contextlib.nullcontext():
                        self._module.backward(value)  # Accelerate's would step too, before the norm is known
        if dropped and self._deepspeed is None:
            self._optimizer.zero_grad()
        elif dropped:
            _, taken = self.optimizer_step()
            assert not taken, "a gradient of NaN was applied"
        return not dropped

    def optimizer_step(self) -> tuple[float, bool]:
        """Clip the gradient and step. Returns its norm before clipping, and whether the step was taken: a gradient that
        is not finite on any rank is not finite here, and is dropped."""
        if self._deepspeed is not None:
            self._module.step()
            return float(self._module.get_global_grad_norm()), self._module.was_step_applied()
        # Accelerate skips steps while gradients accumulate, and whether they do is one state for the whole process,
        # which an `Accelerator` of somebody else may have left so.
        self._accelerator.gradient_state._set_sync_gradients(True)
        limit = self._max_grad_norm if self._max_grad_norm is not None else float("inf")
        norm = float(self._accelerator.clip_grad_norm_(self.module.parameters(), limit))
        taken = bool(np.isfinite(norm))
        if taken:
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm, taken

    @contextlib.contextmanager
    def _accumulating(self, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch, the last of which ends the accumulation."""
        if self._deepspeed is not None:
            self._module.set_gradient_accumulation_boundary(last)
            yield
        else:
            with contextlib.nullcontext() if last else self._accelerator.no_sync(self.module):
                yield

    @contextlib.contextmanager
    def _poisoned(self) -> Iterator[None]:
        """Gradients of NaN: ZeRO cannot forget what it has reduced and cut already, but drops what is not finite."""
        learned = [p for p in self.module.parameters() if p.requires_grad]
        handles = [p.register_hook(lambda gradient: torch.full_like(gradient, torch.nan)) for p in learned]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """For forwards without gradients: with ZeRO-3 the whole weights are gathered once, into `plain_module`, if they
        fit (`rollout.gather_parameters`), so that ranks need not wait for each other at every layer."""
        if self.zero_stage != 3 or not self._gathers():
            yield
            return
        whole = copy.deepcopy(self._skeleton)
        whole.load_state_dict(self._whole_weights(Tensor.clone), strict=False, assign=True)
        self._whole = whole.to(self.device).eval()
        try:
            yield
        finally:
            self._whole = None

    def everywhere(self, fact: bool) -> bool:
        """`fact` itself where ranks are free of each other; where they share each forward, whether it holds on all.

        Loops whose length depends on the samples ask this, so that no rank leaves the others waiting.
        """
        if self.zero_stage != 3 or self._whole is not None:
            return fact
        return self._on_all(fact)  # for every token: without telling others each time

    def anywhere(self, fact: bool) -> bool:
        """Whether it holds on any rank; asked by all."""
        return bool(self.sum(torch.tensor(int(fact))) > 0)

    def _on_all(self, fact: bool) -> bool:
        count = self._accelerator.reduce(torch.tensor(int(fact), device=self.device), "sum")
        return bool(count == self.world_size)

    def share(self, count: int) -> Int[Tensor, " n"]:
        """This rank's rows of `count`: contiguous, the first ranks one longer where it does not divide."""
        return self.shares(count)[self.rank]

    def shares(self, count: int) -> list[Int[Tensor, " n"]]:
        """Every rank's `share` of `count` rows."""
        return [torch.from_numpy(rows) for rows in np.array_split(np.arange(count), self.world_size)]

    def gather_rows(self, rows: Tensor, count: int) -> Tensor:
        """The `count` rows of which every rank holds its `share`, in order, on every rank, as CPU tensors."""
        if self.world_size == 1:
            return rows.cpu()
        longest = -(-count // self.world_size)
        # gloo gathers no booleans.
        padded = torch.zeros(longest, *rows.shape[1:], dtype=_sendable(rows.dtype), device=self.device)
        padded[: len(rows)] = rows.to(self.device)
        with self._waiting():
            gathered = self._accelerator.gather(padded).cpu().reshape(self.world_size, longest, *rows.shape[1:])
        return torch.cat([gathered[rank, : len(share)] for rank, share in enumerate(self.shares(count))]).to(rows.dtype)

    def gather_list(self, items: Sequence[B]) -> list[B]:
        """The lists of all ranks, in order, on every rank."""
        with self._waiting():
            return gather_object(list(items)) if self.world_size > 1 else list(items)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over ranks, on the CPU."""
        with self._waiting():
            total: Tensor = self._accelerator.reduce(values.to(self.device), "sum")
        return total.cpu()

    def max(self, values: Tensor) -> Tensor:
        """Elementwise maximum over ranks, on the CPU."""
        with self._waiting():
            rows: Tensor = self._accelerator.gather(values.to(self.device)[None])
        return rows.amax(0).cpu()

    def peak_memory_mib(self) -> float:
        """The largest peak of any rank in MiB: of allocated GPU memory, or of the process's resident memory."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            peak = peak_resident_mib()
        return float(self.max(torch.tensor(peak)))

    def learned_weights(self, frozen: bool = False) -> dict[str, Tensor]:
        """Whole weights of all that is trained, and persistent buffers, on the CPU of the main process, nothing on the
        others; with `frozen`, of all parameters. Called by every rank."""
        return self._whole_weights(
            lambda weight: weight.to("cpu", copy=True) if self.is_main else None, learned=not frozen
        )

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Give parameters and buffers of the prepared module whole values by their names; every rank brings them all.

        Raises `ConfigError` if the module has none of such a name and shape.
        """
        named = _named_tensors(self._accelerator.unwrap_model(self.module))
        for name, value in weights.items():
            if name not in named or tuple(getattr(named[name], "ds_shape", named[name].shape)) != tuple(value.shape):
                raise ConfigError(f"these are weights of another model: this one has no {name} {tuple(value.shape)}")
        values = {named[name]: value for name, value in weights.items()}
        with torch.no_grad():
            for part in self._together([p for p in values if isinstance(p, nn.Parameter)], write=True):
                for parameter in part:
                    parameter.copy_(values[parameter])
            for buffer in (tensor for tensor in values if not isinstance(tensor, nn.Parameter)):
                buffer.copy_(values[buffer])

    def save_state(self, folder: Path) -> str | None:
        """What learns and the optimizer's state, for `prepare` to go on from; called by every rank.

        Returns why this rank could not write its part, None if it could: one that raised would leave others waiting.
        Sharded (`run.checkpoint`), each rank writes its part in DeepSpeed's form. Portable, the main process writes the
        whole weights by name and, of each, AdamW's `exp_avg`, `exp_avg_sq` and `step`.
        """
        if self.writes_shards:
            files = self._module.checkpoint_engine
            files.failure = None
            self._module.save_checkpoint(str(folder), tag=_ENGINE, save_latest=False, exclude_frozen_parameters=True)
            problem: str | None = files.failure
            return problem
        weights, moments = each_once(self.learned_weights()), self._whole_moments()
        if not self.is_main:
            return None

        def write() -> None:
            save_file(weights, folder / _WEIGHTS)
            save_file(moments, folder / _MOMENTS)

        return failure(write)

    def first_failure(self, mine: str | None) -> str | None:
        """What went wrong on the first rank where something did, with its number; the same on every rank."""
        for rank, said in enumerate(self.gather_list([mine])):
            if said is not None:
                return said if self.world_size == 1 else f"rank {rank}: {said}"
        return None

    def _whole_moments(self) -> dict[str, Tensor]:
        """AdamW's state of each parameter that learns, `NAME.exp_avg` and so on, on the CPU of the main process."""
        module = self._accelerator.unwrap_model(self.module)
        moments: dict[str, Tensor] = {}
        if self._deepspeed is None:
            for name, parameter in module.named_parameters():
                for key, value in self._optimizer.state.get(parameter, {}).items():
                    moments[f"{name}.{key}"] = value.to("cpu", copy=True)
            return moments
        from deepspeed.utils import safe_get_full_optimizer_state

        inner, flats = self._flat_optimizer()
        if not all(inner.state.get(flat) for flat in flats):  # before the first step
            return {}
        self._link_moments()
        step = torch.tensor(float(inner.state[flats[0]]["step"]))
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                for key in ("exp_avg", "exp_avg_sq"):
                    value = safe_get_full_optimizer_state(parameter, key)
                    if self.is_main:
                        moments[f"{name}.{key}"] = value.to("cpu", copy=True)
                moments[f"{name}.step"] = step.clone()
        return moments

    def _load_moments(self, folder: Path) -> None:
        """The optimizer's state from what `_whole_moments` gave, by any launch into any other."""
        module = self._accelerator.unwrap_model(self.module)
        learned = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        with safe_open(folder / _MOMENTS, framework="pt", device="cpu") as file:
            known = set(file.keys())
            learned = {name: parameter for name, parameter in learned.items() if f"{name}.step" in known}
            if not learned:
                return
            if self._deepspeed is None:
                for name, parameter in learned.items():
                    # The step too: fused AdamW counts where the parameter lies.
                    state = {key: file.get_tensor(f"{name}.{key}") for key in ("exp_avg", "exp_avg_sq", "step")}
                    self._optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
                return
            inner, flats = self._flat_optimizer()
            step = file.get_tensor(f"{next(iter(learned))}.step")
            for flat in flats:
                ours = isinstance(inner, torch.optim.AdamW)  # DeepSpeed's own counts in integers
                inner.state[flat] = {
                    "step": step.to(flat.device, copy=True) if ours else int(step),
                    **{key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")},
                }
            self._link_moments()
            for name, parameter in learned.items():
                for key in ("exp_avg", "exp_avg_sq"):
                    self._set_moment(parameter, file.get_tensor(f"{name}.{key}"), key)

    def _flat_optimizer(self) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        """The optimizer inside ZeRO's, and this rank's flat parts of the parameters, by which it keeps its state."""
        zero = self._module.optimizer
        flats = zero.fp32_partitioned_groups_flat if self.zero_stage == 3 else zero.single_partition_of_fp32_groups
        return zero.optimizer, list(flats)

    def _link_moments(self) -> None:
        """Let ZeRO-1 and -2 find the state of each parameter, of all groups: by itself DeepSpeed does so when the first
        group was stepped, and finds none of the others'."""
        if self.zero_stage < 3:
            self._module.optimizer._hp_optimizer_states_linked = False
            self._module.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_moment(self, parameter: Any, value: Tensor, key: str) -> None:
        """This rank's part of a whole moment."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.zero_stage < 3:
            safe_set_full_optimizer_state(parameter, value.to(self.device), key)
            return
        size = parameter.ds_tensor.ds_numel  # the parts are equal, the last one padded
        padded = torch.zeros(size * self.world_size)
        padded[: value.numel()] = value.flatten()
        safe_set_local_optimizer_state(parameter, padded[self.rank * size :][:size].to(self.device), key)

    def from_main(self, make: Callable[[], B]) -> B:
        """What `make` returns on the main process, on every rank.

        What it raises there is raised there, and on the other ranks too, which would wait for the result: its
        `ConfigError` and `RunFailed` as they are, anything else as a `RunFailed` that names it.
        """
        outcome: list[Any] = [None]
        raised: Exception | None = None
        if self.is_main:
            try:
                outcome = [make()]
            except Exception as error:
                raised = error
                known = isinstance(error, (ConfigError, RunFailed))
                outcome = [error if known else RunFailed(f"the main process: {type(error).__name__}: {error}")]
        if self.world_size > 1:
            with self._waiting():
                broadcast_object_list(outcome)
        if raised is not None:
            raise raised
        if isinstance(outcome[0], (ConfigError, RunFailed)):
            raise outcome[0]
        made: B = outcome[0]
        return made

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process of each node goes through the block before the others: what it caches they find."""
        with self._accelerator.local_main_process_first():
            yield

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around a collective: the others can see whether this rank is in it."""
        if self.world_size > 1:
            _tell("waits", "1")
        yield
        if self.world_size > 1:
            _tell("waits", "")

    def start_trackers(self, run: RunConfig, config: dict[str, Any], folder: Path, first_step: int | None) -> None:
        """Open the run in every tracker, with the flat config as its settings; called by every rank.

        `first_step` as in `trackers.settings`. Raises `ConfigError` on every rank if a tracker cannot be started.
        """
        place = folder / "trackers"
        self._accelerator.project_configuration.logging_dir = str(place)
        try:
            problem = failure(lambda: self._start_trackers(run, config, place, first_step))
        except Exception as error:  # trackers are many, and some ask a server
            problem = f"{type(error).__name__}: {error}"
        problem = self.first_failure(problem)
        if problem is not None:
            raise ConfigError(f"run.trackers={list(self._trackers)} cannot be started: {problem}", key="run.trackers")

    def _start_trackers(self, run: RunConfig, config: dict[str, Any], place: Path, first_step: int | None) -> None:
        self._accelerator.init_trackers(run.project, init_kwargs=trackers.settings(run.name, place, first_step))
        for tracker in self._accelerator.trackers:
            if not trackers.has_settings(tracker.name, place, first_step):
                tracker.store_init_configuration(config)
        if self.is_main and self._accelerator.trackers:
            trackers.remember({tracker.name: self._native(tracker) for tracker in self._accelerator.trackers}, place)

    def track(self, metrics: dict[str, float], step: int) -> list[str]:
        """Figures to every tracker. Returns what went wrong at those that fail for the first time in this process."""
        return self._on_trackers(lambda tracker: tracker.log(metrics, step=step))

    def track_table(self, title: str, rows: Sequence[Mapping[str, Any]], step: int) -> list[str]:
        """Rows with the same keys to the trackers that hold tables; returns what `track` does."""
        return self._on_trackers(
            lambda tracker: trackers.push_table(tracker.name, self._native(tracker), title, rows, step)
        )

    def end_trackers(self) -> list[str]:
        """Have them write what they hold back, if they can; returns what `track` does. Processes go on meeting."""
        problems = self._on_trackers(lambda tracker: tracker.finish())
        self._accelerator.trackers = []
        return problems

    def _native(self, tracker: Any) -> Any:
        """The tracker's own object, such as a `SummaryWriter`; on the main process."""
        return self._accelerator.get_tracker(tracker.name, unwrap=True)

    def _on_trackers(self, work: Callable[[Any], None]) -> list[str]:
        """A tracker may fail at any time, of a network say: it must not end the run, nor fill the console."""
        problems = []
        for tracker in self._accelerator.trackers if self.is_main else ():
            try:
                problem = failure(lambda tracker=tracker: work(tracker))  # type: ignore[misc]  # a default binds it
            except Exception as error:  # trackers are many, each with errors of its own
                problem = f"{type(error).__name__}: {error}"
            if problem is not None and tracker.name not in self._failed_trackers:
                self._failed_trackers.add(tracker.name)
                problems.append(f"{tracker.name} failed ({' '.join(problem.split())})")
        return problems

    def close(self) -> None:
        """After this, processes do not meet any more."""
        self._accelerator.end_training()

    def _whole_weights(self, copy_of: Callable[[Tensor], Tensor | None], learned: bool = False) -> dict[str, Tensor]:
        """A copy of each parameter by its names, of those that are trained only if `learned`, and of each persistent
        buffer; what is shared has one copy. `copy_of` is called with whole tensors on every rank, and may return None
        for none."""
        module = self._accelerator.unwrap_model(self.module)
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if parameter.requires_grad or not learned:
                names.setdefault(parameter, []).append(name)
        copies: dict[str, Tensor] = {}
        for part in self._together(list(names)):
            for parameter in part:
                made = copy_of(parameter.detach())
                if made is not None:
                    copies |= dict.fromkeys(names[parameter], made)
        buffers = persistent_buffers(module)  # which ZeRO does not cut
        made_of = {id(buffer): copy_of(buffer.detach()) for buffer in buffers.values()}
        return copies | {name: made for name, buffer in buffers.items() if (made := made_of[id(buffer)]) is not None}

    def _together(self, parameters: Sequence[Any], *, write: bool = False) -> Iterator[Sequence[Any]]:
        """The parameters part by part, each part whole on this rank while it is looked at; with `write`, what the main
        process makes of them stays."""
        if self.zero_stage != 3:
            yield parameters
            return
        import deepspeed

        while parameters:
            sizes = np.cumsum([parameter.ds_numel * parameter.element_size() for parameter in parameters])
            count = max(int(np.searchsorted(sizes, _GATHER_BYTES, side="right")), 1)
            part, parameters = parameters[:count], parameters[count:]
            with deepspeed.zero.GatheredParameters(part, modifier_rank=0 if write else None):
                yield part

    def _gathers(self) -> bool:
        """Whether a rollout gathers the parameters; `auto` does if they take at most half of the memory that is free on
        every rank, and leaves the rest to the KV cache."""
        if self._gather_parameters == "auto":
            size = sum(p.numel() * p.element_size() for p in self._skeleton.parameters())
            if self.device.type == "cuda":
                free = torch.cuda.mem_get_info(self.device)[0]
            else:
                free = free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            self._gather_parameters = "always" if self._on_all(2 * size <= free) else "never"
        return self._gather_parameters == "always"

    def _shard(self, module: nn.Module) -> None:
        """Cut the parameters over the ranks one by one: the engine alone would first put them whole on the device.

        From here on `torch.nn.functional.linear` is one of DeepSpeed's, for the whole process: torch's would keep the
        whole weights alive until the backward pass. It agrees with torch's up to rounding.
        """
        import deepspeed

        deepspeed.zero.Init(module=module, config_dict_or_path=self._frozen_config())
        for buffer in module.buffers():  # which neither this nor the engine moves then
            buffer.data = buffer.data.to(self.device)

    def _frozen_config(self) -> dict[str, Any]:
        """DeepSpeed's config for a module without an optimizer."""
        assert self._deepspeed is not None
        config: dict[str, Any] = copy.deepcopy(self._deepspeed.deepspeed_config)
        config["zero_optimization"].pop("offload_optimizer", None)
        return config


# A pass costs at least as much as this share of a full one, however few tokens it has.
_LEAST_SHARE = 1 / 16


def cut_micro_batches(
    query_lengths: Int[Tensor, " B"],
    response_lengths: Int[Tensor, " B"],
    rows: Int[Tensor, " n"],
    budget: int,
    world_size: int,
) -> list[list[Int[Tensor, " m"]]]:
    """Cut a minibatch into micro-batches: for each rank a list of row tensors, equally many on every rank.

    Rows are sorted by length and dealt to the ranks in turn, so that ranks carry like loads and a micro-batch pads
    little. `budget` bounds the tokens of a pass as in `cut_by_tokens`. A rank with fewer passes than others ends with
    empty micro-batches, which keep it in step.

    >>> cut_micro_batches(torch.tensor([2, 1, 2, 1, 1]), torch.tensor([7, 0, 3, 4, 1]), torch.arange(5), 40, 1)
    [[tensor([0]), tensor([2, 3]), tensor([4, 1])]]
    """
    lengths = query_lengths + response_lengths
    ordered = rows[torch.argsort(lengths[rows], descending=True, stable=True)]
    shares = [ordered[rank::world_size] for rank in range(world_size)]
    return cut_by_tokens(query_lengths, response_lengths, shares, budget)


def cut_by_tokens(
    query_lengths: Int[Tensor, " B"],
    response_lengths: Int[Tensor, " B"],
    shares: Sequence[Int[Tensor, " n"]],
    budget: int,
) -> list[list[Int[Tensor, " m"]]]:
    """Each share's rows, longest first, cut into the passes that cost least; equally many for every share.

    A pass costs its tokens, padding included, which are rows x (longest query + longest response), and a sixteenth of
    `budget` for being one. `budget` bounds its tokens, but one row always fits. A share with fewer passes than others
    ends with empty ones.

    >>> cut_by_tokens(torch.ones(6).long(), torch.tensor([90, 9, 9, 9, 8, 8]), [torch.arange(6)], 300)
    [[tensor([0]), tensor([1, 2, 3, 4, 5])]]
    """
    lengths = query_lengths + response_lengths
    cuts = []
    for share in shares:
        ordered = share[torch.argsort(lengths[share], descending=True, stable=True)]
        ends = _cheapest_cuts(query_lengths[ordered].numpy(), response_lengths[ordered].numpy(), budget)
        cuts.append([ordered[start:end] for start, end in zip([0, *ends], ends, strict=False)])
    most = max(len(passes) for passes in cuts)
    return [passes + [query_lengths.new_zeros(0)] * (most - len(passes)) for passes in cuts]


def _cheapest_cuts(queries: np.ndarray, responses: np.ndarray, budget: int) -> list[int]:
    """Where to cut these rows so that the padded tokens of all passes, and the least that each costs, are fewest."""
    count = len(queries)
    most = max(budget // max(int((queries + responses).min(initial=budget)), 1), 1)  # rows that a pass may hold
    cost, ends = np.zeros(count + 1), np.zeros(count + 1, dtype=int)
    for start in reversed(range(count)):
        rows = slice(start, start + most)
        widths = np.maximum.accumulate(queries[rows]) + np.maximum.accumulate(responses[rows])
        tokens = widths * np.arange(1, len(widths) + 1)
        fit = max(int((tokens <= budget).sum()), 1)  # each row more makes the pass larger: those that fit come first
        total = (tokens[:fit] + budget * _LEAST_SHARE + cost[start + 1 : start + fit + 1])[::-1]
        ends[start] = start + fit - int(total.argmin())  # of equally cheap ones the largest
        cost[start] = total.min()
    cuts, at = [], 0
    while at < count:
        at = int(ends[at])
        cuts.append(at)
    return cuts


def post(what: str) -> None:
    """Let the other processes of the launch read this with `missing`; nothing in a process of its own."""
    _tell("post", what)


def missing() -> dict[int, str]:
    """What the processes posted last that wait for nobody, by their ranks; empty if nobody can be asked any more."""
    found = {}
    with contextlib.suppress(RuntimeError, ValueError):
        for rank in range(torch.distributed.get_world_size()):
            said, waits = (_asked(f"rlhf_accel/{what}/{rank}") for what in ("post", "waits"))
            if said and not waits:
                found[rank] = said
    return found


def _tell(what: str, text: str) -> None:
    with contextlib.suppress(RuntimeError, ValueError):
        _store().set(f"rlhf_accel/{what}/{torch.distributed.get_rank()}", text)


def _asked(key: str) -> str:
    return _store().get(key).decode() if _store().check([key]) else ""


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()


def first_of_all(what: str) -> bool:
    """Whether no process of the launch has asked this before; True too when those that could tell are gone."""
    try:
        return int(_store().add(f"rlhf_accel/{what}", 1)) == 1
    except RuntimeError:
        return True


def release_accelerate() -> None:
    """Let go of the precision that Accelerate holds for the whole process, so that the next run of this process may
    bring its own. The processes of the launch stay together."""
    AcceleratorState._reset_state()


def _check_precision_of_process() -> None:
    """Raises `ConfigError` where an `Accelerator` that is not a run's has set the precision of this process."""
    if not AcceleratorState._shared_state:
        return
    held = AcceleratorState().mixed_precision
    if held != "no":
        raise ConfigError(
            f"this process already has an Accelerator(mixed_precision={held!r}), which would round within the run; "
            "make it after the run, with mixed_precision='no', or in another process",
            mixed_precision=held,
        )


def _check_trackers(names: Sequence[str]) -> None:
    """Raises `ConfigError` for trackers that Accelerate does not know, and for those that are not installed, which it
    would leave out."""
    for name in names:
        if name not in LoggerType.list():
            raise ConfigError(
                f"run.trackers={list(names)}: {name} is not a tracker; known are {', '.join(LoggerType.list())}",
                key="run.trackers",
            )
    available = [str(name) for name in get_available_trackers()]
    absent = [name for name in names if name not in (*available, "all")]
    if absent:
        raise ConfigError(
            f"run.trackers={list(names)}: {', '.join(absent)} is not installed; {trackers.pip_command(absent)}",
            key="run.trackers",
        )


def _deepspeed_plugin(precision: str, max_grad_norm: float | None, minibatch: int) -> DeepSpeedPlugin | None:
    """DeepSpeed's config as `accelerate launch` names it, with what the run's config decides filled in; None when this
    is no DeepSpeed launch. Raises `ConfigError` where the two disagree."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    if not is_deepspeed_available():
        raise ConfigError("this launch asks for DeepSpeed, which is not installed; pip install 'rlhf_accel[deepspeed]'")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    micro = -(-minibatch // world_size)
    batch = f"rollout.batch_size / ppo.num_minibatches = {minibatch}"
    owned: dict[str, tuple[Any, str]] = {
        # Micro-batches are cut by tokens and differ in size; DeepSpeed only asks that its three sizes fit together.
        "train_batch_size": (minibatch, batch),
        "train_micro_batch_size_per_gpu": (micro, f"{batch} over {world_size} processes"),
        "gradient_accumulation_steps": (1, "ppo.micro_batch_tokens, which cuts micro-batches by tokens"),
        "gradient_clipping": (max_grad_norm or 0.0, f"optim.max_grad_norm={max_grad_norm}"),
        "fp16.enabled": (False, "run.precision, which knows fp32 and bf16"),
        "bf16.enabled": (False, f"run.precision={precision}, which is autocast over fp32 weights"),
        "torch_autocast.enabled": (precision == "bf16", f"run.precision={precision}"),
    }
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    # Without a file, the sizes in the plugin are Accelerate's own defaults, with which nobody has to agree.
    try:
        plugin = DeepSpeedPlugin(hf_ds_config=None if path == "none" else _deepspeed_file(path, owned))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"the launch's DeepSpeed settings: {error}") from error
    config = plugin.deepspeed_config
    config |= {key: value for key, (value, _) in owned.items() if "." not in key}
    config["train_batch_size"] = micro * world_size
    # No module by name: DeepSpeed would gather its weights and reduce its gradients in bf16, which DDP does in fp32.
    config["torch_autocast"] = {
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
        **config.get("torch_autocast", {}),
        "enabled": precision == "bf16",
    }
    return plugin


def _deepspeed_file(path: str, owned: Mapping[str, tuple[Any, str]]) -> dict[str, Any]:
    """The DeepSpeed config in a file; raises `ConfigError` if it says of an owned key something else than the run."""
    try:
        config: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        where = (
            "" if Path(path).is_absolute() else f" from {Path.cwd()}; launch from the checkout, or name its whole path"
        )
        raise ConfigError(
            f"deepspeed_config_file: {path} cannot be read ({error.strerror}){where}", key="deepspeed_config_file"
        ) from error
    except ValueError as error:
        raise ConfigError(f"deepspeed_config_file: {path} is no JSON ({error})", key="deepspeed_config_file") from error
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ConfigError(
                f"{section} in {path} and optim.* of the run's config both set it; remove the former", key=section
            )
    for key, (value, ours) in owned.items():
        section, _, name = key.rpartition(".")
        said = (config.get(section, {}) if section else config).get(name, "auto")
        if said not in ("auto", value):
            raise ConfigError(f'{key}={said} in {path} disagrees with {ours}; set the former to "auto"', key=key)
        if section and said == "auto" and section in config:
            config[section][name] = value
    if config.get("zero_optimization", {}).get("stage", 0) == 0:
        raise ConfigError(
            f"zero_optimization.stage in {path} is 0 or absent; set 1, 2 or 3, or launch with ddp.yaml",
            key="zero_optimization.stage",
        )
    # What Accelerate would derive from one model's width is left to DeepSpeed's defaults.
    zero = config.get("zero_optimization", {})
    return config | {"zero_optimization": {key: value for key, value in zero.items() if value != "auto"}}


def failure(work: Callable[[], None]) -> str | None:
    """Why the work could not write its files, None if it could. Whatever else goes wrong is raised."""
    try:
        work()
    except OSError as error:
        return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    except SafetensorError as error:
        return str(error)
    return None


def check_portable(checkpoint: Path) -> None:
    """Raises `ConfigError` for a checkpoint that is cut by rank."""
    if not (checkpoint / _WEIGHTS).is_file():
        raise ConfigError(
            f"{checkpoint} is cut by rank: only checkpoints of run.checkpoint=portable can be read here",
            key="run.checkpoint",
        )


def portable_weights(checkpoint: Path) -> dict[str, Tensor]:
    """What learnt, whole and by its names in the module, of a checkpoint in the portable form; raises `ConfigError` for
    another one."""
    check_portable(checkpoint)
    try:
        return load_file(checkpoint / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{checkpoint / _WEIGHTS} cannot be read ({error})", key="--which") from error


def _load_weights(module: nn.Module, folder: Path) -> None:
    weights = load_file(folder / _WEIGHTS)
    ours = _named_tensors(module)
    # Of parameters that are shared the file holds one; buffers are in no file of older versions.
    lacking = [name for name, p in module.named_parameters() if p.requires_grad and name not in weights]
    foreign = [name for name, weight in weights.items() if name not in ours or ours[name].shape != weight.shape]
    for name in (*lacking, *foreign):
        raise ConfigError(f"run.resume={folder}: holds weights of another model ({name}, …)", key="run.resume")
    module.load_state_dict(weights, strict=False)


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a module's state, by all their names: such as the bias by which DeepSeek-V3 balances
    its experts. Others, such as rotary frequencies, follow from its config."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, layer in module.named_modules(remove_duplicate=False)
        for name, buffer in layer._buffers.items()
        if buffer is not None and name not in layer._non_persistent_buffers_set
    }


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, by all their names."""
    return {**dict(module.named_parameters(remove_duplicate=False)), **persistent_buffers(module)}


def each_once(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shared weights by the first of their names, as `named_parameters` has them: safetensors takes no others."""
    once: dict[int, tuple[str, Tensor]] = {}
    for name, weight in weights.items():
        once.setdefault(id(weight), (name, weight.contiguous()))
    return dict(once.values())


def _shard_files() -> Any:
    """How DeepSpeed writes and reads the files of its checkpoints: a failure to write is kept for later, since ranks
    wait for each other meanwhile, and reading unpickles nothing but what DeepSpeed puts there."""
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
                except RuntimeError as error:  # so torch says that the disk did not take it
                    raise OSError(str(error).splitlines()[0]) from error

            self.failure = self.failure or failure(write)

        def load(self, path: str, map_location: Any = None) -> Any:
            try:
                with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
                    return torch.load(path, map_location=map_location, weights_only=True)
            except pickle.UnpicklingError as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(
                    f"run.resume: {path} holds what no checkpoint does: not read ({reason})", key="run.resume"
                ) from error

    return ShardFiles()


def _skeleton(module: nn.Module) -> nn.Module:
    """The module with parameters on the meta device, which take no memory, and buffers of its own."""
    hollow = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, hollow)


def _sendable(dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if dtype == torch.bool else dtype
