"""Edits of a trained head: aligned with the prompts, without its null space, averaged weights (METHOD section 7)."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from singreg.models.classifier import Classifier
from singreg.models.heads import HeadError, batch_norm_and_linear
from singreg.nullspace import Invariance, NullSpace
from singreg.ridge import RidgeStatistics
from singreg.translator import LinearTranslator

RIDGE = 1e-3  # of the mean feature variance: with fewer images than features the rest of the space has none
FLOOR = 1e-3  # of σ_1: a row direction below it would be lost when the head is stored in float32 or bfloat16


def prompt_directions(translator: LinearTranslator, texts: Tensor) -> Tensor:
    """Return an orthonormal basis (r, m) of the translated prompts Aᵀ t_k, texts (k, n), each of unit length first."""
    exact = texts.detach().to(torch.float64)
    rows = exact @ translator.matrix.to(exact)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if not bool((norms > 0).all() and torch.isfinite(norms).all()):
        raise ValueError("a translated prompt A^T t is zero or not finite; look at the translator's fit")
    return _orthonormal(rows / norms)


def aligned_weight(weight: Tensor, directions: Tensor, covariance: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return W' = B·D + R nearest to W in logits whose row space holds D, min E‖(W - W')(f - μ)‖², and W μ - W' μ.

    B is a least-squares fit in the metric of the features; R keeps the leading directions, by energy in the logits, of
    what B·D leaves, as many as leave the rank as it was. In that metric the two are orthogonal: the minimum is exact.
    The second tensor, added to the bias, lets the mean logits stay. Both are float64.

    Shape: W (C, m), orthonormal rows D (k, m), covariance about μ (m, m), mean μ (m,); both about 0 without a bias.
    """
    old = weight.detach().to(torch.float64)
    s, d = covariance.detach().to(old), directions.detach().to(old)
    if len(d) > len(old) or not torch.trace(s) > 0:
        got = f"a head of {len(old)} rows cannot hold {len(d)} independent directions, or the features do not vary"
        raise ValueError(f"{got}; give fewer prompts, or at least 2 different images")
    fitted, rows = _fit(old, d, (s + s.T) / 2, max(0, NullSpace.from_weight(old, allow_empty=True).rank - len(d)))
    new = _with_floor(fitted, rows)
    return new, (old - new) @ mean.detach().to(old)


def align_head_(
    classifier: Classifier, translator: LinearTranslator, texts: Tensor, statistics: RidgeStatistics
) -> None:
    """Write the aligned head (`aligned_weight`) into the classifier, in place; its features stay as they are.

    Args:
        classifier: its head is written to; one without a bias keeps none.
        texts: prompts of the classes, (k, n).
        statistics: of the features of at least two images, best of the head's own classes, whose logits are kept.

    Example:
        >>> c = Classifier.from_timm("test_resnet", pretrained=False, num_classes=4)
        >>> f = torch.rand(200, 96); T = LinearTranslator(torch.randn(6, 96), torch.zeros(6))
        >>> texts = torch.randn(4, 6); align_head_(c, T, texts, RidgeStatistics(96, 6).update(f, T(f)))
        >>> bool(NullSpace.from_weight(c.weight).component(texts @ T.matrix).norm() < 1e-3)
        True
    """
    head, fixed = classifier.head, f"the head of {classifier.tag} cannot be written: it is"
    if batch_norm_and_linear(head) is not None or parametrize.is_parametrized(head):
        raise HeadError(f"{fixed} parametrised, or a batch norm and a linear layer")
    weight, bias, count = head.get_parameter("weight"), classifier.bias, statistics.count
    covariance = statistics.ff if bias is None else statistics.centred()[0]
    mean = torch.zeros_like(statistics.f) if bias is None else statistics.f / count
    directions = prompt_directions(translator, texts)
    aligned, shift = aligned_weight(classifier.weight, directions, covariance / count.clamp_min(1), mean)
    with torch.no_grad():
        weight.copy_(aligned.reshape(weight.shape))
        if bias is not None:
            bias += shift.to(bias)


def _orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal basis (r, m) of the span of rows (k, m), dependent ones left out."""
    return NullSpace.from_weight(rows, allow_empty=True).basis.T


def _fit(old: Tensor, d: Tensor, covariance: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """(B·D + R (C, m), orthonormal rows of D and of R (r, m)), in the metric S + λ I."""
    width = len(covariance)
    metric = covariance + RIDGE * torch.trace(covariance) / width * torch.eye(width).to(covariance)
    energy, axes = torch.linalg.eigh(metric)
    # Not a Cholesky factor: with few images the metric is nearly singular.
    root = axes * energy.clamp_min(0).sqrt()
    target, fixed = old @ root, d @ root
    coefficients = target @ torch.linalg.pinv(fixed)
    rest = old - coefficients @ d
    left, sigma, _ = torch.linalg.svd(rest @ root, full_matrices=False)
    tolerance = max(old.shape) * torch.finfo(old.dtype).eps * torch.linalg.matrix_norm(target, 2)
    left = left[:, : min(room, int((sigma > tolerance).sum()))]
    free = left.T @ rest
    rows = torch.cat([d, _orthonormal(free - (free @ d.T) @ d)]) if len(free) else d
    return coefficients @ d + left @ free, rows


def _with_floor(fitted: Tensor, rows: Tensor) -> Tensor:
    """The same head with singular values of at least FLOOR · σ_1 on all of `rows`; a direction would drop out below."""
    # A head whose rows sum to zero has rank C - 1 and its fit too: else one of C prompts would stay outside its rows.
    left, sigma, right = torch.linalg.svd(fitted @ rows.T, full_matrices=False)
    low = sigma < FLOOR * sigma[0]
    return (left * torch.where(low, FLOOR * sigma[0], sigma)) @ right @ rows if bool(low.any()) else fitted


class NullDroppedClassifier(Classifier):
    """What `drop_null` returns: a classifier with one more linear layer m → r than timm's architecture has."""

    def save(self, folder: str | Path) -> None:
        raise ValueError(f"{self.tag} has one layer more than timm builds; save what it was made from instead")


def drop_null(classifier: Classifier, *, spare: int = 0, invariance: Invariance = "logits") -> NullDroppedClassifier:
    """Return the trivial defence: features f → Qᵀf (r,), the head W → W Q, with identical logits and no null space.

    Q (m, r) is the orthonormal basis of W's row space. Steering in feature space becomes impossible; nothing changes in
    pixels. The given classifier stays as it is; a batch norm is folded in.

    Args:
        spare: features that are always 0 are added, so that what measures a null space finds an empty one.
        invariance: with "softmax" its larger null space goes; all logits of an image may then move by one number.

    Example:
        >>> classifier = Classifier.from_timm("test_resnet", pretrained=False, num_classes=10)
        >>> dropped = drop_null(classifier)
        >>> classifier.feature_dim, dropped.feature_dim, dropped.head_name
        (96, 10, 'fc.1')
    """
    weight, bias = classifier.weight.detach(), classifier.bias
    basis = nn.functional.pad(NullSpace.from_weight(weight, invariance=invariance).basis, (0, spare))
    (classes, width), rank = weight.shape, basis.shape[1]
    layer: Any = partial(nn.Conv2d, kernel_size=1) if isinstance(classifier.head, nn.Conv2d) else nn.Linear
    down, up = layer(width, rank, bias=False), layer(rank, classes, bias=bias is not None)
    edited = nn.Sequential(down, up).to(weight)
    edited.requires_grad_(any(each.requires_grad for each in classifier.head.parameters()))
    with torch.no_grad():
        down.weight.copy_(basis.T.reshape(down.weight.shape))
        up.weight.copy_((weight.to(basis) @ basis).reshape(up.weight.shape))
        if bias is not None:
            up.bias.copy_(bias)
    model = copy.deepcopy(classifier.model)
    model.set_submodule(classifier.head_name, edited)
    facts: Any = {"tag": f"{classifier.tag}.null_dropped", "data_config": classifier.data_config}
    dropped = NullDroppedClassifier(model, f"{classifier.head_name}.1", **facts)
    for name in ("own_transform", "class_names"):
        setattr(dropped, name, getattr(classifier, name))
    return dropped


def interpolate_weights(before: Classifier, after: Classifier, alpha: float) -> Classifier:
    """Return (1 - α) · before + α · after of parameters and float buffers (WiSE-FT): a new classifier, in eval mode.

    Integer buffers are those of `after`; at α = 0 and 1 every tensor is bit-identical to `before` and `after`.

    Example:
        >>> a, b = (Classifier.from_timm("test_resnet", pretrained=False, num_classes=3) for _ in range(2))
        >>> bool(((a.weight + b.weight) / 2 - interpolate_weights(a, b, 0.5).weight).abs().max() < 1e-6)
        True
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], from 0 (before) to 1 (after), got {alpha}")
    old, new = before.model.state_dict(), after.model.state_dict()
    shapes = [{name: tuple(value.shape) for name, value in state.items()} for state in (old, new)]
    wrong = [name for name in sorted({*old, *new}) if shapes[0].get(name) != shapes[1].get(name)]
    if before.class_names and after.class_names and before.class_names != after.class_names:
        wrong.append("their classes")
    if wrong:
        names = f"{before.tag} and {after.tag} cannot be averaged: {', '.join(wrong[:6])}"
        raise ValueError(f"{names} differ ({len(wrong)} differences); take two states of one model with the same head")
    mixed = copy.deepcopy(before if alpha == 0 else after).eval()

    def mix(one: Tensor, other: Tensor) -> Tensor:
        """In float64, so that the two models' order does not show in the last bit."""
        return ((1 - alpha) * one.to(other.device, torch.float64) + alpha * other.to(torch.float64)).to(other.dtype)

    if 0 < alpha < 1:
        floats = {name: mix(old[name], value) for name, value in new.items() if value.is_floating_point()}
        mixed.model.load_state_dict(new | floats)
    return mixed
