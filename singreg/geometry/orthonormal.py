"""An orthonormal basis of a well-conditioned head's rows from matrix products alone, checked; others are left to QR and SVD."""

from __future__ import annotations

import torch
from torch import Tensor

LEAF = 64  # rows made orthonormal at once; anything from 32 to 128 costs the same
LARGEST_CONDITION = 1e5  # a bound on |W|_F |W⁻¹|_F; two passes are exact up to about 1e7
LARGEST_DEPARTURE = 1e-12  # |Q Qᵀ - I|_F after one pass; a second pass brings any other to rounding
PROBES = 2


def orthonormal_rows(rows: Tensor, *, largest_condition: float = LARGEST_CONDITION) -> tuple[Tensor, Tensor] | None:
    """Q (C, m) with orthonormal rows and a lower triangular L (C, C) such that W = L Q; None where W is not safely of full rank.

    `rows` (C, m), C <= m, float64, is overwritten: Q may be the same memory. Halving makes nearly all the work matrix products, an
    order of magnitude faster than an SVD at 1000 x 2048. Its error grows with the square of the condition number, so that is
    bounded and |Q Qᵀ - I| is measured, both on random vectors: the chance that either is missed by a factor of t is about 1/t²,
    and the bound is far from where it would matter. The singular values of W are those of L.

    Raises:
        ValueError: rows that are not a float64 matrix with C <= m.

    Example:
        >>> W = torch.tensor([[3.0, 0.0, 0.0], [4.0, 5.0, 0.0]], dtype=torch.float64)
        >>> Q, L = orthonormal_rows(W.clone())
        >>> torch.allclose(L @ Q, W), torch.allclose(Q @ Q.T, torch.eye(2, dtype=torch.float64)), orthonormal_rows(W[[0, 0]])
        (True, True, None)
    """
    if rows.ndim != 2 or rows.shape[0] > rows.shape[1] or rows.dtype != torch.float64:
        raise ValueError(f"expected float64 rows (C, m) with C <= m, got {rows.dtype} {tuple(rows.shape)}")
    factor = rows.new_zeros(len(rows), len(rows))
    if not len(rows) or not _orthonormalize_(rows, factor):
        return None
    probes = torch.randn(PROBES, len(rows), dtype=rows.dtype, generator=torch.Generator().manual_seed(0)).to(rows.device)
    solved = torch.linalg.solve_triangular(factor, probes.T, upper=False)
    condition = float(torch.linalg.vector_norm(factor) * torch.linalg.vector_norm(solved, dim=0).max())
    if not condition <= largest_condition:
        return None
    if _departure(rows, probes) <= LARGEST_DEPARTURE:
        return rows, factor
    second = torch.zeros_like(factor)
    if not _orthonormalize_(rows, second) or not _departure(rows, probes) <= LARGEST_DEPARTURE:
        return None
    return rows, factor @ second


def _orthonormalize_(rows: Tensor, factor: Tensor) -> bool:
    """Overwrite rows (C, m) by Q and fill L (C, C), halving down to leaves; False where a leaf's Gram matrix is not definite."""
    if len(rows) <= LEAF:
        triangle, failed = torch.linalg.cholesky_ex(rows @ rows.T)
        if bool(failed):
            return False
        factor.copy_(triangle)
        inverse = torch.linalg.solve_triangular(triangle, torch.eye(len(rows)).to(triangle), upper=False)
        rows.copy_(inverse @ rows)
        return True
    half = (len(rows) + 1) // 2
    first, rest = rows[:half], rows[half:]
    if not _orthonormalize_(first, factor[:half, :half]):
        return False
    overlap = rest @ first.T
    factor[half:, :half] = overlap
    rest.addmm_(overlap, first, alpha=-1)
    return _orthonormalize_(rest, factor[half:, half:])


def _departure(rows: Tensor, probes: Tensor) -> float:
    """An estimate of |Q Qᵀ - I|_F on random vectors, probes (k, C): one is right within a factor of three nearly always."""
    return float(torch.linalg.vector_norm((probes @ rows) @ rows.T - probes, dim=1).max())
