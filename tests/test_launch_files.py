"""The launch files inside the package: the same as at the top, and found from any working folder."""

import os

import pytest
import yaml

from rlhf_accel import __main__ as command_line
from rlhf_accel.distributed import launch_files
from tests.distributed.launch import ROOT

VARIABLE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"


@pytest.mark.parametrize("folder", ["accelerate_configs", "ds_configs"])
def test_the_package_has_the_files_of_the_top_level(folder):
    ours = {path.name: path.read_bytes() for path in (launch_files.LAUNCH / folder).iterdir()}
    assert ours == {path.name: path.read_bytes() for path in (ROOT / folder).iterdir()}


@pytest.mark.parametrize("name", launch_files.launch_names())
def test_launch_config_prints_a_file_whose_deepspeed_config_is_found(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command_line.main(["launch-config", name])
    with open(capsys.readouterr().out.strip(), encoding="utf-8") as file:
        named = yaml.safe_load(file).get("deepspeed_config", {}).get("deepspeed_config_file")
    if named is not None:
        monkeypatch.setenv(VARIABLE, named)  # as `accelerate launch` does
        launch_files.find_deepspeed_file()
        assert os.path.isfile(os.environ[VARIABLE])


def test_a_deepspeed_config_of_the_working_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero2.json").write_text("{}")
    for named in ("ds_configs/zero2.json", "ds_configs/other.json", "none"):
        monkeypatch.setenv(VARIABLE, named)
        launch_files.find_deepspeed_file()
        assert os.environ[VARIABLE] == named
