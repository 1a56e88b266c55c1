"""The slow, obvious formulas of METHOD.md in float64: the oracles that the fast code is held against."""

import math

import numpy as np
import torch
from torch import Tensor


def null_projector(weight: Tensor) -> Tensor:
    """Π_n as an (m, m) matrix from the full SVD (paper eq. 2)."""
    _, sigma, vh = torch.linalg.svd(weight.detach().double(), full_matrices=True)
    rank = int((sigma > max(weight.shape) * torch.finfo(torch.float64).eps * sigma[0]).sum())
    return vh[rank:].T @ vh[rank:]


def angle_degrees(x: Tensor, y: Tensor) -> Tensor:
    """arccos of the cosine, in degrees: fine away from 0 and 180."""
    return torch.cosine_similarity(x.double(), y.double(), dim=-1).clamp(-1, 1).arccos().rad2deg()


def scores(z: Tensor, z_eq: Tensor, text: Tensor) -> dict[str, Tensor]:
    """AS and IS in degrees, and κ (METHOD section 8.2)."""
    before, after, image = (angle_degrees(x, y) for x, y in ((z, text), (z_eq, text), (z, z_eq)))
    a, b, c = (torch.deg2rad(angle) for angle in (before, after, image))
    return {"AS": before - after, "IS": image, "kappa": (b.cos() - a.cos() * c.cos()) / (a.sin() * c.sin())}


def ridge(f: np.ndarray, z: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """(A, a) by the normal equations on centred data, with λ = ridge · tr(S)/m."""
    fc, zc = f - f.mean(0), z - z.mean(0)
    scatter = fc.T @ fc
    penalty = ridge * np.trace(scatter) / f.shape[1]
    matrix = np.linalg.solve(scatter + penalty * np.eye(f.shape[1]), fc.T @ zc).T
    return matrix, z.mean(0) - matrix @ f.mean(0)


def held_out_r2(fit: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], size: float) -> float:
    """R² on other images of a fit."""
    (matrix, offset), (f, z) = ridge(*fit, size), other
    return float(1 - ((f @ matrix.T + offset - z) ** 2).sum() / ((z - z.mean(0)) ** 2).sum())


def block_scale(f: np.ndarray, weight: Tensor) -> np.ndarray:
    """The map (m, m) that divides row-space and null block each by the root of its energy-weighted variance."""
    null, scatter = null_projector(weight).numpy(), np.cov(f.T, bias=True)
    blocks = [(p, p @ scatter @ p) for p in (np.eye(len(null)) - null, null)]
    return np.asarray(sum(p / np.sqrt(np.trace(s @ s) / np.trace(s)) for p, s in blocks))


def agreement(halves: list[tuple[np.ndarray, np.ndarray]], scale: np.ndarray, size: float) -> tuple[float, float]:
    """Mean R² of each half's ridge fit on the other, and the cosine of the two, both of features f · scale."""
    pair = [(f @ scale, z) for f, z in halves]
    scores = [held_out_r2(pair[place], pair[1 - place], size) for place in (0, 1)]
    one, other = (ridge(f, z, size)[0].ravel() for f, z in pair)
    return float(np.mean(scores)), float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def projection(weight: Tensor, features: Tensor) -> Tensor:
    """Π_p f through the pseudo-inverse; differentiable in both."""
    return features @ (torch.linalg.pinv(weight) @ weight)


def capacity(weight: Tensor, matrix: Tensor, texts: Tensor, bank: Tensor, floor: float) -> Tensor:
    """tr(P M Pᵀ) / tr(A_t M A_tᵀ) with M written out from the bank's features (N, m) (METHOD section 10.2)."""
    width = bank.shape[1]
    covariance = torch.cov(bank.T, correction=0)
    metric = covariance + floor * torch.trace(covariance) / width * torch.eye(width).to(bank)
    null = torch.eye(width).to(bank) - torch.linalg.pinv(weight) @ weight
    above = [t @ matrix @ null @ metric @ null @ matrix.T @ t for t in texts]
    below = [t @ matrix @ metric @ matrix.T @ t for t in texts]
    return torch.stack(above).sum() / torch.stack(below).sum()


def readout(
    *, features: Tensor, embeddings: Tensor, weight: Tensor, texts: Tensor, bank: Tensor, bank_z: Tensor, fitted: Tensor
) -> Tensor:
    """1 - R² of a ridge regression of contrast scores on the row space, image by image (METHOD section 10.1).

    `fitted` is the head (C, m) at the time of the fit to the bank's features (N, m) and embeddings (N, n).
    """
    centred = texts - texts.mean(0)
    span = torch.linalg.svd(centred, full_matrices=False)[2][: len(texts) - 1]
    rows = torch.linalg.qr(fitted.T).Q.T
    x, s = (bank - bank.mean(0)) @ rows.T, (bank_z - bank_z.mean(0)) @ span.T
    gram = x.T @ x
    penalty = 1e-3 * torch.trace(gram) / len(gram) * torch.eye(len(gram)).to(gram)
    coefficients = torch.linalg.inv(gram + penalty) @ x.T @ s
    project = torch.linalg.pinv(weight) @ weight
    missed, spread = [], []
    for f, z in zip(features, embeddings, strict=True):
        seen = span @ (z - bank_z.mean(0))
        read = coefficients.T @ (rows @ (project @ (f - bank.mean(0))))
        missed.append((seen - read).square().sum())
        spread.append(seen.square().sum())
    return torch.stack(missed).sum() / torch.stack(spread).sum()


def degrees(x: Tensor, y: Tensor) -> float:
    """The angle between two vectors by their parallelogram, right at 0 and 180."""
    x, y = x.double() / x.double().norm(), y.double() / y.double().norm()
    return math.degrees(2 * math.atan2(float((x - y).norm()), float((x + y).norm())))


def translations(features: Tensor, weight: Tensor, matrix: Tensor, offset: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(T f, T f~) of every image through the (m, m) null projector of a full SVD."""
    null, matrix, offset = null_projector(weight), matrix.double(), offset.double()
    return [(matrix @ f + offset, matrix @ (f - null @ f) + offset) for f in features.double()]


def concept_angles(pairs: list[tuple[Tensor, Tensor]], texts: Tensor) -> tuple[Tensor, Tensor]:
    """Angles before and after, (N, K) each."""
    before = [[degrees(z, text) for text in texts] for z, _ in pairs]
    after = [[degrees(z_eq, text) for text in texts] for _, z_eq in pairs]
    return torch.tensor(before, dtype=torch.float64), torch.tensor(after, dtype=torch.float64)


def audited(
    f: Tensor,
    z: Tensor,
    label: int,
    target: int,
    translators: list[tuple[Tensor, Tensor]],
    texts: Tensor,
    weight: Tensor,
    bank: Tensor,
    bank_z: Tensor,
) -> dict[str, float]:
    """The cross-fitted columns of one image; translators: the halves', the whole, the predictors of f and Π_p f."""
    null, mean = null_projector(weight), bank.mean(0)
    one, other, whole, full, rows = translators

    def apply(pair: tuple[Tensor, Tensor], feature: Tensor) -> Tensor:
        return pair[0] @ feature + pair[1]

    def without(v: Tensor, directions: Tensor) -> Tensor:
        return v - torch.linalg.pinv(directions) @ (directions @ v)

    contrasts, common = texts - texts.mean(0), texts.mean(0)[None]
    seen, seen_eq = apply(whole, f), apply(whole, f - null @ f)
    before, after, text = (without(v, common) for v in (seen, seen_eq, texts[label]))
    errors = {"spread": z - bank_z.mean(0), "missed": z - apply(full, f), "missed by rows": z - apply(rows, f)}
    found = {name: float((v - without(v, contrasts)).square().sum()) for name, v in errors.items()}
    found |= {f"harmless {n}": float(without(errors[n], texts).square().sum()) for n in ("spread", "missed")}
    for name, part in (("scores", f - mean), ("null scores", null @ (f - mean))):
        found[name] = sum(float((t @ one[0] @ part) * (t @ other[0] @ part)) for t in texts)
    found["contrast AS_abs"] = abs(degrees(before, text) - degrees(after, text))
    found["orthogonal IS"] = degrees(without(seen, texts), without(seen_eq, texts))
    covariance = torch.cov(bank.T, correction=0)
    for attacked, judge in ((one, other), (other, one)):
        for budget, step in crafted(f, texts[target], attacked, null, covariance).items():
            for kind, reader in (("self", attacked), ("cross", judge)):
                angles = [degrees(apply(reader, f + step), t) for t in texts]
                hit = 0.5 * (angles.index(min(angles)) == target)
                found[f"{kind} {budget}"] = found.get(f"{kind} {budget}", 0.0) + hit
    return found


def crafted(
    f: Tensor, text: Tensor, translator: tuple[Tensor, Tensor], null: Tensor, covariance: Tensor
) -> dict[str, Tensor]:
    """Null steps of every budget towards a text: the Mahalanobis ones, and those of a long ascent in a ball."""

    def gradient(step: Tensor) -> Tensor:
        leaf = (f + step).requires_grad_()
        torch.cosine_similarity(translator[0] @ leaf + translator[1], text, dim=0).backward()  # type: ignore[no-untyped-call]
        return null @ leaf.grad

    g = gradient(torch.zeros_like(f))
    direction = null @ covariance @ null @ g
    found = {f"{k} sd": k * direction / (g @ direction).sqrt() for k in (1, 2, 4)}
    for share in (0.1, 0.25):
        limit, step = share * f.norm(), torch.zeros_like(f)
        for turn in range(300):
            slope = gradient(step)
            step = step + 0.3 * 0.98**turn * limit * slope / slope.norm()
            step = step * (limit / step.norm()).clamp_max(1)
        found[f"{share:.0%} of |f|"] = step
    return found
