"""Model level: every figure of METHOD section 3 and 8 for one classifier on the test images, by several translators."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch, PassSettings, evenly, gathered, iterate_features
from singreg.analysis.results import CENTRED, HeadSummary, ModelMeasurement, Rows, SteeringSummary, TranslatorScores
from singreg.analysis.statistics import mean_interval, ratio_interval, resampled_means
from singreg.analysis.steering.pairs import measure_steering
from singreg.data.datasets import ImageSplit
from singreg.metrics import COLUMNS, SemanticLeakage, score_columns
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance, NullSpace, null_share
from singreg.translator import Translator
from singreg.utils import all_reduce_sum, gather_rows

ROW_FIGURES = ("AS", "IS", "kappa")
STEERING_IMAGES = 1024


def summarize_head(classifier: Classifier, space: NullSpace) -> HeadSummary:
    """The head's passport from its null space; needs no data (no shapes; shares in [0, 1])."""
    sigma = space.singular_values
    classes, features = classifier.weight.shape
    return HeadSummary(
        tag=classifier.tag,
        classes=classes,
        features=features,
        rank=space.rank,
        rank_loose=int((sigma > 1e-3 * sigma[0]).sum()),
        nullity=space.nullity,
        null_dimensions=space.nullity / features,
        conditioning=float(sigma[space.rank - 1] / sigma[0]) if space.rank else 0.0,
        head_hash=classifier.head_hash(),
    )


class _TranslatorPass:
    """Running sums of one translator over the test pass."""

    def __init__(self, translator: Translator, texts: Tensor) -> None:
        self.translator = translator
        self.texts = texts
        self.scores, self.centred = (SemanticLeakage(texts).to(texts.device) for _ in range(2))
        # cosine, zero-shot hits, Σ|T f - z|², Σ|z|², images; and Σ z for the R²'s mean
        self.quality = torch.zeros(5, dtype=torch.float64, device=texts.device)
        self.target_sum = torch.zeros(texts.shape[1], dtype=torch.float64, device=texts.device)

    def update(self, batch: FeatureBatch, equivalent: Tensor, centred: Tensor) -> dict[str, Tensor]:
        """Add a batch (B, m) with its two removals; returns this translator's per-image figures, each (B,)."""
        z, z_eq = self.translator(batch.features), self.translator(equivalent)
        z_centred = self.translator(centred)
        self.scores.update(z, z_eq, batch.labels)
        self.centred.update(z, z_centred, batch.labels)
        target = batch.embeddings
        if self.translator.info.normalized_targets:
            target = torch.nn.functional.normalize(target, dim=-1)
        hits = (torch.nn.functional.normalize(z, dim=-1) @ self.texts.T).argmax(1) == batch.labels
        cosine = torch.nn.functional.cosine_similarity(z, target, dim=-1)
        count = torch.tensor(float(len(z)), device=z.device)
        sums = [cosine.sum(), hits.sum(), (z - target).double().square().sum(), target.double().square().sum(), count]
        self.quality += torch.stack([value.double() for value in sums])
        self.target_sum += target.double().sum(0)
        text = self.texts[batch.labels]
        both = {"": score_columns(z, z_eq, text), CENTRED: score_columns(z, z_centred, text)}
        return {f"{kind}{name}": columns[COLUMNS.index(name)] for kind, columns in both.items() for name in ROW_FIGURES}

    def result(self, rows: Rows, name: str) -> TranslatorScores:
        """Scores over all processes; rows are all images' figures."""
        quality, target_sum = all_reduce_sum(self.quality), all_reduce_sum(self.target_sum)
        cosine, hits, residual, squared, count = quality.tolist()
        spread = squared - float(target_sum @ target_sum) / count
        overall = {key: float(value) for key, value in self.scores.compute().items()}
        centred = {key: float(value) for key, value in self.centred.compute().items()}
        with self.scores.sync_context():
            per_class = {
                key: [None if np.isnan(v) else v for v in values.tolist()]
                for key, values in self.scores.per_class().items()
            }
            quantiles = {f"{n}_{int(100 * q)}": self.scores.quantile(n, q) for n in ("AS", "IS") for q in (0.05, 0.5, 0.95)}  # type: ignore[arg-type]
        info = self.translator.info
        return TranslatorScores(
            overall=overall,
            centred=centred,
            intervals=_intervals(rows, name),
            per_class=per_class,
            quantiles=quantiles,
            cosine=cosine / count,
            r2=1 - residual / spread,
            zero_shot=hits / count,
            ridge=info.ridge,
            fit_images=info.images,
            standardized=info.standardized,
            validation_r2=info.validation_r2,
        )


def _intervals(rows: Rows, name: str) -> dict[str, list[float]]:
    """95 % bootstrap intervals of each overall figure, of the paper's removal and of the centred one: images clustered in classes."""
    columns: dict[str, np.ndarray] = {}
    for kind in ("", CENTRED):
        attribute, image, kappa = (rows[f"{kind}{figure}/{name}"] for figure in ROW_FIGURES)
        columns |= {
            f"{kind}AS": attribute,
            f"{kind}AS_neg": np.maximum(-attribute, 0),
            f"{kind}AS_pos": np.maximum(attribute, 0),
            f"{kind}AS_abs": np.abs(attribute),
            f"{kind}IS": image,
            f"{kind}kappa": kappa,
        }
    table = np.stack(list(columns.values()), axis=1).astype(np.float64)
    drawn = resampled_means(table, groups=rows["label"])  # one draw for all of them
    intervals = {key: np.quantile(drawn[:, place], [0.025, 0.975]).tolist() for place, key in enumerate(columns)}
    for kind in ("", CENTRED):
        pair = [list(columns).index(f"{kind}{figure}") for figure in ("IS", "AS_abs")]
        intervals[f"{kind}ratio"] = list(ratio_interval(table[:, pair].mean(0), drawn[:, pair])[1:])
    return intervals


def analyze_model(
    classifier: Classifier,
    part: ImageSplit,
    embeddings: np.ndarray,
    texts: Tensor,
    translators: Mapping[str, Translator],
    *,
    mean: Tensor,
    invariance: Invariance = "logits",
    settings: PassSettings | None = None,
    steering_image_score: float = 40.0,
) -> ModelMeasurement:
    """Measure one classifier on the pictures of a part, once through, with all translators at the same time.

    Shapes: embeddings (N, n), texts (C, n) unit rows, mean (m,) the feature mean for the centred removal (METHOD section 8.4).
    Angles in degrees. Exact over processes: every picture is counted once.

    Raises:
        ValueError: the part has no or unlabelled pictures, or the head has no null space.
    """
    unlabelled = int((np.asarray(part.labels) < 0).sum())
    if not len(part) or unlabelled:
        raise ValueError(
            f"part {part.name!r} must hold labelled pictures to be measured on; it has {len(part)}, {unlabelled} of them unlabelled"
        )
    space = NullSpace.from_weight(classifier.weight, invariance=invariance).to(texts.device)
    passes = {name: _TranslatorPass(translator, texts) for name, translator in translators.items()}
    columns: list[dict[str, np.ndarray]] = []
    kept: list[Rows] = []
    steered = evenly(len(part), STEERING_IMAGES)
    changes = [0.0, 0.0]
    for batch in gathered(iterate_features(classifier, part, embeddings, settings or PassSettings(), "measuring")):
        figures, equivalent, centred = _model_figures(batch, space, texts, mean)
        for index, change in enumerate(_logit_change(classifier, batch.features, space)):
            changes[index] = max(changes[index], change)
        for name, running in passes.items():
            figures.update({f"{f}/{name}": v for f, v in running.update(batch, equivalent, centred).items()})
        columns.append({name: value.cpu().numpy() for name, value in figures.items()})
        kept.append(_steered(batch, steered))
    rows = gather_rows(columns, sort_by="index")
    rows["image"] = np.array([part.identifier(int(i)) for i in rows["index"]])
    accuracy = mean_interval(rows["correct"], groups=rows["label"])
    return ModelMeasurement(
        images=len(rows["index"]),
        top1=accuracy[0],
        top1_interval=list(accuracy[1:]),
        null_share=float(rows["null_share"].mean()),
        null_energy=float((rows["null_energy"]).sum() / rows["energy"].sum()),
        logit_change_float64=max(float(v) for v in gather_rows([{"v": np.array(changes[:1])}])["v"]),
        logit_change_float32=max(float(v) for v in gather_rows([{"v": np.array(changes[1:])}])["v"]),
        vlm_zero_shot=float(rows["vlm_correct"].mean()),
        head=summarize_head(classifier, space),
        translators={name: running.result(rows, name) for name, running in passes.items()},
        steering=_steering(kept, texts, space, translators, steering_image_score),
        rows=rows,
    )


def _model_figures(
    batch: FeatureBatch, space: NullSpace, texts: Tensor, mean: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Per-image figures that need no translator, and the equivalent features of both removals (B, m)."""
    null = space.component(batch.features)
    vlm = torch.nn.functional.normalize(batch.embeddings, dim=-1) @ texts.T
    figures = {
        "index": batch.indices,
        "label": batch.labels,
        "correct": (batch.logits.argmax(1) == batch.labels).double(),
        "vlm_correct": (vlm.argmax(1) == batch.labels).double(),
        "null_share": null_share(batch.features, null).double(),
        "null_energy": null.double().square().sum(1),
        "energy": batch.features.double().square().sum(1),
    }
    return figures, batch.features - null, space.remove(batch.features, mean=mean)


def _logit_change(classifier: Classifier, features: Tensor, space: NullSpace) -> tuple[float, float]:
    """Largest |Δlogit| between f and f~ in float64 and in the classifier's own float32 arithmetic.

    The softmax null lets all logits of a picture move together, which no probability sees: that much is taken out.
    """
    exact = features.double()
    equivalent = space.remove(exact)
    wide = (exact - equivalent) @ classifier.weight.detach().double().T
    with torch.no_grad():
        narrow = classifier.logits(features) - classifier.logits(equivalent.float())
    if space.invariance == "softmax":
        wide, narrow = (change - change.mean(1, keepdim=True) for change in (wide, narrow))
    return float(wide.abs().max()), float(narrow.abs().max())


def _steered(batch: FeatureBatch, chosen: np.ndarray) -> Rows:
    """What steering needs of those pictures of a batch that are among the chosen indices."""
    mine = np.isin(batch.indices.numpy(), chosen)
    kept = torch.from_numpy(mine).to(batch.features.device)
    features, labels = batch.features[kept].cpu().numpy(), batch.labels[kept].cpu().numpy()
    return {"features": features, "labels": labels, "indices": batch.indices.numpy()[mine]}


def _steering(
    kept: list[Rows], texts: Tensor, space: NullSpace, translators: Mapping[str, Translator], degrees: float
) -> dict[str, SteeringSummary]:
    """Table-1 steering for each translator as its own attacker and judge, on pictures from all over the part."""
    width = space.basis.shape[0]
    empty: Rows = {
        "features": np.zeros((0, width), np.float32),
        "labels": np.zeros(0, np.int64),
        "indices": np.zeros(0, np.int64),
    }
    rows = gather_rows(kept or [empty], sort_by="indices")
    features, labels, indices = (torch.from_numpy(rows[name]).to(texts.device) for name in ("features", "labels", "indices"))
    return {
        name: measure_steering(
            features, labels, indices, texts=texts, null_space=space, attacker=translator, image_score=degrees
        )
        for name, translator in translators.items()
    }
