"""The attacked classifiers themselves: what they are, and how far their features can be steered (METHOD section 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from singreg.analysis.attackers import Outsider
from singreg.analysis.features import PassSettings, cached_features
from singreg.analysis.robustness import measure_robustness
from singreg.analysis.steering import plan_pairs
from singreg.analysis.steering_curves import Budgets, fit_conditional, natural_radii
from singreg.data.datasets import ImageSplit, Splits
from singreg.data.embeddings import take_rows
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance, NullSpace
from singreg.translator import LinearTranslator

STEPS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)  # shares of |f|
RADII = (0.25, 0.5, 0.75, 1.0)  # natural medians


def attack_features(
    classifier: Classifier,
    splits: Splits,
    embeddings: Mapping[str, np.ndarray],
    texts: Tensor,
    translators: Mapping[str, LinearTranslator],
    chosen: pd.DataFrame,
    targets: Sequence[int],
    *,
    pairs: int,
    tau: float,
    outsiders: Mapping[str, Outsider],
    invariance: Invariance = "logits",
    settings: PassSettings,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Steer the chosen test images (see `choose_images`) in feature space by every attack; None without a null space.

    Args:
        targets: classes whose prompts features are steered towards.
        pairs: of a source class and a target, drawn evenly over sources.
        outsiders: other models' attackers, of which those of another feature width are left out.

    Shape: embeddings (N, n) by the split's name, texts (C, n).
    """
    weight = classifier.weight
    space = NullSpace.from_weight(weight, invariance=invariance, allow_empty=True)
    if not space.nullity:
        return None
    gaussian = fit_conditional(classifier, splits.bank, embeddings["bank"], space, settings=settings)
    test = splits.test, embeddings["test"]
    natural = natural_radii(classifier, *test, gaussian, fit_images=len(splits.bank), settings=settings)
    names, labels = splits.class_names, np.full(len(splits.test), -1)
    labels[chosen["image"]] = chosen["label"]
    sources, keys = sorted(set(chosen["label"].tolist())), [names[place] for place in targets]
    plan = plan_pairs(labels, names, texts, sources, keys, texts[list(targets)], max_pairs=pairs, seed=seed)
    _, figures = measure_robustness(
        classifier,
        *test,
        texts,
        translators,
        plan=plan,
        budgets=Budgets.over(STEPS, RADII, gaussian, natural),
        outsiders={n: o for n, o in outsiders.items() if len(o.null_space.basis) == classifier.feature_dim},
        tolerances=(tau,),
        invariance=invariance,
        settings=settings,
    )
    return figures


@torch.no_grad()
def describe_attacked(
    classifier: Classifier,
    split: ImageSplit,
    embeddings: np.ndarray,
    translators: Mapping[str, LinearTranslator],
    settings: PassSettings,
) -> tuple[dict[str, Any], Tensor]:
    """Return sizes, the logits' standard deviation and every translator's cosine; and the logits (N, C) on the CPU."""
    assert settings.cache is not None
    stored = cached_features(classifier, split, settings)
    f, z = (torch.from_numpy(np.array(table)).to(classifier.weight.device) for table in (stored, embeddings))
    logits = classifier.logits(f).float().cpu()
    null = NullSpace.from_weight(classifier.weight, allow_empty=True)
    sizes = {"classes": len(classifier.weight), "features": classifier.feature_dim, "nullity": null.nullity}
    cosine = {name: float(cosine_similarity(t(f), z, dim=-1).mean()) for name, t in translators.items()}
    return {**sizes, "logit_sd": float(logits.std()), "cosine": cosine}, logits


def zero_shot(embeddings: np.ndarray, texts: Tensor, chosen: pd.DataFrame) -> float:
    """Return the share of the chosen images that an encoder's class prompts name rightly."""
    z = take_rows(embeddings, chosen["image"].to_numpy()).to(texts)
    first = (normalize(z, dim=-1) @ texts.T).argmax(1).cpu().numpy()
    return float((first == chosen["label"].to_numpy()).mean())
