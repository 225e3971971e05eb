"""Types of the keys in a config: numbers within a range, and lists of which a single item may be given alone."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field


def _not_a_truth_value(value: Any) -> Any:
    # In Python, True is 1; in a config, `lr: true` is a mistake.
    if isinstance(value, bool):
        raise ValueError("input should be a number, not true or false")
    return value


def _tuple_of_one(value: Any) -> Any:
    return (value,) if isinstance(value, (str, int, float)) else value


Number = Annotated[float, BeforeValidator(_not_a_truth_value)]
Count = Annotated[int, BeforeValidator(_not_a_truth_value)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
BelowOne = Annotated[Number, Field(ge=0, lt=1)]
PositiveInt = Annotated[Count, Field(gt=0)]
NonNegativeInt = Annotated[Count, Field(ge=0)]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Strings = Annotated[tuple[str, ...], BeforeValidator(_tuple_of_one)]
Floats = Annotated[tuple[Number, ...], BeforeValidator(_tuple_of_one)]
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True, use_attribute_docstrings=True)
