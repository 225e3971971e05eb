"""The place of this process among the others, and the module and optimizer that it trains with them.

Only this folder knows Accelerate and DeepSpeed: everyone else sees an `nn.Module` and a `Runtime`. Every method that
communicates is called by all ranks alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from rlhf_accel.config.schema import RunConfig
from rlhf_accel.distributed import collectives, portable, weights
from rlhf_accel.distributed.accelerator import check_precision_of_process, chosen_precision, make_accelerator
from rlhf_accel.distributed.batching import contiguous_shares
from rlhf_accel.distributed.builds import check_tools, remove_abandoned_locks
from rlhf_accel.distributed.data_parallel import DataParallel
from rlhf_accel.distributed.deepspeed import Zero
from rlhf_accel.distributed.deepspeed_config import deepspeed_plugin
from rlhf_accel.distributed.trackers import Trackers, check_trackers
from rlhf_accel.system.arithmetic import casts_kept
from rlhf_accel.system.files import failure
from rlhf_accel.system.memory import peak_resident_mib
from rlhf_accel.system.process import quiet_libraries, tune_process
from rlhf_accel.system.terminal import counted

T = TypeVar("T")


class Runtime:
    """This process in its launch: ranks, collectives, the prepared module, gradients, steps, state.

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
        check_trackers(run.trackers)
        check_precision_of_process()
        tune_process(run.matmul_precision)
        quiet_libraries()
        self.precision = chosen_precision(run.precision)
        plugin = deepspeed_plugin(self.precision, max_grad_norm, minibatch)
        if plugin is not None:
            check_tools(plugin.deepspeed_config["zero_optimization"])
            remove_abandoned_locks()
        self._accelerator = make_accelerator(run, plugin)
        self._engine: DataParallel | Zero
        if plugin is None:
            self._engine = DataParallel(self._accelerator, max_grad_norm)
        else:
            self._engine = Zero(self._accelerator, plugin, gather_parameters)
        self.zero_stage = self._engine.stage
        self.writes_shards = plugin is not None and run.checkpoint == "sharded"
        self.trackers = Trackers(self._accelerator, run.trackers)
        self._base_lrs: list[float] = []
        self._plain: nn.Module  # the module without the wrapper, from prepare()
        self._gathered: nn.Module | None = None  # the module with its whole weights, during a rollout with ZeRO-3

    @property
    def rank(self) -> int:
        return int(self._accelerator.process_index)

    @property
    def world_size(self) -> int:
        return int(self._accelerator.num_processes)

    @property
    def launch(self) -> str:
        """How many processes run together, and under what."""
        under = f"ZeRO-{self.zero_stage}" if self.zero_stage else "DDP" if self.world_size > 1 else ""
        return counted(self.world_size, "process", "processes") + (f" under {under}" if under else "")

    @property
    def is_main(self) -> bool:
        return bool(self._accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        return torch.device(self._accelerator.device)

    # Module and optimizer

    @property
    def module(self) -> nn.Module:
        """The prepared module: call it for anything that needs gradients."""
        module: nn.Module | None = self._engine.module
        assert module is not None, "prepare() first"
        return module

    @property
    def plain_module(self) -> Any:
        """The same module without the wrapper: for forward passes without gradients, and for its own methods."""
        return self._gathered if self._gathered is not None else self._plain

    @property
    def has_whole_weights(self) -> bool:
        """Whether this rank can run `plain_module` by itself; with ZeRO-3 only while it is gathered."""
        return self.zero_stage != 3 or self._gathered is not None

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer, resume: Path | None = None) -> None:
        """Move the module to the device, and put it under data parallelism or ZeRO.

        With `resume`, a folder that `save_state` wrote, module and optimizer continue from there. Raises `ConfigError`
        if the folder holds the weights of another model.
        """
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        module.eval()
        is_portable = resume is not None and portable.is_portable(resume)
        if resume is not None and is_portable:
            portable.load_weights(module, resume)
        self._engine.prepare(module, optimizer)
        self._plain = self._accelerator.unwrap_model(self.module)
        if resume is not None and is_portable:
            portable.load_moments(self._plain, resume, self._engine.set_moments)
        elif resume is not None:
            assert isinstance(self._engine, Zero), "only DeepSpeed writes shards"
            self._engine.load_shards(resume)

    def prepare_frozen(self, module: nn.Module) -> nn.Module:
        """A module that is not trained: sharded with ZeRO-3 (and offloaded where parameters are), else whole."""
        return self._engine.prepare_frozen(module)

    def set_lr_factor(self, factor: float) -> None:
        """Scale every learning rate from its configured value."""
        for group, lr in zip(self._engine.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * factor

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 arithmetic over the weights as they are, if `run.precision` asks for it.

        It is torch's own autocast: DeepSpeed's bf16 would round heads and adapters too, and Accelerate's reaches only
        the wrapped module.
        """
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """`autocast` without gradients, around many passes of `plain_module`: its fp32 weights are rounded once,
        the frozen ones too. Weights that ZeRO-3 shards are rounded in each pass: together they may not fit."""
        keeps = self.precision == "bf16" and self.has_whole_weights
        with torch.no_grad(), self.autocast(), casts_kept(self.plain_module) if keeps else contextlib.nullcontext():
            yield

    def backward(self, losses: Sequence[Callable[[], Tensor]], unless: Callable[[], bool] | None = None) -> bool:
        """Add up the gradients of these micro-batch losses over all ranks.

        Each loss is a sum over its tokens, divided by the token count of all micro-batches on all ranks, so gradients
        are to be summed; data parallelism averages them over ranks, which the factor undoes. All ranks give equally
        many losses: each forward and backward pass is a collective.

        `unless` is called once, on all ranks, when all losses are known. If it returns True the gradients are dropped,
        and the result is False.
        """
        dropped = False
        for number, loss in enumerate(losses, start=1):
            last = number == len(losses)
            drop = unless if last and unless is not None else lambda: False
            with self._engine.accumulating(last):
                with self.autocast():
                    value = loss() * self.world_size
                dropped = self._engine.backward(value, drop)
        return not dropped

    def optimizer_step(self) -> tuple[float, bool]:
        """Clip the gradient and step. Returns the norm before clipping, and whether the step was taken: a gradient that
        is not finite on some rank is not finite on any, and is dropped."""
        return self._engine.step()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Around forward passes without gradients: with ZeRO-3 the whole weights are gathered once into `plain_module`,
        if they fit (`rollout.gather_parameters`), so that ranks need not wait for each other at every layer."""
        if not isinstance(self._engine, Zero) or not self._engine.gathers():
            yield
            return
        self._gathered = self._engine.gather()
        try:
            yield
        finally:
            self._gathered = None

    # State

    def trainable_weights(self, with_frozen: bool = False) -> dict[str, Tensor]:
        """Whole trainable weights and persistent buffers by name, on the CPU of the main process; empty on the others.
        `with_frozen` adds the frozen parameters."""
        return weights.whole_weights(
            self._plain,
            self._engine.parts,
            lambda weight: weight.to("cpu", copy=True) if self.is_main else None,
            trainable_only=not with_frozen,
        )

    def set_weights(self, values: Mapping[str, Tensor]) -> None:
        """Copy whole values into parameters and buffers by name; every rank gives all of them. Raises `ConfigError` if
        the module has no tensor of such a name and shape."""
        weights.set_weights(self._plain, self._engine.parts, values)

    def save_state(self, folder: Path) -> str | None:
        """Write the trainable weights and the optimizer's state, from which `prepare` continues.

        Returns why this rank could not write its part, None if it could: if it raised, the others would wait for it.
        Sharded (`run.checkpoint`), each rank writes its part in DeepSpeed's format; else the main process writes whole
        tensors.
        """
        if isinstance(self._engine, Zero) and self.writes_shards:
            return self._engine.save_shards(folder)
        state, moments = self.trainable_weights(), self._engine.whole_moments()
        return failure(lambda: portable.save_portable(folder, state, moments)) if self.is_main else None

    # Collectives

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over ranks, on the CPU."""
        return collectives.sum_over_ranks(self._accelerator, values)

    def max(self, values: Tensor) -> Tensor:
        """Elementwise maximum over ranks, on the CPU."""
        return collectives.max_over_ranks(self._accelerator, values)

    def sum_and_max(self, sums: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
        """Both at once: the elementwise sum of the one and maximum of the other, on the CPU."""
        summed, largest = collectives.sum_and_max_over_ranks(self._accelerator, sums, maxima)
        return summed, largest

    def anywhere(self, fact: bool) -> bool:
        """Whether a fact holds on any rank."""
        return bool(self.sum(torch.tensor(int(fact))) > 0)

    def everywhere(self, fact: bool) -> bool:
        """Whether a fact holds on all ranks, if forward passes are collectives; else the fact of this rank.

        Loops whose length depends on the samples end by it, so that no rank leaves the others waiting.
        """
        return fact if self.has_whole_weights else collectives.on_all(self._accelerator, fact)

    def share(self, count: int) -> Int[Tensor, " n"]:
        """This rank's rows of `count`."""
        return self.shares(count)[self.rank]

    def shares(self, count: int) -> list[Int[Tensor, " n"]]:
        """Every rank's rows of `count`: contiguous, the first ranks one row longer where it does not divide."""
        return contiguous_shares(count, self.world_size)

    def gather_rows(self, rows: Tensor, count: int) -> Tensor:
        """The `count` rows of which every rank gives its `share`, in order, on every rank, as CPU tensors."""
        return collectives.gather_rows(self._accelerator, rows, count)

    def gather_list(self, items: Sequence[T]) -> list[T]:
        """The lists of all ranks, in order, on every rank."""
        return collectives.gather_list(self._accelerator, items)

    def first_failure(self, problem: str | None) -> str | None:
        """The problem of the first rank that has one, with its number; the same on every rank."""
        return collectives.first_failure(self._accelerator, problem)

    def from_main(self, make: Callable[[], T]) -> T:
        """The result of `make` on the main process, on every rank; if it raises there, every rank raises."""
        return collectives.from_main(self._accelerator, make)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process of each node runs the block before the others, which find what it has cached."""
        with self._accelerator.local_main_process_first():
            yield

    def peak_memory_mib(self) -> float:
        """The largest peak of any rank in MiB: of allocated GPU memory, or of the process's resident memory."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            peak = peak_resident_mib()
        return float(self.max(torch.tensor(peak)))

    def close(self) -> None:
        """Leave the process group: the last call."""
        self._accelerator.end_training()
