"""One arm of a study, measured: scores, information, steering at equal effort, side effects (METHOD 8 and 9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from singreg.analysis.features import FeatureBatch, PassSettings, evenly, iterate_features
from singreg.analysis.fitting import fit_on_split, translator_agreement
from singreg.analysis.probes import BlockFits, fit_blocks, measure_information
from singreg.analysis.scores import STEERING_IMAGES, Rows, analyze_model
from singreg.analysis.statistics import paired_ratio
from singreg.analysis.steering import SteeringRows, steering_targets
from singreg.analysis.steering_curves import fit_conditional, natural_radii, read_along
from singreg.data.corruption import KINDS, CorruptedSplit
from singreg.data.datasets import ImageSplit
from singreg.data.scenes import ATTRIBUTES
from singreg.data.splits import SceneSplit, SubsetSplit
from singreg.models.classifier import Classifier
from singreg.models.edits import drop_null
from singreg.nullspace import Invariance, NullSpace
from singreg.ridge import DEFAULT_RIDGES
from singreg.setup import Setup
from singreg.steering import ConditionalGaussian, similarity_gradient, steer, unit_in_null
from singreg.translator import LinearTranslator
from singreg.utils import gather_rows

AUDITOR = "auditor"
IMAGE_SCORE, STEP = 40.0, 0.25  # how far features are steered: in degrees, and as a share of |f|
SEVERITY, BINS = 3, 15  # of corruptions; of the calibration error
ROUNDING = 1e-6  # a null residual below this share of |f| is what float32 left of none
OVERALL = ("AS", "AS_neg", "AS_pos", "AS_abs", "IS", "kappa")
Images = tuple[ImageSplit, np.ndarray]
"""A split with its image embeddings (N, n)."""


@dataclass(frozen=True)
class Measured:
    """What was found of one arm at one seed; `extra` is what to note. Without a null space it is top1 alone."""

    figures: dict[str, float]
    intervals: dict[str, list[float]] = field(default_factory=dict)
    rows: pd.DataFrame | None = None
    validation: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def measure_arm(
    classifier: Classifier,
    setup: Setup,
    translators: dict[str, LinearTranslator],
    validation: Images | None = None,
    *,
    ridge: float | None = None,
    invariance: Invariance = "logits",
    ood: int = 0,
    seed: int = 0,
) -> Measured:
    """Fit an auditor on the audit images and measure an arm by it, and by the translators, on the test images.

    Args:
        validation: images that an arm may be chosen on.
        ridge: the auditor's; None lets it choose.
        ood: unlabelled images of the bank that count as strange ones, for the AUROCs.
    """
    splits, passes, texts = setup.splits, setup.passes, setup.texts
    audit, test = ((each, setup.embeddings[each.name]) for each in (splits.audit, splits.test))
    how: dict[str, Any] = {"invariance": invariance, "settings": passes}
    ridges = DEFAULT_RIDGES if ridge is None else (ridge,)
    fitted = fit_on_split(classifier, *audit, ridges=ridges, description="fitting the auditor", **how)
    auditor, how["mean"] = fitted.translator, fitted.mean
    table, found = analyze_model(classifier, *test, texts, {**translators, AUDITOR: auditor}, **how)
    figures, intervals = _scores(found)
    figures |= {f"agreement/{n}|{AUDITOR}": translator_agreement(T, auditor, texts) for n, T in translators.items()}
    space = NullSpace.from_weight(classifier.weight, invariance=invariance).to(classifier.weight.device)

    def read(split: ImageSplit, table: np.ndarray, settings: PassSettings = passes) -> Iterator[FeatureBatch]:
        return iterate_features(classifier, split, table, settings, "measuring the arm")

    blocks: dict[str, Any] = {"null_space": space, "classes": classifier.num_classes}
    fits = fit_blocks(read(*audit), target_dim=texts.shape[1], **blocks)
    information, harmless = measure_information(read(*test), fits), harmless_rows(read(*test), fits, texts)
    value, low, high = paired_ratio(*harmless.values(), groups=table["label"].to_numpy())
    figures |= {"null_probe": information["accuracy"]["null_space"], "probe_chance": information["chance"]}
    figures |= {"unique_r2": information["unique"], "harmless_r2": 1 - value}
    intervals |= {"harmless_r2": [1 - high, 1 - low], "null_probe": information["intervals"]["accuracy null_space"]}
    known, held = known_attributes(splits.audit), known_attributes(splits.test)
    if known is not None and held is not None:
        targets = known.to_numpy(np.float32), held.to_numpy(np.float32)
        fits = fit_blocks(read(splits.audit, targets[0]), target_dim=known.shape[1], **blocks)
        figures |= attribute_r2(read(splits.test, targets[1]), fits, list(known.columns))
    gaussian = fit_conditional(classifier, *audit, space, settings=passes)
    natural = natural_radii(classifier, *test, gaussian, fit_images=len(splits.audit), settings=passes)
    steered = steer_images(read(*test), len(table), texts, auditor, space, gaussian, natural["p95"], seed)
    figures |= {str(name): float(steered[name].mean()) for name in steered}
    figures |= _side_effects(read, setup, partial(network_outputs, space=space, mean=fitted.mean), ood, seed)
    held_out = {}
    if validation is not None:
        _, found = analyze_model(classifier, *validation, texts, {AUDITOR: auditor}, **how)
        scores, step = found["translators"][AUDITOR]["overall"], found["steering"][AUDITOR]["step"]
        held_out = {"top1": found["top1"], "images": found["images"], "step": step}
        held_out |= {key: scores[key] for key in ("AS_neg", "AS_abs", "IS")}
    rows = table.assign(**{f"harmless_{name}": values for name, values in harmless.items()}).join(steered)
    return Measured(_floats(figures), intervals, rows, _floats(held_out))


def _floats(figures: dict[str, Any]) -> dict[str, float]:
    return {key: math.nan if value is None else float(value) for key, value in figures.items()}


def _scores(found: dict[str, Any]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Figures of `analyze_model` by name, with the audit gap: the auditor's AS⁻ over that of the loop's translator."""
    figures = {key: found[key] for key in ("top1", "null_share", "null_energy")}
    figures["nullity"], intervals = found["head"]["nullity"], {"top1": found["top1_interval"]}
    for name, scores in found["translators"].items():
        figures |= {f"{key}/{name}": scores["overall"][key] for key in OVERALL} | {f"cosine/{name}": scores["cosine"]}
        intervals |= {f"{key}/{name}": scores["intervals"][key] for key in ("AS_neg", "AS_abs", "IS")}
    loop = figures.get("AS_neg/loop", 0.0)
    if loop > 0:
        figures["audit_gap"] = figures[f"AS_neg/{AUDITOR}"] / loop
    return figures, intervals


def _side_effects(
    read: Callable[..., Iterator[FeatureBatch]], setup: Setup, outputs: Callable[..., Rows], ood: int, seed: int
) -> dict[str, Any]:
    """Calibration, AUROCs of strange images and accuracy on corrupted ones (METHOD section 8.8)."""
    splits, z = setup.splits, setup.embeddings
    tested = outputs(read(splits.test, z["test"]))
    figures = {"ece": calibration_error(tested["confidence"], tested["correct"]), "nll": tested["nll"].mean()}
    unlabelled = np.flatnonzero(np.asarray(splits.bank.labels) < 0)
    strange = unlabelled[evenly(len(unlabelled), ood)] if ood and len(unlabelled) else unlabelled[:0]
    if len(strange):
        unknown = outputs(read(splits.bank.subset(strange, "ood"), z["bank"][strange]))
        figures |= ood_figures(tested, unknown, outputs(read(splits.audit, z["audit"])))
    for kind in KINDS:
        corrupted = read(
            CorruptedSplit(splits.test, kind, SEVERITY, seed=seed), z["test"], replace(setup.passes, cache=None)
        )
        figures[f"corrupted/{kind}"] = outputs(corrupted)["correct"].mean()
    return figures


def measure_dropped(classifier: Classifier, images: Images, settings: PassSettings) -> Measured:
    """Measure top-1 after the null space was dropped: nothing else is left."""
    batches = iterate_features(drop_null(classifier), *images, replace(settings, cache=None), "without the null space")
    rows = [_arrays(correct=batch.logits.argmax(1) == batch.labels) for batch in batches]
    return Measured({"top1": float(gather_rows(rows)["correct"].mean())})


def harmless_rows(batches: Iterable[FeatureBatch], fits: BlockFits, texts: Tensor) -> Rows:
    """Return of each image residual |P(z - T f)|² and spread |P(z - z̄)|², P the projection off the class prompts' span.

    T is the fit on f of `fit_blocks`, z̄ these images' mean; 1 - Σ residual / Σ spread is R²(P z | f) (METHOD section
    8.5). Both are 0 where the prompts span the whole space. Shape: texts (C, n); returns (N,) each.
    """
    rank = int(torch.linalg.matrix_rank(texts.double()))
    inside = torch.linalg.svd(texts.double().T, full_matrices=False).U[:, :rank]
    rows = []
    for batch in batches:
        z = batch.embeddings.double()
        off, error = (value - (value @ inside) @ inside.T for value in (z, z - _predicted(fits, "features", batch)))
        rows.append(_arrays(index=batch.indices, off=off, residual=error.square().sum(1)))
    table = gather_rows(rows, sort_by="index")
    left = float(rank < texts.shape[1])
    spread = np.square(table["off"] - table["off"].mean(0)).sum(1)
    return {"residual": left * table["residual"], "spread": left * spread}


def _arrays(**columns: Tensor) -> Rows:
    return {name: values.cpu().numpy() for name, values in columns.items()}


def _predicted(fits: BlockFits, block: str, batch: FeatureBatch) -> Tensor:
    basis, solution = fits.basis[block], fits.solutions[block]
    return (batch.features.to(basis) @ basis) @ solution.matrix.T + solution.offset


def known_attributes(split: ImageSplit) -> pd.DataFrame | None:
    """Return every value of every attribute of built-in scenes as 0 or 1, such as "color: red"; None for others."""
    if isinstance(split, SubsetSplit):
        whole = known_attributes(split.parent)
        return None if whole is None else whole.iloc[split.indices]
    if not isinstance(split, SceneSplit):
        return None
    places = {f"{name}: {value}": (name, i) for name, values in ATTRIBUTES.items() for i, value in enumerate(values)}
    every: pd.DataFrame = pd.DataFrame({key: split.table.codes[name] == i for key, (name, i) in places.items()})
    return every


def attribute_r2(batches: Iterable[FeatureBatch], fits: BlockFits, names: Sequence[str]) -> dict[str, float]:
    """Return held-out R² as "BLOCK_r2/NAME" of known attributes, from f, Π_p f and Π_n f; NaN for one that is constant.

    `fits` and the batches have the attributes (B, k) in the place of embeddings.
    """
    rows = []
    for batch in batches:
        targets = batch.embeddings.double()
        error = {block: (targets - _predicted(fits, block, batch)).square() for block in fits.basis}
        rows.append(_arrays(index=batch.indices, target=targets, **error))
    table = gather_rows(rows, sort_by="index")
    spread = np.square(table["target"] - table["target"].mean(0)).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        r2 = {block: np.where(spread > 0, 1 - table[block].sum(0) / spread, np.nan) for block in fits.basis}
    return {f"{block}_r2/{name}": float(r2[block][place]) for place, name in enumerate(names) for block in r2}


@torch.no_grad()
def steer_images(
    batches: Iterable[FeatureBatch],
    count: int,
    texts: Tensor,
    translator: LinearTranslator,
    space: NullSpace,
    gaussian: ConditionalGaussian,
    radius: float,
    seed: int = 0,
) -> pd.DataFrame:
    """Steer images towards one other class's prompt, fixed by seed and index; a row an image, NaN where not steered.

    steering_step (a share of |f|, NaN out of reach) and steering_reachable at an image score of 40°; AS25 and success25
    at a relative step of 25 %; manifold_success95 at a natural radius, along Σ times the gradient. One gradient step,
    float64, so all are lower bounds; at most 1024 images, evenly over the split. Columns end in "/auditor".

    Shape: texts (C, n) unit rows.
    """
    chosen, prompts = np.zeros(count, dtype=bool), texts.double()
    chosen[evenly(count, STEERING_IMAGES)] = True
    columns = []
    for batch in batches:
        mine = torch.from_numpy(chosen[batch.indices.numpy()])
        here = mine.to(batch.features.device)
        f, labels, indices = batch.features[here].double(), batch.labels[here], batch.indices[mine]
        targets = steering_targets(labels, indices, len(prompts), seed=seed)
        rows, length = SteeringRows(indices, labels, targets, f, prompts[targets]), torch.linalg.vector_norm(f, dim=-1)
        steered = steer(f, rows.text, null_space=space, image_score=IMAGE_SCORE, translator=translator)
        gradient = similarity_gradient(f, rows.text, translator)
        direction = unit_in_null(space.component(gradient), gradient)
        gained, _, won = read_along(rows, direction, STEP * length[:, None], translator, prompts)
        natural = normalize(gaussian.on_manifold(direction), dim=-1, eps=torch.finfo(f.dtype).tiny)
        largest = torch.nan_to_num(gaussian.step_for_radius(f, natural, f.new_tensor([radius])))
        _, _, won_natural = read_along(rows, natural, largest, translator, prompts)
        found = {"steering_step": steered.step / length, "steering_reachable": steered.reachable.double()}
        found |= {"AS25": gained[:, 0], "success25": won[:, 0], "manifold_success95": won_natural[:, 0]}
        columns.append(_arrays(index=indices, **{f"{name}/{AUDITOR}": values for name, values in found.items()}))
    table: pd.DataFrame = pd.DataFrame(gather_rows(columns)).set_index("index").reindex(range(count))
    return table


def network_outputs(batches: Iterable[FeatureBatch], space: NullSpace, mean: Tensor) -> Rows:
    """Return of all images correct, confidence, nll, residual |Π_n(f - μ)|, logsumexp and max_logit (N,)."""
    rows = []
    for batch in batches:
        f, logits = batch.features.double(), batch.logits.double()
        residual = torch.linalg.vector_norm(space.component(f - mean.double()), dim=1)
        # What float32 leaves of a null component that is not there would otherwise be ranked as if it said something.
        residual = residual * (residual > ROUNDING * torch.linalg.vector_norm(f, dim=1))
        columns = {"correct": logits.argmax(1) == batch.labels, "confidence": logits.softmax(1).amax(1)}
        columns["nll"] = cross_entropy(logits, batch.labels, reduction="none", ignore_index=-1)
        columns |= {"residual": residual, "logsumexp": logits.logsumexp(1), "max_logit": logits.amax(1)}
        rows.append(_arrays(index=batch.indices, **columns))
    return gather_rows(rows, sort_by="index")


def ood_figures(known: Rows, strange: Rows, fit: Rows) -> dict[str, float]:
    """Return how well null energy, the energy score and ViM's combination tell strange images from known ones (AUROC).

    ViM with the null space of W in the place of the small principal components: α|Π_n(f - μ)| - logsumexp, with α the
    mean largest logit over the mean residual of the fit. Without any null energy the energy score stands alone.
    """
    scale = fit["max_logit"].mean() / fit["residual"].mean() if fit["residual"].any() else 0.0

    def score(weight: float, energy: float) -> float:
        return auroc(*(weight * each["residual"] - energy * each["logsumexp"] for each in (known, strange)))

    return {"ood_null_energy": score(1, 0), "ood_energy": score(0, 1), "ood_vim": score(scale, 1)}


def auroc(known: np.ndarray, strange: np.ndarray) -> float:
    """Return the share of (known, strange) pairs in which the strange one scores higher, ties as half; (N,), (M,)."""
    ranks, count = pd.Series(np.concatenate([known, strange])).rank().to_numpy(), len(strange)
    return float((ranks[len(known) :].mean() - (count + 1) / 2) / len(known))


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Return the expected calibration error over equal bins of the largest probability (N,)."""
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    return float(np.abs(np.bincount(bins, weights=confidence - correct)).sum() / len(bins))
