"""Closed-form ridge regression from streamed sufficient statistics (METHOD section 2, paper eq. 4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from singreg.utils import is_distributed

FeatureScale = Callable[[Tensor], Tensor]
"""A symmetric map L of feature space, applied to the columns of (m, k)."""

DEFAULT_RIDGES = tuple(10.0 ** (exponent / 2) for exponent in range(-10, 5))
DEAD = 1e-11  # of the raw second moment of a feature or of all: what rounding leaves of a constant feature or block
ROWS = 512  # images at a time, in float64: what a processor's cache holds


@dataclass(frozen=True)
class RidgeSolution:
    """T(f) = f Aᵀ + a with A (n, m) and a (n,) in float64, its relative ridge, and the images behind it."""

    matrix: Tensor
    offset: Tensor
    ridge: float
    count: int


class RidgeStatistics:
    """The sums ridge regression needs, in float64: one pass over the images, O(m² + mn) memory.

    The penalty is relative, λ = ridge · tr(S)/m with S the centred scatter of f: it means the same at any N and scale.
    `standardize`, a basis (m, r) of a head's row space, divides the row-space and the null part of the features each by
    the root of its energy-weighted variance for the fit (METHOD section 8.6), and folds the scale back into A.

    Attributes:
        ff, fz, f, z, zz, count: Σ f fᵀ (m, m), Σ f zᵀ (m, n), Σ f (m,), Σ z (n,), Σ |z|² and N.

    Example:
        >>> f = torch.randn(100, 4, dtype=torch.float64); A = torch.randn(3, 4, dtype=torch.float64)
        >>> solution = RidgeStatistics(4, 3).update(f, f @ A.T + 1).solve(1e-12)
        >>> torch.allclose(solution.matrix, A), torch.allclose(solution.offset, torch.ones(3, dtype=torch.float64))
        (True, True)
    """

    def __init__(self, feature_dim: int, target_dim: int, *, device: torch.device | str = "cpu") -> None:
        shapes = ((feature_dim, feature_dim), (feature_dim, target_dim), (feature_dim,), (target_dim,), (), ())
        sums = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)
        self.ff, self.fz, self.f, self.z, self.zz, self.count = sums

    def update(self, features: Tensor, targets: Tensor) -> "RidgeStatistics":
        """Add a batch, features (B, m) and targets (B, n)."""
        m, n = self.fz.shape
        if features.shape[1:] != (m,) or targets.shape != (len(features), n):
            got = f"{tuple(features.shape)} and {tuple(targets.shape)}"
            raise ValueError(f"expected features (B, {m}) and targets (B, {n}), got {got}")
        if not all(bool(torch.isfinite(x.detach().sum(dtype=torch.float64))) for x in (features, targets)):
            raise ValueError("features or targets hold NaN or infinity; one such row would spoil the whole fit")
        for rows in zip(torch.split(features.detach(), ROWS), torch.split(targets.detach(), ROWS), strict=True):
            f, z = (x.to(self.ff) for x in rows)
            self.ff.addmm_(f.T, f)
            self.fz.addmm_(f.T, z)
            self.f += f.sum(0)
            self.z += z.sum(0)
            self.zz += (z * z).sum()
        self.count += len(features)
        return self

    def __add__(self, other: "RidgeStatistics") -> "RidgeStatistics":
        """Return the sums over the images of both, of the same shapes."""
        total = RidgeStatistics(*self.fz.shape, device=self.ff.device)
        total.load_state_dict({name: mine + getattr(other, name).to(mine) for name, mine in vars(self).items()})
        return total

    def reduce(self) -> "RidgeStatistics":
        """Sum over all processes, in place; every process must call it."""
        for mine in self.state_dict().values() if is_distributed() else ():
            torch.distributed.all_reduce(mine)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums by name."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over stored sums of the same shapes, bit by bit."""
        for name, mine in self.state_dict().items():
            mine.copy_(state[name])

    def mapped(self, basis: Tensor) -> "RidgeStatistics":
        """Return the statistics of (f B, z) for a map B (m, k), exactly: no image is read again."""
        basis = basis.to(self.ff)
        found = RidgeStatistics(basis.shape[1], self.fz.shape[1], device=self.ff.device)
        found.ff, found.fz, found.f = basis.T @ self.ff @ basis, basis.T @ self.fz, basis.T @ self.f
        found.z, found.zz, found.count = self.z.clone(), self.zz.clone(), self.count.clone()
        return found

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scatter about the means, S_ff (m, m), S_fz (m, n) and S_zz ()."""
        if self.count < 2:
            raise ValueError(f"a translator needs at least 2 images, got {int(self.count)}")
        s_ff = self.ff - torch.outer(self.f, self.f) / self.count
        s_fz = self.fz - torch.outer(self.f, self.z) / self.count
        return s_ff, s_fz, self.zz - (self.z * self.z).sum() / self.count

    def solve(self, ridge: float, *, standardize: Tensor | None = None) -> RidgeSolution:
        """Return the minimiser of Σ|T(f) - z|² + λ|A|², intercept unpenalised, at one relative ridge >= 0.

        A Cholesky solve, an order of magnitude cheaper than the eigendecomposition behind `path`: for a training loop.
        """
        if not ridge >= 0:
            raise ValueError(f"ridge must be >= 0, got {ridge}")
        scaled, loadings, scale = self._scaled(standardize)
        penalty = ridge * torch.diagonal(scaled).mean()
        factor, failed = torch.linalg.cholesky_ex(scaled + penalty * torch.eye(len(scaled)).to(scaled))
        if ridge < 1e-9 or bool(failed):  # a singular scatter may pass by rounding alone; the path has the minimum norm
            return self.path(standardize=standardize).solve(ridge)
        matrix = scale(torch.cholesky_solve(loadings, factor)).T
        return RidgeSolution(matrix, (self.z - matrix @ self.f) / self.count, ridge, int(self.count))

    def path(self, *, standardize: Tensor | None = None) -> "RidgePath":
        """Return the whole regularisation path, from one eigendecomposition of the (standardised) scatter."""
        scaled, loadings, scale = self._scaled(standardize)
        eigenvalues, vectors = torch.linalg.eigh(scaled)
        means, count = (self.f / self.count, self.z / self.count), int(self.count)
        return RidgePath(eigenvalues.clamp_min(0), vectors.T @ loadings, scale(vectors), *means, count)

    def validated(self, held_out: "RidgeStatistics", *, standardize: Tensor | None = None) -> float:
        """Choose the ridge with the best R² on held-out statistics."""
        lost = self.path(standardize=standardize).residuals(held_out, DEFAULT_RIDGES)
        return max(zip(DEFAULT_RIDGES, lost, strict=True), key=lambda each: 1 - each[1])[0]

    def agreed(
        self, other: "RidgeStatistics", *, ridges: Sequence[float] = DEFAULT_RIDGES, standardize: Tensor | None = None
    ) -> tuple[float, float, float]:
        """Choose a ridge by what fits on two disjoint halves have in common: R² on the other half, times their cosine.

        R² alone prefers a ridge so small that low-variance directions are fitted to noise (METHOD section 2). Returned
        with its mean R² on the other half and the cosine <A₁, A₂> / |A₁| |A₂| in the penalty's scale.
        """
        whole = self + other
        scale = whole._scaled(standardize)[2](torch.eye(len(whole.f)).to(whole.f))
        pair = [each.mapped(scale) for each in (self, other)]
        paths = [each.path() for each in pair]
        lost = [path.residuals(held_out, ridges) for path, held_out in zip(paths, pair[::-1], strict=True)]
        cosines = paths[0].cosines(paths[1], ridges)
        columns = zip(ridges, *lost, cosines, strict=True)
        found = [(ridge, 1 - (one + two) / 2, cosine) for ridge, one, two, cosine in columns]
        return max(found, key=lambda each: max(each[1], 0) * max(each[2], 0))

    def _scaled(self, standardize: Tensor | None) -> tuple[Tensor, Tensor, FeatureScale]:
        """(L S_ff L (m, m), L S_fz (m, n), L): the centred scatter in the scale that the penalty acts in."""
        s_ff, s_fz, _ = self.centred()
        scale = _feature_scale(s_ff, self.ff, self.count, standardize)
        scaled = scale(scale(s_ff).T)
        return (scaled + scaled.T) / 2, scale(s_fz), scale


@dataclass(frozen=True)
class RidgePath:
    """V E Vᵀ of the scatter, with loadings Vᵀ S_fz (m, n), ready to give the solution at any ridge."""

    eigenvalues: Tensor
    loadings: Tensor
    vectors: Tensor
    feature_mean: Tensor
    target_mean: Tensor
    count: int

    def solve(self, ridge: float) -> RidgeSolution:
        """Return the solution at one relative ridge >= 0; directions of zero variance get coefficient 0."""
        matrix = (self.vectors @ (self._inverse(ridge)[:, None] * self.loadings)).T
        return RidgeSolution(matrix, self.target_mean - matrix @ self.feature_mean, ridge, self.count)

    def residuals(self, held_out: RidgeStatistics, ridges: Sequence[float]) -> list[float]:
        """Return 1 - R² on held-out statistics, Σ|T(f) - z|² / Σ|z - z̄|², of every ridge's solution."""
        # In the eigenbasis a solution is D L with D diagonal: the sums are a quadratic form in D's diagonal.
        _, _, s_zz = held_out.centred()
        own = self.vectors.T @ held_out.ff @ self.vectors * (self.loadings @ self.loadings.T)
        cross = (self.loadings * (self.vectors.T @ held_out.fz)).sum(1)
        seen, fitted = self.vectors.T @ held_out.f, self.vectors.T @ self.feature_mean
        inverse = torch.stack([self._inverse(ridge) for ridge in ridges])
        offset = self.target_mean - (inverse * fitted) @ self.loadings
        fit = (inverse @ own * inverse).sum(1) + held_out.count * offset.square().sum(1)
        fit = fit + 2 * (offset * ((inverse * seen) @ self.loadings)).sum(1)
        found: list[float] = ((held_out.zz + fit - 2 * (inverse @ cross + offset @ held_out.z)) / s_zz).tolist()
        return found

    def cosines(self, other: "RidgePath", ridges: Sequence[float]) -> list[float]:
        """Return <A₁, A₂> / |A₁| |A₂| of the two paths' solutions at every ridge, without forming one of them."""
        shared = (self.vectors.T @ other.vectors) * (self.loadings @ other.loadings.T)
        mine, its = (torch.stack([path._inverse(ridge) for ridge in ridges]) for path in (self, other))
        squares = (mine.square() @ self.loadings.square().sum(1)) * (its.square() @ other.loadings.square().sum(1))
        length = squares.sqrt().clamp_min(torch.finfo(shared.dtype).tiny)
        found: list[float] = ((mine @ shared * its).sum(1) / length).tolist()
        return found

    def _inverse(self, ridge: float) -> Tensor:
        shifted = self.eigenvalues + ridge * self.eigenvalues.mean()
        floor = len(shifted) * torch.finfo(shifted.dtype).eps * shifted.max()
        return torch.where(shifted > floor, 1 / shifted.clamp_min(floor), 0)


def _feature_scale(scatter: Tensor, raw: Tensor, count: Tensor, basis: Tensor | None) -> FeatureScale:
    """Π_p f and Π_n f each by the root of tr(S²)/tr(S); a constant block, or feature without a basis, to 0."""
    if basis is None:
        alive = torch.diagonal(scatter) > DEAD * torch.diagonal(raw)
        return lambda columns: torch.where(alive[:, None], columns, 0)
    basis = basis.to(scatter)
    across = scatter @ basis
    # Π_n S Π_n itself, not a difference of sums of squares, in which a block shrunk to a thousandth would drown.
    half = scatter - basis @ across.T
    null = half - (half @ basis) @ basis.T
    least = DEAD * torch.diagonal(raw).sum()

    def inverse_deviation(block: Tensor) -> Tensor:
        # a mean weighted by variance: a plain one, of null directions most almost empty, would be far too small
        energy = torch.diagonal(block).sum()
        return (energy * count / block.square().sum()).sqrt() if bool(energy > least) else torch.zeros_like(energy)

    row_scale = inverse_deviation(basis.T @ across)
    null_scale = inverse_deviation(null) if basis.shape[1] < len(basis) else torch.zeros_like(row_scale)
    # Thin: L = n I + (p - n) Q Qᵀ, never an m x m matrix.
    return lambda columns: null_scale * columns + (row_scale - null_scale) * (basis @ (basis.T @ columns))
