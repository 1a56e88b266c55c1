"""Sums over processes that are the identity in a single one, and seeds by process. No gradient passes: `loss_terms._ratio_of_means`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def is_distributed() -> bool:
    """True inside an initialised process group of more than one process (no shapes involved)."""
    return (
        torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    )


@torch.no_grad()
def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum over processes, any shape (...) to the same; detached; every process must call it."""
    value = value.detach().clone()
    if is_distributed():
        torch.distributed.all_reduce(value)
    return value


@torch.no_grad()
def all_reduce_max(value: Tensor) -> Tensor:
    """Largest over processes, any shape (...) to the same, element by element; detached; every process must call it."""
    value = value.detach().clone()
    if is_distributed():
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return value


@torch.no_grad()
def all_reduce_mean(values: Tensor) -> Tensor:
    """Mean over all images of all processes, weighted by their counts; values (B,) to (), detached."""
    total = torch.stack([values.detach().sum(), values.new_tensor(float(values.numel()))])
    total = all_reduce_sum(total)
    return total[0] / total[1]


@torch.no_grad()
def broadcast_from_first(values: Sequence[Tensor]) -> None:
    """Overwrite tensors of any shapes, in place, with the first process's: work done by all alike may round differently."""
    if is_distributed():
        for value in values:
            torch.distributed.broadcast(value, src=0)


def seed_process(seed: int, rank: int, step: int = 0) -> None:
    """Seed torch's and CUDA's random numbers from all three, so that no two processes draw the same dropout masks (no shapes)."""
    torch.manual_seed(int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0]))


def gather_rows(batches: list[dict[str, np.ndarray]], *, sort_by: str | None = None) -> dict[str, np.ndarray]:
    """Concatenate named columns (B, ...) over batches and processes, in the order of one column; the same on every process.

    A process without batches passes an empty list. Each row appears once: nothing is padded.
    """
    mine = {name: np.concatenate([batch[name] for batch in batches]) for name in (batches[0] if batches else {})}
    shares = [mine]
    if is_distributed():
        shares = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(shares, mine)
    filled = [share for share in shares if share]
    if not filled:
        raise ValueError("no process has any row to gather")
    rows = {name: np.concatenate([share[name] for share in filled]) for name in filled[0]}
    if sort_by is not None:
        order = np.argsort(rows[sort_by], kind="stable")
        rows = {name: values[order] for name, values in rows.items()}
    return rows
