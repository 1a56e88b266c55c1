"""A streaming `datasets` set, which has no length and no row numbers: read once, and what is wanted of it kept beside the caches."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from filelock import FileLock

from singreg.data.pictures import trial
from singreg.data.reading import Origin, RefusedPictureError, cell_bytes
from singreg.data.sources import NAMED, HubRows, Split, columns_of, label_name, text_labels, warn_unlabelled
from singreg.data.splits import UNLABELLED
from singreg.data.verified import hashes_to
from singreg.old_seals import DamagedFileError, read_sealed, write_sealed
from singreg.utils import atomic_write, progress, sha256_of_file, sha256_of_json

logger = logging.getLogger(__name__)

SHARD_ROWS, SHARD_BYTES = 1000, 64 << 20  # what a kill can cost, and what is held in memory
FORMAT = 1
Cell = dict[str, Any]  # {"bytes", "path"} of a picture


class StreamSource:
    """A data set read through `datasets` streaming; nothing is downloaded but what is read (no shapes).

    Splits are drawn, counted and checked by row, so one pass writes the pictures of the wanted classes, encoded as they came, to Arrow
    files in `folder`; they are memory-mapped from then on. With a number `wanted` of a split the pass ends as soon as every class has
    as many readable pictures: the first of the stream, so this is a fair draw only from a set that was shuffled when it was
    published. A pass that was interrupted goes on behind its last whole file.

    Args:
        wanted: pictures a class by split; None for all.
    """

    def __init__(self, source: str, folder: str | Path, wanted: Mapping[str, int | None]) -> None:
        self.source, self.folder, self.wanted = source, Path(folder).expanduser(), wanted
        self._builder: datasets.DatasetBuilder | None = None

    def keys(self, split: str, option: str = "data.train_split") -> tuple[str, ...]:
        """The class names of a split, in the data set's own order; a text column of labels is read to its end for them.

        `option` is the one that named the split (no shapes).

        Raises:
            ValueError: the stream cannot be read, or has no label.
        """
        stream = self._stream(split, option)
        _, label = columns_of(stream.features, self.source)
        feature = stream.features[label]
        if isinstance(feature, datasets.ClassLabel):
            return tuple(feature.names)
        return text_labels((row[label] for row in stream.select_columns([label])), label, f"{self.source}/{split}")

    def read(self, split: str, keys: Sequence[str]) -> Split:
        """The kept rows of the split, labelled by their place in `keys`.

        Raises:
            ValueError: the stream cannot be read, or ends without a picture of these classes.
        """
        stream = self._stream(split)
        assert self._builder is not None
        facts = {
            "format": FORMAT, "source": self.source, "data": self._builder.hash, "split": split, "keys": list(keys),
            "wanted": self.wanted.get(split),
        }  # fmt: skip
        folder = self.folder / f"stream-{sha256_of_json(facts)[:32]}"
        folder.mkdir(parents=True, exist_ok=True)
        origin = self._origin()
        with FileLock(folder / ".lock"):  # the other processes of a run come here too, and find it finished
            kept = _Kept.found(folder, facts)
            if not kept.finished:
                kept.fill(stream, columns_of(stream.features, self.source), keys, f"{self.source}/{split}", origin)
        table = datasets.concatenate_datasets([datasets.Dataset.from_file(str(folder / name)) for name in kept.shards])
        labels = np.asarray(table.select_columns(["label"]).with_format(None)[:]["label"], dtype=np.int64)
        undecoded = table.cast_column("image", datasets.Image(decode=False))
        return HubRows(
            f"{self.source}/{split} (streamed)", undecoded, "image", labels, Origin(f"what was kept of {self.source}")
        )

    def _origin(self) -> Origin:
        """Rows may point into the folder that is streamed, or to the files that `datasets` found when it listed the data set."""
        assert self._builder is not None
        listed = frozenset(str(file) for files in (self._builder.config.data_files or {}).values() for file in files)
        return Origin(self.source, [self.source] if Path(self.source).is_dir() else [], listed)

    def _stream(self, split: str, option: str = "data.train_split") -> Any:
        try:
            self._builder = self._builder or datasets.load_dataset_builder(self.source)
            stream = self._builder.as_streaming_dataset(split=split)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"data.source {self.source!r}, split {split!r} ({option}), cannot be streamed; datasets says: {error}"
            ) from error
        if stream.features is None:
            raise ValueError(
                f"data.source {self.source!r} does not say which columns it has; set data.streaming: false"
            )
        column, _ = columns_of(stream.features, self.source)
        return stream.cast_column(column, datasets.Image(decode=False))


class _Kept:
    """The Arrow files of one split and how far in the stream they reach; `state.json` is written after each of them."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts, self.finished = folder, facts, False
        self.shards: dict[str, str] = {}
        self.counts, self.seen = [0] * len(facts["keys"]), 0
        self.position: dict[str, Any] | None = None

    @classmethod
    def found(cls, folder: Path, facts: dict[str, Any]) -> _Kept:
        """What is in the folder, whole by its hashes; empty where there is nothing, or what there is was damaged (which is said)."""
        kept, file = cls(folder, facts), folder / "state.json"
        if not file.is_file():
            return kept
        try:
            state = read_sealed(file)
            for name, digest in state["shards"].items():
                if not (folder / name).is_file() or not hashes_to(folder / name, digest):
                    raise DamagedFileError(f"{folder / name} is damaged: its content is not what was written")
        except DamagedFileError as error:
            logger.warning("%s; what was kept of the stream is read anew", error)
            for path in [file, *folder.glob("rows-*.arrow")]:
                path.unlink(missing_ok=True)
            return kept
        for name in ("shards", "counts", "seen", "position", "finished"):
            setattr(kept, name, state[name])
        return kept

    def fill(self, stream: Any, columns: tuple[str, str], keys: Sequence[str], where: str, origin: Origin) -> None:
        """Read on from where the last whole file ended, until there is enough or the stream ends."""
        if self.position is not None:
            logger.warning(
                "%s: an interrupted run kept %d pictures of %d read; going on from there",
                where,
                sum(self.counts),
                self.seen,
            )
            stream.load_state_dict(self.position)
        place = {key: index for index, key in enumerate(keys)}
        rows: list[tuple[Cell, int]] = []
        held = unlabelled = refused = 0
        for row in progress(iter(stream), f"streaming {where}", done=self.seen):
            self.seen += 1
            name = label_name(row[columns[1]], stream.features[columns[1]])
            unlabelled += name is None
            label = UNLABELLED if name is None else place.get(name, UNLABELLED)
            if label != UNLABELLED and not self._enough(label):
                cell, problem = _kept_cell(row[columns[0]], origin, f"{where}, row {self.seen - 1}")
                rows.append((cell, label))
                held += len(cell["bytes"] or b"")
                self.counts[label] += problem is None
                refused += cell["bytes"] is None
                if cell["bytes"] is None and refused <= NAMED:
                    logger.warning("%s, row %d: %s", where, self.seen - 1, problem)
            full = all(self._enough(index) for index in range(len(keys)))
            if full or len(rows) >= SHARD_ROWS or held >= SHARD_BYTES:
                self._write(rows, stream.state_dict(), finished=full)
                rows, held = [], 0
            if full:
                break
        warn_unlabelled(unlabelled, where, columns[1])
        if self.finished:
            return
        if not rows and not self.shards:
            raise ValueError(f"{where} holds no picture of the {len(keys)} classes wanted ({self.seen} rows were read)")
        self._write(rows, None, finished=True)

    def _enough(self, label: int) -> bool:
        wanted = self.facts["wanted"]
        return wanted is not None and self.counts[label] >= wanted

    def _write(self, rows: list[tuple[Cell, int]], position: dict[str, Any] | None, *, finished: bool) -> None:
        if rows:
            name = f"rows-{len(self.shards):05d}.arrow"
            pictures = pa.array([cell for cell, _ in rows], type=datasets.Image().pa_type)
            table = pa.table({"image": pictures, "label": pa.array([label for _, label in rows], pa.int64())})
            with (
                atomic_write(self.folder / name) as temporary,
                pa.ipc.new_stream(str(temporary), table.schema) as writer,
            ):
                writer.write_table(table)
            self.shards[name] = sha256_of_file(self.folder / name)
        self.position, self.finished = position, finished
        state = {name: getattr(self, name) for name in ("shards", "counts", "seen", "position", "finished")}
        write_sealed(self.folder / "state.json", {"key": self.facts, **state})


def _kept_cell(cell: dict[str, Any] | None, origin: Origin, where: str) -> tuple[Cell, str | None]:
    """A picture as it is kept, and why it is of no use, or None; a bad one is kept too, so that it is counted and named with the others.

    One that must not be read is kept without bytes, with its path where it has one: that is refused again when the pictures are checked.
    """
    try:
        content = cell_bytes(cell, origin)
    except RefusedPictureError as error:
        return {"bytes": None, "path": None if cell is None or cell["bytes"] is not None else cell["path"]}, str(error)
    except OSError as error:  # the network's fault as a rule: a run started again goes on from the last whole file
        raise OSError(
            f"{where}: cannot read {cell['path'] if cell else None} ({error}); start again to go on from there"
        ) from error
    return {"bytes": content, "path": None}, trial(content)
