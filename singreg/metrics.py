"""torchmetrics classes for the SING scores: tensor states only, exact over batches and processes (METHOD sections 3 and 8)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from singreg.functional import attribute_score, image_score, kappa

HISTOGRAM_BINS = 1440  # 0.25 degrees wide over [-180, 180]
COLUMNS = ("count", "AS", "AS²", "AS_neg", "AS_pos", "AS_abs", "IS", "IS²", "kappa", "kappa²")


def score_columns(z: Tensor, z_eq: Tensor, text: Tensor) -> Tensor:
    """The ten summable figures of every image, rows in the order of `COLUMNS` (degrees; κ without unit).

    Shapes: z, z_eq, text (B, n); returns (10, B) float64. Sums of these give every mean and standard deviation exactly.
    """
    attribute = attribute_score(z, z_eq, text).double()
    image = image_score(z, z_eq).double()
    travelled = kappa(z, z_eq, text).double()
    rows = [torch.ones_like(attribute), attribute, attribute**2, (-attribute).clamp_min(0), attribute.clamp_min(0)]
    return torch.stack([*rows, attribute.abs(), image, image**2, travelled, travelled**2])


def summarize_columns(sums: Tensor) -> dict[str, Tensor]:
    """Means and standard deviations from summed columns; a class without images gives NaN.

    Shapes: sums (10, ...); returns tensors (...): AS, AS_neg, AS_pos, AS_abs, IS in degrees, kappa, *_std, and the paper's
    model-level `ratio` = mean IS / mean |AS|.
    """
    table = dict(zip(COLUMNS, sums.double(), strict=True))
    count = table["count"]
    summary = {name: table[name] / count for name in ("AS", "AS_neg", "AS_pos", "AS_abs", "IS", "kappa")}
    for name in ("AS", "IS", "kappa"):
        summary[f"{name}_std"] = (table[f"{name}²"] / count - summary[name] ** 2).clamp_min(0).sqrt()
    return {**summary, "ratio": summary["IS"] / summary["AS_abs"], "count": count}


class _MeanScore(Metric):
    """Mean of one score over images: a sum and a count in float64, the sum under the score's own name.

    A MetricCollection merges metrics whose states agree on the first batch; states of different names it never compares.
    """

    is_differentiable = False
    full_state_update = False
    count: Tensor

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sum = f"{name}_sum"
        self.add_state(self._sum, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, scores: Tensor) -> None:
        setattr(self, self._sum, getattr(self, self._sum) + scores.detach().double().sum())
        self.count += scores.numel()

    def compute(self) -> Tensor:
        """Mean in degrees, shape ()."""
        total: Tensor = getattr(self, self._sum)
        return total / self.count

    def plot(self, val: Tensor | None = None, ax: Any = None) -> Any:
        """Draw the value as torchmetrics does; returns (figure, axes)."""
        return self._plot(val, ax)


class AttributeScore(_MeanScore):
    """Mean attribute score over images, in degrees (paper eq. 7).

    Args:
        part: "signed" AS, "negative" AS⁻ = relu(-AS) (leakage), "positive" AS⁺ (benign) or "absolute" |AS| (the paper's).

    Shapes: update(z (B, n), z_eq (B, n), text (B, n)); compute ().

    Example:
        >>> metric = AttributeScore()
        >>> metric.update(torch.eye(2)[:1], torch.eye(2)[1:], torch.eye(2)[1:])
        >>> metric.compute().item()
        90.0
    """

    def __init__(self, part: Literal["signed", "negative", "positive", "absolute"] = "signed", **kwargs: Any) -> None:
        if part not in ("signed", "negative", "positive", "absolute"):
            raise ValueError(f'part must be "signed", "negative", "positive" or "absolute", got {part!r}')
        super().__init__(f"attribute_{part}", **kwargs)
        self.part = part

    def update(self, z: Tensor, z_eq: Tensor, text: Tensor) -> None:
        """Add a batch; all three (B, n)."""
        score = attribute_score(z, z_eq, text)
        kinds = {"signed": score, "negative": (-score).clamp_min(0), "positive": score.clamp_min(0), "absolute": score.abs()}
        self._add(kinds[self.part])


class ImageScore(_MeanScore):
    """Mean image score over images, in degrees (paper eq. 8). Shapes: update(z (B, n), z_eq (B, n)); compute ().

    Example:
        >>> metric = ImageScore()
        >>> metric.update(torch.eye(2)[:1], torch.eye(2)[1:])
        >>> metric.compute().item()
        90.0
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("image", **kwargs)

    def update(self, z: Tensor, z_eq: Tensor) -> None:
        """Add a batch; both (B, n)."""
        self._add(image_score(z, z_eq))


class SemanticLeakage(Metric):
    """Every SING figure at once, per class and overall: AS, AS⁻, AS⁺, |AS|, IS (degrees), κ, deviations, quantiles.

    Args:
        texts: (C, n) text embedding of each class's prompt, in the translator's target space.

    Shapes: update(z (B, n), z_eq (B, n), labels (B,)); compute a dict of () tensors: AS, AS_neg, AS_pos, AS_abs, IS, AS_std, IS_std in
    degrees, kappa, kappa_std, ratio (mean IS / mean |AS|), count; `per_class()` the same of (C,) tensors; `quantile("AS", 0.95)`.
    On several processes read `per_class` and `quantile` inside `with metric.sync_context():`.
    One state for all figures, so that no two of them can be merged by a MetricCollection.

    Raises:
        ValueError: labels outside 0..C-1, or shapes that do not fit.

    Example:
        >>> metric = SemanticLeakage(torch.eye(2))
        >>> metric.update(torch.eye(2)[:1], torch.eye(2)[1:], torch.tensor([1]))
        >>> metric.compute()["AS"].item(), metric.compute()["IS"].item()
        (90.0, 90.0)
    """

    is_differentiable = False
    full_state_update = False
    sums: Tensor
    histogram: Tensor
    texts: Tensor

    def __init__(self, texts: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if texts.ndim != 2:
            raise ValueError(f"expected texts (C, n), got {tuple(texts.shape)}")
        self.register_buffer("texts", texts.detach().clone(), persistent=False)
        self.add_state("sums", torch.zeros(len(COLUMNS), len(texts), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("histogram", torch.zeros(2, HISTOGRAM_BINS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, z: Tensor, z_eq: Tensor, labels: Tensor) -> None:
        """Add a batch: z, z_eq (B, n), labels (B,) int64."""
        if z.shape != z_eq.shape or z.shape != (len(labels), self.texts.shape[1]):
            raise ValueError(
                f"expected z and z_eq (B, {self.texts.shape[1]}) and labels (B,), got {tuple(z.shape)}, "
                f"{tuple(z_eq.shape)} and {tuple(labels.shape)}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.texts):
            raise ValueError(f"labels must be in 0..{len(self.texts) - 1}, got {int(labels.min())}..{int(labels.max())}")
        columns = score_columns(z.detach(), z_eq.detach(), self.texts.to(z)[labels])
        self.sums.index_add_(1, labels, columns)
        for row, name in enumerate(("AS", "IS")):
            bins = ((columns[COLUMNS.index(name)] + 180) / 360 * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1)
            self.histogram[row] += torch.bincount(bins, minlength=HISTOGRAM_BINS)

    def compute(self) -> dict[str, Tensor]:
        """Overall figures, each of shape ()."""
        return summarize_columns(self.sums.sum(1))

    def per_class(self) -> dict[str, Tensor]:
        """The same figures for each class, each of shape (C,); NaN for a class without images. After `sync` if distributed."""
        return summarize_columns(self.sums)

    def quantile(self, name: Literal["AS", "IS"], q: float) -> float:
        """Quantile in degrees, to the histogram's 0.25 degrees; q in [0, 1]."""
        counts = self.histogram[("AS", "IS").index(name)]
        below = counts.cumsum(0)
        bin_index = int(torch.searchsorted(below, q * below[-1]).clamp_max(HISTOGRAM_BINS - 1))
        return (bin_index + 0.5) * 360 / HISTOGRAM_BINS - 180

    def plot(self, val: dict[str, Tensor] | None = None, ax: Any = None) -> Any:
        """Histograms of AS and IS in degrees; returns (figure, axes)."""
        import matplotlib.pyplot as plt

        figure, axes = (ax.figure, ax) if ax is not None else plt.subplots()
        centres = (torch.arange(HISTOGRAM_BINS) + 0.5) * 360 / HISTOGRAM_BINS - 180
        for row, name in enumerate(("AS", "IS")):
            used = self.histogram[row].cpu() > 0
            axes.bar(centres[used], self.histogram[row].cpu()[used], width=0.25, alpha=0.6, label=name)
        axes.set(xlabel="degrees", ylabel="images", title="attribute score AS and image score IS")
        axes.legend()
        return figure, axes
