"""Which classes: named sets, lists and class names, matched to the folders (or label names) of a data set."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

_SETS_FOLDER = Path(__file__).parent / "named_sets"
# The four ImageNet-1k names that two classes share; the second words are those CLIP's authors use.
_SHARED_NAMES = {"n02012849": "crane bird", "n03126707": "construction crane"}
_SHARED_NAMES |= {"n02113186": "Cardigan Welsh corgi", "n03710721": "tank suit"}


@dataclass(frozen=True)
class ClassSubset:
    """The chosen classes, in label order: as the data set has them, in words, and their rows in ImageNet-1k or None."""

    keys: tuple[str, ...]
    names: tuple[str, ...]
    indices: tuple[int, ...] | None


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
    return " ".join(word.replace("_", " ").replace("-", " ").lower().split())


def imagenet_names() -> tuple[str, ...]:
    """Return the 1000 names used for ImageNet-1k's classes, in label order."""
    return tuple(_imagenet()[0].values())


def named_sets() -> tuple[str, ...]:
    """Return the names of the sets that come with the package."""
    return tuple(sorted(path.stem for path in _SETS_FOLDER.glob("*.txt")))


def expand_classes(classes: Sequence[str] | str) -> tuple[str, ...]:
    """Return the entries of a named set, a list file (one a line, `#` begins a comment), one class, or a sequence."""
    if not isinstance(classes, str):
        return tuple(classes)
    path = _SETS_FOLDER / f"{classes}.txt" if classes in named_sets() else Path(classes)
    if not path.is_file():
        return (classes,)
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return tuple(line for line in lines if line)


def resolve_classes(classes: Sequence[str] | str | None, available: Sequence[str] | None = None) -> ClassSubset:
    """Match a specification to the classes that are `available` (None: the 1000 of ImageNet-1k, by wnid).

    Wnids, class names and synonyms match in any case, with `_` or `-` for a blank. The order given is the label order.

    Raises:
        ValueError: classes that are not there (with the nearest names), may mean two different ones, or come twice.

    Example:
        >>> subset = resolve_classes(["goldfish", "n02123394"])
        >>> subset.names, subset.indices
        (('goldfish', 'Persian cat'), (1, 283))
    """
    keys = tuple(_imagenet()[0] if available is None else available)
    if classes is None:
        return _subset(keys if available is None else tuple(sorted(keys)))
    entries = expand_classes(classes)
    if not entries:
        raise ValueError(f"classes: {classes!r} lists no class; name at least one, or leave it out to take all")
    owners = _owners(keys)
    found = {entry: owners.get(entry) or owners.get(_normal(entry), set()) for entry in entries}
    missing = [entry for entry, match in found.items() if not match]
    if missing:
        close = {entry: difflib.get_close_matches(_normal(entry), owners, n=3) for entry in missing}
        hints = ", ".join(f"{entry!r} (near: {', '.join(near) or 'none'})" for entry, near in close.items())
        sets = f"; named sets are {', '.join(named_sets())}" if isinstance(classes, str) else ""
        raise ValueError(f"{len(missing)} of the classes are not among the {len(keys)} there: {hints}{sets}")
    vague = [f"{entry!r} ({', '.join(sorted(match))})" for entry, match in found.items() if len(match) > 1]
    if vague:
        raise ValueError(f"class names that fit several classes, use one in brackets: {', '.join(vague)}")
    chosen = [next(iter(found[entry])) for entry in entries]
    twice = sorted({entry for entry, key in zip(entries, chosen, strict=True) if chosen.count(key) > 1})
    if twice:
        raise ValueError(f"classes listed twice (also by synonyms): {', '.join(twice)}")
    return _subset(tuple(chosen))


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


def _subset(keys: tuple[str, ...]) -> ClassSubset:
    imagenet, wnids = _imagenet()[0], [_wnid_of(key) for key in keys]
    rows = {wnid: row for row, wnid in enumerate(imagenet)}
    known = tuple(rows[wnid] for wnid in wnids if wnid is not None)
    names = tuple(imagenet.get(key, key.replace("_", " ")) for key in keys)
    return ClassSubset(keys, names, known if len(set(known)) == len(keys) else None)
