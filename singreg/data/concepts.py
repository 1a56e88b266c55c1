"""Concept vocabularies: the banks of the package, and a user's own text files and lists."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from singreg.data.classes import imagenet_names

if TYPE_CHECKING:
    from singreg.models.vlm import VisionLanguageModel

logger = logging.getLogger(__name__)
CONCEPTS_FOLDER = Path(__file__).parent / "concepts"
IMAGENET = "imagenet"
DEFAULT_TEMPLATE = "an image of {concept}"
# The prompt of each bank's concepts; the paper's own for ImageNet's classes.
BANK_TEMPLATES = {
    "colours": "an image of something {concept}",
    "textures": "an image of something with a {concept} texture",
    "materials": "an image of something made of {concept}",
    "scenes": "an image of a {concept}",
    "parts": "a close-up image of a {concept}",
    IMAGENET: "an image of a {concept}",
}
LONGEST = 200  # characters; a text tower cuts longer prompts off without a word
SHOWN = 8  # wrong entries named in one message


@dataclass(frozen=True)
class ConceptBank:
    """K concepts in words.

    Attributes:
        banks: the bank or file each concept is from, or "own".
        blank: lines without text, left out.
        repeated: entries said before, also in another case or bank, left out.
    """

    concepts: tuple[str, ...]
    banks: tuple[str, ...]
    blank: int = 0
    repeated: int = 0

    def __len__(self) -> int:
        return len(self.concepts)

    def omissions(self) -> list[str]:
        """Return sentences about what was left out."""
        counts = {"blank lines": self.blank, "repeated concepts": self.repeated}
        return [f"{count} {what} were left out." for what, count in counts.items() if count]

    def templates(self, templates: Sequence[str] | None = None) -> list[tuple[str, ...]]:
        """Return the K prompt templates: those given for all, or each bank's own.

        Raises:
            ValueError: no template, or some without {concept}.
        """
        if templates is None:
            return [(BANK_TEMPLATES.get(bank, DEFAULT_TEMPLATE),) for bank in self.banks]
        if isinstance(templates, str) or not templates or not all("{concept}" in one for one in templates):
            raise ValueError(f"expected templates with {{concept}}, such as {DEFAULT_TEMPLATE!r}, got {templates!r}")
        return [tuple(templates)] * len(self)


def concept_banks() -> tuple[str, ...]:
    """Return the names of the banks that come with the package.

    Example:
        >>> concept_banks()
        ('colours', 'imagenet', 'materials', 'parts', 'scenes', 'textures')
    """
    return tuple(sorted([*(path.stem for path in CONCEPTS_FOLDER.glob("*.txt")), IMAGENET]))


def load_concepts(source: str | Path | Sequence[str]) -> ConceptBank:
    """Read concepts from a named bank, a text file, or a list of banks, files and concepts in words.

    A file has one concept a line; `#` begins a comment. Blank and repeated lines are left out, counted and logged.

    Raises:
        ValueError: an unknown name, no concept, or entries without text or of more than 200 characters; all are named.
        FileNotFoundError: a path that is not there.

    Example:
        >>> bank = load_concepts(["colours", "a zebra", "Red"])
        >>> len(bank), bank.concepts[0], bank.concepts[-1], bank.repeated
        (63, 'red', 'a zebra', 1)
    """
    entries: list[tuple[str, str]] = []  # bank and concept
    own: list[tuple[str, str]] = []  # place and concept
    blank = 0
    single = isinstance(source, (str, Path))
    listed = [str(source)] if isinstance(source, (str, Path)) else source
    for place, name in enumerate(listed, start=1):
        if single or name in concept_banks() or _is_path(name):
            read, empty = _named(name)
            entries, blank = entries + read, blank + empty
        else:
            if near := difflib.get_close_matches(name, concept_banks(), n=1, cutoff=0.85):
                logger.warning("%r is taken as a concept in words; the bank is called %r", name, near[0])
            own.append((f"entry {place}", name.strip()))
            entries.append(("own", name.strip()))
    _refuse("the list of concepts", own)
    kept: dict[str, tuple[str, str]] = {}
    for bank, concept in entries:
        kept.setdefault(" ".join(concept.casefold().split()), (concept, bank))
    if not kept:
        raise ValueError(f"no concept in {source!r}; name a bank ({', '.join(concept_banks())}), a file or concepts")
    concepts, banks = zip(*kept.values(), strict=True)
    found = ConceptBank(concepts, banks, blank=blank, repeated=len(entries) - len(kept))
    for sentence in found.omissions():
        logger.warning("concepts %s: %s", source if single else "listed", sentence)
    return found


def embed_concepts(vlm: VisionLanguageModel, bank: ConceptBank, templates: Sequence[str] | None = None) -> Tensor:
    """Return one unit row a concept (K, n): the mean over its templates' unit rows, normalised again."""
    wanted = bank.templates(templates)
    rows: dict[int, Tensor] = {}
    for group in dict.fromkeys(wanted):
        places = [place for place, own in enumerate(wanted) if own == group]
        prompts = [template.replace("{concept}", "{class}") for template in group]
        rows |= zip(places, vlm.embed_classes([bank.concepts[place] for place in places], prompts), strict=True)
    return torch.stack([rows[place] for place in range(len(bank))])


def _named(name: str) -> tuple[list[tuple[str, str]], int]:
    """(bank, concept) of every entry of a bank or a file, and the number of its blank lines."""
    if name == IMAGENET:
        return [(name, concept) for concept in imagenet_names()], 0
    packaged = name in concept_banks()
    path = CONCEPTS_FOLDER / f"{name}.txt" if packaged else Path(name).expanduser()
    if not path.is_file():
        if _is_path(name):
            raise FileNotFoundError(f"there is no concept file {name}")
        near = difflib.get_close_matches(name, concept_banks(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; a single concept is given as a list: [{name!r}]"
        raise ValueError(f"{name!r} is neither a concept bank ({', '.join(concept_banks())}) nor a file{hint}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error
    found = [(f"line {number}", re.split(r"(?:^|\s)#", line)[0].strip()) for number, line in enumerate(lines, 1)]
    filled = [(place, concept) for place, concept in found if concept]
    if not filled:
        raise ValueError(f"{path} lists no concept; expected one a line")
    _refuse(str(path), filled)
    return [(path.stem, concept) for _, concept in filled], sum(not line.strip() for line in lines)


def _is_path(text: str) -> bool:
    return text.endswith(".txt") or "/" in text or "\\" in text


def _refuse(where: str, entries: Sequence[tuple[str, str]]) -> None:
    """Raise one ValueError that names every (place, concept) that cannot be a prompt."""
    bad = [(place, c) for place, c in entries if len(c) > LONGEST or not any(letter.isalnum() for letter in c)]
    if bad:
        shown = "; ".join(f"{place}: {concept[:40]!r}" for place, concept in bad[:SHOWN])
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError(f"{where}: expected concepts of letters, at most {LONGEST} characters each, got {shown}{more}")
