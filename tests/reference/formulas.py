"""The slow, obvious formulas of METHOD.md in float64: the oracles that the fast code is held against."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def null_projector(weight: Tensor, rtol: float | None = None) -> Tensor:
    """Π_n as an (m, m) matrix from the full SVD (paper eq. 2)."""
    w = weight.detach().double()
    _, sigma, vh = torch.linalg.svd(w, full_matrices=True)
    tolerance = rtol if rtol is not None else max(w.shape) * torch.finfo(torch.float64).eps
    rank = int((sigma > tolerance * sigma[0]).sum())
    null = vh[rank:]
    return null.T @ null


def angle_degrees(x: Tensor, y: Tensor) -> Tensor:
    """arccos of the cosine, in degrees: fine away from 0 and 180."""
    return torch.rad2deg(
        torch.arccos(torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1).clamp(-1, 1))
    )


def ridge(f: np.ndarray, z: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """(A, a) by the normal equations on centred data, with λ = ridge · tr(S)/m."""
    fc, zc = f - f.mean(0), z - z.mean(0)
    scatter = fc.T @ fc
    penalty = ridge * np.trace(scatter) / f.shape[1]
    matrix = np.linalg.solve(scatter + penalty * np.eye(f.shape[1]), fc.T @ zc).T
    return matrix, z.mean(0) - matrix @ f.mean(0)


def projection(weight: Tensor, features: Tensor) -> Tensor:
    """Π_p f through the pseudo-inverse; differentiable in both."""
    return features @ (torch.linalg.pinv(weight) @ weight)


def between_class_share(features: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Between-class over total scatter of the centred null components, with the class means of these very rows."""
    null = features - features.mean(0)
    null = null - null @ torch.linalg.pinv(weight) @ weight
    means = torch.stack([null[labels == y].mean(0) for y in labels.tolist()])
    return means.square().sum() / null.square().sum()


def sing_terms(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    matrix: Tensor,
    offset: Tensor,
    texts: Tensor,
    mean: Tensor,
    class_means: Tensor,
    reference: Tensor,
    confusable: int,
    random_targets: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every SingLoss term image by image in plain loops (METHOD section 6); steer to the texts and random targets."""
    project = torch.linalg.pinv(weight) @ weight
    text = texts / texts.norm(dim=1, keepdim=True)
    rows = []

    def shared(null: Tensor, anchor: Tensor) -> Tensor:
        return 2 * null @ anchor - anchor @ anchor

    for f, y in zip(features, labels.tolist(), strict=True):
        centred = f - mean
        null = centred - centred @ project
        z, shift, total = matrix @ f + offset, matrix @ null, matrix @ centred
        near = sorted((j for j in range(len(text)) if j != y), key=lambda j: -float(text[y] @ text[j]))[:confusable]
        basis = torch.linalg.qr(torch.stack([text[y] - text[j] for j in near], dim=1).detach()).Q
        unit = z / z.norm()

        def energy(v: Tensor, unit: Tensor = unit, basis: Tensor = basis) -> Tensor:
            return (basis.T @ (v - unit * (v @ unit))).square().sum()

        z_eq = z - shift
        cosine = torch.nn.functional.cosine_similarity
        to_text, eq_to_text, image = (
            torch.rad2deg(torch.arccos(cosine(a, b, dim=0))) for a, b in ((z, text[y]), (z_eq, text[y]), (z, z_eq))
        )
        anchor = class_means[y] - mean
        rows.append(
            (
                energy(shift),
                energy(total).detach(),
                torch.relu(eq_to_text - to_text) / reference[y],
                torch.relu(0.9 - image / reference[y]) ** 2 + torch.relu(image / reference[y] - 1.5) ** 2,
                shared(null, (anchor - anchor @ project).detach()),
                null @ null,
                centred @ centred,
                (eq_to_text - to_text).abs() / reference[y],
            )
        )
    prompts = text @ matrix
    columns = [torch.stack(column).mean() for column in zip(*rows, strict=True)]
    return {
        "leak": columns[0] / columns[1],
        "hinge": columns[2],
        "attribute": columns[7],
        "band": columns[3],
        "class_share": columns[4] / columns[5],
        "capacity": (prompts - prompts @ project).square().sum() / prompts.square().sum(),
        "null_energy": columns[5] / columns[6].detach(),
        "null_share": columns[5] / columns[6],
        **weight_terms(weight, [matrix], text if random_targets is None else torch.cat([text, random_targets])),
    }


def weight_terms(weight: Tensor, matrices: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
    """The terms of W alone: M = A Π_n Aᵀ, the centred W's singular values, cosines of pairs of rows."""
    null = torch.eye(weight.shape[1], dtype=weight.dtype) - torch.linalg.pinv(weight) @ weight
    cosine = torch.nn.functional.cosine_similarity
    moved = [cosine(a @ null @ a.T @ t, t, dim=0).square() for a in matrices for t in targets]
    rank = min(len(weight) - 1, weight.shape[1])
    sigma = torch.linalg.svdvals(weight - weight.mean(0))[:rank]
    pairs = [
        cosine(weight[i], weight[j], dim=0).square() for i in range(len(weight)) for j in range(len(weight)) if i != j
    ]
    return {
        "steer": torch.stack(moved).mean(),
        "head": torch.relu(0.3 - sigma.min() / sigma.max()).square() / 0.3**2,
        "orthogonal": torch.stack(pairs).mean(),
    }


def degrees(x: Tensor, y: Tensor) -> float:
    """The angle between two vectors by their parallelogram, right at 0 and 180."""
    x, y = x.double() / x.double().norm(), y.double() / y.double().norm()
    return math.degrees(2 * math.atan2(float((x - y).norm()), float((x + y).norm())))


def translations(
    features: Tensor, weight: Tensor, matrix: Tensor, offset: Tensor, mean: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(T f, T f~) of every image through the (m, m) null projector of a full SVD."""
    null = null_projector(weight)
    mu = torch.zeros(features.shape[1], dtype=torch.float64) if mean is None else mean.double()
    pairs = []
    for f in features.double():
        equivalent = f - null @ (f - mu)
        pairs.append((matrix.double() @ f + offset.double(), matrix.double() @ equivalent + offset.double()))
    return pairs


def concept_angles(pairs: list[tuple[Tensor, Tensor]], texts: Tensor) -> tuple[Tensor, Tensor]:
    """Angles before and after, (N, K) each."""
    before = [[degrees(z, text) for text in texts] for z, _ in pairs]
    after = [[degrees(z_eq, text) for text in texts] for _, z_eq in pairs]
    return torch.tensor(before, dtype=torch.float64), torch.tensor(after, dtype=torch.float64)
