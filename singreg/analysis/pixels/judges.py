"""Attacked pictures as their files read: by the classifier, the attacked translator, the auditor and real image encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from singreg.analysis.pixels.budgets import LEVELS, Budget
from singreg.analysis.pixels.model import PixelModel, load_pictures
from singreg.analysis.pixels.results import (
    ATTACK,
    HELD_TO_NOTHING,
    READINGS,
    AttackedPicture,
    JudgedPicture,
    PixelDifference,
    PixelSummary,
)
from singreg.analysis.pixels.shares import share_interval
from singreg.analysis.statistics import mean_interval, paired_difference
from singreg.functional import angle
from singreg.models.vlm import VisionLanguageModel
from singreg.translator import Translator

Read = Callable[[Sequence[Path]], Tensor]
"""Picture files to embeddings (B, n) in a judge's space."""


@dataclass(frozen=True)
class Reader:
    """A judge: how it reads picture files, and the class prompts (C, n) in its space as unit rows."""

    read: Read
    texts: Tensor


def encoder_reader(vlm: VisionLanguageModel, texts: Tensor) -> Reader:
    """A real image encoder with its own preprocessing; the attack never saw it. Shapes: texts (C, n)."""

    def read(paths: Sequence[Path]) -> Tensor:
        rows = []
        for path in paths:
            with Image.open(path) as picture:
                rows.append(vlm.transform(picture.convert("RGB")))
        return vlm.embed_images(torch.stack(rows)).cpu()

    return Reader(read, texts.cpu())


def translator_reader(model: PixelModel, translator: Translator, texts: Tensor) -> Reader:
    """Translated features of the classifier. Shapes: texts (C, n)."""

    @torch.no_grad()
    def read(paths: Sequence[Path]) -> Tensor:
        features, _ = model(load_pictures(paths).to(model.mean.device))
        translated: Tensor = translator(features)
        return translated.float().cpu()

    return Reader(read, texts.cpu())


def judge_pictures(
    attacked: Sequence[AttackedPicture],
    folder: Path,
    model: PixelModel,
    readers: Mapping[str, Reader],
    budgets: Mapping[str, Budget],
    *,
    tau: float,
    batch_size: int = 64,
) -> list[JudgedPicture]:
    """Read every attacked picture and its original again from their PNG files and say what the judges see (no shapes).

    Nothing the attack reported is believed: logits, decision and distances come from the 8-bit files. A budget not in `budgets`
    is none at all: what was moved then is not kept.
    """
    judged: list[JudgedPicture] = []
    for start in range(0, len(attacked), batch_size):
        chunk = attacked[start : start + batch_size]
        before, after = ([folder / getattr(a, name) for a in chunk] for name in ("original", "file"))
        judged += _judge_chunk(chunk, before, after, model, readers, budgets, tau)
    return judged


@torch.no_grad()
def _judge_chunk(
    chunk: Sequence[AttackedPicture], before: list[Path], after: list[Path], model: PixelModel, readers: Mapping[str, Reader],
    budgets: Mapping[str, Budget], tau: float,
) -> list[JudgedPicture]:  # fmt: skip
    x, y = load_pictures(before), load_pictures(after)
    old, new = (model(pictures.to(model.mean.device))[1].float().cpu() for pictures in (x, y))
    change, steps = (new - old).abs().amax(1), (LEVELS * (y - x)).round() / LEVELS
    lengths = {norm: Budget(norm, 0).lengths(steps) for norm in ("linf", "l2")}  # type: ignore[arg-type]
    targets = torch.tensor([a.target for a in chunk])
    seen = {name: _seen(reader, before, after, targets) for name, reader in readers.items()}
    rows = []
    for place, attacked in enumerate(chunk):
        budget = budgets.get(attacked.budget)
        used = lengths[budget.norm if budget else "linf"][place]
        within = float(used) <= (budget.radius if budget else 0.0) * (1 + 1e-6) + 1e-9
        rows.append(
            JudgedPicture(
                attacked=attacked,
                kept=bool(within and change[place] <= tau and old[place].argmax() == new[place].argmax()),
                logit_change=float(change[place]),
                decision=int(new[place].argmax()),
                decision_before=int(old[place].argmax()),
                linf=float(LEVELS * lengths["linf"][place]),
                l2=float(lengths["l2"][place]),
                rise={name: float(found[0][place]) for name, found in seen.items()},
                shift={name: float(found[1][place]) for name, found in seen.items()},
                first={name: bool(found[2][place]) for name, found in seen.items()},
                first_before={name: bool(found[3][place]) for name, found in seen.items()},
                cosine_change={name: float(found[4][place]) for name, found in seen.items()},
            )
        )
    return rows


def _seen(reader: Reader, before: list[Path], after: list[Path], targets: Tensor) -> tuple[Tensor, ...]:
    """(rise, shift) in degrees, (first, first before), largest change of a class prompt's cosine: each (B,)."""
    z, moved = reader.read(before).double(), reader.read(after).double()
    texts = reader.texts.double()
    wanted = texts[targets]
    now, old = (normalize(rows, dim=-1) @ texts.T for rows in (moved, z))
    return (
        angle(z, wanted) - angle(moved, wanted), angle(z, moved), now.argmax(1) == targets, old.argmax(1) == targets,
        (now - old).abs().amax(1),
    )  # fmt: skip


def reading_of(row: JudgedPicture, encoders: Sequence[str]) -> str | None:
    """Who was fooled: the highest of READINGS that a kept picture reached, or None (no shapes).

    "changed meaning" needs two image encoders or more, all of which put the target first; one that does and another that does
    not is a fooled encoder.
    """
    won = {name for name in row.first if row.won(name)}
    if len(encoders) >= 2 and won >= {*encoders}:
        return READINGS[3]
    if won & {*encoders}:
        return READINGS[2]
    if "auditor" in won:
        return READINGS[1]
    return READINGS[0] if "fitted" in won else None


def counted_rise(row: JudgedPicture, judge: str) -> float:
    """The rise in degrees as it counts: 0 for what was not kept; a random direction is held to nothing, which favours it."""
    return row.rise[judge] if row.kept or row.attacked.arm in HELD_TO_NOTHING else 0.0


def summarise(rows: Sequence[JudgedPicture], encoders: Sequence[str], *, seed: int = 0) -> PixelSummary:
    """The sums of one model, budget and arm, with 95 % intervals: of degrees by bootstrap over pictures, of shares by Wilson.

    Raises:
        ValueError: no rows, or rows of several models, budgets or arms.
    """
    kinds = {(row.attacked.model, row.attacked.budget, row.attacked.arm) for row in rows}
    if len(kinds) != 1:
        raise ValueError(f"expected the rows of one model, budget and arm, got {len(kinds)} kinds: {sorted(kinds)}")
    ((model, budget, arm),) = kinds

    def interval(values: Sequence[float]) -> list[float]:
        return list(mean_interval(np.array(values, dtype=np.float64), seed=seed))

    judges = list(rows[0].rise)
    readings = [reading_of(row, encoders) for row in rows]
    return PixelSummary(
        model=model, budget=budget, arm=arm, pictures=len(rows),
        kept=float(np.mean([row.kept for row in rows])),
        flipped=float(np.mean([row.decision != row.decision_before for row in rows])),
        logit_change=max(row.logit_change for row in rows),
        rise={name: interval([counted_rise(row, name) for row in rows]) for name in judges},
        shift={name: interval([row.shift[name] for row in rows]) for name in judges},
        success={name: share_interval(sum(row.won(name) for row in rows), len(rows)) for name in judges},
        readings={name: share_interval(readings.count(name), len(rows)) for name in READINGS},
    )  # fmt: skip


def model_differences(rows: Sequence[JudgedPicture], first: str, second: str, *, seed: int = 0) -> list[PixelDifference]:
    """How much harder or easier the second model is than the first at every budget, paired by picture (degrees, points)."""
    found = []
    attacks = [row for row in rows if row.attacked.arm == ATTACK]
    for budget in dict.fromkeys(row.attacked.budget for row in attacks):
        by_model = [
            {row.attacked.picture: row for row in attacks if (row.attacked.model, row.attacked.budget) == (name, budget)}
            for name in (first, second)
        ]
        shared = sorted(by_model[0].keys() & by_model[1].keys())
        for judge in attacks[0].rise:
            for figure in ("rise", "success"):
                values = [np.array([_figure(m[place], figure, judge) for place in shared]) for m in by_model]
                value, low, high = paired_difference(values[1], values[0], seed=seed)
                found.append(PixelDifference(first, second, budget, figure, judge, value, low, high))
    return found


def _figure(row: JudgedPicture, figure: str, judge: str) -> float:
    return counted_rise(row, judge) if figure == "rise" else 100.0 * row.won(judge)
