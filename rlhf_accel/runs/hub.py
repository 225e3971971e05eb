"""Push a trained model to the Hugging Face hub, after checking access.

The token comes from `hf auth login` or the environment variable HF_TOKEN, never from a config. Knows the hub's client
and the files of an export. Knows no model and no rank.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from rlhf_accel.config.schema import Config
from rlhf_accel.runs.cards import base_model
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.system.files import read_json

ADAPTER = "adapter_config.json"


class PushError(RunFailed):
    """A model could not be uploaded; the message gives the reason. The model's folder is unchanged."""


def check(config: Config) -> None:
    """Raises `ConfigError` unless the token of this machine can write to run.push_to_hub."""
    repo_id = config.run.push_to_hub
    assert repo_id is not None
    subject = f"run.push_to_hub={repo_id}"
    if config.lora.r > 0 and base_model(config) is None:
        raise ConfigError(
            f"{subject}: the base of the adapter, model.name_or_path={config.model.name_or_path}, is a folder of this "
            "machine; name it by its hub id, or push later with python -m rlhf_accel push RUN USER/NAME --base ID",
            key="run.push_to_hub",
        )
    check_access(subject, "run.push_to_hub", repo_id)


def check_access(subject: str, key: str | None, repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise HFValidationError("it has no user")
    except HFValidationError as error:
        raise ConfigError(f"{subject} is not a hub id, expected USER/NAME ({error})", key=key) from None
    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
    try:
        who = HfApi().whoami()
    except LocalTokenNotFoundError:
        raise ConfigError(f"{subject}: no hub token is set on this machine; {login}", key=key) from None
    except OfflineModeIsEnabled:
        raise ConfigError(f"{subject}: HF_HUB_OFFLINE is set; unset it, or remove run.push_to_hub", key=key) from None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            raise ConfigError(f"{subject}: the hub refuses the token of this machine; {login}", key=key) from None
        raise ConfigError(f"{subject}: unexpected answer of the hub ({_reason(error)})", key=key) from None
    except Exception as error:  # the client passes on errors of its transport
        raise ConfigError(f"{subject}: the hub cannot be reached ({_reason(error)})", key=key) from None
    owners = [who["name"], *(organisation["name"] for organisation in who.get("orgs", ()))]
    owner = repo_id.partition("/")[0]
    if owner.lower() not in [name.lower() for name in owners]:
        raise ConfigError(
            f"{subject}: the token of this machine may write to {', '.join(owners)}, not to {owner}", key=key
        )
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ConfigError(f"{subject}: the token of this machine may only read; {login}", key=key)


def push(folder: Path, repo_id: str, *, private: bool = False, base: str | None = None) -> str:
    """Upload the files of an exported model in one commit, to a repository that is created if needed.

    `base`, a hub id, replaces the base in an adapter's config, and the card's code names `repo_id`. Returns the
    address. Raises `PushError` for any failure.
    """
    api = HfApi()
    try:
        with _shown(folder, repo_id, base) as shown:
            address = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
            api.upload_folder(
                repo_id=repo_id, folder_path=shown, repo_type="model", commit_message="A model trained by rlhf_accel"
            )
    except Exception as error:  # from the hub, the transport or the disk; a finished run must not fail here
        raise PushError(f"{folder} could not be uploaded to {repo_id} ({_reason(error)})") from error
    return str(address)


def push_final(config: Config, folder: Path, say: Callable[[str], None]) -> None:
    """Upload a run's final/ if run.push_to_hub is set; a failure is printed with the command to try again."""
    run = config.run
    if run.push_to_hub is None:
        return
    say(f"uploading final/ to {run.push_to_hub}")
    try:
        address = push(folder / "final", run.push_to_hub, private=run.hub_private, base=base_model(config))
    except PushError as error:
        again = f"python -m rlhf_accel push {folder} {run.push_to_hub}{' --private' * run.hub_private}"
        say(f"warning: {error}; final/ is complete; try again with {again}")
    else:
        say(f"the model is on the hub: {address}")


@contextmanager
def _shown(folder: Path, repo_id: str, base: str | None) -> Iterator[Path]:
    """A temporary folder with the files to upload: links, and copies of those that name paths of this machine."""
    with tempfile.TemporaryDirectory(prefix="rlhf_accel_push_") as work:
        for path in sorted(folder.rglob("*")):
            if not path.resolve().is_relative_to(folder.resolve()):  # a folder from elsewhere may link to a secret
                raise PushError(
                    f"{path} is a link to a file outside of {folder}; nothing was uploaded, remove the link"
                )
            place = Path(work) / path.relative_to(folder)
            if path.is_dir():
                place.mkdir(parents=True)
            elif path.name == ADAPTER and base is not None:
                settings = read_json(path)
                place.write_text(json.dumps(settings | {"base_model_name_or_path": base}, indent=2), encoding="utf-8")
            elif path.name == "README.md":
                card = path.read_text(encoding="utf-8").replace('name = "."', f'name = "{repo_id}"')
                place.write_text(card, encoding="utf-8")
            else:
                os.symlink(path.absolute(), place)
        yield Path(work)


def _reason(error: Exception) -> str:
    """The error in one line, without the request id and the addresses that the client appends."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}" if lines else type(error).__name__
