"""The arithmetic problems: right, each in one split, and read as any data set."""

import re

import pytest

from rlhf_accel.config.schema import DataConfig
from rlhf_accel.data.problems import SPLITS, arithmetic_problems
from rlhf_accel.data.prompts import split_rows
from rlhf_accel.rewards import last_number
from rlhf_accel.system.errors import ConfigError

OPERATIONS = {"sum": lambda a, b: a + b, "product": lambda a, b: a * b, "larger": max}


def numbers(text: str) -> tuple[int, int]:
    a, b = re.findall(r"\d+", text)
    return int(a), int(b)


def test_every_answer_is_right_and_every_problem_is_in_one_split():
    train, held = (arithmetic_problems(split) for split in SPLITS)
    texts = [problem.text for problem in (*train, *held)]
    assert len(set(texts)) == len(texts) == 20 * 20 + 11 * 11 + 20 * 19
    for problem in (*train, *held):
        assert problem.answer == OPERATIONS[problem.kind](*numbers(problem.text))
    places = [{(problem.kind, *sorted(numbers(problem.text))) for problem in part} for part in (train, held)]
    assert not places[0] & places[1], "the same problem in the other order"


def test_every_kind_is_held_out_and_the_rule_is_fixed():
    held = arithmetic_problems("heldout")
    assert {kind: sum(problem.kind == kind for problem in held) for kind in OPERATIONS} == {
        "sum": 76,
        "product": 21,
        "larger": 98,
    }


def test_a_config_names_them():
    train, held = split_rows(DataConfig(source="embedded:arithmetic", eval_split="heldout"))
    assert (len(train), len(held)) == (706, 195)
    row = held[0]
    assert last_number([row["text"]], ["It is 6."], answer=[row["answer"]]) == [1.0]
    with pytest.raises(ConfigError, match=r"data\.split=test .*embedded:arithmetic; choose one of train, heldout"):
        split_rows(DataConfig(source="embedded:arithmetic", split="test"))
