"""What the examples share: the built-in scenes with their embeddings, the loss for a classifier, AS and IS of one."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import singreg
from singreg.config import DataConfig, located
from singreg.data.splits import make_loader

parser = argparse.ArgumentParser()
parser.add_argument("--images", type=int, default=1000, help="in each split")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--accumulate", type=int, default=1, help="batches of one optimiser step")
parser.add_argument("--bf16", action="store_true", help="mixed precision")
parser.add_argument("--folder", type=Path, help="an existing one for checkpoints; training goes on from that in it")


class Scenes(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Training images, labels and the vision-language model's embeddings. What yours would be stands on the right."""

    def __init__(self, images: int) -> None:
        counts = dict.fromkeys(("train", "bank", "audit", "test"), images)
        splits = singreg.load_splits(DataConfig(scenes={**counts, "bias": 0.6}))  # source="FOLDER"
        self.classifier = singreg.Classifier.from_timm(located("demo", "classifier"))  # "resnet50.tv_in1k"
        vlm = singreg.VisionLanguageModel.from_open_clip(located("demo", "vlm"))  # "ViT-L-14", "openai"
        self.texts = vlm.embed_classes(splits.class_names)
        self.train, bank, self.audit, self.test = splits
        self.bank = bank.subset(range(images, 2 * images))  # without the training images, which come first
        used = {"train": self.train, "bank": self.bank, "audit": self.audit, "test": self.test}
        self.seen = {name: singreg.cached_embeddings(vlm, split, progress=False) for name, split in used.items()}

    def __len__(self) -> int:
        return len(self.train)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, label = self.classifier.transform(self.train.image(index)), torch.tensor(self.train.labels[index])
        return {"images": image, "labels": label, "embeddings": torch.tensor(self.seen["train"][index])}

    def sing_loss(self, classifier: singreg.Classifier) -> singreg.SingLoss:
        """Return the loss, with a translator of images that are not trained on."""
        fitted = singreg.fit_on_split(classifier, self.bank, self.seen["bank"])
        return singreg.SingLoss(classifier, fitted.translator, self.texts, fitted.statistics)

    def refresh(self, task: Task) -> None:
        """Let the loss's translator follow the classifier; once an epoch is often enough."""
        fitted = singreg.fit_on_split(task.classifier, self.bank, self.seen["bank"])
        task.sing.set_translator(fitted.translator, fitted.statistics)

    @torch.no_grad()
    def measure(self, when: str, classifier: singreg.Classifier) -> None:
        """Print AS and IS by an auditor, a translator of images that neither training nor the loss saw."""
        auditor = singreg.fit_on_split(classifier, self.audit, self.seen["audit"]).translator
        space, metric = singreg.NullSpace.from_weight(classifier.weight), singreg.SemanticLeakage(self.texts)
        for images, labels, _ in make_loader(self.test, self.classifier.transform, 64):
            features = classifier.eval().features(images)
            metric.update(auditor(features), auditor(space.remove(features)), labels)
        scores = metric.compute()
        print(when, ", ".join(f"{name} {scores[name]:.2f}°" for name in ("AS_neg", "AS_abs", "IS")), flush=True)


class Task(nn.Module):
    """Cross-entropy and SingLoss in one forward, so that whatever wraps a model (DDP, a trainer) sees all of it."""

    def __init__(self, classifier: singreg.Classifier, sing: singreg.SingLoss) -> None:
        super().__init__()
        self.classifier, self.sing = classifier, sing

    def forward(self, images: Tensor, labels: Tensor, embeddings: Tensor) -> dict[str, Tensor]:
        features, logits = self.classifier.features_and_logits(images)
        loss = nn.functional.cross_entropy(logits, labels) + self.sing(features, labels, embeddings)
        return {"loss": loss, "output": logits}
