"""A hub cache without a hub: models and data sets as a machine holds them that has loaded them once.

A process with `forks.offline_environment`, such as a fork, loads them under their hub ids.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.splits import SplitDict, SplitInfo

# A commit and a builder's hash: any hexadecimal digits will do.
COMMIT = "0" * 40


def put_model(hub_cache: Path, name: str, folder: Path) -> Path:
    """Copy a model's folder to where the hub's client keeps `name`; returns the copy."""
    root = hub_cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    return shutil.copytree(folder, root / "snapshots" / COMMIT)


def make_hub_cache_dataset(hub_cache: Path, name: str, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Put a data set of these rows where `load_dataset(name)` looks offline; returns its folder.

    Offline, `datasets` 5.2 does not read the hub's own cache (datasets--ns--name/snapshots): it wants the Arrow files
    that it prepared when it loaded the set online, in HF_DATASETS_CACHE/ns___name/CONFIG/VERSION/HASH (see its packaged
    module `cache`). `name` is taken to be in lower case, as that folder is in snake case.
    """
    dataset = name.rpartition("/")[2]
    folder = hub_cache.parent / "datasets" / name.replace("/", "___") / "plain_text" / "0.0.0" / COMMIT
    folder.mkdir(parents=True)
    infos = SplitDict()
    features = datasets.Features()
    for split, rows in splits.items():
        table = datasets.Dataset.from_list([dict(row) for row in rows])
        features = table.features
        with pa.ipc.new_stream(folder / f"{dataset}-{split}.arrow", table.data.schema) as writer:
            writer.write_table(table.data.table)
        infos.add(SplitInfo(name=split, num_examples=len(rows), dataset_name=dataset))
    info = datasets.DatasetInfo(
        features=features,
        splits=infos,
        builder_name="parquet",
        dataset_name=dataset,
        config_name="plain_text",
        version="0.0.0",
    )
    info.write_to_directory(folder)
    return folder
