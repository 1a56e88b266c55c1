"""Ten-line classifiers with every kind of head, untrained timm models, and a tiny open_clip model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from singreg.models.classifier import Classifier

WIDTH, CLASSES = 12, 5
TINY_CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def images(count: int = 3, size: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def shake(model: nn.Module, seed: int = 0, strength: float = 0.02) -> None:
    """Move every parameter and statistic away from its initial value (zeros, ones), so that no two are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(strength * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))


class Net(nn.Module):
    """Convolution, batch norm, pooling, and whatever head is given: (B, 3, H, W) to (B, C)."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        # timm's models with `use_conv` give their head a map of one place, and that is what drop_null keeps.
        self.flat, self.head = nn.Identity() if isinstance(head, nn.Conv2d) else nn.Flatten(), head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.flat(self.body(x)))
        return logits.flatten(1)

    def reset_classifier(self, num_classes: int) -> None:
        """As timm has it, for a head of batch norm and linear: all of it is made anew."""
        self.head = batch_norm_head(num_classes)


class CosineLinear(nn.Linear):
    """A linear layer that normalises its weight and input: no affine map of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight), self.bias)


def batch_norm_head(classes: int = CLASSES, *, affine: bool = True, bias: bool = True) -> nn.Sequential:
    head = nn.Sequential(nn.BatchNorm1d(WIDTH, affine=affine), nn.Dropout(0.5), nn.Linear(WIDTH, classes, bias=bias))
    shake(head, strength=0.5)
    return head


def deficient_head() -> nn.Linear:
    """Five rows of rank 2, exactly: rows 3 to 5 are twice or four times the others."""
    head = nn.Linear(WIDTH, CLASSES)
    with torch.no_grad():
        head.weight[2:] = head.weight[[0, 1, 0]] * torch.tensor([2.0, 4.0, -2.0])[:, None]
    return head


HEADS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, CLASSES),
    "no bias": lambda: nn.Linear(WIDTH, CLASSES, bias=False),
    "convolution": lambda: nn.Conv2d(WIDTH, CLASSES, 1),
    "rank 2": deficient_head,
    "batch norm": batch_norm_head,
    "batch norm without affine": lambda: batch_norm_head(affine=False),
    "batch norm without bias": lambda: batch_norm_head(bias=False),
}


def net(kind: str) -> nn.Module:
    """A network in float64 with one of the `HEADS`, far from its initial values."""
    torch.manual_seed(0)
    made = Net(HEADS[kind]())
    shake(made.body, strength=0.3)
    return made.double()


def tiny_state(seed: int = 0, *, quick_gelu: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny CLIP in eval mode and its state, drawn with a seed."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**json.loads(json.dumps(TINY_CONFIG)), quick_gelu=quick_gelu).eval()
    return model, {name: value.clone().contiguous() for name, value in model.state_dict().items()}


def write_tiny_vlm(folder: Path, seed: int = 0) -> str:
    """Write an open_clip folder and return its name for `from_open_clip`."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    preprocess = {**numbers, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": TINY_CONFIG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(tiny_state(seed)[1], folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def used(name: str = "test_resnet", *, seed: int = 0, strength: float = 0.02, **options: Any) -> Classifier:
    """An untrained classifier with weights and statistics far from their initial values."""
    torch.manual_seed(seed)
    classifier = Classifier.from_timm(name, **{"pretrained": False, "num_classes": 7, "image_size": 32, **options})
    shake(classifier.model, seed, strength)
    return classifier


def on_meta(name: str, **options: Any) -> Classifier:
    """Shapes without memory: a 300 M parameter model in milliseconds."""
    with torch.device("meta"):
        return Classifier.from_timm(name, pretrained=False, **options)


def logits_of(model: nn.Module, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(images() if x is None else x)
    return logits


def check_contract(classifier: Classifier, x: Tensor) -> None:
    """features(x) then logits(features), and W f + b, are what the model itself returns in eval mode."""
    assert not any(module.training for module in classifier.modules())
    with torch.no_grad():
        for parameter in classifier.head.parameters():  # else an untrained network's logits are little but the bias
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        features = classifier.features(x)
        linear = features @ classifier.weight.T
        scale = linear.abs().max()
        assert (features[0] - features[1]).abs().max() > 0
        if isinstance(own := getattr(classifier.head, "bias", None), Tensor):
            own.copy_(torch.linspace(-1, 1, len(own)) * scale)
        expected = classifier.model(x)
        both = classifier.features_and_logits(x)
        assert torch.equal(both[0], features)
        assert torch.equal(both[1], expected)
        assert torch.equal(classifier(x), expected)
        bias = classifier.bias
        for mine in (classifier.logits(features), linear + (0 if bias is None else bias)):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5 * float(scale))
    assert features.shape == (len(x), classifier.feature_dim)
    assert classifier.weight.shape == (expected.shape[1], features.shape[1])
    assert (classifier.num_classes, classifier.feature_dim) == classifier.weight.shape
