"""The worked examples of all docstrings."""

import doctest
import importlib
import pkgutil

import pytest

import rlhf_accel

MODULES = [module.name for module in pkgutil.walk_packages(rlhf_accel.__path__, "rlhf_accel.")]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(examples) > 10
