"""Attack classifiers in pixels: 8-bit images that keep every logit and that a translator reads as another class.

python recipes/attack.py --config configs/attack_scenes.yaml
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from singreg.config import ComparedModel, Problems, RunConfig, TranslatorConfig, VLMConfig, parse


@dataclass
class AttackedModel(ComparedModel):
    """One of the attacked classifiers.

    Args:
        drop_null: drop the null space from its features (same logits), the defence everyone has: the line to beat.
    """

    drop_null: bool = False


@dataclass
class AttackConfig(RunConfig):
    """A run of recipes/attack.py; every field is a key of the YAML and a flag of the command line.

    Args:
        further_vlms: image encoders beside `vlm` that judge.
        images: test images, evenly over classes.
        linf: L-infinity budgets in 255ths, rising.
        tau: how far any logit may move, in standard deviations of the model's logits.
        steps: gradient steps a pass; below about 16 the passes may gain less than a single step.
        restarts: passes, the first from the image itself, others from random points.
        batch_size: images attacked together.
    """

    models: list[AttackedModel] = field(default_factory=lambda: [AttackedModel()])
    further_vlms: list[VLMConfig] = field(default_factory=list)
    translator: TranslatorConfig = field(default_factory=TranslatorConfig)
    images: int = 128
    linf: list[int] = field(default_factory=lambda: [2, 8])
    tau: float = 0.15
    steps: int = 40
    restarts: int = 2
    batch_size: int = 32

    def check(self, problems: Problems) -> None:
        super().check(problems)
        counts = {name: getattr(self, name) for name in ("images", "steps", "restarts", "batch_size")}
        problems.within(1, models=len(self.models), linf=min(self.linf, default=0), **counts)
        problems.within(1e-9, tau=self.tau)
        problems.need(self.linf == sorted(set(self.linf)), f"linf: expected rising budgets, got {self.linf}")
        problems.once("models", [model.known_as for model in self.models])


if __name__ == "__main__":  # --help and mistakes are answered before the seconds that these imports take
    parse(AttackConfig, description=__doc__)

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cosine_similarity

from singreg.analysis import attack_judges as judging
from singreg.analysis.attack import PixelModel, attack_split, choose_images
from singreg.analysis.features import cached_features
from singreg.analysis.steering import plan_pairs
from singreg.analysis.steering_curves import measure_robustness
from singreg.data.datasets import load_splits
from singreg.data.splits import Splits
from singreg.models.edits import drop_null
from singreg.models.vlm import hash_of_state
from singreg.nullspace import NullSpace
from singreg.plots import steering as plotting
from singreg.report import log_figures, track, write_report
from singreg.runs import Run, explained, refuse_other_inputs, start
from singreg.setup import Setup, Space, fit_translators, labels_for_head, open_model, open_spaces, try_one_batch

PAIRS = 240  # of a source class and a target prompt, in feature space
STEPS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)  # shares of |f|
KNOWS = 0.5  # an image encoder that names fewer of the untouched images rightly is no witness


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, open every model, embed the images, attack model by model, judge the saved files, report."""
    config = parse(AttackConfig, arguments, description=__doc__ or "")
    accelerator = start(config)
    with explained():
        run = Run(config, accelerator, "attack").check()
        splits = load_splits(config.data)
        chosen, inputs = choose_images(splits.test, config.images, config.seed), {}
        for model in config.models:
            classifier = open_model(model, splits, config)
            try_one_batch(labels_for_head(splits, classifier, model), classifier, model)
            inputs[model.known_as] = hash_of_state(classifier)
        spaces = open_spaces(config, splits, [splits.class_names], accelerator)
        if config.dry_run:
            print(f"dry run: nothing was attacked; {len(chosen)} images, budgets {config.linf}, models {list(inputs)}")
            return
        run.open()
    with run.guarded():
        # Images sit at 0.999 of τ, which TF32's 10 bits of mantissa do not resolve.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        inputs |= {f"encoder {space.label}": space.vlm.weights_hash for space in spaces}
        refuse_other_inputs(run, inputs | {f"{split.name} images": split.fingerprint for split in splits})
        found = [attack_model(config, run, place, splits, spaces, chosen) for place in range(len(config.models))]
        if accelerator.is_main_process:
            report(config, run, splits, spaces, found)
    accelerator.end_training()


def attack_model(
    config: AttackConfig, run: Run, place: int, splits: Splits, spaces: list[Space], chosen: pd.DataFrame
) -> judging.Attacked:
    """Fit two translators to the first space, attack the chosen images, and steer the same in feature space."""
    model, label = config.models[place], config.models[place].known_as
    classifier = open_model(model, splits, config).to(run.accelerator.device).eval().requires_grad_(False)
    setup = spaces[0].setup(classifier, splits, model)
    every, *_ = fit_translators(setup, config.translator.ridge)
    translators = {name: every[name] for name in ("fitted", "auditor")}
    pixels = PixelModel(drop_null(classifier).eval() if model.drop_null else classifier)
    facts, features, logits = describe(config, model, setup, translators, chosen)
    folder = re.sub("[^A-Za-z0-9]+", "-", f"{place}-{label}").strip("-").lower()
    settings = {name: getattr(config, name) for name in ("seed", "batch_size", "linf", "steps", "restarts")}
    where = pixels, translators["fitted"], splits.test, chosen, setup.texts, run.folder, folder
    with run.timed(label):
        rows = attack_split(*where, tau=facts["tau"], **settings)
    judges = [judging.Judge(name, pixels, translator, setup.texts) for name, translator in translators.items()]
    judges += [judging.Judge(each.label, each.vlm, None, each.texts[splits.class_names]) for each in spaces]
    return judging.Attacked(rows.assign(model=label), pixels, judges, facts, features, logits)


@torch.no_grad()
def describe(
    config: AttackConfig, model: AttackedModel, setup: Setup, translators: dict[str, Any], chosen: pd.DataFrame
) -> tuple[dict[str, Any], dict[str, Any] | None, torch.Tensor]:
    """Return facts of a classifier, how far its features of the chosen images can be steered, and logits (N, C)."""
    classifier, split, texts = setup.classifier, setup.splits.test, setup.texts
    stored = cached_features(classifier, split, setup.passes), setup.embeddings["test"]
    f, z = (torch.from_numpy(np.array(each)).to(texts) for each in stored)
    logits, names = classifier.logits(f).float().cpu(), split.class_names
    space = NullSpace.from_weight(classifier.weight, invariance=model.invariance, allow_empty=True).to(texts.device)
    spread, nullity = logits.std().item(), 0 if model.drop_null else space.nullity
    facts = {"label": model.known_as, "source": model.name, "classes": logits.shape[1], "features": f.shape[1]}
    facts |= {"nullity": nullity, "logit_sd": spread, "tau": config.tau * spread}
    facts["cosine"] = {name: cosine_similarity(t(f), z, dim=-1).mean().item() for name, t in translators.items()}
    if not nullity:
        return facts, None, logits
    labels = np.full(len(f), -1)
    labels[chosen["image"]] = chosen["label"]
    sources = sorted(set(chosen["label"].tolist()))
    plan = plan_pairs(labels, names, texts, sources, names, texts, max_pairs=PAIRS, seed=config.seed)
    how: dict[str, Any] = {"classifier": classifier, "space": space, "steps": STEPS, "tolerance": facts["tau"]}
    batches = setup.read("test", "robustness to steering")
    return facts, measure_robustness(batches, plan, translators, **how), logits


def report(config: AttackConfig, run: Run, splits: Splits, spaces: list[Space], found: list[judging.Attacked]) -> None:
    """Judge every saved image by its own model, all judges and the other models, and write the run's report."""
    judged, transfers = [], list[dict[str, Any]]()
    for each in found:
        judged.append(judging.judge_images(each.rows, run.folder, each.pixels, each.judges, each.facts["tau"]))
        others = [other.rows for other in found if other is not each and other.pixels.size == each.pixels.size]
        if others:
            rows = pd.concat(others).query("arm == 'attack'")
            carried = judging.judge_images(rows, run.folder, each.pixels, each.judges[:1], each.facts["tau"])
            transfers += judging.transfers_of(judged[-1], carried)
    rows, names = pd.concat(judged, ignore_index=True), [judge.name for judge in found[0].judges]
    known = {space.label: rows.drop_duplicates("image")[f"knows {space.label}"].mean() for space in spaces}
    features = {each.facts["label"]: each.features for each in found if each.features}
    witnesses = {space.label: space.embeddings["test"] for space in spaces if known[space.label] >= KNOWS}
    logits = {each.facts["label"]: each.logits for each in found}
    figures: dict[str, Any] = {
        "models": [each.facts for each in found],
        "tau": config.tau,
        "images": rows["image"].nunique(),
        "zero_shot": known,
        "encoders": list(witnesses),
        "summaries": judging.summarize_attack(rows, names, config.seed),
        "transfers": transfers,
        "differences": judging.model_differences(rows, names, config.seed),
        "twins": judging.natural_twins(splits.test, logits, witnesses, config.seed),
        "checks": judging.attack_checks(rows),
        "climbs": judging.summarize_climbs(rows).to_dict("records"),
        "features": features,
    }
    plots = plotting.attack_plots(figures, rows, splits.test, run.folder)
    track(run.accelerator, "attack", config)
    log_figures(run.accelerator, list(plots.values()))
    write_report(
        run,
        title=f"{run.folder.name}: {len(found)} classifiers attacked in pixels",
        verdict=plotting.attack_verdict(figures),
        warnings=plotting.attack_warnings(figures),
        sections=plotting.attack_sections(figures, plots),
        figures=figures,
        rows=rows,
    )


if __name__ == "__main__":
    main()
