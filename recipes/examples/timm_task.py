"""timm's own training task, optimiser factory and checkpoints: its train.py needs this task in place of its own."""

from typing import Any

import torch
from scenes import Scenes, Task, parser
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import Tensor, nn


class SingTask(ClassificationTask):
    """Checkpoints hold timm's own model as `state_dict` and the loss as `task_state`."""

    def forward(self, input: Tensor, target: Tensor, embeddings: Tensor) -> dict[str, Tensor]:
        return self.trainable_module(input, target, embeddings)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> Any:
        return None if ema else self.trainable_module.classifier.model

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        return self.trainable_module.sing.state_dict()

    def load_task_state(self, state: Any, **_: Any) -> None:
        self.trainable_module.sing.load_state_dict(state)


args = parser.parse_args()
scenes = Scenes(args.images)
scenes.measure("before", scenes.classifier)
task = SingTask(Task(scenes.classifier, scenes.sing_loss(scenes.classifier)))
optimizer = create_optimizer_v2(scenes.classifier.model, opt="adamw", lr=1e-3, weight_decay=0.01)
saver = args.folder and CheckpointSaver(task, optimizer, checkpoint_dir=args.folder, task=task)
last = args.folder and args.folder / "last.pth.tar"
start = resume_task_checkpoint(task, last, optimizer) if last and last.exists() else 0
for epoch in range(start, args.epochs):
    order = torch.Generator().manual_seed(epoch)
    loader = torch.utils.data.DataLoader(scenes, 32, shuffle=True, drop_last=True, generator=order)
    task.train()
    for number, batch in enumerate(loader, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = task(batch["images"], batch["labels"], batch["embeddings"])["loss"]
        (loss / args.accumulate).backward()
        if number % args.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    scenes.refresh(task.trainable_module)
    if saver:
        saver.save_checkpoint(epoch)
scenes.measure("after", scenes.classifier)
