"""Concept vocabularies: the banks of the package, a user's own file or list; every entry is checked and every omission counted."""

from __future__ import annotations

import difflib
import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from singreg.data.classes import imagenet_names

logger = logging.getLogger(__name__)

CONCEPTS_FOLDER = Path(__file__).parent / "concepts"
IMAGENET = "imagenet"
DEFAULT_TEMPLATE = "an image of {concept}"
BANK_TEMPLATES = {
    "colours": "an image of something {concept}",
    "textures": "an image of something with a {concept} texture",
    "materials": "an image of something made of {concept}",
    "scenes": "an image of a {concept}",
    "parts": "a close-up image of a {concept}",
    IMAGENET: "an image of a {concept}",
}
"""The prompt of each bank's concepts; the paper's own for ImageNet's classes. What a user lists is put into "an image of ..."."""
LONGEST = 200  # characters; a text tower cuts longer prompts off without a word
SHOWN = 8  # wrong entries named in one message


class TextEncoder(Protocol):
    """What `embed_concepts` needs of a vision-language model."""

    def embed_classes(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """(K, n) unit rows, the mean over templates with "{class}" in them."""
        ...


@dataclass(frozen=True)
class ConceptBank:
    """K concepts in words, `banks` (K,) the bank (or file, or "own") each is from, and what was left out.

    blank: lines without text. repeated: entries said before, also in another case or another bank; the first one stays.
    """

    concepts: tuple[str, ...]
    banks: tuple[str, ...]
    blank: int = 0
    repeated: int = 0

    def __len__(self) -> int:
        return len(self.concepts)

    def omissions(self) -> list[str]:
        """Sentences about what was left out, none when nothing was (no shapes)."""
        found = [f"{self.blank} blank lines were left out."] if self.blank else []
        return found + ([f"{self.repeated} repeated concepts were left out."] if self.repeated else [])

    def templates(self, templates: Sequence[str] | None = None) -> list[tuple[str, ...]]:
        """The prompt templates of every concept, K of them: those given for all, or each bank's own.

        Raises:
            ValueError: no template, or some without {concept} or with control characters, all named at once.
        """
        if templates is None:
            return [(BANK_TEMPLATES.get(bank, DEFAULT_TEMPLATE),) for bank in self.banks]
        wrong = [t for t in templates if "{concept}" not in t or control_character(t)]
        if isinstance(templates, str) or not templates or wrong:
            raise ValueError(
                f"expected at least one template with {{concept}} in it, as in {DEFAULT_TEMPLATE!r}, got {wrong or templates!r}"
            )
        return [tuple(templates)] * len(self)


def concept_banks() -> tuple[str, ...]:
    """The names of the banks that come with the package.

    Example:
        >>> concept_banks()
        ('colours', 'imagenet', 'materials', 'parts', 'scenes', 'textures')
    """
    return tuple(sorted([*(path.stem for path in CONCEPTS_FOLDER.glob("*.txt")), IMAGENET]))


def load_concepts(source: str | Path | Sequence[str]) -> ConceptBank:
    """Concepts from a named bank, a text file (one a line, `#` begins a comment), or a list of these and of concepts in words.

    Blank and repeated lines are left out, counted in the result and logged.

    Raises:
        ValueError: an unknown name, an empty file or list, or entries without text, with control characters or of more than
            200 characters; all wrong entries are named with their place.
        FileNotFoundError: a path that is not there.

    Example:
        >>> bank = load_concepts(["colours", "a zebra", "Red"])
        >>> len(bank), bank.concepts[0], bank.concepts[-1], bank.repeated
        (63, 'red', 'a zebra', 1)
    """
    if isinstance(source, str | Path):
        entries, blank = _named(str(source))
    else:
        entries, blank = _listed(source)
    kept: dict[str, tuple[str, str]] = {}
    for bank, concept in entries:
        kept.setdefault(" ".join(concept.casefold().split()), (concept, bank))
    if not kept:
        raise ValueError(
            f"no concept in {source!r}: name a bank ({', '.join(concept_banks())}), a text file, or concepts in words"
        )
    concepts, banks = zip(*kept.values(), strict=True)
    found = ConceptBank(concepts, banks, blank=blank, repeated=len(entries) - len(kept))
    for sentence in found.omissions():
        logger.warning("concepts %s: %s", source if isinstance(source, str | Path) else "listed", sentence)
    return found


def _named(name: str) -> tuple[list[tuple[str, str]], int]:
    """(bank, concept) of a bank or a file, and its blank lines."""
    if name == IMAGENET:
        return [(name, concept) for concept in imagenet_names()], 0
    if name in concept_banks():
        return _read(CONCEPTS_FOLDER / f"{name}.txt", name)
    path = Path(name).expanduser()
    if path.is_file():
        return _read(path, path.stem)
    if _is_path(name):
        raise FileNotFoundError(f"there is no concept file {name}")
    near = difflib.get_close_matches(name, concept_banks(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    known = ", ".join(concept_banks())
    raise ValueError(
        f"{name!r} is neither a concept bank ({known}) nor a file{hint} A single concept is given as a list: [{name!r}]"
    )


def _listed(source: Iterable[str]) -> tuple[list[tuple[str, str]], int]:
    entries: list[tuple[str, str]] = []
    blank, own = 0, []
    for place, entry in enumerate(source):
        if entry in concept_banks() or _is_path(entry):
            more, empty = _named(entry)
            entries, blank = entries + more, blank + empty
            continue
        near = difflib.get_close_matches(entry, concept_banks(), n=1, cutoff=0.85)
        if near:
            logger.warning("%r is taken as a concept in words; the bank is called %r", entry, near[0])
        own.append((f"entry {place + 1}", entry.strip()))
        entries.append(("own", entry.strip()))
    _refuse("the list of concepts", own)
    return entries, blank


def _is_path(text: str) -> bool:
    return text.endswith(".txt") or "/" in text or "\\" in text


def _read(path: Path, bank: str) -> tuple[list[tuple[str, str]], int]:
    """(bank, concept) of every line with text, and the number of blank ones; a line of comment only is neither."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error
    lines = text.removesuffix("\n").split("\n")  # not splitlines, which takes control characters for line ends
    stripped = [
        (f"line {number}", re.split(r"(?:^|\s)#", line)[0].strip(" \t")) for number, line in enumerate(lines, 1)
    ]
    blank = sum(not line.strip() for line in lines)
    filled = [(place, concept) for place, concept in stripped if concept]
    if not filled:
        raise ValueError(f"{path} lists no concept: expected one a line")
    _refuse(str(path), filled)
    return [(bank, concept) for _, concept in filled], blank


def _refuse(where: str, entries: Sequence[tuple[str, str]]) -> None:
    """Raise one ValueError that names every entry (place, concept) that cannot be a prompt."""
    problems = [f"{place}: {problem}" for place, concept in entries if (problem := _problem(concept))]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(f"{len(problems)} entries of {where} cannot be concepts: {'; '.join(problems[:SHOWN])}{more}")


def _problem(concept: str) -> str | None:
    if control := control_character(concept):
        return f"{concept[:40]!r} has the control character {control}"
    if not any(character.isalnum() for character in concept):
        return f"{concept!r} has no text in it"
    return f"it has {len(concept)} characters, more than {LONGEST}" if len(concept) > LONGEST else None


def control_character(text: str) -> str | None:
    """The first character that is not to be seen (control, format, surrogate, line separator), by its number."""
    found = next(
        (c for c in text if unicodedata.category(c)[0] == "C" or unicodedata.category(c) in ("Zl", "Zp")), None
    )
    return None if found is None else f"U+{ord(found):04X}"


def embed_concepts(vlm: TextEncoder, bank: ConceptBank, templates: Sequence[str] | None = None) -> Tensor:
    """One unit row a concept (K, n): the mean over its templates' unit rows, normalised again.

    Raises:
        ValueError: a template without {concept}.
    """
    wanted = bank.templates(templates)
    rows: list[Tensor | None] = [None] * len(bank)
    for group in dict.fromkeys(wanted):
        places = [place for place, own in enumerate(wanted) if own == group]
        names = [bank.concepts[place] for place in places]
        embedded = vlm.embed_classes(names, [template.replace("{concept}", "{class}") for template in group])
        for place, row in zip(places, embedded, strict=True):
            rows[place] = row
    return torch.stack([row for row in rows if row is not None])
