"""Which rows go to which part: reproducible draws per class, unreadable pictures replaced, copies across parts found."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence

import numpy as np

from singreg.data.config import DataConfig
from singreg.data.pictures import PictureChecker, UnreadableImageError
from singreg.data.sources import NAMED, Split
from singreg.data.splits import ImageSplit

logger = logging.getLogger(__name__)

_NAMED_IN_ERRORS = 50  # a message that names more than this is read by nobody


class Candidates:
    """The rows of a split with what is known of each: not looked at, readable with its digest (N, 32), or bad."""

    def __init__(self, split: Split, checker: PictureChecker) -> None:
        self.split, self.checker = split, checker
        self.digests = np.zeros((len(split.labels), 32), dtype=np.uint8)
        self.bad: dict[int, str] = {}
        self._seen = np.zeros(len(split.labels), dtype=bool)

    def shuffled(self, label: int, seed: int, key: str) -> np.ndarray:
        """The rows of a label (M,), bad ones left out, in an order that depends on seed and `key` alone.

        So a class keeps its pictures whatever other classes are chosen, and a bad one is replaced by the next in line.
        """
        rows = np.flatnonzero(self.split.labels == label)
        word = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
        rows = np.random.default_rng([seed, word]).permutation(rows)
        return rows[[int(row) not in self.bad for row in rows]] if self.bad else rows

    def look(self, rows: np.ndarray) -> int:
        """Check those of the rows (M,) not yet looked at; returns how many turned out bad."""
        new = rows[~self._seen[rows]]
        checked = self.split.check(new, self.checker)
        self._seen[new] = True
        self.digests[new] = checked.digests
        self.bad |= {int(new[place]): reason for place, reason in checked.bad.items()}
        return len(checked.bad)

    def part(self, name: str, rows: np.ndarray, class_names: Sequence[str]) -> ImageSplit:
        """Rows (M,) as a part."""
        return self.split.part(name, rows, class_names, self.digests[rows])


Chosen = dict[str, np.ndarray]


def choose_train_audit(found: Candidates, keys: Sequence[str], config: DataConfig) -> tuple[Chosen, list[str]]:
    """Rows for "train" and "audit" (the rule is DataConfig.audit_per_class'), and what is short, class by class."""
    train, audit, short = [], [], []
    for label, key in enumerate(keys):
        rows = found.shuffled(label, config.seed, key)
        for_train, for_audit = _shares(len(rows), config)
        if for_train < 1 or for_train + for_audit > len(rows) or (for_audit < 1 and config.audit_per_class != 0):
            short.append(
                f"{key} has {len(rows)} for train {_asked(config.train_per_class)} + audit {_asked(config.audit_per_class)}"
            )
            continue
        train.append(np.sort(rows[:for_train]))
        audit.append(np.sort(rows[for_train : for_train + for_audit]))
    remedy = "lower data.train_per_class / data.audit_per_class, or set them to null"
    return {"train": _joined(train), "audit": _joined(audit)}, _headed(short, found, remedy)


def choose_test(found: Candidates, keys: Sequence[str], config: DataConfig) -> tuple[Chosen, list[str]]:
    """Rows for "test", and what is short, class by class."""
    test, short = [], []
    for label, key in enumerate(keys):
        rows = found.shuffled(label, config.seed, key)
        wanted = len(rows) if config.test_per_class is None else config.test_per_class
        if not 1 <= wanted <= len(rows):
            short.append(f"{key} has {len(rows)} for test {_asked(config.test_per_class)}")
        test.append(np.sort(rows[:wanted]))
    return {"test": _joined(test)}, _headed(short, found, "lower data.test_per_class, or set it to null")


def choose_unlabelled(found: Candidates, config: DataConfig) -> tuple[Chosen, list[str]]:
    """Rows of the unlabelled pictures for the "bank" and the "audit", and whether there are too few."""
    rows = found.shuffled(-1, config.seed, "unlabelled")
    wanted = len(rows) if config.unlabeled_count is None else config.unlabeled_count
    short = (
        [
            f"{found.split.where} (data.unlabeled): {len(rows)} unlabelled pictures, asked for {wanted}; lower data.unlabeled_count, "
            "or set it to null"
        ]
        if not 1 <= wanted <= len(rows)
        else []
    )
    cut = round(config.unlabeled_to_audit * wanted)
    return {"audit": np.sort(rows[:cut]), "bank": np.sort(rows[cut:wanted])}, short


def report_bad(found: Sequence[Candidates], unreadable: str) -> None:
    """Stop over unreadable pictures ("stop"), naming them all, or warn that they are left out ("skip")."""
    _report_links([link for one in found for link in one.split.links], unreadable)
    bad = [f"{one.split.identifier(row)} ({why})" for one in found for row, why in sorted(one.bad.items())]
    if not bad:
        return
    if unreadable == "stop":
        names = "\n  ".join(bad)
        raise UnreadableImageError(
            f"{len(bad)} unreadable pictures (or set data.unreadable: skip to leave them out):\n  {names}"
        )
    logger.warning("%d unreadable pictures are left out:\n  %s", len(bad), "\n  ".join(bad))


def _report_links(links: list[str], unreadable: str) -> None:
    """Links that are not followed are pictures that cannot be read: the same choice, and named in the same way."""
    if not links:
        return
    more = f"\n  and {len(links) - NAMED} more" if len(links) > NAMED else ""
    text = f"{len(links)} links lead out of the data folder, or to another folder, and are not followed"
    names = "\n  ".join(links[:NAMED]) + more
    if unreadable == "stop":
        raise UnreadableImageError(
            f"{text}; copy what they lead to, or set data.unreadable: skip to leave it out:\n  {names}"
        )
    logger.warning("%s:\n  %s", text, names)


def remove_copies(groups: Sequence[tuple[str, list[ImageSplit]]], duplicates: str) -> list[list[ImageSplit]]:
    """Deal with pictures of equal bytes in two groups: an error ("stop"), or kept in the first group only ("drop").

    A picture may be twice in one group: that is no leak.
    """
    repeated = _repeated([part for _, parts in groups for part in parts])
    owner: dict[bytes, tuple[str, ImageSplit, int]] = {}
    copies: list[str] = []
    kept: list[list[ImageSplit]] = []
    for name, parts in groups:
        mine: dict[bytes, tuple[str, ImageSplit, int]] = {}
        kept.append([])
        for part in parts:
            stay = np.ones(len(part), dtype=bool)
            for index in next(repeated).tolist():
                digest = bytes(part.digests[index])
                if digest in owner:
                    other, first, place = owner[digest]
                    copies.append(f"{part.identifier(index)} ({name}) = {first.identifier(place)} ({other})")
                    stay[index] = False
                else:
                    mine.setdefault(digest, (name, part, index))
            kept[-1].append(part if stay.all() else part.subset(np.flatnonzero(stay)))
        owner |= mine
    if copies:
        _report_copies(copies, duplicates)
    return kept


def _repeated(parts: Sequence[ImageSplit]) -> Iterator[np.ndarray]:
    """Per part, the places (M,) of pictures whose digest occurs more than once in all of them: few, where a table of all would be large."""
    digests = np.concatenate([np.ascontiguousarray(part.digests).view(np.uint64) for part in parts])
    order = np.lexsort(digests.T)
    equal = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    several = np.zeros(len(digests), dtype=bool)
    several[order[1:][equal]] = several[order[:-1][equal]] = True
    yield from (np.flatnonzero(share) for share in np.split(several, np.cumsum([len(part) for part in parts])[:-1]))


def _report_copies(copies: list[str], duplicates: str) -> None:
    more = f"\n  and {len(copies) - _NAMED_IN_ERRORS} more" if len(copies) > _NAMED_IN_ERRORS else ""
    names = "\n  ".join(copies[:_NAMED_IN_ERRORS]) + more
    if duplicates == "stop":
        raise ValueError(
            f"{len(copies)} pictures are in two parts that must not share any; remove one of each pair, or set "
            f"data.duplicates: drop to keep the second of each line only:\n  {names}"
        )
    logger.warning(
        "%d pictures that are in another part too were dropped from the first named:\n  %s", len(copies), names
    )


def _shares(count: int, config: DataConfig) -> tuple[int, int]:
    train, audit = config.train_per_class, config.audit_per_class
    if train is None:
        audit = count // 2 if audit is None else audit
        return count - audit, audit
    return train, count - train if audit is None else audit


def _joined(rows: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)


def _asked(count: int | None) -> str:
    return "(the rest, at least 1)" if count is None else str(count)


def _headed(short: list[str], found: Candidates, remedy: str) -> list[str]:
    left_out = {"unreadable ones": len(found.bad), "links out of the folder": len(found.split.links)}
    skipped = "".join(f" ({count} {what} not counted)" for what, count in left_out.items() if count)
    if not short:
        return []
    more = f", and {len(short) - NAMED} more classes" if len(short) > NAMED else ""
    return [f"{found.split.where}: too few pictures{skipped}: {', '.join(short[:NAMED])}{more}; {remedy}"]
