"""Edits of a trained head: aligned with the prompts, without its null space, averaged weights (METHOD section 7).

The aligned head W = B·D + R has no null direction that can raise a class prompt. The edit needs no training;
`constrain_to_rows` keeps it while the head trains. The loss term `capacity` is its soft form, whose minimiser it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from singreg.models.classifier import Classifier
from singreg.models.heads import HeadError, batch_norm_and_linear
from singreg.nullspace import NullSpace
from singreg.ridge import RidgeStatistics
from singreg.translator import LinearTranslator

RIDGE = 1e-3  # of the mean feature variance: with fewer images than features the rest of the space has none
FLOOR = 1e-3  # of σ_1: a row direction below it would be lost when the head is stored in float32 or bfloat16
OUTSIDE = 1e-3  # share of a head's norm that counts as rounding when it is said to lie in a row space


@dataclass(frozen=True)
class AlignedHead:
    """A head whose row space holds given directions, and what that cost; tensors are float64."""

    weight: Tensor  # W', (C, m)
    bias_shift: Tensor  # to be added to b so that mean logits stay, (C,)
    directions: Tensor  # D, orthonormal, (k, m)
    rows: Tensor  # orthonormal basis of the whole row space of W', D first, (rank, m)
    rank_before: int  # dimensions of the row space of W
    rank: int  # dimensions of that of W'
    free_rows: int  # rank - k, what R adds
    raised: int  # singular values lifted to `floor` · σ_1, without which a direction would have dropped out
    logit_change: float  # rms of the change of the logits over the rms of the logits, both about their means


def prompt_directions(
    translators: LinearTranslator | Sequence[LinearTranslator], texts: Tensor, leading: int | None = None
) -> Tensor:
    """Return an orthonormal basis (r, m) of the translated prompts A_iᵀ t_k, each scaled to unit length first.

    Args:
        translators: one, or an ensemble from the same features.
        texts: (k, n).
        leading: how many right singular vectors of the stack; as many as there are prompts unless given.

    Raises:
        ValueError: shapes disagree, a translated prompt is zero, or there are fewer directions than `leading`.

    Example:
        >>> T = LinearTranslator(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.zeros(2))
        >>> prompt_directions(T, torch.tensor([[1.0, 0.0]])).abs().tolist()
        [[1.0, 0.0, 0.0]]
    """
    ensemble = [translators] if isinstance(translators, LinearTranslator) else list(translators)
    shapes = {tuple(translator.matrix.shape) for translator in ensemble}
    if texts.ndim != 2 or {size for size, _ in shapes} != {texts.shape[1]} or len(shapes) != 1:
        raise ValueError(
            f"expected texts (k, n) and matrices of one shape (n, m), got {tuple(texts.shape)} and {shapes}"
        )
    exact = texts.detach().to(torch.float64)
    rows = torch.cat([exact @ translator.matrix.to(exact) for translator in ensemble])
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if not bool((norms > 0).all() and torch.isfinite(norms).all()):
        raise ValueError("a translated prompt A^T t is zero or not finite; look at the translator's fit")
    basis = _orthonormal(rows / norms)
    wanted = min(len(texts), len(basis)) if leading is None else leading
    if not 1 <= wanted <= len(basis):
        raise ValueError(f"leading must be in 1..{len(basis)}, the independent directions of the prompts, got {wanted}")
    return basis[:wanted]


def aligned_weight(
    weight: Tensor,
    directions: Tensor,
    *,
    covariance: Tensor,
    mean: Tensor | None = None,
    free_rows: int | None = None,
    ridge: float = RIDGE,
    floor: float = FLOOR,
) -> AlignedHead:
    """Return the head W' = B·D + R nearest to W in logits whose row space holds D: min E‖(W - W')(f - μ)‖².

    B is a least-squares fit in the metric of the features; R keeps the leading directions, by energy in the logits, of
    what B·D leaves. D first and R to its residual is the exact minimum: in that metric the two are orthogonal.

    Args:
        weight: W, (C, m).
        directions: spanning D, (k, m).
        covariance: S of the features about μ, (m, m); for a head without a bias, about 0.
        mean: μ, (m,); 0 unless given.
        free_rows: dimensions of R, at most C - k; rank(W) - k unless given, which leaves the rank as it was.
        ridge: ridge · tr(S)/m is added to S, for directions in which the images at hand do not vary.
        floor: smallest singular value allowed, of the largest; raising one costs at most that share in the logits.

    Raises:
        ValueError: shapes disagree, values are not finite, more directions than rows, or no room for the free rows.

    Example:
        >>> W, d = torch.tensor([[1.0, 0.2, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
        >>> aligned = aligned_weight(W, d, covariance=torch.eye(3))
        >>> aligned.rank, aligned.free_rows, NullSpace.from_weight(aligned.weight).component(d).norm().item() < 1e-12
        (2, 1, True)
    """
    old = weight.detach().to(torch.float64)
    (classes, width), s = old.shape, covariance.detach().to(old)
    if directions.ndim != 2 or directions.shape[1] != width or s.shape != (width, width):
        shapes = f"{tuple(directions.shape)} and {tuple(s.shape)}"
        raise ValueError(
            f"expected directions (k, {width}) and covariance ({width}, {width}) for this head, got {shapes}"
        )
    if not all(bool(torch.isfinite(x).all()) for x in (old, directions, s)) or not old.any() or not torch.trace(s) > 0:
        raise ValueError(
            "head, directions or covariance hold NaN or infinity, the head is 0, or the features do not vary"
        )
    s, d = (s + s.T) / 2, _orthonormal(directions.detach().to(old))
    rank_before, count = NullSpace.from_weight(old, allow_empty=True).rank, len(d)
    room = max(0, rank_before - count) if free_rows is None else free_rows
    if not 0 <= room <= classes - count:
        raise ValueError(
            f"a head of {classes} rows holds at most {classes} dimensions, got {count} independent directions and "
            f"free_rows {room}; give fewer prompts or free rows, or the leading directions of an ensemble"
        )
    fitted, rows = _fit(old, d, s, room, ridge)
    new, raised = _with_floor(fitted, rows, floor)
    change = old - new
    energy = ((old @ s) * old).sum()
    return AlignedHead(
        weight=new,
        bias_shift=change @ (torch.zeros(width).to(old) if mean is None else mean.detach().to(old)),
        directions=d,
        rows=rows,
        rank_before=rank_before,
        rank=len(rows),
        free_rows=len(rows) - count,
        raised=raised,
        logit_change=float((((change @ s) * change).sum().clamp_min(0) / energy).sqrt()),
    )


def align_head_(
    classifier: Classifier,
    translators: LinearTranslator | Sequence[LinearTranslator],
    texts: Tensor,
    statistics: RidgeStatistics,
) -> AlignedHead:
    """Write the aligned head into the classifier, in place, and return what was done.

    The backbone and so features, statistics and translators stay as they are; a head without a bias keeps none.

    Args:
        classifier: its head is written to.
        translators: one, or an ensemble, whose leading directions are taken.
        texts: prompts of the classes, (k, n).
        statistics: of the features of at least two images, best of the head's own classes, whose logits are kept.

    Raises:
        HeadError: the head is a batch norm and a linear layer, or is constrained already.
        ValueError: shapes disagree, or the directions do not fit.

    Example:
        >>> c = Classifier.from_timm("test_resnet", pretrained=False, num_classes=4)
        >>> f = torch.rand(200, 96); T = LinearTranslator(torch.randn(6, 96), torch.zeros(6))
        >>> align_head_(c, T, torch.randn(4, 6), RidgeStatistics(96, 6).update(f, T(f))).rank
        4
    """
    head = _plain_head(classifier)
    weight, bias, count = head.get_parameter("weight"), classifier.bias, statistics.count
    covariance = statistics.ff if bias is None else statistics.centred()[0]
    mean = None if bias is None else statistics.f / count
    directions = prompt_directions(translators, texts)
    found = aligned_weight(classifier.weight, directions, covariance=covariance / count.clamp_min(1), mean=mean)
    with torch.no_grad():
        weight.copy_(found.weight.reshape(weight.shape))
        if bias is not None:
            bias += found.bias_shift.to(bias)
    return found


class RowSpaceConstraint(nn.Module):
    """W = W_raw Q Qᵀ: whatever W_raw (C, m) or (C, m, 1, 1) becomes, the rows stay in the span of Q."""

    basis: Tensor

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        self.register_buffer("basis", basis)

    def forward(self, raw: Tensor) -> Tensor:
        """Return the constrained weight, in the shape of `raw`."""
        with torch.autocast(raw.device.type, enabled=False):  # bfloat16 products would leave the row space
            basis = self.basis.to(raw.dtype)
            projected: Tensor = (raw.flatten(1) @ basis) @ basis.T
        return projected.reshape(raw.shape)


def constrain_to_rows(classifier: Classifier, rows: Tensor) -> Classifier:
    """Keep the head's rows in the span of `rows` (r, m) while it trains, in place; `release_rows` undoes it.

    `rows` is `AlignedHead.rows` (a `keep` head then keeps its free directions where they are) or any other basis.

    Raises:
        HeadError: the head is a batch norm and a linear layer, or is constrained already.
        ValueError: the rows do not fit, or the head is not in their span yet (`align_head_` puts it there).

    Example:
        >>> c = Classifier.from_timm("test_resnet", pretrained=False, num_classes=4)
        >>> _ = constrain_to_rows(c, c.weight.detach())
        >>> c.weight.shape, type(release_rows(c).head).__name__
        (torch.Size([4, 96]), 'Linear')
    """
    head = _plain_head(classifier)
    weight = classifier.weight.detach()
    if rows.ndim != 2 or rows.shape[1] != weight.shape[1]:
        raise ValueError(f"expected rows (r, {weight.shape[1]}) for this head, got {tuple(rows.shape)}")
    basis = _orthonormal(rows.detach().to(weight.device, torch.float64))
    exact = weight.to(torch.float64)
    outside = float((exact - (exact @ basis.T) @ basis).norm() / exact.norm())
    if not outside <= OUTSIDE:
        raise ValueError(
            f"{outside:.1%} of the head's norm lies outside the given {len(basis)} rows, so a constraint would change "
            "its logits; write the aligned head first (align_head_), and pass its `rows`"
        )
    parametrize.register_parametrization(head, "weight", RowSpaceConstraint(basis.T.to(weight.dtype).contiguous()))
    return classifier


def release_rows(classifier: Classifier) -> Classifier:
    """Take the constraint off, in place: the head is a plain layer again, with the weight and logits it has now."""
    head, kind = classifier.head, type(classifier.head)
    if not parametrize.is_parametrized(head, "weight"):
        raise ValueError(f"the head {classifier.head_name!r} is not constrained; constrain_to_rows does that")
    # torch takes the property off the module's class, which a deep copy shares, so the module first gets its own class.
    head.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    parametrize.remove_parametrizations(head, "weight", leave_parametrized=True)
    return classifier


def _plain_head(classifier: Classifier) -> nn.Module:
    """The layer whose weight is W itself, to be written to."""
    if batch_norm_and_linear(classifier.head) is not None:
        raise HeadError(
            f"the head {classifier.head_name!r} of {classifier.tag} is a batch norm and a linear layer, so W cannot be "
            "written; fold the batch norm into the linear layer first, or use the loss term `capacity`"
        )
    if parametrize.is_parametrized(classifier.head):
        raise HeadError(f"the head {classifier.head_name!r} is constrained already; call release_rows first")
    return classifier.head


def _orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal basis (r, m) of the span of rows (k, m), leading first, dependent ones left out."""
    _, sigma, right = torch.linalg.svd(rows, full_matrices=False)
    rank = int((sigma > max(rows.shape) * torch.finfo(rows.dtype).eps * sigma[:1]).sum())
    basis: Tensor = right[:rank].contiguous()
    return basis


def _fit(old: Tensor, d: Tensor, covariance: Tensor, room: int, ridge: float) -> tuple[Tensor, Tensor]:
    """(B·D + R (C, m), orthonormal rows of D and of R (r, m)), in the metric S + λ I."""
    width = len(covariance)
    metric = covariance + ridge * torch.trace(covariance) / width * torch.eye(width).to(covariance)
    energy, axes = torch.linalg.eigh(metric)
    # Not a Cholesky factor: with ridge 0 and few images the metric is singular, and those directions then cost nothing.
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


def _with_floor(fitted: Tensor, rows: Tensor, floor: float) -> tuple[Tensor, int]:
    """The same head with singular values of at least floor · σ_1 on all of `rows`, and how many were lifted.

    A head whose rows sum to zero has rank C - 1 and its fit too: else one of C prompts would stay outside its rows.
    """
    left, sigma, right = torch.linalg.svd(fitted @ rows.T, full_matrices=False)
    low = sigma < floor * sigma[0]
    if not bool(low.any()):
        return fitted, 0
    lifted: Tensor = (left * torch.where(low, floor * sigma[0], sigma)) @ right @ rows
    return lifted, int(low.sum())


class NullDroppedClassifier(Classifier):
    """What `drop_null` returns: a classifier with one more linear layer m → r than timm's architecture has."""

    def save(self, folder: str | Path) -> None:
        """Raise a ValueError, as a timm folder cannot say that there is one layer more."""
        raise ValueError(
            f"{self.tag} has one layer more than timm would build from {folder}; save the classifier that it "
            "was made from and call drop_null on that again (same logits)"
        )


def drop_null(classifier: Classifier) -> NullDroppedClassifier:
    """Return the trivial defence: features f → Qᵀf (r,), the head W → W Q, with identical logits and no null space.

    Q (m, r) is the orthonormal basis of W's row space, W = (W Q) Qᵀ. It makes steering in feature space impossible and
    changes nothing in pixels, so a trained defence must beat it there. The given classifier stays as it is; its head
    becomes a layer m → r without bias, then r → C, the head of what is returned. A batch norm in it is folded in.

    Raises:
        ValueError: the head has no null space to drop.

    Example:
        >>> classifier = Classifier.from_timm("test_resnet", pretrained=False, num_classes=10)
        >>> dropped = drop_null(classifier)
        >>> classifier.feature_dim, dropped.feature_dim, dropped.head_name
        (96, 10, 'fc.1')
    """
    weight, bias = classifier.weight.detach(), classifier.bias
    basis = NullSpace.from_weight(weight).basis
    (classes, width), rank = weight.shape, basis.shape[1]
    if isinstance(classifier.head, nn.Conv2d):
        edited = nn.Sequential(
            nn.Conv2d(width, rank, 1, bias=False), nn.Conv2d(rank, classes, 1, bias=bias is not None)
        )
    else:
        edited = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, classes, bias=bias is not None))
    edited = edited.to(weight).requires_grad_(any(each.requires_grad for each in classifier.head.parameters()))
    values = {"0.weight": basis.T, "1.weight": weight.to(basis) @ basis, "1.bias": bias}
    with torch.no_grad():
        for name, parameter in edited.named_parameters():
            value = values[name]
            assert value is not None
            parameter.copy_(value.reshape(parameter.shape))
    model = copy.deepcopy(classifier.model)
    model.set_submodule(classifier.head_name, edited)
    tag, config = f"{classifier.tag}.null_dropped", classifier.data_config
    dropped = NullDroppedClassifier(model, f"{classifier.head_name}.1", tag=tag, data_config=config)
    for name in ("own_transform", "class_names", "batch_norm"):
        setattr(dropped, name, getattr(classifier, name))
    return dropped


def interpolate_weights(before: Classifier, after: Classifier, alpha: float) -> Classifier:
    """Return (1 - α) · before + α · after of parameters and float buffers (WiSE-FT): a new classifier, in eval mode.

    Integer buffers are those of `after`; at α = 0 and 1 every tensor is bit-identical to `before` and `after`.
    Wortsman et al., Robust fine-tuning of zero-shot models, 2022.

    Raises:
        ValueError: alpha is not in [0, 1], or the two have other tensors, shapes or classes.

    Example:
        >>> a, b = (Classifier.from_timm("test_resnet", pretrained=False, num_classes=3) for _ in range(2))
        >>> bool(((a.weight + b.weight) / 2 - interpolate_weights(a, b, 0.5).weight).abs().max() < 1e-6)
        True
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], from 0 (before) to 1 (after), got {alpha}")
    old, new = before.model.state_dict(), after.model.state_dict()
    shapes = [{name: tuple(value.shape) for name, value in state.items()} for state in (old, new)]
    wrong = [
        f"{name} is {shapes[0].get(name)} before and {shapes[1].get(name)} after"
        for name in sorted({*old, *new})
        if shapes[0].get(name) != shapes[1].get(name)
    ]
    if before.class_names and after.class_names and before.class_names != after.class_names:
        wrong.append(f"the classes are {before.class_names[:4]}... before and {after.class_names[:4]}... after")
    if wrong:
        raise ValueError(
            f"the weights of {before.tag} and {after.tag} cannot be averaged: {'; '.join(wrong[:6])} ({len(wrong)} "
            "differences); take two states of one model with the same head"
        )
    mixed = copy.deepcopy(before if alpha == 0 else after).eval()
    if 0 < alpha < 1:
        mixed.model.load_state_dict({name: _mix(old[name], value, alpha) for name, value in new.items()})
    return mixed


def _mix(old: Tensor, new: Tensor, alpha: float) -> Tensor:
    """In float64, so that the two models' order does not show in the last bit; integers are the new model's."""
    if not new.is_floating_point():
        return new
    return ((1 - alpha) * old.to(new.device, torch.float64) + alpha * new.to(torch.float64)).to(new.dtype)
