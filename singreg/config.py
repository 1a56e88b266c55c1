"""What the recipes are told: nested dataclasses, read from YAML and the command line by jsonargparse."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from singreg.parsing import overridden as overridden
from singreg.parsing import parse as parse

# Nothing here imports torch: --help and mistakes are answered before the seconds that takes.
MLPKind = Literal["mlp3", "mlp4", "residual"]
ASSETS = Path(__file__).parent / "assets"
TERMS = {"readout": 1.0, "capacity": 10.0}  # those of losses.py and their weights
SCENES: dict[str, float] = {"train": 2000, "audit": 1600, "test": 1000, "bank": 0, "bias": 0.6, "seed": 0}


class Problems(list[str]):
    """Sentences about what is wrong with a section of a configuration."""

    def need(self, ok: bool, sentence: str) -> None:
        """Add the sentence unless `ok`."""
        if not ok:
            self.append(sentence)

    def within(self, low: float, high: float = math.inf, **values: float | None) -> None:
        """Each named value must be a finite number from `low` to `high`, or None."""
        wanted = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        for name, value in values.items():
            ok = value is None or (low <= value <= high and value < math.inf)
            self.need(ok, f"{name}: expected a number {wanted}, got {value}")

    def keys(self, name: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
        """A mapping may have these keys only."""
        self += [f"{name}.{key}: no such key; known are {', '.join(known)}" for key in sorted(set(given) - set(known))]

    def once(self, name: str, given: Sequence[str]) -> None:
        """Nothing may be listed twice."""
        twice = sorted({each for each in given if given.count(each) > 1})
        self.need(not twice, f"{name}: listed twice: {', '.join(twice)}; leave one out, or call it otherwise")


@dataclass
class Checked:
    """A section of a configuration that says all that is wrong with its values at once; no number is below 0."""

    def __post_init__(self) -> None:
        problems = Problems()
        problems.within(0, **{name: value for name, value in vars(self).items() if isinstance(value, (int, float))})
        self.check(problems)
        if problems:
            raise ValueError("\n".join(problems))

    def check(self, problems: Problems) -> None:
        """Add what is wrong to `problems`."""


@dataclass
class DataConfig(Checked):
    """Which images a run uses.

    Args:
        source: scenes (built in), a folder of SPLIT/CLASS/image files or Parquet files, or a Hugging Face data set.
        train_split: split that training and audit images are drawn from.
        test_split: split that the test images are drawn from.
        classes: wnids or names, a named set (imagenet16, imagenette, imagewoof, imagenet100) or a file; null for all.
        class_names: file of names for prompts and tables, one a line for all classes in order, or "folder: name" lines.
        label_column: column of the labels in Parquet files or a data set; null where there is one, or one called label.
        per_class: images a class for train, audit, test and bank, such as {train: 150}; where a key is missing, test
            takes all, train what audit leaves, audit what train leaves (half if both are missing), bank none.
        unlabeled: folder of further images without labels, for the translators and the auditor.
        unlabeled_to_audit: share of the unlabelled images that the auditor gets; the bank gets the rest.
        scenes: numbers of built-in scenes (train, audit, test, bank), bias (how often a training background follows
            the class) and their seed; a missing key keeps its default.
        image_size: side of the classifier's input in pixels; null for the model's own.
        augmentation: of training images, none, flip or timm (its standard training transform).
        workers: loader processes per training process.
        bad_images: unreadable images, and copies of one image in two splits, stop the run or are dropped.
    """

    source: str = "scenes"
    train_split: str = "train"
    test_split: str = "validation"
    classes: list[str] | str | None = None
    class_names: str | None = None
    label_column: str | None = None
    per_class: dict[str, int] = field(default_factory=dict)
    unlabeled: str | None = None
    unlabeled_to_audit: float = 0.5
    scenes: dict[str, float] = field(default_factory=dict)
    image_size: int | None = None
    augmentation: Literal["none", "flip", "timm"] = "flip"
    workers: int = 0
    bad_images: Literal["stop", "drop"] = "stop"

    def check(self, problems: Problems) -> None:
        problems.keys("per_class", self.per_class, ("train", "audit", "test", "bank"))
        problems.keys("scenes", self.scenes, tuple(SCENES))
        counts = {f"{section}.{k}": v for section in ("per_class", "scenes") for k, v in getattr(self, section).items()}
        for name, count in counts.items():
            least, most = int(name.endswith(("train", "test"))), 1 if name == "scenes.bias" else math.inf
            problems.within(least, most, **{name: count})
        problems.need(self.unlabeled_to_audit <= 1, "unlabeled_to_audit: expected a share from 0 to 1")
        problems.need(self.image_size != 0, "image_size: expected pixels, got 0")
        if self.built_in:
            own = self.classes or self.class_names or self.unlabeled or self.per_class
            problems.need(not own, "source: scenes has no classes, class_names, per_class or unlabeled; leave them out")

    @property
    def built_in(self) -> bool:
        """Whether the source is the built-in scenes: a user's folder goes before a built-in name."""
        return self.source == "scenes" and not Path("scenes").is_dir()


@dataclass
class ModelConfig(Checked):
    """The classifier.

    Args:
        name: any timm name, hf-hub:USER/MODEL, a timm folder or that of a finished fine-tuning run; demo is the small
            one inside the package.
        pretrained: load its weights.
        head: keep all rows of the pretrained head, slice it to the data's classes, or make a new one; auto slices, or
            makes a new one for training where no row is known to be one of the classes.
        label_names: file that names the rows of the pretrained head, one a line; null for the names stored with it.
        tuning: train the head only, the last stage and the head, or all.
        invariance: null space of the logits, or of the softmax (one dimension more).
        compile: train through torch.compile.
    """

    name: str = "demo"
    pretrained: bool = True
    head: Literal["auto", "keep", "slice", "new"] = "auto"
    label_names: str | None = None
    tuning: Literal["head", "last_stage", "all"] = "all"
    invariance: Literal["logits", "softmax"] = "logits"
    compile: bool = False

    def check(self, problems: Problems) -> None:
        problems.need(bool(self.name.strip()), "name: expected words, got a blank")

    @property
    def source(self) -> str:
        """The name as timm takes it (`located`)."""
        return located(self.name, "classifier")

    @property
    def translator(self) -> Path:
        """Where a fine-tuning run keeps the auditor's translator of this model, if it is one of a run."""
        folder = Path(self.source.removeprefix("local-dir:"))
        return folder.with_name(folder.name.replace("model", "translator-after") + ".safetensors")


@dataclass
class ComparedModel(ModelConfig):
    """One of several classifiers.

    Args:
        label: how it is called in the report; null takes the last part of the name.
    """

    label: str | None = None

    def check(self, problems: Problems) -> None:
        super().check(problems)
        problems.need(self.label is None or bool(self.label.strip()), "label: expected words, got a blank")

    @property
    def known_as(self) -> str:
        """The label, or the last part of the name; a run's model is called as the run."""
        path = Path(self.name.partition(":")[2] or self.name)
        run = f"{path.parent.name}{path.name[5:]}" if path.name in ("model", "model-control") else ""
        return self.label or run or path.name or self.name


def located(name: str, kind: str) -> str:
    """Return a model's name as timm or open_clip takes it: a folder, the model in a run's, the packaged one."""
    given = Path(name.removeprefix("local-dir:")).expanduser()
    if name == "demo" and not given.is_dir():
        given = ASSETS / f"demo_{kind}"
    elif not given.is_dir():
        return name
    inner = given / "model"
    return f"local-dir:{inner if (inner / 'config.json').is_file() else given}"


@dataclass
class VLMConfig(Checked):
    """The vision-language model that says what features mean.

    Args:
        name: an open_clip name or a folder of open_clip's; demo is the small one inside the package.
        pretrained: open_clip tag or weights file; null for folders.
        templates: class prompts, each with {class}; several make an ensemble.
    """

    name: str = "demo"
    pretrained: str | None = None
    templates: list[str] = field(default_factory=lambda: ["an image of a {class}"])

    def check(self, problems: Problems) -> None:
        problems.need(bool(self.templates), "templates: expected at least one class prompt")
        for template in self.templates:
            problems.need("{class}" in template, f'templates: {template!r} has no "{{class}}" in it')


@dataclass
class TranslatorConfig(Checked):
    """The translators: one fitted on the bank, the auditor on images of its own.

    Args:
        ridge: relative penalty of both; null lets each choose by its own validation images.
    """

    ridge: float | None = None


@dataclass
class LoopTranslatorConfig(TranslatorConfig):
    """The loop's translator, fitted on the bank, and the auditor.

    Args:
        ridge: relative penalty of both; null lets each choose the one by which two halves of its images agree.
        refreshes: how often, evenly over training, the bank is encoded again and the loop's translator refitted.
    """

    refreshes: int = 6


@dataclass
class LossConfig(Checked):
    """SingLoss (METHOD section 6).

    Args:
        weight: λ after warm-up and ramp.
        terms: weights by term that replace the usual ones, readout 1 and capacity 10; 0 removes a term.
        floor: ε of capacity's metric, which also counts directions that no feature takes; a large one is Euclidean.
        placebo: a control that the true loss must beat. The loss is given random directions for prompts, the prompts
            of classes that are not in the data (foreign), or every image the embedding of another one (shuffled); or
            the readout reads all of f, not the row space alone (everywhere).
    """

    weight: float = 1.0
    terms: dict[str, float] = field(default_factory=dict)
    floor: float = 1.0
    placebo: Literal["none", "random", "foreign", "shuffled", "everywhere"] = "none"

    def check(self, problems: Problems) -> None:
        problems.within(0, **{f"terms.{name}": weight for name, weight in self.terms.items()})
        if set(self.terms) <= set(TERMS) and any(weight > 0 for weight in {**TERMS, **self.terms}.values()):
            return
        from singreg import losses  # which imports torch: for mistakes, and for terms that others have registered

        problems.keys("terms", self.terms, sorted(losses.TERMS))
        problems.need(bool(losses.resolve_terms(self.terms)), "terms: none is left; give one a weight above 0")


@dataclass
class TrainingConfig(Checked):
    """Optimisation, the same for both arms.

    Mixed precision and gradient accumulation are accelerate's own: accelerate launch --mixed_precision bf16, and
    ACCELERATE_GRADIENT_ACCUMULATION_STEPS=2 in the environment (its flag of that name reaches DeepSpeed alone).

    Args:
        optimizer: one that timm makes (timm.optim.list_optimizers()).
        schedule: timm's learning rates after a linear warm-up of a tenth of the steps. With each third of the others
            step and multistep fall to a tenth; wsd and rsqrt decay in the last third; poly falls linearly.
        epochs: passes over the training images; 0 measures only.
        batch_size: images an optimiser step sees, over all processes and accumulation steps.
        learning_rate: peak, after the warm-up.
        head_factor: the head's learning rate is this times learning_rate.
        weight_decay: the optimiser's, of all but norms and biases.
        l2_sp: adds half of this times the squared distance of the backbone from where it began (L2-SP).
        best_checkpoint: keep each arm's epoch with the best top-1 on the validation images, about a tenth of the
            labelled audit images; a number also stops an arm after so many epochs without a better one.
    """

    optimizer: str = "adamw"
    schedule: Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant"] = "cosine"
    epochs: int = 2
    batch_size: int = 32
    learning_rate: float = 2e-4
    head_factor: float = 5.0
    weight_decay: float = 0.01
    l2_sp: float = 0.0
    best_checkpoint: bool | int = False

    def check(self, problems: Problems) -> None:
        for name in ("learning_rate", "head_factor", "batch_size"):
            problems.need(getattr(self, name) != 0, f"{name}: expected a number above 0, got 0")

    @property
    def patience(self) -> int:
        """Epochs without a better one after which an arm stops; 0 trains to the end."""
        return 0 if isinstance(self.best_checkpoint, bool) else self.best_checkpoint


@dataclass
class RunConfig(Checked):
    """What every recipe has.

    Args:
        out: the run's folder.
        seed: every random choice hangs on it.
        dry_run: build everything, run one batch, say what would happen, stop.
        resume: go on with an interrupted run of the same folder and configuration.
        log_with: tracker that accelerate knows (tensorboard, wandb, mlflow, all, ...).
    """

    out: str = "runs/demo"
    seed: int = 0
    dry_run: bool = False
    resume: bool = False
    log_with: str = "tensorboard"
    data: DataConfig = field(default_factory=DataConfig)
    vlm: VLMConfig = field(default_factory=VLMConfig)

    def check(self, problems: Problems) -> None:
        problems.need(bool(Path(self.out).name), f"out: expected a folder, got {self.out!r}")
        problems.need(self.seed < 2**32, f"seed: expected a whole number below {2**32}, got {self.seed}")

    @property
    def folder(self) -> Path:
        """The run's folder as a path."""
        return Path(self.out)


@dataclass
class FinetuneConfig(RunConfig):
    """A run of recipes/finetune.py; every field is a key of the YAML and a flag of the command line.

    Args:
        push_to_hub: USER/NAME on the Hugging Face hub that the model of SingLoss is uploaded to.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    translator: LoopTranslatorConfig = field(default_factory=LoopTranslatorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    push_to_hub: str | None = None

    def check(self, problems: Problems) -> None:
        super().check(problems)
        hub = self.push_to_hub
        problems.need(hub is None or bool(re.fullmatch(r"[\w.-]+/[\w.-]+", hub)), "push_to_hub: expected USER/NAME")
