"""Edits of a head: alignment to the language space, dropping the null component, weight interpolation (METHOD section 7)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from singreg.models.classifier import Classifier
from singreg.models.heads import HeadError, batch_norm_and_linear
from singreg.nullspace import NullSpace
from singreg.ridge import RidgeStatistics
from singreg.translator import LinearTranslator
from singreg.utils import atomic_write

DEFAULT_RIDGE = 1e-3  # of the mean feature variance: with fewer images than features the rest of the space has none
DEFAULT_FLOOR = 1e-3  # of σ_1: a row direction below it would be lost when the head is stored in float32 or bfloat16
OUTSIDE = 1e-3  # share of a head's norm that counts as rounding when it is said to lie in a row space


@dataclass(frozen=True)
class AlignedHead:
    """A head whose row space holds given directions, and what that cost. Tensors are float64.

    Attributes:
        weight: W' (C, m). bias_shift: (C,), to be added to b so that mean logits stay.
        directions: D, (k, m) orthonormal. rows: orthonormal basis of W''s whole row space, D first, (rank, m).
        rank_before, rank: dimensions of the row space of W and of W'. free_rows: rank - k, what R adds.
        raised: singular values that had to be lifted to `floor` · σ_1, without which a direction would have dropped out.
        logit_change: rms of the change of the logits over the rms of the logits, both about their means (mean given), no unit.
    """

    weight: Tensor
    bias_shift: Tensor
    directions: Tensor
    rows: Tensor
    rank_before: int
    rank: int
    free_rows: int
    raised: int
    logit_change: float


class HeadAgreement(NamedTuple):
    """top1: share of images with the same first class, in [0, 1]; logit_change: rms over rms about the means, no unit."""

    top1: float
    logit_change: float


def prompt_directions(
    translators: LinearTranslator | Sequence[LinearTranslator],
    texts: Tensor | Sequence[Tensor],
    leading: int | None = None,
) -> Tensor:
    """Orthonormal basis of the translated prompts A_iᵀ t_k: of all of one translator, or the leading directions of an ensemble.

    Every A_iᵀ t_k is scaled to unit length, so that no translator counts more for its norm; the leading right singular vectors of
    the stack are returned, as many as there are prompts unless `leading` says otherwise.

    Shapes: texts (k, n), or one (k, n_i) per translator where they translate to different models; returns (r, m) float64.

    Raises:
        ValueError: shapes disagree, a translated prompt is zero, or there are fewer independent directions than `leading`.

    Example:
        >>> T = LinearTranslator(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.zeros(2))
        >>> prompt_directions(T, torch.tensor([[1.0, 0.0]])).abs().tolist()
        [[1.0, 0.0, 0.0]]
    """
    ensemble = [translators] if isinstance(translators, LinearTranslator) else list(translators)
    each = [texts] * len(ensemble) if isinstance(texts, Tensor) else list(texts)
    if not ensemble or len(each) != len(ensemble):
        raise ValueError(f"expected at least one translator and texts for each, got {len(ensemble)} and {len(each)}")
    stack = []
    for translator, text in zip(ensemble, each, strict=True):
        if text.ndim != 2 or text.shape[1] != translator.target_dim or translator.feature_dim != ensemble[0].feature_dim:
            raise ValueError(
                f"expected texts (k, {translator.target_dim}) and translators from {ensemble[0].feature_dim} features, got "
                f"{tuple(text.shape)} and {translator.feature_dim}"
            )
        rows = text.detach().to(translator.matrix.device, torch.float64) @ translator.matrix.to(torch.float64)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        if not bool((norms > 0).all() and torch.isfinite(norms).all()):
            raise ValueError("a translated prompt A^T t is zero or not finite, so it has no direction; look at the translator's fit")
        stack.append((rows / norms).to(ensemble[0].matrix.device))
    basis = _orthonormal(torch.cat(stack))
    wanted = min(len(each[0]), len(basis)) if leading is None else leading
    if not 1 <= wanted <= len(basis):
        raise ValueError(f"leading must be in 1..{len(basis)}, the independent directions of these prompts, got {wanted}")
    return basis[:wanted]


def aligned_weight(
    weight: Tensor,
    directions: Tensor,
    *,
    second_moment: Tensor | RidgeStatistics,
    mean: Tensor | None = None,
    free_rows: int | None = None,
    ridge: float = DEFAULT_RIDGE,
    floor: float = DEFAULT_FLOOR,
) -> AlignedHead:
    """W' = B·D + R, the head nearest to W in logits among those whose row space holds D: min E‖(W − W')(f − μ)‖².

    B is a least-squares fit in the metric of the features; R keeps the leading directions, by energy in the logits, of what B·D
    leaves, as many as there is room for. Then Π_n d = 0 for every direction d. D is fitted first and R to its residual, which is
    the exact minimum: in the features' metric the two are orthogonal. The rank grows only where W had fewer rows than D.

    Args:
        second_moment: E f fᵀ (m, m) with `mean` μ (m,); or statistics, which bring both. Without a mean nothing is centred and no
            bias moves: for a head without one.
        free_rows: dimensions of R; default rank(W) - k, what leaves the rank as it was. At most C - k.
        ridge: λ = ridge · tr(S)/m is added to the covariance S, for directions in which the images at hand do not vary.
        floor: smallest singular value allowed, of the largest; raising one costs at most that share in the logits.

    Raises:
        ValueError: shapes disagree, more directions than the head has rows, or no room for so many free rows.

    Example:
        >>> W, d = torch.tensor([[1.0, 0.2, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
        >>> aligned = aligned_weight(W, d, second_moment=torch.eye(3))
        >>> aligned.rank, aligned.free_rows, bool(NullSpace.from_weight(aligned.weight).component(d).abs().max() < 1e-12)
        (2, 1, True)
    """
    old = weight.detach().to(torch.float64)
    _check_shapes(old, directions, ridge, floor)
    covariance, centre = _moments(second_moment, mean, old)
    d = _orthonormal(directions.detach().to(old))
    rank_before, count = NullSpace.from_weight(old, allow_empty=True).rank, len(d)
    if count > len(old):
        raise ValueError(
            f"a head of {len(old)} rows has a row space of at most {len(old)} dimensions, got {count} independent directions; give "
            "fewer prompts, or the leading directions of an ensemble"
        )
    room = max(0, rank_before - count) if free_rows is None else free_rows
    if not 0 <= room <= len(old) - count:
        raise ValueError(f"free_rows must be in 0..{len(old) - count} for {len(old)} rows and {count} directions, got {room}")
    fitted, rows = _fit(old, d, covariance, room, ridge)
    new, raised = _with_floor(fitted, rows, floor)
    change = old - new
    energy = ((old @ covariance) * old).sum()
    return AlignedHead(
        weight=new,
        bias_shift=change @ centre,
        directions=d,
        rows=rows,
        rank_before=rank_before,
        rank=len(rows),
        free_rows=len(rows) - count,
        raised=raised,
        logit_change=float((((change @ covariance) * change).sum().clamp_min(0) / energy).sqrt()),
    )


def head_agreement(
    features: Tensor, weight: Tensor, bias: Tensor | None, new_weight: Tensor, new_bias: Tensor | None
) -> HeadAgreement:
    """Top-1 agreement of two heads on features (B, m), and the relative change of their logits, measured rather than predicted.

    Example:
        >>> head_agreement(torch.eye(2), torch.eye(2), None, 2 * torch.eye(2), None)
        HeadAgreement(top1=1.0, logit_change=1.0)
    """
    if len(features) < 2:
        raise ValueError(f"head_agreement needs at least 2 images to centre the logits, got {len(features)}")
    old, new = (
        features.double() @ w.detach().double().T + (0.0 if b is None else b.detach().double())
        for w, b in ((weight, bias), (new_weight, new_bias))
    )
    change, spread = (x - x.mean(0) for x in (new - old, old))
    same = old.argmax(1) == new.argmax(1)
    return HeadAgreement(float(same.double().mean()), float(change.norm() / spread.norm()))


def align_head_(
    classifier: Classifier,
    translators: LinearTranslator | Sequence[LinearTranslator],
    texts: Tensor | Sequence[Tensor],
    statistics: RidgeStatistics,
    *,
    leading: int | None = None,
    free_rows: int | None = None,
    ridge: float = DEFAULT_RIDGE,
    floor: float = DEFAULT_FLOOR,
) -> AlignedHead:
    """Write the aligned head into the classifier, in place, and return what was done (see `aligned_weight`, `prompt_directions`).

    The backbone and so the features, statistics and translators stay as they are. A head without a bias keeps none.
    Shapes: texts (k, n); `statistics` over features (m,) of at least two images, best of the head's own classes: those are the
    logits that are kept, and fitting other pictures' as well costs accuracy on these.

    Raises:
        HeadError: the head is a batch norm and a linear layer, or is constrained already.
        ValueError: shapes disagree, or the directions do not fit (see the two functions).

    Example:
        >>> c = Classifier.from_timm("test_resnet", pretrained=False, num_classes=4)
        >>> f = torch.rand(200, 96); T = LinearTranslator(torch.randn(6, 96), torch.zeros(6))
        >>> align_head_(c, T, torch.randn(4, 6), RidgeStatistics(96, 6).update(f, T(f))).rank
        4
    """
    head = _plain_head(classifier)
    bias = getattr(head, "bias", None)
    count = statistics.count.clamp_min(1)
    found = aligned_weight(
        classifier.weight,
        prompt_directions(translators, texts, leading),
        second_moment=statistics if bias is not None else statistics.ff / count,
        free_rows=free_rows,
        ridge=ridge,
        floor=floor,
    )
    with torch.no_grad():
        weight = head.weight
        assert isinstance(weight, Tensor)
        weight.copy_(found.weight.reshape(weight.shape))
        if bias is not None:
            bias += found.bias_shift.to(bias)
    return found


class RowSpaceConstraint(nn.Module):
    """W = W_raw Q Qᵀ: whatever W_raw becomes, the rows stay in the span of Q. Shapes: (C, m) or (C, m, 1, 1), kept."""

    basis: Tensor

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        self.register_buffer("basis", basis)

    def forward(self, raw: Tensor) -> Tensor:
        """The constrained weight. Shapes kept."""
        with torch.autocast(raw.device.type, enabled=False):  # bfloat16 products would leave the row space
            basis = self.basis.to(raw.dtype)
            projected: Tensor = (raw.flatten(1) @ basis) @ basis.T
        return projected.reshape(raw.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """W_raw for a weight to be set: itself, its part outside the span has no effect. Shapes kept."""
        return weight


def constrain_to_rows(classifier: Classifier, rows: Tensor) -> Classifier:
    """Keep the head's rows in the span of `rows` (r, m) while it trains, in place; undo it with `release_rows` before saving.

    `rows` is `AlignedHead.rows` (the whole row space: a `keep` head keeps its free directions where they are) or any other basis.

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
            f"{outside:.1%} of the head's norm lies outside the given {len(basis)} rows, so constraining it would change its logits; "
            "write the aligned head first (align_head_), and pass its `rows`"
        )
    parametrize.register_parametrization(head, "weight", RowSpaceConstraint(basis.T.to(weight.dtype).contiguous()))
    return classifier


def release_rows(classifier: Classifier) -> Classifier:
    """Take the constraint off, in place: the head is a plain layer again, with the weight (C, m) and logits it has now.

    Raises ValueError when there is none.
    """
    if not parametrize.is_parametrized(classifier.head, "weight"):
        raise ValueError(f"the head {classifier.head_name!r} is not constrained; constrain_to_rows does that")
    head, kind = classifier.head, type(classifier.head)
    # torch takes the property off the module's class, which a deep copy shares: without a class of its own the copy would break.
    head.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    parametrize.remove_parametrizations(head, "weight", leave_parametrized=True)
    return classifier


def _plain_head(classifier: Classifier) -> nn.Module:
    """The layer whose weight is W itself, to be written to."""
    if batch_norm_and_linear(classifier.head) is not None:
        raise HeadError(
            f"the head {classifier.head_name!r} of {classifier.tag} is a batch norm and a linear layer: W is a product of both, so it "
            "cannot be aligned by writing one. Fold the batch norm into the linear layer first, or use the loss term `capacity`"
        )
    if parametrize.is_parametrized(classifier.head):
        raise HeadError(f"the head {classifier.head_name!r} of {classifier.tag} is constrained already; call release_rows first")
    return classifier.head


def _check_shapes(weight: Tensor, directions: Tensor, ridge: float, floor: float) -> None:
    if weight.ndim != 2 or directions.ndim != 2 or weight.shape[1] != directions.shape[1] or not len(directions):
        raise ValueError(f"expected weight (C, m) and directions (k, m), got {tuple(weight.shape)} and {tuple(directions.shape)}")
    if not (ridge >= 0 and 0 <= floor < 1):
        raise ValueError(f"expected ridge >= 0 and 0 <= floor < 1, got {ridge} and {floor}")
    if not (torch.isfinite(weight).all() and torch.isfinite(directions).all() and weight.any()):
        raise ValueError("the head weight or the directions hold NaN or infinity, or the head is all zero")


def _moments(second_moment: Tensor | RidgeStatistics, mean: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """(S (m, m) about the mean, μ (m,)); without a mean, the moment as it is and zero."""
    if isinstance(second_moment, RidgeStatistics):
        if mean is not None:
            raise ValueError("statistics hold their own mean; pass `mean` only with a second moment (m, m)")
        scatter, count = second_moment.centred()[0], second_moment.count
        covariance, centre = scatter / count, second_moment.f / count
    else:
        exact = second_moment.detach().to(torch.float64)
        centre = exact.new_zeros(exact.shape[-1]) if mean is None else mean.detach().to(exact)
        if centre.shape != exact.shape[-1:]:
            raise ValueError(f"expected a mean ({exact.shape[-1]},), got {tuple(centre.shape)}")
        covariance = exact - torch.outer(centre, centre)
    width = like.shape[1]
    if covariance.shape != (width, width):
        raise ValueError(f"expected moments of features ({width}, {width}) for this head, got {tuple(covariance.shape)}")
    if not torch.isfinite(covariance).all() or not bool(torch.trace(covariance) > 0):
        raise ValueError("the features' moments are not finite, or the features do not vary about the mean: logits cannot be compared")
    return (covariance + covariance.T).to(like) / 2, centre.to(like)


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

    A head whose rows sum to zero has rank C - 1 and its fit too: without this one of C prompts would stay outside the row space.
    """
    left, sigma, right = torch.linalg.svd(fitted @ rows.T, full_matrices=False)
    low = sigma < floor * sigma[0]
    if not bool(low.any()):
        return fitted, 0
    lifted: Tensor = (left * torch.where(low, floor * sigma[0], sigma)) @ right @ rows
    return lifted, int(low.sum())


FORMAT = "singreg-null-dropped-1"


class NullDroppedClassifier(Classifier):
    """What `drop_null` returns: a classifier with one more linear layer m → r than timm's architecture has (no shapes of its own)."""

    def save(self, folder: str | Path) -> None:
        """Refuse: a timm folder cannot say that there is one layer more.

        Raises:
            ValueError: always; it names what to do instead.
        """
        raise ValueError(
            f"{self.tag} has one layer more than the architecture timm would build for {folder}, so plain timm could not load it. Save "
            "the classifier it was made from and call drop_null on that again (same logits), or write its tensors with "
            "save_weights(path) and read them back with drop_null(original).model.load_state_dict(safetensors.torch.load_file(path))"
        )

    def save_weights(self, path: str | Path) -> None:
        """Write all tensors of the model to a safetensors file at the path, atomically, with the format, tag and head's name."""
        state = {name: value.detach().cpu().contiguous().clone() for name, value in self.model.state_dict().items()}
        with atomic_write(path) as temporary:
            save_file(state, temporary, metadata={"format": FORMAT, "tag": self.tag, "head": self.head_name})


def drop_null(classifier: Classifier) -> NullDroppedClassifier:
    """The trivial defence: features f (m,) → Qᵀf (r,), the head W → W Q. Identical logits and no null space (METHOD section 9 f).

    Q is the orthonormal basis of W's row space, W = (W Q) Qᵀ. It makes steering in feature space impossible and changes nothing in
    pixels, so a trained defence must beat it there. The given classifier stays as it is; a batch norm in its head is folded in.

    Shapes: head (C, m) becomes a linear layer m → r without bias, then r → C, which is the returned classifier's head.

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
    layers: tuple[nn.Module, nn.Module]
    if isinstance(classifier.head, nn.Conv2d):
        layers = nn.Conv2d(width, rank, 1, bias=False), nn.Conv2d(rank, classes, 1, bias=bias is not None)
    else:
        layers = nn.Linear(width, rank, bias=False), nn.Linear(rank, classes, bias=bias is not None)
    trained = any(parameter.requires_grad for parameter in classifier.head.parameters())
    edited = nn.Sequential(*layers).to(weight).requires_grad_(trained)
    with torch.no_grad():
        _write(layers[0], "weight", basis.T)
        _write(layers[1], "weight", weight.to(basis) @ basis)
        if bias is not None:
            _write(layers[1], "bias", bias)
    model = copy.deepcopy(classifier.model)
    parent, _, name = classifier.head_name.rpartition(".")
    setattr(model.get_submodule(parent), name, edited)
    dropped = NullDroppedClassifier(
        model, f"{classifier.head_name}.1", tag=f"{classifier.tag}.null_dropped", data_config=classifier._data_config
    )
    dropped._transform, dropped.class_names, dropped.batch_norm = classifier._transform, classifier.class_names, classifier.batch_norm
    return dropped


def interpolate_weights(before: Classifier, after: Classifier, alpha: float) -> Classifier:
    """WiSE-FT: (1 − α) · before + α · after over all parameters and floating-point buffers; a new classifier, in eval mode.

    Counters (integer buffers) are those of `after`. At α = 0 and 1 every tensor is bit-identical to `before` and `after`.
    Wortsman et al., Robust fine-tuning of zero-shot models, 2022. (No shapes: both models have the same.)

    Raises:
        ValueError: alpha is not in [0, 1], or the two have other tensors, shapes or classes.

    Example:
        >>> a, b = (Classifier.from_timm("test_resnet", pretrained=False, num_classes=3) for _ in range(2))
        >>> middle = interpolate_weights(a, b, 0.5)
        >>> bool(((a.weight + b.weight) / 2 - middle.weight).abs().max() < 1e-6)
        True
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], from 0 (before) to 1 (after), got {alpha}")
    old, new = before.model.state_dict(), after.model.state_dict()
    _check_same(before, after, old, new)
    mixed = copy.deepcopy(before if alpha == 0 else after).eval()
    if 0 < alpha < 1:
        mixed.model.load_state_dict({name: _mix(old[name], value, alpha) for name, value in new.items()})
    return mixed


def _write(layer: nn.Module, name: str, value: Tensor) -> None:
    parameter = layer.get_parameter(name)
    parameter.copy_(value.reshape(parameter.shape))


def _mix(old: Tensor, new: Tensor, alpha: float) -> Tensor:
    """In float64, so that the two models' order does not show in the last bit; integers are the new model's. Shapes kept."""
    if not (new.is_floating_point() or new.is_complex()):
        return new
    exact = torch.promote_types(new.dtype, torch.float64)
    return ((1 - alpha) * old.to(new.device, exact) + alpha * new.to(exact)).to(new.dtype)


def _check_same(before: Classifier, after: Classifier, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """All differences that make an average meaningless, at once."""
    wrong = [f"{name} is only in {'before' if name in old else 'after'}" for name in sorted(old.keys() ^ new.keys())]
    wrong += [
        f"{name} is {tuple(old[name].shape)} before and {tuple(value.shape)} after"
        for name, value in new.items()
        if name in old and old[name].shape != value.shape
    ]
    if before.class_names and after.class_names and before.class_names != after.class_names:
        wrong.append(f"the classes are {', '.join(before.class_names[:4])}, ... before and {', '.join(after.class_names[:4])}, ... after")
    if wrong:
        raise ValueError(
            f"the weights of {before.tag} and {after.tag} cannot be averaged: {'; '.join(wrong[:6])} ({len(wrong)} differences). Take two "
            "states of one model with the same head"
        )
