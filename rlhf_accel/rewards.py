"""Rewards that can be verified: the response is compared with the row's column `answer`, or with a pattern or a length.

A config names the first four as `rlhf_accel.rewards:NAME`. The others are made with a setting of the user's own, in a
module that the config names. Each is called as `(prompts, responses, **columns)`, with lists of one entry per sample,
and returns one number per response. Knows texts; knows no model, no config and no run.
"""

from __future__ import annotations

import functools
import json
import os
import re
import string
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

Scores = list[float]

_NUMBER = re.compile(
    r"""
    (?: (?<![\w)]) [-+−] )?      # the minus of a difference is no sign
    \$?
    (?: (?<!\w) (?<!\d\.) (?: \d{1,3} (?: ,\d{3} )+ (?!\d) | \d+ ) (?: \.\d+ )?
      | (?<![\w.]) \.\d+ )
    (?: / 0*[1-9]\d* )?
    """,
    re.VERBOSE | re.ASCII,
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(prompts: Sequence[str], responses: Sequence[str], answer: Sequence[Any], **columns: Any) -> Scores:
    """1 if the response is the text of `answer`, apart from white space around both; else 0.

    >>> exact_match([""] * 3, [" 72\\n", "72.0", "It is 72"], answer=[72, 72, 72])
    [1.0, 0.0, 0.0]
    """
    return [float(r.strip() == str(a).strip()) for r, a in zip(responses, answer, strict=True)]


def normalized_match(prompts: Sequence[str], responses: Sequence[str], answer: Sequence[Any], **columns: Any) -> Scores:
    """1 if the response is the text of `answer`, apart from case, ASCII punctuation and white space; else 0.

    Punctuation is removed, so `-5` equals `5` and `3.5` equals `35`: for numbers, use `last_number`. Articles stay,
    unlike in the exact match of SQuAD (Rajpurkar et al. 2016, section 6.1).

    >>> normalized_match([""] * 3, [" New  york.", "new-york", "the New York"], answer=["New York"] * 3)
    [1.0, 0.0, 0.0]
    """
    return [float(_normalized(r) == _normalized(str(a))) for r, a in zip(responses, answer, strict=True)]


def last_number(prompts: Sequence[str], responses: Sequence[str], answer: Sequence[Any], **columns: Any) -> Scores:
    """1 if the last number of the response equals `answer` exactly; 0 if it does not, or if there is no number.

    A number is written in ASCII digits, with

    - an optional sign directly before it (+, - or −), unless an ASCII letter, a digit or `)` precedes the sign: `5-3`
      holds 5 and 3;
    - an optional `$`, and commas between groups of three digits: `-$1,234` is -1234, and `1,23` holds 1 and 23;
    - optional decimals: `72.00` and `72` are equal, as are `.5` and `0.5`, and `72.` is 72 at the end of a sentence;
    - an optional denominator other than 0 directly after it: `1/2` equals `0.5`. `0.33` does not equal `1/3`.

    Exponents, mixed numbers and percent are not read: `1e3` holds 1, `1 1/2` ends in 1/2, and `50%` in 50. Digits
    directly after an ASCII letter or `_` are not a number, nor are more than 4300 digits. `answer` is a number, or a
    text whose last number counts, such as a solution of GSM8K, which ends in `#### 72`. Raises `ValueError` for an
    answer without a number.

    >>> last_number([""] * 4, ["6 x 12 = 72.", "$72.00", "It is 72, not 71", "many"], answer=["#### 72", 72, 72, 72])
    [1.0, 1.0, 0.0, 0.0]
    >>> last_number([""] * 3, ["about 1,234.50", "1/2", "5-3"], answer=[1234.5, "0.5", -3])
    [1.0, 1.0, 0.0]
    """
    return [float(_last_number(r) == _expected(a)) for r, a in zip(responses, answer, strict=True)]


def math_answer(prompts: Sequence[str], responses: Sequence[str], answer: Sequence[Any], **columns: Any) -> Scores:
    r"""1 if the expression that the response gives as its answer equals `answer` mathematically; else 0.

    The package math-verify reads both (LaTeX in `\boxed{}`, `$…$` and the like, or else plain numbers) and compares
    them with sympy. `answer` is a number or an expression: in LaTeX, bare or in `\boxed{}` or `$…$`.

    Each expression may take 5 seconds to read and 5 to compare, and scores 0 if it takes longer, as `9^{9^{9^9}}` does.
    Signals end it, which only a main thread receives. Called in another thread, as with reward.timeout and by a reward
    server, the function starts a process for each call, which takes about 2 seconds more.

    Raises `ModuleNotFoundError` if math-verify is not installed, and `ValueError` for an answer without an expression;
    from another thread, `RuntimeError` with the same message.

    >>> math_answer(["", ""], [r"So $x = \frac{2}{4}$.", r"\boxed{x^2}"], answer=["1/2", "2x"])  # doctest: +SKIP
    [1.0, 0.0]
    """
    pairs = [(response, str(expected)) for response, expected in zip(responses, answer, strict=True)]
    in_main = threading.current_thread() is threading.main_thread()
    return _equal(pairs) if in_main else _equal_in_a_process(pairs)


def matches(pattern: str) -> Callable[..., Scores]:
    r"""A reward that is 1 if the regular expression is found in the response, else 0.

    `.` also matches a newline. `\A` and `\Z` stand for the beginning and the end of the response. Raises `re.error` for
    a pattern that is not one.

    >>> thought_first = matches(r"\A<think>.*</think>\s*\d+\s*\Z")
    >>> thought_first(["", ""], ["<think>6 x 7</think> 42", "42"])
    [1.0, 0.0]
    """
    compiled = re.compile(pattern, re.DOTALL)

    def matched(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> Scores:
        return [float(compiled.search(response) is not None) for response in responses]

    return matched


def length_penalty(characters: int) -> Callable[..., Scores]:
    """A reward that falls linearly from 0 for an empty response to -1 for one of so many characters, or more.

    Raises `ValueError` if `characters` is not above 0.

    >>> length_penalty(10)([""] * 3, ["", "short", "a long response"])
    [0.0, -0.5, -1.0]
    """
    if characters <= 0:
        raise ValueError(f"characters={characters}; give a number above 0")

    def shortness(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> Scores:
        return [0.0 - min(1.0, len(response) / characters) for response in responses]

    return shortness


def answer_in(column: str, reward: Callable[..., Scores]) -> Callable[..., Scores]:
    """The same reward, which reads the column of this name as its `answer`. Raises `KeyError` if the data lacks it.

    >>> answer_in("solution", last_number)(["", ""], ["72", "3"], solution=["6 x 12 = 72", "2"])
    [1.0, 0.0]
    """

    def renamed(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> Scores:
        return reward(prompts, responses, **{**columns, "answer": columns[column]})

    return renamed


def _normalized(text: str) -> str:
    return " ".join(text.casefold().translate(_PUNCTUATION).split())


def _last_number(text: str) -> Fraction | None:
    found = _NUMBER.findall(text)
    return _value(found[-1]) if found else None


def _value(number: str) -> Fraction | None:
    """None for a number of more digits than Python converts, 4300."""
    plain = number.replace(",", "").replace("$", "").replace("−", "-")
    numerator, _, denominator = plain.partition("/")
    try:
        return Fraction(numerator) / Fraction(denominator or 1)
    except ValueError:
        return None


def _expected(answer: Any) -> Fraction:
    value = _last_number(answer) if isinstance(answer, str) else Fraction(str(answer))
    if value is None:
        raise ValueError(f"answer {answer!r:.40} holds no number")
    return value


def _equal(pairs: Sequence[Sequence[str]]) -> Scores:
    """`math_answer` for pairs of response and answer, in the main thread."""
    library = _math_verify()
    scores = []
    for response, expected in pairs:
        is_marked = "\\boxed" in expected or "$" in expected
        gold = library.parse(expected if is_marked else f"\\boxed{{{expected}}}")
        if not gold:
            raise ValueError(f"answer {expected!r:.40} holds no expression that math-verify can read")
        scores.append(float(library.verify(gold, library.parse(response))))
    return scores


def _equal_in_a_process(pairs: Sequence[Sequence[str]]) -> Scores:
    # Not without limits in this thread: a power of large integers keeps the interpreter's lock, and all threads wait.
    code = "import json, sys; from rlhf_accel.rewards import _equal; print(json.dumps(_equal(json.load(sys.stdin))))"
    path = os.pathsep.join(place or os.getcwd() for place in sys.path)
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=json.dumps(pairs), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError((done.stderr.splitlines() or [f"the process ended with status {done.returncode}"])[-1])
    scores: Scores = json.loads(done.stdout.splitlines()[-1])
    return scores


@functools.cache
def _math_verify() -> Any:
    try:
        import math_verify
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; pip install 'rlhf_accel[math]'") from error
    return math_verify
