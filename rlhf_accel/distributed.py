"""The only room that knows Accelerate: processes, preparation, backward, reduction, gathering, trackers.

Everyone else sees an `nn.Module` and a `Runtime`. All that communicates is called by every rank alike.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list, gather_object
from jaxtyping import Int
from torch import Tensor, nn

from rlhf_accel.config import ConfigError, RunConfig
from rlhf_accel.runtime import computes_in_bf16, quiet_libraries, tune_process

B = TypeVar("B")


class Runtime:
    """This process's place among the others, and the module and optimizer that Accelerate prepared for it."""

    def __init__(self, run: RunConfig, *, max_grad_norm: float | None = None) -> None:
        tune_process()
        quiet_libraries()
        no_gpu = not torch.cuda.is_available()
        # Named for a launch only: Accelerate takes a named backend to mean that there are other processes. With
        # DeepSpeed it finds none on a CPU unless gloo is named.
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        group = InitProcessGroupKwargs(backend="gloo" if no_gpu and launched else None, timeout=timedelta(hours=1))
        precision = run.precision
        if precision == "auto":
            precision = "fp32" if no_gpu or not computes_in_bf16(torch.device("cuda")) else "bf16"
        try:
            self._accelerator = Accelerator(
                mixed_precision="bf16" if precision == "bf16" else "no",
                # Boundaries of accumulation are ours: Accelerate's would also end one with the prompt loader.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
                kwargs_handlers=[group] if launched else [],
                log_with=list(run.trackers) or None,
                project_dir=".",  # asked for already here; the run's folder is known when start_trackers() says it
            )
        except (ValueError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"run.trackers={list(run.trackers)} or run.precision={run.precision}: {reason}"
            ) from error
        self.precision = precision
        self._max_grad_norm = max_grad_norm
        self._module: nn.Module | None = None
        self._optimizer: Any = None
        self._base_lrs: list[float] = []

    @property
    def rank(self) -> int:
        return self._accelerator.process_index

    @property
    def world_size(self) -> int:
        return self._accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self._accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self._accelerator.device

    @property
    def module(self) -> nn.Module:
        """The prepared module: call it for anything that needs gradients."""
        assert self._module is not None, "prepare() first"
        return self._module

    @property
    def plain_module(self) -> Any:
        """The same module without the wrapper: for forwards that keep no gradient, and for its own methods."""
        return self._accelerator.unwrap_model(self.module)

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._module, self._optimizer = self._accelerator.prepare(module, optimizer)

    def set_lr_factor(self, factor: float) -> None:
        """Scale every learning rate from its configured value."""
        for group, lr in zip(self._optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * factor

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return self._accelerator.autocast()

    def backward(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        """Add up the gradients of these micro-batch losses, over all ranks.

        Each is a sum over its tokens, already divided by the token count of all micro-batches on all ranks, so the
        gradients have to be summed; data parallelism takes their mean over ranks, which the factor undoes. All ranks
        bring equally many losses: each forward and backward pass is a collective.
        """
        for number, loss in enumerate(losses, start=1):
            last = number == len(losses)
            with contextlib.nullcontext() if last else self._accelerator.no_sync(self.module):
                with self.autocast():
                    value = loss()
                self._accelerator.backward(value * self.world_size)

    def optimizer_step(self) -> tuple[float, bool]:
        """Clip the gradient and step. Returns its norm before clipping, and whether the step was taken: a gradient that
        is not finite on any rank is not finite here, and is dropped."""
        limit = self._max_grad_norm if self._max_grad_norm is not None else float("inf")
        norm = float(self._accelerator.clip_grad_norm_(self.module.parameters(), limit))
        taken = bool(np.isfinite(norm))
        if taken:
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm, taken

    def drop_gradient(self) -> None:
        self._optimizer.zero_grad()

    def share(self, count: int) -> Int[Tensor, " n"]:
        """This rank's rows of `count`: contiguous, the first ranks one longer where it does not divide."""
        return torch.from_numpy(np.array_split(np.arange(count), self.world_size)[self.rank])

    def gather_rows(self, rows: Tensor, count: int) -> Tensor:
        """The `count` rows of which every rank holds its `share`, in order, on every rank, as CPU tensors."""
        if self.world_size == 1:
            return rows.cpu()
        longest = -(-count // self.world_size)
        # gloo gathers no booleans.
        padded = torch.zeros(longest, *rows.shape[1:], dtype=_sendable(rows.dtype), device=self.device)
        padded[: len(rows)] = rows.to(self.device)
        gathered = self._accelerator.gather(padded).cpu().reshape(self.world_size, longest, *rows.shape[1:])
        sizes = [len(part) for part in np.array_split(np.arange(count), self.world_size)]
        return torch.cat([gathered[rank, :size] for rank, size in enumerate(sizes)]).to(rows.dtype)

    def gather_list(self, items: Sequence[B]) -> list[B]:
        """The lists of all ranks, in order, on every rank."""
        return gather_object(list(items)) if self.world_size > 1 else list(items)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over ranks, on the CPU."""
        return self._accelerator.reduce(values.to(self.device), "sum").cpu()

    def max(self, values: Tensor) -> Tensor:
        """Elementwise maximum over ranks, on the CPU."""
        gathered = self._accelerator.gather(values.to(self.device)[None])
        return gathered.amax(0).cpu()

    def peak_memory_mib(self) -> float:
        """The largest peak of any rank in MiB: of allocated GPU memory, or of the process's resident memory."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        return float(self.max(torch.tensor(peak)))

    def state_dict(self) -> dict[str, Tensor]:
        """Full weights of the module, on the main process; called by every rank."""
        return self._accelerator.get_state_dict(self.module)

    def save_state(self, folder: Path) -> None:
        """Module and optimizer, for `load_state`; called by every rank."""
        self._accelerator.save_state(str(folder))

    def load_state(self, folder: Path) -> None:
        self._accelerator.load_state(str(folder))

    def from_main(self, make: Callable[[], B]) -> B:
        """What `make` returns on the main process, on every rank; its `ConfigError` too."""
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [make()]
            except ConfigError as error:
                outcome = [error]
        if self.world_size > 1:
            broadcast_object_list(outcome)
        if isinstance(outcome[0], ConfigError):
            raise outcome[0]
        return outcome[0]

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process of each node goes through the block before the others: what it caches they find."""
        with self._accelerator.local_main_process_first():
            yield

    def barrier(self) -> None:
        self._accelerator.wait_for_everyone()

    def start_trackers(self, name: str, config: dict[str, Any], folder: Path) -> None:
        self._accelerator.project_configuration.logging_dir = str(folder / "trackers")
        self._accelerator.init_trackers(name, config=config)

    def track(self, metrics: dict[str, float], step: int) -> None:
        self._accelerator.log(metrics, step=step)

    def close(self) -> None:
        self._accelerator.end_training()


def cut_micro_batches(
    query_lengths: Int[Tensor, " B"],
    response_lengths: Int[Tensor, " B"],
    rows: Int[Tensor, " n"],
    budget: int,
    world_size: int,
) -> list[list[Int[Tensor, " m"]]]:
    """Cut a minibatch into micro-batches: for each rank a list of row tensors, equally many on every rank.

    Rows are sorted by length and dealt to the ranks in turn, so that ranks carry like loads and a micro-batch pads
    little. `budget` bounds the tokens of a pass, padding included: rows x (longest query + longest response), but one
    row always fits. A rank with fewer rows than others ends with empty micro-batches, whose passes keep it in step.

    >>> cut_micro_batches(torch.tensor([2, 1, 2, 1, 1]), torch.tensor([7, 0, 3, 4, 1]), torch.arange(5), 12, 1)
    [[tensor([0]), tensor([2, 3]), tensor([4, 1])]]
    """
    lengths = query_lengths + response_lengths
    ordered = rows[torch.argsort(lengths[rows], descending=True, stable=True)]
    ranks: list[list[Tensor]] = []
    for rank in range(world_size):
        mine, batches = ordered[rank::world_size], []
        while len(mine):
            widths = query_lengths[mine].cummax(0).values + response_lengths[mine].cummax(0).values
            # Each row more makes the pass larger: those that fit come first.
            fit = max(int((widths * torch.arange(1, len(mine) + 1) <= budget).sum()), 1)
            batches.append(mine[:fit])
            mine = mine[fit:]
        ranks.append(batches)
    most = max(len(batches) for batches in ranks)
    return [batches + [rows[:0]] * (most - len(batches)) for batches in ranks]


def _sendable(dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if dtype == torch.bool else dtype
