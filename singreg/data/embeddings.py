"""The embedding cache: a fixed encoder's output for every picture of a part, computed once, memory-mapped ever after."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from singreg.data.collective import everywhere, first_for_all, rank, world
from singreg.data.datasets import ImageSplit, make_loader
from singreg.data.loader import Transform
from singreg.data.partial import PartialFile, RowWriter
from singreg.data.verified import hashes_to
from singreg.utils import progress as with_progress
from singreg.utils import sha256_of_file, write_json

logger = logging.getLogger(__name__)

FORMAT = 1
Begun = tuple[str, list[tuple[int, int]]]  # the file under way, and the stretches of rows that are finished


class ImageEncoder(Protocol):
    """What `cached_embeddings` needs of a vision-language model; `embed_images` maps (B, 3, H, W) to (B, n)."""

    weights_hash: str
    preprocessing: dict[str, Any]
    transform: Transform
    dim: int

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, n)."""
        ...


def cached_embeddings(
    vlm: ImageEncoder, part: ImageSplit, cache_dir: str | Path, *, batch_size: int = 64, workers: int = 0,
    progress: bool = True,
) -> np.memmap[Any, np.dtype[np.float32]]:  # fmt: skip
    """Raw image embeddings z (N, n) of a part, float32, row i for picture i, read-only and memory-mapped.

    The cache key is the weights, the preprocessing, the part's content and the format: another file path, batch size or
    number of processes finds the same file, anything that changes an embedding does not.

    Raises:
        ValueError: an embedding that is not finite, or a picture that cannot be read; both name it.
    """
    key = {"weights": vlm.weights_hash, "preprocessing": vlm.preprocessing}
    return encode_split(
        vlm.embed_images, vlm.transform, part, vlm.dim, cache_dir, key=key,
        batch_size=batch_size, workers=workers, progress=progress,
    )  # fmt: skip


def encode_split(
    encode: Callable[[Tensor], Tensor], transform: Transform, part: ImageSplit, width: int, cache_dir: str | Path, *,
    key: Mapping[str, Any], batch_size: int = 64, workers: int = 0, progress: bool = True, description: str = "embedding",
) -> np.memmap[Any, np.dtype[np.float32]]:  # fmt: skip
    """Any encoder's output (N, width) for a part, from the cache or computed; `key` must name all that determines it.

    In a process group every process must call it, with the same arguments and a cache folder they all see: each encodes
    an equal share of what is missing into one temporary file, which the first renames when all are done. A run that was
    killed leaves that file; the next one of the same key checks its finished rows by their hashes and computes the others only.

    Raises:
        ValueError: an empty part, a row that is not finite (the picture is named), or an encoder of another width.
    """
    if not len(part):
        raise ValueError(f"part {part.name!r} has no pictures to encode")
    facts = {"format": FORMAT, "part": part.fingerprint, "shape": [len(part), width], **key}
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    target = Path(cache_dir).expanduser() / f"embeddings-{name}.npy"
    partial: list[PartialFile] = []  # on the first process, and only where something must be computed
    useless = False
    try:
        begun = first_for_all(lambda: _prepare(target, facts, partial), "encoding")
        if begun is not None:
            shown = description if progress else ""
            everywhere(lambda: _fill(encode, transform, part, begun, width, batch_size, workers, shown), "encoding")
            first_for_all(lambda: _publish(partial[0], target, facts), "encoding")
    except ValueError:  # the data's or the encoder's fault: going on from here would not help
        useless = True
        raise
    finally:
        for file in partial:
            file.close(keep=not useless)
    found: np.memmap[Any, np.dtype[np.float32]] = np.load(target, mmap_mode="r", allow_pickle=False)
    return found


def take_rows(table: np.ndarray, rows: np.ndarray) -> Tensor:
    """Rows (B,) of a table (N, n) as a tensor (B, n) of the same type, in memory of torch's own.

    numpy's memory begins at any multiple of 16 bytes, and matrix products round by where it begins: a resumed run, whose memory
    lies otherwise, could differ from an undisturbed one.
    """
    return torch.from_numpy(np.ascontiguousarray(table[rows])).clone()


def _prepare(target: Path, facts: dict[str, Any], partial: list[PartialFile]) -> Begun | None:
    """None when the cached file is whole; otherwise the file under way, new or left by a killed run, and its finished rows."""
    if _problem(target, facts) is None:
        return None
    count, width = facts["shape"]
    partial.append(PartialFile(target, (count, width)))
    problem = _problem(target, facts)  # once more: another run may have finished it before this one had the lock
    if problem is None:
        return None
    if target.exists():
        logger.warning("the cached file %s is damaged (%s) and is computed anew", target, problem)
    finished = sum(stop - start for start, stop in partial[0].done)
    if finished:
        logger.warning(
            "%s: an interrupted run left %d of %d rows finished; going on from there", partial[0].path, finished, count
        )
    return str(partial[0].path), partial[0].done


def _problem(target: Path, facts: dict[str, Any]) -> str | None:
    sidecar = target.with_suffix(".json")
    if not target.is_file():
        return "not there"
    try:
        note = json.loads(sidecar.read_text(encoding="utf-8"))
        size, digest, noted = note["bytes"], note["sha256"], note["key"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no readable {sidecar.name}: {type(error).__name__}"
    if noted != json.loads(json.dumps(facts)):
        return f"{sidecar.name} describes something else"
    if target.stat().st_size != size:
        return f"{target.stat().st_size} bytes, expected {size}"
    if not hashes_to(target, digest):
        return "its content is not what was written"
    try:
        stored = np.load(target, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        return str(error)
    if stored.shape != tuple(facts["shape"]) or stored.dtype != np.float32:
        return f"it holds {stored.dtype} {stored.shape}, expected float32 {tuple(facts['shape'])}"
    return None


def _fill(
    encode: Callable[[Tensor], Tensor], transform: Transform, part: ImageSplit, begun: Begun, width: int,
    batch_size: int, workers: int, description: str,
) -> None:  # fmt: skip
    """Encode what is not finished of this process's share of the pictures into its rows; no description, no progress."""
    path, done = begun
    missing = np.ones(len(part), dtype=bool)
    for start, stop in done:
        missing[start:stop] = False
    mine = np.array_split(np.flatnonzero(missing), world())[
        rank()
    ]  # of what is missing: fixed ranges would leave processes idle
    if not len(mine):
        return
    writer = RowWriter(Path(path), rank())
    loader = make_loader(part.subset(mine), transform, batch_size, workers=workers)
    for images, _, positions in with_progress(
        loader, f"{description} [{part.name}]", enabled=bool(description) and rank() == 0
    ):
        with torch.no_grad():
            encoded = encode(images).float().cpu()
        indices = mine[positions.numpy()]
        if encoded.shape != (len(indices), width):
            raise ValueError(
                f"the encoder gave {tuple(encoded.shape)} for {len(indices)} pictures, expected width {width}"
            )
        wrong = (~encoded.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if wrong:
            names = ", ".join(part.identifier(int(indices[place])) for place in wrong)
            raise ValueError(f"the encoder's output is not finite for {len(wrong)} pictures: {names}")
        writer.write(indices, encoded.numpy())
    writer.commit()


def _publish(partial: PartialFile, target: Path, facts: dict[str, Any]) -> None:
    """The sidecar first: a kill before the rename leaves a finished partial file, which the next run only needs to rename."""
    path = partial.path
    with open(path, "rb") as written:
        os.fsync(written.fileno())
    if target.is_file() and _problem(target, facts) is None:  # another run was quicker; what it wrote stays
        partial.forget_rows()
        return
    write_json(
        target.with_suffix(".json"), {"bytes": path.stat().st_size, "sha256": sha256_of_file(path), "key": facts}
    )
    partial.rename(target)
