"""From YAML files and the command line to a configuration dataclass, through jsonargparse; all errors in one message."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings
from yaml.constructor import ConstructorError

from singreg.old_seals import DamagedFileError, read_sealed_text

Config = TypeVar("Config")
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What YAML's constructors and jsonargparse raise of values they did not expect, such as an empty !!int."""
LARGEST = 100_000
SHOWN = 160
NOTHING = ("none", "None")
"""What people write for YAML's null; where null is allowed it is meant, and a folder of that name is ./none."""


class ConfigurationError(ValueError):
    """All that is wrong with a configuration, in one message."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        listed = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"the configuration has {len(self.problems)} problem(s):\n{listed}")


def find_config(path: str) -> Path:
    """A YAML by its path, or by its name among those shipped with the package.

    Raises:
        FileNotFoundError: neither exists; the shipped names are listed.
    """
    if Path(path).is_file():
        return Path(path)
    shipped = Path(__file__).parents[1] / "configs"
    folder = shipped if shipped.is_dir() else Path(__file__).parents[2] / "configs"
    candidate = folder / f"{Path(path).stem}.yaml"
    if candidate.is_file():
        return candidate
    known = ", ".join(sorted(p.name for p in folder.glob("*.yaml")))
    raise FileNotFoundError(f"no configuration at {path}; shipped with the package are: {known}")


def parse_config(
    kind: type[Config],
    check: Callable[[Config], Sequence[str]],
    arguments: Sequence[str] | None = None,
    *,
    description: str = "",
) -> Config:
    """A `kind` from `--config FILE` and overrides such as `--training.epochs 3`, in the order given.

    `check` returns what is wrong with the values. Unknown keys, wrong types and bad values are shown together, before any
    work starts; the process then exits with status 2.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(kind, description)
    parser.add_argument("--config", action="config", help="YAML file, or the name of one shipped with the package")
    try:
        given = list(_given(arguments, kind))
    except (OSError, yaml.YAMLError, ConfigurationError, DamagedFileError) as error:
        _refuse(parser, str(error))
    problems = _problems(parser, given, kind)
    config: Config | None = None
    try:
        config = _parsed(parser, arguments, given, kind, problems)
    except (ArgumentError, *MALFORMED) as error:
        problems.append(" ".join(_what(error).split()))
    if config is not None:
        problems += check(config)
    if config is None or problems:
        _refuse(parser, str(ConfigurationError(problems)))
    return config


def _parser(kind: type, description: str = "") -> ArgumentParser:
    """One option for every field, explained by the dataclass's Args or by the text that stands under the field."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_class_arguments(kind, fail_untyped=True)
    return parser


def _parsed(
    parser: ArgumentParser, arguments: list[str], given: Sequence[tuple[str, Any]], kind: type[Config], problems: list[str]
) -> Config:
    if problems:
        return _with_the_good_ones(parser, given, kind, problems)
    namespace: Namespace = parser.parse_args(arguments)
    namespace.pop("config", None)
    return typing.cast(Config, build(kind, {**namespace.as_dict(), **_last_lists(given, kind)}, problems))


def _last_lists(given: Sequence[tuple[str, Any]], kind: type) -> dict[str, Any]:
    """The last value of every top-level list of dataclasses: jsonargparse would mix its items with those of an earlier one."""
    hints = typing.get_type_hints(kind)
    return {key: value for key, value in given if _item_kind(hints.get(key)) is not None}


def _item_kind(hint: Any) -> type | None:
    """The dataclass that a list holds, or None for any other type."""
    items = typing.get_args(hint) if typing.get_origin(hint) is list else ()
    return typing.cast(type, items[0]) if items and dataclasses.is_dataclass(items[0]) else None


def _refuse(parser: ArgumentParser, message: str) -> typing.NoReturn:
    # What a terminal would obey, or turn round, is shown as its number.
    message = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in message)
    parser.exit(2, f"{message}\nrun with --help for every key and what it means\n")
    raise SystemExit(2)


def _given(arguments: list[str], kind: type) -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) in the YAML files and flags, in order; file names in `arguments` become full paths."""
    known = dict(_fields(kind))
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if not name.startswith("--"):
            continue
        following = arguments[position + 1] if position + 1 < len(arguments) else ""
        if name != "--config":
            key = name[2:]
            if key in ("help", "print_config") or key.startswith("print_") or _asks_for_help(key, known):
                continue
            if (value if equals else following) in NOTHING and _may_be_null(known.get(key)):
                arguments[position + (0 if equals else 1)] = f"{name}=null" if equals else "null"
                value, following = "null", "null"
            yield from _flag(key, value if equals else following, known.get(key))
            continue
        if not (value or following):
            raise ConfigurationError(["--config: expected a YAML file, or the name of one shipped with the package"])
        path = find_config(value if equals else following)
        arguments[position + (0 if equals else 1)] = f"--config={path}" if equals else str(path)
        read_sealed_text(path)  # refuses a run's configuration that was damaged
        with open(path, encoding="utf-8") as file:  # not its text alone, so that YAML's complaints name the file
            try:
                content = yaml.load(file, _StrictLoader)
            except ConfigurationError:
                raise
            except MALFORMED as error:
                raise ConfigurationError([f"{path}: {_what(error)}"]) from error
        if not isinstance(content, dict):
            got = "an empty file" if content is None else type(content).__name__
            raise ConfigurationError([f"{path}: expected a mapping of keys to values, got {got}"])
        yield from _leaves(content, kind)


def _asks_for_help(key: str, known: Mapping[str, Any]) -> bool:
    """jsonargparse's own `--models.help`, which explains the items of a list of dataclasses."""
    return key.endswith(".help") and _item_kind(known.get(key.removesuffix(".help"))) is not None


def _may_be_null(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _flag(key: str, text: str, hint: Any) -> Iterator[tuple[str, Any]]:
    """What a flag's text stands for: itself where text is wanted (`--name 2024`), else what YAML makes of it."""
    if hint is str:
        yield key, text
        return
    try:
        value = yaml.load(text, _StrictLoader)
    except ConfigurationError:
        raise
    except (yaml.YAMLError, *MALFORMED) as error:
        reason = _what(error).partition("\n")[0]
        raise ConfigurationError(
            [f"{key[:SHOWN]}: {_shown(text)} is not valid YAML ({reason}); lists look like '[\"a\", \"b\"]'"]
        ) from error
    choice = typing.get_origin(hint) is typing.Literal and text in typing.get_args(hint)  # "no" is one, and YAML's false
    if choice or (str in typing.get_args(hint) and not isinstance(value, (list, type(None)))):
        value = text
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        yield from _leaves(value, typing.cast(type, hint), f"{key}.")
    else:
        yield key, value


def _what(error: BaseException) -> str:
    """What is wrong, in words; YAML's own constructors fail with all sorts of errors, some without any."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    spoken = isinstance(error, (yaml.YAMLError, ArgumentError, ValueError)) and str(error)
    return str(error) if spoken else f"{type(error).__name__}: {error}"


def _shown(value: Any) -> str:
    """A value in a message, in at most a few words; neither control characters nor a book."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python will write
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """How many nodes a node stands for when every alias is written out; infinitely many for one within itself."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = math.inf
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    known[id(node)] = 1 + sum(_size(child, known) for child in children)
    return known[id(node)]


class _StrictLoader(yaml.SafeLoader):
    """YAML's own loader keeps the last of two equal keys without a word; a section pasted twice would lose its first half.

    Nor does it mind a few lines of aliases that stand for more values than memory holds, or numbers that nothing can count.
    """

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value: int = super().construct_yaml_int(node)  # type: ignore[no-untyped-call]
        if value.bit_length() > 63:
            text = self.construct_scalar(node)
            raise ConstructorError(None, None, f"a number of {len(text)} digits is not meant", node.start_mark)
        return value

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _size(node, {}) > LARGEST:
            raise ConfigurationError([f"{self.name}: its aliases stand for more than {LARGEST} values"])
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := sorted({key for key in keys if isinstance(key, str) and keys.count(key) > 1}):
            mark = node.start_mark
            raise ConfigurationError([f"{mark.name}, line {mark.line + 1}: listed twice: {', '.join(twice)}"])
        return super().construct_mapping(node, deep)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def _leaves(values: dict[Any, Any], kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested mappings, down to where the dataclass has a plain field."""
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        inner = hints.get(key) if isinstance(key, str) else None
        if dataclasses.is_dataclass(inner) and isinstance(value, dict):
            yield from _leaves(value, typing.cast(type, inner), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _problems(parser: ArgumentParser, given: Sequence[tuple[str, Any]], kind: type) -> list[str]:
    """Unknown keys, with the nearest known one, and values of the wrong type."""
    return [problem for key, value in given if (problem := _problem(parser, key, value, kind)) is not None]


def _problem(parser: ArgumentParser, key: str, value: Any, kind: type) -> str | None:
    known = dict(_fields(kind))
    parent, _, item = key.rpartition(".")
    if key not in known and typing.get_origin(known.get(parent)) is dict:  # one entry of a mapping, as in --loss.terms.leak 2
        key, value = parent, {item: value}
    if key not in known:
        near = difflib.get_close_matches(key[:SHOWN], known, n=1)
        siblings = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
        return f"{key[:SHOWN]}: no such key" + (f"; did you mean {near[0]}?" if near else f"; known are {', '.join(siblings or known)}")
    if dataclasses.is_dataclass(known[key]):
        return f"{key}: expected a mapping of keys to values, got {type(value).__name__}"
    wanted = str(known[key]).replace("typing.", "").removeprefix("<class '").removesuffix("'>").replace(" | None", " | null")
    if value is None and not _may_be_null(known[key]):  # jsonargparse takes a null for any type
        return f"{key}: expected {wanted}, got nothing"
    try:
        parser.parse_object(_nested(key, copy.deepcopy(value)), defaults=False)  # it writes into what it is given
    except (ArgumentError, *MALFORMED) as error:
        reason = (_what(error).strip().splitlines() or [""])[-1].strip()
        bare = isinstance(value, bool) and {"yes", "no", "on", "off"} & set(typing.get_args(known[key]))
        hint = 'YAML reads a bare yes or no as true or false; write it in quotes: "no"' if bare else reason[:SHOWN]
        if value in NOTHING and _may_be_null(known[key]):
            hint = 'write null for "not set"'
        return f"{key}: expected {wanted}, got {_shown(value)} ({hint})"
    return None


def _fields(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in typing.get_type_hints(kind).items():
        if name in {field.name for field in dataclasses.fields(kind)}:
            yield f"{prefix}{name}", inner
            if dataclasses.is_dataclass(inner):
                yield from _fields(typing.cast(type, inner), f"{prefix}{name}.")


def _nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return typing.cast(dict[str, Any], value)


def _with_the_good_ones(
    parser: ArgumentParser, given: Sequence[tuple[str, Any]], kind: type[Config], problems: list[str]
) -> Config:
    """The configuration without its bad keys, so that the values of the others can be judged in the same message."""
    base: Namespace = parser.get_defaults()
    good = [(key, value) for key, value in given if _problem(parser, key, value, kind) is None]
    for key, value in good:
        base.update(parser.parse_object(_nested(key, copy.deepcopy(value)), defaults=False))
    base.pop("config", None)
    return typing.cast(Config, build(kind, {**base.as_dict(), **_last_lists(good, kind)}, problems))


def overridden(config: Config, values: Mapping[str, Any], problems: list[str]) -> Config:
    """A copy of a configuration with other values at dotted keys, such as {"loss.weight": 0.1} (no shapes).

    Unknown keys and wrong types go to `problems`; the good ones are set all the same.
    """
    kind = type(config)
    parser = _parser(kind)
    known, nested = dict(_fields(kind)), dataclasses.asdict(config)  # type: ignore[call-overload]
    for key, value in values.items():
        problem = _problem(parser, str(key), value, kind)
        if problem is not None:
            problems.append(problem)
            continue
        *parents, last = key.split(".")
        # One entry of a mapping, as in loss.terms.leak: 2, is judged as a mapping of that one entry.
        whole, given = (key, copy.deepcopy(value)) if key in known else (".".join(parents), {last: value})
        parsed = parser.parse_object(_nested(whole, given), defaults=False)[whole]
        inner = nested
        for parent in parents:
            inner = inner[parent]
        inner[last] = parsed if key in known else parsed[last]
    return typing.cast(Config, build(kind, nested, problems))


def build(kind: type, values: dict[str, Any], problems: list[str] | None = None) -> Any:
    """A dataclass from nested plain values (no shapes); the inverse of `dataclasses.asdict`.

    What an inner dataclass refuses goes to `problems` when a list is given (its defaults stand in), else it is raised.
    """
    hints = typing.get_type_hints(kind)
    inner = {key: _built(hints[key], value, problems) for key, value in values.items()}
    try:
        return kind(**inner)
    except ValueError as error:
        if problems is None:
            raise
        problems.append(str(error))
        return kind()


def _built(hint: Any, value: Any, problems: list[str] | None) -> Any:
    """One field's value: a dataclass from a mapping, a list of them from a list of mappings, anything else as it is."""
    if isinstance(value, str) and value in NOTHING and _may_be_null(hint):
        return None
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return build(typing.cast(type, hint), value, problems)
    item_kind = _item_kind(hint)
    if item_kind is not None and isinstance(value, list):
        return [_built(item_kind, item, problems) for item in value]
    return value


def dump_config(config: Any) -> str:
    """The resolved configuration (a dataclass or a mapping) as YAML: running it again gives the same run (no shapes)."""
    text: str = yaml.safe_dump(config if isinstance(config, dict) else dataclasses.asdict(config), sort_keys=False)
    return text
