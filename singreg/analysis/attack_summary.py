"""What an attack found: its models, intervals, models compared, checks of the attack itself, and feature space."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from singreg.analysis.attack import LAGRANGIAN, TANGENT, Budget
from singreg.analysis.attack_images import ATTACK, ONE_STEP, RANDOM
from singreg.analysis.attack_judges import READINGS, counted_rise, judges_of, readings_of, share_interval, won
from singreg.analysis.attackers import Outsider
from singreg.analysis.features import PassSettings, cached_features
from singreg.analysis.robustness import measure_robustness
from singreg.analysis.statistics import mean_interval, paired_difference
from singreg.analysis.steering import plan_pairs
from singreg.analysis.steering_curves import Budgets, fit_conditional, natural_radii
from singreg.data.datasets import ImageSplit, Splits
from singreg.data.embeddings import take_rows
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance, NullSpace
from singreg.translator import LinearTranslator

SLACK = 0.05  # degrees by which a search may fall short, and that passes must gain by themselves
STEPS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)  # shares of |f|
RADII = (0.25, 0.5, 0.75, 1.0)  # natural medians


def summarize_attack(judged: pd.DataFrame, encoders: Sequence[str], *, seed: int = 0) -> list[dict[str, Any]]:
    """Summarise every model, budget and arm, with 95 % intervals: of degrees by bootstrap, of shares by Wilson.

    Args:
        encoders: names of the image encoders that count as witnesses.
    """
    judges, found = judges_of(judged), []
    readings = readings_of(judged, encoders)
    for (model, budget, arm), rows in judged.groupby(["model", "budget", "arm"], sort=False):
        count, of_these = len(rows), readings[rows.index]
        found.append(
            {
                "model": model,
                "budget": budget,
                "arm": arm,
                "images": count,
                "kept": float(rows["kept"].mean()),
                "flipped": float((rows["decision"] != rows["decision_before"]).mean()),
                "logit_change": float(rows["logit_change"].max()),
                "rise": {name: _interval(counted_rise(rows, name), seed) for name in judges},
                "shift": {name: _interval(rows[f"shift {name}"], seed) for name in judges},
                "success": {name: share_interval(int(won(rows, name).sum()), count) for name in judges},
                "readings": {name: share_interval(int((of_these == name).sum()), count) for name in READINGS},
            }
        )
    return found


def _interval(values: pd.Series, seed: int) -> list[float]:
    return list(mean_interval(values.to_numpy(np.float64), seed=seed))


def model_differences(judged: pd.DataFrame, *, seed: int = 0) -> list[dict[str, Any]]:
    """Compare every later model with the first at every budget, paired by image: rise in degrees, success in points."""
    attacks = judged[judged["arm"] == ATTACK]
    first, *others = attacks["model"].unique()
    found = []
    for second, budget, judge in itertools.product(others, attacks["budget"].unique(), judges_of(judged)):
        pair = [
            attacks[(attacks["model"] == name) & (attacks["budget"] == budget)].set_index("image").sort_index()
            for name in (second, first)
        ]
        for figure in ("rise", "success"):
            values = [counted_rise(m, judge) if figure == "rise" else 100.0 * won(m, judge) for m in pair]
            value, low, high = paired_difference(*(v.to_numpy(np.float64) for v in values), seed=seed)
            row = {"first": first, "second": second, "budget": budget, "figure": figure, "judge": judge}
            found.append({**row, "value": value, "low": low, "high": high})
    return found


def transfers_of(own: pd.DataFrame, carried: pd.DataFrame, crafted_on: str) -> list[dict[str, Any]]:
    """Compare, at every budget, images crafted on another model with a model's own, both judged on the latter."""
    found = []
    for budget, mine in own[own["arm"] == ATTACK].groupby("budget", sort=False):
        theirs = carried[(carried["arm"] == ATTACK) & (carried["budget"] == budget)]
        rise, white_box = (float(counted_rise(rows, "fitted").mean()) for rows in (theirs, mine))
        row = {"crafted_on": crafted_on, "judged_on": mine["model"].iloc[0], "budget": budget}
        found.append({**row, "rise": rise, "own": white_box, "kept": float(theirs["kept"].mean())})
    return found


def summarize_climbs(climbs: pd.DataFrame) -> list[dict[str, Any]]:
    """Average how far the passes of each model, budget and kind got by themselves (degrees)."""
    groups = climbs.groupby(["model", "budget", "kind"], sort=False)
    means = groups[["one_step", "began", "alone"]].mean().assign(images=groups.size())
    found: list[dict[str, Any]] = means.reset_index().to_dict("records")
    return found


def attack_checks(
    judged: pd.DataFrame, climbs: pd.DataFrame, budgets: Sequence[Budget], tau: float
) -> list[dict[str, Any]]:
    """Check the attack on every model: one that fails takes every claim of robustness with it.

    The saved files must keep the logits within τ, the decision and the budgets; the attack must reach what its single
    step does, and at a larger budget what it does at a smaller one. It begins with the single step and with the smaller
    budget's images, so it would pass whatever its passes do; so each kind of pass is also measured without what it
    started from: those that begin at the single step must reach it and climb beyond it at one budget or more, those
    from random points must climb beyond random directions.

    Returns:
        model, name, passed, found (the numbers in words).
    """
    checks = []
    for model, rows in judged.groupby("model", sort=False):
        own = climbs[climbs["model"] == model]
        for name, passed, found in [*_file_checks(rows, budgets, tau), *_rise_checks(rows, own, budgets)]:
            checks.append({"model": model, "name": name, "passed": bool(passed), "found": found})
    return checks


_Found = tuple[str, bool, str]


def _file_checks(rows: pd.DataFrame, budgets: Sequence[Budget], tau: float) -> list[_Found]:
    claimed = rows[rows["arm"] != RANDOM]
    change, flipped = claimed["logit_change"].max(), int((claimed["decision"] != claimed["decision_before"]).sum())
    over = []
    for budget in budgets:
        longest = rows.loc[rows["budget"] == budget.label, budget.norm].max()
        if not longest <= budget.size * (1 + 1e-6) + 1e-6:
            over.append(f"{longest:.4g} at {budget.label}")
    logits = "logits within the tolerance and the decision stays, in the saved files"
    words = f"largest change {change:.3g} of {tau:g} allowed; {flipped} of {len(claimed)} decided otherwise"
    lengths = "every displacement within its budget, in the saved files"
    return [(logits, change <= tau and not flipped, words), (lengths, not over, "; ".join(over) or "none is longer")]


def _rise_checks(rows: pd.DataFrame, climbs: pd.DataFrame, budgets: Sequence[Budget]) -> list[_Found]:
    def mean(budget: Budget, arm: str) -> float:
        values = counted_rise(rows[(rows["budget"] == budget.label) & (rows["arm"] == arm)], "fitted")
        # An attacker would keep only the random directions that help.
        return float((values.clip(lower=0) if arm == RANDOM else values).mean())

    attack, single, random = ([mean(budget, arm) for budget in budgets] for arm in (ATTACK, ONE_STEP, RANDOM))
    pairs = itertools.pairwise(zip(budgets, attack, strict=True))
    fall = max((a - b for (one, a), (two, b) in pairs if one.norm == two.norm), default=0.0)
    found = [
        ("the attack reaches what its single step does", *_at_least(budgets, attack, single)),
        ("a larger budget reaches what a smaller one does", fall <= SLACK, f"worst fall {fall:.2f}°"),
    ]
    kinds = climbs["kind"].unique().tolist() or [LAGRANGIAN]  # nothing measured is no pass
    first = TANGENT if TANGENT in kinds else LAGRANGIAN
    for kind in kinds:
        means = climbs[climbs["kind"] == kind].groupby("budget")[["one_step", "began", "alone"]].mean()
        mine = means.reindex([budget.label for budget in budgets])
        alone = mine["alone"].tolist()
        if kind == first:
            found.append((f"{kind} alone reach the single step", *_at_least(budgets, alone, mine["one_step"].tolist())))
        gains = (mine["alone"] - (mine["began"] if kind == first else random)).tolist()
        words = ", ".join(f"{gain:+.2f}° at {budget.label}" for gain, budget in zip(gains, budgets, strict=True))
        beyond = "what they began from" if kind == first else "random directions"
        found.append((f"{kind} climb by themselves beyond {beyond}", any(gain > SLACK for gain in gains), words))
    return found


def _at_least(budgets: Sequence[Budget], high: Sequence[float], low: Sequence[float]) -> tuple[bool, str]:
    gains = [(a - b, budget.label) for a, b, budget in zip(high, low, budgets, strict=True)]
    worst, label = min(gains)
    return all(gain >= -SLACK for gain, _ in gains), f"{worst:+.2f}° at {label}, the least of {len(gains)} budgets"


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
