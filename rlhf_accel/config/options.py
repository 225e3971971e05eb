"""Options of a command line that are not keys of a config. Imports no library."""

from __future__ import annotations

from rlhf_accel.system.errors import ConfigError


def take_option(arguments: list[str], name: str, value: str) -> str | None:
    """Take `--name VALUE` or `--name=VALUE` out of the arguments; None if it is not there.

    Raises `ConfigError` if it has no value, which the message calls `value`, or if it is given twice.
    """
    places = [i for i, argument in enumerate(arguments) if argument.partition("=")[0] == f"--{name}"]
    if len(places) > 1:
        raise ConfigError(f"--{name} is given more than once; keep one of them", key=f"--{name}")
    if not places:
        return None
    i = places[0]
    _, equals, given = arguments[i].partition("=")
    if not equals:
        given = "".join(arguments[i + 1 : i + 2])
    if not given or (not equals and given.startswith("--")):
        raise ConfigError(f"--{name} needs a value: --{name} {value}", key=f"--{name}")
    del arguments[i : i + (1 if equals else 2)]
    return given
