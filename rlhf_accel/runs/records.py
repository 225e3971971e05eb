"""The form of the JSON files in a run's folder, for commands that read a folder from another machine.

Files are read within size limits and their types are checked. Knows names and types; knows no meaning of a number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from rlhf_accel.system.files import Malformed, read_json

T = TypeVar("T")

_MORE = ConfigDict(extra="allow", regex_engine="python-re")
Figure = int | float | None  # null if it was not finite
Count = Annotated[int, Field(ge=0)]
Figures = dict[str, Figure]
Row = dict[str, str | int | float | None]


class Scale(TypedDict):
    mean: Annotated[float, Field(allow_inf_nan=False)]
    std: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Summary(TypedDict, total=False):
    """summary.json."""

    __pydantic_config__ = _MORE  # type: ignore[misc]
    steps: Count
    seconds: Figure
    calibration: Scale
    base: Figures
    trained: Figures
    gain: Figure
    samples: list[Row]
    sampling: dict[str, float]
    best: dict[str, Figure]


class Evaluations(TypedDict, total=False):
    """evaluation.json."""

    __pydantic_config__ = _MORE  # type: ignore[misc]
    models: dict[str, Figures]
    sampling: dict[str, float]
    prompts: Count
    samples: Count


class Dumped(TypedDict):
    """dump.json."""

    __pydantic_config__ = _MORE  # type: ignore[misc]
    phase: str
    message: str
    rows: list[Count]
    prompts: list[str]
    responses: list[str]
    columns: NotRequired[dict[str, list[Any]]]
    traceback: NotRequired[str]


class Adapter(TypedDict):
    """The part of adapter_config.json that this package reads; peft checks the rest."""

    __pydantic_config__ = _MORE  # type: ignore[misc]
    base_model_name_or_path: str | None


class Listed(TypedDict):
    """A file in a checkpoint's manifest."""

    bytes: Count
    sha256: str


def read(path: Path, kind: type[T]) -> T:
    """The file as a record of this type. Raises `Malformed` if its form is wrong, `OSError` if it cannot be read."""
    record: T = check(read_json(path), kind)
    return record


def check(tree: Any, kind: Any) -> Any:
    """The tree as a record or a dataclass. Raises `Malformed` naming the first wrong entry."""
    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])[:80]
        raise Malformed(f"{place}: {first['msg']}" if place else first["msg"]) from None
