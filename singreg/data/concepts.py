"""Concept vocabularies: the banks of the package, a user's own text files, and concepts in words."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from singreg.classes import imagenet_names, read_list
from singreg.models.vlm import VisionLanguageModel

CONCEPTS_FOLDER = Path(__file__).parent / "concepts"
IMAGENET = "imagenet"
DEFAULT_TEMPLATE = "an image of {concept}"
# The prompt of each bank's concepts; the paper's own for ImageNet's classes.
BANK_TEMPLATES = {"colours": "an image of something {concept}", "scenes": "an image of a {concept}"}
BANK_TEMPLATES |= {"textures": "an image of something with a {concept} texture", IMAGENET: "an image of a {concept}"}
BANK_TEMPLATES |= {"materials": "an image of something made of {concept}", "parts": "a close-up image of a {concept}"}
LONGEST = 200  # characters; a text tower cuts longer prompts off without a word


@dataclass(frozen=True)
class ConceptBank:
    """K concepts in words, and the bank or file each is from ("own" for words)."""

    concepts: tuple[str, ...]
    banks: tuple[str, ...]


def load_concepts(sources: Sequence[str]) -> ConceptBank:
    """Read each concept once from banks, text files (one a line, `#` begins a comment) and concepts in words."""
    entries = [entry for source in sources for entry in _entries(source)]
    bad = [f"{bank}: {c[:40]!r}" for bank, c in entries if len(c) > LONGEST or not any(map(str.isalnum, c))]
    if bad:
        raise ValueError(f"expected concepts of letters, at most {LONGEST} characters each, got {'; '.join(bad[:20])}")
    kept: dict[str, tuple[str, str]] = {}
    for bank, concept in entries:
        kept.setdefault(" ".join(concept.casefold().split()), (concept, bank))
    if not kept:
        raise ValueError(f"no concept in {sources}; banks ({', '.join(sorted(BANK_TEMPLATES))}), files or concepts")
    return ConceptBank(*zip(*kept.values(), strict=True))


def embed_concepts(vlm: VisionLanguageModel, bank: ConceptBank, templates: Sequence[str] | None = None) -> Tensor:
    """Return one unit row a concept (K, n), by `templates` with {concept}; None takes each bank's own."""
    wanted = [tuple(templates or [BANK_TEMPLATES.get(name, DEFAULT_TEMPLATE)]) for name in bank.banks]
    rows: dict[int, Tensor] = {}
    for group in dict.fromkeys(wanted):
        places = [place for place, own in enumerate(wanted) if own == group]
        prompts = [template.replace("{concept}", "{class}") for template in group]
        rows |= zip(places, vlm.embed_classes([bank.concepts[place] for place in places], prompts), strict=True)
    return torch.stack([rows[place] for place in range(len(wanted))])


def _entries(source: str) -> Iterator[tuple[str, str]]:
    """(bank, concept) of every entry of a bank, a file or a concept in words."""
    path = Path(source).expanduser()
    path = path if path.is_file() else CONCEPTS_FOLDER / f"{source}.txt"  # a user's file goes before a built-in name
    if source != IMAGENET and path.is_file():
        yield from ((path.stem, concept) for concept in read_list(path))
    elif source == IMAGENET:
        yield from ((source, concept) for concept in imagenet_names())
    elif re.fullmatch(r".*(\.\w{2,4}|[/\\].*)", source):
        raise FileNotFoundError(f"there is no concept file {source}")
    else:
        yield "own", source.strip()
