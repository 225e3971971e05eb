"""What DeepSpeed's own launcher gives to a script, and how its user names the DeepSpeed config."""

from __future__ import annotations

import os
import sys

import pytest

from rlhf_accel import __main__ as command_line
from rlhf_accel.config.recipes import recipe_names
from rlhf_accel.distributed.deepspeed_launch import take_launch_options
from rlhf_accel.system.errors import ConfigError

USE, FILE = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment that these tests may fill, as of a process that is not launched."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "LOCAL_"))}
    for key in ("RANK", "WORLD_SIZE"):
        clean.pop(key, None)
    monkeypatch.setattr(os, "environ", clean)
    return clean


@pytest.mark.parametrize("words", [["--local_rank=3"], ["--local_rank", "3"]])
def test_the_local_rank_is_taken_unless_the_launcher_has_set_it(words: list[str], environment: dict[str, str]) -> None:
    rest = ["--run.seed", "1"]
    assert take_launch_options([*words, *rest]) == rest
    assert environment["LOCAL_RANK"] == "3" and USE not in environment and "LOCAL_WORLD_SIZE" not in environment
    environment |= {"LOCAL_RANK": "5", "LOCAL_SIZE": "8"}
    assert take_launch_options([*rest, *words]) == rest
    assert environment["LOCAL_RANK"] == "5" and environment["LOCAL_WORLD_SIZE"] == "8"


def test_a_deepspeed_file_is_named_as_a_launch_file_would(environment: dict[str, str]) -> None:
    environment["RANK"] = "0"
    assert take_launch_options(["--deepspeed=ds_configs/zero3.json"]) == []
    assert environment[USE] == "true" and environment[FILE] == "ds_configs/zero3.json"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"


@pytest.mark.parametrize(
    ("file", "more", "words"),
    [
        ("ds_configs/zero9.json", {"RANK": "0"}, "ds_configs/zero9.json: there is no such file"),
        ("ds_configs/zero2.json", {}, "needs a launch"),
        ("ds_configs/zero2.json", {"RANK": "0", USE: "true", FILE: "other.json"}, "has named other.json already"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(
    file: str, more: dict[str, str], words: str, environment: dict[str, str]
) -> None:
    environment |= more
    with pytest.raises(ConfigError, match=words) as refused:
        take_launch_options(["--deepspeed", file])
    assert refused.value.key == "--deepspeed"
    assert environment.get(FILE) == more.get(FILE)


@pytest.mark.parametrize("place", [0, 1])
def test_a_command_takes_the_options_of_a_launch(
    place: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script gets them behind the command, and `deepspeed --module rlhf_accel` before it."""
    words = ["train", "--config", recipe_names()[0], "--print_config"]
    words.insert(place, "--local_rank=1")
    monkeypatch.setattr(sys, "argv", ["rlhf-accel", *words])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("run:")
    assert os.environ["LOCAL_RANK"] == "1"
