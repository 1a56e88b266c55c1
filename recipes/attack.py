"""Attack classifiers in pixels: 8-bit images that keep every logit and that a translator reads as another class.

accelerate launch recipes/attack.py --config configs/attack_scenes.yaml
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from singreg.analysis import attack_judges as judging
from singreg.analysis import attack_summary as summary
from singreg.analysis.attack import Budget
from singreg.analysis.attack_images import ATTACK, AttackSettings, PixelModel, attack_images, choose_images, save_batch
from singreg.analysis.attackers import Outsider
from singreg.analysis.features import PassSettings
from singreg.analysis.fitting import fit_translators
from singreg.attack_tables import attack_sections, attack_verdict, attack_warnings
from singreg.checkpoints import Stage, refuse_other_inputs, stage
from singreg.config import Problems, RunConfig, TranslatorConfig, VLMConfig, parse
from singreg.data.classes import resolve_classes
from singreg.data.corruption import KINDS
from singreg.data.datasets import Splits, load_splits
from singreg.data.embeddings import take_rows
from singreg.models.classifier import Classifier
from singreg.models.edits import drop_null
from singreg.models.vlm import hash_of_state
from singreg.nullspace import NullSpace
from singreg.plots.attack import save_attack_plots
from singreg.report import log, log_figures, track, write_report
from singreg.runs import Run, explained, start
from singreg.setup import BATCH_SIZE, labels_for_head
from singreg.spaces import ComparedModel, Space, open_model, open_spaces, refuse_unknown_names
from singreg.translator import LinearTranslator
from singreg.utils import cache_folder, progress

KNOWS = 0.5  # an image encoder that names fewer of the untouched images rightly is no witness
ROBUST = (1.0, 2.0, 4.0)  # 255ths of ordinary adversarial images
TWIN_IMAGES = 1000


@dataclass
class AttackedModel(ComparedModel):
    """One of the attacked classifiers.

    Args:
        drop_null: drop the null space from its features (same logits), the defence everyone has: the line to beat.
    """

    drop_null: bool = False

    @property
    def known_as(self) -> str:
        """The label, or the last part of the name with what was done to it."""
        name = super().known_as
        return f"{name} without null space" if self.drop_null and self.label is None else name


@dataclass
class AttackConfig(RunConfig):
    """A run of recipes/attack.py; every field is a key of the YAML and a flag of the command line.

    Args:
        models: the classifiers, all attacked on the same images.
        further_vlms: image encoders beside `vlm` that judge; meaning changes only where two see it.
        images: test images, evenly over classes.
        targets: classes whose prompts they are steered towards; null for all.
        linf: L-infinity budgets in 255ths.
        l2: L2 budgets in pixel values of [0, 1] over the whole image.
        tau: how far any logit may move.
        steps: gradient steps a pass; below about 16 the passes may gain less than a single step.
        restarts: passes, the first from the image itself, others from random points.
        feature_pairs: pairs of a source class and a target prompt in feature space; 0 leaves that out.
        batch_size: images attacked together.
    """

    models: list[AttackedModel] = field(default_factory=lambda: [AttackedModel(), AttackedModel(drop_null=True)])
    further_vlms: list[VLMConfig] = field(default_factory=list)
    translator: TranslatorConfig = field(default_factory=TranslatorConfig)
    images: int = 128
    targets: list[str] | None = None
    linf: list[float] = field(default_factory=lambda: [2.0, 8.0])
    l2: list[float] = field(default_factory=list)
    tau: float = 1.0
    steps: int = 40
    restarts: int = 2
    feature_pairs: int = 240
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Raise one ValueError that names everything wrong with the values."""
        super().__post_init__()
        problems, labels = Problems(), [model.known_as for model in self.models]
        counts = {name: getattr(self, name) for name in ("images", "steps", "restarts", "batch_size")}
        problems.within(1, models=len(labels), budgets=len(self.budgets), **counts)
        problems.within(0, feature_pairs=self.feature_pairs)
        problems.need(0 < self.tau < float("inf"), f"tau: expected a number above 0, got {self.tau}")
        for name, sizes, least in (("linf", self.linf, 1.0), ("l2", self.l2, 1e-9)):  # below 1/255 no 8-bit value moves
            rising = list(sizes) == sorted({size for size in sizes if least <= size < float("inf")})
            problems.need(rising, f"{name}: expected different sizes of at least {least:g}, rising, got {sizes}")
        twice = {label for label in labels if labels.count(label) > 1}
        problems.need(not twice, f"models: listed twice: {', '.join(twice)}; give each a label of its own")
        problems.need(self.targets != [], "targets: expected class names, or null for all")
        problems.show()

    @property
    def budgets(self) -> list[Budget]:
        """All budgets, rising by norm."""
        return [*(Budget("linf", size) for size in self.linf), *(Budget("l2", size) for size in self.l2)]


@dataclass(frozen=True)
class Images:
    """What all models are attacked and judged on.

    Attributes:
        chosen: the attacked test images (see `choose_images`).
        left_out: names of those of one colour.
        targets: classes among the data's.
        twins: (k,) test images among which natural twins are sought.
        spaces: the image encoders; translators imitate the first.
        texts: (C, n) the class prompts of the first space.
    """

    splits: Splits
    chosen: pd.DataFrame
    left_out: list[str]
    targets: list[int]
    twins: np.ndarray
    spaces: list[Space]
    texts: Tensor
    passes: PassSettings


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, look at every model, embed the images, attack model by model, judge the saved files, report."""
    config = parse(AttackConfig, arguments, description=__doc__ or "")
    accelerator = start(config)
    with explained():
        run = Run(config, accelerator, "attack")
        if not config.dry_run:
            run.check()
        refuse_unknown_names(config.models)
        images, inputs = prepare(config, accelerator)
        if config.dry_run:
            print(f"{len(images.chosen)} images, budgets {', '.join(budget.label for budget in config.budgets)}")
            print("dry run: nothing was attacked, no run folder was made")
            return
        run.open()
    attacked: dict[str, Stage] = {}
    with run.guarded():
        # Images sit at 0.999 of τ, which TF32's 10 bits of mantissa do not resolve.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        refuse_other_inputs(run, inputs)
        for place, model in enumerate(config.models):
            name = f"{place}-{re.sub('[^A-Za-z0-9]+', '-', model.known_as).strip('-').lower()}"
            compute = partial(attack_model, config, model, run, images, Path("attacked") / name, attacked)
            attacked[model.known_as] = stage(run, name, compute)
        if accelerator.is_main_process:
            with run.timed("judging"):
                judged, transfers, undone = judge(config, run, images, attacked)
            report(config, run, images, attacked, judged, transfers, undone)
    accelerator.end_training()


def prepare(config: AttackConfig, accelerator: Accelerator) -> tuple[Images, dict[str, str]]:
    """Choose images and targets, look at every model, embed; and return hashes of what the attack hangs on."""
    splits = load_splits(config.data)
    if not len(splits.audit):
        raise ValueError("the audit split is empty, so no auditor can be fitted; give data.per_class.audit")
    names, test = splits.class_names, splits.test
    keys = names if config.targets is None else resolve_classes(config.targets, names).keys
    targets = [names.index(key) for key in keys]
    chosen, left_out = choose_images(test, config.images, targets, config.seed)
    order = np.random.default_rng([config.seed, 8]).permutation(np.flatnonzero(test.labels >= 0))
    hashes, problems = {f"{split.name} images": split.fingerprint for split in splits}, []
    for place, model in enumerate(config.models):
        try:
            classifier, attacked = open_attacked(config, model, splits, accelerator)
            labels_for_head(splits, classifier, model)
            pixels = PixelModel.of(attacked)
            hashes[model.known_as] = hash_of_state(classifier)
            if config.dry_run and accelerator.is_main_process:
                x = pixels.image(test, int(chosen["image"].iloc[0]))
                features, logits = pixels(x[None])
                print(f"{model.known_as}: {tuple(x.shape)} to features {features.shape[1]}, logits {logits.shape[1]}")
        except (ValueError, RuntimeError, OSError) as error:
            problems.append(f"models[{place}] ({model.known_as}): {error}")
    if problems:
        raise ValueError("\n".join(problems))
    passes = PassSettings(BATCH_SIZE, config.data.workers, accelerator.is_local_main_process, str(cache_folder()))
    embedded = (splits.bank, splits.audit, test)
    spaces = open_spaces([config.vlm, *config.further_vlms], embedded, [names], accelerator, passes)
    hashes |= {f"encoder {space.label}": space.info.vlm_weights_hash for space in spaces}
    twins = np.sort(order[:TWIN_IMAGES])
    return Images(splits, chosen, left_out, targets, twins, spaces, spaces[0].texts[names], passes), hashes


def open_attacked(
    config: AttackConfig, model: AttackedModel, splits: Splits, accelerator: Accelerator
) -> tuple[Classifier, Classifier]:
    """Return the classifier that translators are fitted on, and the attacked one: other only with its null dropped."""
    classifier = open_model(model, splits, config).to(accelerator.device).eval().requires_grad_(False)
    return classifier, drop_null(classifier).eval() if model.drop_null else classifier


def attack_model(
    config: AttackConfig, model: AttackedModel, run: Run, images: Images, at: Path, before: Mapping[str, Stage]
) -> Stage:
    """Fit two translators, attack the chosen images (their files below `at`), and measure features and robustness."""
    accelerator, space, chosen, test = run.accelerator, images.spaces[0], images.chosen, images.splits.test
    classifier, attacked = open_attacked(config, model, images.splits, accelerator)
    own, pixels, label = labels_for_head(images.splits, classifier, model), PixelModel.of(attacked), model.known_as
    embeddings: Mapping[str, np.ndarray] = space.embeddings
    how: dict[str, Any] = {"invariance": model.invariance, "settings": images.passes}
    ridge, info = config.translator.ridge, space.info_for(classifier)
    fitted = fit_translators(classifier, own, embeddings, ridge=ridge, info=info, **how)
    translators = {name: found.translator for name, found in fitted.items()}
    features = None
    if config.feature_pairs:
        how |= {"outsiders": {} if model.drop_null else outsiders(config, before, accelerator.device)}
        how |= {"pairs": config.feature_pairs, "tau": config.tau, "seed": config.seed}
        scene = (images.splits, embeddings, images.texts, translators, chosen, images.targets)
        features = summary.attack_features(classifier, *scene, **how)
    settings = AttackSettings(config.budgets, config.tau, config.steps, config.restarts, config.seed)
    batches = list(enumerate(range(0, len(chosen), config.batch_size)))
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    found = []
    for number, first in progress(mine, f"attacking {label}", enabled=images.passes.progress):
        some = chosen.iloc[first : first + config.batch_size]
        places = some["image"].tolist()
        x = torch.stack([pixels.image(test, index) for index in places])
        target = images.texts[some["target"].tolist()]
        moved, climbs = attack_images(pixels, translators["fitted"], x, target, settings, number=number)
        rows = save_batch(moved, x, some, run.folder, at)
        labels = torch.from_numpy(np.asarray(own.test.labels)[places])
        right = judging.still_right(pixels, x, labels.to(x.device), ROBUST, seed=config.seed + number)
        right |= judging.corrupted_right(pixels, test.subset(places), labels, batch_size=BATCH_SIZE)
        found.append((number, rows, climbs, pd.DataFrame({name: kept.cpu().numpy() for name, kept in right.items()})))
    found = sorted(gather_object(found), key=lambda batch: batch[0])
    rows, climbs, right = (pd.concat([batch[part] for batch in found], ignore_index=True) for part in (1, 2, 3))
    facts, logits = summary.describe_attacked(classifier, own.test, embeddings["test"], translators, images.passes)
    null, shares = {"nullity": 0} if model.drop_null else {}, right.mean().to_dict()
    robust = {"adversarial": {size: shares[size] for size in (f"{size:g}" for size in ROBUST)}}
    robust |= {"corrupted": {kind: shares[kind] for kind in KINDS}}
    figures = {
        "model": {"label": label, "source": model.name, **facts, **null, "top1": shares["clean"]},
        "robustness": {"model": label, "images": len(right), "clean": shares["clean"], **robust},
        "climbs": summary.summarize_climbs(climbs.assign(model=label)),
        "features": features,
    }
    tensors = {"logits": logits[images.twins], "weight": classifier.weight.detach()}
    for name, translator in translators.items():
        tensors |= {f"{name} matrix": translator.matrix, f"{name} offset": translator.offset}
    return Stage(rows.assign(model=label), figures, tensors, {"input": list(pixels.image(test, 0).shape)})


def translator_of(found: Stage, name: str, device: torch.device) -> LinearTranslator:
    """Return a translator of an attacked model."""
    return LinearTranslator(found.tensors[f"{name} matrix"], found.tensors[f"{name} offset"]).to(device)


def outsiders(config: AttackConfig, before: Mapping[str, Stage], device: torch.device) -> dict[str, Outsider]:
    """Return the first model that has a null space as an attacker of later ones."""
    for model in config.models[: len(before)]:
        if (found := before[model.known_as]).figures["features"] is not None:
            null = NullSpace.from_weight(found.tensors["weight"].to(device), invariance=model.invariance)
            return {model.known_as: Outsider(translator_of(found, "fitted", device), null)}
    return {}


def judge(
    config: AttackConfig, run: Run, images: Images, attacked: Mapping[str, Stage]
) -> tuple[pd.DataFrame, list[dict[str, Any]], list[str]]:
    """Judge every saved image by its own model and all judges, and on the other models of the same input size."""
    names, device = images.splits.class_names, run.accelerator.device
    encoders = {space.label: judging.encoder_judge(space.vlm, space.texts[names]) for space in images.spaces}
    judged, transfers, undone = [], list[dict[str, Any]](), list[str]()
    for model in config.models:
        label, found = model.known_as, attacked[model.known_as]
        pixels = PixelModel.of(open_attacked(config, model, images.splits, run.accelerator)[1])
        fitted, auditor = (
            judging.translator_judge(pixels, translator_of(found, name, device), images.texts)
            for name in ("fitted", "auditor")
        )
        read = partial(judging.judge_images, folder=run.folder, model=pixels, budgets=config.budgets, tau=config.tau)
        own = read(found.rows, judges={"fitted": fitted, "auditor": auditor, **encoders})
        judged.append(own)
        for other, theirs in attacked.items():
            if theirs.notes != found.notes:
                undone.append(f"images of {other} were not carried over to {label}, which has another input size")
            elif other != label:
                carried = read(theirs.rows[theirs.rows["arm"] == ATTACK], judges={"fitted": fitted})
                transfers += summary.transfers_of(own, carried, other)
    return pd.concat(judged, ignore_index=True), transfers, undone


def report(
    config: AttackConfig,
    run: Run,
    images: Images,
    attacked: Mapping[str, Stage],
    judged: pd.DataFrame,
    transfers: list[dict[str, Any]],
    warnings: list[str],
) -> None:
    """Check the attack, compare the models, look for natural twins and write the run's report."""
    spaces, test = images.spaces, images.splits.test
    names, labels = images.splits.class_names, torch.from_numpy(test.labels[images.twins])
    right = {s.label: summary.zero_shot(s.embeddings["test"], s.texts[names], images.chosen) for s in spaces}
    encoders = [label for label, share in right.items() if share >= KNOWS]
    twins = []
    if (problem := judging.twins_problem(labels)) is not None:
        warnings = [*warnings, f"no natural twins were sought: {problem}"]
    for label, space in itertools.product(attacked, spaces if problem is None else []):
        if space.label in encoders:
            z, logits = take_rows(space.embeddings["test"], images.twins), attacked[label].tensors["logits"].cpu()
            found = judging.natural_twins(logits, z, labels, places=images.twins)
            twins.append({"model": label, "encoder": space.label, **found})
    climbs = [climb for found in attacked.values() for climb in found.figures["climbs"]]
    figures: dict[str, Any] = {
        "models": [found.figures["model"] for found in attacked.values()],
        "tau": config.tau,
        "images": len(images.chosen),
        "zero_shot": right,
        "encoders": encoders,
        "summaries": summary.summarize_attack(judged, encoders, seed=config.seed),
        "transfers": transfers,
        "differences": summary.model_differences(judged, seed=config.seed),
        "twins": twins,
        "robustness": [found.figures["robustness"] for found in attacked.values()],
        "checks": summary.attack_checks(judged, pd.DataFrame(climbs), config.budgets, config.tau),
        "climbs": climbs,
        "features": {label: f.figures["features"] for label, f in attacked.items() if f.figures["features"]},
        "dropped": [model.known_as for model in config.models if model.drop_null],
    }
    plots = save_attack_plots(figures, judged, test, run.folder)
    track(run.accelerator, "attack", config)
    for label in attacked:
        for step, each in enumerate(s for s in figures["summaries"] if (s["model"], s["arm"]) == (label, ATTACK)):
            log(run.accelerator, {f"rise/{name}/{label}": rise[0] for name, rise in each["rise"].items()}, step)
    log_figures(run.accelerator, list(plots.values()))
    write_report(
        run,
        title=f"{run.folder.name}: {len(attacked)} classifiers attacked in pixels",
        verdict=attack_verdict(figures),
        warnings=attack_warnings(figures, images.left_out, warnings),
        sections=attack_sections(figures, plots),
        figures=figures,
        rows=judged,
    )


if __name__ == "__main__":
    main()
