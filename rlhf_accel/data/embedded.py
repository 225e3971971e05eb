"""The data sets in this package, and the reward model that is trained on its movie reviews at first use.

Knows the data file, the recipe of the training and its cached result. The training runs in a process of its own: this
file knows no model and no rank.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import datasets
import pyarrow.parquet

from rlhf_accel.config.loading import load
from rlhf_accel.config.recipes import REWARD_RECIPE
from rlhf_accel.config.reward_schema import RewardTrainingConfig
from rlhf_accel.data import problems
from rlhf_accel.data.cache import built_once, cache_dir, note
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.files import sha256

MOVIE_REVIEWS = Path(__file__).parents[1] / "movie_reviews" / "movie_reviews.parquet"
SPLITS = ("train", "validation", "heldout")

# Set by accelerate launch, torchrun and mpirun for one rank. The training process must not inherit that rank.
_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE", "NODE_RANK")
_LAUNCH_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "LOCAL_", "GROUP_", "ROLE_", "FSDP_", "PMI_", "OMPI_", "MPI_")


def embedded_dataset(name: str, split: str) -> datasets.Dataset:
    """Rows of a data set in this package. movie_reviews has the columns id, text, rating (the mean) and ratings (one
    for each rater), arithmetic has kind, text (the question) and answer.

    Raises `ConfigError` naming data.source or data.split if one of them does not exist.
    """
    known = {"movie_reviews": SPLITS, "arithmetic": problems.SPLITS}
    if name not in known:
        raise ConfigError(
            f"data.source=embedded:{name} does not exist; choose embedded:{' or embedded:'.join(known)}",
            key="data.source",
        )
    if split not in known[name]:
        raise ConfigError(
            f"data.split={split} does not exist in embedded:{name}; choose one of {', '.join(known[name])}",
            key="data.split",
        )
    if name == "arithmetic":
        return datasets.Dataset.from_list([problem._asdict() for problem in problems.arithmetic_problems(split)])
    # Not by `datasets`, whose cache folder processes would share.
    table = pyarrow.parquet.read_table(MOVIE_REVIEWS, filters=[("split", "==", split)])
    return datasets.Dataset(table.drop_columns("split"))


def embedded_reward_model(key: str) -> Path:
    """The folder of the reward model for the embedded reviews, trained at first use.

    Raises `ConfigError` naming `key` if it cannot be trained or written here, `RuntimeError` if its training crashes.
    """
    config = load(RewardTrainingConfig, REWARD_RECIPE)
    tree = asdict(config)
    del tree["model"]["trust_remote_code"]  # no effect here, and models cached before this key existed stay valid
    recipe = json.dumps(tree, sort_keys=True).encode()
    digest = hashlib.sha256(recipe + sha256(MOVIE_REVIEWS).encode()).hexdigest()
    folder = cache_dir() / "reward_models" / f"movie_reviews-{digest[:8]}"
    if folder.is_dir():
        return folder
    with built_once(folder, key, 300) as work:
        if work is not None:
            note("training the reward model of the default recipe on the human ratings, about 3 minutes, once")
            _train_reward(work / "result", key)
            note(f"kept in {folder}")
    return folder


def _train_reward(output: Path, key: str) -> None:
    # In a process of its own, which frees its memory at the end and keeps its torch settings to itself.
    command = [sys.executable, "-m", "rlhf_accel", "train-reward", "--config", REWARD_RECIPE]
    # Its output goes to standard error: the standard output of `generate` may be a file.
    result = subprocess.run([*command, "--run.output_dir", str(output)], env=_own_environment(), stdout=2)
    if result.returncode == 2:
        raise ConfigError(
            f"{key}=embedded:movie_reviews: its training cannot run; the reason is printed above", key=key
        )
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {result.returncode}; its output is above")


def _own_environment() -> dict[str, str]:
    """The environment without the variables that a launcher set for this rank."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCH_VARIABLES and not name.startswith(_LAUNCH_PREFIXES)
    }
    if "WORLD_SIZE" in os.environ:
        # Launchers set it to share the cores between ranks, but the other ranks wait for this process.
        kept.pop("OMP_NUM_THREADS", None)
    return kept
