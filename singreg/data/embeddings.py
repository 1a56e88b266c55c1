"""The embedding cache: a fixed encoder's output for every image of a split, computed once and memory-mapped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from singreg.data.splits import ImageSplit, Transform, make_loader
from singreg.utils import atomic_write, cache_folder, progress, rank_and_world, sha256_of_json, together

if TYPE_CHECKING:
    from singreg.models.vlm import VisionLanguageModel

ABANDONED_SECONDS = 24 * 3600


@dataclass(frozen=True)
class PassSettings:
    """How images are read in a pass that trains nothing; `cache` is a folder that keeps features, or None."""

    batch_size: int = 64
    workers: int = 0
    progress: bool = True
    cache: str | None = None


def cached_embeddings(
    vlm: VisionLanguageModel, split: ImageSplit, *, batch_size: int = 64, workers: int = 0, progress: bool = True
) -> np.ndarray:
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
) -> np.ndarray:
    """Return any encoder's output (N, width) for a split, from the cache or computed; `key` names all it depends on.

    In a process group every process must call it. Each encodes whole batches, the same as a single process would.
    """
    if not len(split):
        raise ValueError(f"split {split.name!r} has no images to encode")
    shape, batch_size = (len(split), width), settings.batch_size
    facts = {"format": 1, "part": split.fingerprint, "shape": shape, **key}
    target = Path(settings.cache or cache_folder()) / f"embeddings-{sha256_of_json(facts)[:32]}.npy"

    def begin() -> Path | None:
        if _load(target, shape) is not None:
            return None
        for left in target.parent.glob(".embeddings-*-writing-*"):  # by killed runs
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink(missing_ok=True)
        temporary = stack.enter_context(atomic_write(target))
        np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape).flush()
        return temporary

    def fill(path: Path) -> None:
        """Encode this process's share of the batches into its rows of the file."""
        rank, world = rank_and_world()
        batches = np.array_split(np.arange(0, len(split), batch_size), world)[rank]
        if not len(batches):
            return
        start, stop = int(batches[0]), min(int(batches[-1]) + batch_size, len(split))
        loader = make_loader(split.subset(np.arange(start, stop)), transform, batch_size, workers=settings.workers)
        offset = np.load(path, mmap_mode="r").offset
        with open(path, "r+b") as file:  # not through a memory map, which a full disk would kill without a word
            file.seek(offset + 4 * width * start)
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


def _load(target: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The cached rows, or None where there are none of this shape."""
    try:
        return np.load(target, mmap_mode="r", allow_pickle=False).reshape(shape)
    except (OSError, ValueError, EOFError):
        return None
