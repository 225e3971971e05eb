"""Dumps: a failure that stopped a run, with everything needed to repeat it.

Knows files; knows no model and no rank.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_accel.config.loading import load_run, to_yaml
from rlhf_accel.config.schema import Config
from rlhf_accel.runs import records
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.files import Malformed, replace_folder, work_folder


@dataclass(frozen=True, kw_only=True)
class Dump:
    """A failure that stopped a run, with everything needed to repeat it.

    `facts` describe what happened, with prompts, responses and columns. `experience`, by field, and `weights`, those of
    trainable parameters by name, are empty unless the numbers of a model were at fault.
    """

    config: Config
    facts: dict[str, Any]
    experience: dict[str, Tensor]
    weights: dict[str, Tensor]


def write_dump(folder: Path, dump: Dump) -> None:
    """Write a dump. Raises `OSError` or `SafetensorError` if it cannot be written."""
    with work_folder(folder) as beside:
        (beside / "config.yaml").write_text(to_yaml(dump.config), encoding="utf-8")
        (beside / "dump.json").write_text(
            json.dumps(dump.facts, indent=2, ensure_ascii=False, default=str), encoding="utf-8"
        )
        for name, tensors in (("experience", dump.experience), ("weights", dump.weights)):
            if tensors:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, beside / f"{name}.safetensors")
        replace_folder(beside, folder)


def read_dump(folder: Path) -> Dump:
    """The dump in a folder. Raises `ConfigError` if there is none."""
    try:
        facts: dict[str, Any] = dict(records.read(folder / "dump.json", records.Dumped))
        count = len(facts["prompts"])
        lengths = {len(column) for column in (facts["responses"], *facts.get("columns", {}).values())}
        if lengths != {count} or max(facts["rows"], default=-1) >= count:
            raise Malformed("prompts, responses, columns and rows of dump.json do not agree")
        tensors = [
            load_file(path) if (path := folder / f"{name}.safetensors").is_file() else {}
            for name in ("experience", "weights")
        ]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        dumps = sorted(
            str(path.parent) for path in (*folder.glob("step-*/dump.json"), *folder.glob("dumps/*/dump.json"))
        )
        missing = "it holds no dump.json; failed runs write theirs to RUN/dumps"
        reason = missing if isinstance(error, FileNotFoundError) else str(error)
        reason = f"name one of {', '.join(dumps)}" if dumps else reason
        raise ConfigError(f"{folder} is not a dump of a run: {reason}") from None
    return Dump(config=load_run(folder / "config.yaml"), facts=facts, experience=tensors[0], weights=tensors[1])
