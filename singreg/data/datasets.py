"""load_splits: from a DataConfig to the four parts; make_loader: from a part to batches."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from singreg.data.classes import ClassSubset, resolve_classes
from singreg.data.collective import ElsewhereError, everywhere, first_for_all, rank
from singreg.data.config import DataConfig
from singreg.data.loader import EpochSampler, Transform
from singreg.data.pictures import PictureChecker
from singreg.data.remembered import Remembered
from singreg.data.selection import (
    Candidates,
    Chosen,
    choose_test,
    choose_train_audit,
    choose_unlabelled,
    remove_copies,
    report_bad,
)
from singreg.data.sources import FolderSource, open_source
from singreg.data.splits import ConcatSplit, FolderSplit, HubSplit, ImageSplit, SceneSplit, Splits, SubsetSplit
from singreg.data.streamed import StreamSource
from singreg.data.verified import Stamp, known_whole, trust

__all__ = [
    "ConcatSplit",
    "FolderSplit",
    "HubSplit",
    "ImageSplit",
    "SceneSplit",
    "Splits",
    "SubsetSplit",
    "load_splits",
    "make_loader",
]

logger = logging.getLogger(__name__)


def load_splits(config: DataConfig) -> Splits:
    """The train, bank, audit and test parts a configuration describes; the same for the same seed and files.

    Shapes: none; every part holds its own number of pictures N with labels (N,).

    Raises:
        ValueError: classes that do not exist or have too few pictures (all named at once), unreadable pictures (all
            named), one picture in two parts.
        FileNotFoundError: a folder or split that is not there.

    Example:
        >>> parts = load_splits(DataConfig(scenes_train=12, scenes_audit=6, scenes_test=5))
        >>> [len(part) for part in (parts.train, parts.bank, parts.audit, parts.test)]
        [12, 12, 6, 5]
    """
    parts = _scenes(config) if config.source == "scenes" else _stored(config)
    sizes = ", ".join(f"{part.name} {len(part)}" for part in (parts.train, parts.bank, parts.audit, parts.test))
    logger.info("data %s: %d classes; pictures: %s", config.source, len(parts.class_names), sizes)
    return parts


def make_loader(
    part: ImageSplit, transform: Transform, batch_size: int, *, clean_transform: Transform | None = None,
    shuffle: bool = False, seed: int = 0, workers: int = 0, drop_last: bool = False,
) -> DataLoader[Any]:  # fmt: skip
    """Batches (images (B, 3, H, W), labels (B,), indices (B,)); with `clean_transform` the clean view comes second.

    Order and augmentation of an epoch depend on (seed, epoch, index) alone: call `loader.sampler.set_epoch(epoch)`, or
    leave it to accelerate, which calls it on the loaders it has prepared.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    view = part.tensors(transform, clean_transform, seed=seed)
    sampler = EpochSampler(view, shuffle=shuffle, seed=seed)
    generator = torch.Generator().manual_seed(
        seed
    )  # without its own, every pass would draw from the training's dropout
    return DataLoader(
        view, batch_size=batch_size, sampler=sampler, num_workers=workers, drop_last=drop_last, generator=generator
    )


def _scenes(config: DataConfig) -> Splits:
    from singreg.data.scenes import sample_scenes

    if config.classes is not None or config.unlabeled is not None:
        raise ValueError("data: source: scenes has its own classes and pictures; leave out classes and unlabeled")

    def part(name: str, stream: int, count: int, bias: float) -> ImageSplit:
        seed = int(np.random.SeedSequence([config.seed, stream]).generate_state(1)[0])
        return SceneSplit(name, sample_scenes(count, seed=seed, background_bias=bias), pixels=config.scene_pixels)

    bias = config.scene_background_bias
    train = part("train", 0, config.scenes_train, bias)
    audit = part("audit", 1, config.scenes_audit, bias)
    test = part("test", 2, config.scenes_test, config.scene_test_background_bias)
    extra = [part("bank", 3, config.scenes_bank, bias)] if config.scenes_bank else []
    return Splits(train, ConcatSplit("bank", [train, *extra]), audit, test, train.class_names, None)


def _stored(config: DataConfig) -> Splits:
    """The first process looks at the pictures (and reads a stream); the others then take over what it found, and only draw."""
    checker = PictureChecker(config.source, config.cache_dir if rank() == 0 else None)
    parts: list[Splits] = []

    def look() -> tuple[Remembered, frozenset[Stamp]]:
        parts.append(_drawn(config, checker))
        return checker.known, known_whole()

    try:
        known, whole = first_for_all(look, "reading the data")
    except ElsewhereError as error:  # a user's mistake as a rule: told like one on every process
        raise ValueError(str(error)) from None
    if not parts:
        checker.known = known
        trust(whole)
    everywhere(lambda: None if parts else parts.append(_drawn(config, checker)), "reading the data")
    return parts[0]


def _drawn(config: DataConfig, checker: PictureChecker) -> Splits:
    source = _stream(config) if config.streaming else open_source(config.source)
    subset = resolve_classes(config.classes, source.keys(config.train_split, "data.train_split"))
    there = source.keys(config.test_split, "data.test_split")
    try:
        test_keys = resolve_classes(subset.keys, there).keys
    except ValueError as error:
        raise ValueError(f"split {config.test_split!r} of {config.source} (data.test_split): {error}") from error
    train = Candidates(source.read(config.train_split, subset.keys), checker)
    test = Candidates(source.read(config.test_split, test_keys), checker)
    extra = Candidates(FolderSource.read_unlabelled(config.unlabeled), checker) if config.unlabeled else None
    rows, test_rows, extra_rows = _choose(config, subset, train, test, extra)
    checker.save()
    bank = [train.part("train", rows["train"], subset.names)]
    audit = [train.part("audit", rows["audit"], subset.names)]
    if extra is not None:
        bank.append(extra.part("bank", extra_rows["bank"], subset.names))
        audit.append(extra.part("audit", extra_rows["audit"], subset.names))
    groups = [("test", [test.part("test", test_rows["test"], subset.names)]), ("audit", audit), ("bank", bank)]
    (test_part,), audit, bank = remove_copies(groups, config.duplicates)
    _refuse_empty_classes(bank[0])
    return Splits(
        bank[0], ConcatSplit("bank", bank), ConcatSplit("audit", audit), test_part, subset.names, subset.indices
    )


def _stream(config: DataConfig) -> StreamSource:
    """The source as a stream, which ends where the counts asked for are reached; a count that is None wants all there is."""
    if config.cache_dir is None:
        raise ValueError("data.streaming needs data.cache_dir: the folder where the pictures read are kept")
    counts = {
        config.train_split: (config.train_per_class, config.audit_per_class),
        config.test_split: (config.test_per_class,),
    }
    if len(counts) == 1:
        counts = {config.train_split: (None,)}
    wanted = {split: None if None in asked else sum(count or 0 for count in asked) for split, asked in counts.items()}
    return StreamSource(config.source, config.cache_dir, wanted)


def _choose(
    config: DataConfig, subset: ClassSubset, train: Candidates, test: Candidates, extra: Candidates | None
) -> tuple[Chosen, Chosen, Chosen]:
    """Draw the rows of every part; look at those drawn, and draw again without the bad ones until all are readable."""
    found = [train, test] if extra is None else [train, test, extra]
    while True:
        chosen, short = choose_train_audit(train, subset.keys, config)
        test_chosen, test_short = choose_test(test, subset.keys, config)
        extra_chosen, extra_short = ({}, []) if extra is None else choose_unlabelled(extra, config)
        if short or test_short or extra_short:
            raise ValueError("\n".join([*short, *test_short, *extra_short]))
        drawn = (chosen, test_chosen, extra_chosen)
        bad = sum(
            one.look(np.concatenate(list(rows.values()))) for one, rows in zip(found, drawn, strict=False)
        )  # no third without unlabelled ones
        if not bad or config.unreadable == "stop":
            break
    report_bad(found, config.unreadable)
    return drawn


def _refuse_empty_classes(train: ImageSplit) -> None:
    counts = np.bincount(train.labels, minlength=len(train.class_names))
    empty = [name for name, count in zip(train.class_names, counts, strict=True) if not count]
    if empty:
        raise ValueError(
            f"no training picture is left once copies of other parts' pictures are dropped: {', '.join(empty)}"
        )
