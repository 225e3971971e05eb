"""Local paths stay the same in any working folder, and files that leave the machine do not contain them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from rlhf_accel.commands import evaluate, generate, merge, parsers
from rlhf_accel.config import places
from rlhf_accel.config.loading import load, parse
from rlhf_accel.config.rules import changed_keys
from rlhf_accel.config.schema import Config
from rlhf_accel.training.ppo_trainer import PPOTrainer

REWARD = """
import os
def wandering(prompts, responses, **columns):
    os.chdir({elsewhere!r})
    return [response.count("o") for response in responses]
"""


def test_only_paths_that_exist_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("gpt2", "test"):
        Path(folder).mkdir()
    Path("a.jsonl").touch()
    tree = {
        "run": {"output_dir": "out/run", "resume": "latest"},
        "model": {"name_or_path": "gpt2"},
        "data": {"source": "a.jsonl", "eval_split": "test"},
        "reward": {"model": "./none", "gold": "a:b"},
    }
    config = places.absolute(parse(Config, tree))
    assert config.run.output_dir == f"{tmp_path}/out/run"
    assert config.run.resume == "latest"
    assert config.model.name_or_path == f"{tmp_path}/gpt2"
    assert (config.data.source, config.data.eval_split) == (f"{tmp_path}/a.jsonl", "test")
    assert (config.reward.model, config.reward.import_from) == ("./none", str(tmp_path))
    assert places.absolute(config) == config
    plain = places.absolute(parse(Config, {"model": {"name_or_path": "org/name"}, "data": {"source": "imdb"}}))
    assert (plain.model.name_or_path, plain.data.source, plain.reward.import_from) == ("org/name", "imdb", None)


@pytest.mark.usefixtures("exact_fp32")
def test_a_run_stays_in_one_folder_and_is_read_from_any(tiny, gpt2_folder, prompts_file, tmp_path, monkeypatch, capsys):
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    for folder in (work, elsewhere):
        folder.mkdir()
    shutil.copytree(gpt2_folder, work / "base_model")
    shutil.copy(prompts_file, work / "texts.jsonl")
    (work / "wandering_reward.py").write_text(REWARD.format(elsewhere=str(elsewhere)))
    monkeypatch.chdir(work)
    relative = tiny(
        run={"output_dir": "out/run", "total_steps": 1, "eval_samples": 2, "save_every": 1},
        model={"name_or_path": "base_model", "dtype": "fp32"},
        lora={"r": 2},
        data={"source": "texts.jsonl"},
        reward={"function": "wandering_reward:wandering"},
    )
    PPOTrainer(relative).fit()
    os.chdir(elsewhere)
    assert list(elsewhere.iterdir()) == []
    run = work / "out" / "run"
    assert {"config.yaml", "checkpoints", "final", "summary.json", "samples.jsonl"} <= {p.name for p in run.iterdir()}
    assert [path.name for path in work.iterdir() if path.name != "__pycache__"] != []
    # What may be uploaded names no folder of this machine.
    assert json.loads((run / "final" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base_model"
    for path in (run / "final").rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path

    evaluate.main(parsers.evaluate([str(run), "--which", "final", "--trust_code"]))
    generate.main(parsers.generate([str(run), "The film", "--compare", "--score", "--trust_code"]))
    merge.main(parsers.merge([str(run), "merged"]))
    assert (elsewhere / "merged" / "model.safetensors").is_file()
    # A run of an older version, which kept paths as they were given, is resumed as the same.
    config = load(Config, run / "config.yaml")
    assert changed_keys(relative, config) == []
    old = yaml.safe_load((run / "config.yaml").read_text())
    old["model"]["name_or_path"], old["data"]["source"] = "./base_model", "other/texts.jsonl"
    assert [change.partition(" ")[0] for change in changed_keys(parse(Config, old), config)] == ["data.source"]
