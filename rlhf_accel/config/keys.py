"""Dotted keys: those of a config class, those of a tree, and the valid key nearest to a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys.

    >>> flatten({"run": {"seed": 0, "name": "a"}})
    {'run.seed': 0, 'run.name': 'a'}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


@cache
def type_hints(cls: Any) -> dict[str, Any]:
    """The types of a config class's fields; cached, since resolving them from text takes milliseconds."""
    return get_type_hints(cls)


def key_names(cls: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a config class.

    >>> from rlhf_accel.config.schema import Config
    >>> key_names(Config)[:2]
    ['run.seed', 'run.output_dir']
    """
    names = []
    hints = type_hints(cls)
    for field in fields(cls):
        kind = hints[field.name]
        names += key_names(kind, f"{prefix}{field.name}.") if is_dataclass(kind) else [prefix + field.name]
    return names


def unknown(key: str, known: Sequence[str]) -> str:
    """The message for an unknown key, with the nearest keys: first a typing error, then the right key in the wrong
    section, then any similar spelling.

    The second precedes the third, because `--lr` means optim.lr although lora.r is more similar.
    """
    sections = list(dict.fromkeys(name.partition(".")[0] for name in known))
    if key in sections:
        return f"{key} is a section; its keys are {', '.join(name for name in known if name.startswith(f'{key}.'))}"
    everything = [*sections, *known]
    nearest = difflib.get_close_matches(key, everything, n=1, cutoff=0.85)
    nearest = nearest or [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = nearest or difflib.get_close_matches(key, everything, n=1, cutoff=0.5)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"known are {', '.join(known)}"
    return f"unknown key {key}; {hint}"


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
