"""Hugging Face's Trainer and a model of transformers: here the packaged one, a ViT in the same way.

On one process or, by `torchrun --nproc_per_node 2 recipes/examples/hf_trainer.py`, on two.
"""

import os
from typing import Any

from scenes import Scenes, Task, parser
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback, TrainingArguments

from singreg import Classifier
from singreg.config import ASSETS


class Logits(nn.Module):
    """transformers' models return an object; singreg asks for the logits themselves."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


class Refresh(TrainerCallback):
    """Let the translator follow the classifier."""

    def on_epoch_end(self, *arguments: Any, **named: Any) -> None:
        scenes.refresh(task)


args = parser.parse_args()
scenes = Scenes(args.images)
# Of a ViT, `from_pretrained("google/vit-base-patch16-224")` here and head="model.classifier" below.
model = AutoModelForImageClassification.from_pretrained(ASSETS / "demo_classifier", model_args={})
classifier = Classifier.from_module(Logits(model), "model.timm_model.classifier", transform=scenes.classifier.transform)
scenes.measure("before", classifier)
task = Task(classifier, scenes.sing_loss(classifier))
settings = TrainingArguments(
    args.folder or "runs/hf_trainer",
    num_train_epochs=args.epochs,
    per_device_train_batch_size=32 // int(os.environ.get("WORLD_SIZE", 1)),
    gradient_accumulation_steps=args.accumulate,
    learning_rate=1e-3,
    lr_scheduler_type="constant",  # that a run with fewer epochs can be resumed with more
    bf16=args.bf16,
    save_strategy="epoch" if args.folder else "no",
    report_to="none",
    use_cpu=True,
    ddp_find_unused_parameters=False,
)
trainer = Trainer(task, settings, train_dataset=scenes, callbacks=[Refresh()])
trainer.train(resume_from_checkpoint=bool(args.folder and any(args.folder.glob("checkpoint-*"))))
scenes.measure("after", classifier)
