"""The null space of a classifier head (METHOD section 1, paper eq. 1-3), decomposed once or followed while W trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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


Invariance = Literal["logits", "softmax"]


def helmert_contrasts(weight: Tensor) -> Tensor:
    """The C-1 orthonormal contrasts of W's rows: same row space as W minus its mean row, but of full rank.

    Shapes: weight (C, m); returns (C-1, m). Used for the softmax null, where probabilities and not logits stay equal.

    Example:
        >>> helmert_contrasts(torch.ones(3, 5)).abs().max().item() < 1e-6
        True
    """
    row = torch.arange(1, weight.shape[0], device=weight.device, dtype=weight.dtype)[:, None]
    # Running sums, not a (C-1, C) matrix of contrasts: with 21,841 classes that alone would be 4 GB.
    return (weight.cumsum(0)[:-1] - row * weight[1:]) / (row * (row + 1)).sqrt()


def _rows_of(weight: Tensor, invariance: str) -> Tensor:
    if weight.ndim != 2:
        raise ValueError(f"expected a head weight of shape (C, m), got {tuple(weight.shape)}; flatten a 1x1 convolution first")
    if invariance not in ("logits", "softmax"):
        raise ValueError(f'invariance must be "logits" or "softmax", got {invariance!r}')
    if not torch.isfinite(weight.detach()).all():
        raise ValueError(f"the head weight {tuple(weight.shape)} holds NaN or infinity; its null space is undefined")
    return helmert_contrasts(weight) if invariance == "softmax" else weight


def _left_vectors(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal directions (m, k) of the rows (C, m), any rank, and their singular values (k,), largest first; k = min(C, m)."""
    # SVD of the small triangular factor, not of W: the QR does the long side once.
    if len(rows) > rows.shape[1]:
        left, sigma, _ = torch.linalg.svd(torch.linalg.qr(rows).R.T, full_matrices=False)
        return left, sigma
    q, r = torch.linalg.qr(rows.T)
    u, sigma, _ = torch.linalg.svd(r, full_matrices=False)
    return q @ u, sigma


class NullSpace(nn.Module):
    """Row space and null space of a head W, as a thin orthonormal basis Q of the row space (paper eq. 1-3).

    `component(f) = f - Q Qᵀ f` is the null part, `remove(f) = Q Qᵀ f` the logit-equivalent feature of eq. 9. The m x m
    projectors are never formed. The basis is a float64 buffer that moves with `.to(device)` and keeps its precision.

    Attributes:
        basis: (m, r) orthonormal, float64. rank: r. nullity: m - r. singular_values: (min(C, m),) float64, found when asked for.

    Example:
        >>> space = NullSpace.from_weight(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        >>> space.rank, space.nullity, space.component(torch.tensor([1.0, 2.0, 3.0])).tolist()
        (2, 1, [0.0, 0.0, 3.0])
    """

    basis: Tensor
    _sigma: Tensor | None
    _factor: Tensor | None

    def __init__(
        self, basis: Tensor, singular_values: Tensor | None = None, *, invariance: Invariance = "logits", factor: Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("_sigma", singular_values, persistent=False)
        self.register_buffer("_factor", factor, persistent=False)  # L (r, r) of rows = L Qᵀ, which has their singular values
        self.invariance: Invariance = invariance

    @classmethod
    def from_weight(
        cls, weight: Tensor, *, rtol: float | None = None, invariance: Invariance = "logits", allow_empty: bool = False
    ) -> NullSpace:
        """Decompose a head W (C, m) in float64; the rank counts σ_i > rtol · σ_1, so scaling W never changes it.

        Args:
            rtol: relative tolerance, default max(C, m) · eps(float64). "softmax" centres the rows first.
            allow_empty: accept a head without a null space (nullity 0: `component` is then 0 everywhere).

        Raises:
            ValueError: W is not (C, m), not finite, or has no null space and `allow_empty` is False.
        """
        rows = _rows_of(weight.detach().to(torch.float64, copy=True), invariance)
        classes, width = weight.shape
        tolerance = rtol if rtol is not None else max(classes, width) * torch.finfo(torch.float64).eps
        if len(rows) < width and 0 <= tolerance < 1:
            # With a condition number far below 1/tolerance the rank is full, and nobody needs an SVD to count it.
            found = orthonormal_rows(rows, largest_condition=min(LARGEST_CONDITION, 1e-3 / max(tolerance, 1e-300)))
            if found is not None:
                return cls(found[0].T, factor=found[1], invariance=invariance)
            rows = _rows_of(weight.detach().to(torch.float64), invariance)  # they were worked on in place
        left, sigma = _left_vectors(rows)
        rank = int((sigma > tolerance * sigma[:1]).sum()) if sigma.numel() else 0
        if rank == width and not allow_empty:
            raise ValueError(
                f"the head ({classes} classes, {width} features) has full rank {rank}: it has no null space, so there is "
                f"nothing to measure or regularise. Use a model with more features than classes, or a head sliced to fewer "
                f"than {width} classes; allow_empty=True gives the empty null space"
            )
        return cls(left[:, :rank].contiguous(), sigma, invariance=invariance)

    @property
    def singular_values(self) -> Tensor:
        """σ of the head, largest first, (min(C, m),) float64; found on first use: that costs more than the basis, and few need it."""
        if self._sigma is None:
            if self._factor is None:
                raise ValueError("this NullSpace was made from a basis alone; one made by NullSpace.from_weight has singular values")
            self._sigma = torch.linalg.svdvals(self._factor)
        return self._sigma

    def singular_directions(self) -> tuple[Tensor, Tensor]:
        """The row space along the head's right singular vectors, (m, r), and their σ, (r,), largest first. `basis` has no such order."""
        if self._factor is None:
            return self.basis, self.singular_values[: self.rank]
        _, sigma, right = torch.linalg.svd(self._factor)
        return self.basis @ right.T, sigma

    @property
    def rank(self) -> int:
        """Dimension r of the row space."""
        return self.basis.shape[1]

    @property
    def nullity(self) -> int:
        """Dimension m - r of the null space."""
        return self.basis.shape[0] - self.basis.shape[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NullSpace:
        # `.half()` or `.to(dtype)` on a parent must not round the basis: reports promise float64.
        exact = {name: self._buffers[name] for name in ("basis", "_sigma", "_factor")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in exact.items():
            if value is not None:
                self._buffers[name] = value.to(self._buffers[name].device)  # type: ignore[union-attr]
        return self

    def _check(self, features: Tensor) -> Tensor:
        if features.shape[-1] != self.basis.shape[0]:
            raise ValueError(f"expected features (..., {self.basis.shape[0]}) for this head, got {tuple(features.shape)}")
        return features.to(torch.promote_types(features.dtype, torch.float64))

    def remove(self, features: Tensor, *, mean: Tensor | None = None) -> Tensor:
        """The equivalent feature f~ = f - Π_n f (eq. 9); with `mean` the centred removal f - Π_n (f - mean).

        Shapes: features (..., m), mean (m,); returns (..., m) in the dtype of `features`, computed in float64.
        """
        return features - self.component(features if mean is None else features - mean)

    def component(self, features: Tensor) -> Tensor:
        """The null component Π_n f = f - Q Qᵀ f. Shapes: (..., m) to (..., m), dtype kept, computed in float64."""
        exact = self._check(features)
        with torch.autocast(exact.device.type, enabled=False):
            return (exact - (exact @ self.basis) @ self.basis.T).to(features.dtype)

    def split(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(Π_p f, Π_n f): row-space and null parts that sum to f. Shapes: (..., m) to two (..., m)."""
        null = self.component(features)
        return features - null, null

    def null_basis(self) -> Tensor:
        """An orthonormal basis of the null space, shape (m, m - r), float64. Formed only here, for those who ask."""
        complete: Tensor = torch.linalg.qr(self.basis, mode="complete").Q
        return complete[:, self.rank :]

    def extra_repr(self) -> str:
        """Sizes for `print`: m, rank, nullity (no shapes change)."""
        return f"m={self.basis.shape[0]}, rank={self.rank}, nullity={self.nullity}, invariance={self.invariance}"


class _RowSpaceProjection(torch.autograd.Function):
    """y = P f and its exact derivative in closed form: dP = W⁺ dW Π_n + (W⁺ dW Π_n)ᵀ.

    Everything is thin, (B, C) and (B, m): no derivative of a factorisation is ever taken, so it cannot be NaN for equal
    singular values and costs a few products with W. `solve` maps (B, C) right-hand sides to (W Wᵀ)⁻¹ of them.
    """

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
            to_weight = None
            if ctx.needs_input_grad[0]:
                to_weight = gradient_coefficients.T @ null + coefficients.T @ (gradient - projected)
        return to_weight, projected, None


def _least_squares(weight: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Coefficients (B, C) of the projection of x (B, m) on W's rows: normal equations, corrected once for rounding."""
    first = torch.cholesky_solve(weight @ x.T, factor)
    residual = x.T - weight.T @ first
    return (first + torch.cholesky_solve(weight @ residual, factor)).T


def row_space_projection(weight: Tensor, features: Tensor, *, invariance: Invariance = "logits") -> Tensor:
    """Π_p f = Wᵀ (W Wᵀ)⁻¹ W f, differentiable in W and in f, without an m x m matrix (METHOD section 6).

    One C x C Cholesky factor and thin products; the gradient is closed-form. An ill-conditioned head (its cheap lower bound of
    cond(W) above 30 in float32) is factored by a QR of Wᵀ in float64 instead. In a numerically rank-deficient head the singular
    directions that are kept carry the gradient; those of rounding noise, along which the projector has no derivative, carry none.

    Shapes: weight (C, m), features (..., m); returns (..., m) in the dtype of `features` (at least float32).

    Raises:
        ValueError: shapes disagree, or W is not finite.

    Example:
        >>> W = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
        >>> row_space_projection(W, torch.tensor([[1.0, 1.0, 1.0]])).tolist()
        [[1.0, 0.0, 0.0]]
    """
    if features.shape[-1] != weight.shape[-1]:
        raise ValueError(f"features {tuple(features.shape)} do not fit the head weight {tuple(weight.shape)}")
    with torch.autocast(features.device.type, enabled=False):  # in bfloat16 an "equivalent" feature moves the logits
        return _projected(weight, features, invariance)


def _projected(weight: Tensor, features: Tensor, invariance: Invariance) -> Tensor:
    dtype = torch.promote_types(features.dtype, torch.float32)
    rows = _rows_of(weight.to(dtype), invariance)
    flat = features.to(dtype).reshape(-1, features.shape[-1])
    if rows.shape[0] < rows.shape[1]:
        with torch.no_grad():
            factor, failed = torch.linalg.cholesky_ex(rows @ rows.T)
            diagonal = torch.diagonal(factor)
        # max/min of the factor's diagonal is a lower bound of cond(W) that comes free.
        limit = 30.0 if dtype == torch.float32 else 1e6
        if not bool(failed) and bool(diagonal.max() <= limit * diagonal.min()):
            return _project(rows, flat, factor).reshape(features.shape)
    return _project_ill_conditioned(rows, flat).reshape(features.shape)


def _project(rows: Tensor, flat: Tensor, factor: Tensor) -> Tensor:
    projected: Tensor = _RowSpaceProjection.apply(rows, flat, factor)  # type: ignore[no-untyped-call]
    return projected


def _project_ill_conditioned(rows: Tensor, flat: Tensor) -> Tensor:
    """Through a QR of Wᵀ in float64; through the singular directions above the tolerance where its rank is not full."""
    exact, wide = rows.to(torch.float64), flat.to(torch.float64)
    tolerance = max(exact.shape) * torch.finfo(rows.dtype).eps
    with torch.no_grad():
        triangle = torch.linalg.qr(exact.T).R
        sigma = torch.linalg.svdvals(triangle)
        full_rank = exact.shape[0] < exact.shape[1] and bool(sigma[-1] > tolerance * sigma[0])
        # The sign of a QR's diagonal is free; a Cholesky factor's is positive.
        factor = (torch.sign(torch.diagonal(triangle))[:, None] * triangle).T
    if full_rank:
        return _project(exact, wide, factor).to(flat.dtype)
    with torch.no_grad():
        left, sigma, _ = torch.linalg.svd(exact, full_matrices=False)
        rank = int((sigma > tolerance * sigma[:1]).sum())
    if not rank:
        return torch.zeros_like(flat)
    kept = left[:, :rank].T @ exact  # (r, m), of full rank; what is left out of W's rows is rounding noise
    with torch.no_grad():
        factor = torch.diag(sigma[:rank])
    return _project(kept, wide, factor).to(flat.dtype)


def null_share(features: Tensor, null: Tensor) -> Tensor:
    """Share of the feature norm in the null component, |Π_n f| / |f|. Shapes: two (..., m) to (...); in [0, 1]."""
    norm = torch.linalg.vector_norm(features, dim=-1).clamp_min(math.sqrt(torch.finfo(features.dtype).tiny))
    share: Tensor = torch.linalg.vector_norm(null, dim=-1) / norm
    return share


@dataclass(frozen=True)
class RandomSubspace:
    """A uniformly random subspace of feature space, by an orthonormal basis of the thinner of it and its complement.

    basis (m, k), k = min(d, m - d); complement: the basis spans what is kept, so P g = g - B Bᵀ g, else P g = B Bᵀ g.

    Example:
        >>> space = RandomSubspace.draw(5, 4, seed=0)
        >>> tuple(space.basis.shape), space.complement, space.dimension
        ((5, 1), True, 4)
    """

    basis: Tensor
    complement: bool

    @classmethod
    def draw(cls, width: int, dimension: int, *, seed: int | Sequence[int]) -> RandomSubspace:
        """A subspace of `dimension` d of the m = `width` features, the same for the same seed anywhere (float64).

        Raises:
            ValueError: d is not in 1..m.
        """
        if not 1 <= dimension <= width:
            raise ValueError(f"a random subspace of {width} features needs a dimension in 1..{width}, got {dimension}")
        thin = min(dimension, width - dimension)
        # NumPy's generator takes several numbers as a seed; torch's uses the lower 32 bits of one.
        gaussian = torch.from_numpy(np.random.default_rng(seed).standard_normal((width, thin)))
        return cls(torch.linalg.qr(gaussian).Q, complement=dimension > thin)

    @property
    def dimension(self) -> int:
        """d, of the subspace itself."""
        return self.basis.shape[0] - self.basis.shape[1] if self.complement else self.basis.shape[1]

    def to(self, like: Tensor) -> RandomSubspace:
        """On the device and in the dtype of a tensor of any shape (...)."""
        return RandomSubspace(self.basis.to(like), self.complement)

    def component(self, features: Tensor) -> Tensor:
        """P g, the part in the subspace. Shapes: (..., m) to (..., m)."""
        inside = (features @ self.basis) @ self.basis.T
        return features - inside if self.complement else inside


def matched_coefficients(null_share: Tensor, random_share: Tensor) -> tuple[Tensor, Tensor]:
    """(α, β) of the displacement δ = α g + β P g that is as long as Π_n g and at the same angle to g, image by image.

    With s² = |Π_n g|²/|g|² and p² = |P g|²/|g|²: β = √(s²(1-s²) / (p²(1-p²))), α = s² - β p². Then |δ|² = δ·g = s²|g|², as for
    an orthogonal projection that removes exactly the energy the null space removes. Its part across g has the direction of
    P g's, which for a uniformly random subspace is uniform: δ is Π_n g turned about g at random.

    Shapes: s², p² (...) in [0, 1] to two (...). Where P g has no part across g (p² 0 or 1), β = 0 and δ lies along g.

    Example:
        >>> [round(float(x), 3) for x in matched_coefficients(torch.tensor(0.5), torch.tensor(0.2))]
        [0.25, 1.25]
    """
    across = random_share * (1 - random_share)
    usable = across > torch.finfo(across.dtype).eps
    wanted = (null_share * (1 - null_share)).clamp_min(0)
    beta = torch.where(usable, wanted / torch.where(usable, across, torch.ones_like(across)), torch.zeros_like(across)).sqrt()
    return null_share - beta * random_share, beta
