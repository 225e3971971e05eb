"""Portable checkpoints: whole weights and AdamW's state by name, written by one launch and read by any other.

Knows the two files of safetensors; the engine knows where the state of a parameter is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_accel.distributed.weights import each_once, named_tensors
from rlhf_accel.system.errors import ConfigError

_WEIGHTS, _MOMENTS = "learned.safetensors", "optimizer.safetensors"


def is_portable(checkpoint: Path) -> bool:
    return (checkpoint / _WEIGHTS).is_file()


def check_portable(checkpoint: Path) -> None:
    """Raises `ConfigError` for a checkpoint that is sharded by rank."""
    if not is_portable(checkpoint):
        raise ConfigError(
            f"{checkpoint} is sharded by rank: only checkpoints of run.checkpoint=portable can be read here",
            key="run.checkpoint",
        )


def portable_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The whole trainable weights in a portable checkpoint, by their names in the module; raises `ConfigError` if the
    checkpoint is not portable."""
    check_portable(checkpoint)
    try:
        return load_file(checkpoint / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{checkpoint / _WEIGHTS} cannot be read ({error})", key="--which") from error


def save_portable(folder: Path, weights: Mapping[str, Tensor], moments: dict[str, Tensor]) -> None:
    """Write the whole trainable weights by name and, of each, AdamW's `exp_avg`, `exp_avg_sq` and `step`."""
    save_file(each_once(weights), folder / _WEIGHTS)
    save_file(moments, folder / _MOMENTS)


def load_weights(module: nn.Module, folder: Path) -> None:
    """Raises `ConfigError` if the checkpoint is of another model."""
    weights = load_file(folder / _WEIGHTS)
    own = named_tensors(module)
    # The file holds shared parameters once; files of older versions hold no buffers.
    lacking = [name for name, p in module.named_parameters() if p.requires_grad and name not in weights]
    foreign = [name for name, weight in weights.items() if name not in own or own[name].shape != weight.shape]
    for name in (*lacking, *foreign):
        raise ConfigError(f"run.resume={folder}: holds weights of another model ({name}, …)", key="run.resume")
    module.load_state_dict(weights, strict=False)


def load_moments(
    module: nn.Module, folder: Path, give: Callable[[Mapping[str, nn.Parameter], Callable[[str], Tensor]], None]
) -> None:
    """Call `give` with the trainable parameters that have a state in the checkpoint, by name, and with a function that
    reads one tensor of that state, such as `NAME.exp_avg`. A checkpoint from before the first step has no state."""
    with safe_open(folder / _MOMENTS, framework="pt", device="cpu") as file:
        known = set(file.keys())
        stepped = {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and f"{name}.step" in known
        }
        if stepped:
            give(stepped, file.get_tensor)
