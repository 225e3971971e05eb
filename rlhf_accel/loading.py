"""The one place that reads models, tokenizers, their configs and adapters from a folder or the hub.

transformers asks on stdin whether code that comes with a model may run, unless a call says so either way; here
every call does. Knows transformers' and peft's ways to load; knows no config but the key that decides.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from peft import PeftConfig, PeftModel
from transformers import dynamic_module_utils

from rlhf_accel.config import ConfigError

TRUST_KEY = "model.trust_remote_code"
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}


def pretrained(kind: Any, path: Any, *, trust_remote_code: bool, **settings: Any) -> Any:
    """`kind.from_pretrained(path)`; code that comes with it runs only if `trust_remote_code`.

    Raises `ConfigError` if it cannot be loaded without such code, else whatever transformers raises.
    """
    return _without_asking(lambda: kind.from_pretrained(path, trust_remote_code=trust_remote_code, **settings), path)


def from_config(kind: Any, config: Any, *, trust_remote_code: bool, **settings: Any) -> Any:
    """`kind.from_config(config)`, as `pretrained`."""
    path = getattr(config, "_name_or_path", "") or "the model"
    return _without_asking(lambda: kind.from_config(config, trust_remote_code=trust_remote_code, **settings), path)


def adapter_config(path: str) -> PeftConfig:
    """The settings of the adapter at `path`. Raises `ConfigError` if they name a module that peft would import."""
    settings = PeftConfig.from_pretrained(path)
    named = getattr(settings, "megatron_config", None) and getattr(settings, "megatron_core", None)
    if settings.task_type is None and settings.auto_mapping:
        named = settings.auto_mapping.get("parent_library")
    if named:
        raise ConfigError(f"{path}: adapter_config.json has peft import the module {named!r}; it is not loaded")
    return settings


def adapted(model: Any, path: str, **settings: Any) -> PeftModel:
    """The model with the adapter at `path`, as `PeftModel.from_pretrained`. Raises what `adapter_config` does."""
    adapter_config(path)
    return PeftModel.from_pretrained(model, path, **settings)


def _name_cache(error: BaseException | None, path: Any) -> None:
    """Raises `ConfigError` if the error, or what it comes from, is a hub cache that cannot be written."""
    caches = [Path(constants.HF_HOME), Path(constants.HF_HUB_CACHE), Path(dynamic_module_utils.HF_MODULES_CACHE)]
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REFUSED and error.filename is not None:
            place = Path(os.fsdecode(error.filename))
            if any(place.is_relative_to(cache) or cache.is_relative_to(place) for cache in caches):
                raise ConfigError(
                    f"{path}: the cache of the Hugging Face hub cannot be written ({place}: {error.strerror}); set "
                    "HF_HOME to a folder that can",
                    key="HF_HOME",
                    cache=str(place),
                ) from None
        error = error.__cause__ or error.__context__


def _without_asking(load: Callable[[], Any], path: Any) -> Any:
    try:
        return load()
    except OSError as error:
        _name_cache(error, path)
        raise
    except ValueError as error:
        if isinstance(error, ConfigError) or "trust_remote_code=True" not in str(error):
            raise
        raise ConfigError(
            f"{path} needs code that comes with it, which is not run; {TRUST_KEY}=true runs it, only for sources that "
            "you trust (`generate` and `merge` of a model or adapter: --trust_code)",
            key=TRUST_KEY,
            path=str(path),
        ) from None
