"""One training step as a module, what the optimiser is given, the steps' layout, the loop's translator (METHOD 6)."""

import copy
import math
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2, list_optimizers  # type: ignore[attr-defined]
from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from singreg.analysis.features import FittedTranslator, gathered, iterate_features
from singreg.classes import imagenet_names
from singreg.config import FinetuneConfig
from singreg.data.embeddings import take_rows
from singreg.data.splits import ImageSplit, Splits
from singreg.losses import SingLoss, resolve_terms
from singreg.models.classifier import Classifier
from singreg.ridge import RidgeStatistics
from singreg.setup import Setup
from singreg.translator import LinearTranslator

LR_WARMUP = 0.1  # share of the steps with a linear warm-up of the learning rate
PLACEBO_SEED = 20261  # fixed, so that every process and every resumed run draws the same
WARMUP, RAMP = 0.1, 0.2  # shares of the steps with λ = 0, and of the cosine ramp that follows


class FinetuneTask(nn.Module):
    """Cross-entropy + SingLoss + ½ · l2_sp · |θ - θ0|² over the trained backbone, in one forward (METHOD section 6).

    Everything trainable goes through it, so that DDP sees all of it. With `clean` views, which the vision-language
    model embedded, the SING terms read those and cross-entropy the augmented ones. θ0, the weights at construction, is
    not in checkpoints: a resumed run builds the task from the same classifier.

    Args:
        sing: None for the control.
        compile: hand timm's `forward_features` to torch.compile; the head stays as it is, for its weight's gradient.

    Shape:
        images and clean (B, 3, H, W), labels (B,), embeddings (B, n) of the clean images by the vision-language model.

    Returns:
        {"loss": (), "ce": (), "correct": (), ...terms}, all but "loss" detached.
    """

    def __init__(
        self, classifier: Classifier, sing: SingLoss | None = None, *, l2_sp: float = 0.0, compile: bool = False
    ) -> None:
        super().__init__()
        self.classifier, self.sing, self.l2_sp = classifier, sing, l2_sp
        self._compiled = torch.compile(classifier.model.forward_features) if compile else None  # type: ignore[arg-type]
        backbone = trained_parameters(classifier, head=False) if l2_sp else []
        self._start = [parameter.detach().clone() for parameter in backbone]

    def forward(
        self, images: Tensor, labels: Tensor, clean: Tensor | None = None, embeddings: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return one step's loss and its named parts."""
        own = vars(self.classifier.model)
        if self._compiled is not None:  # the model's own `forward` finds it; copies made later do not
            own["forward_features"] = self._compiled
        features, logits = self.classifier.features_and_logits(images)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        if self.sing is not None and clean is not None:  # dropout rests, as the translator was fitted
            training = self.classifier.training
            features = self.classifier.eval().features(clean)
            self.classifier.train(training)
        own.pop("forward_features", None)
        outputs = {"ce": loss.detach(), "correct": (logits.detach().argmax(1) == labels).float().mean()}
        if self.sing is not None:
            loss = loss + self.sing(features, labels, embeddings)
            outputs |= self.sing.last_terms
        if self.l2_sp:
            pairs = zip(trained_parameters(self.classifier, head=False), self._start, strict=True)
            moved = [loss.new_zeros(()), *((now - start).square().sum() for now, start in pairs)]
            penalty = 0.5 * self.l2_sp * torch.stack(moved).sum()
            loss, outputs["l2_sp"] = loss + penalty, penalty.detach()
        return {"loss": loss, **outputs}


def make_sing(config: FinetuneConfig, setup: Setup, fitted: FittedTranslator, forwards: int) -> SingLoss:
    """Build a configuration's SingLoss; λ's schedule follows from the number of training images and forwards a step."""
    total, loss, texts = Schedule(config, len(setup.splits.train)).total, config.loss, loss_texts(config, setup)
    options: dict[str, Any] = {"floor": loss.floor, "invariance": config.model.invariance, "weight": loss.weight}
    options |= {"terms": resolve_terms(loss.terms), "accumulation": forwards}
    options["everywhere"] = loss.placebo == "everywhere"
    options |= {"warmup_steps": round(WARMUP * total), "ramp_steps": round(RAMP * total)}
    return SingLoss(setup.classifier, fitted.translator, texts, fitted.statistics, **options).to(texts.device)


def loss_texts(config: FinetuneConfig, setup: Setup) -> Tensor:
    """Return the prompts (C, n) that the loss is given: the classes', or a placebo's."""
    placebo = config.loss.placebo
    if placebo == "random":
        drawn = torch.randn(setup.texts.shape, generator=torch.Generator().manual_seed(PLACEBO_SEED))
        return nn.functional.normalize(drawn, dim=1).to(setup.texts)
    if placebo == "foreign":
        classes = setup.splits.class_names
        others = [name for name in imagenet_names() if name not in classes]
        if len(others) < len(classes):
            wanted = f"{len(classes)} ImageNet classes that are not in the data"
            raise ValueError(f"loss.placebo: foreign needs {wanted}, got {len(others)}; use random or shuffled")
        spaced = others[:: len(imagenet_names()) // len(classes)][: len(classes)]
        return setup.vlm.embed_classes(spaced, tuple(config.vlm.templates)).to(setup.texts)
    return setup.texts


def loss_embeddings(config: FinetuneConfig, setup: Setup) -> np.ndarray:
    """Return the embeddings (N, n) of the bank's images that the loop is given; a placebo shuffles them."""
    bank = setup.embeddings["bank"]
    shuffled = config.loss.placebo == "shuffled"
    return bank[np.random.default_rng(PLACEBO_SEED).permutation(len(bank))] if shuffled else bank


def trained_parameters(classifier: Classifier, *, head: bool) -> list[nn.Parameter]:
    """Return the parameters that train, of the head or of all else, in the module's order."""
    own = {id(parameter) for parameter in classifier.head.parameters()}
    return [each for each in classifier.parameters() if each.requires_grad and (id(each) in own) == head]


def parameter_groups(classifier: Classifier, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Return groups to train: the head at `head_factor` times the rate; no decay on norms and biases (shape (k,))."""
    training, groups = config.training, []
    for head, factor in ((False, 1.0), (True, training.head_factor)):
        for flat, decay in ((False, training.weight_decay), (True, 0.0)):
            chosen = [each for each in trained_parameters(classifier, head=head) if (each.ndim <= 1) == flat]
            groups.append({"params": chosen, "lr": factor * training.learning_rate, "weight_decay": decay})
    return [group for group in groups if group["params"]]


def make_optimizer(classifier: Classifier, config: FinetuneConfig) -> Optimizer:
    """Build timm's optimiser of the name given over our own groups; one that cannot be made is refused."""
    name = config.training.optimizer
    try:
        optimizer = create_optimizer_v2(parameter_groups(classifier, config), name, config.training.learning_rate)
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        near = ", ".join(get_close_matches(name, list_optimizers(), 5)) or "adamw, sgd, lamb, lion"  # type: ignore[arg-type]
        raise ValueError(f"training.optimizer: timm cannot make {name!r} ({error}); names near it: {near}") from error
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(f"training.optimizer: {name} needs second derivatives, which training does not take")
    return optimizer


class Schedule:
    """An arm's optimiser steps for a number of images; the last incomplete batch of an epoch is dropped.

    After the steps `refresh_at` the loop's translator is refitted.
    """

    def __init__(self, config: FinetuneConfig, images: int) -> None:
        training, count = config.training, config.translator.refreshes + 1
        self.steps_per_epoch = images // training.batch_size
        if self.steps_per_epoch == 0 and training.epochs:
            wanted = f"at least training.batch_size = {training.batch_size} training images"
            raise ValueError(f"expected {wanted}, got {images}; lower the batch size or give more images")
        total = self.total = self.steps_per_epoch * training.epochs
        self.name, self.warmup = training.schedule, max(1, math.ceil(LR_WARMUP * total))
        self.refresh_at = sorted({round(total * i / count) for i in range(1, count)} - {0, total})

    def rates(self, optimizer: Optimizer) -> Scheduler:
        """Return timm's schedule; its `step_update(number)`, from 1, sets the rates of a step before it is taken.

        The last step comes just before the rates reach their end, or it would be one of rate 0.
        """
        span = max(1, self.total - self.warmup + 1)
        scheduler: Scheduler = create_scheduler_v2(
            optimizer,
            self.name,
            num_epochs=span,
            warmup_epochs=self.warmup,
            warmup_prefix=True,
            warmup_lr=0.0,
            decay_epochs=max(1.0, span / 3),
            decay_milestones=[round(span / 3), round(2 * span / 3)],
            decay_rate=1.0 if self.name == "poly" else 0.1,  # timm's factory takes poly's power by this name
            step_on_epochs=False,
            updates_per_epoch=1,
        )[0]
        return scheduler


def describe_training(config: FinetuneConfig, accelerator: Accelerator, classifier: Classifier, images: int) -> str:
    """Say what training takes in steps, weights and memory; refuse batches that cannot be split."""
    micro_batch(config, accelerator)
    schedule = Schedule(config, images)
    tuned = copy.deepcopy(classifier).tune(config.model.tuning)
    make_optimizer(tuned, config)
    every = sum(parameter.numel() for parameter in tuned.parameters())
    trained = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    return (
        f"steps: {schedule.total} ({schedule.steps_per_epoch} an epoch), translator refreshed after "
        f"{schedule.refresh_at}\nclassifier {tuned.tag}: {tuned.num_classes} classes, {tuned.feature_dim} features, "
        f"{trained:,} of {every:,} weights trained; {4 * (every + 3 * trained) / 2**20:.0f} MiB with the optimiser, "
        "beside activations"
    )


def micro_batch(config: FinetuneConfig, accelerator: Accelerator) -> int:
    """Return the images of one forward over all processes; a batch that cannot be split evenly is refused."""
    accumulation, processes = int(accelerator.gradient_accumulation_steps), accelerator.num_processes
    micro, rest = divmod(config.training.batch_size, accumulation)
    if rest or micro % processes:
        parts = f"{accumulation} accumulation step(s) over {processes} process(es)"
        wrong = f"training.batch_size = {config.training.batch_size} cannot be split evenly into {parts}"
        raise ValueError(f"{wrong}; choose a multiple of their product")
    return micro


class LoopTranslator:
    """Refits the loss's translator, metric and readout for the setup's classifier, at the ridge of the first, `fitted`.

    `embeddings` (N, n) are those of the bank, or a placebo's in their place. Without a loss there is nothing to refit.
    """

    def __init__(
        self, fitted: FittedTranslator, setup: Setup, embeddings: np.ndarray, sing: SingLoss | None = None
    ) -> None:
        self.first, self.info, self.statistics = fitted.translator, fitted.translator.info, fitted.statistics
        self.setup, self.bank, self.embeddings = setup, loop_bank(setup.splits, embeddings), embeddings
        self.sing = sing

    @property
    def current(self) -> LinearTranslator:
        """The translator the loss reads now; without a loss, the first."""
        sing = self.sing
        return self.first if sing is None else LinearTranslator(sing.matrix, sing.offset, self.info)

    def seen(self, indices: Tensor, device: torch.device) -> Tensor:
        """Return the embeddings (B, n) of the training images at indices (B,): they are the bank's first."""
        return take_rows(self.embeddings, indices.cpu().numpy()).to(device)

    def refresh(self) -> None:
        """Encode the bank with today's classifier and refit on it."""
        if self.sing is None:
            return
        setup, said = self.setup, "refreshing the translator"
        fresh = RidgeStatistics(*self.statistics.fz.shape, device=setup.texts.device)
        for batch in gathered(iterate_features(setup.classifier, *self.bank, setup.passes, said)):
            fresh.update(batch.features, batch.embeddings)
        self.statistics = fresh.reduce()
        self.refit()

    def refit(self) -> None:
        """Solve again for today's head, without encoding an image."""
        if self.sing is None:
            return
        self.info = replace(self.info, head_hash=self.setup.classifier.head_hash())
        solution = self.statistics.solve(self.info.ridge, standardize=self.setup.space.basis)
        self.sing.set_translator(LinearTranslator.from_solution(solution, self.info), self.statistics)


def loop_bank(splits: Splits, embeddings: np.ndarray) -> tuple[ImageSplit, np.ndarray]:
    """Return the images that the loop's translator is fitted on, with their rows of the bank's embeddings (N, n).

    They are the bank's without the training images, whose features are overfitted, if as many others are there.
    """
    bank, training = splits.bank, len(splits.train)
    start = training if len(bank) >= 2 * training else 0
    return bank.subset(np.arange(start, len(bank))), embeddings[start:]
