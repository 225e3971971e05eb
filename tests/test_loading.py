"""Code that comes with a model runs where model.trust_remote_code says so; else it is refused, and nobody is asked."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import rlhf_accel
from rlhf_accel.commands import generate, merge, model_sizes, parsers
from rlhf_accel.commands.checks.building import build
from rlhf_accel.commands.checks.findings import Findings
from rlhf_accel.config.loading import parse
from rlhf_accel.config.reward_schema import RewardTrainingConfig
from rlhf_accel.config.schema import Config, RewardConfig
from rlhf_accel.data import loading
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.models import classifier as classifiers
from rlhf_accel.reward import load_reward
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.training.ppo_trainer import PPOTrainer

CPU = torch.device("cpu")


def test_one_place_loads() -> None:
    """No other call can forget to say whether code that comes with a model may run."""
    package = Path(rlhf_accel.__file__).parent
    calls = {
        f"{path.name}:{node.lineno}"
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "from_config")
        if path.name != "loading.py"
    }
    assert not calls


@pytest.fixture
def nobody_answers(monkeypatch):
    """stdin that says yes, and fails the test if it was asked."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "yes")
    yield
    assert not questions


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def with_code(tmp_path, mark, nobody_answers, monkeypatch):
    """A function that copies a model's folder under a type of its own, with code that leaves a mark when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def make(folder: Path, config: str, model: str, auto: str, name: str = "foreign") -> Path:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        (copy / "code.py").write_text(
            f"import pathlib, transformers\npathlib.Path({str(mark)!r}).touch()\n"
            f"class Settings(transformers.{config}):\n    model_type = 'with_code'\n"
            f"class Model(transformers.{model}):\n    config_class = Settings\n"
        )
        tree = json.loads((copy / "config.json").read_text())
        tree |= {"model_type": "with_code", "auto_map": {"AutoConfig": "code.Settings", auto: "code.Model"}}
        (copy / "config.json").write_text(json.dumps(tree))
        return copy

    return make


@pytest.fixture
def classifier(with_code, classifier_folder) -> str:
    return str(
        with_code(
            classifier_folder,
            "RobertaConfig",
            "RobertaForSequenceClassification",
            "AutoModelForSequenceClassification",
            "classifier",
        )
    )


@pytest.fixture
def policy(with_code, gpt2_folder) -> str:
    return str(with_code(gpt2_folder, "GPT2Config", "GPT2LMHeadModel", "AutoModelForCausalLM"))


def refused(load, mark: Path) -> str:
    with pytest.raises(ConfigError, match=r"needs code that comes with it, .*model\.trust_remote_code=true") as error:
        load()
    assert error.value.key == "model.trust_remote_code"
    assert not mark.exists()
    return str(error.value)


def test_code_of_a_reward_model(classifier, mark) -> None:
    config = parse(RewardConfig, {"model": classifier, "label": "POSITIVE", "dtype": "fp32"})
    refused(lambda: load_reward(config, classifier, CPU), mark)
    reward = load_reward(config, classifier, CPU, trust_remote_code=True)
    assert mark.exists()
    assert type(reward.terms[0][2].model).__module__.endswith("code")
    assert reward(["a"], ["b"], {}).isfinite().all()


def test_code_of_what_reward_training_starts_from(classifier, mark) -> None:
    def config(trust: bool) -> RewardTrainingConfig:
        return parse(RewardTrainingConfig, {"model": {"name_or_path": classifier, "trust_remote_code": trust}})

    refused(lambda: classifiers.known_labels(config(False)), mark)
    assert classifiers.known_labels(config(True)) == ("NEGATIVE", "POSITIVE")
    assert mark.exists()
    tokenizer = classifiers.load_tokenizer(classifier, "model", trust_remote_code=True)
    model = classifiers.load(config(True), tokenizer, ("score",))
    assert type(model).__module__.endswith("code")


def test_code_of_a_policy_and_of_the_reward_beside_it(policy, classifier, tiny, mark) -> None:
    """In training and in doctor, and in its plan of the memory, which reads configs alone."""
    model = {"name_or_path": policy}
    refused(lambda: PPOTrainer(tiny(model=model)), mark)
    refused(lambda: model_sizes.measure(tiny(model=model), policy), mark)
    of_reward = tiny(reward={"model": classifier, "label": "POSITIVE", "dtype": "fp32", "function": []})
    refused(lambda: PPOTrainer(of_reward), mark)
    refused(lambda: model_sizes.measure(of_reward, of_reward.model.name_or_path, classifier), mark)
    findings = Findings(lambda _: None)
    assert build(findings, tiny(model=model)) is None
    assert ["model.trust_remote_code=true" in str(finding) for finding in findings] == [True]
    assert not mark.exists()
    trusting = tiny(model=model | {"trust_remote_code": True})
    assert model_sizes.measure(trusting, policy).trainable > 0
    assert mark.exists()


def test_code_of_a_tokenizer(policy, mark) -> None:
    path = Path(policy) / "tokenizer_config.json"
    tree = json.loads(path.read_text()) | {
        "tokenizer_class": "Foreign",
        "auto_map": {"AutoTokenizer": ["code.F", None]},
    }
    path.write_text(json.dumps(tree))
    refused(lambda: Tokens.load(policy), mark)
    refused(lambda: classifiers.load_tokenizer(policy, "reward.model", trust_remote_code=False), mark)


def test_code_of_a_model_or_an_adapters_base(policy, gpt2_folder, tmp_path, mark, capsys) -> None:
    refused(lambda: generate.main(parsers.generate([policy, "The film", "--max_new_tokens", "2"])), mark)
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = tmp_path / "adapter"
    base = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, fan_in_fan_out=True))
    adapted.peft_config["default"].base_model_name_or_path = policy
    adapted.save_pretrained(adapter)
    AutoTokenizer.from_pretrained(gpt2_folder).save_pretrained(adapter)
    refused(lambda: generate.main(parsers.generate([str(adapter), "The film", "--max_new_tokens", "2"])), mark)
    refused(lambda: merge.main(parsers.merge([str(adapter), str(tmp_path / "merged")])), mark)
    generate.main(parsers.generate([str(adapter), "The film", "--max_new_tokens", "2", "--trust_code"]))
    assert mark.exists()


def test_a_cache_that_cannot_be_written_is_named(policy, tiny, tmp_path, mark, monkeypatch) -> None:
    (tmp_path / "file").touch()
    place = str(tmp_path / "file" / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", place)
    config = tiny(model={"name_or_path": policy, "trust_remote_code": True})
    with pytest.raises(ConfigError, match=rf"cache .* cannot be written \({tmp_path}/file.*; set HF_HOME to") as error:
        PPOTrainer(config)
    assert error.value.key == "HF_HOME" and not mark.exists()


def test_an_adapter_made_without_a_task_is_one(gpt2_folder, tmp_path) -> None:
    """peft notes the class of its base for it, which is transformers' own."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    get_peft_model(base, LoraConfig(r=2, fan_in_fan_out=True)).save_pretrained(tmp_path)
    assert loading.adapter_config(str(tmp_path)).auto_mapping["parent_library"].startswith("transformers.")


@pytest.mark.parametrize(
    "changes",
    [
        {"task_type": None, "auto_mapping": {"parent_library": "planted", "base_model_class": "Model"}},
        {"megatron_config": {"a": 1}, "megatron_core": "planted"},
    ],
)
def test_an_adapter_that_has_a_module_imported(changes, gpt2_folder, tmp_path) -> None:
    tree = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(gpt2_folder), "r": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(tree | changes))
    with pytest.raises(ConfigError, match=r"adapter_config\.json has peft import the module 'planted'"):
        loading.adapter_config(str(tmp_path))


def test_a_model_without_code_of_its_own_needs_no_trust(gpt2_folder) -> None:
    assert len(Tokens.load(str(gpt2_folder))) > 0
    assert not Config().model.trust_remote_code
