"""Rewards that can be verified: by hand, and on the examples of TRL 1.16.0 and verl 0.9.1, whose values they gave."""

import importlib.util
import sys
import threading
from fractions import Fraction

import pytest

from rlhf_accel import rewards
from rlhf_accel.reward import Reward, RewardError, import_function
from rlhf_accel.rewards import (
    answer_in,
    exact_match,
    last_number,
    length_penalty,
    matches,
    math_answer,
    normalized_match,
)

needs_math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="extra math")


def score(function, response, answer):
    (found,) = function(["a prompt"], [response], answer=[answer], another_column=[None])
    return found


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 x 12 = 72.", 72),
        ("...72", 72),
        ("answer:.5", Fraction(1, 2)),
        ("...5", 5),
        ("1.50", Fraction(3, 2)),
        ("1.2.3", Fraction(6, 5)),
        ("-$1,234.50", Fraction(-2469, 2)),
        ("$-5", -5),
        ("\N{MINUS SIGN}4", -4),
        ("+4", 4),
        ("5-3", 3),
        ("(3)-2", 2),
        ("3 - 5", 5),
        ("x=-3", -3),
        ("1,23", 23),
        ("1,2345", 2345),
        ("12,345,678", 12345678),
        ("1/3", Fraction(1, 3)),
        ("-1/3", Fraction(-1, 3)),
        ("1,000/4", 250),
        ("10/0", 0),
        ("1e3", 1),
        ("1e999999999", 1),
        ("50%", 50),
        ("72km", 72),
        ("x5", None),
        ("答案是72", 72),
        ("\\boxed{72}", 72),
        ("#### 1,000", 1000),
        ("none", None),
        ("", None),
        ("-", None),
        ("9" * 5000, None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert rewards._last_number(text) == number


@pytest.mark.parametrize("answer", [72, 72.0, "72", "6 x 12 = 72\n#### 72", Fraction(72)])
def test_an_answer_is_a_number_or_a_text_that_ends_in_one(answer):
    assert score(last_number, "It is 72.", answer) == 1.0
    assert score(last_number, "It is 72 or 73.", answer) == score(last_number, "many", answer) == 0.0


def test_small_floats_are_read_as_python_writes_them():
    assert score(last_number, "0.0000001", 1e-7) == 1.0
    assert score(last_number, "0.1", 0.1) == 1.0


@pytest.mark.parametrize("answer", ["many", "", None, float("nan")])
def test_an_answer_without_a_number_is_an_error(answer):
    with pytest.raises(ValueError, match=r"holds no number|Invalid literal"):
        score(last_number, "72", answer)


def test_last_number_reads_what_the_gsm8k_scorer_of_verl_reads():
    """Those that it scores 1, strict or flexible, for a response whose answer is at its end."""
    for response in ("6 x 12 = 72", "#### 72", "$72", "72%"):
        assert score(last_number, response, "72") == 1.0
    assert score(last_number, "#### 1,234", "1234") == score(last_number, "x = -4", "-4") == 1.0
    for response in ("no", "71 or 72 or 73"):
        assert score(last_number, response, "72") == 0.0


def test_exact_and_normalized_matches():
    assert score(exact_match, " Paris\n", "Paris") == score(exact_match, "72", 72) == 1.0
    assert score(exact_match, "paris", "Paris") == score(exact_match, "Paris.", "Paris") == 0.0
    assert score(normalized_match, "  The new-York\tTimes! ", "the newyork times") == 1.0
    assert score(normalized_match, "the new York times", "new York times") == 0.0
    assert score(normalized_match, "STRASSE", "straße") == 1.0


def test_a_pattern_as_the_format_reward_of_trl_has_it():
    thinks = matches(r"\A<think>(?!.*<think>).*?</think>")
    cases = {
        "<think>\nThis is my reasoning.\n</think>\nThis is my answer.": 1.0,
        "<think>\nThis is my reasoning.\nThis is my answer.": 0.0,
        "<think>a<think>b</think>": 0.0,
        "x<think>a</think>": 0.0,
        "<think></think>": 1.0,
    }
    assert thinks([""] * len(cases), list(cases)) == list(cases.values())


def test_lengths():
    assert length_penalty(4)([""] * 4, ["", "a", "four", "more than four"]) == [0.0, -0.25, -1.0, -1.0]
    with pytest.raises(ValueError, match="characters=0"):
        length_penalty(0)


def test_the_answer_of_another_column():
    function = answer_in("solution", exact_match)
    assert function(["", ""], ["a", "b"], solution=["a", "c"], answer=["x", "b"]) == [1.0, 0.0]


@pytest.mark.parametrize("name", ["exact_match", "normalized_match", "last_number", "math_answer"])
def test_a_config_names_them_and_a_missing_column_is_named(name):
    function = import_function(f"rlhf_accel.rewards:{name}")
    with pytest.raises(RewardError, match=f"{name}.. missing 1 required positional argument: 'answer'"):
        Reward(terms=((name, 1.0, function),))(["a"], ["b"], {})


# ---- math-verify ----

# response, answer, score
EXPRESSIONS = [
    (r"My answer is \boxed{\frac{1}{3}}", r"\frac{1}{3}", 1.0),
    (r"My answer is \boxed{\frac{1}{2}}", r"\frac{1}{3}", 0.0),
    (r"\boxed{\frac{63}{400}}", r"\boxed{\frac{63}{400}}", 1.0),
    (r"\boxed{0.5}", r"\frac12", 1.0),
    (r"$x=\frac{2}{4}$", "1/2", 1.0),
    ("The answer is 72", 72, 1.0),
    (r"\boxed{x^2+2x+1}", r"(x+1)^2", 1.0),
    (r"\boxed{(1,2)}", "(1,2)", 1.0),
    (r"\boxed{\{2,1\}}", r"\{1,2\}", 1.0),
    (r"\boxed{10\text{ cm}}", "10", 1.0),
    ("nothing", "3", 0.0),
    (r"\boxed{50\%}", "$0.5$", 1.0),
]


@needs_math_verify
def test_expressions_score_as_with_verl():
    responses, answers, expected = zip(*EXPRESSIONS, strict=True)
    assert math_answer([""] * len(responses), list(responses), answer=list(answers)) == list(expected)


@needs_math_verify
def test_expressions_score_alike_in_a_thread_whose_time_is_limited():
    responses, answers, expected = zip(*EXPRESSIONS, strict=True)
    reward = Reward(terms=(("f", 1.0, math_answer),), timeout=120.0)
    assert reward([""] * len(responses), responses, {"answer": answers}).tolist() == list(expected)


@needs_math_verify
@pytest.mark.parametrize("timeout", [None, 120.0])
def test_an_answer_without_an_expression_is_an_error(timeout):
    with pytest.raises(RewardError, match="answer '' holds no expression"):
        Reward(terms=(("f", 1.0, math_answer),), timeout=timeout)([""], ["3"], {"answer": [""]})


def test_the_extra_is_named_where_math_verify_is_not_installed(monkeypatch):
    rewards._math_verify.cache_clear()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rlhf_accel\[math\]'"):
        score(math_answer, "1", 1)


def test_another_thread_leaves_expressions_to_a_process(monkeypatch):
    """In this process, a power of large integers would keep the interpreter's lock for hours."""
    asked, answers = [], []
    monkeypatch.setattr(rewards, "_equal", lambda pairs: asked.append("here") or [0.0])
    monkeypatch.setattr(rewards, "_equal_in_a_process", lambda pairs: asked.append("elsewhere") or [1.0])
    thread = threading.Thread(target=lambda: answers.append(score(math_answer, "9^{9^{9^9}}", "1")))
    thread.start()
    thread.join()
    assert (asked, answers) == (["elsewhere"], [1.0])
    assert score(math_answer, "1", "1") == 0.0 and asked == ["elsewhere", "here"]
