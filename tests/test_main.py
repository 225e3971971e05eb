"""The command line: bad input ends in one line that names the key, with status 2, and leaves the disk unchanged."""

import hashlib
import json
import os
import shutil
import sys

import datasets
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rlhf_accel import __main__ as command_line
from rlhf_accel.config.keys import key_names
from rlhf_accel.config.loading import load, parse, to_yaml
from rlhf_accel.config.schema import Config, DataConfig
from rlhf_accel.data.prompts import split_rows
from rlhf_accel.distributed import liveness
from rlhf_accel.system.errors import ConfigError
from tests import forks

pytestmark = pytest.mark.usefixtures("exact_fp32")


def nan_for_all(prompts, responses, **columns):
    return [float("nan")] * len(prompts)


def raises(prompts, responses, **columns):
    raise RuntimeError("no such\nfile")


def too_few(prompts, responses, **columns):
    return [1.0] * (len(prompts) - 1)


def on_disk(folder):
    """Every path below with its content and the time it was written."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
        )
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder: inputs in in/, the run's folder may be made in out/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.fixture
def refused(place, tiny, capfd):
    """A function that trains with these options and expects one line which holds `words`, and nothing else."""
    (place / "in" / "config.yaml").write_text(to_yaml(tiny(run={"output_dir": str(place / "out" / "run")})))

    def check(*options, words, config="in/config.yaml"):
        before = on_disk(place)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            command_line.main(["train", "--config", config, *map(str, options)])
        lines = capfd.readouterr().err.splitlines()
        assert stopped.value.code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        for word in words:
            assert word in lines[0], lines[0]
        assert on_disk(place) == before

    return check


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ppo.kl_coeff", "0.1"], ["unknown key ppo.kl_coeff", "did you mean ppo.kl_coef?"]),
        (["--optim.lr", "fast"], ["optim.lr='fast'"]),
        (["--optim.lr", "-1"], ["optim.lr=-1"]),
        (["--rollout.batch_size", "8.5"], ["rollout.batch_size=8.5"]),
        (["--optim.lr"], ["--optim.lr needs a value"]),
        (["oops"], ["unexpected argument 'oops'"]),
        (["--ppo.num_minibatches", "3"], ["ppo.num_minibatches=3", "rollout.batch_size=8"]),
        (["--rollout.min_new_tokens", "9"], ["rollout.min_new_tokens=9", "rollout.max_new_tokens=8"]),
        (["--ppo.micro_batch_tokens", "10"], ["ppo.micro_batch_tokens=10"]),
        (["--model.dtype", "bf16"], ["model.dtype=bf16", "lora.r"]),
        (["--reward.label", "POSITIVE"], ["reward.label", "reward.model"]),
        (["--run.trackers", "carrier_pigeon"], ["run.trackers", "carrier_pigeon"]),
        (["--run.resume", "latest"], ["run.resume=latest", "no checkpoint"]),
        (["--run.resume", "nowhere"], ["run.resume=nowhere", "neither latest, auto nor"]),
        (["--run.output_dir", "null", "--run.resume", "auto"], ["run.resume=auto", "run.output_dir"]),
        (["--run.changes", "optim.lrr"], ["run.changes", "did you mean optim.lr?"]),
        (["--run.max_skipped_steps", "0"], ["run.max_skipped_steps=0"]),
        (["--run.max_failed_saves", "-1"], ["run.max_failed_saves=-1"]),
        (["--run.collective_timeout", "0"], ["run.collective_timeout=0"]),
        (["--run.keep_checkpoints", "-1"], ["run.keep_checkpoints=-1"]),
        (["--run.checkpoint", "pickle"], ["run.checkpoint='pickle'", "portable"]),
        (["--run.total_steps", "0"], ["run.total_steps=0"]),
        (["--run.seed", "true"], ["run.seed=True"]),
        (["--run.precision", "fp8"], ["run.precision='fp8'"]),
        (["--model.critic", "adapter"], ["model.critic=adapter", "lora.r"]),
        (["--lora.r", "4", "--lora.adapter", "nowhere"], ["lora.adapter=nowhere"]),
        (["--model.load_in_4bit", "true", "--lora.r", "4"], ["model.load_in_4bit=true", "CUDA"]),
        (
            ["--rollout.max_new_tokens", "60", "--ppo.micro_batch_tokens", "99"],
            ["rollout.max_new_tokens=60", "64 positions"],
        ),
        (["--rollout.top_p", "0"], ["rollout.top_p=0"]),
        (["--rollout.temperature", ".nan"], ["rollout.temperature"]),
        (["--rollout.stop", "['']"], ["rollout.stop"]),
        (["--data.prompt_tokens", "[6, 2]"], ["data.prompt_tokens=[6, 2]"]),
        (["--data.prompt_tokens", "[1]"], ["data.prompt_tokens"]),
        (["--data.split", "test"], ["data.split=test", "no splits"]),
        (["--data.eval_split", "test"], ["data.eval_split=test", "no splits"]),
        (["--reward.url", "http://me:hunter2@host/"], ["reward.url", "RLHF_ACCEL_REWARD_TOKEN"]),
        (["--reward.url", "http://127.0.0.1:9/"], ["reward.url=http://127.0.0.1:9/", "Connection refused"]),
        (["--reward.weights", "[1, 2]"], ["reward.weights", "for 1 rewards"]),
        (["--reward.retries", "-1"], ["reward.retries=-1"]),
        (["--reward.retries", "99999999999"], ["reward.retries=99999999999"]),
        (["--ppo.gamma", "1.5"], ["ppo.gamma=1.5"]),
        (["--ppo.kl_target", "1", "--ppo.kl_coef", "0"], ["ppo.kl_target", "ppo.kl_coef=0"]),
        (["--optim.betas", "[0.9]"], ["optim.betas"]),
        (["--optim.schedule", "linaer"], ["optim.schedule='linaer'"]),
    ],
)
def test_bad_settings(refused, options, words):
    refused(*options, words=words)


def test_a_config_that_is_not_there_or_not_a_config(refused, place):
    refused(words=["--config in/nothing.yaml", "imdb_sentiment"], config="in/nothing.yaml")
    (place / "in" / "list.yaml").write_text("- 1\n")
    refused(words=["--config in/list.yaml", "mapping"], config="in/list.yaml")
    (place / "in" / "torn.yaml").write_text("run: {seed: 1\n")
    refused(words=["--config in/torn.yaml", "not valid YAML"], config="in/torn.yaml")


@pytest.mark.parametrize(
    ("name", "content", "options", "words"),
    [
        ("absent.jsonl", None, [], ["data.source=", "absent.jsonl"]),
        ("empty.jsonl", "", [], ["data.source=", "empty.jsonl"]),
        ("empty.txt", "\n\n", [], ["data.source=", "empty.txt"]),
        ("header.csv", "text\n", [], ["data.source=", "header.csv"]),
        ("torn.jsonl", '{"text": "a"\n', [], ["data.source=", "torn.jsonl"]),
        ("other.jsonl", '{"review": "good"}\n', [], ["data.text_field=text", "review"]),
        ("field.jsonl", '{"text": "good"}\n', ["--data.text_field", "body"], ["data.text_field=body", "text"]),
        ("blank.jsonl", '{"text": "good"}\n{"text": "  "}\n', [], ["row 2", "data.text_field"]),
        ("null.jsonl", '{"text": "good"}\n{"text": null}\n', [], ["row 2", "data.text_field"]),
        ("number.jsonl", '{"text": 1}\n{"text": 2}\n', [], ["row 1", "data.text_field"]),
        (
            "long.jsonl",
            json.dumps({"text": "good " * 50}) + "\n",
            ["--data.prompt_tokens", "null"],
            ["rollout.max_prompt_tokens=6"],
        ),
    ],
)
def test_bad_data(refused, place, name, content, options, words):
    if content is not None:
        (place / "in" / name).write_text(content)
    refused("--data.source", place / "in" / name, *options, words=words)


def test_a_policy_that_cannot_be_used(refused, place, gpt2_folder, classifier_folder):
    refused("--model.name_or_path", place / "in" / "nowhere", words=["model.name_or_path=", "nowhere: no such folder"])
    refused("--model.name_or_path", classifier_folder, words=["model.name_or_path=", "lm_head"])
    refused("--lora.r", 4, "--lora.target_modules", "q_proj", words=["lora.target_modules", "q_proj"])


def test_a_policy_without_weights(refused, place, gpt2_folder):
    shutil.copytree(gpt2_folder, place / "in" / "model")
    (place / "in" / "model" / "model.safetensors").unlink()
    refused("--model.name_or_path", place / "in" / "model", words=["model.name_or_path="])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (name, content)
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        for content in (b"", b"{", b"[]", b"\xff\x00garbage", "half", "folder")
        # A folder is not looked into, and without this file a tokenizer is whole.
        if (name, content) != ("tokenizer_config.json", "folder")
    ],
)
@pytest.mark.parametrize("part", ["policy", "reward"])
def test_a_model_folder_with_a_bad_file(refused, place, gpt2_folder, classifier_folder, name, content, part):
    folder = place / "in" / "model"
    shutil.copytree(gpt2_folder if part == "policy" else classifier_folder, folder)
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    if content == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    options = ["--model.name_or_path", folder]
    if part == "reward":
        options = ["--reward.function", "[]", "--reward.label", "POSITIVE", "--reward.model", folder]
    refused(*options, words=["model.name_or_path=" if part == "policy" else "reward.model="])


class Boom:
    """An object that, unpickled, leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("part", ["policy", "reward", "adapter"])
def test_a_pickle_that_would_run_code_is_refused(
    refused, place, tmp_path_factory, gpt2_folder, classifier_folder, part
):
    folder, mark = place / "in" / "model", tmp_path_factory.mktemp("mark") / "boom"
    if part == "adapter":
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(gpt2_folder), LoraConfig(r=2, fan_in_fan_out=True))
        model.save_pretrained(folder)
        (folder / "adapter_model.safetensors").unlink()
        torch.save({"weight": Boom(mark)}, folder / "adapter_model.bin")
    else:
        shutil.copytree(gpt2_folder if part == "policy" else classifier_folder, folder)
        (folder / "model.safetensors").unlink()
        torch.save({"weight": Boom(mark)}, folder / "pytorch_model.bin")
    options, key = {
        "policy": (["--model.name_or_path", folder], "model.name_or_path="),
        "reward": (
            ["--reward.function", "[]", "--reward.label", "POSITIVE", "--reward.model", folder],
            "reward.model=",
        ),
        "adapter": (["--lora.r", "2", "--lora.adapter", folder], "lora.adapter="),
    }[part]
    refused(*options, words=[key])
    assert not mark.exists()
    # And it would have left its mark where pickles are trusted.
    torch.load(next(folder.glob("*.bin")), weights_only=False)
    assert mark.exists()


def test_code_that_comes_with_a_model_is_not_run(refused, place, tmp_path_factory, gpt2_folder):
    folder, mark = place / "in" / "model", tmp_path_factory.mktemp("mark") / "boom"
    shutil.copytree(gpt2_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.Theirs", "AutoModelForCausalLM": "theirs.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    refused("--model.name_or_path", folder, words=["model.name_or_path="])
    assert not mark.exists()


# Any bytes as a data file, any text as a value: an error has one line and names the key.

SLOW = hypothesis.settings(
    max_examples=60, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


@SLOW
@hypothesis.given(st.binary(max_size=60), st.sampled_from([".jsonl", ".csv", ".parquet", ".txt"]))
def test_no_data_file_is_a_traceback(tmp_path, monkeypatch, content, suffix):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    try:
        rows, held = split_rows(parse(DataConfig, {"source": str(path)}))
    except ConfigError as error:
        assert str(error).startswith("data.") and "\n" not in str(error)
    else:
        assert len(rows) + len(held) > 0


@SLOW
@hypothesis.given(
    st.sampled_from(key_names(Config)), st.text(max_size=20) | st.floats().map(str) | st.integers().map(str)
)
def test_no_value_is_a_traceback(key, value):
    try:
        load(Config, "movie_reviews", [f"--{key}={value}"])
    except ConfigError as error:
        assert "\n" not in str(error)
        assert key.partition(".")[0] in str(error) or key.rpartition(".")[2] in str(error)


@pytest.mark.parametrize("family", ["gpt2_folder", "llama_folder"])
def test_a_policy_without_a_tokenizer(refused, place, request, family):
    (place / "in" / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(request.getfixturevalue(family) / name, place / "in" / "model")
    refused("--model.name_or_path", place / "in" / "model", words=["model.name_or_path=", "tokenizer"])


def test_a_reward_model_that_cannot_be_used(refused, place, gpt2_folder, classifier_folder):
    with_model = ["--reward.function", "[]", "--reward.model"]
    refused(*with_model, place / "in" / "nowhere", words=["reward.model=", "nowhere"])
    refused(*with_model, gpt2_folder, words=["reward.model="])
    refused(*with_model, classifier_folder, words=["reward.label is not set", "NEGATIVE, POSITIVE"])
    refused(*with_model, classifier_folder, "--reward.label", "GOOD", words=["reward.label=GOOD", "NEGATIVE, POSITIVE"])
    refused(
        *with_model,
        classifier_folder,
        *("--reward.label", "POSITIVE", "--model.critic", "separate", "--model.critic_init", "reward"),
        words=["model.critic_init=reward"],
    )


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("no_colon", ["package.module:callable"]),
        ("no_such_module:f", ["no_such_module", "cannot be imported"]),
        ("tests.test_main:no_such_name", ["has no no_such_name"]),
        ("tests.test_main:__doc__", ["not callable"]),
        ("tests.test_main:raises", ["raised RuntimeError: no such file"]),
        ("tests.test_main:too_few", ["1 scores for 2 responses"]),
        ("tests.test_main:nan_for_all", ["nan"]),
    ],
)
def test_a_bad_reward_function(refused, target, words):
    refused("--reward.function", target, words=[f"reward.function={target}", *words])


def test_no_reward(refused):
    refused("--reward.function", "[]", words=["reward.model, reward.url or reward.function"])


def test_a_reward_that_does_not_vary_cannot_be_calibrated(refused):
    refused(
        *("--reward.function", "tests.test_ppo_trainer:always_one", "--reward.calibrate", "true"),
        words=["reward.calibrate=true"],
    )


@pytest.mark.parametrize("below", ["", "/run", "/a/b"])
def test_a_file_in_the_way_of_the_output(refused, place, below):
    (place / "out" / "file").write_text("mine")
    refused("--run.output_dir", f"{place}/out/file{below}", words=["run.output_dir="])


def test_a_run_in_the_way_of_the_output(refused, place, tiny, capfd):
    command_line.main(["train", "--config", "in/config.yaml", "--run.total_steps", "1", "--run.save_every", "1"])
    assert (place / "out" / "run" / "final").is_dir()
    refused(words=["run.output_dir=", "already holds a run", "--run.resume latest"])
    # Nor does another mistake, when going on with the run.
    more = ("--run.total_steps", "2", "--run.resume")
    other_reward = ("--reward.function", "tests.test_main:too_few")
    refused(*more, "latest", *other_reward, words=["run.resume=latest", "reward.function (was", "--run.changes"])
    meant = ("--run.changes", "reward.function")
    refused(*more, "latest", *other_reward, *meant, words=["reward.function=tests.test_main:too_few returned 1 scores"])
    refused(*more, place / "nowhere", words=["run.resume=", "nowhere", "neither latest, auto nor the folder"])
    new = ("--run.output_dir", f"{place}/out/new")
    refused(*more, place / "in", *new, words=["run.resume=", "not a whole checkpoint", "manifest.json"])
    refused("--run.total_steps", "1", "--run.resume", "latest", words=["is finished: 1 steps", "raise run.total_steps"])


@pytest.mark.parametrize("save_every", ["1", "50"])
def test_auto_accepts_a_finished_run(place, tiny, refused, capfd, save_every):
    """Also one that was too short to write a checkpoint."""
    options = ["train", "--config", "in/config.yaml", "--run.total_steps", "1", "--run.save_every", save_every]
    command_line.main([*options, "--run.resume", "auto"])
    before = on_disk(place)
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        command_line.main([*options, "--run.resume", "auto"])
    assert left.value.code == 0
    assert capfd.readouterr().err.startswith(f"the run in {place}/out/run is finished: 1 steps, its model is {place}")
    assert on_disk(place) == before


def test_files_of_a_run_have_the_usual_permissions(place, tiny, refused):
    command_line.main(["train", "--config", "in/config.yaml", "--run.total_steps", "1", "--run.save_every", "1"])
    modes = {path.stat().st_mode & 0o777 for path in (place / "out" / "run").rglob("*") if path.is_file()}
    assert modes == {(place / "in" / "config.yaml").stat().st_mode & 0o777}


def test_a_bad_config_as_seen_from_outside(place, tiny):
    """In its own process: no library prints a warning beside the line."""
    config = yaml.safe_load(to_yaml(tiny(run={"output_dir": str(place / "out" / "run")})))
    config["reward"]["function"] = ["tests.test_main:too_few"]
    (place / "in" / "config.yaml").write_text(yaml.safe_dump(config))
    before = on_disk(place)
    root = os.path.dirname(os.path.dirname(__file__))
    done = forks.run(
        [sys.executable, "-m", "rlhf_accel", "train", "--config", "in/config.yaml"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: reward.function=tests.test_main:too_few returned 1 scores for 2 responses")
    assert on_disk(place) == before


# Commands


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help(arguments, capsys):
    command_line.main(arguments)
    output = capsys.readouterr()
    assert output.err == ""
    assert all(word in output.out for word in ("usage:", "train", "generate", "train-reward", "imdb_sentiment"))


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["tarin"])
    output = capsys.readouterr()
    assert stopped.value.code == 2
    assert output.err.startswith("error: ") and "'tarin'" in output.err
    assert all(command in output.err for command in command_line.COMMANDS)
    assert len(output.err.splitlines()) == 1


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main([command, "--help"])
    output = capsys.readouterr()
    assert stopped.value.code == 0
    assert output.err == ""
    assert len(output.out.splitlines()) > 5


def test_print_config_prints_and_trains_nothing(refused, place, capfd):
    before = on_disk(place)
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["train", "--config", "in/config.yaml", "--ppo.kl_coef", "0.5", "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capfd.readouterr().out)
    assert printed["ppo"]["kl_coef"] == 0.5
    assert printed["rollout"]["batch_size"] == 8
    assert on_disk(place) == before


def test_training_from_the_command_line(refused, place, capfd):
    command_line.main(["train", "--config", "in/config.yaml", "--run.total_steps=1"])
    assert len((place / "out" / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert "step 1/1" in capfd.readouterr().out


def test_a_crash_is_not_a_bad_input(refused, monkeypatch):
    from rlhf_accel.training.ppo_trainer import PPOTrainer

    def fail(self, prompts):
        raise ZeroDivisionError

    monkeypatch.setattr(PPOTrainer, "step", fail)
    with pytest.raises(ZeroDivisionError):  # which Python shows, and leaves with status 1
        command_line.main(["train", "--config", "in/config.yaml"])


def test_ctrl_c(capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        command_line.run(interrupt, [])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


# One launch, several processes


@pytest.fixture
def waits(monkeypatch):
    """The seconds that a process waited before it left."""
    seconds = []
    monkeypatch.setattr(command_line.time, "sleep", seconds.append)
    return seconds


def leave(capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["train", "--no.such_key", "1"])
    assert stopped.value.code == 2
    return capsys.readouterr().err.count("error: unknown key no.such_key")


@pytest.mark.parametrize(("rank", "waited"), [("0", 0), ("1", 1)])
def test_before_processes_communicate_the_first_of_a_node_prints_and_others_wait(
    waits, capsys, monkeypatch, rank, waited
):
    """A process that waited in vain prints its error, since the first process did not meet it."""
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert leave(capsys) == 1
    assert len(waits) == waited


@pytest.mark.parametrize("is_first", [True, False])
def test_after_processes_communicate_one_prints(waits, capsys, monkeypatch, is_first):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(liveness, "first_of_all", lambda event: is_first)
    assert leave(capsys) == int(is_first)
    assert len(waits) == int(not is_first)
