"""A plain PyTorch loop, on one process or, by `torchrun --nproc_per_node 2 recipes/examples/plain_torch.py`, on two."""

import os

import torch
from scenes import Scenes, Task, parser
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

parser.add_argument("--compile", action="store_true")
args, rank, world = parser.parse_args(), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    torch.distributed.init_process_group("gloo")  # "nccl" on GPUs
scenes = Scenes(args.images)
classifier = scenes.classifier
scenes.measure("before", classifier)
task = Task(classifier, scenes.sing_loss(classifier))
if args.compile:  # the backbone alone: SingLoss differentiates the head's weight
    classifier.model.forward_features = torch.compile(classifier.model.forward_features)
model = DistributedDataParallel(task) if world > 1 else task
optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
sampler = DistributedSampler(scenes, world, rank)
loader = DataLoader(scenes, 32 // world, sampler=sampler, drop_last=True)
start, checkpoint = 0, args.folder and args.folder / "checkpoint.pt"
if checkpoint and checkpoint.exists():
    state = torch.load(checkpoint, weights_only=True)
    task.load_state_dict(state["task"])
    optimizer.load_state_dict(state["optimizer"])
    start = state["epoch"]
for epoch in range(start, args.epochs):
    sampler.set_epoch(epoch)
    model.train()
    for number, batch in enumerate(loader, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = model(**batch)["loss"]
        (loss / args.accumulate).backward()
        if number % args.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    scenes.refresh(task)
    if checkpoint and rank == 0:
        torch.save({"task": task.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, checkpoint)
scenes.measure("after", classifier)
