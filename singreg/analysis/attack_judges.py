"""Attacked images judged from their 8-bit files, checks of the attack itself, and ordinary robustness."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from singreg.analysis.attack import LAGRANGIAN, LEVELS, TANGENT, Budget, ascend
from singreg.analysis.attack_images import (
    ATTACK,
    ONE_STEP,
    RANDOM,
    PixelModel,
    away_from_label,
    load_images,
    share_interval,
)
from singreg.analysis.statistics import mean_interval, paired_difference
from singreg.data.corruption import KINDS, CorruptedSplit
from singreg.data.datasets import ImageSplit
from singreg.functional import angle
from singreg.models.vlm import VisionLanguageModel
from singreg.translator import Translator

READINGS = ("fooled the translator", "fooled the translators", "fooled the VLM", "changed meaning")
"""Who saw the target first, from the attacked translator alone to all image encoders, of which there must be two."""
SLACK = 0.05  # degrees by which a search may fall short, and that passes must gain by themselves
SEVERITY = 3  # of the corruptions


@dataclass(frozen=True)
class Judge:
    """What reads images from their files.

    Attributes:
        read: from paths to embeddings (B, n).
        texts: (C, n) unit rows of the class prompts in its space.
    """

    read: Callable[[Sequence[Path]], Tensor]
    texts: Tensor


def encoder_judge(vlm: VisionLanguageModel, texts: Tensor) -> Judge:
    """Return a real image encoder with its own preprocessing; the attack never saw it."""

    def read(paths: Sequence[Path]) -> Tensor:
        rows = []
        for path in paths:
            with Image.open(path) as image:
                rows.append(vlm.transform(image.convert("RGB")))
        return vlm.embed_images(torch.stack(rows)).cpu()

    return Judge(read, texts.cpu())


def translator_judge(model: PixelModel, translator: Translator, texts: Tensor) -> Judge:
    """Return a reader of a classifier's translated features."""

    @torch.no_grad()
    def read(paths: Sequence[Path]) -> Tensor:
        features, _ = model(load_images(paths).to(model.mean.device))
        translated: Tensor = translator(features)
        return translated.float().cpu()

    return Judge(read, texts.cpu())


def judge_images(
    attacked: pd.DataFrame,
    folder: Path,
    model: PixelModel,
    judges: Mapping[str, Judge],
    budgets: Sequence[Budget],
    *,
    tau: float,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Read every attacked image and its original again from the PNG files; nothing the attack reported is believed.

    Args:
        attacked: rows of `save_attacked`.

    Returns:
        The rows with kept (within the budget, every logit within τ, the decision stays), logit_change, decision,
        decision_before, linf (255ths), l2; and by judge: rise, the angle gained towards the target, shift, the angle
        between the two readings (degrees), first and first_before, whether the target outranks all class prompts.
    """
    known = {budget.label: budget for budget in budgets}
    chunks = (attacked.iloc[start : start + batch_size] for start in range(0, len(attacked), batch_size))
    found = [_judge_chunk(chunk, folder, model, judges, known, tau) for chunk in chunks]
    return pd.concat(found, ignore_index=True)


@torch.no_grad()
def _judge_chunk(
    chunk: pd.DataFrame,
    folder: Path,
    model: PixelModel,
    judges: Mapping[str, Judge],
    budgets: Mapping[str, Budget],
    tau: float,
) -> pd.DataFrame:
    before, after = ([folder / path for path in chunk[name]] for name in ("original", "file"))
    x, y = load_images(before), load_images(after)
    old, new = (model(images.to(model.mean.device))[1].float().cpu() for images in (x, y))
    steps = (LEVELS * (y - x)).round() / LEVELS
    lengths = {"linf": Budget("linf", 0).lengths(steps), "l2": Budget("l2", 0).lengths(steps)}
    own = [budgets[label] for label in chunk["budget"]]
    within = [float(lengths[budget.norm][row]) <= budget.radius * (1 + 1e-6) + 1e-9 for row, budget in enumerate(own)]
    change = (new - old).abs().amax(1)
    kept = torch.tensor(within) & (change <= tau) & (old.argmax(1) == new.argmax(1))
    columns = {"kept": kept, "logit_change": change, "decision": new.argmax(1), "decision_before": old.argmax(1)}
    columns |= {"linf": LEVELS * lengths["linf"], "l2": lengths["l2"]}
    targets = torch.tensor(chunk["target"].to_numpy())
    for name, judge in judges.items():
        z, moved, texts = judge.read(before).double(), judge.read(after).double(), judge.texts.double()
        first, first_before = ((normalize(rows, dim=-1) @ texts.T).argmax(1) == targets for rows in (moved, z))
        columns[f"rise {name}"] = angle(z, texts[targets]) - angle(moved, texts[targets])
        columns |= {f"shift {name}": angle(z, moved), f"first {name}": first, f"first_before {name}": first_before}
    found: pd.DataFrame = chunk.assign(**{name: values.numpy() for name, values in columns.items()})
    return found


def judges_of(judged: pd.DataFrame) -> list[str]:
    """Return the names of the judges behind rows of `judge_images`."""
    return [name.removeprefix("rise ") for name in judged.columns if name.startswith("rise ")]


def won(judged: pd.DataFrame, judge: str) -> pd.Series:
    """Return whether the target became first by that judge, all else kept."""
    found: pd.Series = judged["kept"] & judged[f"first {judge}"] & ~judged[f"first_before {judge}"]
    return found


def counted_rise(judged: pd.DataFrame, judge: str) -> pd.Series:
    """Return rises as they count: 0 for what was not kept, but for random directions, which are held to nothing."""
    found: pd.Series = judged[f"rise {judge}"].where(judged["kept"] | (judged["arm"] == RANDOM), 0.0)
    return found


def readings_of(judged: pd.DataFrame, encoders: Sequence[str]) -> pd.Series:
    """Return who was fooled by each image: the highest of READINGS, or "" for nobody.

    "changed meaning" needs two image encoders or more, all of which put the target first; one that does beside another
    that does not is a fooled encoder.
    """
    seen = {name: won(judged, name) for name in judges_of(judged)}
    counts = sum((seen[name].astype(int) for name in encoders), start=pd.Series(0, index=judged.index))
    found = pd.Series("", index=judged.index)
    found[seen["fitted"]] = READINGS[0]
    found[seen["auditor"]] = READINGS[1]
    found[counts > 0] = READINGS[2]
    found[(counts == len(encoders)) & (len(encoders) >= 2)] = READINGS[3]
    return found


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
                "pictures": count,
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
        row = {"crafted_on": crafted_on, "judged_on": mine["model"].iloc[0], "budget": budget}
        rises = {
            "rise": float(counted_rise(theirs, "fitted").mean()),
            "own": float(counted_rise(mine, "fitted").mean()),
        }
        found.append({**row, **rises, "kept": float(theirs["kept"].mean())})
    return found


def summarize_climbs(climbs: pd.DataFrame) -> list[dict[str, Any]]:
    """Average how far the passes of each model, budget and kind got by themselves (degrees)."""
    found = []
    for (model, budget, kind), rows in climbs.groupby(["model", "budget", "kind"], sort=False):
        means = {name: float(rows[name].mean()) for name in ("one_step", "began", "alone")}
        found.append({"model": model, "budget": budget, "kind": kind, "pictures": len(rows), **means})
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
    longest = {budget: rows.loc[rows["budget"] == budget.label, budget.norm].max() for budget in budgets}
    over = [
        f"{longest[budget]:.4g} at {budget.label}"
        for budget in budgets
        if not longest[budget] <= budget.size * (1 + 1e-6) + 1e-6
    ]
    words = f"largest change {change:.3g} of {tau:g} allowed; {flipped} of {len(claimed)} decided otherwise"
    return [
        (
            "logits within the tolerance and the decision stays, in the saved files",
            change <= tau and not flipped,
            words,
        ),
        ("every displacement within its budget, in the saved files", not over, "; ".join(over) or "none is longer"),
    ]


def _rise_checks(rows: pd.DataFrame, climbs: pd.DataFrame, budgets: Sequence[Budget]) -> list[_Found]:
    def mean(budget: Budget, arm: str) -> float:
        values = counted_rise(rows[(rows["budget"] == budget.label) & (rows["arm"] == arm)], "fitted")
        # An attacker would keep only the random directions that help.
        return float((values.clip(lower=0) if arm == RANDOM else values).mean())

    attack, single, random = ([mean(budget, arm) for budget in budgets] for arm in (ATTACK, ONE_STEP, RANDOM))
    falls = [
        a - b
        for (a, b), (one, two) in zip(itertools.pairwise(attack), itertools.pairwise(budgets), strict=True)
        if one.norm == two.norm
    ]
    fall = max(falls, default=0.0)
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
    worst = min(gains)
    return all(
        gain >= -SLACK for gain, _ in gains
    ), f"{worst[0]:+.2f}° at {worst[1]}, the least of {len(gains)} budgets"


def still_right(
    model: PixelModel, images: Tensor, labels: Tensor, sizes: Sequence[float], *, steps: int = 10, seed: int
) -> dict[str, Tensor]:
    """Return which images keep their right answer under PGD on the margin, (B,) bool by "clean" and by 255ths.

    What fell at a smaller budget stays fallen at a larger one; only what still stands is attacked.

    Shape: images (B, 3, H, W) on the 8-bit grid, labels (B,) among the head's rows.
    """
    with torch.no_grad():
        standing = model(images)[1].argmax(1) == labels
    found = {"clean": standing}
    for place, size in enumerate(sorted(sizes)):
        standing = standing.clone()
        rows = standing.nonzero().flatten()
        if len(rows):
            generator = torch.Generator().manual_seed(seed + place)
            judged = away_from_label(model, labels[rows])
            attack = ascend(judged, images[rows], Budget("linf", size), steps=steps, generator=generator)
            with torch.no_grad():
                standing[rows] = model(attack.images)[1].argmax(1) == labels[rows]
        found[f"{size:g}"] = standing
    return found


@torch.no_grad()
def corrupted_right(model: PixelModel, split: ImageSplit, labels: Tensor, *, batch_size: int = 64) -> dict[str, Tensor]:
    """Return which images of a split are right when blurred, noisy or of low contrast, (N,) bool by kind."""
    found = {}
    for kind in KINDS:
        corrupted = CorruptedSplit(split, kind, SEVERITY)
        right = []
        for start in range(0, len(split), batch_size):
            rows = range(start, min(start + batch_size, len(split)))
            images = torch.stack([model.image(corrupted, row) for row in rows])
            right.append(model(images)[1].argmax(1).cpu() == labels[start : start + batch_size])
        found[kind] = torch.cat(right)
    return found
