"""From YAML files and the command line to a configuration dataclass, with all errors in one message."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

Config = TypeVar("Config")
WRONG = (ArgumentError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, OSError, yaml.YAMLError)
"""What jsonargparse and YAML's own constructors raise of values that they did not expect."""


def parse(kind: type[Config], arguments: Sequence[str] | None = None, *, description: str = "") -> Config:
    """Read a `kind` from `--config FILE` and overrides such as `--training.epochs 3`, in the order given.

    jsonargparse does the reading. Where it refuses, every key is looked at on its own, so that unknown keys, wrong
    types and bad values are all shown together; the process then exits with status 2 before any work starts.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(kind, description)
    problems: list[str] = []
    try:
        _refuse_twice([Path(path) for path in _files(arguments)])
        namespace = parser.parse_args(arguments)
        namespace.pop("config", None)
        config = build(kind, namespace, problems)
    except (*WRONG, RecursionError) as error:
        problems = _each_on_its_own(parser, kind, arguments) or [" ".join(str(error).split())]
    if problems:
        listed = "".join(f"  - {problem}\n" for problem in problems)
        parser.exit(2, f"the configuration has {len(problems)} problem(s):\n{listed}--help explains every key\n")
    return config


def overridden(config: Config, values: Mapping[str, Any]) -> Config:
    """Copy a configuration with other values at dotted keys, such as {"loss.weight": 0.1}.

    Raises:
        ValueError: names every unknown key and every bad value.
    """
    kind = type(config)
    parser = _parser(kind)
    problems = [found for key, value in values.items() for found in _problem(parser, kind, key, value)]
    namespace = parser.parse_object(dataclasses.asdict(config))  # type: ignore[call-overload]
    namespace.pop("config", None)
    if not problems:
        for key, value in values.items():
            namespace.update(parser.parse_object(_nested(key, value), defaults=False))
    changed = build(kind, namespace, problems)
    if problems:
        raise ValueError("\n".join(problems))
    return changed


def dump(config: Any) -> str:
    """Write a configuration (a dataclass) as YAML: parsed again it gives the same run."""
    text: str = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    return text


def build(kind: type[Config], values: Any, problems: list[str], prefix: str = "") -> Config:
    """Make a dataclass of nested values; what a section refuses goes to `problems`, its defaults stand in."""
    hints = typing.get_type_hints(kind)
    given = dict(values) if isinstance(values, Mapping) else vars(values)  # a default is the dataclass itself
    inner = {}
    for name, value in given.items():
        hint, path = hints[name], f"{prefix}{name}"
        item = _item(hint)
        if dataclasses.is_dataclass(hint):
            value = build(typing.cast(type, hint), value or {}, problems, f"{path}.")
        elif item is not None and value is not None:
            value = [build(item, each, problems, f"{path}[{place}].") for place, each in enumerate(value)]
        elif value is None and type(None) not in typing.get_args(hint):
            problems.append(f"{path}: expected a value, got nothing")
            continue
        inner[name] = value.as_dict() if isinstance(value, Namespace) else value
    try:
        return kind(**inner)
    except ValueError as error:
        problems += [f"{prefix}{line}" for line in str(error).splitlines()]
    return kind()


def _parser(kind: type, description: str = "") -> ArgumentParser:
    parser = ArgumentParser(
        description=description, usage="%(prog)s --config FILE [--KEY VALUE ...]", exit_on_error=False
    )
    parser.add_class_arguments(kind, fail_untyped=True)
    parser.add_argument("--config", action="config", help="YAML file; later flags and files win")
    return parser


def _item(hint: Any) -> type | None:
    """The dataclass that a list holds, or None for any other type."""
    items = typing.get_args(hint) if typing.get_origin(hint) is list else ()
    return typing.cast(type, items[0]) if items and dataclasses.is_dataclass(items[0]) else None


def _files(arguments: Sequence[str]) -> Iterator[str]:
    for place, argument in enumerate(arguments):
        if argument == "--config" and place + 1 < len(arguments):
            yield arguments[place + 1]
        elif argument.startswith("--config="):
            yield argument.partition("=")[2]


def _refuse_twice(files: Sequence[Path]) -> None:
    """YAML keeps the last of two equal keys without a word; a section pasted twice would lose its first half."""
    for path in files:
        waiting = [yaml.compose(path.read_text(encoding="utf-8-sig"))]
        seen: set[int] = set()  # an alias may stand within itself
        while waiting:
            node = waiting.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if isinstance(node, yaml.MappingNode):
                names = [key.value for key, _ in node.value]
                waiting += [value for _, value in node.value]
                if twice := sorted({str(name) for name in names if names.count(name) > 1}):
                    raise ValueError(f"{path}, line {node.start_mark.line + 1}: listed twice: {', '.join(twice)}")
            elif isinstance(node, yaml.SequenceNode):
                waiting += node.value


def _each_on_its_own(parser: ArgumentParser, kind: type, arguments: Sequence[str]) -> list[str]:
    """Look at every key that was given, alone, and at the sections that the good ones make."""
    problems: list[str] = []
    good: list[dict[str, Any]] = []
    for key, value in _given(kind, arguments, problems):
        found = _problem(parser, kind, key, value)
        problems += found
        good += [] if found else [_nested(key, value)]
    namespace = parser.get_defaults()
    namespace.pop("config", None)
    for each in good:
        namespace.update(parser.parse_object(each, defaults=False))
    build(kind, namespace, problems)
    return problems


def _given(kind: type, arguments: Sequence[str], problems: list[str]) -> Iterator[tuple[str, Any]]:
    for file in _files(arguments):
        try:
            _refuse_twice([Path(file)])
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8-sig"))
        except OSError as error:
            problems.append(f"--config: cannot read {file} ({error.strerror})")
            continue
        except (*WRONG, RecursionError) as error:
            problems.append(f"--config: {file}: {' '.join(str(error).split())}")
            continue
        if isinstance(content, dict):
            yield from _leaves(content, kind)
        else:
            problems.append(f"--config: {file}: expected a mapping of keys to values, got {type(content).__name__}")
    skip = False
    for place, argument in enumerate(arguments):
        if skip or not argument.startswith("--") or argument.partition("=")[0] == "--config":
            skip = argument == "--config"
            continue
        key, equals, text = argument[2:].partition("=")
        following = arguments[place + 1] if place + 1 < len(arguments) else ""
        yield key, text if equals else following


def _leaves(values: Mapping[Any, Any], kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        inner = hints.get(key) if isinstance(key, str) else None
        if dataclasses.is_dataclass(inner) and isinstance(value, dict):
            yield from _leaves(value, typing.cast(type, inner), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _problem(parser: ArgumentParser, kind: type, key: str, value: Any) -> list[str]:
    """What is wrong with one key or its type, in at most one sentence."""
    known = dict(_fields(kind))
    entry = typing.get_origin(known.get(key.rpartition(".")[0])) is dict  # as in --loss.terms.leak 2
    if key not in known and not entry:
        near = difflib.get_close_matches(key, known, n=1)
        return [f"{key[:160]}: no such key" + (f"; did you mean {near[0]}?" if near else "")]
    if dataclasses.is_dataclass(known.get(key)):
        return [f"{key}: expected a mapping of keys to values, got {_shown(value)}"]
    try:
        parser.parse_object(_nested(key, value), defaults=False)
    except (*WRONG, RecursionError) as error:
        wanted = known.get(key, known.get(key.rpartition(".")[0]))
        name = getattr(wanted, "__name__", str(wanted)).replace("typing.", "")
        reason = " ".join(str(error).split())
        return [f"{key}: expected {name}, got {_shown(value)} ({reason[-200:]})"]
    return []


def _shown(value: Any) -> str:
    try:
        return repr(str(value)[:160])
    except (ValueError, RecursionError):  # an integer of more digits than Python will write
        return f"a {type(value).__name__} too large to show"


def _fields(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in typing.get_type_hints(kind).items():
        if name in {each.name for each in dataclasses.fields(kind)}:
            yield f"{prefix}{name}", hint
            if dataclasses.is_dataclass(hint):
                yield from _fields(typing.cast(type, hint), f"{prefix}{name}.")


def _nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return typing.cast(dict[str, Any], value)
