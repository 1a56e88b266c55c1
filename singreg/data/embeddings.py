"""The embedding cache: a fixed encoder's output for every picture of a part, computed once, memory-mapped ever after."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from singreg.data.loading import make_loader
from singreg.data.parts import ImagePart
from singreg.data.views import Transform
from singreg.distributed import is_distributed
from singreg.files import sha256_of_file, write_json
from singreg.progress import progress as with_progress

logger = logging.getLogger(__name__)

FORMAT = 1


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
    vlm: ImageEncoder, part: ImagePart, cache_dir: str | Path, *, batch_size: int = 64, workers: int = 0,
    progress: bool = True,
) -> np.memmap[Any, np.dtype[np.float32]]:  # fmt: skip
    """Raw image embeddings z (N, n) of a part, float32, row i for picture i, read-only and memory-mapped.

    The cache key is the weights, the preprocessing, the part's content and the format: another file path, batch size or
    number of processes finds the same file, anything that changes an embedding does not.

    Raises:
        ValueError: an embedding that is not finite, or a picture that cannot be read; both name it.
    """
    key = {"weights": vlm.weights_hash, "preprocessing": vlm.preprocessing}
    return encode_part(
        vlm.embed_images, vlm.transform, part, vlm.dim, cache_dir, key=key,
        batch_size=batch_size, workers=workers, progress=progress,
    )  # fmt: skip


def encode_part(
    encode: Callable[[Tensor], Tensor], transform: Transform, part: ImagePart, width: int, cache_dir: str | Path, *,
    key: Mapping[str, Any], batch_size: int = 64, workers: int = 0, progress: bool = True, description: str = "embedding",
) -> np.memmap[Any, np.dtype[np.float32]]:  # fmt: skip
    """Any encoder's output (N, width) for a part, from the cache or computed; `key` must name all that determines it.

    In a process group every process must call it, with the same arguments and a cache folder they all see: each encodes
    its own contiguous share of the pictures into one temporary file, which the first renames when all are done.

    Raises:
        ValueError: an empty part, a row that is not finite (the picture is named), or an encoder of another width.
    """
    if not len(part):
        raise ValueError(f"part {part.name!r} has no pictures to encode")
    facts = {"format": FORMAT, "part": part.fingerprint, "shape": [len(part), width], **key}
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    target = Path(cache_dir).expanduser() / f"embeddings-{name}.npy"
    temporary = _together(lambda: _prepare(target, facts))
    if temporary is not None:
        try:
            _everywhere(lambda: _fill(encode, transform, part, temporary, width, batch_size, workers, description if progress else ""))
            _together(lambda: _publish(temporary, target, facts))
        finally:
            if _rank() == 0:
                Path(temporary).unlink(missing_ok=True)
    found: np.memmap[Any, np.dtype[np.float32]] = np.load(target, mmap_mode="r")
    return found


def _prepare(target: Path, facts: dict[str, Any]) -> str | None:
    """None when the cached file is whole; otherwise the name of a new, empty temporary file of the right size."""
    problem = _problem(target, facts)
    if problem is None:
        return None
    if target.exists():
        logger.warning("the cached file %s is damaged (%s) and is computed anew", target, problem)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=".npy", dir=target.parent)
    os.close(handle)
    np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=tuple(facts["shape"])).flush()
    return temporary


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
    if sha256_of_file(target) != digest:
        return "its content is not what was written"
    return None


def _fill(
    encode: Callable[[Tensor], Tensor], transform: Transform, part: ImagePart, temporary: str, width: int,
    batch_size: int, workers: int, description: str,
) -> None:  # fmt: skip
    """Encode this process's share of the pictures into its rows of the temporary file; no description, no progress."""
    start, stop = (len(part) * place // _world() for place in (_rank(), _rank() + 1))
    if start == stop:
        return
    rows = np.lib.format.open_memmap(temporary, mode="r+")
    loader = make_loader(part.subset(np.arange(start, stop)), transform, batch_size, workers=workers)
    for images, _, indices in with_progress(loader, f"{description} [{part.name}]", enabled=bool(description) and _rank() == 0):
        with torch.no_grad():
            encoded = encode(images).float().cpu()
        if encoded.shape != (len(indices), width):
            raise ValueError(f"the encoder gave {tuple(encoded.shape)} for {len(indices)} pictures, expected width {width}")
        wrong = (~encoded.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if wrong:
            names = ", ".join(part.identifier(start + int(indices[place])) for place in wrong)
            raise ValueError(f"the encoder's output is not finite for {len(wrong)} pictures: {names}")
        rows[start + indices.numpy()] = encoded.numpy()
    rows.flush()


def _publish(temporary: str, target: Path, facts: dict[str, Any]) -> None:
    path = Path(temporary)
    with open(path, "rb") as written:
        os.fsync(written.fileno())
    note = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path), "key": facts}
    path.chmod(0o644)
    os.replace(path, target)
    write_json(target.with_suffix(".json"), note)


def _rank() -> int:
    return torch.distributed.get_rank() if is_distributed() else 0


def _world() -> int:
    return torch.distributed.get_world_size() if is_distributed() else 1


def _together(work: Callable[[], str | None]) -> str | None:
    """Run on the first process only and give its result to all; its failure becomes a failure of all."""
    result: list[str | None] = [None]

    def first_only() -> None:
        if _rank() == 0:
            result[0] = work()

    _everywhere(first_only)
    if is_distributed():
        torch.distributed.broadcast_object_list(result, src=0)
    return result[0]


def _everywhere(work: Callable[[], None]) -> None:
    """Run on every process and wait for all; one that fails raises its own error, the others say which one did."""
    failure: Exception | None = None
    try:
        work()
    except Exception as error:  # handed on below, once the others know: they would wait for ever otherwise
        failure = error
    texts: list[str | None] = [None] * _world()
    if is_distributed():
        torch.distributed.all_gather_object(texts, None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    failed = [f"process {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
    if failed:
        raise RuntimeError(f"encoding failed elsewhere: {'; '.join(failed)}")
