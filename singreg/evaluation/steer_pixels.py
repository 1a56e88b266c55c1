"""The pixel job: attack every model batch by batch, judge the saved files, look for twins, check, report."""

from __future__ import annotations

import gc
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from singreg.analysis.features import cached_features
from singreg.analysis.pixels.attack import AttackSettings, Batch, attack_batch, save_batch
from singreg.analysis.pixels.checks import KNOWS, pixel_checks, pixel_findings, pixel_warnings, unchanged_without_null
from singreg.analysis.pixels.features import feature_rules
from singreg.analysis.pixels.judges import (
    Reader,
    counted_rise,
    judge_pictures,
    model_differences,
    summarise,
    translator_reader,
)
from singreg.analysis.pixels.model import PixelModel
from singreg.analysis.pixels.passes import Climbed, climb_summaries
from singreg.analysis.pixels.plain_robustness import PlainRobustness, corrupted_right, still_right
from singreg.analysis.pixels.results import ATTACK, AttackedModel, AttackedPicture, JudgedPicture, PixelReport, Transfer
from singreg.analysis.pixels.twins import TwinReport, natural_twins, twins_problem
from singreg.analysis.old_robustness.reachable import reachable_targets
from singreg.analysis.old_robustness.results import RobustnessFigures
from singreg.analysis.old_robustness.sanity import Check
from singreg.data.corruption import KINDS
from singreg.evaluation.compare_bench import ModelBench
from singreg.evaluation.fitting import fit_translators
from singreg.evaluation.steer_pixels_bench import PixelsBench, open_attacked
from singreg.evaluation.steer_pixels_config import AttackedModelConfig, PixelsConfig, parse_pixels
from singreg.evaluation.steer_pixels_features import FeatureAttack
from singreg.evaluation.steer_pixels_kept import MADE_FROM, made_from, read_kept
from singreg.nullspace import NullSpace
from singreg.reporting.pixels_report import pixels_to_tensorboard, write_pixels_report
from singreg.reporting.pixels_tables import checks_table, pixels_table
from singreg.translator import Translator
from singreg.utils import progress, write_json
from singreg.workbench.run import Run, describe_machine, explained, make_accelerator


@dataclass
class Attacked:
    """What is kept of a model once it was attacked: facts, translators by name, its files; logits (P, C) of the twin pictures."""

    facts: AttackedModel
    translators: dict[str, Translator]
    rows: list[AttackedPicture]
    right: dict[str, list[bool]]
    logits: Tensor
    size: tuple[int, ...]
    features: RobustnessFigures | None
    climbs: list[Climbed]


class PixelAttack:
    """Attack, judge, report; holds what the stages share. Angles in degrees."""

    def __init__(self, run: Run, config: PixelsConfig, bench: PixelsBench) -> None:
        self.run, self.config, self.bench = run, config, bench
        self.found: dict[str, Attacked] = {}
        self.in_features = FeatureAttack(config, bench)
        self.rows: list[JudgedPicture] = []
        self.transfers: list[Transfer] = []
        self.not_carried: list[str] = []
        labelled = np.flatnonzero(bench.pictures.test.labels >= 0)
        rng = np.random.default_rng([config.seed, 8])
        self.twin_places = np.sort(rng.permutation(labelled)[: config.twin_pictures])

    def attack(self) -> None:
        """Every model in turn, one in memory at a time; batches that are already there are read back (a stage for each label)."""
        for place, model in enumerate(self.config.models):
            start = time.monotonic()
            self.found[model.known_as] = self._attack_model(model, place)
            self.run.seconds[f"attacking {model.known_as}"] = time.monotonic() - start
            gc.collect()

    def _attack_model(self, model: AttackedModelConfig, place: int) -> Attacked:
        device = self.bench.accelerator.device
        classifier, attacked = open_attacked(self.config, model, self.bench.pictures, device)
        bench = self.bench.model_bench(classifier, model)
        fitted = fit_translators(bench, self.config.translator, self.config.auditor, invariance=model.invariance)
        translators: dict[str, Translator] = {name: found.translator for name, found in fitted.items()}
        pixel_model, at = PixelModel.of(attacked), self._folder_of(model, place)
        made = made_from(classifier, bench.parts, bench.info.vlm_weights_hash)
        features = self.in_features.of(model, bench, fitted, self.run.folder / at, made)
        count = len(self.bench.chosen.indices)
        batches = [range(start, min(start + self.config.attack_batch, count)) for start in range(0, count, self.config.attack_batch)]
        accelerator = self.bench.accelerator
        mine = list(enumerate(batches))[accelerator.process_index :: accelerator.num_processes]
        for number, rows in progress(mine, f"attacking {model.known_as}", enabled=self.bench.settings.progress):
            log = self.run.folder / at / f"batch-{number:04d}.json"
            if read_kept(log, made) is None:
                found = self._attack_rows(pixel_model, translators["fitted"], rows, number, at, model.known_as)
                write_json(log, {**found, MADE_FROM: made})
        accelerator.wait_for_everyone()
        logs = [json.loads((self.run.folder / at / f"batch-{number:04d}.json").read_text()) for number in range(len(batches))]
        right = {name: [kept for log in logs for kept in log["right"][name]] for name in logs[0]["right"]}
        cosines, logits = self._on_test(bench, translators)
        return Attacked(
            facts=self._facts(model, bench, right["clean"], float(logits.std()), cosines),
            translators=translators,
            rows=[AttackedPicture(**row) for log in logs for row in log["attacked"]],
            right=right,
            logits=logits[self.twin_places],
            size=tuple(pixel_model.picture(self.bench.pictures.test, int(self.bench.chosen.indices[0])).shape),
            features=features,
            climbs=[Climbed(**row) for log in logs for row in log["climbs"]],
        )

    def _folder_of(self, model: AttackedModelConfig, place: int) -> Path:
        """Where a model's files go, in the run's folder; the place keeps two labels that differ in signs only apart."""
        return Path("attacked") / f"{place}-{re.sub('[^A-Za-z0-9]+', '-', model.known_as).strip('-').lower()}"

    def _attack_rows(
        self, model: PixelModel, translator: Translator, rows: Sequence[int], number: int, at: Path, label: str
    ) -> dict[str, Any]:
        """One batch through all arms, its pictures saved, and ordinary robustness on the same pictures; what its log holds."""
        config, chosen, test = self.config, self.bench.chosen, self.bench.pictures.test
        device = self.bench.accelerator.device
        indices = [int(chosen.indices[row]) for row in rows]
        pictures = torch.stack([model.picture(test, index) for index in indices])
        batch = Batch(
            indices, [test.identifier(index) for index in indices], pictures,
            [int(chosen.labels[row]) for row in rows], [int(chosen.targets[row]) for row in rows],
        )  # fmt: skip
        settings = AttackSettings(
            config.budgets, tau=config.tau, steps=config.steps, restarts=config.restarts, hold=config.hold, seed=config.seed
        )
        texts = next(iter(self.bench.encoders.values())).texts
        hold = max(0, min(config.hold_pictures - rows[0], len(rows)))
        found = attack_batch(model, translator, texts, batch, settings, number=number, hold=hold)
        attacked = save_batch(found.pictures, batch, label, self.run.folder, at)
        labels = torch.tensor(self._head_labels(model, indices), device=device)
        right = still_right(
            model, pictures.to(device), labels, config.robust,
            steps=config.robust_steps, restarts=config.robust_restarts, seed=config.seed + number,
        )  # fmt: skip
        part = self.bench.pictures.test.subset(indices)
        for kind, kept in corrupted_right(model, part, labels.cpu(), severity=config.severity, batch_size=config.batch_size).items():
            right[kind] = kept
        return {
            "attacked": [asdict(row) for row in attacked],
            "climbs": [asdict(row) for row in found.climbs],
            "right": {name: kept.tolist() for name, kept in right.items()},
        }

    def _head_labels(self, model: PixelModel, indices: Sequence[int]) -> list[int]:
        """The pictures' labels among the rows of the model's head: ImageNet's own where all of them were kept."""
        parts = self.bench.pictures
        labels = parts.test.labels[list(indices)]
        if model.classifier.num_classes != len(parts.class_names) and parts.class_indices is not None:
            labels = np.asarray(parts.class_indices)[labels]
        return [int(label) for label in labels]

    def _on_test(self, bench: ModelBench, translators: dict[str, Translator]) -> tuple[dict[str, float], Tensor]:
        """(mean cosine of every T(f) to the encoder's embedding, logits (N, C)) over the test part, on every process."""
        settings = self.bench.settings
        stored = cached_features(
            bench.classifier, bench.parts.test, self.config.cache,
            batch_size=settings.batch_size, workers=settings.workers, progress=settings.progress,
        )  # fmt: skip
        f, z = (torch.from_numpy(np.array(table)).to(bench.texts) for table in (stored, bench.embeddings["test"]))
        with torch.no_grad():
            cosines = {name: float(cosine_similarity(translator(f), z, dim=-1).mean()) for name, translator in translators.items()}
            return cosines, bench.classifier.logits(f).float().cpu()

    def _facts(
        self, model: AttackedModelConfig, bench: ModelBench, clean: list[bool], logit_sd: float, cosines: dict[str, float]
    ) -> AttackedModel:
        space = NullSpace.from_weight(bench.classifier.weight, allow_empty=True)
        classes, features = bench.classifier.weight.shape
        note = ""
        if model.drop_null:
            note = (
                f"Its null space ({space.nullity} dimensions) was dropped, so its features cannot be steered by exactly null directions. "
                "In pixels attack and judge read the features before the dropping, so that its pictures come out like those of the model "
                "it was made from is by construction, and says only that the dropping hides nothing."
            )
        elif not space.nullity:
            note = f"It has no null space ({classes} classes on {features} features): every feature direction moves a logit."
        return AttackedModel(
            label=model.known_as, source=model.name, classes=classes, features=features,
            nullity=0 if model.drop_null else space.nullity, top1=float(np.mean(clean)), logit_sd=logit_sd, cosine=cosines, note=note,
        )  # fmt: skip

    def judge(self) -> None:
        """Every saved picture by its own model and all judges, and by the other models (main process only; stage "judging")."""
        if not self.bench.accelerator.is_main_process:
            return
        start = time.monotonic()
        for model in progress(self.config.models, "judging the saved pictures", enabled=self.bench.settings.progress):
            mine = self.found[model.known_as]
            _, attacked = open_attacked(self.config, model, self.bench.pictures, self.bench.accelerator.device)
            pixel_model = PixelModel.of(attacked)
            texts = next(iter(self.bench.encoders.values())).texts
            translated = {name: translator_reader(pixel_model, found, texts) for name, found in mine.translators.items()}
            encoders = {name: encoder.reader for name, encoder in self.bench.encoders.items()}
            rows = self._judged(mine.rows, pixel_model, {**translated, **encoders})
            self.rows += rows
            for other in self.found.values():
                if other.size != mine.size:
                    self.not_carried.append(f"{other.facts.label} to {model.known_as}")
                elif other.facts.label != model.known_as:
                    crafted = [row for row in other.rows if row.arm == ATTACK]
                    self._carry_over(other.facts.label, rows, self._judged(crafted, pixel_model, {"fitted": translated["fitted"]}))
        self.run.seconds["judging"] = time.monotonic() - start

    def _judged(self, rows: Sequence[AttackedPicture], model: PixelModel, readers: Mapping[str, Reader]) -> list[JudgedPicture]:
        budgets = {budget.label: budget for budget in self.config.budgets}
        return judge_pictures(rows, self.run.folder, model, readers, budgets, tau=self.config.tau, batch_size=self.config.batch_size)

    def _carry_over(self, crafted_on: str, own: Sequence[JudgedPicture], carried: Sequence[JudgedPicture]) -> None:
        for budget in self.config.budgets:
            theirs, mine = (
                [row for row in rows if row.attacked.budget == budget.label and row.attacked.arm == ATTACK] for rows in (carried, own)
            )
            self.transfers.append(
                Transfer(
                    crafted_on, mine[0].attacked.model, budget.label, float(np.mean([counted_rise(row, "fitted") for row in theirs])),
                    float(np.mean([counted_rise(row, "fitted") for row in mine])), float(np.mean([row.kept for row in theirs])),
                )
            )

    def report(self) -> PixelReport | None:
        """Check, write the run's files and say what was found (main process only; no shapes)."""
        if not self.bench.accelerator.is_main_process:
            return None
        config, zero_shot = self.config, self.bench.zero_shot()
        encoders = [name for name, share in zero_shot.items() if share >= KNOWS]
        labels = [model.known_as for model in config.models]
        groups = group_rows(self.rows)
        report = PixelReport(
            models=[found.facts for found in self.found.values()],
            tau=config.tau,
            pictures=len(self.bench.chosen.indices),
            zero_shot=zero_shot,
            encoders=encoders,
            summaries=[summarise(rows, encoders, seed=config.seed) for rows in groups],
            transfers=self.transfers,
            differences=[d for second in labels[1:] for d in model_differences(self.rows, labels[0], second, seed=config.seed)],
            twins=self._twins(encoders),
            robustness=[self._robustness(found) for found in self.found.values()],
            checks=pixel_checks(
                self.rows, self.transfers, config.budgets, config.tau,
                climbs={label: found.climbs for label, found in self.found.items()}, hold=config.hold, reachable=self._reachable(),
            ),
            findings=[],
            warnings=[],
            settings={**asdict(config), "command": " ".join(["recipes/steer.py", *sys.argv[1:]])},
            machine=describe_machine(self.run.accelerator),
            seconds=self.run.seconds,
            rows=self.rows,
            features={label: found.features for label, found in self.found.items() if found.features is not None},
            dropped=[model.known_as for model in config.models if model.drop_null],
            climbs=[summary for label, found in self.found.items() for summary in climb_summaries(label, found.climbs)],
        )
        report.checks += [*self._dropped(report), *feature_rules(report)]
        report.findings, report.warnings = pixel_findings(report), pixel_warnings(report, self.bench.chosen.left_out, self._left_undone())
        plots = write_pixels_report(report, self.run.folder, self.bench.pictures.test)
        pixels_to_tensorboard(report, self.run.folder, plots)
        print(pixels_table(report, compact=True))
        print(checks_table(report, compact=True))
        print("\n".join([*report.findings, *report.warnings]))
        print(f"report: {self.run.folder / 'report.html'} (the same as report.md)")
        return report

    def _reachable(self) -> dict[str, set[int]]:
        texts = next(iter(self.bench.encoders.values())).texts
        return {label: reachable_targets(found.translators["fitted"], texts) for label, found in self.found.items()}

    def _left_undone(self) -> list[str]:
        """What this run did not measure, and why, in sentences."""
        said = []
        if self.not_carried:
            said.append(f"pictures were not carried over between models of other input sizes ({', '.join(self.not_carried)}).")
        if (problem := twins_problem(self._twin_labels())) is not None:
            said.append(f"no natural twins were sought among {len(self.twin_places)} test pictures: {problem}. See twin_pictures.")
        return said

    def _twin_labels(self) -> Tensor:
        return torch.from_numpy(self.bench.pictures.test.labels[self.twin_places])

    def _twins(self, encoders: Sequence[str]) -> list[TwinReport]:
        labels, found = self._twin_labels(), list[TwinReport]()
        if twins_problem(labels) is not None:  # said as a warning
            return found
        for label, attacked in self.found.items():
            for name in encoders:
                z = torch.from_numpy(np.asarray(self.bench.encoders[name].embeddings["test"][self.twin_places]))
                twins = natural_twins(attacked.logits, z, labels, model=label, encoder=name)
                shown = [replace(t, first=int(self.twin_places[t.first]), second=int(self.twin_places[t.second])) for t in twins.shown]
                found.append(replace(twins, shown=shown))
        return found

    def _robustness(self, found: Attacked) -> PlainRobustness:
        shares = {name: float(np.mean(kept)) for name, kept in found.right.items()}
        adversarial = {f"{size:g}": shares[f"{size:g}"] for size in self.config.robust}
        count = len(self.bench.chosen.indices)
        return PlainRobustness(found.facts.label, count, shares["clean"], adversarial, {kind: shares[kind] for kind in KINDS})

    def _dropped(self, report: PixelReport) -> list[Check]:
        """For every model without its null space, beside the one it was made from where that is in the run too."""
        checks = []
        for model in self.config.models:
            twin = [m for m in self.config.models if model.drop_null and not m.drop_null and (m.name, m.head) == (model.name, model.head)]
            for budget in self.config.budgets if twin else []:
                before, after = report.of(twin[0].known_as, budget.label), report.of(model.known_as, budget.label)
                if before is not None and after is not None:
                    checks.append(unchanged_without_null(model.known_as, before, after))
        return checks


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 while pictures are attacked and judged: they sit at 0.999 of τ, which its 10 bits of mantissa do not resolve (no shapes)."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def group_rows(rows: Sequence[JudgedPicture]) -> list[list[JudgedPicture]]:
    """Rows by model, budget and arm, in the order they come (no shapes)."""
    groups: dict[tuple[str, str, str], list[JudgedPicture]] = {}
    for row in rows:
        groups.setdefault((row.attacked.model, row.attacked.budget, row.attacked.arm), []).append(row)
    return list(groups.values())


def dry_run(config: PixelsConfig, bench: PixelsBench) -> None:
    """Say what would be attacked, after one picture through every model; nothing is written (no shapes)."""
    chosen = bench.chosen
    for model in config.models:
        _, attacked = open_attacked(config, model, bench.pictures, bench.accelerator.device)
        pixel_model = PixelModel.of(attacked)
        picture = pixel_model.picture(bench.pictures.test, int(chosen.indices[0]))
        features, logits = pixel_model(picture[None].to(bench.accelerator.device))
        shapes = f"features {tuple(features.shape)}, logits {tuple(logits.shape)}"
        if bench.accelerator.is_main_process:
            print(f"{model.known_as}: one picture {tuple(picture.shape)} gives {shapes}")
    if not bench.accelerator.is_main_process:
        return
    passes = len(config.models) * len(chosen.indices) * len(config.budgets) * config.restarts * (config.steps + 1)
    print(f"pictures: {len(chosen.indices)} attacked; {', '.join(f'{part.name} {len(part)}' for part in bench.pictures)}")
    print(f"budgets: {', '.join(budget.label for budget in config.budgets)}; image encoders: {', '.join(bench.encoders)}")
    print(f"work: {passes} passes of one picture forward and backward, beside ordinary robustness")
    print("dry run: nothing was attacked, no run folder was made")


def attack_pixels(arguments: Sequence[str] | None = None, *, description: str = "") -> None:
    """What recipes/steer.py does with `attack: pixels`: parse, build, attack, judge, report (no shapes)."""
    config = parse_pixels(arguments, description=description)
    accelerator = make_accelerator(seed=config.seed)
    with explained():
        run = Run(config, accelerator, "steer")
        if config.dry_run:
            dry_run(config, PixelsBench.build(config, accelerator))
            return
        run.check()
        bench = PixelsBench.build(config, accelerator)
        run.open()
    with run.guarded(), full_float32():
        job = PixelAttack(run, config, bench)
        job.attack()
        job.judge()
        job.report()
    accelerator.end_training()
