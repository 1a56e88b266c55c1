"""Compare several classifiers on the same images, in one or more vision-language spaces: scores, differences, order.

python recipes/compare.py --config configs/compare_demo.yaml
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from singreg.config import ComparedModel, MLPKind, Problems, RunConfig, TranslatorConfig, VLMConfig, parse


@dataclass
class CompareConfig(RunConfig):
    """A run of recipes/compare.py; every field is a key of the YAML and a flag of the command line.

    Args:
        models: the classifiers, all measured on the same images; names alone do, such as runs/mine,runs/other. A run
            alone is compared with its control.
        further_vlms: more vision-language models after `vlm`; each is a space in which all models are read.
        mlp: non-linear translators besides the two linear ones; each takes minutes a model and space.
    """

    models: list[ComparedModel] = field(
        default_factory=lambda: [ComparedModel(), ComparedModel(label="demo (softmax)", invariance="softmax")]
    )
    further_vlms: list[VLMConfig] = field(default_factory=list)
    translator: TranslatorConfig = field(default_factory=TranslatorConfig)
    mlp: list[MLPKind] = field(default_factory=list)

    def check(self, problems: Problems) -> None:
        super().check(problems)
        if len(self.models) == 1 and (control := Path(self.models[0].name) / "model-control").is_dir():
            self.models.append(ComparedModel(name=str(control)))
        problems.need(len(self.models) >= 2, f"models: expected at least two to compare, got {len(self.models)}")
        problems.once("models", [model.known_as for model in self.models])


if __name__ == "__main__":  # --help and mistakes are answered before the seconds that these imports take
    parse(CompareConfig, description=__doc__)

import pandas as pd

from singreg.analysis import comparison as between
from singreg.analysis.chance import measure_chance
from singreg.analysis.comparison import SCORES
from singreg.analysis.features import translator_agreement
from singreg.analysis.scores import compare_passports
from singreg.data.datasets import load_splits
from singreg.plots.scores import save_comparison_plot
from singreg.report import Section, log, log_figures, number, track, write_report
from singreg.runs import Run, explained, start
from singreg.setup import Setup, fit_translators, labels_for_head, look_at_heads, open_model, open_spaces
from singreg.tables import READING, analysis_warnings, passport_table, score_table

CHANCE_DRAWS = 4  # random subspaces behind a model's chance level
TITLES = {"top1": "top-1 (points)", "AS_neg": "AS⁻ °", "AS_abs": "|AS| °", "IS": "IS °", "ratio": "IS / |AS|"}
ORDER = "τ: Kendall's rank correlation, 1 for the same order."
CHANCE = (
    "At chance: when as much energy is taken away in a random direction; compare models with other heads by their "
    "distance from it."
)
Read = dict[str, Any]
"""One model in one space: rows and figures of `analyze_model`, chance level, agreement of its two translators."""
Measured = dict[str, dict[str, Read]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, look at every head, embed in every space, measure every model, compare, report."""
    config = parse(CompareConfig, arguments, description=__doc__ or "")
    accelerator = start(config)
    with explained():
        run = Run(config, accelerator, "compare").check()
        splits = load_splits(config.data)
        heads, names = look_at_heads(config.models, splits, config)
        spaces = open_spaces(config, splits, names, accelerator)
        if config.dry_run:
            print("\n".join(f"{head['label']}: {head['omitted'] or 'has a null space'}" for head in heads))
            print(f"images: {', '.join(f'{split.name} {len(split)}' for split in splits)}")
            print(f"spaces: {', '.join(space.label for space in spaces)}")
            print("dry run: nothing was measured, no run folder was made")
            return
        run.open()
    measured: Measured = {}
    with run.guarded():
        for model, head in zip(config.models, heads, strict=True):
            if head["omitted"] is not None:
                continue
            with run.timed(head["label"]):  # one model at a time, so that memory does not grow with their number
                classifier = open_model(model, splits, config)
                labelled = labels_for_head(splits, classifier, model)
                classifier = classifier.to(accelerator.device).eval()
                for space in spaces:
                    read = measure(config, space.setup(classifier, labelled, model))
                    measured.setdefault(space.label, {})[head["label"]] = read
        if accelerator.is_main_process:
            report(config, run, heads, measured)
    accelerator.end_training()


def measure(config: CompareConfig, setup: Setup) -> Read:
    """Fit translators to a model in a space and measure it on the test images, with its chance level."""
    translators, mean, _ = fit_translators(setup, config.translator.ridge, config.mlp, config.seed)
    rows, figures = setup.measure(translators, mean)
    random: Any = {"null_space": setup.space, "mean": mean, "draws": CHANCE_DRAWS, "seed": config.seed}
    judged: Any = {"texts": setup.texts, "translator": translators["auditor"]}
    chance = measure_chance(setup.read("test", "chance levels"), **judged, **random)
    agreement = translator_agreement(translators["fitted"], translators["auditor"], setup.texts)
    return {"rows": rows, "measurements": figures, "chance": chance, "agreement": agreement}


def report(config: CompareConfig, run: Run, heads: list[Read], measured: Measured) -> None:
    """Compare the models and write the run's report."""

    def each(name: str) -> dict[str, dict[str, Any]]:
        return {space: {label: read[name] for label, read in models.items()} for space, models in measured.items()}

    rows, figures = each("rows"), each("measurements")
    every = [(space, label, read) for space, models in measured.items() for label, read in models.items()]
    paired = between.model_figures(rows, seed=config.seed) if rows else None
    differences = [] if paired is None else between.model_differences(paired)
    order = None if paired is None or not differences else between.order_check(paired)
    plots = [save_comparison_plot(figures, run.folder / "plots" / "comparison.png")] if rows else []
    warnings = compare_passports([head["passport"] for head in heads if head["omitted"] is None])
    track(run.accelerator, "compare", config)
    for space, label, read in every:
        warnings += [f"{label} in {space}: {s}" for s in analysis_warnings(read["measurements"], read["agreement"])]
        for name, scores in read["measurements"]["translators"].items():
            log(run.accelerator, {f"{space}/{name}/{key}/{label}": scores["overall"][key] for key in SCORES}, 0)
    log_figures(run.accelerator, plots)
    tables = [read["rows"].assign(model=f"{label} in {space}") for space, label, read in every]
    write_report(
        run,
        title=f"{run.folder.name}: {len(heads)} classifiers compared",
        verdict=between.comparison_verdict(paired, heads, every[0][2]["rows"]["label"].tolist() if every else []),
        warnings=warnings,
        sections=[
            Section("The models", [models_table(heads, every), READING, CHANCE, *plots]),
            Section("Differences", [differences_table(differences), "Model minus the other, paired by image."]),
            Section("Does the order by AS⁻ hold?", [*([order_table(order)] if order else []), ORDER]),
            Section("Heads", [passport_table([head["passport"] for head in heads if head["passport"]])]),
        ],
        figures={name: each(name) for name in ("measurements", "chance", "agreement")}
        | {"heads": heads, "differences": differences, "order": order},
        rows=pd.concat(tables) if tables else None,
    )


def models_table(heads: list[Read], every: list[tuple[str, str, Read]]) -> pd.DataFrame:
    """Every model in every space by every translator, then those without a null space."""
    tables = []
    for space, label, read in every:
        table = score_table({label: read["measurements"]})
        level = number(read["chance"]["paper"]["levels"]["energy"]["mean"]["AS_neg"])
        table["AS⁻ at chance °"] = [level if name == "auditor" else "–" for name in table["translator"]]
        tables.append(table.assign(space=space))
    omitted = [{"model": head["label"], "translator": head["omitted"]} for head in heads if head["omitted"]]
    return pd.concat([*tables, pd.DataFrame(omitted)]).fillna("")


def differences_table(differences: list[dict[str, Any]]) -> pd.DataFrame:
    """Second minus first for every two models by the auditor, a row a pair and space."""
    rows = [
        {"model": d["second"], "minus": d["first"], "space": d["space"], "figure": TITLES[d["figure"]]}
        | {"shown": "{value:+.2f} [{low:+.2f}, {high:+.2f}]".format(**d)}
        for d in differences
        if d["translator"] in ("auditor", "-")
    ]
    table = pd.DataFrame(rows, columns=["model", "minus", "space", "figure", "shown"])
    wide = table.pivot(index=["model", "minus", "space"], columns="figure", values="shown")
    return wide.fillna("").reset_index()


def order_table(order: dict[str, Any]) -> pd.DataFrame:
    """The order in each view, and τ against the first view."""
    columns = {"view": order["views"], "order, best first": map(" › ".join, order["orders"])}
    return pd.DataFrame({**columns, "τ with the first view": [number(tau) for tau in order["tau"][0]]})


if __name__ == "__main__":
    main()
