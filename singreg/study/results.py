"""A study's arms over seeds: planned, kept, measured beside their scores, and compared (METHOD 6 to 8)."""

import itertools
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.logging import get_logger
from torch import Tensor

from singreg.analysis import comparison
from singreg.analysis.comparison import CONFIRMED, HARM, BySeed, Measured, compare_rows, no_claim, too_few, words
from singreg.analysis.features import FeatureBatch, FittedTranslator, evenly
from singreg.analysis.probes import fit_blocks, measure_information
from singreg.analysis.scores import AUDITOR, Rows
from singreg.config import FinetuneConfig
from singreg.nullspace import NullSpace
from singreg.setup import Setup
from singreg.study import ArmConfig, StudyConfig, arm_config
from singreg.utils import gather_rows, sha256_of_json, write_text

SAID = "measuring the arm"
NEIGHBOURS, QUERIES = 10, 2000  # of an image within its class, and test images asked for them
ROUNDING = 1e-6  # a null residual below this share of |f| is what float32 left of none
logger = get_logger(__name__)
PLACES = ("out", "dry_run", "resume", "log_with")  # where things go and how a run is started
WORDS = ("note", "role", "overrides")  # only said of an arm, or in its configuration already
MEASURED = ("ood", "validation_per_class")
Summary = dict[str, Any]


def measure_arm(setup: Setup, auditor: FittedTranslator, scores: Measured, *, ood: int = 0) -> Measured:
    """Add to an arm's scores, those of `analyze_model` on the test images by the auditor, what a study shows beside."""
    splits, chosen_on = setup.splits, dict[str, Any]()
    rows, figures = scores[0], {name: scores[1][name] for name in ("null_share", "null_energy")} | scores[1]["audit"]
    intervals = figures.pop("intervals")
    sizes = {"classes": setup.classifier.num_classes, "target_dim": setup.texts.shape[1]}
    fits = fit_blocks(setup.read("audit", SAID), null_space=setup.space, **sizes)
    information = measure_information(setup.read("test", SAID), fits)
    figures |= {"null_probe": information["accuracy"]["null_space"], "probe_chance": information["chance"]}
    figures["retrieval"] = retrieval(setup.read("test", SAID), splits.test.labels)
    figures |= _strange_images(setup, auditor.mean, ood)
    if setup.held is not None:
        z = {**setup.embeddings, "test": setup.held[1]}
        own = replace(setup, splits=replace(splits, test=setup.held[0]), embeddings=z)
        _, found = own.measure({AUDITOR: auditor.translator}, auditor.mean, auditor)
        chosen_on = {"images": found["images"], **found["audit"]}
        chosen_on.pop("intervals")
    return rows, {"figures": figures, "intervals": intervals, "validation": chosen_on}


def _strange_images(setup: Setup, mean: Tensor, ood: int) -> dict[str, float]:
    """AUROCs of `ood` unlabelled images of the bank (METHOD section 8.8), nothing without any."""
    splits, z = setup.splits, setup.embeddings
    unlabelled = np.flatnonzero(np.asarray(splits.bank.labels) < 0)
    strange = unlabelled[evenly(len(unlabelled), ood)]
    if not len(strange):
        return {}
    named = replace(splits, bank=splits.bank.subset(strange, "ood"))
    own = replace(setup, splits=named, embeddings={**z, "bank": z["bank"][strange]})
    parts = [network_outputs(own.read(name, SAID), setup.space, mean) for name in ("test", "bank", "audit")]
    return ood_figures(*parts)


def _arrays(**columns: Tensor) -> Rows:
    return {name: values.cpu().numpy() for name, values in columns.items()}


def retrieval(batches: Iterable[FeatureBatch], labels: np.ndarray) -> float:
    """Return how well features find images of like meaning beside the class (METHOD section 8.8).

    Of an image's `NEIGHBOURS` nearest of its class by the cosine of features, the share that is among the nearest as
    the vision-language model embeds them; images evenly spaced, at most `QUERIES`. Shape: labels (N,) of the split.
    """
    rows, chosen = [], evenly(len(labels), QUERIES)
    for batch in batches:
        mine = torch.from_numpy(np.isin(batch.indices.numpy(), chosen))
        here = mine.to(batch.features.device)
        rows.append(_arrays(index=batch.indices[mine], f=batch.features[here], z=batch.embeddings[here]))
    table, found = gather_rows(rows, sort_by="index"), list[float]()
    for label in np.unique(labels[table["index"]]):
        own = labels[table["index"]] == label
        if (count := min(NEIGHBOURS, int(own.sum()) - 2)) < 1:
            continue
        near = [_nearest(table[name][own], count) for name in ("f", "z")]
        found += [len(set(first) & set(second)) / count for first, second in zip(*near, strict=True)]
    return float(np.mean(found)) if found else math.nan


def _nearest(rows: np.ndarray, count: int) -> list[list[int]]:
    """The places of the `count` other rows at the smallest angles to each of (N, n)."""
    unit = torch.nn.functional.normalize(torch.from_numpy(rows).double(), dim=1)
    return (unit @ unit.T).fill_diagonal_(-2).topk(count).indices.tolist()


def network_outputs(batches: Iterable[FeatureBatch], space: NullSpace, mean: Tensor) -> Rows:
    """Return of all images residual |Π_n(f - μ)|, logsumexp and max_logit (N,)."""
    rows = []
    for batch in batches:
        f, logits = batch.features.double(), batch.logits.double()
        residual = torch.linalg.vector_norm(space.component(f - mean.double()), dim=1)
        # What float32 leaves of a null component that is not there would otherwise be ranked as if it said something.
        residual = residual * (residual > ROUNDING * torch.linalg.vector_norm(f, dim=1))
        energies = {"logsumexp": logits.logsumexp(1), "max_logit": logits.amax(1)}
        rows.append(_arrays(index=batch.indices, residual=residual, **energies))
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


@dataclass(frozen=True)
class Work:
    """One arm at one seed, to be made: its configuration, the work whose weights it begins with, hash of all inputs."""

    arm: ArmConfig
    seed: int
    config: FinetuneConfig
    source: "Work | None"
    digest: str
    folder: Path

    @property
    def name(self) -> str:
        """What trackers, caches and checkpoints call it."""
        return f"{self.arm.name}-{self.seed}"

    @property
    def trained(self) -> bool:
        """Whether it, or the arm it is made from, depends on the seed."""
        return self.arm.make == "train" or self.source is not None

    def make_room(self) -> None:
        """Remove what another configuration left in the folder; what this one has done stays."""
        note = self.folder / "digest.txt"
        if note.is_file() and note.read_text(encoding="utf-8") == self.digest:
            return
        if note.is_file():
            logger.info("%s was made with another configuration and is made again", self.name)
        shutil.rmtree(self.folder, ignore_errors=True)
        write_text(note, self.digest)


def plan_study(config: StudyConfig, inputs: Mapping[str, str]) -> list[Work]:
    """List every arm at every seed, all arms of one seed before the next; `inputs` are hashes of images and models.

    An arm without randomness runs with the first seed alone.
    """
    works: dict[tuple[str | None, int], Work] = {}
    shared: list[Any] = [getattr(config, name) for name in MEASURED]
    shared.append([asdict(vlm) for vlm in config.further_vlms])
    for seed, arm in itertools.product(config.seeds, config.arms):
        source, own = works.get((arm.weights_from, seed)), arm_config(config, arm, seed)
        parts: list[Any] = [{key: value for key, value in asdict(own).items() if key not in PLACES}, shared]
        parts.append({key: value for key, value in asdict(arm).items() if key not in WORDS})
        digest = sha256_of_json([*parts, source and source.digest, dict(inputs)])
        work = Work(arm, seed, own, source, digest, config.folder / "arms" / arm.name / f"seed-{seed}")
        if work.trained or seed == config.seeds[0]:
            works[arm.name, seed] = work
    return list(works.values())


def summarize_study(runs: Sequence[tuple[Work, Measured]], reference: str, claim: str) -> list[Summary]:
    """Aggregate the runs arm by arm and compare each with the reference, plain fine-tuning with the same budget.

    Returns:
        A dict an arm: what it is, its seeds; mean and spread (standard deviation over seeds) of figures, mean of
        validation; intervals over images, ends averaged over seeds; paired: see `compare_rows`; further: the same by
        the label of every further vision-language model; placebo: the claimed arm against this one, likewise; front:
        no arm is better in both top-1 and class-score variance; weight: λ of the arms that differ in λ alone, or None.
    """
    by_arm: dict[str, list[tuple[Work, Measured]]] = {}
    for work, run in runs:
        by_arm.setdefault(work.arm.name, []).append((work, run))
    seeds = [work.seed for work, _ in by_arm[reference]]

    def rows(name: str, label: str = "") -> BySeed:
        found = {work.seed: rows_by(table, label) for work, (table, _) in by_arm[name]}
        only = next(iter(found.values()))
        return found if by_arm[name][0][0].trained else dict.fromkeys(seeds, only)  # an untrained arm's seed is nothing

    arms = [_summary(found) for found in by_arm.values()]
    for arm in arms:
        name, compared = arm["arm"], arm["arm"] != reference
        arm["paired"] = compare_rows(rows(name), rows(reference)) if compared else {}
        further = [label for label in by_arm[name][0][1][0]["by"].unique() if label] if compared else ()
        arm["further"] = {label: compare_rows(rows(name, label), rows(reference, label)) for label in further}
        arm["placebo"] = compare_rows(rows(claim), rows(name)) if arm["role"] == "placebo" else {}
    front = pareto_front({arm["arm"]: (arm["mean"]["top1"], arm["mean"][HARM]) for arm in arms})
    return [{**arm, "front": arm["arm"] in front} for arm in arms]


def rows_by(table: pd.DataFrame, label: str = "") -> pd.DataFrame:
    """Return an arm's rows by the study's own vision-language model, or by a further one, which no loop reads."""
    return table[table["by"] == label].drop(columns=[name for name in table if label and str(name).endswith("/loop")])


def _summary(found: Sequence[tuple[Work, Measured]]) -> Summary:
    (first, _), runs = found[0], [run for _, (_, run) in found]
    table, arm = pd.DataFrame([run["figures"] for run in runs], dtype=float), first.arm
    curve = arm.make == "train" and set(arm.overrides) <= {"loss.weight"}
    return {
        "arm": arm.name,
        **{name: getattr(arm, name) for name in ("role", "make", "note")},
        "trained": first.trained,
        "weight": first.config.loss.weight if curve else None,
        "seeds": [work.seed for work, _ in found],
        "mean": table.mean(skipna=False).to_dict(),
        "spread": table.std(ddof=1, skipna=False).to_dict(),
        "intervals": {
            name: np.mean([np.array(run["intervals"][name], float) for run in runs], axis=0).tolist()
            for name in runs[0]["intervals"]
        },
        "validation": pd.DataFrame([run["validation"] for run in runs], dtype=float).mean().to_dict(),
    }


def pareto_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Return the names of (top-1, harm) that no other beats: as good in both and better in one."""
    every = set(points.values())
    beaten = {(a, b) for a, b in every for top1, harm in every - {(a, b)} if top1 >= a and harm <= b}
    return {name for name, point in points.items() if point not in beaten}


def study_verdict(
    arms: Sequence[Summary], reference: str, claim: str, images: int, classes: int, auditor_images: int, features: int
) -> list[str]:
    """Say in at most four lines what the claimed arm does, its price, and what placebos and a dropped null space do."""
    arm = next(each for each in arms if each["arm"] == claim)
    refused = no_claim(auditor_images, features) or too_few(images, classes)
    if refused or not arm["paired"]:
        return [refused or f"{claim!r} is compared with nothing, so this study says nothing about it."]
    on = f"{images} test images, auditor of {auditor_images} others, {len(arm['seeds'])} seed(s)"
    first = f"{claim}, named beforehand, against {reference}: {comparison.claim(arm['paired'])} ({on})."
    price = f"{comparison.price(arm['paired'])} {comparison.audit(arm['paired'])}"
    said = [first, price, _placebos(arms, arm)]
    for each in arms:
        if each["make"] == "drop":
            cost = f"top-1 {words(each['paired']['top1'])} and harmless R² {words(each['paired']['harmless_r2'])}"
            said.append(f"The baseline to beat, {each['arm']}, leaves nothing to steer through, with {cost}.")
    return said[:4]


def _placebos(arms: Sequence[Summary], claimed: Summary) -> str:
    """Whether the true loss is clearly better than each placebo; intervals about 1 are no proof of equality."""
    found = []
    for arm in arms:
        if arm["role"] == "placebo":
            beaten = arm["placebo"][HARM]["high"] < 1
            found.append(f"{arm['arm']} {words(arm['placebo'][HARM])}, {'fails' if beaten else 'does not fail'}")
    if not found:
        return "There was no placebo arm, so nothing here shows that the classes' prompts matter."
    left = f"{claimed['arm']}'s class-score variance over each placebo's"
    return f"Placebos ({left}): {'; '.join(found)}. One that does not fail leaves open whether the prompts matter."


def study_warnings(arms: Sequence[Summary]) -> list[str]:
    """Give reasons not to believe a figure: one seed, gamed loops."""
    single = "; ".join(arm["arm"] for arm in arms if len(arm["seeds"]) == 1 and arm["trained"])
    shares = {arm["arm"]: arm["paired"].get("confirmed") for arm in arms if arm["role"] == "method" and arm["trained"]}
    gamed = "; ".join(name for name, share in shares.items() if share and not share["high"] >= CONFIRMED)
    found = [f"Of one seed only, so without a spread over seeds: {single}."] if single else []
    return [*found, *([f"The loss was gamed (less than {CONFIRMED:.0%} confirmed): {gamed}."] if gamed else [])]
