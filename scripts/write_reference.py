"""Write the generated tables of docs/reference.md: python scripts/write_reference.py. A test compares them."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from rlhf_accel.config.reward_schema import RewardTrainingConfig
from rlhf_accel.config.schema import Config
from rlhf_accel.runs.metrics import markdown_table

REFERENCE = Path(__file__).parents[1] / "docs" / "reference.md"


def keys_table(cls: Any) -> str:
    """Every key of a config class with its default and meaning, in one table per section."""
    tables = []
    for section, kind in get_type_hints(cls).items():
        rows = [_key(section, field.name, kind) for field in fields(kind)]
        tables.append("\n".join([f"**`{section}`**", "", "| key | default | meaning |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(tables)


def _key(section: str, name: str, kind: Any) -> str:
    info = kind.__pydantic_fields__[name]
    # A pipe would end the cell, and GitHub would read <…> as HTML.
    meaning = " ".join((info.description or "").split()).replace("|", "\\|").replace("<", "\\<")
    return f"| `{section}.{name}` | {_default(info.default)} | {meaning} |"


def _default(value: Any) -> str:
    """As a YAML file would have it."""
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def updated(text: str) -> str:
    """The page with its generated parts as the code has them."""
    parts = {
        "Config": keys_table(Config),
        "RewardTrainingConfig": keys_table(RewardTrainingConfig),
        "metrics": markdown_table(),
    }
    for name, table in parts.items():
        pattern = rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    REFERENCE.write_text(updated(REFERENCE.read_text(encoding="utf-8")), encoding="utf-8")
