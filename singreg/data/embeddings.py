"""The embedding cache: a fixed encoder's output for every image of a split, computed once and memory-mapped."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from singreg.data.splits import ImageSplit, Transform, make_loader
from singreg.models.vlm import VisionLanguageModel
from singreg.utils import atomic_write, cache_folder, progress, rank_and_world, sha256_of_json, together

ABANDONED_SECONDS = 24 * 3600
BLOCK = 2**16  # images of a large split that are kept as soon as they are encoded: a killed run loses no more


@dataclass(frozen=True)
class PassSettings:
    """How images are read in a pass that trains nothing; `cache` is a folder that keeps features, or None."""

    batch_size: int = 64
    workers: int = 0
    progress: bool = True
    cache: str | None = None


def cached_embeddings(
    vlm: VisionLanguageModel, split: ImageSplit, *, batch_size: int = 64, workers: int = 0, progress: bool = True
) -> np.memmap[Any, Any]:
    """Return raw image embeddings z (N, n) of a split, float32, row i for image i, read-only and memory-mapped.

    They are found again in `utils.cache_folder()` by weights, preprocessing and the split's content.
    """
    key = {"weights": vlm.weights_hash, "preprocessing": vlm.preprocessing}
    settings = PassSettings(batch_size, workers, progress)
    return encode_split(vlm.embed_images, vlm.transform, split, vlm.dim, key, "embedding", settings)


def encode_split(
    encode: Callable[[Tensor], Tensor],
    transform: Transform,
    split: ImageSplit,
    width: int,
    key: Mapping[str, Any],
    description: str,
    settings: PassSettings,
) -> np.memmap[Any, Any]:
    """Return any encoder's output (N, width) for a split, from the cache or computed; `key` names all it depends on.

    In a process group every process must call it. Each encodes whole batches, the same as a single process would.
    """
    if not len(split):
        raise ValueError(f"split {split.name!r} has no images to encode")
    shape, batch_size = (len(split), width), settings.batch_size
    facts = {"format": 1, "part": split.fingerprint, "shape": shape, **key}
    target = Path(settings.cache or cache_folder()) / f"embeddings-{sha256_of_json(facts)[:32]}.npy"
    if len(split) > BLOCK and together(lambda: _load(target, shape) is None, description, first_only=True):
        blocks = [np.arange(start, min(start + BLOCK, len(split))) for start in range(0, len(split), BLOCK)]
        rest: tuple[Any, ...] = width, key, description, settings
        parts = [encode_split(encode, transform, split.subset(rows), *rest) for rows in blocks]
        together(partial(_join, target, shape, parts), description, first_only=True)

    def begin() -> Path | None:
        if _load(target, shape) is not None:
            return None
        for left in target.parent.glob(".embeddings-*-writing-*"):  # by killed runs
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink(missing_ok=True)
        return _emptied(stack.enter_context(atomic_write(target)), shape)

    def fill(path: Path) -> None:
        """Encode this process's share of the batches into its rows of the file."""
        rank, world = rank_and_world()
        batches = np.array_split(np.arange(0, len(split), batch_size), world)[rank]
        if not len(batches):
            return
        start, stop = int(batches[0]), min(int(batches[-1]) + batch_size, len(split))
        loader = make_loader(split.subset(np.arange(start, stop)), transform, batch_size, workers=settings.workers)
        with open(path, "r+b") as file:  # not through a memory map, which a full disk would kill without a word
            file.seek(np.load(path, mmap_mode="r").offset + 4 * width * start)
            bar = progress(loader, f"{description} [{split.name}]", enabled=settings.progress and rank == 0)
            for images, _, places in bar:
                with torch.no_grad():
                    rows = encode(images).float().cpu()
                wrong = (start + places[~rows.isfinite().all(dim=1)]).tolist()
                if wrong:
                    names = ", ".join(split.identifier(place) for place in wrong)
                    raise ValueError(f"the encoder's output is not finite for {len(wrong)} images: {names}")
                file.write(rows.numpy().tobytes())

    with ExitStack() as stack:  # a failure removes the file
        unfinished = together(begin, description, first_only=True)
        if unfinished is not None:
            together(lambda: fill(unfinished), description)
            together(stack.close, description)  # which renames the file on the first process
    found = _load(target, shape)
    if found is None:
        raise OSError(f"{target} is not what was just written there; does every process see this folder?")
    return found


def take_rows(table: np.ndarray, rows: np.ndarray) -> Tensor:
    """Return rows (B,) of a table (N, n) as a tensor (B, n) in memory of torch's own.

    Products round by where memory begins, so a resumed run could differ otherwise.
    """
    return torch.from_numpy(np.ascontiguousarray(table[rows])).clone()


def _emptied(path: Path, shape: tuple[int, int]) -> Path:
    """Make a file of rows that are still to be written."""
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape).flush()
    return path


def _join(target: Path, shape: tuple[int, int], parts: list[np.memmap[Any, Any]]) -> None:
    """Write the rows of some cached files one after the other as one, and remove those."""
    with atomic_write(target) as temporary:
        start = np.load(_emptied(temporary, shape), mmap_mode="r").offset
        with open(temporary, "r+b") as file:
            file.seek(start)
            for part in parts:
                file.write(part.tobytes())
    for part in parts:
        Path(str(part.filename)).unlink(missing_ok=True)


def _load(target: Path, shape: tuple[int, int]) -> np.memmap[Any, Any] | None:
    """The cached rows, or None where there are none of this shape."""
    try:
        return np.load(target, mmap_mode="r", allow_pickle=False).reshape(shape)
    except (OSError, ValueError, EOFError):
        return None
