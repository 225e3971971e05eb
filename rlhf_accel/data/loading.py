"""The one file that loads models, tokenizers, their configs and adapters from a folder or the hub.

Without an explicit setting, transformers asks on stdin whether code that comes with a model may run; every call here is
explicit. Knows the loading functions of transformers and peft; knows only one config key, which allows such code.
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

from rlhf_accel.system.errors import ConfigError

_IMPORTED = ("transformers", "diffusers", "megatron")  # packages that an adapter's settings may name
TRUST_KEY = "model.trust_remote_code"
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}


def pretrained(kind: Any, path: Any, *, trust_remote_code: bool, subject: str | None = None, **settings: Any) -> Any:
    """`kind.from_pretrained(path)`; code that comes with it runs only if `trust_remote_code`.

    Raises `ConfigError`, which begins with `subject` or the path, if it needs such code or the hub's cache cannot be
    written; other errors come from transformers.
    """
    settings["trust_remote_code"] = trust_remote_code
    return _without_asking(lambda: kind.from_pretrained(path, **settings), subject or str(path))


def from_config(kind: Any, config: Any, *, trust_remote_code: bool, **settings: Any) -> Any:
    """`kind.from_config(config)`, with the same rule and errors as `pretrained`."""
    settings["trust_remote_code"] = trust_remote_code
    return _without_asking(lambda: kind.from_config(config, **settings), getattr(config, "_name_or_path", "the model"))


def adapter_config(path: str, subject: str | None = None) -> PeftConfig:
    """The settings of the adapter at `path`.

    Raises `ConfigError`, which begins with `subject` or the path, if peft would import a module that they name and
    that is not part of transformers.
    """
    settings = PeftConfig.from_pretrained(path)
    named = [getattr(settings, "megatron_core", None)] if getattr(settings, "megatron_config", None) else []
    named += [settings.auto_mapping.get("parent_library")] if isinstance(settings.auto_mapping, dict) else []
    for module in named:
        if module is not None and str(module).partition(".")[0] not in _IMPORTED:
            raise ConfigError(
                f"{subject or path}: adapter_config.json has peft import the module {module!r}; it is not loaded",
                module=str(module),
            )
    return settings


def adapted(model: Any, path: str, **settings: Any) -> PeftModel:
    """The model with the adapter at `path`, by `PeftModel.from_pretrained`; raises the errors of `adapter_config`."""
    adapter_config(path)
    return PeftModel.from_pretrained(model, path, **settings)


def _name_cache(error: BaseException | None, subject: str) -> None:
    """Raises `ConfigError` if the error or one of its causes is that the hub's cache cannot be written."""
    caches = [Path(constants.HF_HOME), Path(constants.HF_HUB_CACHE), Path(dynamic_module_utils.HF_MODULES_CACHE)]
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REFUSED and error.filename is not None:
            place = Path(os.fsdecode(error.filename))
            if any(place.is_relative_to(cache) or cache.is_relative_to(place) for cache in caches):
                raise ConfigError(
                    f"{subject}: the cache of the Hugging Face hub cannot be written ({place}: {error.strerror}); set "
                    "HF_HOME to a writable folder",
                    key="HF_HOME",
                    cache=str(place),
                ) from None
        error = error.__cause__ or error.__context__


def _without_asking(load: Callable[[], Any], subject: str) -> Any:
    try:
        return load()
    except OSError as error:
        _name_cache(error, subject)
        raise
    except ValueError as error:
        if isinstance(error, ConfigError) or "trust_remote_code=True" not in str(error):
            raise
        raise ConfigError(
            f"{subject} needs code that comes with it, which is not run; set {TRUST_KEY}=true to run it, only for "
            "sources that you trust (`generate` and `merge` of a model or adapter: --trust_code)",
            key=TRUST_KEY,
        ) from None
