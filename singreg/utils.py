"""Files written whole or not at all, content hashes, progress, and sums and rows over processes."""

import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 15.0
TEMPORARY = re.compile(r"\..*-writing-[a-z0-9_]{8}(\.[^.]+)?")  # the names that atomic_write takes


def cache_folder() -> Path:
    """Return the folder of embeddings and features that all runs reuse: $SINGREG_CACHE, else ~/.cache/singreg."""
    try:
        return Path(os.environ.get("SINGREG_CACHE") or "~/.cache/singreg").expanduser()
    except RuntimeError as error:
        raise ValueError("there is no home directory to keep embeddings in; set SINGREG_CACHE to a folder") from error


def usable_cores() -> int:
    """Return how many cores this process may run on, fewer than the machine has inside a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it is flushed to disk and renamed onto `path`.

    An exception (full disk, Ctrl-C) removes the temporary file and leaves what was there before untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-writing-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)  # mkstemp's private mode is not what a shared run folder wants
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: str | Path) -> None:
    """Remove the temporary files and folders that a killed process left anywhere below a folder."""
    for path in [path for path in Path(folder).rglob(".*") if TEMPORARY.fullmatch(path.name)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write text to a path as UTF-8, whole or not at all; bytes of file names that are not UTF-8 are escaped."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented, strict JSON, whole or not at all; NaN and infinity become null."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], notes: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all; that format wants plain memory which nothing shares."""
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(own, temporary, notes)


def plain(value: Any) -> Any:
    """Return a value as JSON has it: arrays and numpy scalars as lists and numbers, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (Tensor, np.ndarray)):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def sha256_of_tensor(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's shape and float32 values, whatever its device and memory layout."""
    values = tensor.detach().to(device="cpu", dtype=torch.float32)
    return hashlib.sha256(str(tuple(values.shape)).encode() + values.numpy().tobytes()).hexdigest()


def sha256_of_json(value: Any) -> str:
    """Return the SHA-256 of a JSON-able value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def progress(
    items: Iterable[Item], description: str, *, enabled: bool = True, told: Mapping[str, str] | None = None, **bar: Any
) -> Iterator[Item]:
    """Yield the items with tqdm's bar and `told` beside it; where there is no terminal, with a line now and then."""
    terminal = sys.stderr.isatty()
    every = 0.1 if terminal else SECONDS_BETWEEN_LINES  # a log shows nothing of what takes less
    bar |= {"mininterval": every, "maxinterval": max(10, every), "delay": 0 if terminal else every}
    bar |= {"leave": False, "bar_format": None if terminal else "{l_bar}{r_bar}\n"}
    with tqdm(items, description, disable=not enabled, **bar) as shown:
        for item in shown:
            shown.set_postfix(told, refresh=False)
            yield item


def is_distributed() -> bool:
    """Return True inside a process group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_and_world() -> tuple[int, int]:
    """Return this process's number and how many there are; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def together(work: Callable[[], Item], what: str, *, first_only: bool = False) -> Item:
    """Run `work` on every process, or on the first for all, and wait; a failure on one reaches all, so none hangs."""
    rank, world = rank_and_world()
    results: list[Any] = [None]
    failure: Exception | None = None
    if rank == 0 or not first_only:
        try:
            results = [work()]
        except Exception as error:  # raised below, once the others know
            failure = error
    texts: list[str | None] = [None] * world
    if world > 1:
        dist.all_gather_object(texts, None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if failed := [f"process {place}: {text}" for place, text in enumerate(texts) if text]:
        raise ValueError(f"{what} failed elsewhere: {'; '.join(failed)}")
    if first_only and world > 1:
        dist.broadcast_object_list(results, src=0)
    return results[0]


@torch.no_grad()
def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum a tensor over processes, detached. Every process must call it. Shape: any, kept."""
    value = value.detach().clone()
    if is_distributed():
        dist.all_reduce(value)
    return value


@torch.no_grad()
def all_reduce_mean(values: Tensor) -> Tensor:
    """Average over all images of all processes, weighted by their counts. Shape: (B,) to (), detached."""
    total = all_reduce_sum(torch.stack([values.detach().sum(), values.new_full((), float(values.numel()))]))
    return total[0] / total[1]


def seed_process(seed: int, rank: int, step: int = 0) -> None:
    """Seed torch's random numbers from all three, so that no two processes draw the same dropout masks."""
    torch.manual_seed(int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0]))


def gather_rows(batches: Sequence[Mapping[str, np.ndarray]], *, sort_by: str | None = None) -> dict[str, np.ndarray]:
    """Concatenate named numeric columns (B, ...) over batches and processes, in the order of the column `sort_by`."""
    mine = {name: np.concatenate([batch[name] for batch in batches]) for name in (batches[0] if batches else {})}
    if is_distributed():
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, list(mine))
        for name in next(filter(None, found), []):  # one at a time, so that a process holds the copies of one column
            dist.all_gather_object(found, mine.get(name))
            mine[name] = np.concatenate([part for part in found if part is not None])
    if not mine:
        raise ValueError("no process has any row to gather")
    order = slice(None) if sort_by is None else np.argsort(mine[sort_by], kind="stable")
    return {name: values[order] for name, values in mine.items()}
