"""From YAML and dotted overrides to a config and back; the command line of a config.

Knows the files of the recipes. Knows no tensor, no model and no rank.
"""

from __future__ import annotations

import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from rlhf_accel.config.keys import key_names, short, type_hints, unknown
from rlhf_accel.config.options import take_option
from rlhf_accel.config.recipes import RECIPES, recipe_names
from rlhf_accel.config.rules import check_trainable
from rlhf_accel.config.schema import Config
from rlhf_accel.system import files
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.terminal import say, visible

_MOST_YAML, _MOST_YAML_PARTS = 256 << 10, 50_000  # bytes, which take PyYAML seconds; and parts with aliases expanded
C = TypeVar("C")


def load(cls: type[C], source: str | Path | None = None, overrides: Sequence[str] = ()) -> C:
    """A config of type `cls` from a recipe's name or a YAML file, with `--section.key value` overrides on top.

    Raises `ConfigError` naming the key for an unknown key, a wrong type, a value out of range, a contradiction or what
    `check_trainable` refuses.
    """
    return parse(cls, read_tree(cls, source, overrides))


def load_run(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config.yaml of a run, to read or to compare with. Settings that only an older version allowed are accepted.
    Raises `ConfigError` as `load` does for everything else."""
    return parse(Config, read_tree(Config, path, overrides), to_train=False)


def read_tree(cls: Any, source: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in the source, with the overrides on top. Raises `ConfigError` for an unknown key of an override."""
    tree = read_yaml(source) if source is not None else {}
    for key, value in parse_overrides(overrides):
        _set(tree, key, value, cls)
    return tree


def from_command_line(cls: type[C], arguments: Sequence[str], default: str) -> C:
    """A config from `[--config RECIPE_OR_FILE] [--section.key value …]`.

    `--print_config` prints the resolved config and `--help` the keys, and both exit with status 0. Raises `ConfigError`
    as `load` does.
    """
    rest = list(arguments)
    if "-h" in rest or "--help" in rest:
        say(f"options: --config RECIPE_OR_FILE (default {default}), --print_config, and any of\n\n{describe(cls)}")
        sys.exit(0)
    print_config = "--print_config" in rest
    rest = [argument for argument in rest if argument != "--print_config"]
    source = take_option(rest, "config", "RECIPE_OR_FILE") or default
    config = load(cls, source, rest)
    if print_config:
        say(to_yaml(config), end="")
        sys.exit(0)
    return config


def describe(cls: Any, prefix: str = "") -> str:
    """Every key of a config class with its default and its doc line."""
    hints = type_hints(cls)
    lines = []
    for field in fields(cls):
        if is_dataclass(hints[field.name]):
            lines.append(describe(hints[field.name], f"{prefix}{field.name}."))
        else:
            info = cls.__pydantic_fields__[field.name]
            doc = f"  {' '.join(info.description.split())}" if info.description else ""
            lines.append(f"--{prefix}{field.name} ({short(info.default)}){doc}")
    return "\n".join(lines)


def parse(cls: type[C], tree: Mapping[str, Any], *, to_train: bool = True) -> C:
    """The mapping as a checked config. Raises `ConfigError` for the first error. Without `to_train`, `check_trainable`
    is skipped."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"expected a mapping of sections, found {short(tree)}")
    _refuse_unknown_keys(cls, tree, "", key_names(cls))
    try:
        config = TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        contradiction = first.get("ctx", {}).get("error")
        if isinstance(contradiction, ConfigError):
            raise contradiction from None
        key = ".".join(str(part) for part in first["loc"] if isinstance(part, str) and "[" not in part)
        raise ConfigError(f"{key}={short(first['input'])}: {_message(first)}", key=key) from None
    if to_train and isinstance(config, Config):
        check_trainable(config)
    return config


def to_yaml(config: Any) -> str:
    """The config as YAML, which `load` reads back."""
    tree = _plain(asdict(config))
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    # PyYAML writes U+0085 as it is and reads it back as a space, and a console shows other control characters as their
    # codes. In ASCII both are escaped, so that they are read back unchanged.
    return text if visible(text) == text else yaml.safe_dump(tree, sort_keys=False)


def read_yaml(source: str | Path) -> dict[str, Any]:
    """The mapping in a recipe (by name) or a YAML file (by path); raises `ConfigError` if there is none."""
    path = RECIPES / f"{source}.yaml" if str(source) in recipe_names() else Path(source)
    try:
        text = _read_text(path)
    except FileNotFoundError:
        raise ConfigError(
            f"--config {source}: neither a file nor a recipe; recipes are {', '.join(recipe_names())}", key="--config"
        ) from None
    except OSError as error:
        raise ConfigError(f"--config {source}: cannot be read ({error.strerror})", key="--config") from None
    except ValueError as error:  # not UTF-8, or a name that no file can have
        raise ConfigError(f"--config {source}: not a text file ({error})", key="--config") from None
    try:
        tree = parse_yaml(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise ConfigError(
            f"--config {source}: not valid YAML{line}; {getattr(error, 'problem', error)}", key="--config"
        ) from None
    if tree is None:
        raise ConfigError(f"--config {source}: the file is empty", key="--config")
    if not isinstance(tree, dict):
        raise ConfigError(
            f"--config {source}: expected a mapping of sections, found {type(tree).__name__}", key="--config"
        )
    return tree


def _read_text(path: Path) -> str:
    """The text of a file, or of a pipe that the shell made; an endless device is read up to a limit."""
    if stat.S_ISFIFO(path.stat().st_mode) and not str(path).startswith(("/dev/", "/proc/")):
        raise files.Malformed("a named pipe, which may have no writer")
    with path.open("rb") as file:
        content = file.read(_MOST_YAML + 1)
    return files.whole(content, _MOST_YAML).decode("utf-8")


def parse_yaml(text: str) -> Any:
    """The tree in a YAML text. Raises `yaml.YAMLError` for any error, including endless aliases."""
    try:
        return files.bounded(_safe_load(text), _MOST_YAML_PARTS)
    except files.Malformed as error:
        raise yaml.YAMLError(str(error)) from error


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """`--a.b 1`, `--a.b=1` -> [("a.b", 1), …]; values are read as YAML. Raises `ConfigError` on anything else.

    >>> parse_overrides(["--optim.lr", "3e-4", "--rollout.stop=['.', '!']"])
    [('optim.lr', '3e-4'), ('rollout.stop', ['.', '!'])]
    """
    pairs = []
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or len(flag) < 3:
            raise ConfigError(f"unexpected argument {flag!r}; overrides look like --section.key value", key=flag)
        key, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value: --{key} VALUE", key=f"--{key}")
            value = rest.pop(0)
        try:
            pairs.append((key, parse_yaml(value)))
        except yaml.YAMLError:
            pairs.append((key, value))
    return pairs


def _refuse_unknown_keys(cls: Any, tree: Mapping[Any, Any], prefix: str, known: Sequence[str]) -> None:
    """`known` are all dotted keys of the config, since a key may be in the wrong section."""
    hints = type_hints(cls)
    names = [field.name for field in fields(cls)]
    for key, value in tree.items():
        if key not in names:
            raise ConfigError(unknown(f"{prefix}{key}", known), key=f"{prefix}{key}")
        if is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{prefix}{key}: expected a mapping of keys, found {short(value)}", key=f"{prefix}{key}"
                )
            _refuse_unknown_keys(hints[key], value, f"{prefix}{key}.", known)


def _set(tree: dict[str, Any], dotted: str, value: Any, cls: Any) -> None:
    known = key_names(cls)
    if dotted not in known:
        raise ConfigError(unknown(dotted, known), key=dotted)
    *sections, key = dotted.split(".")
    for section in sections:
        below = tree.setdefault(section, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{section}: expected a mapping of keys, found {short(below)}", key=section)
        tree = below
    tree[key] = value


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error; PyYAML would silently keep the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _safe_load(text: str) -> Any:
    """Raises `yaml.YAMLError` for any error, even if PyYAML raises another exception."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        # A date or a number that Python rejects, a tag that does not match its value, endless brackets.
        raise yaml.YAMLError(str(error)) from error


def _message(error: Mapping[str, Any]) -> str:
    """The message of pydantic, in the words of a YAML file."""
    if error["type"] == "missing":
        return "too few items"
    message: str = error["msg"].removeprefix("Value error, ").replace(" after validation", "")
    message = (message[0].lower() + message[1:]).replace("tuple", "list")
    if error["type"] in ("string_type", "tuple_type") and not isinstance(error["input"], (Mapping, list)):
        return f"{message}; put a text that YAML would read as another type in quotes"
    return message


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
