"""A LightningModule: the embeddings come with the batch, and the translator follows at the end of every epoch."""

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scenes import Scenes, Task, parser
from torch import Tensor


class SingModule(lightning.LightningModule):
    """Training alone: validation and logging stay as in any other module."""

    def __init__(self, task: Task, scenes: Scenes) -> None:
        super().__init__()
        self.task, self.scenes = task, scenes

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.task(**batch)["loss"]

    def on_train_epoch_end(self) -> None:
        self.scenes.refresh(self.task)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.task.parameters(), lr=1e-3)


args = parser.parse_args()
scenes = Scenes(args.images)
scenes.measure("before", scenes.classifier)
module = SingModule(Task(scenes.classifier, scenes.sing_loss(scenes.classifier)), scenes)
trainer = lightning.Trainer(
    accelerator="cpu",
    max_epochs=args.epochs,
    precision="bf16-mixed" if args.bf16 else "32-true",
    accumulate_grad_batches=args.accumulate,
    callbacks=[ModelCheckpoint(args.folder, save_last=True)] if args.folder else None,
    enable_checkpointing=args.folder is not None,
    logger=False,
)
sampler = torch.utils.data.DistributedSampler(scenes, 1, 0)  # Lightning tells it the epoch
loader = torch.utils.data.DataLoader(scenes, 32, sampler=sampler, drop_last=True)
trainer.fit(module.train(), loader, ckpt_path="last" if args.folder else None)
scenes.measure("after", scenes.classifier)
