"""From a configuration to the splits, models, texts and embeddings it names; complaints come before any long work."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor

from singreg.analysis.features import FeatureBatch, FittedTranslator, cached_features, fit_on_split, iterate_features
from singreg.analysis.scores import analyze_model, head_passport
from singreg.classes import NoRows, head_rows, imagenet_names, read_list, subset_of
from singreg.config import ComparedModel, ModelConfig, RunConfig, VLMConfig, located
from singreg.data.datasets import NAMED, load_splits
from singreg.data.embeddings import PassSettings, cached_embeddings
from singreg.data.splits import ImageSplit, Splits, TableSplit, make_loader
from singreg.mlp import MLPKind, MLPSettings
from singreg.models.classifier import Classifier
from singreg.models.heads import HeadError
from singreg.models.vlm import VisionLanguageModel, needs_quick_gelu
from singreg.nullspace import NullSpace
from singreg.ridge import DEFAULT_RIDGES, RidgeStatistics
from singreg.translator import Translator, TranslatorInfo, fit_mlp_translator, load_translator
from singreg.utils import cache_folder, sha256_of_json

logger = logging.getLogger(__name__)
BATCH_SIZE = 64  # where nothing is trained


@dataclass(frozen=True)
class Setup:
    """One classifier and one VLM on the splits of a data set: class prompts (C, n), embeddings (N, n) by split name."""

    splits: Splits
    classifier: Classifier
    vlm: VisionLanguageModel
    texts: Tensor
    embeddings: dict[str, np.ndarray]
    passes: PassSettings
    model: ModelConfig = field(default_factory=ModelConfig)
    held: tuple[ImageSplit, np.ndarray] | None = None  # validation images with their embeddings

    @property
    def space(self) -> NullSpace:
        """The null space of the classifier's head."""
        return NullSpace.from_weight(self.classifier.weight, invariance=self.model.invariance).to(self.texts.device)

    def read(self, name: str, description: str) -> Iterator[FeatureBatch]:
        """Pass once over this process's images of bank, audit or test."""
        where = getattr(self.splits, name), self.embeddings[name]
        return iterate_features(self.classifier, *where, self.passes, description)

    @property
    def info(self) -> TranslatorInfo:
        """What a translator between the two models is fitted on, for its file."""
        return TranslatorInfo(
            classifier=self.classifier.tag,
            head_hash=self.classifier.head_hash(),
            classifier_preprocessing=sha256_of_json(self.classifier.preprocessing),
            vlm=self.vlm.tag,
            vlm_weights_hash=self.vlm.weights_hash,
            vlm_preprocessing=sha256_of_json(self.vlm.preprocessing),
        )

    def fit(self, split: ImageSplit, embeddings: np.ndarray, ridge: float | None) -> FittedTranslator:
        """Fit a translator on a split and the embeddings (N, n) of its images; without a ridge it chooses its own."""
        how: dict[str, Any] = {"ridges": DEFAULT_RIDGES if ridge is None else (ridge,), "info": self.info}
        how |= {"invariance": self.model.invariance, "settings": self.passes}
        return fit_on_split(self.classifier, split, embeddings, **how)

    def measure(
        self, translators: Mapping[str, Translator], mean: Tensor, auditor: FittedTranslator | None = None
    ) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Measure the classifier on the test images, see `analyze_model`."""
        where = self.splits.test, self.embeddings["test"], self.texts, translators
        options: dict[str, Any] = {"invariance": self.model.invariance, "settings": self.passes}
        return analyze_model(self.classifier, *where, mean=mean, auditor=auditor, **options)


def prepare(
    config: Any, accelerator: Accelerator, *, before_embedding: Callable[[Splits, Classifier], None] | None = None
) -> Setup:
    """Load data and models and compute, or read back, the embeddings of bank, audit and test.

    `before_embedding` is called when splits and classifier are there and the long work is not begun.
    """
    needs_quick_gelu(located(config.vlm.name, "vlm"), config.vlm.pretrained)  # or say now what is wrong with them
    model, splits = config.model, load_splits(config.data)
    if not len(splits.audit):
        raise ValueError("no image is left for the auditor; give data.per_class.audit or data.scenes.audit")
    fit_batch(config, len(splits.train), accelerator)
    options: dict[str, Any] = {"image_size": config.data.image_size, "trained": hasattr(config, "training")}
    classifier = build_classifier(model, splits, **options).to(accelerator.device)
    labelled = labels_for_head(splits, classifier, model)
    told = try_one_batch(labelled, classifier, model)
    vlm = open_vlm(config.vlm, accelerator)
    passes = pass_settings(config, accelerator)
    if config.dry_run and accelerator.is_main_process:
        space = NullSpace.from_weight(classifier.weight, invariance=model.invariance, allow_empty=True)
        share = space.nullity / classifier.feature_dim
        print(f"head: rank {space.rank}, nullity {space.nullity} ({share:.1%} of the dimensions)")
        print(f"images: {', '.join(f'{split.name} {len(split)}' for split in labelled)}\n{told}")
        print(f"embedding those of bank, audit and test once; {cache_folder()} keeps them", flush=True)
    if before_embedding is not None:
        before_embedding(labelled, classifier)
    texts = vlm.embed_classes(labelled.class_names, tuple(config.vlm.templates)).to(accelerator.device)
    embeddings = embed_splits(vlm, (splits.bank, splits.audit, splits.test), passes)  # the labels do not matter
    if config.dry_run and accelerator.is_main_process:
        print("dry run: nothing was measured, no run folder was made")
    return Setup(labelled, classifier, vlm, texts, embeddings, passes, model)


def prepare_alone(config: Any, accelerator: Accelerator) -> Setup:
    """Load the models without any data: splits are empty, classes are all rows of the head as it is."""
    model = config.model
    classifier = Classifier.from_timm(model.source, pretrained=model.pretrained, image_size=config.data.image_size)
    labels, rows = row_labels(classifier, model), classifier.num_classes
    known = tuple(labels.values()) or imagenet_names()
    if len(known) != rows:
        raise ValueError(f"model.label_names: expected a file of the names of the head's {rows} rows, one a line")
    vlm, names = open_vlm(config.vlm, accelerator), subset_of(known).names
    nothing = TableSplit.from_files("none", [], names, [])
    splits, classifier = Splits(nothing, nothing, nothing, nothing, names, None), classifier.to(accelerator.device)
    texts = vlm.embed_classes(names, tuple(config.vlm.templates)).to(accelerator.device)
    return Setup(splits, classifier, vlm, texts, {}, pass_settings(config, accelerator), model)


def fit_translators(
    setup: Setup, ridge: float | None, kinds: Sequence[MLPKind] = (), seed: int = 0
) -> tuple[dict[str, Any], Tensor, RidgeStatistics]:
    """Fit "fitted" on the bank, "auditor" on the audit split and MLPs of some kinds on the bank (METHOD section 8.6).

    Without a ridge each linear translator chooses its own. "run" is that of the run whose model it is, if it fits.
    Returned by name, with the auditor's mean feature (m,) and the sums over the bank.
    """
    classifier, passes, bank = setup.classifier, setup.passes, setup.embeddings["bank"]
    fitted = setup.fit(setup.splits.bank, bank, ridge)
    auditor = setup.fit(setup.splits.audit, setup.embeddings["audit"], ridge)
    found: dict[str, Any] = {"fitted": fitted.translator, "auditor": auditor.translator}
    for kind in kinds:
        arrays = cached_features(classifier, setup.splits.bank, passes), bank
        options: Any = {"info": setup.info, "device": classifier.weight.device, "progress": passes.progress}
        found[kind] = fit_mlp_translator(*arrays, settings=MLPSettings(kind=kind, seed=seed), **options)
    if setup.model.translator.is_file():
        fits = replace(setup.info, classifier="", vlm="")  # folders may move; hashes say what is in them
        try:
            found["run"] = load_translator(setup.model.translator, expected=fits).to(classifier.weight.device)
        except ValueError as error:
            logger.warning("the run's translator is left out: %s", error)
    return found, auditor.mean, fitted.statistics


def read_by(setup: Setup, config: VLMConfig, accelerator: Accelerator) -> Setup:
    """Return the same classifier and splits with another VLM's prompts and embeddings of audit and test."""
    vlm, splits = open_vlm(config, accelerator), setup.splits
    texts = vlm.embed_classes(splits.class_names, tuple(config.templates)).to(accelerator.device)
    embeddings = embed_splits(vlm, (splits.audit, splits.test), setup.passes)
    return replace(setup, vlm=vlm, texts=texts, embeddings=embeddings)


def pass_settings(config: RunConfig, accelerator: Accelerator) -> PassSettings:
    """Return how passes over images read them; features are kept where the backbone is not trained."""
    cache = None if hasattr(config, "training") else str(cache_folder())
    return PassSettings(BATCH_SIZE, config.data.workers, accelerator.is_local_main_process, cache)


def build_classifier(
    model: ModelConfig, splits: Splits, image_size: int | None = None, allow_empty: bool = False, trained: bool = False
) -> Classifier:
    """Build the classifier with its head kept, sliced to the splits' classes, or new; auto is new only if `trained`."""
    options: dict[str, Any] = {"pretrained": model.pretrained, "image_size": image_size}
    name, names = model.source, splits.class_names
    new = model.head == "new"
    if not new:
        classifier = Classifier.from_timm(name, **options)
        try:
            if model.head != "keep":
                classifier.slice_head(find_rows(splits, classifier, model)[0])
        except NoRows as error:
            if model.head == "slice" or not trained:
                raise
            logger.warning("model.head: auto takes new, since %s", error)
            new = True
    if new:
        classifier = Classifier.from_timm(name, head_mode="new", num_classes=len(names), **options)
    if model.head != "keep":
        classifier.class_names = names
    if classifier.num_classes < 2:
        raise ValueError(f"the data have one class ({names[0]}), and a head of one row separates nothing; give two")
    NullSpace.from_weight(classifier.weight, invariance=model.invariance, allow_empty=allow_empty)  # or say so now
    if model.compile and not hasattr(classifier.model, "forward_features"):
        raise ValueError(f"model.compile: timm's {model.name} has no forward_features to compile; set it to false")
    return classifier.to(memory_format=torch.channels_last)


def row_labels(classifier: Classifier, model: ModelConfig) -> dict[int, str]:
    """Return the names of a pretrained head's rows, as far as a file or the weights say them."""
    if model.label_names is None:
        return classifier.label_names
    labels, count = dict(enumerate(read_list(model.label_names))), classifier.num_classes
    if len(labels) != count:
        raise ValueError(f"model.label_names: {model.label_names} has {len(labels)} lines, the head {count} rows")
    return labels


def find_rows(splits: Splits, classifier: Classifier, model: ModelConfig) -> tuple[list[int], dict[int, str]]:
    """Return which rows of a pretrained head are the splits' classes, and the names of its rows as far as known."""
    labels, count = row_labels(classifier, model), classifier.num_classes
    classes = splits.classes or subset_of(splits.class_names)
    rows = head_rows(classes, labels, count)
    named = tuple(labels.values()) or next((w for w in (imagenet_names(), classes.order) if len(w) == count), ())
    names = dict(zip(labels or range(count), subset_of(named).names, strict=False))
    told = [f"{key} {row} ({names.get(row, key)})" for key, row in zip(classes.keys, rows, strict=True)]
    logger.info("rows of the head by class: %s", ", ".join(told[:NAMED] + ["..."] * (len(told) > NAMED)))
    return rows, {**names, **dict(zip(rows, splits.class_names, strict=True))}


def labels_for_head(splits: Splits, classifier: Classifier, model: ModelConfig) -> Splits:
    """With a kept head, give labels and names among all its rows."""
    if model.head != "keep":
        return splits
    rows, names = find_rows(splits, classifier, model)
    if rows == list(range(classifier.num_classes)):
        return splits
    return splits.among(rows, [names.get(row, f"row {row}") for row in range(classifier.num_classes)])


def open_vlm(config: VLMConfig, accelerator: Accelerator) -> VisionLanguageModel:
    """Open the vision-language model on the accelerator's device."""
    return VisionLanguageModel.from_open_clip(located(config.name, "vlm"), config.pretrained, device=accelerator.device)


def embed_splits(vlm: VisionLanguageModel, splits: Sequence[ImageSplit], passes: PassSettings) -> dict[str, np.ndarray]:
    """Return image embeddings (N, n) by the split's name, computed once and memory-mapped from the cache."""
    settings: dict[str, Any] = {"batch_size": passes.batch_size, "workers": passes.workers, "progress": passes.progress}
    return {split.name: cached_embeddings(vlm, split, **settings) for split in splits}


def try_one_batch(splits: Splits, classifier: Classifier, model: ModelConfig) -> str:
    """Classify test images from all over the split, or say why not; warn of chance, return figures to print."""
    split, device = splits.test, classifier.weight.device
    places = np.linspace(0, len(split) - 1, min(BATCH_SIZE, len(split))).astype(int)
    images, labels, _ = next(iter(make_loader(split.subset(places), classifier.transform, len(places))))
    try:
        with torch.no_grad():
            logits = classifier(images.to(device))
    except (AssertionError, RuntimeError) as error:
        why = str(error).splitlines()[0][:90]
        wrong = f"{classifier.tag} cannot take images {tuple(images.shape[1:])}, data.image_size"
        raise ValueError(f"{wrong}: {why}") from error
    right, count = int((logits.argmax(1).cpu() == labels).sum()), len(labels)
    classes = len(labels.unique())
    if right <= count / classes + 2 * (count / classes) ** 0.5 and model.pretrained and not classifier.new_head:
        told = "before training %d of %d test images are right: are the head's rows those classes?"
        logger.warning(told, right, count)
    shapes = f"features {(count, classifier.feature_dim)}, logits {tuple(logits.shape)}"
    return f"one batch: {shapes}; top-1 before training {right / count:.1%}"


def fit_batch(config: RunConfig, images: int, accelerator: Accelerator) -> None:
    """Lower `training.batch_size`, where a recipe has it, to the number of training images."""
    training: Any = getattr(config, "training", None)
    step = accelerator.gradient_accumulation_steps * accelerator.num_processes
    if training is not None and step <= images < training.batch_size:
        training.batch_size = images // step * step
        logger.warning("training.batch_size is lowered to %d, as there are %d images", training.batch_size, images)


def open_model(model: ComparedModel, splits: Splits, config: RunConfig) -> Classifier:
    """Build a classifier, with or without a null space; what is untrained in it depends on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_classifier(model, splits, image_size=config.data.image_size, allow_empty=True)


@dataclass(frozen=True)
class Space:
    """One vision-language model's reading of the images.

    `texts` are unit rows (C, n) of the class prompts by class names, since heads may have other classes; `embeddings`
    are (N, n) by the split's name (bank, audit, test).
    """

    label: str
    vlm: VisionLanguageModel
    texts: dict[tuple[str, ...], Tensor]
    embeddings: dict[str, np.ndarray]
    passes: PassSettings

    def setup(self, classifier: Classifier, splits: Splits, model: ComparedModel) -> Setup:
        """Return one classifier in this space; `splits` have its labels."""
        texts = self.texts[splits.class_names]
        return Setup(splits, classifier, self.vlm, texts, self.embeddings, self.passes, model)


def open_spaces(config: Any, splits: Splits, names: Sequence[tuple[str, ...]], accelerator: Accelerator) -> list[Space]:
    """Open every vision-language model of a configuration, and embed images and the prompts of class names."""
    if not len(splits.audit):
        raise ValueError("no image is left for the auditor; give data.per_class.audit or data.scenes.audit")
    spaces, passes, vlms = [], pass_settings(config, accelerator), [config.vlm, *config.further_vlms]
    for each, label in zip(vlms, space_labels(vlms), strict=True):
        vlm = open_vlm(each, accelerator)
        texts = {every: vlm.embed_classes(every, tuple(each.templates)).to(accelerator.device) for every in names}
        embeddings = embed_splits(vlm, (splits.bank, splits.audit, splits.test), passes)
        spaces.append(Space(label, vlm, texts, embeddings, passes))
    return spaces


def space_labels(vlms: Sequence[VLMConfig]) -> list[str]:
    """Name every space: model and tag, or the folder's name; the same one twice gets a number."""
    parts = [(vlm.name.removeprefix("local-dir:"), vlm.pretrained) for vlm in vlms]
    names = [" ".join(Path(part).name for part in both if part) for both in parts]
    before = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, before, strict=True)]


def look_at_heads(
    models: Sequence[ComparedModel], splits: Splits, config: RunConfig
) -> tuple[list[dict[str, Any]], list[tuple[str, ...]]]:
    """Look at every head before any long work; models that cannot be built are named, all of them at once.

    Returns:
        Of every model label, source, passport (None without a linear head) and why it is omitted, or None; and the
        class names (C,) that prompts are needed for.
    """
    heads, names, problems = [], [], []
    for place, model in enumerate(models):
        head: dict[str, Any] = {"label": model.known_as, "source": model.name, "passport": None, "omitted": None}
        try:
            classifier = open_model(model, splits, config)
            head["passport"] = passport = {**head_passport(classifier), "tag": model.known_as}
            if NullSpace.from_weight(classifier.weight, invariance=model.invariance, allow_empty=True).nullity:
                labelled = labels_for_head(splits, classifier, model)
                try_one_batch(labelled, classifier, model)
                names.append(labelled.class_names)
            else:
                sizes = f"{passport['classes']} classes fill all {passport['features']} features"
                head["omitted"] = f"no null space: {sizes}, every direction moves a logit"
        except HeadError as error:
            head["omitted"] = f"no linear head: {error}"
        except (ValueError, RuntimeError, OSError) as error:
            problems.append(f"models[{place}] ({model.known_as}): {error}")
        heads.append(head)
    if problems:
        raise ValueError("\n".join(problems))
    return heads, list(dict.fromkeys(names))
