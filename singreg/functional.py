"""Angles in degrees and the SING scores built on them (METHOD section 3, paper eq. 5-8)."""

import torch
from torch import Tensor

DEGREES = 180.0 / torch.pi
NEAR = {torch.float32: 0.8, torch.float64: 1 - 1e-12}  # |cos| from which the arccos of a rounded cosine is not trusted
REFINED_AT_ONCE = 4096  # pairs


def unit_rows(x: Tensor) -> Tensor:
    """Divide every row by its length; 0, with a zero gradient, where it is 0. Shape: (..., n) to (..., n).

    In float32 at least: in bfloat16 a small angle would be wrong by as much as it is.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm == 0, torch.inf, norm)


def angle(x: Tensor, y: Tensor) -> Tensor:
    """Return the angle between x and y in degrees, `2 atan2(|x̂ - ŷ|, |x̂ + ŷ|)`; 90 where one of them is 0.

    It is right to 1e-5 degrees at 0 and 180, where arccos of a clamped cosine is not, and has finite gradients there.

    Shape: x, y (..., n), broadcast over the leading axes; returns (...).

    Example:
        >>> angle(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])).item()
        90.0
    """
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"angle: the last axes must agree, got x {tuple(x.shape)} and y {tuple(y.shape)}")
    x, y = unit_rows(x), unit_rows(y)
    # the gradient of this norm at 0 is 0, not NaN
    apart, together = (torch.linalg.vector_norm(each, dim=-1) for each in (x - y, x + y))
    return 2 * DEGREES * torch.atan2(apart, together)


def attribute_score(z: Tensor, z_eq: Tensor, text: Tensor) -> Tensor:
    """Return the attribute score AS = angle(z, t) - angle(z_eq, t) in degrees (paper eq. 7).

    Positive: the null component was nuisance. Negative: removing it took class meaning away (leakage).

    Shape: translated features before and after the removal, z and z_eq (..., n), text (..., n); returns (...).

    Example:
        >>> attribute_score(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])).item()
        90.0
    """
    return angle(z, text) - angle(z_eq, text)


def image_score(z: Tensor, z_eq: Tensor) -> Tensor:
    """Return the image score IS = angle(z, z_eq) in degrees: how far the removal moved the meaning (paper eq. 8)."""
    return angle(z, z_eq)


def kappa(z: Tensor, z_eq: Tensor, text: Tensor) -> Tensor:
    """Return κ = (cos θ' - cos θ cos IS) / (sin θ sin IS), in [-1, 1] and 0 at chance (METHOD section 8.2).

    θ, θ' are the angles to the text before and after. κ is the cosine between the direction of travel on the sphere and
    the direction to the text: it tells meaning from mere displacement, which |AS| cannot. 0 where nothing moved.

    Example:
        >>> z, z_eq, t = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0])
        >>> round(kappa(z, z_eq, t).item(), 4)
        1.0
    """
    z, z_eq, text = unit_rows(z), unit_rows(z_eq), unit_rows(text)
    # Tangents at z towards z_eq and towards the text: the same ratio without the cancellation of the cosine form.
    travel = z_eq - z * (z * z_eq).sum(-1, keepdim=True)
    target = text - z * (z * text).sum(-1, keepdim=True)
    return (unit_rows(travel) * unit_rows(target)).sum(-1).clamp(-1, 1)


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels (B,) but whole numbers in 0..classes - 1; a GPU is not made to wait, its indexing asserts that."""
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"expected labels (B,) as whole numbers, none mixed, got {labels.dtype} {tuple(labels.shape)}")
    if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must be in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")


@torch.no_grad()
def pairwise_angles(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return (angles in degrees, cosines), (B, K) each, between unit (or zero) rows x (B, n) and y (K, n).

    One matrix product, whose arccos is off by up to 2e-5/sin θ degrees in float32. Where |cos| is near 1 (`NEAR`) the
    pair is computed anew as `angle` does it, in float64: all are right to 5e-5 degrees, of float64 rows to 1e-7.
    """
    cosines = (x @ y.T).clamp_(-1, 1)
    angles = torch.acos(cosines).mul_(DEGREES)
    for pairs in torch.split((cosines.abs() > NEAR[cosines.dtype]).nonzero(), REFINED_AT_ONCE):
        rows, columns = pairs.unbind(1)
        angles[rows, columns] = angle(x[rows].double(), y[columns].double()).to(angles)
    return angles, cosines
