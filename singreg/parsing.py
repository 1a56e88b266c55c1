"""From YAML files and the command line to a configuration dataclass, with all errors in one message."""

import codecs
import dataclasses
import difflib
import io
import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser

Config = TypeVar("Config")
ASCII = {"⁻": "_neg", "°": " deg", "λ": "lambda", "κ": "kappa", "τ": "tau", "–": "-", "±": "+-", "×": "x", "…": "..."}


def parse(kind: type[Config], arguments: Sequence[str] | None = None, *, description: str = "") -> Config:
    """Read a `kind` from `--config FILE` and overrides such as `--training.epochs 3`, in the order given.

    Unknown keys, wrong types and bad values are all shown together; the process then exits with status 2.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="singreg")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(kind, description)
    if {"-h", "--help"} & set(arguments):
        parser.parse_args(["--help"])
    shown = "--print_config" in arguments
    arguments = [word for word in arguments if word != "--print_config"]
    problems: list[str] = []
    config = _changed(parser, kind(), _given(kind, arguments, problems), problems)
    if problems:
        listed = "".join(f"  - {problem}\n" for problem in problems)
        said = f"the configuration has {len(problems)} problem(s):\n{listed}--help explains every key\n"
        parser.exit(2, said if os.environ.get("LOCAL_RANK", "0") == "0" else "")  # once, whatever is launched
    if shown:
        print(dump(config), end="")
        parser.exit()
    return config


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """What stands for letters that a terminal does not have, and for bytes of a file's name that are not UTF-8."""
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    return "".join(ASCII.get(x) or x.encode("ascii", "backslashreplace").decode() for x in letters), error.end


codecs.register_error("singreg", _in_ascii)


def overridden(config: Config, values: Mapping[str, Any]) -> Config:
    """Copy a configuration with other values at dotted keys, such as {"loss.weight": 0.1}."""
    problems: list[str] = []
    changed = _changed(_parser(type(config)), config, values.items(), problems)
    if problems:
        raise ValueError("\n".join(problems))
    return changed


def dump(config: Any) -> str:
    """Write a configuration (a dataclass) as YAML: parsed again it gives the same run."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def build(kind: type[Config], values: Any, problems: list[str], prefix: str = "") -> Config:
    """Make a dataclass of nested values; what a section refuses goes to `problems`, its defaults stand in."""
    hints, inner = typing.get_type_hints(kind), {}
    if not isinstance(values, Mapping):
        problems.append(f"{prefix.rstrip('.')}: expected a section of keys and values, got {_shown(values)}")
        return kind()
    for name, value in values.items():
        hint, path = hints[name], f"{prefix}{name}"
        items = typing.get_args(hint) if typing.get_origin(hint) is list else ()
        if dataclasses.is_dataclass(hint):
            value = build(typing.cast(type, hint), value, problems, f"{path}.")
        elif items and dataclasses.is_dataclass(items[0]):
            each = typing.cast(type, items[0])
            value = [build(each, item, problems, f"{path}[{place}].") for place, item in enumerate(value)]
        elif value is None and type(None) not in typing.get_args(hint):
            problems.append(f"{path}: expected a value, got nothing")
            continue
        inner[name] = _at_home(value)
    try:
        return kind(**inner)
    except ValueError as error:
        problems += [f"{prefix}{line}" for line in str(error).splitlines()]
    return kind()


def _at_home(value: Any) -> Any:
    """A value, or list of them, with the home directory for `~` where a path begins with it."""
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    path = re.match("(local-dir:)?(~[^/]*/.*)", value) if isinstance(value, str) else None
    return f"{path[1] or ''}{os.path.expanduser(path[2])}" if path else value


def _sections(value: Any) -> Any:
    """A list of sections of which some, or all separated by commas, are only named: runs/mine,runs/other."""
    value = yaml.load(value, _Once) if isinstance(value, str) else value
    value = value.split(",") if isinstance(value, str) else value
    return [{"name": each} if isinstance(each, str) else each for each in value] if isinstance(value, list) else value


def _shown(value: Any) -> str:
    """A value in at most 60 letters; Python itself refuses to write whole numbers of thousands of digits."""
    try:
        return repr(str(value)[:60])
    except ValueError:
        return f"a {type(value).__name__} too long to be shown"


def _parser(kind: type, description: str = "") -> ArgumentParser:
    usage = "%(prog)s --config FILE [--KEY VALUE ...]"
    parser = ArgumentParser(description=description, usage=usage, exit_on_error=False)
    parser.add_class_arguments(kind, fail_untyped=True)
    parser.add_argument("--config", action="config", help="YAML file; later flags and files win")
    return parser


def _changed(parser: ArgumentParser, config: Config, given: Iterable[tuple[str, Any]], problems: list[str]) -> Config:
    """The configuration with other values at dotted keys; unknown keys and wrong types go to `problems`."""
    known, values = dict(_fields(type(config))), dataclasses.asdict(config)  # type: ignore[call-overload]
    for key, value in given:
        parent, _, name = key.rpartition(".")
        entry = typing.get_origin(known.get(parent)) is dict  # as in --loss.terms.leak 2
        if key not in known and not entry:
            near = difflib.get_close_matches(key, known, n=1)
            problems.append(f"{key}: no such key" + (f"; did you mean {near[0]}?" if near else ""))
            continue
        wanted = known[parent if entry else key]
        try:
            nested = _sections(value) if any(map(dataclasses.is_dataclass, typing.get_args(wanted))) else value
            for part in reversed(key.split(".")):
                nested = {part: nested}
            found = parser.parse_object(nested, defaults=False).as_dict()
        except Exception as error:  # jsonargparse raises nearly anything of values that it did not expect
            kind = getattr(wanted, "__name__", str(wanted)).replace("typing.", "")
            quotes = "str" in str(wanted) and not isinstance(value, str)
            reason = "put quotes around numbers, dates, yes and no" if quotes else " ".join(str(error).split())[-90:]
            if typing.get_origin(wanted) is typing.Literal:
                kind, reason = "one of these", ", ".join(typing.get_args(wanted))
            problems.append(f"{key}: expected {kind}, got {_shown(value)} ({reason})")
            continue
        target = values
        for part in parent.split(".") if parent else ():
            target, found = target[part], found[part]
        target[name] = found[name]
    return build(type(config), values, problems)


def _given(kind: type, arguments: Sequence[str], problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of files and flags, in order."""
    words = iter(arguments)
    for word in words:
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            problems.append(f"{word}: expected --KEY VALUE or --config FILE")
            continue
        value = text if equals else next(words, "")
        if key != "config":
            yield key, value
            continue
        try:
            content = yaml.load(Path(os.path.expanduser(value)).read_text(encoding="utf-8-sig"), _Once)
        except Exception as error:  # and so do YAML's constructors
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            problems.append(f"--config: cannot read {value}: {reason[:120]}")
            continue
        if isinstance(content, dict):
            yield from _leaves(content, dict(_fields(kind)))
        else:
            problems.append(f"--config: {value}: expected a mapping of keys to values, got {type(content).__name__}")


class _Once(yaml.SafeLoader):
    """YAML itself keeps the last of two equal keys without a word: a section pasted twice would lose its first half."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [str(key.value) for key, _ in node.value]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"line {node.start_mark.line + 1}: listed twice: {', '.join(twice)}")
        return super().construct_mapping(node, deep)


def _leaves(values: Mapping[Any, Any], known: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if dataclasses.is_dataclass(known.get(f"{prefix}{key}")) and (value is None or isinstance(value, dict)):
            yield from _leaves(value or {}, known, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _fields(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        yield f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _fields(hints[field.name], f"{prefix}{field.name}.")
