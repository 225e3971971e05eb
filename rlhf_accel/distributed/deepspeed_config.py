"""The DeepSpeed config of a launch, completed with the settings of the run.

Knows the file that the launch names and the keys that the run decides; knows no engine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import DeepSpeedPlugin
from accelerate.utils import is_deepspeed_available

from rlhf_accel.distributed.launch_files import find_deepspeed_file
from rlhf_accel.system.errors import ConfigError

Owned = Mapping[str, tuple[Any, str]]  # a key that the run decides: its value, and the setting of the run behind it


def deepspeed_plugin(precision: str, max_grad_norm: float | None, minibatch: int) -> DeepSpeedPlugin | None:
    """The config that `accelerate launch` names, completed with the settings of the run; None if DeepSpeed was not
    launched. Raises `ConfigError` where the two disagree."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    if not is_deepspeed_available():
        raise ConfigError("this launch asks for DeepSpeed, which is not installed; pip install 'rlhf_accel[deepspeed]'")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    micro = -(-minibatch // world_size)
    batch = f"rollout.batch_size / ppo.num_minibatches = {minibatch}"
    owned: dict[str, tuple[Any, str]] = {
        # Micro-batches are cut by tokens and differ in size; DeepSpeed only checks that its three sizes agree.
        "train_batch_size": (minibatch, batch),
        "train_micro_batch_size_per_gpu": (micro, f"{batch} over {world_size} processes"),
        "gradient_accumulation_steps": (1, "ppo.micro_batch_tokens, which cuts micro-batches by tokens"),
        "gradient_clipping": (max_grad_norm or 0.0, f"optim.max_grad_norm={max_grad_norm}"),
        "fp16.enabled": (False, "run.precision, which is fp32 or bf16"),
        "bf16.enabled": (False, f"run.precision={precision}, which is autocast over fp32 weights"),
        "torch_autocast.enabled": (precision == "bf16", f"run.precision={precision}"),
    }
    find_deepspeed_file()
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    try:
        # Without a file, the sizes in the plugin are Accelerate's own defaults, which need not agree with the run.
        plugin = DeepSpeedPlugin(hf_ds_config=None if path == "none" else _read_file(path, owned))
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


def _read_file(path: str, owned: Owned) -> dict[str, Any]:
    """The DeepSpeed config in a file; raises `ConfigError` if it sets an owned key to another value than the run."""
    config = _read_json(path)
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ConfigError(
                f"{section} in {path} and optim.* of the run's config both set it; remove the former", key=section
            )
    for key, (value, setting) in owned.items():
        section, _, name = key.rpartition(".")
        found = (config.get(section, {}) if section else config).get(name, "auto")
        if found not in ("auto", value):
            raise ConfigError(f'{key}={found} in {path} disagrees with {setting}; set the former to "auto"', key=key)
        if section and found == "auto" and section in config:
            config[section][name] = value
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) == 0:
        raise ConfigError(
            f"zero_optimization.stage in {path} is 0 or absent; set 1, 2 or 3, or launch with ddp.yaml",
            key="zero_optimization.stage",
        )
    # Without "auto" DeepSpeed uses its defaults; Accelerate would derive these values from the width of one model.
    return config | {"zero_optimization": {key: value for key, value in zero.items() if value != "auto"}}


def _read_json(path: str) -> dict[str, Any]:
    key = "deepspeed_config_file"
    try:
        config: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        hint = f" from {Path.cwd()}; launch from the checkout, or give an absolute path"
        where = "" if Path(path).is_absolute() else hint
        raise ConfigError(f"{key}: {path} cannot be read ({error.strerror}){where}", key=key) from error
    except ValueError as error:
        raise ConfigError(f"{key}: {path} is not a JSON file ({error})", key=key) from error
    return config
