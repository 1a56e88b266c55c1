"""A few steered pictures drawn by a diffusion model: which ones, their embeddings, and the sheet (extra `singreg[unclip]`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import Tensor

from singreg.analysis.features import iterate_features
from singreg.analysis.old_steering.plan import PairPlan
from singreg.analysis.old_steering.results import ShownSteering
from singreg.data.datasets import ImageSplit
from singreg.nullspace import NullSpace
from singreg.reporting.unclip import UnclipRenderer, check_extra, draw_rows, shift_columns
from singreg.steering import steer
from singreg.translator import LinearTranslator
from singreg.utils import gather_rows
from singreg.workbench.build import Bench


@dataclass(frozen=True)
class SteeredPictures:
    """The pictures chosen, and the sheet of drawings: None on all but the main process, or when none of them could be steered."""

    shown: list[ShownSteering]
    sheet: Figure | None


def open_renderer(name: str | None, accelerator: Accelerator) -> UnclipRenderer | None:
    """The pipeline of that hub name or folder (path), opened on the main process only; None when none is asked for.

    Raises:
        ValueError: the extra is not installed, or there is no such pipeline.
    """
    if name is None:
        return None
    try:
        check_extra()  # on every process, so that all of them stop
        return UnclipRenderer.from_pretrained(name, device=accelerator.device) if accelerator.is_main_process else None
    except (ImportError, OSError) as error:
        raise ValueError(f"unclip: {error}") from error


def choose_shown(plan: PairPlan, labels: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """(picture, source, target) of at most `count` pictures: the first of every source, each towards another of its targets.

    Shapes: labels (N,) of the part's pictures; sources and targets are places in the plan.
    """
    found: list[tuple[int, int, int]] = []
    for source, label in enumerate(plan.source_labels.tolist()):
        targets = plan.wanted[source].nonzero().flatten().tolist()
        mine = np.flatnonzero(plan.chosen & (labels == label))
        if targets and len(mine) and len(found) < count:
            found.append((int(mine[0]), source, targets[len(found) % len(targets)]))
    return found


def draw_steered(
    renderer: UnclipRenderer | None,
    bench: Bench,
    plan: PairPlan,
    count: int,
    *,
    null_space: NullSpace,
    attacker: LinearTranslator,
    judge: LinearTranslator,
    image_score: float,
    seed: int = 0,
) -> SteeredPictures:
    """Steer the shown pictures by the attacker and draw the judge's T(f), T(f~) and T of the steered feature beside each.

    A picture that cannot reach `image_score` (degrees) is listed without a step and not drawn. Without a renderer nothing is
    drawn. All processes must call it (no shapes).
    """
    test = bench.parts.test
    wanted = choose_shown(plan, np.asarray(test.labels), count)
    indices = [picture for picture, _, _ in wanted]
    features, real = _features(bench, indices)
    texts = plan.texts[[target for _, _, target in wanted]].to(features)
    steered = steer(
        features, texts, matrix=attacker.matrix.to(features), offset=attacker.offset.to(features), null_space=null_space,
        image_score=image_score,
    )  # fmt: skip
    steps = (steered.step / torch.linalg.vector_norm(features, dim=-1)).tolist()
    ok = steered.reachable
    shown = [
        ShownSteering(index, test.identifier(index), plan.sources[source], plan.targets[target], step if reached else None)
        for (index, source, target), step, reached in zip(wanted, steps, ok.tolist(), strict=True)
    ]
    if renderer is None or not bool(ok.any()):
        return SteeredPictures(shown, None)
    columns = shift_columns(features[ok], judge, null_space, real[ok], steered=steered.features[ok])
    drawn = renderer.render(columns, real[ok], seed=seed, progress=bench.settings.progress)
    kept = [picture for picture in shown if picture.step is not None]
    side = next(iter(drawn.values())).shape[1]
    sheet = draw_rows(drawn, [f"{p.source} → {p.target}" for p in kept], _squares(test, [p.index for p in kept], side))
    return SteeredPictures(shown, sheet)


def _features(bench: Bench, indices: list[int]) -> tuple[Tensor, Tensor]:
    """Features (k, m) and embeddings (k, n) of pictures of the test part, in float64, the same on every process."""
    part, embeddings = bench.parts.test.subset(indices), np.asarray(bench.embeddings["test"][indices])
    settings = replace(bench.settings, cache=None, progress=False)  # a handful: no file of their own in the cache
    columns = [
        {"index": batch.indices.numpy(), "features": batch.features.cpu().numpy()}
        for batch in iterate_features(bench.classifier, part, embeddings, settings, "pictures to draw")
    ]
    device = bench.texts.device
    features = torch.from_numpy(gather_rows(columns, sort_by="index")["features"]).to(device)
    return features.double(), torch.from_numpy(embeddings).to(device).double()


def _squares(part: ImageSplit, indices: list[int], side: int) -> np.ndarray:
    """Pictures of a part, their middle square, as (N, side, side, 3) in [0, 1]."""
    cut = []
    for index in indices:
        picture = part.image(index).convert("RGB")
        short = min(picture.size)
        left, top = ((length - short) // 2 for length in picture.size)
        cut.append(np.asarray(picture.crop((left, top, left + short, top + short)).resize((side, side)), dtype=np.float32) / 255)
    return np.stack(cut)
