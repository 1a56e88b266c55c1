"""The null space of a classifier head (METHOD section 1, paper eq. 1-3), decomposed once or followed while W trains."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Invariance = Literal["logits", "softmax"]
"""What removing the null component keeps: the logits, or only the probabilities (one null dimension more)."""

LARGEST_RATIO = {torch.float32: 30.0, torch.float64: 1e6}  # of a Cholesky factor's diagonal, a lower bound of cond(W)
SAFE = 1e7  # |R| |R⁻¹|, an upper bound of cond(W): below it nobody needs an SVD, five times slower, to count the rank


def helmert_contrasts(weight: Tensor) -> Tensor:
    """Return orthonormal contrasts (C-1, m) of W's rows: the row space of W minus its mean row, but of full rank."""
    row = torch.arange(1, weight.shape[0], device=weight.device, dtype=weight.dtype)[:, None]
    # Running sums, not a (C-1, C) matrix of contrasts: with 21,841 classes that alone would be 4 GB.
    return (weight.cumsum(0)[:-1] - row * weight[1:]) / (row * (row + 1)).sqrt()


def _rows_of(weight: Tensor, invariance: str) -> Tensor:
    """The rows whose null space it is: W, or its contrasts."""
    if weight.ndim != 2:
        raise ValueError(f"expected a head weight (C, m), got {tuple(weight.shape)}; flatten a 1x1 convolution first")
    if invariance not in ("logits", "softmax"):
        raise ValueError(f'invariance must be "logits" or "softmax", got {invariance!r}')
    if not torch.isfinite(weight.detach()).all():
        raise ValueError(f"the head weight {tuple(weight.shape)} holds NaN or infinity; its null space is undefined")
    return helmert_contrasts(weight) if invariance == "softmax" else weight


class NullSpace(nn.Module):
    """The row space and null space of a head W, as a thin orthonormal basis Q of the row space (paper eq. 1-3).

    `component(f) = f - Q Qᵀ f` is the null part, `remove(f) = Q Qᵀ f` the logit-equivalent feature of eq. 9. The m x m
    projectors are never formed. The basis moves with `.to(device)`, keeps its precision and is not saved.

    Args:
        basis: Q (m, r), float64.
        factor: L (r, r) of W = L Qᵀ, which has W's singular values; or these themselves (k,).

    Example:
        >>> space = NullSpace.from_weight(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        >>> space.rank, space.nullity, space.component(torch.tensor([1.0, 2.0, 3.0])).tolist()
        (2, 1, [0.0, 0.0, 3.0])
    """

    basis: Tensor
    _factor: Tensor

    def __init__(self, basis: Tensor, factor: Tensor, *, invariance: Invariance = "logits") -> None:
        super().__init__()
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("_factor", factor, persistent=False)
        self.invariance: Invariance = invariance

    @classmethod
    def from_weight(
        cls, weight: Tensor, *, invariance: Invariance = "logits", allow_empty: bool = False
    ) -> "NullSpace":
        """Decompose a head W (C, m) in float64; the rank counts σ_i > max(C, m) · eps · σ_1, whatever W's scale.

        Args:
            invariance: "softmax" takes W without its mean row.
            allow_empty: accept a head without a null space (nullity 0: `component` is then 0 everywhere).
        """
        rows = _rows_of(weight.detach().to(torch.float64), invariance)
        classes, width = weight.shape
        if 0 < len(rows) < width:
            basis, triangle = torch.linalg.qr(rows.T)
            inverse = torch.linalg.solve_triangular(triangle, torch.eye(len(rows)).to(triangle), upper=True)
            if torch.linalg.matrix_norm(triangle) * torch.linalg.matrix_norm(inverse) <= SAFE:  # False for NaN
                return cls(basis, triangle.T, invariance=invariance)
        rows = torch.linalg.qr(rows).R if classes > width else rows  # the long side once
        left, sigma, _ = torch.linalg.svd(rows.T, full_matrices=False)
        rank = int((sigma > max(classes, width) * torch.finfo(torch.float64).eps * sigma[:1]).sum())
        if rank == width and not allow_empty:
            wrong = f"the head ({classes} classes, {width} features) has full rank, so it has no null space"
            raise ValueError(f"{wrong}; take more features than classes, slice the head, or pass allow_empty=True")
        return cls(left[:, :rank].contiguous(), sigma, invariance=invariance)

    @property
    def singular_values(self) -> Tensor:
        """σ of the head, largest first; computed when asked: that costs more than the basis, and few need it."""
        return self._factor if self._factor.ndim == 1 else torch.linalg.svdvals(self._factor)

    @property
    def rank(self) -> int:
        """Dimension r of the row space."""
        return self.basis.shape[1]

    @property
    def nullity(self) -> int:
        """Dimension m - r of the null space."""
        return self.basis.shape[0] - self.basis.shape[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NullSpace":
        # `.half()` or `.to(dtype)` on a parent must not round the basis: reports promise float64.
        exact = (self.basis, self._factor)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.basis, self._factor = (value.to(self.basis.device) for value in exact)
        return self

    def component(self, features: Tensor) -> Tensor:
        """Return the null component Π_n f = f - Q Qᵀ f, by float64. Shape: (..., m) to (..., m), dtype kept."""
        if features.shape[-1] != len(self.basis):
            raise ValueError(f"expected features (..., {self.basis.shape[0]}), got {tuple(features.shape)}")
        exact = features.to(torch.float64)
        with torch.autocast(exact.device.type, enabled=False):
            return (exact - (exact @ self.basis) @ self.basis.T).to(features.dtype)

    def remove(self, features: Tensor, *, mean: Tensor | None = None) -> Tensor:
        """Return the equivalent feature f~ = f - Π_n f (eq. 9); with `mean` the centred f - Π_n (f - mean)."""
        return features - self.component(features if mean is None else features - mean)

    def null_basis(self) -> Tensor:
        """Return an orthonormal basis of the null space, (m, m - r), float64; formed only here, for those who ask."""
        complete: Tensor = torch.linalg.qr(self.basis, mode="complete").Q
        return complete[:, self.rank :]


class _RowSpaceProjection(torch.autograd.Function):
    """y = P f, and its derivative dP = W⁺ dW Π_n + (W⁺ dW Π_n)ᵀ; factor: the Cholesky factor of W Wᵀ."""

    # No derivative of a factorisation is ever taken, so it cannot be NaN for equal singular values, and all is thin.
    @staticmethod
    def forward(ctx: Any, weight: Tensor, features: Tensor, factor: Tensor) -> Tensor:
        coefficients = _least_squares(weight, features, factor)
        projected = coefficients @ weight
        ctx.save_for_backward(weight, factor, coefficients, features - projected)
        return projected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, factor, coefficients, null = ctx.saved_tensors
        gradient = gradients[0]
        with torch.autocast(weight.device.type, enabled=False):  # for those who call backward inside one
            gradient_coefficients = _least_squares(weight, gradient, factor)
            projected = gradient_coefficients @ weight
            to_weight = gradient_coefficients.T @ null + coefficients.T @ (gradient - projected)
        return to_weight, projected, None


def _least_squares(weight: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Coefficients (B, C) of the projection of x (B, m) on W's rows: normal equations, corrected once for rounding."""
    first = torch.cholesky_solve(weight @ x.T, factor)
    residual = x.T - weight.T @ first
    return (first + torch.cholesky_solve(weight @ residual, factor)).T


def row_space_projection(weight: Tensor, features: Tensor, *, invariance: Invariance = "logits") -> Tensor:
    """Return Π_p f = Wᵀ (W Wᵀ)⁻¹ W f, differentiable in W and in f, without an m x m matrix (METHOD section 6).

    Exact for a well-conditioned head by one Cholesky factor, in at least float32 even inside autocast; for any other by
    float64. Singular directions of a rank-deficient head that are rounding noise carry no gradient.

    Shape: weight (C, m), features (..., m); returns (..., m).

    Example:
        >>> W = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
        >>> row_space_projection(W, torch.tensor([[1.0, 1.0, 1.0]])).tolist()
        [[1.0, 0.0, 0.0]]
    """
    if features.shape[-1] != weight.shape[-1]:
        raise ValueError(f"features {tuple(features.shape)} do not fit the head weight {tuple(weight.shape)}")
    dtype = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):  # in bfloat16 an "equivalent" feature moves the logits
        rows, flat = _rows_of(weight.to(dtype), invariance), features.to(dtype).reshape(-1, features.shape[-1])
        if len(rows) < rows.shape[1]:
            with torch.no_grad():
                factor, failed = torch.linalg.cholesky_ex(rows @ rows.T)
                diagonal = torch.diagonal(factor)
            if not bool(failed) and bool(diagonal.max() <= LARGEST_RATIO[dtype] * diagonal.min()):
                projected: Tensor = _RowSpaceProjection.apply(rows, flat, factor)
                return projected.reshape(features.shape)
        return _ill_conditioned(rows, flat).reshape(features.shape)


def _ill_conditioned(rows: Tensor, flat: Tensor) -> Tensor:
    """Through a QR of Wᵀ in float64; through the singular directions above the tolerance where the rank is not full."""
    exact, wide = rows.to(torch.float64), flat.to(torch.float64)
    fixed, tolerance = exact.detach(), max(exact.shape) * torch.finfo(rows.dtype).eps
    triangle = torch.linalg.qr(fixed.T).R
    sigma = torch.linalg.svdvals(triangle)
    if len(exact) < exact.shape[1] and bool(sigma[-1] > tolerance * sigma[0]):
        # the sign of a QR's diagonal is free; a Cholesky factor's is positive
        factor = (torch.sign(torch.diagonal(triangle))[:, None] * triangle).T
    else:
        left, sigma, _ = torch.linalg.svd(fixed, full_matrices=False)
        kept = sigma > tolerance * sigma[:1]
        # (r, m), of full rank; what is left out of W's rows is rounding noise
        exact, factor = left[:, kept].T @ exact, torch.diag(sigma[kept])
    projected: Tensor = _RowSpaceProjection.apply(exact, wide, factor) if len(exact) else torch.zeros_like(wide)
    return projected.to(flat.dtype)


def null_share(features: Tensor, null: Tensor) -> Tensor:
    """Return the share of the feature norm in the null component, |Π_n f| / |f|. Shape: two (..., m) to (...)."""
    norm = torch.linalg.vector_norm(features, dim=-1).clamp_min(math.sqrt(torch.finfo(features.dtype).tiny))
    return torch.linalg.vector_norm(null, dim=-1) / norm
