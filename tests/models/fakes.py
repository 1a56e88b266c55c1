"""Ten-line models with every kind of head, and small helpers for the tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, CLASSES = 12, 5


def images(count: int = 3, size: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def shake(model: nn.Module, seed: int = 0, strength: float = 0.02) -> None:
    """Move every parameter and statistic away from its initial value (zeros, ones), so that no two of them are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(strength * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))


class Net(nn.Module):
    """Convolution, batch norm, pooling, and whatever head is given: (B, 3, H, W) to (B, C)."""

    def __init__(self, head: nn.Module, *, pool: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1) if pool else nn.Identity()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(self.body(x))
        return self.head(pooled if isinstance(self.head, nn.Conv2d) else pooled.flatten(1)).flatten(1)

    def reset_classifier(self, num_classes: int) -> None:
        """As timm has it, for a head of batch norm and linear: all of it is made anew."""
        self.head = batch_norm_head(num_classes)


def batch_norm_head(classes: int = CLASSES, *, affine: bool = True, bias: bool = True) -> nn.Sequential:
    head = nn.Sequential(nn.BatchNorm1d(WIDTH, affine=affine), nn.Dropout(0.5), nn.Linear(WIDTH, classes, bias=bias))
    shake(head, strength=0.5)
    return head


class CosineLinear(nn.Linear):
    """A linear layer that normalises its weight and input: no affine map of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight), self.bias)


class TwoHeads(nn.Module):
    """Averages the logits of two linear layers, as distilled models do."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.head_dist = nn.Linear(48, CLASSES), nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return (self.head(x.flatten(1)) + self.head_dist(x.flatten(1))) / 2


class Scaled(nn.Module):
    """Does something to a model's output: `after` is applied to the logits."""

    def __init__(self, after: object) -> None:
        super().__init__()
        self.fc, self.after = nn.Linear(48, CLASSES), after

    def forward(self, x: Tensor) -> object:
        return self.after(self.fc(x.flatten(1)))  # type: ignore[operator]
