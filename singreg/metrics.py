"""torchmetrics classes for the SING scores: sums alone, exact over batches and processes (METHOD sections 3 and 8)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from singreg.functional import attribute_score, check_labels, image_score, kappa
from singreg.utils import sha256_of_tensor

HISTOGRAM_BINS = 1440  # 0.25 degrees wide over [-180, 180]
COLUMNS = ("count", "AS", "AS²", "AS_neg", "AS_pos", "AS_abs", "IS", "IS²", "kappa", "kappa²")
NO_FLOAT64 = ("mps",)  # devices where sums in float64 are kept on the CPU
Part = Literal["signed", "negative", "positive", "absolute"]


def score_columns(z: Tensor, z_eq: Tensor, text: Tensor) -> Tensor:
    """Return the summable figures of every image, rows as in `COLUMNS`. Shape: (B, n) thrice -> (10, B) float64."""
    return columns_of(*map(_exact, (attribute_score(z, z_eq, text), image_score(z, z_eq), kappa(z, z_eq, text))))


def columns_of(attribute: Tensor, image: Tensor, travelled: Tensor) -> Tensor:
    """Return the same from AS, IS and κ of every image. Shape: (B,) thrice -> (10, B)."""
    rows = [torch.ones_like(attribute), attribute, attribute**2, (-attribute).clamp_min(0), attribute.clamp_min(0)]
    return torch.stack([*rows, attribute.abs(), image, image**2, travelled, travelled**2])


def summarize_columns(sums: Tensor) -> dict[str, Tensor]:
    """Return means, deviations and the paper's ratio IS / |AS| from sums of columns (10, ...); NaN without images."""
    table = dict(zip(COLUMNS, sums.double(), strict=True))
    count = table["count"]
    summary = {name: table[name] / count for name in ("AS", "AS_neg", "AS_pos", "AS_abs", "IS", "kappa")}
    for name in ("AS", "IS", "kappa"):
        summary[f"{name}_std"] = (table[f"{name}²"] / count - summary[name] ** 2).clamp_min(0).sqrt()
    return {**summary, "ratio": summary["IS"] / summary["AS_abs"], "count": count}


def _exact(values: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (values.cpu() if values.device.type in NO_FLOAT64 else values).double()


class _SumMetric(Metric):
    """Sums in float64 that follow the metric's device where that has float64."""

    is_differentiable = False
    higher_is_better: bool | None = None  # leakage is to fall, permitted variety to stay: no end is best
    full_state_update = False

    def add_sum(self, name: str, *shape: int) -> None:
        """Add a state of zeros that is summed over processes."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Any:
        sums = [name for name in self._defaults if getattr(self, name).dtype == torch.float64]
        moved = super()._apply(fn, exclude_state=(*exclude_state, *sums))
        for name in sums if self.device.type not in NO_FLOAT64 else ():
            setattr(self, name, getattr(self, name).to(self.device))
        return moved


class _MeanScore(_SumMetric):
    """Mean of one score over images, in degrees."""

    plot_lower_bound, plot_upper_bound = 0.0, 180.0
    plot = Metric._plot  # which torchmetrics leaves to every metric to offer

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A MetricCollection merges metrics whose states agree on the first batch, but never compares other names.
        self.name = f"{name}_sum_and_count"
        self.add_sum(self.name, 2)

    def _add(self, scores: Tensor) -> None:
        exact = _exact(scores.detach())
        getattr(self, self.name).add_(torch.stack([exact.sum(), torch.ones_like(exact).sum()]))

    def compute(self) -> Tensor:
        """Return the mean over all images, ()."""
        total, count = getattr(self, self.name)
        return total / count


class AttributeScore(_MeanScore):
    """Mean attribute score over images, in degrees (paper eq. 7).

    Args:
        part: "signed" AS, "negative" AS⁻ = relu(-AS) (leakage), "positive" AS⁺ (benign) or the paper's "absolute" |AS|.

    Example:
        >>> metric = AttributeScore()
        >>> metric.update(torch.eye(2)[:1], torch.eye(2)[1:], torch.eye(2)[1:])
        >>> metric.compute().item()
        90.0
    """

    plot_lower_bound = -180.0

    def __init__(self, part: Part = "signed", **kwargs: Any) -> None:
        if part not in get_args(Part):
            raise ValueError(f"part must be one of {get_args(Part)}, got {part!r}")
        super().__init__(f"attribute_{part}", **kwargs)
        self.part = part

    def update(self, z: Tensor, z_eq: Tensor, text: Tensor) -> None:
        """Add a batch; all three (B, n)."""
        score = attribute_score(z, z_eq, text)
        negative, positive = (-score).clamp_min(0), score.clamp_min(0)
        self._add({"signed": score, "negative": negative, "positive": positive, "absolute": score.abs()}[self.part])


class ImageScore(_MeanScore):
    """Mean image score over images, in degrees (paper eq. 8)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("image", **kwargs)

    def update(self, z: Tensor, z_eq: Tensor) -> None:
        """Add a batch; both (B, n)."""
        self._add(image_score(z, z_eq))


class SemanticLeakage(_SumMetric):
    """Every SING figure at once, per class and overall: AS, AS⁻, AS⁺, |AS|, IS (degrees), κ, deviations.

    On several processes read `per_class` and `histogram` inside `with metric.sync_context():`.

    Args:
        texts: embedding of each class's prompt, in the translator's target space, (C, n).

    Example:
        >>> metric = SemanticLeakage(torch.eye(2))
        >>> metric.update(torch.eye(2)[:1], torch.eye(2)[1:], torch.tensor([1]))
        >>> metric.compute()["AS"].item(), metric.compute()["IS"].item()
        (90.0, 90.0)
    """

    texts: Tensor
    columns: Tensor
    histogram: Tensor

    def __init__(self, texts: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if texts.ndim != 2:
            raise ValueError(f"expected texts (C, n), got {tuple(texts.shape)}")
        self.register_buffer("texts", texts.detach().clone(), persistent=False)
        self.add_sum("columns", len(COLUMNS), len(texts))
        self.add_sum("histogram", 2, HISTOGRAM_BINS)
        # Two with other texts may agree on a first batch; with this state a MetricCollection does not merge them.
        self.add_state("texts_id", torch.tensor(int(sha256_of_tensor(texts)[:12], 16)), dist_reduce_fx="max")

    def update(self, z: Tensor, z_eq: Tensor, labels: Tensor) -> None:
        """Add a batch: z, z_eq (B, n), labels (B,) of any integer type."""
        classes, width = self.texts.shape
        if z.shape != z_eq.shape or z.shape != (len(labels), width):
            shapes = f"{tuple(z.shape)}, {tuple(z_eq.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"expected z and z_eq (B, {width}) and labels (B,), got {shapes}")
        check_labels(labels, classes)
        labels = labels.long()  # uint8 would index as a mask
        columns = score_columns(z.detach(), z_eq.detach(), self.texts.to(z)[labels])
        self.columns.index_add_(1, labels.to(columns.device), columns)
        for row, name in enumerate(("AS", "IS")):
            bins = ((columns[COLUMNS.index(name)] + 180) / 360 * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1)
            self.histogram[row].index_add_(0, bins, columns[0])  # ones

    def compute(self) -> dict[str, Tensor]:
        """Return the figures of `summarize_columns` over all images, each ()."""
        return summarize_columns(self.columns.sum(1))

    def per_class(self) -> dict[str, Tensor]:
        """Return the same figures for each class, each (C,); NaN for a class without images."""
        return summarize_columns(self.columns)
