"""Absolute paths for a config's local ones, resolved once at the start, so that they stay the same if a reward changes
the working folder or a command runs in another one. Knows the config and the disk."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from rlhf_accel.config.schema import Config
from rlhf_accel.system.errors import ConfigError, why

Name = TypeVar("Name", str, "str | None")


def absolute(config: Config) -> Config:
    """The config with relative paths that exist made absolute; hub ids and the like stay as they are.

    A folder with the name of a hub id takes precedence, as in transformers and datasets. `reward.import_from` becomes
    the working folder, unless it is set or there is nothing to import. A file of `data.chat_template` or
    `reward.chat_template` is replaced by its content, so that a run does not depend on it. Raises `ConfigError` if it
    cannot be read.
    """
    run, reward, here = config.run, config.reward, os.getcwd()
    imports = here if reward.import_from is None and (reward.function or reward.gold) else reward.import_from
    resume = run.resume if run.resume in (None, "latest", "auto") else _path(run.resume)
    return replace(
        config,
        run=replace(run, output_dir=None if run.output_dir is None else os.path.abspath(run.output_dir), resume=resume),
        model=replace(config.model, name_or_path=_folder(config.model.name_or_path)),
        lora=replace(config.lora, adapter=_folder(config.lora.adapter)),
        data=replace(
            config.data,
            source=_path(config.data.source),
            eval_split=_file(config.data.eval_split),
            chat_template=template_text(config.data.chat_template, "data.chat_template"),
        ),
        reward=replace(
            reward,
            model=_folder(reward.model),
            import_from=_path(imports),
            chat_template=template_text(reward.chat_template, "reward.chat_template"),
        ),
    )


def template_text(template: str | None, key: str) -> str | None:
    """A Jinja template as it is, or the content of the file that it names. Raises `ConfigError`, which names `key`, if
    that cannot be read."""
    if template is None or "{" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{key}={template}: neither a Jinja template nor a file that can be read ({why(error)})", key=key
        ) from error


def _path(name: Name) -> Name:
    return os.path.abspath(name) if name is not None and os.path.exists(name) else name


def _folder(name: Name) -> Name:
    return _path(name) if name is not None and os.path.isdir(name) else name


def _file(name: Name) -> Name:
    return _path(name) if name is not None and os.path.isfile(name) else name
