"""A trained model to the Hugging Face hub: whether it may go there, and sending it.

Knows the hub's client and what an exported folder holds; knows no model and no rank. The token is that of
`hf auth login` or of the environment variable HF_TOKEN, never a config's.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from rlhf_accel.config.loading import load_run
from rlhf_accel.config.schema import Config
from rlhf_accel.runs import records
from rlhf_accel.runs.cards import base_model, is_hub_id
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.system.files import Malformed, read_json
from rlhf_accel.system.terminal import say

_ADAPTER = "adapter_config.json"


class PushError(RunFailed):
    """The hub did not take a model; the message says why. The model's folder is as it was."""


def check(config: Config) -> None:
    """Raises `ConfigError` unless run.push_to_hub can be written to with this machine's token."""
    repo_id = config.run.push_to_hub
    assert repo_id is not None
    said = f"run.push_to_hub={repo_id}"
    if config.lora.r > 0 and base_model(config) is None:
        raise ConfigError(
            f"{said}: the base of the adapter, model.name_or_path={config.model.name_or_path}, is a folder that nobody "
            "else has; name it by its hub id, or push later with python -m rlhf_accel push RUN USER/NAME --base ID",
            key="run.push_to_hub",
        )
    _check_access(said, "run.push_to_hub", repo_id)


def _check_access(said: str, key: str | None, repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise HFValidationError("it has no user")
    except HFValidationError as error:
        raise ConfigError(f"{said} is no hub id, expected USER/NAME ({error})", key=key) from None
    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
    try:
        who = HfApi().whoami()
    except LocalTokenNotFoundError:
        raise ConfigError(f"{said}: there is no token of the hub here; {login}", key=key) from None
    except OfflineModeIsEnabled:
        raise ConfigError(f"{said}: HF_HUB_OFFLINE is set; unset it, or take run.push_to_hub out", key=key) from None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            raise ConfigError(f"{said}: the hub refuses the token here; {login}", key=key) from None
        raise ConfigError(f"{said}: the hub does not answer as it should ({_reason(error)})", key=key) from None
    except Exception as error:  # the client lets errors of its transport through
        raise ConfigError(f"{said}: the hub cannot be asked ({_reason(error)})", key=key) from None
    owners = [who["name"], *(organisation["name"] for organisation in who.get("orgs", ()))]
    owner = repo_id.partition("/")[0]
    if owner.lower() not in [name.lower() for name in owners]:
        raise ConfigError(f"{said}: the token here writes for {', '.join(owners)}, not for {owner}", key=key)
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ConfigError(f"{said}: the token here may only read; {login}", key=key)


def push(folder: Path, repo_id: str, *, private: bool = False, base: str | None = None) -> str:
    """Make the repository if it is not there, and put the files of an exported model there in one commit.

    Where an adapter's base is a folder of this machine, its config goes up with `base`, a hub id, instead, and the
    card's code names `repo_id`. Returns the address. Raises `PushError`, whatever the reason.
    """
    api = HfApi()
    try:
        with _shown(folder, repo_id, base) as shown:
            address = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
            api.upload_folder(
                repo_id=repo_id, folder_path=shown, repo_type="model", commit_message="A model trained by rlhf_accel"
            )
    except Exception as error:  # of the hub, of the transport, of the disk: none may end a run that is done
        raise PushError(f"{folder} could not be uploaded to {repo_id} ({_reason(error)})") from error
    return str(address)


@contextmanager
def _shown(folder: Path, repo_id: str, base: str | None) -> Iterator[Path]:
    """The folder as others are to see it: its files as links, but for those that name places of this machine."""
    with tempfile.TemporaryDirectory(prefix="rlhf_accel_push_") as work:
        for path in sorted(folder.rglob("*")):
            if not path.resolve().is_relative_to(folder.resolve()):  # somebody else's folder may link to a secret
                raise PushError(f"{path} is a link to a file outside of {folder}; nothing is uploaded, remove the link")
            place = Path(work) / path.relative_to(folder)
            if path.is_dir():
                place.mkdir(parents=True)
            elif path.name == _ADAPTER and base is not None:
                settings = read_json(path)
                place.write_text(json.dumps(settings | {"base_model_name_or_path": base}, indent=2), encoding="utf-8")
            elif path.name == "README.md":
                card = path.read_text(encoding="utf-8").replace('name = "."', f'name = "{repo_id}"')
                place.write_text(card, encoding="utf-8")
            else:
                os.symlink(path.absolute(), place)
        yield Path(work)


def _reason(error: Exception) -> str:
    """In one line, without the request's number and the addresses that the client adds below it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}" if lines else type(error).__name__


def main(arguments: list[str]) -> None:
    """The command; raises `ConfigError` for a folder that holds no model or a hub that cannot be written to."""
    parser = argparse.ArgumentParser(prog="rlhf_accel push", description=__doc__)
    parser.add_argument("model", type=Path, help="a run's folder, or an exported model's")
    parser.add_argument("repo_id", help="USER/NAME on the hub; made if it is not there")
    parser.add_argument("--which", choices=("final", "best"), default="final", help="which model of a run's folder")
    parser.add_argument("--private", action="store_true", help="make a repository that is not there a private one")
    parser.add_argument("--base", help="hub id of an adapter's base, where the run knew it as a local folder")
    options = parser.parse_args(arguments)
    folder, base = options.model, options.base
    if (folder / "config.yaml").is_file():
        base = base or base_model(load_run(folder / "config.yaml"))
        folder = folder / options.which
    if not (folder / "config.json").is_file() and not (folder / _ADAPTER).is_file():
        raise ConfigError(f"{folder} holds no model; name a run's folder, or that of a model")
    if base is None and (folder / _ADAPTER).is_file():
        try:
            named = records.read(folder / _ADAPTER, records.Adapter)["base_model_name_or_path"]
        except (OSError, Malformed) as error:
            raise ConfigError(f"{folder / _ADAPTER} is not what peft writes ({records.why(error)})") from None
        if named is None or not is_hub_id(named):
            raise ConfigError(f"{folder}: the adapter's base, {named}, is no hub id; name it with --base", key="--base")
    _check_access(f"push {options.repo_id}", None, options.repo_id)
    say(push(folder, options.repo_id, private=options.private, base=base))
