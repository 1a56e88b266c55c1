"""What a pixel attack stands on: the pictures and their targets, the image encoders, every model; complaints come before long work."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import normalize

from singreg.analysis.features import PassSettings
from singreg.analysis.pixels.judges import Reader, encoder_reader
from singreg.analysis.pixels.model import PixelModel
from singreg.data.classes import resolve_classes
from singreg.data.datasets import ImageSplit, Splits, load_splits
from singreg.evaluation.compare_bench import ModelBench, refuse_unknown_names, space_labels
from singreg.evaluation.steer_config import ALL, names_of
from singreg.evaluation.steer_pixels_config import AttackedModelConfig, PixelsConfig
from singreg.models.classifier import Classifier
from singreg.models.edits import drop_null
from singreg.translator import TranslatorInfo
from singreg.utils import sha256_of_json
from singreg.workbench.build import build_classifier, embed_parts, labels_for_head, open_vlm


@dataclass
class Encoder:
    """A real image encoder as a judge. texts (C, n) of the data's classes; embeddings (N, n) by part; info for translators."""

    reader: Reader
    texts: Tensor
    embeddings: dict[str, np.ndarray]
    info: TranslatorInfo


@dataclass(frozen=True)
class Chosen:
    """The attacked pictures: places in the test part, labels and target classes among the data's, (M,); names left out."""

    indices: np.ndarray
    labels: np.ndarray
    targets: np.ndarray
    left_out: tuple[str, ...]


@dataclass
class PixelsBench:
    """The pictures and their targets, the encoders by name (the first is what translators imitate), how pictures are read."""

    accelerator: Accelerator
    pictures: Splits
    chosen: Chosen
    encoders: dict[str, Encoder]
    settings: PassSettings

    @classmethod
    def build(cls, config: PixelsConfig, accelerator: Accelerator) -> PixelsBench:
        """Load data, choose pictures and targets, look at every model, then open and embed in every encoder (no shapes).

        Raises:
            ValueError: models that cannot be built, all at once; an empty audit part; targets that do not exist or are the source;
                nothing but pictures of one colour.
        """
        refuse_unknown_names(config.models)
        pictures = load_splits(replace(config.data, cache_dir=config.data.cache_dir or config.cache))
        if not len(pictures.audit):
            raise ValueError("the audit part is empty, so no auditor could be fitted; give data.audit_per_class or unlabeled pictures")
        chosen = choose_pictures(pictures.test, config.pictures, config.targets, config.seed)
        _look_at_models(config, pictures)
        labels = space_labels(config.vlms)
        encoders = {}
        for vlm_config, label in zip(config.vlms, labels, strict=True):
            vlm = open_vlm(vlm_config, accelerator)
            embeddings = embed_parts(
                vlm, (pictures.bank, pictures.audit, pictures.test), config.cache,
                batch_size=vlm_config.batch_size, workers=config.data.workers, progress=accelerator.is_local_main_process,
            )  # fmt: skip
            texts = vlm.embed_classes(pictures.class_names, tuple(vlm_config.templates))
            info = TranslatorInfo(
                vlm=vlm.tag, vlm_weights_hash=vlm.weights_hash, vlm_preprocessing=sha256_of_json(vlm.preprocessing),
                normalized_targets=config.translator.normalize_targets,
            )  # fmt: skip
            encoders[label] = Encoder(encoder_reader(vlm, texts), texts.to(accelerator.device), embeddings, info)
        settings = PassSettings(config.batch_size, config.data.workers, accelerator.is_local_main_process, config.cache)
        return cls(accelerator, pictures, chosen, encoders, settings)

    def zero_shot(self) -> dict[str, float]:
        """By encoder, the share of the chosen untouched pictures that its class prompts name rightly (in [0, 1])."""
        found = {}
        for name, encoder in self.encoders.items():
            z = torch.from_numpy(np.asarray(encoder.embeddings["test"][self.chosen.indices])).to(encoder.texts)
            right = (normalize(z, dim=-1) @ encoder.texts.T).argmax(1).cpu().numpy() == self.chosen.labels
            found[name] = float(right.mean())
        return found

    def model_bench(self, classifier: Classifier, model: AttackedModelConfig) -> ModelBench:
        """The classifier in the first encoder's space, for fitting translators (shapes as in `Bench`)."""
        first = next(iter(self.encoders.values()))
        info = replace(
            first.info, classifier=classifier.tag, head_hash=classifier.head_hash(),
            classifier_preprocessing=sha256_of_json(classifier.preprocessing),
        )  # fmt: skip
        parts = labels_for_head(self.pictures, classifier, model.resolved())
        return ModelBench(classifier, parts, first.texts, first.embeddings, info, self.settings)


def open_attacked(config: PixelsConfig, model: AttackedModelConfig, pictures: Splits, device: torch.device) -> tuple[Classifier, Classifier]:
    """(the classifier that translators are fitted on, the one that is attacked): two only where the null space is dropped.

    Raises:
        ValueError: `drop_null` of a head that has no null space, and what `build_classifier` refuses (head (C, m)).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # what is untrained hangs on the seed
        classifier = build_classifier(model.resolved(), pictures, image_size=config.data.image_size, allow_empty=True)
    classifier = classifier.to(device).eval().requires_grad_(False)
    return classifier, drop_null(classifier).eval() if model.drop_null else classifier


def _look_at_models(config: PixelsConfig, pictures: Splits) -> None:
    problems = []
    for place, model in enumerate(config.models):
        try:
            classifier, attacked = open_attacked(config, model, pictures, torch.device("cpu"))
            labels_for_head(pictures, classifier, model.resolved())
            PixelModel.of(attacked)
        except (ValueError, RuntimeError, OSError) as error:
            problems.append(f"models[{place}] ({model.known_as}): {error}")
    if problems:
        raise ValueError("\n".join(problems))


def choose_pictures(part: ImageSplit, count: int, targets: list[str] | str, seed: int) -> Chosen:
    """`count` labelled pictures, evenly over classes, and a target class other than its own for each, drawn by the seed.

    Pictures of one colour are left out and named. Shapes: (M,), M at most `count`.

    Raises:
        ValueError: unknown target names; a class that is the only target of its own pictures; nothing but one-coloured pictures.
    """
    names = part.class_names
    wanted = names_of(targets)
    allowed = list(range(len(names))) if wanted == [ALL] else [names.index(name) for name in resolve_classes(wanted, names).keys]
    rng = np.random.default_rng([seed, 7])
    order = rng.permutation(np.flatnonzero(part.labels >= 0))
    rank = np.zeros(len(order), dtype=np.int64)
    for label in np.unique(part.labels[order]):
        mine = part.labels[order] == label
        rank[mine] = np.arange(mine.sum())
    kept: list[int] = []
    left_out: list[str] = []
    for index in order[np.lexsort((part.labels[order], rank))]:
        if len(kept) == count:
            break
        if _one_colour(part, int(index)):
            left_out.append(part.identifier(int(index)))
        else:
            kept.append(int(index))
    if not kept:
        raise ValueError(
            f"all {len(left_out)} labelled test pictures are of one colour: nothing is to be seen in them, so nothing can be steered"
            if left_out else "no test picture has a label, so there is none to steer"
        )  # fmt: skip
    labels = part.labels[kept]
    own = sorted({names[label] for label in labels if not {*allowed} - {int(label)}})
    if own:
        raise ValueError(
            f"targets: {', '.join(own)} is the only target of its own pictures; a target must not equal the source, so name another class"
        )
    drawn = np.array([rng.choice([target for target in allowed if target != label]) for label in labels])
    return Chosen(np.array(kept), labels, drawn, tuple(left_out))


def _one_colour(part: ImageSplit, index: int) -> bool:
    pixels = np.asarray(part.image(index).convert("RGB"))
    return bool((pixels == pixels[:1, :1]).all())
