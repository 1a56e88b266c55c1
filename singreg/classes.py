"""Which classes: named sets, lists and class names, matched to the folders of a data set and to the rows of a head."""

import difflib
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
NAMED_SETS = {path.stem: path for path in sorted((Path(__file__).parent / "data" / "named_sets").glob("*.txt"))}
# The four ImageNet-1k names that two classes share; the second words are those CLIP's authors use.
_SHARED_NAMES = {"n02012849": "crane bird", "n03126707": "construction crane"}
_SHARED_NAMES |= {"n02113186": "Cardigan Welsh corgi", "n03710721": "tank suit"}


class NoRows(ValueError):
    """A head of which no row is known to be a class of the data."""


@dataclass(frozen=True)
class ClassSubset:
    """The chosen classes in label order: as the data set has them, in words, their rows in ImageNet-1k or None.

    `order` are all classes of the data in the order in which a training on them numbers the rows of its head.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    indices: tuple[int, ...] | None
    order: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def _imagenet() -> tuple[dict[str, str], dict[str, set[str]]]:
    """The name of every wnid, in label order, and the wnids that go by a (normalised) word."""
    from timm.data.imagenet_info import ImageNetInfo  # here, since importing timm takes seconds

    info: Any = ImageNetInfo()
    names: dict[str, str] = {}
    aliases: dict[str, set[str]] = {}
    for wnid in info.label_names():
        description = info.label_name_to_description(wnid)
        lemmas = [lemma.strip() for lemma in description.split(",")]
        names[wnid] = _SHARED_NAMES.get(wnid, lemmas[0])
        for word in (wnid, description, *lemmas, names[wnid]):
            aliases.setdefault(_normal(word), set()).add(wnid)
    for wnid, name in names.items():
        aliases[_normal(name)] = {wnid}  # the name itself always means this class, whatever other synonyms say
    aliases["crane"] = {"n02012849", "n03126707"}
    return names, aliases


def _normal(word: str) -> str:
    return " ".join(unicodedata.normalize("NFC", word).replace("_", " ").replace("-", " ").lower().split())


def imagenet_names() -> tuple[str, ...]:
    """Return the 1000 names used for ImageNet-1k's classes, in label order."""
    return tuple(_imagenet()[0].values())


def read_list(path: str | Path) -> tuple[str, ...]:
    """Return the lines of a text file without blank ones and those that begin with `#`."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")  # Notepad begins its files with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    return tuple(line for each in text.splitlines() if (line := each.strip()) and line[0] != "#")


def expand_classes(classes: Sequence[str] | str) -> tuple[str, ...]:
    """Return the entries of a list file (one a line), a named set, one class, or a sequence."""
    if not isinstance(classes, str):
        return tuple(classes)
    if Path(classes).expanduser().is_file():
        return read_list(classes)
    if "/" in classes or classes.endswith(".txt"):
        raise FileNotFoundError(f"there is no list of classes {classes}")
    return read_list(NAMED_SETS[classes]) if classes in NAMED_SETS else (classes,)


def resolve_classes(classes: Sequence[str] | str | None, available: Sequence[str] | None = None) -> ClassSubset:
    """Match a specification to the classes that are `available` (None: the 1000 of ImageNet-1k, by wnid).

    Wnids, class names and synonyms match in any case, with `_` or `-` for a blank. The order given is the label order.
    """
    keys = tuple(_imagenet()[0] if available is None else available)
    if classes is None:
        return subset_of(keys if available is None else tuple(sorted(keys)))
    entries = expand_classes(classes)
    if not entries:
        raise ValueError(f"classes: {classes!r} lists no class; name at least one, or leave it out to take all")
    owners = _owners(keys)
    found = {entry: owners.get(entry) or owners.get(_normal(entry), set()) for entry in entries}
    missing = [entry for entry, match in found.items() if not match]
    if missing:
        close = {entry: difflib.get_close_matches(_normal(entry), owners, n=3) for entry in missing[:6]}
        hints = ", ".join(f"{entry!r} (near: {', '.join(near) or 'none'})" for entry, near in close.items())
        sets = f"; named sets are {', '.join(NAMED_SETS)}" if entries == (classes,) else ""
        raise ValueError(f"{len(missing)} of the classes are not among the {len(keys)} there: {hints}{sets}")
    vague = [f"{entry!r} ({', '.join(sorted(match))})" for entry, match in found.items() if len(match) > 1]
    if vague:
        raise ValueError(f"class names that fit several classes, use one in brackets: {', '.join(vague)}")
    chosen = [next(iter(found[entry])) for entry in entries]
    twice = sorted({entry for entry, key in zip(entries, chosen, strict=True) if chosen.count(key) > 1})
    if twice:
        raise ValueError(f"classes listed twice (also by synonyms): {', '.join(twice)}")
    return subset_of(tuple(chosen))


def _wnid_of(key: str) -> str | None:
    """The ImageNet-1k wnid a folder or label name stands for, or None where it is none or not clear."""
    owners = _imagenet()[1].get(_normal(key), set())
    return next(iter(owners)) if len(owners) == 1 else None


def _owners(keys: Sequence[str]) -> dict[str, set[str]]:
    """Every word a class goes by, to the available keys it may mean."""
    by_wnid = {wnid: key for key in keys if (wnid := _wnid_of(key)) is not None}
    owners: dict[str, set[str]] = {}
    for word, wnids in _imagenet()[1].items():
        if present := {by_wnid[wnid] for wnid in wnids if wnid in by_wnid}:
            owners[word] = present
    own: dict[str, set[str]] = {}
    for key in keys:
        own.setdefault(_normal(key), set()).add(key)
    return owners | own | {key: {key} for key in keys}


def subset_of(keys: tuple[str, ...]) -> ClassSubset:
    """Return classes with their names in words and their rows in ImageNet-1k, in the order given."""
    imagenet, wnids = _imagenet()[0], [_wnid_of(key) for key in keys]
    rows = {wnid: row for row, wnid in enumerate(imagenet)}
    known = tuple(rows[wnid] for wnid in wnids if wnid is not None)
    names = tuple(imagenet.get(key, key.replace("_", " ")) for key in keys)
    return ClassSubset(keys, names, known if len(set(known)) == len(keys) else None, keys)


def renamed(classes: ClassSubset, path: str) -> ClassSubset:
    """Give classes the names of a file: one a line for all classes of the data in `order`, or `folder: name` lines."""
    lines, owners = read_list(path), _owners(classes.order)
    marks = [
        ":" if ":" in line else next((m for m in "\t," if line.partition(m)[0] in classes.order), ":") for line in lines
    ]
    pairs = [[part.strip() for part in line.partition(mark)[::2]] for line, mark in zip(lines, marks, strict=True)]
    found = [owners.get(before) or owners.get(_normal(before), set()) if after else set() for before, after in pairs]
    again = [before for (before, _), keys in zip(pairs, found, strict=True) if keys and found.count(keys) > 1]
    if again:
        raise ValueError(f"data.class_names: {path} names {again[0]!r} twice; leave one line out")
    if lines and all(found):
        words = {key: after for keys, (_, after) in zip(found, pairs, strict=True) for key in keys}
    elif len(lines) == len(classes.order) and not any(found):
        words = dict(zip(classes.order, lines, strict=True))
    else:
        wrong = next((line for line, keys in zip(lines, found, strict=True) if not keys), "none")[:40]
        wanted = f"a name for each of {len(classes.order)} classes ({', '.join(classes.order[:2])}, ...)"
        wanted += f" or `folder: name` lines, got {len(lines)} like {wrong!r}"
        raise ValueError(f"data.class_names: expected {wanted}")
    names = tuple(words.get(key, name) for key, name in zip(classes.keys, classes.names, strict=True))
    spelled = [_normal(name) for name in names]
    if twice := {name for name, word in zip(names, spelled, strict=True) if spelled.count(word) > 1}:
        raise ValueError(f"data.class_names: {path} calls several classes {', '.join(sorted(twice)[:6])}")
    return replace(classes, names=names, indices=classes.indices or subset_of(names).indices)


def head_rows(classes: ClassSubset, labels: Mapping[int, str], count: int) -> list[int]:
    """Return which of the `count` rows of a head is which class, in label order; `labels` are stored names by row.

    Stored names count, in any spelling, wnids and synonyms too. Without them, a head of 1000 rows has ImageNet's, and
    one with a row for each class is taken to be numbered as a training on the data numbers it.
    """
    say = "list the names of its rows in model.label_names: FILE"
    if not labels:
        if count == len(imagenet_names()) and classes.indices is not None:
            return list(classes.indices)
        numbered = [classes.order, tuple(key for key in classes.order if key in classes.keys)]
        order = next((keys for keys in numbered if len(keys) == count), None)
        if order is None:
            had = f"has {count} rows without names, the data {len(classes.order)} classes"
            raise NoRows(f"the head {had}; {say}, or set model.head: new")
        if len(order) < len(classes.order) and order != classes.keys:
            raise ValueError(f"the head has {count} rows without names, in the listed order or the folders'? {say}")
        told = "no names are stored of the head's %d rows: taken as %s, ...; if wrong, %s"
        logger.warning(told, count, order[:3], say)
        return [order.index(key) for key in classes.keys]
    if max(labels) >= count:
        raise ValueError(f"there are names for {max(labels) + 1} rows of a head that has {count}; {say}")
    owners, found = _owners(tuple(labels.values())), list[list[int]]()
    for words in zip(classes.keys, classes.names, strict=True):
        match = {name for word in words for name in owners.get(word) or owners.get(_normal(word), set())}
        found.append([row for row, name in labels.items() if name in match])
    named = ", ".join(list(labels.values())[:3])
    if missing := [name for name, rows in zip(classes.names, found, strict=True) if not rows]:
        none = f"has no row for {', '.join(missing[:3])} ({len(missing)} of {len(found)} classes)"
        kind = NoRows if len(missing) == len(found) else ValueError
        raise kind(f"the head {none}, its rows are {named}; set model.head: new, or {say}")
    several = [f"{name} ({rows})" for name, rows in zip(classes.names, found, strict=True) if len(rows) > 1]
    chosen = [rows[0] for rows in found]
    if several or len(set(chosen)) < len(chosen):
        raise ValueError(f"the head has several rows or classes of one name: {', '.join(several[:3]) or named}; {say}")
    return chosen
