"""A run's folder from elsewhere is data: code that its config names runs only with the user's own flag."""

import json
import shutil

import pytest

from rlhf_accel import __main__ as command_line
from rlhf_accel.config import trust
from rlhf_accel.config.loading import load, parse
from rlhf_accel.config.schema import Config
from rlhf_accel.training.ppo_trainer import PPOTrainer

CALLED: list[str] = []


def leaves_a_mark(prompts, responses, **columns):
    CALLED.append("reward")
    return [float(len(response)) for response in responses]


def as_gold(prompts, responses, **columns):
    CALLED.append("gold")
    return [0.0] * len(responses)


def fails(prompts, responses, **columns):
    CALLED.append("fails")
    raise KeyError("as it was written")


@pytest.fixture
def foreign(tiny, tmp_path):
    """A run's folder whose config names functions of its own."""
    reward = {"function": "tests.test_trust:leaves_a_mark", "gold": "tests.test_trust:as_gold"}
    trainer = PPOTrainer(tiny(run={"total_steps": 1, "eval_samples": 4}, lora={"r": 2}, reward=reward))
    trainer.fit()
    CALLED.clear()
    return trainer.folder


def told(capfd, *arguments) -> str:
    """The one line of a command that is refused."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command_line.main([str(argument) for argument in arguments])
    lines = capfd.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_commands_call_no_function_that_only_the_config_names(foreign, tmp_path, capfd) -> None:
    line = told(capfd, "evaluate", foreign)
    assert "would run reward.function=tests.test_trust:leaves_a_mark; reward.gold=tests.test_trust:as_gold;" in line
    assert line.endswith("nothing is run; add --trust_code if you trust it")
    # A gold reward that the command line names is the user's own.
    line = told(capfd, "evaluate", foreign, "--reward.gold", "tests.conftest:share_of_o")
    assert "leaves_a_mark" in line and "gold" not in line
    assert "leaves_a_mark" in told(capfd, "generate", foreign, "A film", "--score")
    assert not CALLED
    # Without scores generate needs none of them, nor does merge.
    command_line.main(["generate", str(foreign), "A film", "--max_new_tokens", "2"])
    command_line.main(["merge", str(foreign), str(tmp_path / "merged")])
    assert not CALLED
    command_line.main(["generate", str(foreign), "A film", "--score", "--max_new_tokens", "2", "--trust_code"])
    assert CALLED == ["reward"]
    command_line.main(["evaluate", str(foreign), "--which", "base", "--trust_code"])
    assert set(CALLED) == {"reward", "gold"}


def test_code_of_the_models_of_a_foreign_run_needs_the_flag(foreign, tmp_path, capfd) -> None:
    path = foreign / "config.yaml"
    path.write_text(path.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    for command in (("generate", foreign, "A"), ("merge", foreign, tmp_path / "merged"), ("evaluate", foreign)):
        assert "model.trust_remote_code=true (code that comes with " in told(capfd, *command)
    assert not CALLED and not (tmp_path / "merged").exists()


def test_a_replay_calls_no_function_that_only_the_config_names(foreign, capfd) -> None:
    dump = foreign / "dumps" / "step-000001"
    dump.mkdir(parents=True)
    shutil.copy(foreign / "config.yaml", dump)
    facts = {"phase": "score", "message": "stopped", "rows": [0], "prompts": ["a"], "responses": ["b"]}
    (dump / "dump.json").write_text(json.dumps(facts))
    assert "leaves_a_mark" in told(capfd, "replay", dump)
    assert not CALLED
    command_line.main(["replay", str(dump), "--trust_code"])
    assert CALLED == ["reward"]


@pytest.mark.parametrize(
    ("reward", "found"),
    [
        ({"function": "rlhf_accel.reward:vader", "gold": "rlhf_accel.reward:vader2"}, []),
        ({"function": ["rlhf_accelerator:f", "rlhf_accel:f", "a:b"]}, ["rlhf_accelerator:f", "rlhf_accel:f", "a:b"]),
        ({"url": "http://example.org/"}, ["http://example.org/ (which receives the texts, and"]),
        ({"model": "someone/classifier"}, []),
    ],
)
def test_what_a_config_would_run(reward, found) -> None:
    listed = trust.foreign_code(parse(Config, {"reward": reward}))
    assert len(listed) == len(found)
    assert all(end in line for line, end in zip(listed, found, strict=True))


def test_recipes_need_no_flag() -> None:
    for recipe in ("movie_reviews", "imdb_sentiment"):
        assert trust.foreign_code(load(Config, recipe)) == []
