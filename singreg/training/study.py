"""The study: arms × seeds, each made, measured and stored before the next; then one report (METHOD sections 8 and 9)."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace

import numpy as np
import torch
from accelerate.logging import get_logger

from singreg.analysis.features import PassSettings, iterate_features
from singreg.analysis.study.arm_figures import KnownAttributes, OtherVLM, measure_arm
from singreg.analysis.study.arm_results import ArmFigures
from singreg.analysis.study.auditors import AgreementPoint, fit_auditors
from singreg.analysis.study.results import ArmRun, StudyReport
from singreg.analysis.study.targets import study_report
from singreg.data.datasets import ImageSplit, SceneSplit, SubsetSplit
from singreg.data.scenes import ATTRIBUTES
from singreg.mlp import MLPSettings
from singreg.models.classifier import Classifier
from singreg.models.edits import drop_null
from singreg.old_seals import read_sealed, write_sealed
from singreg.reporting.study_report import write_study_report
from singreg.reporting.study_tables import study_table
from singreg.training.experiment import Experiment
from singreg.training.loop import Schedule, micro_batch
from singreg.training.processes import refuse_batch_norm
from singreg.training.study_arms import ArmMaker, Made, prepare_start
from singreg.training.study_config import ArmConfig, StudyConfig, arm_config, arm_seeds, is_trained, read_arms
from singreg.training.study_store import ArmStore, StudyRun, arm_hash
from singreg.training.study_validation import agreement_points, hold_out, validation_figures
from singreg.translator import Translator
from singreg.utils import all_reduce_max, all_reduce_sum, sha256_of_json
from singreg.workbench.build import describe_pair, embed_parts, open_vlm
from singreg.workbench.config import VisionLanguageConfig
from singreg.workbench.run import describe_machine

logger = get_logger(__name__)
SECOND = "auditor VLM2"


class Study:
    """Holds what the arms share: parts, embeddings, the common start, the second judge."""

    def __init__(self, run: StudyRun, experiment: Experiment) -> None:
        self.inputs = experiment.inputs()
        self.run, self.config, self.experiment = run, run.config, hold_out(experiment, run.config.validation_per_class)
        experiment, self.agreement = self.experiment, list[AgreementPoint]()
        self.arms = read_arms(run.config)
        self.finished: list[ArmRun] = []
        self.spent: dict[str, list[float]] = {}
        for arm in self.arms:
            own = arm_config(self.config, arm, self.config.seeds[0])
            if arm.train != "none":  # complaints come before any work
                micro_batch(own, experiment.accelerator.num_processes)
                refuse_batch_norm(own, experiment.accelerator)
                Schedule.from_config(own, len(experiment.parts.train))

    def stores(self) -> Iterator[tuple[ArmConfig, ArmStore, ArmStore | None]]:
        """Every arm at every seed with the folder of the arm it takes its weights from, all arms of one seed before the next."""
        made: dict[tuple[str, int], ArmStore] = {}
        for seed in self.config.seeds:
            for arm in self.arms:
                if seed not in arm_seeds(self.config, arm, self.arms):
                    continue
                source = None
                if arm.weights_from is not None:
                    first = self.config.seeds[0]  # an arm without randomness has that one alone
                    source = made.get((arm.weights_from, seed)) or made[arm.weights_from, first]
                digest = arm_hash(self.config, arm, seed, None if source is None else source.digest, self.inputs)
                made[arm.name, seed] = ArmStore(
                    self.run.folder, arm, seed, digest, trained=is_trained(arm, self.arms), inputs=self.inputs
                )
                yield arm, made[arm.name, seed], source

    def run_arms(self) -> None:
        """Make, measure and store every arm that is not finished; says which one of how many, and the time left (no shapes)."""
        works = list(self.stores())
        self._read_agreement()
        loaded = [store.load() for _, store, _ in works]
        self.finished = [run for run in loaded if run is not None]
        for run in self.finished:
            self._count(run)
        if len(self.finished) == len(works):
            return
        features = str(self.run.folder / "features" / "start")
        start = prepare_start(self.experiment, features)
        self._measure_agreement(features)
        maker = ArmMaker(self.experiment, start, features, self.run.folder / "tensorboard")
        other = self._second_vlm()
        for place, ((arm, store, source), done) in enumerate(zip(works, loaded, strict=True)):
            if done is not None:
                continue
            left = [each for each, found in zip(works[place:], loaded[place:], strict=True) if found is None]
            logger.info("arm %d of %d: %s, seed %d%s", place + 1, len(works), arm.name, store.seed, self._time_left(left))
            self._work(maker, other, arm, store, source)
            found = store.load()
            assert found is not None
            self.finished.append(found)
            self._count(found)
        order = {(arm.name, store.seed): place for place, (arm, store, _) in enumerate(works)}
        self.finished.sort(key=lambda run: order[run.arm, run.seed])
        if self.experiment.accelerator.is_main_process:
            shutil.rmtree(self.run.folder / "features", ignore_errors=True)

    def _count(self, run: ArmRun) -> None:
        self.run.seconds[f"{run.arm}, seed {run.seed}"] = run.seconds
        self.spent.setdefault(run.train, []).append(run.seconds)

    def _time_left(self, works: list[tuple[ArmConfig, ArmStore, ArmStore | None]]) -> str:
        """By the mean time of finished arms of the same kind, of any kind where there is none yet."""
        every = [seconds for found in self.spent.values() for seconds in found]
        if not every:
            return ""
        total = sum(float(np.mean(self.spent.get(arm.train, every))) for arm, _, _ in works)
        return f" (about {total / 60:.0f} min left)"

    def _work(
        self, maker: ArmMaker, other: _SecondVLM | None, arm: ArmConfig, store: ArmStore, source: ArmStore | None
    ) -> None:
        begun, main = time.monotonic(), self.experiment.accelerator.is_main_process
        if main:
            store.begin()
        self.experiment.accelerator.wait_for_everyone()
        made = maker.make(arm, arm_config(self.config, arm, store.seed), store, source)
        of_start = arm.train != "all" and source is None
        cache = self.run.folder / "features" / ("start" if of_start else f"{arm.name}-{store.seed}")
        settings = replace(self.experiment.settings, cache=str(cache))
        figures: ArmFigures | None = None
        validation: dict[str, float] = {}
        if arm.drop_null:
            made.notes.update(self._dropped(made.classifier, settings))
        else:
            figures, validation = self._measure(maker, other, made, settings)
        if main:
            store.save(figures, made.notes, time.monotonic() - begun, validation)
            if not of_start:
                shutil.rmtree(cache, ignore_errors=True)
        self.experiment.accelerator.wait_for_everyone()

    def _measure(
        self, maker: ArmMaker, other: _SecondVLM | None, made: Made, settings: PassSettings
    ) -> tuple[ArmFigures, dict[str, float]]:
        experiment, config, classifier = self.experiment, self.config, made.classifier
        invariance = config.model.invariance
        info = replace(experiment.info, head_hash=classifier.head_hash())
        options = {"ridge": config.auditor.ridge, "invariance": invariance, "settings": settings}
        auditors = fit_auditors(
            classifier, experiment.parts.audit, experiment.embeddings["audit"], halves=config.halves,
            mlp=MLPSettings(seed=config.seed) if config.mlp_auditor else None,
            normalize_targets=config.translator.normalize_targets, info=info, **options,  # type: ignore[arg-type]
        )  # fmt: skip
        translators: dict[str, Translator] = {"frozen": maker.start.loop.translator}
        if made.loop is not None:
            translators["loop"] = made.loop
        translators |= {name: auditor.translator for name, auditor in auditors.items()}
        figures = measure_arm(
            classifier, experiment.parts.test, experiment.embeddings["test"], experiment.texts, translators,
            fit=experiment.parts.audit, fit_embeddings=experiment.embeddings["audit"], mean=auditors["auditor"].mean,
            other=None if other is None else other.judge(classifier, options), ood=self._strange(),
            attributes=known_attributes(experiment.parts.audit, experiment.parts.test) if config.attributes else None,
            corruptions=config.corruptions, invariance=invariance, settings=settings, seed=config.seed,
            transfers=[("auditor A", "auditor B")] if config.halves else [],
        )  # fmt: skip
        return figures, validation_figures(experiment, classifier, auditors["auditor"], settings, invariance)

    def _read_agreement(self) -> None:
        """The agreement of auditors that an earlier start measured."""
        try:
            stored = read_sealed(self.run.folder / "agreement.json")
        except FileNotFoundError:
            return
        if stored["key"] == self._agreement_key():
            self.agreement = [AgreementPoint(**point) for point in stored["points"]]

    def _agreement_key(self) -> str:
        config = self.config
        return sha256_of_json([config.agreement_sizes, config.auditor.ridge, config.validation_per_class, asdict(config.data), self.inputs])

    def _measure_agreement(self, features: str) -> None:
        config = self.config
        if self.agreement or not config.agreement_sizes:
            return
        ridge = 1.0 if config.auditor.ridge is None else config.auditor.ridge
        self.agreement = agreement_points(self.experiment, config.agreement_sizes, ridge, features)
        if self.experiment.accelerator.is_main_process:
            points = [asdict(point) for point in self.agreement]
            write_sealed(self.run.folder / "agreement.json", {"key": self._agreement_key(), "points": points})

    def _strange(self) -> ImageSplit | None:
        """Pictures of no class, evenly over the bank's unlabelled ones: no auditor and no cross-entropy ever saw them."""
        if self.config.ood == "none":
            return None
        bank = self.experiment.parts.bank
        found = np.flatnonzero(np.asarray(bank.labels) < 0)
        chosen = found[np.linspace(0, len(found) - 1, min(self.config.ood_count, len(found))).round().astype(int)]
        return bank.subset(chosen, "ood")

    def _dropped(self, classifier: Classifier, settings: PassSettings) -> dict[str, float]:
        """Top-1 after the null space was dropped, in [0, 1], and the largest |Δlogit| to the classifier it was dropped from."""
        test, embeddings = self.experiment.parts.test, self.experiment.embeddings["test"]

        once, quiet = replace(settings, cache=None), replace(settings, cache=None, progress=False)
        device = classifier.weight.device
        counts, change = torch.zeros(2, dtype=torch.float64, device=device), torch.zeros((), device=device)
        # Side by side, batch by batch: the logits of all pictures by two models may be gigabytes.
        for before, after in zip(
            iterate_features(classifier, test, embeddings, once, "dropping the null space"),
            iterate_features(drop_null(classifier), test, embeddings, quiet, "dropping the null space"),
            strict=True,
        ):
            counts += torch.stack([(after.logits.argmax(1) == after.labels).sum(), after.labels.new_tensor(len(after.labels))])
            change = torch.maximum(change, (after.logits - before.logits).abs().max())
        hits, images = all_reduce_sum(counts).tolist()
        return {"top1": hits / images, "logit_change": float(all_reduce_max(change))}

    def _second_vlm(self) -> _SecondVLM | None:
        return _SecondVLM(self.experiment, self.config, self.config.further_vlms[0]) if self.config.further_vlms else None

    def report(self) -> StudyReport | None:
        """Aggregate, write the run's files and say what was found (main process only; no shapes)."""
        if not self.experiment.accelerator.is_main_process:
            return None
        config = self.config
        found = study_report(
            self.finished,
            reference=config.reference,
            claim=config.claim,
            images_per_feature=config.auditor.images_per_feature,
            settings={**asdict(config), "command": " ".join(["recipes/study.py", *sys.argv[1:]])},
            machine=describe_machine(self.experiment.accelerator),
            seconds=self.run.seconds,
            agreement=self.agreement,
        )
        write_study_report(found, self.run.folder)
        print(study_table(found, compact=True))
        print("\n".join([*found.sentences, *found.warnings]))
        print(f"report: {self.run.folder / 'report.html'} (the same as report.md)")
        return found


class _SecondVLM:
    """The second judge's prompts and embeddings; its auditor is fitted to every arm."""

    def __init__(self, experiment: Experiment, config: StudyConfig, vlm_config: VisionLanguageConfig) -> None:
        vlm, parts = open_vlm(vlm_config, experiment.accelerator), experiment.parts
        self.embeddings = embed_parts(
            vlm, (parts.audit, parts.test), config.cache, batch_size=vlm_config.batch_size, workers=config.data.workers,
            progress=experiment.accelerator.is_local_main_process,
        )  # fmt: skip
        self.texts = vlm.embed_classes(parts.class_names, tuple(vlm_config.templates)).to(experiment.accelerator.device)
        self.info = describe_pair(experiment.classifier, vlm, normalized_targets=config.translator.normalize_targets)
        self.audit, self.normalize = parts.audit, config.translator.normalize_targets

    def judge(self, classifier: Classifier, options: Mapping[str, object]) -> OtherVLM:
        info = replace(self.info, head_hash=classifier.head_hash())
        found = fit_auditors(
            classifier, self.audit, self.embeddings["audit"], halves=False, name=SECOND, normalize_targets=self.normalize, info=info,
            **options,  # type: ignore[arg-type]
        )  # fmt: skip
        return OtherVLM(self.texts, self.embeddings["test"], {SECOND: found[SECOND].translator})


def known_attributes(fit: ImageSplit, test: ImageSplit) -> KnownAttributes:
    """Every value of every attribute of built-in scenes as 0 or 1, "color: red", for the fit part (F, k) and the test part (N, k).

    Raises:
        ValueError: the pictures are no scenes.
    """
    names = tuple(f"{name}: {value}" for name, values in ATTRIBUTES.items() for value in values)

    def table(part: ImageSplit) -> np.ndarray:
        if isinstance(part, SubsetSplit):
            return table(part.parent)[part.indices]
        if not isinstance(part, SceneSplit):
            raise ValueError(f"attributes are known of built-in scenes only, not of the pictures of {part.name!r}")
        return np.concatenate([np.eye(len(values))[part.table.codes[name]] for name, values in ATTRIBUTES.items()], axis=1)

    return KnownAttributes(names, table(fit), table(test))


def dry_run(config: StudyConfig, experiment: Experiment) -> None:
    """List the arms and what each would do, after one batch through the starting classifier; nothing is written (no shapes)."""
    arms, parts = read_arms(config), experiment.parts
    some = parts.test.subset(range(min(64, len(parts.test))))
    quiet = PassSettings(len(some), 0, progress=False)
    batch = next(iter(iterate_features(experiment.classifier, some, experiment.embeddings["test"][: len(some)], quiet, "dry run")))
    if not experiment.accelerator.is_main_process:
        return
    print(f"one batch: features {tuple(batch.features.shape)}, logits {tuple(batch.logits.shape)}")
    for arm in arms:
        own = arm_config(config, arm, config.seeds[0])
        steps = 0 if arm.train == "none" else Schedule.from_config(own, len(parts.train)).total
        begun = f", from {arm.weights_from}" if arm.weights_from else ""
        seeds = len(arm_seeds(config, arm, arms))
        print(f"{arm.name}: train {arm.train}{begun}, {steps} steps, {seeds} seed(s){': ' + arm.note if arm.note else ''}")
    print("dry run: nothing was trained, no run folder was made")
