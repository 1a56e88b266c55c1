"""A head's null space by `NullSpace.from_weight` against the full SVD of the reference formula: time, and the angle between them.

OMP_NUM_THREADS=1 python tests/benchmarks/head_decomposition.py

Both in float64 from a float32 head. Aim: at least 10 times faster at 1000 x 2048, principal angle at most 1e-6. The angle is
taken by its sine, |P - Q Qᵀ P| with P the SVD's row space and Q ours: an arccos would see nothing below 1e-8. The singular
values, which the null space itself does not need, are timed besides, with the decomposition.
"""

from __future__ import annotations

import argparse

import torch
from paired import machine, pairs, ratio_line
from torch import Tensor

from singreg.nullspace import NullSpace


def full_svd(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(row space (m, r), null space (m, m - r)) from the right singular vectors of W (C, m): the reference formula."""
    _, sigma, right = torch.linalg.svd(weight.double(), full_matrices=True)
    rank = int((sigma > max(weight.shape) * torch.finfo(torch.float64).eps * sigma[0]).sum())
    return right[:rank].T, right[rank:].T


def measure(classes: int, width: int, count: int) -> None:
    """Print ratio and angle for one size."""
    weight = torch.randn(classes, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    size = f"{classes} x {width}"
    row, null = full_svd(weight)
    basis = NullSpace.from_weight(weight).basis
    sine = float(torch.linalg.matrix_norm(row - basis @ (basis.T @ row), ord=2))
    leak = float((null.T @ basis).abs().max())
    times = pairs(lambda: full_svd(weight), lambda: NullSpace.from_weight(weight), count)
    with_sigma = pairs(
        lambda: full_svd(weight), lambda: NullSpace.from_weight(weight).singular_values, max(1, count // 2), warm=False
    )
    print(ratio_line(f"{size}: full SVD / ours, clock", times.wall))
    print(ratio_line(f"{size}: full SVD / ours, processor seconds", times.work))
    print(ratio_line(f"{size}: full SVD / ours with the singular values, processor seconds", with_sigma.work))
    print(f"{size}: largest principal angle {sine:.2e} rad; largest |null vectorᵀ basis| {leak:.2e}", flush=True)


def main() -> None:
    """Both sizes, or the one asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1000x2048", "1000x4096"], help="CxM ...")
    parser.add_argument("--pairs", type=int, default=7)
    arguments = parser.parse_args()
    print(f"head decomposition; {machine()}")
    for size in arguments.sizes:
        classes, width = (int(part) for part in size.split("x"))
        measure(classes, width, arguments.pairs)


if __name__ == "__main__":
    main()
