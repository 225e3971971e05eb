"""Configs are written and read back, and errors are one line that names the key."""

from __future__ import annotations

import ast
import dataclasses
import json
import pickle
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rlhf_accel.config.keys import key_names
from rlhf_accel.config.loading import (
    describe,
    from_command_line,
    load,
    load_run,
    parse,
    parse_overrides,
    read_yaml,
    to_yaml,
)
from rlhf_accel.config.recipes import DEFAULT_RECIPE, RECIPES, recipe_names
from rlhf_accel.config.reward_schema import RewardTrainingConfig
from rlhf_accel.config.rules import changed_keys, check_trainable
from rlhf_accel.config.schema import (
    BatchSizes,
    Config,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    RolloutConfig,
    RunConfig,
)
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.terminal import visible

ROOT = Path(__file__).parent.parent
LAUNCH_FILES = sorted([*ROOT.glob("accelerate_configs/*"), *ROOT.glob("ds_configs/*")])


def sections(cls: Any) -> list[Any]:
    return [kind for kind in get_type_hints(cls).values() if dataclasses.is_dataclass(kind)]


def error_of(tree: Any, cls: Any = Config) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(cls, tree)
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1
    return message


def command_line_error(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        from_command_line(Config, arguments, DEFAULT_RECIPE)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_defaults_survive_yaml() -> None:
    for cls in (Config, RewardTrainingConfig):
        assert parse(cls, yaml.safe_load(to_yaml(cls()))) == cls()


def test_every_kind_of_value_survives_yaml() -> None:
    tree: dict[str, Any] = {
        "run": {"name": "1e3", "output_dir": "a: b # ö\n", "trackers": ["wandb", "no"]},
        "lora": {"r": 8, "target_modules": ["q_proj"]},
        "data": {"prompt_tokens": [2, 8], "max_samples": None},
        "rollout": {"stop": ["\n\n", "\x85", "\u2028", "#", "true", "null", "2024-01-01", "'", "<|im_end|>"]},
        "reward": {"function": "a.b:c", "weights": 0.5, "clip": 1e-7},
        "ppo": {"cliprange_value": None},
        "optim": {"betas": [0.0, 0.95], "lr": "3e-4"},
    }
    config = parse(Config, tree)
    assert config.optim.lr == 3e-4
    assert config.reward.weights == (0.5,)
    assert config.reward.function == ("a.b:c",)
    assert config.rollout.stop == tuple(tree["rollout"]["stop"])
    assert parse(Config, yaml.safe_load(to_yaml(config))) == config


def test_a_printed_config_is_read_back() -> None:
    config = parse(Config, {"rollout": {"stop": ["a\u200eb"]}})
    assert parse(Config, yaml.safe_load(visible(to_yaml(config)))) == config


@settings(max_examples=25, deadline=None)
@given(name=st.text(min_size=1), stop=st.lists(st.text(min_size=1)), lr=st.floats(min_value=1e-30, max_value=1e30))
def test_any_text_and_number_survive_yaml(name: str, stop: list[str], lr: float) -> None:
    config = Config(run=RunConfig(name=name), rollout=RolloutConfig(stop=tuple(stop)), optim=OptimConfig(lr=lr))
    assert parse(Config, yaml.safe_load(to_yaml(config))) == config


def test_an_override_beats_the_recipe_and_the_recipe_beats_the_default() -> None:
    recipe = load(Config, "imdb_sentiment")
    assert recipe.rollout.batch_size == 256 != RolloutConfig().batch_size
    changed = load(Config, "imdb_sentiment", ["--rollout.batch_size", "64", "--rollout.batch_size=128"])
    assert changed.rollout.batch_size == 128
    assert changed.rollout.max_new_tokens == recipe.rollout.max_new_tokens
    assert changed.ppo == recipe.ppo


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads(name: str) -> None:
    cls: Any = RewardTrainingConfig if name.endswith("_reward") else Config
    config = load(cls, name)
    assert config.run.name != cls().run.name or "name" in read_yaml(name)["run"]
    assert load(cls, RECIPES / f"{name}.yaml") == config


def test_the_default_recipe_exists() -> None:
    assert DEFAULT_RECIPE in recipe_names()
    assert {"imdb_sentiment", "imdb_sentiment_lora"} <= set(recipe_names())


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_launch_file_parses(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert path.suffix in (".yaml", ".json"), "a file of another kind needs a check of its own"
    if path.suffix == ".json":
        tree = json.loads(text)
    else:
        tree = yaml.safe_load(text)
        assert {"distributed_type", "num_processes"} <= set(tree)
        assert isinstance(tree["distributed_type"], str), "an unquoted NO is a boolean"
        if tree["distributed_type"] == "DEEPSPEED":
            assert (ROOT / tree["deepspeed_config"]["deepspeed_config_file"]).is_file()
            assert "mixed_precision" not in tree, "Accelerate refuses it beside a file of DeepSpeed's"
        else:
            assert isinstance(tree["mixed_precision"], str), "an unquoted no is a boolean"
    assert isinstance(tree, dict) and tree


@pytest.mark.parametrize(
    ("tree", "found", "meant"),
    [
        ({"rolout": {"batch_size": 8}}, "rolout", "rollout"),
        ({"ppo": {"gama": 1.0}}, "ppo.gama", "ppo.gamma"),
        ({"ppo": {"lr": 1e-5}}, "ppo.lr", "optim.lr"),
        ({"kl_coef": 0.1}, "kl_coef", "ppo.kl_coef"),
        ({"model": {"dtypes": "fp32"}}, "model.dtypes", "model.dtype"),
        ({"optim": {"batch_size": 8}}, "optim.batch_size", "rollout.batch_size or reward.batch_size"),
    ],
)
def test_an_unknown_key_names_the_nearest(tree: dict, found: str, meant: str) -> None:
    assert error_of(tree) == f"unknown key {found}; did you mean {meant}?"


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("--rolout.batch_size=8", "rollout.batch_size"),
        ("--rollout.batch-size=8", "rollout.batch_size"),
        ("--ppo.lr=1", "optim.lr"),
        ("--lr=1", "optim.lr"),
        ("--lora.rank=8", "lora.r"),
    ],
)
def test_an_unknown_override_names_the_nearest(argument: str, meant: str) -> None:
    assert command_line_error(argument).endswith(f"did you mean {meant}?")


def test_an_unknown_key_like_no_other_lists_the_known_ones() -> None:
    message = error_of({"zzz": 1})
    assert "zzz" in message and "rollout.batch_size" in message


def test_a_section_is_not_a_key() -> None:
    message = command_line_error("--lora", "8")
    assert message.startswith("lora is a section") and "lora.r, lora.alpha" in message


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"run": {"seed": "x"}}, "run.seed='x'"),
        ({"run": {"seed": 1.5}}, "run.seed=1.5"),
        ({"run": {"seed": True}}, "run.seed=True"),
        ({"run": {"seed": None}}, "run.seed=None"),
        ({"run": {"seed": -1}}, "run.seed=-1"),
        ({"run": {"total_steps": 0}}, "run.total_steps=0"),
        ({"run": {"name": ["a"]}}, "run.name=['a']"),
        ({"run": {"name": False}}, "run.name=False"),
        ({"optim": {"lr": True}}, "optim.lr=True"),
        ({"optim": {"lr": 0}}, "optim.lr=0"),
        ({"optim": {"betas": [0.9, 1.0]}}, "optim.betas=1.0"),
        ({"optim": {"betas": [0.9]}}, "optim.betas=[0.9]: too few items"),
        ({"data": {"prompt_tokens": [1, 2, 3]}}, "data.prompt_tokens=[1, 2, 3]: list"),
        ({"data": {"prompt_tokens": [0, 2]}}, "data.prompt_tokens=0"),
        ({"model": {"critic": "heads"}}, "model.critic='heads'"),
        ({"rollout": {"top_p": 0}}, "rollout.top_p=0"),
        ({"rollout": {"top_p": 1.1}}, "rollout.top_p=1.1"),
        ({"rollout": {"temperature": 0}}, "rollout.temperature=0"),
        ({"rollout": {"stop": None}}, "rollout.stop=None"),
        ({"rollout": {"stop": ["a", ""]}}, "rollout.stop contains an empty text"),
        ({"rollout": {"stop": ["a", ["b"]]}}, "rollout.stop=['b']"),
        ({"reward": {"weights": ["x"]}}, "reward.weights='x'"),
        ({"reward": {"weights": True}}, "reward.weights=True"),
        ({"reward": {"calibrate_samples": 1}}, "reward.calibrate_samples=1"),
        ({"ppo": {"whiten_rewards": "perhaps"}}, "ppo.whiten_rewards='perhaps'"),
        ({"ppo": {"kl_coef": float("nan")}}, "ppo.kl_coef=nan"),
        ({"ppo": {"kl_coef": float("inf")}}, "ppo.kl_coef=inf"),
        ({"ppo": {"gamma": 1.01}}, "ppo.gamma=1.01"),
        ({"ppo": 3}, "ppo: expected a mapping of keys, found 3"),
        ({"ppo": None}, "ppo: expected a mapping of keys, found None"),
    ],
)
def test_a_wrong_value_names_its_key(tree: dict, key: str) -> None:
    assert error_of(tree).startswith(key)


CONTRADICTIONS: list[tuple[dict, list[str]]] = [
    ({"ppo": {"num_minibatches": 3}}, ["ppo.num_minibatches=3", "rollout.batch_size=64", "choose a divisor"]),
    ({"rollout": {"min_new_tokens": 33}}, ["rollout.min_new_tokens=33", "rollout.max_new_tokens=32", "lower"]),
    ({"rollout": {"stop": ["a", ""]}}, ["rollout.stop", "empty", "remove"]),
    ({"data": {"eval_split": "train"}}, ["data.eval_split=train", "training data", "name another"]),
    (
        {"data": {"source": "a.csv", "eval_split": "a.csv"}},
        ["data.eval_split=a.csv", "training data", "name another"],
    ),
    ({"data": {"prompt_tokens": [8, 2]}}, ["data.prompt_tokens=[8, 2]", "smaller number first"]),
    (
        {"data": {"prompt_tokens": [2, 65]}},
        ["data.prompt_tokens=[2, 65]", "rollout.max_prompt_tokens=64", "raise"],
    ),
    (
        {"reward": {"model": "m", "function": ["a:b"], "weights": [1]}},
        ["reward.weights", "1 numbers for 2 rewards", "one for each"],
    ),
    ({"reward": {"label": "POSITIVE"}}, ["reward.label", "reward.model", "remove"]),
    ({"model": {"critic_init": "reward"}}, ["model.critic_init=reward", "model.critic=separate", "reward.model"]),
    (
        {"model": {"critic_init": "reward", "critic": "separate"}},
        ["model.critic_init=reward", "reward.model"],
    ),
    ({"model": {"dtype": "bf16"}}, ["model.dtype=bf16", "lora.r=0", "model.dtype=fp32"]),
    ({"ppo": {"micro_batch_tokens": 95}}, ["ppo.micro_batch_tokens=95", "=96", "raise"]),
    ({"ppo": {"kl_target": 6.0, "kl_coef": 0}}, ["ppo.kl_target", "ppo.kl_coef=0", "above 0"]),
    (
        {"ppo": {"kl_target": 6.0, "kl_horizon": 12.8}, "rollout": {"batch_size": 64}},
        ["ppo.kl_horizon=12.8", "rollout.batch_size=64", "above 12.8"],
    ),
    (
        {"reward": {"partial_every": 2}, "ppo": {"whiten_rewards": True}},
        ["reward.partial_every=2", "ppo.whiten_rewards=true", "reward.calibrate=true"],
    ),
    ({"run": {"resume": "latest"}}, ["run.resume=latest", "run.output_dir"]),
    ({"model": {"critic": "adapter"}}, ["model.critic=adapter", "lora.r above 0"]),
    ({"model": {"load_in_4bit": True}}, ["model.load_in_4bit=true", "lora.r above 0"]),
    ({"model": {"load_in_4bit": True, "critic": "separate"}, "lora": {"r": 4}}, ["model.load_in_4bit", "model.critic"]),
    (
        {"model": {"attention": "flash_attention_2"}, "run": {"precision": "fp32"}},
        ["model.attention=flash_attention_2", "run.precision=fp32", "model.attention=sdpa"],
    ),
    ({"lora": {"use_dora": True}}, ["lora.use_dora", "lora.r=0"]),
    ({"lora": {"adapter": "folder"}}, ["lora.adapter", "lora.r=0", "adapter's rank"]),
    (
        {"lora": {"r": 4, "adapter": "folder", "modules_to_save": ["lm_head"]}},
        ["lora.modules_to_save", "lora.adapter", "remove"],
    ),
    (
        {"lora": {"r": 4, "modules_to_save": ["lm_head"]}, "model": {"dtype": "bf16"}},
        ["lora.modules_to_save", "model.dtype=bf16", "run.precision=bf16"],
    ),
]


@pytest.mark.parametrize(("tree", "parts"), CONTRADICTIONS, ids=lambda value: str(value)[:50])
def test_a_contradiction_names_key_and_fix(tree: dict, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as found:
        parse(Config, tree)
    message, key = str(found.value), found.value.key
    for part in parts:
        assert part in message
    assert key is not None and message.startswith(key)
    assert {key, *found.value.facts.get("others", ())} <= set(key_names(Config))


def test_limits_are_not_contradictions() -> None:
    tree = {
        "run": {"resume": "latest", "output_dir": "x"},
        "rollout": {"min_new_tokens": 32, "stop": ["a"]},
        "data": {"prompt_tokens": [64, 64], "eval_split": "test"},
        "reward": {"model": "m", "function": ["a:b"], "weights": [1, -2.5], "label": "0"},
        "model": {"critic_init": "reward", "critic": "separate", "dtype": "bf16"},
        "lora": {"r": 1},
        "ppo": {"micro_batch_tokens": 96, "num_minibatches": 64},
    }
    assert BatchSizes.of(parse(Config, tree)) == BatchSizes(prompts=64, rollout=64, minibatch=1)


# A short text whose tree has nine times nine times … as many parts.
ALIASES = "a: &a [x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


# A short text whose tree has nine times nine times … as many parts.
ALIASES = "a: &a [x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "the file is empty"),
        (b"# nothing\n", "the file is empty"),
        (b"- 1\n", "expected a mapping of sections, found list"),
        (b"hello", "expected a mapping of sections, found str"),
        (b"run: [1\nppo: }", "not valid YAML (line 2)"),
        (b"run:\n\tseed: 3", "not valid YAML (line 2)"),
        (b"run: {name: 2024-99-99}", "not valid YAML"),
        (b"run: {seed: !!timestamp x}", "not valid YAML"),
        (b"[" * 1200, "not valid YAML"),
        (b"\0\0", "not valid YAML"),
        (ALIASES.encode(), "not valid YAML; more than "),
        (b"!!python/object/apply:os.getcwd []", "not valid YAML (line 1)"),
        (b"ppo: {gamma: 1.0}\nppo: {lam: 1.0}\n", "not valid YAML (line 2); ppo is given twice"),
        (b"ppo:\n  lam: 0.9\n  lam: 1.0\n", "not valid YAML (line 3); lam is given twice"),
        (bytes(range(256)), "not a text file"),
    ],
)
def test_a_file_that_is_not_a_config(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert f"--config {path}: {part}" in command_line_error("--config", str(path))


def test_a_file_that_is_not_there_lists_the_recipes() -> None:
    message = command_line_error("--config", "movie_review")
    assert "neither a file nor a recipe" in message and "movie_reviews" in message


@pytest.mark.parametrize("name", ["x" * 5000, "\0", "."])
def test_a_name_that_cannot_be_a_file(name: str) -> None:
    assert command_line_error("--config", name).startswith("--config ")


def test_a_folder_is_not_a_config(tmp_path: Path) -> None:
    assert command_line_error("--config", str(tmp_path)) == f"--config {tmp_path}: cannot be read (Is a directory)"


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As root, which reads everything, the permission is played.
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("rlhf_accel.config.loading._read_text", refuse)
    assert command_line_error("--config", "run.yaml") == "--config run.yaml: cannot be read (Permission denied)"


def test_both_forms_of_an_override() -> None:
    assert parse_overrides(["--a.b=1", "--a.c", "-1", "--d=x=y", "--e", "[1, 'b']", "--f="]) == [
        ("a.b", 1),
        ("a.c", -1),
        ("d", "x=y"),
        ("e", [1, "b"]),
        ("f", None),
    ]


@pytest.mark.parametrize("value", ["[[", "*x", "%", "2024-99-99", "[" * 1200, "!!timestamp x", "{[1]: 2}", "\x00"])
def test_a_value_that_is_not_yaml_is_a_text(value: str) -> None:
    assert parse_overrides(["--rollout.stop", value]) == [("rollout.stop", value)]


def test_a_negative_number_is_a_value_and_out_of_range() -> None:
    assert command_line_error("--ppo.kl_coef", "-1").startswith("ppo.kl_coef=-1: input should be greater")
    assert command_line_error("--ppo.kl_coef", "-1e-3").startswith("ppo.kl_coef='-1e-3': input should be greater")


def test_a_text_that_yaml_reads_otherwise() -> None:
    assert "in quotes" in command_line_error("--rollout.stop", "#")
    assert "in quotes" in command_line_error("--run.name", "no")
    assert load(Config, overrides=["--rollout.stop", "'#'"]).rollout.stop == ("#",)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--run.seed"], "--run.seed needs a value"),
        (["--run.seed", "--run.name", "x"], "--run.seed needs a value"),
        (["stray"], "unexpected argument 'stray'"),
        (["--run.seed", "1", "2"], "unexpected argument '2'"),
        (["-x"], "unexpected argument '-x'"),
        (["--"], "unexpected argument '--'"),
        (["--config"], "--config needs a value"),
        (["--config="], "--config needs a value"),
        (["--config", "--run.seed=1"], "--config needs a value"),
        (["--config", "movie_reviews", "--config=imdb_sentiment"], "--config is given more than once"),
    ],
)
def test_a_command_line_that_cannot_be_read(arguments: list[str], part: str) -> None:
    assert part in command_line_error(*arguments)


@pytest.mark.parametrize("arguments", [["--config", "imdb_sentiment"], ["--config=imdb_sentiment"]])
def test_config_in_both_forms_and_anywhere(arguments: list[str]) -> None:
    config = from_command_line(Config, ["--run.seed", "7", *arguments, "--run.total_steps=2"], DEFAULT_RECIPE)
    assert config == load(Config, "imdb_sentiment", ["--run.seed=7", "--run.total_steps=2"])


def test_print_config_prints_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        from_command_line(Config, ["--print_config", "--run.seed=7"], DEFAULT_RECIPE)
    assert left.value.code == 0
    assert parse(Config, yaml.safe_load(capsys.readouterr().out)) == load(Config, DEFAULT_RECIPE, ["--run.seed=7"])


def test_print_config_checks_first() -> None:
    assert "ppo.gamma" in command_line_error("--print_config", "--ppo.gamma=2")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_key(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        from_command_line(Config, ["--nonsense", flag], DEFAULT_RECIPE)
    assert left.value.code == 0
    out = capsys.readouterr().out
    for key in key_names(Config):
        assert f"--{key} (" in out


@pytest.mark.parametrize("cls", [Config, RewardTrainingConfig])
def test_every_key_has_a_doc_line(cls: Any) -> None:
    missing = [
        f"{section.__name__}.{name}"
        for section in sections(cls)
        for name, field in section.__pydantic_fields__.items()
        if not field.description
    ]
    assert missing == []
    assert len(describe(cls).splitlines()) == len(key_names(cls))


def test_a_config_cannot_be_changed() -> None:
    for owner, name in ((Config(), "run"), (Config().run, "seed"), (BatchSizes.of(Config()), "rollout")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(owner, name, 1)


def test_python_callers_meet_the_same_checks() -> None:
    with pytest.raises(ValidationError):
        RunConfig(seed=-1)
    with pytest.raises(ValidationError):
        RunConfig(sead=1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        PPOConfig(kl_coef=float("nan"))
    with pytest.raises(ValueError, match="does not divide"):
        Config(ppo=PPOConfig(num_minibatches=3))
    with pytest.raises(ValidationError, match="positional"):
        ModelConfig("gpt2")  # type: ignore[misc]


def test_an_error_is_one_line() -> None:
    assert str(ConfigError("a\n  b\r\nc\u2028d")) == "a b c d"


GARBAGE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers() | st.none(), inner),
    max_leaves=4,
)
KEYS = st.sampled_from([name.rpartition(".")[2] for name in key_names(Config)])
NAMES = st.sampled_from([field.name for field in dataclasses.fields(Config)])


def refused_at_most(function: Any, *arguments: Any) -> None:
    try:
        function(*arguments)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


@settings(max_examples=60, deadline=None)
@given(tree=GARBAGE | st.dictionaries(NAMES | st.text(), GARBAGE | st.dictionaries(KEYS, GARBAGE)))
def test_no_tree_breaks_the_parser(tree: Any) -> None:
    refused_at_most(parse, Config, tree)


@settings(max_examples=100, deadline=None)
@given(
    arguments=st.lists(
        st.text()
        | st.text(alphabet=string.printable + "[]{}:!&*", max_size=12)
        | st.sampled_from([f"--{key}" for key in key_names(Config)] + ["--config", "--config="])
    )
)
def test_no_command_line_breaks_the_parser(arguments: list[str]) -> None:
    refused_at_most(load, Config, None, arguments)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text() | st.text(alphabet="ab:-[]{}!&*#|>%@'\"\n ,?<1.e") | st.binary().map(lambda b: b.decode("latin-1"))
)
def test_no_file_breaks_the_reader(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.yaml"
    path.write_text(text, encoding="utf-8")
    refused_at_most(load, Config, path)


def test_only_k1_is_allowed_in_the_reward_and_old_configs_are_read(tmp_path):
    for estimator in ("k2", "k3"):
        with pytest.raises(ConfigError, match="away from the reference") as refused:
            load(Config, None, ["--ppo.kl_estimator", estimator])
        assert (refused.value.key, refused.value.facts["found"]) == ("ppo.kl_estimator", estimator)
        load(Config, None, ["--ppo.kl_estimator", estimator, "--ppo.kl_coef", "0"])  # where it changes nothing
    path = tmp_path / "config.yaml"
    path.write_text("ppo: {kl_estimator: k3}\n", encoding="utf-8")
    written = load_run(path)
    assert written.ppo.kl_estimator == "k3"
    with pytest.raises(ConfigError, match=r"ppo\.kl_estimator=k3"):
        check_trainable(written)  # as PPOTrainer does, whoever made the config
    resumed = load(Config, None, ["--run.changes", "ppo.kl_estimator"])
    assert changed_keys(written, resumed) == []
    assert changed_keys(written, Config()) == ["ppo.kl_estimator (was 'k3', is 'k1')"]


# What code reads of an error

# Functions whose errors are about a folder, file or text that a command or a call was given, or a launch: there is no
# key to change.
KEYLESS = {
    *("run_folder.model_folder", "summary.read_summary", "summary.reward_scale", "dumps.read_dump"),
    *("loading.parse", "prompts.own_prompts", "accelerator.make_accelerator", "accelerator.check_precision_of_process"),
    *("deepspeed_config.deepspeed_plugin", "weights.set_weights", "building.build"),
    *("evaluate._config", "evaluate.of", "evaluate.reference_scores", "generate._load", "push.main"),
    *("generate._prompts", "generate._encoded", "push.check_base"),
    *(
        "loading.adapter_config",
        "merge.merge",
        "merge._check",
        "merge._settings",
        "json_lines._unreadable",
        "replay.main",
    ),
    *("exports.exported_weights", "page.write", "run_data.read_run"),
}


def errors_made(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Each error with a key that the file makes, with the name of the innermost function around it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]  # outer ones first
    owners = {id(node): function.name for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        name = getattr(node.func, "id", None) if isinstance(node, ast.Call) else None
        if name in ("ConfigError", "RewardError", "Finished"):
            yield owners[id(node)], node


def template(node: ast.expr) -> str:
    """The text of a string, with `{expression}` for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"{{{ast.unparse(node.value)}}}"
    return node.value if isinstance(node, ast.Constant) else f"{{{ast.unparse(node)}}}"


def test_each_error_of_the_package_has_a_key_and_names_it() -> None:
    keyless, made = set(), 0
    for path in sorted((ROOT / "rlhf_accel").rglob("*.py")):
        for function, call in errors_made(path):
            made += 1
            where, message = f"{path.stem}.{function}", template(call.args[0])
            keys = [keyword.value for keyword in call.keywords if keyword.arg == "key"]
            if not keys:
                keyless.add(where)
                continue
            (key,) = keys
            shown = template(
                key.args[0] if isinstance(key, ast.Call) else key
            )  # of key_in(what the message begins with)
            # A message that begins with what the caller gives, as hub's do, is the caller's to name the key in.
            assert shown in message or message.startswith("{"), f"{where}: {message}"
    assert made > 150
    assert keyless <= KEYLESS, keyless - KEYLESS


def test_an_error_keeps_its_key_and_facts_through_pydantic_and_pickle() -> None:
    with pytest.raises(ConfigError) as found:
        parse(Config, {"ppo": {"num_minibatches": 3}})
    sent = pickle.loads(pickle.dumps(found.value))  # as Runtime.from_main sends it
    for error in (found.value, sent):
        assert (error.key, error.facts) == ("ppo.num_minibatches", {"others": ("rollout.batch_size",)})
        assert str(error).startswith("ppo.num_minibatches=3 does not divide")


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"ppo": {"kl_coef": -1}}, "ppo.kl_coef"),
        ({"optim": {"betas": [0.9, 2]}}, "optim.betas"),
        ({"ppo": {"kl_coeff": 1}}, "ppo.kl_coeff"),
        ({"lr": 1}, "lr"),
        ({"ppo": 3}, "ppo"),
    ],
)
def test_the_key_of_an_error_is_in_the_tree(tree: dict, key: str) -> None:
    with pytest.raises(ConfigError) as found:
        parse(Config, tree)
    assert found.value.key == key
