"""A whole module on every rank: one process, or several under DDP. The counterpart of `deepspeed.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn


class DataParallel:
    """Module and optimizer, prepared by Accelerate."""

    stage = 0  # of ZeRO

    def __init__(self, accelerator: Accelerator, max_grad_norm: float | None) -> None:
        self._accelerator = accelerator
        self._limit = float("inf") if max_grad_norm is None else max_grad_norm
        self.module: Any = None
        self.optimizer: Any = None

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = self._accelerator.prepare(module, optimizer)

    def prepare_frozen(self, module: nn.Module) -> nn.Module:
        return module.to(self._accelerator.device)

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch: gradients are reduced with the last one."""
        with contextlib.nullcontext() if last else self._accelerator.no_sync(self.module):
            yield

    def backward(self, loss: Tensor, drop: Callable[[], bool]) -> bool:
        """Add to the gradients; if `drop()` is True, drop them all. Returns the result of `drop()`.

        It is called after the backward pass has started, since the host waits for the loss in it.
        """
        self._accelerator.backward(loss)
        dropped = drop()
        if dropped:
            self.optimizer.zero_grad()
        return dropped

    def step(self) -> tuple[float, bool]:
        """Clip and step. Returns the gradient norm before clipping, and whether the step was taken."""
        # Accelerate skips steps while gradients accumulate. Whether they do is a state of the whole process, which
        # another `Accelerator` may have changed.
        self._accelerator.gradient_state._set_sync_gradients(True)
        norm = float(self._accelerator.clip_grad_norm_(self.module.parameters(), self._limit))
        taken = bool(np.isfinite(norm))
        if taken:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, taken

    def parts(self, parameters: Sequence[Any], *, write: bool = False) -> Iterator[Sequence[Any]]:
        """All of the parameters, which are whole (`weights.Parts`)."""
        yield parameters

    def whole_moments(self) -> dict[str, Tensor]:
        """AdamW's state of each trainable parameter as `NAME.exp_avg` and so on, on the CPU of the main process."""
        if not self._accelerator.is_main_process:
            return {}
        return {
            f"{name}.{key}": value.to("cpu", copy=True)
            for name, parameter in self._accelerator.unwrap_model(self.module).named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def set_moments(self, parameters: Mapping[str, nn.Parameter], read: Callable[[str], Tensor]) -> None:
        """Set the state of these parameters to what `whole_moments` returned, as `read` gives it by name."""
        for name, parameter in parameters.items():
            # The step too: fused AdamW counts on the parameter's device.
            state = {key: read(f"{name}.{key}").to(parameter.device) for key in ("exp_avg", "exp_avg_sq", "step")}
            self.optimizer.state[parameter] = state
