"""The weights of a module by their names: parameters and the buffers that belong to its state.

Knows modules and tensors; how a sharded parameter becomes whole is the matter of `Parts`, which the caller gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlhf_accel.system.errors import ConfigError


class Parts(Protocol):
    """Yields parameters part by part, each part whole on this rank while it is looked at. With `write`, the values that
    the main process gives them are kept, on all ranks."""

    def __call__(self, parameters: Sequence[Any], *, write: bool = False) -> Iterator[Sequence[Any]]: ...


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a module's state, under all of their names: such as the bias with which DeepSeek-V3
    balances its experts. Other buffers, such as rotary frequencies, follow from the config."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, layer in module.named_modules(remove_duplicate=False)
        for name, buffer in layer._buffers.items()
        if buffer is not None and name not in layer._non_persistent_buffers_set
    }


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, under all of their names."""
    return {**dict(module.named_parameters(remove_duplicate=False)), **persistent_buffers(module)}


def each_once(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shared weights under the first of their names only, as in `named_parameters`: safetensors refuses the others."""
    once: dict[int, tuple[str, Tensor]] = {}
    for name, weight in weights.items():
        once.setdefault(id(weight), (name, weight.contiguous()))
    return dict(once.values())


def whole_weights(
    module: nn.Module, parts: Parts, copy_of: Callable[[Tensor], Tensor | None], *, trainable_only: bool = False
) -> dict[str, Tensor]:
    """A copy of each parameter and persistent buffer by name; of shared weights one copy under all of their names.

    `copy_of` is called with whole tensors on every rank, and may return None where no copy is wanted.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad or not trainable_only:
            names.setdefault(parameter, []).append(name)
    copies: dict[str, Tensor] = {}
    for part in parts(list(names)):
        for parameter in part:
            copy = copy_of(parameter.detach())
            if copy is not None:
                copies |= dict.fromkeys(names[parameter], copy)
    buffers = persistent_buffers(module)  # which ZeRO does not shard
    copy_by_id = {id(buffer): copy_of(buffer.detach()) for buffer in buffers.values()}
    return copies | {name: copy for name, buffer in buffers.items() if (copy := copy_by_id[id(buffer)]) is not None}


def set_weights(module: nn.Module, parts: Parts, weights: Mapping[str, Tensor]) -> None:
    """Copy whole values into parameters and buffers by name; every rank gives all of them.

    Raises `ConfigError` if the module has no tensor of such a name and shape.
    """
    named = named_tensors(module)
    for name, value in weights.items():
        if name not in named or tuple(getattr(named[name], "ds_shape", named[name].shape)) != tuple(value.shape):
            raise ConfigError(f"these are weights of another model: this one has no {name} {tuple(value.shape)}")
    values = {named[name]: value for name, value in weights.items()}
    with torch.no_grad():
        for part in parts([p for p in values if isinstance(p, nn.Parameter)], write=True):
            for parameter in part:
                parameter.copy_(values[parameter])
        for buffer in (tensor for tensor in values if not isinstance(tensor, nn.Parameter)):
            buffer.copy_(values[buffer])
