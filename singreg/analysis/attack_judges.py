"""Attacked images judged from their 8-bit files, models compared by them, and twins that nobody attacked."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from singreg.analysis.attack import ATTACK, LEVELS, RANDOM, TANGENT, PixelModel, load_images
from singreg.analysis.statistics import mean_interval, share_interval
from singreg.data.embeddings import take_rows
from singreg.data.splits import ImageSplit
from singreg.functional import angle
from singreg.models.vlm import VisionLanguageModel

BATCH = 64
SLACK = 0.05  # degrees that passes must gain by themselves
TWIN_IMAGES, SHOWN = 1000, 8  # among which twins are sought, and how many are listed


class Judge(NamedTuple):
    """What reads image files: an encoder, and for a classifier's features a translator; texts (C, n) are unit rows."""

    name: str
    encoder: PixelModel | VisionLanguageModel
    translator: Callable[[Tensor], Tensor] | None
    texts: Tensor

    def read(self, paths: Sequence[Path]) -> Tensor:
        """Return embeddings (B, n) of PNG files; an image encoder takes its own preprocessing."""
        if isinstance(self.encoder, PixelModel):
            embeddings, _ = self.encoder(load_images(paths).to(self.encoder.device))
        else:
            images = [self.encoder.transform(Image.open(path).convert("RGB")) for path in paths]
            embeddings = self.encoder.embed_images(torch.stack(images))
        return (embeddings if self.translator is None else self.translator(embeddings)).float().cpu()


class Attacked(NamedTuple):
    """One attacked model: its files' rows, its readers, its facts, robustness in feature space, all logits."""

    rows: pd.DataFrame
    pixels: PixelModel
    judges: list[Judge]
    facts: dict[str, Any]
    features: dict[str, Any] | None
    logits: Tensor


@torch.no_grad()
def judge_images(
    rows: pd.DataFrame, folder: Path, model: PixelModel, judges: Sequence[Judge], tau: float
) -> pd.DataFrame:
    """Read every attacked image and its original again from the PNG files; nothing the attack reported is believed.

    Returns:
        The rows of `attack_split` with logit_change, linf (255ths), kept (within the budget, every logit within τ, the
        decision stays); and by judge: rise, the degrees gained towards the target's prompt, won, whether that prompt
        became first, and knows, whether the own one was. What was not kept counts as 0, but for the rise of random
        directions, which are held to nothing.
    """
    frames = []
    for start in range(0, len(rows), BATCH):
        chunk = rows.iloc[start : start + BATCH]
        before, after = ([folder / path for path in chunk[name]] for name in ("original", "file"))
        x, y = load_images(before), load_images(after)
        old, new = (model(images.to(model.device))[1].float().cpu() for images in (x, y))
        change, length = (new - old).abs().amax(1), (LEVELS * (y - x)).round().abs().amax((1, 2, 3))
        within = length <= torch.tensor(chunk["size"].to_numpy())
        kept = within & (change <= tau) & (old.argmax(1) == new.argmax(1))
        counted = kept | torch.tensor((chunk["arm"] == RANDOM).to_numpy())
        columns = {"kept": kept, "logit_change": change, "linf": length}
        targets, labels = (torch.tensor(chunk[name].to_numpy()) for name in ("target", "label"))
        for judge in judges:
            was, now, texts = judge.read(before).double(), judge.read(after).double(), judge.texts.cpu().double()
            first, last = ((normalize(z, dim=-1) @ texts.T).argmax(1) for z in (was, now))
            columns[f"rise {judge.name}"] = counted * (angle(was, texts[targets]) - angle(now, texts[targets]))
            columns[f"won {judge.name}"] = kept & (last == targets) & (first != targets)
            columns[f"knows {judge.name}"] = first == labels
        frames.append(chunk.assign(**{name: values.numpy() for name, values in columns.items()}))
    return pd.concat(frames, ignore_index=True)


def summarize_attack(judged: pd.DataFrame, judges: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Summarise every model, budget and arm, with 95 % intervals: of degrees by bootstrap, of shares by Wilson."""
    found = []
    for (model, budget, arm), rows in judged.groupby(["model", "budget", "arm"], sort=False):
        rises = {name: list(mean_interval(rows[f"rise {name}"].to_numpy(), seed=seed)) for name in judges}
        success = {name: share_interval(int(rows[f"won {name}"].sum()), len(rows)) for name in judges}
        row = {"model": model, "budget": budget, "arm": arm, "images": len(rows), "kept": float(rows["kept"].mean())}
        found.append({**row, "logit_change": rows["logit_change"].max(), "rise": rises, "success": success})
    return found


def model_differences(judged: pd.DataFrame, judges: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Compare the rises of every later model with the first's at every budget, paired by image."""
    attacks, found = judged[judged["arm"] == ATTACK], []
    first, *others = attacks["model"].unique()
    for second, (budget, rows), judge in itertools.product(others, attacks.groupby("budget", sort=False), judges):
        pair = rows.pivot(index="image", columns="model", values=f"rise {judge}")
        value, low, high = mean_interval((pair[second] - pair[first]).to_numpy(), seed=seed)
        names = {"first": first, "second": second, "budget": budget, "judge": judge}
        found.append({**names, "value": value, "low": low, "high": high})
    return found


def transfers_of(own: pd.DataFrame, carried: pd.DataFrame) -> list[dict[str, Any]]:
    """Compare images crafted on other models with a model's own, both as judged by the latter's translator."""
    means = carried.groupby(["model", "budget"], sort=False)[["rise fitted", "kept"]].mean().reset_index()
    white_box = own[own["arm"] == ATTACK].groupby("budget")["rise fitted"].mean().rename("own")
    means = means.rename(columns={"model": "crafted_on", "rise fitted": "rise"}).merge(white_box, on="budget")
    return means.assign(judged_on=own["model"].iloc[0]).to_dict("records")


def summarize_climbs(judged: pd.DataFrame) -> pd.DataFrame:
    """Average how many degrees the passes of each model, budget and kind got by themselves, beside the single step."""
    attacks = judged[judged["arm"] == ATTACK]
    kinds = [name for name in attacks.columns if name.endswith(" passes")]
    means = attacks.groupby(["model", "budget"], sort=False)[["one_step", "began", *kinds]].mean().reset_index()
    return means.melt(["model", "budget", "one_step", "began"], kinds, "kind", "alone").dropna()


def attack_checks(judged: pd.DataFrame) -> list[dict[str, Any]]:
    """Check the attack on every model (name, passed, found): one that fails takes every claim of robustness with it.

    An attack begins with the single step and with the smaller budget's images, so it would rise whatever its passes do;
    so each kind of pass is also measured alone: at one budget or more the first kind must climb beyond what it began
    from, those from random points beyond random directions, of which an attacker would keep only what helps.
    """
    checks = []
    for model, rows in judged.groupby("model", sort=False):
        attacks, random = rows[rows["arm"] == ATTACK], rows[rows["arm"] == RANDOM]
        broken = int((~attacks["kept"]).sum())
        files = "logits, decision and budget are kept in the saved files"
        words = f"{broken} of {len(attacks)} break one, largest logit change {attacks['logit_change'].max():.3g}"
        checks.append({"model": model, "name": files, "passed": not broken, "found": words})
        level = random["rise fitted"].clip(lower=0).groupby(random["budget"]).mean()
        climbs = summarize_climbs(attacks).set_index("budget")
        first = TANGENT if (climbs["kind"] == TANGENT).any() else climbs["kind"].iloc[0]
        for kind, own in climbs.groupby("kind", sort=False):
            gains = own["alone"] - (own["began"] if kind == first else level[own.index])
            name = f"{kind} climb by themselves beyond {'their start' if kind == first else 'random directions'}"
            words = ", ".join(f"{gain:+.2f}° at {budget}" for budget, gain in gains.items())
            checks.append({"model": model, "name": name, "passed": bool((gains > SLACK).any()), "found": words})
    return checks


@torch.no_grad()
def twins_among(logits: Tensor, embeddings: Tensor, labels: Tensor, places: np.ndarray) -> dict[str, Any]:
    """Find pairs of images of two classes that are close in logits and far apart in meaning; nobody attacked them.

    Close: largest |Δlogit| at most the median between images of one class, so a model with larger logits is held to a
    larger limit. Far: angle at least the median between images of different classes. "shown" are the closest twins, no
    image twice, by `places` (N,).

    Shape: logits (N, C), embeddings (N, n), labels (N,), at least two classes. Memory grows with N².
    """
    exact, unit = logits.double(), normalize(embeddings.double(), dim=-1)
    distance = torch.cat([torch.cdist(chunk, exact, p=torch.inf) for chunk in torch.split(exact, 512)])
    apart = torch.rad2deg(torch.arccos((unit @ unit.T).clamp(-1, 1)))
    upper = torch.ones_like(distance, dtype=torch.bool).triu(1)
    same = labels[:, None] == labels[None]
    pairs = upper & ~same
    close, far = distance[upper & same].median(), apart[pairs].median()
    twins = (pairs & (distance <= close) & (apart >= far)).nonzero()
    shown, used = list[dict[str, Any]](), set[int]()
    for i, j in twins[distance[tuple(twins.T)].argsort(stable=True)].tolist():
        if len(shown) < SHOWN and not used & {i, j}:
            used |= {i, j}
            both = {"first": int(places[i]), "second": int(places[j])}
            shown.append({**both, "logit_distance": distance[i, j].item(), "angle": apart[i, j].item()})
    count, limits = int(pairs.sum()), {"close": close.item(), "far": far.item()}
    return {"images": len(labels), "pairs": count, **limits, "rate": len(twins) / count, "shown": shown}


def natural_twins(
    split: ImageSplit, logits: Mapping[str, Tensor], embeddings: Mapping[str, np.ndarray], seed: int
) -> list[dict[str, Any]]:
    """Seek natural twins among a split's images by every model's logits (N, C) and encoder's embeddings (N, n)."""
    order = np.random.default_rng([seed, 8]).permutation(np.flatnonzero(split.labels >= 0))
    places, found = np.sort(order[:TWIN_IMAGES]), list[dict[str, Any]]()
    if not pd.Series(split.labels[places]).duplicated().any():  # nothing says how close images of one class are
        return found
    for (model, of_model), (encoder, table) in itertools.product(logits.items(), embeddings.items()):
        labels = torch.from_numpy(split.labels[places])
        twins = twins_among(of_model[places], take_rows(table, places), labels, places)
        found.append({"model": model, "encoder": encoder, **twins})
    return found
